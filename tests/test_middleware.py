"""The middleware: where it may stand, whose life it runs, what it knows and whom it leaves alone.

The law of this file: it looks at what stands around ours (routes of others, HTTP, mounts, other middlewares, the
server's lifespan); how a refusal is told is tested in `test_gate`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from typing import Annotated, Any

import anyio
import pytest
from fastapi import Depends, FastAPI
from fastapi import WebSocket as FastAPIWebSocket
from fastapi.security import OAuth2PasswordBearer
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    BaseUser,
    SimpleUser,
    requires,
)
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route, Router, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from starlette_rt import (
    ConfigurationError,
    Identity,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenBackend,
    TokenSigner,
    Unavailable,
)
from starlette_rt.admission import SERVER_LOGGERS, RedactingFilter
from starlette_rt.testing import Refused, connect, lifespan

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

BROWSER: dict[str, Any] = {"origin": "http://testserver", "subprotocols": ["rt.plain"]}

tokens = TokenSigner(["k" * 32])


class Group(RealtimeEndpoint):
    """Everybody is in one group; says first who one is."""

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.push(self.user.identity)
        await self.join("g")

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.broadcast("g", data)


async def foreign(websocket: WebSocket) -> None:
    """A route that knows nothing of us: says whom it sees, and then whatever it hears."""
    await websocket.accept()
    scopes = list(websocket.auth.scopes) if "auth" in websocket.scope else None
    await websocket.send_json([type(websocket.scope.get("user")).__name__, scopes])
    async for text in websocket.iter_text():
        await websocket.send_text(text)


def loud(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]


def token(name: str = "ann", **details: Any) -> str:
    return tokens.sign(Identity(name, **details))


def ours(realtime: Realtime, **settings: Any) -> Middleware:
    return Middleware(RealtimeMiddleware, realtime=realtime, **settings)


async def two_of(app: ASGIApp, path: str, **how: Any) -> None:
    """Two clients at ``path`` hear each other."""
    async with connect(app, path, token=token("ann"), **how) as ann, connect(app, path, token=token("bob")) as bob:
        assert (await ann.receive_json(), await bob.receive_json()) == ("ann", "bob")
        await ann.send_json("hi")
        assert await ann.receive_json() == await bob.receive_json() == "hi"


# Where it may stand.


async def test_globally_it_serves_every_route_and_every_mount() -> None:
    app = Starlette(
        routes=[WebSocketRoute("/ws", Group), Mount("/sub", routes=[WebSocketRoute("/ws", Group)])],
        middleware=[ours(Realtime(), tokens=tokens)],
    )
    await two_of(app, "/ws")
    await two_of(app, "/sub/ws")


async def test_a_mounted_sub_app_lives_under_the_main_apps_middleware() -> None:
    sub = Starlette(routes=[WebSocketRoute("/ws", Group)])
    app = Starlette(routes=[Mount("/sub", sub)], middleware=[ours(Realtime(), tokens=tokens)])
    await two_of(app, "/sub/ws")


@pytest.mark.parametrize("place", ["route", "mount", "router", "sub-app"])
async def test_inside_the_app_it_hears_no_lifespan_so_the_hosts_own_runs_the_realtime(place: str) -> None:
    rt = Realtime()
    line = [ours(rt, tokens=tokens)]

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async with rt:
            yield

    route: Any = {
        "route": lambda: WebSocketRoute("/sub/ws", Group, middleware=line),
        "mount": lambda: Mount("/sub", routes=[WebSocketRoute("/ws", Group)], middleware=line),
        "router": lambda: Mount("/sub", Router(routes=[WebSocketRoute("/ws", Group)], middleware=line)),
        "sub-app": lambda: Mount("/sub", Starlette(routes=[WebSocketRoute("/ws", Group)], middleware=line)),
    }[place]()
    app = Starlette(routes=[route, WebSocketRoute("/other", foreign)], lifespan=life)
    await two_of(app, "/sub/ws")
    async with connect(app, "/other", token=token()) as client:
        assert await client.receive_json() == ["NoneType", None]  # the line stands elsewhere
    assert not rt.running


async def test_a_mount_with_a_middleware_of_its_own_has_its_own_tokens_and_connections() -> None:
    outer, inner = Realtime(), Realtime()
    theirs = TokenSigner(["x" * 32])

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async with inner:
            yield

    sub = Mount("/sub", routes=[WebSocketRoute("/ws", Group)], middleware=[ours(inner, tokens=theirs)])
    app = Starlette(routes=[sub, WebSocketRoute("/ws", Group)], middleware=[ours(outer, tokens=tokens)], lifespan=life)
    async with connect(app, "/ws", token=token()), connect(app, "/sub/ws", token=theirs.sign(Identity("eve"))) as eve:
        assert await eve.receive_json() == "eve"
        assert outer.stats()["connections"] == inner.stats()["connections"] == 1
        for path, wrong in (("/ws", theirs.sign(Identity("eve"))), ("/sub/ws", token())):
            with pytest.raises(Refused, match="401"):
                async with connect(app, path, token=wrong):
                    pass


async def test_on_fastapi_it_is_added_as_any_other() -> None:
    app = FastAPI()
    app.add_middleware(RealtimeMiddleware, realtime=Realtime(), tokens=tokens)
    app.router.routes.append(WebSocketRoute("/ws", Group))
    await two_of(app, "/ws")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"realtime": None}, "realtime=rt"),
        ({"tokens": "a secret"}, r"tokens= takes a verifier: TokenSigner"),
        ({"protect": "none"}, 'protect= is "ours" or "all"'),
        ({"reject": "drop"}, 'reject= is "auto", "http" or "close"'),
        ({"origins": ["example.com"]}, "has no scheme"),
        ({"origins": "https://example.com"}, "origins is a list"),
    ],
)
def test_a_setting_that_cannot_work_is_said_at_start(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        RealtimeMiddleware(foreign, **{"realtime": Realtime(), **settings})  # type: ignore[arg-type]


# The lifespan.


async def drive(app: ASGIApp, *, state: bool = True) -> tuple[list[Message], list[Exception]]:
    """Run a lifespan from startup to shutdown as a server does; return what was said and what was raised."""
    said: list[Message] = []
    raised: list[Exception] = []
    started = anyio.Event()
    inbox: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Message:
        if len(inbox) == 1:
            await started.wait()
        return inbox.pop(0)

    async def send(message: Message) -> None:
        said.append(message)
        started.set()

    with anyio.fail_after(5):
        try:
            await app({"type": "lifespan", **({"state": {}} if state else {})}, receive, send)
        except Exception as error:
            raised.append(error)
    return said, raised


async def test_the_hosts_own_lifespan_runs_inside_ours_and_the_end_is_told_when_all_is_closed() -> None:
    rt = Realtime()
    seen: list[Any] = []

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        seen.append(("up", rt.running))
        yield {"mine": 1}
        seen.append(("down", rt.running))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            seen.append((message["type"], rt.running))
            await send(message)

        await host(scope, receive, noting)

    host = Starlette(lifespan=life, middleware=[ours(rt)])
    said, raised = await drive(app)
    assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert raised == []
    assert seen == [
        ("up", True),
        ("lifespan.startup.complete", True),
        ("down", True),
        ("lifespan.shutdown.complete", False),
    ]


async def test_at_its_end_living_connections_are_closed_before_the_server_hears_of_it() -> None:
    rt = Realtime()
    app = Starlette(routes=[WebSocketRoute("/ws", Group)], middleware=[ours(rt)])
    joined, closed = anyio.Event(), anyio.Event()
    seen: list[Any] = []
    handshake: list[Message] = [{"type": "websocket.connect"}]

    async def receive() -> Message:
        if handshake:
            return handshake.pop()
        await closed.wait()
        return {"type": "websocket.disconnect", "code": 1012}

    async def send(message: Message) -> None:
        seen.append((message["type"], message.get("code"), rt.running))
        if message["type"] == "websocket.send":
            joined.set()
        elif message["type"] == "websocket.close":
            closed.set()

    scope: Scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"", "subprotocols": []}
    async with anyio.create_task_group() as group:
        async with lifespan(app):
            group.start_soon(app, scope, receive, send)
            with anyio.fail_after(5):
                await joined.wait()
        seen.append("the lifespan is over")
    assert seen == [
        ("websocket.accept", None, True),
        ("websocket.send", None, True),
        ("websocket.close", 1012, True),
        "the lifespan is over",
    ]
    assert rt.stats()["connections"] == 0


async def test_the_state_of_every_request_has_the_realtime() -> None:
    rt = Realtime()

    async def page(request: Request) -> JSONResponse:
        return JSONResponse(request.state.rt is rt)

    async def ws(websocket: WebSocket) -> None:
        assert websocket.state.rt is rt
        await websocket.accept()
        await websocket.close(4321)

    async with connect(Starlette(routes=[WebSocketRoute("/ws", ws)], middleware=[ours(rt)]), "/ws") as client:
        assert await client.closed() == 4321


async def test_a_server_without_state_is_served_too() -> None:
    said, raised = await drive(Starlette(middleware=[ours(Realtime())]), state=False)
    assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert raised == []


async def silent_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Knows no lifespan and says nothing about it."""


async def listening_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Knows no lifespan, but only finds out when it has heard of it."""
    await receive()
    raise AssertionError("what is that?")


async def raising_app(scope: Scope, receive: Receive, send: Send) -> None:
    """Knows no lifespan and says so as ASGI has it."""
    raise AssertionError("what is that?")


@pytest.mark.parametrize("app", [silent_app, listening_app, raising_app])
async def test_around_an_app_that_knows_no_lifespan_it_lives_as_long_as_the_server(app: ASGIApp) -> None:
    rt = Realtime()
    seen: list[bool] = []

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting() -> Message:
            message = await receive()
            seen.append(rt.running)
            return message

        await RealtimeMiddleware(app, realtime=rt)(scope, noting, send)

    said, raised = await drive(watched)
    assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert raised == []
    assert seen == [True, True]
    assert not rt.running


async def test_a_host_whose_shutdown_fails_is_heard_by_the_server() -> None:
    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        yield
        raise ZeroDivisionError("the host's own cleaning up")

    rt = Realtime()
    said, raised = await drive(Starlette(lifespan=life, middleware=[ours(rt)]))
    assert [message["type"] for message in said] == ["lifespan.startup.complete", "lifespan.shutdown.failed"]
    assert "the host's own cleaning up" in said[-1]["message"]
    assert isinstance(raised[0], ZeroDivisionError)
    assert not rt.running


async def test_a_host_whose_startup_fails_leaves_nothing_running() -> None:
    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        raise ZeroDivisionError("the host's own start")
        yield

    rt = Realtime()
    said, raised = await drive(Starlette(lifespan=life, middleware=[ours(rt)]))
    assert [message["type"] for message in said] == ["lifespan.startup.failed"]
    assert isinstance(raised[0], ZeroDivisionError)
    assert not rt.running


async def test_a_realtime_that_cannot_start_tells_the_server_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rt = Realtime()

    async def start(self: Realtime) -> None:
        raise Unavailable("no backend far and wide")

    monkeypatch.setattr(Realtime, "_start", start)
    said, raised = await drive(Starlette(middleware=[ours(rt)]))
    assert said == [{"type": "lifespan.startup.failed", "message": "Unavailable: no backend far and wide"}]
    assert raised == []
    assert not rt.running


# Whom it leaves alone.


async def test_other_peoples_sockets_pass_untouched(caplog: pytest.LogCaptureFixture) -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", foreign)], middleware=[ours(Realtime(), tokens=tokens)])
    for how in ({}, {"token": "wrong"}, {"origin": "https://evil.example"}, {"origin": "no origin"}):
        async with connect(app, "/ws", **how) as client:
            assert await client.receive_json() == ["UnauthenticatedUser", []]
            await client.send("hello")
            assert await client.receive() == "hello"
    assert loud(caplog) == []


async def test_other_peoples_sockets_see_who_came_with_a_token_of_ours() -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", foreign)], middleware=[ours(Realtime(), tokens=tokens)])
    async with connect(app, "/ws", token=token(scopes=["admin"])) as client:
        assert await client.receive_json() == ["Identity", ["authenticated", "admin"]]


async def test_a_page_of_a_foreign_origin_lends_nobodys_cookie_to_other_peoples_sockets() -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", foreign)], middleware=[ours(Realtime(), tokens=tokens)])
    for origin, user in (("https://evil.example", "UnauthenticatedUser"), ("http://testserver", "Identity")):
        async with connect(app, "/ws", cookies={"rt_token": token()}, origin=origin) as client:
            assert (await client.receive_json())[0] == user


async def test_the_hosts_user_stays_the_hosts_where_no_token_came() -> None:
    app = Starlette(
        routes=[WebSocketRoute("/ws", foreign)],
        middleware=[Middleware(AuthenticationMiddleware, backend=Session()), ours(Realtime(), tokens=tokens)],
    )
    async with connect(app, "/ws", headers={"x-session": "carl"}) as client:
        assert await client.receive_json() == ["SimpleUser", ["authenticated"]]


async def test_other_peoples_sockets_work_while_nothing_runs(caplog: pytest.LogCaptureFixture) -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", foreign)], middleware=[ours(Realtime(), tokens=tokens)])

    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await app(scope, receive, send)

    async with connect(without_lifespan, "/ws", token=token()) as client:
        assert (await client.receive_json())[0] == "Identity"
    assert loud(caplog) == []


async def test_what_other_peoples_sockets_raise_is_theirs() -> None:
    async def fails(websocket: WebSocket) -> None:
        raise ZeroDivisionError

    app = Starlette(routes=[WebSocketRoute("/ws", fails)], middleware=[ours(Realtime())])
    with pytest.raises(ZeroDivisionError):
        async with connect(app, "/ws"):
            pass


async def test_http_and_what_else_there_is_pass_as_they_are() -> None:
    calls: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append((scope, receive, send))

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    for kind in ("http", "something.new"):
        scope = {"type": kind, "headers": [(b"authorization", b"Bearer wrong")]}
        before = dict(scope)
        await RealtimeMiddleware(app, realtime=Realtime(), tokens=tokens, protect="all")(scope, nothing, nothing)
        assert calls.pop() == (scope, nothing, nothing)
        assert scope == before


# Protecting everything.


async def test_protect_all_refuses_on_routes_of_others_too(caplog: pytest.LogCaptureFixture) -> None:
    rt = Realtime()
    app = Starlette(routes=[WebSocketRoute("/ws", foreign)], middleware=[ours(rt, tokens=tokens, protect="all")])
    for how, status in (
        ({}, 401),
        ({"token": "wrong"}, 401),
        ({"token": token(), "origin": "https://evil.example"}, 403),
    ):
        with pytest.raises(Refused) as refused:
            async with connect(app, "/ws", **how):
                pass
        assert refused.value.status == status
    async with connect(app, "/ws", **BROWSER) as client:
        assert await client.closed() == 4501
    async with connect(app, "/ws", token=token()) as client:
        assert (await client.receive_json())[0] == "Identity"
    assert loud(caplog) == []


async def test_protect_all_knows_the_hosts_users_and_refuses_its_strangers() -> None:
    app = Starlette(
        routes=[WebSocketRoute("/ws", foreign)],
        middleware=[
            Middleware(AuthenticationMiddleware, backend=Session()),
            ours(Realtime(), tokens=tokens, protect="all"),
        ],
    )
    async with connect(app, "/ws", headers={"x-session": "carl"}) as client:
        assert (await client.receive_json())[0] == "SimpleUser"
    with pytest.raises(Refused, match="401"):
        async with connect(app, "/ws"):
            pass
    with pytest.raises(Refused, match="401"):
        async with connect(app, "/ws", headers={"x-session": "carl"}, token="wrong"):
            pass


async def test_protect_all_without_tokens_looks_at_the_origin_alone() -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", foreign)], middleware=[ours(Realtime(), protect="all")])
    async with connect(app, "/ws", origin="http://testserver") as client:
        await client.receive()
    with pytest.raises(Refused, match="403"):
        async with connect(app, "/ws", origin="https://evil.example"):
            pass


# Beside Starlette's own authentication, and FastAPI's.


class Session(AuthenticationBackend):
    """The host's own login: whoever the header says."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        name = conn.headers.get("x-session")
        return (AuthCredentials(["authenticated"]), SimpleUser(name)) if name else None


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({"headers": {"x-session": "carl"}}, "carl"),
        ({"headers": {"x-session": "carl"}, "token": token()}, "ann"),
        ({"token": token()}, "ann"),
    ],
    ids=["session", "both", "token"],
)
async def test_authentication_outside_ours_gives_the_user_unless_a_token_does(
    how: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = Starlette(
        routes=[WebSocketRoute("/ws", Group)],
        middleware=[Middleware(AuthenticationMiddleware, backend=Session()), ours(Realtime(), tokens=tokens)],
    )
    async with connect(app, "/ws", **how) as client:
        assert await client.receive_json() == name
    assert loud(caplog) == []


async def test_authentication_inside_ours_replaces_the_user_which_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Starlette(
        routes=[WebSocketRoute("/ws", Group)],
        middleware=[ours(Realtime(), tokens=tokens), Middleware(AuthenticationMiddleware, backend=Session())],
    )
    async with lifespan(app):
        for how in ({}, {"headers": {"x-session": "carl"}}):
            async with connect(app, "/ws", token=token(), **how) as client:
                assert await client.receive_json() == "ann"
        async with connect(app, "/ws", headers={"x-session": "carl"}) as client:
            assert await client.receive_json() == "carl"
    assert len(loud(caplog)) == 1


async def test_requires_reads_the_scopes_of_a_token() -> None:
    @requires("admin")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close(4321)

    app = Starlette(routes=[WebSocketRoute("/ws", ws)], middleware=[ours(Realtime(), tokens=tokens)])
    async with connect(app, "/ws", token=token(scopes=["admin"])) as client:
        assert await client.closed() == 4321
    with pytest.raises(Refused, match="403"):
        async with connect(app, "/ws", token=token()):
            pass


async def test_one_verifier_serves_http_and_sockets() -> None:
    async def page(request: Request) -> JSONResponse:
        return JSONResponse(request.user.display_name)

    backend = Middleware(AuthenticationMiddleware, backend=TokenBackend(tokens))
    app = Starlette(
        routes=[Route("/", page), WebSocketRoute("/ws", Group)], middleware=[backend, ours(Realtime(), tokens=tokens)]
    )
    async with connect(app, "/ws", token=token()) as client:
        assert await client.receive_json() == "ann"
    with TestClient(app) as http:
        assert http.get("/", headers={"authorization": f"Bearer {token()}"}).json() == "ann"


oauth2 = OAuth2PasswordBearer(tokenUrl="token")


def security() -> FastAPI:
    """A FastAPI app whose own dependency reads the bearer token; our middleware knows no verifier."""
    app = FastAPI()
    app.add_middleware(RealtimeMiddleware, realtime=Realtime())

    @app.websocket("/ws")
    async def ws(websocket: FastAPIWebSocket, given: Annotated[str, Depends(oauth2)]) -> None:
        await Group.serve(websocket, identity=tokens.verify(given))

    return app


@pytest.mark.parametrize("carrier", ["header", "subprotocol"])
async def test_fastapis_bearer_dependency_works_from_either_carrier(carrier: Any) -> None:
    async with connect(security(), "/ws", token=token(), carrier=carrier, subprotocols=["rt.plain"]) as client:
        assert await client.receive_json() == "ann"
        assert client.subprotocol == "rt.plain"  # never the token


async def test_fastapis_bearer_dependency_refuses_who_has_none() -> None:
    with pytest.raises(Refused, match="401"):
        async with connect(security(), "/ws"):
            pass


async def test_a_header_that_is_there_is_not_replaced_by_the_subprotocol() -> None:
    seen: list[list[str]] = []

    async def ws(websocket: WebSocket) -> None:
        seen.append(websocket.headers.getlist("authorization"))
        await websocket.accept()
        await websocket.close(4321)

    app = Starlette(routes=[WebSocketRoute("/ws", ws)], middleware=[ours(Realtime())])
    for header in ("Basic eDp5", None):
        headers = {"authorization": header} if header else {}
        async with connect(app, "/ws", token="abc", carrier="subprotocol", headers=headers) as client:
            await client.closed()
    assert seen == [["Basic eDp5"], ["Bearer abc"]]


# Carriers, tickets and verifiers.


def app_with(rt: Realtime | None = None, **settings: Any) -> Starlette:
    settings = {"tokens": tokens, **settings}
    return Starlette(routes=[WebSocketRoute("/ws", Group)], middleware=[ours(rt or Realtime(), **settings)])


async def test_every_carrier_brings_the_token() -> None:
    app = app_with(query_token=True)
    for how in (
        {"token": token()},
        {"token": token(), "carrier": "subprotocol"},
        {"cookies": {"rt_token": token()}},
    ):
        async with connect(app, "/ws", **how) as client:  # type: ignore[arg-type]
            assert await client.receive_json() == "ann"
    async with connect(app, f"/ws?token={token()}") as client:
        assert await client.receive_json() == "ann"


async def test_a_token_in_the_query_counts_only_where_that_was_asked_for() -> None:
    with pytest.raises(Refused, match="401"):
        async with connect(app_with(), f"/ws?token={token()}"):
            pass


async def test_the_cookie_has_the_name_it_was_given() -> None:
    app = app_with(cookie="session_token")
    async with connect(app, "/ws", cookies={"session_token": token()}) as client:
        assert await client.receive_json() == "ann"
    with pytest.raises(Refused, match="401"):
        async with connect(app, "/ws", cookies={"rt_token": token()}):
            pass


async def test_a_ticket_is_used_once() -> None:
    app = app_with()
    ticket = tokens.ticket(Identity("ann"))
    async with lifespan(app):
        async with connect(app, f"/ws?ticket={ticket}") as client:
            assert await client.receive_json() == "ann"
        with pytest.raises(Refused) as refused:
            async with connect(app, f"/ws?ticket={ticket}"):
                pass
        assert (refused.value.status, refused.value.json()["message"]) == (401, "the ticket has been used")
        async with connect(app, f"/ws?ticket={tokens.ticket(Identity('ann'))}") as client:
            assert await client.receive_json() == "ann"


async def test_a_ticket_is_no_token_and_a_token_no_ticket() -> None:
    app = app_with(query_token=True)
    ticket = tokens.ticket(Identity("ann"))
    for path, how in (("/ws", {"token": ticket}), (f"/ws?token={ticket}", {}), (f"/ws?ticket={token()}", {})):
        with pytest.raises(Refused, match="401"):
            async with connect(app, path, **how):  # type: ignore[arg-type]
                pass


async def test_no_ticket_is_taken_while_nothing_runs_that_could_remember_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", foreign)], middleware=[ours(Realtime(), tokens=tokens)])

    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await app(scope, receive, send)

    async with connect(without_lifespan, f"/ws?ticket={tokens.ticket(Identity('ann'))}") as client:
        assert (await client.receive_json())[0] == "UnauthenticatedUser"


class Verifier:
    """A verifier of the host's own, which may be asynchronous."""

    async def verify(self, token: str) -> Identity:
        await anyio.lowlevel.checkpoint()
        if token == "away":
            raise Unavailable("the keys that verify tokens cannot be fetched")
        return tokens.verify(token)


async def test_a_verifier_may_be_asynchronous_and_takes_no_tickets_unless_it_says_so() -> None:
    app = app_with(tokens=Verifier())
    async with connect(app, "/ws", token=token()) as client:
        assert await client.receive_json() == "ann"
    with pytest.raises(Refused) as refused:
        async with connect(app, f"/ws?ticket={tokens.ticket(Identity('ann'))}"):
            pass
    assert refused.value.json()["message"] == "this app takes no tickets"


async def test_a_verifier_that_cannot_verify_now_is_503_and_not_a_wrong_token() -> None:
    with pytest.raises(Refused) as refused:
        async with connect(app_with(tokens=Verifier()), "/ws", token="away"):
            pass
    assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")


async def test_a_revoked_token_is_refused_and_others_of_the_same_user_are_not() -> None:
    rt = Realtime()
    app = app_with(rt)
    first, second = token(), token()
    async with lifespan(app):
        await rt.revoke(token=tokens.verify(first).token_id)
        with pytest.raises(Refused) as refused:
            async with connect(app, "/ws", token=first):
                pass
        assert refused.value.json()["message"] == "the token has been revoked"
        async with connect(app, "/ws", token=second) as client:
            assert await client.receive_json() == "ann"


# What is written down.


@pytest.fixture
def access_log() -> Iterator[logging.Logger]:
    """The logger into which uvicorn writes the path of a handshake."""
    logger = logging.getLogger("uvicorn.error")
    before, logger.propagate = logger.propagate, True
    yield logger
    logger.propagate = before


@pytest.mark.parametrize("carrier", ["header", "subprotocol", "cookie", "ticket", "query"])
@pytest.mark.parametrize("good", [True, False], ids=["good", "bad"])
async def test_no_token_is_in_any_record_of_a_handshake(
    carrier: str, good: bool, caplog: pytest.LogCaptureFixture, access_log: logging.Logger
) -> None:
    secret, session = tokens.ticket(Identity("ann")) if carrier == "ticket" else token(), "s" * 22
    secret += "" if good else "x"
    path = {"ticket": f"/ws?ticket={secret}", "query": f"/ws?token={secret}"}.get(carrier, "/ws")
    how: dict[str, Any] = {
        "header": {"token": secret},
        "subprotocol": {"token": secret, "carrier": "subprotocol"},
        "cookie": {"cookies": {"rt_token": secret}},
    }.get(carrier, {})
    with caplog.at_level(logging.DEBUG):
        access_log.info('%s - "WebSocket %s" [accepted]', "127.0.0.1:1", path)  # what servers write
        access_log.debug("< %s: %s", "sec-websocket-protocol", f"rt.token.{secret}, rt.session.{session}")
        access_log.debug("< %s: %s", "authorization", f"Bearer {secret}")
        with nullcontext() if good else pytest.raises(Refused, match="401") as refused:
            async with connect(
                app_with(query_token=True), path, subprotocols=[f"rt.session.{session}"], **how
            ) as client:
                await client.receive_json()
                await client.send("no json")
                await client.receive_json()
    written = "\n".join(f"{record.getMessage()} {record.args} {record.exc_text}" for record in caplog.records)
    assert "authorization: Bearer ***" in written  # the lines are there, and only the secrets are gone
    assert secret not in written
    assert session not in written
    assert refused is None or secret not in f"{refused.value} {refused.value.body!r} {refused.value.headers}"


def test_the_servers_loggers_are_filtered_once_however_many_apps_there_are() -> None:
    for _ in range(2):
        RealtimeMiddleware(foreign, realtime=Realtime())  # type: ignore[arg-type]
    for name in SERVER_LOGGERS:
        filters = logging.getLogger(name).filters
        assert [type(each) for each in filters].count(RedactingFilter) == 1


async def test_nothing_that_stays_with_a_connection_keeps_the_token() -> None:
    seen: list[Any] = []

    class Endpoint(Group):
        async def on_connect(self, websocket: WebSocket) -> None:
            seen.append(websocket.scope["starlette_rt"])
            await super().on_connect(websocket)

    app = Starlette(routes=[WebSocketRoute("/ws", Endpoint)], middleware=[ours(Realtime(), tokens=tokens)])
    secret = token()
    async with connect(app, "/ws", token=secret, carrier="subprotocol") as client:
        await client.receive_json()
    assert seen[0].handshake.token is None
    assert secret not in repr(seen[0])


def test_connections_that_are_no_limits_say_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match="connections= takes ConnectionLimits"):
        RealtimeMiddleware(Starlette(), realtime=Realtime(), connections={"total": 1})  # type: ignore[arg-type]
