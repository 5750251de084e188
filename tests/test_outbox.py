"""The backlog of one peer: its bounds, its order and what is lost, against a model of a few lines."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_rt.exceptions import ConfigurationError
from starlette_rt.outbox import OVERFLOW, Entry, Outbox, OutboxLimits, Overflow

pytestmark = pytest.mark.unit

POLICIES: list[Overflow] = ["disconnect", "drop_oldest", "drop_newest"]
each_policy = pytest.mark.parametrize("policy", POLICIES)

sizes = st.integers(0, 60)
entries = st.builds(Entry, st.none(), sizes, st.booleans(), st.sampled_from([None, None, None, "a", "b"]))
takes = st.integers(0, 80)
steps = st.lists(st.one_of(entries, entries, entries, takes), max_size=60)


def outbox(size: int = 100, messages: int = 5, policy: Overflow = "disconnect") -> Outbox:
    return Outbox(OutboxLimits(bytes=size, messages=messages, overflow=policy))


def said(*payloads: str, **options: Any) -> list[Entry]:
    return [Entry(payload, 10, **options) for payload in payloads]


def fill(box: Outbox, *some: Entry) -> list[int]:
    return [box.push(entry) for entry in some]


def take(box: Outbox, most: int = 65536, now: float = 0.0) -> list[Entry]:
    """What is taken from an outbox of which nothing has lapsed."""
    entries, lapsed = box.take(now, most)
    assert lapsed == 0
    return entries


def rest(box: Outbox) -> list[Any]:
    return [entry.payload for entry in take(box)]


def model(queue: list[Entry], new: Entry, policy: Overflow, size: int, messages: int) -> list[Entry] | None:
    """What a push leaves behind, written for shortness; ``None`` means that the peer is to be disconnected."""
    queue = [old for old in queue if new.key is None or old.key != new.key]
    while len(queue) >= messages or sum(entry.size for entry in (*queue, new)) > size:
        victims = [old for old in queue if old.ephemeral] or (queue if policy == "drop_oldest" else [])
        if not new.ephemeral and policy == "disconnect" and (new.size > size or not victims):
            return None
        if new.ephemeral or new.size > size or not victims:
            return queue
        queue = [old for old in queue if old is not victims[0]]
    return [*queue, new]


@each_policy
@given(steps=steps, size=st.integers(1, 120), messages=st.integers(1, 6))
def test_any_pushes_and_takes_leave_what_the_model_says(
    policy: Overflow, steps: list[Entry | int], size: int, messages: int
) -> None:
    box, queue = outbox(size, messages, policy), list[Entry]()
    for step in steps:
        if isinstance(step, int):
            taken = take(box, step)
            assert taken == queue[: len(taken)], "the oldest, in order"
            queue = queue[len(taken) :]
        else:
            before, queue_after = queue, model(queue, step, policy, size, messages)
            lost = box.push(step)
            if queue_after is None:
                assert lost == OVERFLOW
                return
            queue = queue_after
            assert lost == len(before) + 1 - len(queue), "every loss is a fact that was returned"
        assert len(box) == len(queue) <= messages
        assert box.size == sum(entry.size for entry in queue) <= size
        keys = [entry.key for entry in queue if entry.key is not None]
        assert len(keys) == len(set(keys)), "one entry for each key"
    assert take(box, 10**9) == queue


@given(steps=st.lists(entries, max_size=60), size=st.integers(1, 120), messages=st.integers(1, 6))
def test_under_disconnect_nothing_but_ephemeral_or_superseded_entries_is_ever_lost(
    steps: list[Entry], size: int, messages: int
) -> None:
    box = outbox(size, messages, "disconnect")
    kept: list[Entry] = []
    for entry in steps:
        if box.push(entry) == OVERFLOW:
            assert not entry.ephemeral, "a message that may be dropped disconnects nobody"
            return
        kept = [old for old in kept if entry.key is None or old.key != entry.key]
        kept += [] if entry.ephemeral else [entry]
    assert [entry for entry in take(box, 10**9) if not entry.ephemeral] == kept


@given(sizes=st.lists(sizes, min_size=1, max_size=20), most=takes)
def test_a_take_is_as_much_as_fits_and_at_least_one(sizes: list[int], most: int) -> None:
    box = outbox(10**6, 100)
    fill(box, *(Entry(number, size) for number, size in enumerate(sizes)))
    taken = take(box, most)
    total = sum(entry.size for entry in taken)
    assert [entry.payload for entry in taken] == list(range(len(taken)))
    assert len(taken) == 1 or total <= most
    assert len(taken) == len(sizes) or total + sizes[len(taken)] > most


def test_nothing_is_taken_from_an_empty_outbox() -> None:
    assert outbox().take(0.0) == ([], 0)


@each_policy
def test_within_its_bounds_an_outbox_loses_nothing(policy: Overflow) -> None:
    box = outbox(50, 5, policy)
    assert fill(box, *said("a", "b"), *said("c", ephemeral=True), *said("d", "e")) == [0, 0, 0, 0, 0]
    assert rest(box) == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("bounds", [{"size": 20}, {"messages": 2}])
def test_a_full_outbox_disconnects_its_peer(bounds: dict[str, Any]) -> None:
    assert fill(outbox(**bounds), *said("a", "b", "c")) == [0, 0, OVERFLOW]


@pytest.mark.parametrize("bounds", [{"size": 20}, {"messages": 2}])
def test_a_full_outbox_drops_the_oldest_or_the_newest_where_that_is_the_policy(bounds: dict[str, Any]) -> None:
    oldest, newest = outbox(policy="drop_oldest", **bounds), outbox(policy="drop_newest", **bounds)
    assert fill(oldest, *said("a", "b", "c")) == fill(newest, *said("a", "b", "c")) == [0, 0, 1]
    assert rest(oldest) == ["b", "c"]
    assert rest(newest) == ["a", "b"]


@each_policy
def test_ephemeral_messages_go_first_under_every_policy(policy: Overflow) -> None:
    box = outbox(messages=3, policy=policy)
    fill(box, *said("a"), *said("typing", ephemeral=True), *said("b"))
    assert box.push(said("c")[0]) == 1
    assert rest(box) == ["a", "b", "c"]


@each_policy
def test_an_ephemeral_message_pushes_nothing_out(policy: Overflow) -> None:
    box = outbox(messages=2, policy=policy)
    fill(box, *said("old typing", ephemeral=True), *said("a"))
    assert box.push(said("typing", ephemeral=True)[0]) == 1
    assert rest(box) == ["old typing", "a"]


@each_policy
def test_of_one_key_only_the_latest_is_kept_in_the_place_of_its_saying(policy: Overflow) -> None:
    box = outbox(policy=policy)
    fill(box, *said("at 1", ephemeral=True, key="cursor"), *said("a"))
    assert fill(box, *said("at 2", "at 3", ephemeral=True, key="cursor")) == [1, 1]
    assert box.push(said("other", ephemeral=True, key="pointer")[0]) == 0
    assert rest(box) == ["a", "at 3", "other"]


def test_a_key_that_was_taken_supersedes_nothing_any_more() -> None:
    box = outbox()
    fill(box, *said("at 1", ephemeral=True, key="cursor"))
    assert rest(box) == ["at 1"]
    assert fill(box, *said("at 2", ephemeral=True, key="cursor")) == [0]


def test_a_latest_without_room_takes_the_stale_one_with_it() -> None:
    box = outbox(size=20)
    fill(box, *said("at 1", ephemeral=True, key="cursor"))
    assert box.push(Entry("at 2, at length", 21, ephemeral=True, key="cursor")) == 2
    assert len(box) == box.size == 0


@pytest.mark.parametrize(("policy", "fact"), [("disconnect", OVERFLOW), ("drop_oldest", 1), ("drop_newest", 1)])
def test_a_message_that_fits_into_no_outbox_pushes_nothing_out(policy: Overflow, fact: int) -> None:
    box = outbox(size=20, policy=policy)
    fill(box, *said("a"), *said("typing", ephemeral=True))
    assert box.push(Entry("too much", 21)) == fact
    assert rest(box) == ["a", "typing"]


@pytest.mark.parametrize("bound", ["bytes", "messages", "stall", "close"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_bound_of_nothing_is_refused(bound: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match="greater than zero"):
        OutboxLimits(**{bound: value})  # type: ignore[arg-type]


def test_the_smallest_bounds_are_bounds() -> None:
    box = Outbox(OutboxLimits(bytes=1, messages=1, stall=0.001, close=0.001))
    assert fill(box, Entry("a", 1), Entry("b", 0)) == [0, OVERFLOW]


@pytest.mark.parametrize("policy", ["latest", "resync", "", None])
def test_an_unknown_policy_is_refused_with_the_words_that_are_known(policy: Any) -> None:
    with pytest.raises(ConfigurationError, match=r'"disconnect", "drop_oldest" or "drop_newest".*key='):
        OutboxLimits(overflow=policy)


@each_policy
def test_every_policy_that_the_message_names_is_one(policy: Overflow) -> None:
    assert OutboxLimits(overflow=policy).overflow == policy


@given(untils=st.lists(st.none() | st.integers(0, 20), max_size=30), now=st.integers(0, 20), most=takes)
def test_what_is_over_is_left_out_and_counted_and_the_rest_keeps_its_order(
    untils: list[int | None], now: int, most: int
) -> None:
    box = outbox(10**6, 100)
    fill(box, *(Entry(number, 10, until=until) for number, until in enumerate(untils)))
    taken, lapsed = [], 0
    while box:
        entries, over = box.take(now, most)
        assert entries or not box, "there is something as long as anything is left"
        taken += [entry.payload for entry in entries]
        lapsed += over
    alive = [number for number, until in enumerate(untils) if until is None or until > now]
    assert (taken, lapsed) == (alive, len(untils) - len(alive))
    assert box.size == 0


def test_an_entry_is_over_at_its_time_and_not_before() -> None:
    for now, kept in ((4.9, ["a"]), (5.0, []), (5.1, [])):
        box = outbox()
        fill(box, Entry("a", 1, ephemeral=True, key="cursor", until=5.0))
        entries, lapsed = box.take(now)
        assert ([entry.payload for entry in entries], lapsed) == (kept, 1 - len(kept))
        assert fill(box, Entry("b", 1, ephemeral=True, key="cursor")) == [0], "its key is free"


def test_what_is_over_still_takes_room_until_somebody_looks() -> None:
    box = outbox(messages=2)
    fill(box, Entry("a", 1, ephemeral=True, until=1.0), *said("b"))
    assert box.push(said("c", ephemeral=True)[0]) == 1
    assert [entry.payload for entry in box.take(2.0)[0]] == ["b"]
