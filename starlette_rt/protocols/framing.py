"""RFC 6455 and 7692: one WebSocket message as the bytes that a server sends for it.

The law of this file: bytes in, bytes out. A frame made here is the same for every peer, so that a message is
framed once and shared: unmasked, never fragmented. Uncompressed it may go to everybody, also to a peer that
negotiated permessage-deflate. Compressed it may go to those to whom the server promised that no message refers
to one before it (``server_no_context_takeover``), since each is compressed alone. It knows no connection, no
order and no control frames; who may be written to, and when, is the seam's business.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from struct import Struct

TEXT, BINARY = 0x81, 0x82  # FIN and the opcode
COMPRESSED = 0x40  # RSV1: RFC 7692, section 6

WINDOW = 12  # bits: 4 kB, which a peer must be able to look back
DEFLATE_FROM = 512  # bytes: half of a smaller message is not worth what compressing it costs
LEVEL = 1  # of zlib's nine: three times as quick as the usual 6, for a seventh more bytes
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


class FramedCarrier:
    """Payloads as framed bytes; the transport only reads them, so one object serves every peer."""

    def frame(self, data: str | bytes, /) -> bytes:
        return frame(data)

    def join(self, frames: Sequence[bytes], /) -> bytes:
        return b"".join(frames)


class DeflatedCarrier:
    """The same, compressed where it is worth it."""

    def frame(self, data: str | bytes, /) -> bytes:
        return deflated(data)

    def join(self, frames: Sequence[bytes], /) -> bytes:
        return b"".join(frames)


FRAMED = FramedCarrier()
DEFLATED = DeflatedCarrier()
