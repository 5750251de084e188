"""Redis away, dead, deaf, slow or empty: who was listening knows what is missing, and nobody has to be restarted.

The law of this file: two nodes and a Redis are processes, a hundred listeners are on them, and one node says twenty
numbers a second to a group without history and twenty to one with. One test is one fault. After it the books of every
listener are closed: what is missing was announced, or could not be heard.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import NamedTuple

import httpx
import pytest

from tests.audience import (
    SOON,
    Listener,
    Said,
    Speaker,
    Sums,
    account,
    ask,
    errors,
    eventually,
    gather,
    latencies,
    longest_gap,
    tally,
    until,
)
from tests.fleet import Node, fleet
from tests.redises import RedisServer
from tests.wires import Way, Wire

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

APP, QUIET = "tests.station:app", ["--no-access-log"]
LOOSE, KEPT, PEOPLE = "loose", "kept:news", "people"
LISTENERS = 50  # on each node
PRESENT = 5  # of them, who are tracked; the last one of each node watches
BEFORE, AFTER = 10, 20  # numbers that are said before the fault, and after its end
HEARING = 2.0  # seconds after the return of Redis in which all hear again


@pytest.fixture
def anyio_backend() -> str:
    """Redis is for asyncio."""
    return "asyncio"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


class Scene:
    """Two nodes with their listeners; ``near`` are those of the node that speaks."""

    def __init__(self, nodes: list[Node], near: list[Listener], far: list[Listener], speakers: list[Speaker]) -> None:
        self.nodes, self.near, self.far = nodes, near, far
        self.loose, self.kept = speakers
        self.fault = self.back = 0.0  # when it began, and when it was over

    @property
    def everybody(self) -> list[Listener]:
        return [*self.near, *self.far]

    async def begun(self) -> None:
        """Everybody has heard something; from here on it is the fault's time."""
        for speaker in (self.loose, self.kept):
            await until(lambda speaker=speaker: len(speaker.said) >= BEFORE, "enough said")  # type: ignore[misc]
        await self.have_heard(self.everybody, LOOSE, 0)
        await self.have_heard(self.everybody, KEPT, 0)
        self.fault = time.monotonic()

    async def have_heard(self, listeners: list[Listener], group: str, number: int, within: float = 10.0) -> None:
        await until(lambda: all(each.last(group) >= number for each in listeners), f"{number} in {group}", within)

    async def over(self) -> float:
        """The fault is over: return the seconds until everybody hears again what is said from now on."""
        self.back = time.monotonic()
        first = {
            speaker.group: await until(lambda speaker=speaker: self._first_since(speaker), "accepted")  # type: ignore[misc]
            for speaker in (self.loose, self.kept)
        }
        for group, said in first.items():
            await self.have_heard(self.everybody, group, said.number)
        return max(self._heard_at(each, group, said.number) for group, said in first.items() for each in self.everybody)

    def _first_since(self, speaker: Speaker) -> Said | None:
        """The first that was said after the fault and accepted."""
        return next((said for said in speaker.said if said.at >= self.back and said.verdict == "accepted"), None)

    def _heard_at(self, listener: Listener, group: str, number: int) -> float:
        """Seconds from the end of the fault to when ``number`` or a later one was heard."""
        lines = listener.record[group]
        return next(line.at for line in lines if line.number is not None and line.number >= number) - self.back

    async def end(self) -> None:
        """Say some more, then a last one in each group that everybody hears."""
        enough = {speaker: len(speaker.said) + AFTER for speaker in (self.loose, self.kept)}
        await until(lambda: all(len(speaker.said) >= count for speaker, count in enough.items()), "enough said")
        for speaker in enough:
            await speaker.stop()
        for speaker in (self.loose, self.kept):
            for _ in range(3):  # one that a reset stands for is heard by nobody
                last = await speaker.accepted()
                try:
                    await self.have_heard(self.everybody, speaker.group, last.number, 4.0)
                except AssertionError:
                    continue
                break
            else:
                await self.have_heard(self.everybody, speaker.group, last.number, 1.0)

    # The books.

    def books(self, listeners: list[Listener], speaker: Speaker) -> list[Sums]:
        return [account(each.record[speaker.group], speaker) for each in listeners]

    def kept_by_all(self) -> list[Sums]:
        """In the group with history nothing is missing that was not announced; return the books."""
        books = self.books(self.everybody, self.kept)
        for sums in books:
            assert sums.sent == sums.accepted + sums.refused + sums.doubtful
            assert sums.accepted + sums.doubtful_delivered == sums.delivered + sums.announced, sums
            assert not sums.silent, sums
            assert not sums.again, sums
        return books

    def all_here(self) -> None:
        """On the node that speaks, the group without history has no gap and no refusal."""
        for sums in self.books(self.near, self.loose):
            assert sums.sent == sums.accepted == sums.delivered, sums

    async def missed_there(self, since: float, before: float) -> int:
        """On the other node nothing is missing but what was said between; return the most that one has missed.

        Or while a node took Redis to be away, which on a busy machine happens by itself.
        """
        most, deaf = 0, [(since, before)]
        for node in self.nodes:
            for begun, *ended in await ask(node, "/aways"):
                deaf.append((begun - 0.5, (ended or [time.monotonic()])[0] + HEARING))
        for sums in self.books(self.far, self.loose):
            assert sums.accepted == sums.delivered + len(sums.silent)
            said = {number: self.loose.said[number].at for number in sums.silent}
            outside = [number for number, at in said.items() if not any(low <= at <= high for low, high in deaf)]
            assert not outside, f"{outside} were said when all could hear; the fault was {since}–{before}"
            most = max(most, len(sums.silent))
        return most

    async def nobody_left(self) -> None:
        """Presence has not moved, and both nodes know who is there."""
        there = {each.name for part in (self.near, self.far) for each in part[:PRESENT]}
        for node in self.nodes:
            await eventually(lambda node=node: ask(node, f"/present?group={PEOPLE}"), lambda seen: seen.keys() == there)  # type: ignore[misc]
        for watcher in (self.near[-1], self.far[-1]):
            left = [key for _, diff in watcher.leaves for key in diff["leaves"] if key not in diff["joins"]]
            assert not left, f"{left} left while Redis was away"
            await until(lambda watcher=watcher: watcher.present(PEOPLE).keys() == there, "everybody present")  # type: ignore[misc]

    def quiet(self) -> None:
        """No client lost its node, none was told an offset that is not the next, and no node has met a bug."""
        assert [each.connections for each in self.everybody] == [1] * len(self.everybody)
        assert [gap for each in self.everybody for gap in each.gaps] == []
        assert [line for node in self.nodes for line in errors(node)] == []


@asynccontextmanager
async def scene(speaking: str, listening: str) -> AsyncIterator[Scene]:
    """Start a node on each of two addresses of Redis, let listeners come and the speakers begin."""
    with ExitStack() as nodes:
        started = await asyncio.to_thread(
            lambda: [
                nodes.enter_context(fleet(APP, 1, {"REDIS_URL": url}, ["--no-access-log"]))[0]
                for url in (speaking, listening)
            ]
        )
        async with AsyncExitStack() as stack:
            near, far = [await audience(stack, node) for node in started]
            speakers = [await stack.enter_async_context(Speaker(group, started[0])) for group in (LOOSE, KEPT)]
            made = Scene(started, near, far, speakers)
            await made.begun()
            yield made


async def audience(stack: AsyncExitStack, node: Node) -> list[Listener]:
    """Let the listeners of one node come in, some to be seen, and one to see them."""
    names = [f"{node.port}.{number}" for number in range(LISTENERS)]
    listeners = await gather(stack, names, lambda _: [f"{node.url}/ws"], [LOOSE, KEPT])
    for each in listeners[:PRESENT]:
        await each.join(PEOPLE)
        await each.track(PEOPLE, {"name": each.name})
    await listeners[-1].join(PEOPLE, presence="members")
    return listeners


async def settle(there: Scene, heard_again: float) -> None:
    """What holds after every fault; the numbers are printed."""
    await there.end()
    kept = there.kept_by_all()
    there.all_here()
    missed = await there.missed_there(there.fault - 0.5, there.back + HEARING)
    await there.nobody_left()
    there.quiet()
    shared = [said.shared for said in there.loose.said]
    print(f"\nfault of {there.back - there.fault:.1f} s; all hear again after {heard_again:.2f} s")
    print(f"with history: {tally(kept)}")
    print(f"without: {len(shared)} said, {shared.count('queued')} queued, {shared.count('no')} not shared; ", end="")
    print(f"the other node missed {missed}")
    print(f"longest silence: here {silence(there.near, LOOSE):.2f} s, there {silence(there.far, LOOSE):.2f} s", end="")
    print(f", with history {silence(there.everybody, KEPT):.2f} s; repeated {sum(e.repeated for e in there.everybody)}")
    delays = [delay for each in there.near for delay in latencies(each.record[LOOSE], there.loose)]
    print(f"delay here, without history: p99 {1000 * sorted(delays)[len(delays) * 99 // 100]:.0f} ms")
    assert heard_again <= HEARING


def silence(listeners: list[Listener], group: str) -> float:
    return max(longest_gap(each.record[group]) for each in listeners)


# Redis dies, and comes back empty


async def is_killed_for(seconds: float, redis: RedisServer) -> None:
    async with scene(redis.url, redis.url) as there:
        await asyncio.to_thread(redis.kill)
        await asyncio.sleep(seconds)
        await asyncio.to_thread(redis.start)
        await settle(there, await there.over())


@pytest.mark.system
async def test_a_redis_that_dies_and_comes_back_empty_three_seconds_later(redis: RedisServer) -> None:
    await is_killed_for(3.0, redis)


@pytest.mark.soak
async def test_a_redis_that_dies_and_comes_back_empty_ten_seconds_later(redis: RedisServer) -> None:
    await is_killed_for(10.0, redis)


# Redis ends the connections that hear


@pytest.mark.system
async def test_a_redis_that_ends_the_connections_that_hear(redis: RedisServer) -> None:
    async with scene(redis.url, redis.url) as there:
        for _ in range(3):
            assert await asyncio.to_thread(redis.ask, "CLIENT", "KILL", "TYPE", "pubsub") == 2
            heard_again = await there.over()
        await settle(there, heard_again)


BALLAST, HEAVY, LIMIT = "ballast", 500_000, "64kb"  # a group, bytes of a message in it, and what Redis bears


@pytest.mark.system
async def test_a_redis_that_gives_up_a_node_that_reads_too_slowly(redis: RedisServer) -> None:
    await asyncio.to_thread(redis.ask, "CONFIG", "SET", "client-output-buffer-limit", f"pubsub {LIMIT} 0 0")
    async with scene(redis.url, redis.url) as there, httpx.AsyncClient(timeout=SOON) as http:
        speaking, listening = there.nodes
        await there.far[0].join(BALLAST)
        ballast = {"group": BALLAST, "size": HEAVY, "exclude": there.far[0].session, "n": 0}
        await asyncio.to_thread(listening.freeze)
        for _ in range(100):
            await http.post(f"{speaking.http}/say", params=ballast)
            if "output buffer limits" in redis.log():
                break
        count = len(there.kept.said)
        await until(lambda: len(there.kept.said) > count + 10, "something said that it cannot hear")
        await asyncio.to_thread(listening.thaw)
        assert "output buffer limits" in redis.log()
        await settle(there, await there.over())


# Redis stands still, forgets, or cannot be reached


@pytest.mark.system
async def test_a_redis_that_stands_still_for_five_seconds(redis: RedisServer) -> None:
    async with scene(redis.url, redis.url) as there:
        await asyncio.to_thread(redis.pause)
        await asyncio.sleep(5.0)
        await asyncio.to_thread(redis.resume)
        await settle(there, await there.over())


@pytest.mark.system
async def test_a_redis_that_forgets_everything(redis: RedisServer) -> None:
    async with scene(redis.url, redis.url) as there:
        await asyncio.to_thread(redis.ask, "FLUSHALL")
        await settle(there, await there.over())


@pytest.mark.system
async def test_a_network_that_swallows_what_one_node_and_redis_say_to_each_other(redis: RedisServer) -> None:
    with Wire(redis.port) as wire:
        async with scene(redis.url, redis.url_through(wire.port)) as there:
            await asyncio.to_thread(wire.swallow)
            await asyncio.sleep(4.0)
            await asyncio.to_thread(wire.mend)
            await settle(there, await there.over())


@pytest.mark.system
async def test_a_network_that_swallows_the_answers_of_redis_to_the_node_that_speaks(redis: RedisServer) -> None:
    with Wire(redis.port) as wire:
        async with scene(redis.url_through(wire.port), redis.url) as there:
            await asyncio.to_thread(wire.swallow, "down")
            await asyncio.sleep(2.0)
            await asyncio.to_thread(wire.mend)
            await settle(there, await there.over())
            assert await there.missed_there(0.0, 0.0) == 0


@pytest.mark.system
async def test_a_network_that_swallows_what_everybody_and_redis_say_to_each_other(redis: RedisServer) -> None:
    with Wire(redis.port) as near, Wire(redis.port) as far:
        async with scene(redis.url_through(near.port), redis.url_through(far.port)) as there:
            for wire in (near, far):
                await asyncio.to_thread(wire.swallow)
            await asyncio.sleep(4.0)
            for wire in (near, far):
                await asyncio.to_thread(wire.mend)
            await settle(there, await there.over())


# All of it, again and again


class Harm(NamedTuple):
    """What may be harmed, and by how much: Redis, the line of each node to it, and chance."""

    redis: RedisServer
    wires: list[Wire]
    chance: random.Random

    async def dies(self) -> None:
        await asyncio.to_thread(self.redis.kill)
        await self.some_time()
        await asyncio.to_thread(self.redis.start)

    async def stands_still(self) -> None:
        await asyncio.to_thread(self.redis.pause)
        await self.some_time()
        await asyncio.to_thread(self.redis.resume)

    async def forgets(self) -> None:
        await asyncio.to_thread(self.redis.ask, "FLUSHALL")

    async def hangs_up(self) -> None:
        kind = self.chance.choice(["pubsub", "normal"])
        await asyncio.to_thread(self.redis.ask, "CLIENT", "KILL", "TYPE", kind)

    async def is_unreachable(self) -> None:
        """A line or both lose, keep back or refuse what is said, one way or both."""
        wires = self.chance.choice([self.wires[:1], self.wires[1:], self.wires])
        ways: tuple[Way, ...] = self.chance.choice([("up",), ("down",), ("up", "down")])
        harm = self.chance.choice(["swallow", "hold", "cut"])
        for wire in wires:
            await asyncio.to_thread(getattr(wire, harm), *(() if harm == "cut" else ways))
        await self.some_time()
        for wire in wires:
            await asyncio.to_thread(wire.mend)

    async def is_far(self) -> None:
        """A line is slow, but not so slow that Redis is taken to be away."""
        wire = self.chance.choice(self.wires)
        await asyncio.to_thread(wire.delay, self.chance.uniform(0.0, 0.1))
        await self.some_time()
        await asyncio.to_thread(wire.mend)

    async def some_time(self) -> None:
        await asyncio.sleep(self.chance.choice([self.chance.uniform(0.0, 0.5), self.chance.uniform(0.5, 4.0)]))


HARMS = [Harm.dies, Harm.stands_still, Harm.forgets, Harm.hangs_up, Harm.is_unreachable, Harm.is_far]


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10))
async def test_one_fault_after_the_other_without_a_restart_of_a_node(redis: RedisServer, seed: int) -> None:
    chance = random.Random(seed)
    with Wire(redis.port) as near, Wire(redis.port) as far:
        harm = Harm(redis, [near, far], chance)
        async with scene(redis.url_through(near.port), redis.url_through(far.port)) as there:
            worst = 0.0
            for _ in range(10):
                does = chance.choice(HARMS)
                await does(harm)
                heard_again = await there.over()
                print(f"{does.__name__}: all hear again after {heard_again:.2f} s")
                worst = max(worst, heard_again)
                await asyncio.sleep(chance.uniform(0.0, 3.0))
            await settle(there, worst)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(10))
async def test_listeners_who_go_from_node_to_node_meanwhile_know_what_they_miss(redis: RedisServer, seed: int) -> None:
    chance = random.Random(seed)
    with ExitStack() as lines:
        wires = [lines.enter_context(Wire(redis.port)) for _ in range(3)]
        urls = [redis.url_through(wire.port) for wire in wires]
        nodes = [lines.enter_context(fleet(APP, 1, {"REDIS_URL": url}, QUIET))[0] for url in urls]
        doors = [f"{node.url}/ws" for node in nodes]
        async with AsyncExitStack() as stack:
            names = [f"{seed}.{number}" for number in range(45)]
            listeners = await gather(stack, names, lambda place: doors[place % 3 :] + doors[: place % 3], [KEPT])
            speaker = await stack.enter_async_context(Speaker(KEPT, nodes[0]))
            async with asyncio.TaskGroup() as group:
                moving = group.create_task(move(listeners, chance))
                for _ in range(10):
                    await chance.choice(HARMS)(Harm(redis, wires[:2], chance))
                    await asyncio.sleep(chance.uniform(0.0, 3.0))
                moving.cancel()
            await speaker.stop()
            last = [await speaker.accepted() for _ in range(3)][-1]
            await until(lambda: all(each.last(KEPT) == last.number for each in listeners), "the last one", 15.0)
            books = [account(each.record[KEPT], speaker) for each in listeners]
            assert [sums.silent for sums in books] == [()] * len(books)
            found = [recovered for each in listeners for recovered in each.recovered[KEPT]]
            print(f"\n{sum(found)} came back to all they had missed, {len(found) - sum(found)} to a break")
            print(f"{sum(sums.announced for sums in books)} announced, {sum(sums.again for sums in books)} told again")
        assert [line for node in nodes for line in errors(node)] == []


async def move(listeners: Sequence[Listener], chance: random.Random) -> None:
    """Cut off some listeners, again and again; each comes back to a node of its choice."""
    while True:
        await asyncio.sleep(chance.uniform(0.05, 0.5))
        for each in chance.sample(listeners, 3):
            each.cut()
