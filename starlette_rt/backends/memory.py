"""One process, no network: the four roles in plain memory.

The law of this file: the same guarantees as every other backend, nothing survives the process, and nothing
grows without a bound. It imports no event loop; clocks are arguments.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Any

import anyio

from ..history import History, Log, Position, Publication, Random, Reading, Window, new_epoch, new_tag
from ..limits import Buckets, Due, quote
from ..presence import Diff, Member, Roster, State
from .base import MAX_ANSWER, Backend, Claim, Published, Watch

Clock = Callable[[], float]

SHARED = Published(None, "yes")
NOBODY = State(0, ())
FREE = Claim("free")

LOGS = 100_000  # logs that are kept; beyond, the one that was used longest ago goes
REPEATABLE = 100_000  # ids of publications without history that are remembered, of all groups together
LOOKS = 200  # logs that are looked at in one sweep
ANSWERS = 100_000  # answers that the ledger keeps; beyond, the oldest goes
ANSWER_BYTES = 32 * 1024 * 1024  # and bytes of them


class MemoryBroker:
    """Delivers to this process, at once."""

    def __init__(
        self, now: Clock = time.monotonic, *, logs: int = LOGS, tag: Random = new_tag, epoch: Random = new_epoch
    ) -> None:
        self._deliver: Callable[[Publication], None] = ignore
        self._now = now
        self._tag, self._epoch = tag, epoch
        self._most = logs
        self._logs: OrderedDict[str, Log] = OrderedDict()  # the one that was used longest ago first
        self._hand: deque[tuple[str, Log]] = deque()  # each log once, the one looked at longest ago first
        self._said: Window[None] = Window(REPEATABLE)

    async def start(self, deliver: Callable[[Publication], None], resumed: Callable[[], None]) -> None:
        self._deliver = deliver

    def subscribe(self, group: str) -> None:
        """Nothing has to be done: everything is here."""

    def unsubscribe(self, group: str) -> None:
        """Nothing has to be done."""

    async def subscribed(self, group: str) -> None:
        """Nothing has to be waited for."""

    async def subscribed_elsewhere(self, groups: Collection[str]) -> set[str]:
        return set()

    def troubles(self) -> list[str]:
        return []

    async def publish(self, publication: Publication, history: History | None) -> Published:
        if history is None:
            if not (publication.once and self._repeats(publication)):
                self._deliver(publication)
            return SHARED
        log = self._log(publication.group, history)
        position, placed = log.append(publication, self._now(), self._tag)
        if placed is not None:
            self._deliver(placed)
        return Published(position, "yes")

    async def read(self, group: str, history: History) -> Reading:
        return self._log(group, history).read(self._now())

    async def position(self, group: str, history: History) -> Position:
        return (await self.read(group, history)).position

    async def renew(self, group: str, history: History, seen: Position) -> Position:
        return self._log(group, history).renew(seen, self._now(), self._epoch)

    async def stop(self) -> None:
        self._deliver = ignore
        self._logs.clear()
        self._hand.clear()
        self._said.clear()

    def sweep(self) -> None:
        self._look(LOOKS)

    def _repeats(self, publication: Publication) -> bool:
        name = (publication.group, publication.id)
        known = name in self._said
        self._said.put(name, None)
        return known

    def _log(self, group: str, history: History) -> Log:
        log, now = self._logs.get(group), self._now()
        if log is None or log.outlived(now):
            self._look(2)  # who adds one looks at two: no log costs more because there are many
            log = self._logs[group] = Log(history, now, self._epoch)
            self._hand.append((group, log))
        self._logs.move_to_end(group)
        if len(self._logs) > self._most:
            self._logs.popitem(last=False)
        return log

    def _look(self, steps: int) -> None:
        now = self._now()
        for _ in range(min(steps, len(self._hand))):
            group, log = self._hand.popleft()
            if self._logs.get(group) is not log:
                continue  # it went before its time was over
            if log.outlived(now):
                del self._logs[group]
            else:
                log.expire(now)
                self._hand.append((group, log))


class MemoryPresence:
    """A roster for each group in which somebody is, or was within the grace."""

    on_count: Callable[[str, int, int], None] | None = None

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
        before = roster.count()
        roster.track(key, connection, meta, self._now())
        self._report(group, before, roster)

    async def untrack(self, group: str, key: str, connection: str) -> None:
        if (roster := self._rosters.get(group)) is not None:
            before = roster.count()
            roster.untrack(connection, self._now())
            self._report(group, before, roster)

    def _report(self, group: str, before: int, roster: Roster) -> None:
        self._changed(group)
        if self.on_count is not None and roster.count() != before:
            self.on_count(group, before, roster.count())

    def close(self, groups: Sequence[str], key: str, connection: str) -> None:
        for group in groups:
            roster = self._rosters[group]
            before = roster.count()
            roster.close(connection, self._now(), self._grace)
            self._lingering.add(group)
            self._report(group, before, roster)

    def sweep(self) -> None:
        now = self._now()
        for group in tuple(self._lingering):
            roster = self._rosters.get(group)
            before = 0 if roster is None else roster.count()
            if roster is None:
                self._changed(group)
            elif roster.expire(now):
                self._report(group, before, roster)
            if roster is None or roster.deadline is None:
                self._lingering.discard(group)

    async def follow(self, group: str, part: Watch) -> None:
        """Nothing has to be done: everything is here."""

    def unfollow(self, group: str, part: Watch) -> None:
        """Nothing has to be done."""

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

    def size(self, group: str) -> int:
        roster = self._rosters.get(group)
        return 0 if roster is None else roster.count()

    async def members(self, group: str, after: str | None = None, limit: int | None = None) -> dict[str, Member]:
        roster = self._rosters.get(group)
        return page_of({} if roster is None else roster.members(), after, limit)

    async def count(self, group: str, connections: bool = False) -> int:
        roster = self._rosters.get(group)
        return 0 if roster is None else roster.count(connections=connections)


class MemoryLimits:
    """Budgets and caps of this process; nobody need ask for them, for it has them at hand already."""

    shared: bool = False
    fail_open: bool = True

    def __init__(self, now: Clock) -> None:
        self.buckets: Buckets = Buckets()
        self._now = now
        self._caps: Counter[str] = Counter()

    async def take(self, dues: Sequence[Due], seen: Buckets) -> float:
        now, taken = self._now(), []
        for due in dues:
            wait, tats = quote(self.buckets.get(due.key), due.limit, now, due.amount)
            if wait:
                return wait
            taken.append((due.key, tats))
        for key, tats in taken:
            self.buckets.put(key, tats, now)
        return 0.0

    async def take_cap(self, identity: str, most: int) -> bool:
        if self._caps[identity] >= most:
            return False
        self._caps[identity] += 1
        return True

    def release_cap(self, identity: str) -> None:
        self._caps[identity] -= 1
        if self._caps[identity] <= 0:
            del self._caps[identity]

    def sweep(self) -> None:
        """What has refilled goes by itself."""


class Held:
    """A key that is claimed: by which claim, until when, and how it ended, if it did."""

    __slots__ = ("answer", "ended", "holder", "until")

    def __init__(self, holder: str, until: float) -> None:
        self.holder: str = holder
        self.until: float = until
        self.answer: bytes | None = None
        self.ended: anyio.Event | None = None  # there if somebody waits

    def end(self) -> None:
        """Wake those who wait for it."""
        if self.ended is not None:
            self.ended.set()

    def claim(self) -> Claim:
        """Return what it is to one who comes now."""
        return Claim("running", self.holder) if self.answer is None else Claim("answered", self.holder, self.answer)


class MemoryLedger:
    """Claims, answers and revocations of this process; what has run out is forgotten with the next one."""

    fail_open: bool = True

    def __init__(self, wall: Clock = time.time, *, answers: int = ANSWERS, size: int = ANSWER_BYTES) -> None:
        self._wall = wall
        self._most, self._room = answers, size
        self._numbers = count(1)
        self._held: dict[str, Held] = {}
        self._answered: OrderedDict[str, None] = OrderedDict()  # the oldest first
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the bytes of those that are still whole, the oldest first
        self._rules: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []  # at least one for each key and each rule, and no more than thrice that

    async def claim(self, key: str, ttl: float, *, shared: bool = False, holder: str = "") -> Claim:
        self._sweep()
        if (held := self._holding(key)) is not None:
            return held.claim()
        held = self._held[key] = Held(holder or str(next(self._numbers)), self._wall() + ttl)
        self._plan(key, held.until)
        return Claim("first", held.holder)

    async def settle(self, key: str, answer: bytes, ttl: float) -> bytes:
        self._sweep()
        held = self._holding(key)
        if held is None:
            held = self._held[key] = Held("", 0.0)
        if held.answer is None:
            held.answer, held.until = bounded(answer), self._wall() + ttl
            held.end()
            self._plan(key, held.until)
            stays = held.answer  # for there may be no room to keep it
            self._keep(key, len(stays))
            return stays
        return held.answer

    async def release(self, key: str, holder: str) -> None:
        held = self._holding(key)
        if held is not None and held.answer is None and held.holder == holder:
            self._forget(key)

    async def outcome(self, key: str, deadline: float) -> Claim:
        with anyio.move_on_after(deadline):
            while (held := self._holding(key)) is not None and held.answer is None:
                held.ended = held.ended or anyio.Event()
                with anyio.move_on_after(held.until - self._wall()):
                    await held.ended.wait()
        held = self._holding(key)
        return FREE if held is None else held.claim()

    def look(self, key: str) -> tuple[Claim, float]:
        """Return what ``key`` is now, and for how many seconds more."""
        held = self._holding(key)
        return (FREE, 0.0) if held is None else (held.claim(), held.until - self._wall())

    async def revoke(self, rule: str, until: float) -> None:
        self.note(rule, until)

    async def revoked(self, rules: Sequence[str]) -> bool:
        return bool(self._rules) and any(self._rules.get(rule, 0.0) > self._wall() for rule in rules)

    def note(self, rule: str, until: float) -> None:
        self._sweep()
        if until > self._rules.get(rule, self._wall()):
            self._rules[rule] = until
            self._plan(rule, until)

    def revocations(self) -> list[tuple[str, float]]:
        self._sweep()
        return list(self._rules.items())

    async def load(self) -> None:
        """There is nobody to learn from."""

    def _holding(self, key: str) -> Held | None:
        held = self._held.get(key)
        if held is not None and held.until <= self._wall():
            self._forget(key)
            return None
        return held

    def _forget(self, key: str) -> None:
        self._held.pop(key).end()
        self._answered.pop(key, None)
        self._room += self._sizes.pop(key, 0)

    def _keep(self, key: str, size: int) -> None:
        """Make room for an answer: the oldest are emptied, or forgotten where there are too many.

        An emptied one still says that its key is settled: who fills the room makes nothing happen twice.
        """
        self._answered[key] = None
        self._sizes[key] = size
        self._room -= size
        if len(self._answered) > self._most:
            self._forget(next(iter(self._answered)))
        while self._room < 0:
            oldest, freed = self._sizes.popitem(last=False)
            self._held[oldest].answer = b""
            self._room += freed

    def _plan(self, name: str, due: float) -> None:
        heapq.heappush(self._due, (due, name))
        if len(self._due) > 3 * (len(self._held) + len(self._rules)) + 100:
            self._due = [(held.until, key) for key, held in self._held.items()]
            self._due += [(until, rule) for rule, until in self._rules.items()]
            heapq.heapify(self._due)

    def _sweep(self) -> None:
        now = self._wall()
        while self._due and self._due[0][0] <= now:
            name = heapq.heappop(self._due)[1]
            self._holding(name)
            if self._rules.get(name, now + 1) <= now:
                del self._rules[name]


def bounded(answer: bytes) -> bytes:
    """Return ``answer`` as it is kept: of one that is too large the fact alone."""
    return answer if len(answer) <= MAX_ANSWER else b""


def page_of(members: dict[str, Member], after: str | None, limit: int | None) -> dict[str, Member]:
    """Return a page of ``members`` in the order of their keys; all of them if neither is said."""
    if after is None and limit is None:
        return members
    following = (key for key in members if after is None or key > after)
    keys = sorted(following) if limit is None else heapq.nsmallest(limit, following)
    return {key: members[key] for key in keys}


def ignore(_: Any) -> None:
    """Take what arrives while nothing runs."""


def memory(*, grace: float, now: Clock) -> Backend:
    """Return the backend of ``memory://``; ``grace`` is the presence grace in seconds, ``now`` a monotonic clock."""
    return Backend(MemoryBroker(now), MemoryPresence(grace, now), MemoryLimits(now), MemoryLedger())
