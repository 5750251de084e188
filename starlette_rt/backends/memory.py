"""One process, no network: the four roles in plain memory.

The law of this file: the same guarantees as every other backend, nothing survives the process, and nothing
grows without a bound. It imports no event loop; clocks are arguments.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..limits import Buckets, RateLimit
from ..presence import Diff, Member, Roster, State
from .base import Backend, Publication, Published

Clock = Callable[[], float]

SHARED = Published(None, "yes")
NOBODY = State(0, ())


class MemoryBroker:
    """Delivers to this process, at once."""

    def __init__(self) -> None:
        self._deliver: Callable[[Publication], None] = ignore

    async def start(self, deliver: Callable[[Publication], None]) -> None:
        self._deliver = deliver

    async def publish(self, publication: Publication) -> Published:
        self._deliver(publication)
        return SHARED

    async def stop(self) -> None:
        self._deliver = ignore


class MemoryPresence:
    """A roster for each group in which somebody is, or was within the grace."""

    def __init__(self, grace: float, now: Clock) -> None:
        self._grace = grace
        self._now = now
        self._rosters: dict[str, Roster] = {}
        self._lingering: set[str] = set()
        self._changed: Callable[[str], None] = ignore

    async def start(self, changed: Callable[[str], None]) -> None:
        self._changed = changed

    async def stop(self) -> None:
        self._rosters.clear()
        self._lingering.clear()
        self._changed = ignore

    async def track(self, group: str, key: str, connection: str, meta: dict[str, Any]) -> None:
        roster = self._rosters.get(group)
        if roster is None:
            roster = self._rosters[group] = Roster()
        roster.track(key, connection, meta, self._now())
        self._changed(group)

    async def untrack(self, group: str, key: str, connection: str) -> None:
        if (roster := self._rosters.get(group)) is not None:
            roster.untrack(connection, self._now())
            self._changed(group)

    def close(self, groups: Sequence[str], key: str, connection: str) -> None:
        for group in groups:
            self._rosters[group].close(connection, self._now(), self._grace)
            self._lingering.add(group)
            self._changed(group)

    def sweep(self) -> None:
        now = self._now()
        for group in tuple(self._lingering):
            roster = self._rosters.get(group)
            if roster is None or roster.expire(now):
                self._changed(group)
            if roster is None or roster.deadline is None:
                self._lingering.discard(group)

    def take(self, group: str, *, watched: bool) -> Diff | None:
        roster = self._rosters.get(group)
        if roster is None:
            return None
        diff = roster.take_diff()
        if roster.empty and not watched:
            del self._rosters[group]
        return diff

    def known(self, group: str) -> State:
        roster = self._rosters.get(group)
        return NOBODY if roster is None else roster.state()

    async def members(self, group: str, after: str | None = None, limit: int | None = None) -> dict[str, Member]:
        roster = self._rosters.get(group)
        members = {} if roster is None else roster.members()
        if after is None and limit is None:
            return members
        following = (key for key in members if after is None or key > after)
        keys = sorted(following) if limit is None else heapq.nsmallest(limit, following)
        return {key: members[key] for key in keys}

    async def count(self, group: str, connections: bool = False) -> int:
        roster = self._rosters.get(group)
        return 0 if roster is None else roster.count(connections=connections)


class MemoryLimits:
    """Budgets of this process."""

    def __init__(self, now: Clock) -> None:
        self.buckets: Buckets = Buckets()
        self._now = now

    async def hit(self, key: str, limit: RateLimit, amount: int = 1) -> float:
        return self.buckets.hit(key, limit, self._now(), amount)


class MemoryLedger:
    """Claims and revocations of this process; what has run out is forgotten with the next one."""

    def __init__(self, wall: Clock = time.time) -> None:
        self._wall = wall
        self._until: dict[str, float] = {}
        self._order: list[tuple[float, str]] = []

    async def claim(self, key: str, ttl: float) -> bool:
        if self._holds(key):
            return False
        self._set(key, self._wall() + ttl)
        return True

    async def revoke(self, rule: str, until: float) -> None:
        self._set(rule, max(until, self._until.get(rule, 0.0)))

    async def revoked(self, rules: Sequence[str]) -> bool:
        return bool(self._until) and any(self._holds(rule) for rule in rules)

    def _holds(self, key: str) -> bool:
        return self._until.get(key, 0.0) > self._wall()

    def _set(self, key: str, until: float) -> None:
        self._until[key] = until
        heapq.heappush(self._order, (until, key))
        while self._order[0][0] <= self._wall():
            due, old = heapq.heappop(self._order)
            if self._until.get(old) == due:
                del self._until[old]
            if not self._order:
                break


def ignore(_: Any) -> None:
    """Take what arrives while nothing runs."""


def memory(*, grace: float, now: Clock) -> Backend:
    """Return the backend of ``memory://``; ``grace`` is the presence grace in seconds, ``now`` a monotonic clock."""
    return Backend(MemoryBroker(), MemoryPresence(grace, now), MemoryLimits(now), MemoryLedger())
