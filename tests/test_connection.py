"""One live connection: what it is told, what it says, and how it ends, however that begins.

The law of this file: what can be seen from outside is seen from outside, by a client of an app; only what has a
clock is asked on the connection itself, with the time as an argument. The sweeper is not waited for: a test that
needs its look calls it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from typing import Any

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from starlette_rt import (
    EventError,
    RateLimit,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    realtime,
)
from starlette_rt import connection as module
from starlette_rt.connection import Connection
from starlette_rt.outbox import OutboxLimits
from starlette_rt.seams import SEAM_EXTENSION, SendSeam
from starlette_rt.testing import Client, Closed, Refused, connect, lifespan

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

DEADLINE = 5.0  # seconds that any wait of these tests may take
Hook = Callable[..., Awaitable[None]]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second that a peer is given, and the sweeper's half second, are a few turns here."""
    monkeypatch.setattr(module, "GIVE_UP", 0.05)
    monkeypatch.setattr(module, "FAULTS", RateLimit("50/hour"))  # which does not refill while a test runs
    monkeypatch.setattr(realtime, "SWEEP", 0.02)


class Stage:
    """An app with one route, whose hooks are the test's; it notes what its connections live through."""

    def __init__(
        self,
        *,
        connected: Hook | None = None,
        received: Hook | None = None,
        disconnected: Hook | None = None,
        wrapped: Callable[[ASGIApp], ASGIApp] = lambda app: app,
        outbox: OutboxLimits | None = None,
        **settings: Any,
    ) -> None:
        self.rt = Realtime(outbox=outbox or OutboxLimits(), presence_grace=0)
        self.connections: list[Connection] = []
        self.heard: list[Any] = []
        self.codes: list[int] = []
        stage = self

        class Endpoint(RealtimeEndpoint):
            async def on_connect(self, websocket: WebSocket) -> None:
                stage.connections.append(self.connection)
                if connected is None:
                    await websocket.accept()
                    await self.join("lobby")
                else:
                    await connected(self, websocket)

            async def on_receive(self, websocket: WebSocket, data: Any) -> None:
                if received is not None:
                    await received(self, data)
                stage.heard.append(data)

            async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
                stage.codes.append(close_code)
                if disconnected is not None:
                    await disconnected(self)

        for name, value in settings.items():
            setattr(Endpoint, name, value)
        Endpoint._prepare()
        self.app = wrapped(
            Starlette(
                routes=[WebSocketRoute("/", Endpoint)],
                middleware=[Middleware(RealtimeMiddleware, realtime=self.rt)],
            )
        )

    @property
    def connection(self) -> Connection:
        return self.connections[-1]

    @property
    def totals(self) -> dict[str, int]:
        return dict(self.rt.metrics.totals)  # type: ignore[attr-defined]

    @asynccontextmanager
    async def open(self, count: int = 1) -> AsyncIterator[Any]:
        """One client, or so many; at the end nothing of any of them is left."""
        async with lifespan(self.app):
            async with AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(connect(self.app, "/")) for _ in range(count)]
                yield clients[0] if count == 1 else clients
            await until(lambda: not self.rt.connections)
            await until(lambda: not self.rt.watched)  # one that abused us is watched until it has been dropped
            assert not self.rt.hub.groups
            assert len(self.codes) == len([one for one in self.connections if one.accepted])

    async def say(self, *data: Any, **options: Any) -> None:
        """Broadcast, and let the turn end."""
        for each in data:
            await self.rt.broadcast("lobby", each, **options)
        await turns()

    def look(self, later: float) -> None:
        """Let the connection see itself as the sweeper would so many seconds from now."""
        self.connection.look(self.rt.tasks.time() + later)


async def until(ready: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE):
        while not ready():
            await checkpoint()


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await checkpoint()


def said(client: Client) -> list[Any]:
    """What has arrived at the client."""
    return [msgspec.json.decode(raw) for raw in client.pending]


def small(**bounds: Any) -> OutboxLimits:
    return OutboxLimits(messages=5, **bounds)


# A peer that does not read


async def test_a_peer_that_falls_too_far_behind_is_closed_and_the_others_lose_nothing() -> None:
    stage = Stage(outbox=small())
    async with stage.open(2) as (other, slow):
        slow.stall()
        await stage.say(0)
        await stage.say(*range(1, 20))
        assert said(other) == list(range(20))
        slow.resume()
        assert await slow.closed() == 4000
        assert slow.close_reason == "slow consumer"
        await until(lambda: stage.codes == [4000])
        assert stage.totals["evicted.4000"] == 1
        await stage.say("more")
        assert said(other)[-1] == "more"


@pytest.mark.parametrize("count", [1, 5, 6, 7, 30])
async def test_a_message_is_never_lost_in_silence(count: int) -> None:
    """Each of them arrives, or the connection is closed and the client knows."""
    stage = Stage(outbox=small())
    async with stage.open() as client:
        client.stall()
        await stage.say(0)
        await stage.say(*range(1, count))
        client.resume()
        await turns()
        assert (said(client) == list(range(count))) is (client.close_code is None)
        assert (client.close_code is None) is (count <= 6)  # one on its way, five in the outbox


async def test_a_backlog_is_bounded_in_bytes_too() -> None:
    stage = Stage(outbox=OutboxLimits(bytes=1000))
    async with stage.open() as client:
        client.stall()
        await stage.say("x" * 500)
        await stage.say("x" * 500)
        assert stage.connection.is_open
        await stage.say("x" * 500)
        assert not stage.connection.is_open
        client.resume()
        assert await client.closed() == 4000


async def test_drop_oldest_keeps_the_latest_and_counts_the_rest() -> None:
    stage = Stage(outbox=small(overflow="drop_oldest"))
    async with stage.open() as client:
        client.stall()
        await stage.say(0)
        await stage.say(*range(1, 20))
        client.resume()
        await turns()
        assert said(client) == [0, 15, 16, 17, 18, 19]
        assert stage.totals["dropped"] == 14
        assert client.close_code is None


async def test_drop_newest_keeps_the_first_and_counts_the_rest() -> None:
    stage = Stage(outbox=small(overflow="drop_newest"))
    async with stage.open() as client:
        client.stall()
        await stage.say(0)
        await stage.say(*range(1, 20))
        client.resume()
        await turns()
        assert said(client) == [0, 1, 2, 3, 4, 5]
        assert stage.totals["dropped"] == 14


async def test_what_is_ephemeral_goes_first() -> None:
    stage = Stage(outbox=small())
    async with stage.open() as client:
        client.stall()
        await stage.say(0)
        await stage.say(*"abcde", ephemeral=True)
        await stage.say(1, 2, 3)
        client.resume()
        await turns()
        assert said(client) == [0, "d", "e", 1, 2, 3]
        assert stage.totals["dropped"] == 3


async def test_of_one_key_only_the_latest_waits() -> None:
    stage = Stage(outbox=small())
    async with stage.open() as client:
        client.stall()
        await stage.say(0)
        for number in range(30):
            await stage.say(number, ephemeral=True, key="cursor")
        await stage.say(1)
        client.resume()
        await turns()
        assert said(client) == [0, 29, 1]


async def test_a_backlog_goes_out_whole_and_in_order_when_the_peer_reads_again() -> None:
    stage = Stage()
    async with stage.open() as client:
        client.stall()
        for number in range(10):
            await stage.say([number, "x" * 20_000])  # more than one hand-over takes
        client.resume()
        await until(lambda: len(client.pending) == 10)
        await stage.say(10)
        assert [each if each == 10 else each[0] for each in said(client)] == list(range(11))


async def test_a_peer_that_takes_nothing_for_too_long_is_evicted_though_little_waits() -> None:
    stage = Stage(outbox=OutboxLimits(stall=3.0))
    async with stage.open() as client:
        client.stall()
        await stage.say(1)
        stage.look(2.9)
        assert stage.connection.is_open
        stage.look(3.1)
        assert not stage.connection.is_open
        client.resume()
        assert await client.closed() == 4000
        assert said(client) == [1]
        assert stage.totals["evicted.4000"] == 1


def paced(takes: list[anyio.Event]) -> Callable[[ASGIApp], ASGIApp]:
    """A server whose peer takes one message for each event that is set."""

    def wrap(app: ASGIApp) -> ASGIApp:
        async def called(scope: Scope, receive: Receive, send: Send) -> None:
            turn = iter(takes)

            async def wait(message: Message) -> None:
                if message["type"] == "websocket.send":
                    await next(turn).wait()
                await send(message)

            await app(scope, receive, wait)

        return called

    return wrap


async def test_a_slow_peer_that_takes_something_now_and_then_stays() -> None:
    takes = [anyio.Event() for _ in range(3)]
    stage = Stage(wrapped=paced(takes))
    async with stage.open() as client:
        await stage.say(1, 2, 3)
        for take in takes:
            began = stage.connection.paused_at
            assert began is not None
            await anyio.sleep(0.002)
            take.set()
            await turns()
            assert take is takes[-1] or stage.connection.paused_at > began
        assert stage.connection.paused_at is None
        assert not stage.rt.watched
        assert said(client) == [1, 2, 3]
        stage.look(100)
        assert stage.connection.is_open


async def test_an_evicted_peer_that_reads_not_even_the_close_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GIVE_UP", 60.0)
    stage = Stage(outbox=small())
    async with stage.open() as client:
        client.stall()
        await stage.say(*range(20))
        await stage.say(*range(20))
        stage.look(module.GIVE_UP * 0.9)
        await turns()
        assert client.close_code is None
        stage.look(module.GIVE_UP * 1.1)
        assert await client.closed() == 1006
        assert stage.codes == [4000]
        assert stage.totals["aborted"] == 1


async def test_a_peer_that_leaves_with_a_backlog_is_no_slow_consumer() -> None:
    stage = Stage()
    async with stage.open() as client:
        client.stall()
        await stage.say(1)
        await stage.say(2)
        await client.close(4999)
        await until(lambda: stage.codes == [4999])
    assert "evicted.4000" not in stage.totals


def stuck(app: ASGIApp) -> ASGIApp:
    """A server whose ``send()`` of a message never returns, not even when the peer has left."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        async def block(message: Message) -> None:
            if message["type"] == "websocket.send":
                await anyio.sleep_forever()
            await send(message)

        await app(scope, receive, block)

    return called


async def test_a_send_that_outlives_its_peer_is_given_up_and_counted_as_no_eviction() -> None:
    stage = Stage(wrapped=stuck)
    async with stage.open() as client:
        await stage.say(1)
        await client.close()
        await until(lambda: stage.codes == [1000])
        assert stage.rt.watched
        stage.look(module.GIVE_UP * 0.9)
        assert stage.rt.watched
        stage.look(stage.rt.outbox.stall + module.GIVE_UP)
        await until(lambda: not stage.rt.watched)
        stage.look(100)
    assert "evicted.4000" not in stage.totals
    assert stage.codes == [1000]


async def test_a_close_that_outlives_its_peer_keeps_its_deadline() -> None:
    stage = Stage(wrapped=stuck, outbox=OutboxLimits(close=50.0))
    async with stage.open() as client:
        await stage.say(1)
        await stage.connection.close(4321)
        await client.close()
        await until(lambda: stage.codes == [4321])
        stage.look(49.0)
        assert stage.rt.watched
        stage.look(51.0)
        await until(lambda: not stage.rt.watched)
    assert stage.totals["aborted"] == 1


# Closing


async def test_a_close_comes_after_all_that_was_said_and_before_nothing() -> None:
    stage = Stage()
    async with stage.open() as client:
        await stage.rt.broadcast("lobby", 1)
        await stage.connection.push(2)
        await stage.connection.close(4321, "enough")
        await stage.connection.push(3)
        await stage.say(4)
        assert await client.closed() == 4321
        assert client.close_reason == "enough"
        assert said(client) == [1, 2]


async def test_a_close_waits_for_a_peer_that_is_behind() -> None:
    stage = Stage()
    async with stage.open() as client:
        client.stall()
        await stage.say(1)
        await stage.say(2)
        await stage.connection.close()
        await stage.say(3)
        assert client.close_code is None
        client.resume()
        assert await client.closed() == 1000
        assert said(client) == [1, 2]


async def test_the_first_close_counts() -> None:
    stage = Stage()
    async with stage.open() as client:
        client.stall()
        await stage.say(1)
        await stage.connection.close(4001)
        await stage.connection.close(4002)
        client.resume()
        assert await client.closed() == 4001
        await stage.connection.close(4003)
    assert stage.codes == [4001]


async def test_a_close_that_is_not_taken_in_time_drops_the_transport() -> None:
    stage = Stage(outbox=OutboxLimits(close=2.0))
    async with stage.open() as client:
        client.stall()
        await stage.say(1)
        await stage.say(2)
        await stage.connection.close(4321)
        stage.look(1.9)
        await turns()
        assert client.close_code is None
        stage.look(2.1)
        assert await client.closed() == 1006
        assert stage.totals["aborted"] == 1
        assert stage.codes == [4321]


def silent(app: ASGIApp) -> ASGIApp:
    """A server that does not say when the connection is over."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        async def wait() -> Message:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                await anyio.sleep_forever()
            return message

        await app(scope, wait, send)

    return called


async def test_a_close_that_the_peer_does_not_answer_ends_the_connection_all_the_same() -> None:
    stage = Stage(wrapped=silent)
    async with stage.open() as client:
        await stage.connection.close(4321)
        assert await client.closed() == 4321
        await turns()
        assert stage.codes == []
        assert stage.connection in stage.rt.watched
        stage.look(stage.rt.outbox.close + 0.1)
        await until(lambda: stage.codes == [4321])
        assert "aborted" not in stage.totals  # it had taken everything


async def test_what_is_said_in_the_turn_of_the_close_can_be_too_much() -> None:
    stage = Stage(outbox=small())
    async with stage.open() as client:
        client.stall()
        await stage.say(1)
        for number in range(20):
            await stage.rt.broadcast("lobby", number)
        await stage.connection.close(4321)
        client.resume()
        assert await client.closed() == 4000
        assert said(client) == [1]
    assert stage.codes == [4000]


async def test_a_reason_is_cut_to_what_a_close_frame_carries() -> None:
    stage = Stage()
    async with stage.open() as client:
        await stage.connection.close(4321, "ä" * 100)
        assert await client.closed() == 4321
        assert client.close_reason == "ä" * 61


async def test_a_reason_that_is_no_text_is_mended() -> None:
    stage = Stage()
    async with stage.open() as client:
        await stage.connection.close(4321, "so \ud800 it is")
        assert await client.closed() == 4321
        assert client.close_reason == "so ? it is"


@pytest.mark.parametrize("code", [0, 999, 1002, 1004, 1005, 1006, 1015, 2999, 5000])
async def test_a_code_that_may_not_be_sent_is_refused_to_the_host(code: int) -> None:
    stage = Stage()
    async with stage.open():
        with pytest.raises(ValueError, match=str(code)):
            await stage.connection.close(code)
        assert stage.connection.is_open


async def test_where_nobody_can_be_told_such_a_code_becomes_1011() -> None:
    async def fail(endpoint: Any, data: Any) -> None:
        raise WebSocketException(1006)

    stage = Stage(received=fail)
    async with stage.open() as client:
        await client.send_json(1)
        assert await client.closed() == 1011


async def test_a_server_that_shuts_down_lets_everything_out_first() -> None:
    stage = Stage()
    async with stage.open() as client:
        await stage.rt.broadcast("lobby", 1)
        stage.connection.on_closing(1012)
        assert await client.closed() == 1012
        assert client.close_reason == "service restart"
        assert said(client) == [1]


async def test_waiting_for_the_end_ends_however_it_comes() -> None:
    ended: list[str] = []
    stage = Stage()

    async def wait(name: str) -> None:
        await stage.connection.wait_closed()
        ended.append(name)

    async with stage.open() as client, anyio.create_task_group() as group:
        group.start_soon(wait, "one")
        group.start_soon(wait, "two")
        await turns()
        assert ended == []
        await client.close()
    assert sorted(ended) == ["one", "two"]
    with anyio.fail_after(DEADLINE):
        await wait("late")


async def test_waiting_for_the_end_ends_when_this_side_closes() -> None:
    stage = Stage()
    async with stage.open():
        await stage.connection.close()
        with anyio.fail_after(DEADLINE):
            await stage.connection.wait_closed()


# Before the accept


async def test_what_is_said_before_the_accept_waits_for_it() -> None:
    async def early(endpoint: Any, websocket: WebSocket) -> None:
        await endpoint.join("lobby")
        await stage.say(1)
        await endpoint.push(2)
        await turns()
        endpoint.connection.on_pause()
        endpoint.connection.on_resume()  # a transport can be full of what was there before the handshake
        await turns()
        await websocket.accept()
        await endpoint.push(3)

    stage = Stage(connected=early)
    async with stage.open() as client:
        await turns()
        assert said(client) == [1, 2, 3]


async def test_a_close_before_the_accept_refuses() -> None:
    async def close(endpoint: Any, websocket: WebSocket) -> None:
        await endpoint.close(4321, "not now")
        await endpoint.close(4322)

    stage = Stage(connected=close)
    with pytest.raises(Refused) as caught:
        async with stage.open():
            raise AssertionError("it was accepted")
    assert caught.value.status == 403
    assert stage.connection.close_code == 4321
    assert stage.connection.close_reason == "not now"
    assert stage.codes == []


async def test_a_backlog_before_the_accept_is_bounded_too() -> None:
    async def flood(endpoint: Any, websocket: WebSocket) -> None:
        await endpoint.join("lobby")
        await stage.say(*range(20))
        await stage.say(*range(20))
        await websocket.accept()

    stage = Stage(connected=flood, outbox=small())
    with pytest.raises(Refused):
        async with stage.open():
            raise AssertionError("it was accepted")
    assert stage.totals["evicted.4000"] == 1
    assert stage.codes == []


async def test_a_hook_that_does_not_accept_refuses() -> None:
    async def ponder(endpoint: Any, websocket: WebSocket) -> None:
        await turns()

    stage = Stage(connected=ponder)
    with pytest.raises(Refused) as caught:
        async with stage.open():
            raise AssertionError("it was accepted")
    assert caught.value.status == 403
    assert stage.codes == []


async def test_who_is_sent_away_as_it_comes_is_refused_before_any_hook() -> None:
    stage = Stage()
    register = stage.rt.register

    def send_away(connection: Connection) -> None:
        register(connection)
        connection.begin_close(4500, "not you")

    stage.rt.register = send_away  # type: ignore[method-assign]
    with pytest.raises(Refused):
        async with stage.open():
            raise AssertionError("it was accepted")
    assert stage.connections == []


# What arrives


async def test_handlers_of_one_connection_run_in_order_and_one_at_a_time() -> None:
    running: list[int] = []

    async def handle(endpoint: Any, data: Any) -> None:
        running.append(data)
        assert len(running) == 1
        await turns(3 - data % 3)
        running.remove(data)

    stage = Stage(received=handle)
    async with stage.open() as client:
        for number in range(10):
            await client.send_json(number)
        await until(lambda: len(stage.heard) == 10)
        assert stage.heard == list(range(10))


async def test_what_was_received_before_the_peer_left_is_still_handled() -> None:
    async def handle(endpoint: Any, data: Any) -> None:
        await turns()
        await endpoint.push(data)  # to nobody

    stage = Stage(received=handle)
    async with stage.open() as client:
        for number in range(10):
            await client.send_json(number)
        await client.close()
        await until(lambda: stage.codes == [1000])
        assert stage.heard == list(range(10))


async def test_after_a_close_of_ours_nothing_more_is_handled() -> None:
    async def handle(endpoint: Any, data: Any) -> None:
        await turns()
        await endpoint.close(4321)

    stage = Stage(received=handle)
    async with stage.open() as client:
        client.stall()  # it is closing for as long as we like
        await stage.say("x")
        for number in range(5):
            await client.send_json(number)
        await until(lambda: stage.heard == [0])
        await client.send_json("late")
        await turns()
        client.resume()
        assert await client.closed() == 4321
    assert stage.heard == [0]


async def test_a_full_inbox_makes_the_peer_wait_until_half_of_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INBOX", 4)
    gates = [anyio.Event() for _ in range(20)]

    async def handle(endpoint: Any, data: Any) -> None:
        await gates[data].wait()

    stage = Stage(received=handle)
    async with stage.open() as client:
        for number in range(20):
            await client.send_json(number)
        await turns()
        waiting = client._socket.inbound.messages  # the peer's, not ours
        assert len(waiting) == 15
        gates[0].set()
        await turns()
        assert len(waiting) == 15
        gates[1].set()
        await turns()
        assert len(waiting) == 13
        for gate in gates:
            gate.set()
        await until(lambda: stage.heard == list(range(20)))
        assert client.close_code is None


@pytest.mark.parametrize("handled", [0, 1])
async def test_an_inbox_that_stays_full_closes_and_one_that_moves_does_not(
    handled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_INBOX", 4)
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    gates = [anyio.Event() for _ in range(20)]

    async def handle(endpoint: Any, data: Any) -> None:
        await gates[data].wait()

    stage = Stage(received=handle)
    async with stage.open() as client:
        for number in range(5):
            await client.send_json(number)
        await turns()
        for gate in gates[:handled]:
            gate.set()
        with anyio.move_on_after(0.2 if handled else DEADLINE):
            await client.closed()
        assert client.close_code == (None if handled else 4002)
        assert client.close_reason == (None if handled else "too many messages in flight")
        for gate in gates:
            gate.set()


async def test_a_message_that_is_too_large_is_answered_and_not_handled() -> None:
    stage = Stage(max_message_size=10)
    async with stage.open() as client:
        await client.send('"12345678"')
        await client.send('"123456789"')
        assert (await client.receive_json())["code"] == "too_large"
        assert stage.heard == ["12345678"]


async def test_a_size_is_one_of_bytes_whatever_the_letters() -> None:
    stage = Stage(max_message_size=10)
    async with stage.open() as client:
        await client.send('"ääää"')
        await client.send('"äääää"')
        await client.send(b"{}")
        assert (await client.receive_json())["code"] == "too_large"
        await until(lambda: stage.heard == ["ääää", {}])


async def test_a_limit_takes_before_anything_is_decoded_and_says_when_to_come_again() -> None:
    stage = Stage(limits=[RateLimit("2/hour"), RateLimit("100/hour", per="ip")])
    async with stage.open() as client:
        for number in range(2):
            await client.send_json(number)
        await client.send("no json")
        answer = await client.receive_json()
        assert (answer["code"], answer["temporary"]) == ("rate_limited", True)
        assert 0 < answer["retry_after_ms"] <= 1_800_000
        assert stage.heard == [0, 1]


# Refusals and failures


async def refused(stage: Stage, client: Client, text: str) -> list[Any]:
    """Send the same until it is too much; return the answers."""
    for _ in range(60):
        try:
            await client.send(text)
        except Closed:
            break
    await client.closed()
    return said(client)


async def test_who_keeps_on_sending_what_cannot_be_understood_is_closed() -> None:
    stage = Stage()
    async with stage.open() as client:
        answers = await refused(stage, client, "no json")
        assert [answer["code"] for answer in answers] == ["bad_message"] * 50
        assert (client.close_code, client.close_reason) == (4502, "too many invalid messages")
        assert stage.totals["rejected.bad_message"] == 51


async def test_who_keeps_on_after_being_told_to_wait_is_closed_and_may_come_back() -> None:
    stage = Stage(limits=[RateLimit("1/hour")])
    async with stage.open() as client:
        answers = await refused(stage, client, "1")
        assert [answer["code"] for answer in answers] == ["rate_limited"] * 51  # the first could not know
        assert client.close_code == 4003


async def test_who_waits_as_long_as_it_was_told_is_never_closed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAULTS", RateLimit("50/day"))
    stage = Stage(limits=[RateLimit("1/minute")])
    async with stage.open() as client:
        time, later = stage.rt.tasks.time, 0.0
        stage.rt.tasks.time = lambda: time() + later  # type: ignore[method-assign]
        for _ in range(80):
            await client.send_json(1)
            await client.send_json(2)
            later += (await client.receive_json())["retry_after_ms"] / 1000
        assert client.close_code is None
        assert set(stage.heard) == {1}
        for _ in range(60):
            await client.send_json(2)
            await turns(2)
            if client.close_code:
                break
        assert client.close_code == 4003


async def test_a_handlers_refusals_count_as_well() -> None:
    async def refuse(endpoint: Any, data: Any) -> None:
        raise EventError("closed", "come back on Monday")

    stage = Stage(received=refuse)
    async with stage.open() as client:
        assert len(await refused(stage, client, "1")) == 50
        assert client.close_code == 4502


async def test_the_budget_of_refusals_refills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAULTS", RateLimit("50/second"))
    stage = Stage()
    async with stage.open() as client:
        for _ in range(50):
            await client.send("no json")
        await until(lambda: len(client.pending) == 50)
        await anyio.sleep(0.05)  # one refills in 0.02 s
        await client.send("no json")
        await until(lambda: len(client.pending) == 51)
        assert client.close_code is None


async def test_a_refusal_quotes_what_no_wire_carries_and_nobody_loses_anything() -> None:
    async def refuse(endpoint: Any, data: Any) -> None:
        await stage.rt.broadcast("lobby", "for all")
        raise EventError("unknown", "no \ud800 here")

    stage = Stage(received=refuse)
    async with stage.open(2) as (client, other):
        await client.send_json(1)
        assert await other.receive_json() == "for all"
        assert await client.receive_json() == "for all"
        assert (await client.receive_json())["message"] == "no ? here"


async def test_a_text_that_is_none_is_the_hosts_error_and_nobody_loses_anything() -> None:
    async def send(endpoint: Any, websocket: WebSocket) -> None:
        await websocket.accept()
        await endpoint.join("lobby")
        await stage.rt.broadcast("lobby", "for all")
        with pytest.raises(UnicodeEncodeError):
            await websocket.send_text("\ud800")
        await websocket.send_text('"ä"')

    stage = Stage(connected=send)
    async with stage.open() as client:
        assert await client.receive_json() == "for all"
        assert await client.receive_json() == "ä"


async def test_the_wrong_kind_of_message_closes_where_no_error_can_be_said() -> None:
    stage = Stage(encoding="text")
    async with stage.open() as client:
        await client.send("text")
        await client.send(b"bytes")
        assert await client.closed() == 1003
        assert client.close_reason == "this endpoint takes text messages"
        assert said(client) == []
        assert stage.heard == ["text"]


async def test_writing_to_a_peer_that_has_left_ends_the_handler_and_is_no_failure() -> None:
    reached: list[str] = []

    async def connected(endpoint: Any, websocket: WebSocket) -> None:
        endpoint.websocket = websocket
        await websocket.accept()

    async def received(endpoint: Any, data: Any) -> None:
        await endpoint.connection.wait_closed()
        reached.append("before")
        await endpoint.websocket.send_json(data)
        reached.append("after")

    stage = Stage(connected=connected, received=received)
    async with stage.open() as client:
        await client.send_json(1)
        await turns()
        await client.close()
        await until(lambda: bool(stage.codes))
    assert reached == ["before"]
    assert "failed" not in stage.totals


async def test_http_exceptions_of_a_handler_are_refusals_by_their_status() -> None:
    async def fail(endpoint: Any, data: Any) -> None:
        raise HTTPException(404, "no such board")

    stage = Stage(received=fail)
    async with stage.open() as client:
        await client.send_json(1)
        answer = await client.receive_json()
        assert (answer["code"], answer["message"]) == ("http_404", "no such board")
        assert client.close_code is None


async def fail_on_odd(endpoint: Any, data: Any) -> None:
    if data % 2:
        raise RuntimeError(f"{data} is odd")


async def test_ten_failures_in_a_row_close() -> None:
    stage = Stage(received=fail_on_odd)
    async with stage.open() as client:
        for _ in range(9):
            await client.send_json(1)
        await client.send_json(2)  # it was no row
        for _ in range(9):
            await client.send_json(1)
        await until(lambda: len(client.pending) == 18)
        assert client.close_code is None
        await client.send_json(1)
        assert await client.closed() == 1011
        assert [answer["code"] for answer in said(client)] == ["internal"] * 19
        assert stage.totals["failed"] == 19


# The end


def cancellable(scopes: list[anyio.CancelScope]) -> Callable[[ASGIApp], ASGIApp]:
    """A server that cancels an app's task, as servers do that cannot wait."""

    def wrap(app: ASGIApp) -> ASGIApp:
        async def called(scope: Scope, receive: Receive, send: Send) -> None:
            with anyio.CancelScope() as cancelling:
                if scope["type"] == "websocket":
                    scopes.append(cancelling)
                await app(scope, receive, send)

        return called

    return wrap


async def test_a_cancelled_app_still_disconnects_once_and_whole() -> None:
    scopes: list[anyio.CancelScope] = []
    ended: list[str] = []

    async def ending(endpoint: Any) -> None:
        await turns()
        await stage.say("somebody left")
        ended.append("whole")

    stage = Stage(disconnected=ending, wrapped=cancellable(scopes))
    async with stage.open(2) as (client, other):
        scopes[0].cancel()
        assert await client.closed() == 1006
        await until(lambda: ended == ["whole"])
        assert stage.codes == [1001]
        assert said(other) == ["somebody left"]
        assert said(client) == []


async def test_what_was_received_before_the_app_was_cancelled_is_handled() -> None:
    scopes: list[anyio.CancelScope] = []

    async def handle(endpoint: Any, data: Any) -> None:
        await turns()

    stage = Stage(received=handle, wrapped=cancellable(scopes))
    async with stage.open() as client:
        for number in range(5):
            await client.send_json(number)
        scopes[0].cancel()
        await until(lambda: stage.codes == [1001])
        assert stage.heard == list(range(5))


async def test_on_disconnect_has_its_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)

    async def hang(endpoint: Any) -> None:
        await anyio.sleep_forever()

    stage = Stage(disconnected=hang)
    async with stage.open() as client:
        await client.close()
        await until(lambda: not stage.rt.connections)
    assert stage.codes == [1000]


async def test_an_error_in_on_disconnect_is_logged_and_ends_nothing_else() -> None:
    async def fail(endpoint: Any) -> None:
        raise RuntimeError("too late")

    stage = Stage(disconnected=fail)
    async with stage.open():
        pass
    assert stage.totals["failed"] == 1
    assert stage.totals["disconnected.1000"] == 1


async def test_a_handler_that_does_not_end_is_cancelled_when_the_peer_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    ended: list[str] = []

    async def hang(endpoint: Any, data: Any) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    stage = Stage(received=hang)
    async with stage.open() as client:
        await client.send_json(1)
        await client.send_json(2)
        await turns()
        await client.close()
        await until(lambda: stage.codes == [1000])
    assert ended == ["cancelled"]
    assert stage.heard == []


async def test_a_handler_that_resists_is_left_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    monkeypatch.setattr(module, "GIVE_UP", 0.01)
    gate = anyio.Event()

    async def resist(endpoint: Any, data: Any) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await gate.wait()
            except BaseException:
                await gate.wait()

    stage = Stage(received=resist)
    async with stage.open() as client:
        await client.send_json(1)
        await client.send_json(2)
        await turns()
        await client.close()
        await until(lambda: stage.codes == [1000])
        assert stage.heard == []
        gate.set()
        await turns()
        assert stage.heard == [1]


# Beside the handlers


async def test_what_runs_beside_the_handlers_is_cancelled_at_the_end_also_if_it_had_not_begun() -> None:
    ended: list[str] = []

    async def tick(name: str) -> None:
        ended.append(f"{name} began")
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(f"{name} ended")

    stage = Stage()
    async with stage.open() as client:
        stage.connection.start_soon(tick, "one")
        await turns()
        await client.close()
        await until(lambda: bool(stage.codes))
        await turns()
        assert ended == ["one began", "one ended"]
        stage.connection.start_soon(tick, "late")
        await turns()
        assert ended == ["one began", "one ended"]


async def test_what_runs_beside_the_handlers_may_end_fail_and_refuse() -> None:
    async def finish() -> None:
        await stage.connection.push("done")

    async def fail() -> None:
        raise RuntimeError("no")

    async def refuse() -> None:
        raise EventError("no", "not today")

    stage = Stage()
    async with stage.open() as client:
        for function in (finish, fail, refuse):
            stage.connection.start_soon(function)
        await until(lambda: len(client.pending) == 3)
        await turns()
        answers = [each if isinstance(each, str) else each["code"] for each in said(client)]
        assert sorted(answers) == ["done", "internal", "no"]  # trio shuffles what may run at once
        assert stage.connection._tasks == set()  # it keeps none that have ended


request_id: ContextVar[str] = ContextVar("request_id", default="nobody")


@pytest.mark.parametrize("inherited", [True, False])
async def test_a_context_variable_set_in_on_connect_is_seen_by_every_later_hook(inherited: bool) -> None:
    seen: list[str] = []

    async def connected(endpoint: Any, websocket: WebSocket) -> None:
        seen.append(request_id.get())
        request_id.set("ada")
        await websocket.accept()

    async def received(endpoint: Any, data: Any) -> None:
        seen.append(request_id.get())
        endpoint.connection.start_soon(beside)
        await turns()

    async def beside() -> None:
        seen.append(f"{request_id.get()} beside")

    async def disconnected(endpoint: Any) -> None:
        seen.append(request_id.get())

    stage = Stage(connected=connected, received=received, disconnected=disconnected)
    if inherited:
        request_id.set("outer")
    async with stage.open() as client:
        await client.send_json(1)
        await until(lambda: stage.heard == [1])
    assert seen == ["outer" if inherited else "nobody", "ada", "ada beside", "ada"]
    assert request_id.get() == ("outer" if inherited else "nobody")


# Function style


async def test_a_body_reads_what_is_said_and_is_cancelled_when_the_peer_leaves() -> None:
    heard: list[Any] = []
    rt = Realtime()

    async def board(websocket: WebSocket) -> None:
        async with rt.accept(websocket) as connection:
            async for data in connection:
                heard.append(data)
                connection.start_soon(connection.push, data)
                if data == "wait":
                    try:
                        await anyio.sleep_forever()
                    finally:
                        heard.append("cancelled")
        heard.append("after")

    middleware = [Middleware(RealtimeMiddleware, realtime=rt)]
    app = Starlette(routes=[WebSocketRoute("/", board)], middleware=middleware)
    async with connect(app, "/") as client:
        await client.send_json("hello")
        assert await client.receive_json() == "hello"
        await client.send_json("wait")
        assert await client.receive_json() == "wait"
    assert heard == ["hello", "wait", "cancelled", "after"]


# What it tells


async def test_it_says_who_it_is_and_where() -> None:
    stage = Stage()
    async with stage.open() as client:
        connection = stage.connection
        await connection.join("lobby", presence="members")
        await connection.track("lobby")
        await connection.update("lobby", {"at": 1})
        assert connection.groups == {"lobby"}
        assert connection.is_open
        assert connection.close_code is None
        assert connection.close_reason == ""
        assert connection.id in repr(connection)
        assert connection.user.identity in repr(connection)
        await connection.untrack("lobby")
        await connection.leave("lobby")
        assert connection.groups == frozenset()
        await connection.broadcast("lobby", "nobody hears it")
        await client.close(4444)
        await until(lambda: bool(stage.codes))
        assert not connection.is_open
        assert connection.close_code == 4444


async def test_a_client_that_gives_no_code_has_given_none() -> None:
    stage = Stage()
    async with stage.open() as client:
        client._socket.leave(0, "")
        await until(lambda: stage.codes == [1005])


async def test_only_one_of_us_reads() -> None:
    stage = Stage()
    async with stage.open():
        with pytest.raises(RuntimeError, match="declare a handler with @event"):
            stage.connection.events()
        with pytest.raises(RuntimeError, match="on_receive"):
            aiter(stage.connection)


async def test_one_who_says_much_without_a_pause_lets_it_be_written() -> None:
    async def flood(endpoint: Any, websocket: WebSocket) -> None:
        await websocket.accept()
        for number in range(300):
            await endpoint.push(number)
        for number in range(300, 600):
            await websocket.send_json(number)

    stage = Stage(connected=flood, outbox=OutboxLimits(messages=100))
    async with stage.open() as client:
        await until(lambda: len(client.pending) == 600)
        assert said(client) == list(range(600))


async def test_one_who_has_left_need_not_be_dropped_for_what_is_still_refused() -> None:
    left = anyio.Event()

    async def refuse(endpoint: Any, data: Any) -> None:
        await left.wait()
        raise EventError("no")

    stage = Stage(received=refuse)
    async with stage.open() as client:
        for number in range(60):
            await client.send_json(number)
        await client.close()
        await turns()
        left.set()
        await until(lambda: bool(stage.codes))
        assert not stage.rt.watched
    assert stage.codes == [1000]
    assert stage.rt.stats()["rejected.no"] == 60


@pytest.mark.parametrize("protocol", ["rt.v1.json", "rt.v1.msgpack"])
async def test_what_the_host_spelled_itself_is_an_event_to_who_speaks_the_protocol(protocol: str) -> None:
    async def connected(endpoint: Any, websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json({"a": 1})
        await websocket.send_text("no json")
        await websocket.send_bytes(b"raw")
        await websocket.close(4321)

    stage = Stage(connected=connected)
    async with connect(stage.app, "/", subprotocols=[protocol]) as client:
        await client.closed()
        frames: list[Any] = []
        for raw in client.pending:
            said = msgspec.json.decode(raw) if isinstance(raw, str) else msgspec.msgpack.decode(raw)
            frames += said if isinstance(said, list) else [said]
    raw = "cmF3" if protocol == "rt.v1.json" else b"raw"
    assert [frame.get("data") for frame in frames] == [None, {"a": 1}, "no json", raw]
    assert {frame["event"] for frame in frames[1:]} == {"message"}


async def test_an_ended_connection_lets_its_endpoint_go_without_the_collector() -> None:
    seen: list[Any] = []

    async def remembered(endpoint: Any, websocket: WebSocket) -> None:
        await websocket.accept()
        seen.append(weakref.ref(endpoint))

    stage = Stage(connected=remembered)
    gc.disable()
    try:
        async with stage.open():
            assert seen[0]() is not None
        await until(lambda: seen[0]() is None)
    finally:
        gc.enable()


# Where the server hands a message over itself


class Direct(SendSeam):
    """A seam whose server can hand over a message without a turn of the reader, as our class for uvicorn can."""

    def __init__(self, send: Any, relay: Any, receive: Any) -> None:
        super().__init__(send, relay)
        self.take = receive

    async def receive(self) -> Any:
        return await self.take()


def handed_over(stage: list[Stage]) -> Callable[[ASGIApp], ASGIApp]:
    def wrapped(app: ASGIApp) -> ASGIApp:
        async def served(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "websocket":
                seam = Direct(send, stage[0].rt.tasks.relay, receive)
                scope["extensions"] = {**scope["extensions"], SEAM_EXTENSION: seam}
                receive = seam.receive
            await app(scope, receive, send)

        return served

    return wrapped


async def test_a_message_that_the_server_hands_over_is_handled_without_the_reader() -> None:
    gate, stages = anyio.Event(), list[Stage]()

    async def connected(endpoint: Any, websocket: WebSocket) -> None:
        assert not endpoint.connection.on_message('"too early"')
        endpoint.connection.ping()
        await websocket.accept()

    async def received(endpoint: Any, data: Any) -> None:
        if data == "wait":
            await gate.wait()

    stages.append(stage := Stage(connected=connected, received=received, wrapped=handed_over(stages)))
    async with stage.open() as client:
        await until(lambda: bool(stage.connections) and stage.connections[0].is_open)
        (connection,) = stage.connections
        assert connection.on_message('"one"')
        assert connection.on_message(b'"two"')
        await until(lambda: stage.heard == ["one", "two"])
        assert connection.on_message('"wait"')
        await turns()
        for _ in range(module.MAX_INBOX - 1):  # plain, so there is no window
            assert connection.on_message("1")
        assert not connection.on_message('"the reader is to hold it back"')
        gate.set()
        await until(lambda: len(stage.heard) == 3 + module.MAX_INBOX - 1)
        connection.begin_close(4321)
        assert not connection.on_message('"too late"')
        assert await client.closed() == 4321


async def test_where_somebody_stands_between_the_server_and_us_the_reader_takes_every_message() -> None:
    stage = Stage()
    async with stage.open():
        assert not stage.connections[0].on_message('"past whoever wraps receive"')
