"""Recovery under everything that can go wrong: `python -m tests.chaos.recovery --steps 100000 [--write FILE]`.

Two nodes run the real `Streams` over the real `Log`. Between them stands a broker that drops, doubles, delays and
reorders what it brings, answers late or not at all, accepts and says it did not, sets the log back (a failover
that lost the tail) and forgets everything. Clients do what docs/protocol.md tells them: they keep positions, lose
their connection, come back here or there with their position, with ``last`` or with nothing.

The truth is what the log accepted, a tree: each publication knows the one before it. A client that is told of a
publication must have been at exactly the one before, so nothing is skipped, repeated or out of order; what it has
not got it must have been told of, by `reset` or by ``recovered: false``. Every few hundred steps the network heals,
everybody comes back and all must be where the log ends. Time is simulated and everything random comes from one
seed: a failure prints the steps that led to it, and the same seed leads there again.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import selectors
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

from starlette_rt.backends.base import Published
from starlette_rt.exceptions import Unavailable
from starlette_rt.history import History, Link, Log, Position, Publication, Reading, Window, link
from starlette_rt.loop import tasks
from starlette_rt.streams import Stream, Streams

GROUPS = {"a": 8.0, "b": 8.0, "c": 1.0}  # and how much is said in each
NAMES = tuple(GROUPS)
HISTORY = History(size=12, ttl=120)
CLIENTS = 7
ROUND = 400  # steps between two audits
HEALING = 70.0  # seconds in a healthy network after which everything must be known
PROMPT = 2.0  # seconds in which a publication arrives where nothing has gone wrong lately
EXCUSED = 45.0  # seconds for which what has gone wrong excuses a delay
TRACE = 60  # steps that a failure prints
CLONES = 6  # states of each log that a failover may go back to

Kind = Literal["event", "skip"]
Spelled = tuple[Kind, Publication]


class Violation(AssertionError):
    """A promise was broken."""


# Time.


class Instant(selectors.SelectSelector):
    """A selector that does not wait: it lets the time pass instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Violation("everybody waits, and nothing will ever happen")
        self.now += max(timeout, 0.0)
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when there is nothing to do."""

    def __init__(self) -> None:
        self._instant = Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now


# The truth.


@dataclass(eq=False)
class Fact:
    """A publication that the log accepted."""

    publication: Publication
    log: int
    before: Fact | None
    accepted: int
    lost: int = 0  # when it went with the log's tail, or with the log

    @property
    def id(self) -> str:
        return self.publication.id

    def comes_after(self, offset: int, tag: str, log: int) -> bool:
        """Whether the place is one that the chain of this fact goes through, before it."""
        fact: Fact | None = self
        while fact is not None and offset_of(fact) > offset:
            fact = fact.before
        place = (0, "") if fact is None else (offset_of(fact), fact.publication.tag)
        return self.log == log and offset_of(self) > offset and place == (offset, tag)

    def repeats(self) -> bool:
        """Whether its id stands earlier in its chain."""
        fact = self.before
        while fact is not None and fact.id != self.id:
            fact = fact.before
        return fact is not None


def offset_of(fact: Fact) -> int:
    return fact.publication.offset or 0


@dataclass
class Stretch:
    """What a client has of a group without a break: from its anchor to its position."""

    anchor: Position
    began: int
    position: Position
    had: set[str] = field(default_factory=set)  # ids


# The network.


class Network:
    """The log of each group, and the ways to the nodes and back."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        self.logs: dict[str, Log] = {}
        self.numbers: dict[str, int] = {}  # group -> the number of its log
        self.epochs: dict[str, int] = {}  # epoch -> the number of the log that has it
        self.clones: dict[str, deque[Log]] = {group: deque(maxlen=CLONES) for group in GROUPS}
        self.facts: dict[tuple[str, int, str], Fact] = {}
        self.lost: list[Fact] = []
        self.at: dict[str, float] = dict.fromkeys(GROUPS, 0.0)  # when each group was last published to
        self.hostile = True
        self.excuse: dict[tuple[str, str], float] = {}

    # Misfortune.

    def happens(self, share: float) -> bool:
        return self.hostile and self.rng.random() < share

    def excuses(self, group: str, node: str | None = None) -> None:
        for name in ("left", "right"):
            if node in (name, None):
                self.excuse[name, group] = self.world.loop.time() + EXCUSED

    async def way(self, node: str, group: str) -> None:
        """One half of a question, mostly short."""
        if self.happens(0.06):
            self.excuses(group, node)
            await asyncio.sleep(self.rng.uniform(0.5, 4.0))
        elif self.happens(0.06):
            self.excuses(group, node)
            raise Unavailable("the line is down")
        else:
            await asyncio.sleep(self.rng.uniform(0.001, 0.3))

    # The log.

    def log(self, group: str) -> Log:
        log = self.logs.get(group)
        if log is None or log.outlived(self.now):
            log = self.logs[group] = Log(HISTORY, self.now, self.epoch)
            self.numbers[group] = next(self.world.counter)
            self.clones[group].clear()
            self.epochs[log.position.epoch] = self.numbers[group]
            self.excuses(group)
        return log

    @property
    def now(self) -> float:
        return self.world.loop.time()

    def epoch(self) -> str:
        return f"e{self.rng.getrandbits(40):x}"

    def tag(self) -> str:
        return f"{self.rng.getrandbits(32):08x}"

    def append(self, publication: Publication) -> tuple[Position, Publication | None]:
        group = publication.group
        log = self.log(group)
        before = self.facts.get((group, log.position.offset, log.position.tag))
        self.clones[group].append(clone(log))
        position, placed = log.append(publication, self.now, self.tag)
        if placed is not None:
            self.facts[group, position.offset, position.tag] = Fact(
                placed, self.numbers[group], before, next(self.world.counter)
            )
            self.at[group] = self.now
        return position, placed

    def renew(self, group: str, seen: Position) -> Position:
        position = self.log(group).renew(seen, self.now, self.epoch)
        if position.epoch not in self.epochs:
            self.epochs[position.epoch] = self.numbers[group]
            self.excuses(group)  # the others hear of it when they look
        return position

    def fail_over(self, group: str) -> bool:
        """Go on from an older state of the log. If nobody at all has seen where it ended, the broker must say so."""
        if not self.clones[group]:
            return False
        log, back = self.logs[group], self.rng.randrange(len(self.clones[group]))
        older = self.clones[group][back]
        while len(self.clones[group]) > back:
            self.clones[group].pop()
        witnessed = any(
            stream is not None and stream.ready and stream.position == log.position
            for node in self.world.nodes
            for stream in [node.streams.get(group)]
        )
        self.forget_after(group, log, older.position)
        self.logs[group] = older
        if not witnessed or older.position.epoch != log.position.epoch:
            self.renew(group, older.position)
            self.world.stats["failovers that nobody could have seen"] += 1
        self.excuses(group)
        return True

    def forget_after(self, group: str, log: Log, end: Position | None) -> None:
        """What of ``log`` comes after ``end`` is lost."""
        fact = self.facts.get((group, log.position.offset, log.position.tag))
        while fact is not None and (end is None or (offset_of(fact), fact.publication.tag) != (end.offset, end.tag)):
            if not fact.lost:
                fact.lost = next(self.world.counter)
                self.lost.append(fact)
            fact = fact.before

    def forget(self, *groups: str) -> None:
        """FLUSHALL, or the logs of some groups that were too many."""
        for group in groups:
            if (log := self.logs.pop(group, None)) is not None:
                self.forget_after(group, log, None)
                self.clones[group].clear()
                self.excuses(group)

    # To the nodes.

    def send(self, publication: Publication) -> None:
        for node in self.world.nodes:
            copies = 0 if self.happens(0.07) else 2 if self.happens(0.07) else 1
            if copies != 1:
                self.excuses(publication.group, node.name)
            for _ in range(copies):
                delay = self.rng.uniform(0.001, 0.02)
                if self.happens(0.08):
                    self.excuses(publication.group, node.name)
                    delay = self.rng.uniform(0.02, 6.0)
                self.world.loop.call_later(delay, node.streams.receive, publication)


def clone(log: Log) -> Log:
    """A replica of ``log``, as of now."""
    copy = Log(HISTORY, log._published)
    copy.position, copy._used = log.position, log._used
    copy._entries.extend(log._entries)
    copy._ids._seen.update(log._ids._seen)
    return copy


class Line:
    """The broker as one node sees it."""

    def __init__(self, network: Network, node: str) -> None:
        self.network, self.node = network, node

    async def publish(self, publication: Publication, history: History | None) -> Published:
        await self.network.way(self.node, publication.group)
        position, placed = self.network.append(publication)
        if placed is not None:
            self.network.send(placed)
        await self.network.way(self.node, publication.group)
        return Published(position, "yes")

    async def read(self, group: str, history: History) -> Reading:
        await self.network.way(self.node, group)
        reading = self.network.log(group).read(self.network.now)
        await self.network.way(self.node, group)
        return reading

    async def position(self, group: str, history: History) -> Position:
        return (await self.read(group, history)).position

    async def renew(self, group: str, history: History, seen: Position) -> Position:
        await self.network.way(self.node, group)
        position = self.network.renew(group, seen)
        await self.network.way(self.node, group)
        return position

    async def start(self, deliver: Callable[[Publication], None], resumed: Callable[[], None]) -> None: ...
    def subscribe(self, group: str) -> None: ...
    def unsubscribe(self, group: str) -> None: ...
    async def subscribed(self, group: str) -> None: ...
    async def stop(self) -> None: ...
    def sweep(self) -> None: ...
    def troubles(self) -> list[str]:
        return []


# The nodes and their clients.


class Reply(NamedTuple):
    group: str
    asked: Position | None
    recovered: bool
    position: Position
    events: list[Spelled]


class Joined(NamedTuple):
    group: str
    position: Position


class Reset(NamedTuple):
    group: str
    position: Position


class Refused(NamedTuple):
    group: str
    asked: Position | None
    last: int


Frame = Spelled | Reply | Joined | Reset | Refused


class Connection:
    """A line from one node to one client: nothing overtakes on it, and what is on it when it breaks is lost."""

    def __init__(self, client: Client, node: Node) -> None:
        self.client, self.node = client, node
        self.alive = True
        self._last = 0.0
        self.had: dict[
            tuple[str, str], int
        ] = {}  # (group, id) -> when it was said in full and live, in this membership
        self.left: Counter[str] = Counter()
        self.said = 0  # when the node said what is being heard
        self._line: deque[tuple[str, int, int, Frame]] = deque()

    def say(self, group: str, frame: Frame) -> None:
        loop = self.node.world.loop
        self._last = max(self._last, loop.time() + self.client.world.rng.uniform(0.0, 0.03))
        self._line.append((group, self.left[group], next(self.client.world.counter), frame))
        loop.call_at(self._last, self._arrive)

    def _arrive(self) -> None:
        """Hear the next one, unless the client has left since: it ignores the group until the leave is answered."""
        group, left, self.said, frame = self._line.popleft()
        if self.alive and left == self.left[group]:
            self.client.hear(frame)

    def leave(self, group: str) -> None:
        self.left[group] += 1
        self.had = {key: when for key, when in self.had.items() if key[0] != group}


class Node:
    """What hub and dialogue do with streams, in short."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.members: dict[str, dict[Connection, None]] = {group: {} for group in GROUPS}
        self.newcomer: dict[str, int] = dict.fromkeys(GROUPS, 0)
        self._ready: dict[str, tuple[object, float]] = {}
        self.streams: Streams[Spelled] = Streams(
            Line(world.network, name), tasks(), spell, self._deliver, self._reset, jitter=world.rng.uniform
        )

    def ready_since(self, group: str, stream: Stream[Spelled] | None) -> float:
        """When this stream was found to be ready; now, if it was not before."""
        now = self.world.loop.time()
        if stream is None or not stream.ready or self._ready.get(group, (None, 0.0))[0] is not stream:
            self._ready[group] = (stream if stream is not None and stream.ready else None), now
        return self._ready[group][1]

    def _deliver(self, publication: Publication, message: Spelled) -> None:
        for connection in self.members[publication.group]:
            connection.say(publication.group, self.own(connection, message))

    def own(self, connection: Connection, message: Spelled) -> Spelled:
        kind, publication = message
        return ("skip" if publication.exclude == connection.client.name else kind), publication

    def _reset(self, group: str, position: Position) -> None:
        self.world.stats["resets"] += 1
        for connection in self.members[group]:
            connection.say(group, Reset(group, position))

    async def join(self, connection: Connection, group: str, asked: Position | None, last: int) -> None:
        try:
            stream = await self.streams.follow(group, HISTORY)
            if asked and asked.epoch == stream.position.epoch and asked.offset > stream.position.offset:
                await stream.passed(asked.offset, 1.0)
                stream = await self.streams.follow(group, HISTORY)
        except Unavailable:
            self.unfollow(group)
            connection.say(group, Refused(group, asked, last))
            return
        self.newcomer[group] = next(self.world.counter)
        if not connection.alive:
            self.unfollow(group)
            return
        self.members[group][connection] = None
        connection.say(group, self._found(connection, stream, asked, last))

    def _found(self, connection: Connection, stream: Stream[Spelled], asked: Position | None, last: int) -> Reply:
        missed = stream.last(last) if asked is None else stream.since(asked)
        events = [self.own(connection, message) for _, message in missed or ()]
        return Reply(stream.group, asked, missed is not None, stream.position, events)

    async def server_join(self, connection: Connection, group: str) -> None:
        try:
            stream = await self.streams.follow(group, HISTORY)
        except Unavailable:
            return
        self.newcomer[group] = next(self.world.counter)
        if not connection.alive or connection in self.members[group]:
            self.unfollow(group)
            return
        self.members[group][connection] = None
        connection.say(group, Joined(group, stream.position))

    def leave(self, connection: Connection, group: str) -> None:
        self.members[group].pop(connection, None)
        self.unfollow(group)

    def unfollow(self, group: str) -> None:
        if not self.members[group]:
            self.streams.vacated(group)


def spell(publication: Publication, seen: bool) -> Spelled:
    return ("skip" if seen else "event"), publication


class Client:
    """A client as docs/protocol.md wants it, and the judge of what it is told."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.connection: Connection | None = None
        self.stretches: dict[str, Stretch] = {}
        self.ever: set[str] = set()
        self.joined: set[str] = set()
        self.holding: dict[str, list[Spelled]] = {}

    # Doing.

    def connect(self, node: Node) -> None:
        self.connection = Connection(self, node)

    def disconnect(self) -> None:
        assert self.connection is not None
        self.connection.alive = False
        for group in GROUPS:
            if self.connection in self.connection.node.members[group]:
                self.connection.node.leave(self.connection, group)
        self.connection = None
        self.joined.clear()
        self.holding.clear()

    def join(self, group: str, position: Position | None, last: int = 0) -> None:
        assert self.connection is not None
        self.holding.setdefault(group, [])
        self.world.spawn(self.connection.node.join(self.connection, group, position, last))

    def leave(self, group: str) -> None:
        assert self.connection is not None
        self.connection.node.leave(self.connection, group)
        self.joined.discard(group)
        self.connection.leave(group)

    # Hearing.

    def hear(self, frame: Frame) -> None:
        if isinstance(frame, Reply):
            self._replied(frame)
        elif isinstance(frame, Refused):
            self.world.loop.call_later(1.0, self._again, self.connection, frame)
        elif isinstance(frame, Joined):
            self._was_joined(frame)
        elif isinstance(frame, Reset):
            if frame.group in self.holding:
                self.holding[frame.group].clear()
            if frame.group in self.joined:
                self._anchor(frame.group, frame.position)
        elif frame[1].group in self.holding:
            self.holding[frame[1].group].append(frame)
        elif frame[1].group in self.joined:
            self._take(*frame)

    def _again(self, connection: Connection | None, frame: Refused) -> None:
        if connection is not None and connection is self.connection:
            stretch = self.stretches.get(frame.group)
            self.join(frame.group, stretch.position if frame.asked and stretch else None, frame.last)

    def _was_joined(self, frame: Joined) -> None:
        self.joined.add(frame.group)
        if frame.group in self.holding:
            return  # it has asked already
        stretch = self.stretches.get(frame.group)
        if stretch is None:
            self._anchor(frame.group, frame.position)
        else:
            self.join(frame.group, stretch.position)

    def _replied(self, reply: Reply) -> None:
        group, held = reply.group, self.holding.pop(reply.group)
        self.joined.add(group)
        if reply.asked is None:
            first = reply.events[0][1] if reply.events else None
            place = reply.position
            if first is not None:
                place = Position(place.epoch, (first.offset or 0) - 1, first.prev)
            self._anchor(group, place)
            self.world.stats["joins anew"] += 1
        elif not reply.recovered:
            self._anchor(group, reply.position)
            self.world.stats["recovered: false"] += 1
        else:
            self.world.stats["recovered: true"] += 1
            self._require(reply.asked.epoch == reply.position.epoch, f"recovered across epochs: {reply}")
            self._require(self.stretches[group].position == reply.asked, f"was reset, and recovered: {reply}")
        for kind, publication in reply.events:
            self._take(kind, publication, live=False)
        self._require(self.stretches[group].position == reply.position, f"not all was told: {reply}")
        for kind, publication in sorted(held, key=lambda each: each[1].offset or 0):
            if (publication.offset or 0) > self.stretches[group].position.offset:
                self._take(kind, publication)

    # Judging.

    def _anchor(self, group: str, position: Position) -> None:
        self.stretches[group] = Stretch(position, next(self.world.counter), position)

    def _take(self, kind: Kind, publication: Publication, live: bool = True) -> None:
        stretch, group = self.stretches[publication.group], publication.group
        fact = self.world.network.facts.get((group, publication.offset or 0, publication.tag))
        self._require(fact is not None and fact.publication == publication, f"nobody published {publication}")
        assert fact is not None
        place = Position(stretch.position.epoch, offset_of(fact) - 1, publication.prev)
        self._require(place == stretch.position, f"at {stretch.position} was told {brief(publication)}")
        stretch.position = Position(place.epoch, offset_of(fact), publication.tag)
        self.world.stats["deliveries"] += 1
        if kind == "skip":
            known = publication.exclude == self.name or publication.id in self.ever or fact.repeats()
            self._require(known, f"was spared {brief(publication)}, which it has not got")
        else:
            self._not_twice(publication, stretch, live)

    def _not_twice(self, publication: Publication, stretch: Stretch, live: bool) -> None:
        connection, name = self.connection, (publication.group, publication.id)
        assert connection is not None
        before = connection.had.get(name)
        # Those who have come since a break may lack it: then it is said to all.
        fair = before is None or before < connection.node.newcomer[publication.group]
        self._require(fair, f"was told {brief(publication)} twice by the same node")
        if live:
            connection.had[name] = connection.said
        if not publication.once:  # of those with an id of a client's event it drops a repetition by itself
            self._require(publication.id not in stretch.had, f"was told {brief(publication)} twice")
        stretch.had.add(publication.id)
        self.ever.add(publication.id)

    def audit(self, group: str) -> None:
        """The network has healed: is everything known?"""
        stretch, network = self.stretches[group], self.world.network
        if group in network.logs:
            end = network.logs[group].position
            self._require(stretch.position == end, f"is at {stretch.position}, and {group} ends at {end}")
        for fact in network.lost:
            missing = fact.id not in self.ever and fact.publication.exclude != self.name
            if missing and fact.publication.group == group and self._was_owed(fact, stretch):
                self._require(False, f"lost {brief(fact.publication)} and was not told")

    def _was_owed(self, fact: Fact, stretch: Stretch) -> bool:
        """Whether the client had begun at a place before ``fact`` when that was lost."""
        anchor = stretch.anchor
        if not anchor.epoch:  # which no log has, unless a twin is at work
            return stretch.began < fact.accepted
        log = self.world.network.epochs[anchor.epoch]
        return stretch.began < fact.lost and fact.comes_after(anchor.offset, anchor.tag, log)

    def _require(self, held: bool, otherwise: str) -> None:
        if not held:
            self.world.violated(f"{self.name} {otherwise}")


def brief(publication: Publication) -> str:
    return f"{publication.group}/{publication.offset} {publication.id} ({publication.prev}→{publication.tag})"


# The programme.


class World:
    """Everything of one run."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed, self.steps = seed, steps
        self.rng = random.Random(seed)
        self.loop = asyncio.get_running_loop()
        self.counter = count(1)
        self.stats: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.trace: deque[str] = deque(maxlen=TRACE)
        self.found: str | None = None
        self.network = Network(self)
        self.nodes = [Node(self, "left"), Node(self, "right")]
        self.clients = [Client(self, f"client {number}") for number in range(CLIENTS)]
        self.said: deque[Publication] = deque(maxlen=8)
        self.running: dict[asyncio.Task[None], None] = {}
        self.pause = 0.0

    def violated(self, what: str) -> None:
        self.found = self.found or f"after {self.loop.time():.3f} s: {what}"

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self.running[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self.running[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self.violated(f"{error!r}")

    async def run(self) -> None:
        ticking = self.loop.create_task(self._tick())
        try:
            for number in range(1, self.steps + 1):
                await self._step(number)
                if number % ROUND == 0 or number == self.steps:
                    await self._audit()
        finally:
            ticking.cancel()
            for node in self.nodes:
                node.streams.close()
                await node.streams.tasks.close(0.0)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            for node in self.nodes:
                node.streams.tick(self.loop.time())

    async def _step(self, number: int) -> None:
        kind = self.rng.choices(list(STEPS), list(STEPS.values()))[0]
        self.kinds[kind] += 1
        told = getattr(self, f"_{kind.replace(' ', '_')}")()
        self.trace.append(f"{number:6} {self.loop.time():11.3f}  {kind:13} {told}")
        await asyncio.sleep(self.rng.expovariate(8.0) + self.pause)
        self.pause = 0.0
        self._prompt()
        self._judge()

    def _judge(self) -> None:
        if self.found:
            steps = "\n".join(self.trace)
            raise Violation(f"seed {self.seed}: {self.found}\nThe last steps:\n{steps}")

    def _prompt(self) -> None:
        """Where nothing has gone wrong lately, nothing is late."""
        now, network = self.loop.time(), self.network
        for node in self.nodes:
            for group, log in network.logs.items():
                stream = node.streams.get(group)
                since = max(network.at[group], node.ready_since(group, stream)) + PROMPT
                excused = now <= max(since, network.excuse.get((node.name, group), 0.0))
                if stream is not None and not excused and stream.position != log.position:
                    self.violated(f"{node.name} is late: {stream.position}, and {group} ends at {log.position}")

    async def _audit(self) -> None:
        """Heal, let everybody come back, and look."""
        hostile, self.network.hostile = self.network.hostile, False
        for client in self.clients:
            if client.connection is None:
                client.connect(self.rng.choice(self.nodes))
            for group, stretch in client.stretches.items():
                if group not in client.joined and group not in client.holding:
                    client.join(group, stretch.position)
        await asyncio.sleep(HEALING)
        for client in self.clients:
            for group in client.stretches:
                if group in client.holding or group not in client.joined:
                    self.violated(f"{client.name} could not come back to {group}")
                else:
                    client.audit(group)
        self._tidy()
        self.network.lost.clear()
        self.stats["audits"] += 1
        self.trace.append("       all has healed")
        self._judge()
        self.network.hostile = hostile

    def _tidy(self) -> None:
        """Nothing is followed without members, nothing is still being read, and nothing has piled up."""
        for node in self.nodes:
            followed = {group: node.streams.get(group) for group in GROUPS}
            for group, stream in followed.items():
                if (stream is not None) != bool(node.members[group]):
                    self.violated(f"{node.name} has {len(node.members[group])} members in {group}, and {stream}")
                if stream is not None and stream._held is not None:
                    self.violated(f"{node.name} still reads {group}")
            if len(node.streams._due) > 100 or node.streams._farewells:
                self.violated(
                    f"{node.name} has {len(node.streams._due)} looks due, {len(node.streams._farewells)} leaving"
                )

    # The steps. Each returns what the trace says of it.

    def _publish(self) -> str:
        group, number = self.rng.choices(list(GROUPS), list(GROUPS.values()))[0], next(self.counter)
        exclude = self.rng.choice(self.clients).name if self.rng.random() < 0.1 else None
        once = self.rng.random() < 0.5
        publication = Publication(group, "said", number, b"%d" % number, exclude, id=f"p{number}", once=once)
        self.said.append(publication)
        return self._say(publication)

    def _publish_again(self) -> str:
        """Somebody does not know whether it was accepted, perhaps in another process."""
        return self._say(self.rng.choice(self.said)) if self.said else "nothing"

    def _say(self, publication: Publication) -> str:
        node = self.rng.choice(self.nodes)
        self.spawn(self._published(node, publication))
        return f"{publication.id} to {publication.group} by {node.name}"

    async def _published(self, node: Node, publication: Publication) -> None:
        try:
            published = await node.streams.broker.publish(publication, HISTORY)
        except Unavailable:
            self.stats["publishes without an answer"] += 1
            return
        stream = node.streams.get(publication.group)
        if published.position is not None and stream is not None:
            abreast = await stream.passed(published.position.offset, 5.0)
            self.stats["publishes answered in order" if abreast else "publishes answered before their turn"] += 1

    def _come_back(self) -> str:
        client = self.rng.choice(self.clients)
        if client.connection is not None:
            return "nobody"
        node = self.rng.choice(self.nodes)
        client.connect(node)
        for group, stretch in client.stretches.items():
            if self.rng.random() < 0.75:
                client.join(group, stretch.position)
        return f"{client.name} to {node.name}"

    def _join_anew(self) -> str:
        client, group, last = self.rng.choice(self.clients), self.rng.choice(NAMES), self.rng.choice((0, 0, 3, 50))
        if client.connection is None or group in client.joined or group in client.holding:
            return "nobody"
        client.stretches.pop(group, None)
        client.join(group, None, last)
        return f"{client.name} in {group}, last {last}"

    def _ask_again(self) -> str:
        client, group = self.rng.choice(self.clients), self.rng.choice(NAMES)
        if client.connection is None or group not in client.joined or group in client.holding:
            return "nobody"
        client.join(group, client.stretches[group].position)
        return f"{client.name} in {group}"

    def _server_join(self) -> str:
        client, group = self.rng.choice(self.clients), self.rng.choice(NAMES)
        if client.connection is None or group in client.joined or group in client.holding:
            return "nobody"
        self.spawn(client.connection.node.server_join(client.connection, group))
        return f"{client.name} in {group}"

    def _leave(self) -> str:
        client, group = self.rng.choice(self.clients), self.rng.choice(NAMES)
        if client.connection is None or group not in client.joined or group in client.holding:
            return "nobody"
        client.leave(group)
        return f"{client.name} from {group}"

    def _disconnect(self) -> str:
        client = self.rng.choice(self.clients)
        if client.connection is None:
            return "nobody"
        client.disconnect()
        return client.name

    def _empty(self) -> str:
        """All members of a node lose their connection at once."""
        node = self.rng.choice(self.nodes)
        for client in self.clients:
            if client.connection is not None and client.connection.node is node:
                client.disconnect()
        return node.name

    def _pass_time(self) -> str:
        seconds = self.rng.choice((1.0, 5.0, 25.0))
        self.pause = seconds
        return f"{seconds:g} s"

    def _fail_over(self) -> str:
        group = self.rng.choice(NAMES)
        return group if self.network.hostile and self.network.fail_over(group) else "nothing"

    def _forget(self) -> str:
        groups = self.rng.choice((NAMES, NAMES[-1:], NAMES[-1:])) if self.network.hostile else ()
        self.network.forget(*groups)
        return ", ".join(groups)

    def _weather(self) -> str:
        """The network is fine for a while, or no longer."""
        self.network.hostile = not self.network.hostile
        return "hostile" if self.network.hostile else "calm"


STEPS = {
    "publish": 40.0,
    "publish again": 5.0,
    "come back": 14.0,
    "join anew": 10.0,
    "ask again": 3.0,
    "server join": 6.0,
    "leave": 9.0,
    "disconnect": 9.0,
    "empty": 1.0,
    "pass time": 1.5,
    "fail over": 2.5,
    "forget": 1.0,
    "weather": 0.5,
}


# The twins: without one of its guards the programme must find that a promise is broken.


def link_by_number(position: Position, publication: Publication, tag_at: Callable[[int], str | None]) -> Link:
    return "next" if publication.offset == position.offset + 1 else link(position, publication, tag_at)


def since_by_number(stream: Stream[Spelled], position: Position) -> list[tuple[Publication, Spelled]] | None:
    start = len(stream._ring) - (stream.position.offset - position.offset)
    same = position.epoch == stream.position.epoch and 0 <= start <= len(stream._ring)
    return stream._from(start) if same else None


async def read_without_epoch(line: Line, group: str, history: History) -> Reading:
    await line.network.way(line.node, group)
    log = line.network.logs.get(group)
    return Reading(Position("", 0, ""), ()) if log is None else log.read(line.network.now)


TWINS: dict[str, Callable[[], list[Any]]] = {
    "prev is not compared live": lambda: [patch("starlette_rt.streams.link", link_by_number)],
    "tags are not compared in recovery": lambda: [patch.object(Stream, "since", since_by_number)],
    "nothing is held back during a read": lambda: [patch.object(Stream, "_hold", lambda *_: None)],
    "the epoch is made by the first publication": lambda: [patch.object(Line, "read", read_without_epoch)],
    "ids are not remembered": lambda: [patch.object(Window, "get", lambda *_: None)],
    "a lost tail is not looked for": lambda: [patch.object(Streams, "tick", lambda *_: None)],
}


# Running.


class Alarm(logging.Handler):
    """What the package logs as an error is one."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.violated(self.format(record))


async def _run(seed: int, steps: int) -> World:
    world = World(seed, steps)
    alarm = Alarm(world)
    logging.getLogger("starlette_rt").addHandler(alarm)
    try:
        await world.run()
    finally:
        logging.getLogger("starlette_rt").removeHandler(alarm)
    return world


def run(seed: int, steps: int, twin: str | None = None) -> World:
    """Run the programme; raises `Violation` with the steps that led to it."""
    with ExitStack() as patches, asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        for patched in TWINS[twin]() if twin else ():
            patches.enter_context(patched)
        return runner.run(_run(seed, steps))


def table(worlds: list[World]) -> str:
    """What happened in these runs, as Markdown."""
    kinds, stats = sum((world.kinds for world in worlds), Counter()), sum((world.stats for world in worlds), Counter())
    rows = [("steps", sum(kinds.values())), *((f"– {kind}", kinds[kind]) for kind in STEPS), *sorted(stats.items())]
    lines = ["| what | how often |", "|---|---:|", *(f"| {what} | {number:,} |" for what, number in rows)]
    return "\n".join([*lines, "| **violations** | **0** |", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--twin", choices=TWINS)
    parser.add_argument("--write", type=Path, help="write the table to this file")
    options = parser.parse_args()
    text = table([run(options.seed, options.steps, options.twin)])
    print(text)
    if options.write:
        options.write.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
