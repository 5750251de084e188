// Clients that write down what they hear, each with its own wishes about compression.
//
// node deflate.mjs URL COUNT CLIENTS [the folder of ws]; CLIENTS is JSON: {name: {with: "node" | "ws", options}}. "node"
// is the WebSocket of Node.js itself, which always offers compression. Each client hears COUNT messages and hangs up;
// then one line of JSON: {name: {extensions, heard: [SHA-256 of "t" or "b" and the payload]}}. At most thirty seconds.

import { createHash } from "node:crypto";
import { createRequire } from "node:module";

const [, , url, count, clients, folder] = process.argv;

const digest = (kind, payload) => createHash("sha256").update(kind).update(payload).digest("hex");

function listen(socket, extensions, note) {
  return new Promise((resolve, reject) => {
    const heard = [];
    note(socket, (kind, payload) => {
      heard.push(digest(kind, payload));
      if (heard.length === Number(count)) socket.close();
    });
    socket.onerror = (event) => reject(event.error ?? new Error(event.message ?? "the connection failed"));
    socket.onclose = () => resolve({ extensions: extensions(socket), heard });
  });
}

const noteNode = (socket, note) => {
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? note("t", data) : note("b", new Uint8Array(data)));
};

const noteWs = (socket, note) => socket.on("message", (data, binary) => note(binary ? "b" : "t", data));

function client(name, { with: kind, options }) {
  const address = `${url}?${new URLSearchParams({ name })}`;
  if (kind === "node") return listen(new WebSocket(address), (socket) => socket.extensions, noteNode);
  const Ws = createRequire(import.meta.url)(folder);
  let extensions = "";
  const socket = new Ws(address, options);
  socket.on("upgrade", ({ headers }) => (extensions = headers["sec-websocket-extensions"] ?? ""));
  return listen(socket, () => extensions, noteWs);
}

setTimeout(() => process.exit(2), 30_000).unref();
const names = Object.entries(JSON.parse(clients));
const told = await Promise.all(names.map(async ([name, wish]) => [name, await client(name, wish)]));
console.log(JSON.stringify(Object.fromEntries(told)));
