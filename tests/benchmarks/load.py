"""The load generator: many WebSocket clients in one process, which count and check what they hear.

A program, not a module to import: `python -m tests.benchmarks.load URL [--socketio] [--offer PROTOCOL …]`. It
takes orders as JSON lines on stdin and answers each with JSON lines on stdout:

    {"do": "connect", "count": 500}  -> {"connected": 500}
    {"do": "expect", "count": 100}   -> {"armed": 500}, and once each client has heard 100 more messages:
                                        {"received": 50000, "disorder": 0, "lost": 0, "busy": 0.21}
    {"do": "drop"}                   -> {"connected": 0}

It must never be the bottleneck: frames are parsed by picows on uvloop, and of a payload only the eight digits
behind `"seq":` are read; `busy` is the share of a core that this process took meanwhile. Each client knows the
number that must come next; anything else is disorder. Deflate is not offered. An end of stdin ends the process.
What must not live here: a server, a judgement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import picows
import uvloop

MARK = b'"seq":'
DIGITS = 8
DIALS = 64  # handshakes under way at one time
ORDER_DEADLINE = 120.0  # seconds for any one order


class Tally:
    """What all the clients of this process have seen since the last `expect`."""

    def __init__(self) -> None:
        self.received = self.disorder = self.lost = 0
        self.goal = -1
        self.done = asyncio.Event()

    def expect(self, goal: int) -> None:
        """Start to count up to `goal`."""
        self.received = self.disorder = self.lost = 0
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
        """The hot path: a cheap slice, one comparison, two counters."""
        payload = frame.get_payload_as_bytes()
        at = payload.find(MARK)
        if at < 0:
            self.on_other(transport, frame.msg_type, payload)
            return
        at += len(MARK)
        number = int(payload[at : at + DIGITS])
        tally = self.tally
        if number != self.next and self.next:
            tally.disorder += 1
        self.next = number + 1
        tally.received += 1
        if tally.received == tally.goal:
            tally.done.set()

    def on_other(self, transport: picows.WSTransport, kind: picows.WSMsgType, payload: bytes) -> None:
        """What is not a message: the close, and Engine.IO's handshake and pings."""
        if kind == picows.WSMsgType.CLOSE:
            transport.disconnect()
        elif self.socketio and payload[:1] == b"0":
            transport.send(picows.WSMsgType.TEXT, b"40")
        elif self.socketio and payload[:2] == b"40":
            self.joined.set()
        elif self.socketio and payload == b"2":
            transport.send(picows.WSMsgType.TEXT, b"3")


class Load:
    """The clients of this process, and the orders they take."""

    def __init__(self, url: str, socketio: bool, offer: list[str]) -> None:
        self.url = url
        self.socketio = socketio
        self.headers = {"Sec-WebSocket-Protocol": ", ".join(offer)} if offer else None
        self.tally = Tally()
        self.clients: list[Client] = []

    async def dial(self, turnstile: asyncio.Semaphore) -> None:
        """Open one client and wait until it is a member."""
        client = Client(self.tally, self.socketio)
        async with turnstile:
            await picows.ws_connect(
                lambda: client, self.url, extra_headers=self.headers, websocket_handshake_timeout=30, max_redirects=0
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
        """Say that we are ready, then wait until each client has heard `count` more messages, or one is lost."""
        self.tally.expect(count * len(self.clients))
        before, since = time.process_time(), time.monotonic()
        answer({"armed": len(self.clients)})
        await self.tally.done.wait()
        behind = len({client.next for client in self.clients}) - 1
        return {
            "received": self.tally.received,
            "disorder": self.tally.disorder + behind,
            "lost": self.tally.lost,
            "busy": (time.process_time() - before) / (time.monotonic() - since),
        }

    async def drop(self) -> dict[str, int]:
        """Close every client and wait until the server has closed too."""
        for client in self.clients:
            client.closing = True
            assert client.transport is not None
            client.transport.send_close(picows.WSCloseCode.OK)
        for client in self.clients:
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
                case {"do": "drop"}:
                    return await self.drop()
        raise ValueError(f"unknown order {order}")


def answer(value: dict[str, Any]) -> None:
    """One JSON line to the benchmark."""
    print(json.dumps(value), flush=True)


async def main(arguments: argparse.Namespace) -> None:
    """Take orders until stdin ends."""
    load = Load(arguments.url, arguments.socketio, arguments.offer)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer(await load.obey(json.loads(line)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--socketio", action="store_true", help="shake hands as Engine.IO and Socket.IO do")
    parser.add_argument("--offer", nargs="*", default=[], metavar="PROTOCOL", help="subprotocols to offer")
    uvloop.run(main(parser.parse_args()))
