"""The protocol v1, both roles, as JSON and as MessagePack (``rt.v1.json``, ``rt.v1.msgpack``).

The law of this file: sans-I/O, frames to text or bytes and back, exactly as docs/protocol.md says. What a client
sends is hostile: it is held to the bounds of `bounds.py`, decoded in one pass, and whatever it is, nothing but a
`ProtocolError` comes of it. A frame that is wrong takes no other frame of its message with it. The data of an
event stays spelled until its handler's type is known. No list of codecs is anywhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Protocol, get_args

import msgspec

from .. import frames
from ..exceptions import EventError, ProtocolError
from ..frames import MAX_NAME, ClientFrame, Emit, Frame, ServerFrame
from ..history import Position
from .bounds import (
    MAX_ELEMENTS,
    MAX_ID,
    MAX_INT,
    TOO_DEEP,
    Check,
    check_frames,
    check_json,
    check_levels,
    check_plain,
    checks_of,
    too_large,
    walk,
)
from .plain import MAX_DEPTH, brackets

# What a decoder of msgspec raises for bytes that somebody else wrote: 0.19 says TypeError of a map that is a key.
FAULTS = (msgspec.DecodeError, ValueError, RecursionError, TypeError)


@dataclass(frozen=True, slots=True)
class Malformed:
    """What stood in the place of a frame; the answer to it is ``error``, to ``ref`` if it had one."""

    error: ProtocolError
    ref: int | None


class Decodes(Protocol):
    """Decodes what is said in either spelling into one type; `events.py` has them."""

    def decode(self, raw: Any, /) -> Any:
        """Return the value of JSON."""

    def decode_msgpack(self, raw: Any, /) -> Any:
        """Return the value of MessagePack."""


# Frames as they are on the wire, where that differs from what they are to us.


class Answered(Frame, frozen=True, tag="reply"):
    """A `frames.Reply` that was received."""

    ref: int
    data: msgspec.Raw = msgspec.Raw()
    once: Any = None  # whatever a client says there, it means nothing


class Declined(Frame, frozen=True, tag="error"):
    """A `frames.Error` of a client, which owes nothing but a code and a ref."""

    ref: int
    code: str
    message: str = ""
    temporary: bool = False
    retry_after_ms: int | None = None


class Replied(Frame, frozen=True, tag="reply"):
    """A `frames.Reply` or `frames.Recovery` that is said: its data is there also where it is null."""

    ref: int
    data: Any
    once: str | None = None


class Recovered(msgspec.Struct, frozen=True):
    """The data of a reply to a join."""

    position: Position | None
    recovered: bool
    events: list[msgspec.Raw]
    snapshot: Any = msgspec.UNSET


class Said(Frame, frozen=True, tag="event"):
    """A `frames.Event` that is said."""

    event: str
    data: Any
    group: str | None = None
    offset: int | None = None
    tag: str | None = None
    id: str | None = None
    ref: int | None = None


class Heard(Frame, frozen=True, tag="event"):
    """A `frames.Event` or `frames.Skip` that was received."""

    event: str | None = None
    data: msgspec.Raw = msgspec.Raw()
    group: str | None = None
    offset: int | None = None
    tag: str | None = None
    id: str | None = None
    ref: int | None = None
    skip: bool = False


class Head(msgspec.Struct, frozen=True):
    """What can be read of a frame that is wrong."""

    type: Any = None
    ref: Any = None


Kinds = tuple[type[msgspec.Struct], ...]

FROM_CLIENT: Kinds = (*(set(get_args(ClientFrame)) - {frames.Reply, frames.Error}), Answered, Declined)
SPELLED_BY_HAND: set[type] = {frames.Event, frames.Skip, frames.Raw, frames.Recovery, frames.Reply}
FROM_SERVER: Kinds = (*(set(get_args(ServerFrame)) - SPELLED_BY_HAND), Answered, Heard)

# Data that is not said at all: msgspec leaves a default out by its identity.
SILENT: dict[type, msgspec.Raw] = {Emit: Emit("").data, frames.Murmur: frames.Murmur("", "").data}


def said(frame: frames.Event, data: Any) -> Said:
    """Return what is said of an event, its data as given."""
    return Said(frame.event, data, frame.group, frame.offset, frame.tag, frame.id, frame.ref)


def replied(frame: frames.Reply) -> Replied:
    """Return what is said of a reply."""
    nothing = type(frame.data) is msgspec.Raw and not frame.data
    return Replied(frame.ref, None if nothing else frame.data, frame.once)


def recovered(frame: frames.Recovery) -> Replied:
    """Return what is said of the reply to a join; its events are taken as they are."""
    events = [msgspec.Raw(event) for event in frame.events]
    return Replied(frame.ref, Recovered(frame.position, frame.recovered, events, frame.snapshot))


def declined(frame: frames.Error) -> Declined:
    """Return what a client says of an error."""
    return Declined(frame.ref or 0, frame.code, frame.message, frame.temporary, frame.retry_after_ms)


def answered(frame: Answered) -> frames.Reply:
    """Return the reply that was received."""
    return frames.Reply(frame.ref, frame.data, frame.once if isinstance(frame.once, str) else None)


def refused(frame: Declined) -> frames.Error:
    """Return the error that a client has said."""
    return frames.Error(frame.code, frame.message, frame.temporary, frame.retry_after_ms, frame.ref)


# Reading.


class Reader:
    """Reads the frames of one side in one spelling."""

    def __init__(self, language: str, decoder: Callable[[Any], Callable[[Any], Any]], kinds: Kinds) -> None:
        frame: Any = reduce(or_, kinds)
        self._language = language
        self._tags = {kind.__struct_config__.tag for kind in kinds}
        self._whole = decoder(frame | list[frame])
        self._frame = decoder(frame)
        self._pieces = decoder(list[msgspec.Raw])
        self._head = decoder(Head)

    def read(self, raw: str | bytes) -> list[Any]:
        """Return the frames of a message, a `Malformed` in the place of each that is wrong.

        Raises `ProtocolError` where there is no frame at all, and for too many.
        """
        try:
            got = self._whole(raw)
        except FAULTS:
            got = self._piece_by_piece(raw)
        if type(got) is not list:
            return [got]
        check_frames(got)
        return got

    def _piece_by_piece(self, raw: str | bytes) -> list[Any]:
        """Return what stands in a message of which something is wrong, less the frames that nobody knows."""
        try:
            pieces = self._pieces(raw)
        except msgspec.ValidationError:
            found = [self._one(raw)]
        except FAULTS as error:
            raise self.fault(error) from None
        else:
            check_frames(pieces)
            found = [self._one_of_many(piece) for piece in pieces]
        return [frame for frame in found if frame is not None]

    def _one_of_many(self, raw: msgspec.Raw) -> Any:
        try:
            return self._one(raw)
        except ProtocolError as error:
            return Malformed(error, None)

    def _one(self, raw: Any) -> Any:
        """Return a frame, a `Malformed`, or ``None`` for a frame of a type that came after us."""
        try:
            return self._frame(raw)
        except FAULTS as error:
            fault = self.fault(error)
        try:
            head = self._head(raw)
        except FAULTS as error:
            raise self.fault(error) from None
        unknown = type(head.type) is str and head.type not in self._tags
        return None if unknown else Malformed(fault, asked(head.type, head.ref))

    def fault(self, error: Exception) -> ProtocolError:
        """Return what is said of an error of msgspec's."""
        if isinstance(error, msgspec.ValidationError):
            return ProtocolError("invalid", str(error))
        if isinstance(error, RecursionError):
            return too_large(TOO_DEEP)
        return ProtocolError("bad_message", f"not {self._language}: {error}")


def asked(type_: object, ref: object) -> int | None:
    """Return the ref that an error answers: never that of an answer, whose number is the other side's own."""
    return ref if type(ref) is int and 0 <= ref <= MAX_INT and type_ not in ("reply", "error") else None


# The protocol.


class V1(ABC):
    """Spells and reads frames in one spelling, for a server and for a client."""

    answers = True
    binary: bool  # whether it is spoken in binary messages
    short: int  # characters or bytes of a message that cannot have too many elements
    null: msgspec.Raw

    def __init__(self, name: str, language: str, codec: Any, more: dict[str, Callable[[Any], None]]) -> None:
        self.name = name  # the subprotocol
        self._encode = codec.Encoder().encode
        self._decode = codec.Decoder().decode
        self._recovered = codec.Decoder(Recovered).decode
        self._client = Reader(language, lambda kind: codec.Decoder(kind).decode, FROM_CLIENT)
        self._server = Reader(language, lambda kind: codec.Decoder(kind).decode, FROM_SERVER)
        received: dict[type, Callable[[Any], Any]] = {Answered: answered, Declined: refused}
        self._checks: dict[type, tuple[list[Check], Callable[[Any], Any] | None]] = {
            kind: (checks_of(kind, more), received.get(kind)) for kind in FROM_CLIENT
        }
        self._to_client: dict[type, Callable[[Any], Any]] = {
            frames.Event: self._said,
            frames.Recovery: recovered,
            frames.Reply: replied,
        }
        self._to_server: dict[type, Callable[[Any], Any]] = {
            Emit: self._unsaid,
            frames.Murmur: self._unsaid,
            frames.Reply: replied,
            frames.Error: declined,
        }
        self._heard: dict[type, Callable[[Any], Any]] = {Answered: answered, Heard: self._event}

    # For both.

    @abstractmethod
    def join(self, spelled: Sequence[Any]) -> Any:
        """Return spelled frames, one at least, as one message: one alone as it is, others as a batch."""

    def raw(self, data: Any) -> msgspec.Raw:
        """Return plain data in this spelling."""
        return msgspec.Raw(self._spell(data))

    def data(self, raw: msgspec.Raw, decoder: Decodes | None = None) -> Any:
        """Return the data of an `Emit`, `Murmur` or `Reply` that was decoded here, of the decoder's type.

        Raises `EventError`: ``invalid`` for what is not of this type or has no form in JSON, ``bad_message`` for
        what is not of this spelling: that a text is not UTF-8 comes to light only here.
        """
        try:
            return self._data(raw or self.null, decoder)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise self._client.fault(error) from None

    # For the server.

    def encode(self, frame: ServerFrame) -> str | bytes:
        """Return the frame's text or bytes; its data is plain data, or a `msgspec.Raw` in this spelling."""
        wire = self._to_client.get(type(frame))
        if wire is not None:
            return self._spell(wire(frame))
        return self._spell(frame)

    def decode(self, raw: str | bytes) -> list[ClientFrame | Malformed]:
        """Return the frames of a client's message, in order; those of a type that came after us are left out.

        Raises `ProtocolError` where there is no frame at all, for what is beyond a bound of a message, and
        ``unsupported`` for text where bytes are spoken and the other way round.
        """
        if isinstance(raw, bytes) is not self.binary:
            kind = "binary" if self.binary else "text"
            raise ProtocolError("unsupported", f"{self.name} is spoken in {kind} messages")
        if len(raw) > self.short:
            self._check(raw)
        got = self._client.read(raw)
        return [self._checked(got[0])] if len(got) == 1 else [self._checked(frame) for frame in got]

    def _checked(self, frame: Any) -> Any:
        """Return ``frame``, or a `Malformed` if a field is beyond its bound.

        The frame that comes most is first looked at in one go, and if it is as most are, that is all.
        """
        if type(frame) is Emit:
            event, group, ref = frame.event, frame.group, frame.ref
            if (
                0 < len(event) <= MAX_NAME
                and event.isprintable()
                and (group is None or (0 < len(group) <= MAX_NAME and group.isprintable()))
                and (ref is None or 0 <= ref <= MAX_INT)
                and (frame.id is None or (0 < len(frame.id) <= MAX_ID and frame.id.isprintable()))
            ):
                return frame
        return frame if type(frame) is Malformed else self._looked_at(frame)

    def _looked_at(self, frame: Any) -> Any:
        """Return ``frame`` as it is to us, or a `Malformed` if a field is beyond its bound."""
        checks, received = self._checks[type(frame)]
        try:
            for name, check in checks:
                value = getattr(frame, name)
                if value is not None:
                    check(value)
        except EventError as error:
            ref = None if received else getattr(frame, "ref", None)
            return Malformed(ProtocolError(error.code, error.message), asked(None, ref))
        return received(frame) if received else frame

    # For the client.

    def encode_client(self, frame: ClientFrame) -> str | bytes:
        """Return the frame's text or bytes; the data of an `Emit` or `Murmur` is what `raw` returns."""
        wire = self._to_server.get(type(frame))
        return self._spell(frame if wire is None else wire(frame))

    def decode_server(self, raw: str | bytes) -> list[ServerFrame]:
        """Return the frames of a server's message, in order; those of a type that came after us are left out.

        The data of a `Reply` is a `msgspec.Raw`: give it to `data`, or the whole reply to `recovery` if it
        answers a join. Raises `ProtocolError` if one frame is wrong.
        """
        got = self._server.read(raw)
        for frame in got:
            if type(frame) is Malformed:
                raise frame.error
        return [self._heard[type(frame)](frame) if type(frame) in self._heard else frame for frame in got]

    def recovery(self, reply: frames.Reply) -> frames.Recovery:
        """Return the reply to a join as what it is; raises `ProtocolError` if it is not."""
        try:
            got = self._recovered(reply.data)
            events = [self._spelled(event) for event in got.events]
        except FAULTS as error:
            raise self._server.fault(error) from None
        return frames.Recovery(reply.ref, got.position, got.recovered, events, got.snapshot)

    def _event(self, frame: Heard) -> frames.Event | frames.Skip:
        if frame.skip and frame.group is not None and frame.offset is not None and frame.tag is not None:
            return frames.Skip(frame.group, frame.offset, frame.tag, True)
        if frame.event is None or frame.skip:
            raise ProtocolError("invalid", "Object is missing a required field of an event")
        data = self.data(frame.data)
        place = (frame.group, frame.offset, frame.tag, frame.id, frame.ref)
        return frames.Event(frame.event, data, frames.encode(data), *place)

    @staticmethod
    def _unsaid(frame: Any) -> Any:
        silent: msgspec.Raw = SILENT[type(frame)]
        return frame if frame.data else msgspec.structs.replace(frame, data=silent)

    # For one spelling.

    @abstractmethod
    def _spell(self, value: Any) -> str | bytes:
        """Return a frame of the wire, or data, as text or bytes."""

    @abstractmethod
    def _spelled(self, raw: msgspec.Raw) -> str | bytes:
        """Return what is spelled already as the text or bytes that it is."""

    @abstractmethod
    def _said(self, frame: frames.Event) -> Said:
        """Return what is said of an event."""

    @abstractmethod
    def _check(self, raw: Any) -> None:
        """Raise `ProtocolError` for a message that is beyond a bound."""

    @abstractmethod
    def _data(self, raw: msgspec.Raw, decoder: Decodes | None) -> Any:
        """Return the value of what is spelled."""


class Json(V1):
    """The protocol in JSON, in text messages."""

    binary = False
    short = 2 * MAX_ELEMENTS  # of which one is a comma
    null: msgspec.Raw = msgspec.Raw(b"null")

    def __init__(self) -> None:
        super().__init__("rt.v1.json", "JSON", msgspec.json, {"meta": check_levels})

    def join(self, spelled: Sequence[str]) -> str:
        return spelled[0] if len(spelled) == 1 else f"[{','.join(spelled)}]"

    def _spell(self, value: Any) -> str:
        text: bytes = self._encode(value)
        return text.decode()

    def _spelled(self, raw: msgspec.Raw) -> str:
        return bytes(raw).decode()

    def _said(self, frame: frames.Event) -> Said:
        return said(frame, msgspec.Raw(frame.json))

    def _check(self, raw: str | bytes) -> None:
        check_json(raw)

    def _data(self, raw: msgspec.Raw, decoder: Decodes | None) -> Any:
        suspect = len(raw) >= 2 * MAX_DEPTH and brackets(bytes(raw)) >= MAX_DEPTH
        value = self._decode(raw) if suspect or decoder is None else None
        if suspect:
            check_levels(value)
        return value if decoder is None else decoder.decode(raw)


class MessagePack(V1):
    """The protocol in MessagePack, in binary messages."""

    binary = True
    short = MAX_ELEMENTS
    null: msgspec.Raw = msgspec.Raw(b"\xc0")

    def __init__(self) -> None:
        super().__init__("rt.v1.msgpack", "MessagePack", msgspec.msgpack, {"meta": check_plain})

    def join(self, spelled: Sequence[bytes]) -> bytes:
        if len(spelled) == 1:
            return spelled[0]
        many = len(spelled)
        head = bytes([0x90 + many]) if many < 16 else b"\xdd" + many.to_bytes(4)
        return b"".join([head, *spelled])

    def _spell(self, value: Any) -> bytes:
        try:
            packed: bytes = self._encode(value)
        except OverflowError:
            packed = self._encode(smaller(value))
        return packed

    def _spelled(self, raw: msgspec.Raw) -> bytes:
        return bytes(raw)

    def _said(self, frame: frames.Event) -> Said:
        return said(frame, frame.data)

    def _check(self, raw: bytes) -> None:
        walk(raw)

    def _data(self, raw: msgspec.Raw, decoder: Decodes | None) -> Any:
        try:
            value = self._decode(raw)
        except TypeError as error:  # from here it is msgspec's, of a key that cannot be one; from a type it is not
            raise self._client.fault(error) from None
        check_plain(value)
        return value if decoder is None else decoder.decode_msgpack(raw)


def smaller(value: Any) -> Any:
    """Return ``value`` with floats for the integers that MessagePack has no form of: what JavaScript takes them for."""
    if type(value) is int and not -(2**63) <= value < 2**64:
        return float(value) if abs(value) < 2**1023 else None  # null is what JSON says of what is not finite
    if type(value) is dict:
        return {key: smaller(inner) for key, inner in value.items()}
    if type(value) is list:
        return [smaller(inner) for inner in value]
    if isinstance(value, msgspec.Struct):
        return type(value)(*[smaller(getattr(value, name)) for name in value.__struct_fields__])
    return value


V1S: dict[str, V1] = {protocol.name: protocol for protocol in (Json(), MessagePack())}
