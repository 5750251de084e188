"""The way in: who gets through, how a refusal is told, and the function style that lives between the two.

The law of this file: a refusal is looked at from outside, as the client sees it, on servers with and without the
denial extension; and none of them leaves a line above INFO.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, BaseUser, SimpleUser, UnauthenticatedUser
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from starlette_rt import (
    ConfigurationError,
    Connection,
    ConnectionLimits,
    EventError,
    Identity,
    RateLimit,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
    Unavailable,
    gate,
)
from starlette_rt.admission import Admission, Handshake
from starlette_rt.backends.memory import MemoryLimits, memory
from starlette_rt.gate import linger
from starlette_rt.limits import ConnectionCounter
from starlette_rt.testing import Refused, connect, lifespan

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

BROWSER: dict[str, Any] = {"origin": "http://testserver", "subprotocols": ["rt.plain"]}
PATIENCE = 5.0

tokens = TokenSigner(["k" * 32])
Body = Callable[[Connection], Awaitable[None]]


class Whoami(RealtimeEndpoint):
    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.push([self.user.identity, list(self.user.scopes)])


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """No test of this file logs above INFO unless it is marked as one that does."""
    yield
    if "loud" not in request.fixturenames:
        assert loud_lines(caplog) == []


@pytest.fixture
def loud(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged above INFO; asking for it allows it."""
    return lambda: loud_lines(caplog)


def loud_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.get_records("call") if record.levelno > logging.INFO]


class As:
    """What stands for a host's own authentication: puts a user into the scope."""

    def __init__(self, app: ASGIApp, user: Any, scopes: list[str]) -> None:
        self.app, self.user, self.scopes = app, user, scopes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scope["user"], scope["auth"] = self.user, AuthCredentials(self.scopes)
        await self.app(scope, receive, send)


def live(
    endpoint: Any = Whoami, *, realtime: Realtime | None = None, user: Any = None, scopes: Any = (), **settings: Any
) -> Starlette:
    outer = [] if user is None else [Middleware(As, user=user, scopes=list(scopes))]
    return Starlette(
        routes=[WebSocketRoute("/ws", endpoint)],
        middleware=[*outer, Middleware(RealtimeMiddleware, realtime=realtime or Realtime(), **settings)],
    )


def token(name: str = "ann", **details: Any) -> str:
    return tokens.sign(Identity(name, **details))


def expired(name: str = "ann") -> str:
    """A token that was good an hour ago."""
    return TokenSigner(["k" * 32], now=lambda: 1_000_000_000.0).sign(Identity(name))


# Who it is.


async def test_a_token_says_who_it_is() -> None:
    async with connect(live(tokens=tokens), "/ws", token=token(scopes=["admin"])) as client:
        assert await client.receive_json() == ["ann", ["admin"]]


async def test_the_hosts_user_is_wrapped_with_its_scopes() -> None:
    app = live(tokens=tokens, user=SimpleUser("carl"), scopes=["authenticated", "admin"])
    async with connect(app, "/ws") as client:
        assert await client.receive_json() == ["carl", ["authenticated", "admin"]]


async def test_a_valid_token_wins_over_the_hosts_user_and_an_invalid_one_is_no_fallback() -> None:
    app = live(tokens=tokens, user=SimpleUser("carl"))
    async with connect(app, "/ws", token=token()) as client:
        assert (await client.receive_json())[0] == "ann"
    with pytest.raises(Refused, match="401"):
        async with connect(app, "/ws", token="wrong"):
            pass


async def test_where_the_host_authenticates_its_strangers_are_guests_only_if_the_endpoint_says_so() -> None:
    class Open(Whoami):
        anonymous = True

    assert (await refusal(live(user=UnauthenticatedUser()))).status == 401
    async with connect(live(Open, user=UnauthenticatedUser()), "/ws") as client:
        assert (await client.receive_json())[0].startswith("guest:")
    async with connect(live(), "/ws") as client:  # nobody authenticates here
        assert (await client.receive_json())[0].startswith("guest:")


async def test_a_user_that_cannot_be_told_from_others_is_an_error_that_the_host_sees(
    loud: Callable[[], list[str]],
) -> None:
    class Nameless(BaseUser):
        is_authenticated = True
        identity = display_name = ""

    with pytest.raises(Refused) as refused:
        async with connect(live(user=Nameless()), "/ws"):
            pass
    assert refused.value.status == 500
    assert len(loud()) == 1


async def test_a_host_user_with_a_name_of_ours_fills_no_log(loud: Callable[[], list[str]]) -> None:
    app = live(user=SimpleUser("~bob"))
    async with lifespan(app):
        for _ in range(5):
            with pytest.raises(Refused, match="500"):
                async with connect(app, "/ws"):
                    pass
    assert len(loud()) == 1, "the host hears of it, once a minute"


async def test_a_revoked_identity_is_refused_whoever_names_it() -> None:
    rt = Realtime()
    app = live(realtime=rt, tokens=tokens, user=SimpleUser("carl"))
    async with lifespan(app):
        await rt.revoke("carl")
        with pytest.raises(Refused) as refused:
            async with connect(app, "/ws"):
                pass
        assert refused.value.status == 401
        assert refused.value.json()["message"] == "this identity has been revoked"
        async with connect(app, "/ws", token=token()) as client:  # somebody else
            assert (await client.receive_json())[0] == "ann"


async def test_an_endpoint_adds_origins_and_the_token_counts_there_too() -> None:
    class Partner(Whoami):
        origins = ["https://partner.example"]

        async def on_connect(self, websocket: WebSocket) -> None:
            assert websocket.user is self.user
            await super().on_connect(websocket)

    app = live(Partner, tokens=tokens, origins=["https://friend.example"])
    for origin in ("https://partner.example", "https://friend.example", "http://testserver"):
        async with connect(app, "/ws", token=token(), origin=origin) as client:
            assert (await client.receive_json())[0] == "ann"
    with pytest.raises(Refused, match="403"):
        async with connect(app, "/ws", token=token(), origin="https://other.example"):
            pass


# How a refusal is told.


async def refusal(app: ASGIApp, **how: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        async with connect(app, "/ws", **how):
            pass
    return refused.value


async def code_of(app: ASGIApp, **how: Any) -> tuple[int, str | None]:
    """The close code of a refusal that is told after an accept, and the subprotocol of that accept."""
    async with connect(app, "/ws", **how) as client:
        code = await client.closed()
        assert client.pending == ()
        return code, client.subprotocol


async def test_a_refusal_is_a_response_with_a_body_that_programs_can_read() -> None:
    refused = await refusal(live(tokens=tokens))
    assert refused.status == 401
    assert refused.headers["content-type"] == "application/json"
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json() == {"error": "unauthorized", "message": "a token is required"}


async def test_without_the_denial_extension_a_refusal_is_a_close_before_accept() -> None:
    refused = await refusal(live(tokens=tokens), denial=False)
    assert (refused.status, refused.code) == (403, 4501)


async def test_a_browser_of_ours_is_accepted_and_closed_with_a_code_it_can_read() -> None:
    assert await code_of(live(tokens=tokens), **BROWSER) == (4501, "rt.plain")
    assert await code_of(live(tokens=tokens), **BROWSER, token=expired()) == (4001, "rt.plain")


@pytest.mark.parametrize("protocol", ["rt.v1.json", "rt.v1.msgpack"])
async def test_a_browser_hears_a_refusal_in_the_protocol_that_it_offered(protocol: str) -> None:
    app = live(tokens=tokens)
    assert await code_of(app, origin="http://testserver", subprotocols=[protocol, "rt.plain"]) == (4501, protocol)


@pytest.mark.parametrize(
    ("offered", "encoding", "spoken"),
    [
        (["soap", "rt.v1.msgpack", "rt.v1.json"], "json", "rt.v1.msgpack"),
        (["rt.plain", "rt.v1.json"], "json", "rt.plain"),
        (["rt.v2.json"], "json", None),
        (["rt.v1.json", "rt.plain"], "text", "rt.plain"),
        (["rt.v1.json"], None, None),
    ],
)
async def test_the_first_protocol_is_spoken_that_is_known_and_fits_the_encoding(
    offered: list[str], encoding: Any, spoken: str | None
) -> None:
    app = live(type("Endpoint", (RealtimeEndpoint,), {"encoding": encoding}))
    async with connect(app, "/ws", subprotocols=offered) as client:
        assert client.subprotocol == spoken
        await client.silent() if spoken in (None, "rt.plain") else await client.receive()


class Choosing(RealtimeEndpoint):
    """Accepts with a protocol of its own choice."""

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept(subprotocol="soap")


async def test_a_host_that_names_another_protocol_than_is_spoken_is_told_what_to_write(
    caplog: pytest.LogCaptureFixture, loud: Callable[[], list[str]]
) -> None:
    assert (await refusal(live(Choosing), subprotocols=["rt.v1.json", "soap"])).status == 500
    assert len(loud()) == 1
    assert "rt.v1.json is spoken with this client: write accept() without subprotocol=" in caplog.text


async def test_a_host_that_names_ours_where_it_is_not_spoken_is_told_too(
    loud: None, caplog: pytest.LogCaptureFixture
) -> None:
    class Text(RealtimeEndpoint):
        encoding = "text"

        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept(subprotocol="rt.v1.json")

    assert (await refusal(live(Text), subprotocols=["rt.v1.json"])).status == 500
    assert "rt.plain is spoken with this client" in caplog.text


async def test_a_host_may_name_what_is_spoken_and_any_protocol_of_its_own() -> None:
    async with connect(live(Choosing), "/ws", subprotocols=["soap"]) as client:
        assert client.subprotocol == "soap"

    class Same(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept(subprotocol="rt.v1.json")

    async with connect(live(Same), "/ws", subprotocols=["rt.v1.json"]) as client:
        assert client.subprotocol == "rt.v1.json"


async def test_a_close_before_accept_keeps_its_code_and_its_reason() -> None:
    class Private(Whoami):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.close(4321, "members only")

    refused = await refusal(live(Private))
    assert (refused.status, refused.json()["message"]) == (403, "members only")
    async with connect(live(Private), "/ws", **BROWSER) as client:
        assert await client.closed() == 4321
        assert client.close_reason == "members only"


@pytest.mark.parametrize(
    "how",
    [{"origin": "http://testserver"}, {"subprotocols": ["rt.plain"]}, {}],
    ids=["a page without our protocol", "our protocol without a page", "neither"],
)
async def test_only_browsers_that_speak_our_protocol_are_accepted_for_it(how: dict[str, Any]) -> None:
    assert (await refusal(live(tokens=tokens), **how)).status == 401


async def test_reject_http_answers_browsers_with_a_status_too() -> None:
    assert (await refusal(live(tokens=tokens, reject="http"), **BROWSER)).status == 401


async def test_reject_close_closes_everybody_with_a_code() -> None:
    assert await code_of(live(tokens=tokens, reject="close")) == (4501, None)


@pytest.mark.parametrize("reject", ["auto", "http", "close"])
async def test_a_wrong_origin_is_never_accepted_and_the_answer_names_the_argument(reject: Any) -> None:
    app = live(tokens=tokens, reject=reject)
    refused = await refusal(
        app, token=token(), origin="http://localhost:5173", subprotocols=["rt.plain"], carrier="subprotocol"
    )
    assert refused.status == 403
    assert refused.json()["message"] == (
        'origin http://localhost:5173 refused; add it to RealtimeMiddleware(origins=["http://localhost:5173"])'
    )
    assert (await refusal(app, origin="https://evil.example", denial=False)).code == 4503


async def test_an_expired_token_is_told_apart_from_a_bad_one() -> None:
    assert (await refusal(live(tokens=tokens), token=expired())).json()["error"] == "token_expired"
    assert (await refusal(live(tokens=tokens), token="bad")).json()["error"] == "unauthorized"


@pytest.mark.parametrize(
    ("limits", "status", "message"),
    [
        (ConnectionLimits(total=1), 503, "the server is full"),
        (ConnectionLimits(per_ip=1), 429, "too many connections from this address"),
        (ConnectionLimits(per_user=1), 429, "too many connections of this user"),
        (ConnectionLimits(rate="1/hour"), 429, "connections from this address come too fast"),
    ],
    ids=["total", "per_ip", "per_user", "rate"],
)
async def test_one_connection_too_many_is_told_when_to_come_back(
    limits: ConnectionLimits, status: int, message: str
) -> None:
    app = live(tokens=tokens, connections=limits)
    async with connect(app, "/ws", token=token()) as client:
        await client.receive_json()
        refused = await refusal(app, token=token())
        assert refused.status == status
        assert refused.json()["message"] == message
        assert refused.json()["error"] == "too_many_connections"
        wait = int(refused.headers["retry-after"])
        assert 0 < refused.json()["retry_after_ms"] <= wait * 1000
        code = 4005 if status == 503 else 4004
        assert (await code_of(app, **BROWSER, token=token()))[0] == code


@pytest.mark.parametrize(
    ("limits", "other"),
    [
        (ConnectionLimits(per_ip=1), {"client": ("192.0.2.7", 1)}),
        (ConnectionLimits(per_user=1), {"token": token("bob")}),
        (ConnectionLimits(rate="1/hour"), {"client": ("192.0.2.7", 1)}),
    ],
    ids=["per_ip", "per_user", "rate"],
)
async def test_others_are_not_refused_for_it(limits: ConnectionLimits, other: dict[str, Any]) -> None:
    app = live(tokens=tokens, connections=limits)
    async with connect(app, "/ws", token=token()), connect(app, "/ws", **{"token": token(), **other}) as client:
        await client.receive_json()


async def test_a_slot_is_given_back_when_its_connection_ends_and_a_bad_token_takes_none() -> None:
    app = live(tokens=tokens, connections=ConnectionLimits(total=1, per_ip=1, per_user=1))
    async with lifespan(app):
        for _ in range(3):
            async with connect(app, "/ws", token=token()) as client:
                await client.receive_json()
            assert (await refusal(app, token="bad")).status == 401


async def test_a_bad_token_costs_its_share_of_the_rate() -> None:
    app = live(tokens=tokens, connections=ConnectionLimits(rate="2/hour"))
    async with lifespan(app):
        assert [(await refusal(app, token="bad")).status for _ in range(3)] == [401, 401, 429]


async def test_guests_have_no_limit_per_user() -> None:
    app = live(connections=ConnectionLimits(per_user=1))
    async with connect(app, "/ws") as one, connect(app, "/ws") as two:
        assert await one.receive_json() != await two.receive_json()


class Shared(MemoryLimits):
    """The limits of several nodes, in one process; ``take_cap`` may do something of the test's first."""

    shared = True

    def __init__(self, before: Callable[[], Awaitable[None]] = checkpoint) -> None:
        super().__init__(anyio.current_time)
        self._before = before

    async def take_cap(self, identity: str, most: int) -> bool:
        await self._before()
        return await super().take_cap(identity, most)


class Together(Realtime):
    """One that shares its limits."""

    def __init__(self, limits: Shared) -> None:
        super().__init__(backend=memory(grace=0, now=anyio.current_time)._replace(limits=limits))

    @property
    def limits(self) -> Shared:
        return self._backend.limits


def shared_app(limits: Shared, endpoint: Any = Whoami, **caps: int) -> Starlette:
    return live(endpoint, realtime=Together(limits), tokens=tokens, connections=ConnectionLimits(**caps))


async def test_the_cap_of_a_person_holds_for_all_nodes_and_is_given_back() -> None:
    limits = Shared()
    one, two = shared_app(limits, per_user=1), shared_app(limits, per_user=1)
    async with lifespan(one), lifespan(two):
        for app, other in ((one, two), (two, one)):
            async with connect(app, "/ws", token=token()) as client:
                await client.receive_json()
                refused = await refusal(other, token=token())
                assert (refused.status, refused.json()["message"]) == (429, "too many connections of this user")
                assert (await refusal(other, token="bad")).status == 401
                async with connect(other, "/ws", token=token("bob")) as bob:
                    await bob.receive_json()
    assert not limits._caps


async def test_the_other_caps_hold_for_each_node() -> None:
    limits = Shared()
    one, two = (shared_app(limits, total=1, per_ip=1) for _ in range(2))
    async with connect(one, "/ws", token=token()), connect(two, "/ws", token=token()) as client:
        await client.receive_json()
        assert not limits._caps


async def test_a_slot_is_given_back_whatever_happens_before_the_connection_is_there() -> None:
    class Closed(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            raise HTTPException(418)

    limits = Shared()
    app = shared_app(limits, Closed, per_user=1, total=1)
    async with lifespan(app):
        for _ in range(2):
            assert (await refusal(app, token=token())).status == 418
    assert not limits._caps


async def test_a_place_in_this_process_is_given_back_where_the_others_have_none() -> None:
    limits = Shared()
    one, two = shared_app(limits, per_user=1, total=1), shared_app(limits, per_user=1, total=1)
    async with lifespan(two), connect(one, "/ws", token=token()) as client:
        await client.receive_json()
        assert (await refusal(two, token=token())).status == 429
        async with connect(two, "/ws", token=token("bob")) as bob:
            await bob.receive_json()


@pytest.mark.parametrize("ends", ["cancelled", "failed"])
async def test_a_place_in_this_process_is_given_back_where_the_others_do_not_answer(ends: str) -> None:
    async def trouble() -> None:
        if ends == "failed":
            raise RuntimeError("a bug")
        await anyio.sleep_forever()

    counter = ConnectionCounter(ConnectionLimits(per_user=1, total=1))
    admission = Admission(None, Handshake("/ws", "testserver", None, "ws", None), counter=counter)
    raised = pytest.raises(RuntimeError) if ends == "failed" else nullcontext()
    with anyio.move_on_after(0.001), raised:
        await gate.take_slot(admission, Identity("ann"), Shared(trouble))
    assert counter.connections == 0


async def test_a_drain_that_begins_while_the_others_are_asked_refuses_the_newcomer() -> None:
    async def drain() -> None:
        rt.draining = True

    limits = Shared(drain)
    rt = Together(limits)
    app = live(realtime=rt, tokens=tokens, connections=ConnectionLimits(per_user=1, total=1))
    async with lifespan(app):
        refused = await refusal(app, token=token())
        assert (refused.status, refused.json()["message"]) == (503, "the server is restarting")
        assert not limits._caps
        rt.draining = False
        assert (await refusal(app, token=token())).status == 503, "the place in this process was given back"


async def test_where_nobody_can_say_who_is_revoked_nobody_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rt = Realtime()

    async def revoked(identity: Identity) -> bool:
        raise Unavailable("revocations could not be read yet")

    monkeypatch.setattr(rt, "revoked", revoked)
    async with lifespan(app := live(realtime=rt, tokens=tokens, user=SimpleUser("carl"))):
        for proof in ({"token": token()}, {}):
            refused = await refusal(app, **proof)
            assert (refused.status, refused.json()["error"]) == (503, "unavailable")
            assert int(refused.headers["retry-after"]) > 0


async def test_while_it_does_not_run_each_handshake_is_503_and_one_error_names_the_line_to_write(
    loud: Callable[[], list[str]],
) -> None:
    rt = Realtime()
    app = live(realtime=rt)

    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        await app(scope, receive, send)

    refused = await refusal(without_lifespan)
    assert refused.status == 503
    assert refused.headers["retry-after"] == "5"
    (line,) = loud()
    assert "Middleware(RealtimeMiddleware, realtime=rt)" in line


async def test_an_endpoint_without_any_realtime_says_the_same(loud: Callable[[], list[str]]) -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", Whoami)])
    assert (await refusal(app)).status == 503
    (line,) = loud()
    assert "Middleware(RealtimeMiddleware, realtime=rt)" in line


async def test_while_it_drains_newcomers_are_sent_away_with_a_time_to_come_back() -> None:
    rt = Realtime()
    app = live(realtime=rt)
    async with lifespan(app):
        await rt.drain()
        refused = await refusal(app)
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")
        assert (await code_of(app, **BROWSER))[0] == 4005


async def test_refusals_are_counted() -> None:
    rt = Realtime()
    await refusal(live(realtime=rt, tokens=tokens))
    assert rt.stats()["refused.401.unauthorized"] == 1


async def test_something_inside_that_replaces_the_user_is_said_once_and_the_token_counts(
    loud: Callable[[], list[str]],
) -> None:
    app = Starlette(
        routes=[WebSocketRoute("/ws", Whoami)],
        middleware=[
            Middleware(RealtimeMiddleware, realtime=Realtime(), tokens=tokens),
            Middleware(As, user=UnauthenticatedUser(), scopes=[]),
        ],
    )
    async with lifespan(app):
        for _ in range(2):
            async with connect(app, "/ws", token=token()) as client:
                assert (await client.receive_json())[0] == "ann"
    (line,) = loud()
    assert "Put RealtimeMiddleware after (inside) AuthenticationMiddleware" in line


async def test_a_peer_that_did_not_wait_for_its_refusal_is_nobodys_error() -> None:
    async def send(message: Message) -> None:
        raise OSError("the peer has left")

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope: Scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b""}

    class Closed(Whoami):
        anonymous = False

    async with Realtime() as Closed.realtime:
        await Closed(scope, receive, send)


async def test_lingering_ends_when_the_server_has_let_go() -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 3:
            raise RuntimeError("the response is complete")

    await linger(receive, send)
    assert len(sent) == 3


async def test_lingering_has_an_end_where_the_server_never_says_anything() -> None:
    async def send(message: Message) -> None:
        raise AssertionError("not before the disconnect")

    with anyio.fail_after(PATIENCE):
        await linger(anyio.sleep_forever, send)


@pytest.mark.parametrize("browser", [False, True], ids=["over HTTP", "by a close code"])
async def test_a_refusal_that_quotes_half_a_character_is_still_said(browser: bool) -> None:
    class Endpoint(RealtimeEndpoint):
        anonymous = True

        async def on_connect(self, websocket: WebSocket) -> None:
            raise EventError("full", "no seat for \ud83d")

    app = live(Endpoint)
    if browser:
        async with connect(app, "/ws", origin="http://testserver", subprotocols=["rt.plain"]) as client:
            await client.closed()
            assert client.close_reason == "no seat for ?"
    else:
        with pytest.raises(Refused) as refused:
            async with connect(app, "/ws"):
                pass
        assert refused.value.json()["message"] == "no seat for ?"


async def test_a_refusal_is_told_to_the_host_at_info(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "starlette_rt"), pytest.raises(Refused):
        async with connect(live(), "/ws", origin="http://elsewhere.example"):
            pass
    assert "refused 403 origin: origin http://elsewhere.example refused; add it to" in caplog.text


async def test_one_who_was_revoked_on_the_way_in_does_not_get_in() -> None:
    rt, on_the_way = Realtime(), anyio.Event()

    async def slow(websocket: WebSocket) -> None:
        on_the_way.set()
        await anyio.wait_all_tasks_blocked()
        await Whoami.serve(websocket)

    app = Starlette(
        routes=[WebSocketRoute("/ws", slow)], middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)]
    )

    async def come() -> None:
        with pytest.raises(Refused, match="401"):
            async with connect(app, "/ws", token=token("eve")):
                pass

    async with lifespan(app), anyio.create_task_group() as group:
        group.start_soon(come)
        await on_the_way.wait()
        await rt.revoke("eve")


async def test_a_header_of_the_hosts_refusal_is_one_line_of_latin_1() -> None:
    class Endpoint(RealtimeEndpoint):
        anonymous = True

        async def on_connect(self, websocket: WebSocket) -> None:
            raise HTTPException(402, headers={"X-Price": "5 \u20ac\r\nSet-Cookie: a=b"})

    with pytest.raises(Refused) as refused:
        async with connect(live(Endpoint), "/ws"):
            pass
    assert refused.value.headers["x-price"] == "5 ? Set-Cookie: a=b"
    assert "set-cookie" not in refused.value.headers


def test_limits_that_are_none_say_what_to_write() -> None:
    for limits in (RateLimit("1/second"), ["20/second"]):
        with pytest.raises(ConfigurationError, match=r"limits = \[RateLimit"):
            type("Endpoint", (RealtimeEndpoint,), {"limits": limits})


async def test_a_peer_refused_by_a_code_is_read_no_more_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOMENT", 0.0)
    done: list[str] = []
    transport = SimpleNamespace(abort=lambda: done.append("aborted"), pause_reading=lambda: done.append("deaf"))

    class Server:
        """What uvicorn's ``send`` is a method of."""

        transport: Any

        async def send(self, message: Message) -> None:
            done.append(message["type"])

    server = Server()
    server.transport = transport
    await gate.part(server.send)
    assert done == ["deaf", "aborted"]
