// The Node.js contender: Socket.IO as its documentation shows it, one room, the WebSocket transport only.
//
// What must not live here: anything that happens once per delivery and that Socket.IO would not do itself.

"use strict";

const { Server } = require("socket.io");
const { GROUP, control } = require("./control.js");

const say = (data, room) => io.to(room).emit("message", data);
const http = control(say, () => io.of("/").sockets.size);
const io = new Server(http, { transports: ["websocket"], perMessageDeflate: process.env.DEFLATE === "1", serveClient: false });
io.on("connection", (socket) => {
  const { g } = socket.handshake.query;
  socket.join(g === undefined ? GROUP : `g${g}`);
});
http.listen({ fd: Number(process.argv[2]) });
