"""The function style: what lives between ``async with`` and its end, with plain clients and those of the protocol v1.

The law of this file: an app has one route with a body of the test's, and clients see what becomes of it; none of
that leaves a line above INFO, whatever a client says.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fastapi import Depends, FastAPI
from fastapi import WebSocket as FastAPIWebSocket
from starlette.exceptions import WebSocketException
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from starlette_rt import (
    CloseCode,
    Connection,
    ConnectionLimits,
    History,
    Identity,
    RateLimit,
    Realtime,
    RealtimeMiddleware,
)
from starlette_rt.connection import MAX_INBOX
from starlette_rt.gate import Denied
from starlette_rt.testing import connect, lifespan
from tests.test_dialogue import JSON, Talk, both, emit, turns
from tests.test_gate import BROWSER, PATIENCE, code_of, live, loud_lines, refusal, token, tokens

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

Body = Callable[[Connection], Awaitable[None]]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test of this file logs above INFO."""
    yield
    assert loud_lines(caplog) == []


def functions(rt: Realtime, body: Body, *, accept: bool = False, options: Any = None, **settings: Any) -> FastAPI:
    """A FastAPI app with one route in function style; ``app.state.ended`` says how often a body was left."""
    app = FastAPI()
    app.add_middleware(RealtimeMiddleware, realtime=rt, **settings)
    app.state.ended = []

    def current_user(websocket: FastAPIWebSocket) -> str | None:
        return websocket.headers.get("x-user")

    @app.websocket("/ws")
    async def ws(websocket: FastAPIWebSocket, user: str | None = Depends(current_user)) -> None:
        if accept:
            await websocket.accept()
        identity = Identity(user) if user else None
        try:
            async with rt.accept(websocket, identity=identity, **(options or {})) as connection:
                await body(connection)
        finally:
            app.state.ended.append(True)

    return app


async def echo(connection: Connection) -> None:
    async for data in connection:
        await connection.push(data)


async def never(connection: Connection) -> None:
    raise AssertionError("the body of a refused handshake ran")


@pytest.mark.parametrize("accept", [False, True], ids=["accepts", "has been accepted"])
async def test_a_body_reads_what_the_client_says_until_it_leaves(accept: bool) -> None:
    app = functions(Realtime(), echo, accept=accept)
    async with connect(app, "/ws", headers={"x-user": "ann"}) as client:
        for data in (1, {"two": 2}, "three"):
            await client.send_json(data)
            assert await client.receive_json() == data
        await client.send("no json")
        assert (await client.receive_json())["code"] == "bad_message"
    assert app.state.ended == [True]


async def test_the_hosts_identity_is_the_connections() -> None:
    rt = Realtime()

    async def body(connection: Connection) -> None:
        await connection.push(connection.user.identity)
        await connection.wait_closed()

    app = functions(rt, body)
    async with connect(app, "/ws", headers={"x-user": "ann"}) as client:
        assert await client.receive_json() == "ann"
        assert await rt.online(["ann", "bob"]) == {"ann"}
        await rt.push("ann", "for you")
        assert await client.receive_json() == "for you"


@pytest.mark.parametrize("accept", [False, True], ids=["accepts", "has been accepted"])
async def test_a_body_that_only_pushes_waits_for_the_end(accept: bool) -> None:
    seen: list[str] = []

    async def body(connection: Connection) -> None:
        await connection.join("news")
        seen.append("here")
        await connection.wait_closed()

    rt = Realtime()
    app = functions(rt, body, accept=accept)
    async with connect(app, "/ws") as client:
        await anyio.wait_all_tasks_blocked()
        for number in range(2 * MAX_INBOX):
            await client.send_json({"keepalive that nobody asks for": number})
        await anyio.wait_all_tasks_blocked()
        await rt.broadcast("news", 1)
        assert await client.receive_json() == 1
    assert seen == ["here"]
    assert app.state.ended == [True]
    assert rt.stats()["connections"] == 0


async def test_waiting_for_the_end_takes_no_message_from_a_body_that_reads() -> None:
    async def body(connection: Connection) -> None:
        connection.start_soon(connection.wait_closed)
        async for data in connection:
            await anyio.wait_all_tasks_blocked()
            await connection.push(data)

    async with connect(functions(Realtime(), body), "/ws") as client:
        for number in range(5):
            await client.send_json(number)
        assert [await client.receive_json() for _ in range(5)] == list(range(5))


async def test_a_body_is_cancelled_at_its_next_await_when_the_peer_leaves_and_ends_quietly() -> None:
    seen: list[str] = []

    async def body(connection: Connection) -> None:
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            seen.append("cancelled" if isinstance(error, anyio.get_cancelled_exc_class()) else "failed")
            raise

    app = functions(Realtime(), body)
    async with connect(app, "/ws"):
        await anyio.wait_all_tasks_blocked()
    assert seen == ["cancelled"]
    assert app.state.ended == [True]


async def test_a_body_that_ends_closes_with_1000_after_what_it_said() -> None:
    async def body(connection: Connection) -> None:
        await connection.push("bye")

    async with connect(functions(Realtime(), body), "/ws") as client:
        assert await client.receive_json() == "bye"
        assert await client.closed() == 1000


async def test_a_body_may_stop_reading_and_read_on() -> None:
    async def body(connection: Connection) -> None:
        async for data in connection:
            await connection.push(["first", data])
            break
        async for data in aiter(aiter(connection)):
            await connection.push(["then", data])

    async with connect(functions(Realtime(), body), "/ws") as client:
        for number in (1, 2, 3):
            await client.send_json(number)
        assert [await client.receive_json() for _ in range(3)] == [["first", 1], ["then", 2], ["then", 3]]


async def test_reading_in_a_shield_ends_with_the_peer() -> None:
    seen: list[Any] = []

    async def body(connection: Connection) -> None:
        with anyio.CancelScope(shield=True):
            seen.extend([data async for data in connection])
            seen.extend([data async for data in connection])

    async with connect(functions(Realtime(), body), "/ws") as client:
        await client.send_json(1)
        await anyio.wait_all_tasks_blocked()
    assert seen == [1]


async def test_an_exception_of_the_body_closes_with_1011_and_goes_on_to_the_host() -> None:
    async def body(connection: Connection) -> None:
        raise ZeroDivisionError("a bug of the host")

    with pytest.raises(ZeroDivisionError):
        async with connect(functions(Realtime(), body), "/ws") as client:
            assert await client.closed() == 1011


async def test_a_websocket_exception_closes_with_its_code_quietly() -> None:
    async def body(connection: Connection) -> None:
        raise WebSocketException(4321, "so it is")

    async with connect(functions(Realtime(), body), "/ws") as client:
        assert await client.closed() == 4321
        assert client.close_reason == "so it is"


async def test_a_disconnect_that_the_body_lets_through_is_a_normal_end() -> None:
    async def body(connection: Connection) -> None:
        raise WebSocketDisconnect(1001)

    async with connect(functions(Realtime(), body), "/ws") as client:
        assert await client.closed() == 1000


async def test_an_error_after_the_peer_has_left_still_goes_to_the_host() -> None:
    async def body(connection: Connection) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError("a bug in the cleaning up")

    with pytest.raises(ZeroDivisionError):
        async with connect(functions(Realtime(), body), "/ws"):
            await anyio.wait_all_tasks_blocked()


async def test_a_body_that_is_cancelled_by_its_host_closes_with_1001() -> None:
    async def body(connection: Connection) -> None:
        scope.cancel()
        await checkpoint()

    rt, scope = Realtime(), anyio.CancelScope()

    async def ws(websocket: WebSocket) -> None:
        with scope:
            async with rt.accept(websocket) as connection:
                await body(connection)

    async with connect(live(ws, realtime=rt), "/ws") as client:
        assert await client.closed() == 1001


async def test_the_hosts_websocket_speaks_through_the_connection() -> None:
    rt = Realtime()

    async def ws(websocket: WebSocket) -> None:
        async with rt.accept(websocket) as connection:
            await connection.push(1)
            await websocket.send_json(2)
            await connection.push(3)
            with pytest.raises(RuntimeError, match="the connection reads for you; write `async for"):
                await websocket.receive_text()
            await websocket.close(4321)

    async with connect(live(ws, realtime=rt), "/ws", subprotocols=["other", "rt.plain"]) as client:
        assert [await client.receive_json() for _ in range(3)] == [1, 2, 3]
        assert await client.closed() == 4321
        assert client.subprotocol == "rt.plain"


@pytest.mark.parametrize("accept", [False, True], ids=["before accept", "after the host's accept"])
async def test_a_refused_handshake_never_gets_to_the_body(accept: bool) -> None:
    app = functions(Realtime(), never, accept=accept, tokens=tokens)
    if accept:
        assert (await code_of(app))[0] == 4501
        assert (await code_of(app, **BROWSER))[0] == 4501
    else:
        assert (await refusal(app)).status == 401
        assert (await code_of(app, **BROWSER))[0] == 4501
    assert app.state.ended


async def test_a_refusal_outside_the_middleware_is_an_exception_of_the_host() -> None:
    async with Realtime() as rt:

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async with rt.accept(WebSocket(scope, receive, send), anonymous=False):
                raise AssertionError("nobody may come")

        with pytest.raises(Denied):
            async with connect(app, "/ws"):
                pass


@pytest.mark.parametrize(("anonymous", "enters"), [(None, False), (True, True), (False, False)])
async def test_accept_lets_guests_in_where_it_says_so(anonymous: bool | None, enters: bool) -> None:
    app = functions(Realtime(), echo, options={"anonymous": anonymous}, tokens=tokens)
    if enters:
        async with connect(app, "/ws") as client:
            await client.send_json(1)
            assert await client.receive_json() == 1
    else:
        assert (await refusal(app)).status == 401


async def test_accept_gives_its_slot_back() -> None:
    app = functions(Realtime(), echo, connections=ConnectionLimits(total=1))
    async with lifespan(app):
        for _ in range(2):
            async with connect(app, "/ws") as client:
                await client.send_json(1)
                assert await client.receive_json() == 1
                assert (await refusal(app)).status == 503


async def test_accept_takes_an_encoding_and_limits() -> None:
    app = functions(Realtime(), echo, options={"encoding": "text", "limits": [RateLimit("1/hour", per="ip")]})
    async with connect(app, "/ws") as client:
        await client.send("no json")
        assert await client.receive() == "no json"
        await client.send("one too many")
        await client.silent()  # text has no spelling for an error


async def test_a_peer_that_leaves_before_accept_leaves_nothing_behind() -> None:
    rt = Realtime()
    limits = ConnectionLimits(total=1)

    async def ws(websocket: WebSocket) -> None:
        async with rt.accept(websocket):
            raise AssertionError("nobody is there")

    app = live(ws, realtime=rt, connections=limits)

    async def send(message: Message) -> None:
        raise OSError("the peer has left")

    async with lifespan(app):
        for _ in range(2):  # the second finds the slot free again
            await app(scope_of("/ws"), connecting, send)
            assert rt.stats() == {"connections": 0, "groups": 0, "slow": 0}


async def test_a_server_that_fails_in_the_accept_leaves_nothing_behind() -> None:
    rt = Realtime()

    async def ws(websocket: WebSocket) -> None:
        async with rt.accept(websocket):
            raise AssertionError("not accepted")

    app = live(ws, realtime=rt, connections=ConnectionLimits(total=1))

    async def send(message: Message) -> None:
        raise RuntimeError("a bug of the server")

    async with lifespan(app):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a bug of the server"):
                await app(scope_of("/ws"), connecting, send)
            assert rt.stats() == {"connections": 0, "groups": 0, "slow": 0}


async def connecting() -> Message:
    return {"type": "websocket.connect"}


def scope_of(path: str) -> Scope:
    return {"type": "websocket", "path": path, "headers": [], "query_string": b"", "subprotocols": []}


async def test_a_host_that_read_the_connect_itself_may_accept() -> None:
    rt = Realtime()

    async def ws(websocket: WebSocket) -> None:
        await websocket.receive()
        async with rt.accept(websocket) as connection:
            await connection.push("here")

    async with connect(live(ws, realtime=rt), "/ws") as client:
        assert await client.receive_json() == "here"


async def test_many_bodies_end_when_the_realtime_stops() -> None:
    rt = Realtime()
    app = functions(rt, echo)
    async with AsyncExitStack() as stack:
        async with lifespan(app):
            clients = [await stack.enter_async_context(connect(app, "/ws")) for _ in range(3)]
            await rt.drain()
            assert [await client.closed() for client in clients] == [CloseCode.SERVICE_RESTART] * 3
            with anyio.fail_after(PATIENCE):
                while len(app.state.ended) < 3:
                    await checkpoint()
            await stack.aclose()


async def test_an_event_error_of_a_body_is_answered_and_quiet() -> None:
    async def body(connection: Connection) -> None:
        async for data in connection:
            await connection.join(data)

    async with connect(functions(Realtime(), body), "/ws") as client:
        await client.send_json("~ada")
        answer = await client.receive_json()
        assert (answer["type"], answer["code"]) == ("error", "bad_name")
        assert await client.closed() == CloseCode.FORBIDDEN


# Clients that name what they say


@asynccontextmanager
async def talking(app: Any, *, spelling: str = JSON, name: str | None = None) -> Any:
    """A client of the protocol v1, welcomed already."""
    proof = None if name is None else token(name)
    async with connect(app, "/ws", subprotocols=[spelling], token=proof) as client:
        talk = Talk(client)
        talk.welcome = await talk.hear()
        yield talk


async def every(connection: Connection) -> None:
    async for event, data, group in connection.events():
        await connection.push([event, data, group])


@both
async def test_a_body_that_asks_for_events_gets_each_with_its_name(spelling: str) -> None:
    async with talking(functions(Realtime(), every), spelling=spelling) as client:
        assert client.welcome["type"] == "welcome"
        for number, (event, data) in enumerate([("say", {"a": 1}), ("message", None), ("other", [1])]):
            await client.say(emit(event, number, data=data))
            said, answer = sorted(await client.heard(2), key=lambda frame: frame["type"])
            assert said["data"] == [event, data, None]
            assert answer == {"type": "reply", "ref": number, "data": None}


async def test_a_plain_client_names_its_events_in_an_envelope() -> None:
    async with connect(functions(Realtime(), every), "/ws") as client:
        for said, heard in (
            ({"event": "say", "data": {"a": 1}}, ["say", {"a": 1}, None]),
            ({"event": "say"}, ["say", None, None]),
            ({"text": "hello"}, ["message", {"text": "hello"}, None]),
            ({"event": 5}, ["message", {"event": 5}, None]),
            ([1], ["message", [1], None]),
        ):
            await client.send_json(said)
            assert await client.receive_json() == heard


async def test_a_body_that_asks_for_messages_gets_what_a_plain_client_says_as_it_is() -> None:
    async with connect(functions(Realtime(), echo), "/ws") as client:
        for said in ({"event": "say", "data": 1}, {"event": "message"}, "text"):
            await client.send_json(said)
            assert await client.receive_json() == said


@both
async def test_a_body_that_asks_for_messages_knows_no_other_event(spelling: str) -> None:
    async with talking(functions(Realtime(), echo), spelling=spelling) as client:
        assert await client.refused("event", event="say", data=1) == "unknown_event"
        await client.say(emit("message", 5, data=2))
        assert {frame["type"]: frame["data"] for frame in await client.heard(2)} == {"event": 2, "reply": None}


async def test_an_event_is_answered_when_the_body_has_taken_it() -> None:
    gate = anyio.Event()

    async def body(connection: Connection) -> None:
        await gate.wait()
        async for _ in connection.events():
            await anyio.sleep_forever()

    async with talking(functions(Realtime(), body)) as client:
        await client.say(emit("first", 1), emit("message", 2))
        await client.silent()
        gate.set()
        assert await client.answers(1) == {1: "reply"}
        await client.silent()


async def test_what_waits_for_a_body_that_never_asks_ends_with_the_client() -> None:
    async def body(connection: Connection) -> None:
        await anyio.sleep_forever()

    rt = Realtime()
    app = functions(rt, body)
    async with lifespan(app):
        async with talking(app) as client, connect(app, "/ws") as plain:
            await client.say(emit("say", 1), emit("message", 2))
            await plain.send_json({"event": "say"})
            await plain.send_json("bare")
            await turns()
        with anyio.fail_after(PATIENCE):
            while rt.connections:
                await checkpoint()
    assert len(app.state.ended) == 2


async def test_events_are_an_iterator_that_a_body_may_leave_and_take_up_again() -> None:
    async def body(connection: Connection) -> None:
        events = connection.events()
        async for event, *_ in events:
            await connection.push(["first", event])
            break
        async for event, *_ in aiter(events):
            await connection.push(["then", event])

    async with connect(functions(Realtime(), body), "/ws") as client:
        for name in "abc":
            await client.send_json({"event": name})
        assert [await client.receive_json() for _ in range(3)] == [["first", "a"], ["then", "b"], ["then", "c"]]


async def test_a_body_that_only_waits_takes_no_event() -> None:
    async def body(connection: Connection) -> None:
        await connection.wait_closed()

    async with talking(functions(Realtime(), body)) as client:
        await client.get("event", event="message", data=1)
        assert await client.refused("event", event="say") == "unknown_event"


# Groups of a client


def joining(group: str) -> bool:
    return group.startswith("board")


async def joining_later(group: str) -> bool:
    await checkpoint()
    return joining(group)


@pytest.mark.parametrize("authorize", [joining, joining_later])
async def test_a_client_joins_what_authorize_lets_it(authorize: Any) -> None:
    rt = Realtime(history={"board": History(10, 60)})
    async with talking(functions(rt, every, options={"authorize": authorize})) as client:
        assert await client.refused("join", group="lobby") == "forbidden"
        await rt.broadcast("board", "missed")
        found = await client.get("join", group="board", last=1)
        assert [each["data"] for each in found["events"]] == ["missed"]
        found = await client.get("join", group="board", position={"epoch": "old", "offset": 0, "tag": ""})
        assert (found["recovered"], "snapshot" in found) == (False, False)
        await client.say(emit("say", 90, data=1, group="board"))
        heard = {frame["type"]: frame.get("data") for frame in await client.heard(2)}
        assert heard == {"event": ["say", 1, "board"], "reply": None}
        assert await client.refused("event", event="say", group="lobby") == "not_joined"


async def test_without_authorize_a_client_joins_nothing_itself() -> None:
    async def body(connection: Connection) -> None:
        await connection.join("lobby")
        await every(connection)

    async with talking(functions(Realtime(), body)) as client:
        assert (await client.hear())["type"] == "joined"
        assert await client.refused("join", group="board") == "forbidden"
        assert (await client.get("join", group="lobby"))["recovered"], "it is in there already"


async def test_a_plain_client_says_an_event_only_to_a_group_that_it_is_in() -> None:
    async def body(connection: Connection) -> None:
        await connection.join("lobby")
        await every(connection)

    async with connect(functions(Realtime(), body), "/ws") as client:
        await client.send_json({"event": "say", "group": "lobby"})
        assert await client.receive_json() == ["say", None, "lobby"]
        await client.send_json({"event": "say", "group": "other"})
        assert (await client.receive_json())["code"] == "not_joined"


@pytest.mark.parametrize("group", [[1], {"a": 1}, 5, True], ids=str)
async def test_a_group_of_a_plain_client_that_is_no_text_is_answered(group: Any) -> None:
    async with connect(functions(Realtime(), every), "/ws") as client:
        await client.send_json({"event": "say", "group": group})
        assert (await client.receive_json())["code"] == "invalid"


async def test_a_plain_client_says_nothing_to_the_group_of_its_own_identity() -> None:
    async with connect(functions(Realtime(), every, tokens=tokens), "/ws", token=token("ann")) as client:
        await client.send_json({"event": "say", "group": "~ann"})
        answer = await client.receive_json()
        assert isinstance(answer, dict)
        assert answer["code"] == "not_joined"


async def test_a_function_declares_no_whispers_and_lets_nobody_track_itself() -> None:
    async with talking(functions(Realtime(), every, options={"authorize": joining})) as client:
        await client.get("join", group="board")
        assert await client.refused("whisper", group="board", event="typing", data=1) == "unknown_whisper"
        assert await client.refused("track", group="board", meta={}) == "forbidden"


async def test_a_new_token_prolongs_the_connection_of_a_body() -> None:
    app = functions(Realtime(), every, tokens=tokens)
    async with talking(app, name="ann") as client:
        assert (await client.get("refresh", token=token("ann")))["ttl_ms"] > 0
        assert await client.refused("refresh", token=token("bob")) == "forbidden"


async def test_a_body_may_ask_its_client_at_once() -> None:
    async def body(connection: Connection) -> None:
        await connection.push(await connection.call("name"))

    async with talking(functions(Realtime(), body)) as client:
        asked = await client.hear()
        await client.say({"type": "reply", "ref": asked["ref"], "data": "ann"})
        assert (await client.hear())["data"] == "ann"


async def test_a_body_may_ask_its_client() -> None:
    async def body(connection: Connection) -> None:
        await turns()
        await connection.push(await connection.call("name"))

    async with talking(functions(Realtime(), body)) as client:
        asked = await client.hear()
        await client.say({"type": "reply", "ref": asked["ref"], "data": "ann"})
        assert (await client.hear())["data"] == "ann"
        assert await client.client.closed() == 1000


async def test_what_the_host_has_accepted_itself_is_plain_whatever_was_offered() -> None:
    app = functions(Realtime(), echo, accept=True)
    async with connect(app, "/ws", subprotocols=[JSON]) as client:
        assert client.subprotocol is None
        await client.send_json(1)
        assert await client.receive_json() == 1


async def test_only_a_body_that_speaks_json_speaks_the_protocol() -> None:
    app = functions(Realtime(), echo, options={"encoding": "text"})
    async with connect(app, "/ws", subprotocols=[JSON, "rt.plain"]) as client:
        assert client.subprotocol == "rt.plain"
        await client.send("hello")
        assert await client.receive() == "hello"
