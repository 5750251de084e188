"""What this node follows of a group's presence: a copy of its members, or of its counts.

The law of this file: it asks nobody. What Redis has told is applied by its version, what does not follow the one before
is not, and a copy with a gap must be read again. Whoever is missing in what was read after an interruption lingers here
for the grace, so that nothing flaps where Redis has come back empty. Time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import msgspec

from ...presence import Meta, Roster
from .connection import FORMAT

HELD = 10_000  # changes that are kept while the group is read; more are read too
SLICE = 200  # connections that are dealt with between two breaths of the loop
JOINED, LEFT, REPLACED = 0, 1, 2  # what a change may say of a connection

KNOWN = (FORMAT, FORMAT - 1)


class Change(msgspec.Struct, frozen=True, array_like=True):
    """What one step has changed, in order: [JOINED, user, connection, meta] (of a known connection: another meta),
    [LEFT, user, connection, reason], [REPLACED, user, connection, the one before, meta]."""

    format: int
    epoch: str
    version: int
    events: list[Any]


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """How many a group has after a step that changed it."""

    format: int
    epoch: str
    version: int
    members: int
    connections: int


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What Redis keeps of a connection; ``version`` and ``number`` say when it got its meta, for their order."""

    format: int
    generation: str
    version: int
    number: int
    user: str
    meta: Meta


class Shown(NamedTuple):
    """A connection as it is shown."""

    connection: str
    user: str
    meta: Meta


class Found(NamedTuple):
    """A group as it was read, in the order in which metas are shown."""

    epoch: str
    version: int
    members: int
    connections: int
    shown: Sequence[Shown]
    generations: Sequence[str]


ARRAY = b"\x96"  # an entry is stored as its fields one after the other, which scripts can read; this makes it an array

change_of: Callable[[bytes], Change] = msgspec.msgpack.Decoder(Change).decode
counts_of: Callable[[bytes], Counts] = msgspec.msgpack.Decoder(Counts).decode
entry_of: Callable[[bytes], Entry] = msgspec.msgpack.Decoder(Entry).decode
pack: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
meta_of: Callable[[bytes], dict[str, Any]] = msgspec.msgpack.Decoder(dict[str, Any]).decode


async def found_of(reply: Any) -> Found:
    """Return what the script that reads a group has answered."""
    epoch, version, members, connections, flat, generations = reply
    entries = []
    for number, (connection, entry) in enumerate(zip(flat[::2], flat[1::2], strict=True), 1):
        if entry is not None:
            entries.append((entry_of(ARRAY + entry), connection.decode()))
        if not number % SLICE:
            await anyio.lowlevel.checkpoint()
    entries.sort(key=lambda pair: (pair[0].version, pair[0].number))
    shown = [Shown(connection, entry.user, entry.meta) for entry, connection in entries]
    return Found(epoch.decode(), version, members, connections, shown, [name.decode() for name in generations])


class Replica:
    """The members of one group, as a roster that tells this node's watchers what changes.

    It is ``whole`` unless something was missed; ``loading`` while it is read, and ``ready`` once it can be shown.
    """

    def __init__(self, grace: float) -> None:
        self.roster: Roster = Roster()
        self.epoch: str = ""
        self.version: int = 0
        self.whole: bool = False
        self.loading: bool = False
        self.ready: anyio.Event = anyio.Event()
        self._grace = grace
        self._connections: dict[str, None] = {}
        self._held: list[Change] = []
        self._passing: list[tuple[int, anyio.Event]] = []

    def receive(self, change: Change, now: float) -> bool:
        """Take a change; false if the group must be read first."""
        if not self.loading:
            return self._take(change, now)
        if len(self._held) == HELD:
            self._held.clear()  # what is missing then is found, and read
        self._held.append(change)
        return True

    def begin(self) -> None:
        """The group is about to be read: keep what is told meanwhile."""
        self.loading = True
        self._held.clear()

    def abandon(self, own: Sequence[Shown], now: float) -> None:
        """It cannot be read: what was known last stays, and what this node has itself."""
        self.loading = self.whole = False
        for each in own:
            self.show(each, now)

    async def adopt(self, epoch: str, version: int, shown: Sequence[Shown], now: float) -> bool:
        """Be what was read; whoever is missing lingers. False if what was told meanwhile does not follow."""
        there = {each.connection for each in shown}
        for connection in [each for each in self._connections if each not in there]:
            self.close(connection, now)
        for number, each in enumerate(shown, 1):
            self.show(each, now)
            if not number % SLICE:
                await anyio.lowlevel.checkpoint()
        self.loading, self.whole, self.epoch, self.version = False, True, epoch, version
        held, self._held = self._held, []
        self.whole = all(self._take(change, now) for change in held)
        self._pass()
        return self.whole

    def _take(self, change: Change, now: float) -> bool:
        if change.epoch == self.epoch and change.version <= self.version and self.whole:
            return True
        epoch = self.epoch or change.epoch  # one that was read as empty has none yet
        if not self.whole or (change.epoch, change.version) != (epoch, self.version + 1):
            self.whole = False
            return False
        for event in change.events:
            self._apply(event, now)
        self.epoch, self.version = change.epoch, change.version
        self._pass()
        return True

    def _apply(self, event: list[Any], now: float) -> None:
        kind, user, connection, *more = event
        if kind == LEFT:
            self.drop(connection, now, more[0])
            return
        if kind == REPLACED:
            self.close(more[0], now)
        self.show(Shown(connection, user, more[-1]), now)

    # What is shown, told by Redis or, while it is away, done by this node.

    def show(self, shown: Shown, now: float) -> None:
        """Show a connection, in the place of one of the user's that lingers if there is one."""
        self._connections[shown.connection] = None
        self.roster.track(shown.user, shown.connection, shown.meta, now)

    def drop(self, connection: str, now: float, reason: str = "left") -> None:
        """Show a connection no more."""
        self._connections.pop(connection, None)
        self.roster.untrack(connection, now, reason)

    def close(self, connection: str, now: float) -> None:
        """Let a connection linger."""
        self._connections.pop(connection, None)
        self.roster.close(connection, now, self._grace)

    # Waiting.

    async def passed(self, epoch: str, version: int, deadline: float) -> None:
        """Wait until this version has arrived here, for at most ``deadline`` seconds."""
        if not self.whole or epoch != self.epoch or self.version >= version:
            return
        event = anyio.Event()
        self._passing.append((version, event))
        with anyio.move_on_after(deadline):
            await event.wait()

    def _pass(self) -> None:
        if self._passing:
            for _, event in (each for each in self._passing if each[0] <= self.version):
                event.set()
            self._passing = [each for each in self._passing if each[0] > self.version]


class Tally:
    """How many are in one group, without a list. It is ``whole`` once it has been read."""

    def __init__(self, grace: float) -> None:
        self.ready: anyio.Event = anyio.Event()
        self.whole: bool = False
        self.loading: bool = False
        self._grace = grace
        self._epoch = ""
        self._version = 0
        self._members = 0
        self._floor = 0  # where Redis has come back empty, those who were there come back within the grace
        self._until = 0.0

    def receive(self, counts: Counts | Found, now: float, *, read: bool = False) -> bool:
        """Take the counts if they are newer; true if another number is to be told."""
        if counts.epoch == self._epoch and counts.version <= self._version and not read:
            return False
        before = self.size(now)
        if self._epoch not in ("", counts.epoch):
            self._floor, self._until = before, now + self._grace
        self._epoch, self._version, self._members = counts.epoch, counts.version, counts.members
        return self.size(now) != before

    def size(self, now: float) -> int:
        """Return how many members there are."""
        return max(self._members, self._floor if now < self._until else 0)

    def expire(self, now: float) -> bool:
        """Let go of what has not come back in time; true if another number is to be told."""
        if not self._floor or now < self._until:
            return False
        fewer = self._floor > self._members
        self._floor = 0
        return fewer
