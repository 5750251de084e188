"""The facts that are counted: the interface does nothing, the default counts, neither decides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from starlette_rt.exceptions import CloseCode
from starlette_rt.metrics import Counters, Metrics

pytestmark = pytest.mark.unit

FACTS: list[tuple[str, tuple[Any, ...], dict[str, int]]] = [
    ("connected", (), {"connected": 2}),
    ("disconnected", (CloseCode.GOING_AWAY,), {"disconnected": 2, "disconnected.1001": 2}),
    ("refused", (401, "unauthorized"), {"refused": 2, "refused.401.unauthorized": 2}),
    ("received", (21,), {"received": 2, "received_bytes": 42}),
    ("rejected", ("invalid",), {"rejected.invalid": 2}),
    ("published", (), {"published": 2}),
    ("delivered", (500,), {"delivered": 1000}),
    ("dropped", (3,), {"dropped": 6}),
    ("evicted", (CloseCode.SLOW_CONSUMER,), {"evicted.4000": 2}),
    ("aborted", (), {"aborted": 2}),
    ("failed", (), {"failed": 2}),
]
each_fact = pytest.mark.parametrize(("name", "arguments", "counted"), FACTS, ids=[fact[0] for fact in FACTS])


def methods(kind: type) -> dict[str, Callable[..., None]]:
    return {name: each for name, each in vars(kind).items() if inspect.isfunction(each) and name != "__init__"}


def test_the_table_of_this_test_has_every_fact_and_the_counters_count_every_one() -> None:
    assert [name for name, *_ in FACTS] == list(methods(Metrics)) == list(methods(Counters))


@each_fact
def test_a_fact_that_happens_twice_is_counted_twice(
    name: str, arguments: tuple[Any, ...], counted: dict[str, int]
) -> None:
    counters = Counters()
    getattr(counters, name)(*arguments)
    getattr(counters, name)(*arguments)
    assert counters.totals == counted


@each_fact
def test_the_interface_takes_every_fact_and_does_nothing(
    name: str, arguments: tuple[Any, ...], counted: dict[str, int]
) -> None:
    metrics = Metrics()
    assert getattr(metrics, name)(*arguments) is None
    assert vars(metrics) == {}


@each_fact
def test_the_counters_take_what_the_interface_promises(
    name: str, arguments: tuple[Any, ...], counted: dict[str, int]
) -> None:
    assert inspect.signature(methods(Metrics)[name]) == inspect.signature(methods(Counters)[name])


def test_two_counters_share_nothing() -> None:
    one, other = Counters(), Counters()
    one.connected()
    assert other.totals == {}


def test_a_subclass_names_only_the_facts_that_it_wants() -> None:
    class Failures(Metrics):
        count = 0

        def failed(self) -> None:
            self.count += 1

    failures = Failures()
    failures.connected()
    failures.failed()
    assert failures.count == 1
