"""Every example of docs/examples runs, in this process, and does what its page says.

The law of this file: an example is imported by its path, as uvicorn does, and spoken to from outside only: over
its WebSocket and its HTTP routes. What a browser shows of it is the business of test_browser.py.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from starlette_rt.testing import Client, Refused, connect

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

DOCS = Path(__file__).parent.parent / "docs"
STATIC = DOCS / "examples" / "chat" / "static"

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Import an example afresh, so that each test has an app and a Realtime of its own."""

    def load(name: str) -> ModuleType:
        path = DOCS / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"example_{name.replace('/', '_')}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses and structs look for their annotations
        spec.loader.exec_module(module)
        return module

    return load


def http(app: Any, token: str | None = None) -> httpx.AsyncClient:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver", headers=headers)


async def until(client: Client, wanted: Callable[[Any], bool]) -> Any:
    """Receive until a frame is wanted; each wait has the client's deadline."""
    for _ in range(100):
        frame = await client.receive_json()
        if wanted(frame):
            return frame
    raise AssertionError("a hundred frames, and none of them was the one")


# The chat.


class Window:
    """One window of the chat, as its page has it: a client of the protocol v1."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.heard: list[dict[str, Any]] = []  # what has come and was not asked for yet
        self.ref = 0

    async def frame(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first frame that is wanted; those before it are dropped. Each wait has the client's deadline."""
        while True:
            while self.heard:
                if wanted(frame := self.heard.pop(0)):
                    return frame
            said = await self.client.receive_json()
            self.heard += said if isinstance(said, list) else [said]

    async def tell(self, type: str, **fields: Any) -> int:
        self.ref += 1
        await self.client.send_json({"type": type, "ref": self.ref, **fields})
        return self.ref

    async def ask(self, type: str, **fields: Any) -> dict[str, Any]:
        """Ask, and return the `reply` or the `error`."""
        ref = await self.tell(type, **fields)
        return await self.frame(lambda frame: frame["type"] in ("reply", "error") and frame.get("ref") == ref)

    async def say(self, text: str, group: str = "lobby", id: str = "m1") -> dict[str, Any]:
        return await self.ask("event", event="say", group=group, id=id, data={"text": text, "id": id})

    async def said(self, group: str = "lobby") -> dict[str, Any]:
        """The next message of the group."""
        frame = await self.frame(lambda frame: frame.get("event") == "said" and frame["group"] == group)
        message: dict[str, Any] = frame["data"]
        return message


@asynccontextmanager
async def window(chat: ModuleType, name: str, *groups: str) -> AsyncIterator[Window]:
    """Come in under a name, and join these groups."""
    token = await chat_token(chat, name)
    async with connect(chat.app, "/ws", token=token, subprotocols=["rt.v1.json"]) as client:
        opened = Window(client)
        await opened.frame(lambda frame: frame["type"] == "welcome")
        for group in groups:
            assert (await opened.ask("join", group=group))["type"] == "reply"
        yield opened


async def chat_token(chat: ModuleType, name: str) -> str:
    async with http(chat.app) as client:
        return (await client.post(f"/login/{name}")).text


async def test_a_message_reaches_the_group_with_author_and_time_and_is_acknowledged(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada Lovelace", "lobby") as ada, window(chat, "Ben", "lobby") as ben:
        ref = await ada.tell("event", event="say", group="lobby", data={"text": " hello ", "id": "x1"})
        message = await ada.said()
        assert await ada.frame(lambda frame: frame.get("ref") == ref) == {
            "type": "reply",
            "ref": ref,
            "data": {"at": message["at"]},
        }
        assert await ben.said() == message
        assert message.pop("at") > 1_600_000_000_000
        assert message == {"id": "x1", "from": "ada lovelace", "name": "Ada Lovelace", "text": "hello"}


async def test_a_message_that_is_repeated_is_answered_again_and_said_once(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada", "lobby") as ada, window(chat, "Ben", "lobby") as ben:
        first = await ada.say("once")
        again = await ada.say("once")
        assert first["data"] == again["data"]
        assert (await ben.said())["text"] == "once"
        await ben.client.silent()


async def test_who_has_left_a_group_hears_and_says_no_more_of_it(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada", "design") as ada, window(chat, "Ben", "design") as ben:
        await ada.ask("leave", group="design")
        assert (await ada.say("is anybody listening?", "design"))["code"] == "not_joined"
        await ben.say("nobody is", "design")
        await ada.client.silent()


async def test_who_enters_is_handed_the_last_messages(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada", "lobby") as ada, window(chat, "Ben") as ben:
        for number in range(3):
            await ada.say(f"for later {number}", id=str(number))
        events = (await ben.ask("join", group="lobby", last=2))["data"]["events"]
        assert [event["data"]["text"] for event in events] == ["for later 1", "for later 2"]


async def test_who_missed_more_than_can_be_proven_gets_the_last_messages_as_they_are(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada", "lobby") as ada, window(chat, "Ben") as ben:
        await ada.say("after the restart")
        before = {"epoch": "of another process", "offset": 7, "tag": "12345678"}
        answer = (await ben.ask("join", group="lobby", position=before))["data"]
        assert (answer["recovered"], answer["events"]) == (False, [])
        assert [message["text"] for message in answer["snapshot"]] == ["after the restart"]


async def test_the_others_see_who_comes_and_who_leaves(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada") as ada, window(chat, "Ben", "lobby") as ben:
        await ada.ask("join", group="lobby", presence="members")
        assert (await ben.ask("track", group="lobby", meta={"name": "Somebody else"}))["type"] == "reply"
        diff = await ada.frame(lambda frame: "ben" in frame.get("joins", ()))
        assert diff["joins"]["ben"]["metas"][0]["name"] == "Ben"  # whatever the page says
        await ben.ask("leave", group="lobby")
        diff = await ada.frame(lambda frame: "ben" in frame.get("leaves", ()))
        assert diff["leaves"]["ben"]["reason"] == "left"


async def test_the_others_hear_that_somebody_is_typing(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada", "lobby") as ada, window(chat, "Ben", "lobby") as ben:
        await ben.ask("whisper", group="lobby", event="typing", data=None)
        whisper = await ada.frame(lambda frame: frame["type"] == "whisper")
        assert (whisper["event"], whisper["from"], whisper["expires_ms"]) == ("typing", "ben", 5000)


async def test_a_client_that_speaks_too_fast_is_told_when_to_try_again(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada", "lobby") as ada:
        answers = [await ada.say("quick", id=str(number)) for number in range(15)]
        error = next(answer for answer in answers if answer["type"] == "error")
        assert (error["code"], error["temporary"]) == ("rate_limited", True)
        assert 0 < error["retry_after_ms"] <= 1000


@pytest.mark.parametrize(
    "data", [{"text": " ", "id": "1"}, {"text": "x" * 1001, "id": "1"}, {"text": "no id"}, ["say"]]
)
async def test_what_the_types_forbid_is_refused_and_the_connection_stays(load: Load, data: Any) -> None:
    async with window(load("chat/app"), "Ada", "lobby") as ada:
        answer = await ada.ask("event", event="say", group="lobby", data=data)
        assert answer["code"] == "invalid"
        assert (await ada.say("still here"))["type"] == "reply"


@pytest.mark.parametrize("group", ["no spaces", "-dash", "line\n", "x" * 41, "~ben", "a/b"])
async def test_a_group_needs_a_proper_name(load: Load, group: str) -> None:
    async with window(load("chat/app"), "Ada") as ada:
        assert (await ada.ask("join", group=group))["code"] in ("forbidden", "bad_name")


async def test_a_connection_is_in_twelve_groups_at_most(load: Load) -> None:
    chat = load("chat/app")
    async with window(chat, "Ada", *(f"g{number}" for number in range(12))) as ada:
        assert (await ada.ask("join", group="one-more"))["code"] == "too_many_groups"
        assert (await ada.ask("join", group="g0"))["type"] == "reply"  # being in it already is no new group
        assert (await ada.ask("refresh", token=await chat_token(chat, "Ada")))["type"] == "reply"
        assert (await ada.say("still in it", "g11"))["type"] == "reply"


async def test_without_a_token_nobody_comes_in(load: Load) -> None:
    with pytest.raises(Refused) as refusal:
        async with connect(load("chat/app").app, "/ws"):
            pass
    assert refusal.value.status == 401


@pytest.mark.parametrize("name", ["%20", "%3Cb%3E", "x" * 33, "_ada"])
async def test_a_name_that_is_no_name_gets_no_token(load: Load, name: str) -> None:
    async with http(load("chat/app").app) as client:
        assert (await client.post(f"/login/{name}")).status_code == 400


async def test_spaces_around_a_name_do_not_matter(load: Load) -> None:
    chat = load("chat/app")
    identity = chat.tokens.verify(await chat_token(chat, "%20Ada%20%20Lovelace%20"))
    assert (identity.identity, identity.display_name) == ("ada lovelace", "Ada Lovelace")


async def test_the_page_and_all_it_needs_comes_from_the_app_itself(load: Load) -> None:
    async with http(load("chat/app").app) as client:
        page = await client.get("/")
        assert page.status_code == 200
        paths = re.findall(r'(?:href|src)="(/[^"]+)"', page.text)
        paths += re.findall(r'from "\.?(/[^"]+)"', (STATIC / "chat.js").read_text("utf-8"))
        assert "/rt/starlette-rt.js" in paths
        for path in paths:
            path = path if path.startswith(("/static", "/rt")) else f"/static{path}"
            assert (await client.get(path)).status_code == 200
    for file in STATIC.iterdir():
        foreign = re.findall(r"https?://[^\s\"')]+", file.read_text("utf-8"))
        assert set(foreign) <= {"http://www.w3.org/2000/svg"}


def test_the_page_never_makes_markup_of_what_people_write() -> None:
    for script in STATIC.glob("*.js"):
        markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b"
        assert not re.search(markup, script.read_text("utf-8"))


def test_the_page_about_the_demonstration_shows_what_is_in_it() -> None:
    page = (DOCS / "demo.md").read_text("utf-8")
    first, last = re.findall(r'--8<-- "examples/chat/app\.py:(\d+):(\d+)"', page)[0]
    lines = (STATIC.parent / "app.py").read_text("utf-8").splitlines()
    shown = lines[int(first) - 1 : int(last)]
    assert shown[0] == "class Chat(RealtimeEndpoint):"
    assert lines[int(last) :][:2] == ["", ""]  # all of it
    script = (STATIC / "chat.js").read_text("utf-8")
    for line in re.findall(r"^```js\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0].splitlines():
        assert line in script


# The notifications.


async def jwt_of(app: Any, user: str) -> str:
    async with http(app) as client:
        token: str = (await client.post(f"/token/{user}")).json()["access_token"]
        return token


@pytest.mark.parametrize("carrier", ["subprotocol", "header"])
async def test_a_push_reaches_its_user_in_every_window_and_nobody_else(load: Load, carrier: Any) -> None:
    app = load("notifications/app").app
    ada, ben = await jwt_of(app, "ada"), await jwt_of(app, "ben")
    async with (
        connect(app, "/notifications", token=ben, carrier=carrier, subprotocols=["rt.plain"]) as first,
        connect(app, "/notifications", token=ben, carrier=carrier, subprotocols=["rt.plain"]) as second,
        connect(app, "/notifications", token=ada, carrier=carrier, subprotocols=["rt.plain"]) as other,
        http(app, ada) as client,
    ):
        assert first.subprotocol == "rt.plain"
        answer = await client.post("/documents/plan/share/ben")
        assert (answer.status_code, answer.json()) == (202, {"online": True})
        for window in (first, second):
            data = {"document": "plan", "by": "Ada Lovelace"}
            assert await window.receive_json() == {"event": "document_shared", "data": data}
        await other.silent()


async def test_a_def_route_pushes_too(load: Load) -> None:
    app = load("notifications/app").app
    token = await jwt_of(app, "ada")
    async with connect(app, "/notifications", token=token) as window, http(app, token) as client:
        assert (await client.post("/reports")).status_code == 202
        frame = await window.receive_json()
        assert (frame["event"], frame["data"]["lines"]) == ("report_ready", 14286)


async def test_sharing_with_someone_who_is_away_says_so(load: Load) -> None:
    app = load("notifications/app").app
    token = await jwt_of(app, "ada")
    async with connect(app, "/notifications", token=token), http(app, token) as client:
        assert (await client.post("/documents/plan/share/ben")).json() == {"online": False}
        assert (await client.post("/documents/plan/share/nobody")).status_code == 404


@pytest.mark.parametrize("token", [None, "forged"])
async def test_the_apps_own_dependency_guards_the_socket(load: Load, token: str | None) -> None:
    app = load("notifications/app").app
    with pytest.raises(Refused) as refusal:
        async with connect(app, "/notifications", token=token, carrier="subprotocol", subprotocols=["rt.plain"]):
            pass
    assert refusal.value.status == 401


async def test_nobody_unknown_gets_a_token(load: Load) -> None:
    async with http(load("notifications/app").app) as client:
        assert (await client.post("/token/mallory")).status_code == 404


# Coming from ConnectionManager.


@pytest.mark.parametrize("name", ["before", "after"])
async def test_the_chat_says_the_same_before_and_after(load: Load, name: str) -> None:
    app = load(f"connectionmanager/{name}").app
    async with connect(app, "/ws/1") as one:
        await one.send("alone")
        assert [await one.receive(), await one.receive()] == ["You wrote: alone", "Client 1 says: alone"]
        async with connect(app, "/ws/2") as two:
            await two.send("hello")
            assert [await two.receive(), await two.receive()] == ["You wrote: hello", "Client 2 says: hello"]
            assert await one.receive() == "Client 2 says: hello"
        assert await one.receive() == "Client 2 has left"


def code_of(name: str) -> str:
    """An example as the page shows it: without its docstring."""
    text = (DOCS / "examples" / "connectionmanager" / f"{name}.py").read_text("utf-8")
    return text.split('"""\n', 2)[-1].lstrip()


def test_the_page_about_connectionmanager_shows_the_two_files_as_they_are() -> None:
    page = (DOCS / "connectionmanager.md").read_text("utf-8")
    for name, first in re.findall(r'--8<-- "examples/connectionmanager/(\w+)\.py:(\d+):"', page):
        lines = (DOCS / "examples" / "connectionmanager" / f"{name}.py").read_text("utf-8").splitlines(keepends=True)
        assert "".join(lines[int(first) - 1 :]) == code_of(name)
    before, after = code_of("before").splitlines(keepends=True), code_of("after").splitlines(keepends=True)
    diff = "".join(difflib.unified_diff(before, after, "before.py", "after.py", n=1))
    assert f"```diff\n{diff}```" in page


# The cursors.


async def test_the_others_see_a_pointer_move_and_its_owner_does_not(load: Load) -> None:
    app = load("cursors/app").app
    async with connect(app, "/boards/front") as one, connect(app, "/boards/front") as other:
        me = (await one.receive_json())["data"]
        await until(other, lambda frame: frame["event"] == "welcome")
        await one.send_json({"x": 0.25, "y": 1})
        assert await other.receive_json() == {"event": "moved", "data": {**me, "x": 0.25, "y": 1.0}}
        await one.silent()
        await one.close()
        assert await other.receive_json() == {"event": "gone", "data": me}


async def test_boards_do_not_see_each_other(load: Load) -> None:
    app = load("cursors/app").app
    async with connect(app, "/boards/front") as one, connect(app, "/boards/back") as other:
        await one.receive_json()
        await other.receive_json()
        await one.send_json({"x": 0, "y": 0})
        await other.silent()


async def test_a_pointer_beside_the_board_is_refused(load: Load) -> None:
    async with connect(load("cursors/app").app, "/boards/front") as client:
        await client.receive_json()
        await client.send_json({"x": 1.5, "y": 0})
        assert (await client.receive_json())["code"] == "invalid"


async def test_a_board_that_fastapi_refuses_never_opens(load: Load) -> None:
    with pytest.raises(Refused):
        async with connect(load("cursors/app").app, "/boards/No%20Board"):
            pass


async def test_the_board_has_a_page(load: Load) -> None:
    async with http(load("cursors/app").app) as client:
        assert "<title>Cursors</title>" in (await client.get("/")).text
