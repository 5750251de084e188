"""The load generator: many WebSocket clients in one process, which count and check what they hear.

A program, not a module to import: `python -m tests.benchmarks.load URL [--socketio] [--offer PROTOCOL …] [--groups G]
[--rising]`. It takes orders as JSON lines on stdin and answers each with JSON lines on stdout:

    {"do": "connect", "count": 500}  -> {"connected": 500}
    {"do": "expect", "count": 100}   -> {"armed": 500}, and once each client has heard 100 more messages:
                                        {"received": 50000, "disorder": 0, "lost": 0, "busy": 0.21, "frames": 50000,
                                         "diffs": 0}
    {"do": "expect", "total": 900}   -> the same once all of them together have heard 900 more
    {"do": "drop"}                   -> {"connected": 0}

Clients are numbered from 0 in the order in which they dial: the URL's `{n}` is that number, `{g}` the number modulo G.
A message is what follows a `"seq":`, and a payload may hold several (a batch of `rt.v1.json`); `diffs` are the
`presence_diff` beside them, and `frames` the payloads that held any of these. Each client knows the number that must
come next; anything else is disorder. With `--rising` it may be any greater one, as for a member of some of the groups
that share one counter: then a loss shows as a sum that is too small. What has not come after `EXPECT_DEADLINE` does
not come, and is answered as such.

It must never be the bottleneck: frames are parsed by picows on uvloop, and of a payload only the eight digits behind
`"seq":` are read; `busy` is the share of a core that this process took meanwhile. Deflate is not offered. It opens as
many files as the hard limit allows. An end of stdin ends the process. What must not live here: a server, a judgement.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import resource
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from typing import Any

import picows
import uvloop
from picows.url import WSParsedURL

MARK = b'"seq":'
DIGITS = 8
PING, PONG = b'"type":"ping"', b'{"type":"pong"}'
DIFF = b'"type":"presence_diff"'
DIALS = 64  # handshakes under way at one time
CALLERS = 5_000  # clients that call from one address
ORDER_DEADLINE = 120.0  # seconds for any one order
EXPECT_DEADLINE = 100.0  # seconds for what is expected; less, so that the order can be answered


class Tally:
    """What all the clients of this process have seen since the last `expect`."""

    def __init__(self, rising: bool = False) -> None:
        self.rising = rising
        self.received = self.disorder = self.lost = self.diffs = 0
        self.batched = 0  # messages that came behind another one in the same payload
        self.apart = 0  # payloads that held presence only
        self.singles: set[int] = set()  # lengths of payloads known to hold one message and nothing else
        self.goal = -1
        self.done = asyncio.Event()

    def expect(self, goal: int) -> None:
        """Start to count up to `goal`; the messages may have another length from now on."""
        self.received = self.disorder = self.lost = self.diffs = self.batched = self.apart = 0
        self.singles.clear()
        self.goal = goal
        self.done.clear()


class Client(picows.WSListener):
    """One member: it knows which number comes next."""

    def __init__(self, tally: Tally, socketio: bool) -> None:
        self.tally = tally
        self.socketio = socketio
        self.next = 0
        self.closing = False
        self.transport: picows.WSTransport | None = None
        self.joined = asyncio.Event()

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        """Open; on Socket.IO that is not yet a member."""
        self.transport = transport
        if not self.socketio:
            self.joined.set()

    def on_ws_disconnected(self, transport: picows.WSTransport) -> None:
        """Lost, unless we hung up ourselves."""
        if not self.closing:
            self.tally.lost += 1
            self.tally.done.set()

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """The hot path: a cheap slice, one comparison, two counters; to look for a second mark would cost more."""
        payload = frame.get_payload_as_bytes()
        at = payload.find(MARK)
        if at < 0:
            self.on_other(transport, frame.msg_type, payload)
            return
        tally = self.tally
        if len(payload) not in tally.singles:
            at = self.all_but_last(transport, payload)
        at += len(MARK)
        number = int(payload[at : at + DIGITS])
        if number != self.next and self.next and (number < self.next or not tally.rising):  # as `count`, but not called
            tally.disorder += 1
        self.next = number + 1
        tally.received += 1
        if tally.received == tally.goal:
            tally.done.set()

    def count(self, number: int) -> None:
        """One message of several."""
        tally = self.tally
        if number != self.next and self.next and (number < self.next or not tally.rising):
            tally.disorder += 1
        self.next = number + 1
        tally.received += 1
        if tally.received == tally.goal:
            tally.done.set()

    def all_but_last(self, transport: picows.WSTransport, payload: bytes) -> int:
        """Count what is before the last mark, and return where that is; the length of a lone message is remembered."""
        numbers = [part[:DIGITS] for part in payload.split(MARK)[1:-1]]
        if payload[:1] != b"[" and not numbers:
            self.tally.singles.add(len(payload))
        else:
            self.tally.batched += len(numbers)
            self.on_frames(transport, payload)
        for number in numbers:
            self.count(int(number))
        return payload.rfind(MARK)

    def on_frames(self, transport: picows.WSTransport, payload: bytes) -> None:
        """What rt.v1 says beside messages: presence, and pings that must be answered."""
        self.tally.diffs += payload.count(DIFF)
        if PING in payload:
            transport.send(picows.WSMsgType.TEXT, PONG)

    def on_other(self, transport: picows.WSTransport, kind: picows.WSMsgType, payload: bytes) -> None:
        """What is not a message: the close, Engine.IO's handshake and pings, and the frames of rt.v1."""
        if kind == picows.WSMsgType.CLOSE:
            transport.disconnect()
        elif not self.socketio:
            self.tally.apart += DIFF in payload
            self.on_frames(transport, payload)
        elif payload[:1] == b"0":
            transport.send(picows.WSMsgType.TEXT, b"40")
        elif payload[:2] == b"40":
            self.joined.set()
        elif payload == b"2":
            transport.send(picows.WSMsgType.TEXT, b"3")


async def call(number: int, url: WSParsedURL) -> socket.socket | None:
    """A connected socket of client `number`; on loopback with an address of its own for each `CALLERS` and server.

    All of 127.0.0.0/8 is here. From one address there are 28,000 ports, and the kernel searches long for the last.
    """
    if url.host != "127.0.0.1":
        return None  # let picows do it
    made = socket.socket()
    try:
        made.setblocking(False)
        made.bind((f"127.{url.port >> 8}.{url.port & 255}.{1 + number // CALLERS % 250}", 0))
        await asyncio.get_running_loop().sock_connect(made, (url.host, url.port))
    except BaseException:
        made.close()
        raise
    return made


class Load:
    """The clients of this process, and the orders they take."""

    def __init__(self, url: str, socketio: bool, offer: list[str], groups: int = 1, rising: bool = False) -> None:
        self.url = url
        self.socketio = socketio
        self.groups = groups
        self.headers = {"Sec-WebSocket-Protocol": ", ".join(offer)} if offer else None
        self.tally = Tally(rising)
        self.numbers = itertools.count()
        self.clients: list[Client] = []

    async def dial(self, turnstile: asyncio.Semaphore) -> None:
        """Open one client and wait until it is a member."""
        client, number = Client(self.tally, self.socketio), next(self.numbers)
        async with turnstile:
            await picows.ws_connect(
                lambda: client,
                self.url.replace("{n}", str(number)).replace("{g}", str(number % self.groups)),
                extra_headers=self.headers,
                websocket_handshake_timeout=30,
                max_redirects=0,
                socket_factory=partial(call, number),
            )
            await client.joined.wait()
        self.clients.append(client)

    async def connect(self, count: int) -> dict[str, int]:
        """Open `count` more clients, a few at a time."""
        turnstile = asyncio.Semaphore(DIALS)
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(self.dial(turnstile))
        return {"connected": len(self.clients)}

    async def expect(self, count: int) -> dict[str, float]:
        """As `expect_total`; each client has heard `count` of them, so that all must now wait for the same number."""
        heard = await self.expect_total(count * len(self.clients))
        behind = 0 if self.tally.rising else len({client.next for client in self.clients}) - 1
        return {**heard, "disorder": heard["disorder"] + behind}

    async def expect_total(self, total: int) -> dict[str, float]:
        """Say that we are ready, then wait until all clients have heard `total` more messages, or one is lost."""
        tally = self.tally
        tally.expect(total)
        before, since = time.process_time(), time.monotonic()
        answer({"armed": len(self.clients)})
        with suppress(TimeoutError):
            await asyncio.wait_for(tally.done.wait(), EXPECT_DEADLINE)
        return {
            "received": tally.received,
            "disorder": tally.disorder,
            "lost": tally.lost,
            "busy": (time.process_time() - before) / (time.monotonic() - since),
            "frames": tally.received - tally.batched + tally.apart,
            "diffs": tally.diffs,
        }

    async def drop(self) -> dict[str, int]:
        """Close every client and wait until the server has closed too."""
        for client in self.clients:
            client.closing = True
            assert client.transport is not None
            client.transport.send_close(picows.WSCloseCode.OK)
        for client in self.clients:
            assert client.transport is not None
            await client.transport.wait_disconnected()
        self.clients.clear()
        return {"connected": 0}

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order within its deadline."""
        async with asyncio.timeout(ORDER_DEADLINE):
            match order:
                case {"do": "connect", "count": count}:
                    return await self.connect(count)
                case {"do": "expect", "count": count}:
                    return await self.expect(count)
                case {"do": "expect", "total": total}:
                    return await self.expect_total(total)
                case {"do": "drop"}:
                    return await self.drop()
        raise ValueError(f"unknown order {order}")


def answer(value: dict[str, Any]) -> None:
    """One JSON line to the benchmark."""
    print(json.dumps(value), flush=True)


async def main(arguments: argparse.Namespace) -> None:
    """Take orders until stdin ends."""
    load = Load(arguments.url, arguments.socketio, arguments.offer, arguments.groups, arguments.rising)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer(await load.obey(json.loads(line)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--socketio", action="store_true", help="shake hands as Engine.IO and Socket.IO do")
    parser.add_argument("--offer", nargs="*", default=[], metavar="PROTOCOL", help="subprotocols to offer")
    parser.add_argument("--groups", type=int, default=1, metavar="G", help="what {g} counts up to")
    parser.add_argument("--rising", action="store_true", help="numbers need only rise, not follow each other")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(parser.parse_args()))
