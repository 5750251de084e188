"""Publications between the nodes of one Redis; with real servers that stand still, die, forget and come back.

The law of this file: a node here is a `Link` with its broker, as a process has them; several of them stand in one
test. What every broker guarantees is asked by the tests of test_backends.py. That nothing more arrives is shown by
something that is said afterwards and has arrived. Time that has to pass in Redis is taken from its keys.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import redis

from starlette_rt.backends.base import Published
from starlette_rt.backends.redis import broker as brokers
from starlette_rt.backends.redis.broker import NUMBERS, ON_TIME, QUEUE, SCRIPTS, Heard, RedisBroker, envelope_of, pack
from starlette_rt.backends.redis.connection import Link
from starlette_rt.backends.redis.pipe import PATIENCE
from starlette_rt.exceptions import Unavailable
from starlette_rt.frames import encode
from starlette_rt.history import EPOCH_TTL, IDS_TTL, SEEN, History, Position, Publication
from tests import test_backends as contract
from tests.redises import RedisServer, cluster, every_redis_server, every_redis_url, redis_server, redis_url
from tests.test_redis_connection import GROUPS, silence
from tests.test_redis_pipe import LONG, SOON, until
from tests.wires import Wire

__all__ = ["every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]

PREFIX = "t"
HISTORY = History(100, 60)
FENCE = "fence"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Node:
    """What one process has of the things under test, and what it was given to deliver.

    With the ``patience`` of a process it takes a Redis that stands still to be away, which where nothing is to be away
    only a machine that is too busy would be.
    """

    def __init__(self, source: Any, prefix: str = PREFIX, patience: float = LONG) -> None:
        self._patience = patience
        self.link = Link(source, prefix=prefix, scripts=SCRIPTS)
        self.broker = RedisBroker(self.link)
        self.delivered: list[Publication] = []
        self.resumptions = 0
        self._fences = count()
        self._fenced = -1

    async def start(self, *groups: str) -> None:
        await self.broker.start(self._take, self._resumed)
        self.link._pipe._patience = self._patience
        await self.hear(FENCE, *groups)

    async def stop(self) -> None:
        await self.broker.stop()

    def _take(self, publication: Publication) -> None:
        if publication.group != FENCE:
            self.delivered.append(publication)
        elif publication.event == str(id(self)):
            self._fenced = publication.data

    def _resumed(self) -> None:
        self.resumptions += 1

    async def hear(self, *groups: str) -> None:
        for group in groups:
            self.broker.subscribe(group)
        if self.link.up:
            for group in groups:
                await self.broker.subscribed(group)

    async def say(self, data: Any, group: str = "a", history: History | None = None, **fields: Any) -> Published:
        with anyio.fail_after(SOON):
            return await self.broker.publish(publication(data, group, **fields), history)

    async def keep(self, data: Any, group: str = "a", **fields: Any) -> Position:
        """Say it in a group with history, and return its place."""
        published = await self.say(data, group, HISTORY, **fields)
        assert published.shared == "yes"
        assert published.position is not None
        return published.position

    async def settle(self) -> None:
        """Return when everything said until now by this node, and what Redis has taken from others, is here."""
        number = next(self._fences)
        await until(lambda: self.link._subscriber.up, "heard")
        with anyio.fail_after(SOON):
            await self.broker.publish(Publication(FENCE, str(id(self)), number, b""), HISTORY)
        await until(lambda: self._fenced >= number, "what was said last")

    def words(self, group: str = "a") -> list[Any]:
        return [each.data for each in self.delivered if each.group == group]

    async def up(self, is_up: bool = True) -> None:
        await until(lambda: self.link.up is is_up and (not is_up or not self.link.trouble), f"up={is_up}")

    async def known(self, peers: int) -> None:
        """Wait until it knows that so many hear."""
        await self.link.gathered(peers, SOON)
        await until(lambda: self.link.peers >= peers, f"{peers} who hear")

    async def flushed(self) -> None:
        """Wait until what is said leaves at once again."""
        await until(lambda: not self.broker._held, "what waits has left")


def publication(data: Any, group: str = "a", event: str = "said", **fields: Any) -> Publication:
    return Publication(group, event, data, encode(data), **fields)


@asynccontextmanager
async def fleet(*sources: Any, patience: float = LONG) -> AsyncIterator[list[Node]]:
    """Start one node for each source, all of which hear the group ``a``, and stop them."""
    async with AsyncExitStack() as stack:
        made = [Node(source, patience=patience) for source in sources]
        for node in made:
            await node.start("a")
            stack.push_async_callback(node.stop)
        yield made


def at_once(call: Coroutine[Any, Any, Published]) -> Published:
    """Return what ``call`` returns without ever waiting."""
    with pytest.raises(StopIteration) as stopped:
        call.send(None)
    found: Published = stopped.value.value
    return found


# What every broker guarantees.


def pass_time(client: redis.Redis, seconds: float) -> None:
    """Let everything in Redis be so much older."""
    for key in client.scan_iter(f"{PREFIX}:*"):
        left = client.pttl(key)
        assert left > 0, f"{key!r} lives for ever"
        client.pexpire(key, left - round(seconds * 1000))


class RedisStage(contract.Stage):
    """One node on Redis, whose keys grow older as the test says."""

    def __init__(self, node: Node, client: redis.Redis) -> None:
        super().__init__()
        self.node, self.client = node, client
        self.backend = contract.Backend(node.broker, None, None, None)  # type: ignore[arg-type]
        self.delivered = node.delivered

    async def start(self) -> None:
        await self.node.start("a", "b")

    async def stop(self) -> None:
        await self.node.stop()

    async def settled(self) -> None:
        await self.node.settle()

    async def pass_time(self, seconds: float) -> None:
        pass_time(self.client, seconds)


@pytest.fixture
async def stage(every_redis_url: str) -> AsyncIterator[RedisStage]:
    """One node of a Redis of each version; what the tests of the contract ask for."""
    with redis.Redis.from_url(every_redis_url, protocol=2) as client:
        yield RedisStage(Node(every_redis_url), client)


test_a_publication_arrives_whole = contract.test_a_publication_arrives_whole_and_is_shared
test_publications_arrive_in_the_order_of_the_calls = contract.test_publications_arrive_in_the_order_of_the_calls
test_nothing_arrives_before_the_start = contract.test_nothing_arrives_before_the_start_or_after_the_stop
test_with_history_it_arrives_in_the_chain = contract.test_with_history_a_publication_arrives_with_its_place_in_the_chain
test_a_read_tells_what_a_log_keeps = contract.test_a_read_tells_where_the_log_ends_and_what_it_keeps
test_the_epoch_is_made_by_the_first = contract.test_the_epoch_is_made_by_the_first_who_asks
test_what_a_log_keeps_goes_after_its_time = contract.test_what_a_log_keeps_goes_after_its_time_and_its_end_stays
test_a_new_epoch_is_begun_once = contract.test_a_new_epoch_is_begun_once_for_all_who_saw_the_same_end
test_with_history_a_repetition_is_known = (
    contract.test_with_history_what_was_published_before_arrives_once_and_gets_the_same_answer
)
test_without_history_a_repetition_is_known = contract.test_without_history_what_a_client_caused_arrives_once


def test_everything_that_a_broker_guarantees_is_asked_here() -> None:
    source = inspect.getsource(contract)
    section = source[source.index("\n# Broker\n") : source.index("\n# Presence\n")]
    functions = [node for node in ast.parse(section).body if isinstance(node, ast.AsyncFunctionDef)]
    asked = {id(value) for name, value in globals().items() if name.startswith("test_")}
    tests = [node.name for node in functions if node.name.startswith("test_")]
    assert len(tests) >= 10
    assert [name for name in tests if id(getattr(contract, name)) not in asked] == []


# Two nodes, no history.


async def test_what_one_node_says_arrives_at_the_other_in_its_order(every_redis_url: str) -> None:
    async with fleet(every_redis_url, every_redis_url) as (one, two):
        await two.hear("b")
        for number in range(300):
            assert await one.say(number, "ab"[number % 2]) == Published(None, "yes")
            await two.say(-number)
            if not number % 50:
                await anyio.lowlevel.checkpoint()
        await one.settle()
        await two.settle()
        await one.settle()
        for node in (one, two):
            assert [word for word in node.words() if word > 0] == list(range(2, 300, 2))
            assert [word for word in node.words() if word < 0] == [-number for number in range(1, 300)]
        assert two.words("b") == list(range(1, 300, 2))


async def test_the_members_here_have_it_at_once_and_once() -> None:
    with RedisServer() as server:
        async with fleet(server.url, patience=PATIENCE) as [one]:
            assert at_once(one.broker.publish(publication(1), None)) == Published(None, "yes")
            assert one.words() == [1]
            await one.settle()
            assert one.words() == [1]  # what comes back is our own
            server.pause()
            assert at_once(one.broker.publish(publication(2), None)) == Published(None, "yes")  # nobody knows yet
            assert one.words() == [1, 2]
            await one.up(False)
            assert at_once(one.broker.publish(publication(3), None)) == Published(None, "queued")
            assert one.words() == [1, 2, 3]
            server.resume()


PUBLICATIONS = {
    "the least": publication(None),
    "data": publication({"ключ": [1, -1.5, True, None, "👋\0", 2**63 - 1, -(2**63), {}]}),
    "bytes": publication({"file": b"\0\xff" * 100, "more": [b""]}),
    "excluded": publication(1, exclude="session"),
    "ephemeral": publication(1, ephemeral=True, key="k"),
    "named": publication(1, id="an id", once=True),
    "a whisper": publication({"x": 1}, ephemeral=True, exclude="s", key="ada", sender="ada", expires_ms=3000),
    "its end": Publication("a", "typing", None, b"", "s", ephemeral=True, sender="ada", stop=True),
}


@pytest.mark.parametrize("history", [None, HISTORY], ids=["without history", "with history"])
@pytest.mark.parametrize("name", PUBLICATIONS)
async def test_everything_that_a_publication_is_arrives(redis_url: str, name: str, history: History | None) -> None:
    said = PUBLICATIONS[name]
    async with fleet(redis_url, redis_url) as (one, two):
        await one.broker.publish(said, history)
        await one.settle()
        await two.settle()
        for node in (one, two):
            [heard] = node.delivered
            assert (heard.offset, heard.prev) == ((1, "") if history else (None, ""))
            assert strip(heard) == said
        if history:
            assert list(map(strip, (await two.broker.read("a", HISTORY)).entries)) == [said]


def strip(heard: Publication) -> Publication:
    """Return ``heard`` without its place."""
    fields = {name: getattr(heard, name) for name in heard.__struct_fields__}
    return Publication(**{**fields, "offset": None, "tag": "", "prev": ""})


async def test_a_group_is_heard_until_it_was_given_up_as_often(redis_url: str) -> None:
    async with fleet(redis_url, redis_url) as (one, two):
        await two.hear("a")
        two.broker.unsubscribe("a")
        await one.say("heard")
        await one.say("elsewhere", "b")
        await two.settle()
        two.broker.unsubscribe("a")
        await two.settle()
        await one.say("unheard")
        await one.settle()
        await two.settle()
        assert [each.data for each in two.delivered] == ["heard"]


@pytest.mark.parametrize("group", GROUPS)
async def test_a_group_may_have_any_name(redis_url: str, group: str) -> None:
    async with fleet(redis_url, redis_url) as (one, two):
        await two.hear(group)
        await one.say(1, group)
        place = await one.keep(2, group)
        await two.settle()
        assert two.words(group) == [1, 2]
        assert [each.group for each in two.delivered] == [group] * 2
        assert (await two.broker.read(group, HISTORY)).position == place
        for other in {*GROUPS} - {group}:
            assert (await two.broker.position(other, HISTORY)).offset == 0


async def test_other_prefixes_and_databases_are_other_fleets(redis_url: str) -> None:
    async with fleet(redis_url, redis_url.removesuffix("0") + "1") as (one, two):
        three = Node(redis_url, prefix="u")
        await three.start("a")
        await one.say(1)
        assert (await one.keep(2)).offset == 1
        for node in (one, two, three):
            await node.settle()
        assert (await two.broker.position("a", HISTORY)).offset == 0
        assert (await three.broker.position("a", HISTORY)).offset == 0
        assert (one.words(), two.words(), three.words()) == ([1, 2], [], [])
        await three.stop()


async def test_who_hears_what_is_known_to_all(redis_url: str) -> None:
    async with fleet(redis_url, redis_url) as (one, two):
        await two.hear("b")
        asked = one.broker.subscribed_elsewhere
        assert await asked(["a", "b", "c"]) == {"a", "b"}
        assert await asked([]) == set()
        await two.stop()
        assert await asked({"a", "b", "c"}) == {"a"}
        await one.stop()
        with pytest.raises(Unavailable):
            await asked(["a"])
        await one.start()
        await two.start()


# What cannot be read.


async def test_what_is_of_an_unknown_format_is_skipped_and_the_one_before_is_read(
    redis_server: RedisServer, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    letter = pack(envelope_of(publication("old")))
    async with fleet(redis_url) as [one]:
        channel, log = one.link.group_key("a", "b"), one.link.group_key("a", "l")
        await one.keep("kept")
        for start in (b"9", b"2", b"x", b""):
            redis_server.ask("PUBLISH", channel, start + b":node 1 " + letter)
            redis_server.ask("PUBLISH", channel, start + b"@1 tag prev " + letter)
        redis_server.ask("RPUSH", log, b"9@2 what do I know")
        redis_server.ask("PUBLISH", channel, b"0:node 1 " + letter)
        await one.settle()
        assert one.words() == ["kept", "old"]
        assert [each.data for each in (await one.broker.read("a", HISTORY)).entries] == ["kept"]
        assert [record for record in caplog.records if record.levelname != "INFO"] == []


async def test_what_is_no_message_of_ours_is_logged_and_harms_nobody(
    redis_server: RedisServer, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet(redis_url, redis_url) as (one, two):
        channel = one.link.group_key("a", "b")
        for junk in (b"1:node", b"1:node x y", b"1:node 1 \xff", b"1@", b"1@x y z \xff", b"", b"1"):
            redis_server.ask("PUBLISH", channel, junk)
        await two.say(1)
        await two.settle()
        await one.settle()
        assert one.words() == [1]
        assert one.resumptions == 0
        assert "could not be taken" in caplog.text


def test_a_number_is_heard_once_as_far_back_as_it_is_remembered() -> None:
    heard = Heard()
    assert [heard.is_new(number) for number in (5, 5, 3, 3, 4, 6, 5)] == [True, False, True, False, True, True, False]
    assert heard.is_new(6 + NUMBERS - 1)
    assert not heard.is_new(6)  # the oldest that is remembered
    assert heard.is_new(7)
    assert not heard.is_new(1)  # too far back to be sure
    assert heard.is_new(10 * NUMBERS)
    assert not heard.is_new(6 + NUMBERS - 1)
    assert heard.is_new(10 * NUMBERS - 1)
    assert heard._bits < 1 << NUMBERS


# Redis is away.


async def test_what_is_said_while_redis_is_away_arrives_later_in_its_order_and_once() -> None:
    with RedisServer() as server:
        async with fleet(server.url, server.url, patience=PATIENCE) as (one, two):
            await one.known(2)
            server.pause()
            await one.up(False)
            await two.up(False)
            assert [(await one.say(number)).shared for number in range(5)] == ["queued"] * 5
            assert (await one.say("cursor", ephemeral=True)).shared == "no"
            assert one.words() == [0, 1, 2, 3, 4, "cursor"]
            server.resume()
            await one.up()
            for number in range(5, 10):  # behind what has waited
                await one.say(number)
            await one.flushed()
            assert (await one.say(10)).shared == "yes"
            await until(lambda: 10 in two.words(), "the last one")
            assert two.words() == list(range(11))


async def test_what_has_waited_is_said_when_the_others_hear_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "GATHER", LONG)
    with RedisServer() as server, Wire(server.port) as wire:
        async with fleet(server.url, server.url_through(wire.port)) as (one, two):
            await one.known(2)
            await anyio.to_thread.run_sync(server.kill)
            await one.up(False)
            wire.cut()
            await one.say("waits")
            await anyio.to_thread.run_sync(server.start)
            await one.up()
            assert (await one.say("behind it")).shared == "queued"
            wire.mend()
            await until(lambda: two.words() == ["waits", "behind it"], "both")
            await one.flushed()
            await two.up()


async def test_what_waits_waits_on_where_redis_goes_again_before_the_others_hear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(brokers, "GATHER", LONG)
    with RedisServer() as server, Wire(server.port) as wire:
        async with fleet(server.url, server.url_through(wire.port), patience=PATIENCE) as (one, two):
            await one.known(2)
            wire.cut()
            for word in ("first", "second"):
                server.pause()
                await one.up(False)
                assert (await one.say(word)).shared == "queued"
                server.resume()
                await one.up()
            assert (await one.say("third")).shared == "queued"
            wire.mend()
            await two.up()
            await until(lambda: "third" in two.words(), "heard")
            await one.flushed()
            await one.settle()
            await two.settle()
            assert two.words() == ["first", "second", "third"]


async def test_who_does_not_come_back_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "GATHER", 0.05)
    with RedisServer() as server, Wire(server.port) as wire:
        async with fleet(server.url, server.url, server.url_through(wire.port)) as (one, two, gone):
            await one.known(3)
            wire.cut()
            await anyio.to_thread.run_sync(server.kill)
            await one.up(False)
            await two.up(False)
            await one.say("waits")
            await anyio.to_thread.run_sync(server.start)
            await one.up()
            await one.flushed()
            await two.up()
            assert (await one.say("at once")).shared == "yes"
            await until(lambda: "at once" in two.words(), "heard")
            assert gone.words() == []
            wire.mend()


async def test_what_is_said_before_redis_was_ever_there_arrives_too() -> None:
    with RedisServer() as server, Wire(server.port) as wire:
        wire.cut()
        async with fleet(server.url, server.url_through(wire.port)) as (two, one):
            assert not one.link.up
            assert one.broker.troubles()
            assert (await one.say(1)).shared == "queued"
            with pytest.raises(Unavailable):
                await one.keep(2)
            wire.mend()
            await one.up()
            await one.flushed()
            assert (await one.say(3)).shared == "yes"
            await one.settle()
            await two.settle()
            assert two.words() == one.words() == [1, 3]
            assert one.broker.troubles() == []


async def test_what_waits_is_bounded_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer() as server:
        async with fleet(server.url, server.url, patience=PATIENCE) as (one, two):
            await one.known(2)
            server.pause()
            await one.up(False)
            told = [(await one.say(number)).shared for number in range(QUEUE + 10)]
            assert told == ["queued"] * QUEUE + ["no"] * 10
            with monkeypatch.context() as time:
                time.setattr(brokers, "QUEUE_TTL", -1.0)  # it has passed
                one.broker.sweep()
            assert (await one.say("late")).shared == "queued"
            server.resume()
            await one.up()
            await one.flushed()
            await one.settle()
            await two.up()
            await two.settle()
            assert two.words() == ["late"]


async def test_where_nobody_is_away_nothing_is_swept(redis_url: str) -> None:
    async with fleet(redis_url, redis_url) as (one, two):
        assert [(await one.say(number)).shared for number in range(QUEUE + 10)] == ["yes"] * (QUEUE + 10)
        one.broker.sweep()
        await one.settle()
        await two.settle()
        assert two.words() == list(range(QUEUE + 10))


async def test_what_is_said_again_because_a_connection_broke_arrives_once(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with fleet(redis_server.url_through(wire.port), redis_url) as (one, two):
            wire.hold("down")
            for number in range(20):
                await one.say(number, id=str(number), once=number % 2 == 0)
            kept = asyncio.ensure_future(one.keep("kept", id="i"))
            await until(lambda: "kept" in two.words(), "heard")
            assert two.words() == [*range(20), "kept"]
            seen = redis_server.info("commandstats")["cmdstat_publish"]["calls"]
            wire.drop()
            wire.mend()
            place = await kept
            await one.settle()
            await two.settle()
            assert redis_server.info("commandstats")["cmdstat_publish"]["calls"] >= seen + 10  # it was said again
            assert two.words() == [*range(20), "kept"]
            assert (await two.broker.read("a", HISTORY)).position == place


async def test_what_may_have_been_lost_when_redis_went_is_said_again_and_arrives_once(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with fleet(redis_server.url_through(wire.port), redis_url, patience=PATIENCE) as (one, two):
            wire.hold("down")
            for number in range(20):
                await one.say(number, id=str(number), once=number % 2 == 0)
            await one.say("cursor", ephemeral=True)
            await until(lambda: "cursor" in two.words(), "heard")
            await one.up(False)
            assert (await one.say("later")).shared == "queued"
            wire.mend()
            await one.up()
            await one.flushed()
            await one.settle()
            await two.settle()
            assert two.words() == [*range(20), "cursor", "later"]


async def test_what_was_lost_when_redis_went_arrives_later() -> None:
    with RedisServer() as server, Wire(server.port) as wire:
        async with fleet(server.url_through(wire.port), server.url, patience=PATIENCE) as (one, two):
            wire.swallow("up")
            for number in range(20):
                assert (await one.say(number)).shared == "yes"
            assert (await one.say("cursor", ephemeral=True)).shared == "yes"
            await one.up(False)
            wire.mend()
            await one.up()
            await one.flushed()
            await one.settle()
            await two.settle()
            assert two.words() == list(range(20))


async def test_one_that_was_cut_off_is_told_that_it_may_have_missed_something(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with fleet(redis_url) as [one]:
        await one.say(1)
        assert one.resumptions == 0
        redis_server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: one.resumptions == 1, "told")
        await one.up()
        await one.settle()
    redis_server.ask("PING")
    assert one.resumptions == 1


# What a client has caused, on whichever node.


async def test_what_a_client_caused_on_two_nodes_arrives_once(redis_url: str) -> None:
    async with fleet(redis_url, redis_url, redis_url, redis_url) as (one, two, three, listener):
        three.broker.unsubscribe("a")  # it does not hear what the others say there
        await three.settle()
        for node in (one, two, three):
            assert (await node.say("x", id="i", once=True)).shared == "yes"
            await node.settle()
            await two.settle()
        await one.say("own", id="j")
        await one.say("own", id="j")  # the host's own words are never a repetition
        await one.say("x", "b", id="i", once=True)
        await one.say("y", id="k", once=True)
        await one.settle()
        for node in (listener, two):
            await node.settle()
            assert node.words() == ["x", "own", "own", "y"]


async def test_who_hears_later_does_not_hear_again_what_was_said_before(redis_url: str) -> None:
    async with fleet(redis_url, redis_url) as (one, two):
        two.broker.unsubscribe("a")  # it does not know that it was said
        await two.settle()
        await one.say("x", id="i", once=True)
        await one.settle()
        async with fleet(redis_url) as [later]:
            await two.say("x", id="i", once=True)
            await two.say("y", id="j", once=True)
            await two.settle()
            await later.settle()
            assert later.words() == ["y"]


async def test_that_it_was_said_is_forgotten_after_its_time(redis_server: RedisServer, redis_url: str) -> None:
    async with fleet(redis_url) as [one]:
        await one.say("x", id="i", once=True)
        await one.settle()
        [mark] = redis_server.ask("KEYS", f"{PREFIX}:*o:*")
        assert 0 < redis_server.ask("PTTL", mark) <= brokers.ONCE_TTL


# With history.


async def test_all_nodes_have_one_log_and_hear_it_in_its_order(every_redis_url: str) -> None:
    async with fleet(every_redis_url, every_redis_url, every_redis_url) as (one, two, three):

        async def say(node: Node, name: str) -> None:
            for number in range(30):
                await node.keep(f"{name}{number}")

        async with anyio.create_task_group() as group:
            group.start_soon(say, one, "one")
            group.start_soon(say, two, "two")
        for node in (one, two, three):
            await node.settle()
        assert one.delivered == two.delivered == three.delivered
        assert [each.offset for each in one.delivered] == list(range(1, 61))
        assert [each.prev for each in one.delivered] == ["", *(each.tag for each in one.delivered[:-1])]
        for name in ("one", "two"):
            assert [word for word in one.words() if word.startswith(name)] == [
                f"{name}{number}" for number in range(30)
            ]
        reading = await three.broker.read("a", HISTORY)
        assert list(reading.entries) == one.delivered
        assert reading.position == await one.broker.position("a", HISTORY)


async def test_what_was_refused_because_redis_stood_still_is_heard_by_nobody() -> None:
    with RedisServer() as server:
        async with fleet(server.url, server.url, patience=PATIENCE) as (one, two):
            first = await one.keep("first")
            await two.settle()
            server.pause()
            found = await asyncio.gather(*(one.keep(number) for number in range(5)), return_exceptions=True)
            assert [type(each) for each in found] == [Unavailable] * 5
            with pytest.raises(Unavailable):
                one.broker.publish(publication("at once"), HISTORY).send(None)
            server.resume()
            await one.up()
            await two.up()
            second = await one.keep("second")
            assert (second.epoch, second.offset) == (first.epoch, 2)
            await one.settle()
            await two.settle()
            assert one.words() == two.words() == ["first", "second"]
            assert [each.data for each in (await two.broker.read("a", HISTORY)).entries] == ["first", "second"]


async def test_what_comes_too_late_after_a_broken_connection_is_refused_and_heard_by_nobody(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with fleet(redis_server.url_through(wire.port), redis_url) as (one, two):
            for late in (False, True):
                wire.hold("up")
                said = asyncio.ensure_future(one.keep(late))
                await anyio.lowlevel.checkpoint()
                over = one.link.now_ms() + (2 * ON_TIME if late else 0)
                await until(lambda: one.link.now_ms() > over, "over")  # noqa: B023
                wire.drop()
                wire.mend()
                if late:
                    with pytest.raises(Unavailable, match="nobody has got it"):
                        await said
                else:
                    await asyncio.wait([said], timeout=SOON)
            await one.settle()
            await two.settle()
            assert True not in two.words()
            assert (await one.keep("next")).offset <= 2


async def test_a_clock_that_was_set_costs_one_refusal(redis_url: str) -> None:
    async with fleet(redis_url) as [one]:
        one.link._pipe._ahead -= 3600_000  # as if that of Redis had been put forward
        with pytest.raises(Unavailable, match="too long"):
            await one.keep(1)
        assert (await one.keep(2)).offset == 1
        await one.settle()
        assert one.words() == [2]


@pytest.mark.parametrize("begun", [False, True], ids=["in a new log", "in one that has begun"])
async def test_a_redis_that_is_full_refuses_what_is_kept_and_nobody_gets_it(
    every_redis_server: RedisServer, every_redis_url: str, begun: bool
) -> None:
    redis_server = every_redis_server
    async with fleet(every_redis_url, every_redis_url) as (one, two):
        if begun:
            await one.broker.position("a", HISTORY)
        redis_server.ask("CONFIG", "SET", "maxmemory", 1)
        try:
            with pytest.raises(Unavailable, match="maxmemory"):
                await one.keep("kept")
            with pytest.raises(Unavailable, match="maxmemory"):
                await one.broker.read("new", HISTORY)
            with pytest.raises(Unavailable, match="maxmemory"):
                await one.broker.renew("new", HISTORY, Position("", 0, ""))
            assert (await one.say("said")).shared == "yes"
            assert (await one.say("caused", id="i", once=True)).shared == "yes"
            assert one.broker.troubles() == []
            await until(lambda: "caused" in two.words(), "heard")
        finally:
            redis_server.ask("CONFIG", "SET", "maxmemory", 0)
        await one.settle()
        await two.settle()
        assert one.words() == two.words() == ["said", "caused"]


async def test_a_restart_begins_a_new_epoch_where_the_log_ends_once_for_all() -> None:
    with RedisServer(keep=True) as server:
        async with fleet(server.url, server.url) as (one, two):
            before = [await one.keep(number) for number in range(3)][-1]
            assert await two.broker.position("a", HISTORY) == before
            assert (await two.broker.read("a", HISTORY)).position == before
            await anyio.to_thread.run_sync(server.restart)
            await one.up()
            await two.up()
            after = await one.broker.position("a", HISTORY)
            assert (after.offset, after.tag) == (before.offset, before.tag)
            assert after.epoch != before.epoch
            reading = await two.broker.read("a", HISTORY)
            assert reading.position == after
            assert [each.data for each in reading.entries] == [0, 1, 2]
            place = await two.keep(3)
            assert (place.epoch, place.offset) == (after.epoch, 4)


async def test_who_publishes_first_after_a_restart_begins_the_new_epoch() -> None:
    with RedisServer(keep=True) as server:
        async with fleet(server.url) as [one]:
            before = await one.keep(0)
            await anyio.to_thread.run_sync(server.restart)
            await one.up()
            after = await one.keep(1)
            assert after.offset == 2
            assert after.epoch != before.epoch
            assert await one.broker.position("a", HISTORY) == after


async def test_where_the_name_of_the_run_may_not_be_asked_a_restart_is_not_seen() -> None:
    with RedisServer(keep=True, options={"user": "mute on nopass ~* &* +@all -info"}) as server:
        async with fleet(server.url.replace("//", "//mute:x@")) as [one]:
            before = await one.keep(0)
            await anyio.to_thread.run_sync(server.restart)
            await one.up()
            assert await one.broker.position("a", HISTORY) == before


async def test_a_log_that_is_lost_begins_anew(redis_server: RedisServer, redis_url: str) -> None:
    async with fleet(redis_url, redis_url) as (one, two):
        before = await one.keep(1, id="i")
        redis_server.ask("FLUSHALL")
        again = await one.keep(2, id="i")
        assert again.offset == 1
        assert again.epoch != before.epoch
        await two.settle()
        assert [(each.data, each.offset, each.prev) for each in two.delivered] == [(1, 1, ""), (2, 1, "")]
        assert two.delivered[0].tag != two.delivered[1].tag


async def test_a_log_whose_state_is_lost_loses_the_rest_too(redis_server: RedisServer, redis_url: str) -> None:
    async with fleet(redis_url) as [one]:
        for ask in (one.broker.position, one.broker.read, one.keep, one.broker.renew):
            before = await one.keep(1, id="i")
            redis_server.ask("DEL", one.link.group_key("a", "h"))
            if ask == one.keep:
                after = await one.keep(2, id="i")
                assert after.offset == 1
                assert [each.data for each in (await one.broker.read("a", HISTORY)).entries] == [2]
            elif ask == one.broker.renew:
                after = await one.broker.renew("a", HISTORY, before)
                assert after.offset == 0
            else:
                await ask("a", HISTORY)  # type: ignore[operator]
                after = await one.broker.position("a", HISTORY)
                assert (await one.broker.read("a", HISTORY)).entries == ()
            assert after.epoch != before.epoch
            redis_server.ask("FLUSHALL")


async def test_a_new_epoch_is_made_once_by_all_who_ask_together(redis_url: str) -> None:
    async with fleet(redis_url, redis_url, redis_url) as nodes:
        before = await nodes[0].keep(1)
        after = await asyncio.gather(*(node.broker.renew("a", HISTORY, before) for node in nodes for _ in range(5)))
        assert len(set(map(str, after))) == 1
        assert after[0].epoch != before.epoch
        again = await nodes[1].broker.renew("a", HISTORY, after[0])
        assert again.epoch not in (before.epoch, after[0].epoch)


async def test_a_read_is_no_good_before_what_follows_is_heard(redis_server: RedisServer, redis_url: str) -> None:
    with Wire(redis_server.port) as wire:
        async with fleet(redis_server.url_through(wire.port), redis_url) as (one, two):
            place = await two.keep(1)
            assert silence(wire, redis_server) >= 1
            one.broker.subscribe("b")
            reading = asyncio.ensure_future(one.broker.read("b", HISTORY))
            assert (await one.broker.read("a", HISTORY)).position == place  # that one is heard, as far as we know
            assert (await one.broker.read("c", HISTORY)).position.offset == 0  # that one need not be
            assert not reading.done()
            one.link._subscriber.lose("it is deaf")
            with pytest.raises(Unavailable):
                await reading
            with pytest.raises(Unavailable):
                await one.broker.read("a", HISTORY)
            await one.up()
            assert (await one.broker.read("b", HISTORY)).position.offset == 0


# What is kept, and for how long.


async def test_everything_in_redis_has_an_end(redis_server: RedisServer, redis_url: str) -> None:
    def lives(kind: str) -> float:
        left: int = redis_server.ask("PTTL", one.link.group_key("a", kind))
        return left / 1000

    async with fleet(redis_url) as [one]:
        await one.broker.position("a", HISTORY)
        assert 0 < lives("h") <= HISTORY.ttl  # nothing was ever said in it
        await one.keep(1, id="i")
        assert HISTORY.ttl < lives("h") <= EPOCH_TTL
        assert 0 < lives("l") <= HISTORY.ttl
        assert HISTORY.ttl < lives("i") <= IDS_TTL
        for ask in (one.broker.position, one.broker.read):
            redis_server.ask("PEXPIRE", one.link.group_key("a", "h"), 1000_000)
            redis_server.ask("PEXPIRE", one.link.group_key("a", "l"), 1000)
            await ask("a", HISTORY)
            assert lives("h") > 10_000  # who asks keeps the end of it
            assert lives("l") <= 1  # and not what was said
        long = History(1, 10 * EPOCH_TTL)
        await one.say(1, history=long, id="j")
        assert min(map(lives, "hli")) > 5 * EPOCH_TTL
        for key in redis_server.ask("KEYS", f"{PREFIX}:*"):
            assert redis_server.ask("PTTL", key) > 0


async def test_a_log_keeps_the_last_ones_and_not_much_more(redis_server: RedisServer, redis_url: str) -> None:
    three = History(3, 60)
    async with fleet(redis_url) as [one]:
        for number in range(100):
            await one.say(number, history=three)
        assert redis_server.ask("LLEN", one.link.group_key("a", "l")) < 3 + 20
        assert [each.data for each in (await one.broker.read("a", three)).entries] == [97, 98, 99]
        assert [each.data for each in (await one.broker.read("a", HISTORY)).entries][-1] == 99


async def test_the_last_ids_are_known_and_not_many_more(redis_server: RedisServer, redis_url: str) -> None:
    async with fleet(redis_url) as [one]:
        places = await asyncio.gather(*(one.keep(number, id=f"i{number}") for number in range(2 * SEEN)))
        assert SEEN <= redis_server.ask("ZCARD", one.link.group_key("a", "i")) < SEEN + 20
        assert await one.keep("again", id=f"i{2 * SEEN - 1}") == places[-1]
        assert (await one.keep("again", id=f"i{SEEN + 1}")).offset == SEEN + 2
        assert (await one.keep("anew", id="i0")).offset == 2 * SEEN + 1
        await one.settle()
        assert one.words() == [*range(2 * SEEN), "anew"]


# A cluster.


@pytest.mark.parametrize("name", ["redis", "redis-6.2"])
async def test_every_script_keeps_to_one_slot_and_all_masters_hear(name: str) -> None:
    with cluster(name) as masters:
        async with AsyncExitStack() as stack:
            nodes = {server.port: Node(server.url) for server in masters.servers}
            for node in nodes.values():
                node._fences = count(1)
                await node.broker.start(node._take, node._resumed)
                stack.push_async_callback(node.stop)
                await node.hear("hello", *GROUPS)
            for home in nodes.values():  # the masters have just met, and may not yet speak to each other
                await meets(home, list(nodes.values()))
            for group in GROUPS:
                home = nodes[masters.of(node.link.group_key(group, "h")).port]
                await home.say("once", group, id="i", once=True)
                place = await home.keep("kept", group, id="j")
                assert await home.keep("kept", group, id="j") == place
                assert (await home.broker.read(group, HISTORY)).position == place
                renewed = await home.broker.renew(group, HISTORY, place)
                assert renewed.epoch != place.epoch
                for node in nodes.values():
                    await until(lambda: len(node.words(group)) == 2, f"both in {group!r}")  # noqa: B023
            for node in nodes.values():
                assert all(sorted(node.words(group)) == ["kept", "once"] for group in GROUPS)


async def meets(home: Node, others: list[Node]) -> None:
    """Say something, again and again, until all have heard it."""
    name = home.link.node
    with anyio.fail_after(SOON):
        while not all(name in each.words("hello") for each in others):
            await home.say(name, "hello")
            await anyio.sleep(0.01)


async def test_a_key_of_another_master_is_the_trouble_of_who_asks_for_it() -> None:
    with cluster() as masters:
        async with AsyncExitStack() as stack:
            node = Node(masters.url)
            await node.broker.start(node._take, node._resumed)
            stack.push_async_callback(node.stop)
            places = [await asyncio.gather(node.keep(1, group), return_exceptions=True) for group in GROUPS]
            assert {type(place) for [place] in places} == {Position, Unavailable}
