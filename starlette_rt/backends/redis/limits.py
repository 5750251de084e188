"""Budgets and caps that all nodes of one Redis share.

The law of this file: this node's own buckets were asked before, and Redis is asked only for what they let pass and
what no answer of Redis has refused already: who is far beyond a limit costs no round trip. A budget is a bucket by the
clock of Redis, and what one message takes from all budgets of one subject is one command. A cap is how many connections
of a person each generation has; every node says its own number, never a difference.

The grammar of rates is that of the `limits` library; its Redis storage is not used, because it pins old clients, has
a pool of connections of its own beside ours, counts by windows where this node's buckets are GCRA, so that the two
would disagree, and cannot take from several limits together or twice the same without taking twice.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby, islice

from ...exceptions import Unavailable
from ...limits import Buckets, Due, quote
from .connection import FORMAT, Link, Script, escaped
from .nodes import Nodes

LIMIT, CAP = Script("limit"), Script("cap")
SCRIPTS = (LIMIT, CAP)

KEPT = 25 * 3600_000  # milliseconds that the counts of a person are kept since one of them was said last
AGAIN = 12 * 3600.0  # seconds after which a node says its own again
LOOKS = 500  # counts that one sweep says again at most
MOST = 2**31  # connections: what a node says that it has is not refused

Told = tuple[int, str, int]  # how many times Redis had come, by which generation, how many connections
UNSURE: Told = (-1, "", -1)


class Count:
    """How many connections of one person this node has, and what Redis was told of it last, and when."""

    __slots__ = ("at", "number", "told")

    def __init__(self) -> None:
        self.number: int = 0
        self.told: Told | None = None  # None: nothing that Redis could know
        self.at: float = -math.inf


class RedisLimits:
    """Budgets and caps of all nodes of one Redis. See `LimitStore`."""

    shared: bool = True

    def __init__(self, link: Link, nodes: Nodes) -> None:
        self.fail_open: bool = True
        self._link, self._nodes = link, nodes
        self._known = Buckets()  # the budgets as Redis has told of them last, in this loop's time
        self._counts: OrderedDict[str, Count] = OrderedDict()  # what was told longest ago, or not at all, first
        self._times = 0  # that Redis has come; what it was told the time before it may have forgotten
        nodes.on_held.append(self._came)

    # Budgets.

    async def take(self, dues: Sequence[Due], seen: Buckets) -> float:
        if wait := self._refused(dues):
            return wait
        try:
            for _, together in groupby(sorted(dues, key=slot_of), slot_of):
                if wait := await self._ask(list(together), seen):
                    return wait
        except Unavailable:
            if not self.fail_open:
                raise
        return 0.0

    def _refused(self, dues: Iterable[Due]) -> float:
        """Return the seconds that Redis would make it wait for certain: since it told, others can only have taken."""
        now = self._link.tasks.time()
        return max((quote(self._known.get(due.key), due.limit, now, due.amount)[0] for due in dues), default=0.0)

    async def _ask(self, dues: list[Due], seen: Buckets) -> float:
        """Take ``dues``, which are of one subject."""
        keys = [self._link.key("l", slot_of(due), due.place.rstrip(":")) for due in dues]
        wait, *ahead = await self._link.call(LIMIT, keys, [FORMAT, secrets.token_urlsafe(6), *spelled(dues)])
        now, told = self._link.tasks.time(), iter(ahead)
        for due in dues:
            tats = tuple(now + next(told) / 1e6 for _ in due.limit.rates)
            self._known.put(due.key, tats, now)
            if wait:  # what this node had let pass was not taken, and what comes next is refused when it arrives
                seen.put(due.key, tats, now)
        return float(wait / 1e6)

    # Caps.

    async def take_cap(self, identity: str, most: int) -> bool:
        count = self._counts.setdefault(identity, Count())
        count.number += 1
        try:
            allowed = count.number <= most and await self._may_come(identity, count, most)
        except BaseException:
            self._unsaid(identity)
            self.release_cap(identity)
            raise
        if not allowed:
            self.release_cap(identity)
        return allowed

    async def _may_come(self, identity: str, count: Count, most: int) -> bool:
        """Whether all nodes together have room for one more; while they cannot be asked, this one has."""
        said = (self._times, self._nodes.generation, count.number)
        try:
            others = await self._asked(identity, said, most)
            if dead := [each for each in others if not self._nodes.alive(each)]:
                others = await self._asked(identity, said, most, dead)
        except Unavailable:
            self._unsaid(identity)
            return True
        if not others:
            self._told(identity, count, said)
        return not others

    async def _asked(self, identity: str, said: Told, most: int, dead: Sequence[str] = ()) -> list[str]:
        """Let one more in where there is room; else return the other generations that fill it."""
        reply = await self._link.call(CAP, [self._cap(identity)], [FORMAT, *said[1:], most, KEPT, *dead])
        return [] if reply[0] else [each.decode() for each in reply[1:]]

    def release_cap(self, identity: str) -> None:
        count = self._counts[identity]
        count.number -= 1
        if count.told is None and not count.number:
            del self._counts[identity]
        elif count.told is not None and count.told[2] != count.number:
            self._say(identity, count)

    def sweep(self) -> None:
        """Say again what Redis may not know, and what was said so long ago that it could forget it."""
        now, truth = self._link.tasks.time(), (self._times, self._nodes.generation)
        for identity, count in list(islice(self._counts.items(), LOOKS)) if self._link.up else ():
            if count.told == (*truth, count.number) and now - count.at < AGAIN:
                break
            self._say(identity, count)

    def _say(self, identity: str, count: Count) -> None:
        """Tell Redis this node's number, whatever the others have."""
        said, key = (self._times, self._nodes.generation, count.number), self._cap(identity)
        lost = partial(self._unsaid, identity)
        if count.number:
            sent = self._link.cast_call(CAP, [key], [FORMAT, *said[1:], MOST, KEPT], lost=lost)
        else:
            sent = self._link.cast("HDEL", key, said[1], lost=lost)
        if not sent:
            self._unsaid(identity)
        elif count.number:
            self._told(identity, count, said)
        else:
            del self._counts[identity]

    def _told(self, identity: str, count: Count, said: Told) -> None:
        count.told, count.at = said, self._link.tasks.time()
        self._counts.move_to_end(identity)

    def _unsaid(self, identity: str) -> None:
        """Redis may not know the number of a person, or a wrong one: it is the next to be said."""
        self._counts.setdefault(identity, Count()).told = UNSURE
        self._counts.move_to_end(identity, last=False)

    async def _came(self) -> None:
        """Redis is there, and may know nothing of what was said."""
        self._times += 1

    def _cap(self, identity: str) -> bytes:
        return self._link.key("cap", f"{{{escaped(identity)}}}")


def slot_of(due: Due) -> str:
    """Return the part of a budget's name by which Redis finds its slot: all of one subject lie in one."""
    return f"{{{due.limit.per}:{escaped(due.subject)}}}"


def spelled(dues: Iterable[Due]) -> list[float]:
    """Return what is to be taken as `lua/limit.lua` takes it."""
    spelling: list[float] = []
    for due in dues:
        spelling += [due.amount, len(due.limit.rates)]
        spelling += [part * 1e6 for rate in due.limit.rates for part in rate]
    return spelling
