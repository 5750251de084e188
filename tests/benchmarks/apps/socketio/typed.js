// The same on Node.js: Socket.IO as its documentation shows it, an event with an acknowledgement (`emitWithAck`).
//
// The data is not validated. The WebSocket transport only, and none of the optional native add-ons.

"use strict";

const { createServer } = require("node:http");
const { Server } = require("socket.io");

const http = createServer((request, response) => {
  response.writeHead(200, { "Content-Type": "application/json" });
  response.end(JSON.stringify(io.engine.clientsCount));
});

const io = new Server(http, { transports: ["websocket"], perMessageDeflate: false, serveClient: false });
io.on("connection", (socket) => {
  socket.on("say", (data, acknowledge) => acknowledge({ stored: data.n }));
});
http.listen({ fd: Number(process.argv[2]) });
