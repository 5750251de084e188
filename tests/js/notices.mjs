// What is pushed to a person while their connection is lost, with a history of what is pushed.
//
// node notices.mjs http://127.0.0.1:8000; prints what was heard as JSON. The server is tests/speaking.py.

import { connect } from "../../starlette_rt/statics/starlette-rt.js";

const [, , base] = process.argv;
let socket;

class Kept extends WebSocket {
  constructor(...args) {
    super(...args);
    socket = this;
  }
}

const heard = [];
const recovered = [];
let wake = () => {};
const push = (text) => fetch(`${base}/push/ada/${text}`, { method: "POST" });

async function until(count) {
  const late = Date.now() + 20_000;
  while (heard.length < count) {
    if (Date.now() > late) throw new Error(`waited for ${count}, heard ${heard}`);
    await new Promise((resolve) => { wake = resolve; setTimeout(resolve, 1000); });
  }
}

const ada = connect(`${base}/ws`, {
  token: async () => (await fetch(`${base}/token/ada`)).text(),
  WebSocket: Kept,
});
ada.on("notice", (data, meta) => {
  heard.push(data);
  recovered.push(meta.recovered);
  wake();
});
await ada.ready;
while (ada.group("~ada").position === null) await new Promise((resolve) => setTimeout(resolve, 10));
await push("1");
await until(1);
const gone = socket;
gone.close();
await new Promise((resolve) => gone.addEventListener("close", resolve));
await push("2");
await push("3");
await until(3);
await push("4");
await until(4);
ada.close();
console.log(JSON.stringify({ heard, recovered }));
