// The Node.js contender without a protocol of its own: `ws` as its documentation shows it, a loop over its Set of
// clients. The text is encoded once for everybody.
//
// What must not live here: a cleverness that the documentation of ws does not have.

"use strict";

const { WebSocket, WebSocketServer } = require("ws");
const { control } = require("./control.js");

function say(data) {
  const text = JSON.stringify(data);
  for (const client of wss.clients) if (client.readyState === WebSocket.OPEN) client.send(text);
}

const http = control(say, () => wss.clients.size);
const wss = new WebSocketServer({ server: http, perMessageDeflate: process.env.DEFLATE === "1" });
wss.on("connection", (socket) => socket.on("error", console.error));
http.listen({ fd: Number(process.argv[2]) });
