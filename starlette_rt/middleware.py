"""The middleware: it starts the `Realtime` with the app, and learns who comes.

The law of this file: the middleware knows, the endpoint decides. It reads origin, token and address of every
WebSocket handshake into ``scope["starlette_rt"]`` and refuses nothing on routes that are not ours, unless
the host asked for that with ``protect="all"``. An HTTP request pays one comparison. Pure ASGI, no state of a
connection on ``self``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from starlette.authentication import AuthCredentials, BaseUser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .admission import (
    NOBODY,
    SERVER_LOGGERS,
    Admission,
    RedactingFilter,
    Refusal,
    authorization_header,
    check_origin,
    parse_origins,
    read,
)
from .exceptions import ConfigurationError, TokenError, Unavailable
from .gate import NO_IDENTITY, Denied, Reject, deny
from .identity import Identity, credentials, wrap
from .limits import ConnectionCounter, ConnectionLimits
from .realtime import Realtime
from .tokens import MAX_TICKET_TTL, Verifier, resolve


class RealtimeMiddleware:
    """Makes an app live: ``Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)``.

    ``tokens`` verifies the token of a handshake (a `TokenSigner`, a `JWTVerifier` or anything with
    ``verify``). ``origins`` are origins other than the app's own that may connect. ``connections`` caps the
    connections of this process. ``protect="all"`` also refuses bad tokens and origins on WebSocket routes
    that are not ours. ``reject`` says how a refusal is told: ``http`` as a response, ``close`` as a close
    code after an accept, ``auto`` as a close code only to browsers that speak our protocol.
    ``query_token=True`` also reads ``?token=``, which puts tokens into logs that are not ours. ``cookie`` is
    the name of the cookie that may carry the token. Raises `ConfigurationError` for what cannot work.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        realtime: Realtime,
        tokens: Verifier | None = None,
        origins: Iterable[str] = (),
        connections: ConnectionLimits | None = None,
        protect: Literal["ours", "all"] = "ours",
        reject: Reject = "auto",
        query_token: bool = False,
        cookie: str = "rt_token",
    ) -> None:
        check_settings(realtime, tokens, protect, reject, connections)
        self.app: ASGIApp = app
        self._realtime = realtime
        self._tokens = tokens
        self._origins = parse_origins(origins)
        self._counter = None if connections is None else ConnectionCounter(connections)
        self._protect = protect
        self._reject: Reject = reject
        self._query_token = query_token
        self._cookie = cookie
        redact_logs()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            refusal = await self._read(scope)
            if refusal is not None:
                await receive()
                return await deny(scope, receive, send, refusal, self._realtime)
            try:
                await self.app(scope, receive, send)
            except Denied:  # `Realtime.accept` has answered; `suppress` would weigh 190 bytes per idle connection
                return
        elif scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _read(self, scope: Scope) -> Refusal | None:
        """Put what can be known into the scope; return a refusal only where all routes are protected."""
        handshake = read(scope, query_token=self._query_token, cookie=self._cookie)
        admission = Admission(
            self._realtime,
            handshake,
            origins=self._origins,
            counter=self._counter,
            reject=self._reject,
            verifier=self._tokens,
        )
        scope["starlette_rt"] = admission
        await self._identify(scope, admission)
        return self._refusal(admission, scope["user"]) if self._protect == "all" else None

    async def _identify(self, scope: Scope, admission: Admission) -> None:
        """Verify what the handshake carries; put the user into the scope, or the refusal into the admission."""
        handshake = admission.handshake
        token, carrier = handshake.token, handshake.carrier
        if token is not None:
            if carrier == "subprotocol" and not any(name == b"authorization" for name, _ in scope["headers"]):
                scope["headers"] = [*scope["headers"], authorization_header(token)]
            if self._tokens is not None:
                await self._verify(scope, admission, token)
        admission.handshake = replace(handshake, token=None)  # nobody needs it any more
        if "user" not in scope:
            scope["user"], scope["auth"] = NOBODY, AuthCredentials()

    async def _verify(self, scope: Scope, admission: Admission, token: str) -> None:
        try:
            identity = await self._identity_of(token, admission.handshake.carrier == "ticket")
        except TokenError as error:
            admission.refusal = Refusal.of(error)
            return
        except Unavailable as error:
            admission.refusal = Refusal(503, "unavailable", str(error), retry_after=5.0)
            return
        admission.identity = identity
        if check_origin(admission.handshake, self._origins) is None:  # else only an endpoint that lists it may know
            scope["user"], scope["auth"] = identity, credentials(identity)

    async def _identity_of(self, token: str, ticket: bool) -> Identity:
        """Return whom the token names. Raises `TokenError` if it is not valid, used up or revoked."""
        if ticket:
            identity = await self._use_ticket(token)
        else:
            assert self._tokens is not None
            identity = await resolve(self._tokens, token)
        if self._realtime.running and await self._realtime.revoked(identity):
            raise TokenError("the token has been revoked")
        return identity

    async def _use_ticket(self, ticket: str) -> Identity:
        verify = getattr(self._tokens, "verify_ticket", None)
        if verify is None:
            raise TokenError("this app takes no tickets")
        identity: Identity = verify(ticket)
        if not self._realtime.running or not await self._realtime.claim(f"ticket:{identity.token_id}", MAX_TICKET_TTL):
            raise TokenError("the ticket has been used", expired=True)
        return identity

    def _refusal(self, admission: Admission, user: BaseUser) -> Refusal | None:
        """What ``protect="all"`` refuses before any route is looked for."""
        if sentence := check_origin(admission.handshake, self._origins):
            return Refusal(403, "origin", sentence)
        if admission.refusal is None and self._tokens is not None and wrap(user) is None:
            return NO_IDENTITY
        return admission.refusal

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the `Realtime` around the host's lifespan, and let the server hear of its end only after ours."""
        ended: list[Message] = []
        heard: list[Message] = []
        spoken = False

        async def listen() -> Message:
            heard.append(await receive())
            return heard[-1]

        async def hold_back(message: Message) -> None:
            nonlocal spoken
            spoken = True
            if message["type"].startswith("lifespan.shutdown."):
                ended.append(message)
            else:
                await send(message)

        try:
            await self._realtime.__aenter__()
        except Exception as error:  # a server takes a lifespan that raises for one that is not supported
            await receive()
            return await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
        try:
            if "state" in scope:
                scope["state"]["rt"] = self._realtime
            try:
                await self.app(scope, listen, hold_back)
            except Exception:
                if spoken:
                    raise
            if not spoken:
                await stand_in(listen, hold_back, started=bool(heard))
        finally:
            await self._realtime.__aexit__()
            for message in ended:  # also that of a host which failed and raised
                await send(message)


async def stand_in(receive: Receive, send: Send, *, started: bool) -> None:
    """Answer for an app that has no lifespan, so that the `Realtime` around it lives as long as the server."""
    if not started:
        await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def check_settings(realtime: Any, tokens: Any, protect: Any, reject: Any, connections: Any) -> None:
    """Fail at start, with a sentence that says what to write, where something cannot work."""
    if not isinstance(realtime, Realtime):
        raise ConfigurationError("write Middleware(RealtimeMiddleware, realtime=rt) with rt = Realtime()")
    if tokens is not None and not callable(getattr(tokens, "verify", None)):
        raise ConfigurationError('tokens= takes a verifier: TokenSigner(["…"]) or JWTVerifier(key, algorithms=["…"])')
    if not isinstance(connections, ConnectionLimits | None):
        raise ConfigurationError("connections= takes ConnectionLimits(total=…, per_ip=…, per_user=…, rate=…)")
    if protect not in ("ours", "all"):
        raise ConfigurationError('protect= is "ours" or "all"')
    if reject not in ("auto", "http", "close"):
        raise ConfigurationError('reject= is "auto", "http" or "close"')


def redact_logs() -> None:
    """Keep tokens and tickets of query strings out of the access logs of the servers we know; once."""
    for name in SERVER_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, RedactingFilter) for each in logger.filters):
            logger.addFilter(RedactingFilter())
