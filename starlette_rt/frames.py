"""What may be said on the wire: the frames, their sizes and their names; never how they are spelled.

The law of this file: a frame is a frozen value that knows nothing of JSON, of sockets or of who gets it.
Names and sizes are checked here, once, at the edge where they come in. `protocols/` spells the frames for
one kind of client, `hub.py` brings them to the peers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from .exceptions import EventError
from .history import Position
from .presence import Member

MAX_NAME = 255  # characters of a group's or an event's name
MAX_META = 4096  # bytes of one presence meta, spelled as JSON
MAX_MESSAGE = 64 * 1024  # bytes of one incoming message, unless the endpoint says otherwise

_encode = msgspec.json.Encoder().encode


class Frame(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True):
    """What has the same names in every spelling: the tag is the frame's ``type``, the fields are its fields."""


# What a client says.


class Join(Frame, frozen=True, tag="join"):
    """Let me into this group; with ``position`` or ``last``, and tell me what I missed."""

    group: str
    ref: int | None = None
    position: Position | None = None
    last: int | None = None
    presence: Literal["members", "count"] | None = None


class Leave(Frame, frozen=True, tag="leave"):
    """Let me out of this group."""

    group: str
    ref: int | None = None


class Emit(Frame, frozen=True, tag="event"):
    """Something for a handler. ``data`` is still spelled: the handler's type decodes it."""

    event: str
    data: msgspec.Raw = msgspec.Raw()  # empty: there is none, which is null
    group: str | None = None
    ref: int | None = None
    id: str | None = None


class Murmur(Frame, frozen=True, tag="whisper"):
    """Something ephemeral for the other members of a group."""

    group: str
    event: str
    data: msgspec.Raw = msgspec.Raw()
    stop: bool = False
    ref: int | None = None


class Track(Frame, frozen=True, tag="track"):
    """Let me be present with this meta."""

    group: str
    meta: dict[str, Any] | None = None
    ref: int | None = None


class Update(Frame, frozen=True, tag="update"):
    """Let my meta be this one."""

    group: str
    meta: dict[str, Any] | None = None
    ref: int | None = None


class Untrack(Frame, frozen=True, tag="untrack"):
    """Let me be present no longer."""

    group: str
    ref: int | None = None


class Page(Frame, frozen=True, tag="presence"):
    """Tell me up to ``limit`` members after the key ``after``."""

    group: str
    ref: int | None = None
    after: str | None = None
    limit: int = 200


class Refresh(Frame, frozen=True, tag="refresh"):
    """My new token."""

    token: str
    ref: int | None = None

    def __repr__(self) -> str:
        return f"Refresh(ref={self.ref})"


class Pong(Frame, frozen=True, tag="pong"):
    """I am alive."""


# What both say.


class Reply(Frame, frozen=True, tag="reply"):
    """The answer to a ``ref``. From a client ``data`` is a `msgspec.Raw`, to a client it is plain data.

    ``once`` is ``node`` where an event with an id was handled once on its node, and the others could not be asked.
    """

    ref: int
    data: Any = None
    once: str | None = None


class Error(Frame, frozen=True, tag="error"):
    """A refusal, answered to the one who asked."""

    code: str
    message: str
    temporary: bool
    retry_after_ms: int | None = None
    ref: int | None = None


# What the server says.


class Welcome(Frame, frozen=True, tag="welcome"):
    """The first frame: who the client is here and what it may count on."""

    connection: str
    session: str
    identity: str
    ping_interval_ms: int
    ping_timeout_ms: int
    ttl_ms: int | None
    once_ms: int
    window: int
    max_size: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something said by the host's code: to a group, or to one client where ``group`` is ``None``.

    ``json`` is the data spelled as JSON: that is done once, when it is published. ``offset`` and ``tag`` are
    there in a group with history, ``id`` if a repetition of it could come, ``ref`` if an answer is waited for.
    """

    event: str
    data: Any
    json: bytes
    group: str | None = None
    offset: int | None = None
    tag: str | None = None
    id: str | None = None
    ref: int | None = None


class Skip(Frame, frozen=True, tag="event"):
    """An event that is not for this client: only its position moves."""

    group: str
    offset: int
    tag: str
    skip: Literal[True]


@dataclass(frozen=True, slots=True)
class Raw:
    """A WebSocket message that the host spelled itself."""

    data: str | bytes


@dataclass(frozen=True, slots=True)
class Recovery:
    """The reply to a join. ``events`` are spelled already, for the wire that this is said on."""

    ref: int
    position: Position | None
    recovered: bool
    events: Sequence[str | bytes] = ()
    snapshot: Any = msgspec.UNSET


class Joined(Frame, frozen=True, tag="joined"):
    """The server has joined this client to a group."""

    group: str
    position: Position | None


class Left(Frame, frozen=True, tag="left"):
    """The server has taken this client out of a group."""

    group: str
    code: str
    rejoin: bool


class Reset(Frame, frozen=True, tag="reset"):
    """The group's history broke: something may have been lost."""

    group: str
    position: Position


Metas = dict[str, dict[str, Any]]  # members as they are said: a key, its "metas", and in a diff perhaps a "reason"


class PresenceState(Frame, frozen=True, tag="presence_state"):
    """Who is in a group, one page of it; ``after`` is the key to ask the next page with."""

    group: str
    version: int
    members: Metas
    after: str | None


class PresenceDiff(Frame, frozen=True, tag="presence_diff"):
    """What changed in a group's presence since the version before, net."""

    group: str
    version: int
    joins: Metas
    leaves: Metas


class PresenceCount(Frame, frozen=True, tag="presence_count"):
    """How many members a group has."""

    group: str
    count: int


class Whispered(Frame, frozen=True, tag="whisper"):
    """A whisper of another member, stamped with its key; over after ``expires_ms``, and at ``stop``."""

    group: str
    event: str
    sender: str = msgspec.field(name="from")
    data: Any = msgspec.UNSET
    expires_ms: int | None = None
    stop: bool = False


class Ping(Frame, frozen=True, tag="ping"):
    """Are you alive?"""


class Goodbye(Frame, frozen=True, tag="goodbye"):
    """The connection is about to be closed."""

    code: int
    reason: str
    retry_after_ms: int | None = None


ClientFrame = Join | Leave | Emit | Murmur | Track | Update | Untrack | Page | Refresh | Pong | Reply | Error
ServerFrame = (
    Welcome
    | Event
    | Skip
    | Raw
    | Recovery
    | Reply
    | Error
    | Joined
    | Left
    | Reset
    | PresenceState
    | PresenceDiff
    | PresenceCount
    | Whispered
    | Ping
    | Goodbye
)


def told(members: Iterable[Member]) -> Metas:
    """Return members as they are said, in Phoenix's form: each key with its metas."""
    return {member.key: {"metas": list(member.metas)} for member in members}


def error_frame(error: EventError, ref: int | None = None) -> Error:
    """Return the frame that answers ``error``, to the request ``ref`` if there was one."""
    after = error.retry_after
    milliseconds = None if after is None else max(1, math.ceil(after * 1000))
    return Error(printable(error.code), printable(error.message), error.temporary, milliseconds, ref)


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
    if isinstance(data, (bytes, bytearray, memoryview)):
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
