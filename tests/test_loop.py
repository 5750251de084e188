"""Our tasks on asyncio and on trio: who owns them, what becomes of one that fails, how they end."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from starlette_rt import loop
from starlette_rt.loop import AsyncioTasks, Handle, Tasks, TrioTasks, tasks, within

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

DEADLINE = 5.0  # seconds after which a wait of these tests has failed
place: ContextVar[str] = ContextVar("place", default="nowhere")


@pytest.fixture
async def ours(anyio_backend: str) -> AsyncIterator[Tasks]:
    """The owner of tasks under test; what a test leaves behind is ended."""
    owner = tasks()
    yield owner
    await owner.close(0)


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """Everything that any logger said above INFO so far."""
    return lambda: [record for record in caplog.records if record.levelno > logging.INFO]


class Sleeper:
    """Waits until it is cancelled, and says when it began and how it ended."""

    def __init__(self) -> None:
        self.began, self.ended = anyio.Event(), anyio.Event()
        self.how = ""

    async def __call__(self) -> None:
        self.began.set()
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            self.how = "cancelled" if isinstance(error, anyio.get_cancelled_exc_class()) else repr(error)
            raise
        finally:
            self.ended.set()


async def happens(event: anyio.Event) -> None:
    with anyio.fail_after(DEADLINE):
        await event.wait()


# Starting.


async def test_the_running_loop_decides_whose_tasks_they_are(anyio_backend: str) -> None:
    assert isinstance(tasks(), AsyncioTasks if anyio_backend == "asyncio" else TrioTasks)


def test_without_a_running_loop_there_are_no_tasks() -> None:
    with pytest.raises(RuntimeError):
        tasks()


async def test_a_task_gets_its_arguments_and_runs_beside_its_starter(ours: Tasks) -> None:
    seen, done = list[Any](), anyio.Event()

    async def work(*args: int) -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(args)
        done.set()

    ours.spawn(work, 1, 2)
    await happens(done)
    assert seen == [(1, 2)]


async def test_a_task_sees_the_context_of_its_starter_and_changes_only_its_own(ours: Tasks) -> None:
    seen, done = list[str](), anyio.Event()

    async def work() -> None:
        seen.append(place.get())
        place.set("inside")
        done.set()

    place.set("outside")
    ours.spawn(work)
    await happens(done)
    assert (seen, place.get()) == (["outside"], "outside")


async def test_a_context_that_is_given_is_the_one_that_the_task_runs_in(ours: Tasks) -> None:
    context, done = copy_context(), anyio.Event()

    async def work() -> None:
        place.set("inside")
        done.set()

    ours.spawn(work, context=context)
    await happens(done)
    assert context[place] == "inside"


async def test_an_empty_context_is_a_context_too(ours: Tasks) -> None:
    seen, done = list[str](), anyio.Event()

    async def work() -> None:
        seen.append(place.get())
        done.set()

    place.set("outside")
    ours.spawn(work, context=Context())
    await happens(done)
    assert seen == ["nowhere"]


@on_asyncio
async def test_from_python_3_12_a_task_that_need_not_wait_is_done_when_it_has_been_started(ours: AsyncioTasks) -> None:
    seen = list[str]()

    async def work() -> None:
        seen.append("done")

    ours.spawn(work)
    assert seen == (["done"] if sys.version_info >= (3, 12) else [])
    assert len(ours._tasks) == (0 if sys.version_info >= (3, 12) else 1)


@on_asyncio
async def test_a_task_that_is_done_when_it_has_been_started_is_not_kept(
    ours: AsyncioTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager(coroutine: Coroutine[Any, Any, None], **options: Any) -> asyncio.Future[None]:
        coroutine.close()
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(loop, "asyncio", SimpleNamespace(Task=eager))  # so that Python 3.11 has it too
        ours.spawn(anyio.lowlevel.checkpoint)
    assert ours._tasks == set()


@on_asyncio
async def test_a_task_that_fails_at_once_is_logged_and_does_not_fail_its_starter(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    async def work() -> None:
        raise LookupError("a bug")

    ours.spawn(work)
    await ours.close(DEADLINE)
    assert [record.getMessage() for record in errors()] == ["a task of starlette_rt failed"]


async def test_a_task_is_cancelled_by_its_handle_quietly_and_alone(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    one, other = Sleeper(), Sleeper()
    handle = ours.spawn(one)
    ours.spawn(other)
    await happens(one.began)
    await happens(other.began)
    handle.cancel()
    await happens(one.ended)
    assert (one.how, other.how) == ("cancelled", "")
    assert errors() == []


async def test_the_handle_of_a_task_that_has_ended_does_nothing(ours: Tasks) -> None:
    done = anyio.Event()

    async def work() -> None:
        done.set()

    handle = ours.spawn(work)
    await happens(done)
    await ours.close(DEADLINE)
    handle.cancel()
    await anyio.lowlevel.checkpoint()


async def test_a_task_that_raises_is_logged_once_and_the_others_go_on(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    other, bug, done = Sleeper(), LookupError("a bug"), anyio.Event()

    async def work() -> None:
        await anyio.lowlevel.checkpoint()
        done.set()
        raise bug

    ours.spawn(other)
    ours.spawn(work)
    await happens(done)
    await happens(other.began)
    assert other.how == ""
    await ours.close(0)
    gc.collect()  # asyncio would complain here about an exception that nobody retrieved
    assert [(record.name, record.levelname) for record in errors()] == [("starlette_rt", "ERROR")]
    info = errors()[0].exc_info
    assert info is not None
    assert info[1] is bug


async def test_a_task_that_ends_well_is_not_logged_and_not_kept(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    class Work:
        async def run(self) -> None:
            await anyio.lowlevel.checkpoint()

    work = Work()
    gone = weakref.ref(work)
    ours.spawn(work.run)
    del work
    await ours.close(DEADLINE)
    gc.collect()
    assert gone() is None
    assert errors() == []


# Time and turns.


async def test_what_is_scheduled_runs_in_order_when_the_present_turn_has_ended(ours: Tasks) -> None:
    seen, done = list[str](), anyio.Event()
    ours.schedule(lambda: seen.append("scheduled first"))
    ours.schedule(lambda: seen.append("scheduled second"))
    ours.schedule(done.set)
    seen.append("said")
    await happens(done)
    assert seen == ["said", "scheduled first", "scheduled second"]


async def test_the_time_is_that_of_the_loop(ours: Tasks) -> None:
    before = anyio.current_time()
    assert before <= ours.time() <= anyio.current_time()


# Breaking.


async def test_a_break_ends_the_block_quietly_and_the_task_goes_on(ours: Tasks) -> None:
    inside, behind = anyio.Event(), anyio.Event()
    held = SimpleNamespace()

    async def work() -> None:
        with ours.breakable() as held.handle:
            inside.set()
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()  # a cancellation that was left over would arrive here
        behind.set()

    ours.spawn(work)
    await happens(inside)
    held.handle.cancel()
    held.handle.cancel()
    await happens(behind)


async def test_a_block_that_nobody_breaks_passes_everything_on(ours: Tasks) -> None:
    with ours.breakable():
        await anyio.lowlevel.checkpoint()
    with pytest.raises(LookupError), ours.breakable():
        raise LookupError


async def test_the_handle_of_a_block_that_was_left_does_nothing(ours: Tasks) -> None:
    with ours.breakable() as handle:
        pass
    handle.cancel()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


async def test_a_block_that_breaks_itself_and_never_waits_leaves_no_cancellation_behind(ours: Tasks) -> None:
    with ours.breakable() as handle:
        handle.cancel()
    for _ in range(3):
        await anyio.lowlevel.checkpoint()


async def test_a_block_that_breaks_itself_ends_at_its_next_wait(ours: Tasks) -> None:
    with anyio.fail_after(DEADLINE), ours.breakable() as handle:
        handle.cancel()
        await anyio.sleep_forever()
    await anyio.lowlevel.checkpoint()


async def test_an_error_of_the_block_is_raised_also_where_it_is_broken(ours: Tasks) -> None:
    async def work() -> None:
        with ours.breakable() as handle:
            handle.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                raise LookupError

    with pytest.raises(LookupError):
        await work()
    await anyio.lowlevel.checkpoint()


async def test_a_time_limit_inside_a_broken_block_does_not_hold_the_break_back(ours: Tasks) -> None:
    reached = False
    with anyio.fail_after(DEADLINE):
        with ours.breakable() as handle:
            with anyio.move_on_after(DEADLINE):
                handle.cancel()
                await anyio.sleep_forever()
            reached = True
    assert not reached


@pytest.mark.parametrize("anyio_backend", ["trio"])  # on asyncio an anyio before 4.16 swallows what comes with its own
async def test_a_break_and_a_time_limit_at_the_same_moment_end_the_block(ours: Tasks) -> None:
    with anyio.fail_after(DEADLINE):
        with ours.breakable() as handle:
            with anyio.CancelScope() as scope:
                ours.schedule(scope.cancel)
                handle.cancel()
                await anyio.sleep_forever()
            await anyio.sleep_forever()
    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("first", ["break", "foreign"])
async def test_a_cancelled_scope_around_a_broken_block_is_not_swallowed(ours: Tasks, first: str) -> None:
    reached = False
    with anyio.CancelScope() as scope:
        with ours.breakable() as handle:
            both = [handle.cancel, scope.cancel]
            for cancel in both if first == "break" else reversed(both):
                cancel()
            await anyio.sleep_forever()
        await anyio.lowlevel.checkpoint()
        reached = True
    assert not reached
    await anyio.lowlevel.checkpoint()


async def outcome_of(cancel: Callable[[asyncio.Task[str], Any], object]) -> tuple[str, int]:
    """Run a task in a breakable block, cancel it, and say how it ended and how often it still counts as cancelled."""
    inside, held, ours = asyncio.Event(), SimpleNamespace(), AsyncioTasks()

    async def work() -> str:
        with ours.breakable() as held.handle:
            inside.set()
            await asyncio.sleep(60)
        await asyncio.sleep(0)
        return "went on"

    task = asyncio.create_task(work())
    with anyio.fail_after(DEADLINE):
        await inside.wait()
        cancel(task, held.handle)
        with suppress(asyncio.CancelledError):
            await task
    return ("cancelled" if task.cancelled() else task.result()), task.cancelling()


@on_asyncio
async def test_a_break_alone_leaves_no_trace_on_an_asyncio_task() -> None:
    assert await outcome_of(lambda task, handle: handle.cancel()) == ("went on", 0)


@on_asyncio
async def test_a_foreign_cancellation_is_raised_and_the_break_does_not_hide_it() -> None:
    assert await outcome_of(lambda task, handle: task.cancel()) == ("cancelled", 1)


@on_asyncio
async def test_a_foreign_cancellation_at_the_moment_of_the_break_is_raised() -> None:
    def break_first(task: asyncio.Task[str], handle: Any) -> None:
        handle.cancel()
        asyncio.get_running_loop().call_soon(task.cancel)

    def foreign_first(task: asyncio.Task[str], handle: Any) -> None:
        task.cancel()
        handle.cancel()

    assert await outcome_of(break_first) == ("cancelled", 1)
    assert await outcome_of(foreign_first) == ("cancelled", 1)


@on_asyncio
async def test_a_block_in_a_task_that_is_cancelled_already_is_broken_as_quietly() -> None:
    async def work() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:  # the cleaning up of a cancelled task, where the count is one already
            with AsyncioTasks().breakable() as handle:
                handle.cancel()
                await asyncio.sleep(60)
            return "cleaned up"
        raise AssertionError("it was cancelled")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with anyio.fail_after(DEADLINE):
        assert await task == "cleaned up"
    assert task.cancelling() == 1


@on_asyncio
async def test_asyncios_own_timeout_around_a_broken_block_still_works(ours: Tasks) -> None:
    async def work() -> None:
        async with asyncio.timeout(0.01):
            with ours.breakable() as handle:
                handle.cancel()
                await asyncio.sleep(60)
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await work()


@on_asyncio
async def test_a_break_wakes_a_task_whose_wait_has_just_ended(ours: Tasks) -> None:
    woken, inside, behind = asyncio.Event(), asyncio.Event(), asyncio.Event()
    held, waits = SimpleNamespace(), list[str]()

    async def work() -> None:
        with ours.breakable() as held.handle:
            inside.set()
            await woken.wait()
            waits.append("woken")
        await asyncio.sleep(0)
        behind.set()

    ours.spawn(work)
    with anyio.fail_after(DEADLINE):
        await inside.wait()
        held.handle.cancel()
        ours.schedule(woken.set)  # in the turn of the break, after it
        await behind.wait()
    assert waits == []


# Closing.


async def test_closing_where_nothing_runs_ends_at_once(ours: Tasks) -> None:
    await ours.close(0)
    await ours.close(DEADLINE)


async def test_closing_waits_for_tasks_that_end_by_themselves(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    seen, go = list[str](), anyio.Event()

    async def last() -> None:
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        seen.append("last")

    async def work() -> None:
        await go.wait()
        ours.spawn(last)
        seen.append("first")

    ours.spawn(work)
    ours.schedule(go.set)
    with anyio.fail_after(DEADLINE):
        await ours.close(2 * DEADLINE)
    assert seen == ["first", "last"], "also what it started meanwhile"
    assert errors() == []


async def test_closing_cancels_what_has_not_ended_within_the_grace_and_waits_for_its_end(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    seen = list[str]()
    began = anyio.Event()

    async def work() -> None:
        began.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
            seen.append("cleaned up")

    ours.spawn(work)
    await happens(began)
    await ours.close(0.01)
    assert seen == ["cleaned up"]
    assert errors() == []


async def test_a_cancelled_task_may_start_another_to_end_well(ours: Tasks) -> None:
    sleeper, seen = Sleeper(), list[str]()

    async def ending() -> None:
        await anyio.lowlevel.checkpoint()
        seen.append("ended well")

    async def work() -> None:
        try:
            await sleeper()
        finally:
            ours.spawn(ending)

    ours.spawn(work)
    await happens(sleeper.began)
    await ours.close(0)
    assert seen == ["ended well"]


async def test_a_task_that_will_not_end_is_left_behind_and_the_log_says_so(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "UNWILLING", 0.01)
    began, free, ended = anyio.Event(), anyio.Event(), anyio.Event()

    async def work() -> None:
        began.set()
        with anyio.CancelScope(shield=True):
            while not free.is_set():
                with suppress(asyncio.CancelledError):
                    await free.wait()
        ended.set()

    ours.spawn(work)
    await happens(began)
    with anyio.fail_after(DEADLINE):
        await ours.close(0)
    free.set()
    await happens(ended)
    assert [(record.name, record.levelname, record.getMessage()) for record in errors()] == [
        ("starlette_rt", "ERROR", "1 tasks of starlette_rt did not end when they were cancelled")
    ]


async def test_a_task_of_ours_may_close_the_others_and_does_not_wait_for_itself(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    sleeper, closed = Sleeper(), anyio.Event()

    async def closer() -> None:
        await sleeper.began.wait()
        await ours.close(0)
        await anyio.lowlevel.checkpoint()
        closed.set()

    ours.spawn(sleeper)
    ours.spawn(closer)
    await happens(closed)
    assert sleeper.how == "cancelled"
    assert errors() == []


async def test_closing_is_not_moved_by_a_cancellation_around_it(ours: Tasks) -> None:
    sleeper = Sleeper()
    ours.spawn(sleeper)
    await happens(sleeper.began)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await ours.close(0.01)
    assert sleeper.how == "cancelled"


# Deadlines.


async def test_within_says_whether_it_ended_in_time(ours: Tasks) -> None:
    seen = list[str]()

    async def note(what: str) -> None:
        await anyio.lowlevel.checkpoint()
        seen.append(what)

    assert await within(DEADLINE, note, "noted") is True
    assert seen == ["noted"]
    assert await within(0.01, anyio.sleep_forever) is False


async def test_within_lets_an_error_through(ours: Tasks) -> None:
    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await within(DEADLINE, fail)


async def test_within_goes_on_in_a_scope_that_is_cancelled(ours: Tasks) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        assert await within(DEADLINE, anyio.lowlevel.checkpoint) is True


# Many jobs in one task.


class Note:
    """A job that notes who did it, and may wait or fail before that."""

    def __init__(self, done: list[Any], name: int, gate: anyio.Event | None = None, fails: bool = False) -> None:
        self.done, self.name, self.gate, self.fails = done, name, gate, fails
        self.task: Handle | None = None
        self.doers: list[object] = []

    async def run(self) -> None:
        self.doers.append(anyio.get_current_task().id)
        if self.fails:
            raise LookupError(self.name)
        if self.gate is not None:
            await self.gate.wait()
        self.done.append(self.name)

    def waits(self, task: Handle, /) -> None:
        self.task = task


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE):
        while not holds():
            await anyio.lowlevel.checkpoint()


async def test_jobs_that_need_not_wait_are_done_in_order_by_one_task(ours: Tasks) -> None:
    done: list[int] = []
    jobs = [Note(done, number) for number in range(5)]
    for job in jobs:
        ours.relay.add(job)
    assert done == []
    await until(lambda: len(done) == 5)
    assert done == list(range(5))
    assert len({job.doers[0] for job in jobs}) == 1
    assert all(job.task is None for job in jobs)


async def test_a_job_added_later_is_done_as_well(ours: Tasks) -> None:
    done: list[int] = []
    for number in range(3):
        ours.relay.add(Note(done, number))
        await until(lambda: len(done) > number)  # noqa: B023 - awaited here
    assert done == [0, 1, 2]


async def test_nobody_waits_for_a_job_that_waits(ours: Tasks) -> None:
    done: list[int] = []
    gates = [anyio.Event() for _ in range(2)]
    jobs = [Note(done, 0), Note(done, 1, gates[0]), Note(done, 2), Note(done, 3, gates[1]), Note(done, 4)]
    for job in jobs:
        ours.relay.add(job)
    await until(lambda: len(done) == 3)
    assert done == [0, 2, 4]
    assert [job.task is not None for job in jobs] == [False, True, False, True, False]
    gates[1].set()
    await until(lambda: len(done) == 4)
    gates[0].set()
    await until(lambda: len(done) == 5)
    assert done == [0, 2, 4, 3, 1]


async def test_a_job_that_waits_can_be_cancelled_and_the_rest_is_done(ours: Tasks) -> None:
    done: list[int] = []
    stuck = Note(done, 0, anyio.Event())
    ours.relay.add(stuck)
    await until(lambda: stuck.task is not None)
    assert stuck.task is not None
    stuck.task.cancel()
    ours.relay.add(Note(done, 1))
    await until(lambda: done == [1])


async def test_a_job_that_fails_is_logged_and_the_rest_is_done(
    ours: Tasks, errors: Callable[[], list[logging.LogRecord]]
) -> None:
    done: list[int] = []
    for number in range(3):
        ours.relay.add(Note(done, number, fails=number == 1))
    await until(lambda: len(done) == 2)
    assert done == [0, 2]
    assert [record.getMessage() for record in errors()] == ["a task of starlette_rt failed"]


async def test_what_a_job_adds_is_done_by_the_same_task(ours: Tasks) -> None:
    done: list[int] = []
    second = Note(done, 2)

    class First(Note):
        async def run(self) -> None:
            ours.relay.add(second)
            await super().run()

    first = First(done, 1)
    ours.relay.add(first)
    await until(lambda: len(done) == 2)
    assert done == [1, 2]
    assert first.doers == second.doers


async def test_a_relay_leaves_no_task_behind(ours: Tasks) -> None:
    done: list[int] = []
    ours.relay.add(Note(done, 0))
    await until(lambda: done == [0])
    with anyio.fail_after(DEADLINE):
        await ours.close(DEADLINE)
