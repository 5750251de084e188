"""The connection that says and asks: one write a turn, one order, and what becomes of it when Redis is away.

The law of this file: real servers, and a line to them that can be disturbed. A pipe whose ``patience`` is long does not
open its breaker, so that what a broken connection does can be seen by itself, also on a machine that is too busy; the
others have the patience of a process. How often Redis has read is what Redis says.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import sha1
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from starlette_rt.backends.redis import pipe as pipes
from starlette_rt.backends.redis.connection import connections_of
from starlette_rt.backends.redis.pipe import PATIENCE, Pipe, Script
from starlette_rt.backends.redis.wire import Argument
from starlette_rt.exceptions import ConfigurationError, Unavailable
from starlette_rt.loop import Tasks, tasks
from tests.redises import RedisServer, every_redis_server, every_redis_url, redis_server, redis_url
from tests.servers import HOST
from tests.wires import Wire, free_port

__all__ = ["every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]

SOON = 10.0  # seconds for what has to happen and takes no time of its own
LONG = 30.0  # the patience of a pipe that shall not give up


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Either loop: how a connection ends, and when it is full, is theirs to say."""
    if request.param:
        pytest.importorskip("uvloop")
    return "asyncio", {"use_uvloop": request.param}


async def until(look: Callable[[], Any], what: str, within: float = SOON) -> None:
    """Wait until ``look()`` is true, which fails after a while."""
    try:
        with anyio.fail_after(within):
            while not look():  # noqa: ASYNC110 - Redis is asked, or a state looked at
                await anyio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"after {within:g} s there was still not {what}")


class Written(Script):
    """A script of the test's own."""

    def __init__(self, body: str) -> None:
        self.name, self.body = "written", body.encode()
        self.sha = sha1(self.body, usedforsecurity=False).hexdigest().encode()


APPEND = Written("redis.call('RPUSH', KEYS[1], ARGV[1]) return tonumber(ARGV[1])")


class Piped:
    """A running pipe, and what it has told."""

    def __init__(self, url: str, patience: float, scripts: Sequence[Script]) -> None:
        self.told: list[str] = []
        self.tasks: Tasks = tasks()
        make, _ = connections_of(url)
        self.pipe = Pipe(
            make,
            self.tasks,
            scripts,
            self.opened,
            lambda: self.told.append("up"),
            lambda: self.told.append("down"),
            patience=patience,
        )

    async def opened(self) -> None:
        self.told.append("opened")

    async def ask(self, *words: Argument) -> Any:
        with anyio.fail_after(SOON):
            return await self.pipe.ask(words)

    async def append(self, number: int, script: Script = APPEND) -> Any:
        return await self.ask("EVALSHA", script.sha, 1, "list", number)

    def asked(self, *numbers: int) -> list[asyncio.Task[Any]]:
        """Append all of them, in one turn of the loop."""
        return [asyncio.ensure_future(self.append(number)) for number in numbers]

    async def fails(self, because: str = "") -> None:
        with pytest.raises(Unavailable, match=because):
            await self.ask("PING")

    def fails_at_once(self) -> None:
        """Whoever asks now waits for nothing at all."""
        with pytest.raises(Unavailable):
            self.pipe.ask(("PING",)).send(None)

    async def up(self, is_up: bool = True) -> None:
        await until(lambda: self.pipe.up is is_up, f"up={is_up}")


@asynccontextmanager
async def piped(url: str, *, patience: float = LONG, scripts: Sequence[Script] = (APPEND,)) -> AsyncIterator[Piped]:
    made = Piped(url, patience, scripts)
    try:
        await made.pipe.start()
        yield made
    finally:
        await made.pipe.stop()
        await made.tasks.close(0.0)


def numbers(server: RedisServer) -> list[int]:
    """What was appended."""
    return [int(each) for each in server.ask("LRANGE", "list", 0, -1)]


# One order, one write.


async def test_what_is_asked_is_answered_and_what_is_said_is_done(every_redis_url: str) -> None:
    async with piped(every_redis_url) as it:
        assert it.pipe.say("SET", "k", b"\0\xff")
        assert await it.ask("GET", b"k") == b"\0\xff"
        assert await it.ask("INCRBY", "n", 5) == 5
        assert await it.ask("GET", "nothing") is None
        assert await it.ask("MGET", "k", "n") == [b"\0\xff", b"5"]
        assert it.told == ["opened", "up"]


async def test_what_is_said_in_one_turn_leaves_as_one_write(every_redis_url: str) -> None:
    async with piped(every_redis_url) as it:
        assert await reads_for(it, together=True) == 1
        assert await reads_for(it, together=False) == 50


async def reads_for(it: Piped, *, together: bool) -> int:
    """How often Redis has read for fifty commands."""
    before = await reads(it)
    if together:
        await asyncio.gather(*(it.ask("INCR", "n") for _ in range(50)))
    else:
        for _ in range(50):
            await it.ask("INCR", "n")
    return await reads(it) - before - 1  # the last is that of the question


async def reads(it: Piped) -> int:
    lines = (await it.ask("INFO", "stats")).decode().splitlines()
    return int(next(line.partition(":")[2] for line in lines if line.startswith("total_reads_processed:")))


async def test_answers_come_in_the_order_of_the_calls(redis_url: str) -> None:
    came: list[int] = []

    async def ask() -> None:
        came.append(await it.ask("INCR", "n"))

    async with piped(redis_url) as it:
        async with anyio.create_task_group() as group:
            for number in range(1000):
                if number % 3:
                    it.pipe.say("SET", "other", number)
                group.start_soon(ask)
                if not number % 100:
                    await anyio.lowlevel.checkpoint()
    assert came == list(range(1, 1001))


async def test_what_is_made_when_it_is_written_is_made_late(redis_url: str) -> None:
    word = "early"
    async with piped(redis_url) as it:
        asked = asyncio.ensure_future(it.pipe.ask(lambda: ("ECHO", word)))
        await asyncio.sleep(0)
        word = "late"
        assert await asked in (b"late", b"early")  # by the turn in which it was written
        word = "later"
        assert await it.pipe.ask(lambda: ("ECHO", word)) == b"later"


async def test_who_gives_up_disturbs_nobody(redis_url: str) -> None:
    async with piped(redis_url) as it:
        asked = it.asked(*range(10))
        await asyncio.sleep(0)
        asked[3].cancel()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(found.pop(3), asyncio.CancelledError)
        assert found == [0, 1, 2, 4, 5, 6, 7, 8, 9]


async def test_a_flush_waits_for_what_was_said(redis_server: RedisServer, redis_url: str) -> None:
    async with piped(redis_url) as it:
        with anyio.fail_after(SOON):
            await it.pipe.flushed(SOON)  # nothing was said
            for number in range(100):
                it.pipe.say("RPUSH", "list", number)
            await it.pipe.flushed(SOON)
        assert numbers(redis_server) == list(range(100))


async def test_a_flush_waits_no_longer_than_it_may() -> None:
    with RedisServer() as server:
        async with piped(server.url) as it:
            server.pause()
            it.pipe.say("RPUSH", "list", 1)
            with anyio.fail_after(SOON):
                await it.pipe.flushed(0.01)
            server.resume()
            with anyio.fail_after(SOON):
                await it.pipe.flushed(SOON)
            assert numbers(server) == [1]


async def test_a_stop_fails_what_is_not_answered_and_nothing_is_said_after_it() -> None:
    lost: list[str] = []
    with RedisServer() as server:
        async with piped(server.url) as it:
            server.pause()
            asked = asyncio.ensure_future(it.ask("PING"))
            it.pipe.say("PING", lost=lambda: lost.append("said"))
            await asyncio.sleep(0)
            await it.pipe.stop()
            with pytest.raises(Unavailable, match="stopped"):
                await asked
            assert lost == ["said"]
            assert not it.pipe.say("PING", lost=lambda: lost.append("never"))
            it.fails_at_once()
            server.resume()
    assert lost == ["said"]


# A connection that breaks.


@pytest.mark.parametrize("reset", [False, True], ids=["politely", "with a reset"])
async def test_what_was_on_its_way_is_said_again_in_its_order(
    redis_server: RedisServer, redis_url: str, reset: bool
) -> None:
    with Wire(redis_server.port) as wire:
        async with piped(redis_server.url_through(wire.port)) as it:
            wire.hold("down")
            asked = it.asked(*range(50))
            await until(lambda: len(numbers(redis_server)) == 50, "all of them in Redis")
            later = it.asked(*range(50, 60))
            await asyncio.sleep(0)
            wire.drop(reset)
            wire.mend()
            assert await asyncio.gather(*asked, *later) == list(range(60))
            assert it.told == ["opened", "up", "opened"]  # for who asks it was never away
    heard = numbers(redis_server)
    assert heard[:50] == list(range(50))
    assert heard[-60:] == list(range(60))


async def test_what_is_asked_while_it_is_cut_is_answered_later(redis_server: RedisServer, redis_url: str) -> None:
    with Wire(redis_server.port) as wire:
        async with piped(redis_server.url_through(wire.port)) as it:
            wire.drop()
            assert await asyncio.gather(*it.asked(*range(50))) == list(range(50))
    assert numbers(redis_server) == list(range(50))


async def test_what_is_asked_between_two_connections_comes_behind_what_was_on_its_way(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "CONNECT", LONG)
    with Wire(redis_server.port) as wire:
        async with piped(redis_server.url_through(wire.port)) as it:
            wire.hold("down")
            asked = it.asked(*range(50))
            await until(lambda: len(numbers(redis_server)) == 50, "all of them in Redis")
            wire.drop()
            await until(lambda: wire.accepted == 2, "the next connection")
            asked += it.asked(*range(50, 60))
            await anyio.sleep(0.02)  # many turns, of which none may write
            wire.mend()
            assert await asyncio.gather(*asked) == list(range(60))
    assert numbers(redis_server)[50:] == list(range(60))


async def test_what_may_have_been_lost_is_told_once_and_what_was_answered_is_not() -> None:
    lost: list[str] = []
    with RedisServer() as server:
        async with piped(server.url, patience=PATIENCE) as it:
            it.pipe.say("PING", lost=lambda: lost.append("answered"))
            await it.ask("PING")
            server.pause()
            for name in "abc":
                it.pipe.say("PING", lost=lambda name=name: lost.append(name))  # type: ignore[misc]
            await it.up(False)
            assert lost == ["a", "b", "c"]
            assert not it.pipe.say("PING", lost=lambda: lost.append("refused"))
            server.resume()
            await it.up()
            await it.ask("PING")
    assert lost == ["a", "b", "c"]


# Redis is away.


async def test_a_redis_that_stands_still_is_away_and_comes_back_by_itself() -> None:
    with RedisServer() as server:
        async with piped(server.url, patience=PATIENCE) as it:
            server.pause()
            asked = it.asked(*range(20))
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(each) for each in found] == [Unavailable] * 20
            assert "has not answered" in it.pipe.trouble
            assert not it.pipe.up
            it.fails_at_once()
            server.resume()
            await it.up()
            assert it.pipe.trouble == ""
            assert await it.append(99) == 99
            assert it.told == ["opened", "up", "down", "opened", "up"]


async def test_a_line_that_swallows_everything_is_seen_and_so_is_its_mending(redis_server: RedisServer) -> None:
    with Wire(redis_server.port) as wire:
        async with piped(redis_server.url_through(wire.port), patience=PATIENCE) as it:
            wire.swallow()
            await it.fails("has not answered")
            tried = wire.accepted
            await until(lambda: wire.accepted > tried, "another attempt")
            it.fails_at_once()
            wire.mend()
            await it.up()
            assert await it.ask("PING") == b"PONG"


async def test_a_connection_that_breaks_and_has_no_heir_in_time_is_an_outage(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with piped(redis_server.url_through(wire.port), patience=PATIENCE) as it:
            wire.hold("down")
            asked = it.asked(*range(10))
            await until(lambda: len(numbers(redis_server)) == 10, "all of them in Redis")
            wire.drop()
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(each) for each in found] == [Unavailable] * 10
            it.fails_at_once()
            wire.mend()
            await it.up()
            assert await it.append(10) == 10
    assert numbers(redis_server) == list(range(11))  # who was refused is not said again


async def test_who_flushes_when_redis_goes_does_not_wait_on() -> None:
    with RedisServer() as server:
        async with piped(server.url, patience=PATIENCE) as it:
            server.pause()
            it.pipe.say("PING")
            with anyio.fail_after(SOON):
                await it.pipe.flushed(LONG)
            assert not it.pipe.up
            server.resume()


async def test_a_redis_that_dies_and_is_started_again_is_found() -> None:
    with RedisServer() as server:
        async with piped(server.url) as it:
            first = it.pipe.run_id
            assert first == server.info("server")["run_id"]
            await anyio.to_thread.run_sync(server.kill)
            await it.up(False)
            await it.fails("cannot be reached")
            await anyio.to_thread.run_sync(server.start)
            await it.up()
            assert await it.append(1) == 1  # its scripts are loaded again
            assert it.pipe.run_id not in ("", first)


async def test_a_redis_that_is_away_at_the_start_is_found_later() -> None:
    with RedisServer() as server:
        await anyio.to_thread.run_sync(server.stop)
        async with piped(server.url) as it:
            assert not it.pipe.up
            it.fails_at_once()
            assert it.told == []  # who never came does not go
            await anyio.to_thread.run_sync(server.start)
            await it.up()
            assert await it.append(1) == 1
            assert it.told == ["opened", "up"]


async def test_a_stall_of_our_own_loop_is_no_outage(redis_url: str) -> None:
    async with piped(redis_url, patience=PATIENCE) as it:
        asked = it.asked(*range(10))
        await asyncio.sleep(0)
        time.sleep(4 * PATIENCE)  # noqa: ASYNC251 - a handler that blocks
        assert await asyncio.gather(*asked) == list(range(10))
        asked = it.asked(*range(10))
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        time.sleep(4 * PATIENCE)  # noqa: ASYNC251
        assert await asyncio.gather(*asked) == list(range(10))
        assert it.told == ["opened", "up"]


async def test_an_answer_that_comes_right_after_a_stall_is_not_too_late(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with piped(redis_server.url_through(wire.port), patience=PATIENCE) as it:
            wire.hold("down")
            asked = it.asked(*range(10))
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            time.sleep(4 * PATIENCE)  # noqa: ASYNC251 - a handler that blocks
            threading.Timer(PATIENCE / 5, wire.mend).start()
            assert await asyncio.gather(*asked) == list(range(10))
            assert it.told == ["opened", "up"]


# Redis refuses.


def through(server: RedisServer, who: str = "", database: int = 0) -> str:
    return f"redis://{who}{HOST}:{server.port}/{database}"


async def test_a_redis_that_does_not_let_us_in_is_an_error_that_says_what_to_see_to(redis_server: RedisServer) -> None:
    with RedisServer(rules="~* &* +@all -script") as closed:
        for url in (
            through(closed, "app:wrong@"),
            through(closed),
            closed.url,
            through(redis_server, database=99),
        ):
            with pytest.raises(ConfigurationError, match=r"redis refuses: .* see to the URL, the user"):
                async with piped(url):
                    pass


async def test_one_that_may_do_what_it_must_is_let_in() -> None:
    with RedisServer(rules="~* &* +@all -@admin -@dangerous") as server:
        async with piped(server.url) as it:
            assert await it.append(1) == 1
            assert it.pipe.run_id == ""  # INFO is dangerous


async def test_a_refusal_is_the_trouble_of_one_caller(every_redis_server: RedisServer, every_redis_url: str) -> None:
    fails = Written("return redis.error_reply('MINE no')")
    async with piped(every_redis_url, scripts=(APPEND, fails)) as it:
        good, bad, wrong, last = (
            it.append(1),
            it.append(2, fails),
            it.ask("INCR", "list"),
            it.append(3),
        )
        found = await asyncio.gather(good, bad, wrong, last, return_exceptions=True)
        assert (found[0], found[3]) == (1, 3)
        assert [type(each) for each in found[1:3]] == [Unavailable] * 2
        assert "MINE no" in str(found[1])
        assert it.pipe.say("INCR", "list")  # nobody wants to know
        every_redis_server.ask("CONFIG", "SET", "maxmemory", 1)
        try:
            with pytest.raises(Unavailable, match="maxmemory"):
                await it.append(4)
            assert await it.ask("PING") == b"PONG"
        finally:
            every_redis_server.ask("CONFIG", "SET", "maxmemory", 0)
        assert await it.append(5) == 5
        assert it.told == ["opened", "up"]
    assert numbers(every_redis_server) == [1, 3, 5]


async def test_who_is_no_master_any_more_is_left_for_a_new_connection() -> None:
    with RedisServer() as master, RedisServer() as server:
        async with piped(server.url) as it:
            first = await it.ask("CLIENT", "ID")
            await anyio.to_thread.run_sync(server.follow, master)
            reading = await it.ask("CLIENT", "ID")
            assert reading == first  # who only reads does not see it
            refused, ping = it.append(1), it.ask("CLIENT", "ID")
            found = await asyncio.gather(refused, ping, return_exceptions=True)
            assert isinstance(found[0], Unavailable)
            assert found[1] != first  # it was asked again
            await anyio.to_thread.run_sync(server.promote)
            assert await it.append(2) == 2
            assert numbers(server) == [2]


# Scripts.


async def test_scripts_that_redis_forgets_are_loaded_again_and_the_order_is_kept(
    every_redis_server: RedisServer, every_redis_url: str
) -> None:
    async with piped(every_redis_url) as it:
        early = it.asked(*range(25))
        it.pipe.say("SCRIPT", "FLUSH")  # between them, whatever of it is on its way
        late = it.asked(*range(25, 50))
        await asyncio.sleep(0)
        later = it.asked(*range(50, 60))
        early[-1].add_done_callback(lambda _: later.extend(it.asked(*range(60, 70))))
        await asyncio.gather(*early)
        await asyncio.sleep(0)
        assert await asyncio.gather(*early, *late, *later) == list(range(70))
        assert it.told == ["opened", "up"]
    heard = numbers(every_redis_server)
    assert heard[:60] == list(range(60))
    assert heard[60:] == list(range(60, 70))


async def test_what_is_newer_waits_until_what_met_no_script_is_said_again(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with piped(redis_url) as it:
        redis_server.ask("SCRIPT", "FLUSH")
        asked = it.asked(*range(10))
        waits = asyncio.ensure_future(it.ask("BLPOP", "nothing", 0.2))  # their answers are here before this one
        await until(lambda: len(it.pipe._repeat) == 10, "all without a script")
        newer = asyncio.ensure_future(it.ask("RPUSH", "list", 10))
        assert await asyncio.gather(*asked, newer) == [*range(10), 11]
        await waits
    assert numbers(redis_server) == list(range(11))


async def test_scripts_that_are_forgotten_again_and_again_are_loaded_again_and_again(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with piped(redis_url) as it:
        for number in range(50):
            redis_server.ask("SCRIPT", "FLUSH")
            assert await it.append(number) == number
    assert numbers(redis_server) == list(range(50))


async def test_scripts_that_may_not_be_loaded_any_more_are_the_trouble_of_who_calls_them() -> None:
    with RedisServer(rules="~* &* +@all") as server:
        async with piped(server.url) as it:
            server.ask("ACL", "SETUSER", "app", "-script")
            server.ask("SCRIPT", "FLUSH")
            with pytest.raises(Unavailable, match="script"):
                await it.append(1)
            assert await it.ask("PING") == b"PONG"
            server.ask("ACL", "SETUSER", "app", "+script")
            assert await it.append(2) == 2


# The clock.


def clock_of(server: RedisServer) -> int:
    seconds, microseconds = server.ask("TIME")
    return int(seconds) * 1000 + int(microseconds) // 1000


async def test_the_clock_of_redis_is_known_and_never_ahead_of_it(redis_server: RedisServer, redis_url: str) -> None:
    async with piped(redis_url) as it:
        before = clock_of(redis_server)
        assert before - SOON * 1000 < it.pipe.now_ms() <= clock_of(redis_server)


async def test_a_clock_that_was_set_is_read_again(redis_server: RedisServer, redis_url: str) -> None:
    async with piped(redis_url) as it:
        for hours in (-1, 1):
            it.pipe._ahead += hours * 3600_000
            assert abs(it.pipe.now_ms() - clock_of(redis_server)) > 3000_000
            await it.pipe.look_at_clock()
            assert abs(it.pipe.now_ms() - clock_of(redis_server)) < SOON * 1000


async def test_nobody_answers_on_a_port_where_nobody_listens() -> None:
    async with piped(f"redis://{HOST}:{free_port()}/0") as it:
        await it.fails("cannot be reached")
