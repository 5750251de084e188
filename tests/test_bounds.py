"""How much a client may say: each bound with what is just inside it, in both spellings.

The law of this file: a bound is looked at through the protocol that holds it, as a client meets it.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starlette_rt.events import Decoder
from starlette_rt.exceptions import EventError, ProtocolError
from starlette_rt.frames import Emit, Murmur, Pong
from starlette_rt.protocols import bounds
from starlette_rt.protocols.bounds import MAX_ELEMENTS, MAX_FRAMES, MAX_INT
from starlette_rt.protocols.plain import MAX_DEPTH
from starlette_rt.protocols.v1 import V1, Malformed
from tests.test_v1 import JSON, PACK, both, nested, one, refused, say, values, wrong

pytestmark = pytest.mark.unit


# The bounds, each with what is just inside.


def inside(protocol: V1, frame: dict[str, Any]) -> None:
    got = one(protocol, frame)
    assert not isinstance(got, Malformed)


def outside(protocol: V1, frame: dict[str, Any], code: str, sentence: str = "") -> None:
    got = wrong(protocol, frame | {"ref": 5} if "ref" not in frame else frame)
    assert got.error.code == code
    assert sentence in got.error.message
    assert got.ref == (None if "ref" in frame else 5)


EVENT = {"type": "event", "event": "e"}
EACH_WITH_A_GROUP = ["join", "leave", "event", "whisper", "track", "update", "untrack", "presence"]


@both
@pytest.mark.parametrize("kind", EACH_WITH_A_GROUP)
def test_the_name_of_a_group_has_1_to_255_printable_characters(protocol: V1, kind: str) -> None:
    for name in ("g", "é" * 255, "~ada", "a b"):
        inside(protocol, EVENT | {"type": kind, "group": name})
    for name in ("", "g" * 256, "a\nb", "\u202e"):
        outside(protocol, EVENT | {"type": kind, "group": name}, "bad_name", "group names have")


@both
@pytest.mark.parametrize("kind", ["event", "whisper"])
def test_the_name_of_an_event_has_1_to_255_printable_characters(protocol: V1, kind: str) -> None:
    for name in ("e", "é" * 255):
        inside(protocol, {"type": kind, "group": "g", "event": name})
    for name in ("", "e" * 256, "\0"):
        outside(protocol, {"type": kind, "group": "g", "event": name}, "bad_name", "event names have")


@both
@pytest.mark.parametrize("kind", [*EACH_WITH_A_GROUP, "refresh", "reply", "error"])
def test_a_ref_is_a_number_that_every_client_can_count_to(protocol: V1, kind: str) -> None:
    frame = EVENT | {"type": kind, "group": "g", "token": "t", "code": "c"}
    for ref in (0, MAX_INT):
        inside(protocol, frame | {"ref": ref})
    for ref in (-1, MAX_INT + 1, 2**64 - 1):
        outside(protocol, frame | {"ref": ref}, "invalid", "at `$.ref`")


@both
def test_an_id_has_1_to_64_printable_characters(protocol: V1) -> None:
    for id_ in ("a", "é" * 64):
        inside(protocol, EVENT | {"id": id_})
    for id_ in ("", "a" * 65, "a\n"):
        outside(protocol, EVENT | {"id": id_}, "invalid", "at `$.id`")


@both
def test_the_numbers_of_a_join_and_of_a_page_have_their_bounds(protocol: V1) -> None:
    join, page = {"type": "join", "group": "g"}, {"type": "presence", "group": "g"}
    for last in (1, 10_000):
        inside(protocol, join | {"last": last})
    for last in (0, 10_001, -1):
        outside(protocol, join | {"last": last}, "invalid", "at `$.last`")
    for limit in (1, 200):
        inside(protocol, page | {"limit": limit})
    for limit in (0, 201):
        outside(protocol, page | {"limit": limit}, "invalid", "at `$.limit`")
    for offset in (0, MAX_INT):
        inside(protocol, join | {"position": {"epoch": "e", "offset": offset, "tag": "t"}})
    for offset in (-1, MAX_INT + 1):
        outside(protocol, join | {"position": {"epoch": "e", "offset": offset, "tag": "t"}}, "invalid", "offset")


@both
def test_the_wait_that_an_answer_names_has_its_bound(protocol: V1) -> None:
    refusal = {"type": "error", "ref": 1, "code": "busy"}
    for wait in (0, MAX_INT):
        inside(protocol, refusal | {"retry_after_ms": wait})
    for wait in (-1, MAX_INT + 1):
        assert wrong(protocol, refusal | {"retry_after_ms": wait}).error.code == "invalid"


names = st.sampled_from(["", "e", "é" * 255, "e" * 256, "a\n"]) | st.text(max_size=3)
refs = st.none() | st.sampled_from([-1, 0, MAX_INT, MAX_INT + 1])
ids = st.none() | st.sampled_from(["", "a", "a" * 64, "a" * 65, "\0"])


@given(event=names, group=st.none() | names, ref=refs, id_=ids)
def test_the_look_in_one_go_at_the_frame_that_comes_most_agrees_with_the_checks_one_by_one(
    event: str, group: str | None, ref: int | None, id_: str | None
) -> None:
    def holds(name: str, value: Any) -> bool:
        try:
            return bounds.BOUNDS[name](value) is None if value is not None else True
        except EventError:
            return False

    frame = Emit(event, group=group, ref=ref, id=id_)
    each = [holds(name, getattr(frame, name)) for name in ("event", "group", "ref", "id")]
    assert (JSON._checked(frame) is frame) is all(each)


@both
@pytest.mark.parametrize("decoder", [None, Decoder(Any)], ids=["untyped", "typed"])
def test_a_frame_has_64_levels_itself_included(protocol: V1, decoder: Any) -> None:
    good = one(protocol, EVENT | {"data": nested(MAX_DEPTH - 1)})
    assert protocol.data(good.data, decoder) == nested(MAX_DEPTH - 1)
    bad = one(protocol, EVENT | {"data": nested(MAX_DEPTH)})
    with pytest.raises(ProtocolError) as caught:
        protocol.data(bad.data, decoder)
    assert (caught.value.code, caught.value.message) == ("too_large", "more than 64 levels of nesting")


@both
@pytest.mark.parametrize("kind", ["track", "update"])
def test_a_meta_has_as_many(protocol: V1, kind: str) -> None:
    inside(protocol, {"type": kind, "group": "g", "meta": nested(MAX_DEPTH - 2 + MAX_DEPTH % 2)})
    outside(protocol, {"type": kind, "group": "g", "meta": nested(MAX_DEPTH)}, "too_large", "64 levels")


@both
@pytest.mark.parametrize("leaf", [1, "[[[[", "é"])
def test_what_is_in_the_deepest_level_is_no_level(protocol: V1, leaf: Any) -> None:
    value = leaf
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert protocol.data(one(protocol, EVENT | {"data": value}).data) == value
    with pytest.raises(ProtocolError):
        protocol.data(one(protocol, EVENT | {"data": [value]}).data)


def wide(filler: Callable[[int], Any], many: int) -> dict[str, Any]:
    """A frame with so many elements: its three fields, and what is in its data."""
    return EVENT | {"data": [filler(number) for number in range(many - 3)]}


FILLERS: dict[str, Callable[[int], Any]] = {
    "numbers": lambda number: number,
    "short texts": lambda number: "",
    "texts": lambda number: '",[{}]\\"\\' * (number % 3),
}


@both
@pytest.mark.parametrize("filler", FILLERS.values(), ids=FILLERS)
def test_a_message_has_10000_elements(protocol: V1, filler: Callable[[int], Any]) -> None:
    def said(many: int) -> str | bytes:
        return say(protocol, wide(filler, many))

    (frame,) = protocol.decode(said(MAX_ELEMENTS))
    assert isinstance(frame, Emit)
    assert len(protocol.data(frame.data)) == MAX_ELEMENTS - 3
    error = refused(protocol, said(MAX_ELEMENTS + 1))
    assert (error.code, error.message) == ("too_large", "more than 10000 elements")


@both
def test_the_values_of_objects_are_elements_and_their_keys_are_not(protocol: V1) -> None:
    good = {str(number): number for number in range(MAX_ELEMENTS - 3)}
    assert protocol.data(one(protocol, EVENT | {"data": good}).data) == good
    assert refused(protocol, say(protocol, EVENT | {"data": good | {"more": 1}})).code == "too_large"


@both
@given(value=values)
def test_elements_are_counted_as_a_recursive_count_says(protocol: V1, value: Any) -> None:
    def count(node: Any) -> int:
        within = list(node.values()) if isinstance(node, dict) else node
        return (len(within) or 1) + sum(map(count, within)) if isinstance(node, dict | list) else 0

    if protocol is JSON:
        assert bounds.marks(bounds.outside_strings(json.dumps(value))) == count(value)
        assert bounds.marks(bounds.outside_strings(json.dumps(value, ensure_ascii=False, indent=1).encode())) == count(
            value
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "MAX_ELEMENTS", count(value))
        protocol._check(say(protocol, value))
        if count(value):
            patch.setattr(bounds, "MAX_ELEMENTS", count(value) - 1)
            with pytest.raises(ProtocolError):
                protocol._check(say(protocol, value))


EVERY_KIND = [
    *(0, 200, 2**10, 2**20, 2**40, -1, -100, -(2**10), -(2**20), -(2**40), 1.5, None, True),
    *("a" * size for size in (0, 20, 200, 300, 70_000)),
    *(b"a" * size for size in (0, 200, 300, 70_000)),
    *(msgspec.msgpack.Ext(1, b"a" * size) for size in (1, 2, 4, 8, 16, 3, 300, 70_000)),
    *([0] * size for size in (15, 16, 70_000)),
    *({str(key): key for key in range(size)} for size in (15, 20, 70_000)),
]


@pytest.mark.parametrize("value", EVERY_KIND, ids=[f"{msgspec.msgpack.encode(value)[0]:x}" for value in EVERY_KIND])
def test_a_walk_steps_over_every_kind_of_value(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    after = [[0] * 40]
    inside = len(value) if isinstance(value, list | dict) else 0
    monkeypatch.setattr(bounds, "MAX_ELEMENTS", 2 + inside + 40)
    raw = msgspec.msgpack.encode([value, *after])
    PACK._check(raw)
    monkeypatch.setattr(bounds, "MAX_ELEMENTS", 2 + inside + 39)
    with pytest.raises(ProtocolError):
        PACK._check(raw)


@pytest.mark.parametrize("head", [b"\xcf", b"\xd3", b"\xcb", b"\xdc\x27", b"\xde\x13\x88", b"\xdd\0\0\x27"])
def test_a_walk_ends_where_the_message_ends(head: bytes) -> None:
    PACK._check(head)
    PACK._check(b"\x91" + head + b"\0")


@both
def test_a_message_has_1000_frames(protocol: V1) -> None:
    pong = protocol.encode_client(Pong())
    assert len(protocol.decode(protocol.join([pong] * MAX_FRAMES))) == MAX_FRAMES
    error = refused(protocol, protocol.join([pong] * (MAX_FRAMES + 1)))
    assert (error.code, error.message) == ("too_large", "more than 1000 frames")
    wrong = say(protocol, {"type": "leave"})
    assert len(protocol.decode(protocol.join([wrong] * MAX_FRAMES))) == MAX_FRAMES
    assert refused(protocol, protocol.join([wrong] * (MAX_FRAMES + 1))).code == "too_large"


EMIT = b"\x83\xa4type\xa5event\xa5event\xa1e\xa4data"
TRACK = b"\x83\xa4type\xa5track\xa5group\xa1g\xa4meta\x81\xa1m"
BOMBS: dict[str, tuple[V1, str | bytes]] = {
    "deep": (JSON, "[" * 100_000 + "]" * 100_000),
    "deep data": (JSON, '{"type":"event","event":"e","data":' + "[" * 9_000 + "]" * 9_000 + "}"),
    "deep objects": (JSON, '{"a":' * 20_000 + "1" + "}" * 20_000),
    "deep, unfinished": (JSON, "[" * 100_000),
    "deep in a field that nobody knows": (JSON, '{"type":"pong","x":' + "[" * 9_000 + "]" * 9_000 + "}"),
    "wide": (JSON, "[" + "[]," * 30_000 + "1]"),
    "wide frames": (JSON, "[" + "{}," * 9_000 + "1]"),
    "texts of commas": (JSON, '[",,' + '",",,' * 9_000 + '"]'),
    "quotes": (JSON, '"' * 64_000),
    "texts": (JSON, '["ab' + '","ab' * 12_000 + '"]'),
    "backslashes": (JSON, '["' + "\\" * 64_000 + "," * 11_000),
    "deep packed": (PACK, b"\x91" * 100_000),
    "deep packed, short": (PACK, b"\x91" * 9_999),
    "deep packed maps": (PACK, b"\x81\xa1a" * 30_000),
    "deep packed data": (PACK, EMIT + b"\x91" * 9_000 + b"\xc0"),
    "deep packed meta": (PACK, TRACK + b"\x91" * 9_000 + b"\xc0"),
    "wide packed": (PACK, b"\xdd\0\0\xff\xff" + b"\x90" * 0xFFFF),
    "wide packed, short": (PACK, TRACK + b"\xdc\x26\xac" + b"\x90" * 9_900),
    "long arrays": (PACK, b"\xdd\xff\xff\xff\xff" * 200),
    "long arrays in a meta": (PACK, TRACK + b"\xdd\xff\xff\xff\xff" * 200),
    "long arrays in data": (PACK, EMIT + b"\xdd\xff\xff\xff\xff" * 200),
    "long maps in a meta": (PACK, TRACK + b"\xdf\xff\xff\xff\xff\xa1a" * 200),
    "long text": (PACK, TRACK + b"\xdb\xff\xff\xff\xff"),
    "long bytes": (PACK, TRACK + b"\xc6\xff\xff\xff\xff"),
    "long extension": (PACK, TRACK + b"\xc9\xff\xff\xff\xff\x05"),
    "many long arrays": (PACK, b"\xdd\xff\xff\xff\xff" * 20_000),
}


NO_TIME = 0.1  # seconds; it is less than a twentieth of that where no coverage is measured and nobody else works


def outcome(protocol: V1, raw: str | bytes) -> set[str]:
    """The codes of what is wrong with a message and with the data in it."""
    try:
        got = protocol.decode(raw)
    except ProtocolError as error:
        return {error.code}
    codes = {frame.error.code for frame in got if isinstance(frame, Malformed)}
    for frame in got:
        try:
            protocol.data(frame.data) if isinstance(frame, Emit | Murmur) else None
        except ProtocolError as error:
            codes.add(error.code)
    return codes


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_time_to_speak_of_and_less_than_a_megabyte(name: str) -> None:
    protocol, raw = BOMBS[name]
    assert outcome(protocol, raw) <= {"bad_message", "invalid", "too_large"}
    taken = []
    for _ in range(5):  # the best one: other processes take their time too
        started = time.process_time()
        outcome(protocol, raw)
        taken.append(time.process_time() - started)
    tracemalloc.start()
    try:
        outcome(protocol, raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert min(taken) < NO_TIME
    assert peak < 1024 * 1024
