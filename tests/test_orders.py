"""Who is sent away on one node is sent away on all, also by one that could not hear just then.

The law of this file: two or three `Realtime` on one real Redis stand in one test, each with an app and clients of its
own, as processes have them. Where time must pass, the sweeper and the looks at a log are made to come often.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from starlette.types import ASGIApp

from starlette_rt import CloseCode, Identity, OutboxLimits, Realtime, Unavailable
from starlette_rt.backends.base import Backend, Published
from starlette_rt.backends.memory import memory
from starlette_rt.frames import encode
from starlette_rt.history import Publication
from starlette_rt.loop import tasks
from starlette_rt.orders import KEPT, ORDERS, Order, Orders
from starlette_rt.testing import Client, Refused, connect, lifespan
from tests.redises import RedisServer, redis_server, redis_url
from tests.servers import HOST
from tests.test_realtime import live, loud, token, tokens
from tests.test_redis_pipe import LONG, SOON, until
from tests.wires import Wire, free_port

__all__ = ["redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens every few seconds happens many times a second."""
    monkeypatch.setattr("starlette_rt.realtime.SWEEP", 0.01)
    monkeypatch.setattr("starlette_rt.streams.CHECK", (0.1, 0.2))
    monkeypatch.setattr("starlette_rt.streams.SPREAD", 0.01)
    monkeypatch.setattr("starlette_rt.streams.STRIKE", 0.05)
    monkeypatch.setattr("starlette_rt.orders.PAUSE", 0.05)


class Site:
    """One process: a `Realtime` and its app."""

    def __init__(self, source: str) -> None:
        self.rt = Realtime(source)
        self.app: ASGIApp = live(self.rt)

    async def up(self, is_up: bool = True) -> None:
        await until(lambda: bool(self.rt._backend.broker.troubles()) is not is_up, f"up={is_up}")

    async def refuses(self, name: str = "", *, by: str = "") -> bool:
        try:
            async with connect(self.app, "/ws", token=by or token(name)):
                return False
        except Refused as refused:
            return refused.status == 401

    async def comes_to_refuse(self, name: str) -> None:
        with anyio.fail_after(SOON):
            while not await self.refuses(name):  # noqa: ASYNC110 - nobody says it
                await anyio.sleep(0.01)


@asynccontextmanager
async def sites(*sources: str) -> AsyncIterator[list[Site]]:
    async with AsyncExitStack() as stack:
        made = [Site(source) for source in sources]
        for site in made:
            await stack.enter_async_context(lifespan(site.app))
        yield made


@asynccontextmanager
async def present(site: Site, *names: str) -> AsyncIterator[list[Client]]:
    """One client at ``site`` for each name."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(site.app, "/ws", token=token(name))) for name in names]
        for client in clients:
            client.hello = await client.receive_json()  # type: ignore[attr-defined]
        yield clients


async def ends(client: Client, code: int, reason: str) -> None:
    with anyio.fail_after(SOON):
        assert (await client.closed(), client.close_reason) == (code, reason)


# All hear.


async def test_a_disconnect_reaches_the_other_nodes(redis_url: str) -> None:
    async with sites(redis_url, redis_url) as (here, there):
        async with (
            present(there, "ann", "ann", "bob", "bob") as (one, two, three, four),
            present(here, "ann") as (own,),
        ):
            await here.rt.disconnect("ann", reason="bye")
            for client in (one, two, own):
                await ends(client, CloseCode.DISCONNECTED, "bye")
            await here.rt.disconnect(connection=three.hello[0], code=4321)  # type: ignore[attr-defined]
            await ends(three, 4321, "")
            await four.silent()
        assert not await there.refuses("ann")  # that was no revocation


async def test_a_revocation_reaches_the_other_nodes_and_holds_there(redis_url: str) -> None:
    async with sites(redis_url, redis_url) as (here, there):
        async with present(there, "ann", "bob") as (ann, bob):
            await here.rt.revoke("ann")
            await ends(ann, CloseCode.UNAUTHORIZED, "revoked")
            await bob.silent()
            assert [await site.refuses("ann") for site in (here, there)] == [True, True]
            assert [await site.refuses("bob") for site in (here, there)] == [False, False]
            assert await there.rt.revoked(Identity("ann"))
        stolen = token("bob")
        async with connect(there.app, "/ws", token=stolen) as thief:
            await here.rt.revoke(token=tokens.verify(stolen).token_id)
            await thief.receive()
            await ends(thief, CloseCode.UNAUTHORIZED, "revoked")
            assert await there.refuses(by=stolen)
            assert not await there.refuses("bob")


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at a log unless there is a reason to."""
    monkeypatch.setattr("starlette_rt.streams.CHECK", (LONG, LONG))


async def test_one_that_was_cut_off_does_later_what_it_could_not_hear(
    redis_server: RedisServer, redis_url: str, seldom: None
) -> None:
    with Wire(redis_server.port) as wire:
        async with sites(redis_url, redis_server.url_through(wire.port)) as (here, there):
            async with present(there, "ann", "bob", "cleo") as (ann, bob, cleo):
                wire.cut()
                await there.up(False)
                await here.rt.disconnect("ann", reason="bye")
                await here.rt.revoke("bob")
                for client in (ann, bob):
                    await client.silent()
                wire.mend()
                await ends(ann, CloseCode.DISCONNECTED, "bye")
                await ends(bob, CloseCode.UNAUTHORIZED, "revoked")
                await cleo.silent()
            assert await there.refuses("bob")
            assert not await there.refuses("ann")


async def test_one_that_only_listens_badly_does_it_too(redis_server: RedisServer, redis_url: str, seldom: None) -> None:
    async with sites(redis_url, redis_url) as (here, there):
        async with present(there, "ann") as (ann,):
            redis_server.ask("CLIENT", "KILL", "TYPE", "pubsub")
            await here.rt.disconnect("ann", reason="bye")
            await ends(ann, CloseCode.DISCONNECTED, "bye")


async def test_a_node_that_starts_later_refuses_the_revoked_and_sends_nobody_away(redis_url: str) -> None:
    async with sites(redis_url) as [here]:
        await here.rt.revoke("ann")
        await here.rt.disconnect("bob")
        async with sites(redis_url) as [there]:
            assert await there.refuses("ann")
            async with present(there, "bob") as (bob,):
                await here.rt.broadcast("g", "fence")
                assert await bob.receive_json() == "fence"
                await bob.silent()


# Redis is away.


async def test_while_redis_is_away_it_is_done_here_and_said_so() -> None:
    with RedisServer() as server:
        async with sites(server.url, server.url) as (here, there):
            async with present(here, "ann", "bob") as (ann, bob), present(there, "ann") as (other,):
                await anyio.to_thread.run_sync(server.kill)
                await here.up(False)
                await there.up(False)
                with pytest.raises(Unavailable, match="this node alone"):
                    await here.rt.disconnect("ann", reason="bye")
                with pytest.raises(Unavailable):
                    await here.rt.revoke("bob")
                await ends(ann, CloseCode.DISCONNECTED, "bye")
                await ends(bob, CloseCode.UNAUTHORIZED, "revoked")
                assert await here.refuses("bob")
                await other.silent()
                await anyio.to_thread.run_sync(server.start)
                await here.up()
                await there.up()
                await there.comes_to_refuse("bob")


async def test_one_that_was_cut_off_tells_later_whom_it_has_revoked_and_not_whom_it_has_sent_away(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        async with sites(redis_server.url_through(wire.port), redis_url) as (here, there):
            async with present(there, "ann", "bob") as (ann, bob):
                wire.cut()
                await here.up(False)
                with pytest.raises(Unavailable):
                    await here.rt.disconnect("ann")
                with pytest.raises(Unavailable):
                    await here.rt.revoke("bob")
                wire.mend()
                await ends(bob, CloseCode.UNAUTHORIZED, "revoked")
                assert await there.refuses("bob")
                await here.up()
                await here.rt.broadcast("g", "fence")
                assert await ann.receive_json() == "fence"
                await ann.silent()
            await until(lambda: not here.rt._orders._untold, "told")


async def test_a_node_that_starts_while_redis_is_away_learns_it_later(
    redis_server: RedisServer, redis_url: str
) -> None:
    with Wire(redis_server.port) as wire:
        wire.cut()
        async with sites(redis_url, redis_server.url_through(wire.port)) as (here, there):
            await here.rt.revoke("ann")
            async with present(there, "ann", "bob") as (ann, bob):  # nobody could tell
                wire.mend()
                await ends(ann, CloseCode.UNAUTHORIZED, "revoked")
                assert await there.refuses("ann")
                await bob.silent()
                await here.rt.disconnect("bob", reason="bye")
                await ends(bob, CloseCode.DISCONNECTED, "bye")


async def test_what_redis_has_forgotten_it_is_told_again_by_who_knows_it(
    redis_server: RedisServer, redis_url: str
) -> None:
    async with sites(redis_url, redis_url) as (here, there):
        await here.rt.revoke("ann")
        redis_server.ask("FLUSHALL")
        await until(lambda: redis_server.ask("ZRANGE", "rt:{revoked}", 0, -1) == [b"user:ann"], "told again")
        async with sites(redis_url) as [later]:
            assert await later.refuses("ann")
            await until(lambda: epoch(here) == epoch(there) == epoch(later), "noticed by all")
            async with present(there, "bob") as (bob,):
                await later.rt.disconnect("bob", reason="bye")
                await ends(bob, CloseCode.DISCONNECTED, "bye")
    redis_server.ask("FLUSHALL")
    async with sites(redis_url) as [alone]:
        assert not await alone.refuses("ann")  # nobody is left who knows


async def test_a_node_that_has_never_heard_stops_at_once() -> None:
    async with Realtime(f"redis://{HOST}:{free_port()}/0", outbox=OutboxLimits(close=10 * SOON)):
        pass  # what is tried until it succeeds is not waited for: the time-out of the test would show it


def epoch(site: Site) -> str:
    stream = site.rt._orders._streams.get(ORDERS)
    assert stream is not None
    return stream.position.epoch


# One node.


@asynccontextmanager
async def heeding() -> AsyncIterator[tuple[Backend, Orders, list[Order]]]:
    """Orders of one process, and what was obeyed."""
    obeyed: list[Order] = []
    mine = tasks()
    backend = memory(grace=0.0, now=mine.time)
    orders = Orders(backend.broker, backend.ledger, mine, obeyed.append)
    await backend.broker.start(orders.receive, orders.recheck)
    await orders.start()
    yield backend, orders, obeyed
    orders.close()
    await mine.close(0.0)
    await backend.broker.stop()


def by_another(data: Any, id: str) -> Publication:
    return Publication(ORDERS, "another", data, encode(data), id=id)


async def test_an_order_is_obeyed_once_where_it_is_given() -> None:
    async with heeding() as (_, orders, obeyed):
        for number in range(3):
            await orders.give(Order("disconnect", 4000, str(number), "ann"))
        assert [order.reason for order in obeyed] == ["0", "1", "2"]


async def test_the_orders_of_another_are_obeyed_in_their_order_and_once() -> None:
    async with heeding() as (backend, _, obeyed):
        for id in ("a", "b", "a", "c"):
            data = {"do": "disconnect", "code": 4000, "reason": id, "identity": "ann"}
            await backend.broker.publish(by_another(data, id), KEPT)
        assert [order.reason for order in obeyed] == ["a", "b", "c"]
        revocation = {"do": "revoke", "code": 3000, "token": "t", "until": 4e9}
        await backend.broker.publish(by_another(revocation, "d"), KEPT)
        assert backend.ledger.revocations() == [("token:t", 4e9)]


async def test_where_some_may_have_been_missed_the_revoked_are_sent_away_again() -> None:
    async with heeding() as (backend, orders, obeyed):
        backend.ledger.note("user:ann", 4e9)
        backend.ledger.note("token:t", 4e9)
        end = await backend.broker.position(ORDERS, KEPT)
        await backend.broker.renew(ORDERS, KEPT, end)
        await until(lambda: orders.tick(orders._tasks.time()) or len(obeyed) == 2, "both")
        assert [(each.do, each.identity, each.token) for each in obeyed] == [
            ("revoke", "ann", None),
            ("revoke", None, "t"),
        ]


async def test_an_order_of_another_version_is_left_alone_and_those_that_follow_are_obeyed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with heeding() as (backend, orders, obeyed):
        for id, data in (("a", {"do": "sing"}), ("b", None), ("c", {"do": "disconnect", "code": 4000, "newer": 1})):
            await backend.broker.publish(by_another(data, id), KEPT)
        assert [order.code for order in obeyed] == [4000]
        await orders.give(Order("disconnect", 4001, "", "ann"))
        assert [order.code for order in obeyed] == [4000, 4001]
    assert len(loud(caplog)) == 2
    assert "not understood" in caplog.text


async def test_a_revocation_that_is_said_anew_while_the_last_one_is_told_is_told_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with heeding() as (backend, orders, _):
        rule, told = "user:ann", list[str]()
        first, second = (by_another({"until": until}, f"{until}") for until in (1.0, 2.0))

        async def publish(publication: Publication, history: Any) -> Published:
            told.append(publication.id)
            orders._untold[rule] = second
            return Published(None, "yes")

        monkeypatch.setattr(backend.broker, "publish", publish)
        orders._untold[rule] = first
        await orders._tell()
        assert orders._untold == {rule: second}
        await orders._tell()
        assert (orders._untold, told) == ({}, ["1.0", "2.0"])
