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

from starlette_rt.events import Decoder, ModelDecoder, decoder_for, message_decoder
from starlette_rt.exceptions import ConfigurationError, EventError

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
