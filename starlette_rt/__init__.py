"""Real-time WebSockets for Starlette and FastAPI: auth, limits, presence and broadcast groups on your own routes.

The law of this file: it names what is public and does nothing. What is not in `__all__` may change without a word.
"""

from __future__ import annotations

from .backends.base import Published
from .blocking import Blocking
from .connection import Connection
from .endpoints import RealtimeEndpoint
from .events import Whisper, event
from .exceptions import (
    CloseCode,
    ConfigurationError,
    EventError,
    NotRunning,
    RealtimeError,
    TokenError,
    Unavailable,
)
from .history import History, Position, Publication
from .identity import Identity
from .limits import ConnectionLimits, RateLimit
from .metrics import Metrics
from .middleware import RealtimeMiddleware
from .outbox import OutboxLimits
from .presence import Member
from .realtime import Health, Realtime
from .tokens import JWTVerifier, TokenBackend, TokenSigner

__all__ = [
    "Blocking",
    "CloseCode",
    "ConfigurationError",
    "Connection",
    "ConnectionLimits",
    "EventError",
    "Health",
    "History",
    "Identity",
    "JWTVerifier",
    "Member",
    "Metrics",
    "NotRunning",
    "OutboxLimits",
    "Position",
    "Publication",
    "Published",
    "RateLimit",
    "Realtime",
    "RealtimeEndpoint",
    "RealtimeError",
    "RealtimeMiddleware",
    "TokenBackend",
    "TokenError",
    "TokenSigner",
    "Unavailable",
    "Whisper",
    "event",
]
