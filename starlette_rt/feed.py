"""Presence as it is told to those who asked for it.

The law of this file: changes become frames here, net and not too often. Whoever joined with
``presence="members"`` has a state and then diffs, at most five a second; a group of more than 200 members is
told as a count, at most one a second, and told whole again when it has shrunk. Watchers are members of a
hidden group of the hub, so that presence is spelled once and takes its place in the order of everything.
One task runs while something has changed lately, none otherwise.
"""

from __future__ import annotations

from collections import Counter

import anyio
import anyio.lowlevel

from .backends.base import PresenceStore
from .backends.base import Watch as Watch
from .frames import PresenceCount, PresenceDiff, PresenceState, told
from .hub import Hub, Message, Peer
from .loop import Handle, Tasks
from .presence import Diff, Member

PAGE = 200  # members in one state, and the most that are told one by one
DIFF_PERIOD = 0.2  # seconds between two diffs of one group
COUNT_PERIOD = 1.0  # seconds between two counts of one group
TICK = 0.05  # seconds between two looks while something is due

MEMBERS, COUNT = "\0members:", "\0count:"  # no group of a host can begin with a control character
HIDDEN: dict[Watch, str] = {"members": MEMBERS, "count": COUNT}


class Feed:
    """Tells the watchers of this node."""

    def __init__(self, hub: Hub, store: PresenceStore, tasks: Tasks) -> None:
        self._hub, self._store, self._tasks = hub, store, tasks
        self._dirty: dict[str, None] = {}
        self._counting: dict[str, None] = {}
        self._rested: dict[str, float] = {}  # hidden group -> when it may be told again
        self._large: set[str] = set()
        self._states: dict[str, tuple[int, Message]] = {}
        self._counts: dict[str, int] = {}  # group -> what its counters were told last
        self._coming: Counter[str] = Counter()  # hidden group -> watchers that wait until it is followed
        self._running: Handle | None = None
        self._closed = False

    def close(self) -> None:
        """Tell nothing more: the process goes, and its members stay for those who ask elsewhere."""
        self._closed = True
        if self._running is not None:
            self._running.cancel()

    async def watch(self, peer: Peer, group: str, how: Watch) -> None:
        """Tell ``peer``, a member of ``group``, its present state, and from now on what changes.

        One that has left, or ended, before the group was followed is told nothing.
        """
        hidden = HIDDEN[how] + group
        self._coming[hidden] += 1
        try:
            await self._store.follow(group, how)
            if self._hub.has(peer, group):
                self.unwatch(peer, group)
                self._hub.say(peer, self._first(group, how))
                self._hub.join(peer, hidden)
        finally:
            self._coming[hidden] -= 1
            self._vacated(hidden, group, how)

    def _first(self, group: str, how: Watch) -> Message:
        """Return what a watcher is told first."""
        if how == "members":
            if MEMBERS + group not in self._hub.groups:
                self._catch_up(group)
            return self._state(group)
        count = self._store.size(group)
        if self._counts.get(group) != count:
            self._counts.pop(group, None)  # the others are told what this one knows, whatever they were told last
        return Message(PresenceCount(group, count))

    def _catch_up(self, group: str) -> None:
        """Let the first watcher's state hold everything: nobody else has to hear of what is pending."""
        if self._store.take(group, watched=True) is not None:
            self._states.pop(group, None)
            if COUNT + group in self._hub.groups:
                self._counting[group] = None

    def unwatch(self, peer: Peer, group: str) -> None:
        """Tell ``peer`` nothing more of ``group``'s presence."""
        self._hub.leave(peer, MEMBERS + group)
        self._hub.leave(peer, COUNT + group)

    def changed(self, group: str) -> None:
        """Something has changed in ``group``; it is told at the end of the turn, or when its period has passed."""
        self._dirty[group] = None
        if self._running is None and not self._closed:
            self._running = self._tasks.spawn(self._run)

    def crowd(self, name: str, occupied: bool) -> None:
        """A group of the hub has got its first member or lost its last; what is not watched is not followed."""
        if occupied or name[:1] != "\0":
            return
        for how, start in HIDDEN.items():
            if name.startswith(start):
                self._vacated(name, name.removeprefix(start), how)

    def _vacated(self, hidden: str, group: str, how: Watch) -> None:
        """Follow ``group`` no more if nobody watches it, or is about to."""
        if hidden in self._hub.groups or self._coming[hidden]:
            return
        del self._coming[hidden]
        self._store.unfollow(group, how)
        self._states.pop(group, None)
        self._counts.pop(group, None)
        if how == "members":
            self.changed(group)  # a roster that nobody is in may be forgotten

    async def _run(self) -> None:
        """Tell what is due until nothing is due and every period has passed."""
        try:
            await anyio.lowlevel.checkpoint()  # what changes in one turn is told together
            while self._dirty or self._counting or self._rested:
                self._tell(self._tasks.time())
                await anyio.sleep(TICK)
        finally:
            self._running = None

    def _tell(self, now: float) -> None:
        for hidden in [hidden for hidden, due in self._rested.items() if due <= now]:
            del self._rested[hidden]
        for group in [group for group in self._dirty if MEMBERS + group not in self._rested]:
            del self._dirty[group]
            self._tell_members(group, now)
        for group in [group for group in self._counting if COUNT + group not in self._rested]:
            del self._counting[group]
            self._tell_count(group, now)

    def _tell_members(self, group: str, now: float) -> None:
        """Take the diff of ``group``, always, and deliver it if somebody watches."""
        diff = self._store.take(group, watched=MEMBERS + group in self._hub.groups)
        self._states.pop(group, None)
        if COUNT + group in self._hub.groups:
            self._counting[group] = None
        if diff is None:
            return
        if MEMBERS + group not in self._hub.groups:
            self._large.discard(group)
        elif self._store.size(group) > PAGE:
            self._large.add(group)
            self._counting[group] = None
        elif group in self._large:
            self._large.discard(group)
            self._counts.pop(group, None)
            self._hub.deliver(MEMBERS + group, self._state(group))
        else:
            self._rested[MEMBERS + group] = now + DIFF_PERIOD
            self._hub.deliver(MEMBERS + group, Message(diff_frame(group, diff)))

    def _tell_count(self, group: str, now: float) -> None:
        """Tell how many there are, unless that is what was told last."""
        count = self._store.size(group)
        if self._counts.get(group) == count:
            return
        if COUNT + group in self._hub.groups or group in self._large:
            self._counts[group] = count
        self._rested[COUNT + group] = now + COUNT_PERIOD
        message = Message(PresenceCount(group, count))
        self._hub.deliver(COUNT + group, message)
        if group in self._large:
            self._hub.deliver(MEMBERS + group, message)

    def _state(self, group: str) -> Message:
        """Return the first page of the state that every watcher has by now, spelled once for each version."""
        state = self._store.known(group)
        cached = self._states.get(group)
        if cached is None or cached[0] != state.version:
            page, after = state.page(limit=PAGE)
            if after is not None:
                self._large.add(group)  # who has one page only cannot follow diffs
            cached = state.version, Message(PresenceState(group, state.version, told(page), after))
            if MEMBERS + group in self._hub.groups:
                self._states[group] = cached
        return cached[1]


def diff_frame(group: str, diff: Diff) -> PresenceDiff:
    """Return a diff as it is said: who is gone altogether carries the reason."""
    joins, leaves = (told(Member(*item) for item in side.items()) for side in (diff.joins, diff.leaves))
    for key, reason in diff.reasons.items():
        leaves[key]["reason"] = reason
    return PresenceDiff(group, diff.version, joins, leaves)
