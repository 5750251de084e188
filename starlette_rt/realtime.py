"""The facade: what the host holds, and the only place where this node and the others meet.

The law of this file: a verb of the host is checked here, given to the backend, and what comes back from the
backend goes to the hub. It owns what lives as long as the process serves: the hub, the tasks, the sweeper.
It knows no HTTP; who may come in is decided in `gate.py`, what a handler does in `endpoints.py`.
"""

from __future__ import annotations

import logging
import math
import mimetypes
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from random import random
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.from_thread
import msgspec
from anyio.lowlevel import EventLoopToken, current_token

from .acceptance import Acceptance, Authorize
from .backends import from_url
from .backends.base import Backend, Ledger, LimitStore, Published
from .blocking import Blocking
from .connection import Connection, check_code
from .dialogue import WINDOW, skip
from .events import DeclaredWhisper
from .exceptions import CloseCode, ConfigurationError, NotRunning, Unavailable
from .faults import FaultLog
from .feed import Feed, Watch
from .frames import Event, Reset, Welcome, Whispered, check_group, check_name, encode, plain_data, plain_meta
from .heartbeat import Heartbeats
from .history import History, Policies, Position, Publication
from .hub import Hub, Message, Only, Wire
from .limits import Buckets, RateLimit
from .loop import Handle, Tasks, tasks
from .metrics import Counters, Metrics
from .occupancy import Hook, Occupancy
from .once import ONCE, ORIGIN
from .orders import ORDERS, REVOKED, Order, Orders
from .outbox import OutboxLimits
from .presence import Member
from .protocols.plain import PLAIN, Encoding
from .protocols.v1 import V1S
from .seams import Carrier
from .streams import Stream, Streams

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from starlette.staticfiles import StaticFiles
    from starlette.websockets import WebSocket

    from .identity import Identity

logger: logging.Logger = logging.getLogger("starlette_rt")

SWEEP = 0.5  # seconds between two looks at deadlines, stalls, expiries and graces
ABREAST = 5.0  # seconds that a broadcast waits until this node's members have it
RETURNS = 500  # clients a second that are asked to come back after a drain
STATICS = Path(__file__).parent / "statics"


class Health(NamedTuple):
    """Whether a process is ready for connections, and what is wrong with it, in sentences."""

    ready: bool
    reasons: tuple[str, ...]


class Realtime:
    """Everything live in one process.

    ``url`` names the backend: ``memory://`` is this process alone; ``redis://``, ``rediss://`` and ``unix://`` are all
    processes on one Redis, and so is a ``redis.asyncio.Redis`` of the host's own. ``prefix`` is what its keys begin
    with. While Redis is away this node works alone: with ``fail_open`` it judges by what it knows, without it refuses
    what the others would have to be asked about. ``backend`` is one of the host's own instead.

    ``history`` says which groups remember what was said in them, by pattern, the first that fits:
    ``{"room:*": History(100, 300)}``; ``"~*"`` means what is pushed to people. ``outbox`` bounds what is kept for a
    slow peer, ``presence_grace`` is how many seconds a member stays after its connection ended. A client of the
    protocol v1 is pinged every ``ping_interval`` seconds and has ``ping_timeout`` seconds to say anything, and
    ``expiry_grace`` seconds after its token has run out to hand in a new one; whoever says nothing for
    ``idle_timeout`` seconds is closed. ``on_group_occupied`` and ``on_group_vacated`` are functions or coroutines of
    the host's that are called with the name of a group when its first member on all nodes has come and its last has
    gone, each on one node. ``metrics`` takes the counts. Raises `ConfigurationError` for what cannot work.

    Enter it with ``async with``, or let `RealtimeMiddleware` do that; entering nests, and when the last one has
    left it can be started again, in another event loop too.
    """

    def __init__(
        self,
        url: str | Redis = "memory://",
        *,
        history: Mapping[str, History] | None = None,
        backend: Backend | None = None,
        outbox: OutboxLimits = OutboxLimits(),  # noqa: B008 - frozen
        presence_grace: float = 10.0,
        ping_interval: float = 25.0,
        ping_timeout: float = 20.0,
        idle_timeout: float | None = None,
        expiry_grace: float = 10.0,
        prefix: str = "rt",
        fail_open: bool = True,
        on_group_occupied: Hook | None = None,
        on_group_vacated: Hook | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        if presence_grace < 0:
            raise ConfigurationError("presence_grace is a number of seconds, 0 or more")
        if expiry_grace < 0:
            raise ConfigurationError("expiry_grace is a number of seconds, 0 or more")
        self.heartbeats: Heartbeats = Heartbeats(ping_interval, ping_timeout, idle_timeout)
        self.idle_timeout: float | None = idle_timeout
        self._policies = Policies(history)
        self._expiry_grace = expiry_grace
        self._names = secrets.token_urlsafe(6)
        self._numbers = count(1)
        self.outbox: OutboxLimits = outbox
        self.metrics: Metrics = metrics if metrics is not None else Counters()
        self.faults: FaultLog = FaultLog()
        self.buckets: Buckets = Buckets()
        self.connections: dict[str, Connection] = {}
        self.watched: dict[Connection, None] = {}
        self.draining: bool = False
        self.warned: bool = False
        self._url = url
        self._backend = backend or from_url(
            url, grace=presence_grace, now=self._now, prefix=prefix, fail_open=fail_open
        )
        self._fail_open = fail_open
        self._hooks = on_group_occupied, on_group_vacated
        self._entered = 0
        self._wires: dict[tuple[Encoding, str | None, Carrier], Wire] = {}
        self._expiring: dict[Connection, None] = {}
        self._thread: int | None = None

    hub: Hub
    tasks: Tasks
    _feed: Feed
    _streams: Streams[Message]
    _orders: Orders
    _occupancy: Occupancy | None
    _token: EventLoopToken

    # Living.

    @property
    def running(self) -> bool:
        """Whether it has been started in this process."""
        return self._entered > 0

    async def __aenter__(self) -> Realtime:
        self._entered += 1
        if self._entered == 1:
            try:
                await self._start()
            except BaseException:
                self._entered = 0
                raise
        elif self._token != current_token():
            self._entered -= 1
            raise ConfigurationError("this Realtime runs in another event loop; make one for each loop")
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._entered == 1:
                with anyio.CancelScope(shield=True):
                    await self._stop()
        finally:
            self._entered -= 1

    async def _start(self) -> None:
        self.draining = False
        self.tasks = tasks()
        self.buckets, self.faults = Buckets(), FaultLog()  # what they keep is in this loop's time
        self._thread = threading.get_ident()
        self._token = current_token()
        self.hub = Hub(self.tasks.schedule, self.metrics)
        self._feed = Feed(self.hub, self._backend.presence, self.tasks)
        broker, ledger = self._backend.broker, self._backend.ledger
        self._streams = Streams(broker, self.tasks, self._spell, self._say, self._reset)
        self._orders = Orders(broker, ledger, self.tasks, self._obey)
        self._occupancy = None
        if any(self._hooks):
            self._occupancy = Occupancy(self._backend.presence, self.tasks, *self._hooks, self._failed)
            self._backend.presence.on_count = self._occupancy.counted
        self.hub.on_crowd = self._crowd
        await broker.start(self._deliver, self._resumed)
        await self._backend.presence.start(self._feed.changed)
        await self._orders.start()
        self._sweeper: Handle = self.tasks.spawn(self._sweep)
        if self._url == "memory://" and workers() > 1:
            logger.warning("memory:// reaches one process only, and %d workers run; use one worker", workers())

    async def _stop(self) -> None:
        """Close what is still open, wait for its end, and leave nothing running."""
        self._feed.close()
        await self.drain(self.outbox.close + 2 * SWEEP)  # time for the sweeper to drop who does not read its Close
        self._sweeper.cancel()
        self._streams.close()
        self._orders.close()
        await self.tasks.close(self.outbox.close)
        await self._backend.presence.stop()
        await self._backend.broker.stop()
        self._thread = None
        self.connections.clear()
        self.watched.clear()
        self._expiring.clear()
        self.heartbeats.clear()

    async def drain(self, deadline: float = 10.0) -> None:
        """Refuse newcomers and close every connection with 1012, each after what was said to it.

        Clients of the protocol v1 are told when to come back, each at a time of its own. Returns when all have
        ended or ``deadline`` seconds have passed. Call it before the server stops, where its own signal comes
        too late.
        """
        self._check_running()
        self.draining = True
        for connection in tuple(self.connections.values()):
            connection.begin_close(CloseCode.SERVICE_RESTART, CloseCode.SERVICE_RESTART.reason)
        with anyio.move_on_after(deadline):
            for connection in tuple(self.connections.values()):
                await connection.wait_closed()

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(SWEEP)
            self._look()

    def _look(self) -> None:
        """Look at whatever has a deadline; in a frame of its own, which keeps no connection alive."""
        now, wall = self.tasks.time(), time.time()
        for connection in tuple(self.watched):
            connection.look(now)
        for connection in [one for one in self._expiring if self._expires(one) <= wall]:
            connection.begin_close(CloseCode.TOKEN_EXPIRED, CloseCode.TOKEN_EXPIRED.reason)
        self.heartbeats.tick(now)
        self.buckets.sweep(now, 100)
        self._backend.presence.sweep()
        self._backend.broker.sweep()
        self._backend.limits.sweep()
        self._streams.tick(now)
        self._orders.tick(now)

    def _expires(self, connection: Connection) -> float:
        """When the connection ends for its token's sake, by the wall clock; who can hand in a new one has a grace."""
        expires_at = connection.user.expires_at
        grace = self._expiry_grace if connection.wire.v1 is not None else 0.0
        return math.inf if expires_at is None else expires_at + grace

    def come_back(self) -> int:
        """Return in how many milliseconds one of our clients should come back, so that not all come at once."""
        return round(1000 * random() * (1 + len(self.connections) / RETURNS))

    def _crowd(self, name: str, occupied: bool) -> None:
        """A group of the hub has got its first member or lost its last."""
        self._feed.crowd(name, occupied)
        if name[0] == "\0":
            return
        if self._occupancy is not None and name[0] != "~":
            self._occupancy.crowd(name, occupied)
        if occupied:
            self._backend.broker.subscribe(name)
        else:
            self._backend.broker.unsubscribe(name)
            self._streams.vacated(name)

    def _failed(self, error: BaseException) -> None:
        """Code of the host's has raised."""
        self.metrics.failed()
        self.faults.report(error, self.tasks.time())

    def _now(self) -> float:
        return self.tasks.time()

    def _check_running(self) -> None:
        if not self._entered:
            raise NotRunning(
                "this Realtime is not running; add Middleware(RealtimeMiddleware, realtime=rt) to the app, "
                "or write `async with rt:` around the work"
            )

    # Saying.

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
        """Send ``data`` to every member of ``group``.

        In a group with a history it is kept, and `Published.position` is its place; an ephemeral one is not.
        ``data`` is JSON data, bytes, a dataclass, a struct or a Pydantic model; it is copied now, later
        changes do not show. ``exclude`` is a connection, or its session, that does not get it. An
        ``ephemeral`` message may be dropped for a slow peer; of those with the same ``key`` only the latest
        is kept. Raises `TypeError` or `ValueError` for what is no data, `NotRunning`, `EventError`
        ``bad_name``, and `Unavailable` where the backend accepts nothing.
        """
        if key is not None and not ephemeral:
            raise ValueError("key= keeps only the latest of a kind; write ephemeral=True with it")
        session = exclude.session if isinstance(exclude, Connection) else exclude
        if session is not None and not isinstance(session, str):
            raise TypeError(f"exclude= is a connection or its session, not {type(session).__name__}")
        return await self._publish(check_name(group), data, event, session, ephemeral, key)

    async def _publish(
        self,
        group: str,
        data: Any,
        event: str,
        session: str | None = None,
        ephemeral: bool = False,
        key: str | None = None,
    ) -> Published:
        self._check_running()
        plain = plain_data(data)
        json = encode(plain)
        origin = ORIGIN.get()
        id = f"{self._names}{next(self._numbers):x}" if origin is None else origin.name()
        once = origin is not None
        publication = Publication(group, check_name(event, "event"), plain, json, session, ephemeral, key, id, once)
        self.metrics.published()
        policy = None if ephemeral else self._policies.of(group)
        published = await self._backend.broker.publish(publication, policy)
        if published.position is not None and (stream := self._streams.get(group)) is not None:
            await stream.passed(published.position.offset, ABREAST)
        if self.hub.pressed:
            await self.breathe()
        return published

    async def whisper(self, connection: Connection, group: str, declared: DeclaredWhisper, data: Any) -> None:
        """Relay what a client whispers to the others; ``msgspec.UNSET`` for the end of it."""
        sender, stop = connection.user.identity, data is msgspec.UNSET
        publication = Publication(
            group,
            declared.name,
            None if stop else data,
            b"" if stop else encode(data),
            connection.session,
            ephemeral=True,
            key=sender if declared.latest else None,
            sender=sender,
            expires_ms=declared.expires_ms,
            stop=stop,
        )
        await self._backend.broker.publish(publication, None)

    async def breathe(self) -> None:
        """Let the loop write what has been said: one who says much without a pause would fill every outbox."""
        self.hub.pressed = False
        await anyio.lowlevel.cancel_shielded_checkpoint()

    async def push(self, identity: str, data: Any, event: str = "message") -> Published:
        """Send ``data`` to every connection of one person: a broadcast to the group ``~identity``."""
        return await self._publish(f"~{person(identity)}", data, event)

    def broadcast_sync(self, group: str, data: Any, event: str = "message", **options: Any) -> Published:
        """`broadcast` from a ``def`` route or any other thread; waits for the loop to do it.

        Raises `RuntimeError` on the loop's own thread, which it would block: write ``await rt.broadcast(…)``.
        """
        return self._from_thread(partial(self.broadcast, group, data, event, **options))

    def push_sync(self, identity: str, data: Any, event: str = "message") -> Published:
        """`push` from a ``def`` route or any other thread."""
        return self._from_thread(partial(self.push, identity, data, event))

    def _from_thread(self, call: Any) -> Published:
        self._check_running()
        if threading.get_ident() == self._thread:
            raise RuntimeError("the …_sync verbs would block the event loop; write `await rt.broadcast(…)`")
        published: Published = anyio.from_thread.run(call, token=self._token)
        return published

    def _resumed(self) -> None:
        """Delivery was interrupted and goes on."""
        self._streams.recheck()
        self._orders.recheck()

    def _deliver(self, publication: Publication) -> None:
        """What the broker brings goes to the members on this node."""
        if publication.group == ORDERS:
            self._orders.receive(publication)
        elif publication.offset is not None:
            self._streams.receive(publication)
        elif publication.sender is not None:
            self.hub.deliver(publication.group, self._whispered(publication, publication.sender), publication.exclude)
        else:
            self.hub.deliver(publication.group, self._spell(publication, False), publication.exclude)

    def _spell(self, publication: Publication, seen: bool) -> Message:
        """Return what the members get of a publication; one that they have seen only moves their position."""
        if seen:
            return skip(publication)
        group = publication.group
        frame = Event(
            publication.event,
            publication.data,
            publication.json,
            None if group[0] == "~" and publication.offset is None else group,
            publication.offset,
            publication.tag or None,
            publication.id if publication.once else None,
        )
        key = None if publication.key is None else latest(publication)
        return Message(frame, len(publication.json), ephemeral=publication.ephemeral, key=key)

    def _whispered(self, publication: Publication, sender: str) -> Message:
        """Return what the others get of a whisper."""
        data = msgspec.UNSET if publication.stop else publication.data
        expires = None if publication.stop else publication.expires_ms
        frame = Whispered(publication.group, publication.event, sender, data, expires, publication.stop)
        key = None if publication.key is None else latest(publication)
        until = None if expires is None else self.tasks.time() + expires / 1000
        return Message(frame, len(publication.json), ephemeral=True, key=key, until=until)

    def _say(self, publication: Publication, message: Message) -> None:
        """Say a publication of a group with history: whoever is left out hears its place."""
        self.hub.deliver(publication.group, message, publication.exclude)
        if publication.exclude is not None and publication.offset is not None:
            self.hub.deliver(publication.group, skip(publication), Only(publication.exclude))

    def _reset(self, group: str, position: Position) -> None:
        """A group's history broke: its members hear of it."""
        self.hub.deliver(group, Message(Reset(group, position)))

    # Asking.

    async def online(self, identities: Iterable[str]) -> set[str]:
        """Return those of ``identities`` that have a connection, on any node. Raises `Unavailable`."""
        self._check_running()
        if isinstance(identities, str):
            raise TypeError("online() takes a list of identities: write rt.online([identity])")
        own = {f"~{person(identity)}": identity for identity in identities}
        here = own.keys() & self.hub.groups.keys()
        elsewhere = await self._backend.broker.subscribed_elsewhere(own.keys() - here)
        return {own[group] for group in here | elsewhere}

    async def history(self, group: str, last: int = 50) -> tuple[list[Publication], Position]:
        """Return the ``last`` publications of a group with history, oldest first, and the group's position.

        A page that is rendered with them hands the position to its client, which then misses nothing. Raises
        `ConfigurationError` for a group without history, `Unavailable` where it cannot be read.
        """
        log = await self._backend.broker.read(check_group(group), self._policy(group))
        return list(log.entries)[-last:] if last > 0 else [], log.position

    async def position(self, group: str) -> Position:
        """Return the present position of a group with history. Raises as `history` does."""
        return await self._backend.broker.position(check_group(group), self._policy(group))

    def _policy(self, group: str) -> History:
        self._check_running()
        policy = self._policies.of(group)
        if policy is None:
            raise ConfigurationError(
                f"{group!r} has no history; write Realtime(history={{{group!r}: History(100, 300)}})"
            )
        return policy

    async def presence(self, group: str, *, after: str | None = None, limit: int | None = None) -> dict[str, Member]:
        """Return who is present in ``group``, by key.

        With ``limit``, or ``after`` a key, it is a page in the order of the keys: at most ``limit`` members
        whose key follows ``after``. Without, all of them in no promised order.
        """
        self._check_running()
        return await self._backend.presence.members(check_group(group), after, limit)

    async def count(self, group: str, connections: bool = False) -> int:
        """Return how many members are present in ``group``, or how many connections of theirs."""
        self._check_running()
        return await self._backend.presence.count(check_group(group), connections)

    def stats(self) -> dict[str, int]:
        """Return what this process holds now and, from the default metrics, what it has counted."""
        held = {"connections": len(self.connections), "groups": 0, "slow": len(self.watched)}
        if self._entered:
            held["groups"] = sum(name[0] not in "~\0" for name in self.hub.groups)
        return {**held, **(self.metrics.totals if isinstance(self.metrics, Counters) else {})}

    def health(self) -> Health:
        """Return whether this process should be given connections, and what is wrong with it, for a readiness route.

        A backend that is away is no reason to send nobody here: the others have the same trouble, and this node
        goes on with what it has.
        """
        if not self._entered:
            return Health(False, ("this Realtime is not running",))
        own = ("it drains: its connections are going elsewhere",) if self.draining else ()
        return Health(not self.draining, (*own, *self._backend.broker.troubles()))

    # Sending away.

    async def disconnect(
        self,
        identity: str | None = None,
        *,
        connection: str | None = None,
        code: int = CloseCode.DISCONNECTED,
        reason: str = "",
    ) -> None:
        """Close all connections of ``identity``, or the one with the id ``connection``, wherever they are.

        Raises `ValueError` for a code that may not be sent, `Unavailable` if other nodes cannot be told: then those
        of this one are closed.
        """
        self._check_running()
        if (identity is None) == (connection is None):
            raise TypeError("disconnect() takes an identity or connection=, one of them")
        check_code(code)
        identity = None if identity is None else person(identity)
        reason = reason or (CloseCode.DISCONNECTED.reason if code == CloseCode.DISCONNECTED else "")
        await self._orders.give(Order("disconnect", code, reason, identity, connection))

    async def revoke(self, identity: str | None = None, *, token: str | None = None, ttl: float = 86400.0) -> None:
        """Refuse ``identity``, or the token with the id ``token``, for ``ttl`` seconds, and close what it has open.

        Raises `Unavailable` if other nodes cannot be told: then it holds on this one.
        """
        self._check_running()
        if (identity is None) == (token is None):
            raise TypeError("revoke() takes an identity or token=, one of them")
        identity = None if identity is None else person(identity)
        order = Order("revoke", CloseCode.UNAUTHORIZED, REVOKED, identity, token=token, until=time.time() + ttl)
        try:
            await self._backend.ledger.revoke(order.rule, order.until)
        finally:
            await self._orders.give(order)

    def _obey(self, order: Order) -> None:
        """Send away whom ``order`` names."""
        for each in self._named(order):
            each.begin_close(order.code, order.reason)

    def _named(self, order: Order) -> list[Connection]:
        if order.identity is not None:
            return self._of(order.identity)
        return self._with_id(order.connection) if order.connection is not None else self._with_token(order.token)

    async def revoked(self, identity: Identity) -> bool:
        """Whether this identity, or the token it came with, is revoked now."""
        rules = [f"user:{identity.identity}"]
        if identity.token_id is not None:
            rules.append(f"token:{identity.token_id}")
        return await self._backend.ledger.revoked(rules)

    async def claim(self, key: str, ttl: float) -> bool:
        """Take ``key`` for ``ttl`` seconds, once on all nodes; false if somebody has it.

        While the others cannot be asked it is taken on this node, or with ``fail_open=False`` raises `Unavailable`.
        """
        claim = await self._backend.ledger.claim(key, ttl, shared=not self._fail_open)
        return claim.state in ("first", "lost")

    def _of(self, identity: str | None) -> list[Any]:
        if person(identity).startswith("guest:"):  # guests are in no group of their own
            return [each for each in self.connections.values() if each.user.identity == identity]
        group = self.hub.groups.get(f"~{identity}")
        return list(group.members) if group is not None else []

    def _with_id(self, connection: str | None) -> list[Connection]:
        found = self.connections.get(connection or "")
        return [found] if found is not None else []

    def _with_token(self, token: str | None) -> list[Connection]:
        return [each for each in self.connections.values() if each.user.token_id == token]

    # What connections ask; see connection.Node.

    @property
    def ledger(self) -> Ledger:
        """What may happen once."""
        return self._backend.ledger

    @property
    def limits(self) -> LimitStore:
        """The budgets and caps that nodes share."""
        return self._backend.limits

    def wire(self, encoding: Encoding, protocol: str | None, carrier: Carrier) -> Wire:
        """Return the one wire of this protocol, or of plain in this encoding, and carrier."""
        key = encoding, protocol, carrier
        if key not in self._wires:
            spoken = V1S.get(protocol or "")
            self._wires[key] = Wire(PLAIN[encoding] if spoken is None else spoken, carrier)
        return self._wires[key]

    async def expect(self, user: Identity) -> None:
        """Be ready for what is pushed to ``user``: nothing is lost if `register` follows before the next await.

        `expect_no_more` has to follow, whatever happens. A backend that is away is not waited for.
        """
        if (own := own_group(user)) is None:
            return
        broker = self._backend.broker
        broker.subscribe(own)
        if not broker.troubles():
            with suppress(Unavailable):
                await (self.follow(own) if self.remembered(own) else broker.subscribed(own))

    def expect_no_more(self, user: Identity) -> None:
        """Let go of what `expect` has made ready, if nobody has come."""
        if (own := own_group(user)) is not None:
            self._backend.broker.unsubscribe(own)
            self.unfollow(own)

    def register(self, connection: Connection) -> None:
        """Count ``connection`` among ours, from before its accept to after its end."""
        self.connections[connection.id] = connection
        if (own := own_group(connection.user)) is not None:
            self.hub.join(connection, own)
            if self.remembered(own):
                connection.start_soon(self._follow_own, connection, own)
        if connection.user.expires_at is not None:
            self._expiring[connection] = None

    async def _follow_own(self, connection: Connection, own: str) -> None:
        """Tell a client where what is pushed to it stands: one that has been away asks for what it missed."""
        stream = None
        while stream is None:
            try:
                stream = await self.follow(own)
            except Unavailable:
                await anyio.sleep(SWEEP)
        if self._knows(connection):
            connection.joined(own, stream.position)
        self.unfollow(own)

    def welcome(self, connection: Connection) -> Welcome:
        """Return the first frame to a client of the protocol v1."""
        return Welcome(
            connection.id,
            connection.session,
            connection.user.identity,
            round(self.heartbeats.interval * 1000),
            round(self.heartbeats.timeout * 1000),
            ttl_ms(connection.user),
            round(ONCE * 1000),
            WINDOW,
            connection.max_message_size,
        )

    def renew(self, connection: Connection, user: Identity) -> int | None:
        """Let ``connection`` go on with a new token; return the milliseconds that it is good for."""
        connection.user = user
        self._expiring.pop(connection, None)
        if user.expires_at is not None:
            self._expiring[connection] = None
        return ttl_ms(user)

    def forget(self, connection: Connection) -> None:
        """End whatever ``connection`` is in; its metas linger for the presence grace."""
        self.hub.forget(connection)
        self._backend.presence.close(connection.tracked, connection.user.identity, connection.id)
        connection.tracked = ()
        self.connections.pop(connection.id, None)
        self._expiring.pop(connection, None)
        self.heartbeats.discard(connection)

    async def join(self, connection: Connection, group: str, presence: Watch | None) -> Position | None:
        """See `Connection.join`."""
        check_group(group)
        if presence not in (None, "members", "count"):
            raise ValueError('presence= is "members", "count" or None')
        stream = await self.follow(group)
        position = None if stream is None else stream.position
        if self.enter(connection, group):
            connection.joined(group, position)
        if presence is not None:
            await self.watch(connection, group, presence)
        return position

    def remembered(self, group: str) -> bool:
        """Whether ``group`` has a history."""
        return self._policies.of(group) is not None

    async def follow(self, group: str) -> Stream[Message] | None:
        """Return the history of ``group`` on this node, up to date; ``None`` if it has none.

        What is published from now on arrives at who becomes a member before the next await.
        """
        policy = self._policies.of(group)
        if policy is not None:
            return await self._streams.follow(group, policy)
        await self._hear(group)
        return None

    async def _hear(self, group: str) -> None:
        """Wait until other nodes are heard in ``group``; while that cannot be, this one alone has to do."""
        broker = self._backend.broker
        broker.subscribe(group)
        try:
            with suppress(Unavailable):
                await broker.subscribed(group)
        finally:
            broker.unsubscribe(group)

    def enter(self, connection: Connection, group: str) -> bool:
        """Make ``connection`` a member of ``group``; false if it is one, or has ended."""
        if self._knows(connection):
            return self.hub.join(connection, group)
        self.unfollow(group)
        return False

    def unfollow(self, group: str) -> None:
        """Let go of the history of ``group`` if nobody here is in it."""
        if group not in self.hub.groups:
            self._streams.vacated(group)

    async def watch(self, connection: Connection, group: str, presence: Watch) -> None:
        """Tell ``connection`` who is present in ``group``."""
        if self._knows(connection):
            await self._feed.watch(connection, group, presence)

    async def leave(self, connection: Connection, group: str) -> None:
        """See `Connection.leave`."""
        self.hub.leave(connection, check_group(group))
        self._feed.unwatch(connection, group)
        await self.untrack(connection, group)

    async def track(self, connection: Connection, group: str, meta: Any) -> None:
        """See `Connection.track`."""
        check_group(group)
        plain = plain_meta(meta)
        if not self._knows(connection):
            return
        if group not in connection.tracked:
            connection.tracked = (*connection.tracked, group)
        await self._backend.presence.track(group, connection.user.identity, connection.id, plain)

    update = track

    async def untrack(self, connection: Connection, group: str) -> None:
        """See `Connection.untrack`."""
        if group in connection.tracked:
            connection.tracked = tuple(each for each in connection.tracked if each != group)
            await self._backend.presence.untrack(group, connection.user.identity, connection.id)

    def _knows(self, connection: Connection) -> bool:
        """Whether ``connection`` has not ended: one that has can join nothing."""
        return self.connections.get(connection.id) is connection

    # Without an event loop.

    def blocking(self) -> Blocking:
        """Return the verbs for code without an event loop: ``with Realtime(url).blocking() as rt: rt.push(…)``."""
        return Blocking(self)

    # Function style.

    def accept(
        self,
        websocket: WebSocket,
        *,
        identity: Identity | None = None,
        anonymous: bool | None = None,
        encoding: Encoding = "json",
        limits: Iterable[RateLimit] = (),
        authorize: Authorize | None = None,
    ) -> Acceptance:
        """Take over ``websocket`` for the length of an ``async with``, which yields a `Connection`.

        It is accepted if the host has not done so. ``identity`` is who the host's own code says it is,
        otherwise the token and the host's user decide; ``anonymous`` lets guests in; ``authorize(group)`` says
        which groups the client may join itself (none without it). When the peer leaves,
        the body is cancelled at its next await and the ``async with`` ends quietly. A refused handshake
        never gets to the body: what is raised instead ends the request, and `RealtimeMiddleware` swallows it.
        """
        return Acceptance(self, websocket, identity, anonymous, encoding, tuple(limits), authorize)

    def static(self) -> StaticFiles:
        """Return an ASGI app that serves the JavaScript client: ``Mount("/rt", rt.static())``."""
        from starlette.staticfiles import StaticFiles

        mimetypes.add_type("text/javascript", ".js")  # some systems have no word for it, some a wrong one
        return StaticFiles(directory=STATICS)


def ttl_ms(user: Identity) -> int | None:
    """Return the milliseconds that a token is still good for, ``None`` if for ever."""
    return None if user.expires_at is None else max(0, round((user.expires_at - time.time()) * 1000))


def own_group(user: Identity) -> str | None:
    """Return the group of all connections of one person; guests have none."""
    return f"~{user.identity}" if user.is_authenticated else None


def latest(publication: Publication) -> str:
    """Return the key of a kind: a cursor of one group must not take the place of a cursor of another."""
    return f"{publication.group}\n{publication.event}\n{publication.key}"


def person(identity: object) -> str:
    """Return ``identity`` if it is the name of one; raises `TypeError` for an `Identity`, which has it."""
    if isinstance(identity, str):
        return identity
    raise TypeError(f"an identity is named by its text: write identity.identity, not {type(identity).__name__}")


def workers() -> int:
    """Return how many workers this process's server was told to run, by its command line or WEB_CONCURRENCY."""
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    for flag, value in pairwise(words):
        if flag in ("--workers", "-w") and value.isdecimal():
            return int(value)
    told = os.environ.get("WEB_CONCURRENCY", "1")
    return int(told) if told.isdecimal() else 1
