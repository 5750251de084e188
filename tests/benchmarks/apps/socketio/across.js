// Socket.IO on Node.js across nodes, as its documentation shows it: the Redis adapter, and a room that is emitted to.
//
// It answers the same HTTP routes as the Python contenders (see apps/control.py), speaks by the same clock and stamps
// what it says (see apps/stamp.py). What must not live here: anything that happens once per delivery and that
// Socket.IO would not do itself.

"use strict";

const { createServer } = require("node:http");
const { createAdapter } = require("@socket.io/redis-adapter");
const { createClient } = require("redis");
const { Server } = require("socket.io");

const GROUP = "lobby";
const FRAME = '{"seq":10000000,"at":1000000000000000,"pad":""}'.length;
let sequence = 10_000_000; // eight digits for ever

const now = () => 1e15 + Number(process.hrtime.bigint() / 1000n); // the clock of Python's time.monotonic_ns

function speak({ turns, burst, interval, size }) {
  const pad = "x".repeat(size - FRAME);
  let due = performance.now();
  const turn = () => {
    if (turns-- <= 0) return;
    for (let n = 0; n < burst; n++) io.to(GROUP).emit("message", { seq: sequence++, at: now(), pad });
    due += interval * 1000;
    setTimeout(turn, Math.max(0, due - performance.now()));
  };
  turn();
}

const http = createServer((request, response) => {
  const url = new URL(request.url, "http://127.0.0.1");
  const answer = (status, value) => {
    response.writeHead(status, { "Content-Type": "application/json" });
    response.end(JSON.stringify(value));
  };
  if (url.pathname === "/members") return answer(200, io.of("/").adapter.rooms.get(GROUP)?.size ?? 0);
  if (url.pathname !== "/broadcast") return answer(404, null);
  const numbers = Object.fromEntries([...url.searchParams].map(([name, value]) => [name, Number(value)]));
  answer(202, numbers.turns * numbers.burst);
  speak(numbers);
});

const io = new Server(http, { transports: ["websocket"], perMessageDeflate: false, serveClient: false });
io.on("connection", (socket) => socket.join(GROUP));

async function main() {
  const publisher = createClient({ url: process.env.REDIS_URL });
  const subscriber = publisher.duplicate();
  await Promise.all([publisher.connect(), subscriber.connect()]);
  io.adapter(createAdapter(publisher, subscriber));
  http.listen({ fd: Number(process.argv[2]) });
}

main();
