"""Frames of the protocol v1, mutated, by the hundred thousand: a client may send whatever it likes.

The law of this file: everything comes from one seed. What is decoded is looked at further, as a server would: its
data is decoded too and said again in both spellings. Anything but a `ProtocolError` (or an `EventError` of the data)
is the failure. ``python -m tests.fuzz_v1 1000000 [seed]`` runs so many in all.
"""

from __future__ import annotations

import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from starlette_rt import frames
from starlette_rt.events import Decoder
from starlette_rt.exceptions import EventError, ProtocolError
from starlette_rt.frames import Emit, Error, Join, Murmur, Reply, Track, Update
from starlette_rt.protocols.bounds import MAX_INT
from starlette_rt.protocols.v1 import V1, V1S, Malformed

SEED = 20261101
CODES = {"unsupported", "bad_message", "bad_name", "invalid", "too_large"}
DEEP: Any = None
for _ in range(70):
    DEEP = [DEEP]
SAID: list[Any] = [
    {"type": "join", "ref": 1, "group": "board:7", "position": {"epoch": "x3kQ", "offset": 41, "tag": "9f1c"}},
    {"type": "join", "ref": 2**53 - 1, "group": "gärten", "last": 50, "presence": "count"},
    {"type": "leave", "ref": 2, "group": "board:7"},
    {"type": "event", "ref": 3, "id": "Xw3v9qkT", "event": "say", "group": "board:7", "data": {"text": "hello"}},
    {"type": "event", "event": "draw", "data": [[0, -1, 2.5, 300, 70_000], {"a": {"b": [None, True, "é🙂"]}}]},
    {"type": "event", "event": "say", "data": {"text": "hi", "more": [{"deep": [[[[[1]]]]]}]}},
    {"type": "whisper", "group": "board:7", "event": "typing", "data": {"where": "title"}},
    {"type": "whisper", "group": "board:7", "event": "typing", "stop": True},
    {"type": "track", "ref": 4, "group": "board:7", "meta": {"name": "Ada", "n": [1, {"x": 2}]}},
    {"type": "update", "ref": 5, "group": "board:7", "meta": {"name": "Ada", "away": True}},
    {"type": "untrack", "ref": 6, "group": "board:7"},
    {"type": "presence", "ref": 7, "group": "board:7", "after": "ada", "limit": 200},
    {"type": "refresh", "ref": 8, "token": "eyJz"},
    {"type": "reply", "ref": 9, "data": {"agreed": True}},
    {"type": "error", "ref": 9, "code": "declined", "message": "not now", "retry_after_ms": 5},
    {"type": "pong"},
    {"type": "later", "ref": 1, "x": [1, {"y": 2}]},
]
SAID += [SAID[:5], [SAID[3]] * 20, SAID[5:17], [], {"type": "event", "ref": 3, "event": "deep", "data": DEEP}]

WORDS = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u0000", b"\\ud83d", b"\\ud800", b"1e400", b"-0.0", b"NaN"),
    *(b"null", b"true", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\xe2\x80\xae", b"9" * 400, b"9" * 4400),
    *(b'"type":"reply",', b'"type":7,', b'"ref":-1,', b'"ref":[{}],', b'"group":"~x",', b'"event":"",', b'"id":"",'),
    *(b'"data":', b'"meta":', b"[" * 70, b"]" * 70, b'{"a":' * 70, b"}" * 70, b"[" * 2000, b"[[],[]]" * 200),
    b'"last":0,' + b'"limit":201,',
    b"[" * 70 + b"]" * 70,
]
PACKED_WORDS = [
    *(bytes([first]) for first in [*range(0x80, 0xA2), *range(0xC0, 0xE0), 0xFF]),
    *(b"\x91" * 70, b"\x81\xa1a" * 70, b"\x91" * 2000, b"\x90" * 300, b"\x81\x01", b"\x81\x91\x01", b"\x81\x80"),
    *(b"\xd6\xff\0\0\0\x01", b"\xd5\xff\0\0", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xd4\x05\x01", b"\xa1\xff"),
    *(b"\xa4type", b"\xa5event", b"\xa5group", b"\xa3ref", b"\xa4data\x81", b"\xa4meta\x81", b"\xa2id", b"\xa4join"),
    b"\x91" * 70 + b"\xc0",
    *(b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\0" * 7, b"\xc4\x03\x80\x90\xff"),
]
LENGTHS = [b"\xdc", b"\xdd", b"\xde", b"\xdf", b"\xd9", b"\xda", b"\xdb", b"\xc4", b"\xc5", b"\xc6", b"\xc7", b"\xc9"]


class Message(msgspec.Struct):
    """What the typed handler takes."""

    text: str
    more: Any = None


class Fuzz:
    """Mutates what is said in one spelling and counts what becomes of it."""

    def __init__(self, protocol: V1, seed: str) -> None:
        self._protocol = protocol
        self._rng = random.Random(seed)
        json = protocol is V1S["rt.v1.json"]
        encode: Callable[[Any], bytes] = msgspec.json.encode if json else msgspec.msgpack.encode
        self._said = [encode(value) for value in SAID]
        self._words = WORDS if json else PACKED_WORDS
        self._typed = Decoder(Message)
        self._json = json
        self.outcomes: Counter[str] = Counter()

    def run(self, many: int) -> None:
        for _ in range(many):
            raw = self.mutated()
            try:
                self.look_at(self._text(raw) if self._json is not self._odd() else raw)
            except Exception as error:
                raise AssertionError(f"{self._protocol.name}: {raw!r} ({type(error).__name__})") from error

    def _odd(self) -> bool:
        """Whether a message comes in the other kind, text or binary."""
        return self._rng.random() < 0.02

    def mutated(self) -> bytes:
        """A message with a few bytes changed, dropped, doubled, moved or spoken in between."""
        rng = self._rng
        data = bytearray(rng.choice(self._said))
        for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
            rng.choice(MUTATIONS)(self, data, rng.randrange(len(data) + 1))
        return bytes(data) if rng.random() < 0.98 else rng.randbytes(rng.randrange(60))

    def flip(self, data: bytearray, place: int) -> None:
        if place < len(data):
            data[place] ^= 1 << self._rng.randrange(8)

    def overwrite(self, data: bytearray, place: int) -> None:
        data[place : place + 1] = self._rng.randbytes(1)

    def cut(self, data: bytearray, place: int) -> None:
        del data[place : place + self._rng.choice([1, 2, 4, 8, 100_000])]

    def repeat(self, data: bytearray, place: int) -> None:
        piece = data[place : place + self._rng.randrange(1, 40)]
        data[place:place] = piece * self._rng.choice([1, 1, 2, 80])

    def splice(self, data: bytearray, place: int) -> None:
        other = self._rng.choice(self._said)
        data[place:] = other[self._rng.randrange(len(other)) :]

    def word(self, data: bytearray, place: int) -> None:
        data[place:place] = self._rng.choice(self._words)

    def value(self, data: bytearray, place: int) -> None:
        """Put a word where a value is, so that what is around stays right."""
        name = b'"data":' if self._json else b"\xa4data"
        found = data.find(name)
        if found >= 0:
            data[found + len(name) : found + len(name) + self._rng.randrange(2)] = self._rng.choice(self._words)

    def length(self, data: bytearray, place: int) -> None:
        """Put a length there that is too long, or just odd; in JSON a number is one."""
        size = self._rng.choice([0, 1, 16, 255, 9_999, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1])
        long = struct.pack(">I", size)
        bomb = str(size).encode() if self._json else self._rng.choice(LENGTHS) + self._rng.choice([long, long[2:]])
        data[place : place + self._rng.randrange(3)] = bomb

    @staticmethod
    def _text(raw: bytes) -> str:
        return raw.decode("utf-8", "surrogateescape")

    def look_at(self, raw: str | bytes) -> None:
        """Do with a message what a server and what a client would do."""
        try:
            got = self._protocol.decode(raw)
        except ProtocolError as error:
            return self._refused(error)
        finally:
            self._as_a_client(raw)
        for frame in got:
            if isinstance(frame, Malformed):
                assert frame.ref is None or 0 <= frame.ref <= MAX_INT
                self._refused(frame.error)
            else:
                self._handle(frame)
        self.outcomes["messages"] += 1

    def _refused(self, error: EventError) -> None:
        assert error.code in CODES
        assert self._protocol.encode(frames.error_frame(error))
        self.outcomes[error.code] += 1

    def _as_a_client(self, raw: str | bytes) -> None:
        try:
            self._protocol.decode_server(raw)
        except ProtocolError as error:
            assert error.code in CODES  # noqa: PT017 - any other code is the failure

    def _handle(self, frame: Any) -> None:
        assert repr(frame)
        ref = getattr(frame, "ref", None)
        assert ref is None or 0 <= ref <= MAX_INT
        if isinstance(frame, Join | Track | Update | Murmur):
            assert frames.check_name(frame.group) == frame.group
        if isinstance(frame, Track | Update) and frame.meta:
            self._say_again(frame.meta)
        if isinstance(frame, Error):
            assert frame.retry_after_ms is None or 0 <= frame.retry_after_ms <= MAX_INT
        if isinstance(frame, Emit | Murmur | Reply):
            self._decode_data(frame.data)
        self.outcomes[type(frame).__name__] += 1

    def _decode_data(self, raw: Any) -> None:
        for decoder in (None, self._typed):
            try:
                value = self._protocol.data(raw, decoder)
            except EventError as error:
                self._refused(error)
            else:
                self._say_again(value)
                self.outcomes["data" if decoder is None else "typed"] += 1

    def _say_again(self, value: Any) -> None:
        """What was received can be said to every client."""
        event = frames.event("said", {"from": "ada", "said": value})
        assert all(protocol.encode(event) for protocol in V1S.values())


MUTATIONS = [Fuzz.flip, Fuzz.overwrite, Fuzz.cut, Fuzz.repeat, Fuzz.splice, Fuzz.word, Fuzz.value, Fuzz.length]


def fuzz(protocol: V1, many: int, seed: object = SEED) -> Counter[str]:
    """Run so many messages of one spelling; return what became of them."""
    run = Fuzz(protocol, f"{seed} {protocol.name}")
    run.run(many)
    return run.outcomes


def main(many: str, seed: str = str(SEED)) -> None:
    each = int(many) // len(V1S)
    for protocol in V1S.values():
        started = time.perf_counter()
        outcomes = fuzz(protocol, each, seed)
        print(f"{protocol.name}: {each} messages, {time.perf_counter() - started:.1f} s, {dict(outcomes)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
