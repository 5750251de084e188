"""The load generator for what `load.py` does not ask: how long a message was on its way, and who comes with a line.

A program, not a module to import: `python -m tests.benchmarks.hear URL [--socketio] [--offer PROTOCOL …] [--deflate]`.
It takes the orders of `load.py`, and

    {"do": "expect", "count": 10}   -> as `load.py`, with the microseconds that each message took from its publisher
                                       (see `apps/stamp.py`) to a client, too: {…, "delays": [412, …]}
    {"do": "expect", "count": 10, "percentiles": [50, 99.9]}
                                    -> the same for many messages, with these percentiles of the delays alone, and how
                                       many they are: {…, "percentiles": [412, 973], "delays": 5000}
    {"do": "come", "count": 500, "first": 0, "lines": ["…"]}
                                    -> {"connected": 500, "recovered": 500}

A delay holds the way into this process and its own queue: who hears last has waited for all before. `--deflate` offers
permessage-deflate as browsers do; it is for clients that are told nothing, because none inflates.

Who comes dials `URL` with its number, counted from `first`, in the place of `{n}`, and in the place of `{g}` its
number modulo the number of `lines`; it says its line and is there when the `ref` 1 is answered. Without a line it is
there when it is connected. With a `redis://` URL and `--channel NAME` the one client is no WebSocket but a subscriber
of redis-py: the floor under all contenders. What must not live here: a server, a judgement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from array import array
from collections.abc import MutableSequence, Sequence
from types import SimpleNamespace
from typing import Any

import picows
import uvloop

from tests.benchmarks import common
from tests.benchmarks.apps.stamp import now
from tests.benchmarks.load import DIALS, ORDER_DEADLINE, Client, Load, Tally, answer

MARK = b'"at":'
DIGITS = 16
DEFLATE = "permessage-deflate; client_max_window_bits"


class Delayed(Client):
    """One member that looks at the clock."""

    def __init__(self, tally: Tally, socketio: bool, delays: MutableSequence[int]) -> None:
        super().__init__(tally, socketio)
        self.delays = delays

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """Look at the clock first, then count and check."""
        payload = frame.get_payload_as_bytes()
        at = payload.find(MARK)
        if at >= 0:
            at += len(MARK)
            self.delays.append(now() - int(payload[at : at + DIGITS]))
        super().on_ws_frame(transport, frame)


class Comer(Client):
    """One client that says a line and waits for the answer."""

    def __init__(self, tally: Tally, line: str | None) -> None:
        super().__init__(tally, socketio=False)
        self.line = line
        self.recovered = False

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        """Say the line."""
        self.transport = transport
        if self.line is None:
            self.joined.set()
        else:
            transport.send(picows.WSMsgType.TEXT, self.line.encode())

    def on_other(self, transport: picows.WSTransport, kind: picows.WSMsgType, payload: bytes) -> None:
        """The answer, and the pings of the protocol v1."""
        if kind == picows.WSMsgType.TEXT and b'"ref":1' in payload:
            self.recovered = b'"recovered":true' in payload
            self.joined.set()
        elif kind == picows.WSMsgType.TEXT and b'"type":"ping"' in payload:
            transport.send(picows.WSMsgType.TEXT, b'{"type":"pong"}')
        else:
            super().on_other(transport, kind, payload)


class Hearing(Load):
    """The clients of this process."""

    def __init__(self, url: str, socketio: bool, offer: list[str], channel: str | None, deflate: bool = False) -> None:
        super().__init__(url, socketio, offer)
        if deflate:
            self.headers = {**(self.headers or {}), "Sec-WebSocket-Extensions": DEFLATE}
        self.channel = channel
        self.delays: MutableSequence[int] = array("q")  # microseconds
        self.listening: list[asyncio.Task[None]] = []

    async def dial(self, turnstile: asyncio.Semaphore) -> None:
        """Open one client and wait until it is a member."""
        await self.open(Delayed(self.tally, self.socketio, self.delays), self.url, turnstile)

    async def open(self, client: Client, url: str, turnstile: asyncio.Semaphore) -> None:
        """Open this client and wait until it says that it is there."""
        async with turnstile:
            await picows.ws_connect(
                lambda: client, url, extra_headers=self.headers, websocket_handshake_timeout=30, max_redirects=0
            )
            await client.joined.wait()
        self.clients.append(client)

    async def come(self, count: int, first: int, lines: list[str]) -> dict[str, int]:
        """Open so many numbered clients, a few at a time."""
        turnstile, comers = asyncio.Semaphore(DIALS), [Comer(self.tally, None) for _ in range(count)]
        async with asyncio.TaskGroup() as group:
            for number, comer in enumerate(comers, first):
                place = number % max(1, len(lines))
                comer.line = (lines[place] or None) if lines else None
                url = self.url.replace("{n}", str(number)).replace("{g}", str(place))
                group.create_task(self.open(comer, url, turnstile))
        return {"connected": len(self.clients), "recovered": sum(comer.recovered for comer in comers)}

    async def connect(self, count: int) -> dict[str, int]:
        """Open `count` more clients; a subscriber is only one."""
        if self.channel is None:
            return await super().connect(count)
        there = asyncio.Event()
        self.listening.append(asyncio.create_task(self.subscribe(self.channel, there)))
        await there.wait()
        return {"connected": 1}

    async def subscribe(self, channel: str, there: asyncio.Event) -> None:
        """Hear a channel of Redis as a member of a group would."""
        from redis.asyncio import Redis

        client = Delayed(self.tally, False, self.delays)
        self.clients.append(client)
        async with Redis.from_url(self.url) as connection, connection.pubsub() as pubsub:
            await pubsub.subscribe(channel)
            async for message in pubsub.listen():
                if message["type"] == "subscribe":
                    there.set()
                    continue
                frame: Any = SimpleNamespace(get_payload_as_bytes=lambda data=message["data"]: data)
                client.on_ws_frame(None, frame)  # type: ignore[arg-type]

    async def expect(self, count: int) -> dict[str, Any]:
        """As `load.py` does it, with the delays."""
        del self.delays[:]
        return {**await super().expect(count), "delays": list(self.delays)}

    async def expect_percentiles(self, count: int, wanted: Sequence[float]) -> dict[str, Any]:
        """As `load.py` does it, with percentiles of the delays."""
        del self.delays[:]
        heard = await super().expect(count)
        return {**heard, "percentiles": percentiles(self.delays, wanted), "delays": len(self.delays)}

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order within its deadline."""
        async with asyncio.timeout(ORDER_DEADLINE):
            match order:
                case {"do": "come", "count": count, "first": first, "lines": lines}:
                    return await self.come(count, first, lines)
                case {"do": "expect", "count": count, "percentiles": wanted}:
                    return await self.expect_percentiles(count, wanted)
        return await super().obey(order)


def percentiles(delays: Sequence[int], wanted: Sequence[float]) -> list[int]:
    """The smallest delays that so many per cent do not exceed; none of nothing."""
    ordered = sorted(delays)
    return [ordered[max(0, math.ceil(len(ordered) * each / 100) - 1)] for each in wanted] if ordered else []


async def main(arguments: argparse.Namespace) -> None:
    """Take orders until stdin ends."""
    load = Hearing(arguments.url, arguments.socketio, arguments.offer, arguments.channel, arguments.deflate)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer(await load.obey(json.loads(line)))
    for task in load.listening:
        task.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--socketio", action="store_true", help="shake hands as Engine.IO and Socket.IO do")
    parser.add_argument("--offer", nargs="*", default=[], metavar="PROTOCOL", help="subprotocols to offer")
    parser.add_argument("--deflate", action="store_true", help="offer permessage-deflate")
    parser.add_argument("--channel", help="subscribe to this channel of the Redis at URL")
    common.open_files()
    uvloop.run(main(parser.parse_args()))
