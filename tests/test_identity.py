"""Identities: what is refused, what is equal, and how a host's own users become one."""

from __future__ import annotations

import sys
from typing import Any
from uuid import UUID

import pytest
from starlette.authentication import BaseUser, SimpleUser, UnauthenticatedUser

from starlette_rt.exceptions import ConfigurationError
from starlette_rt.identity import MAX_LENGTH, Identity, credentials, guest, wrap

pytestmark = pytest.mark.unit


class Nameless(BaseUser):
    """Starlette's defaults for both names: they raise ``NotImplementedError``."""

    @property
    def is_authenticated(self) -> bool:
        return True


class Named(Nameless):
    @property
    def display_name(self) -> str:
        return "Ada"


class Row(Named):
    def __init__(self, key: Any) -> None:
        self.key = key

    @property
    def identity(self) -> Any:
        return self.key


def test_an_identity_is_an_authenticated_starlette_user() -> None:
    ada = Identity("ada")
    assert isinstance(ada, BaseUser)
    assert ada.is_authenticated
    assert (ada.identity, ada.display_name) == ("ada", "ada")
    assert (ada.scopes, dict(ada.claims), ada.expires_at, ada.token_id) == ((), {}, None, None)
    assert ada.original is ada


def test_an_identity_keeps_what_its_issuer_said() -> None:
    ada = Identity("ada", display_name="Ada", scopes=["read"], claims={"team": 7}, expires_at=9.0, token_id="t")
    assert (ada.display_name, ada.scopes, ada.claims["team"]) == ("Ada", ("read",), 7)
    assert (ada.expires_at, ada.token_id) == (9.0, "t")


def test_an_empty_display_name_falls_back_to_the_identity() -> None:
    assert Identity("ada", display_name="").display_name == "ada"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "not empty"),
        (None, "not empty"),
        (7, "not empty"),
        ("x" * (MAX_LENGTH + 1), "256 characters; 255"),
        ("a\nb", "control characters"),
        ("a\x00", "control characters"),
        ("a\x85", "control characters"),
        ("a\u2028b", "control characters"),
        ("a\ud800", "control characters"),
        ("guest:1", "reserved"),
        ("~ada", "reserved"),
    ],
)
def test_a_name_that_could_be_mistaken_is_refused(name: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Identity(name)


@pytest.mark.parametrize("name", ["x" * MAX_LENGTH, "guest", "a~b", "Zoë 🦊", "auth0|5f7c8ec7c33c6c004bbafe82"])
def test_an_unusual_but_plain_name_is_taken(name: str) -> None:
    assert Identity(name).identity == name


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"scopes": "admin"}, r"as in scopes=\['admin'\]"),
        ({"scopes": [1]}, "list of strings"),
        ({"display_name": 1}, "display_name must be"),
        ({"token_id": 1}, "token_id must be"),
        ({"expires_at": float("nan")}, "finite"),
        ({"expires_at": float("inf")}, "finite"),
    ],
)
def test_an_attribute_of_the_wrong_kind_is_refused(extra: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Identity("ada", **extra)


def test_an_identity_does_not_change() -> None:
    said = {"team": 7}
    ada = Identity("ada", claims=said)
    said["team"] = 8
    assert ada.claims["team"] == 7
    with pytest.raises(TypeError):
        ada.claims["team"] = 9  # type: ignore[index]
    for name in ("identity", "_identity", "anything"):
        with pytest.raises(AttributeError, match="does not change"):
            setattr(ada, name, "eve")
        with pytest.raises(AttributeError, match="does not change"):
            delattr(ada, name)


def test_identities_are_equal_by_value_and_not_by_token() -> None:
    ada = Identity("ada", scopes=["read"], claims={"team": [7]}, expires_at=1.0, token_id="a")
    again = Identity("ada", scopes=("read",), claims={"team": [7]}, expires_at=2.0, token_id="b")
    assert ada == again
    assert hash(ada) == hash(again)
    assert len({ada, again}) == 1


@pytest.mark.parametrize(
    "other",
    [
        Identity("eve"),
        Identity("ada", display_name="A"),
        Identity("ada", scopes=["x"]),
        Identity("ada", claims={"x": 1}),
    ],
)
def test_identities_that_differ_are_not_equal(other: Identity) -> None:
    assert Identity("ada") != other


def test_an_identity_is_not_equal_to_its_name() -> None:
    assert Identity("ada") != "ada"


def test_the_repr_shows_who_and_no_secret() -> None:
    assert repr(Identity("ada")) == "Identity('ada')"
    shown = repr(Identity("ada", display_name="Ada", scopes=["read"], claims={"k": "secret"}, token_id="tid"))
    assert shown == "Identity('ada', display_name='Ada', scopes=('read',))"


def test_an_identity_is_small() -> None:
    assert sys.getsizeof(Identity("ada")) <= 120
    assert Identity("ada").claims is Identity("eve").claims


def test_another_token_proves_the_same_identity() -> None:
    ada = Identity("ada", display_name="Ada", scopes=["read"], claims={"k": 1}, expires_at=1.0, token_id="a")
    later = ada.with_token(expires_at=2.0, token_id="b")
    assert later == ada
    assert (later.expires_at, later.token_id) == (2.0, "b")
    assert (ada.expires_at, ada.token_id) == (1.0, "a")
    with pytest.raises(ValueError, match="finite"):
        ada.with_token(expires_at=float("nan"), token_id=None)


def test_a_guest_is_known_by_its_session_and_is_not_authenticated() -> None:
    visitor = guest("s" * 22)
    assert visitor.identity.startswith("guest:")
    assert "s" * 22 not in visitor.identity, "names are seen by others, the session is a secret"
    assert visitor.display_name == "guest"
    assert not visitor.is_authenticated
    assert visitor == guest("s" * 22) != guest("t" * 22)
    assert not visitor.with_token(expires_at=1.0, token_id=None).is_authenticated


def test_wrapping_an_identity_gives_it_back() -> None:
    ada, visitor = Identity("ada"), guest("s")
    assert wrap(ada) is ada
    assert wrap(visitor) is visitor


def test_wrapping_a_foreign_user_keeps_the_original() -> None:
    user = SimpleUser("ada")
    wrapped = wrap(user, scopes=["read"])
    assert wrapped == Identity("ada", scopes=["read"])
    assert wrapped is not None
    assert wrapped.original is user
    assert wrapped.with_token(expires_at=None, token_id=None).original is user


def test_a_user_that_is_not_authenticated_is_nobody() -> None:
    assert wrap(UnauthenticatedUser()) is None


def test_a_foreign_user_without_identity_goes_by_its_display_name() -> None:
    assert wrap(Named()) == Identity("Ada")
    assert wrap(Row("")) == Identity("Ada")


@pytest.mark.parametrize("key", [0, 42, UUID(int=5)])
def test_the_key_of_a_database_row_is_written_out(key: object) -> None:
    assert wrap(Row(key)) == Identity(str(key), display_name="Ada")


def test_a_display_name_that_is_no_text_is_left_out() -> None:
    class Lazy(Row):
        @property
        def display_name(self) -> Any:
            return object()

    assert wrap(Lazy("ada")) == Identity("ada")


def test_a_foreign_user_without_any_name_is_a_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="Nameless has neither identity nor display_name"):
        wrap(Nameless())


def test_a_foreign_user_with_a_reserved_name_is_a_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="Row cannot be used: identity must not begin with 'guest:'"):
        wrap(Row("guest:1"))


class Callable(SimpleUser):
    def is_authenticated(self) -> bool:  # type: ignore[override]
        return False


@pytest.mark.parametrize("user", [object(), BaseUser(), Callable("ada")])
def test_a_user_whose_authentication_is_no_plain_answer_is_refused(user: Any) -> None:
    with pytest.raises(ConfigurationError, match="is_authenticated must be a property"):
        wrap(user)


def test_credentials_speak_the_language_of_requires() -> None:
    assert credentials(Identity("ada", scopes=["read", "authenticated"])).scopes == ["authenticated", "read"]
    assert credentials(guest("s")).scopes == []
