"""The groups whose presence this node follows, because it has watchers there.

The law of this file: a group is subscribed first, then read, and read again whenever something may have been missed;
everything in between is told by Redis. Nobody's read is made for one watcher: a group has one copy here. While Redis
is away the copy stays as it was, and what this node does itself is put into it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, repeat
from typing import Any

import anyio

from ...exceptions import Unavailable
from ..base import Watch
from ..memory import Clock
from .changes import TRACK, UNTRACK, Answer, Operation, channel
from .connection import Link, Script
from .replica import KNOWN, Found, Replica, Shown, Tally, change_of, counts_of, found_of, meta_of
from .wire import Argument

logger: logging.Logger = logging.getLogger("starlette_rt")

READ = Script("presence_read")

EVERYBODY = 2**31  # more members than a group has
AGAIN = (0.0, 0.2, 0.5, 1.0)  # seconds before a group is read again that has changed while it was read
CAUGHT_UP = 1.0  # seconds that who tracks waits until this node's watchers have it


class Following:
    """Copies of groups.

    ``own`` returns what this node tracks in a group, ``changed`` is told a group whose copy has changed, ``found``
    the generations that hold something in a group that was read.
    """

    def __init__(
        self,
        link: Link,
        grace: float,
        now: Clock,
        own: Callable[[str], list[Shown]],
        changed: Callable[[str], None],
        found: Callable[[str, Iterable[str]], None],
    ) -> None:
        self._link, self._grace, self._now = link, grace, now
        self._own, self._changed, self._found = own, changed, found
        self._replicas: dict[str, Replica] = {}
        self._tallies: dict[str, Tally] = {}

    def start(self) -> None:
        """Follow what is asked for from now on."""
        self._link.on_resumed.append(self.resume)

    def stop(self) -> None:
        """Follow nothing more."""
        self._link.on_resumed.remove(self.resume)
        for group in tuple(self._replicas):
            self.unfollow(group, "members")
        for group in tuple(self._tallies):
            self.unfollow(group, "count")

    async def follow(self, group: str, part: Watch) -> None:
        """Return when a copy is here; while Redis is away, of what is known."""
        ready = self._follow_members(group) if part == "members" else self._follow_count(group)
        if not ready.is_set():
            await ready.wait()

    def _follow_members(self, group: str) -> anyio.Event:
        replica = self._replicas.get(group)
        if replica is None:
            replica = self._replicas[group] = Replica(self._grace)
            self._link.subscribe(channel(self._link, group, "members"), partial(self._told, group))
            self._load(group, replica)
        return replica.ready

    def _follow_count(self, group: str) -> anyio.Event:
        tally = self._tallies.get(group)
        if tally is None:
            tally = self._tallies[group] = Tally(self._grace)
            self._link.subscribe(channel(self._link, group, "count"), partial(self._counted, group))
            self._count(group, tally)
        return tally.ready

    def unfollow(self, group: str, part: Watch) -> None:
        """Forget a copy."""
        followed: dict[str, Any] = self._replicas if part == "members" else self._tallies
        if followed.pop(group, None) is not None:
            self._link.unsubscribe(channel(self._link, group, part))

    # What Redis tells.

    def _told(self, group: str, payload: bytes) -> None:
        replica, change = self._replicas.get(group), change_of(payload)
        if replica is None or change.format not in KNOWN:
            return
        if not replica.receive(change, self._now()):
            self._load(group, replica)
        elif not replica.loading:
            self._changed(group)

    def _counted(self, group: str, payload: bytes) -> None:
        tally, counts = self._tallies.get(group), counts_of(payload)
        if tally is not None and counts.format in KNOWN and tally.receive(counts, self._now()):
            self._changed(group)

    def resume(self) -> None:
        """Something may have been missed: read again what is followed."""
        if self._replicas or self._tallies:
            self._link.tasks.spawn(self._resume)

    async def _resume(self) -> None:
        for group, replica in tuple(self._replicas.items()):
            if not replica.loading:
                replica.begin()
                await self._read_again(group, replica)
        for group, tally in tuple(self._tallies.items()):
            self._count(group, tally)

    def _load(self, group: str, replica: Replica) -> None:
        if not replica.loading:
            replica.begin()
            self._link.tasks.spawn(self._read_again, group, replica)

    async def _read_again(self, group: str, replica: Replica) -> None:
        """Read ``group`` until it is followed without a gap; while Redis is away there is what this node tracks."""
        try:
            for pause in chain(AGAIN, repeat(AGAIN[-1])):
                await anyio.sleep(pause)
                if self._replicas.get(group) is not replica or await self._adopt(group, replica):
                    break
                replica.begin()
        except Unavailable as error:
            logger.debug("what is followed is read later: %s", error)
            replica.abandon(self._own(group), self._now())
        finally:
            replica.ready.set()
        if self._replicas.get(group) is replica:
            self._changed(group)

    async def _adopt(self, group: str, replica: Replica) -> bool:
        await self._link.subscribed(channel(self._link, group, "members"))
        found = await self.read(group)
        self._found(group, found.generations)
        there = {each.connection for each in found.shown}
        # What is only being registered is not missing: Redis may have come back empty a moment ago.
        own = [each for each in self._own(group) if each.connection not in there]
        return await replica.adopt(found.epoch, found.version, [*found.shown, *own], self._now())

    def _count(self, group: str, tally: Tally) -> None:
        if not tally.loading:
            tally.loading = True
            self._link.tasks.spawn(self._count_again, group, tally)

    async def _count_again(self, group: str, tally: Tally) -> None:
        tally.whole = False
        try:
            await self._link.subscribed(channel(self._link, group, "count"))
            found = await self.read(group, 0)
            tally.whole = True
            if tally.receive(found, self._now(), read=True) and self._tallies.get(group) is tally:
                self._changed(group)
        except Unavailable as error:
            logger.debug("what is counted is read later: %s", error)
        finally:
            tally.loading = False
            tally.ready.set()

    async def read(self, group: str, limit: int | None = None, after: str | None = None) -> Found:
        """Read all of ``group``, or a page: at most ``limit`` members that follow ``after``. Raises `Unavailable`."""
        keys = [self._link.group_key(group, kind) for kind in ("u", "e", "k", "n", "v")]
        page: list[Argument] = []
        if limit is not None or after is not None:
            page = [EVERYBODY if limit is None else limit, after or ""]
        return await found_of(await self._link.call(READ, keys, page))

    # What this node does.

    def mirror(self, group: str, operations: Iterable[Operation]) -> None:
        """Put ``operations`` into the copy, since Redis does not tell of them."""
        replica, now = self._replicas.get(group), self._now()
        if replica is None:
            return
        for verb, connection, user, meta in operations:
            if verb == TRACK:
                replica.show(Shown(connection, user, meta_of(meta)), now)
            elif verb == UNTRACK:
                replica.drop(connection, now)
            else:
                replica.close(connection, now)
        self._changed(group)

    async def passed(self, group: str, answer: Answer) -> None:
        """Wait until the copy, if there is one, holds a change that this node has made."""
        if (replica := self._replicas.get(group)) is not None:
            await replica.passed(answer.epoch, answer.version, CAUGHT_UP)

    def sweep(self) -> None:
        """Let leave those whose return is not expected any more, and read what could not be read."""
        now = self._now()
        for group, replica in tuple(self._replicas.items()):
            if replica.roster.expire(now):
                self._changed(group)
            if not replica.whole and self._link.up:
                self._load(group, replica)
        for group, tally in tuple(self._tallies.items()):
            if tally.expire(now):
                self._changed(group)
            if not tally.whole and self._link.up:
                self._count(group, tally)

    # Asking.

    def replica(self, group: str) -> Replica | None:
        """Return the copy of the members of ``group``, if there is one and it can be shown."""
        replica = self._replicas.get(group)
        return replica if replica is not None and replica.ready.is_set() else None

    def size(self, group: str) -> int | None:
        """Return how many members are known here, `None` if the group is not followed."""
        if (replica := self.replica(group)) is not None:
            return replica.roster.count()
        tally = self._tallies.get(group)
        return None if tally is None else tally.size(self._now())
