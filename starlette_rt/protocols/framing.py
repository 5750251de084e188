"""RFC 6455 and 7692: one WebSocket message as the bytes that a server sends for it, and the short ones that it gets.

The law of this file: bytes in, bytes out. A frame made here is the same for every peer, so that a message is
framed once and shared: unmasked, never fragmented. Uncompressed it may go to everybody, also to a peer that
negotiated permessage-deflate. Compressed it may go to those to whom the server promised that no message refers
to one before it (``server_no_context_takeover``), since each is compressed alone. It knows no connection, no
order and no control frames; who may be written to, and when, is the seam's business.

What arrives is parsed by whoever speaks the protocol with the client. But most of it is one whole short message, and
those `whole` reads without a parser; `beyond` says where the frames begin that it must not touch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from struct import Struct

TEXT, BINARY = 0x81, 0x82  # FIN and the opcode
COMPRESSED = 0x40  # RSV1: RFC 7692, section 6

WINDOW = 12  # bits: 4 kB, which a peer must be able to look back
DEFLATE_FROM = 512  # bytes: half of a smaller message is not worth what compressing it costs
LEVEL = 1  # of zlib's nine: three times as quick as the usual 6, for a seventh more bytes
LOST = -1  # what `beyond` says when a frame's head is cut
TAIL = b"\x00\x00\xff\xff"  # of every flush; RFC 7692, section 7.2.1, leaves it out

_MEDIUM = Struct("!BBH")
_LARGE = Struct("!BBQ")


def frame(data: str | bytes) -> bytes:
    """Return one whole message as a frame: text for ``str``, binary for ``bytes``.

    Raises `UnicodeEncodeError` for text that is no text: a lone surrogate. Source: RFC 6455, section 5.2.
    """
    if isinstance(data, str):
        return _framed(TEXT, data.encode())
    return _framed(BINARY, data)


def deflated(data: str | bytes) -> bytes:
    """Return one whole message as a compressed frame; as `frame` does below `DEFLATE_FROM` or where that is shorter.

    Raises `UnicodeEncodeError` as `frame` does. Source: RFC 7692, section 7.2.1, with a context of its own.
    """
    opcode, payload = (TEXT, data.encode()) if isinstance(data, str) else (BINARY, data)
    if len(payload) >= DEFLATE_FROM:
        compressor = zlib.compressobj(LEVEL, zlib.DEFLATED, -WINDOW)
        compressed = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        if len(compressed) < len(payload):
            return _framed(opcode | COMPRESSED, compressed.removesuffix(TAIL))
    return _framed(opcode, payload)


def _framed(head: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((head, size)) + payload
    if size < 65536:
        return _MEDIUM.pack(head, 126, size) + payload
    return _LARGE.pack(head, 127, size) + payload


def whole(data: bytes, at: int, unmask: Callable[[bytes, bytes], bytes], most: int) -> tuple[str | bytes, int] | None:
    """Return the message that is one frame at ``at``, and where the next one begins; ``None`` for what is not so plain.

    Plain is: final, text or binary, no extension, masked, its length in its shortest form, at most ``most`` bytes and
    at most 65,535, all of it there, and text only if it is text. Everything else is for a parser, which also knows how
    to refuse it. ``unmask`` undoes RFC 6455, section 5.3.
    """
    if len(data) < at + 6 or (head := data[at]) not in (TEXT, BINARY) or (size := data[at + 1] - 0x80) < 0:
        return None
    at += 2
    if size >= 126:
        if size == 127 or (size := data[at] << 8 | data[at + 1]) < 126:
            return None
        at += 2
    end = at + 4 + size
    if end > len(data) or size > most:
        return None
    payload = unmask(data[at + 4 : end], data[at : at + 4])
    if head == BINARY:
        return payload, end
    try:
        return payload.decode(), end
    except UnicodeDecodeError:
        return None


def beyond(data: bytes, at: int, fragmented: bool) -> tuple[int, bool]:
    """Return how much of the last frame in ``data`` is still to come, and whether a message is left in fragments.

    A frame begins at ``at``; ``fragmented`` is how it was before. `LOST` if ``data`` ends within a frame's head.
    """
    size = len(data)
    while at < size:
        if size < at + 2:
            return LOST, fragmented
        head, second = data[at], data[at + 1]
        at += 2
        length = second & 0x7F
        if length >= 126:
            width = 2 if length == 126 else 8
            if size < at + width:
                return LOST, fragmented
            length = int.from_bytes(data[at : at + width])
            at += width
        at += length + (4 if second & 0x80 else 0)
        if not head & 0x08:  # a ping between two fragments changes nothing
            fragmented = not head & 0x80
    return at - size, fragmented


class FramedCarrier:
    """Payloads as framed bytes; the transport only reads them, so one object serves every peer."""

    __slots__ = ("_frame",)

    def __init__(self, frame: Callable[[str | bytes], bytes]) -> None:
        self._frame = frame

    def frame(self, data: str | bytes, /) -> bytes:
        return self._frame(data)

    def join(self, frames: Sequence[bytes], /) -> bytes:
        return b"".join(frames)


FRAMED = FramedCarrier(frame)
DEFLATED = FramedCarrier(deflated)
