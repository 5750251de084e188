"""What a handler takes: the type of its message, read from its annotation when the class is made.

The law of this file: annotations are resolved once, early, and a bad one is an error with a sentence at
start, never a surprise at the first message. It knows no connection and calls no handler.
"""

from __future__ import annotations

import inspect
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
    """The same for a Pydantic model."""

    def __init__(self, model: Any) -> None:
        self.type = model

    def decode(self, raw: str | bytes) -> Any:
        """Return the model; raises `EventError` ``invalid`` naming the first field that is wrong."""
        try:
            return self.type.model_validate_json(raw)
        except ValueError as error:
            raise EventError("invalid", first_complaint(error)) from None


def first_complaint(error: Any) -> str:
    """Return the first error of a Pydantic validation with its place, in msgspec's form."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return f"{first['msg']} - at `${place}`"


def message_decoder(handler: Callable[..., Any], parameter: int) -> Decoder | ModelDecoder | None:
    """Return what decodes the message that ``handler`` takes as its ``parameter``-th, ``None`` if it takes any JSON.

    Raises `ConfigurationError` for a handler that is not ``async``, an annotation that cannot be resolved
    or one that JSON cannot be decoded into.
    """
    name = f"{handler.__module__}.{handler.__qualname__}"
    if not inspect.iscoroutinefunction(handler):
        raise ConfigurationError(f"{name} is not async; write `async def {handler.__name__}(…)`")
    parameters = list(inspect.signature(handler).parameters.values())
    if parameter >= len(parameters) or parameters[parameter].annotation in UNTYPED:
        return None
    wanted = parameters[parameter].name
    try:
        annotation = typing.get_type_hints(handler, include_extras=True)[wanted]
    except Exception as error:
        raise ConfigurationError(f"{name}: the annotation of `{wanted}` cannot be resolved: {error}") from error
    return None if annotation in UNTYPED else decoder_for(annotation, name)


def decoder_for(annotation: Any, name: str) -> Decoder | ModelDecoder:
    """Return the decoder of one type."""
    if hasattr(annotation, "model_validate_json"):
        return ModelDecoder(annotation)
    try:
        return Decoder(annotation)
    except TypeError as error:
        raise ConfigurationError(f"{name}: JSON cannot be decoded into {annotation!r}: {error}") from error
