"""The facade: what the host holds, how it lives, and what its verbs do to those who are connected.

The law of this file: everything is seen from outside, through clients in this process. Where time must pass, the
sweeper is made to look often, and every wait has a deadline.
"""

from __future__ import annotations

import logging
import mimetypes
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message
from starlette.websockets import WebSocket

from starlette_rt import (
    CloseCode,
    ConfigurationError,
    EventError,
    Health,
    History,
    Identity,
    Metrics,
    NotRunning,
    OutboxLimits,
    Published,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
)
from starlette_rt.once import ORIGIN, Origin
from starlette_rt.realtime import workers
from starlette_rt.testing import Client, Refused, connect, lifespan
from tests.test_dialogue import Talk, turns

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

PATIENCE = 5.0

tokens = TokenSigner(["k" * 32])


class Member(RealtimeEndpoint):
    """Joins the group ``g`` and tells its own connection's id."""

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.join("g")
        await self.push([self.connection.id, self.connection.session])


def live(rt: Realtime, endpoint: Any = Member, *routes: Any) -> Starlette:
    return Starlette(
        routes=[WebSocketRoute("/ws", endpoint), *routes],
        middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
    )


def token(name: str, **details: Any) -> str:
    return tokens.sign(Identity(name), **details)


@asynccontextmanager
async def crowd(app: ASGIApp, *names: str) -> AsyncIterator[list[tuple[Client, str, str]]]:
    """One client for each name, with the id and the session of its connection."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(app, "/ws", token=token(name))) for name in names]
        yield [(client, *await client.receive_json()) for client in clients]


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until it is so."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110 - nobody rings a bell for it
            await anyio.sleep(0.001)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeper looks a hundred times a second."""
    monkeypatch.setattr("starlette_rt.realtime.SWEEP", 0.01)


def loud(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


# Living.


async def test_it_nests_and_ends_with_the_outermost() -> None:
    rt = Realtime()
    assert not rt.running
    async with rt as outer:
        async with rt as inner:
            assert outer is inner is rt
            await rt.broadcast("g", 1)
        assert rt.running
        await rt.broadcast("g", 1)
    assert not rt.running


def test_it_starts_again_in_another_loop() -> None:
    rt = Realtime()

    async def once() -> None:
        async with crowd(live(rt), "ann") as [(client, *_)]:
            await rt.broadcast("g", 1)
            assert await client.receive_json() == 1
            assert await anyio.to_thread.run_sync(rt.broadcast_sync, "g", 2) == Published(None, "yes")
            assert await client.receive_json() == 2
        assert rt.stats()["connections"] == 0

    for backend in ("asyncio", "trio", "asyncio"):
        anyio.run(once, backend=backend)


async def test_a_second_loop_at_the_same_time_is_refused_and_the_first_goes_on() -> None:
    async def enter() -> None:
        async with rt:
            raise AssertionError("it lives in another loop")

    def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="runs in another event loop; make one for each loop"):
            anyio.run(enter)

    async with Realtime() as rt:
        await anyio.to_thread.run_sync(elsewhere)
        await rt.broadcast("g", 1)
        assert rt.running
    assert not rt.running


async def test_a_start_that_fails_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rt = Realtime()
    with monkeypatch.context() as patch:
        patch.setattr("starlette_rt.realtime.tasks", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await rt.__aenter__()
    assert not rt.running
    async with rt:
        assert rt.running


@pytest.mark.parametrize(
    "verb",
    [
        lambda rt: rt.broadcast("g", 1),
        lambda rt: rt.push("ann", 1),
        lambda rt: rt.online(["ann"]),
        lambda rt: rt.presence("g"),
        lambda rt: rt.count("g"),
        lambda rt: rt.disconnect("ann"),
        lambda rt: rt.revoke("ann"),
        lambda rt: rt.drain(),
    ],
)
async def test_while_it_does_not_run_its_verbs_say_what_to_write(verb: Any) -> None:
    rt = Realtime()
    for _ in range(2):
        with pytest.raises(NotRunning, match=r"Middleware\(RealtimeMiddleware, realtime=rt\).*async with rt:"):
            await verb(rt)
        async with rt:
            pass  # and once it has run the same is said


def test_what_cannot_work_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError, match="presence_grace"):
        Realtime(presence_grace=-1)
    with pytest.raises(ConfigurationError, match='write "memory://" for one process, or "redis://'):
        Realtime("kafka://localhost")


async def test_at_its_end_a_peer_that_does_not_read_is_dropped(often: None) -> None:
    """Its Close cannot be sent; when the outbox's deadline is over nothing is left of it."""
    rt = Realtime(outbox=OutboxLimits(close=0.05))
    codes: list[int] = []
    handshake: list[Message] = [{"type": "websocket.connect"}]
    stalled = anyio.Event()

    class Endpoint(Member):
        realtime = rt

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            codes.append(close_code)

    async def receive() -> Message:
        if not handshake:
            await anyio.sleep_forever()
        return handshake.pop()

    async def send(message: Message) -> None:
        if message["type"] == "websocket.send":
            stalled.set()
            await anyio.sleep_forever()

    async def serve() -> None:
        await Endpoint({"type": "websocket", "path": "/", "headers": [], "query_string": b""}, receive, send)

    with anyio.fail_after(PATIENCE / 2):
        async with anyio.create_task_group() as group:
            async with rt:
                group.start_soon(serve)
                await stalled.wait()
    assert codes == [CloseCode.SERVICE_RESTART]
    assert rt.stats()["aborted"] == 1
    assert rt.stats()["connections"] == 0


# Saying.


async def test_a_broadcast_reaches_the_group_of_this_moment_and_a_push_one_person() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann", "ann", "bob") as clients:
        assert await rt.broadcast("g", {"n": 1}) == Published(None, "yes")
        assert await rt.push("ann", 2, "note") == Published(None, "yes")
        await rt.broadcast("nobody's", 3)
        await rt.push("nobody", 3)
        for client, *_ in clients:
            assert await client.receive_json() == {"n": 1}
        for client, *_ in clients[:2]:
            assert await client.receive_json() == {"event": "note", "data": 2}
        for client, *_ in clients:
            await client.silent()


async def test_a_broadcast_may_leave_out_a_connection_or_a_session() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann", "bob") as [(ann, connection, session), (bob, *_)]:
        await rt.broadcast("g", 1, exclude=rt.connections[connection])
        await rt.broadcast("g", 2, exclude=session)
        await rt.broadcast("g", 3, exclude=None)
        assert await ann.receive_json() == 3
        assert [await bob.receive_json() for _ in range(3)] == [1, 2, 3]


async def test_what_is_said_is_copied_when_it_is_said() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann") as [(ann, *_)]:
        data = {"n": [1]}
        await rt.broadcast("g", data)
        data["n"].append(2)
        assert await ann.receive_json() == {"n": [1]}


async def test_of_ephemeral_messages_with_one_key_a_slow_peer_gets_the_latest() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann") as [(ann, *_)]:
        ann.stall()
        await rt.broadcast("g", "first")
        await anyio.wait_all_tasks_blocked()
        for number in range(5):
            await rt.broadcast("g", number, ephemeral=True, key="cursor")
        await rt.broadcast("g", "last")
        await anyio.wait_all_tasks_blocked()
        ann.resume()
        assert [await ann.receive_json() for _ in range(3)] == ["first", 4, "last"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("g", object()), TypeError),
        (("g", "\ud800"), ValueError),
        (("", 1), EventError),
        (("g\n", 1), EventError),
        (("g", 1, "\x00"), EventError),
    ],
)
async def test_what_cannot_be_said_is_said_to_the_caller(arguments: Any, error: type[Exception]) -> None:
    async with Realtime() as rt:
        with pytest.raises(error):
            await rt.broadcast(*arguments)
        with pytest.raises(ValueError, match="ephemeral=True"):
            await rt.broadcast("g", 1, key="k")
        assert rt.stats()["connections"] == 0


async def test_a_def_route_says_it_from_its_thread() -> None:
    rt = Realtime()

    def page(request: Request) -> JSONResponse:
        group = rt.broadcast_sync("g", "from a route", "note", ephemeral=True)
        person = rt.push_sync("ann", "and a push")
        return JSONResponse([group.shared, person.shared])

    app = live(rt, Member, Route("/", page))
    async with crowd(app, "ann") as [(ann, *_)]:
        assert await get(app) == b'["yes","yes"]'
        assert await ann.receive_json() == {"event": "note", "data": "from a route"}
        assert await ann.receive_json() == "and a push"


async def get(app: ASGIApp) -> bytes:
    """The body that ``GET /`` answers on this loop."""
    body = b""

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        nonlocal body
        body += message.get("body", b"")

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    with anyio.fail_after(PATIENCE):
        await app(scope, receive, send)
    return body


async def test_a_thread_of_nobodys_says_it_too() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann") as [(ann, *_)]:
        thread = threading.Thread(target=lambda: (rt.broadcast_sync("g", 1), rt.push_sync("ann", 2)))
        thread.start()
        assert [await ann.receive_json() for _ in range(2)] == [1, 2]
        await anyio.to_thread.run_sync(thread.join)


async def test_a_thread_hears_the_errors_of_what_it_said() -> None:
    async with Realtime() as rt:
        with pytest.raises(EventError):
            await anyio.to_thread.run_sync(rt.broadcast_sync, "", 1)
    with pytest.raises(NotRunning):
        await anyio.to_thread.run_sync(rt.broadcast_sync, "g", 1)


async def test_on_the_loops_own_thread_it_would_wait_for_itself_and_says_so() -> None:
    async with Realtime() as rt:
        for verb in (rt.broadcast_sync, rt.push_sync):
            with pytest.raises(RuntimeError, match=r"would block the event loop; write `await rt\.broadcast"):
                verb("g", 1)


async def test_one_who_says_much_without_a_pause_fills_nobodys_outbox() -> None:
    rt = Realtime(outbox=OutboxLimits(messages=100))
    async with crowd(live(rt), "ann") as [(ann, *_)]:
        for number in range(1000):
            await rt.broadcast("g", number)
        assert [await ann.receive_json() for _ in range(1000)] == list(range(1000))


async def test_a_disconnect_says_why_where_the_host_does_not() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann") as [(ann, *_)]:
        await rt.disconnect("ann")
        assert (await ann.closed(), ann.close_reason) == (CloseCode.DISCONNECTED, "disconnected")


# Asking.


async def test_online_are_those_who_have_a_connection() -> None:
    rt = Realtime()
    app = live(rt)
    async with lifespan(app):
        assert await rt.online(["ann", "bob"]) == set()
        async with crowd(app, "ann", "ann", "bob") as clients:
            assert await rt.online(["ann", "bob", "eve"]) == {"ann", "bob"}
            await clients[0][0].close()
            await until(lambda: rt.stats()["connections"] == 2)
            assert await rt.online(iter(["ann"])) == {"ann"}  # another one is still there
        await until(lambda: not rt.stats()["connections"])
        assert await rt.online(["ann", "bob"]) == set()


class Tracked(Member):
    async def on_connect(self, websocket: WebSocket) -> None:
        await super().on_connect(websocket)
        await self.track("g", {"on": "g"})
        await self.track("h", {"on": "h"})
        await self.track("h", {"on": "h2"})

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.untrack("never tracked")
        await self.leave("g")
        await self.push("left")


async def test_presence_counts_people_and_connections_and_ends_after_the_grace(often: None) -> None:
    rt = Realtime(presence_grace=0)
    app = live(rt, Tracked)
    async with lifespan(app):
        async with crowd(app, "ann", "ann", "bob") as clients:
            members = await rt.presence("h")
            assert {key: [meta["on"] for meta in member.metas] for key, member in members.items()} == {
                "ann": ["h2", "h2"],
                "bob": ["h2"],
            }
            assert (await rt.count("h"), await rt.count("h", connections=True)) == (2, 3)
            await clients[2][0].send_json(0)
            assert await clients[2][0].receive_json() == "left"
            assert set(await rt.presence("g")) == {"ann"}  # leaving untracks
            assert set(await rt.presence("h")) == {"ann", "bob"}
        await until(lambda: not rt.stats()["connections"])
        with anyio.fail_after(PATIENCE):
            while await rt.presence("h"):  # noqa: ASYNC110
                await anyio.sleep(0.001)


async def test_names_are_checked_where_one_asks() -> None:
    async with Realtime() as rt:
        for bad in ("", "~ann", "x" * 256):
            with pytest.raises(EventError):
                await rt.presence(bad)
            with pytest.raises(EventError):
                await rt.count(bad)


async def test_stats_say_what_is_held_and_what_was_counted() -> None:
    rt = Realtime()
    assert rt.stats() == {"connections": 0, "groups": 0, "slow": 0}
    async with crowd(live(rt), "ann", "bob") as clients:
        await rt.broadcast("g", 1)
        for client, *_ in clients:
            await client.receive_json()
        stats = rt.stats()
        assert (stats["connections"], stats["groups"], stats["slow"]) == (2, 1, 0)  # no group of an identity
        assert (stats["connected"], stats["published"], stats["delivered"]) == (2, 1, 4)
        clients[0][0].stall()
        await rt.broadcast("g", 2)
        await anyio.wait_all_tasks_blocked()
        assert rt.stats()["slow"] == 1
        clients[0][0].resume()
    stats = rt.stats()
    assert (stats["connections"], stats["groups"], stats["disconnected.1000"]) == (0, 0, 2)


async def test_other_metrics_take_the_counts_and_stats_then_says_what_is_held() -> None:
    seen: list[int] = []

    class Mine(Metrics):
        def connected(self) -> None:
            seen.append(1)

    rt = Realtime(metrics=Mine())
    async with crowd(live(rt), "ann"):
        assert rt.stats() == {"connections": 1, "groups": 1, "slow": 0}
    assert seen == [1]


# Sending away.


async def test_disconnect_closes_every_connection_of_one_person_or_one_connection() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann", "ann", "bob", "bob") as clients:
        (one, *_), (two, *_), (three, connection, _), (four, *_) = clients
        await rt.push("ann", "said before it")
        await rt.disconnect("ann", reason="bye")
        for client in (one, two):
            assert await client.receive_json() == "said before it"
            assert await client.closed() == CloseCode.DISCONNECTED
            assert client.close_reason == "bye"
        await rt.disconnect(connection=connection, code=4321)
        assert (await three.closed(), three.close_reason) == (4321, "")
        await rt.disconnect("nobody")
        await rt.disconnect(connection="none of ours")
        await four.silent()


async def test_revoke_closes_and_refuses_a_person() -> None:
    rt = Realtime()
    app = live(rt)
    async with crowd(app, "ann", "ann", "bob") as clients:
        await rt.revoke("ann")
        for client, *_ in clients[:2]:
            assert await client.closed() == CloseCode.UNAUTHORIZED
        with pytest.raises(Refused, match="401"):
            async with connect(app, "/ws", token=token("ann")):
                pass
        await clients[2][0].silent()
        async with crowd(app, "bob"):
            pass
        assert not await rt.revoked(Identity("bob"))
        assert await rt.revoked(Identity("ann"))


async def test_revoke_closes_and_refuses_one_token() -> None:
    rt = Realtime()
    app = live(rt)
    stolen = token("ann")
    async with connect(app, "/ws", token=stolen) as thief, connect(app, "/ws", token=token("ann")) as ann:
        await thief.receive()
        await ann.receive()
        await rt.revoke(token=tokens.verify(stolen).token_id)
        assert await thief.closed() == CloseCode.UNAUTHORIZED
        await ann.silent()
        with pytest.raises(Refused, match="401"):
            async with connect(app, "/ws", token=stolen):
                pass


async def test_a_revocation_ends() -> None:
    async with Realtime() as rt:
        await rt.revoke("ann", ttl=-1)
        assert not await rt.revoked(Identity("ann"))


async def test_whom_to_send_away_is_said_in_one_way() -> None:
    async with Realtime() as rt:
        for wrong in ({}, {"identity": "ann", "connection": "c"}):
            with pytest.raises(TypeError, match="one of them"):
                await rt.disconnect(**wrong)
        for wrong in ({}, {"identity": "ann", "token": "t"}):
            with pytest.raises(TypeError, match="one of them"):
                await rt.revoke(**wrong)
        with pytest.raises(ValueError, match="1005 is no code"):
            await rt.disconnect("ann", code=1005)


async def test_a_claim_is_taken_once() -> None:
    async with Realtime() as rt:
        assert await rt.claim("key", 60)
        assert not await rt.claim("key", 60)
        assert await rt.claim("other", 60)


async def test_drain_closes_everybody_after_what_was_said_and_refuses_newcomers() -> None:
    rt = Realtime()
    app = live(rt)
    async with lifespan(app):
        async with crowd(app, "ann", "bob") as clients:
            await rt.broadcast("g", "the last word")
            await rt.drain()
            for client, *_ in clients:
                assert await client.receive_json() == "the last word"
                assert await client.closed() == CloseCode.SERVICE_RESTART
            with pytest.raises(Refused, match="503"):
                async with connect(app, "/ws", token=token("eve")):
                    pass
            await rt.drain()  # again is nothing
    async with crowd(app, "ann") as [(ann, *_)]:  # and a new start lets them in again
        await ann.silent()


async def test_drain_does_not_wait_longer_than_it_was_told() -> None:
    rt = Realtime()
    async with crowd(live(rt), "ann") as [(ann, *_)]:
        ann.stall()
        await rt.broadcast("g", 1)
        with anyio.fail_after(PATIENCE / 2):
            await rt.drain(0.01)
        ann.resume()
        assert await ann.closed() == CloseCode.SERVICE_RESTART


# Tokens that expire.


class Calendar:
    """The wall clock of signers and of a `Realtime`, moved by the test; the sweeper looks when it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        self.tokens = TokenSigner(["k" * 32], now=lambda: self.now)
        monkeypatch.setattr("starlette_rt.realtime.SWEEP", 60.0)
        monkeypatch.setattr("starlette_rt.realtime.time", SimpleNamespace(time=lambda: self.now))

    def live(self, rt: Realtime, endpoint: Any = Member) -> Starlette:
        middleware = [Middleware(RealtimeMiddleware, realtime=rt, tokens=self.tokens)]
        return Starlette(routes=[WebSocketRoute("/ws", endpoint)], middleware=middleware)

    def token(self, name: str, ttl: float) -> str:
        return self.tokens.sign(Identity(name), ttl=ttl)

    def move(self, rt: Realtime, seconds: float) -> None:
        self.now += seconds
        rt._look()


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    return Calendar(monkeypatch)


async def test_a_living_connection_is_closed_when_its_token_expires(calendar: Calendar) -> None:
    rt = Realtime()
    app = calendar.live(rt)
    short = calendar.token("ann", ttl=60)
    async with connect(app, "/ws", token=calendar.token("bob", ttl=600)) as bob:
        await bob.receive_json()
        async with connect(app, "/ws", token=short) as ann:
            await ann.receive_json()
            calendar.move(rt, 55)
            await ann.silent()
            calendar.move(rt, 6)
            assert await ann.closed() == CloseCode.TOKEN_EXPIRED
        with pytest.raises(Refused) as refused:
            async with connect(app, "/ws", token=short):
                pass
        assert refused.value.json()["error"] == "token_expired"
        await bob.silent()


async def test_who_can_hand_in_a_new_token_has_a_grace(calendar: Calendar) -> None:
    rt = Realtime(expiry_grace=100)  # a token counts in whole seconds: nothing here is near one
    app = calendar.live(rt)
    proof = calendar.token("ann", ttl=600)
    async with connect(app, "/ws", token=proof, subprotocols=["rt.v1.json"]) as ann:
        async with connect(app, "/ws", token=proof) as plain:
            calendar.move(rt, 601)
            assert await plain.closed() == CloseCode.TOKEN_EXPIRED
        calendar.move(rt, 50)
        assert ann.close_code is None
        await ann.send_json({"type": "refresh", "ref": 1, "token": calendar.token("ann", ttl=600)})
        await until(lambda: '"type":"reply"' in str(ann.pending[-1]))
        calendar.move(rt, 650)
        assert ann.close_code is None
        calendar.move(rt, 60)
        assert await ann.closed() == CloseCode.TOKEN_EXPIRED


async def test_a_token_that_has_run_out_long_ago_is_good_for_no_time(calendar: Calendar) -> None:
    rt = Realtime(expiry_grace=10)
    proof = calendar.token("ann", ttl=60)
    async with connect(calendar.live(rt), "/ws", token=proof, subprotocols=["rt.v1.json"]):
        (connection,) = rt.connections.values()
        calendar.now += 65
        assert rt.welcome(connection).ttl_ms == 0


async def test_an_identity_that_ended_with_the_epoch_has_ended(calendar: Calendar) -> None:
    rt = Realtime()

    async def ws(websocket: WebSocket) -> None:
        await Member.serve(websocket, identity=Identity("ann", expires_at=0.0))

    async with connect(calendar.live(rt, ws), "/ws") as ann:
        await ann.receive_json()
        calendar.move(rt, 1)
        await turns()
        assert ann.close_code == CloseCode.TOKEN_EXPIRED


async def test_an_identity_of_the_hosts_expires_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_rt.realtime.SWEEP", 60.0)
    rt = Realtime()

    async def ws(websocket: WebSocket) -> None:
        await Member.serve(websocket, identity=Identity("ann", expires_at=time.time() - 1))

    async with connect(live(rt, ws), "/ws") as ann:
        await ann.receive_json()
        rt._look()
        assert await ann.closed() == CloseCode.TOKEN_EXPIRED
    assert rt.stats()["connections"] == 0


# What connections ask.


async def test_a_connection_that_has_ended_joins_and_tracks_nothing() -> None:
    rt = Realtime()
    kept: list[Any] = []

    class Endpoint(Member):
        async def on_connect(self, websocket: WebSocket) -> None:
            kept.append(self.connection)
            await super().on_connect(websocket)

    app = live(rt, Endpoint)
    async with lifespan(app):
        async with crowd(app, "ann"):
            pass
        await kept[0].join("h")
        await kept[0].track("h", {})
        assert kept[0].groups == frozenset()
        assert await rt.presence("h") == {}
        assert rt.stats()["groups"] == 0


async def test_joining_may_ask_for_presence_and_says_how() -> None:
    class Endpoint(Member):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            try:
                await self.join("h", presence=data)
            except ValueError as error:
                await self.push(str(error))

    async with crowd(live(Realtime(), Endpoint), "ann") as [(ann, *_)]:
        await ann.send_json("all")
        assert await ann.receive_json() == 'presence= is "members", "count" or None'
        await ann.send_json("count")
        assert await ann.receive_json() == {"type": "presence_count", "group": "h", "count": 0}
        await ann.send_json("members")
        assert (await ann.receive_json())["type"] == "presence_state"
        await ann.send_json(None)
        await ann.silent()


# Several workers.


@pytest.mark.parametrize(
    ("argv", "environment", "count"),
    [
        (["uvicorn", "app:app"], {}, 1),
        (["uvicorn", "app:app", "--workers", "4"], {}, 4),
        (["uvicorn", "--workers=3", "app:app"], {}, 3),
        (["gunicorn", "-w", "2", "app:app"], {}, 2),
        (["uvicorn", "app:app"], {"WEB_CONCURRENCY": "5"}, 5),
        (["uvicorn", "app:app", "--workers", "1"], {"WEB_CONCURRENCY": "5"}, 1),
        (["uvicorn", "app:app", "--workers", "many"], {"WEB_CONCURRENCY": "²"}, 1),
        (["uvicorn", "app:app", "--workers"], {}, 1),
    ],
)
async def test_the_workers_are_those_of_the_command_line_or_of_the_environment(
    argv: list[str],
    environment: dict[str, str],
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert workers() == count
    async with Realtime():
        await checkpoint()
    warning = f"memory:// reaches one process only, and {count} workers run; use one worker"
    assert loud(caplog) == ([warning] if count > 1 else [])


async def test_a_guest_can_be_sent_away_by_name() -> None:
    class Guests(RealtimeEndpoint):
        anonymous = True

        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.push(self.user.identity)

    rt = Realtime()
    app = Starlette(routes=[WebSocketRoute("/", Guests)], middleware=[Middleware(RealtimeMiddleware, realtime=rt)])
    async with connect(app, "/") as one, connect(app, "/") as other:
        await rt.disconnect(await one.receive_json())
        assert await one.closed() == CloseCode.DISCONNECTED
        assert one.close_reason == "disconnected"
        await other.receive_json()
        await other.silent()


@pytest.mark.parametrize("name", ["x" * 255, "Ada\u3000L", "\U0001f469\u200d\U0001f4bb"])
async def test_whoever_can_be_an_identity_can_be_pushed_to(name: str) -> None:
    async with Realtime() as rt:
        assert (await rt.push(Identity(name).identity, 1)).shared == "yes"


async def test_an_identity_is_named_by_its_text_and_anything_else_says_so() -> None:
    async with Realtime() as rt:
        for call in (rt.push(Identity("eve"), 1), rt.revoke(Identity("eve")), rt.disconnect(Identity("eve"))):  # type: ignore[arg-type]
            with pytest.raises(TypeError, match=r"write identity\.identity"):
                await call
        with pytest.raises(TypeError, match="a connection or its session"):
            await rt.broadcast("a", 1, exclude=Identity("eve"))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="list of identities"):
            await rt.online("eve")


async def test_a_long_broadcast_without_a_pause_evicts_nobody() -> None:
    class Members(RealtimeEndpoint):
        anonymous = True

        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.join("all")

        async def on_receive(self, websocket: WebSocket, data: int) -> None:
            for number in range(data):
                await (self.push(number) if number % 2 else websocket.send_json(number))

    rt = Realtime(outbox=OutboxLimits(messages=100))
    app = Starlette(routes=[WebSocketRoute("/", Members)], middleware=[Middleware(RealtimeMiddleware, realtime=rt)])
    async with connect(app, "/") as client:
        for number in range(2000):
            await rt.broadcast("all", number)
        assert [await client.receive_json() for _ in range(2000)] == list(range(2000))
        await client.send_json(2000)
        assert [await client.receive_json() for _ in range(2000)] == list(range(2000))
    assert not any(fact.startswith("evicted") for fact in rt.stats())


# Groups that remember.


async def test_what_was_said_can_be_read_with_its_place() -> None:
    async with Realtime(history={"board:*": History(3, 60)}) as rt:
        assert (await rt.position("board:1")).offset == 0
        for number in range(5):
            published = await rt.broadcast("board:1", number, "said")
        told, position = await rt.history("board:1")
        assert [(each.event, each.data, each.offset) for each in told] == [
            ("said", 2, 3),
            ("said", 3, 4),
            ("said", 4, 5),
        ]
        assert position == published.position == await rt.position("board:1")
        assert [each.data for each in (await rt.history("board:1", last=2))[0]] == [3, 4]
        assert (await rt.history("board:1", last=0))[0] == []


async def test_what_is_ephemeral_has_no_place() -> None:
    async with Realtime(history={"board": History(3, 60)}) as rt:
        published = await rt.broadcast("board", 1, ephemeral=True)
        assert published.position is None
        assert (await rt.history("board"))[0] == []


async def test_a_group_without_history_says_what_to_write() -> None:
    async with Realtime(history={"board:*": History(3, 60)}) as rt:
        for ask in (rt.history, rt.position):
            with pytest.raises(ConfigurationError, match=r"'lobby' has no history; write Realtime\(history="):
                await ask("lobby")
            with pytest.raises(EventError):
                await ask("~ann")


async def test_who_joins_a_group_that_remembers_learns_its_place() -> None:
    places: list[Any] = []

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            places.append([await self.join("board"), await self.join("lobby")])

    rt = Realtime(history={"board": History(3, 60)})
    app = live(rt, Endpoint)
    async with lifespan(app):
        await rt.broadcast("board", 1)
        async with connect(app, "/ws", token=token("ann")):
            await until(lambda: bool(places))
            assert places == [[await rt.position("board"), None]]


async def test_one_who_has_ended_lets_go_of_a_history_only_where_nobody_else_is() -> None:
    kept: list[Any] = []

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            kept.append(self.connection)
            await websocket.accept()

    rt = Realtime(history={"board": History(3, 60)})
    app = live(rt, Endpoint)
    async with lifespan(app), connect(app, "/ws", token=token("ann")):
        async with connect(app, "/ws", token=token("bob")):
            pass
        await until(lambda: len(rt.connections) == 1)
        await kept[1].join("board")
        assert len(rt._streams) == 0
        await kept[0].join("board")
        await kept[1].join("board")
        assert len(rt._streams) == 1
        assert kept[1].groups == frozenset()


async def test_what_was_said_before_under_the_same_name_only_moves_the_position() -> None:
    rt = Realtime(history={"g": History(5, 60)})
    async with connect(live(rt), "/ws", token=token("ann"), subprotocols=["rt.v1.json"]) as ann:
        talk = Talk(ann)
        while "data" not in await talk.hear():
            pass  # the welcome, what the server joined
        for _ in range(2):  # as a handler that ran twice does, on a backend that has forgotten the first time
            naming = ORIGIN.set(Origin("ann's event"))
            await rt.broadcast("g", 1)
            ORIGIN.reset(naming)
            rt._backend.broker._logs["g"]._ids.clear()  # type: ignore[attr-defined]
        event, skip = await talk.heard(2)
        assert (event["data"], event["offset"], len(event["id"])) == (1, 1, 12)
        assert skip == {"type": "event", "group": "g", "offset": 2, "tag": skip["tag"], "skip": True}


async def test_a_publication_has_an_id_of_its_own_and_says_it_only_if_it_can_come_again() -> None:
    rt = Realtime(history={"g": History(5, 60)})
    async with rt:
        for number in range(3):
            await rt.broadcast("g", number)
        told, _ = await rt.history("g")
        assert len({each.id for each in told}) == 3
        assert not any(each.once for each in told)


async def test_after_a_drain_clients_come_back_at_different_times() -> None:
    async with Realtime() as rt:
        times = {rt.come_back() for _ in range(50)}
        assert len(times) > 20
        assert all(0 <= time <= 1000 for time in times)
        rt.connections = dict.fromkeys(map(str, range(5000)))  # type: ignore[arg-type]
        assert 1000 < max(rt.come_back() for _ in range(100)) <= 11_000
        rt.connections = {}


def test_the_javascript_client_is_served_as_javascript() -> None:
    files = Realtime().static()
    path, _ = files.lookup_path("starlette-rt.js")
    assert mimetypes.guess_type(path)[0] == "text/javascript"


def test_a_grace_that_cannot_work_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError, match="expiry_grace is a number of seconds, 0 or more"):
        Realtime(expiry_grace=-1)


# Health


async def test_it_is_ready_while_it_runs_and_does_not_drain() -> None:
    rt = Realtime()
    assert rt.health() == Health(False, ("this Realtime is not running",))
    async with rt:
        assert rt.health() == Health(True, ())
        await rt.drain(0)
        assert rt.health() == Health(False, ("it drains: its connections are going elsewhere",))
    assert not rt.health().ready


async def test_what_is_wrong_with_the_backend_is_a_reason_and_no_cause_to_send_nobody_here() -> None:
    rt = Realtime()
    async with rt:
        rt._backend.broker.troubles = lambda: ["redis is away"]  # type: ignore[method-assign]
        assert rt.health() == Health(True, ("redis is away",))
