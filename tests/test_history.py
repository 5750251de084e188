"""The chain, and what is proven by it: every case by hand, and merge against a log that is cut anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_rt import history as history_module
from starlette_rt.exceptions import ConfigurationError
from starlette_rt.history import (
    EPOCH_TTL,
    IDS_TTL,
    History,
    Log,
    Policies,
    Position,
    Publication,
    Reading,
    Window,
    after,
    contradicts,
    follows,
    link,
    merge,
    missed,
    new_epoch,
    new_tag,
)

pytestmark = pytest.mark.unit

TOP = Position("e", 5, "t5")


def said(offset: int, branch: str = "t", prev: str | None = None) -> Publication:
    """The publication at ``offset`` of the chain t1, t2, …"""
    before = f"{branch}{offset - 1}" if offset > 1 else ""
    return Publication("g", "m", offset, b"1", offset=offset, tag=f"{branch}{offset}", prev=prev or before)


def reading(first: int, last: int, epoch: str = "e") -> Reading:
    return Reading(Position(epoch, last, f"t{last}" if last else ""), tuple(map(said, range(first, last + 1))))


def names() -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"n{next(numbers)}"


# Policies


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "3", None])
def test_a_history_of_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="size"):
        History(size, 10)


@pytest.mark.parametrize("ttl", [0, -1, math.inf, math.nan, True, "3", None])
def test_a_history_of_no_time_is_refused(ttl: Any) -> None:
    with pytest.raises(ConfigurationError, match="ttl"):
        History(10, ttl)


def test_the_first_pattern_that_matches_says_what_is_kept() -> None:
    long, short = History(100, 300), History(10, 30.5)
    of = Policies({"board:7": long, "board:*": short, "Chat:?": long}).of
    assert [of("board:7"), of("board:8"), of("Chat:a"), of("chat:a"), of("other")] == [long, short, long, None, None]
    assert of("board:8") is short


def test_without_patterns_nothing_is_kept() -> None:
    assert Policies().of("g") is None
    assert Policies({}).of("g") is None


def test_the_policies_of_groups_are_remembered_and_forgotten_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "GROUPS", 10)
    of: Any = Policies({"*": History(1, 1)}).of
    for number in range(100):
        of(str(number))
    assert of.cache_info().currsize == 10


@pytest.mark.parametrize("patterns", [{"a": 5}, {7: History(1, 1)}])
def test_patterns_that_are_none_are_refused_with_what_to_write(patterns: Any) -> None:
    with pytest.raises(ConfigurationError, match=r'history=\{"board:\*": History\(size=100, ttl=300\)\}'):
        Policies(patterns)


def test_tags_and_epochs_are_random() -> None:
    assert len({new_tag() for _ in range(100)}) == len({new_epoch() for _ in range(100)}) == 100
    assert all(len(new_tag()) == 8 and len(new_epoch()) == 12 for _ in range(100))


# Window


def test_a_window_remembers_the_last_keys() -> None:
    window: Window[int] = Window(3)
    for number in range(3):
        window.put(str(number), number)
    window.put("0", 10)  # the newest again
    window.put("3", 3)
    assert [window.get(str(number)) for number in range(4)] == [10, None, 2, 3]
    assert len(window) == 3
    assert "0" in window
    assert "1" not in window
    window.clear()
    assert len(window) == 0


# The chain


def test_a_position_is_handed_out_as_json_data() -> None:
    assert TOP.asdict() == {"epoch": "e", "offset": 5, "tag": "t5"}


def test_a_publication_follows_only_the_place_with_the_tag_that_it_names() -> None:
    assert follows(TOP, said(6))
    assert not follows(TOP, said(6, prev="x5"))
    assert not follows(TOP, said(7, prev="t5"))
    assert after(TOP, said(6)) == Position("e", 6, "t6")
    assert follows(Position("e", 0, ""), said(1))


@pytest.mark.parametrize(
    ("publication", "fits"),
    [
        (said(6), "next"),
        (said(5), "seen"),
        (said(3), "seen"),
        (said(7), "break"),
        (said(6, prev="x5"), "break"),
        (said(5, "x"), "break"),  # another one with the same number: the log was set back
        (said(1), "break"),  # too old to be known
        (Publication("g", "m", 1, b"1"), "break"),
    ],
)
def test_a_publication_is_next_or_seen_or_breaks_the_chain(publication: Publication, fits: str) -> None:
    known = {5: "t5", 4: "t4", 3: "t3"}
    assert link(TOP, publication, known.get) == fits


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        (Position("e", 5, "t5"), []),
        (Position("e", 4, "t4"), [5]),
        (Position("e", 2, "t2"), [3, 4, 5]),  # itself it need not be kept
        (Position("e", 1, "t1"), None),  # 2 is gone
        (Position("e", 0, ""), None),
        (Position("e", 6, "t6"), None),  # ahead of the log: that was set back
        (Position("e", 5, "x5"), None),
        (Position("e", 4, "x4"), None),
        (Position("f", 5, "t5"), None),
        (Position("f", 4, "t4"), None),
    ],
)
def test_what_was_missed_is_proven_or_not_told(position: Position, expected: list[int] | None) -> None:
    told = missed(position, reading(3, 5))
    assert (told if told is None else [each.offset for each in told]) == expected


def test_a_log_with_a_hole_or_without_its_end_proves_nothing() -> None:
    hole = Reading(TOP, (said(3), said(5), said(5)))
    other_end = Reading(Position("e", 5, "x5"), tuple(map(said, (3, 4, 5))))
    assert missed(Position("e", 2, "t2"), hole) is None
    assert missed(Position("e", 2, "t2"), other_end) is None


def test_nothing_is_kept_and_nothing_was_missed() -> None:
    assert missed(TOP, Reading(TOP, ())) == []
    assert missed(Position("e", 4, "t4"), Reading(TOP, ())) is None


@pytest.mark.parametrize(
    ("offset", "tag", "against"),
    [
        (6, "t6", True),  # it is not there
        (5, "t5", False),
        (5, "x5", True),
        (4, "t4", False),
        (4, "x4", True),
        (2, "t2", False),  # not kept, but named by the one after it
        (2, "x2", True),
        (1, "x1", False),  # nobody knows
    ],
)
def test_a_reading_can_prove_that_something_is_not_in_its_chain(offset: int, tag: str, against: bool) -> None:
    assert contradicts(reading(3, 5), offset, tag) is against


def test_an_empty_reading_knows_its_end_only() -> None:
    empty = Reading(TOP, ())
    assert contradicts(empty, 5, "x5")
    assert not contradicts(empty, 5, "t5")
    assert not contradicts(empty, 4, "x4")


# Merge


def offsets(found: tuple[list[Publication], list[Publication]] | None) -> tuple[list[Any], list[Any]]:
    assert found is not None
    return [each.offset for each in found[0]], [each.offset for each in found[1]]


@pytest.mark.parametrize(
    ("live", "told", "left"),
    [
        ([], [4, 5], []),
        ([said(6), said(7)], [4, 5, 6, 7], []),
        ([said(5), said(6), said(6), said(4)], [4, 5, 6], []),  # doubled, and late
        ([said(7), said(6)], [4, 5, 6, 7], []),  # out of order
        ([said(7)], [4, 5], [7]),  # 6 is missing
        ([said(5, "x"), said(6)], [4, 5, 6], [5]),  # the log says otherwise
        ([said(2, "x"), said(2)], [4, 5], [2]),  # what is named by the first that is kept counts too
        ([said(1, "x")], [4, 5], []),  # older than anything that is known
    ],
)
def test_what_was_read_and_what_came_live_are_put_together_by_offset(
    live: list[Publication], told: list[int], left: list[int]
) -> None:
    assert offsets(merge(Position("e", 3, "t3"), reading(3, 5), live)) == (told, left)


def test_a_reading_that_does_not_go_on_from_the_place_merges_with_nothing() -> None:
    assert merge(Position("e", 3, "x3"), reading(3, 5), [said(6)]) is None
    assert merge(Position("e", 9, "t9"), reading(3, 5), []) is None


def test_with_nothing_kept_the_end_alone_tells_a_duplicate_from_another_log() -> None:
    assert offsets(merge(TOP, Reading(TOP, ()), [said(5), said(6)])) == ([6], [])
    assert offsets(merge(TOP, Reading(TOP, ()), [said(5, "x")])) == ([], [5])


@given(
    length=st.integers(0, 12),
    kept=st.integers(0, 12),
    read=st.integers(0, 12),
    position=st.integers(0, 14),
    draw=st.data(),
)
def test_whatever_comes_in_any_order_the_chain_is_told_once_and_in_order(
    length: int, kept: int, read: int, position: int, draw: st.DataObject
) -> None:
    read = min(read, length)
    first = max(1, read - kept + 1)
    live = draw.draw(st.lists(st.sampled_from(range(1, length + 1)), max_size=20)) if length else []
    at = Position("e", position, f"t{position}" if position else "")
    found = merge(at, reading(first, read), [said(offset) for offset in live])
    if position > read or (position < first - 1):
        assert found is None
        return
    end = read
    while end + 1 in live:
        end += 1
    told, left = offsets(found)
    assert told == list(range(position + 1, end + 1))
    assert sorted(left) == sorted(offset for offset in live if offset > end)


# The log


def publish(log: Log, number: int, now: float = 0.0, id: str = "", tag: Callable[[], str] = new_tag) -> Any:
    return log.append(Publication("g", "m", number, b"1", id=id), now, tag)


def test_a_log_gives_each_publication_its_place_in_the_chain() -> None:
    tag = names()
    log = Log(History(2, 10), 0.0, lambda: "e1")
    assert log.position == Position("e1", 0, "")
    places = [publish(log, number, tag=tag) for number in range(3)]
    assert [place for place, _ in places] == [Position("e1", offset, f"n{offset}") for offset in (1, 2, 3)]
    assert [(each.offset, each.tag, each.prev) for _, each in places] == [
        (1, "n1", ""),
        (2, "n2", "n1"),
        (3, "n3", "n2"),
    ]
    assert log.read(0.0) == Reading(Position("e1", 3, "n3"), (places[1][1], places[2][1]))


def test_what_was_published_before_keeps_its_place_and_is_not_published_again() -> None:
    log = Log(History(2, 10), 0.0)
    place, _ = publish(log, 1, id="a")
    publish(log, 2, id="b")
    assert publish(log, 3, id="a") == (place, None)
    assert log.position.offset == 2
    publish(log, 4)
    publish(log, 5)  # without an id nothing is recognised
    assert log.position.offset == 4


def test_publications_go_after_their_time_and_the_place_stays() -> None:
    log = Log(History(5, 10), 0.0)
    publish(log, 1, 0.0, "a")
    publish(log, 2, 9.0)
    assert len(log.read(18.9).entries) == 2  # the time counts from the last one
    assert log.read(19.0) == Reading(log.position, ())
    assert publish(log, 3, 20.0, "a")[1] is None
    log.expire(20.0 + IDS_TTL)
    assert publish(log, 3, 20.0 + IDS_TTL, "a")[1] is not None
    assert log.position.offset == 3


def test_a_log_is_outlived_a_day_after_its_last_use_or_later() -> None:
    log = Log(History(5, 10), 0.0)
    publish(log, 1)
    assert not log.outlived(EPOCH_TTL - 1)
    log.read(EPOCH_TTL - 1)
    assert not log.outlived(EPOCH_TTL + 1)
    assert log.outlived(2 * EPOCH_TTL)
    assert not Log(History(5, 3 * EPOCH_TTL), 0.0).outlived(2 * EPOCH_TTL)


def test_a_log_in_which_nothing_was_said_is_outlived_with_its_ttl() -> None:
    log = Log(History(5, 10), 0.0)
    assert not log.outlived(9)
    assert log.outlived(10), "who joins many groups and leaves them fills no memory for a day"


def test_an_epoch_is_renewed_once_by_those_who_saw_the_same_end() -> None:
    log = Log(History(5, 10), 0.0, lambda: "e1")
    place, entry = publish(log, 1)
    epoch = names()
    renewed = log.renew(place, 1.0, epoch)
    assert renewed == Position("n1", 1, place.tag) == log.position
    assert log.renew(place, 1.0, epoch) == renewed  # somebody else has done it
    after_it, _ = publish(log, 2)
    assert log.renew(renewed, 1.0, epoch) == after_it  # it has gone on meanwhile
    assert log.renew(after_it, 1.0, epoch).epoch == "n2"
    assert log.read(1.0).entries[0] == entry


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ([("a", History(1, 1))], 'write history={"board:\\*"'),
        ({"": History(1, 1)}, 'write history={"board:\\*"'),
    ],
)
def test_patterns_that_cannot_work_are_refused_with_what_to_write(patterns: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        Policies(patterns)


def test_what_is_pushed_to_people_is_meant_by_patterns_that_begin_so() -> None:
    everything, pushed = History(1, 1), History(2, 2)
    assert Policies({"*": everything}).of("~alice") is None
    policies = Policies({"~*": pushed, "*": everything})
    assert policies.of("~alice") is pushed
    assert policies.of("alice") is everything
