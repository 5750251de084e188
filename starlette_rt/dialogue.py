"""What one client of the protocol v1 asks, in its order, and how each request is answered.

The law of this file: every request with a ref gets one answer. What must not wait (`pong`, answers to calls,
`refresh`) is done when it arrives; the rest waits in the connection's inbox, which a client that keeps to its
window never fills. A batch stops at its first temporary error. What a client may do is the
script's to say, what is done is the node's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import anyio
import msgspec
from starlette.websockets import WebSocketDisconnect

from .backends.base import Ledger, LimitStore
from .events import DeclaredWhisper, Handler, full_name
from .exceptions import CloseCode, EventError, ProtocolError, Unavailable
from .feed import Watch
from .frames import (
    ClientFrame,
    Emit,
    Error,
    Event,
    Join,
    Leave,
    Left,
    Murmur,
    Page,
    Pong,
    Recovery,
    Refresh,
    Reply,
    Skip,
    Track,
    Untrack,
    Update,
    check_group,
    plain_data,
    plain_meta,
    told,
)
from .frames import event as event_frame
from .hub import Hub, Message, Peer
from .limits import Meter, RateLimit
from .once import once
from .protocols.v1 import Malformed
from .streams import Stream

if TYPE_CHECKING:
    from .history import Position, Publication
    from .identity import Identity
    from .presence import Member

WINDOW = 32  # requests that a client may have unanswered
GROUPS = 256  # groups that a client may have joined itself
REPLY = 256 * 1024  # bytes of recovered events in one reply; more are sent ahead of it
# What no other limit counts: pongs, frames that nobody knows or asked for, whispers that are dropped.
FREE = Meter("free", (RateLimit("1000/10 second"), RateLimit("262144/10 second", unit="bytes")))
BUSY = 0.1  # seconds after which a client that went beyond its window may try again
ABREAST = 1.0  # seconds that a client's position may be ahead of this node
SNAPSHOTS = 3  # how often a snapshot is taken anew because the history broke meanwhile


class Client(Peer, Protocol):
    """What a dialogue asks of its connection."""

    user: Identity
    close_code: int | None
    shared: LimitStore | None

    @property
    def is_open(self) -> bool: ...
    @property
    def backlog(self) -> int: ...
    @property
    def room(self) -> int: ...
    def say(self, frame: Any, size: int = 0, /) -> None: ...
    def refuse(self, error: EventError, ref: int | None = None, /) -> None: ...
    def fail(self, error: BaseException, /) -> None: ...
    def expel(self, code: CloseCode, /) -> None: ...
    def must_wait(self, size: int, meter: Meter | None = None, /) -> float: ...
    async def pay(self, size: int, meter: Meter | None = None, what: str = ..., /) -> None: ...
    def enqueue(self, message: Any, /) -> None: ...
    def start_soon(self, function: Callable[..., Awaitable[object]], /, *args: Any) -> None: ...
    def beside(self, function: Callable[..., Awaitable[object]], /, *args: Any) -> None: ...
    async def guard(
        self,
        function: Callable[..., Awaitable[object]],
        /,
        *args: Any,
        ref: int | None = None,
        batch: Volley | None = None,
    ) -> None: ...


class Speaks(Protocol):
    """What is asked of the protocol that a frame came in."""

    def data(self, raw: msgspec.Raw, decoder: Any, /) -> Any: ...


class Node(Protocol):
    """What a dialogue asks of its process."""

    hub: Hub

    @property
    def ledger(self) -> Ledger: ...
    def remembered(self, group: str, /) -> bool: ...
    async def follow(self, group: str, /) -> Stream[Message] | None: ...
    def unfollow(self, group: str, /) -> None: ...
    def enter(self, connection: Any, group: str, /) -> bool: ...
    async def watch(self, connection: Any, group: str, presence: Watch, /) -> None: ...
    async def leave(self, connection: Any, group: str, /) -> None: ...
    async def track(self, connection: Any, group: str, meta: Any, /) -> None: ...
    async def untrack(self, connection: Any, group: str, /) -> None: ...
    async def presence(self, group: str, /, *, after: str | None, limit: int | None) -> dict[str, Member]: ...
    async def whisper(self, connection: Any, group: str, declared: DeclaredWhisper, data: Any, /) -> None: ...
    def renew(self, connection: Any, user: Identity, /) -> int | None: ...


class Script(Protocol):
    """What the host says about a client's wishes."""

    def find(self, event: str, /) -> Handler | None: ...
    async def run(self, handler: Handler, data: Any, group: str | None, /) -> Any: ...
    def whisper(self, event: str, /) -> DeclaredWhisper | None: ...
    async def authorize(self, group: str, /) -> bool: ...
    async def meta(self, group: str, meta: Any, /) -> Any: ...
    async def snapshot(self, group: str, /) -> Any: ...
    async def refresh(self, token: str, /) -> Identity: ...


class Volley:
    """The frames of one message, which the first temporary error stops.

    ``full`` is for one that is met as they arrive, and concerns those after it; ``stopped`` for one that is met as
    they are handled, and concerns those that still wait.
    """

    __slots__ = ("full", "stopped")

    def __init__(self) -> None:
        self.full: bool = False
        self.stopped: bool = False


class Request(NamedTuple):
    """What waits in the inbox; ``size`` is what it still owes to the budgets of all nodes."""

    frame: Any
    batch: Volley | None
    size: int | None = None


class Recovered(NamedTuple):
    """What a join has found: where the group is, whether nothing is missing, and what follows."""

    position: Position | None
    complete: bool
    events: list[Message]
    snapshot: Any = msgspec.UNSET


class Call:
    """An answer that the server waits for."""

    __slots__ = ("answer", "arrived")

    def __init__(self) -> None:
        self.arrived: anyio.Event = anyio.Event()
        self.answer: Reply | Error | None = None


class Dialogue:
    """The requests of one client, and the calls of the server that it has not answered."""

    __slots__ = (
        "_calls",
        "_client",
        "_murmurs",
        "_node",
        "_numbers",
        "_overrun",
        "_protocol",
        "_refreshing",
        "_renewals",
        "_script",
        "_serving",
        "_slots",
        "_unpaid",
        "asked",
    )

    def __init__(self, client: Client, node: Any, script: Script) -> None:
        protocol = client.wire.v1
        assert protocol is not None
        self._client, self._script, self._protocol = client, script, protocol
        self._node: Node = node
        self.asked: tuple[str, ...] = ()  # the groups that the client joined itself: these are authorised again
        self._numbers = self._overrun = self._renewals = self._unpaid = 0
        self._refreshing = self._serving = False
        self._calls: dict[int, Call] | None = None
        self._slots: dict[str, anyio.Semaphore] | None = None
        self._murmurs: dict[tuple[str, str], DeclaredWhisper] | None = None

    # What arrives.

    def arrived(self, raw: str | bytes, size: int) -> None:
        """Take one message: do what must not wait, queue or refuse the rest."""
        try:
            frames = self._protocol.decode(raw)
        except ProtocolError as error:
            return self._client.refuse(error)
        batch = Volley() if len(frames) > 1 else None
        self._unpaid = size
        for frame in frames:
            ARRIVALS[type(frame)](self, frame, batch)
            if not self._client.is_open:
                return
        if self._unpaid and self._client.must_wait(self._unpaid, FREE):
            self._client.expel(CloseCode.OVERLOADED)

    def _queue(self, frame: ClientFrame, batch: Volley | None) -> None:
        client = self._client
        if batch is not None and (batch.full or batch.stopped):
            return self._skip(frame)
        size, self._unpaid = self._unpaid, 0  # the bytes of a message are paid once
        if wait := client.must_wait(size):
            self._fill(batch)
            return client.refuse(EventError("rate_limited", "too many messages", retry_after=wait), ref_of(frame))
        if self._unanswered >= WINDOW:
            return self._too_many(frame, batch)
        self._overrun = 0
        client.enqueue(Request(frame, batch, size))

    def _fill(self, batch: Volley | None) -> None:
        if batch is not None:
            batch.full = True

    def _too_many(self, frame: ClientFrame, batch: Volley | None) -> None:
        """Answer what is beyond the window; twice the window is too much."""
        self._fill(batch)
        self._overrun += 1
        if self._overrun > WINDOW:
            return self._client.expel(CloseCode.OVERLOADED)
        if (ref := ref_of(frame)) is not None:
            self._client.say(Error("busy", "too many requests are unanswered", True, round(BUSY * 1000), ref))

    def _skip(self, frame: ClientFrame) -> None:
        if (ref := ref_of(frame)) is not None:
            self._client.say(Error("skipped", "a frame before it in its batch met a temporary error", True, None, ref))

    def _refuse(self, frame: Malformed, batch: Volley | None) -> None:
        self._client.refuse(frame.error, frame.ref)

    def _hear(self, frame: Pong, batch: Volley | None) -> None:
        """A pong has done its work by arriving."""

    def _murmured(self, frame: Murmur, batch: Volley | None) -> None:
        """Drop what comes too fast; whispers are no part of the other limits."""
        if batch is not None and (batch.full or batch.stopped):
            return self._skip(frame)
        if (declared := self._script.whisper(frame.event)) is None:
            error = EventError("unknown_whisper", f"no whisper {frame.event!r} is declared here")
            return self._client.refuse(error, frame.ref)
        if wait := self._client.must_wait(len(frame.data), declared.meter):
            if frame.ref is not None:
                self._client.refuse(EventError("rate_limited", "too many whispers", retry_after=wait), frame.ref)
        elif self._unanswered < WINDOW:
            self._unpaid = 0
            self._client.enqueue(Request(frame, batch))
        elif frame.ref is not None:
            self._too_many(frame, batch)

    def _left(self, frame: Leave, batch: Volley | None) -> None:
        """Queue it behind what was asked before, perhaps the join; it costs nothing and has twice the window."""
        if batch is not None and (batch.full or batch.stopped):
            self._skip(frame)
        elif self._unanswered < 2 * WINDOW:
            self._client.enqueue(Request(frame, batch))
        else:
            self._too_many(frame, batch)

    def _refreshed(self, frame: Refresh, batch: Volley | None) -> None:
        if self._refreshing:
            return self._client.refuse(EventError("busy", "a refresh is under way", retry_after=BUSY), frame.ref)
        self._refreshing = True
        self._client.start_soon(partial(self._client.guard, self._refresh, frame, ref=frame.ref))

    def _answered(self, frame: Reply | Error, batch: Volley | None) -> None:
        """Hand an answer to whoever waits for it; one that comes too late is nobody's."""
        call = None if self._calls is None or frame.ref is None else self._calls.pop(frame.ref, None)
        if call is not None:
            self._unpaid = 0
            call.answer = frame
            call.arrived.set()

    # What is handled, one after the other.

    async def serve(self, request: Request) -> None:
        """Handle one request and answer it."""
        frame, batch, _ = request
        if batch is not None and batch.stopped:
            return self._skip(frame)
        self._serving = True
        try:
            if self._client.shared is None:
                await self._client.guard(HANDLED[type(frame)], self, frame, batch, ref=ref_of(frame), batch=batch)
            else:
                await self._client.guard(self._pay_and_handle, request, ref=ref_of(frame), batch=batch)
        finally:
            self._serving = False

    async def _pay_and_handle(self, request: Request) -> None:
        frame, batch, size = request
        if size is not None:
            await self._client.pay(size)
        await HANDLED[type(frame)](self, frame, batch)

    @property
    def _unanswered(self) -> int:
        return self._client.backlog + self._serving

    async def _join(self, frame: Join, batch: Volley | None) -> None:
        client, group = self._client, self._joinable(frame)
        member = self._node.hub.has(client, group)
        try:
            found = await self._let_in(frame, member)
        except BaseException:
            self._node.unfollow(group)
            raise
        self._node.enter(client, group)  # nothing has been awaited since the look into the history
        if not member:
            self.asked = (*self.asked, group)
        if frame.ref is not None:
            self._say(frame.ref, found)
        if frame.presence is not None:
            await self._node.watch(client, group, frame.presence)

    def _joinable(self, frame: Join) -> str:
        """Return the group that ``frame`` names; what is pushed to a client may be asked for as groups are."""
        user = self._client.user
        own = user.is_authenticated and frame.presence is None and frame.group == f"~{user.identity}"
        return frame.group if own and self._node.remembered(frame.group) else check_group(frame.group)

    async def _let_in(self, frame: Join, member: bool) -> Recovered:
        """Return what a client missed that may join; the right to it is that of its present token."""
        while True:
            renewals = self._renewals
            if not member:
                await self._admit(frame.group)
            found = await self._recover(frame)
            if member or renewals == self._renewals:
                return found

    async def _admit(self, group: str) -> None:
        """Raise `EventError` unless the host lets the client in, and it is not in too many groups already."""
        if len(self.asked) >= GROUPS:
            raise EventError("too_many_groups", f"at most {GROUPS} groups at a time; leave one first")
        if not await self._script.authorize(group):
            raise EventError("forbidden", f"you may not join {group}")

    async def _recover(self, frame: Join) -> Recovered:
        """Return what the client missed. Nothing is awaited between the look into the history and the return."""
        stream, asked = await self._node.follow(frame.group), frame.position
        if stream is None:
            return Recovered(None, asked is None, [])
        if asked is None:
            return Recovered(stream.position, True, self._newest(stream.last(frame.last)) if frame.last else [])
        if asked.epoch == stream.position.epoch and asked.offset > stream.position.offset:
            await stream.passed(asked.offset, ABREAST)  # the client comes from a node that is ahead of this one
            stream = await self._node.follow(frame.group) or stream
        events = self._since(stream, asked)
        if events is not None and self._bytes(events) <= self._client.room // 2:
            return Recovered(stream.position, True, events)
        return await self._anew(stream, frame.group)

    def _newest(self, kept: list[tuple[Publication, Message]]) -> list[Message]:
        """Return the newest of ``kept``, no more than fit into half an outbox."""
        room, events = self._client.room // 2, self._own(kept)
        for place in range(len(events) - 1, -1, -1):
            room -= self._bytes(events[place : place + 1])
            if room < 0:
                return events[place + 1 :]
        return events

    async def _anew(self, stream: Stream[Message], group: str) -> Recovered:
        """Return the host's own content of the group, and what was said while it was fetched."""
        for _ in range(SNAPSHOTS):
            position = stream.position
            content = await self._script.snapshot(group)
            if content is not msgspec.UNSET:
                content = plain_data(content)
            stream = await self._node.follow(group) or stream  # it may have been let go of meanwhile
            if (events := self._since(stream, position)) is not None:
                return Recovered(stream.position, False, events, content)
        raise EventError("unavailable", "the history of this group is changing", retry_after=1.0)

    def _since(self, stream: Stream[Message], position: Position) -> list[Message] | None:
        missed = stream.since(position)
        return None if missed is None else self._own(missed)

    def _own(self, kept: Iterable[tuple[Publication, Message]]) -> list[Message]:
        """Return what of a history is for this client; of what is not, it hears the place."""
        session = self._client.session
        return [skip(publication) if publication.exclude == session else message for publication, message in kept]

    def _say(self, ref: int, found: Recovered) -> None:
        """Say the reply with its events in it, or behind them where they are many."""
        client, events = self._client, found.events
        if found.complete and self._bytes(events) > REPLY:
            for message in events:
                self._node.hub.say(client, message)
            events = []
        spelled = [entry.payload for message in events if (entry := message.entry(client.wire)) is not None]
        size = sum(map(len, spelled))
        client.say(Recovery(ref, found.position, found.complete, spelled, found.snapshot), size)

    def _bytes(self, events: Iterable[Message]) -> int:
        wire = self._client.wire
        return sum(entry.size for message in events if (entry := message.entry(wire)) is not None)

    async def _leave(self, frame: Leave, batch: Volley | None) -> None:
        await self._go(frame.group)
        self._reply(frame.ref)

    async def _go(self, group: str) -> None:
        """Let the client be in ``group`` no longer, nor be heard of there."""
        self.forget(group)
        await self.hush(group)
        await self._node.leave(self._client, check_group(group))

    async def _emit(self, frame: Emit, batch: Volley | None) -> None:
        client, script = self._client, self._script
        handler = script.find(frame.event)
        if handler is None:
            raise EventError("unknown_event", f"there is no event {frame.event!r} here")
        data = accepted_data(frame, handler, client, self._node.hub, self._protocol)
        if handler.meter is not None and client.shared is not None:
            await client.pay(len(frame.data), handler.meter, handler.name)
        if handler.concurrency == 1:
            return await self._run(frame, handler, data)
        slots = self._slots_of(handler)
        await slots.acquire()
        client.beside(self._run_beside, slots, frame, handler, data)

    async def _run_beside(self, slots: anyio.Semaphore, frame: Emit, handler: Handler, data: Any) -> None:
        try:
            await self._client.guard(self._run, frame, handler, data, ref=frame.ref)
        finally:
            slots.release()

    async def _run(self, frame: Emit, handler: Handler, data: Any) -> None:
        if frame.id is None:
            return self._reply(frame.ref, await self._result(frame, handler, data))
        key = f"once:{self._subject}\n{frame.id}"
        run = partial(self._result, frame, handler, data)
        result, local = await once(self._node.ledger, key, run, rerun=handler.rerun)
        self._reply(frame.ref, result, "node" if local else None)

    async def _result(self, frame: Emit, handler: Handler, data: Any) -> Any:
        """Run the handler and return its result as plain data; an error there names it, since no line of it does."""
        result = await self._script.run(handler, data, frame.group)
        try:
            return plain_data(result)
        except (TypeError, ValueError) as error:
            error.add_note(f"returned by {full_name(handler.function)}")
            raise

    @property
    def _subject(self) -> str:
        """Who asks: a person, or a guest's session, which no identity can be mistaken for."""
        user = self._client.user
        return user.identity if user.is_authenticated else f"~{self._client.session}"

    def _slots_of(self, handler: Handler) -> anyio.Semaphore:
        if self._slots is None:
            self._slots = {}
        return self._slots.setdefault(handler.name, anyio.Semaphore(handler.concurrency))

    async def _murmur(self, frame: Murmur, batch: Volley | None) -> None:
        declared = self._script.whisper(frame.event)
        assert declared is not None  # looked up when it arrived
        check_joined(frame.group, self._client, self._node.hub)
        if self._client.shared is not None and not await self._can_pay(frame, declared):
            return
        data = msgspec.UNSET if frame.stop else plain_data(self._protocol.data(frame.data, declared.decoder))
        self._remember(frame, declared)
        await self._node.whisper(self._client, frame.group, declared, data)
        self._reply(frame.ref)

    async def _can_pay(self, frame: Murmur, declared: DeclaredWhisper) -> bool:
        """Take a whisper from the budgets of all nodes; one that may not pass is dropped if it wants no answer."""
        try:
            await self._client.pay(len(frame.data), declared.meter, "whispers")
        except (EventError, Unavailable):
            if frame.ref is not None:
                raise
            return False
        return True

    def _remember(self, frame: Murmur, declared: DeclaredWhisper) -> None:
        """Keep what is being whispered, so that its end can be said when the whisperer goes."""
        if self._murmurs is None:
            self._murmurs = {}
        if frame.stop:
            self._murmurs.pop((frame.group, frame.event), None)
        else:
            self._murmurs[frame.group, frame.event] = declared

    async def _track(self, frame: Track | Update, batch: Volley | None) -> None:
        check_joined(frame.group, self._client, self._node.hub)
        try:
            meta = plain_meta(frame.meta)
        except ValueError as error:
            raise EventError("too_large", str(error)) from None
        meta = await self._script.meta(frame.group, meta)
        check_joined(frame.group, self._client, self._node.hub)  # it may have been taken out meanwhile
        await self._node.track(self._client, frame.group, meta)
        self._reply(frame.ref)

    async def _untrack(self, frame: Untrack, batch: Volley | None) -> None:
        await self._node.untrack(self._client, check_group(frame.group))
        self._reply(frame.ref)

    async def _page(self, frame: Page, batch: Volley | None) -> None:
        check_joined(frame.group, self._client, self._node.hub)
        found = list((await self._node.presence(frame.group, after=frame.after, limit=frame.limit + 1)).values())
        page = found[: frame.limit]
        self._reply(frame.ref, {"members": told(page), "after": page[-1].key if len(found) > len(page) else None})

    async def _refresh(self, frame: Refresh) -> None:
        try:
            user = await self._script.refresh(frame.token)
            if user.identity != self._client.user.identity:
                raise EventError("forbidden", "the token is of another identity")
            ttl = self._node.renew(self._client, user)
            self._renewals += 1
            for group in self.asked:
                if not await self._may_stay(group):
                    await self._expelled(group)
        finally:
            self._refreshing = False
        self._reply(frame.ref, {"ttl_ms": ttl})

    async def _may_stay(self, group: str) -> bool:
        """Whether the client may still be in ``group``; where the host cannot say, it may not."""
        try:
            return await self._script.authorize(group)
        except EventError:
            return False
        except Exception as error:
            self._client.fail(error)
            return False

    async def _expelled(self, group: str) -> None:
        """Take the client out of a group in which it may not be any longer."""
        await self._go(group)
        self._client.say(Left(group, "forbidden", False))

    # What the host asks.

    async def call(self, event: str, data: Any, timeout: float) -> Any:
        """Say an event that the client is to answer; see `Connection.call`."""
        frame = event_frame(event, data)
        self._numbers += 1
        number, call = self._numbers, Call()
        if self._calls is None:
            self._calls = {}
        self._calls[number] = call
        self._client.say(Event(frame.event, frame.data, frame.json, ref=number), len(frame.json))
        try:
            with anyio.fail_after(timeout):
                await call.arrived.wait()
        finally:
            self._calls.pop(number, None)
        return self._outcome(call.answer)

    def _outcome(self, answer: Reply | Error | None) -> Any:
        if answer is None:
            raise WebSocketDisconnect(self._client.close_code or 1006)
        if isinstance(answer, Error):
            raise EventError(answer.code, answer.message)
        return self._protocol.data(answer.data)

    # Around it.

    async def left(self, group: str) -> None:
        """The host has taken this client out of a group."""
        self.forget(group)
        await self.hush(group)
        self._client.say(Left(group, "left", False))

    def forget(self, group: str) -> None:
        """The client is in ``group`` no longer."""
        self.asked = tuple(each for each in self.asked if each != group)

    def ended(self) -> None:
        """The connection is over: nobody answers any more."""
        for call in tuple((self._calls or {}).values()):
            call.arrived.set()

    async def hush(self, group: str | None = None) -> None:
        """Say the end of what this client was whispering, in ``group`` or everywhere."""
        for key, declared in tuple((self._murmurs or {}).items()):
            if group is None or key[0] == group:
                assert self._murmurs is not None
                del self._murmurs[key]
                with suppress(Unavailable):  # the others have its time to go by
                    await self._node.whisper(self._client, key[0], declared, msgspec.UNSET)

    def _reply(self, ref: int | None, data: Any = None, once: str | None = None) -> None:
        if ref is not None:
            self._client.say(Reply(ref, self._protocol.raw(data), once))


def check_joined(group: str, client: Peer, hub: Hub) -> str:
    """Return ``group`` if ``client`` is in it; raises `EventError` ``not_joined``."""
    if group[:1] == "~" or not hub.has(client, group):
        raise EventError("not_joined", f"join {group or 'a group'} first")
    return group


def accepted_data(frame: Emit, handler: Handler, client: Client, hub: Hub, protocol: Speaks) -> Any:
    """Return the data of an event for its handler, once all that stands against it has been looked at."""
    if frame.group is not None:
        check_joined(frame.group, client, hub)
    check_terms(handler, frame.group, len(frame.data), client)
    return protocol.data(frame.data, handler.decoder) if handler.takes_data else None


def check_terms(handler: Handler, group: str | None, size: int, client: Client) -> None:
    """Raise `EventError` for who may not, comes too often, or names no group where one is needed."""
    if handler.needs_group and group is None:
        raise EventError("invalid", f"{handler.name!r} is said to a group: give it one")
    if missing := set(handler.scopes).difference(client.user.scopes) if handler.scopes else None:
        raise EventError("forbidden", f"this needs the scope {min(missing)}")
    if handler.meter is not None and (wait := client.must_wait(size, handler.meter)):
        raise EventError("rate_limited", f"too many {handler.name}", retry_after=wait)


def skip(publication: Publication) -> Message:
    """Return what moves the position of a client that does not get ``publication``."""
    assert publication.offset is not None
    return Message(Skip(publication.group, publication.offset, publication.tag, True))


def ref_of(frame: Any) -> int | None:
    """Return what a frame wants to be answered by."""
    ref: int | None = getattr(frame, "ref", None)
    return ref


ARRIVALS: dict[type, Callable[[Dialogue, Any, Volley | None], None]] = {
    **dict.fromkeys((Join, Emit, Track, Update, Untrack, Page), Dialogue._queue),
    Malformed: Dialogue._refuse,
    Pong: Dialogue._hear,
    Murmur: Dialogue._murmured,
    Leave: Dialogue._left,
    Refresh: Dialogue._refreshed,
    Reply: Dialogue._answered,
    Error: Dialogue._answered,
}

HANDLED: dict[type, Callable[[Dialogue, Any, Volley | None], Awaitable[None]]] = {
    Join: Dialogue._join,
    Leave: Dialogue._leave,
    Emit: Dialogue._emit,
    Murmur: Dialogue._murmur,
    Track: Dialogue._track,
    Update: Dialogue._track,
    Untrack: Dialogue._untrack,
    Page: Dialogue._page,
}
