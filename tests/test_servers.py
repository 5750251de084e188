"""Fifteen cases on the servers that are not uvicorn, and what each of them does otherwise.

The law of this file: a case is what docs/servers.md promises everywhere. Where a server cannot keep it the case is
a strict xfail and the reason is a row of that page: a server that mends its way fails here, and the row goes.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.peers import (
    CLOSE,
    PATIENCE,
    Raw,
    Roster,
    answered,
    ask,
    bearer,
    browser,
    ending,
    eventually,
    frame,
    goodbyes,
    hear,
    loud,
    name,
    refusal,
    settle,
    stats,
    tell,
    visit,
)
from tests.servers import Server, serve

pytestmark = pytest.mark.system

APP = "tests.live:app"
PAGE = Path(__file__).parent.parent / "docs" / "servers.md"
OTHERS = ["hypercorn", "granian"]
UVICORNS = ["uvicorn", "uvicorn-rt", "uvicorn-wsproto"]
CODES = [1000, 1001, 1008, 1009, 1011, 1012, 1013, 3000, 4000, 4999]
STOP = 10.0  # seconds that a server of any kind has

DEVIATIONS = {  # (server, test) -> the cell of the page that says so
    ("hypercorn", "test_hooks_run_and_the_peers_close_code_reaches_on_disconnect"): (
        "`on_disconnect` is told 1006, whatever code the client sent"
    ),
    ("hypercorn", "test_text_that_is_no_utf8_closes_with_1007"): (
        "a frame that RFC 6455 forbids ends the connection without a Close frame"
    ),
    ("hypercorn", "test_clients_read_1012_when_the_server_stops"): "a stopping server closes with 1011",
    ("granian", "test_text_that_is_no_utf8_closes_with_1007"): (
        "text that is not UTF-8 is answered by a Close frame without a code"
    ),
    ("granian", "test_every_code_reaches_the_client_after_the_last_words"): (
        "a close by the application does not reach the client"
    ),
    (
        "granian",
        "test_clients_read_1012_when_the_server_stops",
    ): "a stopping server drops its clients without a Close frame",
    ("uvicorn-wsproto", "test_uvicorn_answers_text_that_is_no_utf8_with_1007"): (
        "a frame that RFC 6455 forbids ends the connection without a Close frame"
    ),
    ("uvicorn", "test_uvicorn_does_not_log_text_that_is_no_utf8"): (
        "text that is not UTF-8 leaves an ERROR and a traceback in uvicorn's log"
    ),
}


@pytest.fixture(scope="module", params=OTHERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(APP, request.param, env={"PRESENCE_GRACE": "0.1"}) as server:
        yield server


@pytest.fixture(autouse=True)
def _deviation(request: pytest.FixtureRequest) -> None:
    params = getattr(request.node, "callspec", None)
    kind = next(iter(params.params.values()), "") if params else ""
    if reason := DEVIATIONS.get((kind, request.node.originalname)):
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


def test_hooks_run_and_the_peers_close_code_reaches_on_disconnect(server: Server) -> None:
    me = name()
    with visit(server, me) as peer:
        tell(peer, "who")
        assert hear(peer) == [me, True, ["all"]]
        peer.close(4123)
    assert eventually(lambda: goodbyes(server, me), bool) == [4123]


def test_a_peer_that_vanishes_is_gone_once_and_leaves_nothing(server: Server) -> None:
    me, group = name(), name("g")
    with Raw(server, bearer(server, me)) as peer:
        peer.send(frame(json.dumps({"do": "join", "group": group}).encode()))
        peer.send(frame(json.dumps({"do": "track", "group": group}).encode()))
        peer.send(frame(b'"heard"'))
        assert peer.read() == (1, b'{"echo":"heard"}')
        peer.vanish()
    assert eventually(lambda: goodbyes(server, me), bool) in ([1005], [1006])
    eventually(lambda: stats(server), lambda now: now["connections"] == now["groups"] == now["alive"] == 0)
    eventually(lambda: ask(server, f"/present?group={group}"), lambda now: now == [0, 0, []])


def test_garbage_is_answered_and_logged_nowhere(server: Server) -> None:
    with visit(server, name()) as peer:
        for garbage in ("x", b"\xff", '"\\ud800"', "[" * 10_000):
            peer.send(garbage)
            assert hear(peer)["code"] == "bad_message"
    assert loud(server.log()) == []


def test_text_that_is_no_utf8_closes_with_1007(server: Server) -> None:
    with Raw(server, bearer(server, name())) as peer:
        peer.send(frame(b"\xff\xfe"))
        assert peer.close_code() == 1007


def test_binary_fragments_and_large_messages_arrive_whole(server: Server) -> None:
    with visit(server, name(), "/anything", max_size=None) as peer:
        for said in (b"\0\xff", "", "x" * 65_000, ["é", "è" * 1000, "!"]):
            peer.send(said)
            assert peer.recv(timeout=PATIENCE) == ("".join(said) if isinstance(said, list) else said)


def test_a_broadcast_reaches_the_members_without_the_excluded_one(server: Server) -> None:
    group = name("g")
    with visit(server, name()) as ann, visit(server, name()) as bob, visit(server, name()) as eve:
        for peer in (ann, bob):
            tell(peer, "join", group=group)
            settle(peer)
        tell(ann, "say", group=group, data="others", others=True)
        tell(ann, "say", group=group, data="all")
        assert [hear(bob), hear(bob), hear(ann)] == ["others", "all", "all"]
        settle(eve)


def test_what_is_said_arrives_in_the_order_of_the_calls(server: Server) -> None:
    group = name("g")
    with visit(server, name()) as peer:
        steps: list[Any] = [{"do": "join", "group": group}]
        for number in range(0, 300, 3):
            steps.append({"do": "say", "group": group, "data": number})
            steps.append({"do": "push", "data": number + 1})
            steps.append({"do": "send", "data": number + 2})
        tell(peer, "", steps=steps)
        assert [hear(peer) for _ in range(300)] == list(range(300))


def test_presence_follows_who_comes_and_goes(server: Server) -> None:
    group, bob = name("g"), name()
    with visit(server, name()) as ann:
        tell(ann, "join", group=group, presence="members")
        roster = Roster(ann, group)
        with visit(server, bob) as other:
            tell(other, "track", group=group, meta={"a": 1})
            assert roster.until(lambda now: bob in now) == {bob: [{"a": 1}]}
        assert roster.until(lambda now: bob not in now) == {}


def test_messages_survive_compression_where_it_was_agreed_on(server: Server) -> None:
    with visit(server, name(), compression="deflate") as peer:
        ask(server, "/say?group=all&count=100&size=2000&turn=7", "POST")
        assert [hear(peer)["n"] for _ in range(100)] == list(range(100))


def test_every_code_reaches_the_client_after_the_last_words(server: Server) -> None:
    with ExitStack() as stack:
        peers = {code: stack.enter_context(Raw(server, bearer(server, name()))) for code in CODES}
        for code, peer in peers.items():
            close = {"do": "close", "code": code, "reason": "bye"}
            peer.send(frame(json.dumps({"steps": [{"do": "push", "data": "last"}, close]}).encode()))
        for code, peer in peers.items():
            peer.socket.settimeout(3)
            assert peer.read() == (1, b'"last"')
            assert peer.read() == (CLOSE, code.to_bytes(2) + b"bye")


def test_a_refusal_has_its_status_headers_and_body_and_no_line_in_the_log(server: Server) -> None:
    before = len(loud(server.log()))
    assert answered(refusal(server)) == (401, {"error": "unauthorized", "message": "a token is required"})
    assert answered(refusal(server, name(), origin="http://evil.example"))[0] == 403
    assert answered(refusal(server, name(), "/ws?connect=silent"))[0] == 403
    response = refusal(server, name(), "/ws?connect=http")
    assert answered(response) == (402, {"error": "http_402", "message": "pay first"})
    assert response.headers["x-price"] == "1"
    assert loud(server.log())[before:] == []


def test_a_browser_of_ours_reads_the_refusal_as_a_code(server: Server) -> None:
    with browser(server, "forged") as peer:
        assert ending(peer)[0] == 4501
    assert loud(server.log()) == []


def test_a_body_of_the_function_style_ends_with_its_peer(server: Server) -> None:
    me = name()
    with visit(server, path=f"/watch/{me}") as peer:
        assert hear(peer) == {"user": me}
    eventually(lambda: stats(server)["left"], lambda left: me in left)


def test_a_peer_that_never_reads_is_forgotten_in_time(server: Server) -> None:
    me = name("deaf")
    with visit(server, name(), max_size=None) as ann, Raw(server, bearer(server, me), buffer=4096):
        for start in range(0, 120, 4):  # 7 MB: the kernel's buffers and an outbox
            ask(server, f"/say?group=all&size=60000&count=4&start={start}", "POST")
            assert [hear(ann)["n"] for _ in range(4)] == list(range(start, start + 4))
        assert eventually(lambda: goodbyes(server, me), bool, 10.0) == [4000]


def test_the_transport_of_a_peer_that_never_reads_is_dropped_too(server: Server) -> None:
    with visit(server, name(), max_size=None) as ann, Raw(server, bearer(server, name("deaf")), buffer=4096) as deaf:
        for start in range(0, 120, 4):
            ask(server, f"/say?group=all&size=60000&count=4&start={start}", "POST")
            assert [hear(ann)["n"] for _ in range(4)] == list(range(start, start + 4))
        eventually(lambda: stats(server)["connections"], lambda count: count == 1)
        deaf.end()


def test_clients_read_1012_when_the_server_stops(stopped: tuple[Server, int | None]) -> None:
    assert stopped[1] == 1012


def test_a_server_stops_soon_and_every_on_disconnect_has_run(stopped: tuple[Server, int | None]) -> None:
    server = stopped[0]
    assert server.wait(STOP) in (0, -signal.SIGTERM)
    assert server.log().count("1 have been told goodbye") + server.log().count("told goodbye late") == 1


@pytest.fixture(params=OTHERS)
def stopped(request: pytest.FixtureRequest) -> Iterator[tuple[Server, int | None]]:
    """A server that was told to stop while a peer was there, and the code that the peer read."""
    if request.param == "hypercorn" and sys.version_info >= (3, 12):
        pytest.xfail("hypercorn does not stop while a WebSocket is open, from Python 3.12 on; plain Starlette too")
    with serve(APP, request.param) as server, Raw(server, bearer(server, "ann")) as peer:
        peer.send(frame(b'"here"'))
        assert peer.read() == (1, b'{"echo":"here"}')
        server.send_signal(signal.SIGTERM)
        try:
            yield server, peer.close_code()
        except (EOFError, ConnectionError):
            yield server, None


@pytest.mark.parametrize("kind", UVICORNS)
def test_uvicorn_answers_text_that_is_no_utf8_with_1007(kind: str) -> None:
    with serve(APP, kind) as server, Raw(server, bearer(server, "ann")) as peer:
        peer.send(frame(b"\xff\xfe"))
        assert peer.close_code() == 1007


@pytest.mark.parametrize("kind", UVICORNS)
def test_uvicorn_does_not_log_text_that_is_no_utf8(kind: str) -> None:
    with serve(APP, kind) as server:
        with Raw(server, bearer(server, "ann")) as peer:
            peer.send(frame(b"\xff\xfe"))
            eventually(lambda: goodbyes(server, "ann"), bool)
        assert loud(server.log()) == []


def test_every_deviation_is_a_row_of_the_page() -> None:
    page = PAGE.read_text("utf-8")
    assert [reason for reason in DEVIATIONS.values() if f"| {reason} |" not in page] == []
