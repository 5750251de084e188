"""Names, sizes and data at the edge: what may be said, and what is refused with a sentence."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
import uuid
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from starlette_rt.exceptions import EventError
from starlette_rt.frames import (
    MAX_META,
    MAX_NAME,
    Error,
    Event,
    check_group,
    check_name,
    encode,
    error_frame,
    event,
    plain_data,
    plain_meta,
)

pytestmark = pytest.mark.unit

printable = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Struct(msgspec.Struct):
    x: int


class Model(BaseModel):
    at: datetime.date


class Pair(NamedTuple):
    left: int
    right: int


class Colour(enum.Enum):
    RED = "red"


# Names.


@given(name=printable)
def test_a_name_of_printable_characters_is_a_name_up_to_its_length(name: str) -> None:
    if len(name) <= MAX_NAME:
        assert check_name(name) is name
    else:
        with pytest.raises(EventError, match="1 to 255"):
            check_name(name)


@pytest.mark.parametrize("name", ["a", "room 7", "ä", "部屋", "x" * MAX_NAME, "a~b", "🙂"])
def test_these_are_names(name: str) -> None:
    assert check_name(name) == check_group(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * (MAX_NAME + 1), "a\nb", "a\0", "\u202e", "\u2028", "\ud800", None, 7, b"a", ["a"], {"a": 1}],
    ids=ascii,
)
def test_these_are_no_names_and_the_client_is_told(name: Any) -> None:
    with pytest.raises(EventError) as caught:
        check_name(name)
    assert caught.value.code == "bad_name"
    assert not caught.value.temporary


def test_the_refusal_says_which_name_it_means() -> None:
    with pytest.raises(EventError, match="group names"):
        check_name("")
    with pytest.raises(EventError, match="event names"):
        check_name("", "event")


@pytest.mark.parametrize("name", ["~", "~ada"])
def test_the_groups_of_identities_can_be_named_but_not_joined(name: str) -> None:
    assert check_name(name) == name
    with pytest.raises(EventError, match="reserved") as caught:
        check_group(name)
    assert caught.value.code == "bad_name"


# Errors.


@pytest.mark.parametrize(
    ("seconds", "milliseconds"), [(0, 1), (0.0001, 1), (0.25, 250), (0.2501, 251), (1, 1000), (1.0000001, 1001)]
)
def test_a_time_to_wait_is_said_in_whole_milliseconds_and_never_too_short(seconds: float, milliseconds: int) -> None:
    assert error_frame(EventError("busy", "wait", retry_after=seconds)) == Error("busy", "wait", True, milliseconds)


@given(seconds=st.floats(0, 1e6))
def test_who_waits_as_long_as_the_frame_says_has_waited_long_enough(seconds: float) -> None:
    said = error_frame(EventError("busy", retry_after=seconds)).retry_after_ms
    assert said is not None
    assert seconds * 1000 <= said < seconds * 1000 + 2


@pytest.mark.parametrize("never", [None, math.inf])
def test_where_waiting_does_not_help_no_time_is_said(never: float | None) -> None:
    assert error_frame(EventError("too_large", "no", retry_after=never)) == Error("too_large", "no", False, None)


# Data.


@given(value=json_values)
def test_any_json_value_is_said_as_python_would_say_it(value: Any) -> None:
    plain = plain_data(value)
    assert plain == value
    assert json.loads(encode(plain)) == value


@given(value=st.lists(json_values, min_size=1) | st.dictionaries(st.text(), json_values, min_size=1))
def test_what_is_published_is_a_value_of_its_own(value: Any) -> None:
    plain = plain_data(value)
    before = json.dumps(plain)
    for each in [value, *(value.values() if isinstance(value, dict) else value)]:
        if isinstance(each, dict | list):
            each.clear()
    assert json.dumps(plain) == before


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Point(1), {"x": 1, "y": 0}),
        (Struct(1), {"x": 1}),
        (Model(at=datetime.date(2024, 2, 29)), {"at": "2024-02-29"}),
        ([Model(at=datetime.date(2024, 2, 29))], [{"at": "2024-02-29"}]),
        ({"point": Point(1), Colour.RED: Colour.RED}, {"point": {"x": 1, "y": 0}, "red": "red"}),
        (datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), "2024-01-01T00:00:00Z"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.50"), "1.50"),
        ({1: "one"}, {"1": "one"}),
        (frozenset([1]), [1]),
        ((1, [2]), (1, [2])),
        (b"raw", b"raw"),
        (bytearray(b"raw"), b"raw"),
        (memoryview(b"raw"), b"raw"),
        ([b"raw"], [b"raw"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_has_a_form_for_takes_that_form(value: Any, plain: Any) -> None:
    assert plain_data(value) == plain
    assert type(plain_data(value)) is type(plain)
    assert encode(plain_data(value))


@pytest.mark.parametrize(
    "value",
    [object(), 1j, Exception, Model, range(3), iter([]), {(1, 2): 3}, {None: 1}],
    ids=["object", "complex", "type", "model class", "range", "iterator", "tuple as key", "None as key"],
)
def test_what_json_has_no_form_for_is_a_type_error_of_the_caller(value: Any) -> None:
    with pytest.raises(TypeError):
        plain_data(value)
    with pytest.raises(TypeError):
        plain_data({"inside": [value]})


def test_the_type_error_names_the_type_and_what_to_give() -> None:
    with pytest.raises(TypeError, match="complex cannot be sent: give JSON data"):
        plain_data(1j)


def test_data_that_contains_itself_or_is_nested_without_end_is_a_value_error() -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for endless in (circle, deep):
        with pytest.raises(ValueError, match="nested too deep"):
            plain_data(endless)


def test_a_value_of_a_hundred_levels_is_not_nested_too_deep() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    assert json.loads(encode(plain_data(deep))) == deep


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_said_as_null(value: float) -> None:
    assert encode([value]) == b"[null]"


@pytest.mark.parametrize("value", ["\ud800", {"\ud800": 1}, [10**5000]], ids=["text", "key", "integer"])
def test_what_no_wire_can_carry_is_a_value_error_when_it_is_spelled(value: Any) -> None:
    with pytest.raises(ValueError):
        encode(plain_data(value))
    with pytest.raises(ValueError):
        event("message", value)
    with pytest.raises(ValueError):
        plain_meta({"value": value})


def test_bytes_in_json_are_base64() -> None:
    assert encode([b"raw"]) == b'["cmF3"]'


# Frames made here.


def test_an_event_to_one_client_is_spelled_once_and_has_no_group() -> None:
    assert event("moved", Point(1)) == Event("moved", {"x": 1, "y": 0}, b'{"x":1,"y":0}', None)


def test_an_event_with_a_bad_name_is_refused() -> None:
    with pytest.raises(EventError, match="event names"):
        event("", 1)


def test_a_frame_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        event("moved", 1).event = "stayed"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("meta", "plain"),
    [(None, {}), ({}, {}), ({"name": "Ada"}, {"name": "Ada"}), (Point(1), {"x": 1, "y": 0}), (Struct(1), {"x": 1})],
)
def test_a_presence_meta_is_an_object_and_none_is_the_empty_one(meta: Any, plain: dict[str, Any]) -> None:
    assert plain_meta(meta) == plain


@pytest.mark.parametrize("meta", [[], "Ada", 7, False, b"raw", Pair(1, 2)])
def test_a_presence_meta_that_is_no_object_is_a_type_error(meta: Any) -> None:
    with pytest.raises(TypeError, match="an object"):
        plain_meta(meta)


def test_a_presence_meta_has_at_most_four_kilobytes_of_json() -> None:
    room = MAX_META - len(b'{"a":""}')
    assert plain_meta({"a": "x" * room}) == {"a": "x" * room}
    for more in ("x" * (room + 1), "é" * (room // 2 + 1)):
        with pytest.raises(ValueError, match="at most 4096 bytes"):
            plain_meta({"a": more})
