"""Presence as watchers hear it, with a clock that the test moves and peers that note what they are offered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint

from starlette_rt import feed as feed_module
from starlette_rt.backends.memory import MemoryPresence
from starlette_rt.feed import COUNT_PERIOD, DIFF_PERIOD, PAGE, Feed
from starlette_rt.frames import PresenceDiff, PresenceState, Raw
from starlette_rt.hub import Batch, Group, Hub, Message, Wire
from starlette_rt.loop import Handle, tasks
from starlette_rt.metrics import Metrics
from starlette_rt.protocols.plain import PLAIN
from starlette_rt.protocols.v1 import V1, V1S
from starlette_rt.seams import ASGI

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


class Watcher:
    """A peer that notes every frame."""

    def __init__(self, wire: Wire) -> None:
        self.session, self.wire = "s", wire
        self.memberships: tuple[Group, ...] = ()
        self.heard: list[Any] = []
        self.payloads: list[Any] = []

    def offer(self, batch: Batch, /) -> None:
        self.payloads += [entry.payload for entry in batch.entries]
        if self.wire.v1 is None:
            self.heard += [msgspec.json.decode(entry.payload["text"]) for entry in batch.entries]

    def take(self) -> list[Any]:
        heard, self.heard = self.heard, []
        return heard


class SlowStore(MemoryPresence):
    """A store that notes what is followed; with ``open`` unset, to follow takes until it is set."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.open = anyio.Event()
        self.open.set()
        self.followed: list[tuple[str, str]] = []

    async def follow(self, group: str, part: Any) -> None:
        if (group, part) not in self.followed:
            self.followed.append((group, part))
        if not self.open.is_set():
            await self.open.wait()

    def unfollow(self, group: str, part: Any) -> None:
        self.followed.remove((group, part))


class World:
    """A feed with its hub and its store. It is the feed's `Tasks` too: real tasks, our time."""

    def __init__(self) -> None:
        self._tasks = tasks()
        self.now = 100.0
        self.running = 0
        self.hub = Hub(self._tasks.schedule, Metrics())
        self.store = SlowStore(10.0, self.time)
        self.feed = Feed(self.hub, self.store, self)  # type: ignore[arg-type]
        self.hub.on_crowd = self.feed.crowd
        self.wire = Wire(PLAIN["json"], ASGI)

    def time(self) -> float:
        return self.now

    def spawn(self, function: Callable[..., Any], *args: Any) -> Handle:
        async def run() -> None:
            self.running += 1
            try:
                await function(*args)
            finally:
                self.running -= 1

        return self._tasks.spawn(run)

    async def settle(self) -> None:
        """Let the feed look around: it does so in every turn, because its tick is 0 here."""
        for _ in range(10):
            await checkpoint()

    async def later(self, seconds: float) -> None:
        self.now += seconds
        self.store.sweep()
        await self.settle()

    async def watch(self, how: Any = "members", group: str = "a") -> Watcher:
        watcher = Watcher(self.wire)
        self.hub.join(watcher, group)
        await self.feed.watch(watcher, group, how)
        return watcher

    async def track(self, *keys: str, group: str = "a", meta: Any = None) -> None:
        for key in keys:
            await self.store.track(group, key, f"of {key}", meta or {})

    async def untrack(self, *keys: str, group: str = "a") -> None:
        for key in keys:
            await self.store.untrack(group, key, f"of {key}")


@asynccontextmanager
async def living(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(feed_module, "TICK", 0.0)
    world = World()
    await world.store.start(world.feed.changed)
    try:
        yield world
        await world.settle()
        await world.later(2 * COUNT_PERIOD)
        assert world.running == 0  # no task stays when nothing changes
    finally:
        await world._tasks.close(1.0)


Living = Callable[[], Any]


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Living:
    return lambda: living(monkeypatch)


def keys(frame: dict[str, Any], part: str) -> list[str]:
    return sorted(frame[part])


def crowd(size: int) -> list[str]:
    return [f"u{number:03}" for number in range(size)]


# Members


async def test_a_watcher_is_told_the_state_and_then_what_changes(alive: Living) -> None:
    async with alive() as world:
        await world.track("ada", meta={"name": "Ada"})
        await world.settle()
        watcher = await world.watch()
        await world.track("bob")
        await world.settle()
        state, diff = watcher.take()
        assert state["type"] == "presence_state"
        assert state["members"]["ada"]["metas"][0]["name"] == "Ada"
        assert state["after"] is None
        assert diff["type"] == "presence_diff"
        assert keys(diff, "joins") == ["bob"]
        assert diff["version"] == state["version"] + 1
        await world.later(DIFF_PERIOD)
        await world.untrack("ada")
        await world.settle()
        (diff,) = watcher.take()
        assert diff["leaves"]["ada"]["reason"] == "left"


async def test_what_changes_in_one_turn_is_one_diff(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch()
        await world.track("ada", "bob", "cleo")
        await world.untrack("cleo")
        await world.settle()
        state, diff = watcher.take()
        assert state["members"] == {}
        assert keys(diff, "joins") == ["ada", "bob"]
        assert diff["leaves"] == {}


async def test_a_group_is_told_at_most_one_diff_in_a_period_and_nothing_is_lost(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch()
        for key in ("ada", "bob", "cleo"):
            await world.track(key)
            await world.settle()
        assert len(watcher.take()) == 2
        await world.later(DIFF_PERIOD * 0.9)
        assert watcher.take() == []
        await world.later(DIFF_PERIOD * 0.2)
        (diff,) = watcher.take()
        assert keys(diff, "joins") == ["bob", "cleo"]


async def test_the_period_of_one_group_does_not_hold_back_another(alive: Living) -> None:
    async with alive() as world:
        one, two = await world.watch(), await world.watch(group="b")
        await world.track("ada")
        await world.settle()
        await world.track("ada", group="b")
        await world.settle()
        assert len(one.take()) == len(two.take()) == 2


async def test_what_cancels_itself_out_within_a_period_is_not_told(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch()
        await world.track("ada")
        await world.untrack("ada")
        await world.settle()
        assert len(watcher.take()) == 1


async def test_a_watcher_who_comes_in_the_turn_of_a_change_misses_nothing(alive: Living) -> None:
    async with alive() as world:
        await world.track("ada")
        first = await world.watch()
        await world.track("ben")
        second = await world.watch()
        counting = await world.watch("count")
        await world.settle()
        (state, diff), (other, same) = first.take(), second.take()
        assert set(state["members"]) == set(other["members"]) == {"ada"}, "the first state holds what was pending"
        assert keys(diff, "joins") == keys(same, "joins") == ["ben"]
        assert counting.take()[0]["count"] == 2


async def test_those_who_count_hear_of_what_the_first_watcher_was_told_at_once(alive: Living) -> None:
    async with alive() as world:
        counting = await world.watch("count")
        await world.track("ada")
        await world.watch()
        await world.settle()
        assert [each["count"] for each in counting.take()] == [0, 1]


async def test_presence_takes_its_place_in_the_order_of_everything(alive: Living) -> None:
    async with alive() as world:
        watcher = Watcher(world.wire)
        world.hub.join(watcher, "a")
        world.hub.say(watcher, Message(Raw('"before"')))
        await world.feed.watch(watcher, "a", "members")
        world.hub.say(watcher, Message(Raw('"after"')))
        await world.settle()
        first, state, last = watcher.take()
        assert (first, state["type"], last) == ("before", "presence_state", "after")


async def test_a_state_is_spelled_once_for_each_version(alive: Living) -> None:
    async with alive() as world:
        await world.track("ada")
        await world.settle()
        watchers = [await world.watch() for _ in range(3)]  # the first finds nobody watching, the others share
        await world.settle()
        assert watchers[1].payloads[0] is watchers[2].payloads[0]
        await world.track("bob")
        await world.settle()
        late = await world.watch()
        await world.settle()
        assert late.heard[0]["version"] == 2
        assert keys(late.heard[0], "members") == ["ada", "bob"]


async def test_who_no_longer_watches_is_told_nothing(alive: Living) -> None:
    async with alive() as world:
        watcher, other = await world.watch(), await world.watch()
        world.feed.unwatch(watcher, "a")
        await world.track("ada")
        await world.settle()
        assert len(watcher.take()) == 1
        assert len(other.take()) == 2


async def test_a_group_that_is_neither_watched_nor_inhabited_is_forgotten(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch()
        await world.track("ada")
        await world.settle()
        await world.later(DIFF_PERIOD)
        await world.untrack("ada")
        await world.settle()
        assert world.store._rosters  # the watcher counts on from this version
        world.feed.unwatch(watcher, "a")
        world.hub.leave(watcher, "a")
        await world.settle()
        await world.later(DIFF_PERIOD)
        assert not world.store._rosters
        assert not world.hub.groups
        feed = world.feed
        assert not any([feed._dirty, feed._counting, feed._rested, feed._large, feed._states])
        assert not any([feed._counts, feed._coming])


async def test_where_nobody_watches_nothing_is_spelled_and_the_diff_is_taken(alive: Living) -> None:
    async with alive() as world:
        await world.track("ada")
        await world.settle()
        assert world.store.known("a").version == 1
        assert not world.feed._states


async def test_after_the_grace_a_member_leaves_by_a_diff(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch()
        await world.track("ada")
        await world.settle()
        world.store.close(["a"], "ada", "of ada")
        await world.later(9.0)
        assert len(watcher.take()) == 2
        await world.later(1.0)
        (diff,) = watcher.take()
        assert keys(diff, "leaves") == ["ada"]


async def test_once_it_is_closed_nothing_more_is_told_and_no_task_runs(alive: Living) -> None:
    async with alive() as world:
        world.feed.close()  # nothing runs
    async with alive() as world:
        watcher = await world.watch()
        await world.track("ada")
        world.feed.close()
        await world.settle()
        await world.track("bob")
        await world.settle()
        assert [frame["type"] for frame in watcher.take()] == ["presence_state"]


# Count


async def test_who_asked_for_a_count_is_told_the_number_and_nothing_else(alive: Living) -> None:
    async with alive() as world:
        await world.track("ada")
        await world.settle()
        watcher = await world.watch("count")
        await world.track("bob")
        await world.settle()
        assert watcher.take() == [
            {"type": "presence_count", "group": "a", "count": 1},
            {"type": "presence_count", "group": "a", "count": 2},
        ]


async def test_a_count_is_told_at_most_once_in_a_period_and_ends_right(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch("count")
        for key in crowd(5):
            await world.track(key)
            await world.later(COUNT_PERIOD / 10)
        assert [frame["count"] for frame in watcher.take()] == [0, 1]
        await world.later(COUNT_PERIOD)
        assert [frame["count"] for frame in watcher.take()] == [5]


async def test_watching_another_way_replaces_the_first(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch("members")
        await world.feed.watch(watcher, "a", "count")
        await world.track("ada")
        await world.settle()
        assert [frame["type"] for frame in watcher.take()] == ["presence_state", "presence_count", "presence_count"]
        await world.feed.watch(watcher, "a", "members")
        await world.later(COUNT_PERIOD)
        await world.track("bob")
        await world.settle()
        assert [frame["type"] for frame in watcher.take()] == ["presence_state", "presence_diff"]


async def test_a_count_that_is_what_was_told_last_is_not_told_again(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch("count")
        await world.track("ada")
        await world.later(COUNT_PERIOD)
        await world.track("ada", meta={"away": True})
        await world.later(COUNT_PERIOD)
        await world.track("bob")
        await world.untrack("bob")
        await world.later(COUNT_PERIOD)
        assert [frame["count"] for frame in watcher.take()] == [0, 1]


async def test_who_begins_to_count_while_it_changes_ends_with_the_number_of_all(alive: Living) -> None:
    async with alive() as world:
        first = await world.watch("count")
        await world.track("ada")
        await world.settle()
        await world.track("bob")  # not told yet
        second = await world.watch("count")
        await world.untrack("bob")  # what the first was told last is right again, what the second was is not
        await world.later(COUNT_PERIOD)
        assert [frame["count"] for frame in first.take()][-1] == 1
        assert [frame["count"] for frame in second.take()] == [2, 1]


# Following


@pytest.mark.parametrize("how", ["members", "count"])
async def test_a_group_is_followed_as_long_as_somebody_watches(alive: Living, how: Any) -> None:
    async with alive() as world:
        one, two = await world.watch(how), await world.watch(how)
        assert world.store.followed == [("a", how)]
        world.feed.unwatch(one, "a")
        assert world.store.followed == [("a", how)]
        world.hub.forget(two)
        assert world.store.followed == []


async def test_who_watches_another_way_follows_that(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch("members")
        await world.feed.watch(watcher, "a", "members")
        assert world.store.followed == [("a", "members")]
        await world.feed.watch(watcher, "a", "count")
        assert world.store.followed == [("a", "count")]


@pytest.mark.parametrize("how", ["members", "count"])
async def test_who_has_left_before_the_group_is_followed_is_told_nothing(alive: Living, how: Any) -> None:
    async with alive() as world:
        world.store.open = anyio.Event()
        watcher, other = Watcher(world.wire), Watcher(world.wire)
        for each in (watcher, other):
            world.hub.join(each, "a")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.feed.watch, watcher, "a", how)
            tasks.start_soon(world.feed.watch, other, "a", how)
            await world.settle()
            world.hub.forget(watcher)  # its connection has ended
            world.store.open.set()
        await world.settle()
        assert watcher.take() == []
        assert len(other.take()) == 1
        world.hub.leave(other, "a")
        world.feed.unwatch(other, "a")
        assert not world.hub.groups
        assert world.store.followed == []


async def test_a_group_stays_followed_for_who_is_about_to_watch(alive: Living) -> None:
    async with alive() as world:
        first, second = await world.watch(), Watcher(world.wire)
        world.hub.join(second, "a")
        world.store.open = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.feed.watch, second, "a", "members")
            await world.settle()
            world.feed.unwatch(first, "a")
            assert world.store.followed == [("a", "members")]
            world.store.open.set()
        await world.track("ada")
        await world.settle()
        assert [frame["type"] for frame in second.take()] == ["presence_state", "presence_diff"]


async def test_who_is_cancelled_before_the_group_is_followed_leaves_nothing_behind(alive: Living) -> None:
    async with alive() as world:
        world.store.open = anyio.Event()
        watcher = Watcher(world.wire)
        world.hub.join(watcher, "a")
        with anyio.move_on_after(0):
            await world.feed.watch(watcher, "a", "members")
        assert world.store.followed == []
        assert not world.feed._coming
        world.store.open.set()


# Many members


async def test_a_large_group_is_told_as_a_count_and_whole_again_when_it_has_shrunk(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch()
        await world.track(*crowd(PAGE + 1))
        await world.settle()
        assert [frame["type"] for frame in watcher.take()] == ["presence_state", "presence_count"]
        await world.later(COUNT_PERIOD)
        await world.untrack("u000")
        await world.settle()
        (state,) = watcher.take()
        assert state["type"] == "presence_state"
        assert keys(state, "members") == crowd(PAGE + 1)[1:]
        await world.track("ada")
        await world.untrack("u001")
        await world.settle()
        (diff,) = watcher.take()
        assert diff["version"] == state["version"] + 1


async def test_the_first_page_of_a_large_group_says_where_to_go_on(alive: Living) -> None:
    async with alive() as world:
        await world.track(*crowd(PAGE + 1))
        await world.settle()
        watcher = await world.watch()
        await world.settle()
        (state,) = watcher.take()
        assert len(state["members"]) == PAGE
        assert state["after"] == crowd(PAGE)[-1]


async def test_who_has_seen_the_first_page_only_is_told_the_whole_when_it_fits(alive: Living) -> None:
    async with alive() as world:
        await world.track(*crowd(PAGE + 1))
        await world.settle()
        watcher = await world.watch()
        await world.untrack("u000")
        await world.settle()
        _, state = watcher.take()
        assert state["type"] == "presence_state"
        assert keys(state, "members") == crowd(PAGE + 1)[1:]


async def test_a_large_group_that_nobody_watches_any_more_is_nothing_special(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch()
        await world.track(*crowd(PAGE + 1))
        await world.settle()
        world.feed.unwatch(watcher, "a")
        await world.later(COUNT_PERIOD)
        await world.untrack("u000")
        await world.settle()
        assert not world.feed._large
        assert world.store.known("a").version == 2


async def test_counters_and_watchers_of_a_large_group_hear_the_same_count(alive: Living) -> None:
    async with alive() as world:
        watcher, counter = await world.watch(), await world.watch("count")
        await world.track(*crowd(PAGE + 1))
        await world.settle()
        await anyio.lowlevel.checkpoint()
        assert watcher.take()[-1] == counter.take()[-1] == {"type": "presence_count", "group": "a", "count": PAGE + 1}


@pytest.mark.parametrize("protocol", V1S.values(), ids=V1S)
async def test_a_watcher_of_the_protocol_is_told_the_same_in_its_spelling(alive: Living, protocol: V1) -> None:
    async with alive() as world:
        plain, other = await world.watch(), Watcher(Wire(protocol, ASGI))
        world.hub.join(other, "a")
        await world.feed.watch(other, "a", "members")
        await world.track("ann", meta={"n": 1})
        await world.settle()
        await world.later(DIFF_PERIOD)
        await world.untrack("ann")
        await world.settle()
        frames = [frame for payload in other.payloads for frame in protocol.decode_server(payload)]
        assert frames == [
            PresenceState("a", 0, {}, None),
            PresenceDiff("a", 1, {"ann": {"metas": [{"n": 1, "ref": "1"}]}}, {}),
            PresenceDiff("a", 2, {}, {"ann": {"metas": [{"n": 1, "ref": "1"}], "reason": "left"}}),
        ]
        assert [msgspec.to_builtins(frame) for frame in frames] == plain.take()


async def test_who_asks_for_the_number_that_all_know_changes_nothing_for_them(alive: Living) -> None:
    async with alive() as world:
        first = await world.watch("count")
        await world.track("ann")
        await world.later(COUNT_PERIOD)
        second = await world.watch("count")
        await world.later(COUNT_PERIOD)
        assert [frame["count"] for frame in first.take()] == [0, 1]
        assert [frame["count"] for frame in second.take()] == [1]


async def test_a_number_that_nobody_waits_for_any_more_is_told_to_nobody(alive: Living) -> None:
    async with alive() as world:
        watcher = await world.watch("count")
        await world.track("ann")
        await world.later(0)
        await world.track("bob")  # within the period: it waits
        await world.later(0)
        world.feed.unwatch(watcher, "a")
        await world.later(COUNT_PERIOD)
        assert [frame["count"] for frame in watcher.take()] == [0, 1]
