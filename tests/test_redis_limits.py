"""Budgets and caps that the nodes of one Redis share; with real servers, and clients of two nodes.

The law of this file: first the store itself, then apps on two nodes and what their clients see. What every store
guarantees is asked by the tests of test_backends.py. How nodes and servers are made stands in test_redis_ledger.py.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import redis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute

from starlette_rt import ConnectionLimits, RateLimit, Realtime, RealtimeEndpoint, RealtimeMiddleware, Whisper, event
from starlette_rt.backends.memory import MemoryLimits, memory
from starlette_rt.backends.redis.limits import CAP, LIMIT, RedisLimits, spelled
from starlette_rt.limits import Buckets, Due
from starlette_rt.testing import Refused, connect
from tests import test_backends as contract
from tests.redises import RedisServer, every_redis_server, every_redis_url, redis_server, redis_url
from tests.test_dialogue import Stage, Talk, board, echo, token, tokens
from tests.test_redis_ledger import PREFIX, Node, calls, fleet, own_redis, pass_time, short_lives, stage, until

__all__ = ["every_redis_server", "every_redis_url", "own_redis", "redis_server", "redis_url", "short_lives", "stage"]

pytestmark = [pytest.mark.system, pytest.mark.anyio]

TWENTY = RateLimit("20/hour", per="user")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def due(limit: RateLimit = TWENTY, amount: int = 1, *, subject: str = "ada", place: str = "Chat:0:user:") -> Due:
    return Due(place, subject, limit, amount)


# What every store guarantees.

test_a_budget_is_taken = contract.test_a_budget_is_taken_and_says_when_to_come_again
test_what_never_passes = contract.test_what_a_budget_never_holds_never_passes
test_a_refusal_takes_nothing = contract.test_a_budget_that_refuses_takes_nothing_from_the_others_of_its_subject
test_all_rates_must_agree = contract.test_all_rates_of_a_budget_must_agree
test_a_cap_holds = contract.test_a_person_has_as_many_connections_as_may_be_and_others_have_theirs


# Budgets.


class Hall:
    """A node's way to take: its own buckets first, then those of all, as a connection does."""

    def __init__(self, store: Any, now: Callable[[], float] = time.monotonic) -> None:
        self.store, self.now = store, now
        self.own = Buckets()

    async def take(self, some: Due) -> float:
        if wait := self.own.hit(some.key, some.limit, self.now(), some.amount):
            return wait
        return await self.store.take([some], self.own)


async def passed(halls: list[Hall], count: int, some: Due) -> int:
    """How many of so many pass, shared out over the nodes, all at once."""
    waits: list[float] = []

    async def ask(hall: Hall) -> None:
        waits.append(await hall.take(some))

    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(ask, halls[number % len(halls)])
    return waits.count(0.0)


async def test_two_nodes_share_one_budget(redis_url: str) -> None:
    async with fleet(redis_url) as nodes:
        halls = [Hall(node.limits) for node in nodes]
        assert await passed(halls, 60, due()) == 20
        assert await passed(halls, 60, due(subject="bob")) == 20
        assert await passed(halls, 60, due(place="Other:0:user:")) == 20
        assert await passed(halls, 60, due(RateLimit("20/hour", per="ip"), place="Chat:0:ip:")) == 20


async def test_two_nodes_that_share_nothing_let_twice_as_many_through() -> None:
    """The negative twin."""
    assert await passed([Hall(MemoryLimits(time.monotonic)) for _ in range(2)], 60, due()) == 40


async def test_over_time_two_nodes_let_no_more_through_than_the_rate(redis_url: str) -> None:
    limit = RateLimit("20/second", per="user")
    async with fleet(redis_url) as nodes:
        halls, through = [Hall(node.limits) for node in nodes], 0
        started = time.monotonic()
        while time.monotonic() - started < 1:
            for hall in halls:
                through += not await hall.take(due(limit))
        lasted = time.monotonic() - started
        assert 30 <= through <= 21 + lasted * 20


async def test_who_is_refused_again_and_again_costs_no_command(redis_url: str) -> None:
    async with fleet(redis_url) as nodes:
        one, two = (Hall(node.limits) for node in nodes)
        assert await passed([one], 20, due()) == 20
        assert await two.take(due()) > 0, "it is the other node that used it up"
        before = spent(redis_url)
        for _ in range(1000):
            assert await one.take(due()) > 0
            assert await two.take(due()) > 0
            assert await two.store.take([due()], two.own) > 0, "nor is one that waits for its turn"
        assert spent(redis_url) == before


async def test_without_the_memory_of_a_refusal_each_one_costs_a_command(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative twin."""
    monkeypatch.setattr(RedisLimits, "_refused", lambda self, dues: 0.0)
    async with fleet(redis_url) as [one, two]:
        await passed([Hall(one.limits)], 20, due())
        before = spent(redis_url)
        for _ in range(100):
            assert await two.limits.take([due()], Buckets()) > 0
        assert spent(redis_url) - before == 100


def spent(url: str) -> int:
    """How many times a budget was asked: nothing else reads a string here."""
    return calls(url, "get")


async def test_a_message_is_one_command_for_all_budgets_of_its_subject(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [node]:
        by_user = [due(place="Chat:0:user:"), due(place="Chat:2:user:")]
        by_ip = [due(RateLimit("9/hour", per="ip"), place="Chat:1:ip:", subject="192.0.2.1")]
        asked: list[int] = []
        ask = node.link.call

        async def counted(script: Any, keys: Any, args: Any = ()) -> Any:
            asked.extend([len(keys)] if script is LIMIT else [])
            return await ask(script, keys, args)

        node.link.call = counted  # type: ignore[method-assign]
        assert await node.limits.take(by_user, Buckets()) == 0.0
        assert asked == [2]
        assert await node.limits.take([by_user[0], *by_ip, by_user[1]], Buckets()) == 0.0
        assert sorted(asked[1:]) == [1, 2]
        assert await node.limits.take([], Buckets()) == 0.0
        assert len(asked) == 3


async def test_what_redis_refuses_this_node_has_not_taken_either(redis_url: str) -> None:
    async with fleet(redis_url) as nodes:
        one, two = (Hall(node.limits) for node in nodes)
        await passed([one], 15, due())
        assert await two.take(due(amount=10)) > 0
        assert await two.take(due(amount=5)) == 0.0
        assert await one.take(due()) > 0


async def test_who_waits_as_long_as_told_passes_if_nobody_else_has_come(redis_url: str) -> None:
    limit = RateLimit("2/second", per="user")
    async with fleet(redis_url) as nodes:
        one, two = (Hall(node.limits) for node in nodes)
        assert await passed([one], 2, due(limit)) == 2
        wait = await two.take(due(limit))
        assert 0 < wait <= 0.5
        with anyio.fail_after(5):
            await anyio.sleep(wait)
        assert await two.take(due(limit)) == 0.0


@pytest.mark.parametrize("rate", ["10/hour", "7/hour;20/day", "5000/hour"])
async def test_the_bucket_of_redis_is_the_bucket_of_this_node(redis_url: str, rate: str) -> None:
    """The same steps through both say the same, as far as milliseconds that pass meanwhile let it be seen."""
    chance, limit, now = random.Random(rate), RateLimit(rate, per="user"), 0.0
    here = Buckets()
    async with fleet(redis_url, 1) as [node]:
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            for _ in range(150):
                amount = chance.choice([1, 1, 1, 2, 5, 10, 60])
                expected = here.hit("k", limit, now, amount)
                found = await node.limits.take([due(limit, amount)], Buckets())
                assert found == expected if expected in (0.0, math.inf) else 0 < found <= expected + 0.01
                step = chance.uniform(0, 2 * limit.rates[0][0])
                now += step
                pass_time(client, step)
                node.limits._known = Buckets()


async def test_a_budget_is_kept_until_it_is_full_again_and_no_longer(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        async with fleet(redis_url, 1) as [node]:
            await node.limits.take([due(RateLimit("20/hour;100/day", per="user"), 3)], Buckets())
            [key] = client.keys(f"{PREFIX}:l:*")
            assert key.decode() == f"{PREFIX}:l:{{user:ada}}:Chat:0:user"
            assert abs(client.pttl(key) - 3 * 864_000) < 1000
            await node.limits.take([due(RateLimit("1000/second", per="user"), subject="bob")], Buckets())
            assert 1500 < client.pttl(f"{PREFIX}:l:{{user:bob}}:Chat:0:user") <= 2000, "for one that comes twice"


@pytest.mark.parametrize("kept", ["", "nonsense", "0 , 5", "9 aaaaaaaa, ", "1 aaaaaaaa, 99"], ids=repr)
async def test_what_is_no_budget_is_taken_for_a_full_one(redis_url: str, kept: str) -> None:
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        async with fleet(redis_url, 1) as [node]:
            client.set(f"{PREFIX}:l:{{user:ada}}:Chat:0:user", kept)
            assert await passed([Hall(node.limits)], 30, due()) == 20


@pytest.mark.parametrize("subject", ["a}b", "{a", "}", "é\ud800", "a:b c", "%7D"], ids=ascii)
async def test_a_subject_may_have_any_name(redis_url: str, subject: str) -> None:
    async with fleet(redis_url, 1) as [node]:
        both = [due(subject=subject), due(RateLimit("2/hour", per="user"), subject=subject, place="Chat:1:user:")]
        assert [await node.limits.take(both, Buckets()) == 0.0 for _ in range(3)] == [True, True, False]
        assert await node.limits.take([due(subject=f"{subject}.")], Buckets()) == 0.0


async def test_a_limit_that_is_run_twice_takes_once(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [node]:

        async def run(name: str, *dues: Due) -> list[int]:
            keys = [b"t:l:{user:ada}:%d" % number for number in range(len(dues))]
            found: list[int] = await node.link.call(LIMIT, keys, [1, name, *spelled(dues)])
            return found

        five = due(RateLimit("5/hour", per="user"))
        for number in range(5):
            for _ in range(3):
                wait, ahead = await run(f"name000{number}", five)
                assert wait == 0
                assert abs(ahead - (number + 1) * 720e6) < 5e6
        assert (await run("name0006", five))[0] > 0
        assert (await run("name0006", five))[0] > 0
        assert (await run("name0000", five))[0] == 0, "it is recognised though others came between"
        for _ in range(2):
            assert (await run("name0007", five, due()))[0] > 0
        kept = await node.link.command("GET", "t:l:{user:ada}:0")
        assert kept.startswith(b"1 name0004,name0003,name0002,name0001,name0000, ")


async def test_no_more_than_eight_that_passed_are_recognised(redis_url: str) -> None:
    """The negative twin, and the bound: who comes again after that pays again."""
    async with fleet(redis_url, 1) as [node]:
        for number in range(9):
            await node.link.call(LIMIT, [b"t:l:{k}:0"], [1, f"name000{number}", *spelled([due()])])
        taken = await node.link.call(LIMIT, [b"t:l:{k}:0"], [1, "name0001", *spelled([due()])])
        again = await node.link.call(LIMIT, [b"t:l:{k}:0"], [1, "name0000", *spelled([due()])])
        assert again[1] - taken[1] > 170e6


# Caps.


async def caps(nodes: list[Node], most: int = 3, identity: str = "ada") -> list[bool]:
    """Ask each node once."""
    return [await node.limits.take_cap(identity, most) for node in nodes]


async def test_the_connections_of_a_person_are_counted_on_all_nodes(redis_url: str) -> None:
    async with fleet(redis_url, 2) as [one, two]:
        assert await caps([one, two, one, two, one]) == [True, True, True, False, False]
        assert await caps([one, two], identity="bob") == [True, True]
        one.limits.release_cap("ada")
        await one.link.command("PING")
        assert await caps([two, two, one]) == [True, False, False]
        for node, number in ((one, 1), (two, 2)):
            for _ in range(number):
                node.limits.release_cap("ada")
        for node in (one, two):
            node.limits.release_cap("bob")
            await node.link.command("PING")
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            assert client.keys(f"{PREFIX}:cap:*") == []
        assert not one.limits._counts
        assert not two.limits._counts


async def test_of_many_who_come_at_once_as_many_as_may_be_get_in(redis_url: str) -> None:
    async with fleet(redis_url, 2) as nodes:
        found: list[bool] = []

        async def come(node: Node) -> None:
            found.append(await node.limits.take_cap("ada", 5))

        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(come, nodes[number % 2])
        assert found.count(True) == 5
        for node in nodes:
            await node.link.command("PING")
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            counts = {key.decode(): value for key, value in client.hgetall(f"{PREFIX}:cap:{{ada}}").items()}
        held = {node.nodes.generation: node.limits._counts["ada"].number for node in nodes if node.limits._counts}
        assert {key: b"1 %d" % number for key, number in held.items() if number} == counts
        assert sum(held.values()) == 5


async def test_what_a_dead_node_had_does_not_count(redis_url: str, short_lives: None) -> None:
    async with fleet(redis_url, 1) as [node]:
        dead = Node(redis_url)
        await dead.start()
        assert await caps([dead, dead, dead, node]) == [True, True, True, False]
        await until(lambda: node.nodes.settled, "a node that may judge")
        assert await caps([node]) == [False], "it lives"
        await dead.die()
        await until(lambda: not node.nodes.alive(dead.nodes.generation), "the death known")
        assert await caps([node, node, node, node]) == [True, True, True, False]
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            assert client.hgetall(f"{PREFIX}:cap:{{ada}}") == {node.nodes.generation.encode(): b"1 3"}


async def test_while_redis_is_away_each_node_counts_its_own_and_then_says_so(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 2) as [one, two]:
        assert await caps([one, one, two]) == [True, True, True]
        assert await caps([two], identity="gone") == [True]
        own_redis.kill()
        await one.up(False)
        await two.up(False)
        assert await caps([one, one, two, two, two]) == [True, False, True, True, False]
        two.limits.release_cap("ada")
        two.limits.release_cap("gone")
        assert await caps([one, two], identity="dan") == [True, True]
        one.limits.release_cap("dan")
        one.limits.sweep()
        own_redis.start()
        await one.up()
        await two.up()
        await until(lambda: one.nodes.held and two.nodes.held, "the leases")
        await until(lambda: one.limits._times > 1 and two.limits._times > 1, "both told that it is back")
        for node in (one, two):
            node.limits.sweep()
            await node.link.command("PING")
        with redis.Redis.from_url(own_redis.url, protocol=2) as client:
            found = {key.decode(): sorted(client.hvals(key)) for key in client.keys(f"{PREFIX}:cap:*")}
        assert found == {f"{PREFIX}:cap:{{ada}}": [b"1 2", b"1 3"], f"{PREFIX}:cap:{{dan}}": [b"1 1"]}
        assert await caps([one, two]) == [False, False]


async def test_counts_survive_a_redis_that_has_forgotten_them(redis_url: str, redis_server: RedisServer) -> None:
    async with fleet(redis_url, 2) as [one, two]:
        assert await caps([one, one, two]) == [True, True, True]
        redis_server.ask("FLUSHALL")
        with anyio.fail_after(10):
            while not {b"1 2", b"1 1"} <= {*redis_server.ask("HVALS", f"{PREFIX}:cap:{{ada}}")}:
                for node in (one, two):
                    node.limits.sweep()
                await anyio.sleep(0.05)
        assert await caps([one, two]) == [False, False]


async def test_a_count_is_said_again_before_it_is_forgotten(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        async with fleet(redis_url, 1) as [node]:
            await caps([node])
            key = f"{PREFIX}:cap:{{ada}}"
            assert 24 < client.pttl(key) / 3600_000 <= 25
            pass_time(client, 13 * 3600)
            node.limits.sweep()
            await node.link.command("PING")
            assert client.pttl(key) / 3600_000 < 13, "it was said lately, as far as the node knows"
            node.limits._counts["ada"].at -= 13 * 3600
            node.limits.sweep()
            await node.link.command("PING")
            assert client.pttl(key) / 3600_000 > 24
            before = calls(redis_url, "hset")
            node.limits.sweep()
            await node.link.command("PING")
            assert calls(redis_url, "hset") == before


async def test_one_who_gave_up_while_redis_was_asked_is_not_counted(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 2) as [one, two]:
        await caps([one], identity="bob")
        own_redis.pause()
        for identity in ("ada", "bob"):
            with anyio.move_on_after(0.02) as scope:
                await one.limits.take_cap(identity, 2)
            assert scope.cancelled_caught
        own_redis.resume()
        await one.up()
        one.limits.sweep()
        await one.link.command("PING")
        assert await caps([two, two], 2) == [True, True]
        assert await caps([two, two], 2, "bob") == [True, False]
        assert {name: count.number for name, count in one.limits._counts.items()} == {"bob": 1}


async def test_a_count_that_may_not_have_arrived_is_said_again(own_redis: RedisServer) -> None:
    async with fleet(own_redis.url, 1) as [node]:
        assert await caps([node, node]) == [True, True]
        assert await caps([node], identity="bob") == [True]
        own_redis.pause()
        node.limits.release_cap("ada")
        node.limits.release_cap("bob")
        await node.up(False)
        own_redis.resume()
        await node.up()
        node.limits.sweep()
        await node.link.command("PING")
        assert own_redis.ask("HVALS", f"{PREFIX}:cap:{{ada}}") == [b"1 1"]
        assert own_redis.ask("EXISTS", f"{PREFIX}:cap:{{bob}}") == 0
        assert list(node.limits._counts) == ["ada"]


async def test_a_cap_that_is_run_twice_counts_once(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [node]:
        for args, found in (
            ([1, "a", 1, 2, 60_000], [1]),
            ([1, "b", 1, 2, 60_000], [1]),
            ([1, "a", 2, 2, 60_000], [0, b"b"]),
            ([1, "a", 2, 2, 60_000, "b"], [1]),
        ):
            for _ in range(2):
                assert await node.link.call(CAP, [b"t:cap:{k}"], args) == found
        assert await node.link.command("HGETALL", b"t:cap:{k}") == [b"a", b"1 2"]


# Clients of two nodes.


@pytest.fixture(autouse=True)
def limits_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Realtime, "limits", property(lambda self: self._backend.limits), raising=False)


def backend(node: Node) -> Any:
    """Everything in memory but what is under test."""
    return memory(grace=0, now=time.monotonic)._replace(limits=node.limits, ledger=node.ledger)


@asynccontextmanager
async def stages(url: str, endpoint: Any, size: int = 2, **settings: Any) -> AsyncIterator[list[Stage]]:
    """An app with ``endpoint`` on each of so many nodes."""
    async with fleet(url, size) as nodes, anyio.create_task_group():
        made = [Stage(endpoint, backend=backend(node), **settings) for node in nodes]
        if size == 1:
            async with made[0]:
                yield made
        else:
            async with made[0], made[1]:
                yield made


async def answers(client: Talk, count: int) -> list[str]:
    """What so many events are answered, said one after the other."""
    said = [await client.ask("event", event="echo") for _ in range(count)]
    return [each.get("code", "reply") for each in said]


async def test_a_person_on_two_nodes_has_one_budget(redis_url: str) -> None:
    made = board(limits=[RateLimit("5/hour", per="user")])
    async with stages(redis_url, made) as [one, two]:
        async with one.talk("ada") as here, two.talk("ada") as there, two.talk("bob") as bob:
            assert await answers(here, 3) == ["reply"] * 3
            assert await answers(there, 4) == ["reply"] * 2 + ["rate_limited"] * 2
            refused = await here.ask("event", event="echo")
            assert refused["code"] == "rate_limited"
            assert refused["temporary"]
            assert 700_000 < refused["retry_after_ms"] <= 720_000
            assert await answers(bob, 5) == ["reply"] * 5


async def test_a_person_of_a_plain_client_too_and_in_order(redis_url: str) -> None:
    class Echo(RealtimeEndpoint):
        limits = [RateLimit("5/hour", per="user"), RateLimit("100/hour", per="ip"), RateLimit("50/hour")]

        async def on_connect(self, websocket: Any) -> None:
            await websocket.accept()

        async def on_receive(self, websocket: Any, data: Any) -> None:
            await self.push(data)

    async with stages(redis_url, Echo) as [one, two]:
        async with one.plain("ada") as here, two.plain("ada") as there:
            for number in range(3):
                await here.send_json(number)
            assert [await here.receive_json() for _ in range(3)] == [0, 1, 2]
            for number in range(4):
                await there.send_json(number)
            heard = [await there.receive_json() for _ in range(4)]
            assert heard[:2] == [0, 1]
            assert [each["code"] for each in heard[2:]] == ["rate_limited"] * 2


async def test_a_batch_stops_at_what_another_node_has_used_up(redis_url: str) -> None:
    made = board(limits=[RateLimit("5/hour", per="user")])
    async with stages(redis_url, made) as [one, two], one.talk("ada") as here, two.talk("ada") as there:
        assert await answers(here, 4) == ["reply"] * 4
        await there.say(*(echo(ref) for ref in range(4)))
        assert await there.answers(0, 1, 2, 3) == {0: "reply", 1: "rate_limited", 2: "skipped", 3: "skipped"}


async def test_the_bytes_of_a_message_are_paid_once_and_on_all_nodes(redis_url: str) -> None:
    made = board(limits=[RateLimit("1000/hour", per="user", unit="bytes")])
    async with stages(redis_url, made) as [one, two], one.talk("ada") as here, two.talk("ada") as there:
        await here.say(*(echo(ref, "x" * 100) for ref in range(4)))
        assert set((await here.answers(0, 1, 2, 3)).values()) == {"reply"}
        with redis.Redis.from_url(redis_url, protocol=2) as client:
            [key] = client.keys(f"{PREFIX}:l:*")
            assert 600 < client.pttl(key) / 3600 < 800
        assert (await there.ask("event", event="echo", data="x" * 600))["code"] == "rate_limited"
        assert (await there.ask("event", event="echo", data="x" * 50))["type"] == "reply"


async def test_the_limit_of_an_event_and_of_a_whisper_is_shared(redis_url: str) -> None:
    @event("count", limit=RateLimit("2/hour", per="user"))
    async def count(self: Any) -> int:
        return 1

    whispers = {"typing": Whisper(bool, limit=RateLimit("2/hour", per="user"))}
    async with stages(redis_url, board(count, whispers=whispers)) as [one, two]:
        async with one.talk("ada") as here, two.talk("ada") as there:
            assert (await here.ask("event", event="count"))["type"] == "reply"
            found = [await there.ask("event", event="count") for _ in range(2)]
            assert [each.get("code") for each in found] == [None, "rate_limited"]
            for client in (here, there):
                await client.get("join", group="board")
            said = {"group": "board", "event": "typing", "data": True}
            assert (await here.ask("whisper", **said))["type"] == "reply"
            found = [await there.ask("whisper", **said) for _ in range(2)]
            assert [each.get("code") for each in found] == [None, "rate_limited"]


@pytest.mark.parametrize("fail_open", [True, False])
async def test_while_redis_is_away_this_node_alone_limits_or_nothing_passes(
    own_redis: RedisServer, fail_open: bool
) -> None:
    made = board(limits=[RateLimit("5/hour", per="user")])
    async with stages(own_redis.url, made) as [one, two], one.talk("ada") as here, two.talk("ada") as there:
        stores = [stage.rt._backend.limits for stage in (one, two)]
        assert await answers(here, 1) == ["reply"]
        for store in stores:
            store.fail_open = fail_open
        own_redis.kill()
        if fail_open:
            assert await answers(here, 5) == ["reply"] * 4 + ["rate_limited"]
            assert await answers(there, 6) == ["reply"] * 5 + ["rate_limited"]
        else:
            found = await here.ask("event", event="echo")
            assert (found["code"], found["temporary"]) == ("unavailable", True)
            assert await answers(there, 1) == ["unavailable"]


async def test_an_event_says_that_it_was_handled_once_on_its_node_only(own_redis: RedisServer) -> None:
    ran: list[int] = []

    @event("count")
    async def count(self: Any) -> int:
        ran.append(1)
        return len(ran)

    async with stages(own_redis.url, board(count)) as [one, two], one.talk("ada") as here, two.talk("ada") as there:
        assert await here.ask("event", event="count", id="a") == {"type": "reply", "ref": 1, "data": 1}
        assert (await there.ask("event", event="count", id="a"))["data"] == 1
        own_redis.kill()
        assert await here.ask("event", event="count", id="b") == {
            **{"type": "reply", "ref": 2, "data": 2},
            "once": "node",
        }
        assert (await here.ask("event", event="count", id="b"))["data"] == 2
        assert (await there.ask("event", event="count", id="b"))["data"] == 3, "nobody could know"
        assert (await here.ask("event", event="count"))["data"] == 4


@asynccontextmanager
async def capped(url: str, per_user: int) -> AsyncIterator[list[tuple[Starlette, Node]]]:
    """Two nodes that take so many connections of one person."""

    class Whoami(RealtimeEndpoint):
        async def on_connect(self, websocket: Any) -> None:
            if self.user.identity == "refused":
                return
            await websocket.accept()
            await self.push(self.user.identity)

    async with fleet(url) as nodes:
        made = []
        for node in nodes:
            rt = Realtime(backend=backend(node))
            limits = ConnectionLimits(per_user=per_user)
            middleware = [Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens, connections=limits)]
            made.append((Starlette(routes=[WebSocketRoute("/ws", Whoami)], middleware=middleware), node))
        yield made


async def come(app: Starlette, name: str = "ada") -> int:
    """Come and go; return the status of the answer."""
    try:
        async with connect(app, "/ws", token=token(name)) as client:
            await client.receive_json()
            return 101
    except Refused as refused:
        return refused.status


async def test_a_person_has_as_many_connections_on_two_nodes_as_on_one(redis_url: str) -> None:
    async with capped(redis_url, 1) as [(one, node), (two, other)]:
        async with connect(one, "/ws", token=token("ada")) as client:
            assert await client.receive_json() == "ada"
            assert await come(two) == await come(one) == 429
            assert await come(two, "bob") == 101
        await settled(node)
        assert await come(two) == 101
        await settled(other)
        assert await come(one) == 101
        for _ in range(3):
            assert await come(one, "refused") == 403
        assert not node.limits._counts
        assert not other.limits._counts


async def settled(node: Node) -> None:
    """Until the node has said that the connection is over."""
    await until(lambda: not node.limits._counts, "the slot given back")
    await node.link.command("PING")


async def test_a_guest_has_no_cap_and_no_budget_of_a_person(redis_url: str) -> None:
    made = board(limits=[RateLimit("1/hour", per="user")])
    async with stages(redis_url, made, 1) as [one], one.talk() as guest:
        before = spent(redis_url)
        assert await answers(guest, 5) == ["reply"] * 5
        assert spent(redis_url) == before
