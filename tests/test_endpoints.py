"""Starlette's three hooks on a live route: what they promise, and each numbered divergence from Starlette's own.

The law of this file: every line of ``starlette_rt/endpoints.py`` that says "it diverges" has a test here with its
number. Clients are in this process, on asyncio and on trio; nobody sleeps to be right.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypedDict

import anyio
import msgspec
import pydantic
import pytest
from anyio.lowlevel import checkpoint
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.types import Message, Scope
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from starlette_rt import (
    ConfigurationError,
    ConnectionLimits,
    EventError,
    Identity,
    RateLimit,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
    Whisper,
    event,
)
from starlette_rt.testing import Client, Closed, Refused, connect, lifespan
from tests.readme import first_block
from tests.test_dialogue import JSON, Point, Talk

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

BROWSER: dict[str, Any] = {"origin": "http://testserver", "subprotocols": ["rt.plain"]}
PATIENCE = 5.0

tokens = TokenSigner(["k" * 32])


def live(*endpoints: Any, realtime: Realtime | None = None, **settings: Any) -> Starlette:
    """An app with these endpoints at ``/ws``, ``/ws1`` and so on."""
    routes = [WebSocketRoute(f"/ws{number or ''}", endpoint) for number, endpoint in enumerate(endpoints)]
    return Starlette(
        routes=routes, middleware=[Middleware(RealtimeMiddleware, realtime=realtime or Realtime(), **settings)]
    )


def loud(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged above INFO."""
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


SCOPE: Scope = {"type": "websocket", "path": "/", "headers": [], "subprotocols": [], "query_string": b""}


def receiver(*then: Message) -> Callable[[], Awaitable[Message]]:
    """A server's ``receive``: the connect, these messages, and nothing more for ever."""
    messages: list[Message] = [{"type": "websocket.connect"}, *then]

    async def receive() -> Message:
        await checkpoint()
        if not messages:
            await anyio.sleep_forever()
        return messages.pop(0)

    return receive


async def serving(app: Any, send: Any) -> None:
    """Call an app as a server does whose client says nothing."""
    await app(dict(SCOPE), receiver(), send)


class Echo(RealtimeEndpoint):
    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.push(data)


# The README.


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Run the text of an app as a module of its own."""

    def run(text: str) -> Any:
        module = ModuleType("readme")
        monkeypatch.setitem(sys.modules, "readme", module)
        exec(compile(text, "README.md", "exec", dont_inherit=True), vars(module))
        return module

    return run


async def chat(app: Any) -> None:
    ann, bob = (app.tokens.sign(Identity(name)) for name in ("ann", "bob"))
    async with connect(app.app, "/ws", token=ann) as one, connect(app.app, "/ws", token=bob) as two:
        await one.send_json({"text": "hello"})
        assert await one.receive_json() == await two.receive_json() == {"from": "ann", "text": "hello"}
        assert set(await app.rt.presence("lobby")) == {"ann", "bob"}


async def test_the_app_of_the_readme_runs_as_it_stands(readme: Callable[[str], Any]) -> None:
    app = readme(first_block())
    await chat(app)
    async with connect(app.app, "/ws", token=app.tokens.sign(Identity("eve"))) as client:
        await client.send_json({"words": 1})
        assert await client.receive_json() == {
            "type": "error",
            "code": "invalid",
            "message": "Object missing required field `text`",
            "temporary": False,
        }
    with pytest.raises(Refused, match="401"):
        async with connect(app.app, "/ws"):
            pass


async def test_the_app_of_the_readme_runs_without_the_annotation(readme: Callable[[str], Any]) -> None:
    text = first_block()
    assert text.count("data: Message") == text.count("data.text") == 1
    await chat(readme(text.replace("data: Message", "data").replace("data.text", 'data["text"]')))


# Starlette's own tests of its endpoint, in our words.


async def test_starlette_on_connect_sees_the_scope_and_chooses_a_subprotocol() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            assert websocket["subprotocols"] == ["soap", "wamp"]
            await websocket.accept(subprotocol="wamp")

    async with connect(live(Endpoint), "/ws", subprotocols=["soap", "wamp"]) as client:
        assert client.subprotocol == "wamp"


async def test_starlette_bytes_arrive_as_bytes_and_text_is_refused() -> None:
    class Endpoint(RealtimeEndpoint):
        encoding = "bytes"

        async def on_receive(self, websocket: WebSocket, data: bytes) -> None:
            await websocket.send_bytes(b"Message bytes was: " + data)

    async with connect(live(Endpoint), "/ws") as client:
        await client.send(b"Hello, world!")
        assert await client.receive() == b"Message bytes was: Hello, world!"
    async with connect(live(Endpoint), "/ws") as client:
        await client.send("Hello world")
        assert await client.closed() == 1003


@pytest.mark.parametrize("mode", ["text", "binary"])
async def test_starlette_json_arrives_decoded_and_goes_out_either_way(mode: str) -> None:
    class Endpoint(RealtimeEndpoint):
        encoding = "json"

        async def on_receive(self, websocket: WebSocket, data: dict[str, str]) -> None:
            await websocket.send_json({"message": data}, mode=mode)

    async with connect(live(Endpoint), "/ws") as client:
        await client.send('{"hello": "world"}' if mode == "text" else b'{"hello": "world"}')
        answer = await client.receive()
        assert isinstance(answer, str if mode == "text" else bytes)
        assert msgspec.json.decode(answer) == {"message": {"hello": "world"}}


async def test_starlette_text_arrives_as_text_and_bytes_are_refused() -> None:
    class Endpoint(RealtimeEndpoint):
        encoding = "text"

        async def on_receive(self, websocket: WebSocket, data: str) -> None:
            await websocket.send_text(f"Message text was: {data}")

    async with connect(live(Endpoint), "/ws") as client:
        await client.send("Hello, world!")
        assert await client.receive() == "Message text was: Hello, world!"
    async with connect(live(Endpoint), "/ws") as client:
        await client.send(b"Hello world")
        assert await client.closed() == 1003


async def test_starlette_without_an_encoding_everything_arrives_as_it_is() -> None:
    class Endpoint(RealtimeEndpoint):
        encoding = None

        async def on_receive(self, websocket: WebSocket, data: str | bytes) -> None:
            await self.push(data)

    async with connect(live(Endpoint), "/ws") as client:
        for data in ("Hello, world!", b"Hello, world!"):
            await client.send(data)
            assert await client.receive() == data


async def test_starlette_on_disconnect_gets_the_code_and_may_close_again(caplog: pytest.LogCaptureFixture) -> None:
    codes: list[int] = []

    class Endpoint(RealtimeEndpoint):
        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            codes.append(close_code)
            assert websocket.client_state is WebSocketState.DISCONNECTED
            await websocket.close(code=close_code)

    async with connect(live(Endpoint), "/ws") as client:
        await client.close(1001)
    assert codes == [1001]
    assert loud(caplog) == []


async def test_starlette_an_endpoint_is_an_asgi_app_and_its_attributes_are_asgis() -> None:
    async with Realtime() as rt:

        class Endpoint(RealtimeEndpoint):
            realtime = rt

            async def on_connect(self, websocket: WebSocket) -> None:
                assert self.scope is websocket.scope
                assert callable(self.receive)
                assert callable(self.send)
                await websocket.accept()

        async with connect(Endpoint, "/anywhere") as client:  # no middleware, no route
            await client.silent()


# The divergences.


@pytest.mark.parametrize("raw", ['{"text": "hi"}', b'{"text": "hi"}'], ids=["text", "binary"])
async def test_divergence_01_json_is_the_default_and_decodes_once_into_the_annotation(raw: str | bytes) -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: SayStruct) -> None:
            await self.push([type(data).__name__, data.text])

    async with connect(live(Endpoint), "/ws") as client:
        await client.send(raw)
        assert await client.receive_json() == ["SayStruct", "hi"]


async def test_divergence_02_on_disconnect_runs_once_also_when_on_connect_raised_after_it_accepted() -> None:
    codes: list[int] = []
    rt = Realtime()

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.join("lobby")
            raise EventError("full")

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            codes.append(close_code)

    app = live(Endpoint, realtime=rt)
    async with lifespan(app):
        async with connect(app, "/ws") as client:
            assert await client.closed() == 4503
        assert codes == [4503]
        assert rt.stats()["groups"] == rt.stats()["connections"] == 0


async def test_divergence_02_on_disconnect_is_not_cancelled_with_the_request() -> None:
    codes: list[int] = []
    done = anyio.Event()

    class Endpoint(RealtimeEndpoint):
        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            for _ in range(5):
                await checkpoint()
            codes.append(close_code)
            done.set()

    async with Realtime() as Endpoint.realtime:
        await cancelled(Endpoint)
        with anyio.fail_after(PATIENCE):
            await done.wait()
    assert codes == [1001]


async def cancelled(app: Any) -> None:
    """Call the app as a server that cancels the request when the client is accepted."""
    accepted = anyio.Event()

    async def send(message: Message) -> None:
        assert message["type"] == "websocket.accept"
        accepted.set()

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serving, app, send)
            await accepted.wait()
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()


async def test_divergence_02_an_on_connect_that_does_not_end_is_cancelled_when_the_client_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("starlette_rt.connection.PATIENCE", 0.01)
    ended: list[Any] = []

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("cancelled")

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            ended.append(close_code)

    async with connect(live(Endpoint), "/ws"):
        pass
    assert ended == ["cancelled", 1000]


async def test_divergence_03_on_disconnect_does_not_run_for_a_refused_handshake() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.close(4321)

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            raise AssertionError("there was no connection")

    app = live(Endpoint)
    with pytest.raises(Refused) as refused:
        async with connect(app, "/ws"):
            pass
    assert refused.value.status == 403
    async with connect(app, "/ws", **BROWSER) as client:
        assert await client.closed() == 4321  # the host's code, where it can be read


async def test_divergence_04_bad_input_is_answered_and_logged_nowhere_above_info(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with connect(live(Echo), "/ws") as client:
        for bad in ("no json", b"\xff", "[" * 10_000, ""):
            await client.send(bad)
            answer = await client.receive_json()
            assert (answer["type"], answer["code"]) == ("error", "bad_message")
        await client.send("1")
        assert await client.receive_json() == 1
    assert loud(caplog) == []


@pytest.mark.parametrize(("encoding", "wrong"), [("text", b"x"), ("bytes", "x")])
async def test_divergence_04_the_wrong_kind_closes_with_1003_where_an_error_has_no_spelling(
    encoding: Any, wrong: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = type("Endpoint", (RealtimeEndpoint,), {"encoding": encoding})
    async with connect(live(endpoint), "/ws") as client:
        await client.send(wrong)
        assert await client.closed() == 1003
        assert client.pending == ()
    assert loud(caplog) == []


async def test_divergence_05_without_an_encoding_an_empty_text_is_an_empty_text() -> None:
    class Endpoint(RealtimeEndpoint):
        encoding = None

        async def on_receive(self, websocket: WebSocket, data: str | bytes) -> None:
            await websocket.send_text(repr(data))

    async with connect(live(Endpoint), "/ws") as client:
        for data in ("", b""):
            await client.send(data)
            assert await client.receive() == repr(data)


class Fails(RealtimeEndpoint):
    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.push(10 // data)


async def test_divergence_06_a_failing_handler_is_logged_and_answered_and_the_connection_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with connect(live(Fails), "/ws") as client:
        for data, answer in ((0, "internal"), (5, None), (0, "internal")):
            await client.send_json(data)
            heard = await client.receive_json()
            assert heard == 2 if answer is None else heard["code"] == answer
    assert len(loud(caplog)) == 1  # once per place and minute
    (record,) = (record for record in caplog.records if record.levelno > logging.INFO)
    assert record.name == "starlette_rt.handler"
    assert record.exc_info is not None


async def test_divergence_06_ten_failures_in_a_row_close_with_1011() -> None:
    async with connect(live(Fails), "/ws") as client:
        for data in [0] * 9 + [1] + [0] * 10:
            await client.send_json(data)
        assert [
            answer["code"] if isinstance(answer := await client.receive_json(), dict) else answer for _ in range(20)
        ] == [
            *["internal"] * 9,
            10,
            *["internal"] * 10,
        ]
        assert await client.closed() == 1011


async def test_divergence_07_a_slow_handler_neither_stops_the_reader_nor_hides_that_the_peer_has_left() -> None:
    rt = Realtime()
    heard: list[Any] = []
    reading = anyio.Event()

    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            if not heard:
                heard.append(data)
                reading.set()
                await self.connection.wait_closed()
            heard.append((data, self.connection.is_open))

    async with connect(live(Endpoint, realtime=rt), "/ws") as client:
        await client.send_json(1)
        await reading.wait()
        await client.send_json(2)
        await anyio.wait_all_tasks_blocked()
        assert rt.stats()["received"] == 2  # read beside the handler
        assert heard == [1]
    assert heard == [1, (1, False), (2, False)]  # in order, and what was received is still handled


@pytest.mark.parametrize("denial", [True, False])
async def test_divergence_08_on_connect_that_ends_without_accepting_refuses(denial: bool) -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await self.join("lobby")
            await self.push("never seen")

    with pytest.raises(Refused) as refused:
        async with connect(live(Endpoint), "/ws", denial=denial):
            pass
    assert refused.value.status == 403
    assert refused.value.code == (None if denial else 4503)


def raising(error: Exception, *, accept: bool) -> type[RealtimeEndpoint]:
    """An endpoint whose ``on_connect`` raises, before or after its accept."""

    class Raises(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            if accept:
                await websocket.accept()
            raise error

    return Raises


async def test_divergence_09_an_exception_before_accept_refuses_with_500_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    endpoint = raising(ZeroDivisionError(), accept=False)
    with pytest.raises(Refused) as refused:
        async with connect(live(endpoint), "/ws"):
            pass
    assert refused.value.status == 500
    async with connect(live(endpoint), "/ws", **BROWSER) as client:
        assert await client.closed() == 1011
    assert {record.name for record in caplog.records if record.levelno > logging.INFO} == {"starlette_rt.handler"}


async def test_divergence_09_an_exception_after_accept_closes_with_1011_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with connect(live(raising(ZeroDivisionError(), accept=True)), "/ws") as client:
        assert await client.closed() == 1011
    assert len(loud(caplog)) == 1


async def test_divergence_09_an_http_exception_before_accept_is_the_refusal_whatever_handlers_there_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(websocket: WebSocket, error: Exception) -> None:
        raise AssertionError("not for us")

    error = HTTPException(402, "first pay", headers={"X-Price": "7"})
    app = live(raising(error, accept=False))
    app.add_exception_handler(HTTPException, handler)  # type: ignore[arg-type]
    with pytest.raises(Refused) as refused:
        async with connect(app, "/ws"):
            pass
    assert refused.value.status == 402
    assert refused.value.headers["x-price"] == "7"
    assert refused.value.json() == {"error": "http_402", "message": "first pay"}
    assert loud(caplog) == []


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (EventError("full", "come later", retry_after=1.5), 4503, 403),
        (WebSocketException(4321, "so it is"), 4321, 403),
        (HTTPException(401), 4501, 401),
        (WebSocketException(1006), 4503, 403),  # a code that no Close frame may carry
    ],
    ids=["event", "websocket", "http", "unsendable"],
)
async def test_divergence_09_what_a_hook_raises_on_purpose_refuses_quietly(
    error: Exception, code: int, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    app = live(raising(error, accept=False))
    with pytest.raises(Refused) as refused:
        async with connect(app, "/ws"):
            pass
    assert refused.value.status == status
    async with connect(app, "/ws", **BROWSER) as client:
        assert await client.closed() == code
    assert loud(caplog) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(EventError("full"), 4503), (WebSocketException(4321, "so it is"), 4321), (HTTPException(404), 4503)],
    ids=["event", "websocket", "http"],
)
async def test_divergence_09_what_a_hook_raises_on_purpose_after_accept_closes_quietly(
    error: Exception, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(live(raising(error, accept=True)), "/ws") as client:
        assert await client.closed() == code
    assert loud(caplog) == []


async def test_divergence_10_what_the_host_sends_itself_takes_its_place_in_the_order() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await self.push("before accept")
            await websocket.accept()
            await self.join("lobby")

        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await self.broadcast("lobby", 1)
            await websocket.send_text("2")
            await self.push(3)
            await websocket.send_json(4)
            await websocket.send_bytes(b"5")
            await self.broadcast("lobby", 6)
            await websocket.close(4321, "done")

    async with connect(live(Endpoint), "/ws") as client:
        await client.send_json(0)
        assert [await client.receive_json() for _ in range(7)] == ["before accept", 1, 2, 3, 4, 5, 6]
        assert await client.closed() == 4321
        assert client.close_reason == "done"


async def test_divergence_10_sending_returns_at_once_though_the_peer_does_not_read() -> None:
    sent = anyio.Event()

    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            for number in range(100):
                await websocket.send_json(number)
            sent.set()

    async with connect(live(Endpoint), "/ws") as client:
        client.stall()
        await client.send_json(0)
        with anyio.fail_after(PATIENCE):
            await sent.wait()
        client.resume()
        assert [await client.receive_json() for _ in range(100)] == list(range(100))


async def test_divergence_10_receiving_says_who_reads() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            for read in (websocket.receive, websocket.receive_text, websocket.receive_bytes, websocket.receive_json):
                with pytest.raises(RuntimeError, match="this endpoint reads for you; use on_receive"):
                    await read()
            with pytest.raises(RuntimeError, match="use on_receive"):
                async for _ in self.connection:
                    pass
            await self.push("said")

    async with connect(live(Endpoint), "/ws") as client:
        assert await client.receive_json() == "said"


async def test_divergence_10_sending_to_a_peer_that_has_left_ends_the_handler_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended: list[str] = []

    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await self.connection.wait_closed()
            ended.append("left")
            await websocket.send_text("too late")
            ended.append("not reached")

    async with connect(live(Endpoint), "/ws") as client:
        await client.send_json(0)
        await anyio.wait_all_tasks_blocked()
    assert ended == ["left"]
    assert loud(caplog) == []


async def test_divergence_10_a_handler_that_goes_on_talking_to_a_peer_that_has_left_is_no_bug(
    caplog: pytest.LogCaptureFixture,
) -> None:
    said: list[int] = []

    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await self.connection.wait_closed()
            for number in range(3):
                with pytest.raises(WebSocketDisconnect):
                    await websocket.send_json(number)
                said.append(number)

    async with connect(live(Endpoint), "/ws") as client:
        await client.send_json(0)
        await anyio.wait_all_tasks_blocked()
    assert said == [0, 1, 2]
    assert loud(caplog) == []


@pytest.mark.parametrize("disconnect", [{}, {"code": None}])
async def test_divergence_11_a_client_that_said_no_code_has_1005(disconnect: dict[str, Any]) -> None:
    codes: list[int] = []

    class Endpoint(RealtimeEndpoint):
        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            codes.append(close_code)

    async def send(message: Message) -> None:
        assert message["type"] == "websocket.accept"
        accepted.set()

    async def receive() -> Message:
        message = await connecting()
        if message["type"] == "websocket.disconnect":
            await accepted.wait()
        return message

    accepted, connecting = anyio.Event(), receiver({"type": "websocket.disconnect", **disconnect})
    async with Realtime() as Endpoint.realtime:
        with anyio.fail_after(PATIENCE):
            await Endpoint(dict(SCOPE), receive, send)
    assert codes == [1005]


# on_connect and the handshake.


async def test_a_host_may_answer_the_handshake_itself() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.send_denial_response(PlainTextResponse("a teapot", 418))

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            raise AssertionError("there was no connection")

    with pytest.raises(Refused) as refused:
        async with connect(live(Endpoint), "/ws"):
            pass
    assert (refused.value.status, refused.value.body) == (418, b"a teapot")


async def test_a_peer_that_leaves_before_accept_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    here, rt = anyio.Event(), Realtime()

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await self.join("lobby")
            here.set()
            await self.connection.wait_closed()
            await websocket.accept()
            raise AssertionError("accepted nobody")

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            raise AssertionError("there was no connection")

    app = live(Endpoint, realtime=rt, connections=ConnectionLimits(total=1))
    async with lifespan(app):
        for _ in range(2):  # the slot of the first is free again
            with pytest.raises(TimeoutError, match="accept or refuse"):
                async with connect(app, "/ws", timeout=0.05):
                    pass
            assert here.is_set()
            with anyio.fail_after(PATIENCE):
                while rt.stats()["connections"]:
                    await checkpoint()
        assert rt.stats()["groups"] == 0
    assert loud(caplog) == []


async def test_nobody_is_accepted_who_has_left_also_where_the_server_does_not_mind() -> None:
    sent: list[str] = []

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await self.connection.wait_closed()
            await websocket.accept()

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async with Realtime() as Endpoint.realtime:
        with anyio.fail_after(PATIENCE):
            await Endpoint(dict(SCOPE), receiver({"type": "websocket.disconnect", "code": 1006}), send)
    assert "websocket.accept" not in sent


async def test_a_connection_that_ends_while_its_accept_is_on_its_way_is_closed() -> None:
    """The server's ``send`` waits in the accept; meanwhile the host sends this user away."""
    sent: list[Message] = []
    seen: list[str] = []
    blocked, go = anyio.Event(), anyio.Event()
    rt = Realtime()

    class Endpoint(RealtimeEndpoint):
        realtime = rt

        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            seen.append("accepted")

    async def send(message: Message) -> None:
        sent.append(message)
        if message["type"] == "websocket.accept":
            blocked.set()
            await go.wait()

    async with rt:
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(serving, Endpoint, send)
                await blocked.wait()
                (connection,) = rt.connections
                await rt.disconnect(connection=connection)
                go.set()
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.close"]
    assert seen == []
    assert rt.stats()["connections"] == 0


async def test_a_host_that_accepted_and_then_ends_the_hook_by_closing_is_no_refusal() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.push("bye")
            await self.close(4321, "enough")

    async with connect(live(Endpoint), "/ws") as client:
        assert await client.receive_json() == "bye"
        assert await client.closed() == 4321


# on_receive and its annotation.


@dataclass
class Say:
    text: str
    loud: bool = False


class SayDict(TypedDict):
    text: str


class SayStruct(msgspec.Struct):
    text: str


class SayModel(pydantic.BaseModel):
    text: str


def typed(annotation: Any) -> type[RealtimeEndpoint]:
    """An endpoint whose messages are of this type, echoed."""

    async def on_receive(self: RealtimeEndpoint, websocket: WebSocket, data: Any) -> None:
        assert annotation is SayDict or isinstance(data, annotation)
        await self.push(data)

    on_receive.__annotations__["data"] = annotation
    return type("Typed", (RealtimeEndpoint,), {"on_receive": on_receive})


@pytest.mark.parametrize("annotation", [Say, SayDict, SayStruct, SayModel])
async def test_a_message_is_validated_by_its_annotation(annotation: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with connect(live(typed(annotation)), "/ws") as client:
        await client.send_json({"text": "hi"})
        assert (await client.receive_json())["text"] == "hi"
        for wrong in ({}, {"text": 7}, []):
            await client.send_json(wrong)
            answer = await client.receive_json()
            assert (answer["type"], answer["code"]) == ("error", "invalid")
            assert answer["message"]
    assert loud(caplog) == []


def test_an_annotation_that_cannot_be_resolved_is_said_when_the_class_is_made() -> None:
    with pytest.raises(ConfigurationError, match=r"on_receive: the annotation of `data` cannot be resolved: .*Nowhere"):

        class Endpoint(RealtimeEndpoint):
            async def on_receive(self, websocket: WebSocket, data: Nowhere) -> None:  # type: ignore[name-defined] # noqa: F821
                pass


@pytest.mark.parametrize("hook", ["on_connect", "on_receive", "on_disconnect"])
@pytest.mark.parametrize("encoding", ["json", "bytes"])
def test_a_hook_that_is_not_async_is_said_when_the_class_is_made(hook: str, encoding: str) -> None:
    def on_something(self: RealtimeEndpoint, *arguments: Any) -> None:
        pass

    with pytest.raises(ConfigurationError, match=r"on_something is not async; write `async def on_something"):
        type("Endpoint", (RealtimeEndpoint,), {hook: on_something, "encoding": encoding})


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [({"encoding": "xml"}, 'write "json", "text", "bytes" or None'), ({"origins": ["example.com"]}, "no scheme")],
)
def test_a_setting_that_cannot_work_is_said_when_the_class_is_made(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        type("Endpoint", (RealtimeEndpoint,), setting)


async def test_an_annotation_decodes_only_where_json_is_spoken() -> None:
    class Endpoint(RealtimeEndpoint):
        encoding = "text"

        async def on_receive(self, websocket: WebSocket, data: str) -> None:
            await self.push(data)

    async with connect(live(Endpoint), "/ws") as client:
        await client.send("no json")
        assert await client.receive() == "no json"


@pytest.mark.parametrize(
    ("error", "code"),
    [(EventError("slow", "not so fast", retry_after=0.8), "slow"), (HTTPException(404, "no such page"), "http_404")],
)
async def test_a_handler_refuses_by_raising(error: Exception, code: str, caplog: pytest.LogCaptureFixture) -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            raise error

    async with connect(live(Endpoint), "/ws") as client:
        await client.send_json(1)
        assert (await client.receive_json())["code"] == code
        await client.silent()  # and the connection stays
    assert loud(caplog) == []


async def test_a_handler_closes_by_raising_a_websocket_exception() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            raise WebSocketException(4321, "so it is")

    async with connect(live(Endpoint), "/ws") as client:
        await client.send_json(1)
        assert await client.closed() == 4321
        assert client.close_reason == "so it is"


# The verbs and the settings.


async def test_the_verbs_do_what_they_say() -> None:
    rt = Realtime(presence_grace=0)

    class Verbs(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            verb, *arguments = data
            await getattr(self, verb)(*arguments)
            await self.push([verb, sorted(self.connection.groups), self.user.identity])

    app = live(Verbs, realtime=rt, tokens=tokens)
    async with connect(app, "/ws", token=tokens.sign(Identity("ann"))) as client:

        async def do(*words: Any) -> Any:
            await client.send_json(words)
            return await client.receive_json()

        assert await do("join", "g") == ["join", ["g"], "ann"]
        assert await do("broadcast", "g", 7) == 7
        assert await client.receive_json() == ["broadcast", ["g"], "ann"]
        assert await do("push", 8, "note") == {"event": "note", "data": 8}
        assert (await client.receive_json())[0] == "push"
        await do("track", "g", {"at": 1})
        assert [meta["at"] for meta in (await rt.presence("g"))["ann"].metas] == [1]
        await do("update", "g", {"at": 2})
        assert [meta["at"] for meta in (await rt.presence("g"))["ann"].metas] == [2]
        await do("untrack", "g")
        assert await rt.presence("g") == {}
        assert await do("leave", "g") == ["leave", [], "ann"]
        await client.send_json(["close", 4321, "bye"])
        assert (await client.receive_json())[0] == "close" if client.pending else True
        assert await client.closed() == 4321


async def test_a_broadcast_can_leave_out_its_sender() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.join("g")

        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await self.broadcast("g", data, exclude=self.connection)

    app = live(Endpoint)
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        await one.send_json("hi")
        assert await two.receive_json() == "hi"
        await one.silent()


async def test_limits_and_sizes_are_settings_of_the_class_and_are_inherited() -> None:
    class Endpoint(Echo):
        limits = [RateLimit("2/hour")]
        max_message_size = 10

    class Child(Endpoint):
        pass

    app = live(Endpoint, Child)
    for path in ("/ws", "/ws1"):
        async with connect(app, path) as client:
            await client.send_json("x" * 20)
            assert (await client.receive_json())["code"] == "too_large"
            for _ in range(2):
                await client.send_json(1)
                assert await client.receive_json() == 1
            await client.send_json(1)
            answer = await client.receive_json()
            assert (answer["code"], answer["temporary"]) == ("rate_limited", True)
            assert 0 < answer["retry_after_ms"] <= 1_800_000


async def test_what_is_started_beside_the_handlers_ends_with_the_connection() -> None:
    ended: list[str] = []

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            self.connection.start_soon(self.tick)

        async def tick(self) -> None:
            try:
                await self.push("tick")
                await anyio.sleep_forever()
            finally:
                ended.append("ended")

    async with connect(live(Endpoint), "/ws") as client:
        assert await client.receive_json() == "tick"
        assert ended == []
    assert ended == ["ended"]


@pytest.mark.parametrize(
    ("anonymous", "guarded", "enters"),
    [(None, False, True), (None, True, False), (True, True, True), (False, False, False)],
)
async def test_guests_come_where_the_class_says_or_where_nothing_could_identify_anybody(
    anonymous: bool | None, guarded: bool, enters: bool
) -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.push([self.user.identity, self.user.is_authenticated])

    Endpoint.anonymous = anonymous
    Endpoint._prepare()
    app = live(Endpoint, tokens=tokens if guarded else None)
    if enters:
        names = []
        for session in ("s" * 22, "s" * 22, "t" * 22):
            async with connect(app, "/ws", subprotocols=[f"rt.session.{session}"]) as client:
                name, authenticated = await client.receive_json()
                assert client.subprotocol is None
            assert not authenticated
            assert name.startswith("guest:")
            assert session not in name  # others see the name, and the session is a secret
            names.append(name)
        assert names[0] == names[1] != names[2]
    else:
        with pytest.raises(Refused, match="401"):
            async with connect(app, "/ws"):
                pass


# serve(): inside the host's own route.


class Board(RealtimeEndpoint):
    board: str = ""

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.join(self.board)

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.broadcast(self.board, [self.user.display_name, data])


def boards(rt: Realtime, *, accept: bool = False, **settings: Any) -> FastAPI:
    """A FastAPI app that resolves who and what with its own dependencies."""
    app = FastAPI()
    app.add_middleware(RealtimeMiddleware, realtime=rt, **settings)

    def current_user(websocket: WebSocket) -> str:
        return websocket.headers["x-user"]

    async def readable_board(board_id: str, user: str = Depends(current_user)) -> str:
        if board_id == "secret":
            raise HTTPException(404, "no such board")
        return f"board:{board_id}"

    @app.websocket("/boards/{board_id}")
    async def board(
        websocket: WebSocket, user: str = Depends(current_user), board: str = Depends(readable_board)
    ) -> None:
        if accept:
            await websocket.accept()
        await Board.serve(websocket, identity=Identity(user, display_name=user.title()), board=board)
        done.append(user)

    done: list[str] = []
    app.state.done = done
    return app


@pytest.mark.parametrize("accept", [False, True])
async def test_serve_runs_an_endpoint_with_what_fastapi_resolved(accept: bool) -> None:
    app = boards(Realtime(), accept=accept)
    async with connect(app, "/boards/7", headers={"x-user": "ann"}) as ann:
        async with connect(app, "/boards/7", headers={"x-user": "bob"}) as bob:
            await bob.send_json("hi")
            assert await ann.receive_json() == await bob.receive_json() == ["Bob", "hi"]
    assert app.state.done == ["bob", "ann"]
    with pytest.raises(Refused, match="404"):
        async with connect(app, "/boards/secret", headers={"x-user": "ann"}):
            pass


@pytest.mark.parametrize("accept", [False, True])
async def test_serve_refuses_as_an_endpoint_does_also_what_the_host_has_accepted(
    accept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = boards(Realtime(), accept=accept, connections=ConnectionLimits(total=1))
    async with connect(app, "/boards/7", headers={"x-user": "ann"}):
        if accept:
            async with connect(app, "/boards/7", headers={"x-user": "bob"}) as bob:
                assert await bob.closed() == 4005
        else:
            with pytest.raises(Refused, match="503"):
                async with connect(app, "/boards/7", headers={"x-user": "bob"}):
                    pass
    assert loud(caplog) == []


async def test_serve_closes_what_the_host_has_accepted_and_the_hook_refuses() -> None:
    app = FastAPI()
    app.add_middleware(RealtimeMiddleware, realtime=Realtime())

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await raising(EventError("full"), accept=False).serve(websocket)

    async with connect(app, "/ws") as client:
        assert await client.closed() == 4503


async def test_the_identity_of_serve_wins_over_the_token() -> None:
    app = boards(Realtime(), tokens=tokens)
    async with connect(app, "/boards/7", token=tokens.sign(Identity("eve")), headers={"x-user": "ann"}) as client:
        await client.send_json(1)
        assert await client.receive_json() == ["Ann", 1]


async def test_serve_leaves_the_handshake_to_who_read_it() -> None:
    """A host that has received the connect itself may still serve."""

    class Served(Echo):
        pass

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        websocket = WebSocket(scope, receive, send)  # raises for a lifespan: this app knows none
        assert (await websocket.receive())["type"] == "websocket.connect"
        await Served.serve(websocket)

    async with Realtime() as Served.realtime, connect(app, "/") as client:
        await client.send_json(1)
        assert await client.receive_json() == 1


async def test_several_realtimes_in_one_app_are_strangers() -> None:
    one, two = Realtime(), Realtime()

    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.join("g")

    First = type("First", (Endpoint,), {"realtime": one})
    Second = type("Second", (Endpoint,), {"realtime": two})
    app = Starlette(
        routes=[WebSocketRoute("/one", First), WebSocketRoute("/two", Second), WebSocketRoute("/inner", Endpoint)],
        middleware=[Middleware(RealtimeMiddleware, realtime=one), Middleware(RealtimeMiddleware, realtime=two)],
    )
    async with connect(app, "/one") as first, connect(app, "/two") as second, connect(app, "/inner") as inner:
        await one.broadcast("g", 1)
        await two.broadcast("g", 2)
        assert [await client.receive_json() for client in (first, second, inner)] == [1, 2, 2]
        assert (one.stats()["connections"], two.stats()["connections"]) == (1, 2)
    assert not one.running
    assert not two.running


async def test_a_denied_response_of_json_reaches_a_client_once() -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.send_denial_response(JSONResponse({"why": "no"}, 451))
            raise AssertionError("said after the answer")

    with pytest.raises(Refused) as refused:
        async with connect(live(Endpoint), "/ws"):
            pass
    assert (refused.value.status, refused.value.json()) == (451, {"why": "no"})


async def test_what_is_said_after_the_connection_closed_itself_raises_no_alarm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Endpoint(RealtimeEndpoint):
        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await self.close(4321)
            await self.push("never seen")
            await websocket.send_text("never seen")
            raise AssertionError("the send above ends the handler")

    async with connect(live(Endpoint), "/ws") as client:
        await client.send_json(1)
        assert await client.closed() == 4321
        with pytest.raises(Closed):
            await client.receive()
    assert loud(caplog) == []


@pytest.mark.parametrize(
    "error", [lambda: SystemExit(3), asyncio.CancelledError, lambda: BaseExceptionGroup("two", [SystemExit()])]
)
async def test_what_ends_a_process_or_a_task_elsewhere_is_a_bug_of_the_handler_here(
    error: Callable[[], BaseException], caplog: pytest.LogCaptureFixture, anyio_backend: str
) -> None:
    if anyio_backend == "trio" and not isinstance(error(), SystemExit):
        return  # neither is raised by hand on trio

    class Endpoint(RealtimeEndpoint):
        anonymous = True

        async def on_connect(self, websocket: WebSocket) -> None:
            if websocket.query_params.get("early"):
                raise error()
            await websocket.accept()

        async def on_receive(self, websocket: WebSocket, data: int) -> None:
            if data == 0:
                raise error()
            await self.push(data)

    app = live(Endpoint)
    async with lifespan(app):
        async with connect(app, "/ws") as client:
            for data in (0, 1, 2):
                await client.send_json(data)
            assert (await client.receive_json())["code"] == "internal"
            assert [await client.receive_json(), await client.receive_json()] == [1, 2]
        with pytest.raises(Refused, match="500"):
            async with connect(app, "/ws?early=1"):
                pass
    assert len(loud(caplog)) == 2


async def test_an_event_error_that_is_none_is_a_bug_and_costs_no_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Endpoint(RealtimeEndpoint):
        anonymous = True

        async def on_receive(self, websocket: WebSocket, data: int) -> None:
            if data == 404:
                raise EventError(404, "no such thing")  # type: ignore[arg-type]
            await self.push(data)

    async with connect(live(Endpoint), "/ws") as client:
        for data in (404, 1):
            await client.send_json(data)
        assert (await client.receive_json())["code"] == "internal"
        assert await client.receive_json() == 1
    assert len(loud(caplog)) == 1


def test_serve_takes_no_name_that_the_endpoint_has_itself() -> None:
    class Endpoint(RealtimeEndpoint):
        board: int | None = None  # a default for what serve() brings

    async def body(websocket: WebSocket) -> None:
        with pytest.raises(TypeError, match=r"serve\(\) cannot set user.*identity="):
            await Endpoint.serve(websocket, user=Identity("ada"))

    anyio.run(body, WebSocket({"type": "websocket", "path": "/"}, None, None))  # type: ignore[arg-type]


def test_a_message_size_that_is_no_number_says_so() -> None:
    with pytest.raises(ConfigurationError, match="max_message_size is a number of bytes"):
        type("Endpoint", (RealtimeEndpoint,), {"max_message_size": "4k"})


# Events and whispers of clients that know no protocol.


class Room(RealtimeEndpoint):
    """A plain client is in the group ``board``; what is heard comes back to it."""

    whispers = {"typing": Whisper(bool, limit=RateLimit("2/hour")), "cursor": Whisper(Point, expires=5)}

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.join("board")

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.push(["message", data])

    async def authorize(self, group: str) -> bool:
        return True

    @event("move", scopes=["player"], limit=RateLimit("2/hour"))
    async def move(self, data: Point, group: str) -> str:
        await self.push([group, data.x])
        return "nobody hears it"

    @event("rest")
    async def rest(self) -> None:
        await self.push("rested")


async def plainly(client: Client, said: Any) -> Any:
    """Say something, and return the code of the refusal or what comes back."""
    await client.send_json(said)
    answer = await client.receive_json()
    return answer["code"] if isinstance(answer, dict) else answer


async def test_a_plain_client_says_a_declared_event_in_an_envelope() -> None:
    proof = tokens.sign(Identity("ann", scopes=["player"]))
    async with connect(live(Room, tokens=tokens), "/ws", token=proof) as client:
        assert await plainly(client, {"event": "move", "data": {"x": 1, "y": 2}, "group": "board"}) == ["board", 1]
        assert await plainly(client, {"event": "rest"}) == "rested"
        assert await plainly(client, {"event": "rest", "data": {"ignored": 1}, "group": "board"}) == "rested"
        await client.silent()  # and no acknowledgement


async def test_what_a_plain_client_says_otherwise_is_a_message_as_it_is() -> None:
    said: list[Any] = [
        {"event": "other", "data": 1},
        {"text": "hi"},
        "bare",
        {"event": 5},
        {"event": "move", "group": 5},
    ]
    async with connect(live(Room), "/ws") as client:
        for each in said:
            assert await plainly(client, each) == ["message", each]


async def test_all_that_stands_against_an_event_stands_against_a_plain_clients() -> None:
    point = {"x": 1, "y": 2}
    app = live(Room, tokens=tokens)
    async with connect(app, "/ws", token=tokens.sign(Identity("ann", scopes=["player"]))) as client:
        assert await plainly(client, {"event": "move", "data": point}) == "invalid"
        assert await plainly(client, {"event": "move", "data": point, "group": "other"}) == "not_joined"
        assert await plainly(client, {"event": "rest", "group": "~ann"}) == "not_joined"
        assert await plainly(client, {"event": "move", "data": {"x": 1}, "group": "board"}) == "invalid"
        assert await plainly(client, {"event": "move", "data": point, "group": "board"}) == ["board", 1]
        assert await plainly(client, {"event": "move", "data": point, "group": "board"}) == "rate_limited"
    async with connect(app, "/ws", token=tokens.sign(Identity("bob"))) as client:
        assert await plainly(client, {"event": "move", "data": point, "group": "board"}) == "forbidden"


class Guarded(RealtimeEndpoint):
    """Declares ``message`` itself, on terms."""

    @event("message", scopes=["player"], limit=RateLimit("1/hour"))
    async def say(self, data: Point) -> None:
        await self.push(["moved", data.x])


async def test_a_declared_message_takes_what_a_plain_client_says_bare() -> None:
    class Endpoint(RealtimeEndpoint):
        @event("message")
        async def say(self, data: Point) -> None:
            await self.push(["moved", data.x])

    async with connect(live(Endpoint), "/ws") as client:
        assert await plainly(client, {"x": 1, "y": 2}) == ["moved", 1]
        assert await plainly(client, {"x": 1}) == "invalid"
        assert await plainly(client, {"event": "message", "data": {"x": 3, "y": 2}}) == ["moved", 3]


@pytest.mark.parametrize("scopes", [["player"], []], ids=["limit", "scope"])
async def test_the_terms_of_a_declared_message_hold_also_where_it_is_said_bare(scopes: list[str]) -> None:
    app = live(Guarded, tokens=tokens)
    async with connect(app, "/ws", token=tokens.sign(Identity("ann", scopes=scopes))) as client:
        answers = [await plainly(client, {"x": 1, "y": 2}) for _ in range(2)]
        assert answers == ([["moved", 1], "rate_limited"] if scopes else ["forbidden"] * 2)


async def test_a_declared_message_that_needs_a_group_is_not_said_bare() -> None:
    class Endpoint(RealtimeEndpoint):
        @event("message")
        async def say(self, data: Any, group: str) -> None:
            await self.push(["said to", group])

    async with connect(live(Endpoint), "/ws") as client:
        assert await plainly(client, {"x": 1}) == "invalid"


async def test_plain_clients_and_others_whisper_to_each_other() -> None:
    rt = Realtime()
    app = live(Room, realtime=rt, tokens=tokens)
    ann, bob = (tokens.sign(Identity(name)) for name in ("ann", "bob"))
    async with connect(app, "/ws", token=ann) as plain, connect(app, "/ws", token=bob, subprotocols=[JSON]) as other:
        talk = Talk(other)
        while (await talk.hear())["type"] != "joined":
            pass
        await plain.send_json({"event": "cursor", "data": {"x": 1, "y": 2, "z": 3}, "group": "board"})
        said = {"type": "whisper", "group": "board", "event": "cursor", "data": {"x": 1, "y": 2}, "expires_ms": 5000}
        assert await talk.hear() == {**said, "from": "ann"}
        await talk.say({"type": "whisper", "event": "cursor", "group": "board", "data": {"x": 1, "y": 2}})
        assert await plain.receive_json() == {**said, "from": "bob"}
        await plain.silent()


async def test_all_that_stands_against_a_whisper_stands_against_a_plain_clients() -> None:
    rt = Realtime()
    app = live(Room, realtime=rt)
    async with connect(app, "/ws") as client, connect(app, "/ws") as other:
        assert await plainly(client, {"event": "cursor", "data": {"x": 1, "y": 2}}) == "not_joined"
        assert await plainly(client, {"event": "cursor", "data": {"x": 1, "y": 2}, "group": "no"}) == "not_joined"
        assert await plainly(client, {"event": "cursor", "data": {"x": "1"}, "group": "board"}) == "invalid"
        for _ in range(5):
            await client.send_json({"event": "typing", "data": True, "group": "board"})
        await client.silent()
        assert len(other.pending) == 2, "and what was too much is dropped without a word"
        assert "rejected.rate_limited" not in rt.stats()


@pytest.mark.parametrize("encoding", ["text", "bytes", None])
@pytest.mark.parametrize("more", [{"whispers": {"typing": Whisper(bool)}}, {"say": event("say")(Room.rest)}])
def test_events_and_whispers_are_json(encoding: Any, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r'events and whispers are JSON; write encoding = "json"'):
        type("Endpoint", (RealtimeEndpoint,), {"encoding": encoding, **more})


@pytest.mark.parametrize("hook", ["authorize", "on_track", "snapshot"])
def test_the_hooks_of_what_a_client_may_do_are_checked_when_the_class_is_made(hook: str) -> None:
    def late(self: Any, group: str, meta: Any = None) -> bool:
        return True

    with pytest.raises(ConfigurationError, match="is not async"):
        type("Endpoint", (RealtimeEndpoint,), {hook: late})


async def test_what_serve_has_been_given_accepted_is_plain_whatever_was_offered() -> None:
    app = FastAPI()
    app.add_middleware(RealtimeMiddleware, realtime=Realtime())

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept(subprotocol=websocket.scope["subprotocols"][0])
        await Echo.serve(websocket)

    async with connect(app, "/ws", subprotocols=["soap", JSON]) as client:
        assert client.subprotocol == "soap"
        await client.send_json(1)
        assert await client.receive_json() == 1


async def test_an_endpoint_asks_its_client() -> None:
    class Endpoint(RealtimeEndpoint):
        @event("ask")
        async def ask(self) -> Any:
            return await self.call("name", timeout=5)

    async with connect(live(Endpoint), "/ws", subprotocols=[JSON]) as client:
        talk = Talk(client)
        await talk.hear()
        await talk.say({"type": "event", "event": "ask", "ref": 1})
        asked = await talk.hear()
        assert (asked["event"], asked["data"]) == ("name", None)
        await talk.say({"type": "reply", "ref": asked["ref"], "data": "ann"})
        assert (await talk.hear())["data"] == "ann"


def test_a_typed_handler_cannot_take_the_place_of_a_verb() -> None:
    with pytest.raises(ConfigurationError, match=r'write @event\("join"\) over a method of another'):

        class Shadow(RealtimeEndpoint):
            @event("join")
            async def join(self) -> None:  # type: ignore[override]
                """Whoever calls `self.join` would be surprised."""
