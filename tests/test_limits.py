"""Rates, buckets and connection caps, with the clock as an argument: nothing here waits."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_rt.exceptions import ConfigurationError
from starlette_rt.limits import (
    RETRY_AFTER,
    Bound,
    Buckets,
    ConnectionCounter,
    ConnectionLimits,
    Due,
    Meter,
    Per,
    RateLimit,
    Refused,
    Tats,
    gcra,
    quote,
)

pytestmark = pytest.mark.unit

TWENTY = RateLimit("20/second")
clocks = st.floats(0, 1e7)  # what a monotonic clock shows in its first hundred days


def test_a_rested_bucket_lets_the_whole_burst_pass_and_then_one_per_interval() -> None:
    buckets = Buckets()
    assert [buckets.hit("k", TWENTY, 5.0) for _ in range(20)] == [0.0] * 20
    assert buckets.hit("k", TWENTY, 5.0) == pytest.approx(0.05)
    assert buckets.hit("k", TWENTY, 5.05) == 0.0
    assert buckets.hit("k", TWENTY, 5.05) == pytest.approx(0.05)


@given(now=clocks, amount=st.integers(1, 1000), seconds=st.sampled_from(["second", "minute", "hour", "7 seconds"]))
def test_the_burst_is_exact_at_any_time_of_the_clock(now: float, amount: int, seconds: str) -> None:
    buckets, limit = Buckets(), RateLimit(f"{amount} per {seconds}")
    assert [buckets.hit("k", limit, now) for _ in range(amount)] == [0.0] * amount
    assert buckets.hit("k", limit, now) > 0.0


@given(
    now=clocks, rate=st.sampled_from(["3/second", "20/second;90/minute", "10000000/second", "7/day"]), data=st.data()
)
def test_who_waits_as_long_as_told_passes_and_a_little_less_does_not(now: float, rate: str, data: Any) -> None:
    buckets, limit = Buckets(), RateLimit(rate)
    burst = min(round(tolerance / interval) + 1 for interval, tolerance in limit.rates)
    for _ in range(data.draw(st.integers(1, 5))):
        amount = data.draw(st.integers(1, burst))
        if wait := buckets.hit("k", limit, now, amount):
            assert wait <= 0.01 or buckets.hit("k", limit, now + wait - 0.01, amount) > 0.0
            assert buckets.hit("k", limit, now + wait, amount) == 0.0
            now += wait


@given(steps=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 6)), max_size=60))
def test_no_window_of_a_second_ever_holds_more_than_a_burst_and_a_rate(steps: list[tuple[int, int]]) -> None:
    buckets, limit, now = Buckets(), RateLimit("10/second"), 0.0
    passed: list[tuple[float, int]] = []
    for milliseconds, amount in steps:
        now += milliseconds / 1000
        if not buckets.hit("k", limit, now, amount):
            passed.append((now, amount))
    for start, _ in passed:
        assert sum(amount for at, amount in passed if start <= at <= start + 1) <= 20


def test_gcra_of_a_cost_above_the_whole_burst_is_never() -> None:
    assert gcra(-math.inf, 0.0, 0.05, 0.95, 20)[0] is True
    assert gcra(-math.inf, 0.0, 0.05, 0.95, 21) == (False, -math.inf, math.inf)
    assert Buckets().hit("k", TWENTY, 0.0, 21) == math.inf


def test_a_refusal_takes_nothing() -> None:
    buckets = Buckets()
    buckets.hit("k", TWENTY, 0.0, 15)
    kept = buckets.get("k")
    assert buckets.hit("k", TWENTY, 0.0, 6) == pytest.approx(0.05)
    assert buckets.get("k") == kept
    assert buckets.hit("k", TWENTY, 0.0, 5) == 0.0


def test_nothing_is_taken_from_any_rate_when_one_refuses() -> None:
    buckets, limit = Buckets(), RateLimit("2/second;3/minute")
    assert [buckets.hit("k", limit, now) for now in (0.0, 0.0)] == [0.0, 0.0]
    for _ in range(50):
        assert buckets.hit("k", limit, 0.0) == pytest.approx(0.5)  # had these counted, the minute were used up
    assert buckets.hit("k", limit, 1.0) == 0.0
    assert buckets.hit("k", limit, 2.0) == pytest.approx(18.0)  # now the minute refuses


def test_quote_takes_nothing_until_its_answer_is_kept() -> None:
    wait, tats = quote(None, TWENTY, 1.0, 20)
    assert wait == 0.0
    assert quote(None, TWENTY, 1.0, 20)[0] == 0.0
    assert quote(tats, TWENTY, 1.0, 20)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("rate", ["", "20", "fast", "20/fortnight", "-1/second", "0/second", "20/second;", 20, None])
def test_what_is_no_rate_is_refused_with_an_example(rate: Any) -> None:
    with pytest.raises(ConfigurationError, match=r'"20/second" or "5/second;100/minute"'):
        RateLimit(rate)


@pytest.mark.parametrize("rate", ["20/second", "5/second;100/minute", "100 per 2 hours", "3/day, 1/minute"])
def test_what_is_a_rate_is_taken(rate: str) -> None:
    assert RateLimit(rate).rate == rate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "room"}, r"per='room' is not known; write one of 'connection', 'user', 'ip'"),
        ({"unit": "bits"}, r"unit='bits' is not known; write one of 'messages', 'bytes'"),
        ({"cost": 0}, r"cost=0 must be a whole number of at least 1"),
        ({"cost": 0.5}, r"cost=0.5 must be a whole number"),
        ({"cost": 21}, r"cost=21 is more than '20/second' ever lets pass"),
    ],
)
def test_a_limit_that_cannot_work_says_what_to_write(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RateLimit("20/second", **arguments)


def test_a_cost_of_the_whole_burst_is_allowed() -> None:
    assert Buckets().hit("k", RateLimit("20/second", cost=20), 0.0, 20) == 0.0


def test_limits_are_values() -> None:
    assert RateLimit("20/second") == TWENTY != RateLimit("20/second", per="ip")
    assert repr(TWENTY) == "RateLimit(rate='20/second', per='connection', cost=1, unit='messages')"
    assert hash(TWENTY) == hash(RateLimit("20/second"))
    with pytest.raises(AttributeError):
        TWENTY.cost = 2  # type: ignore[misc]


def test_a_message_costs_its_cost_and_bytes_cost_by_size() -> None:
    assert RateLimit("20/second", cost=3).amount(1000) == 3
    assert RateLimit("5000/second", unit="bytes").amount(1000) == 1000
    assert RateLimit("5000/second", unit="bytes", cost=2).amount(1000) == 2000
    assert RateLimit("5000/second", unit="bytes").amount(0) == 1


def test_keys_do_not_share_a_bucket() -> None:
    buckets = Buckets()
    assert buckets.hit("a", TWENTY, 0.0, 20) == 0.0
    assert buckets.hit("b", TWENTY, 0.0, 20) == 0.0
    assert buckets.hit("a", TWENTY, 0.0) > 0.0


def test_refilled_keys_are_forgotten_by_those_who_add_new_ones() -> None:
    buckets = Buckets()
    for number in range(1000):
        buckets.hit(f"old-{number}", TWENTY, 0.0)
    for number in range(1001):  # two are looked at for each that is added
        buckets.hit(f"new-{number}", TWENTY, 10.0 + number)
    assert len(buckets) <= 2


def test_keys_that_have_not_refilled_are_kept() -> None:
    buckets, limit = Buckets(), RateLimit("2/hour")
    for number in range(100):
        buckets.hit(f"old-{number}", limit, 0.0, 2)
    for number in range(500):
        buckets.hit(f"new-{number}", TWENTY, 10.0 + number)
    assert all(buckets.hit(f"old-{number}", limit, 520.0, 2) > 0.0 for number in range(100))


def test_a_key_is_kept_until_every_rate_of_it_has_refilled() -> None:
    buckets = Buckets()
    buckets.hit("k", RateLimit("2/second;2/hour"), 0.0)
    assert buckets.sweep(1799.0) == 0
    assert buckets.sweep(1800.0) == 1


def test_a_known_key_and_a_refusal_leave_the_store_as_it_is() -> None:
    buckets = Buckets()
    for number in range(10):
        buckets.hit(f"{number}", TWENTY, 0.0, 20)
    assert buckets.hit("3", TWENTY, 0.5) == 0.0
    assert buckets.hit("fresh", TWENTY, 0.5, 21) == math.inf
    assert len(buckets) == 10


def test_sweep_looks_at_so_many_and_says_how_many_it_dropped() -> None:
    buckets = Buckets()
    for number in range(10):
        buckets.hit(f"{number}", TWENTY, 0.0)
    assert buckets.sweep(0.0, 100) == 0
    assert buckets.sweep(1.0, 4) == 4
    assert len(buckets) == 6
    assert buckets.sweep(1.0, 100) == 6
    assert buckets.sweep(1.0, 100) == len(buckets) == 0


def test_at_the_cap_the_one_that_is_soonest_full_again_makes_room() -> None:
    buckets, limit = Buckets(max_keys=3), RateLimit("10/hour")
    for key, amount in (("a", 10), ("b", 2), ("c", 10)):
        buckets.hit(key, limit, 0.0, amount)
    buckets.hit("d", limit, 0.0, 10)
    assert (len(buckets), buckets.evicted) == (3, 1)
    assert buckets.get("b") is None
    assert all(buckets.get(key) for key in "acd")


def test_below_the_cap_nobody_is_evicted() -> None:
    buckets = Buckets(max_keys=3)
    for key in "abcabc":
        buckets.hit(key, TWENTY, 0.0)
    assert (len(buckets), buckets.evicted) == (3, 0)


def test_a_flood_of_keys_never_passes_the_cap() -> None:
    buckets, limit = Buckets(max_keys=50), RateLimit("10/hour")
    assert all(buckets.hit(f"{number}", limit, 0.0) == 0.0 for number in range(1000))
    assert (len(buckets), buckets.evicted) == (50, 950)


def test_a_store_without_room_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_keys=0"):
        Buckets(max_keys=0)


@given(
    hits=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 900), st.integers(1, 20)), max_size=80),
    sweeps=st.integers(0, 3),
)
def test_forgetting_never_changes_an_answer(hits: list[tuple[str, int, int]], sweeps: int) -> None:
    swept, kept, now = Buckets(), dict[str, Tats](), 0.0
    for key, milliseconds, amount in hits:
        now += milliseconds / 1000
        swept.sweep(now, sweeps)
        wait, tats = quote(kept.get(key), TWENTY, now, amount)
        if not wait:
            kept[key] = tats
        assert swept.hit(key, TWENTY, now, amount) == wait


def test_a_limit_of_the_connection_lives_in_its_own_dictionary() -> None:
    meter, shared = Meter("Chat", [RateLimit("2/second")]), Buckets()
    mine: dict[str, Tats] = {}
    yours: dict[str, Tats] = {}
    assert [meter.check(mine, shared, "ann", "::1", 9, 0.0) for _ in range(2)] == [0.0, 0.0]
    assert meter.check(mine, shared, "ann", "::1", 9, 0.0) == pytest.approx(0.5)
    assert meter.check(yours, shared, "ann", "::1", 9, 0.0) == 0.0
    assert (len(mine), len(yours), len(shared)) == (1, 1, 0)


@pytest.mark.parametrize(
    ("per", "same", "other"), [("user", ("ann", "2"), ("bob", "1")), ("ip", ("bob", "1"), ("ann", "2"))]
)
def test_shared_budgets_follow_their_subject(per: Any, same: tuple[str, str], other: tuple[str, str]) -> None:
    meter, shared = Meter("Chat", [RateLimit("2/second", per=per)]), Buckets()
    own: dict[str, Tats] = {}
    assert [meter.check(own, shared, "ann", "1", 9, 0.0) for _ in range(2)] == [0.0, 0.0]
    assert meter.check({}, shared, *same, 9, 0.0) > 0.0
    assert meter.check({}, shared, *other, 9, 0.0) == 0.0
    assert own == {}


def test_a_guest_has_no_limit_per_user_and_a_peer_without_address_none_per_ip() -> None:
    meter, shared = Meter("Chat", [RateLimit("1/hour", per="user"), RateLimit("1/hour", per="ip")]), Buckets()
    assert [meter.check({}, shared, None, None, 9, 0.0) for _ in range(5)] == [0.0] * 5
    assert len(shared) == 0
    for user in ("ann", ""):
        assert meter.check({}, shared, user, None, 9, 0.0) == 0.0
        assert meter.check({}, shared, user, None, 9, 0.0) > 0.0


def test_equal_limits_of_two_places_are_two_budgets_and_of_one_place_too() -> None:
    limit, shared = RateLimit("1/hour", per="user"), Buckets()
    twice = Meter("Chat", [limit, limit])
    assert twice.check({}, shared, "ann", None, 9, 0.0) == 0.0
    assert len(shared) == 2
    assert Meter("Board", [limit]).check({}, shared, "ann", None, 9, 0.0) == 0.0
    assert Meter("Board", [limit]).check({}, shared, "ann", None, 9, 0.0) > 0.0


def test_one_limit_that_refuses_leaves_all_the_others_untouched() -> None:
    meter = Meter("Chat", [RateLimit("5/hour"), RateLimit("1/hour", per="user"), RateLimit("5/hour", per="ip")])
    own: dict[str, Tats] = {}
    shared = Buckets()
    assert meter.check(own, shared, "ann", "1", 9, 0.0) == 0.0
    before = dict(own), len(shared)
    for _ in range(9):
        assert meter.check(own, shared, "ann", "1", 9, 0.0) == pytest.approx(3600)  # the longest wait of all
    assert (own, len(shared)) == before
    assert meter.check(own, shared, None, "1", 9, 0.0) == 0.0


def test_bytes_are_metered_by_size_and_a_message_that_never_fits_says_so() -> None:
    meter, own = Meter("Chat", [RateLimit("1000/second", unit="bytes")]), dict[str, Tats]()
    assert meter.check(own, Buckets(), None, None, 600, 0.0) == 0.0
    assert meter.check(own, Buckets(), None, None, 600, 0.0) == pytest.approx(0.2)
    assert meter.check(own, Buckets(), None, None, 1001, 0.0) == math.inf


def test_without_limits_everything_passes() -> None:
    assert Meter("Chat", []).check({}, Buckets(), "ann", "1", 10**9, 0.0) == 0.0


@pytest.mark.parametrize("name", ["total", "per_ip", "per_user"])
@pytest.mark.parametrize("bound", [0, -1, 1.5, "9"])
def test_a_cap_below_one_or_not_whole_is_refused(name: str, bound: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=.* must be a whole number of at least 1"):
        ConnectionLimits(**{name: bound})


def test_a_connection_rate_in_no_grammar_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'often' is no rate"):
        ConnectionLimits(rate="often")
    assert ConnectionLimits(1, 2, 3, "10/second").rate == "10/second"


@pytest.mark.parametrize(
    ("limits", "bound", "others"),
    [
        (ConnectionLimits(total=2), "total", []),
        (ConnectionLimits(per_ip=2), "per_ip", [("2", "ann"), (None, "ann")]),
        (ConnectionLimits(per_user=2), "per_user", [("1", "bob"), ("1", None)]),
    ],
)
def test_a_full_cap_refuses_names_itself_and_opens_again(
    limits: ConnectionLimits, bound: Bound, others: list[tuple[str | None, str | None]]
) -> None:
    counter = ConnectionCounter(limits)
    assert counter.take("1", "ann", 0.0) is None
    assert counter.take("1", "ann", 0.0) is None
    assert counter.take("1", "ann", 0.0) == Refused(bound, RETRY_AFTER)
    assert counter.connections == 2
    assert [counter.take(ip, user, 0.0) for ip, user in others] == [None] * len(others)
    counter.release("1", "ann")
    assert counter.take("1", "ann", 0.0) is None


def test_without_bounds_all_come_in_and_are_counted() -> None:
    counter = ConnectionCounter(ConnectionLimits())
    assert [counter.take("1", "ann", 0.0) for _ in range(50)] == [None] * 50
    assert counter.connections == 50


def test_the_connection_rate_is_per_address_and_tells_when() -> None:
    counter = ConnectionCounter(ConnectionLimits(rate="2/second"))
    assert [counter.take("1", None, 0.0) for _ in range(2)] == [None, None]
    assert counter.take("1", None, 0.0) == Refused("rate", 0.5)
    assert counter.take("2", None, 0.0) is None
    assert [counter.take(None, None, 0.0) for _ in range(5)] == [None] * 5
    assert counter.take("1", None, 0.5) is None
    assert counter.connections == 9


def test_a_cap_that_refuses_takes_nothing_from_the_rate() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=1, rate="2/hour"))
    counter.take("1", None, 0.0)
    for _ in range(9):
        assert counter.take("1", None, 0.0) == Refused("total", RETRY_AFTER)
    counter.release("1", None)
    assert counter.take("1", None, 0.0) is None


def test_to_release_what_was_never_taken_is_an_error() -> None:
    counter = ConnectionCounter(ConnectionLimits())
    with pytest.raises(KeyError):
        counter.release("1", "ann")


@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.sampled_from(["1", "2", None]), st.sampled_from(["ann", "bob", None])), max_size=60
    )
)
def test_the_counter_agrees_with_a_plain_count_and_keeps_nothing_of_those_that_left(
    steps: list[tuple[bool, str | None, str | None]],
) -> None:
    counter = ConnectionCounter(ConnectionLimits(total=6, per_ip=4, per_user=3))
    inside: Counter[tuple[str | None, str | None]] = Counter()
    for arrives, ip, user in steps:
        if not arrives:
            if inside[ip, user]:
                inside[ip, user] -= 1
                counter.release(ip, user)
            continue
        same_ip = sum(count for (other, _), count in inside.items() if other == ip)
        same_user = sum(count for (_, other), count in inside.items() if other == user)
        full = inside.total() >= 6 or (ip is not None and same_ip >= 4) or (user is not None and same_user >= 3)
        assert (counter.take(ip, user, 0.0) is not None) is full
        inside[ip, user] += not full
    assert counter.connections == inside.total()
    for ip, user in inside.elements():
        counter.release(ip, user)
    assert counter._counts == {}


# Budgets that other nodes share


def test_what_a_message_owes_to_shared_budgets() -> None:
    per_user, per_ip = RateLimit("5/hour", per="user", cost=2), RateLimit("999/hour", per="ip", unit="bytes")
    meter = Meter("Chat", [RateLimit("9/hour"), per_user, per_ip])
    assert meter.dues("ada", "192.0.2.1", 7) == [
        Due("Chat:1:user:", "ada", per_user, 2),
        Due("Chat:2:ip:", "192.0.2.1", per_ip, 7),
    ]
    assert [due.key for due in meter.dues("ada", "192.0.2.1", 7)] == ["Chat:1:user:ada", "Chat:2:ip:192.0.2.1"]
    assert meter.dues(None, "192.0.2.1", 0) == [Due("Chat:2:ip:", "192.0.2.1", per_ip, 1)]
    assert meter.dues(None, None, 7) == []


def test_what_a_message_owes_is_what_its_check_has_taken() -> None:
    meter, shared, own = Meter("Chat", [TWENTY, RateLimit("5/hour", per="user")]), Buckets(), dict[str, Tats]()
    assert meter.check(own, shared, "ada", "192.0.2.1", 7, 0.0) == 0.0
    [due] = meter.dues("ada", "192.0.2.1", 7)
    assert shared.get(due.key) == (720.0,)


@pytest.mark.parametrize(("per", "shared"), [("connection", False), ("user", True), ("ip", True)])
def test_a_place_knows_whether_anything_of_it_is_shared(per: Per, shared: bool) -> None:
    assert Meter("Chat", [TWENTY, RateLimit("5/hour", per=per)]).shared is shared


def test_a_counter_tells_the_cap_of_a_person() -> None:
    assert ConnectionCounter(ConnectionLimits(per_user=3)).per_user == 3
    assert ConnectionCounter(ConnectionLimits(total=3)).per_user is None
