"""The write seam: everything a connection asks of what lies below it.

The law of this file: above the seam nobody knows a server, below it nobody knows a group. A seam takes
payloads that are ready to go, says when to stop and when to go on, and closes or aborts. It never waits,
never queues more than what is on its way, and never writes after it has closed. `SendSeam` is the tenant
for any ASGI server; the one that hands framed bytes to uvicorn's transport lives in `uvicorn.py` and
announces itself in the scope's extensions under `SEAM_EXTENSION`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

from starlette.types import Message, Send

from .loop import Handle, Relay, Tasks

SEAM_EXTENSION = "starlette_rt.seam"


class Carrier(Protocol):
    """How payloads travel on one kind of seam: each message is framed once and shared by every peer on it."""

    def frame(self, data: str | bytes, /) -> Any:
        """Return one message (text for ``str``, binary for ``bytes``) in the seam's own form."""

    def join(self, frames: Sequence[Any], /) -> Any:
        """Return many framed messages as the one payload that ``write`` takes."""


class Listener(Protocol):
    """What a seam tells the connection above it. All calls are synchronous and must not raise."""

    def on_message(self, raw: str | bytes) -> bool:
        """Take a message that came with nothing before it in the server's queue; false: put it there."""
        ...

    def on_pause(self) -> None:
        """Hand over nothing more until ``on_resume``; said again when a part of a payload has gone."""

    def on_resume(self) -> None:
        """What was handed over is on its way; more is welcome."""

    def on_closing(self, code: int) -> None:
        """The server is shutting down (1012): finish what is queued, then ``close(code)``."""


class Seam(Protocol):
    """What a connection may do to its transport."""

    carrier: Carrier

    def attach(self, listener: Listener) -> None:
        """Report to ``listener`` from now on."""

    def ready(self) -> bool:
        """Whether `write` would take a payload now; where it would later, the listener has been told of a pause."""
        ...

    def write(self, payload: Any) -> bool:
        """Hand over a joined payload; false, and nothing is taken, where the seam is not `ready`."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Send the Close frame; nothing can be written after it. A second call does nothing."""

    def deafen(self) -> None:
        """Read nothing more, also while the Close frame is on its way; where the server allows it."""

    def abort(self) -> None:
        """Drop the transport at once; what was not sent is lost."""


class AsgiCarrier:
    """Payloads as ASGI messages; servers only read them, so one message serves every peer."""

    def frame(self, data: str | bytes, /) -> Message:
        return {"type": "websocket.send", "text" if isinstance(data, str) else "bytes": data}

    def join(self, frames: Sequence[Message], /) -> tuple[Message, ...]:
        return tuple(frames)


ASGI = AsgiCarrier()


class SendSeam:
    """The seam over ASGI's ``send()``: it is awaited in a task that all of them share, until one has to wait.

    Who writes is told of a pause only if there is one: when a peer keeps ``send()`` waiting, or when somebody asks
    for more before the last payload has gone.
    """

    __slots__ = ("_busy", "_close", "_deaf", "_listener", "_open", "_paused", "_payload", "_relay", "_send", "_writer")

    carrier: Carrier = ASGI
    _listener: Listener

    def __init__(self, send: Send, relay: Relay) -> None:
        self._send = send
        self._relay = relay
        self._writer: Handle | None = None  # the task of its own, while it waits
        self._payload: tuple[Message, ...] = ()
        self._close: Message | None = None
        self._open = True
        self._busy = self._paused = self._deaf = False

    def attach(self, listener: Listener) -> None:
        self._listener = listener

    def ready(self) -> bool:
        if self._busy and self._open and not self._paused:
            self._pause()
        return self._open and not self._busy

    def write(self, payload: tuple[Message, ...]) -> bool:
        if self._busy or not self._open:
            return self.ready()
        self._start(payload)
        return True

    def close(self, code: int, reason: str) -> None:
        if not self._open:
            return
        self._open = False
        self._close = {"type": "websocket.close", "code": code, "reason": reason}
        if not self._busy:
            self._start(())

    def abort(self) -> None:
        self._open = False
        self._close = None
        self._payload = ()
        if self._writer is not None:
            self._writer.cancel()
        abort_transport(self._send)

    def deafen(self) -> None:
        self._deaf = True
        stop_reading(self._send)

    def _start(self, payload: tuple[Message, ...]) -> None:
        self._busy = True
        self._payload = payload
        self._relay.add(self)

    def _pause(self) -> None:
        self._paused = True
        self._listener.on_pause()

    def waits(self, task: Handle, /) -> None:
        """The relay goes on without us: the peer does not read."""
        self._writer = task
        if self._open or self._close is not None:
            self._pause()
        else:
            task.cancel()  # aborted in the turn in which it began to wait

    async def run(self) -> None:
        """Send what was handed over, and the Close if that was asked."""
        try:
            for message in self._payload:
                await self._send(message)
                if self._paused:
                    self._listener.on_pause()
            if self._close is not None:
                await self._send(self._close)
                if self._deaf:
                    stop_reading(self._send)  # the server has begun to read again, for the peer's Close
        except Exception:
            # The peer has left while we wrote: OSError on uvicorn, RuntimeError elsewhere. The reader hears of it.
            self._open = False
        finally:
            self._finished()

    def _finished(self) -> None:
        self._busy = False
        self._writer = None
        self._payload = ()
        if self._paused:
            self._paused = False
            self._listener.on_resume()


def seam_for(scope: Any, send: Send, tasks: Tasks) -> Seam:
    """Return the server's own seam if it brought one, else one over ``send``."""
    seam: Seam | None = (scope.get("extensions") or {}).get(SEAM_EXTENSION)
    return seam if seam is not None else SendSeam(send, tasks.relay)


def transport_of(send: Send) -> Any:
    """Return the transport that ``send`` writes to, ``None`` where the server does not let it be found.

    ASGI has no word for it. uvicorn's and hypercorn's ``send`` are methods of objects that hold the
    transport, possibly inside the closures of middlewares.
    """
    seen: set[int] = set()
    found: list[Any] = [send]
    for thing in found:  # grows while it is walked: breadth first, and bounded
        if id(thing) in seen or len(seen) > 200:
            continue
        seen.add(id(thing))
        transport = getattr(thing, "transport", None)
        if callable(getattr(transport, "abort", None)):
            return transport
        found += [getattr(thing, name, None) for name in ("__self__", "__wrapped__", "func", "send", "_send", "writer")]
        found += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or () if filled(cell)]
    return None


def abort_transport(send: Send) -> bool:
    """Drop the connection that ``send`` writes to; false where its transport cannot be found."""
    transport = transport_of(send)
    if transport is not None:
        transport.abort()
    return transport is not None


def stop_reading(send: Send) -> bool:
    """Read nothing more from the peer that ``send`` writes to; false where its transport cannot be found.

    A server that has sent a Close reads on until the peer's own, with nothing to hold a flood back: uvicorn
    on uvloop was kept busy for eight seconds by one peer.
    """
    transport = transport_of(send)
    if transport is not None:
        with suppress(RuntimeError, AttributeError):  # closing already
            transport.pause_reading()
    return transport is not None


def filled(cell: Any) -> bool:
    """Whether a closure's cell holds a value; an empty one raises on reading."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
