"""The programmes of tests/chaos, run small: nothing is found, and without each of their guards something is."""

from __future__ import annotations

import re

import pytest

from tests.chaos import recovery

STEPS = 2_500
SEEDS = (1, 2, 3, 4)
SOAK = 100_000
TWIN_STEPS = 2_400
TWIN_SEEDS = (7, 9, *range(1, 31))  # a twin must have been found by then; today the first two find all

pytestmark = pytest.mark.no_cover  # chance proves no branch, and to trace it takes longer than to run it


@pytest.mark.unit
@pytest.mark.parametrize("seed", SEEDS)
def test_no_message_is_lost_in_silence_said_twice_or_out_of_order(seed: int) -> None:
    world = recovery.run(seed, STEPS)
    stats = world.stats
    assert sum(world.kinds.values()) == STEPS
    assert min(stats[what] for what in ("recovered: true", "recovered: false", "resets", "joins anew", "audits")) > 0
    assert stats["deliveries"] > STEPS / 2


@pytest.mark.unit
def test_the_same_seed_leads_to_the_same_end() -> None:
    first, second = recovery.run(5, 600), recovery.run(5, 600)
    assert (first.trace, first.stats) == (second.trace, second.stats)


@pytest.mark.unit
@pytest.mark.parametrize("twin", recovery.TWINS)
def test_without_one_of_its_guards_a_promise_is_broken_and_the_steps_are_printed(twin: str) -> None:
    found = next(filter(None, (found_by(seed, twin) for seed in TWIN_SEEDS)), "")
    assert re.match(r"seed \d+: after [\d.]+ s: ", found)
    assert "\nThe last steps:\n" in found


def found_by(seed: int, twin: str) -> str | None:
    try:
        recovery.run(seed, TWIN_STEPS, twin)
    except recovery.Violation as violation:
        return str(violation)
    return None


@pytest.mark.unit
def test_an_error_that_the_package_logs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(stream: object, reading: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("starlette_rt.streams.Stream._adopt", fails)
    with pytest.raises(recovery.Violation, match="a task of starlette_rt failed"):
        recovery.run(1, 300)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [101, 102, 103])
def test_a_hundred_thousand_steps_break_no_promise(seed: int) -> None:
    assert sum(recovery.run(seed, SOAK).kinds.values()) == SOAK
