"""The histories that this node follows: each in step with its log, or knowing that it is not.

The law of this file: it knows no hub and no connection; what is to be said goes to callables. A stream is in
step by the chain alone. What is next is delivered, what is a duplicate is dropped, and anything else is a break:
then one task reads the log while what arrives is held back, and either the chain closes or the group is told
that it broke. Because a stream keeps what its log keeps, nobody who comes back costs a read. Whatever stands
between two awaits here is one step for everybody else, which is why there is no lock.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import chain, count, islice, repeat
from typing import Any, Generic, NamedTuple, TypeVar

import anyio

from .backends.base import Broker
from .exceptions import Unavailable
from .history import (
    SEEN,
    History,
    Position,
    Publication,
    Reading,
    Window,
    after,
    begin,
    contradicts,
    link,
    merge,
    offset_of,
)
from .loop import Handle, Tasks

M = TypeVar("M")
V = TypeVar("V")

READY = 5.0  # seconds that a first join waits for its group's log
ANSWER = 5.0  # seconds after which the broker is taken not to answer
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)  # seconds, at most, before it is asked again
CHECK = 10.0, 20.0  # seconds between two looks at where the log ends
STRIKE = 1.0  # seconds after which what was behind at the first look must have come
SPREAD = 1.0  # seconds over which the looks are spread when all are due at once
HELD = 1000  # publications that are held back during a read, or as many as the ring holds
HELD_BYTES = 4 * 1024 * 1024  # and bytes of them
FAREWELL = 30.0  # seconds in which a stream that nobody needs any more may still find out that it broke
FAREWELLS = 1000  # such streams at a time

NOWHERE = Position("", 0, "")


class Kept(NamedTuple, Generic[M]):
    """A publication of the ring and what is said of it; ``spared`` if that is less than the whole.

    It was spared those who had seen it before a break; who comes later may not have.
    """

    publication: Publication
    message: M
    spared: bool


class Stream(Generic[M]):
    """One group's history on this node. `Streams` makes it."""

    def __init__(self, group: str, history: History, home: Streams[M]) -> None:
        self.group: str = group
        self.history: History = history
        self.position: Position = NOWHERE
        self.ready: bool = False
        self.closed: bool = False
        self.waiting: int = 0  # followers who wait for it to be ready
        self.joins: int = 0  # followers who have got it
        self.breaks: int = 0  # how often its group has been told that the history broke
        self.due: float = 0.0  # when its log is looked at next
        self._home = home
        self._ring: deque[Kept[M]] = deque(maxlen=history.size)
        self._ids: Window[int] = Window(SEEN)  # of what has been told, and the count at which it was
        self._covered: set[str] = set()  # ids of what was in the log already when its chain began here
        self._dead: Window[None] = Window(SEEN)  # (offset, tag) of what is in the chain no longer
        self._held: list[Publication] | None = None  # there while a task reads the log
        self._bytes = 0
        self._overrun = False
        self._told = 0  # publications so far; the next two are values that this had
        self._broke_at = self._joined_at = 0
        self._fresh = home.tasks.time()  # when the newest of the ring came
        self._moved: anyio.Event | None = None  # there if somebody waits for the stream to move
        self._suspect: Position | None = None
        self._interrupted = False

    _reader: Handle  # the task that reads the log, or did last

    # For those who join.

    def since(self, position: Position) -> list[tuple[Publication, M]] | None:
        """Return what was said after ``position``; ``None`` if it cannot be proven that this is all of it.

        Who comes from another node may be ahead of this one: let `passed` see to that first.
        """
        self._expire()
        start = begin(position, self.position, len(self._ring))
        if start is None or (start < len(self._ring) and self._ring[start].publication.prev != position.tag):
            return None
        return self._from(start)

    def last(self, count: int) -> list[tuple[Publication, M]]:
        """Return the last ``count`` publications that are kept, or fewer."""
        self._expire()
        return self._from(max(0, len(self._ring) - count))

    async def passed(self, offset: int, deadline: float) -> bool:
        """Wait until this node has told ``offset``, or that the history broke; false after ``deadline`` seconds."""
        breaks = self.breaks
        with anyio.move_on_after(deadline):
            while self.position.offset < offset and self.breaks == breaks and not self.closed:
                await self.movement()
        return self.position.offset >= offset or self.breaks != breaks

    def joined(self) -> None:
        """Somebody comes who may not have what was said here so far."""
        self.joins += 1
        self._joined_at = self._told

    async def movement(self) -> None:
        """Wait until something has changed."""
        self._moved = self._moved or anyio.Event()
        await self._moved.wait()

    # In step.

    def receive(self, publication: Publication) -> None:
        """Take what came live: deliver it, drop it, or find out what is missing."""
        if self._held is not None:
            self._hold(publication)
            return
        if self._dead and key_of(publication) in self._dead:
            return
        fits = link(self.position, publication, self._tag_at)
        if fits == "next":
            self._take(publication)
        elif fits == "break":
            self.distrust(publication)

    def _take(self, publication: Publication) -> None:
        """The next one: it is said, or only counted where it has been said before."""
        said = self._ids.get(publication.id) or 0
        again = said > self._broke_at or publication.id in self._covered
        # Said before a break, it may be unknown to those who came since: then it is said to all.
        spared = not again and said > self._joined_at
        message = self._append(publication, again or spared, spared)
        self._told += 1
        if publication.id:
            self._ids.put(publication.id, self._told)
        self.position = after(self.position, publication)
        if not self.closed:
            self._home.deliver(publication, message)
        self._move()

    def _append(self, publication: Publication, seen: bool, spared: bool = False) -> M:
        message = self._home.spell(publication, seen)
        self._ring.append(Kept(publication, message, spared))
        self._fresh = self._home.tasks.time()
        return message

    def _from(self, start: int) -> list[tuple[Publication, M]]:
        spell = self._home.spell
        return [
            (publication, spell(publication, False) if spared else message)
            for publication, message, spared in islice(self._ring, start, None)
        ]

    def _tag_at(self, offset: int) -> str | None:
        """Return the tag of ``offset``, as far back as it is known."""
        if offset == self.position.offset:
            return self.position.tag
        index = len(self._ring) - (self.position.offset - offset) - 1
        return self._ring[index].publication.tag if 0 <= index < len(self._ring) else None

    def _expire(self) -> None:
        """Forget what the log has forgotten too."""
        if self._home.tasks.time() >= self._fresh + self.history.ttl:
            self._ring.clear()

    def _move(self) -> None:
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    # Out of step.

    def distrust(self, *held: Publication) -> None:
        """Read the log; until that is done, hold back what arrives."""
        self._held, self._bytes = [], 0
        for publication in held:
            self._hold(publication)
        self._reader = self._home.tasks.spawn(self.mend)

    def _hold(self, publication: Publication) -> None:
        """Keep it for after the read. If there is too much of it, it must be read too, and by a later read."""
        held = self._held
        assert held is not None
        self._bytes += len(publication.json)
        if len(held) >= max(HELD, self.history.size) or self._bytes > HELD_BYTES:
            held.clear()
            self._bytes, self._overrun = 0, True
        else:
            held.append(publication)

    async def mend(self) -> None:
        """Read the log until the chain is closed, here or by a new beginning."""
        while self._held is not None:
            asked, self._held, self._bytes, self._overrun = self._held, [], 0, False
            reading = await self.ask(self._home.broker.read)
            if self.closed:  # trio lets go on whose answer came first
                return
            # What came before the question must be in the answer. If it is not, the log was set back, and there may
            # be others who have lost more by that than we have, and do not know it.
            if self._bury(reading, asked):
                await self.renew(reading.position)
                continue
            if not self.ready or reading.position.epoch != self.position.epoch:
                self._adopt(reading)
            merged = merge(self.position, reading, self._alive(self._held))
            if merged is None:
                await self.renew(reading.position)
            else:
                self._resume(*merged)

    def _resume(self, told: list[Publication], left: list[Publication]) -> None:
        self._held = left
        for publication in told:
            self._take(publication)
        if not self._held and not self._overrun:
            self._held = None

    def _adopt(self, reading: Reading) -> None:
        """Begin where the log ends. Who followed what was before is told that it broke."""
        self._bury(reading, [kept.publication for kept in self._ring])
        self._ring.clear()
        self._broke_at = self._told
        self._covered = set()
        for entry in reading.entries:
            self._append(entry, entry.id in self._covered)
            if entry.id:
                self._covered.add(entry.id)
        self.position = reading.position
        broke, self.ready = self.ready, True
        if broke:
            self.breaks += 1
            self._home.reset(self.group, self.position)
        self._move()

    def _bury(self, reading: Reading, publications: list[Publication]) -> bool:
        """Remember those that are not in the log any more; true if there is one that was not known."""
        lost = [each for each in self._alive(publications) if contradicts(reading, offset_of(each), each.tag)]
        for each in lost:
            self._dead.put(key_of(each), None)
        return bool(lost)

    def _alive(self, publications: list[Publication]) -> list[Publication]:
        return [each for each in publications if key_of(each) not in self._dead]

    async def renew(self, seen: Position) -> None:
        """Let there be a new epoch after that of ``seen``, whoever makes it."""
        position = seen
        while position.epoch == seen.epoch:
            position = await self.ask(self._home.broker.renew, position)

    async def ask(self, call: Callable[..., Awaitable[V]], *args: Any) -> V:
        """Ask the broker about this group until it answers."""
        pauses = chain(PAUSES, repeat(PAUSES[-1]))
        while True:
            try:
                with anyio.fail_after(ANSWER):
                    return await call(self.group, self.history, *args)
            except (Unavailable, TimeoutError):
                self._move()  # who waits to join may have waited enough
                pause = next(pauses)
                await anyio.sleep(self._home.jitter(pause / 2, pause))

    # A tail that was lost: nothing comes after it that would show the gap.

    def interrupted(self) -> None:
        """What the log has and this node has not at the next look was said while it could not hear."""
        self._suspect, self._interrupted = None, True

    async def check(self) -> float:
        """Compare with where the log ends; return the seconds until the next look.

        What the log has and this node has not may be on its way: it gets a second, if nothing was interrupted.
        Everything else that differs is a matter for a read.
        """
        self._expire()
        if self._held is None:
            interrupted, self._interrupted = self._interrupted, False
            if (suspect := self._suspect) is not None:
                self._suspect = None
                if not self._agrees(suspect):
                    self.distrust()
            elif (suspect := await self._compare()) is not None:
                if not interrupted:
                    self._suspect = suspect
                    return STRIKE
                self.distrust()
        return self._home.jitter(*((0.0, SPREAD) if self._interrupted else CHECK))

    async def _compare(self) -> Position | None:
        """Ask where the log ends; return that if it is ahead of us."""
        mine = self.position
        try:
            with anyio.fail_after(ANSWER):
                theirs = await self._home.broker.position(self.group, self.history)
        except (Unavailable, TimeoutError):
            return None
        if self._held is not None or self.position.epoch != mine.epoch:
            return None  # it is being read, or has been
        if theirs.epoch == mine.epoch and theirs.offset > self.position.offset:
            return theirs
        if theirs.offset < mine.offset or not self._agrees(theirs):
            self.distrust()
        return None

    def _agrees(self, theirs: Position) -> bool:
        """Whether the log has been at ``theirs`` for all that we know, and we have been there too."""
        same = theirs.epoch == self.position.epoch and theirs.offset <= self.position.offset
        return same and self._tag_at(theirs.offset) in (theirs.tag, None)

    def close(self) -> None:
        """Follow no more; nothing is said from here on."""
        self.closed = True
        self._reader.cancel()
        self._move()


class Streams(Generic[M]):
    """The groups with history that have members on this node.

    ``spell`` makes what is kept and said of a publication, once; its second argument says that its members have
    seen this one, so that only the position moves. ``deliver`` says it to this node's members, ``reset`` tells
    them that the history broke and where it goes on.
    """

    def __init__(
        self,
        broker: Broker,
        tasks: Tasks,
        spell: Callable[[Publication, bool], M],
        deliver: Callable[[Publication, M], None],
        reset: Callable[[str, Position], None],
        *,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.broker: Broker = broker
        self.tasks: Tasks = tasks
        self.spell: Callable[[Publication, bool], M] = spell
        self.deliver: Callable[[Publication, M], None] = deliver
        self.reset: Callable[[str, Position], None] = reset
        self.jitter: Callable[[float, float], float] = jitter
        self._streams: dict[str, Stream[M]] = {}
        self._due: list[tuple[float, int, Stream[M]]] = []  # and some whose time or stream is over
        self._numbers = count()
        self._farewells: set[anyio.CancelScope] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._streams)

    def get(self, group: str) -> Stream[M] | None:
        """Return the stream of ``group`` if this node follows it."""
        return self._streams.get(group)

    async def follow(self, group: str, history: History) -> Stream[M]:
        """Return the stream of ``group``, in step with its log; those who ask at the same time share one read.

        Who gets it makes somebody a member before the next await, or calls `vacated`. Raises `Unavailable`
        if the log cannot be read within five seconds.
        """
        stream = self._streams.get(group)
        if stream is None:
            stream = self._begin(group, history)
        if not stream.ready:
            await self._wait(stream)
        stream.joined()
        return stream

    def _begin(self, group: str, history: History) -> Stream[M]:
        if self._closed:
            raise Unavailable("no group is followed any more: this node stops")
        for trouble in self.broker.troubles():
            raise Unavailable(trouble)
        stream = self._streams[group] = Stream(group, history, self)
        self.broker.subscribe(group)
        stream.distrust()
        self._plan(stream, self.jitter(*CHECK))
        return stream

    async def _wait(self, stream: Stream[M]) -> None:
        """Wait until ``stream`` is ready; the last one who gives up takes it away."""
        stream.waiting += 1
        there = False
        try:
            with anyio.move_on_after(READY):
                while not stream.ready and not stream.closed and not self.broker.troubles():
                    await stream.movement()
            there = stream.ready and not stream.closed
        finally:
            stream.waiting -= 1
            if not (there or stream.waiting or stream.joins or stream.closed):
                self._drop(stream)
        if not there:
            raise Unavailable(f"the history of {stream.group!r} cannot be read now")

    def receive(self, publication: Publication) -> None:
        """What the broker brings of a group with history; nothing happens if nobody here is in it."""
        stream = self._streams.get(publication.group)
        if stream is not None:
            stream.receive(publication)

    def vacated(self, group: str) -> None:
        """The last member has left: stop following, unless somebody waits to come in."""
        stream = self._streams.get(group)
        if stream is None:
            return
        stream.joins = 0
        if not stream.waiting:
            self._drop(stream)

    def _drop(self, stream: Stream[M]) -> None:
        del self._streams[stream.group]
        self.broker.unsubscribe(stream.group)
        stream.close()
        if stream.ready and len(self._farewells) < FAREWELLS:
            scope = anyio.move_on_after(FAREWELL)
            self._farewells.add(scope)
            self.tasks.spawn(self._farewell, stream, scope)

    async def _farewell(self, stream: Stream[M], scope: anyio.CancelScope) -> None:
        """See whether the log still is what this node was told: it may be the only one that can know."""
        mine = stream.position
        try:
            with scope:
                theirs = await stream.ask(self.broker.position)
                if theirs != mine and theirs.epoch == mine.epoch:
                    reading = await stream.ask(self.broker.read)
                    if reading.position.epoch == mine.epoch and contradicts(reading, mine.offset, mine.tag):
                        await stream.renew(reading.position)
        finally:
            self._farewells.discard(scope)

    def tick(self, now: float) -> None:
        """Begin the looks that are due; called about twice a second with the time of the tasks."""
        while self._due and self._due[0][0] <= now:
            due, _, stream = heapq.heappop(self._due)
            if not stream.closed and stream.due == due:
                self.tasks.spawn(self._check, stream)

    async def _check(self, stream: Stream[M]) -> None:
        self._plan(stream, await stream.check())

    def _plan(self, stream: Stream[M], seconds: float) -> None:
        stream.due = self.tasks.time() + seconds
        heapq.heappush(self._due, (stream.due, next(self._numbers), stream))

    def recheck(self) -> None:
        """What is live has been interrupted: look at every log within the next second."""
        self._due.clear()
        for stream in self._streams.values():
            stream.interrupted()
            self._plan(stream, self.jitter(0.0, SPREAD))

    def close(self) -> None:
        """Follow nothing any more; who waits for a stream gets `Unavailable`."""
        self._closed = True
        for scope in tuple(self._farewells):
            scope.cancel()
        for stream in self._streams.values():
            self.broker.unsubscribe(stream.group)
            stream.close()
        self._streams.clear()
        self._due.clear()


def key_of(publication: Publication) -> tuple[int | None, str]:
    """Return what tells a place in the chain from the same place in another."""
    return publication.offset, publication.tag
