"""The plain protocol: any WebSocket client, nothing to learn (no subprotocol, or ``rt.plain``).

The law of this file: sans-I/O, frames to text or bytes and back, for one of four encodings. On ``json``
what the host broadcasts as ``message`` is bare JSON, another event is ``{"event": …, "data": …}`` and what
the package itself says is an object with ``type``. ``text``, ``bytes`` and ``None`` carry the data alone:
there an error or a presence frame has no spelling and is not sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import msgspec

from ..exceptions import ConfigurationError, EventError
from ..frames import (
    Emit,
    Error,
    Event,
    PresenceCount,
    PresenceDiff,
    PresenceState,
    Raw,
    ServerFrame,
    Whispered,
    encode,
)

Encoding = Literal["json", "text", "bytes"] | None

SAID = (Error, PresenceState, PresenceDiff, PresenceCount, Whispered)  # frames of the package that a plain client gets

MAX_DEPTH = 64  # levels of nesting of a received value: what was received can always be sent again


class Decodes(Protocol):
    """Decodes JSON into one type: a `msgspec.json.Decoder`, or one of `events.py`."""

    def decode(self, raw: str | bytes, /) -> Any:
        """Return the value."""


class Envelope(msgspec.Struct):
    """An event that is not ``message``, as a plain client says it."""

    event: str
    data: msgspec.Raw = msgspec.Raw()
    group: str | None = None


class Plain:
    """Spells frames for clients of one encoding."""

    def __init__(self, encoding: Encoding) -> None:
        if encoding not in ("json", "text", "bytes", None):
            raise ConfigurationError(f'encoding = {encoding!r} is unknown; write "json", "text", "bytes" or None')
        self.encoding = encoding
        self.answers: bool = encoding == "json"  # whether an error can be said to this client

    def encode(self, frame: ServerFrame) -> str | bytes | None:
        """Return the frame's text or bytes; ``None`` where it has no spelling."""
        if isinstance(frame, Event):
            return self._event(frame)
        if isinstance(frame, Raw):
            return frame.data
        return encode(frame).decode() if self.answers and isinstance(frame, SAID) else None

    def _event(self, frame: Event) -> str | bytes:
        if self.encoding == "json":
            spelled = frame.json.decode()
            if frame.event == "message":
                return spelled
            return f'{{"event":{encode(frame.event).decode()},"data":{spelled}}}'
        bare = frame.data if isinstance(frame.data, str | bytes) else frame.json.decode()
        if self.encoding == "bytes" and isinstance(bare, str):
            return bare.encode()
        return bare.decode("utf-8", "replace") if self.encoding == "text" and isinstance(bare, bytes) else bare

    def data(self, raw: msgspec.Raw, decoder: Decodes | None = None) -> Any:
        """Return the data of an envelope; of none, ``None``. Raises as `decode` does."""
        return decode_json(bytes(raw) or b"null", decoder)

    def decode(self, raw: str | bytes, decoder: Decodes | None = None) -> Any:
        """Return what a client said; JSON is decoded (and validated, by a typed ``decoder``) in one pass.

        Raises `EventError`: ``bad_message`` for what is not JSON or nested too deep, ``invalid`` for what is
        not of the decoder's type (a number beyond all bounds is of no type), ``unsupported`` for text where
        bytes are spoken and the other way round.
        """
        if self.encoding == "json":
            return decode_json(raw, decoder)
        if self.encoding == "text" and not isinstance(raw, str):
            raise EventError("unsupported", "this endpoint takes text messages")
        if self.encoding == "bytes" and not isinstance(raw, bytes):
            raise EventError("unsupported", "this endpoint takes binary messages")
        return raw


PLAIN: dict[Encoding, Plain] = {encoding: Plain(encoding) for encoding in ("json", "text", "bytes", None)}

_decode = msgspec.json.Decoder().decode
_envelope = msgspec.json.Decoder(Envelope).decode


def enveloped(raw: str | bytes) -> Emit | None:
    """Return what a client said under the name of an event, ``None`` if it named none."""
    try:
        said = _envelope(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return Emit(said.event, said.data, said.group)


def decode_json(raw: str | bytes, decoder: Decodes | None = None) -> Any:
    """Decode JSON within the bounds of the wire; raises `EventError` with a sentence for the client.

    Only what has more opening brackets than levels are allowed can be too deep and is looked into.
    """
    suspect = brackets(raw) > MAX_DEPTH
    try:
        value = _decode(raw) if suspect or decoder is None else None
        if suspect and too_deep(value):
            raise EventError("bad_message", f"more than {MAX_DEPTH} levels of nesting")
        return value if decoder is None else decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise EventError("invalid", str(error)) from None
    except RecursionError:
        raise EventError("bad_message", f"more than {MAX_DEPTH} levels of nesting") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise EventError("bad_message", f"not JSON: {error}") from None


def brackets(raw: str | bytes) -> int:
    """Return how many brackets ``raw`` opens, those in its strings included."""
    return raw.count("[") + raw.count("{") if isinstance(raw, str) else raw.count(b"[") + raw.count(b"{")


def too_deep(value: Any) -> bool:
    """Whether ``value`` has more than `MAX_DEPTH` levels; level by level, so that depth costs no stack."""
    level = containers([value])
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in containers(node.values() if type(node) is dict else node)]
        if not level:
            return False
    return True


def containers(values: Iterable[Any]) -> list[Any]:
    """Return those of ``values`` that hold values themselves."""
    return [value for value in values if type(value) in (dict, list)]
