"""The technologies behind `Realtime`, chosen by the scheme of its URL.

The law of this folder: each technology in a file of its own, imported when it is asked for and not before; what they
all promise stands in `base.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..exceptions import ConfigurationError
from .base import Backend
from .memory import memory

REDIS = ("redis", "rediss", "unix", "valkey", "valkeys")


def from_url(source: Any, *, grace: float, now: Callable[[], float], prefix: str, fail_open: bool) -> Backend:
    """Return the backend of ``source``, a URL or a client of redis-py.

    Raises `ConfigurationError` for a scheme that is not known, and where what it needs is not installed.
    """
    if source == "memory://":
        return memory(grace=grace, now=now)
    if isinstance(source, str) and source.partition("://")[0] not in REDIS:
        raise ConfigurationError('Realtime(<url>): write "memory://" for one process, or "redis://localhost:6379/0"')
    try:
        from .redis import redis
    except ImportError as error:
        raise ConfigurationError(f'write pip install "starlette-rt[redis]" for this URL ({error})') from None
    return redis(source, grace=grace, now=now, prefix=prefix, fail_open=fail_open)
