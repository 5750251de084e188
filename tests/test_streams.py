"""A node in step with the logs of its groups, with a log that the test owns and a time that it moves.

What goes wrong here goes wrong on purpose and one thing at a time; tests/chaos/recovery.py lets everything happen at
once. `Stage` is the broker, the tasks' clock, and the node that hears what is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from starlette_rt import streams as streams_module
from starlette_rt.exceptions import Unavailable
from starlette_rt.history import History, Log, Position, Publication, Reading
from starlette_rt.loop import Handle, tasks
from starlette_rt.streams import CHECK, STRIKE, Stream, Streams

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

HISTORY = History(5, 100)


class Stage:
    """The broker of one node, with one log for each group. It is the node's `Tasks` too: real tasks, our time."""

    def __init__(self) -> None:
        self._tasks = tasks()
        self.now = 1000.0
        self.logs: dict[str, Log] = {}
        self.said: list[Any] = []
        self.calls: list[str] = []
        self.wrong: list[str] = []  # what the broker says is wrong with it
        self.wanted: Counter[str] = Counter()  # subscriptions that the broker holds
        self.failures: list[Exception] = []  # of the next calls
        self.gate: anyio.Event | None = None  # what the broker waits for before it answers
        self.at_gate: Callable[[], object] = lambda: None  # what happens once a call has been answered there
        self.streams: Streams[str] = Streams(
            self,  # type: ignore[arg-type]
            self,
            lambda publication, seen: f"{publication.data}{' again' if seen else ''}",
            lambda publication, message: self.said.append(message),
            lambda group, position: self.said.append(("reset", group, position)),
            jitter=lambda low, high: 0.0 if low < 5 else low,
        )

    # Tasks.

    def time(self) -> float:
        return self.now

    def spawn(self, function: Any, *args: Any) -> Handle:
        return self._tasks.spawn(function, *args)

    def close(self, grace: float) -> Awaitable[None]:
        return self._tasks.close(grace)

    # The broker.

    def log(self, group: str = "g") -> Log:
        if group not in self.logs:
            self.logs[group] = Log(HISTORY, self.now)
        return self.logs[group]

    async def _answer(self, name: str, answer: Callable[[], Any]) -> Any:
        self.calls.append(name)
        await anyio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        answered = answer()
        self.at_gate()
        if self.gate is not None:
            await self.gate.wait()
        return answered

    def troubles(self) -> list[str]:
        return self.wrong

    def subscribe(self, group: str) -> None:
        self.wanted[group] += 1

    def unsubscribe(self, group: str) -> None:
        self.wanted[group] -= 1

    async def read(self, group: str, history: History) -> Reading:
        found: Reading = await self._answer("read", lambda: self.log(group).read(self.now))
        return found

    async def position(self, group: str, history: History) -> Position:
        found: Position = await self._answer("position", lambda: self.log(group).position)
        return found

    async def renew(self, group: str, history: History, seen: Position) -> Position:
        found: Position = await self._answer("renew", lambda: self.log(group).renew(seen, self.now))
        return found

    # What the test does.

    def append(self, *numbers: int, id: str = "", group: str = "g") -> list[Publication]:
        """Publish, but let nothing arrive."""
        placed = []
        for number in numbers:
            _, publication = self.log(group).append(Publication(group, "m", number, b"1", id=id), self.now)
            assert publication is not None
            placed.append(publication)
        return placed

    def publish(self, *numbers: int, id: str = "") -> None:
        for publication in self.append(*numbers, id=id):
            self.streams.receive(publication)

    def set_back(self, position: Position) -> None:
        """A failover: the log ends at ``position`` again, and has lost what came after, ids too."""
        log = self.log()
        while log._entries and (log._entries[-1].offset or 0) > position.offset:
            log._entries.pop()
        log.position = Position(log.position.epoch, position.offset, position.tag)
        log._ids.clear()

    async def follow(self, group: str = "g") -> Stream[str]:
        with anyio.fail_after(10):
            return await self.streams.follow(group, HISTORY)

    async def look(self, seconds: float = CHECK[1]) -> None:
        """Let time pass, and whatever is due then."""
        self.now += seconds
        self.streams.tick(self.now)
        await settled()

    def take(self) -> list[Any]:
        said, self.said = self.said, []
        return said


async def settled() -> None:
    with anyio.fail_after(10):
        for _ in range(3):  # a task that has just ended its wait may begin another
            await anyio.wait_all_tasks_blocked()


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    stage = Stage()
    try:
        yield stage
    finally:
        stage.streams.close()
        if stage.gate is not None:
            stage.gate.set()
        await stage.close(1.0)


def told(found: list[tuple[Publication, str]] | None) -> list[str] | None:
    return None if found is None else [message for _, message in found]


# Joining


async def test_who_joins_is_where_the_log_ends_and_what_is_kept_can_be_asked_for() -> None:
    async with staged() as stage:
        stage.append(1, 2, 3)
        stream = await stage.follow()
        assert stream.position == stage.log().position
        assert told(stream.last(2)) == ["2", "3"]
        assert told(stream.last(50)) == ["1", "2", "3"]
        assert told(stream.last(0)) == []
        assert stage.said == []
        assert stage.streams.get("g") is stream
        assert len(stage.streams) == 1


async def test_an_empty_log_has_an_epoch_from_the_first_join_on() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        position = stream.position
        assert position.epoch
        assert position.offset == 0
        stage.publish(1, 2)
        assert told(stream.since(position)) == ["1", "2"]


async def test_those_who_join_first_share_one_read_and_later_ones_need_none() -> None:
    async with staged() as stage:
        stage.gate = anyio.Event()
        found: list[Stream[str]] = []

        async def join() -> None:
            found.append(await stage.streams.follow("g", HISTORY))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(join)
            await settled()
            assert found == []
            stage.gate.set()
        await stage.follow()
        assert stage.calls == ["read"]
        assert len({id(each) for each in found}) == 1


async def test_what_is_published_while_the_log_is_read_follows_what_was_read() -> None:
    async with staged() as stage:
        stage.append(1)
        stage.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(stage.follow)
            await settled()
            stage.publish(2, 3)
            stage.gate.set()
        stream = stage.streams.get("g")
        assert stream is not None
        assert stage.take() == ["2", "3"]
        assert stream.position == stage.log().position
        assert told(stream.last(9)) == ["1", "2", "3"]
        assert stage.calls == ["read"]


async def test_what_is_published_before_the_read_and_in_it_is_told_once() -> None:
    async with staged() as stage:
        first = stage.append(1, 2)
        stage.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(stage.follow)
            await settled()
            for publication in first:
                stage.streams.receive(publication)
            stage.gate.set()
        stream = stage.streams.get("g")
        assert stream is not None
        assert stage.take() == []
        assert told(stream.last(9)) == ["1", "2"]


async def test_a_log_that_cannot_be_read_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "PAUSES", (0.0, 0.0))
    async with staged() as stage:
        stage.failures = [Unavailable("no"), TimeoutError(), Unavailable("no"), Unavailable("no")]
        await stage.follow()
        assert stage.calls == ["read"] * 5


async def test_a_broker_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "ANSWER", 0.01)
    async with staged() as stage:
        stage.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(stage.follow)
            for _ in range(1000):
                if len(stage.calls) > 1:
                    break
                await anyio.sleep(0.01)
            stage.gate.set()
        assert stage.streams.get("g") is not None


async def test_who_cannot_join_in_time_is_told_so_and_nothing_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "READY", 0.01)
    async with staged() as stage:
        stage.gate = anyio.Event()
        with pytest.raises(Unavailable, match="'g'"):
            await stage.follow()
        assert len(stage.streams) == 0
        stage.gate.set()
        await settled()
        assert stage.calls == ["read"]  # it was given up


async def test_who_gives_up_does_not_disturb_those_who_wait() -> None:
    async with staged() as stage:
        stage.gate = anyio.Event()
        async with anyio.create_task_group() as patient:
            patient.start_soon(stage.follow)
            await settled()
            with anyio.move_on_after(0.01):
                await stage.follow()
            assert len(stage.streams) == 1
            stage.gate.set()
        assert stage.streams.get("g") is not None
        assert stage.calls == ["read"]


async def test_the_last_member_takes_the_stream_along() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.streams.vacated("g")
        assert len(stage.streams) == 0
        stage.publish(1)
        assert stage.said == []
        stage.streams.vacated("g")
        stage.streams.vacated("nowhere")
        await settled()
        stream = await stage.follow()
        assert told(stream.last(5)) == ["1"]


async def test_a_stream_stays_for_those_who_wait_and_goes_with_the_last_of_them() -> None:
    async with staged() as stage:
        stage.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(stage.follow)
            await settled()
            stage.streams.vacated("g")
            assert len(stage.streams) == 1
            group.cancel_scope.cancel()
        assert len(stage.streams) == 0


async def test_a_stop_ends_every_wait() -> None:
    async with staged() as stage:
        stage.gate = anyio.Event()
        async with anyio.create_task_group() as group:

            async def join() -> None:
                with pytest.raises(Unavailable):
                    await stage.streams.follow("g", HISTORY)

            group.start_soon(join)
            await settled()
            stage.streams.close()
        with pytest.raises(Unavailable, match="stops"):
            await stage.follow("h")
        stage.streams.vacated("g")
        assert len(stage.streams) == 0


# Live


async def test_what_is_next_is_said_and_a_duplicate_is_not() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        first, second = stage.append(1, 2)
        for publication in (first, second, first, second):
            stage.streams.receive(publication)
        assert stage.take() == ["1", "2"]
        assert stream.position == stage.log().position
        assert stage.calls == ["read"]


async def test_of_a_group_that_nobody_here_is_in_nothing_is_said() -> None:
    async with staged() as stage:
        stage.publish(1)
        assert stage.said == []
        assert stage.calls == []


async def test_a_gap_is_filled_from_the_log_and_in_order() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.append(1, 2)
        stage.publish(3, 4)
        await settled()
        assert stage.take() == ["1", "2", "3", "4"]
        assert stage.calls == ["read", "read"]
        stage.publish(5)
        assert stage.take() == ["5"]


async def test_what_comes_out_of_order_is_said_in_order() -> None:
    async with staged() as stage:
        await stage.follow()
        for publication in reversed(stage.append(1, 2, 3)):
            stage.streams.receive(publication)
        await settled()
        assert stage.take() == ["1", "2", "3"]


async def test_a_gap_in_what_was_held_back_is_read_again() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.append(1)
        stage.gate = anyio.Event()
        stage.publish(2)
        await settled()
        stage.append(3)
        stage.publish(4)
        stage.gate.set()
        await settled()
        assert stage.take() == ["1", "2", "3", "4"]
        assert stage.calls == ["read"] * 3
        assert stream.breaks == 0


async def test_a_duplicate_that_is_too_old_to_be_known_costs_a_read_and_nothing_else() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        (old,) = stage.append(1)
        stage.streams.receive(old)
        stage.publish(2, 3, 4, 5, 6, 7, 8)
        stage.take()
        stage.streams.receive(old)
        await settled()
        assert stage.take() == []
        assert stage.calls == ["read", "read"]
        assert stream.breaks == 0


@pytest.mark.parametrize(("bound", "most"), [("HELD", 3), ("HELD_BYTES", 3)])
async def test_more_than_can_be_held_back_is_read_instead(
    bound: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, bound, most)
    async with staged() as stage:
        stage.logs["g"] = Log(History(20, 100), stage.now)
        stream = await stage.follow()
        stage.append(1)
        stage.gate = anyio.Event()
        stage.publish(2)
        await settled()
        for number in range(3, 10):
            stage.publish(number)
            assert len(stream._held or ()) <= 5
        stage.gate.set()
        await settled()
        assert stage.take() == [str(number) for number in range(1, 10)]
        assert stage.calls == ["read"] * 3


async def test_who_goes_while_a_gap_is_filled_hears_no_more() -> None:
    async with staged() as stage:
        await stage.follow()
        deliver = stage.streams.deliver

        def leave_at_the_first(publication: Publication, message: str) -> None:
            deliver(publication, message)
            stage.streams.vacated("g")

        stage.streams.deliver = leave_at_the_first
        stage.append(1, 2)
        stage.publish(3)
        await settled()
        assert stage.take() == ["1"]


async def test_an_answer_that_comes_as_the_last_member_goes_is_for_nobody() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.append(1)
        stage.gate = anyio.Event()
        stage.publish(2)
        await settled()
        stage.gate.set()
        stage.streams.vacated("g")
        await settled()
        assert stage.take() == []


# The history breaks


async def test_who_has_fallen_behind_what_is_kept_is_told_so() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        before = stream.position
        stage.append(1, 2, 3, 4, 5, 6)
        stage.publish(7)
        await settled()
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert stream.position.offset == 7
        assert stream.position.epoch != before.epoch
        assert stream.since(before) is None
        stage.publish(8)
        assert stage.take() == ["8"]


async def test_a_log_that_was_set_back_is_known_by_the_next_publication() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1, 2)
        kept = stream.position
        stage.publish(3, 4)
        stage.take()
        stage.set_back(kept)
        stage.publish(30)
        await settled()
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert stream.position.offset == 3
        assert stage.calls == ["read", "read", "renew", "read"]


async def test_a_node_that_missed_what_was_lost_hears_of_it_by_the_new_epoch() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1)
        stage.take()
        stage.log().renew(stage.log().position, stage.now)  # by a node that had seen more
        stage.publish(2)
        assert stage.take() == ["2"]
        await stage.look()
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert stream.breaks == 1
        assert "renew" not in stage.calls


async def test_a_publication_that_is_not_in_the_log_any_more_makes_the_loss_known_once() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1)
        kept = stream.position
        lost = stage.append(2)
        stage.set_back(kept)
        stage.publish(20)
        stage.take()
        for _ in range(3):  # late, and more than once
            stage.streams.receive(lost[0])
            await settled()
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert stage.calls.count("renew") == 1


async def test_what_was_lost_is_not_said_again_where_it_would_fit() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1)
        kept = stream.position
        (lost,) = stage.append(2)
        stage.streams.receive(lost)
        stage.set_back(kept)
        await stage.look()
        assert stage.take() == ["1", "2", ("reset", "g", stage.log().position)]
        stage.streams.receive(lost)  # a duplicate: it follows what is kept
        await settled()
        assert stage.take() == []
        stage.publish(20)
        assert stage.take() == ["20"]


async def test_a_renewal_that_comes_too_late_is_tried_again() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1)
        kept = stream.position
        stage.publish(2)
        stage.set_back(kept)
        stage.take()

        def publish_at_the_first_read() -> None:
            if stage.calls[-1] == "read":
                stage.at_gate = lambda: None
                stage.append(21)

        stage.at_gate = publish_at_the_first_read
        stage.publish(20)
        await settled()
        assert stage.calls == ["read", "read", "renew", "renew", "read"]
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert stream.position.offset == 3


async def test_a_log_that_was_forgotten_breaks_the_history() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1, 2, 3)
        stage.take()
        stage.logs.clear()
        stage.publish(10)
        await settled()
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert "renew" not in stage.calls  # it has an epoch of its own
        assert stream.position == stage.log().position


# A tail that was lost


async def test_a_tail_that_was_lost_is_found_at_the_second_look() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.append(1, 2)
        await stage.look(CHECK[0])
        assert stage.take() == []  # it may be on its way
        await stage.look(STRIKE)
        assert stage.take() == ["1", "2"]
        assert stream.position == stage.log().position


async def test_a_tail_that_was_on_its_way_costs_no_read() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        late = stage.append(1, 2)
        await stage.look(CHECK[0])
        for publication in late:
            stage.streams.receive(publication)
        await stage.look(STRIKE)
        assert stage.calls == ["read", "position"]
        await stage.look(CHECK[0])
        assert stage.calls == ["read", "position", "position"]
        assert stream.breaks == 0


async def test_a_log_that_was_set_back_is_found_by_the_look() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        start = stream.position
        stage.publish(1, 2)
        stage.take()
        stage.set_back(start)
        await stage.look()
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert stream.position.offset == 0
        assert stream.position.epoch != start.epoch


async def test_another_publication_in_the_same_place_is_found_by_the_look() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        start = stream.position
        stage.publish(1)
        stage.take()
        stage.set_back(start)
        stage.append(10)
        await stage.look()
        assert stage.take() == [("reset", "g", stage.log().position)]
        assert stream.position == stage.log().position


async def test_what_comes_while_the_end_is_asked_for_is_no_reason_to_read() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.gate = anyio.Event()
        await stage.look()
        stage.publish(1, 2)  # the answer is already older
        stage.gate.set()
        await settled()
        assert stage.calls == ["read", "position"]


async def test_a_look_that_gets_no_answer_is_one_look_less() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.failures = [Unavailable("no")]
        await stage.look()
        stage.append(1)
        await stage.look()
        await stage.look(STRIKE)
        assert stage.take() == ["1"]


async def test_a_look_leaves_alone_what_is_being_read() -> None:
    async with staged() as stage:
        stage.gate = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(stage.follow)
            await settled()
            await stage.look()
            assert stage.calls == ["read"]
            stage.gate.set()
        stage.gate = anyio.Event()
        await stage.look()
        stage.append(1)
        stage.publish(2)  # while the end is asked for, a gap
        await settled()
        stage.gate.set()
        await settled()
        assert stage.calls == ["read", "position", "read"]
        assert stage.take() == ["1", "2"]


async def test_after_an_interruption_every_log_is_looked_at_within_a_second() -> None:
    async with staged() as stage:
        await stage.follow()
        await stage.follow("h")
        stage.streams.recheck()
        stage.streams.recheck()
        await stage.look(1.0)
        assert stage.calls.count("position") == 2
        await stage.look(1.0)
        assert stage.calls.count("position") == 2
        await stage.look()
        assert stage.calls.count("position") == 4


async def test_a_stream_that_has_gone_is_looked_at_no_more() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.streams.vacated("g")
        await settled()
        calls = len(stage.calls)
        await stage.look()
        assert len(stage.calls) == calls


async def test_the_last_one_to_know_of_a_loss_tells_the_others_before_it_goes() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        start = stream.position
        stage.publish(1, 2)
        stage.set_back(start)
        stage.streams.vacated("g")
        await settled()
        assert stage.log().position.epoch != start.epoch
        assert stage.calls == ["read", "position", "read", "renew"]


async def test_a_stream_goes_without_a_word_where_nothing_is_lost() -> None:
    async with staged() as stage:
        await stage.follow()
        epoch = stage.log().position.epoch
        stage.append(1)
        stage.streams.vacated("g")
        await settled()
        assert stage.calls == ["read", "position", "read"]
        assert stage.log().position.epoch == epoch
        await stage.follow()
        stage.logs.clear()
        stage.streams.vacated("g")
        await settled()
        assert stage.calls[3:] == ["read", "position"]


async def test_a_log_renewed_while_a_stream_goes_is_left_alone() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        start = stream.position
        stage.publish(1)
        stage.set_back(start)

        def renew() -> None:
            stage.at_gate = lambda: None
            stage.log().renew(stage.log().position, stage.now)

        stage.at_gate = renew
        stage.streams.vacated("g")
        await settled()
        assert stage.calls == ["read", "position", "read"]


async def test_not_all_streams_of_a_crowd_say_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "FAREWELLS", 2)
    async with staged() as stage:
        for name in "abc":
            await stage.follow(name)
        for name in "abc":
            stage.streams.vacated(name)
        await settled()
        assert stage.calls.count("position") == 2
        await stage.follow("a")
        stage.streams.vacated("a")
        await settled()
        assert stage.calls.count("position") == 3


async def test_a_farewell_ends_with_the_node() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.gate = anyio.Event()  # the broker does not answer any more
        stage.streams.vacated("g")
        await settled()
        assert stage.calls == ["read", "position"]
        stage.streams.close()
        with anyio.fail_after(5):
            await stage.close(1000.0)


# Coming back


async def test_who_comes_back_gets_what_it_missed_or_is_told_that_it_cannot_be_known() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        places = [stream.position]
        for number in range(1, 8):
            stage.publish(number)
            places.append(stream.position)
        assert told(stream.since(places[7])) == []
        assert told(stream.since(places[5])) == ["6", "7"]
        assert told(stream.since(places[2])) == ["3", "4", "5", "6", "7"]
        assert stream.since(places[1]) is None
        epoch = stream.position.epoch
        assert stream.since(Position(epoch, 5, "other")) is None
        assert stream.since(Position(epoch, 7, "other")) is None
        assert stream.since(Position(epoch, 8, "other")) is None
        assert stream.since(Position("other", 7, places[7].tag)) is None
        assert stage.calls == ["read"]


async def test_what_the_log_forgets_the_stream_forgets_and_the_place_stays() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        before = stream.position
        stage.publish(1)
        stage.now += HISTORY.ttl - 1
        assert told(stream.since(before)) == ["1"]
        stage.now += 1
        assert stream.since(before) is None
        assert told(stream.since(stream.position)) == []
        assert told(stream.last(5)) == []
        stage.publish(2)
        assert stage.take() == ["1", "2"]
        assert told(stream.last(5)) == ["2"]


async def test_a_publisher_waits_until_its_node_has_said_it() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1)
        assert await stream.passed(1, 0.0)
        late = stage.append(2, 3)
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                assert await stream.passed(3, 10.0)
                stage.said.append("passed")

            group.start_soon(wait)
            group.start_soon(wait)
            await settled()
            for publication in late:
                stage.streams.receive(publication)
                stage.said.append("…")
        assert stage.take() == ["1", "2", "…", "3", "…", "passed", "passed"]
        assert not await stream.passed(4, 0.01)


async def test_a_publisher_does_not_wait_for_what_a_reset_has_told() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        stage.publish(1, 2)
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                assert await stream.passed(50, 10.0)

            group.start_soon(wait)
            await settled()
            stage.logs.clear()
            stage.publish(3)


async def test_a_publisher_does_not_wait_for_a_stream_that_has_gone() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                assert not await stream.passed(50, 10.0)

            group.start_soon(wait)
            await settled()
            stage.streams.vacated("g")


# Seen before


async def test_a_repetition_moves_the_position_and_says_nothing() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        start = stream.position
        stage.publish(1, id="a")
        stage.log()._ids.clear()  # the log has forgotten it
        stage.publish(2, id="a")
        assert stage.take() == ["1", "2 again"]
        assert told(stream.since(start)) == ["1", "2 again"]
        assert stream.position.offset == 2


async def test_a_repetition_of_what_was_in_the_log_before_is_recognised() -> None:
    async with staged() as stage:
        stage.append(1, id="a")
        stage.log()._ids.clear()
        stage.append(2, id="a")
        stream = await stage.follow()
        assert told(stream.last(5)) == ["1", "2 again"]
        stage.log()._ids.clear()
        stage.publish(3, id="a")
        assert stage.take() == ["3 again"]


async def broken_after(stage: Stage, id: str) -> tuple[Stream[str], Position]:
    """A stream that has said the publication ``id``, which the log then lost."""
    stream = await stage.follow()
    kept = stream.position
    stage.publish(1, id=id)
    stage.set_back(kept)
    await stage.look()
    assert stage.take() == ["1", ("reset", "g", stage.log().position)]
    return stream, stream.position


async def test_what_was_lost_and_is_published_again_is_not_said_twice_to_those_who_stayed() -> None:
    async with staged() as stage:
        stream, kept = await broken_after(stage, "a")
        stage.publish(2, id="a")
        assert stage.take() == ["2 again"]
        # Who comes from elsewhere may not have it.
        assert told(stream.since(kept)) == ["2"]
        assert told(stream.last(5)) == ["2"]
        stage.log()._ids.clear()
        stage.publish(3, id="a")
        assert stage.take() == ["3 again"]
        assert told(stream.since(kept)) == ["2", "3 again"]


async def test_what_was_lost_and_is_published_again_is_said_if_somebody_came_since() -> None:
    async with staged() as stage:
        await broken_after(stage, "a")
        await stage.follow()
        stage.publish(2, id="a")
        assert stage.take() == ["2"]


async def test_what_was_never_said_here_is_not_taken_for_a_repetition_after_a_break() -> None:
    async with staged() as stage:
        stream = await stage.follow()
        kept = stream.position
        stage.publish(1)
        stage.set_back(kept)
        (entry,) = stage.append(2, id="a")
        stage.streams.receive(entry)
        await settled()
        stage.take()  # a reset, which told of 2
        stage.set_back(kept)
        await stage.look()
        stage.take()
        stage.publish(3, id="a")  # 2 is lost, and nobody here has it
        assert stage.take() == ["3"]


# Subscriptions


async def test_a_group_is_subscribed_while_it_is_followed() -> None:
    async with staged() as stage:
        await stage.follow()
        assert stage.wanted == {"g": 1}
        stage.streams.vacated("g")
        assert +stage.wanted == Counter()
        await stage.follow()
        stage.streams.close()
        assert +stage.wanted == Counter()


# Away


async def test_nobody_waits_for_a_broker_that_is_known_to_be_away() -> None:
    async with staged() as stage:
        stage.wrong = ["redis is away"]
        with pytest.raises(Unavailable, match="redis is away"):
            await stage.follow()
        assert stage.calls == []
        stage.wrong = []
        await stage.follow()
        stage.wrong = ["redis is away"]
        await stage.follow()  # what is followed already can be joined


async def test_who_waits_for_a_log_gives_up_when_its_broker_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with staged() as stage:

        async def read(group: str, history: History) -> Reading:
            await anyio.lowlevel.checkpoint()
            stage.wrong = ["redis is away"]
            raise Unavailable("redis has gone")

        monkeypatch.setattr(stage, "read", read)
        monkeypatch.setattr(streams_module, "READY", 1000.0)
        with pytest.raises(Unavailable, match="cannot be read now"):
            await stage.follow()
        assert +stage.wanted == Counter()


async def test_what_was_missed_in_an_interruption_is_read_at_the_first_look() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.append(1, 2)  # nobody here has heard it
        stage.streams.recheck()
        await stage.look(1.0)
        assert stage.take() == ["1", "2"]


async def test_what_is_only_on_its_way_gets_a_second_look() -> None:
    async with staged() as stage:
        await stage.follow()
        stage.append(1)
        await stage.look()
        assert stage.take() == []
        await stage.look(STRIKE)
        assert stage.take() == ["1"]
