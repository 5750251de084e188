"""What a handler takes: the type of its message, read from its annotation when the class is made.

The law of this file: annotations are resolved once, early, and a bad one is an error with a sentence at
start, never a surprise at the first message. It knows no connection and calls no handler.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import msgspec

from .exceptions import ConfigurationError, EventError

UNTYPED = (inspect.Parameter.empty, Any, object)


class Decoder:
    """Decodes JSON into one type and validates it on the way."""

    def __init__(self, type_: Any) -> None:
        self.type = type_
        self._decoder = msgspec.json.Decoder(type_)

    def decode(self, raw: str | bytes) -> Any:
        """Return the value; raises `msgspec.ValidationError` or `msgspec.DecodeError`."""
        return self._decoder.decode(raw)


class ModelDecoder:
    """The same for a Pydantic model, a list of such, a union with such."""

    def __init__(self, type_: Any) -> None:
        from pydantic import TypeAdapter, ValidationError

        self.type = type_
        self._validate = TypeAdapter(type_).validate_json
        self._invalid = ValidationError

    def decode(self, raw: str | bytes) -> Any:
        """Return the value; raises `EventError` ``invalid`` naming the first field that is wrong."""
        try:
            return self._validate(raw)
        except self._invalid as error:
            raise EventError("invalid", first_complaint(error)) from None


def first_complaint(error: Any) -> str:
    """Return the first error of a Pydantic validation with its place, in msgspec's form."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return f"{first['msg']} - at `${place}`"


def check_handler(handler: Callable[..., Any], parameter: int) -> inspect.Parameter:
    """Return the last parameter that ``handler`` is called with, the ``parameter``-th from 0 with ``self``.

    Raises `ConfigurationError` for a handler that is not ``async`` or cannot be called so.
    """
    name = full_name(handler)
    if not inspect.iscoroutinefunction(handler):
        raise ConfigurationError(f"{name} is not async; write `async def {handler.__name__}(…)`")
    signature = inspect.signature(handler)
    try:
        signature.bind(*range(parameter + 1))
    except TypeError as error:
        raise ConfigurationError(f"{name} is called with {parameter + 1} arguments, self included: {error}") from error
    parameters = list(signature.parameters.values())
    return parameters[min(parameter, len(parameters) - 1)]  # the last one may be `*arguments`


def message_decoder(handler: Callable[..., Any], parameter: int) -> Decoder | ModelDecoder | None:
    """Return what decodes the message that ``handler`` takes as its ``parameter``-th, ``None`` if it takes any JSON.

    Raises `ConfigurationError` as `check_handler` does, for an annotation that cannot be resolved and for one
    that JSON cannot be decoded into. No other annotation is looked at: they may be imported under
    ``TYPE_CHECKING``.
    """
    name = full_name(handler)
    annotation = resolved(check_handler(handler, parameter), handler, name)
    return None if annotation in UNTYPED else decoder_for(annotation, name)


def full_name(handler: Callable[..., Any]) -> str:
    """Return how a complaint names a handler."""
    return f"{handler.__module__}.{handler.__qualname__}"


def resolved(parameter: inspect.Parameter, handler: Callable[..., Any], name: str) -> Any:
    """Return the annotation of one parameter, read from its text where it is one."""
    alone = types.SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    names = getattr(inspect.unwrap(handler), "__globals__", {})
    try:
        return typing.get_type_hints(alone, names, include_extras=True)[parameter.name]
    except Exception as error:
        place = f"{name}: the annotation of `{parameter.name}`"
        raise ConfigurationError(f"{place} cannot be resolved: {error}") from error


def decoder_for(annotation: Any, name: str) -> Decoder | ModelDecoder:
    """Return the decoder of one type."""
    try:
        if is_model(annotation):
            return ModelDecoder(annotation)
        msgspec.json.schema(annotation, schema_hook=foreign)  # a decoder alone would complain at the first message
        return Decoder(annotation)
    except Exception as error:
        raise ConfigurationError(f"{name}: JSON cannot be decoded into {annotation!r}: {error}") from error


def is_model(annotation: Any) -> bool:
    """Whether a Pydantic model is part of the annotation itself."""
    return hasattr(annotation, "model_validate_json") or any(map(is_model, typing.get_args(annotation)))


def foreign(type_: type) -> typing.NoReturn:
    """Refuse a class that msgspec knows nothing of."""
    words = "a Pydantic model inside something else" if is_model(type_) else "no dataclass, TypedDict, Struct or model"
    raise TypeError(f"{type_.__qualname__} is {words}")
