"""RFC 6455: one WebSocket message as the bytes that a server sends for it.

The law of this file: bytes in, bytes out. A frame made here is the same for every peer, so that a message is
framed once and shared: unmasked, never fragmented, never compressed (RSV1 stays 0, which every peer must
take, also one that negotiated permessage-deflate). It knows no connection, no order and no control frames;
who may be written to, and when, is the seam's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

TEXT, BINARY = 0x81, 0x82  # FIN and the opcode

_MEDIUM = Struct("!BBH")
_LARGE = Struct("!BBQ")


def frame(data: str | bytes) -> bytes:
    """Return one whole message as a frame: text for ``str``, binary for ``bytes``.

    Raises `UnicodeEncodeError` for text that is no text: a lone surrogate. Source: RFC 6455, section 5.2.
    """
    if isinstance(data, str):
        opcode, payload = TEXT, data.encode()
    else:
        opcode, payload = BINARY, data
    size = len(payload)
    if size < 126:
        return bytes((opcode, size)) + payload
    if size < 65536:
        return _MEDIUM.pack(opcode, 126, size) + payload
    return _LARGE.pack(opcode, 127, size) + payload


class FramedCarrier:
    """Payloads as framed bytes; the transport only reads them, so one object serves every peer."""

    def frame(self, data: str | bytes, /) -> bytes:
        return frame(data)

    def join(self, frames: Sequence[bytes], /) -> bytes:
        return b"".join(frames)


FRAMED = FramedCarrier()
