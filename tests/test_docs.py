"""What the pages say is true: their programs run, their tables and frames are those of the code.

The law of this file: a page is read as text, and nothing is repeated here that stands there. A block under
``<!-- runs -->`` is a program; a table under ``<!-- arguments: dotted.name -->`` is checked against the signature.
What an example folder does is the business of test_examples.py, what a browser sees that of test_browser.py.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute

import starlette_rt
from starlette_rt import CloseCode, Identity, Realtime, RealtimeEndpoint, RealtimeMiddleware, TokenSigner
from starlette_rt.admission import SERVER_LOGGERS
from starlette_rt.frames import Error, PresenceCount, PresenceDiff, PresenceState
from starlette_rt.protocols.plain import PLAIN
from starlette_rt.testing import Client, Closed, Refused, connect, lifespan
from tests.floors import FLOORS
from tests.readme import README, first_block

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]


class Block(NamedTuple):
    """One fenced block: where it begins, its text, and the comment on the line above it."""

    page: Path
    line: int
    text: str
    comment: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, language: str) -> Iterator[Block]:
    """The fenced blocks of a language, those in tabs without their indentation."""
    text = page.read_text("utf-8")
    for found in re.finditer(rf"^( *)```{language}\b[^\n]*\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        above = text[: found.start()].rstrip("\n").rpartition("\n")[2]
        comment = re.fullmatch(r" *<!-- (.*) -->", above)
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, textwrap.dedent(found[2]), comment[1] if comment else "")


PYTHON = [block for page in PAGES for block in blocks(page, "python")]
RUNS = [block for block in PYTHON if block.comment == "runs"]


def page(name: str) -> Path:
    return DOCS / f"{name}.md"


def block(name: str, comment: str, language: str = "python") -> str:
    """The one block of a page with this comment above it."""
    (found,) = (block.text for block in blocks(page(name), language) if block.comment == comment)
    return found


def rows(page: Path, comment: str) -> list[list[str]]:
    """The cells of the table under a comment, without its head; a ``|`` inside of backticks is text."""
    table = page.read_text("utf-8").partition(f"<!-- {comment} -->\n")[2].partition("\n\n")[0]
    lines = [re.findall(r"\|((?:`[^`]*`|[^|`])*)(?=\|)", line) for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line] for line in lines]


def code(cell: str) -> str:
    return cell.strip("`")


def found_at(name: str) -> Any:
    """What a dotted name names, module or not."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise LookupError(name)


# Programs


def without_snippets(text: str) -> str:
    """A block that shows a file is that file's, and its tests are elsewhere."""
    return re.sub(r'^--8<-- ".*"$', "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_every_python_block_compiles(block: Block) -> None:
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compile(without_snippets(block.text), str(block), "exec", flags=flags, dont_inherit=True)


def test_the_pages_have_blocks_and_a_broken_one_would_be_found(tmp_path: Path) -> None:
    made_up = tmp_path / "made_up.md"
    made_up.write_text('text\n\n=== "Tab"\n\n    <!-- runs -->\n    ```python title="x"\n    x =\n    ```\n', "utf-8")
    (found,) = blocks(made_up, "python")
    assert found == Block(made_up, 6, "x =\n", "runs")
    with pytest.raises(SyntaxError):
        test_every_python_block_compiles(found)
    assert len(PYTHON) > len(RUNS) >= 10


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a block as a module of its own, where dataclasses and annotations are looked up."""

    def run(text: str) -> Any:
        module = ModuleType("block_of_a_page")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(text, module.__name__, "exec", dont_inherit=True), vars(module))
        return module

    return run


@pytest.mark.parametrize("block", RUNS, ids=str)
def test_a_block_that_is_said_to_run_runs(block: Block, run: Any) -> None:
    assert vars(run(block.text))


@pytest.mark.parametrize("name", ["authentication", "client", "events", "groups", "history", "index", "limits"])
def test_a_page_opens_with_a_program(name: str) -> None:
    assert next(blocks(page(name), "python")).comment == "runs"


def test_readme_and_start_page_show_the_same_app_and_the_same_lines() -> None:
    start = page("index")
    for language in ("python", "js", "sh"):
        assert next(blocks(start, language)).text == first_block(language)


# What the programs of the pages do


def token(app: Any, name: str, **options: Any) -> str:
    signed: str = app.tokens.sign(Identity(name, **options))
    return signed


def http(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver")


def program(name: str, title: str, number: int = 0) -> str:
    """The n-th block of a page under this title."""
    text = page(name).read_text("utf-8")
    found = re.findall(rf'^( *)```python title="{title}"\n(.*?)^\1```$', text, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(found[number][1])


async def refusal(app: Any, path: str, **options: Any) -> tuple[int, str | None]:
    with pytest.raises(Refused) as refused:
        async with connect(app, path, **options):
            pass
    return refused.value.status, refused.value.json().get("error")


@pytest.mark.parametrize("number", [0, 1], ids=["starlette", "fastapi"])
async def test_the_app_of_the_start_page_is_a_chat_in_both_tabs(run: Any, number: int) -> None:
    chat = run(program("index", "app.py", number))
    async with http(chat.app) as client:
        ada = (await client.post("/login/ada")).text
    async with connect(chat.app, "/ws", token=ada) as one, connect(chat.app, "/ws", token=token(chat, "ben")) as two:
        await one.send_json({"text": "hello"})
        assert await one.receive() == await two.receive() == '{"from":"ada","text":"hello"}'
        await one.send_json({})
        assert [await one.receive()] == next(blocks(page("index"), "json")).text.splitlines()
        assert set(await chat.rt.presence("lobby")) == {"ada", "ben"}
    assert await refusal(chat.app, "/ws") == (401, "unauthorized")


async def test_serve_gets_what_depends_resolved(run: Any) -> None:
    boards = run(program("index", "boards.py"))
    ada = token(boards, "7")
    async with connect(boards.app, "/boards/plans", token=ada, carrier="subprotocol") as client:
        await client.send_json([1, 2])
        assert await client.receive_json() == {"by": "Ada", "stroke": [1, 2]}
    for name, status in {"8": 403, "nobody": 401}.items():
        assert await refusal(boards.app, "/boards/plans", token=token(boards, name)) == (status, None)


async def test_the_function_style_of_the_start_page_broadcasts(run: Any) -> None:
    echo = run(program("index", "echo.py"))
    async with connect(echo.app, "/boards/x") as one, connect(echo.app, "/boards/x") as two:
        await one.send_json("line")
        assert await two.receive_json() == "line"


async def test_a_def_route_pushes_to_a_person(run: Any, anyio_backend: str) -> None:
    jobs = run(program("index", "jobs.py"))
    async with connect(jobs.app, "/notifications", token=token(jobs, "ada")) as client, http(jobs.app) as requests:
        assert (await requests.post("/jobs/ada")).status_code == 200
        assert await client.receive_json() == {"event": "job", "data": {"done": True}}


async def test_the_app_of_the_authentication_page_knows_scopes_tickets_and_revocation(run: Any) -> None:
    orders = run(program("authentication", "app.py"))
    async with http(orders.app) as client:
        ada, url = (await client.post("/login")).text, (await client.post("/ticket")).json()["url"]
        async with connect(orders.app, "/orders", token=ada) as open_:
            assert await open_.receive_json() == {"you are": "ada"}
            async with connect(orders.app, url):
                pass
            assert await refusal(orders.app, url) == (401, "token_expired")
            assert await refusal(orders.app, "/orders", token=token(orders, "ben")) == (403, "scope_missing")
            await client.post("/logout")
            assert await open_.closed() == CloseCode.UNAUTHORIZED
            assert await refusal(orders.app, "/orders", token=ada) == (401, "unauthorized")


async def test_the_refused_origin_reads_as_on_the_page(run: Any) -> None:
    orders = run(program("authentication", "app.py"))
    with pytest.raises(Refused) as refused:
        async with connect(orders.app, "/orders", origin="http://evil.example"):
            pass
    (shown,) = blocks(page("authentication"), "json")
    assert refused.value.body.decode() + "\n" == shown.text


async def test_a_token_of_another_issuer_opens_the_jwt_app(run: Any) -> None:
    jwt = pytest.importorskip("jwt")
    app = run(program("authentication", "jwt_app.py"))
    claims = {"sub": "ada", "name": "Ada", "scope": "read", "exp": 2**33, "aud": "orders"}
    signed = jwt.encode({**claims, "iss": "https://login.example.com"}, app.SECRET, "HS256")
    async with connect(app.app, "/ws", token=signed) as client:
        assert await client.receive_json() == {"hello": "Ada", "scopes": ["read"]}
    assert await refusal(app.app, "/ws", token=jwt.encode(claims, app.SECRET, "HS256")) == (401, "unauthorized")


async def test_the_app_of_the_groups_page_does_what_its_comments_say(run: Any) -> None:
    boards = run(program("groups", "app.py"))
    path = "/boards/plans"
    async with connect(boards.app, path, token=token(boards, "ada")) as ada, http(boards.app) as requests:
        assert (await ada.receive_json())["type"] == "presence_state"
        assert await until(ada, "welcome") == {"event": "welcome", "data": {"you": "ada"}}
        async with connect(boards.app, path, token=token(boards, "ben")) as ben:
            await until(ben, "welcome")
            await ben.send_json({"x": 1, "y": 2})
            assert (await until(ada, "moved"))["data"] == {"who": "ben", "x": 1.0, "y": 2.0}
            assert (await requests.post("/invite/ben")).text == "2"
            assert (await until(ben, "invited"))["data"] == {"board": "plans"}
            assert not any("moved" in str(frame) for frame in ben.pending)
        assert (await until(ada, "gone"))["data"] == {"who": "ben"}


async def until(client: Client, event: str) -> Any:
    """Receive until an event is there; each wait has the client's deadline."""
    while True:
        frame = await client.receive_json()
        if frame.get("event") == event:
            return frame


async def test_the_app_of_the_limits_page_answers_as_its_frames_say_and_closes_who_keeps_on(run: Any) -> None:
    chat = run(program("limits", "app.py"))
    wanted = block("limits", "frames: errors", "json").splitlines()
    async with connect(chat.app, "/ws") as client:
        for message in ['"' + "x" * 5000 + '"', "{"]:
            await client.send(message)
        assert [await client.receive() for _ in range(2)] == wanted[1:]
        with suppress(Closed):
            for _ in range(100):
                await client.send_json("again")
        said = [json.loads(message) async for message in client]
        assert await client.closed() == CloseCode.RATE_LIMITED
    (limited,) = {json.dumps({**frame, "retry_after_ms": 0}) for frame in said if isinstance(frame, dict)}
    assert json.loads(limited) == {**json.loads(wanted[0]), "retry_after_ms": 0}


async def frames(client: Client, count: int) -> list[Any]:
    """The next frames of the protocol v1, however they are batched."""
    heard: list[Any] = []
    while len(heard) < count:
        said = await client.receive_json()
        heard += said if isinstance(said, list) else [said]
    return heard


async def test_a_page_that_was_rendered_with_a_position_misses_nothing_after_it(run: Any) -> None:
    board = run(program("history", "app.py"))
    async with lifespan(board.app), http(board.app) as client:
        await board.rt.broadcast("board:7", [1.0], "stroke")
        html = (await client.get("/")).text
        assert "1 strokes so far" in html
        (position,) = re.findall(r"position: (\{.*?\})", html)
        await board.rt.broadcast("board:7", [2.0], "stroke")  # after the page was rendered, before it has connected
        async with connect(board.app, "/ws", subprotocols=["rt.v1.json"]) as page:
            assert (await page.receive_json())["type"] == "welcome"
            join = {"type": "join", "ref": 1, "group": "board:7", "position": json.loads(position)}
            await page.send_json(join)
            found = (await page.receive_json())["data"]
            assert (found["recovered"], [each["data"] for each in found["events"]]) == (True, [[2.0]])
            await page.send_json({"type": "event", "ref": 2, "event": "draw", "group": "board:7", "data": [3]})
            said, answered = await frames(page, 2)
            assert (said["event"], said["data"], answered["data"]) == ("stroke", [3.0], 3)


async def test_the_app_of_the_events_page_books_seats_and_asks_before_it_cancels(run: Any) -> None:
    hall = run(program("events", "app.py"))
    async with connect(hall.app, "/ws", subprotocols=["rt.v1.json"]) as client:
        await client.receive_json()
        book = {"type": "event", "event": "book", "group": "hall:7"}
        await client.send_json(
            [{"type": "join", "ref": 1, "group": "hall:7"}, {**book, "ref": 2, "data": {"row": "front"}}]
        )
        _, booked, answer = await frames(client, 3)
        assert (booked["data"], answer["data"]) == ({"row": "front", "left": 1}, {"left": 1})
        await client.send_json({**book, "ref": 3, "data": {"row": "front", "count": 5}})
        assert (await client.receive_json())["code"] == "full"
        await client.send_json({**book, "ref": 4, "data": {"count": 5}})
        assert (await client.receive_json())["message"].startswith("Object missing required field `row`")
        await client.send_json({"type": "event", "ref": 5, "event": "cancel_all"})
        assert (await client.receive_json())["code"] == "forbidden"


async def test_the_function_of_the_events_page_hands_events_on(run: Any) -> None:
    echo = run(program("events", "echo.py"))
    async with connect(echo.app, "/ws", subprotocols=["rt.v1.json"]) as client:
        await client.receive_json()
        await client.send_json({"type": "join", "ref": 1, "group": "board:1"})
        await client.receive_json()
        await client.send_json({"type": "event", "ref": 2, "event": "line", "group": "board:1", "data": [1]})
        assert {frame["type"] for frame in await frames(client, 2)} == {"event", "reply"}


# Tables


@pytest.mark.parametrize(
    ("name", "page"),
    [(name, page) for page in PAGES for name in re.findall(r"<!-- arguments: (\S+) -->", page.read_text("utf-8"))],
    ids=str,
)
def test_a_table_of_arguments_is_the_signature(name: str, page: Path) -> None:
    parameters = inspect.signature(found_at(name)).parameters.values()
    hidden = {"self", "app"} if name.endswith("Middleware") else {"self"}  # what Starlette itself hands over
    said = [[code(cell) for cell in row[:3]] for row in rows(page, f"arguments: {name}")]
    assert said == [[p.name, p.annotation, default(p)] for p in parameters if p.name not in hidden]


def default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is parameter.empty:
        return "required"
    return f"{value.__module__}.{value.__name__}" if callable(value) else repr(value)


def test_the_table_of_close_codes_is_the_one_of_the_code() -> None:
    said = [[code(cell) for cell in row] for row in rows(page("authentication"), "close codes")]
    assert said == [[str(int(c)), c.name, c.reason, c.when, "yes" if c.reconnect else "no"] for c in CloseCode]


def test_the_page_names_every_logger_that_is_kept_free_of_tokens() -> None:
    text = page("authentication").read_text("utf-8")
    assert [name for name in SERVER_LOGGERS if f"`{name}`" not in text] == []


def test_the_bounds_are_those_of_the_code() -> None:
    for bound, value, place in rows(page("limits"), "constants"):
        assert str(found_at(code(place.partition(";")[0]))) == code(value), bound


def test_the_floors_are_those_that_the_house_is_held_to() -> None:
    said = {(code(file), int(floor)) for floor, file, _ in rows(page("design"), "floors")}
    folders = {module.rpartition(".")[0] for module in FLOORS if "." in module} | {""}
    assert said == {
        (f"{module.replace('.', '/')}.py", floor) for module, floor in FLOORS.items() if module not in folders
    }


def test_every_public_name_has_its_place_in_the_reference() -> None:
    named = re.findall(r"^::: starlette_rt\.(\w+)$", page("reference").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(starlette_rt.__all__)


def test_the_members_that_the_reference_picks_exist() -> None:
    sections = re.split(r"^::: ", page("reference").read_text("utf-8"), flags=re.MULTILINE)[1:]
    for section in sections:
        name, *picked = re.findall(r"\A\S+|(?<=^        - )\w+", section, re.MULTILINE)
        assert [member for member in picked if not hasattr(found_at(name), member)] == [], name


# Frames

FRAMES = {"error", "presence_state", "presence_diff", "presence_count"}
DECODE = msgspec.json.Decoder(Error | PresenceState | PresenceDiff | PresenceCount).decode


SHOWN = [
    pytest.param(line, id=f"{block}-{number}")
    for page in PAGES
    if page.stem != "protocol"  # whose frames test_protocol.py reads
    for block in blocks(page, "json")
    for number, line in enumerate(block.text.splitlines())
    if '"type":' in line
]


@pytest.mark.parametrize("line", SHOWN)
def test_a_frame_on_a_page_is_spelled_as_on_the_wire(line: str) -> None:
    assert PLAIN["json"].encode(DECODE(line)) == line


def test_all_kinds_of_frames_are_shown() -> None:
    shown = {json.loads(str(parameter.values[0]))["type"] for parameter in SHOWN}
    assert shown == FRAMES


class Board(RealtimeEndpoint):
    """What the page tells of Ada and Ben."""

    async def on_connect(self, websocket: Any) -> None:
        await websocket.accept()
        await self.join("board:plans", presence="count" if self.user.identity == "zoe" else "members")
        if self.user.identity != "zoe":
            await self.track("board:plans", {"name": self.user.identity})

    async def on_receive(self, websocket: Any, data: str) -> None:
        if data == "leave":
            await self.leave("board:plans")
        else:
            await self.update("board:plans", {"name": data})


async def test_the_story_of_ada_and_ben_goes_as_the_page_tells_it() -> None:
    rt, tokens = Realtime(), TokenSigner(["a-key-of-thirty-two-bytes-at-least!"])
    live = Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)
    app = Starlette(routes=[WebSocketRoute("/", Board)], middleware=[live])
    wanted = block("groups", "frames: members", "json").splitlines()
    async with connect(app, "/", token=tokens.sign(Identity("ada"))) as ada:
        assert [await ada.receive() for _ in range(2)] == wanted[:2]
        async with connect(app, "/", token=tokens.sign(Identity("ben"))) as ben:
            assert await ada.receive() == wanted[2]
            async with connect(app, "/", token=tokens.sign(Identity("zoe"))) as zoe:
                assert [await zoe.receive()] == block("groups", "frames: count", "json").splitlines()
            for said, frame in zip(["Benjamin", "leave"], wanted[3:], strict=True):
                await ben.send_json(said)
                assert await ada.receive() == frame


# The five tests of the testing page


def test_the_five_tests_of_the_testing_page_pass(tmp_path: Path) -> None:
    run = five_tests(tmp_path, first_block())
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 passed" in run.stdout


def test_they_fail_on_a_chat_that_does_not_broadcast(tmp_path: Path) -> None:
    run = five_tests(tmp_path, first_block().replace("await self.broadcast(", "await self.push("))
    assert run.returncode == 1, run.stdout + run.stderr


def five_tests(folder: Path, app: str) -> subprocess.CompletedProcess[str]:
    """Do what the page says: the app in ``app.py``, the tests beside it, ``python -m pytest``."""
    (folder / "app.py").write_text(app, "utf-8")
    (folder / "test_chat.py").write_text(block("testing", "five tests"), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder), "test_chat.py"]
    command += ["-p", "no:asyncio", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=50)
