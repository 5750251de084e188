// The client against a real server, once through every frame that there is, in the spelling that is asked for.
//
// node live.mjs http://127.0.0.1:8000 json|msgpack; prints which types of frames were said and heard, as JSON.
// The server is tests/speaking.py. Each step waits for what it caused, at most ten seconds.

import assert from "node:assert/strict";
import { connect } from "../../starlette_rt/statics/starlette-rt.js";
import { codec } from "./msgpack.mjs";

const [, , base, spelling] = process.argv;
const packed = spelling === "msgpack";
const said = new Set();
const heard = new Set();

function note(into, message) {
  const value = packed ? codec.decode(new Uint8Array(message)) : JSON.parse(message);
  for (const frame of Array.isArray(value) ? value : [value]) {
    into.add(frame.skip ? "skip" : frame.type === "event" && frame.ref !== undefined && into === heard ? "call" : frame.type);
  }
}

class Listening extends WebSocket {
  constructor(...args) {
    super(...args);
    this.binaryType = "arraybuffer";
    this.addEventListener("message", ({ data }) => note(heard, data));
  }

  send(message) {
    note(said, message);
    super.send(message);
  }
}

function within(promise, what) {
  let timer;
  const late = new Promise((_, reject) => (timer = setTimeout(() => reject(new Error(`waited for ${what}`)), 10_000)));
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

const next = (on, what, fits = () => true) =>
  within(new Promise((resolve) => { const off = on((...args) => fits(...args) && (off(), resolve(args))); }), what);

const post = (path) => fetch(base + path, { method: "POST" });

function client(name) {
  return connect(`${base}/ws`, {
    token: async () => (await fetch(`${base}/token/${name}`)).text(),
    WebSocket: Listening,
    ...(packed ? { codec } : {}),
  });
}

const name = `hist:${Math.random()}`;
const ada = client("ada");
const bob = client("bob");
const board = ada.join(name, { presence: "members" });
const other = bob.join(name, { presence: "count", last: 10 });
assert.equal((await within(board.ready, "the join")).recovered, true);
await within(other.ready, "the other's join");
assert.equal(ada.identity, "ada");

const hears = next((fn) => other.on("said", fn), "an event");
assert.deepEqual(await board.emit("say", { text: "hällo" }), { n: 1 });
assert.deepEqual((await hears)[0], { text: "hällo", by: "ada" });
await assert.rejects(board.emit("say", { text: 7 }), { code: "invalid" });
await board.emit("say_others", { text: "not for me" });
await next((fn) => ada.on("said", fn), "my own", ({ text }) => text === "after", board.emit("say", { text: "after" }));
assert.equal(board.position.offset, 3);

const typing = next((fn) => other.onWhisper("typing", fn), "a whisper");
board.typing().start({ where: "here" });
assert.deepEqual(await typing, [{ where: "here" }, "ada", false]);
const quiet = next((fn) => other.onWhisper("typing", fn), "its end", (data, from, stop) => stop);
board.typing().stop();
await quiet;

const counted = next((fn) => other.onPresence(fn), "a count", ({ count }) => count === 1);
await board.track({ name: "Ada" });
await board.update({ name: "Ada L." });
await counted;
if (board.presence.get("ada")?.metas[0].name !== "Ada L.") {
  await next((fn) => board.onPresence(fn), "a diff", () => board.presence.get("ada")?.metas[0].name === "Ada L.");
}
const pages = [];
for await (const page of board.members({ limit: 1 })) pages.push([...page.keys()]);
assert.deepEqual(pages, [["ada"]]);
await board.untrack();

ada.answer("confirm", (question) => ({ agreed: question.to }));
assert.deepEqual(await ada.emit("call_me", { to: "all" }), { agreed: "all" });
bob.answer("confirm", () => { throw Object.assign(new Error("not now"), { code: "declined" }); });
await assert.rejects(bob.emit("call_me", {}));

if (packed) {
  const bytes = next((fn) => other.onWhisper("typing", fn), "bytes");
  board.whisper("typing", { raw: new Uint8Array([255, 0]) });
  assert.deepEqual([...(await bytes)[0].raw], [255, 0]);
}

const broke = next((fn) => board.onRecover(fn), "a reset", ({ reason }) => reason === "reset");
await post(`/lose/${encodeURIComponent(name)}`);
assert.equal((await broke)[0].recovered, false);

const left = next((fn) => other.onLeft(fn), "being taken out");
await other.emit("kick_me");
assert.deepEqual(await left, ["left"]);
await board.leave();

const deadline = Date.now() + 15_000;
while (!(said.has("refresh") && said.has("pong"))) {
  assert.ok(Date.now() < deadline, "waited for a ping and for the token to be refreshed");
  await new Promise((resolve) => setTimeout(resolve, 50));
}
const waits = next((fn) => ada.onState(fn), "the end", (state) => state !== "open");
await post("/drain");
await waits;
ada.close();
bob.close();
console.log(JSON.stringify({ said: [...said].sort(), heard: [...heard].sort() }));
process.exit(0);
