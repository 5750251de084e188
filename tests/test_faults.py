"""The log of the host's own failures: each place once a minute, nothing swallowed, nothing flooded."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_rt.faults import MAX_PLACES, PERIOD, FaultLog, culprit, place_of
from starlette_rt.frames import plain_data

pytestmark = pytest.mark.unit

SECRET = "a-token-that-nobody-may-read"


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it did not raise")


NOTHING: dict[int, int] = {}


def here() -> Exception:
    return raised(lambda: NOTHING[0])


def there() -> Exception:
    return raised(lambda: NOTHING[0])


def deeper() -> Exception:
    def outer() -> None:
        int("not a number")

    return raised(outer)


def test_a_failure_is_logged_with_its_handler_its_type_and_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    error = here()
    assert FaultLog().report(error, now=0.0) is True
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("starlette_rt.handler", "ERROR")
    assert record.getMessage() == f"{__name__}.raised raised KeyError"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_the_handler_is_named_and_not_what_of_ours_called_it(caplog: pytest.LogCaptureFixture) -> None:
    FaultLog().report(raised(lambda: FaultLog().report(None, "no time")), now=0.0)  # type: ignore[arg-type]
    assert caplog.records[0].getMessage().startswith(f"{__name__}.raised raised")
    assert culprit(KeyError("never raised")) == "a handler"


def test_the_frames_of_ours_that_called_the_handler_are_passed_over() -> None:
    class Broken:
        def model_dump(self, mode: str) -> object:
            raise LookupError

    error = raised(lambda: plain_data(Broken()))
    assert culprit(error) == f"{__name__}.raised"
    trace = error.__traceback__
    assert trace is not None
    assert trace.tb_next is not None
    error = error.with_traceback(trace.tb_next.tb_next)  # without those of this test: `plain_data` is the first
    assert culprit(error).startswith(f"{__name__}.")
    assert culprit(error).endswith(".Broken.model_dump")


def test_we_put_no_argument_of_the_handler_into_the_record(caplog: pytest.LogCaptureFixture) -> None:
    def on_receive(data: str) -> object:
        return NOTHING[len(data)]

    FaultLog().report(raised(lambda: on_receive(SECRET)), now=0.0)
    assert "in on_receive" in caplog.text, "the traceback names the place"
    assert SECRET not in caplog.text


def test_the_same_place_is_logged_once_a_minute_and_says_how_many_were_held_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = FaultLog()
    told = [log.report(here(), now) for now in (100.0, 100.0, 159.9, 160.0, 160.1, 3000.0, 4000.0)]
    assert told == [True, False, False, True, False, True, True]
    assert [record.getMessage() for record in caplog.records] == [
        f"{__name__}.raised raised KeyError",
        f"{__name__}.raised raised KeyError (2 more since its last record)",
        f"{__name__}.raised raised KeyError (1 more since its last record)",
        f"{__name__}.raised raised KeyError",
    ]


@given(steps=st.lists(st.tuples(st.floats(0, 100), st.sampled_from([here, there, deeper])), max_size=40))
def test_no_place_is_logged_twice_within_a_minute_and_no_failure_goes_uncounted(
    steps: list[tuple[float, Callable[[], Exception]]],
) -> None:
    log, now, logged = FaultLog(), 0.0, dict[object, float]()
    with listening() as records:
        for after, fail in steps:
            now, error = now + after, fail()
            due = now - logged.get(place_of(error), -PERIOD) >= PERIOD
            assert log.report(error, now) is due
            if due:
                logged[place_of(error)] = now
    told = sum(int(number) for record in records for number in re.findall(r"\((\d+) more", record.getMessage()))
    waiting = sum(held for _, held in log._places.values())
    assert len(records) + told + waiting == len(steps)


@contextmanager
def listening() -> Iterator[list[logging.LogRecord]]:
    """The records of the logger under test, for a test that runs many times."""
    logger, handler, records = logging.getLogger("starlette_rt.handler"), logging.Handler(), list[logging.LogRecord]()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def test_two_places_are_two_bugs_and_so_are_two_types_at_one_place() -> None:
    log = FaultLog()
    assert log.report(here(), 0.0)
    assert log.report(there(), 0.0)
    assert log.report(deeper(), 0.0)
    assert not log.report(here(), 0.0)
    errors = [raised(lambda kind=kind: raiser(kind)) for kind in (KeyError, ValueError)]  # type: ignore[misc]
    assert [log.report(error, 0.0) for error in errors] == [True, True]


def raiser(kind: type[Exception]) -> None:
    raise kind


def test_a_place_is_the_innermost_line_of_the_traceback() -> None:
    error = deeper()
    trace = error.__traceback__
    assert trace is not None
    lines = []
    while trace is not None:
        lines.append(trace.tb_lineno)
        trace = trace.tb_next
    assert place_of(error) == (ValueError, __file__, lines[-1])
    assert lines[-1] not in lines[:-1]


def test_an_error_that_was_never_raised_has_its_type_for_a_place() -> None:
    assert place_of(KeyError("x")) == (KeyError,)
    log = FaultLog()
    assert log.report(KeyError("x"), 0.0)
    assert not log.report(KeyError("y"), 0.0)


def kinds(number: int) -> list[Exception]:
    return [type(f"Bug{each}", (Exception,), {})() for each in range(number)]


def test_as_many_places_as_are_remembered_are_each_held_back() -> None:
    log, bugs = FaultLog(), kinds(MAX_PLACES)
    assert all(log.report(bug, 0.0) for bug in bugs)
    assert not any(log.report(bug, 1.0) for bug in bugs)


def test_places_too_many_forget_only_those_that_were_logged_longest_ago() -> None:
    log, bugs = FaultLog(), kinds(MAX_PLACES + 2)
    for number, bug in enumerate(bugs[:-2]):
        log.report(bug, 0.0 if number < 2 else 30.0)
    assert log.report(bugs[1], PERIOD), "its minute is over, and it becomes the youngest"
    assert log.report(bugs[-2], PERIOD), "in the place of the first"
    assert log.report(bugs[-1], PERIOD), "in the place of the third"
    assert len(log._places) == MAX_PLACES
    assert not any(log.report(bug, PERIOD + 1) for bug in [bugs[1], *bugs[3:]])
    assert log.report(bugs[0], PERIOD + 1)


def test_the_error_itself_is_not_kept_alive() -> None:
    log = FaultLog()
    log.report(here(), 0.0)
    assert not any(isinstance(part, BaseException) for place in log._places for part in place)


def test_two_handlers_whose_results_cannot_be_said_are_two_places() -> None:
    """No line of theirs stands in the traceback, so it is the note that tells them apart."""
    first, second = (raised(lambda: plain_data(object())) for _ in range(2))
    first.add_note("returned by app.one")
    second.add_note("returned by app.two")
    assert place_of(first) != place_of(second)


def test_a_line_of_ours_that_many_handlers_reach_does_not_make_them_one_place() -> None:
    def one() -> None:
        plain_data(object())

    def two() -> None:
        plain_data(object())

    assert place_of(raised(one)) != place_of(raised(two))
    assert place_of(raised(one)) == place_of(raised(one))
