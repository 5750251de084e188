"""Changes of a group's presence in Redis: one script says and tells all of them.

The law of this file: it speaks for a generation and keeps none of what is tracked. What it also looks after is what
nobody tracks any more: those who linger, in any group, and what a dead generation has left behind. Whatever is said
here may be said twice.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import anyio

from ...exceptions import Unavailable
from ...loop import Tasks
from ..base import Watch
from .connection import FORMAT, Link, Script
from .nodes import Due, Nodes, milliseconds

logger: logging.Logger = logging.getLogger("starlette_rt")

CHANGE = Script("presence_change")

ABREAST = 100  # groups that are dealt with at the same time
MOST = 250  # connections that leave in one script, about 20 µs each: so long does nobody else get an answer of Redis
FENCE = 3600.0  # seconds that a group refuses what a dead generation says
KEPT = 3600.0  # seconds that the version of an empty group, and an answer that may be asked for again, are kept
SLACK = 0.01  # seconds that the end of a grace is looked for late, so that it is not early

TRACK, UNTRACK, CLOSE = "t", "x", "c"

Operation = tuple[str, str, str, bytes]  # verb, connection, user, meta

EXPIRE: Operation = ("e", "", "", b"")
REAP: Operation = ("r", "", "", b"")


class Answer(NamedTuple):
    """What became of a change."""

    epoch: str
    version: int
    before: int  # members
    after: int
    wait: int  # ms until the next grace is over; -1: nobody lingers
    held: int  # connections that the generation still has


class Changes:
    """The way from this node to the presence of any group.

    ``counted`` is told the members that a group had and has, when a change of this node's has altered their number.
    """

    def __init__(self, link: Link, nodes: Nodes, grace: float, counted: Callable[[str, int, int], None]) -> None:
        self._link, self._nodes, self._grace, self._counted = link, nodes, grace, counted
        self._requests = (f"{secrets.token_hex(6)}{number:x}" for number in count(1))
        self._lingering: dict[str, Due] = {}  # group -> when to look in ms, and the time of its reminder
        self._suspects: dict[tuple[str, str], None] = {}  # generation, and a group where it holds something

    def start(self) -> None:
        """Look after what is left behind."""
        self._nodes.on_dead.append(self._bury)
        self._nodes.on_due.append(self._due)

    def stop(self) -> None:
        """Look after nothing more."""
        self._nodes.on_dead.remove(self._bury)
        self._nodes.on_due.remove(self._due)
        self._lingering.clear()
        self._suspects.clear()

    async def run(self, group: str, generation: str, operations: Sequence[Operation]) -> Answer:
        """Run ``operations`` in the name of ``generation``. Raises `Unavailable`, also where it is fenced."""
        reminder = 0
        if any(operation[0] == CLOSE for operation in operations):
            reminder = self._nodes.now_ms() + milliseconds(self._grace)
            self._nodes.remind(group, reminder)
        arguments = self._arguments(group, generation, operations)
        reply = await self._link.call(CHANGE, self.keys(group, generation), arguments)
        if reply[0] == b"fenced":
            self._nodes.lose(generation)
            raise Unavailable("this node was taken for dead; it registers again")
        answer = Answer(reply[1].decode(), *reply[2:])
        if reminder and answer.wait >= 0:
            self._lingering[group] = Due(group, self._nodes.now_ms() + answer.wait, reminder)
        if answer.before != answer.after:
            self._counted(group, answer.before, answer.after)
        return answer

    def _arguments(self, group: str, generation: str, operations: Iterable[Operation]) -> list[Any]:
        return [
            FORMAT,
            generation,
            next(self._requests),
            channel(self._link, group, "members"),
            channel(self._link, group, "count"),
            milliseconds(self._grace),
            milliseconds(FENCE),
            milliseconds(KEPT),
            MOST,
            *(part for operation in operations for part in operation),
        ]

    def keys(self, group: str, generation: str) -> list[bytes]:
        """Return the keys of ``group``; the fourth is the set of connections that ``generation`` holds."""
        kinds = ("u", "e", "k", f"m:{generation}", "n", "l", "dead", "v", f"a:{generation}")
        return [self._link.group_key(group, kind) for kind in kinds]

    def index(self, generation: str) -> bytes:
        """Return the key of the groups that ``generation`` holds something of: written before them, removed after."""
        return self._link.key("g", f"{{{generation}}}")

    # Those who linger.

    def _due(self, due: list[Due]) -> None:
        """The grace of somebody is over, and nobody has looked after it."""
        self._link.tasks.spawn(abreast, self._link.tasks, self._expire, due)

    async def _expire(self, due: Due) -> None:
        """Let leave whose grace is over."""
        with suppress(Unavailable):
            answer = await self.run(due.name, self._nodes.generation, [EXPIRE])
            while answer.wait == 0:
                answer = await self.run(due.name, self._nodes.generation, [EXPIRE])
            at = 0 if answer.wait < 0 else self._nodes.now_ms() + answer.wait
            self._nodes.settle(due.name, due.reminder, at)
            if at:
                self._lingering[due.name] = Due(due.name, at, at)

    # What is left behind.

    async def _bury(self, generation: str) -> None:
        """Take out of every group what a dead generation has held there."""
        index = self.index(generation)
        while groups := await self._link.command("SRANDMEMBER", index, ABREAST):
            await abreast(self._link.tasks, partial(self._reap, generation), [group.decode() for group in groups])
            await self._link.command("SREM", index, *groups)

    async def _reap(self, generation: str, group: str) -> None:
        while (await self.run(group, generation, [REAP])).held:
            pass

    def suspect(self, group: str, generations: Iterable[str]) -> None:
        """``generations`` hold something in ``group``: so is found what no index leads to."""
        for generation in generations:
            if generation not in self._nodes.live:
                self._suspects[generation, group] = None

    def _judge(self, generation: str, group: str) -> None:
        alive = self._nodes.alive(generation)
        if not alive or generation in self._nodes.live:
            del self._suspects[generation, group]
        if not alive:
            self._link.tasks.spawn(self._reap_suspect, generation, group)

    async def _reap_suspect(self, generation: str, group: str) -> None:
        with suppress(Unavailable):
            await self._reap(generation, group)

    def sweep(self) -> None:
        """Look after what is due; Redis is there."""
        now = self._nodes.now_ms() - milliseconds(SLACK)
        due = [each for each in self._lingering.values() if each.at <= now]
        for each in due:
            del self._lingering[each.name]
        if due:
            self._due(due)
        if self._nodes.settled:
            for suspect in tuple(self._suspects):
                self._judge(*suspect)


def channel(link: Link, group: str, part: Watch) -> bytes:
    """Return the channel on which those who follow ``part`` of ``group`` are told."""
    return link.group_key(group, "p" if part == "members" else "c")


async def abreast(tasks: Tasks, function: Callable[[Any], Coroutine[Any, Any, None]], items: Sequence[Any]) -> None:
    """Await ``function(item)`` for each, some at the same time. Raises `Unavailable`, after all, if one has."""
    left, failures, ended = deque(items), list[Unavailable](), anyio.Event()
    workers = min(ABREAST, len(items))

    async def work() -> None:
        nonlocal workers
        try:
            while left:
                await attempt(left.popleft())
        finally:
            workers -= 1
            if not workers:
                ended.set()

    async def attempt(item: Any) -> None:
        try:
            await function(item)
        except Unavailable as error:
            failures.append(error)

    for _ in range(workers):
        tasks.spawn(work)
    if items:
        await ended.wait()
    if failures:
        raise failures[0]
