"""What a handler takes, read from its annotation: decoders, and sentences at start for what cannot work."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, field_validator

from starlette_rt.events import (
    Decoder,
    ModelDecoder,
    Whisper,
    decoder_for,
    event,
    handlers_of,
    message_decoder,
    whispers_of,
)
from starlette_rt.exceptions import ConfigurationError, EventError
from starlette_rt.limits import RateLimit

if typing.TYPE_CHECKING:
    from starlette.websockets import WebSocket

    class Hidden: ...


pytestmark = pytest.mark.unit


@dataclasses.dataclass
class Message:
    text: str


class Struct(msgspec.Struct):
    text: str


class Dict(TypedDict):
    text: str
    mood: NotRequired[str]


class Model(BaseModel):
    text: str
    tags: list[Annotated[int, Field(lt=10)]] = []

    @field_validator("text")
    @classmethod
    def is_polite(cls, value: str) -> str:
        if value == "rude":
            raise ValueError("be polite")
        if value == "crash":
            raise LookupError("a bug of the host")
        return value


@dataclasses.dataclass
class Envelope:
    model: Model


@dataclasses.dataclass
class Unresolved:
    inside: Hidden


class Stranger: ...


class Chat:
    """Handlers as they stand in an endpoint."""

    async def bare(self, websocket, data): ...  # type: ignore[no-untyped-def]
    async def any(self, websocket: WebSocket, data: Any) -> None: ...
    async def object(self, websocket: WebSocket, data: object) -> None: ...
    async def dataclass(self, websocket: WebSocket, data: Message) -> None: ...
    async def struct(self, websocket: WebSocket, data: Struct) -> None: ...
    async def typed_dict(self, websocket: WebSocket, data: Dict) -> None: ...
    async def union(self, websocket: WebSocket, data: int | list[Message]) -> None: ...
    async def annotated(self, websocket: WebSocket, data: Annotated[int, msgspec.Meta(gt=0)]) -> None: ...
    async def model(self, websocket: WebSocket, data: Model) -> None: ...
    async def models(self, websocket: WebSocket, data: list[Model]) -> None: ...
    async def maybe_model(self, websocket: WebSocket, data: Model | None) -> None: ...
    async def nothing(self, websocket: WebSocket, data: None) -> None: ...
    async def star(self, *arguments: Message) -> None: ...
    async def named(self, websocket: WebSocket, data: Message, *, more: int = 0) -> None: ...

    def not_async(self, websocket: WebSocket, data: Message) -> None: ...
    async def too_few(self, data: Message) -> None: ...
    async def too_many(self, websocket: WebSocket, data: Message, more: int) -> None: ...
    async def hidden(self, websocket: WebSocket, data: Hidden) -> None: ...
    async def stranger(self, websocket: WebSocket, data: Stranger) -> None: ...
    async def unresolved(self, websocket: WebSocket, data: Unresolved) -> None: ...
    async def nonsense(self, websocket: WebSocket, data: 3) -> None: ...  # type: ignore[valid-type]


@pytest.mark.parametrize("handler", [Chat.bare, Chat.any, Chat.object])
def test_a_handler_without_an_annotation_or_with_any_takes_any_json(handler: Callable[..., Any]) -> None:
    assert message_decoder(handler, 2) is None


@pytest.mark.parametrize(
    ("handler", "raw", "value"),
    [
        (Chat.dataclass, '{"text":"hi","more":1}', Message("hi")),
        (Chat.struct, b'{"text":"hi"}', Struct("hi")),
        (Chat.typed_dict, '{"text":"hi"}', {"text": "hi"}),
        (Chat.union, "[]", []),
        (Chat.union, '[{"text":"hi"}]', [Message("hi")]),
        (Chat.annotated, "1", 1),
        (Chat.model, '{"text":"hi"}', Model(text="hi")),
        (Chat.model, b'{"text":"hi","tags":[1]}', Model(text="hi", tags=[1])),
        (Chat.models, '[{"text":"hi"}]', [Model(text="hi")]),
        (Chat.maybe_model, "null", None),
        (Chat.nothing, "null", None),
        (Chat.star, '{"text":"hi"}', Message("hi")),
        (Chat.named, '{"text":"hi"}', Message("hi")),
    ],
)
def test_a_message_is_decoded_into_the_annotation(handler: Callable[..., Any], raw: str | bytes, value: Any) -> None:
    decoder = message_decoder(handler, 2)
    assert decoder is not None
    assert decoder.decode(raw) == value


def test_only_the_annotation_of_the_message_is_resolved() -> None:
    with pytest.raises(NameError):
        typing.get_type_hints(Chat.dataclass)
    assert isinstance(message_decoder(Chat.dataclass, 2), Decoder)


def test_a_handler_behind_a_decorator_is_read_as_it_was_written() -> None:
    elsewhere: dict[str, Any] = {"Note": Message}
    exec("async def on_receive(self, websocket, data: 'Note'): ...", elsewhere)

    @functools.wraps(elsewhere["on_receive"])
    async def wrapper(*args: Any, **options: Any) -> None: ...

    decoder = message_decoder(wrapper, 2)
    assert decoder is not None
    assert decoder.type is Message


@pytest.mark.parametrize(
    ("handler", "sentence"),
    [
        (Chat.not_async, r"test_events\.Chat\.not_async is not async; write `async def not_async\(…\)`"),
        (Chat.too_few, r"Chat\.too_few is called with 3 arguments, self included: too many positional"),
        (Chat.too_many, r"Chat\.too_many is called with 3 arguments, self included: missing a required argument"),
        (Chat.hidden, r"Chat\.hidden: the annotation of `data` cannot be resolved: name 'Hidden' is not defined"),
        (Chat.stranger, r"Chat\.stranger: JSON cannot be decoded into .*Stranger is no dataclass, TypedDict, Struct"),
        (Chat.unresolved, r"Chat\.unresolved: JSON cannot be decoded into .*name 'Hidden' is not defined"),
        (Chat.nonsense, r"Chat\.nonsense: (JSON cannot be decoded into 3|the annotation of `data` cannot be resolved)"),
    ],
)
def test_a_handler_that_cannot_work_is_an_error_with_a_sentence_at_start(
    handler: Callable[..., Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        message_decoder(handler, 2)


@pytest.mark.parametrize(
    "annotation",
    [
        Stranger,
        list[Stranger],
        dict[str, Stranger],
        complex,
        type,
        Callable[[], int],
        "Message",
        Message | Struct,
        Envelope,
        Unresolved,
        3,
    ],
    ids=str,
)
def test_what_json_cannot_be_decoded_into_is_refused_however_deep_it_stands(annotation: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"app\.Chat: JSON cannot be decoded into "):
        decoder_for(annotation, "app.Chat")


def test_a_model_inside_a_dataclass_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigurationError, match="Model is a Pydantic model inside something else"):
        decoder_for(Envelope, "app.Chat")


@pytest.mark.parametrize(
    "annotation",
    [int, str, bytes, list[int], dict[str, float], Literal["a", "b"], datetime.datetime, Message | None],
    ids=str,
)
def test_what_json_has_a_form_for_is_decoded_without_pydantic(annotation: Any) -> None:
    assert isinstance(decoder_for(annotation, "app.Chat"), Decoder)


@pytest.mark.parametrize("annotation", [Model, list[Model], Model | None, Annotated[Model, 1], dict[str, list[Model]]])
def test_what_has_a_model_in_its_annotation_is_decoded_by_pydantic(annotation: Any) -> None:
    decoder = decoder_for(annotation, "app.Chat")
    assert isinstance(decoder, ModelDecoder)
    assert decoder.type == annotation


def test_bad_input_is_a_validation_error_of_msgspec_that_names_the_place() -> None:
    decoder = decoder_for(list[Message], "app.Chat")
    with pytest.raises(msgspec.ValidationError, match=r"Expected `str`, got `int` - at `\$\[0\]\.text`"):
        decoder.decode('[{"text":1}]')
    with pytest.raises(msgspec.DecodeError):
        decoder.decode("[")


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ("{}", "Field required - at `$.text`"),
        ('{"text":1}', "Input should be a valid string - at `$.text`"),
        ('{"text":"hi","tags":[1,2,30]}', "Input should be less than 10 - at `$.tags[2]`"),
        ('{"text":"rude"}', "Value error, be polite - at `$.text`"),
        ("[]", "Input should be an object - at `$`"),
        ('{"text":', "Invalid JSON: EOF while parsing a value at line 1 column 8 - at `$`"),
    ],
)
def test_bad_input_for_a_model_is_refused_with_the_first_complaint_in_the_same_form(raw: str, complaint: str) -> None:
    with pytest.raises(EventError) as caught:
        decoder_for(Model, "app.Chat").decode(raw)
    assert (caught.value.code, caught.value.message) == ("invalid", complaint)


def test_a_bug_in_a_validator_is_not_taken_for_bad_input() -> None:
    with pytest.raises(LookupError, match="a bug of the host"):
        decoder_for(Model, "app.Chat").decode('{"text":"crash"}')


@given(raw=st.text() | st.binary())
def test_any_input_makes_a_model_or_an_event_error(raw: str | bytes) -> None:
    decoder, codes = decoder_for(Model, "app.Chat"), list[str]()
    try:
        value = decoder.decode(raw)
    except EventError as error:
        codes.append(error.code)
    assert codes == ["invalid"] or isinstance(value, Model)


# Typed handlers of a class.


class Board:
    """Handlers as they stand in an endpoint."""

    @event("data")
    async def data(self, data: Message) -> None: ...

    @event("nothing")
    async def nothing(self) -> None: ...

    @event("group")
    async def group(self, group: str) -> None: ...

    @event("both", limit=RateLimit("5/second"), scopes=["admin"], concurrency=7, rerun=True)
    async def both(self, data: Model, group: str) -> None: ...

    @event("perhaps", limit=[RateLimit("5/second"), RateLimit("9/minute", per="user")])
    async def perhaps(self, data: Any, group: str | None = None, *, more: int = 0) -> None: ...

    @event("star")
    async def star(self, *arguments: int) -> None: ...

    async def no_handler(self, data: Message) -> None: ...


def test_a_handler_is_called_with_what_it_takes() -> None:
    handlers = handlers_of(Board)
    assert set(handlers) == {"data", "nothing", "group", "both", "perhaps", "star"}
    took = {name: (each.takes_data, each.takes_group, each.needs_group) for name, each in handlers.items()}
    assert took == {
        "data": (True, False, False),
        "nothing": (False, False, False),
        "group": (False, True, True),
        "both": (True, True, True),
        "perhaps": (True, True, False),
        "star": (True, False, False),
    }
    assert isinstance(handlers["data"].decoder, Decoder)
    assert isinstance(handlers["both"].decoder, ModelDecoder)
    assert handlers["star"].decoder is not None
    assert {name for name, each in handlers.items() if each.decoder is None} == {"nothing", "group", "perhaps"}


def test_the_terms_of_a_handler_are_those_of_its_declaration() -> None:
    handlers = handlers_of(Board)
    both, data = handlers["both"], handlers["data"]
    assert (both.scopes, both.concurrency, both.rerun) == (("admin",), 7, True)
    assert (data.scopes, data.concurrency, data.rerun, data.meter) == ((), 1, False, None)
    assert both.meter is not None
    assert both.meter is not handlers["perhaps"].meter
    assert both.function is Board.both


def test_an_override_keeps_the_declaration_and_may_give_another() -> None:
    class Quiet(Board):
        async def data(self, data: Struct) -> None: ...  # type: ignore[override]

        @event("loud")
        async def nothing(self) -> None: ...

    handlers = handlers_of(Quiet)
    assert handlers["data"].function is Quiet.data
    assert handlers["data"].decoder is not None
    assert handlers["data"].decoder.type is Struct
    assert "nothing" not in handlers
    assert handlers["loud"].function is Quiet.nothing


class Twice(Board):
    @event("data")
    async def again(self, data: Message) -> None: ...


class Late:
    @event("say")
    def say(self, data: Message) -> None: ...


class Many:
    @event("say")
    async def say(self, data: Message, more: int, group: str) -> None: ...


class Unknown:
    @event("say")
    async def say(self, data: Hidden) -> None: ...


class Odd:
    @event("say")
    async def say(self, data: Stranger) -> None: ...


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Twice, r"test_events\.Board\.data: .*\.Twice\.again handles 'data' already"),
        (Late, r"test_events\.Late\.say is not async; write `async def say\(…\)`"),
        (Many, r"Many\.say is called with data and group; nobody gives it `more`"),
        (Unknown, r"Unknown\.say: the annotation of `data` cannot be resolved"),
        (Odd, r"Odd\.say: JSON cannot be decoded into .*Stranger is no dataclass"),
    ],
)
def test_a_typed_handler_that_cannot_work_is_an_error_with_a_sentence(cls: type, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        handlers_of(cls)


class Selfless:
    @event("say")
    async def say() -> None: ...  # type: ignore[misc]


class GroupFirst:
    @event("say")
    async def say(self, group: str, data: Message) -> None: ...


class ByName:
    @event("say")
    async def say(self, *, data: Message) -> None: ...


class ByPlace:
    @event("say")
    async def say(self, data: Message, group: str, /) -> None: ...


class Named:
    @event("say")
    async def say(self, **data: Message) -> None: ...


@pytest.mark.parametrize("cls", [Selfless, GroupFirst, ByName, ByPlace, Named])
def test_a_handler_that_cannot_be_called_so_is_an_error_with_a_sentence_at_start(cls: type) -> None:
    with pytest.raises(ConfigurationError):
        handlers_of(cls)


@pytest.mark.parametrize(
    ("declare", "sentence"),
    [
        (lambda: event(""), "an event has a name of 1 to 255 printable characters"),
        (lambda: event("x" * 256), "an event has a name"),
        (lambda: event("a\nb"), "an event has a name"),
        (lambda: event(Board.data), r'write @event\("say"\)'),  # type: ignore[type-var]
        (lambda: event("say", scopes="admin"), r'scopes is a list: write scopes=\["admin"\]'),
        (lambda: event("say", concurrency=0), "concurrency is a whole number from 1 to 1000"),
        (lambda: event("say", concurrency=1001), "concurrency is a whole number"),
        (lambda: event("say", concurrency=1.5), "concurrency is a whole number"),  # type: ignore[arg-type]
        (lambda: event("say", limit=["5/second"]), r"limit= is a RateLimit"),  # type: ignore[list-item]
        (lambda: event("say", limit="5/second"), r'write limit=RateLimit\("5/second"\)'),  # type: ignore[arg-type]
    ],
)
def test_a_declaration_that_cannot_work_says_what_to_write(declare: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        declare()


def test_the_bounds_of_a_declaration_are_inside() -> None:
    assert callable(event("x" * 255, concurrency=1000))
    assert callable(event("x", concurrency=1))


# Whispers.


def test_whispers_are_read_once() -> None:
    declared = whispers_of(
        Board, {"typing": Whisper(bool, expires=1.5), "cursor": Whisper(Any, latest=False), "model": Whisper(Model)}
    )
    assert [(each.name, each.latest, each.expires_ms) for each in declared.values()] == [
        ("typing", True, 1500),
        ("cursor", False, None),
        ("model", True, None),
    ]
    assert declared["cursor"].decoder is None
    assert isinstance(declared["typing"].decoder, Decoder)
    assert isinstance(declared["model"].decoder, ModelDecoder)
    assert whispers_of(Board, {}) == {}


@pytest.mark.parametrize(
    ("declare", "sentence"),
    [
        (lambda: Whisper(bool, limit="5/second"), r"Whisper: limit= is a RateLimit: write limit=RateLimit"),  # type: ignore[arg-type]
        (lambda: Whisper(bool, expires=0), "Whisper: expires= is a number of seconds, greater than zero"),
        (lambda: Whisper(bool, expires=float("nan")), "Whisper: expires="),
        (lambda: whispers_of(Board, ["typing"]), r'Board\.whispers: write whispers = {"typing": Whisper'),  # type: ignore[arg-type]
        (lambda: whispers_of(Board, {"typing": bool}), r"Board\.whispers: write"),  # type: ignore[dict-item]
        (lambda: whispers_of(Board, {"a": Whisper(Stranger)}), r"whispers\['a'\]: JSON cannot be decoded into"),
    ],
)
def test_a_whisper_that_cannot_work_says_what_to_write(declare: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        declare()


# The other spelling.


def test_bad_input_in_messagepack_is_refused_as_in_json() -> None:
    model, plain = decoder_for(Model, "app.Chat"), decoder_for(Message, "app.Chat")
    good = msgspec.msgpack.encode({"text": "hi", "tags": [1]})
    assert model.decode_msgpack(good) == Model(text="hi", tags=[1])
    assert plain.decode_msgpack(good) == Message("hi")
    bad = msgspec.msgpack.encode({"text": "hi", "tags": [30]})
    with pytest.raises(EventError, match=r"Input should be less than 10 - at `\$\.tags\[0\]`"):
        model.decode_msgpack(bad)
    with pytest.raises(msgspec.ValidationError, match=r"at `\$\.text`"):
        plain.decode_msgpack(msgspec.msgpack.encode({"text": 1}))
    for decoder in (model, plain):
        with pytest.raises(msgspec.DecodeError):
            decoder.decode_msgpack(b"\xc1")


def test_a_model_reads_the_raw_data_of_a_frame() -> None:
    decoder = decoder_for(Model, "app.Chat")
    assert decoder.decode(msgspec.Raw(b'{"text":"hi"}')) == Model(text="hi")
    assert decoder.decode_msgpack(msgspec.Raw(msgspec.msgpack.encode({"text": "hi"}))) == Model(text="hi")


def test_a_typed_handler_with_a_websocket_or_without_self_is_told_what_to_write() -> None:
    class Sockets:
        @event("say")
        async def say(self, websocket: Any, data: Any) -> None: ...

    class Selves:
        @event("say")
        async def say(data: Any, group: str) -> None: ...  # type: ignore[misc]

    with pytest.raises(ConfigurationError, match=r"gets no websocket; write `\(self, data\)`"):
        handlers_of(Sockets)
    with pytest.raises(ConfigurationError, match=r"has no `self`; write `async def say\(self, …\)`"):
        handlers_of(Selves)
