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

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import msgspec
from starlette.endpoints import WebSocketEndpoint
from starlette.exceptions import HTTPException, WebSocketException
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from .admission import Refusal, parse_origins
from .backends.base import Published
from .connection import Connection
from .dialogue import accepted_data, check_joined, check_terms
from .events import (
    DeclaredWhisper,
    Handler,
    Whisper,
    check_handler,
    handlers_of,
    message_decoder,
    whispers_of,
)
from .exceptions import CloseCode, ConfigurationError, EventError
from .feed import Watch
from .frames import MAX_MESSAGE, Emit, plain_data, size_of
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
    renewed,
    spoken,
    take_over,
)
from .history import Position
from .identity import Identity, credentials
from .limits import RateLimit
from .loop import escapes
from .protocols.plain import PLAIN, Encoding, Plain, enveloped
from .realtime import Realtime

# What every endpoint has, and what it is called with: the number of the last argument, self being 0.
HOOKS = {"on_connect": 1, "on_receive": 2, "on_disconnect": 2, "authorize": 1, "on_track": 2, "snapshot": 1}


class RealtimeEndpoint(WebSocketEndpoint):
    """A WebSocket route that is live. Override ``on_connect``, ``on_receive`` and ``on_disconnect``.

    Class settings: ``anonymous`` lets guests in (by default they may come where nothing could identify
    anybody), ``origins`` adds origins to the middleware's, ``limits`` are the rate limits of messages,
    ``encoding`` is ``"json"``, ``"text"``, ``"bytes"`` or ``None``, ``whispers`` are what clients may say to each
    other without you, ``max_message_size`` bounds a message in bytes, ``realtime`` is used where no middleware
    is. Typed handlers are declared with `event`; what no handler takes goes to ``on_receive`` if it is called
    ``message``.
    """

    anonymous: ClassVar[bool | None] = None
    origins: ClassVar[Iterable[str]] = ()
    limits: ClassVar[Iterable[RateLimit]] = ()
    encoding: Encoding = "json"
    whispers: ClassVar[Mapping[str, Whisper]] = {}
    max_message_size: ClassVar[int] = MAX_MESSAGE
    realtime: ClassVar[Realtime | None] = None

    connection: Connection

    _terms: ClassVar[Terms]
    _handlers: ClassVar[dict[str, Handler]]
    _message: ClassVar[Handler]  # on_receive
    _whispers: ClassVar[dict[str, DeclaredWhisper]]

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
        for hook, parameter in HOOKS.items():
            check_handler(getattr(cls, hook), parameter)
        decoder = message_decoder(cls.on_receive, 2) if cls.encoding == "json" else None
        cls._message = Handler("message", cls.on_receive, decoder)
        cls._handlers = handlers_of(cls)
        check_names(cls, cls._handlers)
        cls._whispers = whispers_of(cls, cls.whispers)
        if cls.encoding != "json" and (cls._handlers or cls._whispers):
            raise ConfigurationError(f'{cls.__name__}: events and whispers are JSON; write encoding = "json"')

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
        outcome = await admit(realtime, scope, self.send, self._terms, identity, accepted=accepted)
        if isinstance(outcome, Refusal):
            return await deny(scope, self.receive, self.send, outcome, realtime, accepted=accepted)
        self.connection = outcome
        hooks = Hooks(self, self._websocket(outcome), realtime)
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
        take_over(websocket, connection, self.send, spoken(admission_of(self.scope, None), self.encoding))
        return websocket

    # What a client may do; hooks beside Starlette's three.

    async def authorize(self, group: str) -> bool:
        """Whether the client may join ``group`` itself; by default it may join none. Asked again after a refresh."""
        return False

    async def on_track(self, group: str, meta: dict[str, Any]) -> Any:
        """Return the meta with which the client is present in ``group`` as it asks; by default it is refused."""
        raise EventError("forbidden", "clients do not track themselves here")

    async def snapshot(self, group: str) -> Any:
        """Return the present content of ``group``, for a client that missed more than its history holds.

        What is said after this was called is sent after it. By default there is none: the client fetches.
        """
        return msgspec.UNSET

    # The verbs.

    @property
    def user(self) -> Identity:
        """Who the client is; a guest has an identity too."""
        return self.connection.user

    async def join(self, group: str, *, presence: Watch | None = None) -> Position | None:
        """See `Connection.join`."""
        return await self.connection.join(group, presence=presence)

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

    async def call(self, event: str, data: Any = None, *, timeout: float = 10.0) -> Any:
        """See `Connection.call`."""
        return await self.connection.call(event, data, timeout=timeout)

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


def check_names(cls: type[RealtimeEndpoint], handlers: Mapping[str, Handler]) -> None:
    """Raise `ConfigurationError` for a typed handler in the place of what every endpoint has, such as ``join``."""
    for handler in handlers.values():
        name = handler.function.__name__
        if hasattr(RealtimeEndpoint, name):
            words = f"{cls.__name__}.{name} takes the place of a method that every endpoint has"
            raise ConfigurationError(f'{words}; write @event("{handler.name}") over a method of another name')


RealtimeEndpoint._prepare()


class Hooks:
    """The script of an endpoint: calls its hooks, and turns what they raise into what the client sees."""

    __slots__ = ("_connection", "_endpoint", "_realtime", "_websocket", "refusal")

    def __init__(self, endpoint: RealtimeEndpoint, websocket: WebSocket, realtime: Realtime | None) -> None:
        assert realtime is not None  # else it was refused
        self._endpoint, self._websocket, self._realtime = endpoint, websocket, realtime
        self._connection = endpoint.connection
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
        """Decode one message of a plain client and hand it to whom it is for."""
        endpoint, protocol = self._endpoint, self._connection.wire.protocol
        assert isinstance(protocol, Plain)
        said = enveloped(raw) if endpoint._handlers or endpoint._whispers else None
        if said is not None and said.event in endpoint._handlers:
            await self._said(said, endpoint._handlers[said.event], protocol)
        elif said is not None and said.event in endpoint._whispers:
            await self._whispered(said, endpoint._whispers[said.event], protocol)
        else:
            await self._bare(raw, endpoint._handlers.get("message", endpoint._message), protocol)

    async def _bare(self, raw: str | bytes, handler: Handler, protocol: Plain) -> None:
        """Run the handler of ``message`` for what came without an envelope."""
        check_terms(handler, None, size_of(raw), self._connection)
        await self.run(handler, protocol.decode(raw, handler.decoder), None)

    async def _said(self, said: Emit, handler: Handler, protocol: Plain) -> None:
        """Run a typed handler for a plain client, which gets no acknowledgement."""
        await self.run(
            handler, accepted_data(said, handler, self._connection, self._realtime.hub, protocol), said.group
        )

    async def _whispered(self, said: Emit, declared: DeclaredWhisper, protocol: Plain) -> None:
        """Relay what a plain client whispers; what comes too fast is dropped."""
        connection, hub = self._connection, self._realtime.hub
        if connection.must_wait(len(said.data), declared.meter):
            return
        group = check_joined(said.group or "", connection, hub)
        data = plain_data(protocol.data(said.data, declared.decoder))
        await self._realtime.whisper(connection, group, declared, data)

    # What a client of the protocol v1 asks; see dialogue.Script.

    def find(self, event: str) -> Handler | None:
        """Return the handler of ``event``."""
        endpoint = self._endpoint
        return endpoint._handlers.get(event) or (endpoint._message if event == "message" else None)

    async def run(self, handler: Handler, data: Any, group: str | None) -> Any:
        """Call a handler, and return what it returns."""
        endpoint = self._endpoint
        if handler is endpoint._message:
            return await endpoint.on_receive(self._websocket, data)
        arguments = (endpoint, data) if handler.takes_data else (endpoint,)
        if handler.takes_group:
            return await handler.function(*arguments, group=group)
        return await handler.function(*arguments)

    def whisper(self, event: str) -> DeclaredWhisper | None:
        """Return the declared whisper of this name."""
        return self._endpoint._whispers.get(event)

    async def authorize(self, group: str) -> bool:
        """Whether the client may join ``group`` itself."""
        return bool(await self._endpoint.authorize(group))

    async def meta(self, group: str, meta: dict[str, Any]) -> Any:
        """Return the meta that is shown of what the client asks for."""
        return await self._endpoint.on_track(group, meta)

    async def snapshot(self, group: str) -> Any:
        """Return the present content of ``group``, if the host knows it."""
        return await self._endpoint.snapshot(group)

    async def refresh(self, token: str) -> Identity:
        """Return whom a new token names; from now on the WebSocket of the hooks knows it too."""
        identity = await renewed(self._endpoint.scope, self._realtime, token)
        if identity.identity == self._connection.user.identity:
            self._endpoint.scope["user"], self._endpoint.scope["auth"] = identity, credentials(identity)
        return identity

    async def disconnect(self, code: int) -> None:
        """Run ``on_disconnect`` with a WebSocket that knows it is over."""
        self._websocket.client_state = WebSocketState.DISCONNECTED
        await self._endpoint.on_disconnect(self._websocket, code)
