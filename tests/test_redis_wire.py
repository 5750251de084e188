"""One open connection to Redis: taken from redis-py, written at once, read answer by answer.

The law of this file: a real server where there is something to say; one of the test's own where bytes must come that
no Redis says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from starlette_rt.backends.redis.connection import connections_of
from starlette_rt.backends.redis.wire import RedisError, Refusal, Refused, Wire, answers, opened, pack
from tests.redises import RedisServer, every_redis_server, every_redis_url, redis_server, redis_url
from tests.servers import HOST
from tests.test_redis_pipe import SOON, anyio_backend, until
from tests.wires import Wire as Line
from tests.wires import free_port

__all__ = ["anyio_backend", "every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]


class Told:
    """What a wire tells its owner."""

    def __init__(self, wire: Wire) -> None:
        self.answers: list[Any] = []
        self.lost = self.rooms = 0
        wire.on_answer, wire.on_lost, wire.on_room = self.answers.append, self._end, self._make_room

    def _end(self) -> None:
        self.lost += 1

    def _make_room(self) -> None:
        self.rooms += 1


@asynccontextmanager
async def wired(url: str) -> AsyncIterator[Wire]:
    make, _ = connections_of(url)
    with anyio.fail_after(SOON):
        wire = await opened(make)
    try:
        yield wire
    finally:
        wire.drop()
        await until(lambda: wire.lost, "closed")


async def ask(wire: Wire, *commands: tuple[Any, ...]) -> list[Any]:
    with anyio.fail_after(SOON):
        return await answers(wire, [pack(command) for command in commands])


@asynccontextmanager
async def saying(said: bytes) -> AsyncIterator[str]:
    """A server that lets everybody in and answers PING with ``said``."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(said if b"PING" in data else b"+OK\r\n" * data.count(b"CLIENT"))
        writer.close()

    async with await asyncio.start_server(say, HOST, 0) as server:
        yield f"redis://{HOST}:{server.sockets[0].getsockname()[1]}/0"


def test_a_command_is_an_array_of_its_words() -> None:
    assert (
        pack(("SET", b"k\xff", 10, "é", 0.5))
        == b"*5\r\n$3\r\nSET\r\n$2\r\nk\xff\r\n$2\r\n10\r\n$2\r\n\xc3\xa9\r\n$3\r\n0.5\r\n"
    )


async def test_what_is_asked_is_answered_in_its_order_and_a_refusal_is_an_answer(every_redis_url: str) -> None:
    async with wired(every_redis_url) as wire:
        found = await ask(wire, ("SET", "k", b"\0\xff"), ("GET", "k"), ("INCR", "k"), ("NONSENSE",), ("MGET", "k", "n"))
        assert found[:2] == [b"OK", b"\0\xff"]
        assert found[4] == [b"\0\xff", None]
        assert [type(each) for each in found[2:4]] == [Refusal] * 2
        assert found[2].word == "ERR"
        assert (await ask(wire, ("EVALSHA", "0" * 40, 0)))[0].word == "NOSCRIPT"
        assert not wire.lost


async def test_an_answer_may_come_in_pieces_of_any_size(redis_server: RedisServer, redis_url: str) -> None:
    big = b"x" * 3_000_000
    with Line(redis_server.port) as line:
        async with wired(redis_server.url_through(line.port)) as wire:
            assert await ask(wire, ("SET", "k", big), ("GET", "k"), ("ECHO", b"\r\n")) == [b"OK", big, b"\r\n"]


async def test_who_writes_more_than_goes_out_is_told_that_it_is_full_and_that_there_is_room_again() -> None:
    with RedisServer() as server:
        async with wired(server.url) as wire:
            told = Told(wire)
            server.pause()
            assert not wire.full
            wire.write([pack(("ECHO", b"x" * 20_000_000))])
            assert wire.full
            assert told.rooms == 0
            server.resume()
            await until(lambda: told.answers, "answered")
            assert not wire.full
            assert told.rooms == 1


@pytest.mark.parametrize("reset", [False, True], ids=["politely", "with a reset"])
async def test_the_end_of_a_connection_is_told_once(redis_server: RedisServer, redis_url: str, reset: bool) -> None:
    with Line(redis_server.port) as line:
        async with wired(redis_server.url_through(line.port)) as wire:
            told = Told(wire)
            line.drop(reset)
            await until(lambda: told.lost, "told")
            assert wire.lost
            wire.write([pack(("PING",))])  # nobody hears it, and it is no error
            await anyio.lowlevel.checkpoint()
            assert (told.lost, told.answers) == (1, [])
            with pytest.raises(OSError, match="closed"):
                await ask(wire, ("PING",))


async def test_a_connection_that_ends_while_it_is_asked_answers_with_an_error(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Line(redis_server.port) as line:
        async with wired(redis_server.url_through(line.port)) as wire:
            line.hold("down")
            asked = asyncio.ensure_future(ask(wire, ("PING",)))
            await anyio.lowlevel.checkpoint()
            line.drop()
            with pytest.raises(OSError, match="closed"):
                await asked


async def test_one_that_is_dropped_says_nothing_more(redis_server: RedisServer, redis_url: str) -> None:
    async with wired(redis_url) as wire:
        told = Told(wire)

        def stop(answer: Any) -> None:
            told.answers.append(answer)
            wire.drop()

        wire.on_answer = stop
        wire.write([pack(("PING",))] * 10)
        await until(lambda: told.lost, "lost")
        assert told.answers == [b"PONG"]


async def test_bytes_that_are_no_answers_end_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with saying(b"+one\r\nHTTP/1.1 400 Bad Request\r\n") as url, wired(url) as wire:
        told = Told(wire)
        wire.write([pack(("PING",))])
        await until(lambda: told.lost, "lost")
        assert told.answers == [b"one"]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# Opening.


async def test_one_that_is_not_let_in_is_refused_and_leaves_nothing_open() -> None:
    with RedisServer(rules="~* &* +@all") as server:
        for url in (f"redis://app:wrong@{HOST}:{server.port}/0", f"{server.url[:-1]}99"):
            make, _ = connections_of(url)
            with pytest.raises(Refused):
                await opened(make)
        await until(lambda: clients(server) == 1, "nobody but who asks")


def clients(server: RedisServer) -> int:
    found: int = server.info("clients")["connected_clients"]
    return found


async def test_where_nobody_listens_it_is_an_error_of_the_network() -> None:
    make, _ = connections_of(f"redis://{HOST}:{free_port()}/0")
    with pytest.raises(RedisError, match="connecting"):
        await opened(make)


async def test_one_that_is_given_up_while_it_opens_leaves_nothing_open(redis_server: RedisServer) -> None:
    with Line(redis_server.port) as line:
        line.hold("down")
        make, _ = connections_of(redis_server.url_through(line.port).replace("/0", "/1"))
        with pytest.raises(TimeoutError), anyio.fail_after(0.05):
            await opened(make)
        line.mend()
        await until(lambda: not line.open, "closed")
