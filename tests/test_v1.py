"""The protocol v1: both roles meet in both spellings, and nothing a client sends is more than an answered error."""

from __future__ import annotations

import dataclasses
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from starlette_rt import frames
from starlette_rt.events import Decoder
from starlette_rt.exceptions import EventError, ProtocolError
from starlette_rt.frames import Emit, Error, Event, Join, Murmur, Page, Pong, Raw, Recovery, Reply, Skip, Track, Update
from starlette_rt.history import Position
from starlette_rt.protocols import v1
from starlette_rt.protocols.plain import MAX_DEPTH
from starlette_rt.protocols.v1 import MAX_ELEMENTS, MAX_FRAMES, MAX_INT, V1, V1S, Malformed

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
@pytest.mark.parametrize("data", ["text", b"bytes", "", b""])
def test_what_the_host_spelled_itself_is_said_as_it_is(protocol: V1, data: str | bytes) -> None:
    assert protocol.encode(Raw(data)) is data


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


@both
def test_a_frame_that_is_not_utf_8_takes_no_other_one_with_it(protocol: V1) -> None:
    pong = protocol.encode_client(Pong())
    text = protocol.encode_client(Emit("say", ref=3)).replace(*[["say", "sa\0"], [b"say", b"sa\xff"]][protocol is PACK])  # type: ignore[arg-type]
    raw = protocol.join([text, pong])
    bad, good = protocol.decode(raw.encode("latin-1").replace(b"\0", b"\xff") if isinstance(raw, str) else raw)
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
        b"\xff",
        '{"type":"\\ud800"}',
        '{"type":"x","ref":}',
    ],
)
def test_what_is_not_json_is_a_bad_message(raw: str | bytes) -> None:
    error = refused(JSON, raw)
    assert error.code == "bad_message"
    assert error.message.startswith("not JSON: ")
    assert JSON.encode(frames.error_frame(error))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", b"\x81", b"\x81\xa4type", b"\x92\x81\xa4type\xa4pong", b"\xdd\xff\xff\xff\xff", "{}", "x" * 20_000],
)
def test_what_is_not_messagepack_is_a_bad_message_and_so_is_text(raw: str | bytes) -> None:
    error = refused(PACK, raw)
    assert error.code == "bad_message"
    assert error.message.startswith("not MessagePack: ")


def test_json_may_come_as_text_or_binary() -> None:
    text = '{"type":"leave","group":"gärten"}'
    assert JSON.decode(text) == JSON.decode(text.encode()) == [frames.Leave("gärten")]


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


@pytest.mark.parametrize(("data", "code"), [(b'"\xff"', "bad_message"), (b"1e400", "invalid")])
@pytest.mark.parametrize("decoder", [None, Decoder(Any)], ids=["untyped", "typed"])
def test_json_that_is_none_when_it_is_looked_at_is_refused(data: bytes, code: str, decoder: Any) -> None:
    (frame,) = JSON.decode(b'{"type":"event","event":"e","data":' + data + b"}")
    assert isinstance(frame, Emit)
    with pytest.raises(ProtocolError) as caught:
        JSON.data(frame.data, decoder)
    assert caught.value.code == code


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
            return v1.BOUNDS[name](value) is None if value is not None else True
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
@pytest.mark.parametrize("binary", [False, True])
def test_a_message_has_10000_elements(protocol: V1, filler: Callable[[int], Any], binary: bool) -> None:
    def said(many: int) -> str | bytes:
        raw = say(protocol, wide(filler, many))
        return raw.encode() if binary and isinstance(raw, str) else raw

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
        assert v1.marks(v1.outside_strings(json.dumps(value))) == count(value)
        assert v1.marks(v1.outside_strings(json.dumps(value, ensure_ascii=False, indent=1).encode())) == count(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v1, "MAX_ELEMENTS", count(value))
        protocol._check(say(protocol, value))
        if count(value):
            patch.setattr(v1, "MAX_ELEMENTS", count(value) - 1)
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
    monkeypatch.setattr(v1, "MAX_ELEMENTS", 2 + inside + 40)
    raw = msgspec.msgpack.encode([value, *after])
    PACK._check(raw)
    monkeypatch.setattr(v1, "MAX_ELEMENTS", 2 + inside + 39)
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
    "deep, unfinished": (JSON, b"[" * 100_000),
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
