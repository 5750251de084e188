"""What a handshake says, and whether that is enough to come in.

The law of this file: a pure function of the handshake. It reads a scope once, verifies nothing, asks nobody, keeps
nothing and never raises for anything that a peer can send. Whether a token is good is `tokens`' answer, whether
this person may come in here is the endpoint's; how a refusal is sent is the middleware's. Whatever carries a
secret through here stays out of reprs, messages and logs.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv6Address, IPv6Network
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote_plus

from starlette.authentication import UnauthenticatedUser

from .exceptions import CloseCode, ConfigurationError, TokenError
from .identity import Identity

Carrier = Literal["header", "subprotocol", "cookie", "ticket", "query"]
"""What brought the token, in the order in which they are looked at."""

TOKEN_PROTOCOL = "rt.token."
SESSION_PROTOCOL = "rt.session."

SERVER_LOGGERS = ("uvicorn.access", "uvicorn.error", "hypercorn.access", "hypercorn.error", "granian.access")
"""The loggers of servers that write the path of a handshake, query included."""

_SESSION = re.compile(r"[A-Za-z0-9_-]{22,64}")  # 128 bits are 22 characters of base64url or 32 of hex
_READ = frozenset({b"host", b"origin", b"authorization", b"cookie"})
_SECRETS = frozenset({"token", "ticket"})


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the peer said when it came. Nothing of it is verified.

    ``host`` and ``origin`` are the headers as sent (``None`` where absent; a header that is there several times
    is joined by commas and so equals no origin). ``ip`` is the address that the server gives, ``None`` on a Unix
    socket. ``protocols`` are the offered subprotocols without those that carry a token or a session.
    """

    path: str
    host: str | None
    origin: str | None
    scheme: str
    ip: str | None
    protocols: tuple[str, ...] = ()
    session: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    carrier: Carrier | None = None

    @property
    def block(self) -> str | None:
        """What limits per address count by: an IPv4 address, or the /64 that an IPv6 host has for itself."""
        if self.ip is None or ":" not in self.ip:
            return self.ip
        try:
            address = IPv6Address(self.ip)
        except AddressValueError:
            return self.ip
        return str(address.ipv4_mapped or IPv6Network((int(address) >> 64 << 64, 64)))

    @property
    def is_browser(self) -> bool:
        """Whether the peer is a browser that speaks to us: it sends ``Origin`` and offers an ``rt.*`` protocol."""
        return self.origin is not None and any(name.startswith("rt.") for name in self.protocols)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why somebody may not come in: an HTTP status before accept, a close code where the peer is a browser.

    ``code`` is a short stable word for programs, ``message`` a sentence for people, ``retry_after`` the seconds
    after which trying again makes sense.
    """

    status: int
    code: str
    message: str
    retry_after: float | None = None
    extra: tuple[tuple[bytes, bytes], ...] = ()  # headers that the host wants in the HTTP response

    @classmethod
    def of(cls, error: TokenError) -> Refusal:
        """Return the refusal of a token; an expired one has a code of its own, since a fresh one will do."""
        return cls(401, "token_expired" if error.expired else "unauthorized", str(error))

    @property
    def close_code(self) -> CloseCode:
        """The code of the table that says the same as the status."""
        if self.code == "token_expired":
            return CloseCode.TOKEN_EXPIRED
        return _CLOSE_CODES.get(self.status, CloseCode.FORBIDDEN)

    def body(self) -> bytes:
        """Return the JSON of the HTTP response."""
        said: dict[str, Any] = {"error": self.code, "message": self.message}
        if self.retry_after is not None:
            said["retry_after_ms"] = math.ceil(self.retry_after * 1000)
        return json.dumps(said, separators=(",", ":")).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of the HTTP response; ``Retry-After`` has whole seconds, rounded up."""
        found = [(b"content-type", b"application/json")]
        if self.status == 401 and not any(name == b"www-authenticate" for name, _ in self.extra):
            found.append((b"www-authenticate", b"Bearer"))  # RFC 9110 §15.5.2: a 401 must name a scheme
        if self.retry_after is not None:
            found.append((b"retry-after", str(math.ceil(self.retry_after)).encode()))
        return [*found, *self.extra]


_CLOSE_CODES = {
    401: CloseCode.UNAUTHORIZED,
    403: CloseCode.FORBIDDEN,
    429: CloseCode.TOO_MANY_CONNECTIONS,
    500: CloseCode.INTERNAL_ERROR,
    503: CloseCode.UNAVAILABLE,
}


NOBODY = UnauthenticatedUser()
"""The user of a scope that had none; another unauthenticated user is the verdict of the host's own middleware."""


@dataclass(slots=True, eq=False)
class Admission:
    """What the middleware knows about a connection and the endpoint decides by; lies at ``scope["starlette_rt"]``."""

    realtime: Any
    handshake: Handshake
    identity: Identity | None = None
    refusal: Refusal | None = None
    origins: frozenset[str] = frozenset()
    counter: Any = None  # the caps of the middleware, a ConnectionCounter
    reject: Literal["auto", "http", "close"] = "auto"
    verifier: Any = None  # the middleware's, a tokens.Verifier

    @property
    def guarded(self) -> bool:
        """Whether the middleware can verify tokens."""
        return self.verifier is not None


def read(scope: Mapping[str, Any], *, cookie: str = "rt_token", query_token: bool = False) -> Handshake:
    """Return what the handshake of a ``websocket`` scope says.

    The token is the first there is of: ``Authorization: Bearer``, the subprotocol ``rt.token.<token>``, the cookie
    named ``cookie``, ``?ticket=``, and ``?token=`` if ``query_token``. An empty one is none.
    """
    headers = _headers(scope)
    offered: list[str] = list(scope.get("subprotocols") or ())
    carrier, token = _carried(headers, offered, scope.get("query_string", b""), cookie, query_token)
    client = scope.get("client")
    return Handshake(
        path=scope["path"],
        host=_joined(headers[b"host"]),
        origin=_joined(headers[b"origin"]),
        scheme=scope.get("scheme", "ws"),
        ip=(client[0] or None) if client else None,
        protocols=tuple(name for name in offered if not name.startswith((TOKEN_PROTOCOL, SESSION_PROTOCOL))),
        session=next(filter(_SESSION.fullmatch, _suffixes(offered, SESSION_PROTOCOL)), None),
        token=token,
        carrier=carrier,
    )


def check_origin(handshake: Handshake, origins: Collection[str] = ()) -> str | None:
    """Return ``None`` if the page that opened this connection may do so, else the sentence that refuses it.

    It may if it says no ``Origin`` (no browser), if it is of the same origin as the scheme and the ``Host`` of
    the handshake, or if it is listed; ``origins`` are those of ``parse_origins``.
    """
    origin = handshake.origin
    if origin is None or "*" in origins:
        return None
    found = _normal(origin)
    if found is None:
        return "the Origin header is not an origin; refused"
    if found == _own_origin(handshake) or found in origins or _under_wildcard(found, origins):
        return None
    return f"origin {origin} refused; add it to RealtimeMiddleware(origins=[{json.dumps(origin)}])"


def parse_origins(origins: Iterable[str]) -> frozenset[str]:
    """Return the listed origins in the one form in which they are compared.

    An entry is an origin (``https://example.com``, ``http://localhost:5173``, ``app://local``), a wildcard for
    every subdomain (``https://*.example.com``), ``null`` (sandboxed and local pages) or ``*`` (any page at all).
    Raises ``ConfigurationError`` for anything else, with what to write.
    """
    if isinstance(origins, str):
        raise ConfigurationError(f"origins is a list: write origins=[{json.dumps(origins)}]")
    if not isinstance(origins, Iterable):
        raise ConfigurationError(f'origins is a list, not {origins!r}: write origins=["https://app.example.com"]')
    return frozenset(map(_parse_origin, origins))


def choose_protocol(protocols: Iterable[str], supported: Collection[str] = ("rt.plain",)) -> str | None:
    """Return the subprotocol to echo: the first that the peer offers and we speak, ``None`` if there is none."""
    return next((name for name in protocols if name in supported), None)


def authorization_header(token: str) -> tuple[bytes, bytes]:
    """Return the header that makes a token from a subprotocol visible to the app's own dependencies."""
    return b"authorization", b"Bearer " + token.encode("latin-1", "replace")


class RedactingFilter(logging.Filter):
    """Takes the secrets of a handshake out of log records: ``logging.getLogger("uvicorn.error").addFilter(…)``.

    It rewrites texts in the message and its arguments and keeps their shape, since formatters of servers read
    them by position or name: values of ``token`` and ``ticket`` in a query (also with the name percent-encoded),
    subprotocols that carry a token or a session, and bearer tokens. It lets every record pass.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite ``record`` in place; always true."""
        record.msg = _scrub(record.msg)
        if isinstance(record.args, tuple):
            record.args = _scrub_headers(tuple(map(_scrub, record.args)))
        elif isinstance(record.args, dict):
            record.args = _scrub_values(record.args)
        return True


# Carriers


def _headers(scope: Mapping[str, Any]) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {name: [] for name in _READ}
    for name, value in scope["headers"]:
        if name in _READ:
            found[name].append(value.decode("latin-1"))
    return found


def _joined(values: list[str]) -> str | None:
    return ", ".join(values) if values else None


def _carried(
    headers: dict[bytes, list[str]], offered: list[str], query: bytes, cookie: str, query_token: bool
) -> tuple[Carrier | None, str | None]:
    bearers = (value.partition(" ") for value in headers[b"authorization"])
    asked = _asked(query)
    carriers: tuple[tuple[Carrier, Iterable[str]], ...] = (
        ("header", (token.strip() for scheme, _, token in bearers if scheme.lower() == "bearer")),
        ("subprotocol", _suffixes(offered, TOKEN_PROTOCOL)),
        ("cookie", _cookies(headers[b"cookie"], cookie)),
        ("ticket", (value for name, value in asked if name == "ticket")),
        ("query", (value for name, value in asked if query_token and name == "token")),
    )
    for carrier, tokens in carriers:
        for token in filter(None, tokens):
            return carrier, token
    return None, None


def _suffixes(offered: Iterable[str], prefix: str) -> Iterable[str]:
    return (name.removeprefix(prefix) for name in offered if name.startswith(prefix))


def _cookies(headers: Iterable[str], wanted: str) -> Iterable[str]:
    for header in headers:
        for pair in header.split(";"):
            name, _, value = pair.partition("=")
            if name.strip() == wanted:
                yield value.strip().strip('"')


def _asked(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1")) if query else []


# Origins. One form for all: lower case, default ports left out, IPv6 compressed as browsers write it.

_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<host>(?:\*\.)?[a-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?"
)
_PAGE_SCHEMES = {"ws": "http", "wss": "https"}
_DEFAULT_PORTS = {"http": 80, "https": 443}


def _normal(origin: str) -> str | None:
    """Return the one form of an origin, ``None`` if it is none."""
    if origin == "null":
        return origin
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None or int(match["port"] or 0) > 65_535:
        return None
    host = match["host"] or _ipv6(match["ipv6"])
    if host is None:
        return None
    port = int(match["port"] or 0) or None
    shown = "" if port in (None, _DEFAULT_PORTS.get(match["scheme"])) else f":{port}"
    return f"{match['scheme']}://{host}{shown}"


def _ipv6(literal: str) -> str | None:
    try:
        return f"[{IPv6Address(literal).compressed}]"
    except AddressValueError:
        return None


def _own_origin(handshake: Handshake) -> str | None:
    if handshake.host is None:
        return None
    scheme = _PAGE_SCHEMES.get(handshake.scheme, handshake.scheme)
    return _normal(f"{scheme}://{handshake.host}")


def _under_wildcard(origin: str, origins: Collection[str]) -> bool:
    scheme, _, host = origin.partition("://")
    labels = host.split(".")
    return any(f"{scheme}://*.{'.'.join(labels[place:])}" in origins for place in range(1, len(labels)))


def _parse_origin(origin: str) -> str:
    if origin == "*":
        return origin
    found = _normal(origin)
    if found is None:
        raise ConfigurationError(f"{_complaint(origin)}: write it as https://example.com or http://localhost:5173")
    if found.startswith(("ws://", "wss://")):
        raise ConfigurationError(f"{origin!r} is an address of a socket; an origin is that of the page: write http…")
    return found


def _complaint(origin: str) -> str:
    if "://" not in origin:
        return f"the origin {origin!r} has no scheme"
    if "/" in origin.partition("://")[2]:
        return f"the origin {origin!r} has a path or a slash at its end"
    return f"{origin!r} is not an origin"


# Logs

_IN_QUERY = re.compile(r"""(^|[?&\s"'])([A-Za-z0-9%_.+-]{5,32})=([^& \t\r\n"]+)""")
_IN_HEADER = re.compile(r"""\b(rt\.token\.|rt\.session\.|bearer\s+)[^\s,;"']+""", re.IGNORECASE)
_SECRET_HEADERS = frozenset({"cookie", "set-cookie"})
_IN_COOKIES = re.compile(r"""\b((?:set-)?cookie: ).+""", re.IGNORECASE)


def _is_secret(name: str) -> bool:
    return unquote_plus(name).lower() in _SECRETS


def _scrub(value: Any) -> Any:
    if isinstance(value, bytes):
        return _scrub(value.decode("latin-1")).encode("latin-1")
    if not isinstance(value, str):
        return value
    value = _IN_QUERY.sub(lambda found: f"{found[1]}{found[2]}=***" if _is_secret(found[2]) else found[0], value)
    return _IN_COOKIES.sub(r"\1***", _IN_HEADER.sub(r"\1***", value))


def _scrub_headers(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hide what follows the name of a secret header: uvicorn logs ``"< %s: %s"`` with both as arguments."""
    names = ("", *args)
    return tuple(
        "***" if str(before).lower() in _SECRET_HEADERS else each for before, each in zip(names, args, strict=False)
    )


def _scrub_values(values: dict[str, Any]) -> dict[str, Any]:
    scrubbed = copy(values)  # keeps its class: hypercorn's answers "-" for names that are not there
    scrubbed.update({name: _scrub(value) for name, value in values.items()})
    return scrubbed
