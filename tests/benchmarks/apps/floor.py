"""The floor: what writing the same bytes costs, and nothing else: `python -m tests.benchmarks.apps.floor FD LOOP`.

One `asyncio.Protocol` for each connection, on uvloop or on asyncio's own loop, without a server or a library in
between. It shakes hands, counts its members and answers the benchmark's HTTP routes. In a turn it frames what is said
once, joins it, and writes the same bytes to each transport: no contender can do less. What must not live here:
anything that a real server needs besides, as limits, pings, bounds for slow peers, or a parser of what clients say.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import socket
import struct
from base64 import b64encode
from collections import defaultdict
from hashlib import sha1
from typing import cast
from urllib.parse import parse_qsl, urlsplit

import uvloop

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
CLOSE = 8  # the opcode of a Close frame
GROUP = "lobby"
EMPTY = len('{"seq":10000000,"pad":""}')

Members = set[asyncio.Transport]
groups: defaultdict[str, Members] = defaultdict(set)


class Speaker:
    """What is said, by the clock of `control.py`: the same messages at the same times."""

    def __init__(self) -> None:
        self.sequence = 10_000_000  # eight digits for ever
        self.task: asyncio.Task[None] | None = None

    def start(self, query: dict[str, str]) -> int:
        """Speak from a task; returns how many messages that will be."""
        turns, burst, interval = int(query["turns"]), int(query["burst"]), float(query["interval"])
        names = [f"g{number}" for number in range(int(query.get("groups", 0)))] or [GROUP]
        pad = "x" * (int(query["size"]) - EMPTY)
        self.task = asyncio.create_task(self.speak(turns, burst, interval, pad, names))
        return turns * burst * len(names)

    async def speak(self, turns: int, burst: int, interval: float, pad: str, names: list[str]) -> None:
        """One write for each member and turn."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(turns):
            for name in names:
                written = b"".join([self.frame(pad) for _ in range(burst)])
                for transport in groups[name]:
                    transport.write(written)
            due += interval
            await asyncio.sleep(max(0.0, due - loop.time()))

    def frame(self, pad: str) -> bytes:
        """The next message in an unmasked text frame."""
        payload = json.dumps({"seq": self.sequence, "pad": pad}, separators=(",", ":")).encode()
        self.sequence += 1
        if len(payload) < 126:
            return b"\x81" + struct.pack("!B", len(payload)) + payload
        if len(payload) < 65536:
            return b"\x81\x7e" + struct.pack("!H", len(payload)) + payload
        return b"\x81\x7f" + struct.pack("!Q", len(payload)) + payload


speaker = Speaker()


class Floor(asyncio.Protocol):
    """One connection: an HTTP request, or a member."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.head = b""
        self.members: Members | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """The request's head; of what a member says only the close is heard, because clients send nothing else."""
        if self.members is not None:
            if data[0] & 15 == CLOSE:
                self.transport.close()
            return
        self.head += data
        if b"\r\n\r\n" in self.head:
            self.answer(self.head)

    def connection_lost(self, exc: Exception | None) -> None:
        """One less."""
        if self.members is not None:
            self.members.discard(self.transport)

    def answer(self, head: bytes) -> None:
        """Shake hands, or answer one HTTP request and hang up."""
        lines = head.split(b"\r\n")
        url = urlsplit(lines[0].split(b" ")[1].decode())
        query = dict(parse_qsl(url.query))
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if key := headers.get(b"sec-websocket-key"):
            self.shake(key, f"g{query['g']}" if "g" in query else GROUP)
            return
        body = json.dumps(route(url.path, query)).encode()
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)
        self.transport.close()

    def shake(self, key: bytes, group: str) -> None:
        """The answer of RFC 6455, and one more member."""
        accept = b64encode(sha1(key + GUID, usedforsecurity=False).digest())
        switch = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.transport.write(b"%bSec-WebSocket-Accept: %b\r\n\r\n" % (switch, accept))
        self.members = groups[group]
        self.members.add(self.transport)


def route(path: str, query: dict[str, str]) -> object:
    """What the benchmark asks over HTTP; see `control.py`."""
    if path == "/members":
        return sum(map(len, groups.values()))
    if path == "/tasks":
        gc.collect()
        return {"tasks": len(asyncio.all_tasks()), "objects": len(gc.get_objects())}
    return speaker.start(query)


async def serve(fd: int) -> None:
    """Until the process is ended."""
    server = await asyncio.get_running_loop().create_server(Floor, sock=socket.socket(fileno=fd), backlog=4096)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("fd", type=int)
    parser.add_argument("loop", choices=["uvloop", "asyncio"])
    arguments = parser.parse_args()
    (uvloop.run if arguments.loop == "uvloop" else asyncio.run)(serve(arguments.fd))
