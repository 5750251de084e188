"""The server's half of a test: an app's lifespan, and the server's end of one WebSocket, in this process.

The law of this file: it speaks ASGI to an app as uvicorn does (websocket 2.4, lifespan 2.0) on whatever loop the
test runs on, and knows neither tokens nor what a message means. Every buffer has a bound, every wait a deadline
that is the caller's argument. Where a server would hang or only write an error into its log (an illegal message, a
``receive()`` after the disconnect), this one raises, so that a test fails where the fault is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import RunVar
from starlette.types import ASGIApp, Message, Scope

CAPACITY = 4 * 1024 * 1024  # bytes on the way, each direction; the socket buffers under uvicorn held 3.8 MiB
FRAME = 8  # bytes that a message costs beside its payload, so that empty ones are bounded too
REASON = 123  # bytes of UTF-8 that fit into a Close frame, RFC 6455 §5.5


Phase = Literal["connecting", "denying", "refused", "open", "closed", "left", "dropped", "unanswered"]


class PeerGone(OSError):
    """The peer has left: what ``send()`` raises to the app, as uvicorn raises ``ClientDisconnected``."""


class Bell:
    """Wakes all who wait for news; costs nothing while nobody does."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def ring(self) -> None:
        """Let everyone who waits look again."""
        event, self._event = self._event, None
        if event is not None:
            event.set()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Return as soon as ``ready()`` is true; it is asked again after each ring."""
        while not ready():
            if self._event is None:
                self._event = anyio.Event()
            await self._event.wait()

    async def within(self, timeout: float, ready: Callable[[], bool], sentence: Callable[[], str]) -> None:
        """Like ``until``, for at most ``timeout`` seconds; then raise ``TimeoutError(sentence())``."""
        if not ready():  # the scope costs more than the look
            with anyio.move_on_after(timeout):
                await self.until(ready)
            if not ready():
                raise TimeoutError(sentence())


class Buffer:
    """The payloads on their way in one direction, oldest first."""

    def __init__(self) -> None:
        self.messages: deque[str | bytes] = deque()
        self._size = 0

    @property
    def full(self) -> bool:
        """Whether the writer has to wait for the reader."""
        return self._size >= CAPACITY

    def put(self, data: str | bytes) -> None:
        """Add one payload; the caller has looked at ``full``."""
        self.messages.append(data)
        self._size += len(data) + FRAME

    def take(self) -> str | bytes:
        """Remove and return the oldest payload."""
        data = self.messages.popleft()
        self._size -= len(data) + FRAME
        return data


class Call(ABC):
    """One call of an app: its scope, its two channels, and how it ended."""

    def __init__(self, scope: Scope) -> None:
        self.scope: Scope = scope
        self.bell: Bell = Bell()
        self.ended: bool = False
        self.error: Exception | None = None

    @abstractmethod
    async def receive(self) -> Message:
        """What the app awaits."""

    @abstractmethod
    async def send(self, message: Message) -> None:
        """What the app sends with."""

    @abstractmethod
    def bid_farewell(self) -> None:
        """Tell the app that it is time to end; harmless when it knows."""

    async def run(self, app: ASGIApp) -> None:
        """Call the app to its end and keep what it raised; news of a lost peer is no failure, as on uvicorn."""
        try:
            await app(self.scope, self.receive, self.send)
        except PeerGone:
            pass
        except Exception as error:
            self.error = error
        finally:
            self.ended = True
            self.bell.ring()  # who waits looks again after this turn, when the subclass has drawn its conclusions


@asynccontextmanager
async def task_group() -> AsyncIterator[TaskGroup]:
    """A task group out of which a single failure comes as itself and not wrapped."""
    lone: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        lone, *others = group.exceptions
        if others:
            raise
    if lone is not None:  # outside the except clause: the failure keeps the context it came with
        raise lone


@asynccontextmanager
async def running(app: ASGIApp, call: Call, name: str, timeout: float) -> AsyncIterator[None]:
    """Run one call of the app beside the body; afterwards bid it farewell and wait for its end.

    The app is shielded: a body that fails or is cancelled reaches it as a farewell, as on a server. Raises what the
    app raised (what the body raised becomes its context), or ``TimeoutError`` once an app that had not ended after
    ``timeout`` seconds has been cancelled.
    """
    shield = anyio.CancelScope(shield=True)

    async def run() -> None:
        with shield:
            await call.run(app)

    async with task_group() as tasks:
        tasks.start_soon(run)
        try:
            yield
        finally:
            await _see_out(call, shield, name, timeout)


async def _see_out(call: Call, shield: anyio.CancelScope, name: str, timeout: float) -> None:
    call.bid_farewell()
    with anyio.move_on_after(timeout, shield=True):
        await call.bell.until(lambda: call.ended)
    shield.cancel()
    if call.error is not None:
        raise call.error
    if not call.ended:
        raise TimeoutError(f"{name} had not ended {timeout} s after it was told to; it has been cancelled")


class Socket(Call):
    """The server's end of one WebSocket: the app's two channels, and what the peer sees of them.

    ``phase`` is one of connecting, denying (the app is sending an HTTP response), refused, open, closed (by the
    app), left (by the peer), dropped (the app ended without a close) and unanswered (it ended without accepting or
    refusing). ``stalled`` makes the app's ``send()`` wait, as a transport does whose buffers are full. The peer waits
    at ``bell``, the app at a bell of its own: it idles in ``receive()`` and must not wake for each message it sent.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope)
        self.phase: Phase = "connecting"
        self.stalled: bool = False
        self.news: Bell = Bell()
        self.inbound: Buffer = Buffer()
        self.outbound: Buffer = Buffer()
        self.subprotocol: str | None = None
        self.headers: list[tuple[bytes, bytes]] = []
        self.status: int | None = None
        self.body: bytes = b""
        self.code: int | None = None
        self.reason: str = ""
        self._introduced = False
        self._disconnect: Message | None = None
        self._told = False

    async def run(self, app: ASGIApp) -> None:
        """Call the app; if it ends without a word to the peer, the peer sees the line drop (1006)."""
        await super().run(app)
        if self.phase == "open":
            self.phase, self.code = "dropped", 1006
        elif self.phase in ("connecting", "denying"):
            self.phase = "unanswered"

    async def receive(self) -> Message:
        """The connect, what the peer sent, and one disconnect."""
        if not self._introduced:
            self._introduced = True
            return {"type": "websocket.connect"}
        await self.news.until(lambda: bool(self.inbound.messages) or self._disconnect is not None)
        if self.inbound.messages:
            data = self.inbound.take()
            self.bell.ring()
            return {"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data}
        if self._told or self._disconnect is None:
            raise RuntimeError("receive() was called again after websocket.disconnect; servers hang there for ever")
        self._told = True
        return self._disconnect

    async def send(self, message: Message) -> None:
        """Do what the app says; wait while the peer is stalled or has four megabytes unread."""
        await self.news.until(lambda: self._gone or not (self.stalled or self.outbound.full))
        if self._gone:
            raise PeerGone("the peer has left")
        match self.phase, message["type"]:
            case "connecting", "websocket.accept":
                self._accept(message)
            case "connecting", "websocket.close":
                self.code, self.status = message.get("code", 1000), 403
                self._refuse()
            case "connecting", "websocket.http.response.start" if "websocket.http.response" in self.scope["extensions"]:
                self.phase, self.status, self.headers = "denying", message["status"], list(message.get("headers", ()))
            case "denying", "websocket.http.response.body":
                self.body += message.get("body", b"")
                if not message.get("more_body", False):
                    self._refuse()
            case "open", "websocket.send":
                self.outbound.put(payload(message))
            case "open", "websocket.close":
                self._close(message.get("code", 1000), message.get("reason") or "")
            case _:
                raise RuntimeError(f"the app sent {message['type']!r} while the connection was {self.phase}")
        self.bell.ring()

    @property
    def _gone(self) -> bool:
        return self.phase in ("left", "refused")

    def _accept(self, message: Message) -> None:
        chosen = message.get("subprotocol")
        if chosen is not None and chosen not in self.scope["subprotocols"]:
            raise RuntimeError(f"the app chose the subprotocol {chosen!r}, which the peer did not offer")
        self.phase, self.subprotocol, self.headers = "open", chosen, list(message.get("headers", ()))

    def _refuse(self) -> None:
        self.phase = "refused"
        self._disconnect = {"type": "websocket.disconnect", "code": 1006}
        self.news.ring()

    def _close(self, code: int, reason: str) -> None:
        if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
            raise ValueError(f"the close code {code} may not be sent")
        if len(reason.encode()) > REASON:
            raise ValueError(f"the close reason {reason!r} is longer than {REASON} bytes")
        self.phase = "closed"
        self._part(code, reason)

    def put(self, data: str | bytes) -> None:
        """The peer sends; it has looked whether ``inbound`` is full."""
        self.inbound.put(data)
        self.news.ring()

    def take(self) -> str | bytes:
        """The peer reads the oldest message; an app that waits for room may go on."""
        crowded = self.outbound.full
        data = self.outbound.take()
        if crowded:
            self.news.ring()
        return data

    def stall(self, stalled: bool) -> None:
        """The peer stops reading, or reads again."""
        self.stalled = stalled
        self.news.ring()

    def leave(self, code: int, reason: str) -> None:
        """The peer goes; what it sent before is still read. Nothing happens if the connection is over already."""
        if self.phase in ("connecting", "denying", "open"):
            self.phase = "left"
            self._part(code, reason)
            self.bell.ring()

    def _part(self, code: int, reason: str) -> None:
        self.code, self.reason = code, reason
        self._disconnect = {"type": "websocket.disconnect", "code": code, "reason": reason}
        self.news.ring()

    def bid_farewell(self) -> None:
        """The test is over: a connection closes normally, an unfinished handshake drops."""
        self.leave(1000 if self.phase == "open" else 1006, "")


def payload(message: Message) -> str | bytes:
    """What a ``websocket.send`` carries. Raises ``TypeError`` unless it is text or bytes."""
    binary, text = message.get("bytes"), message.get("text")
    if binary is not None:
        return memoryview(binary).tobytes()
    if isinstance(text, str):
        return text
    raise TypeError(f"websocket.send carries text (str) or bytes, not {type(text).__name__}")


class Span(Call):
    """One run of an app's lifespan, shared by all who are connected to the app on this loop.

    ``phase`` is one of starting, running, stopped, failed and unsupported (the app knows no lifespan, which is
    allowed).
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        super().__init__({"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state})
        self.phase: Literal["starting", "running", "stopped", "failed", "unsupported"] = "starting"
        self.guests = 0
        self._introduced = False
        self._leaving = False

    async def run(self, app: ASGIApp) -> None:
        """Call the app; one that ends before it started knows no lifespan."""
        await super().run(app)
        if self.phase == "starting":
            self.phase, self.error = "unsupported", None

    async def receive(self) -> Message:
        """The startup at once, the shutdown when it is time."""
        if not self._introduced:
            self._introduced = True
            return {"type": "lifespan.startup"}
        await self.bell.until(lambda: self._leaving)
        return {"type": "lifespan.shutdown"}

    async def send(self, message: Message) -> None:
        """Take the app's word that it has started or stopped."""
        match self.phase, message["type"]:
            case "starting", "lifespan.startup.complete":
                self.phase = "running"
            case "running", "lifespan.shutdown.complete":
                self.phase = "stopped"
            case ("starting", "lifespan.startup.failed" as kind) | ("running", "lifespan.shutdown.failed" as kind):
                self.phase = "failed"
                self.error: Exception | None = RuntimeError(message.get("message") or f"the app sent {kind}")
            case _:
                raise RuntimeError(f"the app sent {message['type']!r} while its lifespan was {self.phase}")
        self.bell.ring()

    def bid_farewell(self) -> None:
        """Ask the app to shut down."""
        self._leaving = True
        self.bell.ring()

    async def started(self, timeout: float) -> None:
        """Wait for the startup. Raises what the app says about a failed one, or ``TimeoutError``."""
        sentence = f"waited {timeout} s for the app's lifespan to start; it has neither started nor failed"
        await self.bell.within(timeout, lambda: self.phase != "starting", lambda: sentence)
        if self.phase == "failed" and self.error is not None:
            raise self.error

    async def left(self, timeout: float) -> None:
        """Wait until the last guest has gone, also when cancelled. Raises ``TimeoutError``."""
        with anyio.CancelScope(shield=True):
            await self.bell.within(timeout, lambda: not self.guests, self._overstayed)

    def _overstayed(self) -> str:
        return (
            f"waited for {self.guests} other connections to leave the lifespan that this one started; "
            "open `async with lifespan(app):` around all of them"
        )


_spans: RunVar[dict[int, Span]] = RunVar("starlette_rt.testing.spans")


@asynccontextmanager
async def lifespan(app: ASGIApp, *, timeout: float = 5.0) -> AsyncIterator[dict[str, Any]]:
    """Keep the app's lifespan running for the length of an ``async with`` block; yields the state it filled.

    ``connect`` does this by itself. Use it where an app is to stay up between several connects, or without any.
    Whoever comes first on this loop starts the lifespan, the others share it; the first waits at its end until they
    have gone, for at most ``timeout`` seconds. An app that knows no lifespan is welcome.

    :raises Exception: what the app raised at startup or shutdown; ``RuntimeError`` with its message if it only said so
    :raises TimeoutError: the app did not start or end within ``timeout`` seconds, or guests stayed too long
    """
    spans = _spans_of_this_loop()
    span = spans.get(id(app))  # an id is unique here: whoever hosts the span holds the app
    async with _hosted(app, spans, timeout) if span is None else _visited(span, timeout) as state:
        yield state


def _spans_of_this_loop() -> dict[int, Span]:
    try:
        return _spans.get()
    except LookupError:
        _spans.set({})
        return _spans.get()


@asynccontextmanager
async def _hosted(app: ASGIApp, spans: dict[int, Span], timeout: float) -> AsyncIterator[dict[str, Any]]:
    span = spans[id(app)] = Span()
    async with running(app, span, "the app's lifespan", timeout):
        try:
            await span.started(timeout)
            yield span.state
        finally:
            try:
                await span.left(timeout)
            finally:
                del spans[id(app)]


@asynccontextmanager
async def _visited(span: Span, timeout: float) -> AsyncIterator[dict[str, Any]]:
    span.guests += 1
    try:
        await span.started(timeout)
        yield span.state
    finally:
        span.guests -= 1
        span.bell.ring()
