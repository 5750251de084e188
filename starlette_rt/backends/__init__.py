"""The technologies behind `Realtime`, chosen by the scheme of its URL.

The law of this folder: each technology in a file of its own, imported when it is asked for and not before; what they
all promise stands in `base.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..exceptions import ConfigurationError
from .base import Backend
from .memory import memory


def from_url(url: str, *, grace: float, now: Callable[[], float]) -> Backend:
    """Return the backend of ``url``. Raises `ConfigurationError` for a scheme that is not known."""
    if url != "memory://":
        raise ConfigurationError(f'Realtime({url!r}): this version knows one backend; write Realtime("memory://")')
    return memory(grace=grace, now=now)
