"""The way in: from a handshake to a connection, or to a refusal that its sender understands.

The law of this file: the middleware knows, the endpoint decides, and this is where it decides. A handshake
ends here in exactly one of two ways, a `Connection` or a `Refusal`, and a refusal leaves no trace above INFO
on any server. After the accept nothing here is used again.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import anyio
from starlette.exceptions import HTTPException, WebSocketException
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from .admission import NOBODY, Admission, Refusal, check_origin, choose_protocol, read
from .backends.base import LimitStore
from .connection import Connection, check_code, sendable
from .exceptions import CloseCode, ConfigurationError, EventError, RealtimeError, TokenError, Unavailable
from .frames import MAX_MESSAGE, printable
from .hub import Wire
from .identity import Identity, credentials, guest, wrap
from .limits import RETRY_AFTER, ConnectionCounter, Meter, RateLimit, Refused
from .protocols.plain import Encoding
from .protocols.v1 import V1S
from .seams import Carrier, abort_transport, seam_for, stop_reading
from .tokens import resolve

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

logger: logging.Logger = logging.getLogger("starlette_rt")

Reject = Literal["auto", "http", "close"]

PLAINLY = ("rt.plain",)
PROTOCOLS = (*V1S, *PLAINLY)

MOMENT = 0.25  # seconds that a peer refused by a close code has to read it

NOT_RUNNING = Refusal(503, "unavailable", "the realtime service is not running", retry_after=5.0)
DRAINING = Refusal(503, "unavailable", "the server is restarting", retry_after=2.0)
NO_IDENTITY = Refusal(401, "unauthorized", "a token is required")
REVOKED = Refusal(401, "unauthorized", "this identity has been revoked")
NOT_ACCEPTED = Refusal(403, "forbidden", "the endpoint did not accept the connection")
FAILED = Refusal(500, "internal", "the server failed to open the connection")


class Denied(RealtimeError):
    """The handshake has been refused and answered; the middleware ends the request quietly with it."""


class Host(Protocol):
    """What the gate asks of a `Realtime`."""

    draining: bool
    warned: bool
    tasks: Any

    @property
    def running(self) -> bool: ...
    @property
    def limits(self) -> LimitStore: ...
    async def revoked(self, identity: Identity) -> bool: ...
    async def expect(self, user: Identity) -> None: ...
    def expect_no_more(self, user: Identity) -> None: ...
    def wire(self, encoding: Encoding, protocol: str | None, carrier: Carrier) -> Wire: ...
    def register(self, connection: Connection) -> None: ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What an endpoint asks of those who come in, made once for each class."""

    anonymous: bool | None = None
    origins: frozenset[str] = frozenset()
    encoding: Encoding = "json"
    meter: Meter | None = None
    max_message_size: int = MAX_MESSAGE


def meter_of(name: str, limits: Iterable[RateLimit]) -> Meter | None:
    """Return the meter of a place with these limits, ``None`` if it has none."""
    listed = () if isinstance(limits, RateLimit) else tuple(limits)
    if isinstance(limits, RateLimit) or not all(isinstance(each, RateLimit) for each in listed):
        raise ConfigurationError(f'{name}: limits is a list of RateLimit: write limits = [RateLimit("20/second")]')
    return Meter(name, listed) if listed else None


def admission_of(scope: Scope, host: Any) -> Admission:
    """Return what the middleware found out, or the handshake alone where no middleware has looked."""
    admission = scope.get("starlette_rt")
    return admission if isinstance(admission, Admission) else Admission(host, read(scope))


async def admit(
    host: Any, scope: Scope, send: Send, terms: Terms, identity: Identity | None = None, *, accepted: bool = False
) -> Connection | Refusal:
    """Decide about a handshake; a connection that comes back is registered and holds its slot in the caps.

    Where the host has ``accepted`` it itself, nobody knows which protocol it chose: it is plain.
    """
    admission = admission_of(scope, host)
    if host is None or not host.running:
        logger.error(
            "the Realtime is not running; write Middleware(RealtimeMiddleware, realtime=rt) into the app, and see that "
            "its lifespan runs (a TestClient wants a `with`, a mounted app its parent's lifespan)"
        )
        return NOT_RUNNING
    user = await recognise(host, scope, admission, terms, identity)
    if isinstance(user, Refusal):
        return await decide(host, admission, user) or user
    try:
        await host.expect(user)
        if refusal := await decide(host, admission, user):
            return refusal
        protocol = None if accepted else spoken(admission, terms.encoding)
        return enter(host, scope, send, terms, admission, user, protocol)
    finally:
        host.expect_no_more(user)


async def decide(host: Any, admission: Admission, user: Identity | Refusal) -> Refusal | None:
    """Return what stands against one more connection, or take its slot in the caps."""
    if host.draining:
        return DRAINING
    if refused := await take_slot(admission, user, shared_limits(host)):
        return too_many(refused)
    if host.draining and isinstance(user, Identity):  # it has begun while the other nodes were asked
        give_slot_back(admission, user, admission.handshake.block, shared_limits(host))
        return DRAINING
    return None


def spoken(admission: Admission, encoding: Encoding) -> str | None:
    """Return the protocol that is spoken with who offered these; only JSON has a second spelling."""
    return choose_protocol(admission.handshake.protocols, PROTOCOLS if encoding == "json" else PLAINLY)


async def recognise(
    host: Any, scope: Scope, admission: Admission, terms: Terms, identity: Identity | None
) -> Identity | Refusal:
    """Return who it is, if they may come now."""
    try:
        user = identify(scope, admission, terms, identity)
    except ConfigurationError as error:  # the host's own user has no name, or one that we keep for ourselves
        host.faults.report(error, host.tasks.time())
        return FAILED
    try:
        if isinstance(user, Identity) and await host.revoked(user):
            return REVOKED  # also a token's: it may have been revoked since the middleware verified it
    except Unavailable as error:
        return Refusal(503, "unavailable", str(error), retry_after=5.0)
    return user


def shared_limits(host: Any) -> LimitStore | None:
    """Return the limits that ``host`` shares with other nodes, ``None`` if it is alone."""
    limits: LimitStore = host.limits
    return limits if limits.shared else None


async def take_slot(admission: Admission, user: Identity | Refusal, shared: LimitStore | None) -> Refused | None:
    """Count the handshake against the caps; one that is refused costs its share of the rate, and no slot."""
    counter = admission.counter
    if not isinstance(counter, ConnectionCounter):
        return None
    ip, name = admission.handshake.block, person(user)
    refused = counter.take(ip, name, time.monotonic())
    if refused is None and isinstance(user, Refusal):
        counter.release(ip, name)
    elif refused is None and shared is not None and name is not None and counter.per_user is not None:
        allowed = False
        try:
            allowed = await shared.take_cap(name, counter.per_user)
        finally:
            if not allowed:
                counter.release(ip, name)
        return None if allowed else Refused("per_user", RETRY_AFTER)
    return refused


def give_slot_back(admission: Admission, user: Identity, ip: str | None, shared: LimitStore | None) -> None:
    """Give back what `take_slot` has taken."""
    if not isinstance(admission.counter, ConnectionCounter):
        return
    name = person(user)
    admission.counter.release(ip, name)
    if shared is not None and name is not None and admission.counter.per_user is not None:
        shared.release_cap(name)


def person(user: Identity | Refusal) -> str | None:
    """Return the name of one who is counted by it."""
    return user.identity if isinstance(user, Identity) and user.is_authenticated else None


def enter(
    host: Any, scope: Scope, send: Send, terms: Terms, admission: Admission, user: Identity, protocol: str | None
) -> Connection:
    """Return the connection of one who may come in, registered."""
    seam = seam_for(scope, send, host.tasks)
    connection = Connection(
        host,
        seam,
        host.wire(terms.encoding, protocol, seam.carrier),
        user,
        id=(id := secrets.token_urlsafe(12)),
        session=admission.handshake.session or id,
        ip=admission.handshake.block,
        meter=terms.meter,
        max_message_size=terms.max_message_size,
        shared=shared_limits(host),
    )
    host.register(connection)
    connection.greet()
    return connection


def identify(scope: Scope, admission: Admission, terms: Terms, identity: Identity | None) -> Identity | Refusal:
    """Return who it is: the host's own word, a valid token, the host's user, or a guest where guests may come."""
    if refusal := check_origin(admission.handshake, admission.origins | terms.origins):
        return Refusal(403, "origin", refusal)
    if identity is not None:
        return identity
    if admission.refusal is not None:
        return admission.refusal
    user = scope.get("user")
    if admission.identity is not None:
        if user is not admission.identity:
            give_user(scope, admission, admission.identity)
        return admission.identity
    known = wrap(user, scopes=getattr(scope.get("auth"), "scopes", ())) if user is not None else None
    if known is not None:
        return known
    guarded = admission.guarded or (user is not None and user is not NOBODY)
    anonymous = terms.anonymous if terms.anonymous is not None else not guarded
    if not anonymous:
        return NO_IDENTITY
    return guest(admission.handshake.session or secrets.token_urlsafe(12))


def too_many(refused: Refused) -> Refusal:
    """Return the refusal of a connection that is one too many."""
    if refused.bound == "total":
        return Refusal(503, "too_many_connections", "the server is full", retry_after=refused.retry_after)
    words = {"per_ip": "too many connections from this address", "per_user": "too many connections of this user"}
    message = words.get(refused.bound, "connections from this address come too fast")
    return Refusal(429, "too_many_connections", message, retry_after=refused.retry_after)


def give_user(scope: Scope, admission: Admission, identity: Identity) -> None:
    """Put the token's user into a scope without it: the origin is the endpoint's own, or something replaced it.

    The latter is said once for each `Realtime`.
    """
    if check_origin(admission.handshake, admission.origins) is None and not admission.realtime.warned:
        admission.realtime.warned = True
        logger.warning(
            "a valid token was read, but something inside replaced scope['user']; the token's identity is used. "
            "Put RealtimeMiddleware after (inside) AuthenticationMiddleware"
        )
    scope["user"], scope["auth"] = identity, credentials(identity)


async def renewed(scope: Scope, host: Any, token: str) -> Identity:
    """Return whom a token handed in later names. Raises `EventError` for one that is not good."""
    verifier = admission_of(scope, host).verifier
    if verifier is None:
        raise EventError("forbidden", "tokens are not refreshed here")
    try:
        identity = await resolve(verifier, token)
    except TokenError as error:
        raise EventError("unauthorized", str(error)) from None
    if await host.revoked(identity):
        raise EventError("unauthorized", REVOKED.message)
    return identity


# Refusing.


async def deny(
    scope: Scope,
    receive: Receive,
    send: Send,
    refusal: Refusal,
    host: Any,
    *,
    code: int | None = None,
    accepted: bool = False,
) -> None:
    """Answer a handshake with ``refusal``: over HTTP, or to a browser of ours with a close code it can read.

    ``code`` is the close code if the host has named one. Where the host has ``accepted`` a close is all there is.
    """
    admission = admission_of(scope, host)
    if host is not None:
        host.metrics.refused(refusal.status, refusal.code)
    close = code if code is not None and sendable(code) else int(refusal.close_code)
    refusal = replace(refusal, message=printable(refusal.message))  # it may quote what no wire carries
    logger.info("refused %d %s: %s", refusal.status, refusal.code, refusal.message)
    reason = refusal.message.encode()[:120].decode("utf-8", "ignore")
    try:
        if not accepted and closes_instead(admission, refusal):
            protocol = choose_protocol(admission.handshake.protocols, PROTOCOLS)
            await send({"type": "websocket.accept", "subprotocol": protocol, "headers": []})
        elif not accepted and "websocket.http.response" in (scope.get("extensions") or {}):
            await respond(send, refusal)
            return await linger(receive, send)
        await send({"type": "websocket.close", "code": close, "reason": reason})
        if accepted or closes_instead(admission, refusal):
            await part(send)
    except OSError:
        pass  # the peer did not wait for the answer


async def part(send: Send) -> None:
    """Take leave of a peer that was closed as soon as it came: it has a moment to read the code, and is not read."""
    if stop_reading(send):
        await anyio.sleep(MOMENT)
        abort_transport(send)


def closes_instead(admission: Admission, refusal: Refusal) -> bool:
    """Whether the refusal is said by a close code: browsers hide an HTTP status. A wrong origin never gets in."""
    if refusal.code == "origin" or admission.reject == "http":
        return False
    return admission.reject == "close" or admission.handshake.is_browser


async def respond(send: Send, refusal: Refusal) -> None:
    """Send the refusal as an HTTP response."""
    headers = refusal.headers()
    await send({"type": "websocket.http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": refusal.body(), "more_body": False})


async def linger(receive: Receive, send: Send) -> None:
    """Stay until the server has let go of a denied handshake.

    uvicorn logs an ERROR if the application returns between the last body and the end of the connection.
    It is over when an empty body is refused; a server that minds sooner has no such line.
    """
    with anyio.move_on_after(1.0):
        await receive()
        try:
            while True:
                await send({"type": "websocket.http.response.body", "body": b"", "more_body": True})
                await anyio.sleep(0.001)
        except Exception:
            return  # ClientDisconnected on uvicorn, other words elsewhere: what was waited for


# Between Starlette's WebSocket and the connection.


def take_over(websocket: WebSocket, connection: Connection, send: Send, protocol: str | None) -> None:
    """Lead everything the host sends through ``connection``, and keep its hands off ``receive``."""
    websocket._send = Diversion(connection, send, protocol)
    websocket._receive = forbidden


class Diversion:
    """The ``send`` that the host's WebSocket uses."""

    __slots__ = ("_connection", "_protocol", "_send")

    def __init__(self, connection: Connection, send: Send, protocol: str | None) -> None:
        self._connection, self._send, self._protocol = connection, send, protocol

    async def __call__(self, message: Message) -> None:
        kind, connection = message["type"], self._connection
        if kind == "websocket.send":
            await answer(connection.send_raw, message)
        elif kind == "websocket.close":
            connection.begin_close(check_code(message.get("code", 1000)), message.get("reason") or "")
        elif kind == "websocket.accept":
            check_protocol(message, self._protocol, connection)
            await opening(connection, self._send, message)
        else:
            if kind == "websocket.http.response.body" and not message.get("more_body", False):
                connection.denied = True
                connection.abandon()  # before it is sent: the disconnect that follows is for `linger`
            await answer(self._send, message)


def check_protocol(message: Message, protocol: str | None, connection: Connection) -> None:
    """Let the accept name the protocol that is spoken. Raises `RuntimeError` for a host that names another."""
    if message.get("subprotocol") is None:
        message["subprotocol"] = protocol
    elif message["subprotocol"] != protocol and (connection.wire.v1 is not None or message["subprotocol"] in V1S):
        raise RuntimeError(f"{protocol or 'rt.plain'} is spoken with this client: write accept() without subprotocol=")


async def opening(connection: Connection, send: Send, message: Message) -> None:
    """Accept, and let go what waited. Raises `WebSocketDisconnect` if the connection has ended meanwhile."""
    check_going(connection)
    await answer(send, message)
    try:
        check_going(connection)
    except WebSocketDisconnect:  # it ended while the accept was on its way: a close is all there is now
        connection.accepted = True
        await answer(send, {"type": "websocket.close", "code": CloseCode.GOING_AWAY, "reason": ""})
        raise
    connection.opened()


def check_going(connection: Connection) -> None:
    """Raise `WebSocketDisconnect` if the connection has ended before it was accepted."""
    if connection.close_code is not None:
        raise WebSocketDisconnect(connection.close_code)


async def answer(send: Send, message: Message) -> None:
    """Send a part of the answer to a handshake, or a message. Raises `WebSocketDisconnect` if the peer has left.

    Starlette makes the same of an `OSError`, but calls the next send a bug: a handler may say more than one thing.
    """
    try:
        await send(message)
    except OSError:
        raise WebSocketDisconnect(1006) from None


def behind_accept(send: Send) -> Send:
    """Return the ``send`` of a handshake that the host has accepted itself: accepting it again is nothing."""

    async def rest(message: Message) -> None:
        if message["type"] != "websocket.accept":
            await send(message)

    return rest


async def forbidden() -> Message:
    """What the host's ``receive*`` meet."""
    raise RuntimeError("this endpoint reads for you; use on_receive")


def release(scope: Scope, connection: Connection) -> None:
    """Give the connection's slot in the caps back."""
    admission = scope.get("starlette_rt")
    if isinstance(admission, Admission):
        give_slot_back(admission, connection.user, connection.ip, connection.shared)


def header_text(text: str) -> bytes:
    """Return ``text`` as a header may carry it: one line of Latin-1."""
    return " ".join(text.splitlines()).encode("latin-1", "replace")


def refusal_for(error: BaseException) -> Refusal | None:
    """Return the refusal that an exception of ``on_connect`` means, ``None`` if it means nothing of the kind."""
    if isinstance(error, HTTPException):
        refusal = Refusal(error.status_code, f"http_{error.status_code}", str(error.detail))
        extra = [(header_text(name).lower(), header_text(value)) for name, value in (error.headers or {}).items()]
        return replace(refusal, extra=tuple(extra))
    if isinstance(error, EventError):
        return Refusal(403, error.code, error.message, retry_after=error.retry_after)
    if isinstance(error, WebSocketException):
        return Refusal(403, "forbidden", error.reason)
    return None
