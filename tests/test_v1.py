"""The protocol v1: both roles meet in both spellings, and nothing a client sends is more than an answered error."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starlette_rt import frames
from starlette_rt.events import Decoder
from starlette_rt.exceptions import EventError, ProtocolError
from starlette_rt.frames import Emit, Error, Event, Join, Murmur, Page, Pong, Recovery, Reply, Skip, Track, Update
from starlette_rt.history import Position
from starlette_rt.protocols.bounds import MAX_FRAMES, MAX_INT
from starlette_rt.protocols.v1 import V1, V1S, Malformed

pytestmark = pytest.mark.unit

JSON, PACK = V1S["rt.v1.json"], V1S["rt.v1.msgpack"]
both = pytest.mark.parametrize("protocol", V1S.values(), ids=V1S)

SAFE = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | SAFE,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(SAFE, inner, max_size=5),
    max_leaves=30,
)

PLACE = Position("x3kQ", 43, "02ab")


@dataclasses.dataclass
class Message:
    text: str
    more: Any = None


def say(protocol: V1, value: Any) -> str | bytes:
    """Any value as a message of this spelling."""
    return json.dumps(value) if protocol is JSON else msgspec.msgpack.encode(value)


def read(protocol: V1, spelled: str | bytes) -> Any:
    return json.loads(spelled) if protocol is JSON else msgspec.msgpack.decode(spelled)


def one(protocol: V1, value: Any) -> Any:
    """The one frame, or what stands in its place, of a value that is said."""
    (frame,) = protocol.decode(say(protocol, value))
    return frame


def wrong(protocol: V1, value: Any) -> Malformed:
    frame = one(protocol, value)
    assert isinstance(frame, Malformed)
    return frame


def refused(protocol: V1, raw: str | bytes) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode(raw)
    return caught.value


def nested(levels: int) -> Any:
    """Arrays and objects in turn, the innermost an empty one."""
    value: Any = []
    for level in range(levels - 1):
        value = [value] if level % 2 else {"a": value}
    return value


# What the two roles say to each other.


FROM_CLIENT: list[frames.ClientFrame] = [
    Join("g"),
    Join("g", 0, PLACE, presence="members"),
    Join("g", MAX_INT, last=50, presence="count"),
    frames.Leave("g", 1),
    Track("g", {"name": "Ada"}, 1),
    Update("g", {}, 2),
    frames.Untrack("g"),
    Page("g", 1, "ada", 20),
    frames.Refresh("secret", 1),
    Pong(),
    Error("declined", "not now", False, None, 9),
    Error("busy", "", True, 800, 9),
]
FROM_SERVER: list[frames.ServerFrame] = [
    frames.Welcome("c", "s", "ada", 25_000, 20_000, None, 3_600_000, 32, 65_536),
    Event("said", {"text": "hé"}, '{"text":"hé"}'.encode(), "g", 44, "e0", "9b", None),
    Event("notice", None, b"null"),
    Event('a "name"', [1], b"[1]", ref=9),
    Skip("g", 45, "11", True),
    Error("busy", "wait", True, 800, 3),
    Error("invalid", "no", False),
    frames.Joined("g", None),
    frames.Joined("g", PLACE),
    frames.Left("g", "forbidden", False),
    frames.Reset("g", PLACE),
    frames.PresenceState("g", 5, {"ada": {"metas": [{"ref": "1"}]}}, None),
    frames.PresenceDiff("g", 6, {}, {"ada": {"metas": [{"ref": "1"}], "reason": "left"}}),
    frames.PresenceCount("g", 1204),
    frames.Whispered("g", "typing", "ada", {"where": "title"}, 5000),
    frames.Whispered("g", "typing", "ada", stop=True),
    frames.Ping(),
    frames.Goodbye(1012, "service restart", 1730),
    frames.Goodbye(4001, "token expired"),
]


@both
@pytest.mark.parametrize("frame", FROM_CLIENT, ids=lambda frame: type(frame).__name__)
def test_what_a_client_says_is_what_the_server_gets(protocol: V1, frame: frames.ClientFrame) -> None:
    assert protocol.decode(protocol.encode_client(frame)) == [frame]


@both
@pytest.mark.parametrize("frame", FROM_SERVER, ids=lambda frame: type(frame).__name__)
def test_what_the_server_says_is_what_a_client_gets(protocol: V1, frame: frames.ServerFrame) -> None:
    assert protocol.decode_server(protocol.encode(frame)) == [frame]


@both
def test_json_is_spoken_as_text_and_messagepack_as_bytes_by_both_roles(protocol: V1) -> None:
    kind = str if protocol is JSON else bytes
    assert {type(protocol.encode(frame)) for frame in FROM_SERVER} == {kind}
    assert {type(protocol.encode_client(frame)) for frame in FROM_CLIENT} == {kind}
    assert protocol.answers
    assert V1S[protocol.name] is protocol


@both
@given(value=values)
@example(value=2**64 - 1)
def test_any_data_of_a_client_arrives_as_it_was_said(protocol: V1, value: Any) -> None:
    data = protocol.raw(value)
    said: list[Any] = [Emit("say", data, "g", 3, "id"), Murmur("g", "typing", data), Reply(9, data)]
    for frame in said:
        (got,) = protocol.decode(protocol.encode_client(frame))
        assert type(got) is type(frame)
        assert repr(protocol.data(got.data)) == repr(protocol.data(data))
        assert msgspec.structs.replace(got, data=None) == msgspec.structs.replace(frame, data=None)


@both
@given(value=values)
def test_any_data_of_the_server_arrives_as_it_was_said(protocol: V1, value: Any) -> None:
    event = frames.event("said", value)
    assert protocol.decode_server(protocol.encode(event)) == [dataclasses.replace(event, data=event.data)]
    (reply,) = protocol.decode_server(protocol.encode(Reply(3, value)))
    assert isinstance(reply, Reply)
    assert frames.encode(protocol.data(reply.data)) == frames.encode(value)


@both
@pytest.mark.parametrize("data", [msgspec.Raw(), msgspec.Raw(b"")])
def test_data_that_is_not_said_is_null(protocol: V1, data: msgspec.Raw) -> None:
    assert "data" not in read(protocol, protocol.encode_client(Emit("say", data)))
    for frame in (Emit("say", data), Murmur("g", "typing", data, stop=True), Reply(1, data)):
        (got,) = protocol.decode(protocol.encode_client(frame))
        assert not isinstance(got, Malformed)
        assert protocol.data(got.data) is None  # type: ignore[union-attr]


@both
def test_a_reply_says_its_data_also_where_that_is_null(protocol: V1) -> None:
    assert read(protocol, protocol.encode(Reply(3))) == {"type": "reply", "ref": 3, "data": None}
    assert read(protocol, protocol.encode(Reply(3, msgspec.Raw()))) == {"type": "reply", "ref": 3, "data": None}
    assert read(protocol, protocol.encode(Reply(3, protocol.raw([1])))) == {"type": "reply", "ref": 3, "data": [1]}


@both
def test_what_is_absent_is_not_said_and_what_is_null_is(protocol: V1) -> None:
    assert read(protocol, protocol.encode(Event("notice", 1, b"1"))) == {"type": "event", "event": "notice", "data": 1}
    assert read(protocol, protocol.encode(frames.Joined("g", None))) == {
        "type": "joined",
        "group": "g",
        "position": None,
    }


def test_the_json_of_an_event_is_said_as_it_was_spelled_once() -> None:
    assert JSON.encode(Event("e", None, b'{"spelled": 1}', "g")) == (
        '{"type":"event","event":"e","data":{"spelled": 1},"group":"g"}'
    )


@both
def test_bytes_are_bytes_in_messagepack_and_base64_in_json(protocol: V1) -> None:
    said = read(protocol, protocol.encode(frames.event("e", {"a": [b"raw"]})))
    assert said["data"] == {"a": ["cmF3" if protocol is JSON else b"raw"]}


@both
@pytest.mark.parametrize("number", [10**30, -(10**30), 2**64, -(2**63) - 1])
def test_a_number_that_messagepack_has_no_form_of_is_what_javascript_takes_it_for(protocol: V1, number: int) -> None:
    taken = number if protocol is JSON else float(number)
    data = {"a": [number, 1, "x"], "b": {"c": number}}
    for frame in (frames.event("e", data), Reply(1, data)):
        said = read(protocol, protocol.encode(frame))["data"]
        assert said == {"a": [taken, 1, "x"], "b": {"c": taken}}
        assert type(said["a"][0]) is type(taken)
    recovery = Recovery(1, PLACE, True, [protocol.encode(Event("e", 1, b"1"))], number)
    assert read(protocol, protocol.encode(recovery))["data"]["snapshot"] == taken


def test_a_number_beyond_every_float_is_null_in_messagepack() -> None:
    assert read(PACK, PACK.encode(frames.event("e", [10**400, -(10**400)])))["data"] == [None, None]


# A join and its recovery.


@both
def test_a_recovery_takes_spelled_events_and_is_the_reply_to_a_join(protocol: V1) -> None:
    events = [Event("said", 1, b"1", "g", 42, "77"), Event("said", {"a": "b"}, b'{"a":"b"}', "g", 43, "02", "id")]
    recovery = Recovery(1, PLACE, True, [protocol.encode(event) for event in events])
    said = protocol.encode(recovery)
    assert read(protocol, said) == {
        "type": "reply",
        "ref": 1,
        "data": {
            "position": {"epoch": "x3kQ", "offset": 43, "tag": "02ab"},
            "recovered": True,
            "events": [
                {"type": "event", "event": "said", "data": 1, "group": "g", "offset": 42, "tag": "77"},
                {"type": "event", "event": "said", "data": {"a": "b"}, "group": "g"}
                | {"offset": 43, "tag": "02", "id": "id"},
            ],
        },
    }
    (reply,) = protocol.decode_server(said)
    assert isinstance(reply, Reply)
    got = protocol.recovery(reply)
    assert got == recovery
    assert [protocol.decode_server(event) for event in got.events] == [[event] for event in events]


@both
@pytest.mark.parametrize("snapshot", [msgspec.UNSET, None, {"title": "Plans"}])
def test_a_snapshot_is_said_if_there_is_one_also_null(protocol: V1, snapshot: Any) -> None:
    recovery = Recovery(1, None, False, [], snapshot)
    said = protocol.encode(recovery)
    assert ("snapshot" in read(protocol, said)["data"]) is (snapshot is not msgspec.UNSET)
    (reply,) = protocol.decode_server(said)
    assert isinstance(reply, Reply)
    assert protocol.recovery(reply) == recovery


@both
@pytest.mark.parametrize("data", [None, {"events": [1]}, {"position": None, "recovered": 1, "events": []}])
def test_another_reply_is_no_recovery(protocol: V1, data: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.recovery(Reply(1, protocol.raw(data)))
    assert caught.value.code == "invalid"


def test_an_event_of_a_recovery_that_is_not_utf_8_is_a_bad_message() -> None:
    with pytest.raises(ProtocolError) as caught:
        JSON.recovery(Reply(1, msgspec.Raw(b'{"position":null,"recovered":true,"events":["\xff"]}')))
    assert caught.value.code == "bad_message"


# Batches.


@both
@pytest.mark.parametrize("many", [2, 15, 16, 17, 300, MAX_FRAMES])
def test_spelled_frames_are_joined_to_a_batch(protocol: V1, many: int) -> None:
    said = [Emit("say", group=f"g{number}", ref=number) for number in range(many)]
    assert protocol.decode(protocol.join([protocol.encode_client(frame) for frame in said])) == said


@both
def test_one_frame_alone_is_itself(protocol: V1) -> None:
    alone = protocol.encode(frames.Ping())
    assert protocol.join([alone]) is alone
    assert protocol.decode_server(alone) == [frames.Ping()]


@both
def test_an_empty_batch_is_nothing(protocol: V1) -> None:
    assert protocol.decode(say(protocol, [])) == protocol.decode_server(say(protocol, [])) == []


@both
def test_a_wrong_frame_takes_no_other_one_of_its_batch_with_it_and_its_ref_is_known(protocol: V1) -> None:
    batch = [
        {"type": "leave", "group": "g", "ref": 1},
        {"type": "leave", "group": 7, "ref": 2},
        {"type": "event", "event": "", "ref": 3},
        {"type": "later"},
        {"type": "event", "event": "say", "ref": 4},
        [{"type": "pong"}],
        7,
        {"type": "pong"},
    ]
    got = protocol.decode(say(protocol, batch))
    assert [type(frame) for frame in got] == [frames.Leave, Malformed, Malformed, Emit, Malformed, Malformed, Pong]
    malformed = [frame for frame in got if isinstance(frame, Malformed)]
    assert [(frame.error.code, frame.ref) for frame in malformed] == [
        ("invalid", 2),
        ("bad_name", 3),
        ("invalid", None),
        ("invalid", None),
    ]
    assert malformed[0].error.message == "Expected `str`, got `int` - at `$.group`"


def test_a_frame_that_is_not_utf_8_takes_no_other_one_with_it() -> None:
    emit, pong = PACK.encode_client(Emit("say", ref=3)), PACK.encode_client(Pong())
    assert isinstance(emit, bytes)
    bad, good = PACK.decode(PACK.join([emit.replace(b"say", b"sa\xff"), pong]))
    assert isinstance(bad, Malformed)
    assert (bad.error.code, bad.ref) == ("bad_message", 3)
    assert good == Pong()


# What is ignored, and what is wrong.


@both
def test_types_and_fields_that_came_after_us_are_ignored_by_both_roles(protocol: V1) -> None:
    later = {"type": "later", "ref": 1, "deep": {"a": [1]}}
    assert protocol.decode(say(protocol, later)) == protocol.decode_server(say(protocol, later)) == []
    assert protocol.decode(say(protocol, [later, {"type": "pong", "more": [1]}])) == [Pong()]
    assert protocol.decode_server(say(protocol, [{"type": "ping", "more": 1}, later])) == [frames.Ping()]
    assert protocol.decode(say(protocol, {"type": "welcome"})) == [], "what only a server says"


@both
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({}, "Object missing required field `type`"),
        ({"type": 1}, "Expected `str`"),
        ({"type": "join"}, "Object missing required field `group`"),
        ({"type": "event", "event": 1}, "Expected `str`, got `int` - at `$.event`"),
        ({"type": "track", "group": "g", "meta": []}, "Expected `object | null`, got `array` - at `$.meta`"),
    ],
)
def test_what_is_not_of_its_type_is_invalid_and_the_sentence_names_the_place(
    protocol: V1, value: Any, sentence: str
) -> None:
    got = wrong(protocol, value | {"ref": 5})
    assert (got.error.code, got.ref) == ("invalid", 5)
    assert got.error.message.startswith(sentence)
    assert not got.error.temporary


@both
@pytest.mark.parametrize("value", [None, True, 7, "text"])
def test_what_is_no_frame_at_all_is_refused(protocol: V1, value: Any) -> None:
    assert refused(protocol, say(protocol, value)).code == "invalid"


@pytest.mark.parametrize(
    "raw",
    [
        "",
        " ",
        "{",
        "[",
        "nonsense",
        '{"type":"pong"',
        '[{"type":"pong"}',
        "\ud800",
        '{"type":"\\ud800"}',
        '{"type":"x","ref":}',
    ],
)
def test_what_is_not_json_is_a_bad_message(raw: str) -> None:
    error = refused(JSON, raw)
    assert error.code == "bad_message"
    assert error.message.startswith("not JSON: ")
    assert JSON.encode(frames.error_frame(error))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", b"\x81", b"\x81\xa4type", b"\x92\x81\xa4type\xa4pong", b"\xdd\xff\xff\xff\xff"],
)
def test_what_is_not_messagepack_is_a_bad_message(raw: bytes) -> None:
    error = refused(PACK, raw)
    assert error.code == "bad_message"
    assert error.message.startswith("not MessagePack: ")


@both
def test_the_other_kind_of_message_is_unsupported_whatever_is_in_it(protocol: V1) -> None:
    spelled = say(protocol, {"type": "pong"})
    other = spelled.encode() if isinstance(spelled, str) else "{}"
    assert refused(protocol, other).code == "unsupported"
    assert protocol.decode(spelled) == [frames.Pong()]


@both
def test_the_ref_of_a_wrong_answer_is_the_servers_and_not_answered(protocol: V1) -> None:
    assert wrong(protocol, {"type": "reply", "ref": 9, "data": 1} | {"ref": -9}).ref is None
    assert wrong(protocol, {"type": "error", "ref": 9}).ref is None
    assert wrong(protocol, {"type": "error", "ref": 9, "code": "busy", "retry_after_ms": -1}).ref is None
    assert wrong(protocol, {"type": "leave", "ref": 9}).ref == 9


@both
@pytest.mark.parametrize("ref", [-1, MAX_INT + 1, True, "1", 1.5, None, [1], {"a": 1}])
def test_a_ref_that_cannot_be_one_is_not_answered(protocol: V1, ref: Any) -> None:
    assert wrong(protocol, {"type": "leave", "ref": ref}).ref is None


# The data.


@both
def test_data_is_decoded_into_the_type_of_its_handler(protocol: V1) -> None:
    data = protocol.raw({"text": "hi", "more": [1]})
    assert protocol.data(data, Decoder(Message)) == Message("hi", [1])
    assert protocol.data(msgspec.Raw(), Decoder(Message | None)) is None


@both
@pytest.mark.parametrize(
    ("data", "sentence"),
    [({"text": 1}, "Expected `str`, got `int` - at `$.text`"), (None, "Expected `object`, got ")],
)
def test_data_that_is_not_of_the_type_is_invalid_and_the_sentence_names_the_place(
    protocol: V1, data: Any, sentence: str
) -> None:
    with pytest.raises(EventError) as caught:
        protocol.data(protocol.raw(data), Decoder(Message))
    assert caught.value.code == "invalid"
    assert caught.value.message.startswith(sentence)


@both
def test_a_decoder_that_refuses_by_itself_is_heard_and_its_bug_is_its_own(protocol: V1) -> None:
    class Picky:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def decode(self, raw: Any) -> Any:
            raise self.error

        decode_msgpack = decode

    with pytest.raises(EventError, match="not like this"):
        protocol.data(protocol.raw(1), Picky(EventError("invalid", "not like this")))
    with pytest.raises(TypeError):
        protocol.data(protocol.raw(1), Picky(TypeError("a bug")))
    with pytest.raises(ProtocolError, match="more than 64 levels"):
        protocol.data(protocol.raw(1), Picky(RecursionError()))


@pytest.mark.parametrize("decoder", [None, Decoder(Any)], ids=["untyped", "typed"])
def test_json_that_is_none_when_it_is_looked_at_is_refused(decoder: Any) -> None:
    (frame,) = JSON.decode('{"type":"event","event":"e","data":1e400}')
    assert isinstance(frame, Emit)
    with pytest.raises(ProtocolError) as caught:
        JSON.data(frame.data, decoder)
    assert caught.value.code == "invalid"


UNSAYABLE = {
    "a number as a key": (b"\x81\x01\x01", "invalid"),
    "bytes as a key": (b"\x81\xc4\x01a\x01", "invalid"),
    "null as a key": (b"\x81\xc0\x01", "invalid"),
    "an array as a key": (b"\x81\x91\x01\x01", "invalid"),
    "a map as a key": (b"\x81\x80\x01", "bad_message"),
    "a key inside": (b"\x91\x81\xa1a\x81\x01\x01", "invalid"),
    "an extension": (b"\xd4\x05\x01", "invalid"),
    "an extension inside": (b"\x81\xa1a\x91\xd4\x05\x01", "invalid"),
    "a timestamp": (b"\xd6\xff\0\0\0\x01", "invalid"),
    "a wrong timestamp": (b"\xd5\xff\0\0", "invalid"),
    "text that is not UTF-8": (b"\xa1\xff", "bad_message"),
    "a surrogate": (b"\xa3\xed\xa0\x80", "bad_message"),
}


@pytest.mark.parametrize(("data", "code"), UNSAYABLE.values(), ids=UNSAYABLE)
@pytest.mark.parametrize("decoder", [None, Decoder(Any)], ids=["untyped", "typed"])
def test_what_json_has_no_form_of_is_refused_in_messagepack(data: bytes, code: str, decoder: Any) -> None:
    (frame,) = PACK.decode(b"\x83\xa4type\xa5event\xa5event\xa1e\xa4data" + data)
    assert isinstance(frame, Emit)
    with pytest.raises(ProtocolError) as caught:
        PACK.data(frame.data, decoder)
    assert caught.value.code == code
    assert PACK.encode(frames.error_frame(caught.value))


@pytest.mark.parametrize(
    "data", [b"\x80", b"\x81\xa1a\xc4\x01\xff", b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcf" + b"\xff" * 8]
)
def test_what_json_has_a_form_of_is_not(data: bytes) -> None:
    value = PACK.data(msgspec.Raw(data))
    assert msgspec.msgpack.encode(value) == data
    assert frames.encode(frames.plain_data(value))


def test_what_the_oldest_decoder_says_of_a_map_as_a_key_is_a_bad_message_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(raw: Any) -> Any:
        raise TypeError("unhashable type: 'dict'")

    monkeypatch.setattr(PACK, "_decode", decode)
    with pytest.raises(ProtocolError) as caught:
        PACK.data(msgspec.Raw(b"\x81\x80\x01"))
    assert caught.value.code == "bad_message"


@pytest.mark.parametrize(("data", "code"), UNSAYABLE.values(), ids=UNSAYABLE)
@pytest.mark.parametrize("kind", ["track", "update"])
def test_a_meta_has_a_form_in_json_too(kind: str, data: bytes, code: str) -> None:
    head = msgspec.msgpack.encode({"type": kind, "group": "g", "ref": 4, "meta": None})
    (frame,) = PACK.decode(head[:-1] + b"\x81\xa1m" + data)
    assert isinstance(frame, Malformed)
    assert frame.error.code == code
    assert frame.ref in {4, None}
    assert one(PACK, {"type": kind, "group": "g", "meta": {"m": b"\xff"}}).meta == {"m": b"\xff"}


# The client's side is told too.


@both
@pytest.mark.parametrize(
    "value",
    [
        {"type": "event"},
        {"type": "event", "skip": True, "group": "g", "offset": 1},
        {"type": "event", "skip": True, "offset": 1, "tag": "t"},
        {"type": "event", "skip": True, "group": "g", "tag": "t"},
        {"type": "joined"},
        [{"type": "ping"}, {"type": "reset", "group": "g", "position": None}],
        7,
    ],
)
def test_a_wrong_frame_of_a_server_is_a_protocol_error(protocol: V1, value: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        protocol.decode_server(say(protocol, value))
    assert caught.value.code == "invalid"


@both
def test_an_event_that_was_not_skipped_is_one(protocol: V1) -> None:
    value = {"type": "event", "event": "e", "data": [1.5], "skip": False}
    assert protocol.decode_server(say(protocol, value)) == [Event("e", [1.5], b"[1.5]")]


@both
def test_a_token_is_not_in_the_text_of_what_was_decoded(protocol: V1) -> None:
    assert "secret" not in repr(one(protocol, {"type": "refresh", "token": "secret", "ref": 1}))
