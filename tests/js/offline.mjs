// Five hundred events that were said while there was no connection, against a server that takes a hundred a second.
//
// node offline.mjs http://127.0.0.1:8000; prints how many arrived, and in which order, at another client.

import { connect } from "../../starlette_rt/statics/starlette-rt.js";

const [, , base] = process.argv;
const EVENTS = 500;
let online = false;

class Patchy extends WebSocket {
  constructor(url, protocols) {
    super(online ? url : "ws://127.0.0.1:9/", protocols); // nobody listens there
  }
}

const group = `hist:${Math.random()}`;
const other = connect(`${base}/ws`);
const heard = [];
const hearing = other.join(group);
hearing.on("said", ({ text }) => heard.push(Number(text)));
await hearing.ready;

const rt = connect(`${base}/tight`, { WebSocket: Patchy, backoff: { base: 20, cap: 100 } });
const board = rt.join(group);
const answers = Array.from({ length: EVENTS }, (_, number) => board.emit("say", { text: String(number) }));
const queued = rt.pending;
online = true;
const numbers = (await Promise.all(answers)).map(({ n }) => n);
while (heard.length < EVENTS) await new Promise((resolve) => setTimeout(resolve, 20));
await new Promise((resolve) => other.emit("add", { a: 1, b: 2 }).then(resolve)); // what would come twice has come by now
console.log(JSON.stringify({ queued, heard, numbers, code: rt.state }));
process.exit(0);
