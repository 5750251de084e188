"""An audience that keeps books: clients that come back by themselves, and a speaker who knows what was accepted.

The law of this file: nothing is forgiven silently. What a listener was told stands in its record in the order of
telling, what a speaker has said stands beside it with the verdict of the node, and `account` compares the two: each
number is delivered once, or its absence was announced, or it was refused. It imports nothing of the package but the
tokens.
"""

from __future__ import annotations

import asyncio
import random
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import httpx

from starlette_rt import Identity, TokenSigner
from tests.second_client import Client, Frame, Group
from tests.servers import Server

T = TypeVar("T")

KEY = "a-key-for-the-tests-of-32-bytes!"
EVERY = 0.05  # seconds between two numbers of a speaker
SOON = 10.0  # seconds; a wait that takes so long has failed
AT_ONCE = 25  # listeners that come at the same time


def token(name: str) -> str:
    """A token that every node accepts."""
    return TokenSigner([KEY]).sign(Identity(name))


class Heard(NamedTuple):
    """One line of a record: a number, or ``None`` for an announcement that numbers are missing before the next."""

    at: float
    number: int | None


class Listener(Client):
    """A client that chooses one of ``doors`` each time it connects, and keeps a record of what it is told.

    ``record`` is by group. ``repeated`` counts what came twice on the wire, ``leaves`` are the presence diffs by which
    somebody left, ``recovered`` the answers to joins that came with a position.
    """

    def __init__(self, name: str, doors: Sequence[str], *, chance: random.Random | None = None, **options: Any) -> None:
        super().__init__(doors[0], token=lambda: token(name), base=0.05, cap=0.5, **options)
        self.name, self.doors = name, list(doors)
        self.record: dict[str, list[Heard]] = defaultdict(list)
        self.recovered: dict[str, list[bool]] = defaultdict(list)
        self.leaves: list[tuple[float, Frame]] = []
        self.joins: list[tuple[float, Frame]] = []
        self.repeated = 0
        self.served_by: int | None = None
        self.connections = 0
        self._chance = chance or random.Random(name)
        self._first = True

    async def _connect(self) -> Any:
        if not self._first:
            self.url = self._chance.choice(self.doors)
        self._first = False
        self.connections += 1
        return await super()._connect()

    def _event(self, frame: Frame) -> None:
        group = self.groups.get(frame.get("group", ""))
        if group is not None and repeats(group, frame):
            self.repeated += 1
        super()._event(frame)

    def _merge(self, sent: Frame, data: Frame) -> None:
        if sent.get("position"):
            self.recovered[sent["group"]].append(data["recovered"])
        super()._merge(sent, data)

    def _tell(self, frame: Frame) -> None:
        kind = frame["type"]
        if kind == "event" and frame["event"] == "said":
            self.record[frame["group"]].append(Heard(self.clock(), frame["data"]["n"]))
        elif kind in ("reset", "stale"):
            self.record[frame["group"]].append(Heard(self.clock(), None))
        elif kind == "event" and frame["event"] == "served by":
            self.served_by = frame["data"]
        elif kind == "presence_diff":
            self._changed(frame)
        else:
            super()._tell(frame)

    def _changed(self, frame: Frame) -> None:
        for side, found in (("joins", self.joins), ("leaves", self.leaves)):
            if frame[side]:
                found.append((self.clock(), frame))

    def last(self, group: str) -> int:
        """The number heard last; -1: none yet."""
        return next((line.number for line in reversed(self.record[group]) if line.number is not None), -1)

    def present(self, group: str) -> dict[str, int]:
        """Who is present as this one sees it, and with how many connections."""
        return {key: len(metas) for key, metas in self.groups[group].people.members.items()}


def repeats(group: Group, frame: Frame) -> bool:
    """Whether an event is one that this connection has had."""
    place = group.position
    return not group.holding and "offset" in frame and place is not None and frame["offset"] <= place["offset"]


class Said(NamedTuple):
    """What became of a number: ``accepted``, ``refused`` at once, or ``doubtful``: not accepted, perhaps on its way."""

    number: int
    at: float
    until: float
    verdict: str
    shared: str


class Speaker:
    """Says numbers to one group, ``through`` its nodes in turn, and the next one when the last has its answer."""

    def __init__(self, group: str, *through: Server, every: float = EVERY) -> None:
        self.group, self.through, self.every = group, list(through), every
        self.said: list[Said] = []
        self._over = False

    async def __aenter__(self) -> Speaker:
        self._http = await httpx.AsyncClient(timeout=SOON).__aenter__()
        self._running = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._over = True
        try:
            async with asyncio.timeout(SOON):
                await self._running
        finally:
            await self._http.aclose()

    async def stop(self) -> None:
        """Say no more; returns when the last one has its answer."""
        self._over = True
        await self._running

    async def _run(self) -> None:
        due = time.monotonic()
        while not self._over:
            await self.say()
            due = max(due + self.every, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    async def say(self) -> Said:
        """Say the next number."""
        number, at = len(self.said), time.monotonic()
        node = self.through[number % len(self.through)]
        try:
            answer = await self._http.post(f"{node.http}/say", params={"group": self.group, "n": number})
        except httpx.TransportError:  # the node was killed
            verdict, shared = "doubtful", ""
        else:
            assert answer.status_code in (200, 503), answer.text
            verdict, shared = answer.json()["verdict"], answer.json().get("shared", "")
        self.said.append(Said(number, at, time.monotonic(), verdict, shared))
        return self.said[-1]

    async def accepted(self) -> Said:
        """Say numbers until one is accepted, and return it."""
        async with asyncio.timeout(SOON):
            while True:
                if (said := await self.say()).verdict == "accepted":
                    return said
                await asyncio.sleep(self.every)

    def numbers(self, verdict: str) -> set[int]:
        """The numbers that met this verdict."""
        return {said.number for said in self.said if said.verdict == verdict}


class Sums(NamedTuple):
    """The books of one listener of one group. ``sent = accepted + refused + doubtful`` and
    ``accepted + doubtful_delivered = delivered + announced + silent``."""

    sent: int
    accepted: int
    refused: int
    doubtful: int
    delivered: int
    doubtful_delivered: int
    announced: int
    silent: tuple[int, ...]  # missing, and nobody has said so
    again: int  # told once more after an announcement: only who comes to a node that is behind may be


def account(record: Iterable[Heard], speaker: Speaker) -> Sums:
    """Close the books of one listener. Raises `AssertionError` for what came twice, out of order or though refused."""
    verdicts = {verdict: speaker.numbers(verdict) for verdict in ("accepted", "refused", "doubtful")}
    accepted = sorted(verdicts["accepted"])
    heard, announced, silent = set[int](), set[int](), set[int]()
    before, told, again = -1, False, 0
    for line in record:
        if line.number is None:
            told = True
            continue
        assert line.number > before or told, f"{line.number} came after {before}"
        missing = accepted[bisect_left(accepted, before + 1) : bisect_left(accepted, line.number)]
        (announced if told else silent).update(missing)
        again += line.number in heard
        heard.add(line.number)
        before, told = line.number, False
    silent.update(accepted[bisect_left(accepted, before + 1) :])
    assert not heard & verdicts["refused"], f"delivered though refused: {sorted(heard & verdicts['refused'])}"
    return Sums(
        len(speaker.said),
        *(len(verdicts[verdict]) for verdict in ("accepted", "refused", "doubtful")),
        len(heard),
        len(heard & verdicts["doubtful"]),
        len(announced - heard - silent),
        tuple(sorted(silent)),
        again,
    )


def longest_gap(record: Sequence[Heard]) -> float:
    """The longest time between two things that a listener was told, in seconds."""
    return max((b.at - a.at for a, b in pairwise(record)), default=0.0)


def latencies(record: Iterable[Heard], speaker: Speaker) -> list[float]:
    """Seconds from the saying of each number to its hearing."""
    return [line.at - speaker.said[line.number].at for line in record if line.number is not None]


def tally(sums: Iterable[Sums]) -> str:
    """All different books, with how many have them."""
    return "; ".join(f"{count} × {each}" for each, count in Counter(sums).most_common())


async def gather(
    stack: AsyncExitStack, names: Sequence[str], doors: Callable[[int], Sequence[str]], groups: Sequence[str]
) -> list[Listener]:
    """Let listeners come in and join; ``doors`` of each by its place in ``names``."""
    listeners = [Listener(name, doors(place)) for place, name in enumerate(names)]
    for start in range(0, len(listeners), AT_ONCE):
        part = listeners[start : start + AT_ONCE]
        for listener in part:
            await stack.enter_async_context(listener)
        await asyncio.gather(*(enter(listener, groups) for listener in part))
    return listeners


async def enter(listener: Listener, groups: Sequence[str]) -> None:
    """Join ``groups``, one after the other."""
    for group in groups:
        await listener.join(group)


async def until(look: Callable[[], T], what: str, within: float = SOON) -> T:
    """Return the first true thing that ``look()`` returns; fail when the time is over."""
    deadline = time.monotonic() + within
    while not (seen := look()):
        assert time.monotonic() < deadline, f"after {within} s there was still not {what}"
        await asyncio.sleep(0.01)
    return seen


async def eventually(look: Callable[[], Awaitable[T]], wanted: Callable[[T], bool], within: float = SOON) -> T:
    """Return the first thing that ``look()`` returns and is wanted; fail with the last one when the time is over."""
    deadline = time.monotonic() + within
    while not wanted(seen := await look()):
        assert time.monotonic() < deadline, f"after {within} s it was still {seen}"
        await asyncio.sleep(0.05)
    return seen


async def ask(node: Server, path: str, method: str = "GET") -> Any:
    """Return the JSON that a route of ``node`` answers."""
    async with httpx.AsyncClient(timeout=SOON) as http:
        answer = await http.request(method, node.http + path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def errors(node: Server) -> list[str]:
    """The lines of a node's log that tell of a bug."""
    return [line for line in node.log().splitlines() if "ERROR" in line or "Traceback" in line]
