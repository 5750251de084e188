"""How much a client may say: the bounds of single fields, of data, and of a whole message.

The law of this file: what is hostile is looked at before it is decoded, by counting what is cheap to count; only a
message that could be beyond a bound is gone through. A bound that is passed is a `ProtocolError`. Nothing here
knows what a frame means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .. import frames
from ..exceptions import ProtocolError
from ..frames import MAX_NAME
from ..history import Position
from .plain import MAX_DEPTH, brackets, containers, too_deep

MAX_ELEMENTS = 10_000  # values in arrays and objects of one message, frames and their fields too; an empty one has one
MAX_FRAMES = 1_000  # of one message
MAX_INT = 2**53 - 1  # what every client can count to
MAX_ID = 64  # characters
MAX_LAST = 10_000  # events
MAX_PAGE = 200  # members


# The bounds of single fields.


def within(name: str, least: int, most: int) -> Callable[[int], None]:
    """Return the check of a number."""

    def check(value: int) -> None:
        if not least <= value <= most:
            raise ProtocolError("invalid", f"Expected `int` from {least} to {most} - at `$.{name}`")

    return check


def check_id(value: str) -> None:
    """Check what an event is recognised by."""
    if not 0 < len(value) <= MAX_ID or not value.isprintable():
        raise ProtocolError("invalid", f"Expected 1 to {MAX_ID} printable characters - at `$.id`")


def check_event(value: str) -> None:
    """Check the name of an event."""
    if not 0 < len(value) <= MAX_NAME or not value.isprintable():
        frames.check_name(value, "event")  # which says what is wrong


def check_group(value: str) -> None:
    """Check the name of a group; whether a client may name a group of the server's is not decided here."""
    if not 0 < len(value) <= MAX_NAME or not value.isprintable():
        frames.check_name(value)


def check_position(value: Position) -> None:
    """Check what a client hands back; what it means is the backend's to say."""
    check_offset(value.offset)


def check_levels(value: Any) -> None:
    """Check how deep the data of a frame is; the frame itself is a level."""
    if too_deep([value]):
        raise too_large(TOO_DEEP)


def check_plain(value: Any) -> None:
    """Check that ``value`` is not too deep and has a form in JSON, base64 for bytes: MessagePack knows more."""
    level = [value]
    for _ in range(MAX_DEPTH - 1):
        level = inside(level)
        if not level:
            return
    if containers(level):
        raise too_large(TOO_DEEP)
    inside(level)


def inside(values: list[Any]) -> list[Any]:
    """Return what is in those of ``values`` that hold values; raises `ProtocolError` for what JSON has no form of."""
    found: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is dict:
            for key in value:
                if type(key) is not str:
                    raise ProtocolError("invalid", "Expected `str` as the key of every map")
            found += value.values()
        elif kind is list:
            found += value
        elif kind not in PLAIN_TYPES:
            raise ProtocolError("invalid", "Expected no `ext`")
    return found


PLAIN_TYPES = frozenset({type(None), bool, int, float, str, bytes})

check_offset: Callable[[int], None] = within("position.offset", 0, MAX_INT)

BOUNDS: dict[str, Callable[[Any], None]] = {
    "event": check_event,
    "group": check_group,
    "ref": within("ref", 0, MAX_INT),
    "id": check_id,
    "position": check_position,
    "last": within("last", 1, MAX_LAST),
    "limit": within("limit", 1, MAX_PAGE),
    "retry_after_ms": within("retry_after_ms", 0, MAX_INT),
}

Check = tuple[str, Callable[[Any], None]]


def checks_of(kind: type[msgspec.Struct], more: dict[str, Callable[[Any], None]]) -> list[Check]:
    """Return the fields of a client's frame that have a bound, each with its check."""
    checks = BOUNDS | more
    return [(field.name, checks[field.name]) for field in msgspec.structs.fields(kind) if field.name in checks]


# The bounds of a message.


def too_large(what: str) -> ProtocolError:
    """Return the refusal of what is beyond a bound."""
    return ProtocolError("too_large", f"more than {what}")


TOO_DEEP = f"{MAX_DEPTH} levels of nesting"
TOO_MANY = f"{MAX_ELEMENTS} elements"


def check_json(raw: str | bytes) -> None:
    """Refuse JSON of more elements than are allowed, before it is decoded.

    Each element but the first has a comma before it or a bracket around it: only where there are many it is looked
    which of them are in strings.
    """
    if marks(raw) > MAX_ELEMENTS and marks(outside_strings(raw)) > MAX_ELEMENTS:
        raise too_large(TOO_MANY)


def marks(raw: str | bytes) -> int:
    """Return how many commas and opening brackets there are."""
    return brackets(raw) + (raw.count(",") if isinstance(raw, str) else raw.count(b","))


NO_MARKS = bytes(set(range(256)) - set(b'[]{},:"'))


def outside_strings(raw: str | bytes) -> bytes:
    """Return the brackets, commas and colons of JSON that are not in a string; of what is not JSON, some.

    An element has two strings at most, its key and itself: what follows after so many counts as it is.
    """
    encoded = raw.encode("ascii", "replace") if isinstance(raw, str) else raw
    if b"\\" in encoded:
        encoded = encoded.replace(b"\\\\", b"").replace(b'\\"', b"")
    sparse = encoded.translate(None, NO_MARKS).replace(b'""', b"")  # most strings hold none, and that was all of them
    return b"".join(sparse.split(b'"', 4 * MAX_ELEMENTS + 2)[::2])


def heads() -> list[tuple[int, int, int, int]]:
    """Return how a value of MessagePack begins, by its first byte.

    That is: the bytes of its head; how many of these are a length; how many entries it has where the first byte
    says so; how many values an entry is: 1 in an array, 2 in a map, 0 in what holds none.
    """
    table = [(1, 0, 0, 0)] * 256
    for many in range(32):
        table[0xA0 + many] = (1 + many, 0, 0, 0)
    for many in range(16):
        table[0x80 + many], table[0x90 + many] = (1, 0, many, 2), (1, 0, many, 1)
    for first, size in {0xCA: 5, 0xCB: 9, 0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}.items():
        table[first] = (size, 0, 0, 0)
    for power in range(4):
        table[0xCC + power] = table[0xD0 + power] = (1 + 2**power, 0, 0, 0)
    for first, digits in {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}.items():
        table[first] = (1 + digits, digits, 0, 0)
    for first, digits in {0xC7: 1, 0xC8: 2, 0xC9: 4}.items():
        table[first] = (2 + digits, digits, 0, 0)
    for first, digits, values in ((0xDC, 2, 1), (0xDD, 4, 1), (0xDE, 2, 2), (0xDF, 4, 2)):
        table[first] = (1 + digits, digits, 0, values)
    return table


HEADS = heads()


def walk(raw: bytes) -> None:
    """Refuse MessagePack of more elements than are allowed, before it is decoded: go from value to value.

    What text and bytes hold is stepped over, so that a step is an element or its key. Where the message ends too
    early there is nothing to say: the decoder will.
    """
    place = seen = 0
    left = 1  # values that are still to come
    while left and place < len(raw):
        size, digits, many, values = HEADS[raw[place]]
        if digits:
            many = int.from_bytes(raw[place + 1 : place + 1 + digits])
        if values:
            seen += many or 1
            if seen > MAX_ELEMENTS:
                raise too_large(TOO_MANY)
        place += size if values else size + many
        left += many * values - 1


def check_frames(batch: list[Any]) -> None:
    """Refuse a batch of more frames than are allowed."""
    if len(batch) > MAX_FRAMES:
        raise too_large(f"{MAX_FRAMES} frames")
