"""What a client may say, and who takes it: the handlers of a class by the name of their event, and their types.

The law of this file: annotations are resolved once, early, and a bad one is an error with a sentence at
start, never a surprise at the first message. It knows no connection and calls no handler.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

import msgspec

from .exceptions import ConfigurationError, EventError
from .limits import Meter, RateLimit

UNTYPED = (inspect.Parameter.empty, Any, object)
DECLARED = "__rt_event__"  # the attribute of a function that `event` has marked
MURMURS = RateLimit("20/second")  # of one connection and one whisper, unless it is declared with a limit

F = TypeVar("F", bound=Callable[..., Any])


class Decoder:
    """Decodes what a client said into one type and validates it on the way."""

    def __init__(self, type_: Any) -> None:
        self.type = type_
        self._json = msgspec.json.Decoder(type_)
        self._msgpack = msgspec.msgpack.Decoder(type_)

    def decode(self, raw: Any) -> Any:
        """Return the value of JSON; raises `msgspec.ValidationError` or `msgspec.DecodeError`."""
        return self._json.decode(raw)

    def decode_msgpack(self, raw: Any) -> Any:
        """Return the value of MessagePack; raises as `decode` does."""
        return self._msgpack.decode(raw)


class ModelDecoder:
    """The same for a Pydantic model, a list of such, a union with such."""

    def __init__(self, type_: Any) -> None:
        from pydantic import TypeAdapter, ValidationError

        self.type = type_
        adapter = TypeAdapter(type_)
        self._validate_json, self._validate = adapter.validate_json, adapter.validate_python
        self._invalid = ValidationError

    def decode(self, raw: Any) -> Any:
        """Return the value of JSON; raises `EventError` ``invalid`` naming the first field that is wrong."""
        return self._checked(self._validate_json, bytes(raw) if isinstance(raw, msgspec.Raw) else raw)

    def decode_msgpack(self, raw: Any) -> Any:
        """Return the value of MessagePack; raises as `decode` does, and `msgspec.DecodeError`."""
        return self._checked(self._validate, msgspec.msgpack.decode(raw))

    def _checked(self, validate: Callable[[Any], Any], value: Any) -> Any:
        try:
            return validate(value)
        except self._invalid as error:
            raise EventError("invalid", first_complaint(error)) from None


@dataclass(frozen=True, slots=True)
class EventOptions:
    """What `event` was told."""

    name: str
    limits: tuple[RateLimit, ...]
    scopes: tuple[str, ...]
    concurrency: int
    rerun: bool


@dataclass(frozen=True, slots=True)
class Handler:
    """One typed handler of a class: what it is called with, and on which terms."""

    name: str
    function: Callable[..., Any]
    decoder: Decoder | ModelDecoder | None = None
    takes_data: bool = True
    takes_group: bool = False
    needs_group: bool = False
    meter: Meter | None = None
    scopes: tuple[str, ...] = ()
    concurrency: int = 1
    rerun: bool = False


@dataclass(frozen=True, slots=True)
class Whisper:
    """A name under which clients of a group may say something ephemeral to each other: typing, cursors.

    ``type`` is what its data must be. ``limit`` is how often one connection may (20 a second if not given);
    what is more is dropped. With ``latest``, of those that wait for a slow peer only the last of each sender is
    kept. After ``expires`` seconds one is over: it is not delivered any more, and those who have it forget it.
    Raises `ConfigurationError` for what cannot work.
    """

    type: Any
    _: KW_ONLY
    limit: RateLimit | None = None
    latest: bool = True
    expires: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not isinstance(self.limit, RateLimit):
            raise ConfigurationError('Whisper: limit= is a RateLimit: write limit=RateLimit("5/second")')
        if self.expires is not None and not self.expires > 0:
            raise ConfigurationError("Whisper: expires= is a number of seconds, greater than zero")


@dataclass(frozen=True, slots=True)
class DeclaredWhisper:
    """A whisper of one class, ready for use."""

    name: str
    decoder: Decoder | ModelDecoder | None
    meter: Meter
    latest: bool
    expires_ms: int | None


def event(
    name: str,
    *,
    limit: RateLimit | Iterable[RateLimit] | None = None,
    scopes: Iterable[str] = (),
    concurrency: int = 1,
    rerun: bool = False,
) -> Callable[[F], F]:
    """Declare a method of a `RealtimeEndpoint` as the handler of the event ``name``.

    It is called as ``handler(self, data)``, with ``group`` if it has a parameter of that name (the client is in
    that group). ``data`` is decoded and validated by its annotation, and what the method returns is the
    acknowledgement. ``limit`` is one or several `RateLimit`, ``scopes`` are what the user must have.
    Handlers of one connection run one after the other; ``concurrency`` lets so many of this one run beside them.
    An event that was begun and whose end nobody knows is not run again when the client repeats it, unless
    ``rerun``. Raises `ConfigurationError` for what cannot work.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 255 or not name.isprintable():
        raise ConfigurationError('an event has a name of 1 to 255 printable characters: write @event("say")')
    if isinstance(scopes, str):
        raise ConfigurationError(f'event({name!r}): scopes is a list: write scopes=["{scopes}"]')
    if not isinstance(concurrency, int) or not 1 <= concurrency <= 1000:
        raise ConfigurationError(f"event({name!r}): concurrency is a whole number from 1 to 1000")
    limits = () if limit is None else (limit,) if isinstance(limit, RateLimit) else tuple(limit)
    if not all(isinstance(each, RateLimit) for each in limits):
        raise ConfigurationError(f'event({name!r}): limit= is a RateLimit: write limit=RateLimit("5/second")')

    def declare(function: F) -> F:
        setattr(function, DECLARED, EventOptions(name, limits, tuple(scopes), concurrency, rerun))
        return function

    return declare


def handlers_of(cls: type) -> dict[str, Handler]:
    """Return the typed handlers of ``cls`` and its bases by event; an override keeps the declaration.

    Raises `ConfigurationError` for a handler that cannot work and for two of one name.
    """
    found: dict[str, Handler] = {}
    for attribute in dir(cls):
        declared = (vars(base).get(attribute) for base in cls.__mro__)
        options = next((getattr(each, DECLARED) for each in declared if hasattr(each, DECLARED)), None)
        if options is None:
            continue
        handler = handler_of(getattr(cls, attribute), options, cls)
        if options.name in found:
            other = full_name(found[options.name].function)
            raise ConfigurationError(f"{full_name(handler.function)}: {other} handles {options.name!r} already")
        found[options.name] = handler
    return found


def handler_of(function: Callable[..., Any], options: EventOptions, cls: type) -> Handler:
    """Return what calls ``function`` for an event."""
    name = full_name(function)
    if not inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"{name} is not async; write `async def {function.__name__}(…)`")
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    if any(each.name == "websocket" for each in parameters):
        raise ConfigurationError(
            f"{name}: a typed handler gets no websocket; write `(self, data)` or `(self, data, group)`"
        )
    if next(iter(signature.parameters), None) in ("data", "group"):
        raise ConfigurationError(f"{name} has no `self`; write `async def {function.__name__}(self, …)`")
    group = next((each for each in parameters if each.name == "group"), None)
    others = [each for each in parameters if each is not group]
    if required := [each for each in others[1:] if each.default is each.empty and each.kind is not each.VAR_KEYWORD]:
        raise ConfigurationError(f"{name} is called with data and group; nobody gives it `{required[0].name}`")
    try:
        signature.bind("self", *["data"][: len(others)], **({} if group is None else {"group": "group"}))
    except TypeError as error:
        words = f"{name} is called as `{function.__name__}(self, data, group=…)`, with what of these it has"
        raise ConfigurationError(f"{words}: {error}") from error
    annotation = resolved(others[0], function, name) if others else Any
    return Handler(
        options.name,
        function,
        None if annotation in UNTYPED else decoder_for(annotation, name),
        takes_data=bool(others),
        takes_group=group is not None,
        needs_group=group is not None and group.default is inspect.Parameter.empty,
        meter=Meter(f"{cls.__module__}.{cls.__qualname__}:{options.name}", options.limits) if options.limits else None,
        scopes=options.scopes,
        concurrency=options.concurrency,
        rerun=options.rerun,
    )


def whispers_of(cls: type, declared: Mapping[str, Whisper]) -> dict[str, DeclaredWhisper]:
    """Return the whispers of ``cls``. Raises `ConfigurationError` for what cannot work."""
    name = f"{cls.__module__}.{cls.__qualname__}"
    if not isinstance(declared, Mapping) or not all(isinstance(each, Whisper) for each in declared.values()):
        raise ConfigurationError(f'{name}.whispers: write whispers = {{"typing": Whisper(bool, expires=5)}}')
    return {
        event: DeclaredWhisper(
            event,
            None if each.type in UNTYPED else decoder_for(each.type, f"{name}.whispers[{event!r}]"),
            Meter(f"{name}:~{event}", (each.limit or MURMURS,)),
            each.latest,
            None if each.expires is None else round(each.expires * 1000),
        )
        for event, each in declared.items()
    }


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
