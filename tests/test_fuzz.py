"""A hundred thousand random and mutated frames, and two neighbours who must not notice.

The law of this file: real servers and raw sockets; the frames come from one seed, which is printed. Nothing that a
peer sends may leave a record of ours above INFO, a traceback of anybody, or a connection, group or task behind.
``FUZZ_SEED`` and ``FUZZ_FRAMES`` in the environment choose another run.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import struct
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.peers import BINARY, CLOSE, PING, PONG, TEXT, ask, bearer, eventually, frame, hello, loud
from tests.servers import HOST, Server, serve

pytestmark = [pytest.mark.system, pytest.mark.timeout(150)]

SEED = int(os.environ.get("FUZZ_SEED", "20261101"))
FRAMES = int(os.environ.get("FUZZ_FRAMES", "100000"))
KINDS = ["uvicorn-rt", "uvicorn"]
STRANGERS = 6  # connections at a time
PATIENCE = 15.0  # seconds; an answer that takes so long does not come

HTTP_WORDS = {"WARNING:  Invalid HTTP request received.", "WARNING:  Unsupported upgrade request."}  # uvicorn's own
NOT_UTF8 = (
    "ERROR:    Invalid UTF-8 sequence received from client."  # and a traceback: uvicorn's, but not with our class
)
FENCE = frame(b'{"do":"push","data":"fence","event":"fence"}')
ACTS = [
    {"do": "join", "group": "public", "data": 1},
    {"do": "join", "group": "gärten/7"},
    {"do": "leave", "group": "public"},
    {"do": "track", "group": "public", "event": "typing"},
    {"do": "untrack", "group": "public"},
    {"do": "say", "group": "public", "data": {"text": "hello", "tags": [1, 2.5, None, True]}},
    {"do": "say", "group": "public", "event": "moved", "data": [[0, 1], {"a": {"b": "c"}}]},
    {"do": "push", "data": "x" * 100},
    {"do": "raw", "data": ["raw", {"é": "\u2028"}]},
]
SEEDS = [json.dumps(act, ensure_ascii=False).encode() for act in ACTS]
ODD = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"\0",
    b"[" * 5000,
    b'{"a":' * 3000,
    b"[" * 64 + b"]" * 64,
    b'{"do":"push","data":' + b"[" * 63 + b"]" * 63 + b"}",
    b'{"do":"push","data":' + b"9" * 5000 + b"}",
    b'{"do":"push","data":1e308}',
    b'{"do":"push","data":1e309}',
    b'{"do":"push","data":-0.0}',
    b'{"do":"push","data":NaN}',
    b'{"do":"push","data":"\\ud800"}',
    b'{"do":"push","data":"\\udc00\\ud800"}',
    b'{"do":"push","data":"\\u0000\\uffff"}',
    b'{"do":"push","event":"","data":1}',
    b'{"do":"push","event":"\\n","data":1}',
    b'{"do":"join","group":"~admin"}',
    b'{"do":"join","group":"' + b"g" * 256 + b'"}',
    b'{"do":"join","group":7}',
    b'{"do":"say","group":"\\u202e","data":0}',
    b'{"do":"do","do":"push","do":"push","data":{"data":1,"data":2}}',
    b'\xef\xbb\xbf{"do":"push"}',
    b"x" * 70_000,
    b'"' + b"y" * 65_533 + b'"',
]


# What is sent


def mutated(rng: random.Random) -> bytes:
    """A good message with a few bytes changed, dropped, doubled or moved."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randrange(4)):
        place = rng.randrange(len(data) + 1)
        rng.choice(MUTATIONS)(rng, data, place)
    return bytes(data)


def flip(rng: random.Random, data: bytearray, place: int) -> None:
    if place < len(data):
        data[place] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, data: bytearray, place: int) -> None:
    del data[place : place + rng.randrange(8)]


def repeat(rng: random.Random, data: bytearray, place: int) -> None:
    data[place:place] = data[place : place + 20] * rng.randrange(1, 5)


def insert(rng: random.Random, data: bytearray, place: int) -> None:
    data[place:place] = rng.choice([b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\ud83d", b"1e9", b"-", b"null"])


MUTATIONS = [flip, cut, repeat, insert]


def text(data: bytes) -> bytes:
    """What a text frame may carry: well-formed UTF-8."""
    return data.decode("utf-8", "replace").encode()


def fragments(rng: random.Random, payload: bytes, opcode: int) -> bytes:
    """One message in pieces, with a ping between them now and then."""
    cuts = sorted(rng.randrange(len(payload) + 1) for _ in range(rng.randrange(1, 5)))
    pieces = [payload[start:end] for start, end in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
    frames = []
    for number, piece in enumerate(pieces):
        frames.append(frame(piece, 0 if number else opcode, number == len(pieces) - 1, mask(rng)))
        if rng.random() < 0.2:
            frames.append(frame(rng.randbytes(rng.randrange(126)), PING, mask=mask(rng)))
    return b"".join(frames)


def mask(rng: random.Random) -> bytes:
    return b"\0\0\0\0" if rng.random() < 0.9 else rng.randbytes(4)


def lawful(rng: random.Random) -> bytes:
    """A message that RFC 6455 allows, whatever it says."""
    kind = rng.random()
    if kind < 0.55:
        payload, opcode = mutated(rng), TEXT
    elif kind < 0.65:
        payload, opcode = rng.choice(ODD), TEXT
    elif kind < 0.75:
        payload, opcode = "".join(map(chr, (rng.randrange(1, 0xD800) for _ in range(rng.randrange(40))))).encode(), TEXT
    elif kind < 0.85:
        payload, opcode = rng.randbytes(rng.randrange(300)), BINARY
    elif kind < 0.95:
        payload, opcode = mutated(rng), BINARY
    else:
        return frame(rng.randbytes(rng.randrange(126)), rng.choice([PING, PONG]), mask=mask(rng))
    payload = text(payload) if opcode == TEXT else payload
    if rng.random() < 0.1:
        return fragments(rng, payload, opcode)
    return frame(payload, opcode, mask=mask(rng))


def lawless(rng: random.Random) -> bytes:
    """What no client may send."""
    some = rng.randbytes(rng.randrange(20))
    return rng.choice(
        [
            lambda: frame(some, rng.choice([3, 4, 5, 6, 7, 11, 12, 13, 14, 15])),
            lambda: frame(some, TEXT, mask=None),
            lambda: frame(some, rng.choice([TEXT, BINARY]), rsv=rng.randrange(1, 8)),
            lambda: frame(some, 0),
            lambda: frame(b"a", TEXT, fin=False) + frame(b"b", TEXT),
            lambda: frame(some, PING, fin=False),
            lambda: frame(b"p" * 126, rng.choice([PING, PONG, CLOSE])),
            lambda: frame(b"\x03", CLOSE),
            lambda: frame(struct.pack(">H", rng.choice([0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535])), CLOSE),
            lambda: frame(struct.pack(">H", rng.choice([1000, 1001, 3000, 4999])) + b"bye", CLOSE) + FENCE,
            lambda: frame(struct.pack(">H", 1000) + b"\xff", CLOSE),
            lambda: struct.pack(">BBQ", 0x81, 0xFF, rng.choice([1 << 63, (1 << 63) - 1, 1 << 40, 17 << 20])) + some,
            lambda: struct.pack(">BBH", 0x81, 0xFE, 5) + some,  # a length that is longer than it need be
            lambda: frame(b"cut short", TEXT)[: rng.randrange(1, 15)],
            lambda: frame(b"never ended", TEXT, fin=False),
            lambda: rng.randbytes(rng.randrange(1, 200)),
        ]
    )()


def not_utf8(rng: random.Random) -> bytes:
    """Text that is none, whole or in fragments."""
    wrong = rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok\x80ok", b"\xc0\xaf"])
    return frame(wrong) if rng.random() < 0.5 else frame(wrong[:1], fin=False) + frame(wrong[1:], 0)


def handshake(rng: random.Random, greeting: bytes) -> bytes:
    """A handshake that is cut, or has a few bytes wrong."""
    data = bytearray(greeting)
    for _ in range(rng.randrange(3)):
        rng.choice(MUTATIONS)(rng, data, rng.randrange(len(data)))
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.6 else data)


# Who sends it


class Strangers:
    """Peers that come, send a batch, read until it has been dealt with, and go one way or another."""

    def __init__(self, server: Server, seed: str) -> None:
        self._server, self._seed = server, seed
        self._visits = itertools.count()
        self.sent = 0
        self.ends: Counter[str] = Counter()

    async def run(self, frames: int) -> None:
        """Send so many frames, a few strangers at a time."""
        async with asyncio.TaskGroup() as group:
            for _ in range(STRANGERS):
                group.create_task(self._come_and_go(frames))

    async def _come_and_go(self, frames: int) -> None:
        while self.sent < frames:
            rng = random.Random(f"{self._seed} {next(self._visits)}")  # each batch is its own, whoever overtakes whom
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection(HOST, self._server.port)
                try:
                    end = await self._visit(rng, reader, writer)
                except (ConnectionError, asyncio.IncompleteReadError):
                    end = "cut off"
                finally:
                    leave(rng, writer)
                self.ends[end] += 1

    async def _visit(self, rng: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        greeting = hello(self._server, "/public")
        if rng.random() < 0.05:
            writer.write(handshake(rng, greeting))
            self.sent += 1
            return "no handshake"
        writer.write(greeting)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(self._batch(rng))
        return await read_to_the_end(reader)

    def _batch(self, rng: random.Random) -> bytes:
        """Frames that are dealt with one by one, then the fence or something after which there is no going on."""
        many = rng.randrange(1, 46) if rng.random() < 0.95 else 150  # too many faults close
        frames = [lawful(rng) for _ in range(many)]
        self.sent += many + 1
        frames.append(FENCE if rng.random() < 0.6 else rng.choice([lawless, lawless, not_utf8])(rng) + FENCE)
        return b"".join(frames)


def leave(rng: random.Random, writer: asyncio.StreamWriter) -> None:
    """Reset the connection, say goodbye, or just go."""
    how = rng.random()
    if how < 0.3:
        writer.transport.abort()
    elif how < 0.5:
        with suppress(RuntimeError):  # it is closing
            writer.write(frame(b"\x03\xe8", CLOSE))
    writer.close()


async def read_to_the_end(reader: asyncio.StreamReader) -> str:
    """Read until the fence comes back, a Close frame, or nothing for a moment: half a frame is waited for."""
    while True:
        try:
            async with asyncio.timeout(0.5):
                first, size = await reader.readexactly(2)
        except TimeoutError:
            return "waited for"
        if size > 125:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8))
        payload = await reader.readexactly(size)
        if first == 0x80 | CLOSE:
            return str(int.from_bytes(payload[:2]))
        if payload == b'{"event":"fence","data":"fence"}':
            return "answered"


# Who must not notice


async def exchange(ann: ClientConnection, bob: ClientConnection, group: str, enough: asyncio.Event) -> int:
    """Say one number after the other, each when both have heard the one before; return how many."""
    number = 0
    while not enough.is_set():
        speaker = (ann, bob)[number % 2]
        await speaker.send(json.dumps({"do": "say", "group": group, "data": number}))
        for listener in (ann, bob):
            async with asyncio.timeout(PATIENCE):
                assert json.loads(await listener.recv()) == number
        number += 1
    return number


async def among_neighbours(server: Server, strangers: Strangers, frames: int) -> int:
    headers = bearer(server, "neighbour")
    async with (
        connect(server.url + "/ws", additional_headers=headers) as ann,
        connect(server.url + "/ws", additional_headers=headers) as bob,
    ):
        for peer in (ann, bob):
            await peer.send('{"do": "join", "group": "home"}')
            await peer.send('"joined"')
            assert json.loads(await peer.recv()) == {"echo": "joined"}
        enough = asyncio.Event()
        talking = asyncio.create_task(exchange(ann, bob, "home", enough))
        await strangers.run(frames)
        enough.set()
        exchanged = await talking
        await asyncio.to_thread(check_that_only_neighbours_are_left, server)
    return exchanged


def check_that_only_neighbours_are_left(server: Server) -> None:
    def settled(now: Any) -> bool:
        return (now["connections"], now["groups"], now["slow"], now["alive"]) == (2, 2, 0, 2)

    now = eventually(lambda: ask(server, "/stats?full=1"), settled, PATIENCE)
    print(json.dumps({key: value for key, value in now.items() if key != "ended"}))
    assert now.get("failed", 0) == 0, "the handler has no bug, and no frame may find one"
    assert now["tasks"] < 20


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_leaves_a_trace_or_disturbs_a_neighbour(kind: str) -> None:
    print(f"FUZZ_SEED={SEED} FUZZ_FRAMES={FRAMES}")
    frames = FRAMES // len(KINDS)
    with serve("tests.live:app", kind, env={"PRESENCE_GRACE": "0.5"}) as server:
        strangers = Strangers(server, f"{SEED} {kind}")
        exchanged = asyncio.run(among_neighbours(server, strangers, frames))
        print(f"{kind}: {strangers.sent} frames, {exchanged} messages between the neighbours, {dict(strangers.ends)}")
        said = loud(server.log())
        assert set(said if kind == "uvicorn-rt" else without_uvicorns_own(said)) <= HTTP_WORDS
        assert exchanged > 100
        assert ask(server, "/stats")["received"] > frames / 2  # the rest ended its connection below us
        assert strangers.ends.keys() - {"answered", "waited for", "cut off", "no handshake", "4502"} <= LAWFUL_ENDS


def without_uvicorns_own(lines: list[str]) -> list[str]:
    """Return the lines that are in no report of text which is not UTF-8; see docs/servers.md."""
    left: list[str] = []
    inside = False
    for line in lines:
        inside = inside or line == NOT_UTF8
        if not inside:
            left.append(line)
        inside = inside and not line.startswith("UnicodeDecodeError:")
    return left


def test_the_sieve_takes_out_uvicorns_report_and_nothing_else() -> None:
    report = [NOT_UTF8, "Traceback (most recent call last):", "  File", "UnicodeDecodeError: 'utf-8' codec"]
    assert without_uvicorns_own(["ERROR: a", *report, *report, "Traceback"]) == ["ERROR: a", "Traceback"]


LAWFUL_ENDS = {"0", "1000", "1001", "1002", "1007", "1009", "3000", "4999"}
