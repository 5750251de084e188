"""Who someone is, as a value.

The law of this file: an identity is plain, immutable and small, because every connection holds one. It knows
nothing of tokens, sockets or requests; whoever verified something builds an `Identity` from what was found.
An identity is also a name in other places (the group `~<identity>`, keys, logs), so what could be mistaken
there is refused here. A guest is an identity too, and the only one that begins with `guest:`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, NoReturn, final
from uuid import UUID

from starlette.authentication import AuthCredentials, BaseUser

from .exceptions import ConfigurationError

MAX_LENGTH = 255
"""The most characters an identity may have."""

_GUEST = "guest:"
_RESERVED = (_GUEST, "~")
# Control characters and line separators forge log lines; lone surrogates cannot be encoded for any wire.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@final
class Identity(BaseUser):
    """A person or a service that has proved who it is; a Starlette ``BaseUser``.

    ``identity`` is the stable name (at most 255 characters, no control characters, not beginning with
    ``guest:`` or ``~``); ``display_name`` is what others see, the identity itself if not given; ``scopes``
    are what it may do; ``claims`` is whatever else its issuer said, read-only at its top level.

    Verifiers also set ``expires_at`` (wall-clock seconds since the epoch after which a connection of this
    identity ends, ``None`` for never) and ``token_id`` (the name of the very token, for single use and
    revocation). Those two describe the token and not the person, so equality leaves them out.

    Raises ``ValueError`` that names what is wrong.
    """

    __slots__ = ("_claims", "_display_name", "_expires_at", "_identity", "_original", "_scopes", "_token_id")

    _claims: Mapping[str, Any]
    _display_name: str
    _expires_at: float | None
    _identity: str
    _original: Any
    _scopes: tuple[str, ...]
    _token_id: str | None

    def __init__(
        self,
        identity: str,
        *,
        display_name: str | None = None,
        scopes: Iterable[str] = (),
        claims: Mapping[str, Any] | None = None,
        expires_at: float | None = None,
        token_id: str | None = None,
    ) -> None:
        put = _writer(self)
        put("_identity", _checked(identity))
        put("_display_name", _text("display_name", display_name) or identity)
        put("_scopes", _checked_scopes(scopes))
        put("_claims", MappingProxyType(dict(claims)) if claims else _NOTHING)
        put("_expires_at", _checked_time(expires_at))
        put("_token_id", _text("token_id", token_id))
        put("_original", None)

    @property
    def is_authenticated(self) -> bool:
        """True for everybody but a guest."""
        return not self._identity.startswith(_GUEST)

    @property
    def identity(self) -> str:
        """The stable name."""
        return self._identity

    @property
    def display_name(self) -> str:
        """The name to show to people."""
        return self._display_name

    @property
    def scopes(self) -> tuple[str, ...]:
        """What this identity may do, as its issuer said."""
        return self._scopes

    @property
    def claims(self) -> Mapping[str, Any]:
        """Whatever else the issuer said; read-only."""
        return self._claims

    @property
    def expires_at(self) -> float | None:
        """Wall-clock seconds after which this proof is worth nothing; ``None``: never."""
        return self._expires_at

    @property
    def token_id(self) -> str | None:
        """The name of the token this came from, if it had one."""
        return self._token_id

    @property
    def original(self) -> Any:
        """The host's own user object where ``wrap`` made this; otherwise this identity itself."""
        return self if self._original is None else self._original

    def with_token(self, *, expires_at: float | None, token_id: str | None) -> Identity:
        """Return the same identity as proved by another token; for verifiers."""
        twin = object.__new__(Identity)
        put = _writer(twin)
        for name in Identity.__slots__:
            put(name, getattr(self, name))
        put("_expires_at", _checked_time(expires_at))
        put("_token_id", _text("token_id", token_id))
        return twin

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"an Identity does not change; build a new one to set {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an Identity does not change; {name!r} stays")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return NotImplemented
        return self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._identity)  # claims need not be hashable

    def __repr__(self) -> str:
        shown = [repr(self._identity)]
        if self._display_name != self._identity:
            shown.append(f"display_name={self._display_name!r}")
        if self._scopes:
            shown.append(f"scopes={self._scopes!r}")
        return f"Identity({', '.join(shown)})"  # no claims and no token: a repr ends in logs

    def _value(self) -> tuple[object, ...]:
        return self._identity, self._display_name, self._scopes, self._claims


def guest(session: str) -> Identity:
    """Return the guest of ``session``: not authenticated, the same on every reconnect.

    The name is ``guest:`` and a digest, because names are seen by others and the session is a secret: who
    knew it could come as this guest.
    """
    user = Identity("guest", display_name="guest")
    _writer(user)(
        "_identity", _GUEST + blake2b(session.encode(), digest_size=12).hexdigest()
    )  # the one name that the constructor refuses to everybody else
    return user


def wrap(user: BaseUser, *, scopes: Iterable[str] = ()) -> Identity | None:
    """Return the host's own ``user`` as an `Identity`, ``None`` if it is not authenticated.

    An `Identity` passes through. A foreign user is known by its ``identity`` or, where it has none (Starlette's
    default raises ``NotImplementedError``), by its ``display_name``; integers and UUIDs are written out.
    ``scopes`` are those of the host's ``AuthCredentials``. The foreign object stays at ``.original``.

    Raises ``ConfigurationError`` for a user that cannot be told from others.
    """
    if isinstance(user, Identity):
        return user
    authenticated = _attribute(user, "is_authenticated")
    if not isinstance(authenticated, bool):  # a method would be true for everybody
        raise ConfigurationError(f"{type(user).__name__}.is_authenticated must be a property that gives a bool")
    return _wrapped(user, scopes) if authenticated else None


def credentials(identity: Identity) -> AuthCredentials:
    """Return what Starlette's ``requires()`` reads: the scopes, and ``authenticated`` for all but guests."""
    authenticated = ["authenticated"] if identity.is_authenticated else []
    return AuthCredentials(list(dict.fromkeys([*authenticated, *identity.scopes])))


def _wrapped(user: BaseUser, scopes: Iterable[str]) -> Identity:
    kind = type(user).__name__
    shown = _attribute(user, "display_name")
    name = _name(_attribute(user, "identity")) or _name(shown)
    if not name:
        raise ConfigurationError(f"{kind} has neither identity nor display_name: give it a property 'identity'")
    try:
        wrapper = Identity(name, display_name=shown if isinstance(shown, str) else None, scopes=scopes)
    except ValueError as error:
        raise ConfigurationError(f"{kind} cannot be used: {error}") from None
    _writer(wrapper)("_original", user)
    return wrapper


def _attribute(user: BaseUser, name: str) -> object:
    try:
        return getattr(user, name, None)
    except NotImplementedError:
        return None


def _name(value: object) -> str:
    return str(value) if isinstance(value, (str, int, UUID)) else ""


def _writer(identity: Identity) -> Any:
    return object.__setattr__.__get__(identity)


def _checked(identity: str) -> str:
    if not isinstance(identity, str) or not identity:
        raise ValueError("identity must be a string that is not empty")
    if len(identity) > MAX_LENGTH:
        raise ValueError(f"identity has {len(identity)} characters; {MAX_LENGTH} are the most")
    if _UNPRINTABLE.search(identity):
        raise ValueError("identity must not contain control characters")
    if identity.startswith(_RESERVED):
        raise ValueError("identity must not begin with 'guest:' or '~'; these are reserved")
    return identity


def _text(name: str, value: str | None) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a string or None")
    return value


def _checked_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    found = tuple(scopes)
    if isinstance(scopes, str) or not all(isinstance(scope, str) for scope in found):  # a str becomes its letters
        raise ValueError("scopes must be a list of strings, as in scopes=['admin']")
    return found


def _checked_time(expires_at: float | None) -> float | None:
    if expires_at is not None and not math.isfinite(expires_at):  # NaN would never expire
        raise ValueError("expires_at must be a finite number of seconds since the epoch, or None")
    return expires_at
