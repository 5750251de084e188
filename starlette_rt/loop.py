"""What we ask of the event loop, and who owns our tasks.

The law of this file: no other file starts a task or schedules a callback by itself. `Tasks` belongs to one
running `Realtime`; every task of the package lives in it and is gone when it has closed. On asyncio it uses
the loop's own calls (eager tasks from Python 3.12: a task that need not wait costs no turn of the loop), on
trio system tasks and the trio token. Tasks given to it must not raise; what does is logged, never lost. No
wait here is without a deadline: a task that not even cancelling ends is left behind, and counted in the log.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextvars import Context, copy_context
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import anyio

logger: logging.Logger = logging.getLogger("starlette_rt")

_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}

UNWILLING = 5.0  # seconds that a cancelled task has to end

AsyncFunction = Callable[..., Coroutine[Any, Any, None]]


class Handle(Protocol):
    """A started task."""

    def cancel(self) -> object:
        """Cancel the task at its next (or present) await."""


class Breakable(Protocol):
    """A ``with`` block that its handle can end."""

    def __enter__(self) -> Handle: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> bool | None: ...


class Job(Protocol):
    """Something short to be done in a task that others use as well; see `Relay`."""

    async def run(self) -> None:
        """Do it; it must not raise."""

    def waits(self, task: Handle, /) -> None:
        """It has begun to wait, and ``task`` is its own from now on."""


class Tasks(Protocol):
    """The tasks and callbacks of one running `Realtime`."""

    relay: Relay

    def schedule(self, callback: Callable[[], object], /) -> object:
        """Call ``callback`` when the present turn of the loop has ended. It must not raise."""

    def time(self) -> float:
        """The loop's monotonic clock in seconds."""
        ...

    def spawn(self, function: AsyncFunction, *args: Any, context: Context | None = None) -> Handle:
        """Start ``function(*args)`` in a task of ours, in ``context`` if one is given.

        On asyncio from Python 3.12 it runs at once up to its first wait, so ``context`` must not be the
        one that the caller runs in.
        """
        ...

    def spawn_later(self, function: AsyncFunction, *args: Any) -> Handle:
        """Start ``function(*args)`` in a task of ours when the present turn of the loop has ended."""
        ...

    def breakable(self) -> Breakable:
        """Return a ``with`` block that its handle ends early and quietly; the task goes on behind it.

        Once the block is left the handle does nothing. A cancellation of the task by anybody else is raised,
        also where both come at the same moment.
        """
        ...

    async def close(self, grace: float) -> None:
        """Give the tasks ``grace`` seconds to end, cancel what remains, and wait up to `UNWILLING` seconds for it.

        The task that calls it is not waited for. Nothing may be spawned once it has returned.
        """


class Baton:
    """The right to do the next job, in the hands of one task."""

    __slots__ = ("task",)

    task: Handle


class Relay:
    """Does many jobs one after another in one task, as long as none of them waits.

    One that waits keeps the task, and from the next turn of the loop another task goes on with the rest: nobody
    waits for it, and a job that need not wait costs no task. No task remains when there is nothing to do.
    """

    __slots__ = ("_baton", "_job", "_jobs", "_tasks")

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._jobs: deque[Job] = deque()
        self._job: Job | None = None  # what is being done
        self._baton: Baton | None = None

    def add(self, job: Job) -> None:
        """Do ``job`` after those that are there already, when the present turn of the loop has ended."""
        self._jobs.append(job)
        if self._baton is None:
            self._hand_over()

    def _hand_over(self) -> None:
        self._baton = Baton()
        self._baton.task = self._tasks.spawn_later(self._run, self._baton)

    async def _run(self, baton: Baton) -> None:
        self._tasks.schedule(partial(self._look, baton))
        while self._jobs:
            job = self._job = self._jobs.popleft()
            await job.run()
            if self._baton is not baton:
                return  # it has waited, and another task goes on
        self._baton = self._job = None

    def _look(self, baton: Baton) -> None:
        """A turn later: a task that is still at a job keeps it, because the job waits (or was cancelled)."""
        if self._baton is not baton or self._job is None:
            return
        job, self._job, self._baton = self._job, None, None
        job.waits(baton.task)
        if self._jobs and self._baton is None:
            self._hand_over()


async def guarded(function: AsyncFunction, args: tuple[Any, ...]) -> None:
    """Run one task of ours; an error that got this far is a bug of this package and is logged as one."""
    try:
        await function(*args)
    except Exception:
        logger.exception("a task of starlette_rt failed")


class Break:
    """A block that can be ended without ending its task; a cancel scope for each idle connection would cost 3 kB.

    The cancellation waits for the end of the turn: then the task is suspended, in the block or behind it, and
    none is left over that would hit what comes after. The counting is that of `asyncio.timeout`: ours is taken
    back, and if there are then no more than before the block, it was the only one.
    """

    __slots__ = ("_before", "_spent", "_task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._before = task.cancelling()
        self._spent = False

    def cancel(self) -> None:
        self._task.get_loop().call_soon(self._cancel)

    def _cancel(self) -> None:
        if not self._spent:
            self._spent = True
            self._task.cancel()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Swallow our own cancellation; one from elsewhere, also at the same moment, goes on."""
        fired, self._spent = self._spent, True
        alone = fired and self._task.uncancel() <= self._before
        return alone and isinstance(error, asyncio.CancelledError)


class AsyncioTasks:
    """Tasks on asyncio (and uvloop)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.schedule: Callable[[Callable[[], object]], object] = self._loop.call_soon
        self.time: Callable[[], float] = self._loop.time
        self.relay: Relay = Relay(self)

    def spawn(self, function: AsyncFunction, *args: Any, context: Context | None = None) -> Handle:
        task: asyncio.Task[None] = asyncio.Task(guarded(function, args), loop=self._loop, context=context, **_EAGER)
        return task if task.done() else self._keep(task)

    def spawn_later(self, function: AsyncFunction, *args: Any) -> Handle:
        return self._keep(asyncio.Task(guarded(function, args), loop=self._loop))

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def breakable(self) -> Breakable:
        return Break()

    async def close(self, grace: float) -> None:
        await wind_down(self._others, self._others_ended, grace)

    def _others(self) -> set[asyncio.Task[Any]]:
        return self._tasks - {asyncio.current_task()}

    async def _others_ended(self) -> None:
        while others := self._others():
            await asyncio.wait(others)


class TrioTasks:
    """Tasks on trio: system tasks, because a `Realtime` may be entered by one task and left by another."""

    def __init__(self) -> None:
        import trio

        self._spawn = trio.lowlevel.spawn_system_task
        self._current = trio.lowlevel.current_task
        self._running: dict[object, anyio.CancelScope] = {}
        self._ended = anyio.Event()
        self.schedule: Callable[[Callable[[], object]], object] = trio.lowlevel.current_trio_token().run_sync_soon
        self.time: Callable[[], float] = trio.current_time
        self.relay: Relay = Relay(self)

    def spawn(self, function: AsyncFunction, *args: Any, context: Context | None = None) -> Handle:
        scope = anyio.CancelScope()
        context = copy_context() if context is None else context
        self._running[self._spawn(self._run, scope, function, args, context=context)] = scope
        return scope

    spawn_later = spawn  # trio starts no task at once

    async def _run(self, scope: anyio.CancelScope, function: AsyncFunction, args: tuple[Any, ...]) -> None:
        try:
            with scope:
                await guarded(function, args)
        finally:
            del self._running[self._current()]
            self._ended.set()
            self._ended = anyio.Event()

    def breakable(self) -> Breakable:
        return anyio.CancelScope()

    async def close(self, grace: float) -> None:
        await wind_down(self._others, self._others_ended, grace)

    def _others(self) -> list[anyio.CancelScope]:
        mine = self._current()
        return [scope for task, scope in self._running.items() if task is not mine]

    async def _others_ended(self) -> None:
        while self._others():
            await self._ended.wait()


def tasks() -> Tasks:
    """Return the owner of tasks for the running loop, asyncio's or trio's."""
    try:
        return AsyncioTasks()
    except RuntimeError:  # no asyncio loop runs here
        return TrioTasks()


async def wind_down(
    others: Callable[[], Collection[Handle]], others_ended: Callable[[], Awaitable[None]], grace: float
) -> None:
    """Wait for the tasks of an owner as `Tasks.close` promises."""
    if await within(grace, others_ended):
        return
    for handle in others():
        handle.cancel()
    if not await within(UNWILLING, others_ended):
        logger.error("%d tasks of starlette_rt did not end when they were cancelled", len(others()))


def escapes(error: BaseException) -> bool:
    """Whether ``error`` is the loop's business and must go on: a cancellation that somebody asked for, or an interrupt.

    A `SystemExit` of a handler must not end the server, and a `CancelledError` that nobody asked for (a handler
    awaited a cancelled task of its own) must not end ours.
    """
    if isinstance(error, Exception | SystemExit):
        return False
    if not isinstance(error, asyncio.CancelledError | BaseExceptionGroup):
        return True
    task = asyncio.current_task()
    return task is None or bool(task.cancelling())


async def within(deadline: float, function: Callable[..., Awaitable[object]], *args: Any) -> bool:
    """Await ``function(*args)`` for at most ``deadline`` seconds, unmoved by anyio's cancellation; true if it ended."""
    with anyio.move_on_after(deadline, shield=True) as scope:
        await function(*args)
    return not scope.cancelled_caught
