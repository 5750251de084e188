"""Every error the package raises and every code a connection is closed with.

The law of this file: an error is declared here or nowhere, and it says what the reader can still do.
Attributes carry the facts, the message is a sentence. A close code is one row of one table: its number,
the reason that travels with it, when it is sent, and whether the client should come back. A client
decides from the number alone: 4000-4499 come back, 4500-4999 do not.

    RealtimeError
    ├── ConfigurationError      the host wrote something that cannot work; the message says what to write
    ├── NotRunning              the Realtime has not been started in this process
    ├── Unavailable             a temporary trouble of the backend; try again
    ├── TokenError              a token that is missing, malformed, forged, expired or used up
    └── EventError              a refusal that is answered to the client who asked
        └── ProtocolError       what a client said is not of the protocol; its code says in which way
"""

from __future__ import annotations

import math
from enum import IntEnum


class CloseCode(IntEnum):
    """The codes a connection of ours is closed with.

    Each member carries ``reason`` (the text of the Close frame), ``when`` (what it means) and
    ``reconnect`` (whether a client should come back).
    """

    reason: str
    when: str
    reconnect: bool

    def __new__(cls, value: int, reason: str = "", when: str = "", reconnect: bool = False) -> CloseCode:
        code = int.__new__(cls, value)
        code._value_ = value
        code.reason, code.when, code.reconnect = reason, when, reconnect
        return code

    NORMAL = 1000, "", "the application closed the connection", False
    GOING_AWAY = 1001, "going away", "the page or the process goes away", True
    UNSUPPORTED_DATA = 1003, "unsupported data", "a text or bytes endpoint got the other kind of frame", False
    INTERNAL_ERROR = 1011, "internal error", "a handler of the application failed", True
    SERVICE_RESTART = 1012, "service restart", "the server shuts down or restarts", True
    SLOW_CONSUMER = 4000, "slow consumer", "the peer reads too slowly: its outbox overflowed or a send stalled", True
    TOKEN_EXPIRED = 4001, "token expired", "the token of this connection has expired; fetch a new one", True
    OVERLOADED = 4002, "too many messages in flight", "the peer sends faster than its messages are handled", True
    RATE_LIMITED = 4003, "rate limit exceeded", "the peer kept on after it was told to wait", True
    TOO_MANY_CONNECTIONS = 4004, "too many connections", "a connection cap or rate is exhausted", True
    UNAVAILABLE = 4005, "unavailable", "the server is not ready for connections", True
    PING_TIMEOUT = 4006, "ping timeout", "nothing was heard of the peer for too long", True
    IDLE = 4007, "idle for too long", "the peer has asked for nothing for too long", True
    DISCONNECTED = 4500, "disconnected", "the application disconnected this user", False
    UNAUTHORIZED = 4501, "unauthorized", "the token is missing or not valid", False
    PROTOCOL_ERROR = 4502, "too many invalid messages", "the peer kept sending what cannot be understood", False
    FORBIDDEN = 4503, "forbidden", "the identity may not use this endpoint", False


class RealtimeError(Exception):
    """The root of every error of this package."""


class ConfigurationError(RealtimeError, ValueError):
    """What the host configured cannot work. Raised at construction or start; the message says what to write."""


class NotRunning(RealtimeError, RuntimeError):
    """A verb was used on a ``Realtime`` that is not running in this process."""


class Unavailable(RealtimeError):
    """The backend cannot do this now; trying again later is the right answer."""


class TokenError(RealtimeError, ValueError):
    """A token was refused. ``str(error)`` names the reason and never contains the token.

    ``expired`` is true when the token was ours and valid but for its age, so that a fresh one will do.
    """

    def __init__(self, message: str, *, expired: bool = False) -> None:
        super().__init__(message)
        self.expired: bool = expired


class EventError(RealtimeError):
    """A refusal that is answered to the client who asked; raise it from any handler.

    ``code`` is a short stable word for programs, ``message`` a sentence for people, ``retry_after``
    the seconds after which trying again makes sense (``None`` or infinity: it does not). It is not logged.
    Raises `TypeError` for a code or message that is no text, `ValueError` for a negative wait or none at all.
    """

    def __init__(self, code: str, message: str = "", *, retry_after: float | None = None) -> None:
        if not isinstance(code, str) or not isinstance(message, str):
            raise TypeError('EventError takes a code and a message, both text: EventError("full", "no seat is left")')
        if retry_after is not None and not retry_after >= 0:
            raise ValueError(f"retry_after is a number of seconds, 0 or more, not {retry_after!r}")
        super().__init__(code, message)
        self.code: str = code
        self.message: str = message
        self.retry_after: float | None = None if retry_after == math.inf else retry_after

    @property
    def temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self.retry_after is not None

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else self.code


class ProtocolError(EventError):
    """What a peer said is not of the protocol; ``code`` is one of those that docs/protocol.md has for that."""
