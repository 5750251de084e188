"""The shared-frame path on uvicorn: ``uvicorn app:app --ws starlette_rt.uvicorn:RealtimeWebSocketProtocol``.

The law of this file: it is uvicorn's own WebSocket protocol plus the write seam, and knows nothing of what is
above it. A socket that nobody attaches to behaves as on plain uvicorn, but that each message is compressed
alone, and for the tracebacks that a peer's garbage leaves there. Whatever it uses of uvicorn stands in
`RELIES_ON` and is checked at import; where something is missing the class steps aside. Its timers are those of
the server's loop, as uvicorn's are.
"""

from __future__ import annotations

import logging
from asyncio import AbstractEventLoop, Future, Queue, Task, TimerHandle, Transport, shield
from collections import deque
from collections.abc import Mapping, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from .protocols.framing import DEFLATED, FRAMED, LOST, WINDOW, beyond, whole
from .seams import SEAM_EXTENSION

try:
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
    from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
    from websockets.frames import Frame
    from websockets.protocol import State
except ImportError as _error:
    raise ImportError(
        f'starlette_rt.uvicorn needs a recent uvicorn and websockets: pip install "uvicorn[standard]" ({_error})'
    ) from _error

if TYPE_CHECKING:
    from .seams import Carrier, Listener

logger: logging.Logger = logging.getLogger(__name__)

try:
    from websockets.speedups import apply_mask
except ImportError:  # websockets was built without its C extension
    from websockets.utils import apply_mask

C = TypeVar("C", bound=type)

FITS = "0.52.1 to 0.54"  # the versions of uvicorn that this file has been tested with

# Method of uvicorn's class -> what its code must mention for this file to be right: attributes that we read or
# set, and the methods of ours that it must call.
RELIES_ON: Mapping[str, str] = {
    "__init__": "loop conn queue writable transport handshake_complete close_sent close_timer close_timeout"
    " disconnected read_paused frames curr_msg_data_type handshake_initiated",
    "connection_lost": "disconnected",
    "data_received": "conn receive_data handle_parser_exception handle_events",
    "eof_received": "",
    "handle_close": "close_sent close_timer",
    "handle_connect": "request response scope run_asgi on_task_complete",
    "handle_events": "handle_close",
    "handle_parser_exception": "",
    "handle_text": "send_receive_event_to_app",
    "keepalive_timeout": "",
    "on_task_complete": "",
    "pause_writing": "writable clear",
    "receive": "queue get empty",
    "resume_writing": "writable set",
    "run_asgi": "close_timer",
    "send": "writable wait disconnected close_sent start_keepalive",
    "send_keepalive_ping": "keepalive_timeout",
    "send_receive_event_to_app": "frames curr_msg_data_type close_sent queue",
    "shutdown": "close_sent close_timer",
    "start_keepalive": "",
}
ADDS = ("abort", "attach", "carrier", "close", "deafen", "ready", "write")


def misfits(base: type, relies_on: Mapping[str, str] = RELIES_ON) -> list[str]:
    """Return what ``base`` lacks of ``relies_on``, and what it has that this file means to add."""
    found = []
    for method, names in relies_on.items():
        code = getattr(getattr(base, method, None), "__code__", None)
        if code is None:
            found.append(f"no {method}()")
        else:
            found += [f"no {name} in {method}()" for name in names.split() if name not in code.co_names]
    return found + [f"a {name} of its own" for name in ADDS if hasattr(base, name)]


def fitted(ours: C) -> C:
    """Return ``ours``, or the class it is built on and a WARNING where the two do not fit."""
    base = ours.__mro__[1]
    if not (found := misfits(base)):
        return ours
    logger.warning(
        "this uvicorn's %s does not fit starlette_rt %s (%s); uvicorn %s do. "
        "It is used as it is, and messages go through send(): correct, but not shared.",
        base.__name__,
        ours.__name__,
        ", ".join(found),
        FITS,
    )
    return cast("C", base)


@fitted
class RealtimeWebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol as a `Seam`: framed bytes go to the transport, shared by every peer.

    It puts itself into ``scope["extensions"]`` under `SEAM_EXTENSION`. The handshake (accept and denial)
    stays ASGI's. ``close_timeout`` (uvicorn's, 10 s) is what the peer of an attached connection has to end
    it after a Close frame or an end of stream; then the transport is aborted, whatever is still buffered.
    """

    __slots__ = (
        "_deadline",
        "_fragmented",
        "_listener",
        "_open",
        "_pipe",
        "_shutting_down",
        "_to_come",
        "_unpaused",
        "carrier",
    )

    _pipe: Transport  # the transport, once more
    shutdown_timeout: ClassVar[float] = 5.0  # seconds from the server's shutdown to the abort

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for offered in self.conn.available_extensions or ():
            if isinstance(offered, ServerPerMessageDeflateFactory):
                offered.server_no_context_takeover = True  # else no compressed frame could be shared
        self.carrier: Carrier = FRAMED
        self._listener: Listener | None = None
        self._unpaused = True
        self._open = False  # data may be written: from the accept to whatever closes
        self._shutting_down = False
        self._deadline: TimerHandle | None = None
        self._to_come = LOST  # bytes of a frame whose beginning has arrived
        self._fragmented = False

    # What the connection calls.

    def attach(self, listener: Listener) -> None:
        """Report to ``listener`` from now on; at once, if the transport is paused already.

        What comes is read by one task from now on, so that a lighter queue will do.
        """
        self._listener = listener
        if not self._unpaused:
            listener.on_pause()
        elif not isinstance(self.queue, Arrivals):
            self.queue: Any = Arrivals(self.loop, self.queue)
            self.writable: Any = Writable(self.loop)

    def ready(self) -> bool:
        """Whether `write` would take something: not while paused, not unless open, not while closing.

        The transport is asked each time, because a failed write changes it without a call. What closes the
        WebSocket passes through a method of ours, so that it need not be asked.
        """
        return self._unpaused and self._open and not self._pipe.is_closing()

    def write(self, payload: bytes) -> bool:
        """Hand framed bytes to the transport; false, and nothing is taken, where it is not `ready`.

        It is called for every receiver of every broadcast, with all that it reads gone from the processor's caches:
        what it needs stands in slots, side by side.
        """
        if self._unpaused and self._open and not (pipe := self._pipe).is_closing():
            pipe.write(payload)
            return True
        return False

    def close(self, code: int, reason: str) -> None:
        """Send the Close frame, also while paused; nothing unless open. What ``websocket.close`` does, at once.

        Whoever still uses ASGI's ``send()`` afterwards gets uvicorn's ``ClientDisconnected``. Raises
        websockets' ``ProtocolError``, before any effect, for a code that may not be sent or a reason of more
        than 123 bytes.
        """
        if self.conn.state is not State.OPEN or self.transport.is_closing():
            return
        self.conn.send_close(code, reason)
        self._open = False
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = self.disconnected = True
        if self._shutting_down:
            self.transport.close()
        else:
            self._await_echo()

    def deafen(self) -> None:
        """Read nothing more from the peer, not even its Close."""
        if not self.transport.is_closing():
            self.read_paused = False  # nobody is to resume it
            self.transport.pause_reading()

    def abort(self) -> None:
        """Drop the transport at once; what was not sent is lost."""
        self.transport.abort()

    # What the transport and the server say.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unpaused = False
        if self._listener is not None:
            self._listener.on_pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unpaused = True
        if self._listener is not None:
            self._listener.on_resume()

    def shutdown(self) -> None:
        """Let the listener finish and ``close()``, for ``shutdown_timeout`` at most; without one, as uvicorn does."""
        state = self.conn.state
        if self._listener is not None and state is State.OPEN and not self._shutting_down:
            self._shutting_down = True
            self._listener.on_closing(1012)
            return self._end_within(self.shutdown_timeout)
        self._open = False
        if state is State.OPEN or (state is State.CONNECTING and self.handshake_initiated) or self.close_sent:
            super().shutdown()
        else:
            # The peer's Close was answered, or its handshake never came to an end: uvicorn would speak, and raise.
            self.transport.close()
        self._end_within(self.shutdown_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end: no timer and no listener remains. A lost transport holds nobody back, so a pause ends here."""
        super().connection_lost(exc)
        if self._deadline is not None:
            self._deadline.cancel()
        listener, self._listener = self._listener, None
        if listener is not None and not self._unpaused:
            listener.on_resume()
        self._unpaused = False

    # What uvicorn does, and what is to be added to it.

    def start_keepalive(self) -> None:
        """The handshake is accepted: data may follow, and nobody asks for its headers any more, but in the scope."""
        self._open, self._pipe = True, self.transport
        self.request: Any = None
        self.response: Any = None
        if self._to_come == 0:  # so the parser has nothing in hand, but holds the request as long as it lives
            self.conn.parser = self.conn.parse()
            next(self.conn.parser)
        super().start_keepalive()

    def send(self, message: Any) -> CoroutineType[Any, Any, None]:
        """Take an ASGI close for the end, as soon as it is said; the rest is uvicorn's."""
        if message["type"] == "websocket.close":
            self._open = False
        return cast("CoroutineType[Any, Any, None]", super().send(message))

    def run_asgi(self) -> CoroutineType[Any, Any, None]:
        """Enter the scope here and not after ``handle_connect``: an eager task would already have read it."""
        self.carrier = carrier_for(self.conn.extensions)
        scope: Any = self.scope
        scope["extensions"][SEAM_EXTENSION] = self
        return cast("CoroutineType[Any, Any, None]", super().run_asgi())

    def data_received(self, data: bytes) -> None:
        """Hand whole short messages to the listener; everything else is parsed, checked and answered by websockets.

        Its parser takes a dozen calls for a frame. To pass it by, we must know where frames begin: from the handshake
        on each chunk is looked over, and if a head is cut, or something came before the accept, never again.
        """
        if self.conn.state is State.CONNECTING:
            early = self.handshake_initiated
            super().data_received(data)
            self._to_come = 0 if not early and data.endswith(b"\r\n\r\n") else LOST
            return
        at = 0
        if self._to_come == 0 and not self._fragmented and self._listener is not None and not self.conn.extensions:
            if (at := self._take_whole(data, self._listener)) == len(data):
                return
            data = data[at:]
        if self._to_come != LOST:
            self._look_over(data)
        super().data_received(data)

    def _take_whole(self, data: bytes, listener: Listener) -> int:
        """Hand over as many messages as can be; return where the rest begins."""
        at, most = 0, self.config.ws_max_size
        while (
            self.conn.state is State.OPEN
            and not self.close_sent
            and self.queue.empty()
            and (found := whole(data, at, apply_mask, most)) is not None
            and listener.on_message(found[0])
        ):
            at = found[1]
        return at

    def _look_over(self, data: bytes) -> None:
        if self._to_come >= len(data):
            self._to_come -= len(data)
        else:
            self._to_come, self._fragmented = beyond(data, self._to_come, self._fragmented)

    def send_receive_event_to_app(self) -> None:
        """Hand a message to the listener, if it is its turn and wants it; else to the queue, as uvicorn does.

        Close with 1007 what is no UTF-8, where uvicorn logs a traceback; nothing if it is closing anyway.
        """
        if self.curr_msg_data_type == "bytes" or _is_text(self.frames):
            if self._listener is None or self.close_sent or not self.queue.empty():
                return super().send_receive_event_to_app()
            data = b"".join(self.frames)
            if not self._listener.on_message(data.decode() if self.curr_msg_data_type == "text" else data):
                return super().send_receive_event_to_app()
            self.frames = []
            return
        self.frames: list[bytes] = []
        if self.conn.state is State.OPEN:
            self.conn.send_close(1007)
            self.handle_parser_exception()
        elif self.conn.state is State.CONNECTING:
            self.handle_parser_exception()

    def handle_parser_exception(self) -> None:
        self._open = False
        if self.conn.state is State.CONNECTING:
            self._drop_handshake()  # uvicorn asserts that there is a Close frame to send
        else:
            super().handle_parser_exception()
        self._end_within(self.close_timeout)

    def handle_close(self, event: Frame) -> None:
        self._open = False
        if self.conn.state is State.CONNECTING:
            self._drop_handshake()
        else:
            super().handle_close(event)
        self._end_within(self.close_timeout)

    def eof_received(self) -> None:
        super().eof_received()
        self._end_within(self.close_timeout)

    def keepalive_timeout(self) -> None:
        self._open = False
        super().keepalive_timeout()
        self._end_within(self.close_timeout)

    def on_task_complete(self, task: Task[None]) -> None:
        super().on_task_complete(task)
        scope: Any = self.scope
        scope["extensions"].pop(SEAM_EXTENSION, None)  # else this object would hold itself
        self._end_within(self.close_timeout)

    def _drop_handshake(self) -> None:
        """The peer spoke before it was accepted, and wrongly: there is no WebSocket to close, only a socket."""
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})
        self.handshake_complete = True
        self.disconnected: bool = True
        self.transport.close()

    def _await_echo(self) -> None:
        """Read on until the peer's Close arrives, for ``close_timeout`` at most."""
        if self.read_paused:
            self.read_paused: bool = False
            self.transport.resume_reading()
        self.close_timer: TimerHandle | None = self.loop.call_later(self.close_timeout, self.transport.abort)

    def _end_within(self, seconds: float) -> None:
        """Bound the end of an attached connection: ``transport.close()`` alone waits forever for a peer to read."""
        if self._listener is not None and self._deadline is None:
            self._deadline = self.loop.call_later(seconds, self.transport.abort)


class Arrivals:
    """A queue of events for one reader that holds nothing while it is empty; asyncio's has four deques of 760 bytes."""

    __slots__ = ("_events", "_loop", "_reader")

    def __init__(self, loop: AbstractEventLoop, before: Queue[Any]) -> None:
        self._loop = loop
        self._events: deque[Any] | None = None
        self._reader: Future[None] | None = None
        while not before.empty():
            self.put_nowait(before.get_nowait())

    def empty(self) -> bool:
        return self._events is None

    def put_nowait(self, event: Any) -> None:
        if self._events is None:
            self._events = deque()
        self._events.append(event)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def get(self) -> Any:
        """Return the next event, when there is one. Raises `RuntimeError` if somebody waits for it already."""
        while self._events is None:
            if self._reader is not None:
                raise RuntimeError("this connection is read by another task")
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        event = self._events.popleft()
        if not self._events:
            self._events = None
        return event


class Writable:
    """An event that is set, and holds nothing while nobody waits for it."""

    __slots__ = ("_cleared", "_loop")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._cleared: Future[None] | None = None

    def clear(self) -> None:
        if self._cleared is None:
            self._cleared = self._loop.create_future()

    def set(self) -> None:
        if self._cleared is not None:
            self._cleared.set_result(None)
            self._cleared = None

    async def wait(self) -> None:
        if self._cleared is not None:
            await shield(self._cleared)


def carrier_for(extensions: Sequence[object]) -> Carrier:
    """Return how frames travel to a peer with which these extensions were agreed.

    A peer that may forget what came before, and looks back as far as we do, gets what is compressed once for all.
    """
    for agreed in extensions:
        if isinstance(agreed, PerMessageDeflate) and agreed.local_no_context_takeover:
            return DEFLATED if agreed.local_max_window_bits >= WINDOW else FRAMED
    return FRAMED


def _is_text(parts: list[bytes]) -> bool:
    try:
        b"".join(parts).decode()
    except UnicodeDecodeError:
        return False
    return True
