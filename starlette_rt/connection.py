"""One live socket: what it is told, what it says, how it ends.

The law of this file: everything that leaves goes through the hub's log, the outbox and the seam; everything
that arrives is read at once and handled in order; and the end comes once, in one place, however it began.
It knows one peer only: groups of others, the broker and presence are the `Node`'s, whose small interface
is declared here. An idle connection owns no task but its reader, no timer and no queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.lowlevel
import msgspec
from starlette.exceptions import HTTPException, WebSocketException
from starlette.types import Message as AsgiMessage
from starlette.types import Receive
from starlette.websockets import WebSocketDisconnect

from . import dialogue
from .dialogue import Dialogue, Volley
from .exceptions import CloseCode, EventError, Unavailable
from .faults import FaultLog
from .feed import Watch
from .frames import Goodbye, Joined, Ping, Raw, Welcome, error_frame, size_of
from .frames import event as event_frame
from .heartbeat import Heartbeats
from .hub import Batch, Group, Hub, Message, Wire
from .limits import Buckets, Meter, RateLimit, quote
from .loop import Handle, Tasks, escapes, within
from .metrics import Metrics
from .once import ORIGIN
from .outbox import OVERFLOW, Outbox, OutboxLimits
from .seams import Seam

if TYPE_CHECKING:
    from .backends.base import LimitStore
    from .history import Position
    from .identity import Identity

PING = Message(Ping())  # spelled once for each wire

CONNECTING, OPEN, CLOSING, CLOSED = range(4)

MAX_INBOX = 256  # messages that wait for their handler
PATIENCE = 5.0  # seconds: for room in a full inbox, for handlers after the peer has left, for on_disconnect
GIVE_UP = 1.0  # seconds that an evicted peer has to read the Close frame
FAULTS = RateLimit("50/10 second")  # refused messages, whatever the reason, before the connection is closed
MAX_FAILURES = 10  # handlers in a row that raised

Handler = Callable[..., Awaitable[object]]


class Node(Protocol):
    """What a connection asks of its process."""

    hub: Hub
    tasks: Tasks
    metrics: Metrics
    faults: FaultLog
    buckets: Buckets
    outbox: OutboxLimits
    watched: dict[Connection, None]
    heartbeats: Heartbeats
    idle_timeout: float | None

    def forget(self, connection: Connection, /) -> None: ...
    def come_back(self) -> int: ...
    def welcome(self, connection: Connection, /) -> Welcome: ...
    async def breathe(self) -> None: ...
    async def join(self, connection: Connection, group: str, presence: Watch | None, /) -> Position | None: ...
    async def leave(self, connection: Connection, group: str, /) -> None: ...
    async def track(self, connection: Connection, group: str, meta: Any, /) -> None: ...
    async def update(self, connection: Connection, group: str, meta: Any, /) -> None: ...
    async def untrack(self, connection: Connection, group: str, /) -> None: ...
    async def broadcast(
        self,
        group: str,
        data: Any,
        event: str = ...,
        *,
        exclude: Any = ...,
        ephemeral: bool = ...,
        key: str | None = ...,
    ) -> Any: ...


class Messages(Protocol):
    """What the client says, for a body that asks for it; ``asked`` is true once one has."""

    asked: bool

    def __aiter__(self) -> AsyncIterator[Any]: ...
    async def __anext__(self) -> Any: ...
    def events(self) -> AsyncIterator[Any]: ...


class Script(dialogue.Script, Protocol):
    """What the host has to say about a connection; the hooks of an endpoint."""

    async def connect(self) -> None: ...
    async def receive(self, raw: str | bytes, /) -> None: ...
    async def disconnect(self, code: int, /) -> None: ...


class Connection:
    """A client of this process, from before its accept to after its end.

    Handlers get it as ``self.connection``, `Realtime.accept` yields it. ``id`` is random and unique,
    ``user`` the identity, ``groups`` the groups it is in, ``close_code`` the code it ended with. ``session``
    is what ``exclude=`` takes: the client's own if it brought one, else the ``id``.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_beside",
        "_closing",
        "_context",
        "_deadline",
        "_dialogue",
        "_direct",
        "_dropped",
        "_ended",
        "_failures",
        "_faults",
        "_inbox",
        "_meter",
        "_node",
        "_outbox",
        "_own",
        "_reader",
        "_room",
        "_script",
        "_seam",
        "_state",
        "_tasks",
        "_worker",
        "_working",
        "accepted",
        "active_at",
        "close_code",
        "denied",
        "due",
        "heard",
        "id",
        "ip",
        "max_message_size",
        "memberships",
        "messages",
        "paused_at",
        "pinged",
        "session",
        "shared",
        "tracked",
        "user",
        "wire",
    )

    def __init__(
        self,
        node: Node,
        seam: Seam,
        wire: Wire,
        user: Identity,
        *,
        id: str,
        session: str,
        ip: str | None,
        meter: Meter | None,
        max_message_size: int,
        shared: LimitStore | None = None,
    ) -> None:
        self._node, self._seam = node, seam
        self.wire: Wire = wire
        self.user: Identity = user
        self.id: str = id
        self.session: str = session
        self.ip: str | None = ip
        self.max_message_size: int = max_message_size
        self._meter = meter
        self.shared: LimitStore | None = shared  # the budgets of all nodes, where there is more than one
        self.memberships: tuple[Group, ...] = ()  # tuples: a set for each idle connection would be 216 bytes more
        self.tracked: tuple[str, ...] = ()
        self.close_code: int | None = None
        self.accepted: bool = False
        self.denied: bool = False  # the host has answered the handshake with a response of its own
        self.paused_at: float | None = None
        self.messages: Messages | None = None
        self.heard: bool = True
        self.pinged: bool = False
        self.active_at: float = 0.0
        self.due: int = 0
        self._state = CONNECTING
        self._dialogue: Dialogue | None = None
        self._direct = False  # whether nothing stands between the seam and the reader
        self._again = 0.0
        self._beside: set[Handle] | None = None
        self._failures = 0
        self._script: Script | None = None
        self._context: Context | None = None
        self._outbox: Outbox | None = None
        self._inbox: deque[Any] | None = None  # raw messages, or the requests of a dialogue
        self._own: dict[str, tuple[float, ...]] | None = None
        self._faults: tuple[float, ...] | None = None
        self._closing: tuple[int, str] | None = None
        self._deadline: float | None = None
        self._dropped = False
        self._reader: Handle | None = None
        self._worker: Handle | None = None
        self._working = False
        self._room: anyio.Event | None = None
        self._tasks: set[Handle] | None = None
        self._ended: anyio.Event | None = None
        seam.attach(self)

    def __repr__(self) -> str:
        return f"<Connection {self.id} of {self.user.identity}>"

    @property
    def close_reason(self) -> str:
        """Why this side closes, or refused the handshake; empty if it did not or gave no reason."""
        return "" if self._closing is None else self._closing[1]

    # What the host's code calls.

    @property
    def groups(self) -> frozenset[str]:
        """The groups this connection is in; that of its identity is not among them."""
        return frozenset(group.name for group in self.memberships if group.name[0] not in "~\0")

    @property
    def is_open(self) -> bool:
        """Whether what is said to it may still arrive."""
        return self._state == OPEN

    async def join(self, group: str, *, presence: Watch | None = None) -> Position | None:
        """Join ``group``; from now on its broadcasts arrive. Joining twice is joining once.

        Returns the group's present `Position` if it has a history. ``presence="members"`` also sends who is
        present and every change, ``"count"`` their number. Raises `EventError` ``bad_name``, and `Unavailable`
        where the history cannot be read.
        """
        return await self._node.join(self, group, presence)

    async def leave(self, group: str) -> None:
        """Leave ``group`` and its presence; leaving what one is not in is nothing."""
        was_in = self._node.hub.has(self, group)
        await self._node.leave(self, group)
        if was_in and self._dialogue is not None:
            await self._dialogue.left(group)

    async def broadcast(
        self,
        group: str,
        data: Any,
        event: str = "message",
        *,
        exclude: Any = None,
        ephemeral: bool = False,
        key: str | None = None,
    ) -> Any:
        """Broadcast to ``group``, as `Realtime.broadcast` does; one need not be in it."""
        return await self._node.broadcast(group, data, event, exclude=exclude, ephemeral=ephemeral, key=key)

    async def push(self, data: Any, event: str = "message") -> None:
        """Send ``data`` to this client only. Raises `TypeError` or `ValueError` for what is no data."""
        frame = event_frame(event, data)
        self.say(frame, len(frame.json))
        if self._node.hub.pressed:
            await self._node.breathe()

    async def call(self, event: str, data: Any = None, *, timeout: float = 10.0) -> Any:
        """Ask this client something, and return what it answers.

        Raises `TimeoutError` after ``timeout`` seconds, `EventError` for what the client refused,
        `WebSocketDisconnect` if it leaves first, `RuntimeError` for a client that is not on a protocol with
        answers, and `TypeError` or `ValueError` for what is no data.
        """
        if self._state == CLOSED and self.wire.v1 is not None:
            raise WebSocketDisconnect(self.close_code or 1006)
        if self._dialogue is None:
            raise RuntimeError("this client speaks the plain protocol, which has no answers; call() needs rt.v1")
        return await self._dialogue.call(event, data, timeout)

    async def track(self, group: str, meta: Any = None) -> None:
        """Be present in ``group`` with ``meta``, a JSON object of at most 4 kB; joining it is not needed.

        A member appears once per user with one meta per connection. Raises `EventError`, `TypeError` or
        `ValueError` for a bad group or meta.
        """
        await self._node.track(self, group, meta)

    async def update(self, group: str, meta: Any = None) -> None:
        """Replace the meta of this connection in ``group``; the same as `track` if it has none."""
        await self._node.update(self, group, meta)

    async def untrack(self, group: str) -> None:
        """Be no longer present in ``group``, at once and without grace."""
        await self._node.untrack(self, group)

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Close: what was said before is sent first, then the Close frame, then nothing.

        Returns when the close has begun. A peer that does not take its backlog within the outbox's
        ``close`` seconds is dropped. Before accept it refuses the handshake (403). Raises `ValueError` for a
        code that may not be sent (1000, 1001, 1003, 1007 to 1014 and 3000 to 4999 may).
        """
        self.begin_close(check_code(code), reason)

    async def wait_closed(self) -> None:
        """Return when the peer has left or the close is done.

        A body of `Realtime.accept` that only waits, and never asked for a message, takes none: what the
        client says meanwhile is dropped.
        """
        if self._state == CLOSED:
            return
        if self.messages is not None and not self.messages.asked:
            async for _ in self.messages:
                pass
        if self._ended is None:
            self._ended = anyio.Event()
        await self._ended.wait()

    def start_soon(self, function: Handler, *args: Any) -> None:
        """Run ``function(*args)`` beside the handlers; it is cancelled when the connection ends."""
        if self._state == CLOSED:
            return
        if self._tasks is None:
            self._tasks = set()
        context = copy_context()
        context.run(ORIGIN.set, None)  # what it says later is not what a repetition of this event would say
        self._spawn(self._tasks, partial(self.guard, function, *args), context)

    def beside(self, function: Handler, *args: Any) -> None:
        """Run a handler beside the others; at the end it has the time that they have."""
        if self._beside is None:
            self._beside = set()
        self._spawn(self._beside, partial(function, *args), copy_context())

    def _spawn(self, tasks: set[Handle], function: Callable[[], Awaitable[object]], context: Context) -> None:
        async def run() -> None:
            try:
                await function()
            finally:
                tasks.discard(handle)
                if self._room is not None:
                    self._room.set()

        handle: Handle = self._node.tasks.spawn(_after_start(run), context=context)
        tasks.add(handle)

    # What leaves.

    def joined(self, group: str, position: Position | None) -> None:
        """The host has joined this client to ``group``: one that can will ask for what it missed."""
        if self.wire.v1 is not None:
            self.say(Joined(group, position))

    def greet(self) -> None:
        """Say the first frame, where the protocol has one."""
        if self.wire.v1 is not None:
            self.say(self._node.welcome(self))

    def say(self, frame: Any, size: int = 0) -> None:
        """Say one frame to this client, in order with everything else."""
        if self._state < CLOSING:
            self._node.hub.say(self, Message(frame, size))

    def offer(self, batch: Batch, /) -> None:
        """Take what the hub has for this client: to the seam, or to the outbox while it is paused."""
        if self._state == OPEN and self._outbox is None and self._seam.write(batch.payload):
            return
        if self._state <= CLOSING and self._closing is None:
            self._queue(batch)

    def _queue(self, batch: Batch) -> None:
        if self._outbox is None:
            self._outbox = Outbox(self._node.outbox)
        lost = 0
        for entry in batch.entries:
            fact = self._outbox.push(entry)
            if fact == OVERFLOW:
                return self.evict(CloseCode.SLOW_CONSUMER)
            lost += fact
        if lost:
            self._node.metrics.dropped(lost)

    def _pump(self) -> None:
        """Hand over the backlog until the seam pauses or nothing is left; then close if that was asked."""
        while self._outbox is not None:
            if not self._seam.ready():
                if self.paused_at is None:
                    self._outbox = None  # the transport is closing: nothing can arrive any more
                break
            entries, lapsed = self._outbox.take(self._node.tasks.time())
            if not self._outbox:
                self._outbox = None
            if lapsed:
                self._node.metrics.dropped(lapsed)
            if entries:
                self._seam.write(self.wire.join(entries))
        if self._outbox is None and self._closing is not None and self.paused_at is None:
            self._seam.close(*self._closing)

    def on_pause(self) -> None:
        """The seam takes no more; from now on its time runs."""
        self.paused_at = self._node.tasks.time()
        self._node.watched[self] = None

    def on_resume(self) -> None:
        """The seam takes more."""
        self.paused_at = None
        if not self._dropped and (self._deadline is None or self._state == CLOSED):
            self._node.watched.pop(self, None)
        if self._state != CONNECTING:
            self._pump()

    def on_closing(self, code: int) -> None:
        """The server shuts down: finish, then close."""
        self.begin_close(code, CloseCode.SERVICE_RESTART.reason)

    # How it ends.

    def begin_close(self, code: int, reason: str = "") -> None:
        """Flush what was said, then close; once. What a Close frame cannot carry becomes 1011, a reason is cut."""
        if self._state >= CLOSING:
            return
        if self._state == CONNECTING:
            return self._break(code, reason)
        if code == CloseCode.SERVICE_RESTART and self.wire.v1 is not None:
            self.say(Goodbye(code, reason, self._node.come_back()))
        self._node.hub.settle_peer(self)
        if self._state != OPEN:  # the flush itself has evicted it
            return
        self._state = CLOSING
        self._end_with(code, reason, self._node.outbox.close)
        self._pump()

    def expel(self, code: CloseCode) -> None:
        """Close a peer that abuses us: it has a second to read why, and is itself not read any more."""
        self.begin_close(code, code.reason)
        if self._closing is not None:
            self._drop_soon()

    def evict(self, code: CloseCode) -> None:
        """Give up a peer that cannot keep up: drop its backlog, try the Close frame for a second, then abort."""
        self._node.metrics.evicted(code)
        if self._state == CONNECTING:
            return self._break(code)
        self._state = CLOSING
        self._outbox = None
        self._end_with(code, code.reason, GIVE_UP)
        self._seam.close(code, code.reason)
        self._drop_soon()

    def give_up(self, code: CloseCode) -> None:
        """Close a peer of which nothing was heard: it hardly reads any more."""
        self.begin_close(code, code.reason)
        if self._closing is not None:
            self._deadline = self._node.tasks.time() + GIVE_UP

    def _drop_soon(self) -> None:
        """Whatever the peer does now, it is gone in `GIVE_UP`: a flood after the Close would keep the server busy."""
        self._dropped = True
        self._deadline = self._node.tasks.time() + GIVE_UP
        self._node.watched[self] = None
        self._seam.deafen()

    def _end_with(self, code: int, reason: str, seconds: float) -> None:
        code = code if sendable(code) else int(CloseCode.INTERNAL_ERROR)
        self._closing = (code, reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore"))
        self.close_code = code
        self._deadline = self._node.tasks.time() + seconds
        self._node.watched[self] = None

    def look(self, now: float) -> None:
        """Called by the sweeper for a watched connection: has it stalled, is its close overdue?"""
        if self._deadline is not None and now >= self._deadline:
            if self._outbox is not None or self.paused_at is not None:
                self._node.metrics.aborted()
            self._break(None)
        elif self._deadline is None and self.paused_at is not None and now - self.paused_at > self._node.outbox.stall:
            self.evict(CloseCode.SLOW_CONSUMER)

    def _break(self, code: int | None, reason: str = "") -> None:
        """End the reader now; where nothing more is to be sent the transport goes with it."""
        if code is None:
            self._seam.abort()
        else:
            self._state, self.close_code, self._closing = CLOSING, code, (code, reason)
        self._node.watched.pop(self, None)
        if self._reader is not None:
            self._reader.cancel()

    # What arrives.

    async def serve(self, receive: Receive, script: Script, left: Callable[[], None] | None = None) -> None:
        """Live: run the script's ``connect``, read until the end, call ``left``, and leave nothing behind.

        Returns when the end is complete, `PATIENCE` at most after the peer has left and again for
        ``disconnect``. Cancelling the caller ends the connection; the ending itself is not cancelled.
        """
        self._script = script
        if self._dialogue is None:
            self.converse(script)
        self._context = copy_context()
        self._direct = getattr(receive, "__self__", None) is self._seam
        self._start_work()
        try:
            with self._node.tasks.breakable() as self._reader:
                if self._state == CONNECTING or self.accepted:  # else refused before the reader began
                    while (message := await receive())["type"] != "websocket.disconnect":
                        self._arrived(message)
                        if self._inbox is not None and len(self._inbox) >= MAX_INBOX:
                            await self._wait_for_room()
                    self._left(message)
        finally:
            if left is not None:
                left()
            finished = anyio.Event()
            self._node.tasks.spawn(self._finish, finished, context=self._context)
        await finished.wait()

    def converse(self, script: Script) -> None:
        """Begin to hear requests, where the protocol has them."""
        if self.wire.v1 is not None:
            self._dialogue = Dialogue(self, self._node, script)

    def on_message(self, raw: str | bytes) -> bool:
        """Take a message at once, which saves a turn of the reader; false where the reader is to have it.

        That is: before it reads and after the end, where somebody stands between the server and it, and where
        the peer has to wait for room.
        """
        if not self._direct or self._state != OPEN or (self._inbox is not None and len(self._inbox) >= MAX_INBOX - 1):
            return False
        assert self._context is not None
        self._context.copy().run(self._take, raw)
        return True

    def _left(self, message: AsgiMessage) -> None:
        if self.close_code is None:
            self.close_code = message.get("code") or 1005  # RFC 6455 §7.1.5: the Close frame had none

    def _arrived(self, message: AsgiMessage) -> None:
        """Take what the reader has read, unless it comes after the Close."""
        if self._state >= CLOSING:
            return
        raw = message.get("text")
        self._take(message.get("bytes", b"") if raw is None else raw)

    def _take(self, raw: str | bytes) -> None:
        """Check one message against the sizes and limits, before it is decoded, and queue it for its handler."""
        size = size_of(raw)
        self.heard = True
        self._node.metrics.received(size)
        if size > self.max_message_size:
            return self.refuse(EventError("too_large", f"a message has at most {self.max_message_size} bytes"))
        if self._dialogue is not None:
            return self._dialogue.arrived(raw, size)
        if wait := self.must_wait(size):
            return self.refuse(EventError("rate_limited", "too many messages", retry_after=wait))
        self.enqueue(raw)

    def enqueue(self, message: Any) -> None:
        """Let ``message`` wait for its handler."""
        if self._node.idle_timeout is not None:
            self.active_at = self._node.tasks.time()
        if self._inbox is None:
            self._inbox = deque()
        self._inbox.append(message)
        if not self._working:
            self._start_work()

    @property
    def backlog(self) -> int:
        """How many messages wait for their handler, or are handled beside the others."""
        return (len(self._inbox) if self._inbox else 0) + (len(self._beside) if self._beside else 0)

    @property
    def room(self) -> int:
        """The bytes that may wait for this client."""
        return self._node.outbox.bytes

    def must_wait(self, size: int, meter: Meter | None = None) -> float:
        """Take one message from the limits of this place, or of ``meter``; return the seconds to wait if it may not."""
        if (meter := meter or self._meter) is None:
            return 0.0
        if self._own is None:
            self._own = {}
        user = self.user.identity if meter.per_user and self.user.is_authenticated else None
        return meter.check(self._own, self._node.buckets, user, self.ip, size, self._node.tasks.time())

    async def pay(self, size: int, meter: Meter | None = None, what: str = "messages") -> None:
        """Take one message from the budgets that all nodes share, when its turn has come; `must_wait` was asked before.

        Raises `EventError` ``rate_limited`` for what may not pass, and `Unavailable` where that cannot be known.
        ``what`` is what there are too many of.
        """
        meter = meter or self._meter
        if self.shared is None or meter is None or not meter.shared:
            return
        user = self.user.identity if meter.per_user and self.user.is_authenticated else None
        if (dues := meter.dues(user, self.ip, size)) and (wait := await self.shared.take(dues, self._node.buckets)):
            raise EventError("rate_limited", f"too many {what}", retry_after=wait)

    # Heartbeats; see heartbeat.Patient.

    @property
    def answers_pings(self) -> bool:
        """Whether the client's protocol knows pings."""
        return self.wire.v1 is not None

    def ping(self) -> None:
        """Ask for a sign of life."""
        if self._state == OPEN:
            self._node.hub.say(self, PING)

    async def _wait_for_room(self) -> None:
        """Let the peer wait, as TCP can, but not so long that its pongs go unread; then it is too much for us."""
        self._room = anyio.Event()
        with anyio.move_on_after(PATIENCE):
            await self._room.wait()
        if self._inbox is not None and len(self._inbox) >= MAX_INBOX:
            self.expel(CloseCode.OVERLOADED)

    def refuse(self, error: EventError, ref: int | None = None) -> None:
        """Answer bad input to its sender, and close the connection of one who keeps on."""
        self._node.metrics.rejected(error.code)
        if self._counts(error):
            wait, faults = quote(self._faults, FAULTS, self._node.tasks.time())
            if wait:
                return self.expel(CloseCode.RATE_LIMITED if error.temporary else CloseCode.PROTOCOL_ERROR)
            self._faults = faults
        if error.code == "unsupported":
            return self.begin_close(CloseCode.UNSUPPORTED_DATA, error.message)
        self.say(error_frame(error, ref))

    def _counts(self, error: EventError) -> bool:
        """Whether a refusal counts against the client: not if it has waited as long as it was told to."""
        if error.retry_after is None:
            return True
        now, again = self._node.tasks.time(), self._again
        self._again = max(again, now + error.retry_after)
        return now < again

    # The handlers.

    def _start_work(self) -> None:
        self._working = True
        worker = self._node.tasks.spawn(self._work, context=self._context)
        self._worker = worker if self._working else None  # an eager task may be done already

    async def _work(self) -> None:
        """Run ``connect`` first, then what is in the inbox, in order, and end when there is nothing more."""
        assert self._script is not None
        receive = self._script.receive if self.shared is None else self._pay_and_receive
        try:
            if self._state == CONNECTING:
                await self._script.connect()
            while self._inbox and self._closing is None:
                message = self._inbox.popleft()
                if self._room is not None and len(self._inbox) <= MAX_INBOX // 2:
                    self._room.set()
                if self._dialogue is not None:
                    await self._dialogue.serve(message)
                else:
                    await self.guard(receive, message)
        finally:
            self._inbox = self._worker = None
            self._working = False
            if self._room is not None:
                self._room.set()

    async def _pay_and_receive(self, raw: str | bytes) -> None:
        assert self._script is not None
        await self.pay(size_of(raw))
        await self._script.receive(raw)

    async def guard(self, function: Handler, *args: Any, ref: int | None = None, batch: Volley | None = None) -> None:
        """Run host code: a refusal is answered, a close closes, a bug is logged and answered ``internal``.

        The answer is to the request ``ref``; a temporary refusal stops ``batch``.
        """
        try:
            await function(*args)
        except EventError as error:
            if batch is not None and error.temporary:
                batch.stopped = True
            self.refuse(error, ref)
        except Unavailable as error:
            if batch is not None:
                batch.stopped = True
            self.refuse(EventError("unavailable", str(error), retry_after=1.0), ref)
        except WebSocketException as error:
            self.begin_close(error.code, error.reason)
        except HTTPException as error:
            self.refuse(EventError(f"http_{error.status_code}", str(error.detail)), ref)
        except WebSocketDisconnect:
            pass  # the host wrote to a peer that has left
        except BaseException as error:
            if escapes(error):
                raise
            self._failed(error, ref)
        else:
            self._failures = 0

    def fail(self, error: BaseException) -> None:
        """Count and log a bug of the host's."""
        self._node.metrics.failed()
        self._node.faults.report(error, self._node.tasks.time())

    def _failed(self, error: BaseException, ref: int | None) -> None:
        self.fail(error)
        self._failures += 1
        self.say(error_frame(EventError("internal", "the server failed to handle this message"), ref))
        if self._failures >= MAX_FAILURES:
            self.begin_close(CloseCode.INTERNAL_ERROR, CloseCode.INTERNAL_ERROR.reason)

    # The end.

    async def _finish(self, finished: anyio.Event) -> None:
        """Handle what was received, forget the connection, run ``disconnect``; nothing of it stays."""
        assert self._script is not None
        try:
            self._state = CLOSED
            self._outbox = None
            if self.paused_at is None and not self._dropped:
                self._node.watched.pop(self, None)
            elif self._deadline is None:  # else it stands: a Close frame waits to be read
                self._deadline = self._node.tasks.time() + GIVE_UP
            if self._ended is not None:
                self._ended.set()
            if self._dialogue is not None:
                self._dialogue.ended()
            await self._let_finish()
            if self._dialogue is not None:
                await self._dialogue.hush()
            self._node.forget(self)
            if self.accepted:
                code = self.close_code if self.close_code is not None else CloseCode.GOING_AWAY
                await within(PATIENCE, self.guard, self._script.disconnect, code)
                self._node.metrics.disconnected(code)
            self.memberships = ()
        finally:
            self._script = self._dialogue = self._context = None  # no circles for the collector, when thousands leave
            finished.set()

    async def _let_finish(self) -> None:
        """Give the handlers their time, then cancel them and what was started beside them."""
        for handle in tuple(self._tasks or ()):
            handle.cancel()
        if self._busy and not await within(PATIENCE, self._idle):
            self._inbox = None
            for handle in (self._worker, *(self._beside or ())):
                if handle is not None:
                    handle.cancel()
            await within(GIVE_UP, self._idle)

    @property
    def _busy(self) -> bool:
        return self._working or bool(self._beside)

    async def _idle(self) -> None:
        while self._busy:
            self._room = anyio.Event()
            await self._room.wait()

    # The way in.

    def opened(self) -> None:
        """The handshake is accepted: what waited may go."""
        self._state = OPEN
        self.accepted = True
        self._node.metrics.connected()
        self._node.heartbeats.add(self, self._node.tasks.time())
        self._pump()

    async def send_raw(self, message: AsgiMessage) -> None:
        """Send what the host spelled itself, in order; to a client of the protocol v1 as the event ``message``.

        Raises `OSError` when the peer has left, `UnicodeEncodeError` for text that is no text.
        """
        if self._state >= CLOSING:
            raise OSError("the peer has left")
        text = message.get("text")
        data = message.get("bytes", b"") if text is None else text
        self.say(Raw(data) if self.wire.v1 is None else event_frame("message", value_of(data)), size_of(data))
        if self._node.hub.pressed:
            await self._node.breathe()

    def abandon(self) -> None:
        """End before accept: the reader stops, so that the handshake can be refused."""
        self._break(CloseCode.FORBIDDEN)

    # Reading as an iterator, for `Realtime.accept`.

    def events(self) -> AsyncIterator[Any]:
        """What the client says, as (event, data, group), whatever the name of the event.

        ``async for data in connection`` takes ``message`` alone. Raises `RuntimeError` on an endpoint, which reads
        by itself.
        """
        if self.messages is None:
            raise RuntimeError("this endpoint reads for you; declare a handler with @event")
        return self.messages.events()

    def __aiter__(self) -> AsyncIterator[Any]:
        if self.messages is None:
            raise RuntimeError("this endpoint reads for you; use on_receive")
        return self.messages


def check_code(code: int) -> int:
    """Return ``code`` if RFC 6455 lets an endpoint send it; raises `ValueError` otherwise."""
    if sendable(code):
        return code
    raise ValueError(f"{code} is no code that may be sent; write 1000, 1011 or one of 4000 to 4999")


def sendable(code: int) -> bool:
    """Whether a Close frame may carry ``code``."""
    return code in (1000, 1001, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999


def _after_start(run: Callable[[], Awaitable[None]]) -> Any:
    async def later() -> None:
        await anyio.lowlevel.checkpoint()
        await run()

    return later


def value_of(data: str | bytes) -> Any:
    """Return what a client reads in a message that the host spelled itself: JSON, or else the text."""
    try:
        return msgspec.json.decode(data) if isinstance(data, str) else data
    except msgspec.DecodeError:
        return data
