// The HTTP side of the Node.js contenders on one node, as apps/control.py is that of the Python ones: it counts the
// members, and makes the contender speak by the same clock. What must not live here: a WebSocket, or anything that
// happens once per delivery.

"use strict";

const { createServer } = require("node:http");

const GROUP = "lobby";
const FRAME = '{"seq":10000000,"pad":""}'.length;
const STAMP = '"at":1000000000000000,'.length;
let sequence = 10_000_000; // eight digits for ever

const now = () => 1e15 + Number(process.hrtime.bigint() / 1000n); // the clock of Python's time.monotonic_ns

// When it was due, if it is late; see apps/stamp.py.
const stamped = ({ seq, pad }, due) => ({ seq, at: Math.min(Math.round(due), now()), pad: pad.slice(STAMP) });

// A text is what the messages say, piece by piece.
function speak(say, { turns, burst, interval, size, groups = 0, stamp = 0 }, text) {
  const same = "x".repeat(size - FRAME);
  const first = sequence;
  const piece = (number) => text.slice(number * same.length, (number + 1) * same.length);
  const pad = (number) => (text ? piece(number - first) : same);
  const names = groups ? Array.from({ length: groups }, (_, number) => `g${number}`) : [GROUP];
  let due = performance.now();
  let at = now();
  const message = () => {
    const data = { seq: sequence, pad: pad(sequence++) };
    return stamp ? stamped(data, at) : data;
  };
  const turn = () => {
    for (let n = 0; n < burst; n++) for (const name of names) say(message(), name);
    due += interval * 1000;
    at += interval * 1e6;
    if (--turns > 0) setTimeout(turn, Math.max(0, due - performance.now()));
  };
  turn();
}

// say(data, group) broadcasts, members() counts the sockets that would hear it.
function control(say, members) {
  return createServer((request, response) => {
    const url = new URL(request.url, "http://127.0.0.1");
    const answer = (status, value) => {
      response.writeHead(status, { "Content-Type": "application/json" });
      response.end(JSON.stringify(value));
    };
    if (url.pathname === "/members") return answer(200, members());
    if (url.pathname === "/tasks") return answer(200, { tasks: 0, objects: 0 });
    if (url.pathname !== "/broadcast") return answer(404, null);
    const numbers = Object.fromEntries([...url.searchParams].map(([name, value]) => [name, Number(value)]));
    let text = "";
    request.setEncoding("utf8").on("data", (part) => (text += part));
    request.on("end", () => {
      answer(202, numbers.turns * numbers.burst * Math.max(1, numbers.groups ?? 0));
      speak(say, numbers, text);
    });
  });
}

module.exports = { GROUP, control };
