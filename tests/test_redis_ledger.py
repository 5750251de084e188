"""What may happen once on all nodes of one Redis, and who may come no more; with real servers that come and go.

The law of this file: a node here is a `Link` with its leases, ledger and limits, as a process has them; several of
them stand in one test. What every ledger guarantees is asked by the tests of test_backends.py. Time that has to pass
in Redis is taken from its keys, so that no test sleeps; only the death of a node takes what a lease lives.
"""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
import redis

from starlette_rt.backends.base import Claim
from starlette_rt.backends.redis import ledger as ledgers
from starlette_rt.backends.redis import limits as redis_limits
from starlette_rt.backends.redis import nodes as leases
from starlette_rt.backends.redis.connection import Link, Script
from starlette_rt.backends.redis.ledger import CLAIM, RELEASE, REVOKE, SETTLE, RedisLedger
from starlette_rt.backends.redis.limits import RedisLimits
from starlette_rt.backends.redis.nodes import Nodes
from starlette_rt.exceptions import EventError, Unavailable
from starlette_rt.limits import Buckets, Due, RateLimit
from starlette_rt.once import Outcome, once
from tests import test_backends as contract
from tests.redises import RedisServer, cluster, every_redis_server, every_redis_url, redis_server, redis_url
from tests.wires import Wire

__all__ = ["every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]

SCRIPTS = (*ledgers.SCRIPTS, *redis_limits.SCRIPTS, *leases.SCRIPTS)
PREFIX = "t"
SOON = 10.0  # seconds for what has to happen and takes no time of its own


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Node:
    """What one process has of the things under test. ``shift`` is how far its clock is ahead."""

    def __init__(self, url: str) -> None:
        self.shift = 0.0
        self.link = Link(url, prefix=PREFIX, scripts=SCRIPTS)
        self.nodes = Nodes(self.link)
        self.ledger = RedisLedger(self.link, self.nodes, lambda: time.time() + self.shift)
        self.limits = RedisLimits(self.link, self.nodes)

    async def start(self) -> None:
        await self.link.start()
        await self.nodes.start()
        if self.link.up:
            await until(lambda: self.limits._times and not self.ledger._loading._busy, "what follows a start done")

    async def stop(self) -> None:
        await self.nodes.stop()
        await self.link.stop()

    async def die(self) -> None:
        """End as a killed process does: the lease is not given back."""
        self.nodes._running.cancel()  # type: ignore[union-attr]
        await self.link.stop()

    async def up(self, is_up: bool = True) -> None:
        await until(lambda: self.link.up is is_up, f"up={is_up}")


@asynccontextmanager
async def fleet(url: str, size: int = 2) -> AsyncIterator[list[Node]]:
    """Start so many nodes, and stop those that still run."""
    async with AsyncExitStack() as stack:
        made = [Node(url) for _ in range(size)]
        for node in made:
            await node.start()
            stack.push_async_callback(node.stop)
        yield made


async def until(look: Callable[[], Any], what: str) -> None:
    with anyio.fail_after(SOON):
        while not look():  # noqa: ASYNC110
            await anyio.sleep(0.005)


def pass_time(client: redis.Redis, seconds: float) -> None:
    """Let everything in Redis be so much older, but for the leases."""
    for key in client.scan_iter(f"{PREFIX}:[^{{]*"):
        age(client, key, seconds)
    age(client, f"{PREFIX}:{{revoked}}".encode(), seconds)


def age(client: redis.Redis, key: bytes, seconds: float) -> None:
    if key.startswith(f"{PREFIX}:l:".encode()):
        mark, names, *tats = client.get(key).decode().split(" ")
        client.set(key, " ".join([mark, names, *(str(float(tat) - seconds * 1e6) for tat in tats)]), keepttl=True)
    if key == f"{PREFIX}:{{revoked}}".encode():
        for rule, ms in client.zrange(key, 0, -1, withscores=True):
            client.zadd(key, {rule: ms - seconds * 1000})
    left = client.pttl(key)
    if left >= 0 and not client.pexpire(key, left - round(seconds * 1000)):
        pytest.fail("the key had gone")


class RedisStage(contract.Stage):
    """One node on Redis, whose time the test moves."""

    def __init__(self, node: Node, client: redis.Redis) -> None:
        super().__init__()
        self.node, self.client = node, client
        self.backend = contract.Backend(None, None, node.limits, node.ledger)  # type: ignore[arg-type]

    def wall(self) -> float:
        return time.time() + self.node.shift

    async def pass_time(self, seconds: float) -> None:
        self.node.shift += seconds
        pass_time(self.client, seconds)
        known = self.node.limits._known
        for key in known._hand:
            known._tats[key] = tuple(tat - seconds for tat in known._tats[key])


@pytest.fixture
async def stage(every_redis_url: str) -> AsyncIterator[RedisStage]:
    """One node of a Redis of each version; what the tests of the contract ask for."""
    async with fleet(every_redis_url, 1) as [node]:
        with redis.Redis.from_url(every_redis_url, protocol=2) as client:
            yield RedisStage(node, client)


# What every ledger guarantees.

test_a_key_is_claimed_once = contract.test_a_key_is_claimed_once_until_its_time_is_over
test_the_first_answer_stays = (
    contract.test_what_is_settled_is_answered_until_its_time_is_over_and_the_first_answer_stays
)
test_the_unclaimed_can_be_settled = contract.test_what_was_never_claimed_can_be_settled
test_a_large_answer_is_a_fact = contract.test_of_an_answer_that_is_too_large_the_fact_is_kept
test_the_released_is_claimed_again = contract.test_what_is_released_can_be_claimed_again
test_a_claim_that_is_over_gives_nothing_back = contract.test_a_claim_that_is_over_cannot_give_back_the_one_that_followed
test_an_outcome_is_there_for_who_waits = contract.test_who_waits_for_an_outcome_gets_it_when_it_is_there
test_an_outcome_is_not_waited_for_after_the_claim = (
    contract.test_an_outcome_is_waited_for_no_longer_than_the_claim_holds
)
test_a_revocation_is_never_shortened = contract.test_a_revocation_holds_until_its_time_and_is_never_shortened
test_a_revocation_of_another_node_holds = contract.test_a_revocation_that_another_node_has_told_of_holds_too


# Nodes together.


def raced(found: list[Claim]) -> list[str]:
    return sorted(claim.state for claim in found)


async def test_of_fifty_who_claim_the_same_on_three_nodes_one_is_first(redis_url: str) -> None:
    async with fleet(redis_url, 3) as nodes:
        for number in range(5):
            found: list[Claim] = []

            async def ask(node: Node, key: str, found: list[Claim]) -> None:
                found.append(await node.ledger.claim(key, 60))

            async with anyio.create_task_group() as group:
                for asker in range(50):
                    group.start_soon(ask, nodes[asker % 3], str(number), found)
            assert raced(found) == ["first"] + ["running"] * 49
            assert not any(claim.local for claim in found)


async def test_without_the_script_more_than_one_would_be_first(redis_url: str) -> None:
    """The negative twin: the same race with a look and a write of which something can come between."""
    async with fleet(redis_url, 3) as nodes:
        first: list[int] = []

        async def ask(node: Node) -> None:
            if await node.link.command("GET", "naive") is None:
                await node.link.command("SET", "naive", "mine")
                first.append(1)

        async with anyio.create_task_group() as group:
            for asker in range(50):
                group.start_soon(ask, nodes[asker % 3])
        assert len(first) > 1


async def test_an_answer_is_known_on_every_node(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.ledger.claim("k", 60)
        assert (await two.ledger.claim("k", 60)).state == "running"
        await one.ledger.settle("k", b"\x00any bytes\xff", 60)
        assert (await two.ledger.claim("k", 60))[::2] == ("answered", b"\x00any bytes\xff")
        assert await two.ledger.settle("k", b"another", 60) == b"\x00any bytes\xff"
        assert (await two.ledger.outcome("k", 0))[::2] == ("answered", b"\x00any bytes\xff")


@pytest.mark.parametrize("key", ["a}b{c}", "{}", "{x", "once:ada\n1", "%7B", "\ud800", "é" * 300], ids=ascii)
async def test_a_key_may_be_any_text(redis_url: str, key: str) -> None:
    async with fleet(redis_url) as [one, two]:
        claim = await one.ledger.claim(key, 60)
        assert (await two.ledger.claim(key, 60)).state == "running"
        assert (await two.ledger.claim(f"{key}.", 60)).state == "first"
        await one.ledger.release(key, claim.holder)
        assert (await two.ledger.claim(key, 60)).state == "first"


async def test_who_waits_on_another_node_hears_of_the_end(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        for ends in ("settled", "released"):
            claim = await one.ledger.claim(ends, 60)
            with anyio.fail_after(SOON):
                async with anyio.create_task_group() as group:
                    found: list[Claim] = []

                    async def wait(key: str, found: list[Claim]) -> None:
                        found.append(await two.ledger.outcome(key, 60))

                    group.start_soon(wait, ends, found)
                    await anyio.sleep(0.05)
                    assert found == []
                    if ends == "settled":
                        await one.ledger.settle(ends, b"done", 60)
                    else:
                        await one.ledger.release(ends, claim.holder)
            assert [claim[::2] for claim in found] == [("answered", b"done") if ends == "settled" else ("free", b"")]


async def test_looks_at_what_runs_elsewhere_are_few(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "PAUSES", (0.001, 0.016))
    async with fleet(redis_url) as [one, two]:
        await one.ledger.claim("k", 60)
        before = calls(redis_url, "get")
        started = time.monotonic()
        assert (await two.ledger.outcome("k", 0.1)).state == "running"
        assert time.monotonic() - started < SOON
        assert 3 <= calls(redis_url, "get") - before <= 12  # 1+2+4+8, then 16 each


async def test_repetitions_that_come_to_the_same_node_wait_without_asking_redis(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [node]:
        await node.ledger.claim("k", 60)
        before = scripts(redis_url), calls(redis_url, "get")
        answers: list[Claim] = []

        async def wait() -> None:
            assert (await node.ledger.claim("k", 60)).state == "running"
            answers.append(await node.ledger.outcome("k", 60))

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                assert (scripts(redis_url), calls(redis_url, "get")) == before
                await node.ledger.settle("k", b"done", 60)
        assert [claim.answer for claim in answers] == [b"done"] * 20
        assert (await node.ledger.claim("k", 60)).answer == b"done"


async def test_an_event_with_an_id_is_two_commands(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [node]:
        before = scripts(redis_url)

        async def run() -> int:
            return 7

        for number in range(10):
            assert await once(node.ledger, str(number), run, rerun=False) == Outcome(7, local=False)
        assert scripts(redis_url) - before <= 20 + 2  # leases are renewed meanwhile


def scripts(url: str) -> int:
    """How many scripts have been run, of which a lease is one a second."""
    return calls(url, "evalsha")


def calls(url: str, command: str) -> int:
    with redis.Redis.from_url(url, protocol=2) as client:
        found = client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})
    return int(found["calls"])


# A node that dies.


@pytest.fixture
def short_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease lives for a moment, and is looked after as often."""
    for name, seconds in {"LEASE": 0.6, "LOOK": 0.1, "QUARANTINE": 0.6}.items():
        monkeypatch.setattr(leases, name, seconds)


class Counted:
    """Something to run, which counts how often it was."""

    def __init__(self, result: Any = "done") -> None:
        self.result, self.ran = result, 0

    async def __call__(self) -> Any:
        self.ran += 1
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


async def outcome_of(node: Node, key: str, run: Any, rerun: bool = False) -> Any:
    try:
        return await once(node.ledger, key, run, rerun=rerun)
    except EventError as error:
        return error.code


async def test_what_a_dead_node_had_begun_is_lost_to_one_who_asks(redis_url: str, short_lives: None) -> None:
    async with fleet(redis_url) as [one, two]:
        dead = Node(redis_url)
        await dead.start()
        claim = await dead.ledger.claim("k", 60)
        await until(lambda: one.nodes.settled and two.nodes.settled, "nodes that may judge")
        assert (await one.ledger.claim("k", 60)) == Claim("running", claim.holder), "it is alive"
        await dead.die()
        with anyio.fail_after(SOON):
            assert (await one.ledger.outcome("k", 60)).state == "lost"
        await until(lambda: not two.nodes.alive(dead.nodes.generation), "the death known on the other node")
        found = [await one.ledger.claim("k", 60), await two.ledger.claim("k", 60)]
        assert raced(found) == ["lost", "running"]
        assert found[0].holder == found[1].holder


async def test_of_those_who_ask_for_what_is_lost_one_gets_it(redis_url: str, short_lives: None) -> None:
    async with fleet(redis_url, 3) as nodes:
        dead = Node(redis_url)
        await dead.start()
        await dead.ledger.claim("k", 60)
        await until(lambda: all(node.nodes.settled for node in nodes), "nodes that may judge")
        for node in nodes:
            assert (await node.ledger.claim("k", 60)).state == "running"
        await dead.die()
        for node in nodes:
            await until(lambda: not node.nodes.alive(dead.nodes.generation), "the death known")  # noqa: B023
        found: list[Claim] = []

        async def ask(node: Node) -> None:
            found.append(await node.ledger.claim("k", 60))

        async with anyio.create_task_group() as group:
            for asker in range(30):
                group.start_soon(ask, nodes[asker % 3])
        assert raced(found) == ["lost"] + ["running"] * 29


@pytest.mark.parametrize("rerun", [False, True])
async def test_a_lost_event_has_no_known_outcome_or_runs_again(redis_url: str, short_lives: None, rerun: bool) -> None:
    async with fleet(redis_url) as [one, two]:
        dead = Node(redis_url)
        await dead.start()
        await dead.ledger.claim("k", 60)
        await until(lambda: one.nodes.settled and two.nodes.settled, "nodes that may judge")
        run, never = Counted(), Counted("never")
        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as group:
                found: list[Any] = []

                async def ask() -> None:
                    found.append(await outcome_of(one, "k", run, rerun))

                group.start_soon(ask)
                await anyio.sleep(0.05)
                assert run.ran == 0, "it waits while the node may live"
                await dead.die()
        assert found == [Outcome("done") if rerun else "outcome_unknown"]
        assert run.ran == rerun
        assert await outcome_of(two, "k", never, rerun) == found[0]
        assert never.ran == 0


async def test_a_node_that_wakes_too_late_cannot_change_what_was_answered(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        late = await one.ledger.claim("k", 60)
        await two.link.call(CLAIM, [two.ledger._key("k")], [1, "heir.1", 60_000, late.holder])
        await one.ledger.release("k", late.holder)
        assert (await two.ledger.claim("k", 60)) == Claim("running", "heir.1"), "it is not the late one's to give back"
        await two.ledger.settle("k", b"unknown", 60)
        assert await one.ledger.settle("k", b"done", 60) == b"unknown"
        assert (await one.ledger.claim("k", 60)).answer == b"unknown"


PROCESS = """
import asyncio, sys
from tests.test_redis_ledger import Node

async def main():
    node = Node(sys.argv[1])
    await node.start()
    print((await node.ledger.claim("k", 60)).state, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_what_a_killed_process_had_begun_is_lost_within_the_time_of_a_lease(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [node]:
        command = [sys.executable, "-c", PROCESS, redis_url]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            with anyio.fail_after(SOON):
                assert await process.stdout.readline() == b"first\n"
            await until(lambda: node.nodes.settled, "a node that may judge")
            assert (await node.ledger.claim("k", 60)).state == "running"
            process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            with anyio.fail_after(SOON):
                assert (await node.ledger.outcome("k", 60)).state == "lost"
            assert leases.LEASE / 2 < time.monotonic() - killed < leases.LEASE + 4
            assert (await node.ledger.claim("k", 60)).state == "lost"
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


# Redis away.


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server that the test stops and starts; it forgets everything when it ends."""
    with RedisServer() as server:
        yield server


async def test_while_redis_is_away_a_key_is_claimed_on_this_node(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 2) as [one, two]:
        own_redis.kill()
        await one.up(False)
        await two.up(False)
        first = await one.ledger.claim("k", 60)
        assert (first.state, first.local) == ("first", True)
        assert (await one.ledger.claim("k", 60)) == Claim("running", first.holder)
        assert (await two.ledger.claim("k", 60)).state == "first", "nobody can know"
        run = Counted()
        assert await once(one.ledger, "event", run, rerun=False) == Outcome("done", local=True)
        assert await once(one.ledger, "event", run, rerun=False) == Outcome("done", local=False)
        assert run.ran == 1
        with pytest.raises(Unavailable):
            await one.ledger.claim("ticket", 60, shared=True)
        own_redis.start()
        await one.up()
        assert (await one.ledger.claim("ticket", 60, shared=True)).state == "first", "the refusal took nothing"


async def test_what_was_settled_meanwhile_is_told_when_redis_is_back(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 2) as [one, two]:
        before = await one.ledger.claim("begun before", 60)
        given_back = await one.ledger.claim("given back", 60)
        own_redis.pause()
        await one.up(False)
        during = await one.ledger.claim("begun meanwhile", 60)
        assert (before.local, during.local) == (False, True)
        assert await one.ledger.settle("begun before", b"1", 60) == b"1"
        await one.ledger.settle("settled meanwhile", b"2", 60)
        await one.ledger.release("given back", given_back.holder)
        await one.ledger.claim("left open", 60)
        own_redis.resume()
        await one.up()
        await one.ledger.settle("begun meanwhile", b"3", 60)
        await until(lambda: not one.ledger._owed, "all told")
        await two.up()
        keys = ("begun before", "settled meanwhile", "begun meanwhile", "given back", "left open")
        found = [(await two.ledger.claim(key, 60)) for key in keys]
        assert [claim.answer for claim in found] == [b"1", b"2", b"3", b"", b""]
        assert [claim.state for claim in found[3:]] == ["first", "first"]


async def test_of_verdicts_that_wait_for_redis_the_oldest_makes_room(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "OWED", 3)
    async with fleet(own_redis.url, 1) as [node]:
        own_redis.pause()
        await node.up(False)
        for number in range(5):
            await node.ledger.settle(str(number), b"x", 60)
        await node.ledger.release("4", "nobody's")
        assert node.ledger._owed == {"2": "", "3": "", "4": ""}
        own_redis.resume()
        await node.up()
        await until(lambda: not node.ledger._owed, "all told")


async def test_a_verdict_that_is_over_before_redis_is_back_is_not_told(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 1) as [node]:
        own_redis.pause()
        await node.up(False)
        await node.ledger.settle("k", b"done", 60)
        node.shift += 61
        own_redis.resume()
        await node.up()
        await until(lambda: not node.ledger._owed, "nothing more to tell")
        assert (await node.ledger.claim("k", 60)).state == "first"


async def test_a_verdict_that_redis_refuses_is_told_again(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "RETRIES", (0.01, 0.02))
    async with fleet(own_redis.url, 2) as [one, two]:
        await one.ledger.claim("k", 60)
        own_redis.ask("CONFIG", "SET", "maxmemory", "1")
        assert await one.ledger.settle("k", b"done", 60) == b"done"
        assert (await one.ledger.claim("k", 60)).answer == b"done", "here it is known"
        claim = await one.ledger.claim("another", 60)
        assert (claim.state, claim.local) == ("first", True)
        with pytest.raises(Unavailable, match="redis refuses"):
            await one.ledger.claim("ticket", 60, shared=True)
        with pytest.raises(Unavailable, match="redis refuses"):
            await one.ledger.revoke("user:ada", time.time() + 60)
        own_redis.ask("CONFIG", "SET", "maxmemory", "0")
        await until(lambda: not one.ledger._owed, "all told")
        assert (await two.ledger.claim("k", 60)).answer == b"done"
        assert (await two.ledger.claim("ticket", 60)).state == "first"
        await until(lambda: not one.ledger._loading._wanted, "the revocation told")
        await two.ledger.load()
        assert await two.ledger.revoked(["user:ada"])


async def test_who_waits_while_redis_goes_away_is_told_what_was_seen_last(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "PAUSES", (0.01, 0.01))
    async with fleet(own_redis.url, 2) as [one, two]:
        await one.ledger.claim("k", 60)
        found: list[Claim] = []
        before = calls(own_redis.url, "get")

        async def wait() -> None:
            found.append(await two.ledger.outcome("k", 1))

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as group:
                group.start_soon(wait)
                await until(lambda: calls(own_redis.url, "get") > before, "a look")
                own_redis.pause()
        assert found[0].state == "running"
        assert await two.ledger.outcome("never seen", 1) == Claim("free")
        own_redis.resume()


async def test_a_claim_that_is_cancelled_is_given_back(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 2) as [one, two]:
        own_redis.pause()
        with anyio.move_on_after(0.02) as scope:
            await one.ledger.claim("k", 60)
        own_redis.resume()
        assert scope.cancelled_caught
        await one.up()
        await until(lambda: not one.ledger._owed, "it given back")
        assert (await two.ledger.claim("k", 60)).state == "first"


async def test_a_redis_that_has_forgotten_everything_cannot_make_an_event_run_twice_on_its_node(
    redis_url: str, redis_server: RedisServer
) -> None:
    async with fleet(redis_url, 2) as [one, two]:
        run = Counted()
        await once(one.ledger, "k", run, rerun=False)
        redis_server.ask("FLUSHALL")
        assert await once(one.ledger, "k", run, rerun=False) == Outcome("done")
        assert run.ran == 1
        assert await once(two.ledger, "k", run, rerun=False) == Outcome("done")
        assert run.ran == 2, "another node knows nothing"


# Revocations.


async def test_a_revocation_is_known_to_a_node_that_starts_later(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [one]:
        until_then = time.time() + 60
        await one.ledger.revoke("user:ada", until_then)
        await one.ledger.revoke("user:\ud800}", math.inf)
        await one.ledger.revoke("user:bob", time.time() - 1)
        async with fleet(redis_url, 1) as [later]:
            await later.ledger.load()
            assert await later.ledger.revoked(["user:ada"])
            assert await later.ledger.revoked(["user:\ud800}"])
            assert not await later.ledger.revoked(["user:bob", "user:cy"])
            before = calls(redis_url, "zrange")
            for _ in range(50):
                await later.ledger.revoked(["user:ada", "token:1"])
            assert calls(redis_url, "zrange") == before, "a handshake asks nobody"


async def test_a_revocation_is_loaded_with_each_connection_without_being_asked_for(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [one]:
        await one.ledger.revoke("user:ada", time.time() + 60)
        async with fleet(redis_url, 1) as [later]:
            await until(lambda: later.ledger.revocations(), "the revocation known")


async def test_revocations_that_are_over_are_forgotten_in_redis_too(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        key = f"{PREFIX}:{{revoked}}"
        async with fleet(redis_url, 1) as [node]:
            await node.ledger.revoke("user:ada", time.time() + 60)
            await node.ledger.revoke("user:bob", time.time() + 120)
            assert 115_000 < client.pttl(key) <= 120_000
            pass_time(client, 61)
            await node.ledger.revoke("user:cy", time.time() + 10)
            assert client.zrange(key, 0, -1) == [b"user:cy", b"user:bob"]
            await node.ledger.revoke("user:dan", time.time() - 1)
            assert client.zrange(key, 0, -1) == [b"user:cy", b"user:bob"]
            pass_time(client, 58)
            assert client.pttl(key) <= 2000


async def test_a_revocation_while_redis_is_away_holds_here_and_its_caller_knows(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 2) as [one, two]:
        own_redis.kill()
        await one.up(False)
        with pytest.raises(Unavailable):
            await one.ledger.revoke("user:ada", time.time() + 60)
        assert await one.ledger.revoked(["user:ada"])
        assert not await two.ledger.revoked(["user:ada"])
        own_redis.start()
        await one.up()
        await until(lambda: own_redis.ask("EXISTS", f"{PREFIX}:{{revoked}}"), "the revocation told")
        await two.up()
        await two.ledger.load()
        assert await two.ledger.revoked(["user:ada"])


async def test_revocations_survive_a_redis_that_has_forgotten_them(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledgers, "RULES", 3)
    async with fleet(own_redis.url, 1) as [node]:
        for number in range(10):
            await node.ledger.revoke(f"token:{number}", time.time() + 60)
        own_redis.restart(empty=True, kill=True)
        async with fleet(own_redis.url, 1) as [later]:
            await until(lambda: own_redis.ask("ZCARD", f"{PREFIX}:{{revoked}}") == 10, "them all told again")
            await later.ledger.load()
            assert await later.ledger.revoked(["token:9"])


async def test_a_node_that_starts_without_redis_revokes_nobody_or_lets_nobody_in(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 1) as [one]:
        await one.ledger.revoke("user:ada", time.time() + 60)
        own_redis.pause()
        async with fleet(own_redis.url, 2) as [trusting, strict]:
            strict.ledger.fail_open = False
            with pytest.raises(Unavailable):
                await trusting.ledger.load()
            assert not await trusting.ledger.revoked(["user:ada"])
            with pytest.raises(Unavailable, match="could not be read"):
                await strict.ledger.revoked(["user:ada"])
            own_redis.resume()
            await strict.up()
            await strict.ledger.load()
            assert await strict.ledger.revoked(["user:ada"])
            assert not await strict.ledger.revoked(["user:bob"])
            own_redis.pause()
            await strict.up(False)
            assert not await strict.ledger.revoked(["user:bob"]), "it has read them once"
            own_redis.resume()


# Scripts.


async def twice(link: Link, script: Script, keys: list[bytes], args: list[Any]) -> Any:
    """Run a script as after a connection that broke before its answer came; return the answer and what is kept."""
    first = await link.call(script, keys, args)
    kept = await link.command("DUMP", keys[0])
    assert await link.call(script, keys, args) == first
    assert await link.command("DUMP", keys[0]) == kept
    return first


async def test_scripts_that_are_run_twice_do_nothing_twice(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [node]:
        link, keys = node.link, [b"t:o:{k}"]
        assert await twice(link, CLAIM, keys, [1, "a.1", 60_000, ""]) == [b"first"]
        assert await twice(link, CLAIM, keys, [1, "b.1", 60_000, ""]) == [b"running", b"a.1"]
        assert await twice(link, CLAIM, keys, [1, "b.2", 60_000, "a.1"]) == [b"lost"]
        assert await twice(link, CLAIM, keys, [1, "c.1", 60_000, "a.1"]) == [b"running", b"b.2"]
        assert await twice(link, RELEASE, keys, ["a.1"]) == 1
        assert await twice(link, RELEASE, keys, ["b.2"]) == 1
        assert await twice(link, CLAIM, keys, [1, "c.1", 60_000, "b.2"]) == [b"first"]
        assert await link.call(SETTLE, keys, [1, "done", 60_000]) is None
        assert await twice(link, SETTLE, keys, [1, "done", 60_000]) == b"done"
        assert (await link.call(CLAIM, keys, [1, "c.1", 60_000, ""]))[:2] == [b"answered", b"done"]
        assert await twice(link, RELEASE, keys, ["c.1"]) == 1
        assert (await link.call(CLAIM, keys, [1, "c.2", 60_000, ""]))[:2] == [b"answered", b"done"]
        rules = [0, round(time.time() * 1000) + 60_000, "user:ada"]
        assert await twice(link, REVOKE, [b"t:{revoked}"], rules) == []


async def test_what_was_on_its_way_when_the_connection_broke_is_done_once(own_redis: RedisServer) -> None:
    """Redis has done it, the answers are lost, and it is said again on the next connection."""
    with Wire(own_redis.port) as wire:
        async with fleet(wire.url(), 1) as [node], fleet(own_redis.url, 1) as [other]:
            node.link._pipe._patience = SOON
            ten, found = Due("Chat:0:user:", "ada", RateLimit("10/hour", per="user"), 1), dict[str, Any]()

            async def ask(name: str, wanted: Awaitable[Any]) -> None:
                found[name] = await wanted

            before = calls(own_redis.url, "evalsha")
            wire.swallow("down")
            async with anyio.create_task_group() as group:
                group.start_soon(ask, "claim", node.ledger.claim("k", 60))
                group.start_soon(ask, "settle", node.ledger.settle("other", b"done", 60))
                group.start_soon(ask, "cap", node.limits.take_cap("ada", 5))
                group.start_soon(ask, "revoke", node.ledger.revoke("user:ada", time.time() + 60))
                for number in range(5):
                    group.start_soon(ask, f"take {number}", node.limits.take([ten], Buckets()))
                await until(lambda: calls(own_redis.url, "evalsha") >= before + 9, "all of it done")
                executed = calls(own_redis.url, "evalsha")
                wire.mend()
            assert calls(own_redis.url, "evalsha") >= executed + 9, "and done again"
            claim = found.pop("claim")
            assert (claim.state, claim.local) == ("first", False)
            takes = {name: found.pop(name) for name in tuple(found) if name.startswith("take")}
            assert {*takes.values()} == {0.0}
            assert found == {"settle": b"done", "cap": True, "revoke": None}
            assert [await other.limits.take_cap("ada", 5) for _ in range(5)] == [True] * 4 + [False]
            assert [await other.limits.take([ten], Buckets()) == 0.0 for _ in range(6)] == [True] * 5 + [False]


async def test_every_script_runs_in_a_cluster_of_three_masters() -> None:
    """A script that touched a key which is not in KEYS, or keys of two slots, would be refused here."""
    with cluster() as made, redis.RedisCluster.from_url(made.url, protocol=2) as client:
        done: list[str] = []

        def run(script: Script, keys: list[str], *args: Any) -> Any:
            done.append(script.name)
            return client.eval(script.body.decode(), len(keys), *keys, *args)

        for name in "abcdefghij":  # on all three of them
            assert run(CLAIM, [f"t:o:{{{name}}}"], 1, "a.1", 60_000, "") == [b"first"]
            assert run(RELEASE, [f"t:o:{{{name}}}"], "a.1") == 1
            assert run(SETTLE, [f"t:o:{{{name}}}"], 1, "done", 60_000) is None
            assert run(REVOKE, [f"t:{{revoked}}{name}"], 0, round(time.time() * 1000) + 9000, "user:ada") == []
            assert run(
                *(redis_limits.LIMIT, [f"t:l:{{user:{name}}}:Chat:0", f"t:l:{{user:{name}}}:Chat:1"]),
                *(1, "12345678", 1, 1, 50_000.0, 950_000.0, 2, 2, 50_000.0, 950_000.0, 1e6, 3e6),
            ) == [0, 50_000, 100_000, 2_000_000]
            assert run(redis_limits.CAP, [f"t:cap:{{{name}}}"], 1, "g", 1, 2, 60_000, "gone") == [1]
        assert {*done} == {script.name for script in (*ledgers.SCRIPTS, *redis_limits.SCRIPTS)}
        assert len({made.of(f"t:o:{{{name}}}").port for name in "abcdefghij"}) == 3


async def test_a_script_that_touches_another_key_is_refused_by_the_cluster() -> None:
    """The negative twin: what passes on one server does not pass there."""
    stray = "redis.call('GET', KEYS[1]) return redis.call('GET', ARGV[1])"
    with RedisServer() as server:
        assert server.ask("EVAL", stray, 1, "a", "b") is None
    with cluster() as made, redis.RedisCluster.from_url(made.url, protocol=2) as client:
        with pytest.raises(redis.ResponseError):
            client.eval(stray, 1, "a", "b")
