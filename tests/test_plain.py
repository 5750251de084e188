"""The plain protocol: what is said to any client, and that no input of a client is more than an answered error."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starlette_rt import frames
from starlette_rt.events import Decoder
from starlette_rt.exceptions import ConfigurationError, EventError
from starlette_rt.frames import (
    Error,
    Event,
    Goodbye,
    Joined,
    Left,
    Ping,
    PresenceCount,
    PresenceDiff,
    PresenceState,
    Raw,
    Recovery,
    Reply,
    Reset,
    ServerFrame,
    Skip,
    Welcome,
    Whispered,
)
from starlette_rt.history import Position
from starlette_rt.protocols import plain
from starlette_rt.protocols.plain import MAX_DEPTH, PLAIN, Encoding, Plain, decode_json, enveloped, too_deep

pytestmark = pytest.mark.unit

JSON, TEXT, BYTES, BOTH = (PLAIN[encoding] for encoding in ("json", "text", "bytes", None))
every_encoding = pytest.mark.parametrize("encoding", ["json", "text", "bytes", None])

SAFE = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | SAFE,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(SAFE, inner, max_size=5),
    max_leaves=30,
)
fragments = st.sampled_from(
    [
        *'[]{}",:\\ \n\0eE+-.019',
        *("true", "null", "NaN", '"a":', "\\u", "\\ud800", "\\udc00", "\\ud83d\\ude00", "1e400"),
        *("1" * 5000, "[" * 70, "]" * 70, '{"a":' * 70, "}" * 70, "\ud800", "é", "🙂", "\ufeff"),
    ]
)
mutations = st.lists(fragments, max_size=12).map("".join)


def nested(levels: int, inside: str = "") -> str:
    """JSON of so many levels, arrays and objects in turn, the outermost an array."""
    text = inside
    for level in reversed(range(levels)):
        text = f"[{text}]" if level % 2 == 0 else f'{{"a":{text or 1}}}'
    return text


def refused(raw: str | bytes, decoder: Any = None) -> EventError:
    with pytest.raises(EventError) as caught:
        decode_json(raw, decoder)
    return caught.value


def tried(raw: str | bytes, decoder: Any = None) -> tuple[Any, EventError | None]:
    """What was decoded, or the one kind of error that may come of it."""
    try:
        return decode_json(raw, decoder), None
    except EventError as error:
        assert error.code in {"bad_message", "invalid"}  # noqa: PT017 - any other code is the failure
        return None, error


@dataclasses.dataclass
class Message:
    text: str
    more: Any = None


# What arrives.


@given(value=json_values)
@example(value=10**4299)
@example(value=-(2**64))
def test_any_json_value_arrives_as_it_was_said_in_text_and_in_bytes(value: Any) -> None:
    said = JSON.encode(frames.event("message", value))
    assert isinstance(said, str)
    assert JSON.decode(said) == JSON.decode(said.encode()) == value
    assert repr(JSON.decode(said)) == repr(value), "also the type of every number"


@given(raw=mutations | st.text() | json_values.map(json.dumps) | mutations.map(lambda text: nested(60, text)))
@example(raw="1" * 4300)
@example(raw="1" * 4301)
@example(raw=nested(MAX_DEPTH))
@example(raw=nested(100_000))
@example(raw='{"a":1e400}')
def test_any_text_is_a_value_that_can_be_said_again_or_an_event_error(raw: str) -> None:
    value, error = tried(raw)
    if error is None:
        again = JSON.encode(frames.event("message", {"from": "ada", "said": [value]}))
        assert isinstance(again, str)
        assert json.loads(again)["said"] == [value]
    else:
        answer = JSON.encode(frames.error_frame(error))
        assert isinstance(answer, str)
        assert json.loads(answer)["message"]


@given(raw=st.binary() | mutations.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(raw=b'"\xff"')
@example(raw=b"\xff")
@example(raw=b'"\xed\xa0\x80"')
@example(raw=b"\xef\xbb\xbf1")
def test_any_bytes_are_a_value_that_can_be_said_again_or_an_event_error(raw: bytes) -> None:
    value, error = tried(raw)
    assert frames.encode(frames.plain_data([value])) if error is None else JSON.encode(frames.error_frame(error))


@given(raw=mutations | st.binary() | st.builds(lambda value: json.dumps({"text": "hi", "more": value}), json_values))
def test_any_input_of_a_typed_endpoint_is_of_its_type_or_an_event_error(raw: str | bytes) -> None:
    value, error = tried(raw, Decoder(Message))
    if error is None:
        assert isinstance(value, Message)
        assert frames.encode(frames.plain_data(value))


@pytest.mark.parametrize("raw", ["", " ", "{", "nonsense", "NaN", "[1,]", '"\\ud800"', "\ufeff1", '"\ud800"', b"\xff"])
def test_what_is_not_json_is_a_bad_message(raw: str | bytes) -> None:
    error = refused(raw)
    assert error.code == "bad_message"
    assert error.message.startswith("not JSON: ")
    assert not error.temporary


def test_a_number_that_nobody_can_hold_is_invalid() -> None:
    assert {refused(raw).code for raw in ("1e400", "[-1e400]", "1" * 4301)} == {"invalid"}


def test_what_is_not_of_the_type_is_invalid_and_the_sentence_names_the_place() -> None:
    error = refused('{"text":1}', Decoder(Message))
    assert (error.code, error.message) == ("invalid", "Expected `str`, got `int` - at `$.text`")
    assert decode_json(b'{"text":"hi"}', Decoder(Message)) == Message("hi")


@pytest.mark.parametrize("kind", [str, str.encode], ids=["text", "bytes"])
@pytest.mark.parametrize("inside", ["", "1", '"[[[["'])
@pytest.mark.parametrize("decoder", [None, Decoder(Any)], ids=["untyped", "typed"])
def test_the_bound_of_nesting_is_exact(kind: Any, inside: str, decoder: Any) -> None:
    assert decode_json(kind(nested(MAX_DEPTH, inside)), decoder) == json.loads(nested(MAX_DEPTH, inside))
    error = refused(kind(nested(MAX_DEPTH + 1, inside)), decoder)
    assert (error.code, error.message) == ("bad_message", "more than 64 levels of nesting")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_the_bound_holds_for_arrays_and_objects_alone(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    exact = opening * (MAX_DEPTH - 1) + opening[0] + closing + closing * (MAX_DEPTH - 1)
    assert decode_json(exact) == json.loads(exact)
    assert refused(opening + exact + closing).code == "bad_message"


def test_brackets_in_a_text_and_many_beside_each_other_are_no_depth() -> None:
    assert decode_json(json.dumps("[{" * 500)) == "[{" * 500
    assert decode_json("[" + "[],{}," * 500 + "1]") == [[], {}] * 500 + [1]


@given(value=json_values)
def test_a_value_is_too_deep_where_a_recursive_count_says_so(value: Any) -> None:
    def depth(node: Any) -> int:
        inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else None
        return 0 if inside is None else 1 + max(map(depth, inside), default=0)

    for levels in (0, MAX_DEPTH - 3, MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH):
        wrapped = value
        for _ in range(levels):
            wrapped = [0, wrapped]
        assert too_deep(wrapped) is (depth(wrapped) > MAX_DEPTH)


BOMBS = {
    "deep": "[" * 32_000 + "]" * 32_000,
    "deep objects": '{"a":' * 9_000 + "1" + "}" * 9_000,
    "wide": "[" + "[]," * 21_000 + "1]",
    "wide objects": "[" + "{}," * 21_000 + "1]",
    "wide and nearly too deep": "[" + ",".join(["[" * 62 + "]" * 62] * 500) + "]",
    "unfinished": "[" * 64_000,
    "brackets in a text": '"' + "[" * 64_000 + '"',
}


@pytest.mark.parametrize("name", BOMBS)
def test_64_kilobytes_cost_one_decoding_and_one_look_into_each_container(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, looks, decodings = BOMBS[name], 0, 0
    containers, decode = plain.containers, plain._decode

    def looking(values: Any) -> Any:
        nonlocal looks
        looks += 1
        return containers(values)

    def decoding(raw: Any) -> Any:
        nonlocal decodings
        decodings += 1
        return decode(raw)

    monkeypatch.setattr(plain, "containers", looking)
    monkeypatch.setattr(plain, "_decode", decoding)
    tried(raw)
    assert len(raw) <= 64 * 1024
    assert decodings == 1
    assert looks <= 1 + (raw.count("[") + raw.count("{") if decodes(raw) else 0)
    if name.startswith("deep"):
        assert looks <= MAX_DEPTH + 1, "it looks no deeper than it must"


def decodes(raw: str) -> bool:
    try:
        msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def test_what_cannot_be_too_deep_is_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "too_deep", None)
    assert decode_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    with pytest.raises(TypeError):
        decode_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_a_decoder_that_refuses_by_itself_is_heard() -> None:
    class Picky:
        def decode(self, raw: str | bytes) -> Any:
            raise EventError("invalid", "not like this")

    assert refused("1", Picky()).message == "not like this"


def test_text_and_bytes_endpoints_take_their_own_kind_as_it_is_and_refuse_the_other() -> None:
    assert TEXT.decode("[") == "["
    assert BYTES.decode(b"[") == b"["
    assert (BOTH.decode("["), BOTH.decode(b"[")) == ("[", b"[")
    for protocol, raw, sentence in ((TEXT, b"a", "takes text messages"), (BYTES, "a", "takes binary messages")):
        with pytest.raises(EventError, match=sentence) as caught:
            protocol.decode(raw)
        assert caught.value.code == "unsupported"


def test_json_may_come_as_text_or_binary() -> None:
    assert JSON.decode('{"a":1}') == JSON.decode(b'{"a":1}') == {"a": 1}


# What is said.


@pytest.mark.parametrize(
    ("data", "json_", "text", "bytes_", "both"),
    [
        ({"a": [1]}, '{"a":[1]}', '{"a":[1]}', b'{"a":[1]}', '{"a":[1]}'),
        ("hé", '"hé"', "hé", "hé".encode(), "hé"),
        (b"raw", '"cmF3"', "raw", b"raw", b"raw"),
        (b"\xff", '"/w=="', "\ufffd", b"\xff", b"\xff"),
        (None, "null", "null", b"null", "null"),
    ],
)
def test_a_message_is_bare_in_every_encoding(data: Any, json_: Any, text: Any, bytes_: Any, both: Any) -> None:
    event = frames.event("message", data)
    assert [each.encode(event) for each in (JSON, TEXT, BYTES, BOTH)] == [json_, text, bytes_, both]


@given(name=SAFE.filter(lambda name: name.isprintable() and name not in ("", "message")), data=json_values)
def test_another_event_is_named_on_json_and_bare_elsewhere(name: str, data: Any) -> None:
    event = frames.event(name, data)
    said = JSON.encode(event)
    assert isinstance(said, str)
    assert json.loads(said) == {"event": name, "data": data}
    assert TEXT.encode(event) == TEXT.encode(frames.event("message", data))


def test_the_group_of_an_event_is_not_said() -> None:
    assert JSON.encode(Event("moved", 1, b"1", "board")) == '{"event":"moved","data":1}'


@every_encoding
@pytest.mark.parametrize("data", ["text", b"bytes", "", b""])
def test_what_the_host_spelled_itself_is_said_as_it_is(encoding: Encoding, data: str | bytes) -> None:
    assert PLAIN[encoding].encode(Raw(data)) == data


OUR_OWN: list[tuple[ServerFrame, dict[str, Any]]] = [
    (
        Error("busy", "wait", True, 800),
        {"type": "error", "code": "busy", "message": "wait", "temporary": True, "retry_after_ms": 800},
    ),
    (Error("invalid", "no", False), {"type": "error", "code": "invalid", "message": "no", "temporary": False}),
    (PresenceCount("g", 3), {"type": "presence_count", "group": "g", "count": 3}),
    (
        Whispered("g", "typing", "ada", True, 5000),
        {"type": "whisper", "group": "g", "event": "typing", "from": "ada", "data": True, "expires_ms": 5000},
    ),
    (
        Whispered("g", "typing", "ada", stop=True),
        {"type": "whisper", "group": "g", "event": "typing", "from": "ada", "stop": True},
    ),
    (
        PresenceState("g", 7, {"ada": {"metas": [{"n": 1}, {"n": 2}]}}, "ada"),
        {
            "type": "presence_state",
            "group": "g",
            "version": 7,
            "members": {"ada": {"metas": [{"n": 1}, {"n": 2}]}},
            "after": "ada",
        },
    ),
    (
        PresenceDiff(
            "g",
            8,
            {"bob": {"metas": [{}]}},
            {"ada": {"metas": [{"n": 1}], "reason": "node_lost"}, "eve": {"metas": [{}]}},
        ),
        {
            "type": "presence_diff",
            "group": "g",
            "version": 8,
            "joins": {"bob": {"metas": [{}]}},
            "leaves": {"ada": {"metas": [{"n": 1}], "reason": "node_lost"}, "eve": {"metas": [{}]}},
        },
    ),
]


@pytest.mark.parametrize(("frame", "spelled"), OUR_OWN, ids=lambda value: type(value).__name__)
def test_what_the_package_itself_says_is_an_object_with_a_type_on_json_and_nothing_elsewhere(
    frame: ServerFrame, spelled: dict[str, Any]
) -> None:
    said = JSON.encode(frame)
    assert isinstance(said, str)
    assert json.loads(said) == spelled
    assert next(iter(json.loads(said))) == "type"
    assert [TEXT.encode(frame), BYTES.encode(frame), BOTH.encode(frame)] == [None, None, None]


def test_an_error_without_a_time_to_wait_says_none() -> None:
    frame = frames.error_frame(EventError("too_large", "no", retry_after=math.inf))
    assert "retry_after_ms" not in json.loads(JSON.encode(frame) or "")


@every_encoding
def test_only_json_can_answer(encoding: Encoding) -> None:
    assert PLAIN[encoding].answers is (encoding == "json")
    assert (PLAIN[encoding].encode(Error("a", "b", False)) is not None) is (encoding == "json")


@every_encoding
def test_there_is_one_protocol_for_each_encoding(encoding: Encoding) -> None:
    assert PLAIN[encoding].encoding == encoding


@pytest.mark.parametrize("encoding", ["JSON", "msgpack", "", 0])
def test_an_unknown_encoding_is_refused_with_the_known_ones(encoding: Any) -> None:
    with pytest.raises(ConfigurationError, match='write "json", "text", "bytes" or None'):
        Plain(encoding)


PLACE = Position("e", 1, "t")


@every_encoding
@pytest.mark.parametrize(
    "frame",
    [
        Welcome("c", "s", "ada", 1, 1, None, 1, 32, 1),
        Skip("g", 1, "t", True),
        Recovery(1, PLACE, True),
        Reply(1, "data"),
        Joined("g", PLACE),
        Left("g", "left", False),
        Reset("g", PLACE),
        Ping(),
        Goodbye(1012, "service restart", 5),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_what_a_plain_client_would_not_know_is_not_said_to_it(frame: ServerFrame, encoding: Encoding) -> None:
    assert PLAIN[encoding].encode(frame) is None


# Events with a name.


def test_an_envelope_names_an_event_and_perhaps_a_group() -> None:
    for raw, event, data, group in (
        ('{"event":"say","data":{"a":[1]},"group":"g","more":1}', "say", {"a": [1]}, "g"),
        (b'{"data":null,"event":"say"}', "say", None, None),
        ('{"event":""}', "", None, None),
    ):
        said = enveloped(raw)
        assert said is not None
        assert (said.event, JSON.data(said.data), said.group, said.ref, said.id) == (event, data, group, None, None)


@pytest.mark.parametrize(
    "raw",
    [
        "1",
        "[]",
        "{}",
        '{"event":1}',
        '{"event":"say","group":1}',
        "{",
        '{"event":"say"',
        b"\xff",
        "[" * 100_000,
        "1" * 5000,
    ],
)
def test_what_names_no_event_is_no_envelope(raw: str | bytes) -> None:
    assert enveloped(raw) is None


def test_the_data_of_an_envelope_is_decoded_into_its_type_within_the_bounds() -> None:
    def data(raw: str, decoder: Any = None) -> Any:
        said = enveloped(f'{{"event":"say","data":{raw}}}')
        assert said is not None
        return JSON.data(said.data, decoder)

    assert data('{"text":"hi"}', Decoder(Message)) == Message("hi")
    with pytest.raises(EventError, match=r"Expected `str`, got `int` - at `\$.text`"):
        data('{"text":1}', Decoder(Message))
    assert data(nested(MAX_DEPTH)) is not None
    with pytest.raises(EventError, match="more than 64 levels"):
        data(nested(MAX_DEPTH + 1))
    silent = enveloped('{"event":"say"}')
    assert silent is not None
    with pytest.raises(EventError, match="Expected `object`, got `null`"):
        JSON.data(silent.data, Decoder(Message))


@given(raw=mutations | st.binary() | json_values.map(lambda value: json.dumps({"event": "say", "data": value})))
def test_any_input_is_an_envelope_with_data_or_none(raw: str | bytes) -> None:
    said = enveloped(raw)
    assert said is None or tried(bytes(said.data) or b"null")
