"""What a client sees and a log shows, the same on every way to serve with uvicorn.

The law of this file: real server processes, `tests.live` in them, and nothing but sockets and HTTP outside. Each
test has names and groups of its own, because a server is shared by all. What must not arrive is proved by what
arrives instead, never by waiting.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

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
    hello,
    loud,
    name,
    refusal,
    settle,
    stats,
    tell,
    visit,
)
from tests.servers import HOST, Server, serve

pytestmark = pytest.mark.system

KINDS = ["uvicorn", "uvicorn-rt", "uvicorn-wsproto"]
APP = "tests.live:app"


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(APP, request.param, env={"PRESENCE_GRACE": "0.1"}) as server:
        server.kind = request.param  # type: ignore[attr-defined]
        yield server


@pytest.fixture(autouse=True)
def log(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """What the test has made the server say above INFO; a test that does not ask must have made it say nothing."""
    if "server" not in request.fixturenames:
        yield list
        return
    server: Server = request.getfixturevalue("server")
    before, asked = len(loud(server.log())), []

    def look() -> list[str]:
        asked.append(True)
        return loud(server.log())[before:]

    yield look
    if not asked:
        assert loud(server.log())[before:] == []


# Hooks


def test_the_hooks_run_once_each_and_the_peers_close_code_reaches_on_disconnect(server: Server) -> None:
    me = name()
    with visit(server, me) as peer:
        tell(peer, "who")
        assert hear(peer) == [me, True, ["all"]]
        peer.close(4123, "enough")
    assert eventually(lambda: goodbyes(server, me), bool) == [4123]


def test_a_close_frame_without_a_code_is_1005(server: Server) -> None:
    me = name()
    with Raw(server, bearer(server, me)) as peer:
        peer.send(frame(b"", CLOSE))
        assert peer.read()[0] == CLOSE
        assert eventually(lambda: goodbyes(server, me), bool) == [1005]


def test_a_peer_that_vanishes_is_told_to_on_disconnect_once(server: Server) -> None:
    me = name()
    with Raw(server, bearer(server, me)) as peer:
        peer.vanish()
    assert eventually(lambda: goodbyes(server, me), bool) in ([1005], [1006])


def test_a_guest_may_come_where_no_token_could_tell_who_it_is_only(server: Server) -> None:
    assert refusal(server).status_code == 401


def test_what_is_said_before_the_accept_waits_for_it_in_order(server: Server) -> None:
    with visit(server, name(), "/ws?connect=early") as peer:
        tell(peer, "push", data="after")
        assert [hear(peer) for _ in range(3)] == ["before", "to all before", "after"]


def test_a_token_may_come_as_a_subprotocol_and_only_the_protocol_is_echoed(server: Server) -> None:
    me = name()
    with browser(server, ask(server, f"/login/{me}", "POST")) as peer:
        assert peer.subprotocol == "rt.plain"
        tell(peer, "who")
        assert hear(peer)[0] == me


def test_an_endpoint_runs_inside_the_hosts_own_route(server: Server) -> None:
    me = name()
    with visit(server, path=f"/serve/{me}") as peer:
        tell(peer, "who")
        assert hear(peer) == [me, True, ["all"]]
        tell(peer, "last_words")
        assert hear(peer) == "last words"
        assert ending(peer) == (4100, "bye")
    assert eventually(lambda: goodbyes(server, me), bool) == [4100]


def test_the_hosts_own_reading_is_refused_with_a_sentence(server: Server, log: Callable[[], list[str]]) -> None:
    with visit(server, name()) as peer:
        tell(peer, "read")
        assert hear(peer)["code"] == "internal"
    assert "RuntimeError: this endpoint reads for you; use on_receive" in log()


# Input


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ('{"piece": "queen", "x": 3}', {"moved": "queen", "x": 3}),
        (b'{"piece": "pawn"}', {"moved": "pawn", "x": 0}),
        ('{"piece": "rook", "else": [1]}', {"moved": "rook", "x": 0}),
        ('{"piece": 7}', ("invalid", "Expected `str`, got `int` - at `$.piece`")),
        ("{}", ("invalid", "Object missing required field `piece`")),
        ("[]", ("invalid", "Expected `object`, got `array`")),
        ('{"piece": "king", "x": 1e999}', ("invalid", "Number out of range - at `$.x`")),
    ],
)
def test_typed_input_is_validated_and_what_is_wrong_is_named(server: Server, said: str | bytes, heard: Any) -> None:
    with visit(server, name(), "/typed") as peer:
        peer.send(said)
        if isinstance(heard, tuple):
            heard = {"type": "error", "code": heard[0], "message": heard[1], "temporary": False}
        assert hear(peer) == heard


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "x",
        '{"piece":',
        "\0",
        '"\\ud800"',
        "NaN",
        "[" * 30_000,
        "[" * 65 + "]" * 65,
        b"\xff\xfe",
        b"\0" * 1000,
        '{"a":' * 5000,
    ],
)
def test_garbage_is_answered_and_the_connection_stays(server: Server, garbage: str | bytes) -> None:
    with visit(server, name()) as peer:
        peer.send(garbage)
        answer = hear(peer)
        assert (answer["type"], answer["code"], answer["temporary"]) == ("error", "bad_message", False)
        settle(peer)


def test_sixty_four_levels_and_large_numbers_are_no_garbage(server: Server) -> None:
    with visit(server, name()) as peer:
        for said in ("[" * 62 + "]" * 62, "123456789012345678901234567890", "[0, -1.5e300, null, true]"):
            peer.send(said)
            assert hear(peer) == {"echo": json.loads(said)}


def test_whoever_keeps_sending_garbage_is_closed_with_its_code(server: Server) -> None:
    me = name()
    with visit(server, me) as peer:
        for _ in range(60):
            peer.send("garbage")
        assert ending(peer) == (4502, "too many invalid messages")
    assert eventually(lambda: goodbyes(server, me), bool) == [4502]


def test_a_message_that_is_too_large_is_refused_before_it_is_decoded(server: Server) -> None:
    with visit(server, name(), "/small") as peer:
        peer.send('"' + "x" * 200)  # no JSON either, but nobody looks
        assert hear(peer) == {
            "type": "error",
            "code": "too_large",
            "message": "a message has at most 100 bytes",
            "temporary": False,
        }
        peer.send('"' + "x" * 98 + '"')
        assert hear(peer) == "x" * 98


def test_a_message_over_the_rate_is_refused_with_the_time_to_wait(server: Server) -> None:
    with visit(server, name(), "/small") as peer:
        for number in range(5):
            peer.send(str(number))
            assert hear(peer) == number
        peer.send("5")
        answer = hear(peer)
        assert (answer["code"], answer["temporary"]) == ("rate_limited", True)
        assert 0 < answer["retry_after_ms"] <= 12_000


def test_messages_up_to_the_bound_and_broadcasts_beyond_it_go_through(server: Server) -> None:
    group = name("g")
    with visit(server, name(), max_size=None) as peer:
        large = "é" * 30_000
        peer.send(json.dumps(large, ensure_ascii=False))
        assert hear(peer) == {"echo": large}
        tell(peer, "join", group=group)
        for size in (124, 125, 126, 65_533, 65_534, 900_000):
            tell(peer, "big", group=group, size=size)
            assert hear(peer) == "x" * size


def test_a_message_in_fragments_arrives_whole(server: Server) -> None:
    with Raw(server, bearer(server, name())) as peer:
        peer.send(frame(b'"\xc3', fin=False) + frame(b"\xa9", 0, fin=False) + frame(b'"', 0))
        assert peer.read() == (1, '{"echo":"é"}'.encode())


@pytest.mark.parametrize(
    ("path", "said", "heard"),
    [
        ("/anything", "text", "text"),
        ("/anything", b"\0\xff", b"\0\xff"),
        ("/anything", "", ""),
        ("/anything", b"", b""),
        ("/text", "{not json}", "{not json}"),
        ("/bytes", b"\0\xff", b"\0\xff"),
        ("/bytes", b"", b""),
    ],
)
def test_other_encodings_carry_what_they_say(server: Server, path: str, said: Any, heard: Any) -> None:
    with visit(server, name(), path) as peer:
        peer.send(said)
        assert peer.recv(timeout=PATIENCE) == heard


@pytest.mark.parametrize(("path", "said"), [("/text", b"binary"), ("/bytes", "text")])
def test_the_wrong_kind_of_frame_closes_with_1003(server: Server, path: str, said: Any) -> None:
    me = name()
    with visit(server, me, path) as peer:
        peer.send(said)
        assert ending(peer)[0] == 1003
    eventually(lambda: ask(server, f"/online?names={me}"), lambda names: names == [])


# Errors of the host's own code


def test_an_event_error_is_answered_and_not_logged(server: Server) -> None:
    with visit(server, name()) as peer:
        tell(peer, "refuse")
        assert hear(peer) == {
            "type": "error",
            "code": "no",
            "message": "not like this",
            "temporary": True,
            "retry_after_ms": 500,
        }
        settle(peer)


def test_a_bug_is_answered_and_logged_once_and_ten_in_a_row_close(server: Server, log: Callable[[], list[str]]) -> None:
    with visit(server, name()) as peer:
        for _ in range(10):
            tell(peer, "fail")
        answers = [hear(peer) for _ in range(10)]
        assert {answer["code"] for answer in answers} == {"internal"}
        assert "bug" not in answers[0]["message"]
        assert ending(peer) == (1011, "internal error")
    said = log()
    assert said.count("RuntimeError: a bug in on_receive") == said.count("Traceback (most recent call last):") == 1
    assert said[0] == "tests.live.Live.on_receive raised RuntimeError" or said[0].endswith("raised RuntimeError")


def test_a_success_between_bugs_keeps_the_connection(server: Server, log: Callable[[], list[str]]) -> None:
    with visit(server, name()) as peer:
        for _ in range(3):
            for _ in range(9):
                tell(peer, "fail")
            tell(peer, "push", data="well")
            assert [hear(peer) for _ in range(10)][-1] == "well"
    assert log().count("RuntimeError: a bug in on_receive") <= 1  # once in a minute, whoever it was


@pytest.mark.parametrize(("do", "seen"), [("close", (4200, "because")), ("raise", (4200, "raised"))])
def test_the_hosts_close_and_its_websocket_exception_carry_their_code(
    server: Server, do: str, seen: tuple[int, str]
) -> None:
    me = name()
    with visit(server, me) as peer:
        tell(peer, do, code=4200, reason="because")
        assert ending(peer) == seen
    assert eventually(lambda: goodbyes(server, me), bool) == [4200]


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1009, 1011, 1012, 1013, 3000, 3999, 4000, 4999])
def test_every_code_that_may_be_sent_reaches_the_client(server: Server, code: int) -> None:
    with visit(server, name()) as peer:
        tell(peer, "close", code=code)
        assert ending(peer)[0] == code


def test_last_words_come_before_the_close_and_nothing_after_it(server: Server) -> None:
    with Raw(server, bearer(server, name())) as peer:
        peer.send(frame(b'{"do":"last_words"}'))
        assert peer.read() == (1, b'"last words"')
        assert peer.read() == (CLOSE, (4100).to_bytes(2) + b"bye")
        peer.send(frame((4100).to_bytes(2), CLOSE))
        with pytest.raises((EOFError, ConnectionResetError)):
            peer.read()


@pytest.mark.parametrize(
    ("how", "seen"),
    [("close", (4321, "not today")), ("fail-later", (1011, "internal error"))],
)
def test_on_connect_may_fail_after_the_accept(
    server: Server, log: Callable[[], list[str]], how: str, seen: tuple[int, str]
) -> None:
    me = name()
    with visit(server, me, f"/ws?connect={how}") as peer:
        assert ending(peer) == seen
    assert eventually(lambda: goodbyes(server, me), bool) == [seen[0]]
    said = log()
    assert said.count("RuntimeError: a bug in on_connect") == (how == "fail-later")


# Groups, pushes, presence, order


def test_a_broadcast_reaches_the_members_and_only_them(server: Server) -> None:
    group = name("g")
    with visit(server, name()) as ann, visit(server, name()) as bob, visit(server, name()) as eve:
        for peer in (ann, bob):
            tell(peer, "join", group=group)
            settle(peer)
        tell(ann, "say", group=group, data={"n": 1})
        assert hear(ann) == hear(bob) == {"n": 1}
        settle(eve)
        tell(bob, "leave", group=group)
        settle(bob)
        tell(ann, "say", group=group, data=2)
        assert hear(ann) == 2
        settle(bob)
        assert stats(server)["groups"] >= 2


def test_exclude_leaves_out_one_connection_and_not_its_person(server: Server) -> None:
    group, me = name("g"), name()
    with visit(server, me) as here, visit(server, me) as there:
        for peer in (here, there):
            tell(peer, "join", group=group)
            settle(peer)
        tell(here, "say", group=group, data="others", others=True)
        tell(here, "say", group=group, data="all")
        assert [hear(there), hear(there), hear(here)] == ["others", "all", "all"]


def test_another_event_comes_in_an_envelope(server: Server) -> None:
    group = name("g")
    with visit(server, name()) as peer:
        tell(peer, "join", group=group)
        tell(peer, "say", group=group, data=[1], event="typing")
        assert hear(peer) == {"event": "typing", "data": [1]}


@pytest.mark.parametrize("group", ["", "~ann", "a\nb", "x" * 256, 7, None])
def test_a_name_that_cannot_be_a_group_is_answered(server: Server, group: Any) -> None:
    with visit(server, name()) as peer:
        tell(peer, "join", group=group)
        assert hear(peer)["code"] == "bad_name"
        settle(peer)


def test_a_push_to_a_person_reaches_each_connection_of_theirs(server: Server) -> None:
    me, other = name(), name()
    with visit(server, me) as here, visit(server, me) as there, visit(server, other) as stranger:
        ask(server, f"/push/{me}", "POST")
        assert hear(here) == hear(there) == {"for": me}
        ask(server, f"/push-sync/{me}", "POST")
        assert hear(here) == hear(there) == {"sync": True}
        settle(stranger)
        assert ask(server, f"/online?names={me},{other},nobody") == sorted([me, other])


def test_a_def_route_broadcasts_from_its_thread(server: Server) -> None:
    group = name("g")
    with visit(server, name()) as peer:
        tell(peer, "join", group=group)
        settle(peer)
        ask(server, f"/say-sync?group={group}", "POST")
        assert hear(peer) == {"sync": True}


def test_the_host_can_send_a_person_away(server: Server) -> None:
    me = name()
    with visit(server, me) as here, visit(server, me) as there:
        ask(server, f"/kick/{me}", "POST")
        assert ending(here)[0] == ending(there)[0] == 4500
    assert eventually(lambda: goodbyes(server, me), lambda codes: len(codes) == 2) == [4500, 4500]


def test_presence_is_told_as_a_state_and_net_diffs(server: Server) -> None:
    group, ann, bob = name("g"), name(), name()
    with visit(server, ann) as watcher:
        tell(watcher, "track", group=group, meta={"mood": "fine"})
        tell(watcher, "join", group=group, presence="members")
        roster = Roster(watcher, group)
        assert roster.until(lambda now: ann in now) == {ann: [{"mood": "fine"}]}
        with visit(server, bob) as first, visit(server, bob) as second:
            tell(first, "track", group=group)
            assert roster.until(lambda now: bob in now)[bob] == [{}]
            tell(second, "track", group=group, meta={"tab": 2})
            assert roster.until(lambda now: len(now[bob]) == 2)[bob] == [{}, {"tab": 2}]
            assert ask(server, f"/present?group={group}") == [2, 3, sorted([ann, bob])]
        assert roster.until(lambda now: bob not in now) == {ann: [{"mood": "fine"}]}
        assert ask(server, f"/present?group={group}") == [1, 1, [ann]]


def test_presence_as_a_count_is_a_number(server: Server) -> None:
    group = name("g")
    with visit(server, name()) as watcher, visit(server, name()) as other:
        tell(watcher, "join", group=group, presence="count")
        assert hear(watcher) == {"type": "presence_count", "group": group, "count": 0}
        tell(other, "track", group=group)
        assert hear(watcher) == {"type": "presence_count", "group": group, "count": 1}


def test_what_one_handler_says_arrives_in_the_order_of_the_calls(server: Server) -> None:
    one, two = name("g"), name("g")
    with visit(server, name()) as ann, visit(server, name()) as bob:
        tell(bob, "join", group=one)
        tell(bob, "join", group=two)
        settle(bob)
        steps: list[dict[str, Any]] = []
        for number in range(0, 300, 6):
            steps += [
                {"do": "say", "group": one, "data": number},
                {"do": "push", "data": number + 1},
                {"do": "say", "group": two, "data": number + 2},
                {"do": "send", "data": number + 3},
                {"do": "say", "group": one, "data": number + 4, "others": True},
                {"do": "say", "group": two, "data": number + 5},
            ]
        tell(ann, "", steps=[{"do": "join", "group": one}, {"do": "join", "group": two}, *steps])
        assert [hear(ann) for _ in range(250)] == [number for number in range(300) if number % 6 != 4]
        assert [hear(bob) for _ in range(200)] == [number for number in range(300) if number % 6 not in (1, 3)]


def test_a_join_and_a_leave_take_their_place_in_the_order(server: Server) -> None:
    group = name("g")
    with visit(server, name()) as peer:
        said = {"do": "say", "group": group}
        steps = [
            {**said, "data": "before"},
            {"do": "join", "group": group},
            {**said, "data": "in"},
            {"do": "leave", "group": group},
            {**said, "data": "after"},
            {"do": "push", "data": "end"},
        ]
        tell(peer, "", steps=steps)
        assert [hear(peer), hear(peer)] == ["in", "end"]


# The function style, and other people's sockets


def test_the_function_style_iterates_and_ends_with_1000(server: Server) -> None:
    with visit(server, path="/pull") as peer:
        for said in (1, {"a": 2}, "enough"):
            peer.send(json.dumps(said))
            assert hear(peer) == {"got": said}
        assert ending(peer)[0] == 1000


def test_the_function_style_answers_garbage_too(server: Server) -> None:
    with visit(server, path="/pull") as peer:
        peer.send("garbage")
        assert hear(peer)["code"] == "bad_message"
        peer.send("1")
        assert hear(peer) == {"got": 1}


def test_a_body_that_only_listens_ends_when_its_peer_leaves(server: Server) -> None:
    me = name()
    with visit(server, path=f"/watch/{me}") as peer:
        assert hear(peer) == {"user": me}
    eventually(lambda: stats(server)["left"], lambda left: me in left)
    eventually(lambda: ask(server, f"/online?names={me}"), lambda names: names == [])


@pytest.mark.parametrize("token", [True, False])
def test_somebody_elses_socket_is_theirs_and_knows_the_user(server: Server, token: bool) -> None:
    me = name()
    options: dict[str, Any] = (
        {} if token else {"headers": {"Authorization": "Bearer nonsense"}, "origin": "http://evil.example"}
    )
    before = stats(server)["connections"]
    with visit(server, me if token else None, "/foreign", **options) as peer:
        assert hear(peer) == {"authenticated": token, "name": me if token else ""}
        assert stats(server)["connections"] == before
        peer.send("not json")
        assert peer.recv(timeout=PATIENCE) == "not json"
        assert ending(peer)[0] == 4999


# Refusals: what was said over HTTP, and that no log says more


def test_no_token_is_401(server: Server) -> None:
    response = refusal(server)
    assert answered(response) == (401, {"error": "unauthorized", "message": "a token is required"})
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_bad_token_is_401_and_in_no_log(server: Server) -> None:
    response = refusal(server, headers={"Authorization": "Bearer forged-nonsense"})
    assert answered(response)[0] == 401
    assert answered(response)[1]["error"] == "unauthorized"
    assert "forged-nonsense" not in server.log()


def test_another_origin_is_403_and_told_what_to_write_also_to_a_browser(server: Server) -> None:
    expected = {
        "error": "origin",
        "message": 'origin http://evil.example refused; add it to RealtimeMiddleware(origins=["http://evil.example"])',
    }
    assert answered(refusal(server, name(), origin="http://evil.example")) == (403, expected)
    response = refusal(server, name(), origin="http://evil.example", subprotocols=["rt.plain"])
    assert answered(response) == (403, expected)


def test_an_endpoint_that_does_not_accept_refuses_with_403(server: Server) -> None:
    me = name()
    response = refusal(server, me, "/ws?connect=silent")
    assert answered(response) == (
        403,
        {"error": "forbidden", "message": "the endpoint did not accept the connection"},
    )
    assert goodbyes(server, me) == []


def test_an_http_exception_is_the_refusal_with_its_headers(server: Server) -> None:
    response = refusal(server, name(), "/ws?connect=http")
    assert answered(response) == (402, {"error": "http_402", "message": "pay first"})
    assert response.headers["x-price"] == "1"


def test_an_event_error_in_on_connect_is_403_with_the_time_to_wait(server: Server) -> None:
    response = refusal(server, name(), "/ws?connect=event")
    assert answered(response) == (403, {"error": "full", "message": "no seat", "retry_after_ms": 2000})
    assert response.headers["retry-after"] == "2"


def test_a_bug_in_on_connect_is_500_and_the_one_record_of_the_handler(
    server: Server, log: Callable[[], list[str]]
) -> None:
    me = name()
    response = refusal(server, me, "/ws?connect=fail")
    assert answered(response) == (500, {"error": "internal", "message": "the server failed to open the connection"})
    said = log()
    assert said[0] == "tests.live.Live.on_connect raised RuntimeError"
    assert said[-1] == "RuntimeError: a bug in on_connect"
    assert sum(line.startswith("Traceback") for line in said) == 1
    assert goodbyes(server, me) == []


def test_a_connection_beyond_a_cap_is_429_and_beyond_the_total_503(server: Server) -> None:
    me = name()
    with visit(server, me, "/capped"):
        response = refusal(server, me, "/capped")
        assert answered(response)[0] == 429
        assert answered(response)[1]["error"] == "too_many_connections"
        assert int(response.headers["retry-after"]) >= 1
        with visit(server, name(), "/capped"):
            response = refusal(server, name(), "/capped")
            assert answered(response)[0] == 503
            assert answered(response)[1]["message"] == "the server is full"
    eventually(lambda: goodbyes(server, me), bool)
    with visit(server, me, "/capped") as peer:  # the slots are free again
        settle(peer)


def test_a_realtime_that_nobody_started_is_503_and_the_line_to_write(
    server: Server, log: Callable[[], list[str]]
) -> None:
    response = refusal(server, name(), "/asleep")
    assert answered(response)[0] == 503
    assert answered(response)[1]["error"] == "unavailable"
    assert response.headers["retry-after"] == "5"
    (line,) = log()
    assert "write Middleware(RealtimeMiddleware, realtime=rt) into the app" in line


def test_a_path_that_is_not_there_is_403_without_a_word(server: Server) -> None:
    assert refusal(server, name(), "/nowhere").status_code == 403


@pytest.mark.parametrize(
    ("path", "token", "seen"),
    [
        ("/ws", "forged", 4501),
        ("/ws?connect=silent", None, 4503),
        ("/ws?connect=http", None, 4503),
        ("/ws?connect=event", None, 4503),
    ],
)
def test_a_browser_of_ours_reads_a_code_instead(server: Server, path: str, token: str | None, seen: int) -> None:
    me = name()
    with browser(server, token or ask(server, f"/login/{me}", "POST"), path) as peer:
        assert peer.subprotocol == "rt.plain"
        assert ending(peer)[0] == seen
    assert goodbyes(server, me) == []


def test_a_browser_of_ours_reads_a_bug_as_1011(server: Server, log: Callable[[], list[str]]) -> None:
    me = name()
    with browser(server, ask(server, f"/login/{me}", "POST"), "/ws?connect=fail") as peer:
        assert ending(peer)[0] == 1011
    said = log()
    assert said == [] or said[0] == "tests.live.Live.on_connect raised RuntimeError"  # once in a minute
    assert goodbyes(server, me) == []


def test_a_browser_of_ours_reads_a_full_house_as_4004(server: Server) -> None:
    me = name()
    with visit(server, me, "/capped"), browser(server, ask(server, f"/login/{me}", "POST"), "/capped") as peer:
        assert ending(peer)[0] == 4004
    assert eventually(lambda: goodbyes(server, me), bool) == [1000]


def test_a_peer_that_does_not_wait_for_its_refusal_leaves_no_trace(server: Server) -> None:
    before = stats(server)
    for path in ("/ws", "/ws?connect=silent", "/ws?connect=http", "/capped", "/nowhere"):
        for headers in ({}, bearer(server, name())):
            with closing(socket.create_connection((HOST, server.port), PATIENCE)) as peer:
                peer.sendall(hello(server, path, headers))
    eventually(lambda: stats(server), lambda now: nothing_is_left(before, now))


# Compression, vanishing and the end


@pytest.mark.parametrize("compression", ["deflate", None])
def test_messages_arrive_whole_and_in_order_with_and_without_compression(
    server: Server, compression: str | None
) -> None:
    group = name("g")
    with visit(server, name(), compression=compression) as peer:
        assert bool(peer.protocol.extensions) == (compression is not None)
        tell(peer, "join", group=group)
        settle(peer)
        for size in (10, 3000):
            ask(server, f"/say?group={group}&count=200&size={size}&turn=7", "POST")
            assert [hear(peer) for _ in range(200)] == [{"n": n, "padding": "x" * size} for n in range(200)]
        tell(peer, "send", data="sent by the host")
        tell(peer, "push", data="pushed")
        assert [hear(peer), hear(peer)] == ["sent by the host", "pushed"]


def nothing_is_left(before: Any, now: Any) -> bool:
    return all(now[key] <= before[key] for key in ("connections", "groups", "slow", "alive", "tasks"))


def test_peers_that_vanish_in_the_middle_of_everything_leave_nothing_behind(server: Server) -> None:
    before = eventually(lambda: stats(server), lambda now: now["connections"] == now["alive"] == now["groups"] == 0)
    group = name("g")
    names = [name("vanishing") for _ in range(30)]
    with ExitStack() as stack:
        peers = [stack.enter_context(Raw(server, bearer(server, each))) for each in names]
        for peer in peers:
            peer.send(frame(json.dumps({"do": "join", "group": group, "presence": "members"}).encode()))
            peer.send(frame(json.dumps({"do": "track", "group": group}).encode()))
            peer.send(frame(json.dumps({"do": "say", "group": group, "data": "x" * 10_000}).encode()))
            peer.send(frame(b'"half a mess', fin=False) + frame(b"half a frame")[:5])
        for peer in peers:
            peer.vanish()
    now = eventually(lambda: stats(server), lambda now: nothing_is_left(before, now))
    assert sorted(who for who, _ in now["ended"] if who.startswith("vanishing")) == sorted(names)
    eventually(lambda: ask(server, f"/present?group={group}"), lambda now: now == [0, 0, []])  # after the grace


def test_what_handlers_say_to_a_peer_that_has_gone_is_no_bug_of_theirs(server: Server) -> None:
    before = stats(server)
    me = name()
    with ExitStack() as stack:
        for peer in [stack.enter_context(Raw(server, bearer(server, me))) for _ in range(5)]:
            peer.send(frame(b'{"do":"send","data":1}') * 200 + frame(b'{"do":"push","data":1}') * 10)
            peer.vanish()
    now = eventually(lambda: stats(server), lambda now: nothing_is_left(before, now))
    assert now.get("failed", 0) == before.get("failed", 0)
    assert len(goodbyes(server, me)) == 5


def test_after_all_that_nothing_is_left(server: Server) -> None:
    now = eventually(
        lambda: stats(server), lambda now: not any(now[key] for key in ("connections", "groups", "slow", "alive"))
    )
    told = [tuple(each) for each in now["ended"]]
    assert now["disconnected"] == now["connected"] >= len(told)


# The server's own end


@pytest.mark.parametrize("kind", KINDS)
def test_at_sigterm_every_client_reads_1012_and_the_process_ends_at_once(kind: str) -> None:
    with serve(APP, kind) as server, ExitStack() as stack:
        polite = [stack.enter_context(visit(server, f"polite{number}")) for number in range(5)]
        mute = [stack.enter_context(Raw(server, bearer(server, f"mute{number}"))) for number in range(5)]
        functions = stack.enter_context(visit(server, path="/watch/listener"))
        assert hear(functions) == {"user": "listener"}
        for peer in polite:
            settle(peer)
        server.send_signal(signal.SIGTERM)
        assert {ending(peer)[0] for peer in [*polite, functions]} == {1012}
        assert {peer.close_code() for peer in mute} == {1012}
        assert server.wait(5.0) in (0, -signal.SIGTERM)  # uvicorn hands the signal on when it has finished
        assert loud(server.log()) == []
        assert "10 have been told goodbye" in server.log()


@pytest.mark.parametrize("kind", KINDS)
def test_a_drain_closes_with_1012_and_refuses_newcomers(kind: str) -> None:
    with serve(APP, kind) as server:
        with visit(server, "ann") as peer:
            tell(peer, "push", data="last")
            assert hear(peer) == "last"
            ask(server, "/drain", "POST")
            assert ending(peer) == (1012, "service restart")
        response = refusal(server, "bob")
        assert answered(response)[0] == 503
        assert response.headers["retry-after"] == "2"
        assert loud(server.log()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_server_is_an_end_without_a_close_frame(kind: str) -> None:
    with serve(APP, kind) as server, visit(server, "ann") as peer:
        settle(peer)
        server.send_signal(signal.SIGKILL)
        with pytest.raises(ConnectionClosed) as caught:
            peer.recv(timeout=PATIENCE)
        assert caught.value.rcvd is None
        assert server.wait() == -signal.SIGKILL


def test_the_log_of_a_test_would_show_what_is_above_info() -> None:
    assert loud("INFO:     ok\nWARNING:  no\nTraceback\n[INFO] ok\n[2026-01-01 00:00:00 +0000] [7] [INFO] ok\n\n") == [
        "WARNING:  no",
        "Traceback",
    ]
