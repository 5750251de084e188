"""Who is alive: this process's generation, the leases of all, and whose duty it is when one ends.

The law of this file: a generation lives as long as its lease in Redis, by the clock of Redis, and one that has been
condemned never lives again. Whoever finds that it has lost its own takes a new one. Nobody is condemned by a node
that has not itself held an unbroken lease for as long as a lease lives: after an outage all have run out together. It
knows no group: what a generation held is registered and buried by those who asked to be told.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import anyio

from ...exceptions import Unavailable
from ...loop import Handle, within
from .connection import Link, Script

logger: logging.Logger = logging.getLogger("starlette_rt")

LEASE = 6.0  # seconds that a lease lives
LOOK = 1.0  # seconds between two looks, more or less: each renews the lease and finds those that are over
JITTER = 0.2  # of that time, and of the quarantine
QUARANTINE = LEASE  # seconds of an unbroken lease before a node condemns others
BURIAL = 5.0  # seconds that the reaper of a generation has before another may go on
LATE = 2.0  # seconds that a reminder must be late before any node takes it over
STARTING, FAREWELL = 1.0, 1.0  # seconds for the first look, and for giving the lease back
REMINDERS = 100  # that are taken over in one look
REMEMBERED = 10_000  # generations of which is known that they are gone

TAKE_OR_HOLD, CONDEMN, SETTLE = Script("lease"), Script("reap"), Script("presence_due")
SCRIPTS: tuple[Script, ...] = (TAKE_OR_HOLD, CONDEMN, SETTLE)


class Due(NamedTuple):
    """What is to be looked after, from when on, and the time of its reminder; in ms by the clock of Redis."""

    name: str
    at: int
    reminder: int


class Nodes:
    """The generation of this process, and what it knows of the others.

    ``on_held`` is awaited when the lease is held for the first time, again after an outage, by another server or
    under a new generation: Redis may know nothing of this node then. ``on_dead`` is awaited with a generation whose
    things are to be cleared away, and ``on_due`` told the reminders that nobody else has looked after. The first two
    may raise `Unavailable`, and are called again.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self.generation: str = ""
        self.held: bool = False
        self.on_held: list[Callable[[], Awaitable[None]]] = []
        self.on_dead: list[Callable[[str], Awaitable[None]]] = []
        self.on_due: list[Callable[[list[Due]], None]] = []
        self._taken = False
        self._told: tuple[object, ...] = ()  # as what Redis knows all that this node holds
        self._telling = False
        self._since = 0.0  # when the lease began to be held without a break
        self._quarantine = QUARANTINE
        self._ended: dict[str, None] = {}  # generations of this node that are over, and are not yet reported
        self._ends: Mapping[str, int] = {}  # what the last look has found
        self._now_ms = 0
        self._looked = 0.0
        self._asked: dict[str, None] = {}  # generations that were not among them
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._burying: set[str] = set()
        self._running: Handle | None = None

    _wake: anyio.Event

    # Living.

    async def start(self) -> None:
        """Take a new generation and its lease; where Redis is away, as soon as it is there."""
        self.generation = secrets.token_hex(8)
        self._wake = anyio.Event()
        self._link.on_up.append(self._up)
        self._link.on_down.append(self._down)
        await within(STARTING, self._look)
        self._running = self._link.tasks.spawn(self._run)

    async def stop(self) -> None:
        """Give the lease back. What the generation held must have been given back before, else it is buried."""
        if self._running is not None:
            self._running.cancel()
        self._link.on_up.remove(self._up)
        self._link.on_down.remove(self._down)
        self.held = self._taken = False
        await within(FAREWELL, self._give_back)
        self._ended.clear()
        self._asked.clear()
        self._gone.clear()
        self._ends = {}

    async def _give_back(self) -> None:
        with suppress(Unavailable):
            await self._link.command("ZREM", self._leases, self.generation)

    def _up(self) -> None:
        self._wake.set()

    def _down(self) -> None:
        self.held = False

    async def _run(self) -> None:
        while True:
            with anyio.move_on_after(LOOK * random.uniform(1 - JITTER, 1 + JITTER)):
                await self._wake.wait()
            self._wake = anyio.Event()
            await self._look()

    # Holding.

    async def _look(self) -> None:
        if not self._link.up:
            return
        try:
            await self._renew()
        except Unavailable as error:
            logger.debug("the lease of this node waits: %s", error)
            return
        if self.held and not self._telling and self._known_as != self._told:
            self._telling = True
            self._link.tasks.spawn(self._tell)
        for generation in self._dead() if self.held else ():
            self._burying.add(generation)
            self._link.tasks.spawn(self._bury, generation)

    async def _renew(self) -> None:
        """Hold the lease, or take one under a new name if it was taken from us or forgotten."""
        asked, self._asked = self._asked, {}  # who is asked for from here on may have begun after this look
        generation = self.generation
        reply = await self._lease("hold" if self._taken else "take")
        if reply[0] == b"refused":
            self.lose(generation)
        if self.generation != generation:
            return  # whoever has lost it has asked for the next look, which takes another
        _, now, before, ends, due = reply
        if not self.held or before < now:  # we were away, or frozen, or the clock was set: so may all others have been
            self._since = self._link.tasks.time()
            self._quarantine = QUARANTINE * random.uniform(1, 1 + JITTER)
        self._taken = self.held = True
        self._learn(int(now), {name.decode(): int(float(end)) for name, end in pairs(ends)}, asked)
        if due:
            found = [Due(name.decode(), int(now), int(reminder)) for name, reminder in pairs(due)]
            for listener in self.on_due:
                listener(found)

    async def _lease(self, verb: str) -> Any:
        times = [milliseconds(LEASE), milliseconds(LATE), milliseconds(BURIAL)]
        keys = [self._leases, self._reminders]
        return await self._link.call(TAKE_OR_HOLD, keys, [verb, self.generation, *times, REMINDERS])

    def lose(self, generation: str) -> None:
        """Take a new generation, because Redis does not know this one any more or refuses it."""
        if generation != self.generation:
            return
        logger.info("this node was taken for dead; it goes on under a new name")
        self._ended[generation] = None
        self.generation = secrets.token_hex(8)
        self._taken = self.held = False
        self._wake.set()

    @property
    def _known_as(self) -> tuple[object, ...]:
        """What Redis knows this node by; another one means that it may know nothing of what the node holds."""
        return self._link.run_id, self.generation, self._since

    async def _tell(self) -> None:
        """Let everything be registered, while the lease is held on beside."""
        known_as, ended = self._known_as, tuple(self._ended)
        try:
            for listener in self.on_held:
                await listener()
            await self._report(ended)
            self._told = known_as
        except Unavailable as error:
            logger.debug("what this node holds is registered later: %s", error)
        finally:
            self._telling = False

    async def _report(self, ended: Iterable[str]) -> None:
        """Say that former generations of ours are dead, now that everything stands under the new one.

        What was written under an old name after it was reaped is found by that, here or by another node.
        """
        for generation in ended:
            await self._link.command("ZADD", self._leases, 0, generation)
            del self._ended[generation]
            self._ends = {**self._ends, generation: 0}

    def now_ms(self) -> int:
        """Return the time by the clock of Redis, as near as the last look tells."""
        return self._now_ms + milliseconds(self._link.tasks.time() - self._looked)

    # The others.

    @property
    def settled(self) -> bool:
        """Whether this node has held its lease for long enough to judge others."""
        return self.held and self._link.tasks.time() - self._since >= self._quarantine

    @property
    def live(self) -> tuple[str, ...]:
        """The generations that hold a lease, as of the last look."""
        return tuple(name for name, end in self._ends.items() if self._lives(end))

    def alive(self, generation: str) -> bool:
        """Whether ``generation`` may still be alive; false is certain.

        One that was never heard of may have begun a moment ago: the next look will tell.
        """
        if generation == self.generation or not self.held:
            return True
        if generation in self._ends:
            return self._lives(self._ends[generation])
        if generation not in self._gone:
            self._asked[generation] = None
        return generation not in self._gone

    def _lives(self, end: int) -> bool:
        """Whether a lease that ends then is held; where all may have run out together, it is until it is condemned."""
        return end > (self._now_ms if self.settled else 0)

    def _learn(self, now_ms: int, ends: Mapping[str, int], asked: Mapping[str, None]) -> None:
        gone = [name for name in (*self._ends, *asked) if name not in ends]
        self._gone.update(dict.fromkeys(gone))
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        self._ends, self._now_ms, self._looked = ends, now_ms, self._link.tasks.time()

    def _dead(self) -> list[str]:
        """Return the generations that this node should try to condemn now."""
        found = [name for name, end in self._ends.items() if self._over(end) and name not in self._burying]
        return found if self.settled else [name for name in found if self._ends[name] == 0]

    def _over(self, end: int) -> bool:
        """Whether a lease has ended; a condemned one, whether the time of its reaper has."""
        return abs(end) < self._now_ms

    async def _bury(self, generation: str) -> None:
        """Clear away what a dead generation held, unless another node does."""
        try:
            if await self._link.call(CONDEMN, [self._leases], [generation, milliseconds(BURIAL)]):
                for listener in self.on_dead:
                    await listener(generation)
                await self._link.command("ZREM", self._leases, generation)
                logger.info("a node is gone, and what it held was cleared away")
        except Unavailable as error:
            logger.debug("a dead node is not cleared away yet: %s", error)
        finally:
            self._burying.discard(generation)

    # Reminders.

    def remind(self, name: str, at_ms: int) -> None:
        """Have ``name`` looked after by another node, should we not do so by ``at_ms``, by the clock of Redis."""
        self._link.cast("ZADD", self._reminders, at_ms, name)

    def settle(self, name: str, seen_ms: int, next_ms: int) -> None:
        """``name`` was looked after; it must be again at ``next_ms``, 0 for never, unless others say otherwise."""
        self._link.cast_call(SETTLE, [self._reminders], [name, seen_ms, next_ms])

    @property
    def _leases(self) -> bytes:
        return self._link.key("{nodes}", "leases")

    @property
    def _reminders(self) -> bytes:
        return self._link.key("{nodes}", "due")


def pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
    """Return a flat list of names and values in pairs."""
    return list(zip(flat[::2], flat[1::2], strict=True))


def milliseconds(seconds: float) -> int:
    """Return ``seconds`` in milliseconds."""
    return round(seconds * 1000)
