"""The client's half of a test: ``connect`` an app, say something, see what comes back, in this process.

The law of this file: it is one peer of one WebSocket and knows the app only through it. No wait without a deadline,
and no deadline without a sentence that says what was waited for and what had arrived. It uses anyio alone, so it
runs on asyncio and on trio, and needs no test framework. A refusal and a close are outcomes that a test looks at,
not errors of the package; that is why ``Refused`` and ``Closed`` stand here and not in ``exceptions``.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, Self
from urllib.parse import unquote

import anyio
from anyio.lowlevel import checkpoint
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from starlette_rt.testing.server import Socket, lifespan, running

ROUNDS, TURNS = 3, 8  # how often, and for how many turns each, a loop is watched before it counts as idle
EXCERPT = 80  # characters of a message that a sentence quotes


class Refused(Exception):
    """The app refused the handshake.

    ``status``, ``headers`` and ``body`` are the HTTP response that a client gets. ``code`` is the close code if the
    app closed before it accepted (a client then sees a bare 403 and never the code), else ``None``.
    """

    def __init__(self, path: str, status: int, headers: Headers, body: bytes, code: int | None) -> None:
        super().__init__(path, status, headers, body, code)
        self.path: str = path
        self.status: int = status
        self.headers: Headers = headers
        self.body: bytes = body
        self.code: int | None = code

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    def __str__(self) -> str:
        said = f", saying {_excerpt(self.body)}" if self.body else ""
        return f"{self.path} was refused with {self.status}{said}"


class Closed(Exception):
    """The connection is over, by whichever side; ``code`` and ``reason`` say how.

    1006 is a line that dropped: the app ended without a close, as it does by raising.
    """

    def __init__(self, path: str, code: int, reason: str) -> None:
        super().__init__(path, code, reason)
        self.path: str = path
        self.code: int = code
        self.reason: str = reason

    def __str__(self) -> str:
        return f"{self.path} is closed: {self.code} {self.reason}".rstrip()


class Client:
    """One connected peer, made by ``connect``.

    ``subprotocol`` and ``headers`` are what the app accepted with. Each waiting method raises ``TimeoutError`` after
    the ``timeout`` given to ``connect``, and ``Closed`` where a closed connection makes waiting pointless. Messages
    that arrived before a close can still be received after it.
    """

    def __init__(self, socket: Socket, path: str, timeout: float) -> None:
        self.subprotocol: str | None = socket.subprotocol
        self.headers: Headers = Headers(raw=socket.headers)
        self._socket = socket
        self._path = path
        self._timeout = timeout
        self._received = 0

    @property
    def close_code(self) -> int | None:
        """The code the connection was closed with, by either side; ``None`` while it is open."""
        return self._socket.code

    @property
    def close_reason(self) -> str | None:
        """The reason that came with the code, perhaps empty; ``None`` while the connection is open."""
        return None if self.close_code is None else self._socket.reason

    @property
    def pending(self) -> tuple[str | bytes, ...]:
        """What has arrived and was not received yet, oldest first."""
        return tuple(self._socket.outbound.messages)

    async def send(self, data: str | bytes) -> None:
        """Send a text or a binary message; waits while the app leaves four megabytes unread."""
        socket = self._socket
        await self._until(lambda: self._over or not socket.inbound.full, "the app to read")
        self._raise_if_closed()
        socket.put(data)
        await checkpoint()

    async def send_json(self, data: Any) -> None:
        """Send ``data`` as JSON in a text message."""
        await self.send(json.dumps(data, separators=(",", ":"), ensure_ascii=False))

    async def receive(self) -> str | bytes:
        """The next message, as it was sent: ``str`` for text, ``bytes`` for binary."""
        await self._until(lambda: self._ready, "a message")
        return self._take()

    async def receive_json(self) -> Any:
        """The next message, text or binary, read as JSON."""
        return json.loads(await self.receive())

    def receive_nowait(self) -> str | bytes:
        """The next message if it has arrived already, else ``anyio.WouldBlock``."""
        if not self._ready:
            raise anyio.WouldBlock
        return self._take()

    async def silent(self) -> None:
        """Let the loop go idle, then raise ``AssertionError`` if a message is pending or the app has closed.

        Idle means that all other tasks are blocked and no callback is due. What a timer, a thread or the network
        will bring later does not count.
        """
        with anyio.move_on_after(self._timeout) as deadline:
            await _idle()
        if deadline.cancelled_caught:
            raise TimeoutError(self._sentence("the loop to go idle"))
        if self.pending:
            raise AssertionError(f"expected silence on {self._path}, but {self._arrived()}")
        if self._socket.phase in ("closed", "dropped"):
            raise AssertionError(f"expected silence, but {Closed(self._path, *self._ending())}")

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Leave; the app gets a disconnect with this code. 1006 is a line that dropped. Harmless once closed."""
        self._socket.leave(code, reason)
        await checkpoint()

    async def closed(self) -> int:
        """Wait until the connection is over, and return its code; unread messages stay pending."""
        await self._until(lambda: self._over, "the connection to close")
        return self._ending()[0]

    def stall(self) -> None:
        """Stop reading, like a peer behind a full transport: the app's next ``send()`` waits."""
        self._socket.stall(True)

    def resume(self) -> None:
        """Read again; the app's waiting ``send()`` goes on."""
        self._socket.stall(False)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str | bytes:
        """The next message; the iteration ends when the connection is over, whatever the code."""
        try:
            return await self.receive()
        except Closed:
            raise StopAsyncIteration from None

    @property
    def _ready(self) -> bool:
        """Whether receiving has an outcome now: a message or the end."""
        return bool(self._socket.outbound.messages) or self._over

    @property
    def _over(self) -> bool:
        return self._socket.phase != "open"

    def _ending(self) -> tuple[int, str]:
        return self._socket.code or 1006, self._socket.reason

    def _raise_if_closed(self) -> None:
        if self._over:
            raise Closed(self._path, *self._ending())

    def _take(self) -> str | bytes:
        if not self._socket.outbound.messages:
            self._raise_if_closed()
        self._received += 1
        return self._socket.take()

    async def _until(self, ready: Callable[[], bool], what: str) -> None:
        await self._socket.bell.within(self._timeout, ready, lambda: self._sentence(what))

    def _sentence(self, what: str) -> str:
        return f"waited {self._timeout} s on {self._path} for {what}; {self._received} received, {self._arrived()}"

    def _arrived(self) -> str:
        count = len(self._socket.outbound.messages)
        return f"{count} pending, the first {_excerpt(self.pending[0])}" if count else "nothing pending"


@asynccontextmanager
async def connect(
    app: ASGIApp,
    path: str,
    *,
    token: str | None = None,
    carrier: Literal["header", "subprotocol"] = "header",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    cookies: Mapping[str, str] | None = None,
    origin: str | None = None,
    subprotocols: Sequence[str] = (),
    client: tuple[str, int] = ("127.0.0.1", 50000),
    timeout: float = 5.0,
    scheme: Literal["ws", "wss"] = "ws",
    denial: bool = True,
) -> AsyncIterator[Client]:
    """Open a WebSocket to ``app`` in this process, on the running loop.

    As many as you like live on one loop, and they can hear each other. The app's lifespan is started by the first
    of them and shared by the rest (see ``lifespan``). At the end of the block the client leaves with 1000 and waits
    for the app to end.

    :param path: path and query, as in ``"/ws?ticket=…"``; the host is ``testserver`` unless ``headers`` names one
    :param token: travels as ``Authorization: Bearer …``, or with ``carrier="subprotocol"`` as ``rt.token.…``
    :param origin: the ``Origin`` header that a browser sends; same-origin is ``http://testserver``
    :param client: the address the app sees, for limits per IP
    :param timeout: seconds that each single wait may take
    :param denial: whether the server can answer a refusal with an HTTP response, as most can
    :raises Refused: the app refused the handshake
    :raises TimeoutError: the app neither accepted nor refused, or did not end after the client had left
    :raises Exception: what the app raised, as it would stand in the server's log; a ``WebSocketDisconnect`` that an
        endpoint let escape is one of them
    """
    offered = [*subprotocols, *([f"rt.token.{token}"] if token is not None and carrier == "subprotocol" else [])]
    said = _headers(headers, cookies, origin, token if carrier == "header" else None, offered)
    async with lifespan(app, timeout=timeout) as state:
        socket = Socket(_scope(path, said, offered, client, scheme, denial, state))
        name = str(socket.scope["path"])  # without the query: a ticket is nobody's business
        async with running(app, socket, f"the app's call for {name}", timeout):
            await _handshake(socket, name, timeout)
            yield Client(socket, name, timeout)


async def _handshake(socket: Socket, path: str, timeout: float) -> None:
    sentence = f"waited {timeout} s for the app to accept or refuse {path}; the connection is still "
    undecided = ("connecting", "denying")
    await socket.bell.within(timeout, lambda: socket.phase not in undecided, lambda: sentence + socket.phase)
    if socket.phase == "unanswered":
        raise socket.error or RuntimeError(f"the app ended before it accepted or refused {path}")
    if socket.status is not None:
        raise Refused(path, socket.status, Headers(raw=socket.headers), socket.body, socket.code)


def _scope(
    path: str,
    headers: list[tuple[bytes, bytes]],
    subprotocols: list[str],
    client: tuple[str, int],
    scheme: str,
    denial: bool,
    state: dict[str, Any],
) -> Scope:
    raw_path, _, query = path.partition("?")
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": scheme,
        "server": ("testserver", 443 if scheme == "wss" else 80),
        "client": client,
        "root_path": "",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode("ascii"),
        "query_string": query.encode("ascii"),
        "headers": headers,
        "subprotocols": subprotocols,
        "state": state.copy(),
        "extensions": {"websocket.http.response": {}} if denial else {},
    }


def _headers(
    given: Mapping[str, str] | Sequence[tuple[str, str]],
    cookies: Mapping[str, str] | None,
    origin: str | None,
    bearer: str | None,
    subprotocols: list[str],
) -> list[tuple[bytes, bytes]]:
    """The headers of the handshake as a server hands them on: lower case, latin-1; the given ones come last and win."""
    own = {
        "host": "testserver",
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",  # the sample of RFC 6455 §1.3
        "sec-websocket-protocol": ", ".join(subprotocols) or None,
        "origin": origin,
        "authorization": None if bearer is None else f"Bearer {bearer}",
        "cookie": "; ".join(f"{name}={value}" for name, value in (cookies or {}).items()) or None,
    }
    theirs = [(name.lower(), value) for name, value in (given.items() if isinstance(given, Mapping) else given)]
    overridden = {name for name, _ in theirs}
    ours = [(name, value) for name, value in own.items() if value is not None and name not in overridden]
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in ours + theirs]


async def _idle() -> None:
    """Return when nothing is left to run. Callbacks belong to no task, so the loop also gets turns of its own."""
    for _ in range(ROUNDS):
        for _ in range(TURNS):
            await checkpoint()
        await anyio.wait_all_tasks_blocked()


def _excerpt(data: str | bytes) -> str:
    shown = repr(data[:EXCERPT])
    return shown if len(data) <= EXCERPT else f"{shown}… ({len(data)} long)"
