"""What the roles share of one Redis: names that lie in one slot, sources of every kind, and whether it is there.

The law of this file: real servers. A connection that has gone deaf is one whose line swallows what Redis says, and
nothing else of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
import pytest
import redis.asyncio

from starlette_rt.backends.redis import connection as connections
from starlette_rt.backends.redis.connection import Link, connections_of
from starlette_rt.backends.redis.pipe import PATIENCE
from starlette_rt.exceptions import ConfigurationError, Unavailable
from tests.redises import RedisServer, every_redis_server, every_redis_url, redis_server, redis_url
from tests.servers import HOST
from tests.test_redis_pipe import APPEND, LONG, SOON, until
from tests.wires import Wire, free_port

__all__ = ["every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Linked(Link):
    """A link, what it has told, and what it has heard."""

    def __init__(self, source: Any, prefix: str = "t") -> None:
        super().__init__(source, prefix=prefix, scripts=[APPEND])
        self.told: list[str] = []
        self.heard: list[bytes] = []
        self.on_up.append(lambda: self.told.append("up"))
        self.on_down.append(lambda: self.told.append("down"))
        self.on_resumed.append(lambda: self.told.append("resumed"))

    async def listen(self, channel: str = "news") -> None:
        self.subscribe(self.key(channel), self.heard.append)
        with anyio.fail_after(SOON):
            await self.subscribed(self.key(channel))

    async def has_told(self, *words: str) -> None:
        await until(lambda: len(self.told) >= len(words), f"{words}, only {self.told}")
        assert self.told == list(words)

    async def answers(self) -> None:
        with anyio.fail_after(SOON):
            assert await self.command("PING") == b"PONG"


@asynccontextmanager
async def linked(source: Any, prefix: str = "t", *, patience: float = LONG) -> AsyncIterator[Linked]:
    made = Linked(source, prefix)
    await made.start()
    made._pipe._patience = patience
    try:
        yield made
    finally:
        await made.stop()


def silence(wire: Wire, server: RedisServer) -> int:
    """Swallow what Redis says on connections that subscribe, and on no other; return how many there are."""
    ports = {int(line.split("addr=")[1].split(" ")[0].rpartition(":")[2]) for line in listeners(server)}
    deaf = [call for call in wire._calls if call.writers["up"].get_extra_info("sockname")[1] in ports]
    for call in deaf:
        call.writers["down"] = Nowhere(call.writers["down"])  # type: ignore[assignment]
    return len(deaf)


def listeners(server: RedisServer) -> list[str]:
    found: bytes | str = server.ask("CLIENT", "LIST", "TYPE", "pubsub")
    text = found.decode() if isinstance(found, bytes) else found
    return [line for line in text.splitlines() if line]


class Nowhere:
    """One direction of a connection, from which nothing comes out; with ``word``, from that word on."""

    def __init__(self, writer: asyncio.StreamWriter, word: bytes = b"") -> None:
        self._writer, self._word, self._deaf = writer, word, False
        self.transport = writer.transport
        self.get_extra_info = writer.get_extra_info

    def write(self, data: bytes) -> None:
        self._deaf = self._deaf or self._word in data
        if not self._deaf:
            self._writer.write(data)

    async def drain(self) -> None:
        await self._writer.drain()

    def write_eof(self) -> None:
        """The other end does not hear of that either."""


class Unconfirmed(Wire):
    """A line that swallows what Redis says on a connection from its first confirmation on, while it is ``deaf``."""

    deaf = True

    async def _join(self, call: Any, readers: Any) -> None:
        if self.deaf:
            call.writers["down"] = Nowhere(call.writers["down"], b"subscribe")
        await super()._join(call, readers)


# Names.

GROUPS = [
    "a",
    "a b",
    "{a}",
    "{a",
    "a}",
    "}{",
    "{}",
    "{{a}}b",
    "%7Ba%7D",
    "100%",
    "%",
    "a\0b",
    "ключ",
    "👋",
    "a:b",
    "~x:y",
    "\0o",
]


@contextmanager
def slots() -> Iterator[RedisServer]:
    """A server that knows of slots."""
    with RedisServer(options={"cluster-enabled": "yes"}) as server:
        yield server


def test_all_keys_of_a_group_lie_in_one_slot_and_no_two_groups_share_one_key() -> None:
    link = Link("redis://", prefix="t", scripts=[])
    seen: set[bytes] = set()
    with slots() as server:
        for group in GROUPS:
            keys = [link.group_key(group, kind) for kind in ("h", "l", "i", "b", "o:{x}", "o:}")]
            assert len({server.ask("CLUSTER", "KEYSLOT", key) for key in keys}) == 1
            assert not seen.intersection(keys)
            seen.update(keys)
        apart = {server.ask("CLUSTER", "KEYSLOT", link.group_key(group, "h")) for group in GROUPS}
    assert len(apart) > len(GROUPS) / 2  # the groups are spread


def test_a_group_that_is_no_text_of_unicode_has_a_key_too() -> None:
    link = Link("redis://", prefix="t", scripts=[])
    assert link.group_key("\ud800", "h") != link.group_key("\ud801", "h")


@pytest.mark.parametrize("prefix", ["", "a b", "{a}", "a\n", "a\0", None, 5])
def test_a_prefix_that_cannot_begin_a_key_is_refused(prefix: Any) -> None:
    with pytest.raises(ConfigurationError, match="prefix="):
        Link("redis://", prefix=prefix, scripts=[])


def test_two_databases_of_one_redis_do_not_hear_each_other() -> None:
    first, other = (Link(f"redis://localhost/{number}", prefix="t", scripts=[]) for number in (0, 3))
    assert first.key("a") == b"t:a"
    assert other.key("a") == b"t:3:a"


# Sources.


@pytest.mark.parametrize(
    "source",
    ["redis://localhost:port", "http://localhost", "redis://localhost/0?socket_timeout=x", None, 5, object()],
)
def test_what_is_no_redis_is_refused_with_what_to_write(source: Any) -> None:
    with pytest.raises(ConfigurationError, match="Realtime"):
        Link(source, prefix="t", scripts=[])


def test_valkey_is_a_redis_by_another_name() -> None:
    plain, safe = (connections_of(f"{scheme}://host:7/2")[0]() for scheme in ("valkey", "valkeys"))
    assert (plain.host, plain.port, plain.db) == ("host", 7, 2)  # type: ignore[attr-defined]
    assert type(safe).__name__ == "SSLConnection"


async def test_a_client_of_the_hosts_own_gives_its_address_and_not_its_habits(redis_server: RedisServer) -> None:
    theirs: Any = redis.asyncio.Redis(
        host=HOST,
        port=redis_server.port,
        db=2,
        decode_responses=True,
        socket_timeout=0.001,
        health_check_interval=1,
        max_connections=1,
        protocol=3,
    )
    async with linked(theirs) as link:
        assert link.prefix == "t:2"
        await link.listen()
        assert await link.command("PUBLISH", link.key("news"), b"\xff") == 1
        await until(lambda: link.heard == [b"\xff"], "heard")
        assert await link.command("ECHO", b"\xff") == b"\xff"
    assert theirs.connection_pool._available_connections == []  # nothing of theirs is used
    await theirs.aclose()


async def test_a_redis_is_reached_over_tls_with_a_user_and_by_a_socket_of_unix() -> None:
    rules = "~t:* &t:* +@all -@admin"
    with RedisServer(tls=True, rules=rules, options={"unixsocket": "redis.sock"}) as server:
        socket = server.folder / "data" / "redis.sock"
        for url in (server.url, f"unix://app:a-password-of-the-tests@{socket}"):
            async with linked(url) as link:
                await link.listen()
                assert await link.command("PUBLISH", link.key("news"), "!") == 1
                await until(lambda: link.heard == [b"!"], "heard")
                with pytest.raises(Unavailable, match=r"redis refuses: .*(perm|access)"):
                    await link.command("GET", "others")


# Living.


async def test_a_start_finds_everything_ready_and_a_second_start_too(every_redis_url: str) -> None:
    made = Linked(every_redis_url)
    nodes = set()
    for _ in range(2):
        await made.start()
        assert made.up
        assert made.trouble == ""
        assert made.run_id
        await made.listen()
        await made.answers()
        nodes.add(made.node)
        await made.stop()
        assert not made.up
        with pytest.raises(Unavailable):
            await made.command("PING")
        assert not made.cast("PING")
    assert made.told == ["up", "up"]
    assert len(nodes) == 2


async def test_what_was_said_last_has_left_when_it_stops(redis_server: RedisServer, redis_url: str) -> None:
    async with linked(redis_url) as link:
        for number in range(1000):
            assert link.cast("RPUSH", "list", number)
    assert redis_server.ask("LLEN", "list") == 1000


async def test_a_redis_that_is_away_at_the_start_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer() as server:
        await anyio.to_thread.run_sync(server.stop)
        async with linked(server.url) as link:
            assert not link.up
            assert "cannot be reached" in link.trouble
            assert [record.levelname for record in caplog.records if record.name == "starlette_rt"] == ["WARNING"]
            await anyio.to_thread.run_sync(server.start)
            await until(lambda: link.up, "up")
            await link.listen()
            await link.answers()
            await link.has_told("up", "resumed")  # who has joined meanwhile may have missed something


async def test_one_that_may_not_subscribe_is_told_so_at_the_start_and_nothing_of_it_goes_on() -> None:
    with RedisServer(rules="~* +@all resetchannels") as server:
        made = Linked(server.url)
        with anyio.fail_after(SOON):
            with pytest.raises(ConfigurationError, match=r"subscribe: .*(perm|access)"):
                await made.start()
        await until(lambda: not clients(server, "app"), "gone")
        server.ask("ACL", "SETUSER", "app", "allchannels")
        await made.start()
        await made.listen()
        await made.stop()


def clients(server: RedisServer, user: str) -> list[str]:
    found = server.ask("CLIENT", "LIST")
    text = found.decode() if isinstance(found, bytes) else found
    return [line for line in text.splitlines() if f"user={user} " in line]


async def test_one_that_is_not_let_in_leaves_nothing_that_knocks_on() -> None:
    with RedisServer() as server, Wire(server.port) as wire:
        made = Linked(f"redis://app:wrong@{HOST}:{wire.port}/0")
        with pytest.raises(ConfigurationError, match="redis refuses"):
            await made.start()
        seen = wire.accepted
        await anyio.sleep(0.2)  # a supervisor would have knocked again by then
        assert wire.accepted == seen
        assert made.tasks._tasks == set()  # type: ignore[attr-defined]


# Breaking.


async def test_after_an_outage_it_hears_before_it_says_that_it_is_up() -> None:
    with RedisServer() as server:
        async with linked(server.url) as link:
            await link.listen()
            seen: list[int] = []
            link.on_up.append(lambda: seen.append(server.ask("PUBLISH", link.key("news"), "!")))
            link.on_resumed.append(lambda: seen.append(link.up))
            await anyio.to_thread.run_sync(server.kill)
            await until(lambda: not link.up, "down")
            with pytest.raises(Unavailable):
                await link.subscribed(link.key("news"))
            await anyio.to_thread.run_sync(server.start)
            await until(lambda: link.up, "up")
            await until(lambda: seen == [1, True], "told in this order")
            await link.has_told("up", "down", "up", "resumed")
            await until(lambda: link.heard == [b"!"], "heard")


async def test_a_redis_that_stands_still_is_told_and_so_is_its_return() -> None:
    with RedisServer() as server:
        async with linked(server.url, patience=PATIENCE) as link:
            await link.listen()
            server.pause()
            with pytest.raises(Unavailable, match="not answered"):
                await link.command("PING")
            assert link.told == ["up", "down"]
            assert "not answered" in link.trouble
            with pytest.raises(Unavailable):
                link.command("PING").send(None)
            server.resume()
            await link.has_told("up", "down", "up", "resumed")
            await link.answers()
            assert link.trouble == ""


async def test_a_network_that_swallows_everything_is_seen_by_the_probe_alone(redis_server: RedisServer) -> None:
    with Wire(redis_server.port) as wire:
        async with linked(redis_server.url_through(wire.port), patience=PATIENCE) as link:
            wire.swallow()
            await until(lambda: not link.up, "down")  # nobody has asked for anything
            wire.mend()
            await link.has_told("up", "down", "up", "resumed")


async def test_a_subscriber_that_is_cut_off_alone_is_no_outage(redis_server: RedisServer, redis_url: str) -> None:
    async with linked(redis_url) as link:
        await link.listen()
        redis_server.ask("CLIENT", "KILL", "TYPE", "pubsub")
        await link.has_told("up", "resumed")
        assert link.up
        await link.listen()


async def test_one_that_has_gone_deaf_finds_it_out_by_itself(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PROBE", 0.05)
    with Wire(redis_server.port) as wire:
        async with linked(redis_server.url_through(wire.port)) as link:
            await link.listen()
            assert silence(wire, redis_server) == 1
            assert redis_server.ask("PUBLISH", link.key("news"), "unheard") == 1
            await link.has_told("up", "resumed")
            assert redis_server.ask("PUBLISH", link.key("news"), "heard") == 1
            await until(lambda: link.heard == [b"heard"], "heard")


async def test_one_that_hears_is_never_taken_to_be_deaf_also_where_its_loop_stands_still(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PROBE", 0.01)
    async with linked(redis_url, patience=PATIENCE) as link:
        for _ in range(3):
            await anyio.sleep(0.1)
            time.sleep(0.3)  # noqa: ASYNC251 - a handler that blocks
        assert link.told == ["up"]


async def test_one_whose_subscriptions_are_never_confirmed_begins_again(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PROBE", 0.05)
    monkeypatch.setattr(connections, "CONNECT", 0.1)
    with Unconfirmed(redis_server.port) as wire:
        async with linked(redis_server.url_through(wire.port)) as link:
            await link.answers()
            assert "nothing is heard" in link.trouble
            wire.deaf = False
            await until(lambda: link.trouble == "", "heard")
            await link.listen()


# The others.


async def test_how_many_hear_is_known_and_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PROBE", 0.05)
    async with linked(redis_url) as link, linked(redis_url, "others"):
        async with linked(redis_url) as second:
            await until(lambda: link.peers == second.peers == 2, "two")
            with anyio.fail_after(SOON):
                assert await link.gathered(2, SOON)
                assert not await link.gathered(3, 0.02)
        await until(lambda: link.peers == 1, "one")
    assert not await link.gathered(1, SOON)  # it has stopped


async def test_nobody_gathers_where_nobody_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with linked(f"redis://{HOST}:{free_port()}/0") as link:
        assert not await link.gathered(1, SOON)
        assert link.told == []
