"""`RealtimeEndpoint`: Starlette's `WebSocketEndpoint` with groups, presence, limits and a clean end.

The law of this file: the host's three hooks keep Starlette's names and signatures; what happens around them
is ours. It diverges from Starlette's `dispatch` on purpose, each number with a test of that number in
``tests/test_endpoints.py``; do not "fix" one without its reason:

1. ``encoding`` is ``"json"`` by default; a message may be text or binary, and is decoded once, into the type
   that ``on_receive`` is annotated with. Starlette hands over raw text or bytes unless told otherwise.
2. ``on_disconnect`` runs once for every accepted connection, also when ``on_connect`` raised after it
   accepted, and is not cancelled with the request. Starlette skips it, and memberships leak.
3. ``on_disconnect`` does not run for a handshake that was refused. Starlette has no such case.
4. Bad input is answered to its sender and logged nowhere above INFO. Starlette closes with 1003 and raises
   RuntimeError into the server's log, so that any client can fill it. Where the encoding has no spelling for
   an error, the wrong kind of frame closes with 1003.
5. ``encoding = None`` takes an empty text frame as ``""``. Starlette raises KeyError.
6. An exception in ``on_receive`` is logged, answered ``internal``, and the connection stays; ten in a row
   close it with 1011. Starlette ends the connection with 1006 and no Close frame.
7. Handlers run in order beside the reader, not in it: a slow handler does not keep pongs unread, and a peer
   that leaves is noticed at once. Starlette reads between two handlers only.
8. ``on_connect`` that ends without accepting refuses with 403. Starlette waits for ever.
9. An exception in ``on_connect`` refuses with 500 before accept and closes with 1011 after it, and is
   logged. ``HTTPException`` before accept is the refusal itself, whatever handlers the app has for it.
10. ``websocket.send*`` and ``close`` take their place in the order of everything said to this client and
    return at once; ``websocket.receive*`` say ``this endpoint reads for you; use on_receive``.
11. The close code of a client that said none is 1005, and of one that was cancelled 1001. Starlette says 1000.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import HTTPException, WebSocketException
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from .admission import Refusal, choose_protocol, parse_origins
from .backends.base import Published
from .connection import Connection
from .events import Decoder, ModelDecoder, check_handler, message_decoder
from .exceptions import CloseCode, ConfigurationError, EventError
from .feed import Watch
from .frames import MAX_MESSAGE
from .gate import (
    FAILED,
    NOT_ACCEPTED,
    Terms,
    admission_of,
    admit,
    behind_accept,
    deny,
    linger,
    meter_of,
    refusal_for,
    release,
    take_over,
)
from .identity import Identity
from .limits import RateLimit
from .loop import escapes
from .protocols.plain import PLAIN, Encoding
from .realtime import Realtime


class RealtimeEndpoint(WebSocketEndpoint):
    """A WebSocket route that is live. Override ``on_connect``, ``on_receive`` and ``on_disconnect``.

    Class settings: ``anonymous`` lets guests in (by default they may come where nothing could identify
    anybody), ``origins`` adds origins to the middleware's, ``limits`` are the rate limits of messages,
    ``encoding`` is ``"json"``, ``"text"``, ``"bytes"`` or ``None``, ``max_message_size`` bounds a message in
    bytes, ``realtime`` is used where no middleware is.
    """

    anonymous: ClassVar[bool | None] = None
    origins: ClassVar[Iterable[str]] = ()
    limits: ClassVar[Iterable[RateLimit]] = ()
    encoding: Encoding = "json"
    max_message_size: ClassVar[int] = MAX_MESSAGE
    realtime: ClassVar[Realtime | None] = None

    connection: Connection

    _terms: ClassVar[Terms]
    _decoder: ClassVar[Decoder | ModelDecoder | None]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._prepare()

    @classmethod
    def _prepare(cls) -> None:
        """Read the class once. Raises `ConfigurationError` for a setting or a hook that cannot work."""
        if cls.encoding not in PLAIN:
            raise ConfigurationError(f'{cls.__name__}.encoding: write "json", "text", "bytes" or None')
        if not isinstance(cls.max_message_size, int) or cls.max_message_size < 1:
            raise ConfigurationError(f"{cls.__name__}.max_message_size is a number of bytes, 1 or more")
        name = f"{cls.__module__}.{cls.__qualname__}"
        cls._terms = Terms(
            cls.anonymous, parse_origins(cls.origins), cls.encoding, meter_of(name, cls.limits), cls.max_message_size
        )
        for hook, parameter in ((cls.on_connect, 1), (cls.on_receive, 2), (cls.on_disconnect, 2)):
            check_handler(hook, parameter)
        cls._decoder = message_decoder(cls.on_receive, 2) if cls.encoding == "json" else None

    @classmethod
    async def serve(cls, websocket: WebSocket, *, identity: Identity | None = None, **attributes: Any) -> None:
        """Run the endpoint on a WebSocket that the host's own route has got.

        ``identity`` is who the host's dependencies say it is; ``attributes`` are set on the endpoint, for
        its hooks. Returns when the connection has ended.
        """
        accepted = websocket.application_state is not WebSocketState.CONNECTING
        send = behind_accept(websocket._send) if accepted else websocket._send
        if taken := [name for name in attributes if hasattr(RealtimeEndpoint, name)]:
            raise TypeError(f"serve() cannot set {taken[0]}, which every endpoint has; who it is goes to identity=")
        endpoint = cls(websocket.scope, websocket._receive, send)
        vars(endpoint).update(attributes)
        connected = websocket.client_state is not WebSocketState.CONNECTING
        await endpoint._run(identity, connected=connected, accepted=accepted)

    def dispatch(self) -> Any:
        """Live; called by Starlette. Not a coroutine of its own: each frame counts for an idle connection."""
        return self._run(None)

    async def _run(self, identity: Identity | None, connected: bool = False, accepted: bool = False) -> None:
        if not connected:
            await self.receive()
        scope, realtime = self.scope, self._realtime()
        outcome = await admit(realtime, scope, self.send, self._terms, identity)
        if isinstance(outcome, Refusal):
            return await deny(scope, self.receive, self.send, outcome, realtime, accepted=accepted)
        self.connection = outcome
        hooks = Hooks(self, self._websocket(outcome))
        try:
            await outcome.serve(self.receive, hooks)
        finally:
            release(scope, outcome)
        if outcome.denied:
            await linger(self.receive, self.send)
        elif not outcome.accepted:
            refusal, code = hooks.refusal, outcome.close_code
            if reason := outcome.close_reason:
                refusal = replace(refusal, message=reason)
            await deny(scope, self.receive, self.send, refusal, realtime, code=code, accepted=accepted)

    def _realtime(self) -> Realtime | None:
        found: Realtime | None = self.realtime or admission_of(self.scope, None).realtime
        return found

    def _websocket(self, connection: Connection) -> WebSocket:
        """Return the `WebSocket` of the hooks, which speaks through the connection."""
        websocket = WebSocket(self.scope, self.receive, self.send)
        websocket.client_state = WebSocketState.CONNECTED
        offered = admission_of(self.scope, None).handshake.protocols
        take_over(websocket, connection, self.send, choose_protocol(offered))
        return websocket

    # The verbs.

    @property
    def user(self) -> Identity:
        """Who the client is; a guest has an identity too."""
        return self.connection.user

    async def join(self, group: str, *, presence: Watch | None = None) -> None:
        """See `Connection.join`."""
        await self.connection.join(group, presence=presence)

    async def leave(self, group: str) -> None:
        """See `Connection.leave`."""
        await self.connection.leave(group)

    async def broadcast(
        self,
        group: str,
        data: Any,
        event: str = "message",
        *,
        exclude: Connection | str | None = None,
        ephemeral: bool = False,
        key: str | None = None,
    ) -> Published:
        """See `Realtime.broadcast`."""
        published: Published = await self.connection.broadcast(
            group, data, event, exclude=exclude, ephemeral=ephemeral, key=key
        )
        return published

    async def push(self, data: Any, event: str = "message") -> None:
        """See `Connection.push`."""
        await self.connection.push(data, event)

    async def track(self, group: str, meta: Any = None) -> None:
        """See `Connection.track`."""
        await self.connection.track(group, meta)

    async def update(self, group: str, meta: Any = None) -> None:
        """See `Connection.update`."""
        await self.connection.update(group, meta)

    async def untrack(self, group: str) -> None:
        """See `Connection.untrack`."""
        await self.connection.untrack(group)

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """See `Connection.close`."""
        await self.connection.close(code, reason)


RealtimeEndpoint._prepare()


class Hooks:
    """The script of an endpoint: calls its hooks, and turns what they raise into what the client sees."""

    __slots__ = ("_connection", "_decoder", "_endpoint", "_websocket", "refusal")

    def __init__(self, endpoint: RealtimeEndpoint, websocket: WebSocket) -> None:
        self._endpoint, self._websocket = endpoint, websocket
        self._connection = endpoint.connection
        self._decoder = type(endpoint)._decoder
        self.refusal: Refusal = NOT_ACCEPTED

    async def connect(self) -> None:
        """Run ``on_connect``; whatever it does, the handshake has an answer afterwards."""
        connection = self._connection
        try:
            await self._endpoint.on_connect(self._websocket)
        except WebSocketDisconnect:
            pass  # the peer has left
        except BaseException as error:
            if escapes(error):
                raise
            self._failed(error)
        if not connection.accepted and connection.close_code is None:
            connection.abandon()

    def _failed(self, error: BaseException) -> None:
        connection = self._connection
        refusal = refusal_for(error)
        if refusal is None:
            connection.fail(error)
            refusal = FAILED
        if not connection.accepted:
            self.refusal = refusal
            connection.begin_close(error.code if isinstance(error, WebSocketException) else refusal.close_code)
        elif isinstance(error, WebSocketException):
            connection.begin_close(error.code, error.reason)
        elif isinstance(error, EventError | HTTPException):
            connection.begin_close(CloseCode.FORBIDDEN, refusal.message)
        else:
            connection.begin_close(CloseCode.INTERNAL_ERROR, CloseCode.INTERNAL_ERROR.reason)

    async def receive(self, raw: str | bytes) -> None:
        """Decode one message and hand it to ``on_receive``."""
        data = self._connection.wire.protocol.decode(raw, self._decoder)
        await self._endpoint.on_receive(self._websocket, data)

    async def disconnect(self, code: int) -> None:
        """Run ``on_disconnect`` with a WebSocket that knows it is over."""
        self._websocket.client_state = WebSocketState.DISCONNECTED
        await self._endpoint.on_disconnect(self._websocket, code)
