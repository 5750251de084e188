"""One group's members under every order of events, and what a watcher of any moment comes to know."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starlette_rt.presence import Diff, Member, Meta, Roster, State

pytestmark = pytest.mark.unit

Seen = dict[str, tuple[Meta, ...]]


def seen(state: State) -> Seen:
    return {member.key: member.metas for member in state.members}


def follow(known: Seen, diff: Diff) -> Seen:
    """Apply a diff as its docstring tells a client to."""
    after = dict(known)
    for key in diff.leaves.keys() | diff.joins.keys():
        gone = {meta["ref"] for meta in diff.leaves.get(key, ())}
        metas = [*(meta for meta in after.pop(key, ()) if meta["ref"] not in gone), *diff.joins.get(key, ())]
        if metas:
            after[key] = tuple(metas)
    return after


def truth(roster: Roster) -> Seen:
    return {key: member.metas for key, member in roster.members().items()}


def say(metas: tuple[Meta, ...]) -> list[Meta]:
    """The metas without their refs."""
    return [{name: value for name, value in meta.items() if name != "ref"} for meta in metas]


def taken(roster: Roster) -> Diff:
    diff = roster.take_diff()
    assert diff is not None
    return diff


def ann(*connections: str, grace: float | None = None) -> Roster:
    """A roster that shows ann on these connections, told to all; with a grace, all closed at 0."""
    roster = Roster()
    for connection in connections:
        roster.track("ann", connection, {"name": "Ann"}, 0.0)
    roster.take_diff()
    for connection in connections if grace is not None else ():
        roster.close(connection, 0.0, grace or 0.0)
    return roster


def test_a_tracked_connection_is_a_member_with_one_meta_that_has_a_ref() -> None:
    roster = Roster()
    roster.track("ann", "c1", {"name": "Ann"}, 0.0)
    member = roster.members()["ann"]
    assert member == Member("ann", ({"name": "Ann", "ref": "1"},))
    assert taken(roster) == Diff(1, joins={"ann": member.metas}, leaves={}, reasons={})


def test_a_user_is_one_member_with_one_meta_per_connection() -> None:
    roster = ann("c1", "c2")
    assert (roster.count(), roster.count(connections=True)) == (1, 2)
    assert len({meta["ref"] for meta in roster.members()["ann"].metas}) == 2
    roster.untrack("c1", 0.0)
    diff = taken(roster)
    assert say(diff.leaves["ann"]) == [{"name": "Ann"}]
    assert (diff.joins, diff.reasons) == ({}, {})  # the member is still here
    roster.untrack("c2", 0.0)
    assert taken(roster).reasons == {"ann": "left"}


def test_the_reason_of_a_leave_is_told() -> None:
    roster = ann("c1")
    roster.untrack("c1", 0.0, "node_lost")
    assert taken(roster).reasons == {"ann": "node_lost"}


def test_no_reason_is_told_for_who_came_back_between_two_diffs() -> None:
    roster = ann("c1")
    roster.untrack("c1", 0.0)
    roster.track("ann", "c2", {"name": "Ann"}, 0.0)
    diff = taken(roster)
    assert (list(diff.leaves), list(diff.joins), diff.reasons) == (["ann"], ["ann"], {})


def test_an_update_is_a_leave_of_the_old_meta_and_a_join_of_the_new() -> None:
    roster = ann("c1")
    assert roster.update("c1", {"name": "Ann", "typing": True}, 0.0)
    diff = taken(roster)
    assert say(diff.leaves["ann"]) == [{"name": "Ann"}]
    assert say(diff.joins["ann"]) == [{"name": "Ann", "typing": True}]
    assert diff.leaves["ann"][0]["ref"] != diff.joins["ann"][0]["ref"]
    assert diff.reasons == {}


def test_two_updates_between_two_diffs_are_one() -> None:
    roster = ann("c1")
    for number in (1, 2):
        roster.update("c1", {"n": number}, 0.0)
    diff = taken(roster)
    assert (say(diff.leaves["ann"]), say(diff.joins["ann"])) == ([{"name": "Ann"}], [{"n": 2}])


def test_an_update_with_equal_content_is_nothing() -> None:
    roster = ann("c1")
    assert roster.update("c1", {"name": "Ann"}, 0.0)
    roster.track("ann", "c1", {"name": "Ann"}, 0.0)
    assert roster.update("c1", dict(roster.members()["ann"].metas[0]), 0.0)  # a ref in it is overwritten
    assert not roster.changed
    assert roster.take_diff() is None


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), (0, False), ([1], [True]), ("1", 1), (None, 0)])
def test_values_that_differ_only_in_json_are_an_update(old: object, new: object) -> None:
    roster = Roster()
    roster.track("ann", "c1", {"x": old}, 0.0)
    roster.take_diff()
    roster.update("c1", {"x": new}, 0.0)
    assert roster.changed


def test_to_track_again_is_an_update() -> None:
    roster = ann("c1")
    roster.track("ann", "c1", {"name": "Anna"}, 0.0)
    assert say(roster.members()["ann"].metas) == [{"name": "Anna"}]


def test_to_track_again_under_another_key_leaves_the_first() -> None:
    roster = ann("c1")
    roster.track("bob", "c1", {}, 0.0)
    assert list(roster.members()) == ["bob"]
    diff = taken(roster)
    assert (list(diff.joins), list(diff.leaves), diff.reasons) == (["bob"], ["ann"], {"ann": "left"})


def test_what_is_not_tracked_cannot_be_updated_untracked_or_closed() -> None:
    roster = ann("c1")
    assert not roster.update("c2", {}, 0.0)
    assert not roster.untrack("c2", 0.0)
    assert not roster.close("c2", 0.0, 10)
    assert not roster.changed
    assert roster.untrack("c1", 0.0)
    assert not roster.untrack("c1", 0.0)


@pytest.mark.parametrize("meta", [None, "Ann", ["Ann"], {1: "Ann"}, {"name": "Ann", None: 1}])
def test_a_meta_that_is_no_json_object_is_a_type_error(meta: Any) -> None:
    roster = ann("c1")
    with pytest.raises(TypeError, match="a dict with str keys"):
        roster.track("bob", "c2", meta, 0.0)
    with pytest.raises(TypeError, match="a dict with str keys"):
        roster.update("c1", meta, 0.0)
    assert not roster.changed


def test_the_dictionary_of_the_host_is_not_kept() -> None:
    roster, meta = Roster(), {"name": "Ann"}
    roster.track("ann", "c1", meta, 0.0)
    meta["name"] = "Eve"
    assert say(roster.members()["ann"].metas) == [{"name": "Ann"}]
    assert "ref" not in meta


def test_who_came_and_went_between_two_diffs_is_nothing() -> None:
    roster = Roster()
    roster.track("ann", "c1", {}, 0.0)
    roster.update("c1", {"n": 1}, 0.0)
    roster.untrack("c1", 0.0)
    assert roster.take_diff() is None
    assert roster.empty


def test_a_second_connection_that_came_and_went_between_two_diffs_is_nothing() -> None:
    roster = ann("c1")
    roster.track("ann", "c2", {}, 0.0)
    roster.untrack("c2", 0.0)
    assert not roster.changed
    assert roster.take_diff() is None
    assert roster.state().version == 1


def test_a_closed_connection_is_shown_until_its_grace_is_over() -> None:
    roster = ann("c1", grace=10.0)
    assert [roster.deadline] == [10.0]
    assert not roster.expire(9.999)
    assert (roster.count(), roster.changed, roster.empty) == (1, False, False)
    assert roster.expire(10.0)
    assert (roster.count(), roster.count(connections=True)) == (0, 0)
    assert roster.deadline is None
    assert taken(roster).reasons == {"ann": "left"}
    assert not roster.expire(99.0)


def test_a_grace_of_nothing_leaves_at_once() -> None:
    assert ann("c1", grace=0.0).count() == 0


def test_an_explicit_untrack_does_not_linger() -> None:
    roster = ann("c1")
    roster.untrack("c1", 0.0)
    assert (roster.count(), roster.deadline) == (0, None)


def test_a_reload_within_the_grace_is_no_diff_and_keeps_the_ref() -> None:
    roster = ann("c1", grace=10.0)
    before = roster.members()
    roster.track("ann", "c2", {"name": "Ann"}, 9.0)
    assert roster.members() == before
    assert not roster.changed
    assert not roster.expire(1000.0)
    assert roster.members() == before


def test_a_reload_after_the_grace_is_a_leave_and_a_join_even_if_nobody_called_expire() -> None:
    roster = ann("c1", grace=10.0)
    roster.track("ann", "c2", {"name": "Ann"}, 10.0)
    diff = taken(roster)
    assert diff.leaves["ann"][0]["ref"] != diff.joins["ann"][0]["ref"]


def test_a_reload_with_other_content_is_an_update() -> None:
    roster = ann("c1", grace=10.0)
    roster.track("ann", "c2", {"name": "Ann", "page": 2}, 1.0)
    diff = taken(roster)
    assert (say(diff.leaves["ann"]), say(diff.joins["ann"])) == ([{"name": "Ann"}], [{"name": "Ann", "page": 2}])
    assert not roster.expire(1000.0)
    assert roster.count(connections=True) == 1


def test_somebody_else_does_not_take_over_what_lingers() -> None:
    roster = ann("c1", grace=10.0)
    roster.track("bob", "c2", {"name": "Ann"}, 1.0)
    assert roster.expire(10.0)
    assert list(roster.members()) == ["bob"]


def test_a_second_device_takes_over_nothing_while_the_first_is_open() -> None:
    roster = ann("c1")
    roster.track("ann", "c2", {"name": "Ann"}, 1.0)
    assert roster.count(connections=True) == 2


def test_of_several_that_linger_the_one_that_says_the_same_is_taken_over_else_the_oldest() -> None:
    roster = Roster()
    for number in (1, 2, 3):
        roster.track("ann", f"c{number}", {"n": number}, 0.0)
    for number in (2, 1, 3):
        roster.close(f"c{number}", 0.0, 10.0)
    roster.take_diff()
    roster.track("ann", "c4", {"n": 3}, 1.0)
    assert not roster.changed
    roster.track("ann", "c5", {"n": 9}, 1.0)
    assert (say(taken(roster).leaves["ann"])) == [{"n": 2}]


def test_a_meta_that_lingers_a_second_time_gets_its_whole_grace_again() -> None:
    roster = ann("c1", grace=10.0)
    roster.track("ann", "c2", {"name": "Ann"}, 5.0)
    roster.close("c2", 6.0, 10.0)
    assert not roster.expire(15.9)
    assert roster.expire(16.0)


def test_state_is_what_watchers_know_and_the_same_object_until_a_diff_is_taken() -> None:
    roster = ann("c1")
    state = roster.state()
    assert (state.version, list(seen(state))) == (1, ["ann"])
    roster.track("bob", "c2", {}, 0.0)
    roster.untrack("c1", 0.0)
    assert roster.state() is state
    assert list(roster.members()) == ["bob"]
    diff = taken(roster)
    assert (roster.state().version, diff.version) == (2, 2)
    assert list(seen(roster.state())) == ["bob"]
    assert roster.take_diff() is None
    assert roster.state() is roster.state()
    assert list(seen(state)) == ["ann"]


def test_a_state_made_while_changes_wait_does_not_show_them() -> None:
    roster = ann("c1")
    roster.track("bob", "c2", {}, 0.0)
    roster.untrack("c1", 0.0)
    assert list(seen(roster.state())) == ["ann"]


def test_a_watcher_who_starts_from_the_members_instead_of_the_state_knows_too_much() -> None:
    """The twin of the model below: the rule is needed, and the model would notice without it."""
    roster = ann("c1")
    roster.track("bob", "c2", {}, 0.0)
    wrong, right = truth(roster), seen(roster.state())
    diff = taken(roster)
    assert follow(right, diff) == truth(roster)
    assert follow(wrong, diff) != truth(roster)


def test_a_watcher_who_misses_a_diff_is_wrong() -> None:
    roster = ann("c1")
    known = seen(roster.state())
    roster.untrack("c1", 0.0)
    roster.take_diff()
    roster.track("bob", "c2", {}, 0.0)
    assert follow(known, taken(roster)) != truth(roster)


def test_pages_are_in_the_order_of_keys_and_name_where_to_go_on() -> None:
    roster = Roster()
    for number in reversed(range(7)):
        roster.track(f"u{number}", f"c{number}", {}, 0.0)
    assert roster.page() == ((), None)  # not told yet
    roster.take_diff()
    after, keys, pages = None, list[str](), 0
    while True:
        members, after = roster.page(after, limit=3)
        keys += [member.key for member in members]
        pages += 1
        if after is None:
            break
    assert (keys, pages) == ([f"u{number}" for number in range(7)], 3)
    assert roster.page("u3x", 2)[0][0].key == "u4"
    assert roster.page("u6") == roster.page("z") == ((), None)


@pytest.mark.parametrize(("size", "following"), [(5, "u4"), (6, "u4"), (4, None), (0, None)])
def test_a_last_page_that_is_just_full_has_none_after_it(size: int, following: str | None) -> None:
    state = State(1, tuple(Member(f"u{number}", ({"ref": "1"},)) for number in range(1, size + 1)))
    assert state.page(limit=4)[1] == following


def test_churn_that_nobody_watches_leaves_nothing_behind() -> None:
    roster = ann("c0")
    for number in range(1000):
        roster.track(f"u{number}", "c", {}, 0.0)
        roster.untrack("c", 0.0)
        roster.update("c0", {"n": number}, 0.0)
    assert len(roster._known) == 1
    assert len(roster._reasons) == 0


contents = st.sampled_from([{}, {"x": 1}, {"x": True}, {"x": 2, "y": [1]}])
connections = st.sampled_from(["c1", "c2", "c3", "c4"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("track"), connections, st.sampled_from(["ann", "bob", "guest:1"]), contents),
        st.tuples(st.just("update"), connections, contents),
        st.tuples(st.just("untrack"), connections),
        st.tuples(st.just("close"), connections, st.sampled_from([0, 1, 2, 5])),
        st.tuples(st.just("pass"), st.integers(0, 3)),
        st.tuples(st.just("expire")),
        st.tuples(st.just("diff")),
        st.tuples(st.just("watch")),
    ),
    max_size=60,
)


class Model:
    """The members as a few lines would keep them: content only, no refs, everything looked up by walking."""

    def __init__(self) -> None:
        self.open: dict[str, tuple[str, str]] = {}
        self.closed: list[tuple[float, str, str]] = []

    def track(self, connection: str, key: str, content: Meta, now: float) -> None:
        self.expire(now)
        tracked, text = self.open.pop(connection, None), json.dumps(content)
        waiting = [entry for entry in self.closed if entry[1] == key]
        if waiting and (tracked is None or tracked[0] != key):
            self.closed.remove(next((entry for entry in waiting if entry[2] == text), waiting[0]))
        self.open[connection] = (key, text)

    def close(self, connection: str, now: float, grace: float) -> None:
        if connection in self.open:
            self.closed.append((now + grace, *self.open.pop(connection)))
        self.expire(now)

    def expire(self, now: float) -> None:
        self.closed = [entry for entry in self.closed if entry[0] > now]

    def shown(self) -> Counter[tuple[str, str]]:
        return Counter([*self.open.values(), *(entry[1:] for entry in self.closed)])


def contents_of(known: Seen) -> Counter[tuple[str, str]]:
    return Counter((key, json.dumps(meta)) for key, metas in known.items() for meta in say(metas))


@settings(max_examples=400, deadline=None)
@given(steps=steps)
def test_any_watcher_of_any_moment_ends_with_the_true_members(steps: list[tuple[Any, ...]]) -> None:
    roster, model, now = Roster(), Model(), 0.0
    watchers: list[tuple[int, Seen]] = [(0, {})]

    def take() -> None:
        nonlocal watchers
        changed = roster.changed
        diff = roster.take_diff()
        assert (diff is not None) is changed
        if diff is None:
            return
        assert diff.joins or diff.leaves
        assert diff.reasons.keys() == diff.leaves.keys() - roster.members().keys()
        assert all(version + 1 == diff.version for version, _ in watchers)
        watchers = [(diff.version, follow(known, diff)) for _, known in watchers]

    for verb, *arguments in steps:
        match verb, arguments:
            case "track", [connection, key, content]:
                roster.track(key, connection, content, now)
                model.track(connection, key, content, now)
            case "update", [connection, content]:
                assert roster.update(connection, content, now) is (connection in model.open)
                if connection in model.open:
                    model.track(connection, model.open[connection][0], content, now)
            case "untrack", [connection]:
                assert roster.untrack(connection, now) is (connection in model.open)
                model.open.pop(connection, None)
            case "close", [connection, grace]:
                roster.close(connection, now, grace)
                model.close(connection, now, grace)
            case "pass", [seconds]:
                now += seconds
            case "diff", []:
                take()
            case "watch", []:
                watchers.append((roster.state().version, seen(roster.state())))
        due = roster.deadline
        before = roster.count(connections=True)
        left = roster.expire(now)
        model.expire(now)
        assert left is (roster.count(connections=True) < before)
        assert due is None or due > now or roster.deadline != due
        assert contents_of(truth(roster)) == model.shown()
        assert roster.count(connections=True) == model.shown().total()
        assert roster.count() == len({key for key, _ in model.shown()})
        assert seen(roster.state()) == watchers[0][1]
        assert list(seen(roster.state())) == sorted(seen(roster.state()))
        assert roster.empty is (not model.shown() and not roster.changed)

    take()
    assert all(json.dumps(known, sort_keys=True) == json.dumps(truth(roster), sort_keys=True) for _, known in watchers)
    for connection in list(model.open):
        roster.close(connection, now, 1)
    roster.expire(now + 100)
    take()
    assert roster.empty
    assert all(known == {} for _, known in watchers)
    assert not any([roster._tracked, roster._lingering, roster._deadlines, roster._known, roster._reasons])
