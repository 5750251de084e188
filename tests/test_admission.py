"""Admission: what a handshake says, which pages may open one, and that no secret reaches a log."""

from __future__ import annotations

import json
import logging
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypercorn.logging import AccessLogAtoms
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.logging import AccessFormatter

from starlette_rt.admission import (
    SERVER_LOGGERS,
    Admission,
    Handshake,
    RedactingFilter,
    Refusal,
    authorization_header,
    check_origin,
    choose_protocol,
    parse_origins,
    read,
)
from starlette_rt.exceptions import CloseCode, ConfigurationError, TokenError

pytestmark = pytest.mark.unit

SESSION = "s" * 22
SECRET = "eyJpIjoiYWRhIn0.c2VjcmV0-_secret"


def scope(
    *headers: tuple[str, str], protocols: list[str] | None = None, query: str = "", **more: Any
) -> dict[str, Any]:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return {
        "type": "websocket",
        "path": "/ws",
        "scheme": "ws",
        "headers": raw,
        "query_string": query.encode("latin-1"),
        "subprotocols": protocols or [],
        "client": ("192.0.2.1", 50000),
    } | more


def carried(*args: Any, **options: Any) -> tuple[str | None, str | None]:
    said = {name: options.pop(name) for name in ("cookie", "query_token") if name in options}
    handshake = read(scope(*args, **options), **said)
    return handshake.carrier, handshake.token


def page(origin: str | None, host: str | None = "example.com", scheme: str = "ws") -> Handshake:
    return Handshake(path="/ws", host=host, origin=origin, scheme=scheme, ip="192.0.2.1")


# Reading


def test_a_handshake_is_read_once_and_whole() -> None:
    headers = [("host", "example.com:8000"), ("origin", "http://localhost:5173"), ("user-agent", "x")]
    handshake = read(scope(*headers, protocols=["rt.plain", "rt.token.abc", f"rt.session.{SESSION}", "chat"]))
    assert handshake == Handshake(
        path="/ws",
        host="example.com:8000",
        origin="http://localhost:5173",
        scheme="ws",
        ip="192.0.2.1",
        protocols=("rt.plain", "chat"),
        session=SESSION,
        token="abc",
        carrier="subprotocol",
    )
    with pytest.raises(FrozenInstanceError):
        handshake.token = "other"  # type: ignore[misc]


def test_a_bare_handshake_says_nothing() -> None:
    handshake = read({"type": "websocket", "path": "/", "headers": []})
    assert handshake == Handshake(path="/", host=None, origin=None, scheme="ws", ip=None)


@pytest.mark.parametrize(
    ("ip", "block"),
    [
        (None, None),
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("unix:/run/app.sock", "unix:/run/app.sock"),
    ],
)
def test_limits_per_address_count_what_one_host_has_for_itself(ip: str | None, block: str | None) -> None:
    assert (
        read({"type": "websocket", "path": "/", "client": None if ip is None else (ip, 1), "headers": []}).block
        == block
    )


def test_a_hosts_own_challenge_takes_the_place_of_ours() -> None:
    challenge = (b"www-authenticate", b'Bearer realm="board"')
    refusal = Refusal(401, "http_401", "log in", extra=(challenge, (b"x-price", b"1")))
    assert [name for name, _ in refusal.headers()] == [b"content-type", b"www-authenticate", b"x-price"]
    assert challenge in refusal.headers()


@pytest.mark.parametrize("client", [None, ("", 0)])
def test_a_unix_socket_has_no_address(client: Any) -> None:
    assert read(scope(client=client)).ip is None


def test_a_repr_shows_no_secret() -> None:
    shown = repr(read(scope(protocols=[f"rt.token.{SECRET}", f"rt.session.{SESSION}"])))
    assert SECRET not in shown
    assert SESSION not in shown


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_authorization_header_carries_a_token(scheme: str) -> None:
    assert carried(("authorization", f"{scheme}  abc ")) == ("header", "abc")


@pytest.mark.parametrize("value", ["Basic YTpi", "Bearer", "Bearer ", "", "Bearerabc"])
def test_another_authorization_carries_none(value: str) -> None:
    assert carried(("authorization", value)) == (None, None)


def test_a_subprotocol_carries_a_token() -> None:
    assert carried(protocols=["rt.plain", "rt.token.", "rt.token.abc", "rt.token.def"]) == ("subprotocol", "abc")
    assert carried(protocols=["rt.plain", "rt.tokens.abc"]) == (None, None)


@pytest.mark.parametrize(
    "value", ["rt_token=abc", "a=b; rt_token=abc; c=d", 'a;rt_token="abc"', "rt_token=abc; rt_token=x"]
)
def test_a_cookie_carries_a_token(value: str) -> None:
    assert carried(("cookie", "other=1"), ("cookie", value)) == ("cookie", "abc")


@pytest.mark.parametrize("value", ["", ";;;", "rt_token", "rt_token=", 'rt_token=""', "xrt_token=abc", "\xff\xfe=\xff"])
def test_another_cookie_carries_none(value: str) -> None:
    assert carried(("cookie", value)) == (None, None)


def test_the_cookie_may_have_another_name() -> None:
    assert carried(("cookie", "rt_token=x; session=abc"), cookie="session") == ("cookie", "abc")


def test_the_query_carries_a_ticket_and_only_on_demand_a_token() -> None:
    assert carried(query="a=b&ticket=abc") == ("ticket", "abc")
    assert carried(query="token=abc") == (None, None)
    assert carried(query="token=abc", query_token=True) == ("query", "abc")
    assert carried(query="%74oken=a%62c", query_token=True) == ("query", "abc")
    assert carried(query="ticket=&ticket=one&ticket=two") == ("ticket", "one")
    assert carried(query="&&=&%=%ff\xff&ticket") == (None, None)


def test_the_first_carrier_in_order_wins() -> None:
    everything: dict[str, Any] = {"protocols": ["rt.token.p"], "query": "token=q&ticket=t", "query_token": True}
    header, cookie = ("authorization", "Bearer h"), ("cookie", "rt_token=c")
    assert carried(cookie, header, ("authorization", "Bearer second"), **everything) == ("header", "h")
    assert carried(cookie, ("authorization", "Basic x"), **everything) == ("subprotocol", "p")
    assert carried(cookie, **everything | {"protocols": []}) == ("cookie", "c")
    assert carried(**everything | {"protocols": []}) == ("ticket", "t")
    assert carried(query="token=q", query_token=True) == ("query", "q")


@pytest.mark.parametrize("session", ["a" * 22, "A-_9" * 8, "f" * 32, "f" * 64])
def test_a_session_of_128_bits_is_taken(session: str) -> None:
    assert read(scope(protocols=["rt.session.short", f"rt.session.{session}"])).session == session


@pytest.mark.parametrize("session", ["", "a" * 21, "a" * 65, "a" * 21 + ".", "a" * 21 + "é", "a" * 22 + "\n"])
def test_a_session_that_is_short_or_strange_is_none(session: str) -> None:
    handshake = read(scope(protocols=[f"rt.session.{session}"]))
    assert handshake.session is None
    assert handshake.protocols == ()


@pytest.mark.parametrize(
    ("origin", "protocols", "answer"),
    [
        ("http://x", ["rt.plain"], True),
        ("http://x", ["chat"], False),
        ("http://x", ["rt.token.abc"], False),
        (None, ["rt.plain"], False),
    ],
)
def test_a_browser_sends_an_origin_and_speaks_to_us(origin: str | None, protocols: list[str], answer: bool) -> None:
    headers = [("origin", origin)] if origin else []
    assert read(scope(*headers, protocols=protocols)).is_browser is answer


@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"host", b"origin", b"authorization", b"cookie", b"x-other"]),
            st.binary(max_size=60)
            | st.sampled_from([b"Bearer ", b"null", b"http://[", b"http://[::1]:x", b"rt_token=;=;"]),
        )
    ),
    protocols=st.lists(st.text() | st.text().map("rt.token.".__add__) | st.text().map("rt.session.".__add__)),
    query=st.binary() | st.binary().map(b"ticket=".__add__),
)
def test_no_handshake_raises(headers: list[tuple[bytes, bytes]], protocols: list[str], query: bytes) -> None:
    handshake = read(
        {"path": "/", "headers": headers, "subprotocols": protocols, "query_string": query}, query_token=True
    )
    check_origin(handshake, parse_origins(["https://a.example"]))
    choose_protocol(handshake.protocols)
    if handshake.token is not None:
        authorization_header(handshake.token)
    assert not any(name.startswith(("rt.token.", "rt.session.")) for name in handshake.protocols)


def test_a_huge_cookie_is_read_in_one_go() -> None:
    crumbs = "; ".join(f"c{number}={'x' * 50}" for number in range(2000))
    assert carried(("cookie", f"{crumbs}; rt_token=abc")) == ("cookie", "abc")


# Origins


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        (None, "example.com", "ws"),
        ("http://example.com", "example.com", "ws"),
        ("http://example.com", "example.com:80", "ws"),
        ("http://example.com:80", "example.com", "ws"),
        ("https://example.com", "example.com", "wss"),
        ("https://example.com", "example.com:443", "wss"),
        ("https://example.com", "example.com", "https"),
        ("http://localhost:8000", "localhost:8000", "ws"),
        ("http://example.com", "EXAMPLE.com", "ws"),
        ("HTTP://Example.COM", "example.com", "ws"),
        ("http://[::1]:8000", "[::1]:8000", "ws"),
        ("http://[::1]", "[0:0:0:0:0:0:0:1]:80", "ws"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "ws"),
    ],
)
def test_a_page_of_the_same_origin_passes(origin: str | None, host: str, scheme: str) -> None:
    assert check_origin(page(origin, host, scheme)) is None


@pytest.mark.parametrize(
    ("origin", "host", "scheme"),
    [
        ("http://evil.example", "example.com", "ws"),
        ("http://example.com.evil.example", "example.com", "ws"),
        ("http://example.com:8000", "example.com", "ws"),
        ("https://example.com", "example.com", "ws"),
        ("http://example.com", "example.com", "wss"),
        ("http://example.com:443", "example.com", "wss"),
        ("http://sub.example.com", "example.com", "ws"),
        ("http://[::2]", "[::1]", "ws"),
        ("null", "null", "ws"),
        ("http://none", None, "ws"),
        ("http://example.com", "example.com/path", "ws"),
        ("http://example.com", "example.com, example.com", "ws"),
        ("http://example.com", "user@example.com", "ws"),
        ("http://example.com", "", "ws"),
    ],
)
def test_a_page_of_another_origin_is_refused(origin: str, host: str | None, scheme: str) -> None:
    assert check_origin(page(origin, host, scheme)) is not None


def test_the_refusal_says_what_to_write() -> None:
    assert check_origin(page("http://localhost:5173")) == (
        'origin http://localhost:5173 refused; add it to RealtimeMiddleware(origins=["http://localhost:5173"])'
    )
    assert check_origin(page("null")) == 'origin null refused; add it to RealtimeMiddleware(origins=["null"])'
    for origin in ("http://localhost:5173", "null"):
        assert check_origin(page(origin), parse_origins([origin])) is None


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "example.com",
        "http://",
        "http://a/",
        "http://a b",
        "http://é",
        "//a",
        "http://a:70000",
        "http://[:::]",
        "a, b",
    ],
)
def test_an_origin_that_is_none_is_refused_without_repeating_it(origin: str) -> None:
    for listed in (frozenset[str](), parse_origins(["https://a.example", "null"])):
        assert check_origin(page(origin), listed) == "the Origin header is not an origin; refused"


def test_two_origins_are_no_origin() -> None:
    handshake = read(scope(("host", "a"), ("origin", "http://a"), ("origin", "http://a")))
    assert handshake.origin == "http://a, http://a"
    assert check_origin(handshake, parse_origins(["http://a"])) is not None


@pytest.mark.parametrize(
    ("listed", "origin", "passes"),
    [
        ("https://app.example", "https://app.example", True),
        ("https://APP.example:443", "https://app.example", True),
        ("https://app.example", "http://app.example", False),
        ("https://app.example", "https://sub.app.example", False),
        ("http://localhost:5173", "http://localhost:5174", False),
        ("http://[0:0::1]:5173", "http://[::1]:5173", True),
        ("app://local", "app://local", True),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh", True),
        ("null", "null", True),
        ("https://*.example.org", "https://a.example.org", True),
        ("https://*.example.org", "https://a.b.example.org", True),
        ("https://*.example.org", "https://example.org", False),
        ("https://*.example.org", "http://a.example.org", False),
        ("https://*.example.org", "https://a.example.org:8443", False),
        ("https://*.example.org:8443", "https://a.example.org:8443", True),
        ("https://*.example.org", "https://evilexample.org", False),
        ("https://*.example.org", "https://a.example.org.evil", False),
        ("*", "https://anything.example", True),
        ("*", "null", True),
        ("https://*.example.org", "null", False),
    ],
)
def test_a_listed_origin_passes_and_no_other(listed: str, origin: str, passes: bool) -> None:
    assert (check_origin(page(origin), parse_origins([listed])) is None) is passes


@pytest.mark.parametrize(
    ("origins", "complaint"),
    [
        ("https://a.example", r'origins is a list: write origins=\["https://a.example"\]'),
        (["a.example"], "has no scheme: write it as"),
        (["localhost:5173"], "has no scheme"),
        (["https://a.example/"], "a path or a slash at its end"),
        (["https://a.example/app"], "a path or a slash at its end"),
        (["https://"], "is not an origin"),
        (["https://*"], "is not an origin"),
        (["https://a.*.example"], "is not an origin"),
        (["https://bücher.example"], "is not an origin"),
        (["https://a.example:99999"], "is not an origin"),
        (["https://[::x]"], "is not an origin"),
        (["https://user@a.example"], "is not an origin"),
        ([""], "has no scheme"),
        (["wss://a.example"], "an address of a socket"),
        (["ws://a.example"], "an address of a socket"),
    ],
)
def test_an_entry_that_could_never_match_is_refused(origins: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parse_origins(origins)


def test_no_origins_are_listed_by_default() -> None:
    assert parse_origins(()) == frozenset()


# Refusals


@pytest.mark.parametrize(
    ("status", "code", "close"),
    [
        (401, "unauthorized", CloseCode.UNAUTHORIZED),
        (401, "token_expired", CloseCode.TOKEN_EXPIRED),
        (403, "forbidden", CloseCode.FORBIDDEN),
        (404, "not_found", CloseCode.FORBIDDEN),
        (429, "too_many_connections", CloseCode.TOO_MANY_CONNECTIONS),
        (500, "internal", CloseCode.INTERNAL_ERROR),
        (503, "unavailable", CloseCode.UNAVAILABLE),
    ],
)
def test_each_status_has_its_close_code(status: int, code: str, close: CloseCode) -> None:
    assert Refusal(status, code, "").close_code is close


def test_a_refusal_says_when_to_come_back() -> None:
    refusal = Refusal(429, "too_many_connections", "this address has 10", retry_after=1.2)
    assert json.loads(refusal.body()) == {
        "error": "too_many_connections",
        "message": "this address has 10",
        "retry_after_ms": 1200,
    }
    assert refusal.headers() == [(b"content-type", b"application/json"), (b"retry-after", b"2")]


def test_a_refusal_for_good_does_not() -> None:
    refusal = Refusal(403, "origin", "no")
    assert json.loads(refusal.body()) == {"error": "origin", "message": "no"}
    assert refusal.headers() == [(b"content-type", b"application/json")]


@pytest.mark.parametrize(("expired", "code"), [(True, "token_expired"), (False, "unauthorized")])
def test_a_bad_token_is_401_and_names_the_scheme(expired: bool, code: str) -> None:
    refusal = Refusal.of(TokenError("the token is …", expired=expired))
    assert (refusal.status, refusal.code, refusal.message) == (401, code, "the token is …")
    assert (b"www-authenticate", b"Bearer") in refusal.headers()


def test_an_admission_is_compact_and_open() -> None:
    admission = Admission(object(), page(None))
    assert admission.identity is None
    assert admission.refusal is None
    admission.refusal = Refusal(403, "origin", "no")
    assert not hasattr(admission, "__dict__")


# Protocols


@pytest.mark.parametrize(
    ("offered", "supported", "chosen"),
    [
        ([], ("rt.plain",), None),
        (["rt.plain"], ("rt.plain",), "rt.plain"),
        (["chat", "rt.v1.json", "rt.plain"], ("rt.plain", "rt.v1.json"), "rt.v1.json"),
        (["chat"], ("rt.plain",), None),
    ],
)
def test_the_first_protocol_that_both_speak_is_chosen(offered: list[str], supported: Any, chosen: str | None) -> None:
    assert choose_protocol(offered, supported) == chosen


def test_only_plain_is_spoken_by_default() -> None:
    assert choose_protocol(["rt.v1.json", "rt.plain"]) == "rt.plain"


def test_a_token_becomes_a_header() -> None:
    assert authorization_header("abc") == (b"authorization", b"Bearer abc")
    assert authorization_header("\u20ac") == (b"authorization", b"Bearer ?")


# Logs


@given(before=st.binary(), name=st.sampled_from(["token", "ticket"]), encoded=st.sets(st.integers(0, 5)))
def test_whatever_is_read_as_a_token_is_redacted(before: bytes, name: str, encoded: set[int]) -> None:
    spelled = "".join(f"%{ord(letter):02x}" if place in encoded else letter for place, letter in enumerate(name))
    query = before.replace(b"=", b"") + b"&" + f"{spelled}={SECRET}".encode()
    handshake = read({"path": "/", "headers": [], "query_string": query}, query_token=True)
    assert handshake.token == SECRET
    line = logged('%s - "WebSocket %s" [accepted]', "192.0.2.1:5", f"/ws?{spelled}={SECRET}")
    assert SECRET not in line


def record(message: Any, *args: Any) -> logging.LogRecord:
    made = logging.getLogger("uvicorn.access").makeRecord("uvicorn.access", logging.INFO, "", 0, message, args, None)
    assert RedactingFilter().filter(made)
    return made


def logged(message: Any, *args: Any) -> str:
    return record(message, *args).getMessage()


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (f"/ws?token={SECRET}", "/ws?token=***"),
        (f"/ws?a=b&ticket={SECRET}&c=d", "/ws?a=b&ticket=***&c=d"),
        (f"/ws?%74%6Fken={SECRET}", "/ws?%74%6Fken=***"),
        (f"/ws?token='{SECRET}'", "/ws?token=***"),
        ("/ws?a=b", "/ws?a=b"),
        ("/ws?stocking=5", "/ws?stocking=5"),
        ("/ws", "/ws"),
        (f"token={SECRET}", "token=***"),
        (f"rt.plain, rt.token.{SECRET}, rt.session.{SESSION}", "rt.plain, rt.token.***, rt.session.***"),
        (f"Bearer {SECRET}", "Bearer ***"),
    ],
)
def test_a_log_line_keeps_all_but_the_secret(path: str, shown: str) -> None:
    assert (
        logged('%s - "WebSocket %s" [accepted]', "192.0.2.1:5", path) == f'192.0.2.1:5 - "WebSocket {shown}" [accepted]'
    )
    assert logged(f'"WebSocket {path}" 403') == f'"WebSocket {shown}" 403'
    assert logged("%s", path.encode()) == str(shown.encode())


def test_what_is_no_text_stays_as_it_is() -> None:
    assert record("%s %d %s", None, 7, 1.5).args == (None, 7, 1.5)
    bare = logging.makeLogRecord({"msg": f"token={SECRET}", "args": None})
    assert RedactingFilter().filter(bare)
    assert bare.getMessage() == "token=***"
    problem = ValueError("x")
    assert record(problem).msg is problem


def test_uvicorns_formatter_still_finds_its_arguments() -> None:
    made = record('%s - "%s %s HTTP/%s" %d', "192.0.2.1:5", "GET", f"/x?token={SECRET}", "1.1", 200)
    line = AccessFormatter("%(client_addr)s %(request_line)s %(status_code)s", use_colors=False).format(made)
    assert line == "192.0.2.1:5 GET /x?token=*** HTTP/1.1 200 OK"


def test_hypercorns_atoms_still_answer_for_what_is_not_there() -> None:
    request: Any = scope(("authorization", f"Bearer {SECRET}"), query=f"token={SECRET}") | {"http_version": "1.1"}
    atoms = AccessLogAtoms(request, None, 0.1)
    line = logged("%(h)s %(R)s %(q)s %({authorization}i)s %({x-absent}i)s %(st)s", atoms)
    assert line == "192.0.2.1:50000 GET /ws?token=*** 1.1 token=*** Bearer *** - -"
    assert atoms["q"] == f"token={SECRET}"


def test_granians_dictionary_is_cleaned() -> None:
    said = {"addr": "192.0.2.1", "path": "/ws", "query_string": f"ticket={SECRET}", "status": 101}
    assert logged("%(addr)s %(path)s?%(query_string)s %(status)d", said) == "192.0.2.1 /ws?ticket=*** 101"


def test_the_filter_works_from_where_servers_log(caplog: pytest.LogCaptureFixture) -> None:
    scrubber = RedactingFilter()
    for name in SERVER_LOGGERS:
        logger = logging.getLogger(name)
        logger.addFilter(scrubber)
        caplog.set_level(logging.INFO, logger=name)
        propagates, logger.propagate = logger.propagate, False
        logger.addHandler(caplog.handler)
        try:
            logger.info('%s - "WebSocket %s" [accepted]', "192.0.2.1:5", f"/ws?token={SECRET}")
        finally:
            logger.removeHandler(caplog.handler)
            logger.removeFilter(scrubber)
            logger.propagate = propagates
    assert len(caplog.records) == len(SERVER_LOGGERS)
    assert SECRET not in caplog.text


@given(st.text())
def test_no_text_breaks_a_log_line(text: str) -> None:
    assert isinstance(logged("%s", text), str)


def test_what_follows_the_name_of_a_cookie_header_is_hidden_wherever_it_stands() -> None:
    record = logging.LogRecord("uvicorn.error", logging.DEBUG, "", 0, "< %s: %s", ("Cookie", "rt_token=secret"), None)
    RedactingFilter().filter(record)
    assert record.getMessage() == "< Cookie: ***"
    record = logging.LogRecord("uvicorn.error", logging.DEBUG, "", 0, "< %s: %s", ("cookies", "two"), None)
    RedactingFilter().filter(record)
    assert record.getMessage() == "< cookies: two"


def test_origins_that_are_no_list_say_what_to_write() -> None:
    with pytest.raises(ConfigurationError, match="origins is a list"):
        parse_origins(None)  # type: ignore[arg-type]
