"""The connection that says and asks: one for everything, first in first out.

The law of this file: what is said in one turn of the loop leaves as one write, in the order of the calls, and the
answers come in that order. A connection that is lost comes back and what was on its way is said again, so whatever
is said must bear being said twice. A Redis that does not answer for a quarter of a second is away: from then on
everything fails at once, nobody waits, and this side alone looks for its return. It knows no group and no key.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from hashlib import sha1
from importlib.resources import files
from typing import Any

import anyio

from ...exceptions import ConfigurationError, Unavailable
from ...loop import Handle, Tasks
from .wire import Argument, Make, RedisError, Refusal, Refused, Wire, answers, opened, pack

logger: logging.Logger = logging.getLogger("starlette_rt")

PATIENCE = 0.25  # seconds without any answer after which Redis is taken to be away
PARTS = 5  # looks in that time: a stall of our own loop is one look late, not a Redis that is away
LINGER = 20  # looks without anything to look at before the watch ends
CONNECT = 1.0  # seconds that one attempt to connect has
REPEATS = 3  # times that a command is said again because Redis has forgotten its script
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)  # seconds, at most, between two attempts; the last one from then on
TROUBLES = (RedisError, Refused, OSError, TimeoutError)  # what an attempt to connect may end with


class Script:
    """A Lua script of the folder ``lua/``: loaded with each connection, called by its digest."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.body: bytes = (files(str(__package__)) / "lua" / f"{name}.lua").read_bytes()
        self.sha: bytes = sha1(self.body, usedforsecurity=False).hexdigest().encode()


class Command:
    """Something that is said, who waits for the answer if somebody does, and who is told that it may be lost.

    What holds a time of its own is spelled when it is written.
    """

    __slots__ = ("_spelling", "answer", "lost", "repeats")

    def __init__(
        self,
        spelling: bytes | Callable[[], bytes],
        answer: asyncio.Future[Any] | None = None,
        lost: Callable[[], object] | None = None,
    ) -> None:
        self._spelling = spelling
        self.answer: asyncio.Future[Any] | None = answer
        self.lost: Callable[[], object] | None = lost
        self.repeats: int = 0

    @property
    def spelled(self) -> bytes:
        """The bytes that are written."""
        return self._spelling if isinstance(self._spelling, bytes) else self._spelling()

    def answered(self, reply: Any) -> None:
        """Hand over the answer; a refusal by Redis is trouble, not an answer."""
        if self.answer is None or self.answer.done():
            return
        if isinstance(reply, Refusal):
            self.answer.set_exception(Unavailable(f"redis refuses: {reply}"))
        else:
            self.answer.set_result(reply)

    def fail(self, reason: str) -> None:
        """Nobody will answer."""
        if self.lost is not None:
            self.lost()
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(Unavailable(reason))


class Pipe:
    """One connection to Redis, kept up.

    ``ready`` is awaited with each new connection before anything is said on it. ``on_up`` and ``on_down`` are told
    when Redis has come back and when it is away.
    """

    def __init__(
        self,
        make: Make,
        tasks: Tasks,
        scripts: Sequence[Script],
        ready: Callable[[], Awaitable[object]],
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        *,
        patience: float = PATIENCE,
    ) -> None:
        self._make, self._tasks = make, tasks
        self._loads = [pack(("SCRIPT", "LOAD", script.body)) for script in scripts]
        self._ready, self._on_up, self._on_down = ready, on_up, on_down
        self._patience = patience
        self.up: bool = False
        self.run_id: str = ""
        self.trouble: str = "redis has not been reached yet"
        self._ahead = 0.0  # milliseconds by which the clock of Redis is ahead of the loop's
        self._wire: Wire | None = None
        self._said: list[Command] = []
        self._inflight: deque[Command] = deque()
        self._repeat: list[Command] = []  # what met a Redis that had forgotten the scripts
        self._scheduled = self._watching = False
        self._lost = anyio.Event()
        self._idle: anyio.Event | None = None
        self._supervisor: Handle | None = None

    # What is said.

    def say(self, *arguments: Argument, lost: Callable[[], object] | None = None) -> bool:
        """Say a command whose answer nobody wants; false if Redis is away."""
        if not self.up:
            return False
        self._put(Command(pack(arguments), None, lost))
        return True

    async def ask(self, arguments: Sequence[Argument] | Callable[[], Sequence[Argument]]) -> Any:
        """Say a command, which may be made when it is written, and return its answer. Raises `Unavailable`."""
        if not self.up:
            raise Unavailable(self.trouble)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._put(Command(partial(spell, arguments) if callable(arguments) else pack(tuple(arguments)), answer))
        return await answer

    def _put(self, command: Command) -> None:
        self._said.append(command)
        if not self._scheduled:
            self._scheduled = True
            self._tasks.schedule(self._flush)

    def _flush(self) -> None:
        """Write what this turn has said, unless something has to go before it."""
        self._scheduled = False
        wire = self._wire
        if wire is None or wire.full or self._repeat or not self._said:
            return
        said, self._said = self._said, []
        self._inflight.extend(said)
        wire.write([command.spelled for command in said])
        if not self._watching:
            self._watching = True
            self._tasks.spawn(self._watch)

    def now_ms(self) -> int:
        """Return the time by the clock of Redis, as near as it is known."""
        return int(self._tasks.time() * 1000 + self._ahead)

    async def look_at_clock(self) -> None:
        """Read the clock of Redis again: it may have been set."""
        self._set_clock(await self.ask(("TIME",)))

    def _set_clock(self, time: Any) -> None:
        seconds, microseconds = time
        self._ahead = int(seconds) * 1000 + int(microseconds) / 1000 - self._tasks.time() * 1000

    async def flushed(self, deadline: float) -> None:
        """Wait until everything said so far is answered, for at most ``deadline`` seconds."""
        with anyio.move_on_after(deadline):
            while self.up and (self._said or self._inflight):
                self._idle = self._idle or anyio.Event()
                await self._idle.wait()

    # What is answered.

    def _answered(self, reply: Any) -> None:
        command = self._inflight.popleft()
        if isinstance(reply, Refusal):
            self._refused(command, reply)
        else:
            command.answered(reply)
        if not self._inflight:
            self._settled()

    def _refused(self, command: Command, refusal: Refusal) -> None:
        if refusal.word == "NOSCRIPT" and command.repeats < REPEATS:
            command.repeats += 1
            self._repeat.append(command)
            return
        command.answered(refusal)
        if refusal.word == "READONLY" and self._wire is not None:
            self._wire.drop()  # it is no master any more

    def _settled(self) -> None:
        """Everything on its way is answered: what met no script is said again, before anything newer."""
        if self._repeat:
            self._said = [*map(Command, self._loads), *self._repeat, *self._said]
            self._repeat.clear()
            self._flush()
        elif self._idle is not None and not self._said:
            self._idle.set()
            self._idle = None

    # Living.

    async def start(self) -> None:
        """Connect. Raises `ConfigurationError` where Redis is there and refuses us; one that is away is no error."""
        try:
            self._use(await self._open())
        except Refused as error:
            raise ConfigurationError(f"redis refuses: {error}; see to the URL, the user and what it may do") from None
        except TROUBLES as error:
            self._away(f"redis cannot be reached: {error}")
        self._supervisor = self._tasks.spawn(self._run)

    async def stop(self) -> None:
        """End. What was said is waited for before, with `flushed`."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        if self._wire is not None:
            self._wire.drop()
        self.up, self.trouble = False, "this node has stopped"
        self._fail_all()

    async def _run(self) -> None:
        attempts = 0
        while True:
            try:
                if self._wire is None:
                    self._use(await self._open())
            except TROUBLES as error:
                self._away(f"redis cannot be reached: {error}")
                pause = PAUSES[min(attempts, len(PAUSES) - 1)]
                attempts += 1
                await anyio.sleep(random.uniform(pause / 2, pause))
                continue
            attempts = 0
            await self._lost.wait()
            self._wire = None

    def _use(self, wire: Wire) -> None:
        """Speak over ``wire`` from now on, and begin with what the last one has not brought to its end."""
        self._said = [*self._inflight, *self._repeat, *self._said]
        self._inflight.clear()
        self._repeat.clear()
        self._lost = anyio.Event()
        wire.on_answer, wire.on_lost, wire.on_room = self._answered, self._lost.set, self._flush
        if wire.lost:
            self._lost.set()
        self._wire = wire
        self._rise()
        self._flush()

    def _rise(self) -> None:
        if not self.up:
            self.up, self.trouble = True, ""
            self._on_up()

    async def _open(self) -> Wire:
        """Return a connection that is ready: authenticated, with the scripts loaded and the clock read."""
        wire = None
        try:
            with anyio.fail_after(CONNECT):
                wire = await opened(self._make)
                info, time, *loaded = await answers(wire, [pack(("INFO", "server")), pack(("TIME",)), *self._loads])
            for answer in (time, *loaded):
                if isinstance(answer, Refusal):
                    raise Refused(str(answer))
            self.run_id = run_id_of(info) if isinstance(info, bytes) else ""  # it may be forbidden to ask
            self._set_clock(time)
            await self._ready()
        except BaseException:
            if wire is not None:
                wire.drop()
            raise
        return wire

    # Away.

    async def _watch(self) -> None:
        """See that answers come. It lingers for a while: who asks now and then needs no new one each time."""
        oldest, looks, idle = None, 0, 0
        try:
            while idle < LINGER:
                await anyio.sleep(self._patience / PARTS)
                first = self._inflight[0] if self._inflight else None
                idle = 0 if first else idle + 1
                looks = looks + 1 if first and first is oldest else 0
                oldest = first
                if looks >= PARTS:
                    return self.lose(f"redis has not answered for {self._patience:g} seconds")
        finally:
            self._watching = False

    def lose(self, reason: str) -> None:
        """Redis is away: everything fails at once until it is back."""
        self._away(reason)
        if self._wire is not None:
            self._wire.drop()

    def _away(self, reason: str) -> None:
        told, self.up, self.trouble = self.up, False, reason
        self._fail_all()
        if told:
            self._on_down()

    def _fail_all(self) -> None:
        commands = [*self._inflight, *self._repeat, *self._said]
        self._inflight.clear()
        self._repeat.clear()
        self._said = []
        for command in commands:
            command.fail(self.trouble)
        if self._idle is not None:
            self._idle.set()
            self._idle = None


def spell(arguments: Callable[[], Sequence[Argument]]) -> bytes:
    """Return the bytes of a command that is made now."""
    return pack(tuple(arguments()))


def run_id_of(info: bytes) -> str:
    """Return the name that this run of the server has."""
    found = [line for line in info.decode().splitlines() if line.startswith("run_id:")]
    return found[0].removeprefix("run_id:") if found else ""
