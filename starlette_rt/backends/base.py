"""The four roles that a backend plays, and what each guarantees.

The law of this file: interfaces and values only. `Realtime` speaks to these and to nothing else, so that
one process and a fleet differ by a URL. A technology lives in a neighbour of this file and imports its
client library itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from ..limits import RateLimit
from ..presence import Diff, Member, State


@dataclass(frozen=True, slots=True)
class Publication:
    """One broadcast on its way: plain data, so that any backend can carry it.

    ``json`` is the data spelled as JSON, ``exclude`` the session that does not get it.
    """

    group: str
    event: str
    data: Any
    json: bytes
    exclude: str | None = None
    ephemeral: bool = False
    key: str | None = None


class Published(NamedTuple):
    """What became of a broadcast.

    ``position`` is its place in the group's history, ``None`` for a group without one. ``shared`` says
    whether other nodes have it: ``yes``, ``queued`` for when the backend is back, or ``no``.
    """

    position: None
    shared: Literal["yes", "queued", "no"]


class Broker(Protocol):
    """Brings every publication to every node that has members of its group.

    The publications of one node to one group arrive in the order of the calls.
    """

    async def start(self, deliver: Callable[[Publication], None]) -> None:
        """Begin; ``deliver`` is called on the loop for each publication that this node is to deliver."""

    async def publish(self, publication: Publication) -> Published:
        """Deliver here and everywhere. Raises `Unavailable` if it was accepted nowhere."""
        ...

    async def stop(self) -> None:
        """End; nothing is delivered after it."""


class PresenceStore(Protocol):
    """Who is present in which group: members by key, one meta per connection.

    A change is visible to `members` at once and reported to the ``changed`` callback of `start`;
    ``take`` returns what has changed since it was called last, net.
    """

    async def start(self, changed: Callable[[str], None]) -> None: ...
    async def stop(self) -> None: ...
    async def track(self, group: str, key: str, connection: str, meta: dict[str, Any]) -> None: ...
    async def untrack(self, group: str, key: str, connection: str) -> None: ...

    def close(self, groups: Sequence[str], key: str, connection: str) -> None:
        """A connection has ended: its metas linger for the grace, then leave."""

    def sweep(self) -> None:
        """Let leave whose grace is over; called about once a second."""

    def take(self, group: str, *, watched: bool) -> Diff | None:
        """What has changed since the last call; a group that is empty and not ``watched`` is forgotten with it."""
        ...

    def known(self, group: str) -> State:
        """The members as those know them who have applied every diff taken so far."""
        ...

    async def members(self, group: str, after: str | None = None, limit: int | None = None) -> dict[str, Member]: ...
    async def count(self, group: str, connections: bool = False) -> int: ...


class LimitStore(Protocol):
    """Budgets shared by all nodes."""

    async def hit(self, key: str, limit: RateLimit, amount: int = 1) -> float:
        """Take ``amount`` and return 0.0, or take nothing and return the seconds to wait."""
        ...


class Ledger(Protocol):
    """What may happen once, and who may come no more."""

    async def claim(self, key: str, ttl: float) -> bool:
        """Take ``key`` for ``ttl`` seconds; false if somebody has it."""
        ...

    async def revoke(self, rule: str, until: float) -> None:
        """Refuse tokens under ``rule`` (``user:…`` or ``token:…``) until this wall-clock time."""

    async def revoked(self, rules: Sequence[str]) -> bool:
        """Whether one of ``rules`` is revoked now."""
        ...


class Backend(NamedTuple):
    """The four roles of one technology."""

    broker: Broker
    presence: PresenceStore
    limits: LimitStore
    ledger: Ledger
