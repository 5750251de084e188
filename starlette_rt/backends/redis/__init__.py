"""Many processes on one Redis.

The law of this folder: every role speaks through the one `Link` and stands in a file of its own, its scripts in
``lua/``. No script touches a key that is not among its KEYS, and the keys of one call lie in one slot. What is
stored and sent says in which format it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..base import Backend
from . import broker, ledger, limits, nodes, presence
from .connection import Link

SCRIPTS = (*broker.SCRIPTS, *nodes.SCRIPTS, *presence.SCRIPTS, *ledger.SCRIPTS, *limits.SCRIPTS)


def redis(source: Any, *, grace: float, now: Callable[[], float], prefix: str, fail_open: bool) -> Backend:
    """Return the backend of one Redis; ``grace`` is the presence grace in seconds, ``now`` a monotonic clock.

    Raises `ConfigurationError` for a source or a prefix that cannot be used.
    """
    link = Link(source, prefix=prefix, scripts=SCRIPTS)
    alive = nodes.Nodes(link)
    roles = Backend(
        broker.RedisBroker(link),
        presence.RedisPresence(link, alive, grace, now),
        limits.RedisLimits(link, alive),
        ledger.RedisLedger(link, alive),
    )
    roles.limits.fail_open = roles.ledger.fail_open = fail_open
    return roles
