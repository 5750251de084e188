"""Tokens: what proves somebody, what never does, and that no error repeats a token."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
import sys
import time
import traceback
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from itsdangerous import URLSafeSerializer
from starlette.authentication import AuthenticationError, SimpleUser, UnauthenticatedUser
from starlette.requests import HTTPConnection

from starlette_rt import tokens as module
from starlette_rt.exceptions import ConfigurationError, TokenError, Unavailable
from starlette_rt.identity import Identity, guest
from starlette_rt.tokens import (
    MAX_TICKET_TTL,
    MAX_TOKEN_LENGTH,
    JWTVerifier,
    TokenBackend,
    TokenSigner,
    Verifier,
    resolve,
)

pytestmark = pytest.mark.unit

OLD, NEW = "o" * 32, "n" * 32
LEGAL = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
ADA = Identity("ada", display_name="Ada Lovelace", scopes=["read", "write"], claims={"team": {"id": 7}})


class Clock:
    """Wall-clock seconds that move only when a test says so."""

    def __init__(self) -> None:
        self.time = 1_700_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signer(clock: Clock) -> TokenSigner:
    return TokenSigner([NEW], now=clock)


# What a traceback shows of itself, and what might be guessed as a token: lines of code, and paths.
SHOWN = (sys.modules[__name__], module)
OURS = "".join(f"{Path(each.__file__ or '').read_text('utf-8')}{each.__file__}" for each in SHOWN)


def refusal(tokens: Any, token: str) -> TokenError:
    """Return the error, having seen that neither it nor its traceback repeats the token."""
    with pytest.raises(TokenError) as caught:
        tokens.verify(token)
    if len(token) > 8:
        shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        parts = [part for part in [token, *token.split(".")] if len(part) > 8 and part not in OURS]
        assert all(part not in shown for part in parts)
    return caught.value


# TokenSigner


def test_a_signed_token_gives_back_the_whole_identity(signer: TokenSigner, clock: Clock) -> None:
    found = signer.verify(signer.sign(ADA, ttl=60))
    assert found == ADA
    assert found.expires_at == clock.time + 60
    assert found.token_id


def test_each_token_has_an_id_of_its_own(signer: TokenSigner) -> None:
    assert len({signer.verify(signer.sign(ADA)).token_id for _ in range(50)}) == 50


def test_a_token_for_a_bare_name_is_short(signer: TokenSigner) -> None:
    assert len(signer.sign(Identity("ada"))) <= 130


@given(
    name=st.text(min_size=1, max_size=255),
    shown=st.none() | st.text(max_size=50),
    scopes=st.lists(st.text(max_size=20), max_size=4),
    claims=st.dictionaries(st.text(max_size=10), st.integers() | st.text(max_size=20) | st.none(), max_size=4),
)
def test_whatever_an_identity_says_survives_in_legal_characters(
    name: str, shown: str | None, scopes: list[str], claims: dict[str, Any]
) -> None:
    try:
        identity = Identity(name, display_name=shown, scopes=scopes, claims=claims)
    except ValueError:
        return
    signer = TokenSigner([NEW])
    for sealed, opened in ((signer.sign, signer.verify), (signer.ticket, signer.verify_ticket)):
        token = sealed(identity)
        assert set(token) <= LEGAL
        assert opened(token) == identity


def test_a_foreign_user_may_be_signed(signer: TokenSigner) -> None:
    assert signer.verify(signer.sign(SimpleUser("ada"))) == Identity("ada")


@pytest.mark.parametrize("nobody", [guest("s"), UnauthenticatedUser()])
def test_a_guest_has_nothing_to_prove(signer: TokenSigner, nobody: Any) -> None:
    with pytest.raises(ValueError, match="a guest"):
        signer.sign(nobody)
    with pytest.raises(ValueError, match="a guest"):
        signer.ticket(nobody)


def test_a_token_is_good_until_its_last_second_and_then_expired(signer: TokenSigner, clock: Clock) -> None:
    token = signer.sign(ADA, ttl=60)
    clock.time += 59.9
    assert signer.verify(token) == ADA
    clock.time += 0.1
    error = refusal(signer, token)
    assert error.expired
    assert str(error) == "the token has expired"


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
def test_a_ttl_must_be_a_positive_number(signer: TokenSigner, ttl: float) -> None:
    with pytest.raises(ValueError, match=r"positive number of seconds$"):
        signer.sign(ADA, ttl=ttl)
    with pytest.raises(ValueError, match="up to 300"):
        signer.ticket(ADA, ttl=ttl)


def test_claims_that_no_header_carries_are_refused_when_signing(signer: TokenSigner) -> None:
    noise = random.Random(1).randbytes(MAX_TOKEN_LENGTH).hex()
    with pytest.raises(ValueError, match="7000 are the most"):
        signer.sign(Identity("ada", claims={"noise": noise}))


def test_claims_that_are_no_json_are_refused_when_signing(signer: TokenSigner) -> None:
    with pytest.raises(TypeError):
        signer.sign(Identity("ada", claims={"x": object()}))


def test_keys_rotate(clock: Clock) -> None:
    before = TokenSigner([OLD], now=clock)
    during = TokenSigner([OLD, NEW], now=clock)
    after = TokenSigner([NEW], now=clock)
    assert during.verify(before.sign(ADA)) == ADA
    assert after.verify(during.sign(ADA)) == ADA
    assert not refusal(after, before.sign(ADA)).expired


def test_an_expired_token_of_an_unknown_key_is_not_called_expired(clock: Clock) -> None:
    token = TokenSigner([OLD], now=clock).sign(ADA)
    clock.time += 9999
    assert not refusal(TokenSigner([NEW], now=clock), token).expired


def test_keys_may_be_bytes() -> None:
    assert TokenSigner([NEW.encode()]).verify(TokenSigner([NEW]).sign(ADA)) == ADA


def test_another_salt_is_another_purpose() -> None:
    refusal(TokenSigner([NEW], salt="other"), TokenSigner([NEW]).sign(ADA))


@pytest.mark.parametrize("keys", [NEW, NEW.encode(), []])
def test_keys_that_are_no_list_are_refused(keys: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"write TokenSigner\(\[key\]\)"):
        TokenSigner(keys)


def test_a_short_key_is_refused_with_the_line_that_makes_one() -> None:
    with pytest.raises(ConfigurationError, match=r"key 2 of TokenSigner has 31 bytes and needs 32.*token_urlsafe"):
        TokenSigner([NEW, "x" * 31])


def test_a_key_is_measured_in_bytes() -> None:
    TokenSigner(["é" * 16])


def test_a_token_changed_in_any_one_character_proves_nothing() -> None:
    signer = TokenSigner([NEW])
    for token in (signer.sign(Identity("a")), signer.sign(Identity("a", claims={"x": "y" * 99}))):
        assert signer.verify(token)
        for place in range(len(token)):
            for other in LEGAL | {"=", "é", " ", "\n"}:
                if other != token[place]:
                    with pytest.raises(TokenError):
                        signer.verify(token[:place] + other + token[place + 1 :])


@pytest.mark.parametrize("change", [" {}", "{} ", "{}=", "{}==", "{}\n", "{}!", "{}.", "{}A", "\ufeff{}", "{0}{0}", ""])
def test_a_token_has_one_spelling(signer: TokenSigner, change: str) -> None:
    with pytest.raises(TokenError):
        signer.verify(change.format(signer.sign(ADA)))


@given(st.text() | st.text(alphabet=sorted(LEGAL), min_size=1) | st.from_regex(r"[\w-]+\.[\w-]{43}", fullmatch=True))
def test_any_text_is_refused_as_a_token_and_as_a_ticket(text: str) -> None:
    signer = TokenSigner([NEW])
    assert not refusal(signer, text).expired
    with pytest.raises(TokenError):
        signer.verify_ticket(text)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        "ada",
        {},
        {"i": "ada", "t": "x"},
        {"i": "ada", "e": 9e9},
        {"i": 7, "t": "x", "e": 9e9},
        {"i": "guest:x", "t": "x", "e": 9e9},
        {"i": "ada", "t": 7, "e": 9e9},
        {"i": "ada", "t": "x", "e": "soon"},
        {"i": "ada", "t": "x", "e": 9e9, "s": 7},
        {"i": "ada", "t": "x", "e": 9e9, "s": [7]},
        {"i": "ada", "t": "x", "e": 9e9, "c": 7},
        {"i": "ada", "t": "x", "e": 9e9, "n": 7},
        {"i": "ada", "t": "x", "e": float("inf")},
        {"i": "ada", "t": "x", "e": float("nan")},
    ],
)
def test_what_another_program_signed_with_our_key_is_refused(signer: TokenSigner, payload: Any) -> None:
    foreign = module._serializer([NEW.encode()], "starlette_rt.token")
    error = refusal(signer, str(foreign.dumps(payload)))
    assert str(error) == "the token is signed but does not say what it must"


def test_fields_of_a_later_version_are_ignored(signer: TokenSigner) -> None:
    later = module._serializer([NEW.encode()], "starlette_rt.token")
    assert signer.verify(str(later.dumps({"i": "ada", "t": "x", "e": 9e9, "z": 1}))) == Identity("ada")


def test_the_weak_defaults_of_itsdangerous_are_not_ours(signer: TokenSigner) -> None:
    refusal(signer, str(URLSafeSerializer(NEW, salt="starlette_rt.token").dumps({"i": "ada", "t": "x", "e": 9e9})))


# Tickets


def test_a_ticket_is_no_token_and_a_token_is_no_ticket(signer: TokenSigner) -> None:
    refusal(signer, signer.ticket(ADA))
    with pytest.raises(TokenError):
        signer.verify_ticket(signer.sign(ADA))


def test_a_ticket_is_short_lived(signer: TokenSigner, clock: Clock) -> None:
    ticket = signer.ticket(ADA)
    clock.time += 29.9
    assert signer.verify_ticket(ticket).token_id
    clock.time += 0.1
    with pytest.raises(TokenError) as caught:
        signer.verify_ticket(ticket)
    assert caught.value.expired
    with pytest.raises(ValueError, match="up to 300"):
        signer.ticket(ADA, ttl=MAX_TICKET_TTL + 1)
    signer.ticket(ADA, ttl=MAX_TICKET_TTL)


def test_the_end_of_a_ticket_is_not_the_end_of_the_connection(signer: TokenSigner, clock: Clock) -> None:
    assert signer.verify_ticket(signer.ticket(ADA)).expires_at is None
    proved = signer.verify(signer.sign(ADA, ttl=3600))
    assert signer.verify_ticket(signer.ticket(proved)).expires_at == clock.time + 3600


def test_a_ticket_does_not_outlive_the_token_it_was_issued_for(signer: TokenSigner, clock: Clock) -> None:
    ticket = signer.ticket(signer.verify(signer.sign(ADA, ttl=10)))
    clock.time += 10
    with pytest.raises(TokenError, match="has expired") as caught:
        signer.verify_ticket(ticket)
    assert caught.value.expired


def test_two_tickets_have_two_ids(signer: TokenSigner) -> None:
    first, second = (signer.verify_ticket(signer.ticket(ADA)) for _ in range(2))
    assert first.token_id != second.token_id


@pytest.mark.parametrize("until", ["soon", [], float("nan")])
def test_a_ticket_with_a_strange_end_is_refused(signer: TokenSigner, until: Any) -> None:
    foreign = module._serializer([NEW.encode()], "starlette_rt.token.ticket")
    with pytest.raises(TokenError):
        signer.verify_ticket(str(foreign.dumps({"i": "ada", "t": "x", "e": 9e9, "u": until})))


# JWTVerifier

SECRET = "s" * 32
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def pem(key: Any) -> bytes:
    encoded: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def issue(
    claims: dict[str, Any] | None = None, key: Any = SECRET, algorithm: str = "HS256", kid: str | None = None
) -> str:
    payload = {"sub": "ada", "exp": int(time.time()) + 600} | (claims or {})
    payload = {name: value for name, value in payload.items() if value is not None}
    return jwt.encode(payload, key, algorithm=algorithm, headers={"kid": kid} if kid else None)


def raw(header: Any, payload: Any = None, signature: bytes = b"x") -> str:
    parts = [json.dumps(header).encode(), json.dumps(payload or {"sub": "ada", "exp": 9e9}).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.mark.parametrize(
    ("private", "public", "algorithm"),
    [
        (SECRET, SECRET, "HS256"),
        (SECRET, SECRET.encode(), "HS256"),
        (SECRET * 2, SECRET * 2, "HS512"),
        (RSA_KEY, pem(RSA_KEY), "RS256"),
        (RSA_KEY, pem(RSA_KEY).decode(), "PS384"),
        (RSA_KEY, RSA_KEY.public_key(), "RS512"),
        (EC_KEY, pem(EC_KEY), "ES256"),
        (ED_KEY, pem(ED_KEY), "EdDSA"),
    ],
)
def test_a_token_of_each_family_proves_its_bearer(private: Any, public: Any, algorithm: str) -> None:
    token = issue(key=private, algorithm=algorithm)
    assert JWTVerifier(public, algorithms=[algorithm]).verify(token).identity == "ada"
    refusal(JWTVerifier(public, algorithms=[algorithm]), token[:-12] + "AAAAAAAAAAAA")


def test_a_private_key_verifies_by_its_public_half() -> None:
    private = RSA_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert JWTVerifier(private, algorithms=["RS256"]).verify(issue(key=RSA_KEY, algorithm="RS256"))


def test_one_verifier_may_take_several_families_of_public_keys() -> None:
    verifier = JWTVerifier({"r": pem(RSA_KEY), "e": pem(EC_KEY)}, algorithms=["RS256", "ES256"])
    assert verifier.verify(issue(key=RSA_KEY, algorithm="RS256", kid="r")).identity == "ada"
    assert verifier.verify(issue(key=EC_KEY, algorithm="ES256", kid="e")).identity == "ada"
    refusal(verifier, issue(key=EC_KEY, algorithm="ES256", kid="r"))


def test_what_a_token_says_is_kept() -> None:
    until = int(time.time()) + 60
    found = JWTVerifier(SECRET, algorithms=["HS256"], leeway=5).verify(
        issue({"exp": until, "jti": "j1", "name": "Ada", "scope": "read write"})
    )
    assert found.scopes == ("read", "write")
    assert (found.display_name, found.token_id, found.expires_at) == ("Ada", "j1", until + 5)
    assert found.claims["scope"] == "read write"


@pytest.mark.parametrize(
    ("claims", "scopes"),
    [
        ({}, ()),
        ({"scope": "read  write"}, ("read", "write")),
        ({"scopes": ["read", "write", 7]}, ("read", "write")),
        ({"scopes": "read write"}, ("read", "write")),
        ({"scope": 7}, ()),
        ({"scope": "read", "scopes": ["write"]}, ("read",)),
    ],
)
def test_scopes_are_read_from_either_claim(claims: dict[str, Any], scopes: tuple[str, ...]) -> None:
    found = JWTVerifier(SECRET, algorithms=["HS256"]).verify(issue(claims))
    assert found.scopes == scopes
    assert found.display_name == "ada"


def test_another_claim_may_name_the_bearer() -> None:
    verifier = JWTVerifier(SECRET, algorithms=["HS256"], identity="user_id")
    assert verifier.verify(issue({"user_id": 42, "name": 7})).identity == "42"
    assert str(refusal(verifier, issue())) == "the token lacks the claim 'user_id'"
    assert str(refusal(verifier, issue({"user_id": ["x"]}))) == "the claims of the token do not name an identity"


def test_a_callable_may_name_the_bearer() -> None:
    def bearer(claims: Any) -> Identity:
        return Identity(f"{claims['tenant']}/{claims['sub']}", expires_at=1.0)

    verifier = JWTVerifier(SECRET, algorithms=["HS256"], identity=bearer)
    found = verifier.verify(issue({"tenant": "t", "jti": None}))
    assert found.identity == "t/ada"
    assert found.expires_at is not None
    assert found.expires_at > time.time()
    assert str(refusal(verifier, issue())) == "the claims of the token do not name an identity"


def test_an_expired_token_is_told_from_a_bad_one() -> None:
    verifier = JWTVerifier(SECRET, algorithms=["HS256"])
    late = issue({"exp": int(time.time()) - 30})
    assert refusal(verifier, late).expired
    assert not refusal(verifier, late[:-12] + "AAAAAAAAAAAA").expired
    assert JWTVerifier(SECRET, algorithms=["HS256"], leeway=60).verify(late)


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": None}, "lacks the claim 'exp'"),
        ({"sub": None}, "lacks the claim 'sub'"),
        ({"aud": None}, "lacks the claim 'aud'"),
        ({"iss": None}, "lacks the claim 'iss'"),
        ({"aud": "other"}, "another audience"),
        ({"iss": "other"}, "another issuer"),
        ({"nbf": int(time.time()) + 600}, "not valid yet"),
        ({"exp": "soon"}, "malformed"),
        ({"exp": 10**400}, "do not name an identity"),
        ({"sub": "guest:1"}, "do not name an identity"),
        ({"sub": ""}, "do not name an identity"),
    ],
)
def test_a_token_that_says_the_wrong_thing_is_refused_with_the_reason(claims: dict[str, Any], reason: str) -> None:
    verifier = JWTVerifier(SECRET, algorithms=["HS256"], audience="app", issuer="https://issuer")
    good = {"aud": ["app", "more"], "iss": "https://issuer"}
    assert verifier.verify(issue(good))
    assert reason in str(refusal(verifier, issue(good | claims)))


def test_a_token_for_somebody_else_is_refused_where_no_audience_is_named() -> None:
    refusal(JWTVerifier(SECRET, algorithms=["HS256"]), issue({"aud": "other"}))


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE"])
def test_a_token_that_is_not_signed_proves_nothing(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"does not accept the algorithm '{name}'"):
        JWTVerifier(SECRET, algorithms=["HS256", name])
    for verifier in (JWTVerifier(SECRET, algorithms=["HS256"]), JWTVerifier(pem(RSA_KEY), algorithms=["RS256"])):
        for signature in (b"", b"x"):
            refusal(verifier, raw({"alg": name, "typ": "JWT"}, signature=signature))


def test_a_public_key_is_never_taken_for_a_secret() -> None:
    with pytest.raises(ConfigurationError, match="cannot mix"):
        JWTVerifier(pem(RSA_KEY), algorithms=["RS256", "HS256"])
    for marked in (pem(RSA_KEY), b"\n" + pem(RSA_KEY), "ssh-rsa " + "A" * 40):
        with pytest.raises(ConfigurationError, match="this is a public key"):
            JWTVerifier(marked, algorithms=["HS256"])
    # The classic attack: HS256 with the public key as its secret.
    head = raw({"alg": "HS256", "typ": "JWT"}).rpartition(".")[0]
    mac = hmac.new(pem(RSA_KEY), head.encode(), hashlib.sha256).digest()
    token = f"{head}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    assert "algorithm" in str(refusal(JWTVerifier(pem(RSA_KEY), algorithms=["RS256"]), token))


@pytest.mark.parametrize(
    ("key", "algorithms", "complaint"),
    [
        (SECRET, "HS256", r'write algorithms=\["HS256"\]'),
        (SECRET, [], r'write algorithms=\["HS256"\]'),
        (SECRET, ["HS257"], "it knows ES256, "),
        ("s" * 31, ["HS256"], "has 31 bytes and needs 32"),
        (7, ["HS256"], "a str or bytes, not int"),
        ({"a": "short"}, ["HS256"], "has 5 bytes"),
        (SECRET, ["RS256", "ES256"], "no public key in PEM for RS256, ES256"),
        (7, ["EdDSA"], "no public key"),
        (pem(EC_KEY), ["RS256"], "no public key in PEM for RS256"),
    ],
)
def test_keys_and_algorithms_that_do_not_fit_are_refused(key: Any, algorithms: Any, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        JWTVerifier(key, algorithms=algorithms)


@pytest.mark.parametrize("find", [{"new": SECRET}, {"new": SECRET}.get, {"new": SECRET}.__getitem__])
def test_a_key_is_found_by_its_name(find: Any) -> None:
    verifier = JWTVerifier(find, algorithms=["HS256"])
    assert verifier.verify(issue(kid="new")).identity == "ada"
    for token in (issue(), issue(kid="old"), issue(key="x" * 32, kid="new")):
        refusal(verifier, token)


def test_the_keys_of_a_jwks_are_taken_as_they_come() -> None:
    described = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY.public_key())) | {"alg": "RS256"}
    verifier = JWTVerifier(lambda kid: jwt.PyJWK(described), algorithms=["RS256"])
    assert verifier.verify(issue(key=RSA_KEY, algorithm="RS256")).identity == "ada"


def test_a_key_server_that_is_away_is_not_a_bad_token() -> None:
    def away(kid: str | None) -> Any:
        raise jwt.PyJWKClientConnectionError("timed out")

    def unknown(kid: str | None) -> Any:
        raise jwt.PyJWKClientError("no such kid")

    with pytest.raises(Unavailable):
        JWTVerifier(away, algorithms=["RS256"]).verify(issue())
    refusal(JWTVerifier(unknown, algorithms=["RS256"]), issue())


def test_a_bad_key_from_a_callable_is_the_hosts_error() -> None:
    with pytest.raises(ConfigurationError, match="needs 32"):
        JWTVerifier(lambda kid: "short", algorithms=["HS256"]).verify(issue())


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "\ud800",
        "é.é.é",
        raw([]),
        raw({}),
        raw({"alg": 7}),
        raw({"alg": ["HS256"]}),
        raw({"alg": {}}),
        raw({"alg": "HS256", "kid": 7}),
        raw({"alg": "HS256", "kid": ["a"]}),
        raw({"alg": "HS256", "crit": ["secret"]}),
        raw({"alg": "HS256", "b64": False, "crit": ["b64"]}),
        base64.urlsafe_b64encode(b"[" * 60_000).decode() + ".e30.e30",
        issue({"sub": 7}),
        issue({"sub": ["x"]}),
        issue(key=RSA_KEY, algorithm="RS256"),
    ],
)
def test_a_hostile_token_is_only_a_token_error(token: str) -> None:
    refusal(JWTVerifier(SECRET, algorithms=["HS256"]), token)
    refusal(JWTVerifier({"a": SECRET}, algorithms=["HS256"]), token)


def test_the_algorithm_of_another_family_than_the_keys_is_only_a_token_error() -> None:
    verifier = JWTVerifier(pem(RSA_KEY), algorithms=["RS256", "ES256", "EdDSA"])
    refusal(verifier, issue(key=EC_KEY, algorithm="ES256"))
    refusal(verifier, issue(key=ED_KEY, algorithm="EdDSA"))


@given(st.text() | st.from_regex(r"[\w-]{4,}\.[\w-]{4,}\.[\w-]{4,}", fullmatch=True))
def test_any_text_is_refused_as_a_jwt(text: str) -> None:
    refusal(JWTVerifier(SECRET, algorithms=["HS256"]), text)


@given(place=st.integers(0), other=st.sampled_from(sorted(LEGAL)))
def test_a_jwt_changed_in_one_character_proves_nothing(place: int, other: str) -> None:
    token = issue({"exp": 9_000_000_000})
    place %= len(token) - 1  # the last one holds two bits that belong to no byte: to change them changes nothing
    if token[place] != other:
        refusal(JWTVerifier(SECRET, algorithms=["HS256"]), token[:place] + other + token[place + 1 :])


def test_without_pyjwt_the_error_names_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ConfigurationError, match=r'pip install "starlette-rt\[jwt\]"'):
        JWTVerifier(SECRET, algorithms=["HS256"])


def test_without_cryptography_public_keys_name_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    only_hmac = {"HS256": jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)}
    monkeypatch.setattr(jwt.algorithms, "get_default_algorithms", lambda: only_hmac)
    assert JWTVerifier(SECRET, algorithms=["HS256"])
    with pytest.raises(ConfigurationError, match=r'need cryptography: pip install "starlette-rt\[jwt\]"'):
        JWTVerifier(pem(RSA_KEY), algorithms=["RS256"])


# Verifiers of the host, and HTTP


class Lookup:
    """A host's own asynchronous verifier."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known

    async def _find(self, token: str) -> Identity:
        if token not in self.known:
            raise TokenError("never heard of it")
        found: Identity = self.known[token]
        return found

    def verify(self, token: str) -> Awaitable[Identity]:
        return self._find(token)


def connection(*authorization: str) -> HTTPConnection:
    headers = [(b"authorization", value.encode("latin-1")) for value in authorization]
    return HTTPConnection({"type": "http", "headers": headers})


@pytest.mark.anyio
async def test_a_verifier_may_be_asynchronous(signer: TokenSigner) -> None:
    verifiers: list[Verifier] = [signer, Lookup({"k": ADA}), JWTVerifier(SECRET, algorithms=["HS256"])]
    assert await resolve(verifiers[0], signer.sign(ADA)) == ADA
    assert await resolve(verifiers[1], "k") is ADA
    assert (await resolve(verifiers[2], issue())).identity == "ada"
    with pytest.raises(TokenError, match="never heard"):
        await resolve(verifiers[1], "other")


@pytest.mark.anyio
async def test_a_verifier_that_answers_nothing_makes_nobody_a_guest() -> None:
    with pytest.raises(ConfigurationError, match=r"Lookup.verify\(\) gave NoneType; return an Identity or raise"):
        await resolve(Lookup({"k": None}), "k")


@pytest.mark.anyio
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
async def test_http_reads_the_same_tokens(signer: TokenSigner, scheme: str) -> None:
    found = await TokenBackend(signer).authenticate(connection(f"{scheme} {signer.sign(ADA)}"))
    assert found is not None
    assert found[0].scopes == ["authenticated", "read", "write"]
    assert found[1] == ADA


@pytest.mark.anyio
@pytest.mark.parametrize("authorization", [(), ("Basic YTpi",), ("",), ("Bearerx",)])
async def test_http_without_a_bearer_token_is_nobodys(signer: TokenSigner, authorization: tuple[str, ...]) -> None:
    assert await TokenBackend(signer).authenticate(connection(*authorization)) is None


@pytest.mark.anyio
@pytest.mark.parametrize("authorization", ["Bearer nonsense", "Bearer", "Bearer ", "Bearer \xff"])
async def test_http_with_a_bad_token_is_refused_and_not_nobodys(signer: TokenSigner, authorization: str) -> None:
    with pytest.raises(AuthenticationError, match="the token is") as caught:
        await TokenBackend(signer).authenticate(connection(authorization))
    assert "nonsense" not in "".join(traceback.format_exception(caught.value))
