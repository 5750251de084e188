"""The errors and the table of close codes: what a reader can still do is said by each of them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest

from starlette_rt import exceptions
from starlette_rt.exceptions import (
    CloseCode,
    ConfigurationError,
    EventError,
    NotRunning,
    RealtimeError,
    TokenError,
    Unavailable,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("code", CloseCode)
def test_a_client_tells_from_the_number_of_our_own_codes_alone_whether_to_come_back(code: CloseCode) -> None:
    assert code < 4000 or code.reconnect is (code <= 4499)


@pytest.mark.parametrize("code", CloseCode)
def test_every_close_code_may_be_sent_and_its_row_is_complete(code: CloseCode) -> None:
    assert code in (1000, 1001, 1003) or 1007 <= code <= 1014 or 4000 <= code <= 4999
    assert len(code.reason.encode()) <= 123, "a Close frame holds no more"
    assert code.reason or code is CloseCode.NORMAL
    assert code.when


def test_no_two_rows_share_a_number_or_a_reason() -> None:
    rows = CloseCode.__members__.values()
    assert len({int(code) for code in rows}) == len({code.reason for code in rows}) == len(CloseCode.__members__)


def test_a_close_code_is_the_int_that_goes_onto_the_wire() -> None:
    assert CloseCode(4000) is CloseCode.SLOW_CONSUMER
    assert f"{CloseCode.SLOW_CONSUMER}" == str(CloseCode.SLOW_CONSUMER) == "4000"
    assert pickle.loads(pickle.dumps(CloseCode.SLOW_CONSUMER)) is CloseCode.SLOW_CONSUMER


def test_a_number_that_is_not_in_the_table_is_no_close_code() -> None:
    with pytest.raises(ValueError, match="4999"):
        CloseCode(4999)


def test_every_error_of_the_package_has_one_root_and_stands_in_the_tree_of_the_docstring() -> None:
    errors = {name: each for name, each in vars(exceptions).items() if isinstance(each, type) and name != "CloseCode"}
    found = {name for name, each in errors.items() if each.__module__ == exceptions.__name__}
    assert all(issubclass(errors[name], RealtimeError) for name in found)
    assert exceptions.__doc__ is not None
    assert all(name in exceptions.__doc__ for name in found)


@pytest.mark.parametrize(
    ("error", "builtin"), [(ConfigurationError, ValueError), (NotRunning, RuntimeError), (TokenError, ValueError)]
)
def test_an_error_of_the_programmer_is_also_the_builtin_that_python_would_raise(
    error: type[RealtimeError], builtin: type[Exception]
) -> None:
    assert issubclass(error, builtin)


def test_a_trouble_of_the_backend_is_no_error_of_the_programmer() -> None:
    assert not issubclass(Unavailable, ValueError | RuntimeError)


def test_a_token_error_says_whether_a_fresh_token_will_do() -> None:
    assert TokenError("the token has expired", expired=True).expired is True
    assert TokenError("the token is forged").expired is False
    assert str(TokenError("the token is forged")) == "the token is forged"


def test_an_event_error_is_its_code_and_its_sentence() -> None:
    error = EventError("full", "the board is full", retry_after=2.5)
    assert (error.code, error.message, error.retry_after) == ("full", "the board is full", 2.5)
    assert str(error) == "full: the board is full"
    assert str(EventError("full")) == "full"


@pytest.mark.parametrize(("retry_after", "temporary"), [(None, False), (math.inf, False), (0, True), (2.5, True)])
def test_an_event_error_is_temporary_where_there_is_a_time_to_try_again(
    retry_after: float | None, temporary: bool
) -> None:
    error = EventError("full", retry_after=retry_after)
    assert error.temporary is temporary
    assert (error.retry_after is not None) is temporary


@pytest.mark.parametrize("clone", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_errors_survive_copying_and_pickling_with_their_facts(clone: object) -> None:
    assert callable(clone)
    event = clone(EventError("full", "no room", retry_after=3.0))
    assert (event.code, event.message, event.retry_after) == ("full", "no room", 3.0)
    assert clone(TokenError("the token has expired", expired=True)).expired is True


def test_an_event_error_is_made_of_text_and_a_wait_that_is_one() -> None:
    for code, message in ((404, "no such thing"), ("no", None)):
        with pytest.raises(TypeError, match="a code and a message, both text"):
            EventError(code, message)  # type: ignore[arg-type]
    for wait in (-1.0, math.nan):
        with pytest.raises(ValueError, match="retry_after is a number of seconds"):
            EventError("no", retry_after=wait)
