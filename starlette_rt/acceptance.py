"""The function style: a connection for the length of an ``async with``, whose body asks for what the client says.

The law of this file: the body runs in the host's task and reads when it wants to; the connection is served in a
task of ours, and when the peer leaves the body is cancelled at its next await. Whatever ends it, the slot in the
caps is given back and the connection has ended when the block is left.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import msgspec
from starlette.exceptions import WebSocketException
from starlette.types import Message, Receive
from starlette.websockets import WebSocketDisconnect

from .admission import Refusal
from .connection import CONNECTING, Connection
from .dialogue import check_joined
from .events import DeclaredWhisper, Handler
from .exceptions import CloseCode, EventError
from .gate import (
    Denied,
    Terms,
    admission_of,
    admit,
    deny,
    meter_of,
    release,
    renewed,
    spoken,
    take_over,
)
from .identity import Identity
from .limits import RateLimit
from .protocols.plain import Encoding, Plain

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

Authorize = Callable[[str], "bool | Awaitable[bool]"]


class Received(NamedTuple):
    """Something that a client said: the name of its event, the data, and the group it was said to, if any."""

    event: str
    data: Any
    group: str | None


async def unread() -> Message:
    """What they meet in the body of `Realtime.accept`."""
    raise RuntimeError("the connection reads for you; write `async for data in connection`")


class Pull:
    """The script of `Realtime.accept`: each message waits for the body to ask for it.

    ``async for data in connection`` asks for the event ``message`` alone, ``connection.events()`` for all.
    """

    def __init__(
        self,
        host: Any,
        websocket: WebSocket,
        connection: Connection,
        scope: anyio.CancelScope,
        authorize: Authorize | None,
    ) -> None:
        self._host, self._websocket = host, websocket
        self._connection, self._scope, self._authorize = connection, scope, authorize
        self.asked: bool = False
        self._every = False
        self._wanted = anyio.Event()
        self._offer, self._taken = anyio.create_memory_object_stream[Received](0)

    async def connect(self) -> None:
        """Nothing: the body is running already."""

    async def receive(self, raw: str | bytes) -> None:
        """Hand one message of a plain client to the body; the next is decoded when this one has been taken."""
        protocol = self._connection.wire.protocol
        assert isinstance(protocol, Plain)
        data = protocol.decode(raw)
        said = Received("message", data, None)
        if isinstance(data, dict) and isinstance(data.get("event"), str):
            await self._wanted.wait()
            said = self._enveloped(data) if self._every else said
        await self._hand(said)

    def _enveloped(self, data: dict[str, Any]) -> Received:
        group = data.get("group")
        if not isinstance(group, str | None):
            raise EventError("invalid", "Expected `str | null` - at `$.group`")
        if group is not None:
            check_joined(group, self._connection, self._host.hub)
        return Received(data["event"], data.get("data"), group)

    async def _hand(self, said: Received) -> None:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self._offer.send(said)

    # What a client of the protocol v1 asks; see dialogue.Script.

    def find(self, event: str) -> Handler:
        """Every event has a handler: the body."""
        return Handler(event, self._hand, takes_group=True)

    async def run(self, handler: Handler, data: Any, group: str | None) -> None:
        """Hand an event to the body; it is answered when the body has taken it."""
        if handler.name != "message":
            await self._wanted.wait()
            if not self._every:
                raise EventError("unknown_event", f"there is no event {handler.name!r} here")
        await self._hand(Received(handler.name, data, group))

    def whisper(self, event: str) -> DeclaredWhisper | None:
        """A function declares none."""
        return None

    async def authorize(self, group: str) -> bool:
        """Whether the client may join ``group`` itself."""
        if self._authorize is None:
            return False
        answer = self._authorize(group)
        return bool(await answer if inspect.isawaitable(answer) else answer)

    async def meta(self, group: str, meta: Any) -> Any:
        """A function lets nobody track itself."""
        raise EventError("forbidden", "clients do not track themselves here")

    async def snapshot(self, group: str) -> Any:
        """A function has none."""
        return msgspec.UNSET

    async def refresh(self, token: str) -> Identity:
        """Return whom a new token names."""
        return await renewed(self._websocket.scope, self._host, token)

    def left(self) -> None:
        """The peer has left, or the close is done: the body ends at its next await."""
        self._wanted.set()
        self._offer.close()
        self._taken.close()
        self._scope.cancel()

    async def disconnect(self, code: int) -> None:
        """Nothing: the body has ended."""

    def __aiter__(self) -> AsyncIterator[Any]:
        """What the client says; no generator, because a body may break out of it."""
        return self

    async def __anext__(self) -> Any:
        return (await self._next()).data

    async def _next(self) -> Received:
        self.asked = True
        self._wanted.set()
        try:
            return await self._taken.receive()
        except (anyio.ClosedResourceError, anyio.EndOfStream):
            raise StopAsyncIteration from None

    def events(self) -> Events:
        """Ask for every event, whatever its name."""
        self._every = True
        return Events(self._next)


class Events:
    """What a client says, with the names of the events; no generator, because a body may break out of it."""

    def __init__(self, following: Callable[[], Awaitable[Received]]) -> None:
        self._following = following

    def __aiter__(self) -> AsyncIterator[Received]:
        return self

    async def __anext__(self) -> Received:
        return await self._following()


class Acceptance:
    """What `Realtime.accept` returns: an async context manager that yields a `Connection`."""

    def __init__(
        self,
        host: Any,
        websocket: WebSocket,
        identity: Identity | None,
        anonymous: bool | None,
        encoding: Encoding,
        limits: tuple[RateLimit, ...],
        authorize: Authorize | None,
    ) -> None:
        self._host, self._websocket, self._identity = host, websocket, identity
        self._authorize = authorize
        path = getattr(websocket.scope.get("route"), "path", websocket.scope.get("path", ""))
        self._terms = Terms(anonymous, encoding=encoding, meter=meter_of(f"accept:{path}", limits))

    async def __aenter__(self) -> Connection:
        websocket, scope = self._websocket, self._websocket.scope
        if websocket.client_state.value == CONNECTING:
            await websocket.receive()
        accepted = websocket.application_state.value != CONNECTING
        receive, send = websocket._receive, websocket._send
        outcome = await admit(self._host, scope, send, self._terms, self._identity, accepted=accepted)
        if isinstance(outcome, Refusal):
            await deny(scope, receive, send, outcome, self._host, accepted=accepted)
            raise Denied(outcome.message)
        self._connection, self._finished = outcome, anyio.Event()
        take_over(websocket, outcome, send, spoken(admission_of(scope, self._host), self._terms.encoding))
        websocket._receive = unread
        self._scope = anyio.CancelScope()
        if accepted:
            outcome.opened()
        else:
            await self._accept()
        self._scope.__enter__()
        script = Pull(self._host, websocket, outcome, self._scope, self._authorize)
        outcome.messages = script
        outcome.converse(script)  # the body may ask its client something at once
        self._host.tasks.spawn(self._serve, receive, script)
        return outcome

    async def _accept(self) -> None:
        try:
            await self._websocket.accept()
        except BaseException as error:
            self._host.forget(self._connection)
            release(self._websocket.scope, self._connection)
            if isinstance(error, WebSocketDisconnect):
                raise Denied("the peer left before it was accepted") from None
            raise

    async def _serve(self, receive: Receive, script: Pull) -> None:
        try:
            await self._connection.serve(receive, script, script.left)
        finally:
            release(self._websocket.scope, self._connection)
            self._finished.set()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        quiet = bool(self._scope.__exit__(kind, error, trace))
        code, reason = self._ending(None if quiet else error)
        self._connection.begin_close(code, reason)
        with anyio.CancelScope(shield=True):
            await self._finished.wait()
        return quiet or isinstance(error, WebSocketException | WebSocketDisconnect | EventError)

    def _ending(self, error: BaseException | None) -> tuple[int, str]:
        if error is None or isinstance(error, WebSocketDisconnect):
            return CloseCode.NORMAL, ""
        if isinstance(error, WebSocketException):
            return error.code, error.reason
        if isinstance(error, EventError):
            self._connection.refuse(error)
            return CloseCode.FORBIDDEN, error.message
        code = CloseCode.INTERNAL_ERROR if isinstance(error, Exception) else CloseCode.GOING_AWAY
        return code, code.reason
