"""The facade: what the host holds, and the only place where this node and the others meet.

The law of this file: a verb of the host is checked here, given to the backend, and what comes back from the
backend goes to the hub. It owns what lives as long as the process serves: the hub, the tasks, the sweeper.
It knows no HTTP; who may come in is decided in `gate.py`, what a handler does in `endpoints.py`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
from anyio.lowlevel import EventLoopToken, current_token

from .backends import from_url
from .backends.base import Backend, Publication, Published
from .connection import Connection, check_code
from .exceptions import CloseCode, ConfigurationError, NotRunning
from .faults import FaultLog
from .feed import Feed, Watch
from .frames import Event, check_group, check_name, encode, plain_data, plain_meta
from .gate import Acceptance
from .hub import Hub, Message, Wire
from .limits import Buckets, RateLimit
from .loop import Handle, Tasks, tasks
from .metrics import Counters, Metrics
from .outbox import OutboxLimits
from .presence import Member
from .protocols.plain import PLAIN, Encoding
from .seams import Carrier

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

    from .identity import Identity

logger: logging.Logger = logging.getLogger("starlette_rt")

SWEEP = 0.5  # seconds between two looks at deadlines, stalls, expiries and graces


class Realtime:
    """Everything live in one process.

    ``url`` names the backend: ``memory://`` is this process alone; ``backend`` is one of the host's own
    instead. ``outbox`` bounds what is kept for a slow
    peer, ``presence_grace`` is how many seconds a member stays after its connection ended, ``metrics`` takes
    the counts. Enter it with ``async with``, or let `RealtimeMiddleware` do that; entering nests, and when
    the last one has left it can be started again, in another event loop too.
    """

    def __init__(
        self,
        url: str = "memory://",
        *,
        backend: Backend | None = None,
        outbox: OutboxLimits = OutboxLimits(),  # noqa: B008 - frozen
        presence_grace: float = 10.0,
        metrics: Metrics | None = None,
    ) -> None:
        if presence_grace < 0:
            raise ConfigurationError("presence_grace is a number of seconds, 0 or more")
        self.outbox: OutboxLimits = outbox
        self.metrics: Metrics = metrics if metrics is not None else Counters()
        self.faults: FaultLog = FaultLog()
        self.buckets: Buckets = Buckets()
        self.connections: dict[str, Connection] = {}
        self.watched: dict[Connection, None] = {}
        self.draining: bool = False
        self.warned: bool = False
        self._url = url
        self._backend = backend or from_url(url, grace=presence_grace, now=self._now)
        self._entered = 0
        self._wires: dict[tuple[Encoding, Carrier], Wire] = {}
        self._expiring: dict[Connection, None] = {}
        self._thread: int | None = None

    hub: Hub
    tasks: Tasks
    _feed: Feed
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
        self.hub.on_crowd = self._feed.crowd
        await self._backend.broker.start(self._deliver)
        await self._backend.presence.start(self._feed.changed)
        self._sweeper: Handle = self.tasks.spawn(self._sweep)
        if self._url == "memory://" and workers() > 1:
            logger.warning("memory:// reaches one process only, and %d workers run; use one worker", workers())

    async def _stop(self) -> None:
        """Close what is still open, wait for its end, and leave nothing running."""
        self._feed.close()
        await self.drain(self.outbox.close + 2 * SWEEP)  # time for the sweeper to drop who does not read its Close
        self._sweeper.cancel()
        await self.tasks.close(self.outbox.close)
        await self._backend.presence.stop()
        await self._backend.broker.stop()
        self._thread = None
        self.connections.clear()
        self.watched.clear()
        self._expiring.clear()

    async def drain(self, deadline: float = 10.0) -> None:
        """Refuse newcomers and close every connection with 1012, each after what was said to it.

        Returns when all have ended or ``deadline`` seconds have passed. Call it before the server stops,
        where its own signal comes too late.
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
        for connection in [one for one in self._expiring if expires(one) <= wall]:
            connection.begin_close(CloseCode.TOKEN_EXPIRED, CloseCode.TOKEN_EXPIRED.reason)
        self.buckets.sweep(now, 100)
        self._backend.presence.sweep()

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
        publication = Publication(group, check_name(event, "event"), plain, encode(plain), session, ephemeral, key)
        self.metrics.published()
        published = await self._backend.broker.publish(publication)
        if self.hub.pressed:
            await self.breathe()
        return published

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

    def _deliver(self, publication: Publication) -> None:
        """What the broker brings goes to the members on this node."""
        frame = Event(publication.event, publication.data, publication.json, publication.group)
        # The latest of a kind: a cursor of one group must not take the place of a cursor of another.
        key = None if publication.key is None else f"{publication.group}\n{publication.event}\n{publication.key}"
        message = Message(frame, len(publication.json), ephemeral=publication.ephemeral, key=key)
        self.hub.deliver(publication.group, message, publication.exclude)

    # Asking.

    async def online(self, identities: Iterable[str]) -> set[str]:
        """Return those of ``identities`` that have a connection."""
        self._check_running()
        if isinstance(identities, str):
            raise TypeError("online() takes a list of identities: write rt.online([identity])")
        return {identity for identity in identities if f"~{identity}" in self.hub.groups}

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

    # Sending away.

    async def disconnect(
        self,
        identity: str | None = None,
        *,
        connection: str | None = None,
        code: int = CloseCode.DISCONNECTED,
        reason: str = "",
    ) -> None:
        """Close all connections of ``identity``, or the one with the id ``connection``.

        Raises `ValueError` for a code that may not be sent.
        """
        self._check_running()
        if (identity is None) == (connection is None):
            raise TypeError("disconnect() takes an identity or connection=, one of them")
        check_code(code)
        for each in self._of(identity) if identity is not None else self._with_id(connection):
            each.begin_close(code, reason or (CloseCode.DISCONNECTED.reason if code == CloseCode.DISCONNECTED else ""))

    async def revoke(self, identity: str | None = None, *, token: str | None = None, ttl: float = 86400.0) -> None:
        """Refuse ``identity``, or the token with the id ``token``, for ``ttl`` seconds, and close what it has open."""
        self._check_running()
        if (identity is None) == (token is None):
            raise TypeError("revoke() takes an identity or token=, one of them")
        rule = f"user:{person(identity)}" if identity is not None else f"token:{token}"
        await self._backend.ledger.revoke(rule, time.time() + ttl)
        affected = self._of(identity) if identity is not None else self._with_token(token)
        for each in affected:
            each.begin_close(CloseCode.UNAUTHORIZED, "revoked")

    async def revoked(self, identity: Identity) -> bool:
        """Whether this identity, or the token it came with, is revoked now."""
        rules = [f"user:{identity.identity}"]
        if identity.token_id is not None:
            rules.append(f"token:{identity.token_id}")
        return await self._backend.ledger.revoked(rules)

    async def claim(self, key: str, ttl: float) -> bool:
        """Take ``key`` for ``ttl`` seconds, once for the whole fleet; false if somebody has it."""
        return await self._backend.ledger.claim(key, ttl)

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

    def wire(self, encoding: Encoding, carrier: Carrier) -> Wire:
        """Return the one wire of this encoding and carrier."""
        key = encoding, carrier
        if key not in self._wires:
            self._wires[key] = Wire(PLAIN[encoding], carrier)
        return self._wires[key]

    def register(self, connection: Connection) -> None:
        """Count ``connection`` among ours, from before its accept to after its end."""
        self.connections[connection.id] = connection
        if connection.user.is_authenticated:
            self.hub.join(connection, f"~{connection.user.identity}")
        if connection.user.expires_at is not None:
            self._expiring[connection] = None

    def forget(self, connection: Connection) -> None:
        """End whatever ``connection`` is in; its metas linger for the presence grace."""
        self.hub.forget(connection)
        self._backend.presence.close(connection.tracked, connection.user.identity, connection.id)
        connection.tracked = ()
        self.connections.pop(connection.id, None)
        self._expiring.pop(connection, None)

    async def join(self, connection: Connection, group: str, presence: Watch | None) -> None:
        """See `Connection.join`."""
        check_group(group)
        if presence not in (None, "members", "count"):
            raise ValueError('presence= is "members", "count" or None')
        if self._knows(connection):
            self.hub.join(connection, group)
            if presence is not None:
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

    # Function style.

    def accept(
        self,
        websocket: WebSocket,
        *,
        identity: Identity | None = None,
        anonymous: bool | None = None,
        encoding: Encoding = "json",
        limits: Iterable[RateLimit] = (),
    ) -> Acceptance:
        """Take over ``websocket`` for the length of an ``async with``, which yields a `Connection`.

        It is accepted if the host has not done so. ``identity`` is who the host's own code says it is,
        otherwise the token and the host's user decide; ``anonymous`` lets guests in. When the peer leaves,
        the body is cancelled at its next await and the ``async with`` ends quietly. A refused handshake
        never gets to the body: what is raised instead ends the request, and `RealtimeMiddleware` swallows it.
        """
        return Acceptance(self, websocket, identity, anonymous, encoding, tuple(limits))


def expires(connection: Connection) -> float:
    """Return when the connection's token expires, in wall-clock seconds."""
    return connection.user.expires_at or float("inf")


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
