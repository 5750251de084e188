"""What may be said on the wire: the frames, their sizes and their names; never how they are spelled.

The law of this file: a frame is a frozen value that knows nothing of JSON, of sockets or of who gets it.
Names and sizes are checked here, once, at the edge where they come in. `protocols/` spells the frames for
one kind of client, `hub.py` brings them to the peers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .exceptions import EventError

MAX_NAME = 255  # characters of a group's or an event's name
MAX_META = 4096  # bytes of one presence meta, spelled as JSON
MAX_MESSAGE = 64 * 1024  # bytes of one incoming message, unless the endpoint says otherwise

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Event:
    """Something said by the host's code: to a group, or to one client where ``group`` is ``None``.

    ``json`` is the data spelled as JSON: that is done once, when it is published.
    """

    event: str
    data: Any
    json: bytes
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Raw:
    """A WebSocket message that the host spelled itself."""

    data: str | bytes


@dataclass(frozen=True, slots=True)
class Error:
    """A refusal, answered to the one who asked."""

    code: str
    message: str
    temporary: bool = False
    retry_after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class PresenceState:
    """Who is in a group, one page of it; ``after`` is the key to ask the next page with."""

    group: str
    version: int
    members: Mapping[str, Sequence[Mapping[str, Any]]]
    after: str | None = None


@dataclass(frozen=True, slots=True)
class PresenceDiff:
    """What changed in a group's presence since the version before, net."""

    group: str
    version: int
    joins: Mapping[str, Sequence[Mapping[str, Any]]]
    leaves: Mapping[str, Sequence[Mapping[str, Any]]]
    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PresenceCount:
    """How many members a group has."""

    group: str
    count: int


Frame = Event | Raw | Error | PresenceState | PresenceDiff | PresenceCount


def error_frame(error: EventError) -> Error:
    """Return the frame that answers ``error``."""
    after = error.retry_after
    milliseconds = None if after is None else max(1, math.ceil(after * 1000))
    return Error(printable(error.code), printable(error.message), error.temporary, milliseconds)


def size_of(data: str | bytes) -> int:
    """Return the bytes that ``data`` takes on the wire; raises `UnicodeEncodeError` for a lone surrogate."""
    return len(data.encode()) if isinstance(data, str) and not data.isascii() else len(data)


def printable(text: str) -> str:
    """Return ``text`` without lone surrogates: what an error quotes may hold some, and no wire carries them."""
    return text.encode("utf-8", "replace").decode()


def check_name(name: object, what: str = "group") -> str:
    """Return ``name`` if it can be a group's or an event's name.

    A name is a string of 1 to 255 printable characters. Raises `EventError` ``bad_name``, so that a name
    which came from a client is answered and not logged.
    """
    if not isinstance(name, str):
        raise EventError("bad_name", f"{what} names are strings")
    if not 0 < len(name) <= MAX_NAME:
        raise EventError("bad_name", f"{what} names have 1 to {MAX_NAME} characters")
    if not name.isprintable():
        raise EventError("bad_name", f"{what} names have printable characters only")
    return name


def check_group(name: object) -> str:
    """Return ``name`` if it can be a group that one joins or tracks; ``~…`` are the groups of identities."""
    group = check_name(name)
    if group.startswith("~"):
        raise EventError("bad_name", "group names that begin with ~ are reserved")
    return group


def plain_data(data: Any) -> Any:
    """Return ``data`` as a value of its own in the JSON model plus ``bytes``.

    Dataclasses, structs, datetimes, UUIDs, decimals, enums, sets and Pydantic models become what JSON says
    of them. Raises `TypeError` for what has no such form, `ValueError` for what is nested too deep.
    """
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data)
    try:
        return msgspec.to_builtins(data, builtin_types=(bytes,), str_keys=True, enc_hook=_dump)
    except RecursionError:
        raise ValueError("the data is nested too deep or contains itself") from None


def encode(data: Any) -> bytes:
    """Return ``data`` as JSON; bytes are said as base64, numbers that are not finite as null.

    Raises `ValueError` for what no wire can carry: lone surrogates, integers beyond Python's 4,300 digits.
    """
    return _encode(data)


def event(name: str, data: Any) -> Event:
    """Return the frame that says ``data`` to one client; raises as `plain_data`, `encode` and `check_name` do."""
    plain = plain_data(data)
    return Event(check_name(name, "event"), plain, encode(plain))


def plain_meta(meta: Any) -> dict[str, Any]:
    """Return a presence meta as a JSON object of at most 4 kB; raises `TypeError` or `ValueError` otherwise."""
    plain = plain_data({} if meta is None else meta)
    if not isinstance(plain, dict):
        raise TypeError("a presence meta is an object: a dict, a dataclass or a model")
    if len(encode(plain)) > MAX_META:
        raise ValueError(f"a presence meta has at most {MAX_META} bytes")
    return plain


def _dump(value: Any) -> Any:
    """Turn a Pydantic model into what msgspec knows."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be sent: give JSON data, bytes, a dataclass or a model")
