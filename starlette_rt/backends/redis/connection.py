"""What the roles share of one Redis: its connections, the names of its keys, and whether it is there.

The law of this file: every role speaks to Redis through one `Link`, so that everything this process says stands in
one order and everything it knows of Redis has one truth. All keys of a group carry its name in braces, so that they
lie in one slot. It knows no role.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import anyio
from redis.asyncio.connection import ConnectionPool

from ...exceptions import ConfigurationError, Unavailable
from ...loop import Handle, Tasks, tasks
from .pipe import CONNECT, Pipe, Script
from .subscriber import Receive, Subscriber
from .wire import Argument, Make

logger: logging.Logger = logging.getLogger("starlette_rt")

FORMAT = 1  # of what is stored and sent; a node reads this one and the one before
PROBE = 1.0  # seconds between two messages of a node to itself
DEAF = 3  # of them that may be missing before the subscriber is taken to be deaf
GATHERING = 0.05  # seconds between two looks whether all hear again
FAREWELL = 1.0  # seconds for what is still on its way at the end

SCHEMES = {"valkey": "redis", "valkeys": "rediss"}

__all__ = ["FORMAT", "Link", "Script", "lifetime"]


class Link:
    """The way to one Redis. See `Pipe` and `Subscriber` for what it promises.

    ``on_up`` and ``on_down`` are told when Redis comes and goes, ``on_resumed`` when live delivery was interrupted
    and goes on: what came meanwhile has been missed.
    """

    def __init__(self, source: Any, *, prefix: str, scripts: Sequence[Script]) -> None:
        self._make, database = connections_of(source)
        self.prefix: str = check_prefix(prefix) + (f":{database}" if database else "")
        self._scripts = scripts
        self.on_up: list[Callable[[], None]] = []
        self.on_down: list[Callable[[], None]] = []
        self.on_resumed: list[Callable[[], None]] = []
        self.node: str = ""

    tasks: Tasks
    peers: int  # nodes that hear, this one too, as of the last look
    _pipe: Pipe
    _subscriber: Subscriber
    _prober: Handle

    # Names.

    def key(self, *parts: str) -> bytes:
        """Return the key with these parts."""
        return ":".join((self.prefix, *parts)).encode("utf-8", "surrogatepass")

    def group_key(self, group: str, kind: str) -> bytes:
        """Return a key of ``group``; all of them lie in one slot."""
        return self.key(f"{{{escaped(group)}}}", kind)

    # Saying and asking.

    @property
    def up(self) -> bool:
        """Whether Redis is there."""
        return self._pipe.up

    @property
    def run_id(self) -> str:
        """The name of this run of the server; empty where it may not be asked."""
        return self._pipe.run_id

    def now_ms(self) -> int:
        """Return the time by the clock of Redis, as near as it is known."""
        return self._pipe.now_ms()

    async def look_at_clock(self) -> None:
        """Read the clock of Redis again."""
        await self._pipe.look_at_clock()

    async def call(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Argument] = (),
        *,
        last: Callable[[], Sequence[Argument]] | None = None,
    ) -> Any:
        """Run ``script``, perhaps twice, and return its answer; ``last`` makes the last arguments when it is written.

        Raises `Unavailable`.
        """
        command = "EVALSHA", script.sha, len(keys), *keys, *args
        return await self._pipe.ask(command if last is None else lambda: (*command, *last()))

    def cast_call(
        self,
        script: Script,
        keys: Sequence[bytes],
        args: Sequence[Argument] = (),
        lost: Callable[[], object] | None = None,
    ) -> bool:
        """Run ``script`` without waiting for its answer; see `cast`."""
        return self._pipe.say("EVALSHA", script.sha, len(keys), *keys, *args, lost=lost)

    async def command(self, *arguments: Argument) -> Any:
        """Say a command and return its answer. Raises `Unavailable`."""
        return await self._pipe.ask(arguments)

    def cast(self, *arguments: Argument, lost: Callable[[], object] | None = None) -> bool:
        """Say a command and want no answer; false if Redis is away. ``lost`` is told if it may not have arrived."""
        return self._pipe.say(*arguments, lost=lost)

    # Hearing.

    def subscribe(self, channel: bytes, receive: Receive) -> None:
        """Hear ``channel`` from when Redis has confirmed it."""
        self._subscriber.subscribe(channel, receive)

    def unsubscribe(self, channel: bytes) -> None:
        """Hear ``channel`` no longer."""
        self._subscriber.unsubscribe(channel)

    def wants(self, channel: bytes) -> bool:
        """Whether ``channel`` is to be heard."""
        return self._subscriber.wants(channel)

    async def subscribed(self, channel: bytes) -> None:
        """Wait until Redis has confirmed ``channel``. Raises `Unavailable`."""
        await self._subscriber.subscribed(channel)

    # Living.

    async def start(self) -> None:
        """Connect; a Redis that is away is waited for beside.

        Raises `ConfigurationError` where it is there and refuses us.
        """
        self.node = secrets.token_hex(6)
        self.tasks = tasks()
        self._subscriber = Subscriber(self._make, self.tasks, self._heard_again)
        self._pipe = Pipe(self._make, self.tasks, self._scripts, self._opened, self._came, self._went)
        self._unheard = 0
        self._missed = False
        self.peers = 0
        self.subscribe(self.key("probe", self.node), self._probed)
        self.subscribe(self.key("probe"), self._probed)  # its subscribers are counted, nothing is said on it
        try:
            await self._connect()
        except BaseException:
            await self._disconnect()
            raise
        self._prober = self.tasks.spawn(self._probe)

    async def _connect(self) -> None:
        self._subscriber.start()
        await self._pipe.start()
        if self._subscriber.refused:
            raise ConfigurationError(f"redis refuses to let us subscribe: {self._subscriber.refused}")
        if not self.up:
            logger.warning("%s; this node works alone until it is there", self.trouble)

    async def stop(self) -> None:
        """End, after what was said has left."""
        await self._pipe.flushed(FAREWELL)
        self._prober.cancel()
        await self._disconnect()

    async def _disconnect(self) -> None:
        self._subscriber.stop()
        await self._pipe.stop()
        await self.tasks.close(0.0)

    @property
    def trouble(self) -> str:
        """What is wrong with Redis now; empty if nothing is."""
        if self._pipe.up and not self._subscriber.up:
            return self._subscriber.refused or "redis is there, and nothing is heard of other nodes"
        return self._pipe.trouble

    async def _opened(self) -> None:
        """A connection that says is ready; after an outage the one that hears comes first."""
        if not self.up:
            await self._subscriber.back(CONNECT)

    async def gathered(self, peers: int, deadline: float) -> bool:
        """Wait until ``peers`` nodes hear, for at most ``deadline`` seconds; false if they do not."""
        with anyio.move_on_after(deadline), suppress(Unavailable):
            while await self._count() < peers:  # noqa: ASYNC110 - Redis has no way to say it
                await anyio.sleep(GATHERING)
            return True
        return False

    async def _count(self) -> int:
        """Return how many nodes hear."""
        _, count = await self.command("PUBSUB", "NUMSUB", self.key("probe"))
        return int(count)

    def _came(self) -> None:
        self._unheard = 0
        logger.info("redis is there")
        tell(self.on_up)
        self._resume()

    def _went(self) -> None:
        logger.warning("%s; this node works alone until it is back", self._pipe.trouble)
        self._subscriber.lose(self._pipe.trouble)
        tell(self.on_down)

    def _heard_again(self, lost: bool) -> None:
        self._unheard = 0
        self._missed = self._missed or lost
        self._resume()

    def _resume(self) -> None:
        """What was missed can be asked for when both are there, in whichever order they have come."""
        if self._missed and self._pipe.up and self._subscriber.up:
            self._missed = False
            tell(self.on_resumed)

    async def _probe(self) -> None:
        """Send a message to ourselves now and then: who does not hear it is deaf, whatever the connection says."""
        channel = self.key("probe", self.node)
        while True:
            await anyio.sleep(PROBE)
            if not self.cast("PUBLISH", channel, b"?"):
                self._unheard = 0
                continue
            self._unheard += 1
            if self._unheard > DEAF:
                self._unheard = 0
                self._subscriber.lose("it has gone deaf")
            with suppress(Unavailable):
                self.peers = await self._count()

    def _probed(self, payload: bytes) -> None:
        self._unheard = 0


def tell(listeners: list[Callable[[], None]]) -> None:
    """Call each of ``listeners``."""
    for listener in tuple(listeners):
        listener()


def connections_of(source: Any) -> tuple[Make, int]:
    """Return what makes connections like those of ``source``, a URL or a client of redis-py, and its database.

    What is not ours to choose (address, TLS, user, database) is taken over; what must be our way is not: the
    protocol, time-outs and retries. Raises `ConfigurationError`.
    """
    pool = pool_of(source) if isinstance(source, str) else getattr(source, "connection_pool", None)
    if not isinstance(pool, ConnectionPool):
        raise ConfigurationError(
            f'{source!r} is no Redis: write Realtime("redis://localhost:6379/0") or give a redis.asyncio.Redis'
        )
    given = {name: value for name, value in pool.connection_kwargs.items() if name not in REPLACED}
    options = {**given, **OURS}
    return lambda: pool.connection_class(**options), int(given.get("db") or 0)


OURS: dict[str, Any] = {
    "protocol": 2,
    "decode_responses": False,
    "socket_timeout": None,
    "socket_connect_timeout": CONNECT,
}
REPLACED = {
    "health_check_interval",
    "himport_registry",
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "orig_host_address",
    "orig_socket_connect_timeout",
    "orig_socket_timeout",
    "retry",
    "retry_on_error",
    "retry_on_timeout",
}


def pool_of(url: str) -> ConnectionPool:
    """Return the pool that redis-py makes of ``url``, of which nothing is used but its settings."""
    scheme, _, rest = url.partition("://")
    try:
        return ConnectionPool.from_url(f"{SCHEMES.get(scheme, scheme)}://{rest}")
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"Realtime(<url>): {error}") from None


def check_prefix(prefix: object) -> str:
    """Return ``prefix`` if keys can begin with it."""
    if isinstance(prefix, str) and prefix and not set(prefix) & set("{}\0\n "):
        return prefix
    raise ConfigurationError(f'prefix={prefix!r}: write a word that all your keys begin with, like prefix="rt"')


def escaped(group: str) -> str:
    """Return ``group`` without braces, which are what Redis finds the slot by."""
    return group.replace("%", "%25").replace("{", "%7B").replace("}", "%7D")


def lifetime(seconds: float) -> int:
    """Return in milliseconds for how long a key lives, which is never not at all."""
    return max(1, round(seconds * 1000))
