// The Node.js contender: Socket.IO as its documentation shows it, one group, the WebSocket transport only.
//
// It answers the same three HTTP routes as the Python contenders (see apps/control.py) and speaks by the same
// clock. What must not live here: anything that happens once per delivery and that Socket.IO would not do itself.

"use strict";

const { createServer } = require("node:http");
const { Server } = require("socket.io");

const GROUP = "lobby";
const FRAME = '{"seq":10000000,"pad":""}'.length;
let sequence = 10_000_000; // eight digits for ever

function speak({ turns, burst, interval, size }) {
  const pad = "x".repeat(size - FRAME);
  let due = performance.now();
  const turn = () => {
    for (let n = 0; n < burst; n++) io.to(GROUP).emit("message", { seq: sequence++, pad });
    due += interval * 1000;
    if (--turns > 0) setTimeout(turn, Math.max(0, due - performance.now()));
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
  if (url.pathname === "/tasks") return answer(200, { tasks: 0, objects: 0 });
  if (url.pathname !== "/broadcast") return answer(404, null);
  const numbers = Object.fromEntries([...url.searchParams].map(([name, value]) => [name, Number(value)]));
  answer(202, numbers.turns * numbers.burst);
  speak(numbers);
});

const io = new Server(http, { transports: ["websocket"], perMessageDeflate: false, serveClient: false });
io.on("connection", (socket) => socket.join(GROUP));
http.listen({ fd: Number(process.argv[2]) });
