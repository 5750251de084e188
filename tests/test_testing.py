"""All other tests believe the in-process client, so it is held against small raw apps that share no code with it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import HTTPException
from starlette.routing import WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from starlette_rt.testing import Client, Closed, Refused, connect, lifespan
from starlette_rt.testing.server import CAPACITY

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

SOON = 0.05  # a deadline that is meant to pass


class Echo(WebSocketEndpoint):
    encoding = "text"

    async def on_receive(self, websocket: WebSocket, data: str) -> None:
        await websocket.send_text(data)


echo = Starlette(routes=[WebSocketRoute("/ws", Echo)])


class Script:
    """A raw app that says its lines after the connect and notes what it then receives, up to the disconnect."""

    def __init__(self, *lines: Message, stay: bool = True) -> None:
        self.lines, self.stay = lines, stay
        self.scope: Scope = {}
        self.heard: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        self.scope = scope
        self.heard.append(await receive())
        for line in self.lines:
            await send(line)
        while self.stay and self.heard[-1]["type"] != "websocket.disconnect":
            self.heard.append(await receive())


def accept(**details: Any) -> Message:
    return {"type": "websocket.accept", **details}


def text(data: str) -> Message:
    return {"type": "websocket.send", "text": data}


def closing(code: int = 1000, reason: str = "") -> Message:
    return {"type": "websocket.close", "code": code, "reason": reason}


# What is said and heard


async def test_text_comes_back_from_an_endpoint() -> None:
    async with connect(echo, "/ws") as client:
        await client.send("hello")
        assert await client.receive() == "hello"


async def test_json_goes_out_compact_and_comes_back_as_a_value() -> None:
    async with connect(echo, "/ws") as client:
        await client.send_json({"é": [1, None]})
        assert client.pending in ((), ('{"é":[1,null]}',))
        assert await client.receive_json() == {"é": [1, None]}


@pytest.mark.parametrize("data", [b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00\xff")])
async def test_bytes_stay_bytes_in_both_directions(data: Any) -> None:
    app = Script(accept(), {"type": "websocket.send", "bytes": data, "text": None})
    async with connect(app, "/ws") as client:
        assert await client.receive() == b"\x00\xff"
        await client.send(b"back")
    assert app.heard[1] == {"type": "websocket.receive", "bytes": b"back"}


async def test_messages_sent_before_leaving_are_still_heard_and_the_disconnect_comes_last() -> None:
    app = Script(accept())
    async with connect(app, "/ws") as client:
        await client.send("one")
        await client.send("two")
        await client.close(4321, "enough")
    assert app.heard == [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": "one"},
        {"type": "websocket.receive", "text": "two"},
        {"type": "websocket.disconnect", "code": 4321, "reason": "enough"},
    ]


async def test_the_end_of_the_block_leaves_normally() -> None:
    app = Script(accept())
    async with connect(app, "/ws"):
        pass
    assert app.heard[-1] == {"type": "websocket.disconnect", "code": 1000, "reason": ""}


async def test_many_clients_share_one_loop_and_hear_each_other() -> None:
    sends: list[Send] = []

    async def hub(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send(accept())
        sends.append(send)
        while (message := await receive())["type"] == "websocket.receive":
            for each in sends:
                await each(text(message["text"]))

    async with connect(hub, "/a") as a, connect(hub, "/b") as b, connect(hub, "/c") as c:
        await b.send("to all")
        assert [await client.receive() for client in (a, b, c)] == ["to all"] * 3


async def test_pending_shows_and_receive_nowait_takes_what_has_arrived() -> None:
    async with connect(Script(accept(), text("one"), text("two")), "/ws") as client:
        await client.receive()
        assert client.pending == ("two",)
        assert client.receive_nowait() == "two"
        with pytest.raises(anyio.WouldBlock):
            client.receive_nowait()


async def test_what_arrived_before_a_close_is_received_before_the_close_is_told() -> None:
    async with connect(Script(accept(), text("last words"), closing(4001, "token expired")), "/ws") as client:
        assert await client.closed() == 4001
        assert (client.close_code, client.close_reason) == (4001, "token expired")
        assert client.receive_nowait() == "last words"
        with pytest.raises(Closed) as caught:
            await client.receive()
        with pytest.raises(Closed, match=r"^/ws is closed: 4001 token expired$"):
            client.receive_nowait()
        with pytest.raises(Closed):
            await client.send("too late")
    assert (caught.value.code, caught.value.reason) == (4001, "token expired")


async def test_iteration_ends_with_the_connection() -> None:
    async with connect(Script(accept(), text("a"), text("b"), closing(1011)), "/ws") as client:
        assert [message async for message in client] == ["a", "b"]


async def test_an_open_connection_has_no_close_code_and_a_left_one_has_its_own() -> None:
    async with connect(echo, "/ws") as client:
        assert (client.close_code, client.close_reason) == (None, None)
        await client.close()
        await client.close(4000, "again")
        assert (await client.closed(), client.close_reason) == (1000, "")


# The handshake


async def test_the_scope_is_the_one_a_server_makes() -> None:
    app = Script(accept(subprotocol="b", headers=[(b"x-node", b"7")]))
    async with connect(
        app,
        "/caf%C3%A9?ticket=t",
        token="secret",
        headers={"X-Trace": "é"},
        cookies={"session": "s", "theme": "dark"},
        origin="https://example.org",
        subprotocols=["a", "b"],
        client=("10.0.0.9", 1234),
        scheme="wss",
    ) as client:
        assert (client.subprotocol, client.headers["X-Node"]) == ("b", "7")
    assert app.scope == {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "wss",
        "server": ("testserver", 443),
        "client": ("10.0.0.9", 1234),
        "root_path": "",
        "path": "/café",
        "raw_path": b"/caf%C3%A9",
        "query_string": b"ticket=t",
        "headers": [
            (b"host", b"testserver"),
            (b"connection", b"Upgrade"),
            (b"upgrade", b"websocket"),
            (b"sec-websocket-version", b"13"),
            (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
            (b"sec-websocket-protocol", b"a, b"),
            (b"origin", b"https://example.org"),
            (b"authorization", b"Bearer secret"),
            (b"cookie", b"session=s; theme=dark"),
            (b"x-trace", "é".encode("latin-1")),
        ],
        "subprotocols": ["a", "b"],
        "state": {},
        "extensions": {"websocket.http.response": {}},
    }


async def test_a_given_header_replaces_ours_and_nothing_is_said_that_was_not_asked_for() -> None:
    app = Script(accept())
    async with connect(app, "/", headers=[("Host", "example.org"), ("x", "1"), ("x", "2")]) as client:
        assert client.subprotocol is None
    headers = [item for item in app.scope["headers"] if not item[0].startswith((b"sec-", b"upgrade", b"connection"))]
    assert headers == [(b"host", b"example.org"), (b"x", b"1"), (b"x", b"2")]
    assert (app.scope["subprotocols"], app.scope["query_string"]) == ([], b"")


async def test_the_token_can_travel_as_a_subprotocol() -> None:
    app = Script(accept(subprotocol="rt.plain"))
    async with connect(app, "/", token="t", carrier="subprotocol", subprotocols=["rt.plain"]):
        pass
    assert app.scope["subprotocols"] == ["rt.plain", "rt.token.t"]
    assert (b"sec-websocket-protocol", b"rt.plain, rt.token.t") in app.scope["headers"]
    assert b"authorization" not in dict(app.scope["headers"])


async def test_a_subprotocol_that_was_not_offered_fails_as_it_does_in_a_browser() -> None:
    with pytest.raises(RuntimeError, match="'v2', which the peer did not offer"):
        async with connect(Script(accept(subprotocol="v2")), "/", subprotocols=["v1"]):
            pass


async def test_a_denial_is_told_with_its_status_headers_and_body() -> None:
    start: Message = {"type": "websocket.http.response.start", "status": 429, "headers": [(b"retry-after", b"7")]}
    parts: list[Message] = [
        {"type": "websocket.http.response.body", "body": b'{"wait"', "more_body": True},
        {"type": "websocket.http.response.body", "body": b": 7}"},
    ]
    app = Script(start, *parts)
    with pytest.raises(Refused, match=r"^/ws was refused with 429, saying b'{\"wait\": 7}'$") as caught:
        async with connect(app, "/ws?ticket=t"):
            pass
    refused = caught.value
    assert (refused.status, refused.headers["Retry-After"], refused.code) == (429, "7", None)
    assert refused.json() == {"wait": 7}
    assert app.heard[-1] == {"type": "websocket.disconnect", "code": 1006}


async def test_starlette_denies_through_the_extension() -> None:
    async def deny(websocket: WebSocket) -> None:
        raise HTTPException(401, "no token", {"www-authenticate": "Bearer"})

    with pytest.raises(Refused) as caught:
        async with connect(Starlette(routes=[WebSocketRoute("/ws", deny)]), "/ws"):
            pass
    assert (caught.value.status, caught.value.body) == (401, b"no token")
    assert caught.value.headers["www-authenticate"] == "Bearer"


async def test_a_close_before_accept_is_a_bare_403_that_remembers_its_code() -> None:
    with pytest.raises(Refused, match=r"^/ws was refused with 403$") as caught:
        async with connect(Script(closing(4503), stay=False), "/ws"):
            pass
    assert (caught.value.status, caught.value.code, caught.value.body) == (403, 4503, b"")


async def test_without_the_extension_a_denial_is_the_apps_fault() -> None:
    app = Script({"type": "websocket.http.response.start", "status": 401, "headers": []})
    with pytest.raises(RuntimeError, match=r"'websocket.http.response.start' while the connection was connecting"):
        async with connect(app, "/ws", denial=False):
            pass
    assert app.scope["extensions"] == {}


async def test_after_a_denial_the_app_that_goes_on_sending_learns_that_nobody_is_there() -> None:
    ends: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send({"type": "websocket.http.response.start", "status": 401})
        await send({"type": "websocket.http.response.body"})
        ends.append("denied")
        await send({"type": "websocket.http.response.body"})
        ends.append("never")

    with pytest.raises(Refused):
        async with connect(app, "/ws"):
            pass
    assert ends == ["denied"]


@pytest.mark.parametrize("lines", [[], [{"type": "websocket.http.response.start", "status": 401}]])
async def test_an_app_that_ends_without_an_answer_fails_the_test(lines: list[Message]) -> None:
    with pytest.raises(RuntimeError, match="ended before it accepted or refused /ws"):
        async with connect(Script(*lines, stay=False), "/ws"):
            pass


async def test_an_app_that_never_answers_runs_into_the_deadline_and_hears_that_the_peer_has_gone() -> None:
    app = Script()
    with pytest.raises(TimeoutError, match=r"to accept or refuse /ws; the connection is still connecting$"):
        async with connect(app, "/ws?token=secret", timeout=SOON):
            pass
    assert app.heard[-1] == {"type": "websocket.disconnect", "code": 1006, "reason": ""}


# Deadlines and silence


async def test_a_message_that_does_not_come_is_told_in_a_sentence() -> None:
    async with connect(Script(accept(), text("only one")), "/ws?token=secret", timeout=SOON) as client:
        await client.receive()
        with pytest.raises(TimeoutError) as caught:
            await client.receive()
    assert str(caught.value) == "waited 0.05 s on /ws for a message; 1 received, nothing pending"


async def test_a_close_that_does_not_come_is_told_with_what_came_instead() -> None:
    async with connect(Script(accept(), text("x" * 200), text("y")), "/ws", timeout=SOON) as client:
        with pytest.raises(TimeoutError) as caught:
            await client.closed()
    said = str(caught.value)
    assert said.startswith("waited 0.05 s on /ws for the connection to close; 0 received, 2 pending, the first 'xxx")
    assert said.endswith("xxx'… (200 long)")


async def test_silence_is_proved_without_waiting_for_a_clock() -> None:
    async with connect(echo, "/ws") as client:
        await client.silent()


async def test_silence_is_broken_by_a_message_that_was_on_its_way() -> None:
    async with connect(echo, "/ws") as client:
        await client.send("hello")
        with pytest.raises(AssertionError, match=r"^expected silence on /ws, but 1 pending, the first 'hello'$"):
            await client.silent()


async def test_silence_waits_for_a_long_chain_of_tasks() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(accept())
        for _ in range(200):
            await checkpoint()
        await send(text("at last"))

    async with connect(app, "/ws") as client:
        with pytest.raises(AssertionError, match="at last"):
            await client.silent()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_silence_waits_for_callbacks_that_no_task_stands_behind(anyio_backend: str) -> None:
    import asyncio

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(accept())
        await receive()
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, loop.call_soon, event.set)
        await event.wait()
        await send(text("from a callback"))

    async with connect(app, "/ws") as client:
        with pytest.raises(AssertionError, match="from a callback"):
            await client.silent()


async def test_a_closed_connection_does_not_count_as_silent() -> None:
    async with connect(Script(accept(), closing(4003, "rate limit exceeded")), "/ws") as client:
        with pytest.raises(AssertionError, match=r"^expected silence, but /ws is closed: 4003 rate limit exceeded$"):
            await client.silent()


async def test_a_connection_that_the_client_itself_left_is_silent() -> None:
    async with connect(echo, "/ws") as client:
        await client.close()
        await client.silent()


async def test_a_loop_that_never_rests_runs_into_the_deadline() -> None:
    async with connect(echo, "/ws", timeout=SOON) as client, anyio.create_task_group() as tasks:

        async def restless() -> None:
            while True:
                await checkpoint()

        tasks.start_soon(restless)
        with pytest.raises(TimeoutError, match="for the loop to go idle"):
            await client.silent()
        tasks.cancel_scope.cancel()


# A peer that does not read, and one that has gone


class Pump:
    """An app that sends as fast as it is let, and notes how it ended."""

    def __init__(self, size: int = 1) -> None:
        self.size, self.sent, self.end = size, 0, ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send(accept())
        try:
            while True:
                await receive()
                await send(text("x" * self.size))
                self.sent += 1
        except OSError as error:
            self.end = str(error)
            raise


async def test_a_stalled_client_blocks_the_apps_send_until_it_resumes() -> None:
    app = Pump()
    async with connect(app, "/ws") as client:
        client.stall()
        for _ in range(3):
            await client.send("go")
        await client.silent()
        assert app.sent == 0
        client.resume()
        assert [await client.receive() for _ in range(3)] == ["x", "x", "x"]


async def test_an_app_blocked_by_a_stalled_client_learns_that_it_left_and_that_is_no_failure() -> None:
    app = Pump()
    async with connect(app, "/ws") as client:
        client.stall()
        await client.send("go")
        await client.silent()
        assert app.end == ""
    assert app.end == "the peer has left"


async def test_a_client_that_does_not_receive_holds_no_more_than_a_socket_would() -> None:
    app = Pump(size=CAPACITY // 4)
    async with connect(app, "/ws") as client:
        for _ in range(6):
            await client.send("go")
        await anyio.wait_all_tasks_blocked()
        assert (app.sent, len(client.pending)) == (4, 4)
        await client.receive()
        await client.receive()
        await anyio.wait_all_tasks_blocked()
        assert app.sent == 6


async def test_sending_to_an_app_that_does_not_read_runs_into_the_deadline() -> None:
    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(accept())
        await released.wait()

    released = anyio.Event()
    async with connect(deaf, "/ws", timeout=SOON) as client:
        await client.send(b"x" * CAPACITY)
        with pytest.raises(TimeoutError, match="for the app to read"):
            await client.send("one too many")
        released.set()


async def test_sending_goes_on_as_soon_as_the_app_reads() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(accept())
        await reading.wait()
        while (message := await receive())["type"] != "websocket.disconnect":
            heard.append(message)

    reading, heard = anyio.Event(), list[Message]()
    async with connect(slow, "/ws") as client, anyio.create_task_group() as tasks:
        await client.send(b"x" * CAPACITY)
        tasks.start_soon(client.send, "after")
        await anyio.wait_all_tasks_blocked()
        reading.set()
    assert heard[-1] == {"type": "websocket.receive", "text": "after"}


# An app that does what it may not


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([text("early")], "'websocket.send' while the connection was connecting"),
        ([accept(), accept()], "'websocket.accept' while the connection was open"),
        ([accept(), closing(), text("late")], "'websocket.send' while the connection was closed"),
        ([accept(), closing(1006)], "the close code 1006 may not be sent"),
        ([accept(), closing(5000)], "the close code 5000 may not be sent"),
        ([accept(), closing(4000, "é" * 62)], "is longer than 123 bytes"),
        ([accept(), {"type": "websocket.send"}], r"carries text \(str\) or bytes, not NoneType"),
        ([accept(), {"type": "websocket.send", "text": b"no"}], r"carries text \(str\) or bytes, not bytes"),
    ],
)
async def test_an_illegal_message_fails_the_test(lines: list[Message], complaint: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=complaint):
        async with connect(Script(*lines), "/ws"):
            pass


async def test_a_close_frame_may_be_as_long_as_the_standard_allows() -> None:
    async with connect(Script(accept(), closing(4000, "é" * 61 + "x")), "/ws") as client:
        assert await client.closed() == 4000


async def test_the_app_hears_its_own_close_as_a_disconnect() -> None:
    app = Script(accept(), closing(4001, "token expired"))
    async with connect(app, "/ws") as client:
        await client.closed()
    assert app.heard[-1] == {"type": "websocket.disconnect", "code": 4001, "reason": "token expired"}


async def test_receiving_after_the_disconnect_fails_the_test_instead_of_hanging() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(accept())
        while True:
            await receive()

    with pytest.raises(RuntimeError, match=r"again after websocket.disconnect"):
        async with connect(app, "/ws"):
            pass


async def test_an_app_that_returns_without_a_close_looks_like_a_dropped_line() -> None:
    async with connect(Script(accept(), stay=False), "/ws") as client:
        assert await client.closed() == 1006
        with pytest.raises(AssertionError, match=r"closed: 1006$"):
            await client.silent()


async def test_an_exception_after_accept_drops_the_line_and_comes_out_of_the_block() -> None:
    class Broken(WebSocketEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            raise LookupError("broken")

    async def visit() -> None:
        async with connect(Starlette(routes=[WebSocketRoute("/ws", Broken)]), "/ws") as client:
            await client.send("go")
            codes.append(await client.closed())

    codes: list[int] = []
    with pytest.raises(LookupError, match="broken"):
        await visit()
    assert codes == [1006]


async def test_an_exception_of_the_app_wins_over_what_the_test_made_of_it() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(accept())
        raise LookupError("broken")

    with pytest.raises(LookupError) as caught:
        async with connect(app, "/ws") as client:
            await client.receive()
    assert isinstance(caught.value.__context__, Closed)


async def test_an_exception_before_accept_comes_out_of_connect() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        raise LookupError("broken")

    with pytest.raises(LookupError):
        async with connect(app, "/ws"):
            pass


async def test_a_disconnect_that_an_endpoint_lets_escape_is_a_failure_as_in_a_servers_log() -> None:
    async def careless(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()

    with pytest.raises(WebSocketDisconnect):
        async with connect(Starlette(routes=[WebSocketRoute("/ws", careless)]), "/ws"):
            pass


async def test_a_failure_of_the_test_comes_out_as_itself() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with connect(echo, "/ws"):
            raise ZeroDivisionError
    assert caught.value.__cause__ is None


class Fatal(BaseException):
    """What no app is expected to survive."""


async def fatal(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "websocket"
    await send(accept())
    await receive()
    await receive()
    raise Fatal


async def test_what_is_no_exception_comes_out_at_once() -> None:
    async def visit() -> None:
        async with connect(fatal, "/ws") as client:
            await client.send("go")
            await anyio.sleep_forever()

    with pytest.raises(Fatal):
        await visit()


async def test_two_failures_at_once_come_out_together() -> None:
    async def visit() -> None:
        async with connect(fatal, "/ws") as client:
            try:
                await client.send("go")
                await anyio.sleep_forever()
            finally:
                raise ZeroDivisionError

    with pytest.raises(BaseExceptionGroup) as caught:
        await visit()
    assert caught.group_contains(Fatal)
    assert caught.group_contains(ZeroDivisionError)


async def test_an_app_that_does_not_end_is_cancelled_and_reported() -> None:
    async def lingering(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await send(accept())
        try:
            await anyio.sleep_forever()
        finally:
            ends.append("cancelled")

    ends: list[str] = []
    with pytest.raises(TimeoutError, match=r"^the app's call for /ws had not ended 0.05 s after it was told to"):
        async with connect(lingering, "/ws", timeout=SOON):
            pass
    assert ends == ["cancelled"]


async def test_a_cancelled_test_leaves_like_a_client_and_the_app_may_end_in_peace() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send(accept())
        await receive()
        await checkpoint()
        ends.append("in peace")

    ends: list[str] = []
    with anyio.CancelScope() as scope:
        async with connect(app, "/ws"):
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert ends == ["in peace"]


# The lifespan


class Life:
    """A Starlette app that notes when its lifespan starts and stops."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.app = Starlette(routes=[WebSocketRoute("/ws", self.state)], lifespan=self.lifespan)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[dict[str, Any]]:
        self.notes.append("up")
        await checkpoint()
        yield {"answer": 42, "shared": []}
        await checkpoint()
        self.notes.append("down")

    async def state(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json(dict(websocket.scope["state"]))
        websocket.scope["state"]["answer"] = 0
        websocket.scope["state"]["shared"].append(1)
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()


async def test_the_first_connect_runs_the_lifespan_and_nested_ones_share_it() -> None:
    life = Life()
    async with connect(life.app, "/ws") as first:
        async with connect(life.app, "/ws") as second:
            assert await first.receive_json() == {"answer": 42, "shared": []}
            assert await second.receive_json() == {"answer": 42, "shared": [1]}  # the copy is shallow
        assert life.notes == ["up"]
    assert life.notes == ["up", "down"]
    async with connect(life.app, "/ws"):
        assert life.notes == ["up", "down", "up"]


async def test_an_explicit_lifespan_outlives_its_connects_and_yields_its_state() -> None:
    life = Life()
    async with lifespan(life.app) as state:
        for _ in range(2):
            async with connect(life.app, "/ws"):
                pass
        assert (life.notes, state) == (["up"], {"answer": 42, "shared": [1, 1]})
    assert life.notes == ["up", "down"]


async def test_connects_that_start_at_once_share_one_lifespan_and_the_first_waits_for_the_last() -> None:
    async def visit(number: int) -> None:
        async with connect(life.app, "/ws") as client:
            await client.receive()
            for _ in range(number * 5):
                await checkpoint()
            assert life.notes == ["up"]

    life = Life()
    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(visit, number)
    assert life.notes == ["up", "down"]


async def test_guests_that_stay_too_long_are_reported_to_the_one_who_started() -> None:
    async def stay() -> None:
        async with connect(life.app, "/ws"):
            there.set()
            await leave.wait()

    async def host() -> None:
        async with lifespan(life.app, timeout=SOON):
            tasks.start_soon(stay)
            await there.wait()

    life, there, leave = Life(), anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        with pytest.raises(TimeoutError, match=r"^waited for 1 other connections to leave .* `async with lifesp"):
            await host()
        leave.set()
    assert life.notes == ["up", "down"]


async def test_two_apps_have_a_lifespan_each() -> None:
    one, two = Life(), Life()
    async with lifespan(one.app), lifespan(two.app):
        assert one.notes == two.notes == ["up"]


async def test_a_lifespan_that_fails_at_startup_raises_what_it_raised() -> None:
    @asynccontextmanager
    async def broken(app: Starlette) -> AsyncIterator[None]:
        if app:
            raise LookupError("no database")
        yield

    with pytest.raises(LookupError, match="no database"):
        async with connect(Starlette(lifespan=broken), "/ws"):
            pass


class Lifespan:
    """A raw app that answers the startup and the shutdown with these messages, and nothing else."""

    def __init__(self, *answers: Message) -> None:
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for answer in self.answers:
            await receive()
            await send(answer)


UP: Message = {"type": "lifespan.startup.complete"}
DOWN: Message = {"type": "lifespan.shutdown.complete"}


async def test_a_lifespan_that_only_says_that_it_failed_raises_its_message() -> None:
    app = Lifespan({"type": "lifespan.startup.failed", "message": "write origins=[…]"})
    with pytest.raises(RuntimeError, match=r"^write origins=\[…\]$"):
        async with lifespan(app):
            pass


async def test_a_failed_shutdown_without_a_word_is_still_a_failure() -> None:
    with pytest.raises(RuntimeError, match=r"^the app sent lifespan.shutdown.failed$"):
        async with lifespan(Lifespan(UP, {"type": "lifespan.shutdown.failed"})):
            pass


async def test_guests_learn_of_a_failed_startup_too() -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await checkpoint()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    async def visit() -> None:
        with pytest.raises(RuntimeError, match="no database"):
            async with connect(failing, "/ws"):
                pass
        told.append(True)

    told: list[bool] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(visit)
        tasks.start_soon(visit)
    assert told == [True, True]


async def test_a_lifespan_that_keeps_to_the_protocol_passes() -> None:
    async with lifespan(Lifespan(UP, DOWN)) as state:
        assert state == {}


async def test_a_lifespan_that_ends_early_is_no_failure_but_one_that_raises_is() -> None:
    async with lifespan(Lifespan(UP)):
        pass
    with pytest.raises(RuntimeError, match=r"'lifespan.startup.complete' while its lifespan was running"):
        async with lifespan(Lifespan(UP, UP)):
            pass


async def test_a_lifespan_that_never_starts_runs_into_the_deadline() -> None:
    async def mute(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()

    with pytest.raises(TimeoutError, match="for the app's lifespan to start"):
        async with lifespan(mute, timeout=SOON):
            pass


async def test_an_app_that_knows_no_lifespan_is_welcome() -> None:
    async with lifespan(Script()) as state:
        assert state == {}


# The package around it


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with connect(echo, "/ws") as client:
        yield client


async def test_a_client_can_live_in_a_fixture(client: Client) -> None:
    await client.send("hello")
    assert await client.receive() == "hello"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_importing_the_client_needs_no_test_framework(anyio_backend: str) -> None:
    code = "import sys, starlette_rt.testing; print({'pytest', 'httpx', 'httpx2'} & set(sys.modules))"
    with anyio.fail_after(30):
        done = await anyio.run_process([sys.executable, "-c", code])
    assert done.stdout.decode().strip() == "set()"
