"""Twenty thousand mutated messages in each spelling, a million when it is asked for: only answered errors come of them.

The law of this file: which messages, stands in tests/fuzz_v1.py; ``FUZZ_SEED`` in the environment chooses others.
"""

from __future__ import annotations

import os

import pytest

from starlette_rt.exceptions import EventError
from starlette_rt.protocols.v1 import V1, V1S
from tests import fuzz_v1

SEED = os.environ.get("FUZZ_SEED", str(fuzz_v1.SEED))
QUICK, LONG = 20_000, 500_000
both = pytest.mark.parametrize("protocol", V1S.values(), ids=V1S)

pytestmark = pytest.mark.no_cover  # chance proves no branch, and to trace it takes longer than to run it


@pytest.mark.unit
@both
def test_no_message_is_more_than_an_answered_error(protocol: V1) -> None:
    print(f"FUZZ_SEED={SEED}")
    outcomes = fuzz_v1.fuzz(protocol, QUICK, SEED)
    assert outcomes["messages"] > QUICK / 20, "enough of them get past the first look"
    assert outcomes["data"] > outcomes["typed"] > 0
    assert {"Emit", "Join", "Track", "Reply", "Error", *fuzz_v1.CODES} <= outcomes.keys()


@pytest.mark.soak
@pytest.mark.timeout(900)
@both
def test_no_message_of_half_a_million_is_either(protocol: V1) -> None:
    print(f"FUZZ_SEED={SEED}", fuzz_v1.fuzz(protocol, LONG, SEED))


@pytest.mark.unit
@both
@pytest.mark.parametrize("method", ["decode", "data", "decode_server"])
def test_another_error_is_found_and_its_message_shown(
    protocol: V1, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError

    monkeypatch.setattr(protocol, method, fail)
    with pytest.raises(AssertionError, match=rf"{protocol.name}: b['\"].*\(KeyError\)"):
        fuzz_v1.fuzz(protocol, 1000, SEED)


@pytest.mark.unit
@both
def test_a_code_that_is_not_of_the_protocol_is_found(protocol: V1, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise EventError("full", "no seat is left")

    monkeypatch.setattr(protocol, "data", refuse)
    with pytest.raises(AssertionError):
        fuzz_v1.fuzz(protocol, 1000, SEED)
