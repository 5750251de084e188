"""Presence over Redis: what this node tracks, and how it is asked.

The law of this file: the source of truth for a connection is the node that holds it. What it tracks stands here
first, is registered in Redis under the node's generation, and is registered again whenever Redis may not know it; so
tracking never fails, and while Redis is away nobody leaves. One change of a group is on its way at a time: what comes
meanwhile goes with the next.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

import anyio
import anyio.lowlevel

from ...exceptions import Unavailable
from ...loop import within
from ...presence import Diff, Member, Meta, State
from ..base import Watch
from ..memory import NOBODY, Clock, ignore, page_of
from .changes import CHANGE, CLOSE, TRACK, UNTRACK, Answer, Changes, Operation, abreast
from .connection import Link, Script
from .following import READ, Following
from .nodes import Nodes
from .replica import Shown, meta_of, pack

logger: logging.Logger = logging.getLogger("starlette_rt")

SCRIPTS: tuple[Script, ...] = (CHANGE, READ)

OPERATIONS = 100  # in one script, about 20 µs each: so long does nobody else get an answer of Redis
BYTES = 64 * 1024  # of their metas
RETRIES = 100  # groups that are registered again in one sweep
FAREWELL = 2.0  # seconds to let everything linger at the end


class Batch:
    """Operations that go in one script, in their order."""

    __slots__ = ("answer", "done", "operations", "size")

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.size: int = 0
        self.done: anyio.Event = anyio.Event()
        self.answer: Answer | None = None

    def takes(self, operation: Operation) -> bool:
        """Add ``operation`` if there is room."""
        if len(self.operations) >= OPERATIONS or self.size >= BYTES:
            return False
        self.operations.append(operation)
        self.size += len(operation[3])
        return True


class Share:
    """What this node has to do with one group."""

    __slots__ = ("batches", "idle", "known", "stale", "tracked")

    def __init__(self) -> None:
        self.tracked: dict[str, tuple[str, bytes]] = {}  # connection -> user and meta
        self.batches: deque[Batch] = deque()  # what is to be said
        self.idle: anyio.Event | None = None  # there while something is said
        self.stale: bool = False  # Redis may not know what is tracked
        self.known: bool = False  # Redis may know something, under our present generation

    def add(self, operation: Operation) -> Batch:
        """Put ``operation`` into the last batch, or a new one."""
        if not self.batches or not self.batches[-1].takes(operation):
            self.batches.append(Batch())
            self.batches[-1].takes(operation)
        return self.batches[-1]

    def unknown(self) -> None:
        """Redis may have forgotten all of it."""
        self.stale, self.known = True, False


class RedisPresence:
    """Presence that all nodes share. See `PresenceStore`.

    A copy that is followed answers for its group; any other question is Redis's. ``link`` must be started before
    this, and stopped after it; ``nodes`` lives with it.
    """

    def __init__(self, link: Link, nodes: Nodes, grace: float, now: Clock) -> None:
        self._link, self._nodes, self._grace = link, nodes, grace
        self._changed: Callable[[str], None] = ignore
        self.on_count: Callable[[str, int, int], None] | None = None
        self._changes = Changes(link, nodes, grace, self._counted)
        self._following = Following(link, grace, now, self._own, self._report, self._changes.suspect)
        self._shares: dict[str, Share] = {}

    # Living.

    async def start(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._changes.start()
        self._following.start()
        self._nodes.on_held.append(self._register_all)
        await self._nodes.start()

    async def stop(self) -> None:
        """Let everything linger that is tracked, and give the lease back; for a few seconds at most."""
        await within(FAREWELL, self._let_linger)
        await self._nodes.stop()
        self._nodes.on_held.remove(self._register_all)
        self._following.stop()
        self._changes.stop()
        self._shares.clear()
        self._changed = ignore

    async def _let_linger(self) -> None:
        if not self._ready:
            return
        for share in self._shares.values():
            for connection in share.tracked:
                share.add(self._closing(connection))
            share.tracked.clear()
        with suppress(Unavailable):
            await abreast(self._link.tasks, self._flush, list(self._shares))
            await self._link.command("DEL", self._changes.index(self._nodes.generation))

    @property
    def _ready(self) -> bool:
        """Whether Redis is there and knows this node."""
        return self._link.up and self._nodes.held

    def _report(self, group: str) -> None:
        self._changed(group)

    def _counted(self, group: str, before: int, after: int) -> None:
        if self.on_count is not None:
            self.on_count(group, before, after)

    # Tracking.

    async def track(self, group: str, key: str, connection: str, meta: Meta) -> None:
        packed = pack(meta)
        share = self._shares.get(group)
        if share is None:
            share = self._shares[group] = Share()
        share.tracked[connection] = key, packed
        await self._wait(group, self._say(group, share, (TRACK, connection, key, packed)))

    async def untrack(self, group: str, key: str, connection: str) -> None:
        share = self._shares.get(group)
        if share is not None and share.tracked.pop(connection, None) is not None:
            await self._wait(group, self._say(group, share, (UNTRACK, connection, "", b"")))

    def close(self, groups: Sequence[str], key: str, connection: str) -> None:
        for group in groups:
            share = self._shares.get(group)
            if share is not None and share.tracked.pop(connection, None) is not None:
                self._say(group, share, self._closing(connection))

    def _closing(self, connection: str) -> Operation:
        return (CLOSE if self._grace > 0 else UNTRACK, connection, "", b"")

    def _say(self, group: str, share: Share, operation: Operation) -> Batch | None:
        """Say what has changed, at the end of the turn; while Redis does not know us, only here."""
        if not self._ready:
            self._put_off(group, share, [operation])
            return None
        batch = share.add(operation)
        self._begin(group, share)
        return batch

    async def _wait(self, group: str, batch: Batch | None) -> None:
        """Wait until Redis has it, and this node's watchers."""
        if batch is not None:
            await batch.done.wait()
            if batch.answer is not None:
                await self._following.passed(group, batch.answer)

    def _begin(self, group: str, share: Share) -> anyio.Event:
        """See that what there is to say is said; return what is set when that is done."""
        if share.idle is None:
            share.idle = anyio.Event()
            self._link.tasks.spawn(self._run, group, share)
        assert share.idle is not None
        return share.idle

    async def _flush(self, group: str) -> None:
        """Say what there is to say of ``group``, and wait for the end of that."""
        if (share := self._shares.get(group)) is not None:
            await self._begin(group, share).wait()

    async def _run(self, group: str, share: Share) -> None:
        try:
            await anyio.lowlevel.checkpoint()  # what comes in one turn goes together
            while self._ready and (share.stale or share.batches):
                await self._speak(group, share)
        except Unavailable as error:
            logger.debug("what is tracked is registered later: %s", error)
        finally:
            self._rest(group, share)

    def _rest(self, group: str, share: Share) -> None:
        """Nothing more can be said now; what is left is registered later."""
        if share.idle is not None:
            share.idle.set()
            share.idle = None
        while share.batches:
            batch = share.batches.popleft()
            self._put_off(group, share, batch.operations)
            batch.done.set()
        if not share.tracked and not share.stale and self._shares.get(group) is share:
            del self._shares[group]
            if share.known:
                self._link.cast("SREM", self._changes.index(self._nodes.generation), group)

    async def _speak(self, group: str, share: Share) -> None:
        generation = self._nodes.generation
        if not share.known:
            share.known = True
            self._link.cast("SADD", self._changes.index(generation), group, lost=share.unknown)
        if share.stale:
            await self._register(group, share, generation)
            return
        batch = share.batches.popleft()  # what comes from here on goes with the next
        try:
            batch.answer = await self._changes.run(group, generation, batch.operations)
        except Unavailable:
            self._put_off(group, share, batch.operations)
            raise
        finally:
            batch.done.set()

    async def _register(self, group: str, share: Share, generation: str) -> None:
        """Let Redis know all that is tracked, and of the rest that it is gone."""
        share.stale = False
        everything = Share()
        for connection, (user, meta) in share.tracked.items():
            everything.add((TRACK, connection, user, meta))
        try:
            for batch in everything.batches:
                await self._changes.run(group, generation, batch.operations)
            known = await self._link.command("SMEMBERS", self._changes.keys(group, generation)[3])
        except Unavailable:
            share.stale = True
            raise
        for connection in [name.decode() for name in known]:
            if connection not in share.tracked:
                share.add(self._closing(connection))

    def _put_off(self, group: str, share: Share, operations: Iterable[Operation]) -> None:
        """Remember that Redis does not know of ``operations``; this node's watchers hear of them at once."""
        share.stale = True
        self._forget_unknown(group, share)
        self._following.mirror(group, operations)

    def _forget_unknown(self, group: str, share: Share) -> None:
        """Forget a group of which neither we nor Redis have anything."""
        if not share.tracked and not share.known and share.idle is None:
            self._shares.pop(group, None)

    async def _register_all(self) -> None:
        """Redis may know nothing of this node: register all, then read again what is followed."""
        for group, share in tuple(self._shares.items()):
            share.unknown()
            self._forget_unknown(group, share)
        await abreast(self._link.tasks, self._flush, list(self._shares))
        if not self._ready:
            raise Unavailable("not everything could be registered")
        self._following.resume()  # a group that Redis refuses is tried again by itself

    def sweep(self) -> None:
        self._following.sweep()
        if self._ready:
            self._changes.sweep()
            late = [group for group, share in self._shares.items() if share.stale and share.idle is None]
            for group in late[:RETRIES]:
                self._begin(group, self._shares[group])

    # Following.

    async def follow(self, group: str, part: Watch) -> None:
        await self._following.follow(group, part)

    def unfollow(self, group: str, part: Watch) -> None:
        self._following.unfollow(group, part)

    def take(self, group: str, *, watched: bool) -> Diff | None:
        replica = self._following.replica(group)
        return None if replica is None else replica.roster.take_diff()

    def known(self, group: str) -> State:
        replica = self._following.replica(group)
        return NOBODY if replica is None else replica.roster.state()

    def size(self, group: str) -> int:
        return self._following.size(group) or 0

    # Asking.

    async def members(self, group: str, after: str | None = None, limit: int | None = None) -> dict[str, Member]:
        if (replica := self._following.replica(group)) is not None:
            return page_of(replica.roster.members(), after, limit)
        try:
            shown = (await self._following.read(group, limit, after)).shown
        except Unavailable:
            shown = self._own(group)
        return page_of(members_of(shown), after, limit)

    async def count(self, group: str, connections: bool = False) -> int:
        if (replica := self._following.replica(group)) is not None:
            return replica.roster.count(connections=connections)
        try:
            counted: int = await self._link.command("HLEN", self._link.group_key(group, "e" if connections else "u"))
        except Unavailable:
            return self._count_here(group, connections)
        return counted

    def _count_here(self, group: str, connections: bool) -> int:
        """Redis is away: the last that was known, else what this node tracks."""
        own = self._own(group)
        if connections:
            return len(own)
        known = self._following.size(group)
        return len({each.user for each in own}) if known is None else known

    def _own(self, group: str) -> list[Shown]:
        share = self._shares.get(group)
        tracked = {} if share is None else share.tracked
        return [Shown(connection, user, meta_of(meta)) for connection, (user, meta) in tracked.items()]


def members_of(shown: Iterable[Shown]) -> dict[str, Member]:
    """Return connections as members; the ref of a meta is as good as its connection's name."""
    members: dict[str, Member] = {}
    for connection, user, meta in shown:
        metas = members[user].metas if user in members else ()
        members[user] = Member(user, (*metas, {**meta, "ref": connection}))
    return members
