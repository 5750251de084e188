"""The connection that hears: what is wanted is subscribed, in batches, again after every break, and told when.

The law of this file: real servers; what Redis was told is counted by Redis itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from starlette_rt.backends.redis import subscriber as subscribers
from starlette_rt.backends.redis.connection import connections_of
from starlette_rt.backends.redis.pipe import PAUSES
from starlette_rt.backends.redis.subscriber import BATCH, Subscriber
from starlette_rt.exceptions import Unavailable
from starlette_rt.loop import Tasks, tasks
from tests.redises import RedisServer, every_redis_server, every_redis_url, redis_server, redis_url
from tests.test_redis_pipe import SOON, anyio_backend, until
from tests.wires import Wire

__all__ = ["anyio_backend", "every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]


class Listener:
    """A running subscriber, what it has told, and what it has heard."""

    def __init__(self, url: str) -> None:
        self.ups: list[bool] = []
        self.heard: list[tuple[str, bytes]] = []
        self.tasks: Tasks = tasks()
        self.at_up: Callable[[], Any] = lambda: None
        make, _ = connections_of(url)
        self.subscriber = Subscriber(make, self.tasks, self.came)

    def came(self, lost: bool) -> None:
        self.ups.append(lost)
        self.at_up()

    def want(self, *channels: str) -> None:
        for channel in channels:
            self.subscriber.subscribe(channel.encode(), lambda payload, name=channel: self.hear(name, payload))  # type: ignore[misc]

    def hear(self, channel: str, payload: bytes) -> None:
        self.heard.append((channel, payload))

    def give_up(self, *channels: str) -> None:
        for channel in channels:
            self.subscriber.unsubscribe(channel.encode())

    async def subscribed(self, channel: str) -> None:
        with anyio.fail_after(SOON):
            await self.subscriber.subscribed(channel.encode())

    async def up(self, times: int = 1) -> None:
        await until(lambda: self.subscriber.up and len(self.ups) == times, f"up for the {times}. time")

    async def hears(self, *expected: tuple[str, bytes]) -> None:
        await until(lambda: len(self.heard) >= len(expected), f"{len(expected)} messages")
        assert self.heard == list(expected)
        self.heard.clear()


@asynccontextmanager
async def listening(url: str, *channels: str) -> AsyncIterator[Listener]:
    made = Listener(url)
    made.want(*channels)
    made.subscriber.start()
    try:
        await made.up()
        yield made
    finally:
        made.subscriber.stop()
        await made.tasks.close(0.0)


def say(server: RedisServer, channel: str, payload: bytes = b"!") -> int:
    """Publish, and return how many have heard it."""
    heard: int = server.ask("PUBLISH", channel, payload)
    return heard


def told(server: RedisServer) -> tuple[int, int]:
    """How often Redis was told SUBSCRIBE and UNSUBSCRIBE since this was asked last."""
    stats = server.info("commandstats")
    server.ask("CONFIG", "RESETSTAT")
    subscribe, unsubscribe = (stats.get(f"cmdstat_{verb}", {}).get("calls", 0) for verb in ("subscribe", "unsubscribe"))
    return subscribe, unsubscribe


# What is wanted.


async def test_what_is_said_on_a_channel_is_given_to_who_wants_it_in_its_order(
    every_redis_server: RedisServer, every_redis_url: str
) -> None:
    async with listening(every_redis_url, "a", "b") as it:
        assert it.ups == [False]
        for number in range(5):
            say(every_redis_server, "ab"[number % 2], b"\0\xff%d" % number)
        say(every_redis_server, "c")
        await it.hears(*[("ab"[number % 2], b"\0\xff%d" % number) for number in range(5)])


async def test_what_is_wanted_in_one_turn_is_asked_for_in_batches(
    every_redis_server: RedisServer, every_redis_url: str
) -> None:
    names = [f"c{number}" for number in range(2 * BATCH + 1)]
    async with listening(every_redis_url) as it:
        told(every_redis_server)
        it.want(*names)
        await it.subscribed(names[-1])
        assert len(every_redis_server.ask("PUBSUB", "CHANNELS")) == len(names)
        assert told(every_redis_server) == (3, 0)
        for name in names[:3]:
            it.want(f"more {name}")
            await it.subscribed(f"more {name}")
        assert told(every_redis_server) == (3, 0)
        it.give_up(*names)
        await until(lambda: len(every_redis_server.ask("PUBSUB", "CHANNELS")) == 3, "given up")
        assert told(every_redis_server) == (0, 3)


async def test_what_is_wanted_and_given_up_in_one_turn_is_not_worth_a_word(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with listening(redis_url, "kept") as it:
        told(redis_server)
        it.want("a")
        it.give_up("a")
        it.give_up("kept")
        it.want("kept")
        it.give_up("never wanted")
        await anyio.lowlevel.checkpoint()
        it.want("fence")
        await it.subscribed("fence")
        assert told(redis_server) == (1, 0)
        assert [say(redis_server, name) for name in ("a", "kept", "fence")] == [0, 1, 1]
        await it.hears(("kept", b"!"), ("fence", b"!"))


async def test_what_is_given_up_and_wanted_again_while_it_is_on_its_way_is_heard(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with listening(redis_server.url_through(wire.port)) as it:
            told(redis_server)
            wire.hold("down")
            for act in (it.want, it.give_up, it.want):
                act("a")
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
            waiting = asyncio.ensure_future(it.subscribed("a"))
            await until(lambda: say(redis_server, "a", b"early"), "subscribed")
            assert not waiting.done()
            wire.mend()
            await waiting
            assert told(redis_server) == (1, 0)  # what was taken back before the first was confirmed is not said
            assert say(redis_server, "a", b"late") == 1
            await until(lambda: ("a", b"late") in it.heard, "heard")


async def test_what_is_wanted_one_after_the_other_goes_together_while_redis_has_not_confirmed_the_first(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with listening(redis_server.url_through(wire.port)) as it:
            told(redis_server)
            wire.hold("down")
            for number in range(50):
                it.want(f"g{number}")
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
            wire.mend()
            for number in range(50):
                await it.subscribed(f"g{number}")
            assert told(redis_server) == (2, 0)


async def test_what_arrives_after_it_was_given_up_is_nobodys(redis_server: RedisServer, redis_url: str) -> None:
    with Wire(redis_server.port) as wire:
        async with listening(redis_server.url_through(wire.port), "a", "b") as it:
            wire.hold("down")
            assert say(redis_server, "a") == 1
            it.give_up("a")
            assert not it.subscriber.wants(b"a")
            wire.mend()
            say(redis_server, "b")
            await it.hears(("b", b"!"))


# Waiting for it.


async def test_who_waits_for_a_subscription_waits_until_redis_has_it(redis_server: RedisServer, redis_url: str) -> None:
    with Wire(redis_server.port) as wire:
        async with listening(redis_server.url_through(wire.port)) as it:
            wire.hold("down")
            it.want("a")
            waiting = [asyncio.ensure_future(it.subscribed("a")) for _ in range(2)]
            await until(lambda: say(redis_server, "a"), "subscribed")
            assert not any(each.done() for each in waiting)
            wire.mend()
            await asyncio.gather(*waiting)
            await it.subscribed("a")  # which is known now


async def test_a_subscription_that_is_not_confirmed_is_not_waited_for_without_end(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscribers, "CONFIRM", 0.05)
    with Wire(redis_server.port) as wire:
        async with listening(redis_server.url_through(wire.port)) as it:
            wire.hold("down")
            it.want("a")
            with pytest.raises(Unavailable, match="confirm"):
                await it.subscribed("a")
            wire.mend()
            await until(lambda: say(redis_server, "a"), "subscribed")
            await until(lambda: it.heard, "heard")


async def test_who_waits_while_it_is_lost_is_told_and_who_comes_while_it_is_away(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with listening(redis_server.url_through(wire.port)) as it:
            wire.hold("down")
            it.want("a")
            waiting = asyncio.ensure_future(it.subscribed("a"))
            await anyio.lowlevel.checkpoint()
            wire.cut()
            with pytest.raises(Unavailable, match="away"):
                await waiting
            with pytest.raises(Unavailable, match="away"):
                await it.subscribed("a")
            wire.mend()
            await it.up(2)
            await it.subscribed("a")


# Breaking.


async def test_after_a_break_everything_that_is_wanted_is_subscribed_before_it_is_told(
    every_redis_server: RedisServer, every_redis_url: str
) -> None:
    names = [f"c{number}" for number in range(2 * BATCH + 1)]
    seen: list[tuple[int, int]] = []
    with Wire(every_redis_server.port) as wire:
        async with listening(every_redis_server.url_through(wire.port), *names, "gone") as it:
            there = lambda: len(every_redis_server.ask("PUBSUB", "CHANNELS"))  # noqa: E731
            it.at_up = lambda: seen.append((there(), len(it.subscriber._pending)))
            wire.cut()
            await until(lambda: not it.subscriber.up, "away")
            it.give_up("gone")
            it.want("new")
            wire.mend()
            await it.up(2)
            assert it.ups == [False, True]
            assert seen == [(len(names) + 1, 0)]
            assert [say(every_redis_server, name) for name in ("gone", "new", names[7])] == [0, 1, 1]
            await it.hears(("new", b"!"), (names[7], b"!"))


async def test_one_that_is_killed_by_an_administrator_comes_back(redis_server: RedisServer, redis_url: str) -> None:
    async with listening(redis_url, "a") as it:
        for times in (2, 3):
            assert redis_server.ask("CLIENT", "KILL", "TYPE", "pubsub") == 1
            await it.up(times)
            assert say(redis_server, "a") == 1
            await it.hears(("a", b"!"))
    assert it.ups == [False, True, True]


async def test_one_that_redis_gives_up_because_it_is_too_slow_comes_back() -> None:
    with RedisServer(options={"client-output-buffer-limit": "pubsub 1mb 0 0"}) as server, Wire(server.port) as wire:
        async with listening(server.url_through(wire.port), "a") as it:
            wire.hold("down")
            await until(lambda: not say(server, "a", b"x" * 1_000_000), "given up")
            wire.mend()
            await it.up(2)
            await until(lambda: say(server, "a", b"again"), "subscribed again")
            await until(lambda: ("a", b"again") in it.heard, "heard")


async def test_one_that_is_told_to_begin_again_does(redis_server: RedisServer, redis_url: str) -> None:
    async with listening(redis_url, "a") as it:
        first = redis_server.ask("CLIENT", "LIST", "TYPE", "pubsub")
        it.subscriber.lose("it was said so")
        assert not it.subscriber.up
        it.subscriber.lose("once more")
        await it.up(2)
        assert redis_server.ask("CLIENT", "LIST", "TYPE", "pubsub") != first
        say(redis_server, "a")
        await it.hears(("a", b"!"))


async def test_a_redis_that_is_away_for_a_while_is_heard_again() -> None:
    with RedisServer() as server:
        async with listening(server.url, "a") as it:
            await anyio.to_thread.run_sync(server.kill)
            await until(lambda: not it.subscriber.up, "away")
            assert not await it.subscriber.back(0.0)
            await anyio.to_thread.run_sync(server.start)
            with anyio.fail_after(SOON):
                assert await it.subscriber.back(SOON)
            assert it.ups == [False, True]
            assert say(server, "a") == 1


async def test_a_receiver_that_raises_is_logged_and_the_others_hear(
    redis_server: RedisServer, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(redis_url, "a", "b") as it:
        it.subscriber.subscribe(b"a", lambda payload: 1 // 0)  # type: ignore[arg-type, return-value]
        say(redis_server, "a")
        say(redis_server, "b")
        await it.hears(("b", b"!"))
        assert it.ups == [False]
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    assert "ZeroDivisionError" in caplog.text


async def test_nothing_is_heard_after_the_stop_and_who_waits_is_told(redis_server: RedisServer, redis_url: str) -> None:
    with Wire(redis_server.port) as wire:
        async with listening(redis_server.url_through(wire.port), "a") as it:
            wire.hold("down")
            it.want("b")
            waiting = asyncio.ensure_future(it.subscribed("b"))
            await anyio.lowlevel.checkpoint()
            it.subscriber.stop()
            with pytest.raises(Unavailable):
                await waiting
            wire.mend()
            await until(lambda: not say(redis_server, "a"), "gone")
            assert it.heard == []


# Refused.


async def test_one_that_may_not_hear_says_why_and_tries_again_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def pause(least: float, most: float) -> float:
        pauses.append(most)
        return 0.0

    monkeypatch.setattr(subscribers.random, "uniform", pause)
    with RedisServer(rules="~* +@all resetchannels &mine") as server:
        made = Listener(server.url)
        made.want("mine", "others")
        made.subscriber.start()
        await until(lambda: len(pauses) > len(PAUSES), "several attempts")
        assert pauses[: len(PAUSES)] == list(PAUSES)
        assert "permission" in made.subscriber.refused
        assert not made.subscriber.up
        server.ask("ACL", "SETUSER", "app", "allchannels")
        await made.up()
        assert made.subscriber.refused == ""
        made.subscriber.stop()
        await made.tasks.close(0.0)
