"""The load generator of `inbound`: many clients that ask, wait for the answer, and ask again.

A program, not a module to import: `python -m tests.benchmarks.ask URL --dialect NAME`. It takes the orders of
`load.py`, and in the place of `expect`:

    {"do": "ask", "count": 80, "outstanding": 1}
        -> {"answered": 4000, "wrong": 0, "lost": 0, "busy": 0.21, "heard": 4000}

Each client has `outstanding` questions on their way, one message each, and asks the next as soon as one is answered:
nothing is batched by the client. Every answer is checked against its question; `heard` is the number of messages
that the answers came in. What must not live here: a server, a judgement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import picows
import uvloop

from tests.benchmarks.load import Client, Load, Tally, answer

FIRST = 10_000_000  # eight digits for ever, so that every message has the same size
TEXT = "a short line of text, as somebody types it in a chat"
DATA = f'{{"text":"{TEXT}","n":%d}}'


class Stored(msgspec.Struct):
    """What the handler returns."""

    stored: int = -1


class Frame(msgspec.Struct):
    """A frame of the protocol v1, or what the contender by hand says in its place."""

    type: str = ""
    ref: int = -1
    data: Stored | None = None


Answers = list[tuple[int, int]]  # the number of each question, and what was answered


class Dialect(NamedTuple):
    """How one kind of contender is asked, and how its answers are read; ``None`` for what holds no answer."""

    kind: picows.WSMsgType
    spell: Callable[[int], bytes]
    read: Callable[[bytes], Answers | None]
    offer: str | None = None
    pong: bytes = b'{"type":"pong"}'
    socketio: bool = False


def reader(decode: Callable[[bytes], Frame | list[Frame]]) -> Callable[[bytes], Answers | None]:
    """Read one frame, or a batch of them."""

    def read(payload: bytes) -> Answers | None:
        got = decode(payload)
        frames = got if isinstance(got, list) else [got]
        answers = [(frame.ref, frame.data.stored if frame.data else -1) for frame in frames if frame.ref >= 0]
        return answers or None

    return read


def json_frame(number: int, more: str = "") -> bytes:
    """Spell a question as JSON."""
    return f'{{"type":"event","event":"say","ref":{number}{more},"data":{DATA % number}}}'.encode()


def packed_frame(number: int) -> bytes:
    """Spell a question as MessagePack."""
    data = {"text": TEXT, "n": number}
    return msgspec.msgpack.encode({"type": "event", "event": "say", "ref": number, "data": data})


def read_socketio(payload: bytes) -> Answers | None:
    """Read an acknowledgement: `43`, the number, and a list of what was returned."""
    if payload[:2] != b"43":
        return None
    return [(int(payload[2:10]), msgspec.json.decode(payload[10:], type=tuple[Stored])[0].stored)]


read_json = reader(msgspec.json.Decoder(Frame | list[Frame]).decode)
read_packed = reader(msgspec.msgpack.Decoder(Frame | list[Frame]).decode)
TEXTUAL, BINARY = picows.WSMsgType.TEXT, picows.WSMsgType.BINARY

DIALECTS = {
    "bare": Dialect(TEXTUAL, json_frame, read_json),
    "json": Dialect(TEXTUAL, json_frame, read_json, "rt.v1.json"),
    "once": Dialect(TEXTUAL, lambda number: json_frame(number, f',"id":"{number}"'), read_json, "rt.v1.json"),
    "msgpack": Dialect(BINARY, packed_frame, read_packed, "rt.v1.msgpack", msgspec.msgpack.encode({"type": "pong"})),
    "socketio": Dialect(
        TEXTUAL, lambda number: f'42{number}["say",{DATA % number}]'.encode(), read_socketio, socketio=True
    ),
}


class Asker(Client):
    """One client: it knows which questions are on their way."""

    def __init__(self, tally: Tally, dialect: Dialect) -> None:
        super().__init__(tally, dialect.socketio)
        self.dialect = dialect
        self.next = FIRST
        self.left = self.heard = 0
        self.waiting: set[int] = set()

    def start(self, count: int, outstanding: int) -> None:
        """Ask the first questions of `count`."""
        self.left, self.heard = count, 0
        for _ in range(outstanding):
            self.ask()

    def ask(self) -> None:
        """Ask the next question, if there is one."""
        if self.left:
            self.left -= 1
            self.next += 1
            self.waiting.add(self.next)
            assert self.transport is not None
            self.transport.send(self.dialect.kind, self.dialect.spell(self.next))

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """Check each answer, and ask again for each."""
        payload = frame.get_payload_as_bytes()
        answers = self.dialect.read(payload) if frame.msg_type == self.dialect.kind else None
        if answers is None:
            return self.on_other(transport, frame.msg_type, payload)
        tally = self.tally
        self.heard += 1
        for number, stored in answers:
            if number not in self.waiting or stored != number:
                tally.disorder += 1
            self.waiting.discard(number)
            tally.received += 1
            self.ask()
        if tally.received >= tally.goal:
            tally.done.set()

    def on_other(self, transport: picows.WSTransport, kind: picows.WSMsgType, payload: bytes) -> None:
        """What is no answer: also the ping of the protocol v1."""
        if self.dialect.offer and b"ping" in payload[:16]:
            transport.send(self.dialect.kind, self.dialect.pong)
        else:
            super().on_other(transport, kind, payload)


class Asking(Load):
    """The clients of this process."""

    def __init__(self, url: str, dialect: Dialect) -> None:
        super().__init__(url, dialect.socketio, [dialect.offer] if dialect.offer else [])
        self.dialect = dialect
        self.askers: list[Asker] = []

    async def dial(self, turnstile: asyncio.Semaphore) -> None:
        """Open one client and wait until it may ask."""
        asker = Asker(self.tally, self.dialect)
        async with turnstile:
            await picows.ws_connect(lambda: asker, self.url, extra_headers=self.headers, max_redirects=0)
            await asker.joined.wait()
        self.clients.append(asker)
        self.askers.append(asker)

    async def ask(self, count: int, outstanding: int) -> dict[str, float]:
        """Let each client ask `count` questions; return when all are answered, or a client is lost."""
        self.tally.expect(count * len(self.clients))
        before, since = time.process_time(), time.monotonic()
        for asker in self.askers:
            asker.start(count, outstanding)
        await self.tally.done.wait()
        return {
            "answered": self.tally.received,
            "wrong": self.tally.disorder,
            "lost": self.tally.lost,
            "busy": (time.process_time() - before) / (time.monotonic() - since),
            "heard": sum(asker.heard for asker in self.askers),
        }

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order within its deadline."""
        if order["do"] != "ask":
            return await super().obey(order)
        async with asyncio.timeout(60):
            return await self.ask(order["count"], order["outstanding"])


async def main(arguments: argparse.Namespace) -> None:
    """Take orders until stdin ends."""
    load = Asking(arguments.url, DIALECTS[arguments.dialect])
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer(await load.obey(json.loads(line)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--dialect", choices=DIALECTS, required=True)
    uvloop.run(main(parser.parse_args()))
