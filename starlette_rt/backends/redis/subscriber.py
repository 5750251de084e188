"""The connection that hears: every channel this process wants, and what arrives there.

The law of this file: what is wanted is one table, and the connection follows it: in batches at the end of a turn,
and whole again after each reconnect. Who receives must not wait and must not raise. A subscriber cannot know that
it has gone deaf; its owner finds out, and says `lose`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import anyio

from ...exceptions import Unavailable
from ...loop import Handle, Tasks
from .pipe import CONNECT, PAUSES, TROUBLES
from .wire import Make, Refusal, Wire, opened, pack

logger: logging.Logger = logging.getLogger("starlette_rt")

BATCH = 512  # channels in one command
CONFIRM = 1.0  # seconds that Redis has to confirm a subscription
AWAY = "redis is away: nothing is heard of other nodes now"

Receive = Callable[[bytes], None]


class Subscriber:
    """One connection to Redis that is subscribed to what is wanted.

    ``on_up`` is told when everything wanted is subscribed, with whether something may have been missed since it was
    last.
    """

    def __init__(self, make: Make, tasks: Tasks, on_up: Callable[[bool], None]) -> None:
        self._make, self._tasks, self._on_up = make, tasks, on_up
        self.up: bool = False
        self.refused: str = ""  # why Redis does not let us subscribe
        self._wanted: dict[bytes, Receive] = {}
        self._add: dict[bytes, None] = {}
        self._drop: dict[bytes, None] = {}
        self._pending: dict[bytes, None] = {}  # subscriptions that Redis has not confirmed
        self._waiting: dict[bytes, list[asyncio.Future[None]]] = {}
        self._missing = 0  # confirmations until everything that was wanted at the start of the connection is there
        self._attempts = 0  # to connect, since it was up
        self._lost = self._scheduled = False
        self._changed = anyio.Event()
        self._wire: Wire | None = None
        self._supervisor: Handle | None = None

    # What is wanted.

    def subscribe(self, channel: bytes, receive: Receive) -> None:
        """Want ``channel``: from when Redis has it, each message is given to ``receive``."""
        self._wanted[channel] = receive
        if channel in self._drop:
            del self._drop[channel]
        else:
            self._add[channel] = None
        self._plan()

    def unsubscribe(self, channel: bytes) -> None:
        """Want ``channel`` no longer."""
        if self._wanted.pop(channel, None) is None:
            return
        if channel in self._add:
            del self._add[channel]
        else:
            self._drop[channel] = None
        self._plan()

    def wants(self, channel: bytes) -> bool:
        """Whether ``channel`` is wanted."""
        return channel in self._wanted

    async def subscribed(self, channel: bytes) -> None:
        """Wait until Redis has confirmed ``channel``. Raises `Unavailable`."""
        if not self.up:
            raise Unavailable(AWAY)
        if channel not in self._add and channel not in self._pending:
            return
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(channel, []).append(confirmed)
        try:
            with anyio.fail_after(CONFIRM):
                await confirmed
        except TimeoutError:
            raise Unavailable("redis does not confirm a subscription") from None

    def _plan(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._tasks.schedule(self._flush)

    def _flush(self) -> None:
        """Tell Redis what has changed; while it has not confirmed the last change, the next one gathers."""
        self._scheduled = False
        if self._wire is None or self._pending or not (self._add or self._drop):
            return
        gone, wanted = list(self._drop), list(self._add)
        self._drop, self._add = {}, {}
        self._pending = dict.fromkeys(wanted)
        self._wire.write([*commands(b"UNSUBSCRIBE", gone), *commands(b"SUBSCRIBE", wanted)])

    # What arrives.

    def _answered(self, answer: Any) -> None:
        if isinstance(answer, Refusal):
            self.refused = str(answer)
            logger.warning("redis does not let us subscribe: %s", answer)
            return self.lose(self.refused)
        kind, channel, payload = answer
        if kind == b"message":
            self._received(channel, payload)
        elif kind == b"subscribe":
            self._confirmed(channel)

    def _received(self, channel: bytes, payload: bytes) -> None:
        receive = self._wanted.get(channel)
        if receive is None:
            return  # it was on its way when it was given up
        try:
            receive(payload)
        except Exception:
            logger.exception("what arrived on a channel could not be taken")

    def _confirmed(self, channel: bytes) -> None:
        self._pending.pop(channel, None)
        for waiting in self._waiting.pop(channel, ()) if channel not in self._add else ():
            if not waiting.done():
                waiting.set_result(None)
        if not self._pending:
            self._flush()
        if self._missing:
            self._missing -= 1
            if not self._missing:
                self._complete()

    # Living.

    def start(self) -> None:
        """Begin to connect."""
        self._supervisor = self._tasks.spawn(self._run)

    def stop(self) -> None:
        """End."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._wire is not None:
            self._wire.drop()
        self._away()

    async def back(self, deadline: float) -> bool:
        """Wait until it is up, for at most ``deadline`` seconds."""
        with anyio.move_on_after(deadline):
            while not self.up:
                await self._changed.wait()
        return self.up

    def lose(self, reason: str) -> None:
        """Begin again with a new connection."""
        logger.debug("the subscriber begins again: %s", reason)
        if self._wire is not None:
            self._away()
            self._wire.drop()

    async def _run(self) -> None:
        while True:
            try:
                with anyio.fail_after(CONNECT):
                    wire = await opened(self._make)
            except TROUBLES as error:
                logger.debug("the subscriber cannot connect: %s", error)
            else:
                try:
                    await self._live(wire)
                finally:
                    self._wire = None
                    wire.drop()
            self._away()
            pause = PAUSES[min(self._attempts, len(PAUSES) - 1)]
            self._attempts += 1
            await anyio.sleep(random.uniform(pause / 2, pause))

    async def _live(self, wire: Wire) -> None:
        """Hear over ``wire`` until it is lost."""
        self._add, self._drop = dict.fromkeys(self._wanted), {}
        self._pending.clear()
        self._missing = len(self._add)
        lost = anyio.Event()
        wire.on_answer, wire.on_lost, wire.on_room = self._answered, lost.set, self._flush
        self._wire = wire
        if not self._missing:
            self._complete()
        self._flush()
        if not wire.lost:
            await lost.wait()

    def _complete(self) -> None:
        lost, self._lost = self._lost, False
        self.up, self.refused, self._attempts = True, "", 0
        self._changed.set()
        self._changed = anyio.Event()
        self._on_up(lost)

    def _away(self) -> None:
        self.up, self._lost = False, True
        waiting, self._waiting = self._waiting, {}
        for future in chain.from_iterable(waiting.values()):
            if not future.done():
                future.set_exception(Unavailable(AWAY))


def commands(verb: bytes, channels: list[bytes]) -> Iterable[bytes]:
    """Return as many commands as ``channels`` need."""
    return [pack((verb, *channels[start : start + BATCH])) for start in range(0, len(channels), BATCH)]
