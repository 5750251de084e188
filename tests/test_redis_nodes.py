"""Leases of nodes on one real Redis: who lives, who is condemned and by whom, and what a node does that was.

The law of this file: a node here is a `Link` with its leases and nothing else; what it holds and clears away are
lists of the test. Leases are short, and no test sleeps to be right.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
import redis
from anyio.lowlevel import checkpoint

from starlette_rt.backends.redis import nodes as leases
from starlette_rt.backends.redis.connection import Link
from starlette_rt.backends.redis.nodes import Due, Nodes
from starlette_rt.exceptions import Unavailable
from tests.redises import RedisServer, every_redis_server, every_redis_url, redis_server, redis_url
from tests.test_redis_presence import until

__all__ = ["every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]

LEASES, REMINDERS = "t:{nodes}:leases", "t:{nodes}:due"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out in a second."""
    for name, seconds in {"LEASE": 1.0, "LOOK": 0.1, "QUARANTINE": 1.0, "BURIAL": 1.0, "LATE": 0.2}.items():
        monkeypatch.setattr(leases, name, seconds)


@pytest.fixture
def client(redis_url: str) -> Any:
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        yield client


class Node:
    """A node that notes what it is told; ``trouble`` is how often it fails to do it."""

    def __init__(self, url: str) -> None:
        self.held: list[str] = []
        self.buried: list[str] = []
        self.due: list[Due] = []
        self.trouble = 0
        self.link = Link(url, prefix="t", scripts=leases.SCRIPTS)
        self.nodes = Nodes(self.link)
        self.nodes.on_held.append(self._registers)
        self.nodes.on_dead.append(self._buries)
        self.nodes.on_due.append(self.due.extend)

    async def _registers(self) -> None:
        self._fails()
        self.held.append(self.nodes.generation)

    async def _buries(self, generation: str) -> None:
        self._fails()
        self.buried.append(generation)

    def _fails(self) -> None:
        if self.trouble:
            self.trouble -= 1
            raise Unavailable("the test says so")

    async def start(self) -> None:
        await self.link.start()
        await self.nodes.start()

    async def stop(self) -> None:
        await self.nodes.stop()
        await self.link.stop()

    def freeze(self) -> None:
        assert self.nodes._running is not None
        self.nodes._running.cancel()

    def thaw(self) -> None:
        self.nodes._running = self.link.tasks.spawn(self.nodes._run)

    async def look(self, times: int = 1) -> None:
        """Wait for so many looks."""
        for _ in range(times):
            seen = self.nodes._looked
            await until(lambda seen=seen: self.nodes._looked > seen, "a look")


@asynccontextmanager
async def fleet(url: str, size: int = 2) -> AsyncIterator[list[Node]]:
    async with AsyncExitStack() as stack:
        made = [Node(url) for _ in range(size)]
        for node in made:
            await node.start()
            stack.push_async_callback(node.stop)
            await until(lambda it=node: it.held, "a lease")
        yield made


# Holding.


async def test_a_node_has_a_lease_from_its_start_to_its_stop(every_redis_url: str) -> None:
    with redis.Redis.from_url(every_redis_url, protocol=2) as client:
        async with fleet(every_redis_url, 1) as [one]:
            name = one.nodes.generation
            assert one.held == [name]
            assert one.nodes.held
            first = client.zscore(LEASES, name)
            assert first is not None
            await one.look(3)
            assert (client.zscore(LEASES, name) or 0) > first
            assert one.nodes.live == (name,)
        assert client.zcard(LEASES) == 0


async def test_each_start_is_another_generation(redis_url: str) -> None:
    one = Node(redis_url)
    for _ in range(2):
        await one.start()
        await until(lambda: len(one.held) and one.held[-1] == one.nodes.generation, "a lease")
        await one.stop()
    assert len(set(one.held)) == 2


async def test_a_lease_that_was_forgotten_is_not_taken_again_under_the_same_name(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url, 1) as [one]:
        name = one.nodes.generation
        client.delete(LEASES)
        await until(lambda: len(one.held) == 2, "a new lease")
        assert one.held == [name, one.nodes.generation]
        assert name != one.nodes.generation
        await until(lambda: one.buried == [name], "the end of the old name")  # whatever was written under it
        await until(lambda: client.zrange(LEASES, 0, -1) == [one.nodes.generation.encode()], "one lease")


async def test_whoever_is_told_that_it_is_fenced_takes_a_new_name_once(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [one]:
        name = one.nodes.generation
        for _ in range(3):
            one.nodes.lose(name)
        assert not one.nodes.held
        await until(lambda: one.nodes.held and one.buried == [name], "a new lease")
        assert len(one.held) == 2


async def test_a_name_that_is_lost_while_its_lease_is_renewed_does_not_count_as_held(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url, 1) as [one]:
        name = one.nodes.generation
        one.freeze()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one.nodes._renew)
            await checkpoint()
            one.nodes.lose(name)
        assert not one.nodes.held
        assert client.zscore(LEASES, one.nodes.generation) is None
        one.thaw()
        await until(lambda: one.nodes.held, "a new lease")
        assert client.zscore(LEASES, one.nodes.generation)


async def test_a_name_that_is_lost_while_everything_is_registered_is_not_buried_before_the_next_is(
    redis_url: str,
) -> None:
    async with fleet(redis_url, 1) as [one]:
        names = [one.nodes.generation]

        async def loses_another() -> None:
            if len(names) < 3:
                one.nodes.lose(names[-1])
                names.append(one.nodes.generation)
                assert names[-2] not in one.buried

        one.nodes.on_held.append(loses_another)
        one.nodes.lose(names[0])
        names.append(one.nodes.generation)
        await until(lambda: sorted(one.buried) == sorted(names[:2]), "the end of both")
        assert one.held[-1] == names[2]


async def test_who_cannot_register_is_asked_again(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 1) as [one]:
        one.trouble = 3
        client.delete(LEASES)
        await until(lambda: len(one.held) == 2 and one.buried, "the registration")
        assert one.trouble == 0


async def test_after_an_outage_everything_is_registered_again_under_the_same_name() -> None:
    with RedisServer(keep=True) as server:
        async with fleet(server.url, 1) as [one]:
            server.pause()
            await until(lambda: not one.link.up, "an outage")
            assert not one.nodes.held
            assert one.nodes.alive("anybody")
            server.resume()
            await until(lambda: len(one.held) == 2, "the registration")
            assert one.held[0] == one.held[1]


async def test_another_run_of_the_server_is_told_everything_though_the_lease_was_kept(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [one]:
        one.link._pipe.run_id = "another"
        await until(lambda: len(one.held) == 2, "the registration")
        assert one.held[0] == one.held[1]


async def test_a_node_that_starts_without_redis_takes_its_lease_when_it_is_there() -> None:
    with RedisServer() as server:
        server.kill()
        one = Node(server.url)
        begun = time.monotonic()
        await one.start()
        assert time.monotonic() - begun < 4
        assert not one.nodes.held
        server.start()
        await until(lambda: one.held, "a lease")
        await one.stop()


# The others.


async def test_of_many_that_live_one_condemns_the_dead_and_clears_it_away(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 4) as [dead, *others]:
        name = dead.nodes.generation
        await until(lambda: all(name in each.nodes.live for each in others), "nodes that know each other")
        dead.freeze()
        await until(lambda: any(each.buried for each in others), "a burial")
        await until(lambda: client.zscore(LEASES, name) is None, "the end of the lease")
        for each in others:
            await each.look(2)
            assert not each.nodes.alive(name)
            assert name not in each.nodes.live
        assert [each.buried for each in others].count([name]) == 1
        assert [each.buried for each in others].count([]) == 2
        assert all(len(each.held) == 1 for each in others)


async def test_of_those_who_condemn_the_same_at_once_one_may_and_nobody_condemns_who_lives(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url) as [one, two]:
        client.zadd(LEASES, {"dead": 1})

        async def condemn(node: Node, name: str) -> int:
            found: int = await node.link.call(leases.CONDEMN, [node.nodes._leases], [name, 60_000])
            return found

        assert [await condemn(node, "dead") for node in (one, two, one)] == [1, 0, 0]
        assert await condemn(one, two.nodes.generation) == 0
        assert await condemn(one, "unheard of") == 0
        assert two.nodes.generation.encode() in client.zrange(LEASES, 0, -1)


async def test_who_is_condemned_cannot_hold_its_lease_though_nobody_has_cleared_away_yet(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url, 1) as [one]:
        name = one.nodes.generation
        client.zadd(LEASES, {name: -(time.time() + 60) * 1000})
        await until(lambda: one.nodes.generation != name and one.nodes.held, "a new name")
        await until(lambda: one.buried == [name], "its end")


async def test_a_lease_that_has_run_out_is_held_again_if_nobody_has_condemned_it(
    redis_url: str, client: redis.Redis
) -> None:
    """The negative twin: to be late is no death."""
    async with fleet(redis_url, 1) as [one]:
        name = one.nodes.generation
        await until(lambda: one.nodes.settled, "a node that may judge")
        one.freeze()
        client.zadd(LEASES, {name: (time.time() - 60) * 1000})
        one.thaw()
        await one.look()
        assert one.nodes.generation == name
        assert not one.nodes.settled  # if ours has run out, so may all others have, for the same reason


async def test_a_reaper_that_dies_is_followed_by_another(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 1) as [one]:
        client.zadd(LEASES, {"busy": -(time.time() + 60) * 1000, "left": -(time.time() - 60) * 1000})
        await until(lambda: one.buried == ["left"], "the one whose reaper is gone")
        await one.look(2)
        assert one.buried == ["left"]
        assert not one.nodes.alive("busy")


async def test_who_cannot_clear_away_tries_again(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 1) as [one]:
        await until(lambda: one.nodes.settled, "a node that may judge")
        one.trouble = 1
        client.zadd(LEASES, {"dead": 1})
        await until(lambda: one.buried == ["dead"], "a second burial")


async def test_a_clock_that_was_set_forward_kills_nobody(redis_url: str, client: redis.Redis) -> None:
    """All leases seem to have run out at once, and there was no outage."""
    async with fleet(redis_url) as [one, two]:
        await until(lambda: one.nodes.settled and two.nodes.settled, "nodes that may judge")
        two.freeze()
        for node in (one, two):
            client.zadd(LEASES, {node.nodes.generation: (time.time() - 3600) * 1000})
        await one.look()
        assert one.nodes._dead() == []
        two.thaw()
        await two.look(2)
        assert one.buried == two.buried == []
        assert len(one.held) <= 2


async def test_of_one_that_nobody_knows_the_next_look_tells(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [one]:
        assert one.nodes.alive("unheard of")  # it may have begun a moment ago
        await one.look(2)
        assert not one.nodes.alive("unheard of")
        new = Node(redis_url)
        await new.start()
        assert one.nodes.alive(new.nodes.generation)
        await one.look(2)
        assert one.nodes.alive(new.nodes.generation)
        await new.stop()
        await one.look(2)
        assert not one.nodes.alive(new.nodes.generation)
        assert one.nodes.alive(one.nodes.generation)


async def test_what_is_remembered_of_the_dead_is_bounded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "REMEMBERED", 10)
    async with fleet(redis_url, 1) as [one]:
        for number in range(50):
            one.nodes.alive(f"n{number}")
        await one.look(2)
        assert len(one.nodes._gone) == 10
        assert not one.nodes._asked


# Reminders.


async def test_a_reminder_that_nobody_has_settled_is_given_to_one_node(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 3) as nodes:
        nodes[0].nodes.remind("late", nodes[0].nodes.now_ms() - 10_000)
        nodes[0].nodes.remind("not yet", nodes[0].nodes.now_ms() + 10_000)
        await until(lambda: any(node.due for node in nodes), "somebody who looks after it")
        for node in nodes:
            await node.look(2)
        due = [due for node in nodes for due in node.due]
        assert [each.name for each in due] == ["late"]
        nodes[1].nodes.settle("late", due[0].reminder, 0)
        await until(lambda: client.zrange(REMINDERS, 0, -1) == [b"not yet"], "the end of it")


async def test_a_reminder_that_was_taken_and_not_settled_is_given_again(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [one]:
        one.nodes.remind("late", 1)
        await until(lambda: len(one.due) >= 2, "another turn")


async def test_a_reminder_that_was_set_again_meanwhile_is_not_settled(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 1) as [one]:
        far = one.nodes.now_ms() + 60_000
        one.nodes.remind("g", far)
        one.nodes.settle("g", far - 1, 0)
        await one.look()
        assert client.zscore(REMINDERS, "g") == far
        one.nodes.settle("g", far, far + 5)
        await one.look()
        assert client.zscore(REMINDERS, "g") == far + 5
        one.nodes.settle("g", far + 5, 0)
        await one.look()
        assert client.zscore(REMINDERS, "g") is None


async def test_the_clock_of_redis_is_known_from_the_last_look(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 1) as [one]:
        seconds, microseconds = client.time()
        assert abs(one.nodes.now_ms() - (seconds * 1000 + microseconds / 1000)) < 500
