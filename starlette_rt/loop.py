"""What we ask of the event loop, and who owns our tasks.

The law of this file: no other file starts a task or schedules a callback by itself. `Tasks` belongs to one
running `Realtime`; every task of the package lives in it and is gone when it has closed. On asyncio it uses
the loop's own calls (eager tasks from Python 3.12: a task that need not wait costs no turn of the loop), on
trio system tasks and the trio token. Tasks given to it must not raise; what does is logged, never lost.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, copy_context
from types import TracebackType
from typing import Any, Protocol

import anyio

logger = logging.getLogger("starlette_rt")

_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}

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


class Tasks(Protocol):
    """The tasks and callbacks of one running `Realtime`."""

    def schedule(self, callback: Callable[[], object], /) -> object:
        """Call ``callback`` when the present turn of the loop has ended. It must not raise."""

    def time(self) -> float:
        """The loop's monotonic clock in seconds."""

    def spawn(self, function: AsyncFunction, *args: Any, context: Context | None = None) -> Handle:
        """Start ``function(*args)`` in a task of ours, in ``context`` if one is given."""

    def breakable(self) -> Breakable:
        """Return a ``with`` block that its handle ends early and quietly; the task goes on behind it."""

    async def close(self, grace: float) -> None:
        """Give the tasks ``grace`` seconds to end, cancel what remains and wait for it."""


async def guarded(function: AsyncFunction, args: tuple[Any, ...]) -> None:
    """Run one task of ours; an error that got this far is a bug of this package and is logged as one."""
    try:
        await function(*args)
    except Exception:
        logger.exception("a task of starlette_rt failed")


class Break:
    """A block that can be ended without ending its task; a cancel scope for each idle connection would cost 3 kB."""

    __slots__ = ("_fired", "_task")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._fired = False

    def cancel(self) -> None:
        if not self._fired:
            self._fired = True
            self._task.cancel()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Swallow our own cancellation; one from elsewhere, also at the same moment, goes on."""
        return isinstance(error, asyncio.CancelledError) and self._fired and not self._task.uncancel()


class AsyncioTasks:
    """Tasks on asyncio (and uvloop)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.schedule = self._loop.call_soon
        self.time = self._loop.time

    def spawn(self, function: AsyncFunction, *args: Any, context: Context | None = None) -> Handle:
        task: asyncio.Task[None] = asyncio.Task(guarded(function, args), loop=self._loop, context=context, **_EAGER)
        if not task.done():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return task

    def breakable(self) -> Breakable:
        return Break()

    async def close(self, grace: float) -> None:
        mine = asyncio.current_task()
        if pending := self._tasks - {mine}:
            await asyncio.wait(pending, timeout=grace)
        if pending := self._tasks - {mine}:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending)


class TrioTasks:
    """Tasks on trio: system tasks, because a `Realtime` may be entered by one task and left by another."""

    def __init__(self) -> None:
        import trio

        self._spawn = trio.lowlevel.spawn_system_task
        self._running: set[anyio.CancelScope] = set()
        self._ended = anyio.Event()
        self.schedule = trio.lowlevel.current_trio_token().run_sync_soon
        self.time = trio.current_time

    def spawn(self, function: AsyncFunction, *args: Any, context: Context | None = None) -> Handle:
        scope = anyio.CancelScope()
        self._running.add(scope)
        self._spawn(self._run, scope, function, args, context=context or copy_context())
        return scope

    async def _run(self, scope: anyio.CancelScope, function: AsyncFunction, args: tuple[Any, ...]) -> None:
        try:
            with scope:
                await guarded(function, args)
        finally:
            self._running.discard(scope)
            self._ended.set()

    def breakable(self) -> Breakable:
        return anyio.CancelScope()

    async def close(self, grace: float) -> None:
        if not await within(grace, self._all_ended):
            for scope in self._running:
                scope.cancel()
            await within(grace, self._all_ended)

    async def _all_ended(self) -> None:
        while self._running:
            self._ended = anyio.Event()
            await self._ended.wait()


def tasks() -> Tasks:
    """Return the owner of tasks for the running loop, asyncio's or trio's."""
    try:
        return AsyncioTasks()
    except RuntimeError:  # no asyncio loop runs here
        return TrioTasks()


async def within(deadline: float, function: Callable[..., Awaitable[object]], *args: Any) -> bool:
    """Await ``function(*args)`` for at most ``deadline`` seconds, unmoved by anyio's cancellation; true if it ended."""
    with anyio.move_on_after(deadline, shield=True) as scope:
        await function(*args)
    return not scope.cancelled_caught
