"""Turning a token into an `Identity`, and back.

The law of this file: signing and verifying are pure; nothing here opens a connection or remembers anything. Who
carries a token to us is `admission`'s business, and that a ticket is used only once is the ledger's. Every way in
which a token can be wrong is a `TokenError`, whose text never repeats any of the token; every way in which the
host can be wrong is a `ConfigurationError` at construction.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from itsdangerous import BadData, URLSafeSerializer
from itsdangerous.encoding import base64_decode, base64_encode
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, BaseUser
from starlette.requests import HTTPConnection

from .exceptions import ConfigurationError, TokenError, Unavailable
from .identity import Identity, credentials, wrap

MIN_KEY_SIZE = 32
"""Bytes; a shorter key could be found by trying (RFC 7518 §3.2 asks the same of HS256)."""

MAX_TOKEN_LENGTH = 7_000
"""Characters; servers take header lines up to 8 KiB, and a token shares its line with other subprotocols."""

MAX_TICKET_TTL = 300
"""Seconds; whoever keeps tickets to a single use may forget a ``token_id`` this long after its use."""

_TOKEN = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_TOKEN_LENGTH}}}")
_NEW_KEY = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'


class Verifier(Protocol):
    """Whatever knows who a token belongs to: `TokenSigner`, `JWTVerifier` or a class of the host's own."""

    def verify(self, token: str) -> Identity | Awaitable[Identity]:
        """Return the identity, or an awaitable of it. Raises ``TokenError`` for a token that is not good."""
        ...


async def resolve(tokens: Verifier, token: str) -> Identity:
    """Return what ``tokens.verify(token)`` finds, awaited where it is asynchronous.

    Raises ``TokenError``, and ``ConfigurationError`` if the verifier answers with anything but an `Identity`:
    a ``None`` taken for "nobody" would turn a bad token into a guest.
    """
    found: object = tokens.verify(token)
    if inspect.isawaitable(found):
        found = await found
    if not isinstance(found, Identity):
        raise ConfigurationError(
            f"{type(tokens).__name__}.verify() gave {type(found).__name__}; return an Identity or raise TokenError"
        )
    return found


class TokenSigner:
    """Signs and verifies tokens of our own: HMAC with SHA-256, through itsdangerous.

    ``keys`` go from oldest to newest, each at least 32 bytes: the last one signs, all of them verify, so a key is
    rotated by appending a new one and dropping the old one when its last token has expired. ``salt`` keeps apart
    what is signed with the same keys for other purposes. ``now`` gives wall-clock seconds.

    A token holds the identity, its display name, scopes and claims, the second it expires and an id of its own.
    It is signed, not encrypted: its bearer can read it. It consists of letters, digits, ``-``, ``_`` and ``.``, so
    it can travel as a WebSocket subprotocol and in a URL. There is exactly one spelling of each token.

    Raises ``ConfigurationError`` for keys that cannot be used.
    """

    def __init__(
        self,
        keys: Sequence[str | bytes],
        *,
        salt: str = "starlette_rt.token",
        now: Callable[[], float] = time.time,
    ) -> None:
        secret = _checked_keys(keys)
        self._now = now
        self._tokens = _serializer(secret, salt)
        self._tickets = _serializer(secret, f"{salt}.ticket")

    def sign(self, identity: BaseUser, *, ttl: float = 3600) -> str:
        """Return a token that proves ``identity`` for ``ttl`` seconds.

        A foreign ``BaseUser`` is wrapped first. Raises ``ValueError`` for a guest, for a ``ttl`` that is not
        positive and for claims that make the token longer than a header carries; ``TypeError`` for claims that
        are no JSON.
        """
        user = _signable(identity)
        return _sealed(self._tokens, user, {"e": self._deadline(ttl, math.inf)})

    def verify(self, token: str) -> Identity:
        """Return whom ``token`` proves. Raises ``TokenError``; ``expired`` is true if only its age is wrong."""
        return _opened(self._tokens, token, self._now(), lasts="e")

    def ticket(self, identity: BaseUser, *, ttl: float = 30) -> str:
        """Return a ticket for one handshake within ``ttl`` seconds (at most 300), made to travel in a URL.

        A ticket is no token and a token is no ticket. What comes in by it lives as long as ``identity`` itself:
        until its ``expires_at``, not until the end of the ticket. Raises as ``sign`` does.
        """
        user = _signable(identity)
        payload: dict[str, Any] = {"e": self._deadline(ttl, MAX_TICKET_TTL)}
        if user.expires_at is not None:
            payload["u"] = user.expires_at
        return _sealed(self._tickets, user, payload)

    def verify_ticket(self, ticket: str) -> Identity:
        """Return whom ``ticket`` lets in; claiming its ``token_id``, once, is the caller's. Raises ``TokenError``."""
        return _opened(self._tickets, ticket, self._now(), lasts="u")

    def _deadline(self, ttl: float, most: float) -> float:
        if not 0 < ttl <= most or math.isinf(ttl):
            raise ValueError(f"ttl must be a positive number of seconds{'' if math.isinf(most) else f' up to {most}'}")
        return round(self._now() + ttl, 3)


class JWTVerifier:
    """Verifies the JSON Web Tokens of another issuer, through PyJWT (``pip install "starlette-rt[jwt]"``).

    ``key`` is a secret (HS*) or a public key in PEM (RS*, PS*, ES*, EdDSA), a mapping from the token's ``kid`` to
    such a key, or a callable ``kid -> key`` (``kid`` is ``None`` where the token names none; the answer to an
    unknown one is ``None`` or ``LookupError``). ``algorithms`` are those that the issuer uses; symmetric and
    asymmetric ones cannot be mixed, since that lets anybody sign with the public key. ``leeway`` is in seconds.

    A token must have ``exp``, and ``aud`` and ``iss`` where ``audience`` and ``issuer`` are given. ``identity`` is
    the claim that names its bearer, or a callable ``claims -> Identity``. Scopes are read from ``scope`` (words)
    or ``scopes`` (a list), the display name from ``name``.

    Raises ``ConfigurationError`` for keys and algorithms that cannot be used together.
    """

    def __init__(
        self,
        key: Any,
        *,
        algorithms: Sequence[str],
        audience: str | Sequence[str] | None = None,
        issuer: str | Sequence[str] | None = None,
        leeway: float = 0.0,
        identity: str | Callable[[Mapping[str, Any]], Identity] = "sub",
    ) -> None:
        self._jwt = _pyjwt()
        self._algorithms = _checked_algorithms(algorithms, self._jwt)
        self._find = self._lookup(key)
        self._leeway = leeway
        self._identify = identity if callable(identity) else lambda claims: _identity_of(claims, identity)
        required = ["exp"] if callable(identity) else ["exp", identity]
        self._demands = {
            "audience": audience,
            "issuer": issuer,
            "leeway": leeway,
            "options": {"require": required},
        }

    def verify(self, token: str) -> Identity:
        """Return whom ``token`` proves, until its ``exp`` plus the leeway.

        Raises ``TokenError``; ``Unavailable`` if a ``PyJWKClient`` behind ``key`` cannot reach its server.
        """
        claims = self._claims(token)
        try:
            expires_at = float(int(claims["exp"])) + self._leeway  # int() as PyJWT reads it
            user = self._identify(claims)
        except (LookupError, ValueError, OverflowError):
            raise TokenError("the claims of the token do not name an identity") from None
        jti = claims.get("jti")
        return user.with_token(expires_at=expires_at, token_id=jti if isinstance(jti, str) else None)

    def _claims(self, token: str) -> Mapping[str, Any]:
        header = self._checked(self._jwt.get_unverified_header, token)
        key = self._key(header.get("kid"))
        claims: Mapping[str, Any] = self._checked(
            self._jwt.decode, token, key, algorithms=self._algorithms, **self._demands
        )
        return claims

    def _checked(self, step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        # Beside its own errors PyJWT lets through: text that is no UTF-8 (ValueError), an algorithm of another
        # family than the key's (TypeError), and, in its older versions, JSON nested too deeply.
        try:
            return step(*args, **options)
        except (self._jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise _refused(error, self._jwt) from None

    def _key(self, kid: str | None) -> Any:
        try:
            return self._find(kid)
        except self._jwt.PyJWKClientConnectionError:
            raise Unavailable("the keys that verify tokens cannot be fetched") from None
        except (LookupError, self._jwt.PyJWTError):
            raise TokenError("the token was signed with a key that is not known here") from None

    def _lookup(self, key: Any) -> Callable[[str | None], Any]:
        if callable(key):
            return lambda kid: self._prepared(_existing(key(kid)))
        if isinstance(key, Mapping):
            return {kid: self._prepared(one) for kid, one in key.items()}.__getitem__
        prepared = self._prepared(key)
        return lambda kid: prepared

    def _prepared(self, key: Any) -> Any:
        key = key.key if isinstance(key, self._jwt.PyJWK) else key
        if self._algorithms[0] in _SYMMETRIC:
            return _checked_secret(key)
        return _public(key, self._algorithms, self._jwt)


class TokenBackend(AuthenticationBackend):
    """The same verifier for plain HTTP: ``Middleware(AuthenticationMiddleware, backend=TokenBackend(tokens))``.

    Reads ``Authorization: Bearer``. Without that header, or with another scheme, the request is nobody's; with a
    token that is not good it is refused (``AuthenticationError``), never let through as nobody's.
    """

    def __init__(self, tokens: Verifier) -> None:
        self.tokens = tokens

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        """Return the credentials and the identity of the request, ``None`` if it has no bearer token."""
        scheme, _, token = conn.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        try:
            identity = await resolve(self.tokens, token.strip())
        except TokenError as error:
            raise AuthenticationError(str(error)) from None
        return credentials(identity), identity


# TokenSigner: one letter per field, since every byte travels with every handshake. Fields that are empty are left
# out, unknown ones are ignored. e expiry, t token id, i identity, n display name, s scopes, c claims, u until.


def _serializer(keys: list[bytes], salt: str) -> URLSafeSerializer:
    # itsdangerous' own defaults are SHA-1 and a key derived by concatenation.
    signer = {"digest_method": hashlib.sha256, "key_derivation": "hmac"}
    return URLSafeSerializer(keys, salt=salt, signer_kwargs=signer)


def _sealed(serializer: URLSafeSerializer, user: Identity, payload: dict[str, Any]) -> str:
    named = user.display_name if user.display_name != user.identity else None
    rest = {"n": named, "s": list(user.scopes), "c": dict(user.claims)}
    payload |= {"i": user.identity, "t": secrets.token_urlsafe(12)}
    payload |= {key: value for key, value in rest.items() if value}
    token = str(serializer.dumps(payload))
    if len(token) > MAX_TOKEN_LENGTH:
        raise ValueError(f"the token would have {len(token)} characters; {MAX_TOKEN_LENGTH} are the most")
    return token


def _opened(serializer: URLSafeSerializer, token: str, now: float, *, lasts: str) -> Identity:
    payload = _unsigned(serializer, token)
    try:
        identity = Identity(
            payload["i"],
            display_name=payload.get("n"),
            scopes=payload.get("s", ()),
            claims=payload.get("c"),
            expires_at=payload.get(lasts),
            token_id=payload["t"],
        )
        good = now < payload["e"] and (identity.expires_at is None or now < identity.expires_at)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise TokenError("the token is signed but does not say what it must") from None
    if not good:
        raise TokenError("the token has expired", expired=True)
    return identity


def _unsigned(serializer: URLSafeSerializer, token: str) -> Any:
    # itsdangerous skips what is not base64, and the last character of a signature has two bits that say nothing:
    # without both checks one token would have many spellings, and a list of refused ones would not hold.
    if not _TOKEN.fullmatch(token):
        raise TokenError("the token is malformed")
    signature = token.rpartition(".")[2]
    try:
        payload = serializer.loads(token)
        if base64_encode(base64_decode(signature)).decode() == signature:
            return payload
    except BadData:
        pass  # the same answer as below, outside of this clause so that no traceback shows parts of the token
    raise TokenError("the token is not signed with a key that is known here")


def _signable(identity: BaseUser) -> Identity:
    user = wrap(identity)
    if user is None or not user.is_authenticated:
        raise ValueError("a guest has nothing to prove: sign the Identity of somebody who has logged in")
    return user


def _checked_keys(keys: Sequence[str | bytes]) -> list[bytes]:
    if isinstance(keys, (str, bytes)) or not keys:
        raise ConfigurationError("TokenSigner needs a list of keys, oldest to newest: write TokenSigner([key])")
    secret = [key.encode() if isinstance(key, str) else bytes(key) for key in keys]
    for place, key in enumerate(secret, 1):
        if len(key) < MIN_KEY_SIZE:
            raise ConfigurationError(
                f"key {place} of TokenSigner has {len(key)} bytes and needs {MIN_KEY_SIZE}: make one with {_NEW_KEY}"
            )
    return secret


# JWTVerifier

_SYMMETRIC = frozenset({"HS256", "HS384", "HS512"})
_ASYMMETRIC = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES256K", "ES384", "ES512", "EdDSA"}
)
_ASYMMETRIC_MARKS = (b"-----BEGIN", b"ssh-", b"ecdsa-")


def _pyjwt() -> ModuleType:
    try:
        import jwt  # an extra: an app without JWT does not pay for it
        import jwt.algorithms
    except ImportError:
        raise ConfigurationError('JWTVerifier needs PyJWT: pip install "starlette-rt[jwt]"') from None
    return jwt


def _checked_algorithms(algorithms: Sequence[str], jwt: ModuleType) -> list[str]:
    if isinstance(algorithms, str) or not algorithms:
        raise ConfigurationError('JWTVerifier needs a list of algorithms: write algorithms=["HS256"]')
    unknown = [name for name in algorithms if name not in _SYMMETRIC | _ASYMMETRIC]
    if unknown:  # "none" is among them: a token that is not signed proves nothing
        known = ", ".join(sorted(_SYMMETRIC | _ASYMMETRIC))
        raise ConfigurationError(f"JWTVerifier does not accept the algorithm {unknown[0]!r}; it knows {known}")
    if _SYMMETRIC.intersection(algorithms) and _ASYMMETRIC.intersection(algorithms):
        raise ConfigurationError(
            "JWTVerifier cannot mix HS* with public-key algorithms: anybody could sign with the public key. "
            "Write two verifiers, or only the algorithms that your issuer uses"
        )
    if not set(algorithms) <= set(jwt.algorithms.get_default_algorithms()):
        raise ConfigurationError('public-key algorithms need cryptography: pip install "starlette-rt[jwt]"')
    return list(algorithms)


def _checked_secret(key: Any) -> bytes:
    secret = key.encode() if isinstance(key, str) else key
    if not isinstance(secret, bytes):
        raise ConfigurationError(f"the key of an HS* algorithm is a str or bytes, not {type(key).__name__}")
    if secret.lstrip().startswith(_ASYMMETRIC_MARKS):
        raise ConfigurationError('this is a public key and HS* would take it for a secret: write algorithms=["RS256"]')
    if len(secret) < MIN_KEY_SIZE:
        raise ConfigurationError(
            f"the key of JWTVerifier has {len(secret)} bytes and needs {MIN_KEY_SIZE}: make one with {_NEW_KEY}"
        )
    return secret


def _public(key: Any, algorithms: list[str], jwt: ModuleType) -> Any:
    """Parse a public key once; of a private one take the public half, which is all that verifying needs."""
    known = jwt.algorithms.get_default_algorithms()
    for name in algorithms:
        try:
            parsed = known[name].prepare_key(key)
        except (jwt.PyJWTError, ValueError, TypeError):
            continue
        return parsed.public_key() if hasattr(parsed, "public_key") else parsed
    raise ConfigurationError(f"the key of JWTVerifier is no public key in PEM for {', '.join(algorithms)}")


def _existing(key: Any) -> Any:
    if key is None:  # a callable such as ``keys.get``
        raise LookupError("no such key")
    return key


def _refused(error: Exception, jwt: ModuleType) -> TokenError:
    """Say in our own words what PyJWT found, since its words may repeat parts of the token."""
    if isinstance(error, jwt.ExpiredSignatureError):
        return TokenError("the token has expired", expired=True)
    reasons = {
        jwt.ImmatureSignatureError: "the token is not valid yet",
        jwt.InvalidAudienceError: "the token is meant for another audience",
        jwt.InvalidIssuerError: "the token comes from another issuer",
        jwt.InvalidAlgorithmError: "the token is signed with an algorithm that is not accepted here",
        jwt.InvalidSignatureError: "the signature of the token does not match",
        jwt.MissingRequiredClaimError: f"the token lacks the claim {getattr(error, 'claim', None)!r}",
    }
    return TokenError(reasons.get(type(error), "the token is malformed"))


def _identity_of(claims: Mapping[str, Any], claim: str) -> Identity:
    value, name = claims[claim], claims.get("name")
    return Identity(
        str(value) if isinstance(value, int) else value,
        display_name=name if isinstance(name, str) else None,
        scopes=_scopes_of(claims),
        claims=claims,
    )


def _scopes_of(claims: Mapping[str, Any]) -> list[str]:
    found = claims.get("scope", claims.get("scopes", ()))
    words = found.split() if isinstance(found, str) else found
    return [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
