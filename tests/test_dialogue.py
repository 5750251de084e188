"""What a client of the protocol v1 asks and gets, seen from its end of the wire, in both spellings where that matters.

The law of this file: a client says frames and hears frames, as docs/protocol.md has them; of the server it knows the
hooks that the test wrote. What takes time has a gate that the test opens. `Stage`, `Talk` and `board` are also the
tools of the tests of other modules that need such a client.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starlette_rt import (
    EventError,
    History,
    Identity,
    RateLimit,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
    Unavailable,
    Whisper,
    dialogue,
    event,
)
from starlette_rt import connection as connections
from starlette_rt.backends.memory import MemoryLimits
from starlette_rt.connection import Connection
from starlette_rt.frames import Refresh
from starlette_rt.outbox import OutboxLimits
from starlette_rt.testing import Client, connect, lifespan

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

JSON, PACK = "rt.v1.json", "rt.v1.msgpack"
DEADLINE = 5.0  # seconds that any wait of these tests may take
SESSION, OTHER = "s" * 22, "t" * 22

both = pytest.mark.parametrize("spelling", [JSON, PACK])
tokens = TokenSigner(["k" * 32])

Frame = dict[str, Any]


class Talk:
    """A client of the protocol v1: says frames, hears frames."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.welcome: Frame = {}
        self._frames: deque[Frame] = deque()
        self._refs = itertools.count(1)

    async def say(self, *frames: Frame) -> None:
        """Say one frame, or several as a batch."""
        said = frames[0] if len(frames) == 1 else list(frames)
        await self.client.send(json.dumps(said) if self.client.subprotocol == JSON else msgspec.msgpack.encode(said))

    async def hear(self) -> Frame:
        """Return the next frame."""
        while not self._frames:
            self._frames += frames_of(await self.client.receive())
        return self._frames.popleft()

    async def heard(self, count: int) -> list[Frame]:
        """Return so many frames."""
        return [await self.hear() for _ in range(count)]

    async def ask(self, type: str, **fields: Any) -> Frame:
        """Say a request; return its answer, which is the next thing that is said."""
        ref = next(self._refs)
        await self.say({"type": type, "ref": ref, **fields})
        answer = await self.hear()
        assert (answer["type"] in ("reply", "error"), answer.get("ref")) == (True, ref), answer
        return answer

    async def get(self, type: str, **fields: Any) -> Any:
        """Ask, and return the data of the reply."""
        answer = await self.ask(type, **fields)
        assert answer["type"] == "reply", answer
        return answer["data"]

    async def refused(self, type: str, **fields: Any) -> str:
        """Ask, and return the code of the refusal."""
        answer = await self.ask(type, **fields)
        assert answer["type"] == "error", answer
        return str(answer["code"])

    async def answers(self, *refs: int) -> dict[int, str]:
        """Hear until these are answered, and nothing else; return each with its code, or ``reply``."""
        found = await self.heard(len(refs))
        assert sorted(frame["ref"] for frame in found) == sorted(refs), found
        return {frame["ref"]: frame.get("code", "reply") for frame in found}

    async def silent(self) -> None:
        assert not self._frames, self._frames
        await self.client.silent()


def frames_of(raw: str | bytes) -> list[Frame]:
    """The frames of a message."""
    said = json.loads(raw) if isinstance(raw, str) else msgspec.msgpack.decode(raw)
    return said if isinstance(said, list) else [said]


class Stage:
    """An app with one endpoint, while it runs; at its end nothing of any client is left."""

    def __init__(self, endpoint: Any, *, tokens: Any = tokens, **settings: Any) -> None:
        self.rt = Realtime(**{"presence_grace": 0, **settings})
        middleware = [Middleware(RealtimeMiddleware, realtime=self.rt, tokens=tokens)]
        self.app = Starlette(routes=[WebSocketRoute("/ws", endpoint)], middleware=middleware)
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Stage:
        await self._exits.enter_async_context(lifespan(self.app))
        return self

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        async with self._exits:
            if error is None:
                await until(lambda: not self.rt.connections)
                assert not self.rt.hub.groups

    @asynccontextmanager
    async def talk(
        self, name: str | None = None, *, session: str | None = None, spelling: str = JSON, ttl: float = 3600
    ) -> AsyncIterator[Talk]:
        """A client: this person, or a guest; welcomed already."""
        offered = [spelling] if session is None else [spelling, f"rt.session.{session}"]
        proof = None if name is None else token(name, ttl=ttl)
        async with connect(self.app, "/ws", token=proof, subprotocols=offered, timeout=DEADLINE) as client:
            talk = Talk(client)
            talk.welcome = await talk.hear()
            yield talk

    @asynccontextmanager
    async def plain(self, name: str | None = None) -> AsyncIterator[Client]:
        """A client that knows no protocol of ours."""
        proof = None if name is None else token(name)
        async with connect(self.app, "/ws", token=proof, timeout=DEADLINE) as client:
            yield client

    @property
    def connection(self) -> Connection:
        """The connection that came last."""
        return list(self.rt.connections.values())[-1]


def token(name: str, *, ttl: float = 3600, scopes: Any = ()) -> str:
    return tokens.sign(Identity(name, scopes=scopes), ttl=ttl)


async def until(ready: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE):
        while not ready():
            await checkpoint()


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await checkpoint()


@dataclass
class Point:
    x: int
    y: int


class Board(RealtimeEndpoint):
    """Groups that begin with ``board`` may be joined; a few handlers and whispers."""

    anonymous = True
    whispers = {
        "typing": Whisper(bool),
        "cursor": Whisper(Point, expires=5),
        "rare": Whisper(Any, limit=RateLimit("1/hour")),
        "every": Whisper(int, latest=False),
    }

    async def authorize(self, group: str) -> bool:
        return group.startswith("board")

    async def on_track(self, group: str, meta: dict[str, Any]) -> Any:
        return {**meta, "group": group}

    @event("echo")
    async def echo(self, data: Any) -> Any:
        return data

    @event("say")
    async def say(self, data: str, group: str) -> Any:
        await self.broadcast(group, data, "said")
        return {"letters": len(data)}

    @event("join")
    async def let_in(self, data: str) -> None:
        await self.join(data)

    @event("leave")
    async def let_out(self, data: str) -> None:
        await self.leave(data)


def board(*functions: Any, **settings: Any) -> type[Board]:
    """A `Board` with these hooks and handlers, by their names."""
    return type("Made", (Board,), {**{each.__name__: each for each in functions}, **settings})


def echo(ref: int | None = None, data: Any = None, **fields: Any) -> Frame:
    """The frame of an event that is answered with its data."""
    return emit("echo", ref, data=data, **fields)


def emit(name: str, ref: int | None = None, **fields: Any) -> Frame:
    return {"type": "event", "event": name, **({} if ref is None else {"ref": ref}), **fields}


# The first frame


@both
async def test_the_first_frame_says_who_the_client_is_and_what_it_may_count_on(spelling: str) -> None:
    made = board(max_message_size=1000)
    async with Stage(made, ping_interval=20, ping_timeout=10) as stage:
        async with stage.talk("ann", session=SESSION, spelling=spelling) as ann:
            assert ann.client.subprotocol == spelling
            ttl = ann.welcome.pop("ttl_ms")
            assert 3_500_000 < ttl <= 3_600_000
            assert ann.welcome == {
                "type": "welcome",
                "connection": stage.connection.id,
                "session": SESSION,
                "identity": "ann",
                "ping_interval_ms": 20_000,
                "ping_timeout_ms": 10_000,
                "once_ms": 3_600_000,
                "window": 32,
                "max_size": 1000,
            }
        async with stage.talk(spelling=spelling) as guest:
            assert guest.welcome["ttl_ms"] is None
            assert guest.welcome["identity"].startswith("guest:")
            assert guest.welcome["session"] == guest.welcome["connection"]


async def test_what_is_said_in_on_connect_follows_the_welcome() -> None:
    async def on_connect(self: Any, websocket: WebSocket) -> None:
        await self.push("before")
        await self.join("lobby")
        await websocket.accept()
        await self.push("after")

    async with Stage(board(on_connect)) as stage, stage.talk() as client:
        assert client.welcome["type"] == "welcome"
        first, joined, second = await client.heard(3)
        assert (first["data"], joined["type"], second["data"]) == ("before", "joined", "after")


# Answers


REQUESTS: list[Frame] = [
    {"type": "join", "group": "board"},
    {"type": "event", "event": "echo", "data": 1},
    {"type": "whisper", "group": "board", "event": "typing", "data": True},
    {"type": "track", "group": "board", "meta": {}},
    {"type": "update", "group": "board", "meta": {"a": 1}},
    {"type": "untrack", "group": "board"},
    {"type": "presence", "group": "board"},
    {"type": "leave", "group": "board"},
]


@both
async def test_every_request_with_a_ref_is_answered_once_in_order(spelling: str) -> None:
    async with Stage(Board) as stage, stage.talk(spelling=spelling) as client:
        await client.say(*({**frame, "ref": ref} for ref, frame in enumerate(REQUESTS)))
        answers = await client.heard(len(REQUESTS))
        assert [answer["ref"] for answer in answers] == list(range(len(REQUESTS)))
        assert {answer["type"] for answer in answers} == {"reply"}
        assert all("data" in answer for answer in answers), "also where it is null"
        await client.silent()


@both
async def test_a_refresh_is_answered_too(spelling: str) -> None:
    async with Stage(Board) as stage, stage.talk("ann", spelling=spelling) as ann:
        assert set(await ann.get("refresh", token=token("ann"))) == {"ttl_ms"}
        await ann.silent()


async def test_without_a_ref_nothing_is_answered() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        await client.say(*REQUESTS)
        await client.say({"type": "pong"}, {"type": "from the future", "ref": 9}, echo(data=1))
        await client.silent()
        assert await client.get("event", event="echo", data=2) == 2


async def test_without_a_ref_a_refusal_is_said_without_one() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        for frame in (emit("nothing"), {"type": "join", "group": "other"}, emit("say", data="hi", group="board")):
            await client.say(frame)
            answer = await client.hear()
            assert answer["type"] == "error"
            assert "ref" not in answer
        assert await client.refused("event", event="nothing") == "unknown_event"


async def test_zero_is_a_ref() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        await client.say(echo(0, "a"), emit("nothing", 0))
        assert await client.heard(2) == [
            {"type": "reply", "ref": 0, "data": "a"},
            {
                "type": "error",
                "ref": 0,
                "code": "unknown_event",
                "message": "there is no event 'nothing' here",
                "temporary": False,
            },
        ]


@both
async def test_an_answer_comes_after_everything_that_its_handler_said(spelling: str) -> None:
    @event("work")
    async def work(self: Any, data: Any) -> str:
        await self.broadcast("board", 1)
        await self.push(2)
        await turns()
        await self.broadcast("board", 3)
        await self.push(4)
        return "done"

    async with Stage(board(work)) as stage, stage.talk(spelling=spelling) as client:
        await client.get("join", group="board")
        await client.say(emit("work", 7), echo(8))
        said = await client.heard(6)
        assert [frame.get("ref", frame["data"]) for frame in said] == [1, 2, 3, 4, 7, 8]


@both
async def test_what_a_handler_returns_is_the_data_of_the_reply(spelling: str) -> None:
    @event("make")
    async def make(self: Any, data: str) -> Any:
        return {"point": Point(1, 2), "none": None, "surrogate": "\ud800", "object": object(), "bytes": b"raw"}[data]

    async with Stage(board(make)) as stage, stage.talk(spelling=spelling) as client:
        assert await client.get("event", event="make", data="point") == {"x": 1, "y": 2}
        assert await client.get("event", event="make", data="none") is None
        assert await client.get("event", event="make", data="bytes") == ("cmF3" if spelling == JSON else b"raw")
        for nothing in ("surrogate", "object"):
            assert await client.refused("event", event="make", data=nothing) == "internal"


# What is not understood


async def test_a_malformed_frame_is_answered_in_its_place_and_takes_no_other_with_it() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        await client.say(
            echo(1), {"type": "join", "ref": 2}, emit("", 3), {"type": "event", "ref": 4, "event": 5}, echo(5)
        )
        assert await client.answers(1, 2, 3, 4, 5) == {
            1: "reply",
            2: "invalid",
            3: "bad_name",
            4: "invalid",
            5: "reply",
        }
        await client.silent()


@both
async def test_text_where_bytes_are_spoken_and_the_other_way_round_closes(spelling: str) -> None:
    async with Stage(Board) as stage, stage.talk(spelling=spelling) as client:
        await client.client.send(b"{}" if spelling == JSON else "{}")
        assert await client.client.closed() == 1003


@both
async def test_a_message_that_holds_no_frame_is_answered_without_a_ref(spelling: str) -> None:
    async with Stage(Board) as stage, stage.talk(spelling=spelling) as client:
        await client.client.send("[1" if spelling == JSON else b"\xc1")
        answer = await client.hear()
        assert (answer["code"], "ref" in answer) == ("bad_message", False)
        await client.say([])  # type: ignore[arg-type] - a batch of nothing
        await client.silent()


async def test_a_message_beyond_the_size_is_answered_and_not_handled() -> None:
    async with Stage(board(max_message_size=100)) as stage, stage.talk() as client:
        await client.say(echo(1, "x" * 100))
        assert (await client.hear())["code"] == "too_large"
        assert await client.get("event", event="echo", data=1) == 1


async def test_data_of_the_wrong_type_is_answered_with_the_place() -> None:
    @event("move")
    async def move(self: Any, data: Point) -> int:
        return data.x

    async with Stage(board(move)) as stage, stage.talk() as client:
        assert await client.get("event", event="move", data={"x": 3, "y": 0}) == 3
        answer = await client.ask("event", event="move", data={"x": 3, "y": "0"})
        assert answer["code"] == "invalid"
        assert answer["message"] == "Expected `int`, got `str` - at `$.y`"


async def test_who_keeps_on_sending_what_is_refused_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "FAULTS", RateLimit("50/hour"))
    async with Stage(Board) as stage, stage.talk() as client:
        for _ in range(50):
            assert await client.refused("event", event="nothing") == "unknown_event"
        await client.say(emit("nothing"))
        assert await client.client.closed() == 4502


# Events


async def test_an_event_is_said_in_a_group_only_by_who_is_in_it_and_before_any_handler_runs() -> None:
    ran: list[Any] = []

    @event("note")
    async def note(self: Any, data: Any, group: str | None = None) -> None:
        ran.append(group)

    async with Stage(board(note)) as stage, stage.talk("ann") as ann:
        for group in ("board", "elsewhere", "~ann"):
            assert await ann.refused("event", event="note", group=group) == "not_joined"
        assert ran == []
        await ann.get("join", group="board")
        await ann.get("event", event="note", group="board")
        await ann.get("event", event="note")
        assert ran == ["board", None]
        await ann.get("leave", group="board")
        assert await ann.refused("event", event="note", group="board") == "not_joined"


async def test_a_handler_takes_data_and_group_as_it_is_written() -> None:
    @event("bare")
    async def bare(self: Any) -> str:
        return "bare"

    @event("grouped")
    async def grouped(self: Any, group: str) -> str:
        return group

    async with Stage(board(bare, grouped)) as stage, stage.talk() as client:
        await client.get("join", group="board")
        assert await client.get("event", event="bare") == "bare"
        assert await client.get("event", event="bare", data={"ignored": 1}, group="board") == "bare"
        assert await client.get("event", event="grouped", group="board") == "board"
        answer = await client.ask("event", event="grouped")
        assert (answer["code"], answer["message"]) == ("invalid", "'grouped' is said to a group: give it one")


async def test_what_no_handler_takes_goes_to_on_receive_only_if_it_is_a_message() -> None:
    async def on_receive(self: Any, websocket: WebSocket, data: Point) -> int:
        return data.x

    async with Stage(board(on_receive)) as stage, stage.talk() as client:
        assert await client.get("event", event="message", data={"x": 1, "y": 2}) == 1
        assert await client.refused("event", event="message", data={"x": 1}) == "invalid"
        assert await client.refused("event", event="massage", data={"x": 1, "y": 2}) == "unknown_event"


async def test_a_scope_opens_a_handler_to_who_has_it() -> None:
    @event("ban", scopes=["admin", "here"])
    async def ban(self: Any) -> str:
        return "banned"

    async with Stage(board(ban)) as stage:
        async with stage.talk("ann") as ann:
            answer = await ann.ask("event", event="ban")
            assert (answer["code"], answer["message"]) == ("forbidden", "this needs the scope admin")
        for scopes, code in ((["admin"], "forbidden"), (["here", "admin", "more"], "reply")):
            async with connect(stage.app, "/ws", token=token("bob", scopes=scopes), subprotocols=[JSON]) as client:
                bob = Talk(client)
                await bob.hear()
                assert (await bob.ask("event", event="ban")).get("code", "reply") == code


async def test_the_limit_of_one_event_is_its_own() -> None:
    @event("rare", limit=RateLimit("2/hour"))
    async def rare(self: Any) -> None: ...

    async with Stage(board(rare)) as stage, stage.talk() as client:
        for _ in range(2):
            await client.get("event", event="rare")
        answer = await client.ask("event", event="rare")
        assert (answer["code"], answer["temporary"]) == ("rate_limited", True)
        assert 0 < answer["retry_after_ms"] <= 1_800_000
        assert await client.get("event", event="echo", data=1) == 1
        async with stage.talk() as other:
            await other.get("event", event="rare")


async def test_a_handler_refuses_and_fails_to_the_one_who_asked() -> None:
    @event("fail")
    async def fail(self: Any, data: str) -> None:
        raise {"refuse": EventError("full", "no seat"), "wait": EventError("full", retry_after=2)}.get(
            data
        ) or KeyError(1)

    async with Stage(board(fail)) as stage, stage.talk() as client:
        answer = await client.ask("event", event="fail", data="refuse")
        assert (answer["code"], answer["message"], answer["temporary"]) == ("full", "no seat", False)
        assert (await client.ask("event", event="fail", data="wait"))["retry_after_ms"] == 2000
        answer = await client.ask("event", event="fail", data="bug")
        assert (answer["code"], answer["temporary"]) == ("internal", False)
        assert await client.get("event", event="echo", data=1) == 1


# Batches


def stopping(error: Exception) -> Any:
    """An endpoint whose event ``stop`` ends with this error."""

    @event("stop")
    async def stop(self: Any) -> None:
        raise error

    return board(stop)


@both
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EventError("full", "no seat", retry_after=0), "full"),
        (EventError("later", retry_after=60), "later"),
        (Unavailable("the backend rests"), "unavailable"),
    ],
)
async def test_a_batch_stops_at_a_temporary_error_and_the_rest_is_not_handled(
    error: Exception, code: str, spelling: str
) -> None:
    async with Stage(stopping(error)) as stage, stage.talk(spelling=spelling) as client:
        rest = [echo(3), echo(), {"type": "join", "ref": 4, "group": "board"}, emit("nothing", 5)]
        await client.say(echo(1), emit("stop", 2), *rest)
        answers = await client.heard(5)
        assert [(each["ref"], each.get("code")) for each in answers] == [
            (1, None),
            (2, code),
            *((ref, "skipped") for ref in (3, 4, 5)),
        ]
        assert all(each["temporary"] for each in answers[1:])
        assert stage.connection.groups == frozenset()
        await client.say(echo(6), echo(7))
        assert await client.answers(6, 7) == {6: "reply", 7: "reply"}, "the next batch is another"
        await client.silent()


@pytest.mark.parametrize(
    ("error", "code"), [(EventError("full", "no seat"), "full"), (RuntimeError("a bug"), "internal")]
)
async def test_an_error_that_lasts_stops_nothing(error: Exception, code: str) -> None:
    async with Stage(stopping(error)) as stage, stage.talk() as client:
        await client.say(emit("stop", 1), emit("nothing", 2), emit("say", 3, data=1, group="board"), echo(4))
        assert await client.answers(1, 2, 3, 4) == {1: code, 2: "unknown_event", 3: "not_joined", 4: "reply"}


async def test_what_is_said_alone_stops_nothing() -> None:
    async with Stage(stopping(EventError("full", retry_after=1))) as stage, stage.talk() as client:
        await client.say(emit("stop", 1))
        await client.say(echo(2))
        assert await client.answers(1, 2) == {1: "full", 2: "reply"}


async def test_a_batch_stops_where_a_limit_of_the_place_is_met() -> None:
    async with Stage(board(limits=[RateLimit("2/hour")])) as stage, stage.talk() as client:
        await client.say(echo(1, "a"), echo(2, "b"), echo(3), echo(), echo(4))
        assert await client.answers(1, 2, 3, 4) == {1: "reply", 2: "reply", 3: "rate_limited", 4: "skipped"}
        await client.silent()
        assert stage.rt.stats()["rejected.rate_limited"] == 1


async def test_what_is_too_much_for_the_place_is_answered_with_the_time_to_wait() -> None:
    async with Stage(board(limits=[RateLimit("2/hour")])) as stage, stage.talk() as client:
        for _ in range(2):
            await client.get("event", event="echo")
        answer = await client.ask("event", event="echo")
        assert (answer["code"], answer["temporary"]) == ("rate_limited", True)
        assert 0 < answer["retry_after_ms"] <= 1_800_000
        await client.say(echo())
        assert "ref" not in await client.hear()


async def test_a_batch_stops_where_the_limit_of_an_event_is_met() -> None:
    @event("rare", limit=RateLimit("1/hour"))
    async def rare(self: Any) -> None: ...

    async with Stage(board(rare)) as stage, stage.talk() as client:
        await client.say(emit("rare", 1), emit("rare", 2), echo(3))
        assert await client.answers(1, 2, 3) == {1: "reply", 2: "rate_limited", 3: "skipped"}


async def test_what_waits_before_a_refused_frame_is_handled_however_late() -> None:
    gate = anyio.Event()

    @event("wait")
    async def wait(self: Any) -> None:
        await gate.wait()

    async with Stage(board(wait, limits=[RateLimit("3/hour")])) as stage, stage.talk() as client:
        await client.say(emit("wait", 1))
        await turns()
        await client.say(echo(2))
        await client.say(echo(3), echo(4), echo(5))
        assert await client.answers(4, 5) == {4: "rate_limited", 5: "skipped"}
        gate.set()
        assert (await client.answers(1, 2, 3))[2] == "reply"


async def test_the_bytes_of_a_message_are_paid_once() -> None:
    async with Stage(board(limits=[RateLimit("1000/hour", unit="bytes")])) as stage, stage.talk() as client:
        batch = [echo(ref, "x" * 300) for ref in (1, 2)]
        assert 500 < len(json.dumps(batch)) < 1000
        await client.say(*batch)
        assert await client.answers(1, 2) == {1: "reply", 2: "reply"}
        await client.say(*batch)
        assert await client.answers(1, 2) == {1: "rate_limited", 2: "skipped"}


# The window


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four requests may be unanswered."""
    monkeypatch.setattr(dialogue, "WINDOW", 4)


def gated(gate: anyio.Event, **options: Any) -> type[Board]:
    """An endpoint whose event ``wait`` ends when the gate is open."""

    @event("wait", **options)
    async def wait(self: Any, data: Any) -> Any:
        await gate.wait()
        return data

    return board(wait)


async def test_what_is_beyond_the_window_is_answered_busy_and_can_be_said_again(narrow: None) -> None:
    gate = anyio.Event()
    async with Stage(gated(gate)) as stage, stage.talk() as client:
        for ref in range(6):
            await client.say(emit("wait", ref))
            await turns()
        busy = await client.heard(2)
        assert busy[0] == {
            "type": "error",
            "ref": 4,
            "code": "busy",
            "message": "too many requests are unanswered",
            "temporary": True,
            "retry_after_ms": 100,
        }
        assert (busy[1]["ref"], busy[1]["code"]) == (5, "busy")
        await client.say(emit("wait"))  # nothing to answer
        gate.set()
        assert set((await client.answers(0, 1, 2, 3)).values()) == {"reply"}
        assert await client.get("event", event="echo", data="again") == "again"
        assert stage.rt.stats().get("rejected.busy") is None, "it does not count as a refusal"


async def test_a_batch_stops_at_the_window(narrow: None) -> None:
    gate = anyio.Event()
    async with Stage(gated(gate)) as stage, stage.talk() as client:
        await client.say(emit("wait", 0))
        await turns()
        await client.say(*(echo(ref) for ref in range(1, 20)))
        refused = await client.answers(*range(4, 20))
        assert refused == {4: "busy", **dict.fromkeys(range(5, 20), "skipped")}
        gate.set()
        assert await client.answers(0, 1, 2, 3) == dict.fromkeys(range(4), "reply")


@pytest.mark.parametrize("kind", ["event", "leave"])
async def test_twice_the_window_is_too_much(kind: str, narrow: None) -> None:
    gate = anyio.Event()
    frame = echo() if kind == "event" else {"type": "leave", "group": "board"}
    room = 3 if kind == "event" else 7  # a leave is let in for longer
    async with Stage(gated(gate)) as stage, stage.talk() as client:
        await client.say(emit("wait", 0))
        await turns()
        for _ in range(room + 4):
            await client.say(frame)
        await turns()
        assert stage.connection.is_open
        await client.say(frame)
        assert await client.client.closed() == 4002
        gate.set()


async def test_what_is_accepted_again_forgives_what_was_too_much(narrow: None) -> None:
    gates = [anyio.Event(), anyio.Event()]

    @event("wait")
    async def wait(self: Any, data: int) -> None:
        await gates[data].wait()

    async with Stage(board(wait)) as stage, stage.talk() as client:
        for gate in range(2):
            await client.say(emit("wait", 0, data=gate))
            await turns()
            for ref in range(1, 8):
                await client.say(echo(ref))
            assert set((await client.answers(4, 5, 6, 7)).values()) == {"busy"}
            gates[gate].set()
            await client.answers(0, 1, 2, 3)
        assert stage.connection.is_open


async def test_what_runs_beside_the_others_counts_for_the_window(narrow: None) -> None:
    gate = anyio.Event()
    async with Stage(gated(gate, concurrency=10)) as stage, stage.talk() as client:
        for ref in range(4):
            await client.say(emit("wait", ref))
        await turns()
        await client.say(echo(4))
        assert await client.answers(4) == {4: "busy"}
        gate.set()
        await client.answers(0, 1, 2, 3)
        assert await client.get("event", event="echo", data=1) == 1


# Handlers that run beside the others


async def test_handlers_run_one_after_the_other_unless_they_are_declared_to_run_beside() -> None:
    running: list[int] = []
    most: dict[str, int] = {}
    gate = anyio.Event()

    async def run(self: Any, data: str) -> str:
        running.append(1)
        most[data] = max(most.get(data, 0), len(running))
        await gate.wait() if data == "wide" else await turns()
        running.pop()
        return data

    async with Stage(board(event("wide", concurrency=3)(run), narrow=event("narrow")(copied(run)))) as stage:
        async with stage.talk() as client:
            await client.say(*(emit("narrow", ref, data="narrow") for ref in range(5)))
            await client.answers(*range(5))
            await client.say(*(emit("wide", ref, data="wide") for ref in range(5)), echo(5))
            await turns(50)
            assert len(running) == 3, "and not one more"
            await client.silent()
            gate.set()
            answers = await client.heard(6)
            assert {answer["ref"] for answer in answers} == set(range(6))
    assert most == {"narrow": 1, "wide": 3}


def copied(function: Any) -> Any:
    """The same function once more: a declaration is an attribute of it."""

    async def copy(self: Any, data: str) -> Any:
        return await function(self, data)

    return copy


async def test_what_runs_beside_is_answered_when_it_ends_and_others_before_it() -> None:
    gate = anyio.Event()
    async with Stage(gated(gate, concurrency=2)) as stage, stage.talk() as client:
        await client.say(emit("wait", 1), echo(2), emit("nothing", 3))
        assert await client.answers(2, 3) == {2: "reply", 3: "unknown_event"}
        gate.set()
        assert await client.answers(1) == {1: "reply"}


async def test_what_runs_beside_refuses_and_fails_as_others_do() -> None:
    @event("fail", concurrency=2)
    async def fail(self: Any, data: bool) -> None:
        raise EventError("full") if data else RuntimeError("a bug")

    async with Stage(board(fail)) as stage, stage.talk() as client:
        for _ in range(3):  # more often than there are places
            assert await client.refused("event", event="fail", data=True) == "full"
            assert await client.refused("event", event="fail", data=False) == "internal"


async def test_what_runs_beside_has_its_time_when_the_client_has_left() -> None:
    gate, ended = anyio.Event(), list[Any]()

    @event("wait", concurrency=5)
    async def wait(self: Any, data: Any) -> None:
        await gate.wait()
        ended.append(data)

    async def on_disconnect(self: Any, websocket: WebSocket, close_code: int) -> None:
        ended.append(close_code)

    async with Stage(board(wait, on_disconnect)) as stage, stage.talk() as client:
        await client.say(emit("wait", data=1), emit("wait", data=1))
        await turns()
        await client.client.close()
        await turns()
        assert ended == []
        gate.set()
        await until(lambda: len(ended) == 3)
        assert ended == [1, 1, 1000]


async def test_what_runs_beside_has_no_more_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.01)
    ended: list[str] = []

    @event("hang", concurrency=5)
    async def hang(self: Any) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ended.append("cancelled")

    async with Stage(board(hang)) as stage, stage.talk() as client:
        await client.say(emit("hang"), emit("hang"))
        await turns()
        await client.client.close()
        await until(lambda: ended == ["cancelled"] * 2)


# Joining


async def test_nobody_joins_anything_unless_the_host_says_so() -> None:
    class Closed(RealtimeEndpoint):
        anonymous = True

    async with Stage(Closed) as stage, stage.talk() as client:
        answer = await client.ask("join", group="board")
        assert (answer["code"], answer["message"]) == ("forbidden", "you may not join board")
        assert stage.connection.groups == frozenset()


@both
async def test_who_may_join_is_in_the_group_from_then_on(spelling: str) -> None:
    async with Stage(Board) as stage, stage.talk(spelling=spelling) as client, stage.talk() as other:
        await other.get("join", group="board:1")
        assert await client.get("join", group="board:1") == {"position": None, "recovered": True, "events": []}
        assert await client.refused("join", group="lobby") == "forbidden"
        await other.say(emit("say", 9, data="hello", group="board:1"))
        assert await client.hear() == {"type": "event", "event": "said", "group": "board:1", "data": "hello"}
        assert (await other.heard(2))[1]["data"] == {"letters": 5}
        await client.get("leave", group="board:1")
        await stage.rt.broadcast("board:1", "nobody hears it")
        await client.silent()


async def test_an_authorize_that_refuses_with_a_reason_is_heard() -> None:
    async def authorize(self: Any, group: str) -> bool:
        raise EventError("full", "no seat", retry_after=3)

    async with Stage(board(authorize)) as stage, stage.talk() as client:
        answer = await client.ask("join", group="board")
        assert (answer["code"], answer["retry_after_ms"]) == ("full", 3000)


async def test_a_group_of_the_servers_cannot_be_joined_left_or_tracked() -> None:
    async with Stage(Board) as stage, stage.talk("ann") as ann:
        assert await ann.refused("join", group="~bob") == "bad_name"
        assert await ann.refused("leave", group="~ann") == "bad_name"
        assert await ann.refused("untrack", group="~ann") == "bad_name"
        assert await ann.refused("track", group="~ann") == "not_joined"
        assert await ann.refused("presence", group="~ann") == "not_joined"
        assert await ann.refused("whisper", group="~ann", event="typing", data=True) == "not_joined"
        assert await stage.rt.online(["ann"]) == {"ann"}


async def test_the_group_of_ones_own_identity_cannot_be_joined_either() -> None:
    async with Stage(Board) as stage, stage.talk("ann") as ann:
        assert await ann.refused("join", group="~ann") == "bad_name"


async def test_what_is_pushed_to_a_person_can_be_kept_for_when_they_come_back() -> None:
    async with Stage(Board, history={"~*": History(10, 300)}) as stage:
        async with stage.talk("ann") as ann:
            joined = await ann.hear()
            assert (joined["type"], joined["group"], joined["position"]["offset"]) == ("joined", "~ann", 0)
            await stage.rt.push("ann", "first", "notice")
            first = await ann.hear()
            assert (first["group"], first["event"], first["offset"]) == ("~ann", "notice", 1)
        seen = {**joined["position"], "offset": 1, "tag": first["tag"]}
        published = await stage.rt.push("ann", "missed", "notice")
        async with stage.talk("ann") as ann:
            position = (await ann.hear())["position"]
            assert published.position is not None
            assert position == published.position.asdict()
            found = await ann.get("join", group="~ann", position=seen)
            assert found["recovered"]
            assert [event["data"] for event in found["events"]] == ["missed"]
            newest = await ann.get("join", group="~ann", last=5)
            assert [event["data"] for event in newest["events"]] == ["first", "missed"]
            await stage.rt.push("ann", "live")
            assert (await ann.hear())["data"] == "live"


async def test_what_is_kept_for_a_person_is_nobody_elses() -> None:
    async with Stage(Board, history={"~*": History(10, 300)}) as stage, stage.talk("bob") as bob:
        await bob.hear()
        await stage.rt.push("ann", "secret")
        assert await bob.refused("join", group="~ann") == "bad_name"
        assert await bob.refused("join", group="~bob", presence="count") == "bad_name"
        assert await bob.refused("leave", group="~bob") == "bad_name"
        async with stage.talk(session=SESSION) as guest:
            assert await guest.refused("join", group="~ann") == "bad_name"
            assert await guest.refused("join", group=f"~{guest.welcome['identity']}") == "bad_name"


async def test_a_plain_client_hears_what_is_kept_as_it_hears_any_push() -> None:
    async with Stage(Board, history={"~*": History(10, 300)}) as stage, stage.plain("ann") as ann:
        await until(lambda: stage.rt._streams.get("~ann") is not None)
        await stage.rt.push("ann", {"n": 1})
        assert json.loads(await ann.receive()) == {"n": 1}


async def test_joining_twice_is_joining_once_and_asks_once() -> None:
    asked: list[str] = []

    async def authorize(self: Any, group: str) -> bool:
        asked.append(group)
        return True

    async with Stage(board(authorize)) as stage, stage.talk() as client:
        for _ in range(3):
            assert (await client.get("join", group="board"))["recovered"]
        assert asked == ["board"]
        await client.say({"type": "join", "group": "board"})
        await client.get("event", event="echo")
        await stage.rt.broadcast("board", 1)
        assert (await client.hear())["data"] == 1
        await client.silent()


async def test_a_join_without_a_ref_joins_and_says_nothing() -> None:
    async with Stage(Board, history={"board": History(10, 60)}) as stage, stage.talk() as client:
        await client.say({"type": "join", "group": "board", "last": 5}, echo(1))
        assert await client.answers(1) == {1: "reply"}
        await stage.rt.broadcast("board", 1)
        assert (await client.hear())["data"] == 1


async def test_leaving_what_one_is_not_in_is_answered() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        assert await client.get("leave", group="board") is None


async def test_a_client_joins_so_many_groups_itself_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogue, "GROUPS", 2)
    async with Stage(Board) as stage, stage.talk() as client:
        await client.say(emit("join", data="board:given"))
        await client.hear()
        for group in ("board:1", "board:2", "board:1", "board:given"):
            await client.get("join", group=group)
        assert await client.refused("join", group="board:3") == "too_many_groups"
        await client.get("leave", group="board:1")
        await client.get("join", group="board:3")
        assert stage.connection.groups == {"board:2", "board:3", "board:given"}


async def test_a_join_that_failed_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def snapshot(self: Any, group: str) -> Any:
        raise EventError("gone")

    monkeypatch.setattr(dialogue, "GROUPS", 2)
    old = {"epoch": "", "offset": 0, "tag": ""}
    async with Stage(board(snapshot), history={"board:*": History(2, 60)}) as stage, stage.talk() as client:
        for number in range(3):
            assert await client.refused("join", group=f"board:{number}", position=old) == "gone"
        await client.get("join", group="board:9")


# What was missed


@both
async def test_who_comes_back_gets_what_was_said_since_and_nothing_twice(spelling: str) -> None:
    async with Stage(Board, history={"board": History(10, 60)}) as stage:
        async with stage.talk(spelling=spelling) as client:
            position = (await client.get("join", group="board"))["position"]
            assert set(position) == {"epoch", "offset", "tag"}
            await stage.rt.broadcast("board", 1)
            heard = await client.hear()
            position |= {"offset": heard["offset"], "tag": heard["tag"]}
        for number in (2, 3):
            await stage.rt.broadcast("board", number, "said")
        async with stage.talk(spelling=spelling) as client:
            found = await client.get("join", group="board", position=position)
            assert found["recovered"]
            assert "snapshot" not in found
            assert [each["data"] for each in found["events"]] == [2, 3]
            assert [each["offset"] for each in found["events"]] == [2, 3]
            assert {(each["type"], each["event"], each["group"]) for each in found["events"]} == {
                ("event", "said", "board")
            }
            assert found["position"] == position | {"offset": 3, "tag": found["events"][-1]["tag"]}
            again = await client.get("join", group="board", position=found["position"])
            assert again == {"position": found["position"], "recovered": True, "events": []}
            await stage.rt.broadcast("board", 4)
            assert (await client.hear())["offset"] == 4


@pytest.mark.parametrize("change", [{"epoch": "other"}, {"offset": 9}, {"offset": 1}, {"tag": "wrong"}], ids=str)
async def test_what_cannot_be_proven_is_not_recovered(change: Frame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogue, "ABREAST", 0.01)
    async with Stage(Board, history={"board": History(3, 60)}) as stage:
        for number in range(1, 7):
            await stage.rt.broadcast("board", number)
        position = (await stage.rt.position("board")).asdict()
        async with stage.talk() as client:
            found = await client.get("join", group="board", position=position | change)
            assert found == {"position": position, "recovered": False, "events": []}
            await stage.rt.broadcast("board", 7)
            assert (await client.hear())["data"] == 7


async def test_a_position_of_a_group_without_history_is_not_recovered() -> None:
    position = {"epoch": "e", "offset": 1, "tag": "t"}
    async with Stage(Board) as stage, stage.talk() as client:
        found = await client.get("join", group="board", position=position)
        assert found == {"position": None, "recovered": False, "events": []}


async def test_one_who_comes_from_a_node_that_is_ahead_is_waited_for() -> None:
    async with Stage(Board, history={"board": History(10, 60)}) as stage, stage.talk() as client, stage.talk() as other:
        await other.get("join", group="board")
        stream = stage.rt._streams.get("board")
        assert stream is not None
        held: list[Any] = []
        stage.rt._backend.broker._deliver = held.append  # type: ignore[attr-defined]
        async with anyio.create_task_group() as group:
            group.start_soon(stage.rt.broadcast, "board", "late")
            await until(lambda: bool(held))
            position = {"epoch": stream.position.epoch, "offset": 1, "tag": held[0].tag}
            await client.say({"type": "join", "ref": 1, "group": "board", "position": position})
            await client.silent()
            stage.rt._deliver(held[0])
            answer = await client.hear()
            assert answer["data"] == {"position": position, "recovered": True, "events": []}
        assert (await other.hear())["data"] == "late"


@both
async def test_who_asks_for_the_last_gets_them_with_its_place(spelling: str) -> None:
    async with Stage(Board, history={"board": History(5, 60)}) as stage:
        for number in range(8):
            await stage.rt.broadcast("board", number)
        async with stage.talk(spelling=spelling) as client:
            found = await client.get("join", group="board", last=2)
            assert ([each["data"] for each in found["events"]], found["recovered"]) == ([6, 7], True)
            assert found["position"]["offset"] == 8
            assert len((await client.get("join", group="board", last=100))["events"]) == 5
            assert (await client.get("join", group="board"))["events"] == []


async def test_what_excludes_a_client_moves_its_position_live_and_in_recovery() -> None:
    async with Stage(Board, history={"board": History(10, 60)}) as stage:
        async with stage.talk(session=SESSION) as client, stage.talk(session=OTHER) as other:
            for each in (client, other):
                await each.get("join", group="board")
            await stage.rt.broadcast("board", "for others", exclude=SESSION)
            await stage.rt.broadcast("board", "for all")
            skip, said = await client.heard(2)
            assert skip == {"type": "event", "group": "board", "offset": 1, "tag": skip["tag"], "skip": True}
            assert said["data"] == "for all"
            assert [each["data"] for each in await other.heard(2)] == ["for others", "for all"]
            found = await client.get("join", group="board", last=2)
            assert found["events"] == [skip, said]
            assert [each["data"] for each in (await other.get("join", group="board", last=2))["events"]] == [
                "for others",
                "for all",
            ]


async def test_who_missed_more_than_half_an_outbox_begins_anew() -> None:
    async with Stage(Board, history={"board": History(10, 60)}, outbox=OutboxLimits(bytes=2000)) as stage:
        async with stage.talk() as client:
            begin = (await client.get("join", group="board"))["position"]
        await stage.rt.broadcast("board", "x" * 500)
        middle = (await stage.rt.position("board")).asdict()
        await stage.rt.broadcast("board", "x" * 500)
        async with stage.talk() as client:
            found = await client.get("join", group="board", position=begin)
            assert (found["recovered"], found["events"]) == (False, [])
            found = await client.get("join", group="board", position=middle)
            assert (found["recovered"], len(found["events"])) == (True, 1)


async def test_the_last_are_no_more_than_an_outbox_holds() -> None:
    async with Stage(Board, history={"board": History(100, 60)}, outbox=OutboxLimits(bytes=200_000)) as stage:
        for number in range(100):
            await stage.rt.broadcast("board", [number, "x" * 10_000])
        async with stage.talk() as client:
            await client.say({"type": "join", "ref": 1, "group": "board", "last": 100})
            told = []
            while (frame := await client.hear())["type"] != "reply":
                told.append(frame)
            told += frame["data"]["events"]
            assert told[-1]["data"][0] == 99, "the newest of them"


@both
async def test_much_is_sent_ahead_of_the_reply(spelling: str) -> None:
    async with Stage(Board, history={"board": History(100, 60)}) as stage:
        for number in range(30):
            await stage.rt.broadcast("board", [number, "x" * 10_000])
        async with stage.talk(spelling=spelling) as client:
            await client.say({"type": "join", "ref": 1, "group": "board", "last": 25})
            answer = await client.hear()
            assert len(answer["data"]["events"]) == 25, "not yet"
            await client.say({"type": "join", "ref": 2, "group": "board", "last": 30})
            ahead = await client.heard(30)
            assert [each["data"][0] for each in ahead] == list(range(30))
            answer = await client.hear()
            assert (answer["ref"], answer["data"]["events"]) == (2, [])
            assert answer["data"]["position"]["offset"] == ahead[-1]["offset"] == 30


# A snapshot


@both
async def test_who_cannot_recover_gets_the_hosts_content_and_what_was_said_meanwhile(spelling: str) -> None:
    async def snapshot(self: Any, group: str) -> Any:
        await self.broadcast(group, "meanwhile")
        return {"title": Point(1, 2)}

    async with Stage(board(snapshot), history={"board": History(2, 60)}) as stage:
        for number in range(3):
            await stage.rt.broadcast("board", number)
        position = (await stage.rt.position("board")).asdict() | {"offset": 0, "tag": ""}
        async with stage.talk(spelling=spelling) as client:
            found = await client.get("join", group="board", position=position)
            assert not found["recovered"]
            assert found["snapshot"] == {"title": {"x": 1, "y": 2}}
            assert [each["data"] for each in found["events"]] == ["meanwhile"]
            assert found["position"]["offset"] == 4
            await stage.rt.broadcast("board", "after")
            assert (await client.hear())["data"] == "after"


async def test_a_snapshot_of_nothing_is_there_and_none_is_not() -> None:
    async def snapshot(self: Any, group: str) -> Any:
        return None

    for made, there in ((board(snapshot), True), (Board, False)):
        async with Stage(made, history={"board": History(2, 60)}) as stage, stage.talk() as client:
            found = await client.get("join", group="board", position={"epoch": "old", "offset": 0, "tag": ""})
            assert ("snapshot" in found) is there


async def test_a_snapshot_is_taken_anew_while_the_history_breaks_and_not_for_ever() -> None:
    taken: list[int] = []

    async def snapshot(self: Any, group: str) -> Any:
        taken.append(1)
        stream = stage.rt._streams.get(group)
        assert stream is not None
        if len(taken) <= breaks:
            await stage.rt._backend.broker.renew(group, stream.history, stream.position)
            before = stream.breaks
            stream.distrust()  # done at once where tasks are eager
            await until(lambda: stream.breaks > before)
        return "content"

    old = {"epoch": "old", "offset": 0, "tag": ""}
    breaks = 2
    async with Stage(board(snapshot), history={"board": History(2, 60)}) as stage, stage.talk() as client:
        found = await client.get("join", group="board", position=old)
        assert (found["snapshot"], len(taken)) == ("content", 3)
    taken, breaks = [], 9
    async with Stage(board(snapshot), history={"board": History(2, 60)}) as stage, stage.talk() as client:
        answer = await client.ask("join", group="board", position=old)
        assert (answer["code"], answer["temporary"], answer["retry_after_ms"]) == ("unavailable", True, 1000)
        assert stage.connection.groups == frozenset()
        assert len(stage.rt._streams) == 0, "it is let go of"


async def test_a_join_that_fails_lets_go_of_the_history() -> None:
    async def snapshot(self: Any, group: str) -> Any:
        raise RuntimeError("a bug")

    async with Stage(board(snapshot), history={"board": History(2, 60)}) as stage, stage.talk() as client:
        for _ in range(2):
            code = await client.refused("join", group="board", position={"epoch": "", "offset": 0, "tag": ""})
            assert code == "internal"
            assert len(stage.rt._streams) == 0
        assert stage.connection.groups == frozenset()


async def test_one_who_has_left_while_it_joined_is_in_nothing() -> None:
    gate = anyio.Event()

    async def authorize(self: Any, group: str) -> bool:
        await gate.wait()
        return True

    async with Stage(board(authorize), history={"board": History(2, 60)}) as stage, stage.talk() as client:
        await client.say({"type": "join", "ref": 1, "group": "board", "presence": "members"})
        await turns()
        forget = stage.rt.forget
        ended: list[Any] = []

        def forgetting(connection: Connection) -> None:
            forget(connection)
            ended.append(dict(stage.rt.hub.groups))

        stage.rt.forget = forgetting  # type: ignore[method-assign]
        stage.rt.connections.clear()  # as if it had ended already
        gate.set()
        await turns(30)
        assert not stage.rt.hub.groups
        assert len(stage.rt._streams) == 0
        await client.client.close()
        await until(lambda: ended == [{}])


# What the host does with a client


@both
async def test_the_client_hears_that_the_host_has_joined_it_and_taken_it_out(spelling: str) -> None:
    async with Stage(Board, history={"hist": History(10, 60)}) as stage, stage.talk(spelling=spelling) as client:
        await stage.rt.broadcast("hist", 1)
        await client.say(emit("join", data="hist"), emit("join", data="plain"), emit("join", data="hist"))
        joined = await client.heard(2)
        position = (await stage.rt.position("hist")).asdict()
        assert joined == [
            {"type": "joined", "group": "hist", "position": position},
            {"type": "joined", "group": "plain", "position": None},
        ]
        found = await client.get("join", group="hist", last=5)
        assert [each["data"] for each in found["events"]] == [1], "no authorize is asked: it is in the group"
        await client.say(emit("leave", data="hist"), emit("leave", data="hist"), emit("leave", data="nothing"))
        assert await client.hear() == {"type": "left", "group": "hist", "code": "left", "rejoin": False}
        await stage.rt.broadcast("hist", 2)
        await client.silent()


async def test_the_host_may_ask_for_presence_when_it_joins_a_client() -> None:
    @event("look")
    async def look(self: Any) -> None:
        await self.join("board", presence="members")
        await self.track("board", {"n": 1})

    async with Stage(board(look)) as stage, stage.talk("ann") as ann:
        await ann.say(emit("look"))
        joined, state, diff = await ann.heard(3)
        assert [each["type"] for each in (joined, state, diff)] == ["joined", "presence_state", "presence_diff"]
        assert diff["joins"] == {"ann": {"metas": [{"n": 1, "ref": "1"}]}}


async def test_a_history_that_breaks_is_said_with_the_place_where_it_goes_on() -> None:
    async with Stage(Board, history={"board": History(10, 60)}) as stage, stage.talk() as client:
        await client.get("join", group="board")
        await stage.rt.broadcast("board", 1)
        await client.hear()
        stage.rt._backend.broker._logs.clear()  # type: ignore[attr-defined] - the log is lost
        await stage.rt.broadcast("board", 2)
        frame = await client.hear()
        assert frame == {"type": "reset", "group": "board", "position": (await stage.rt.position("board")).asdict()}


async def test_what_an_event_without_an_id_publishes_has_none() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        await client.get("join", group="board")
        await client.say(emit("say", data="hi", group="board"))
        assert "id" not in await client.hear()


# Presence


async def test_a_client_that_may_not_track_itself_is_told_so() -> None:
    class Shy(RealtimeEndpoint):
        anonymous = True

        async def authorize(self, group: str) -> bool:
            return True

    async with Stage(Shy) as stage, stage.talk() as client:
        await client.get("join", group="board")
        answer = await client.ask("track", group="board", meta={})
        assert (answer["code"], answer["message"]) == ("forbidden", "clients do not track themselves here")


@both
async def test_who_tracks_itself_is_present_with_what_the_host_makes_of_it(spelling: str) -> None:
    async with Stage(Board) as stage, stage.talk("ann", spelling=spelling) as ann:
        await ann.get("join", group="board", presence="members")
        assert await ann.hear() == {
            "type": "presence_state",
            "group": "board",
            "version": 0,
            "members": {},
            "after": None,
        }
        await ann.get("track", group="board", meta={"name": "Ann"})
        diff = await ann.hear()
        assert diff["joins"] == {"ann": {"metas": [{"name": "Ann", "group": "board", "ref": "1"}]}}
        await ann.get("update", group="board", meta={"away": True})
        diff = await ann.hear()
        assert diff["joins"] == {"ann": {"metas": [{"away": True, "group": "board", "ref": "2"}]}}
        assert diff["leaves"]["ann"]["metas"][0]["ref"] == "1"
        await ann.get("untrack", group="board")
        assert (await ann.hear())["leaves"]["ann"]["reason"] == "left"
        assert await ann.get("untrack", group="board") is None
        await ann.get("track", group="board")
        assert (await stage.rt.presence("board"))["ann"].metas == ({"group": "board", "ref": "3"},)
        await ann.get("leave", group="board")
        assert await stage.rt.presence("board") == {}


async def test_a_meta_beyond_four_kilobytes_is_too_large_and_what_is_no_object_is_invalid() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        assert await client.refused("track", group="board", meta={}) == "not_joined"
        await client.get("join", group="board")
        assert await client.refused("track", group="board", meta={"a": "x" * 4100}) == "too_large"
        assert await client.refused("update", group="board", meta={"a": "x" * 4100}) == "too_large"
        assert await client.refused("track", group="board", meta=[]) == "invalid"
        assert await stage.rt.count("board") == 0


async def test_a_join_may_ask_for_the_number_and_later_for_the_members() -> None:
    async with Stage(Board) as stage, stage.talk("ann") as ann:
        await ann.get("join", group="board")
        await ann.silent()
        await ann.get("join", group="board", presence="count")
        assert await ann.hear() == {"type": "presence_count", "group": "board", "count": 0}
        await ann.get("join", group="board", presence="members")
        assert (await ann.hear())["type"] == "presence_state"
        assert await ann.refused("join", group="board", presence="all") == "invalid"


@both
async def test_who_is_there_can_be_asked_page_by_page(spelling: str) -> None:
    async with Stage(Board) as stage, AsyncExitStack() as exits:
        for name in ("cyd", "ann", "eve", "bob", "dan"):
            talk = await exits.enter_async_context(stage.talk(name, spelling=spelling))
            await talk.get("join", group="board")
            await talk.get("track", group="board", meta={"n": name})
        pages, after = [], None
        for _ in range(3):
            more = {} if after is None else {"after": after}
            page = await talk.get("presence", group="board", limit=2, **more)
            pages.append(list(page["members"]))
            after = page["after"]
        assert pages == [["ann", "bob"], ["cyd", "dan"], ["eve"]]
        assert after is None
        whole = await talk.get("presence", group="board")
        assert (len(whole["members"]), whole["after"]) == (5, None)
        assert whole["members"]["ann"] == {"metas": [{"n": "ann", "group": "board", "ref": "2"}]}
        exact = await talk.get("presence", group="board", limit=5)
        assert exact["after"] is None
        assert (await talk.get("presence", group="board", after="zoe"))["members"] == {}
        assert await talk.refused("presence", group="other") == "not_joined"
        for limit in (0, 201):
            assert await talk.refused("presence", group="board", limit=limit) == "invalid"


# Whispers


@asynccontextmanager
async def pair(stage: Stage, *, spelling: str = JSON) -> AsyncIterator[tuple[Talk, Talk]]:
    """Ann and Bob, both in the group ``board``."""
    async with stage.talk("ann", spelling=spelling) as ann, stage.talk("bob", spelling=spelling) as bob:
        for each in (ann, bob):
            await each.get("join", group="board")
        yield ann, bob


def whisper(name: str = "typing", data: Any = None, **fields: Any) -> Frame:
    return {"type": "whisper", "group": "board", "event": name, **({} if data is None else {"data": data}), **fields}


@both
async def test_a_whisper_reaches_the_others_with_its_senders_name(spelling: str) -> None:
    async with Stage(Board) as stage, pair(stage, spelling=spelling) as (ann, bob):
        await ann.say(whisper(data=True), whisper("cursor", {"x": 1, "y": 2, "z": 3}), whisper("cursor", stop=True))
        assert await bob.heard(3) == [
            {"type": "whisper", "group": "board", "event": "typing", "from": "ann", "data": True},
            {
                "type": "whisper",
                "group": "board",
                "event": "cursor",
                "from": "ann",
                "data": {"x": 1, "y": 2},
                "expires_ms": 5000,
            },
            {"type": "whisper", "group": "board", "event": "cursor", "from": "ann", "stop": True},
        ]
        await ann.silent()


async def test_a_whisper_is_said_to_a_group_that_one_is_in_and_of_a_declared_kind() -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        assert await ann.refused("whisper", group="board", event="nothing", data=1) == "unknown_whisper"
        assert await ann.refused("whisper", group="other", event="typing", data=True) == "not_joined"
        answer = await ann.ask("whisper", group="board", event="cursor", data={"x": 1})
        assert (answer["code"], answer["message"]) == ("invalid", "Object missing required field `y`")
        await ann.say(whisper(data="no bool"))
        answer = await ann.hear()
        assert (answer["code"], "ref" in answer) == ("invalid", False)
        await bob.silent()
        assert await ann.get("whisper", group="board", event="typing", data=True) is None


async def test_whispers_that_come_too_fast_are_dropped_without_a_word() -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        for number in range(3):
            await ann.say(whisper("rare", [number]))
        await ann.silent()
        assert (await bob.hear())["data"] == [0]
        await bob.silent()
        answer = await ann.ask("whisper", group="board", event="rare", data=1)
        assert (answer["code"], answer["temporary"]) == ("rate_limited", True), "who asks is told"
        assert stage.rt.stats()["rejected.rate_limited"] == 1


async def test_whispers_have_a_limit_that_nobody_has_declared() -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        now = stage.rt.tasks.time()
        stage.rt.tasks.time = lambda: now  # type: ignore[method-assign]
        for number in range(30):
            await ann.say(whisper("every", number))
            await turns()
        await ann.get("event", event="echo")
        await turns()
        heard = [frame["data"] for raw in bob.client.pending for frame in frames_of(raw)]
        assert heard == list(range(20))


async def test_whispers_are_no_part_of_the_limits_of_the_place() -> None:
    async with Stage(board(limits=[RateLimit("2/hour")])) as stage, pair(stage) as (ann, bob):
        for _ in range(5):
            await ann.say(whisper(data=True))
            assert (await bob.hear())["data"] is True
        assert await ann.get("event", event="echo", data=1) == 1


@pytest.mark.parametrize(("name", "kept"), [("cursor", [0, 4]), ("every", [0, 1, 2, 3, 4])])
async def test_of_the_latest_kind_a_slow_peer_gets_the_last_of_each_sender(name: str, kept: list[int]) -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob), stage.talk("cyd") as cyd:
        await cyd.get("join", group="board")
        bob.client.stall()
        for number in range(5):
            for each in (ann, cyd):
                await each.say(whisper(name, {"x": number, "y": 0} if name == "cursor" else number))
                await turns()
        bob.client.resume()
        await stage.rt.broadcast("board", "end")
        heard = []
        while (frame := await bob.hear())["event"] != "message":
            heard.append((frame["from"], frame["data"]["x"] if name == "cursor" else frame["data"]))
        assert [number for sender, number in heard if sender == "ann"] == kept
        assert [number for sender, number in heard if sender == "cyd"] == (kept[1:] if name == "cursor" else kept)


async def test_a_whisper_that_is_over_is_not_delivered_any_more() -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        bob.client.stall()
        await stage.rt.broadcast("board", "first")
        await turns()
        await ann.say(whisper("cursor", {"x": 1, "y": 1}), whisper(data=True))
        await turns()
        time = stage.rt.tasks.time
        stage.rt.tasks.time = lambda: time() + 5.1  # type: ignore[method-assign]
        bob.client.resume()
        heard = await bob.heard(2)
        assert [each["event"] for each in heard] == ["message", "typing"]
        await bob.silent()
        assert stage.rt.stats()["dropped"] == 1


async def test_what_lapses_as_the_last_of_a_backlog_leaves_nothing_behind() -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        bob.client.stall()
        await stage.rt.broadcast("board", "first")
        await turns()
        await ann.say(whisper("cursor", {"x": 1, "y": 1}))
        await turns()
        time = stage.rt.tasks.time
        stage.rt.tasks.time = lambda: time() + 5.1  # type: ignore[method-assign]
        bob.client.resume()
        assert (await bob.hear())["data"] == "first"
        await bob.silent()
        await stage.rt.broadcast("board", "second")
        assert (await bob.hear())["data"] == "second"


ENDED = {"type": "whisper", "group": "board", "event": "cursor", "from": "ann", "stop": True}


@pytest.mark.parametrize("how", ["leave", "let out", "disconnect"])
async def test_the_end_of_a_whisper_is_said_when_its_sender_goes(how: str) -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        await ann.get("join", group="board:2")
        await ann.say(whisper("cursor", {"x": 1, "y": 1}), whisper(data=True))
        await ann.say({**whisper("cursor", {"x": 1, "y": 1}), "group": "board:2"})
        await bob.heard(2)
        if how == "leave":
            await ann.get("leave", group="board:2")  # another one
            await bob.silent()
            await ann.get("leave", group="board")
        elif how == "let out":
            await ann.say(emit("leave", data="board"))
        else:
            await ann.client.close()
        assert await bob.heard(2) == [ENDED, {**ENDED, "event": "typing"}]
        await bob.silent()


async def test_what_has_been_stopped_has_no_second_end() -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        await ann.say(whisper("cursor", stop=True), whisper("cursor", {"x": 1, "y": 1}), whisper("cursor", stop=True))
        assert [each.get("stop", False) for each in await bob.heard(3)] == [True, False, True]
        await ann.get("leave", group="board")
        await ann.client.close()
        await turns()
        await bob.silent()


async def test_whispers_beyond_the_window_are_dropped(narrow: None) -> None:
    gate = anyio.Event()
    async with Stage(gated(gate)) as stage, pair(stage) as (ann, bob):
        await ann.say(emit("wait", 0))
        await turns()
        for number in range(9):
            await ann.say(whisper("every", number))
        gate.set()
        await ann.answers(0)
        assert [each["data"] for each in await bob.heard(3)] == [0, 1, 2]
        await bob.silent()


async def test_a_whisper_with_a_ref_is_answered_also_beyond_the_window(narrow: None) -> None:
    gate = anyio.Event()
    async with Stage(gated(gate)) as stage, pair(stage) as (ann, _):
        await ann.say(emit("wait", 0))
        await turns()
        for number in range(5):
            await ann.say(whisper("every", number, ref=10 + number))
        gate.set()
        await turns(30)
        answered = {frame["ref"] for raw in ann.client.pending for frame in frames_of(raw)}
        assert answered == {0, 10, 11, 12, 13, 14}


async def test_a_stopped_batch_lets_nobody_leave_and_relays_nothing() -> None:
    async with Stage(stopping(EventError("full", retry_after=1))) as stage, pair(stage) as (ann, bob):
        await ann.say(emit("stop", 1), whisper(data=True, ref=2), {"type": "leave", "ref": 3, "group": "board"})
        assert await ann.answers(1, 2, 3) == {1: "full", 2: "skipped", 3: "skipped"}
        await bob.silent()


async def test_what_stands_behind_a_refused_frame_is_skipped_as_it_arrives() -> None:
    async with Stage(board(limits=[RateLimit("2/hour")])) as stage, pair(stage) as (ann, bob):
        await ann.say(echo(1), echo(2), whisper(data=True, ref=3), {"type": "leave", "ref": 4, "group": "board"})
        assert await ann.answers(1, 2, 3, 4) == {1: "reply", 2: "rate_limited", 3: "skipped", 4: "skipped"}
        await bob.silent()
        assert {len(each.groups) for each in stage.rt.connections.values()} == {1}


@pytest.mark.parametrize("first", [{"type": "pong"}, {"type": "leave", "group": "board"}, {"type": "reply", "ref": 1}])
async def test_the_bytes_of_a_message_are_paid_whatever_its_first_frame_is(first: Frame) -> None:
    async with Stage(board(limits=[RateLimit("1000/hour", unit="bytes")])) as stage, stage.talk() as client:
        await client.say(first, echo(1, "x" * 2000))
        assert await client.answers(1) == {1: "rate_limited"}


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "pong"},
        {"type": "reply", "ref": 7},
        {"type": "error", "ref": 7, "code": "no"},
        {"type": "nobody-knows"},
        {"type": "whisper", "group": "board", "event": "typing", "data": True},
    ],
    ids=lambda frame: str(frame["type"]),
)
async def test_who_floods_with_what_no_limit_counts_is_closed(frame: Frame) -> None:
    async with Stage(Board) as stage, pair(stage) as (ann, bob):
        for _ in range(1100):
            if ann.client.close_code is None:
                await ann.say(frame)
        assert await ann.client.closed() == 4002
        assert bob.client.close_code is None


async def test_what_a_call_waits_for_costs_nothing_however_large() -> None:
    @event("ask")
    async def ask(self: Any) -> int:
        return len(await self.call("all"))

    async with Stage(board(ask, max_message_size=200_000)) as stage, stage.talk() as client:
        for number in range(3):
            await client.say(emit("ask", number))
            asked = await client.hear()
            await client.say({"type": "reply", "ref": asked["ref"], "data": "x" * 150_000})
            assert (await client.hear())["data"] == 150_000


async def test_who_is_taken_out_while_the_host_thinks_about_its_meta_is_not_present() -> None:
    gate = anyio.Event()

    async def on_track(self: Any, group: str, meta: Any) -> Any:
        await gate.wait()
        return meta

    async with Stage(board(on_track)) as stage, stage.talk("ann") as ann:
        await ann.get("join", group="board")
        await ann.say({"type": "track", "ref": 9, "group": "board"})
        await turns()
        await stage.connection.leave("board")
        gate.set()
        left, refused = await ann.heard(2)
        assert (left["type"], refused["ref"], refused["code"]) == ("left", 9, "not_joined")
        assert await stage.rt.presence("board") == {}


# Beside the events


async def test_what_a_task_of_a_handler_says_is_not_taken_for_what_the_event_says() -> None:
    """A second run of the handler would count anew, and drop what the task of the first has named alike."""

    @event("begin")
    async def begin(self: Any) -> None:
        async def later() -> None:
            await self.broadcast("board", "of the task")

        self.connection.start_soon(later)
        await self.broadcast("board", "of the event")

    async with Stage(board(begin)) as stage, pair(stage) as (ann, bob):
        await ann.say(emit("begin", id="one"))
        said = {frame["data"]: frame.get("id") for frame in await bob.heard(2)}
        assert said["of the event"] is not None
        assert said["of the task"] is None


async def test_a_slow_on_connect_is_not_taken_for_silence() -> None:
    async def on_connect(self: Any, websocket: WebSocket) -> None:
        for _ in range(40):
            self.connection._node._look()
        await websocket.accept()

    async with Stage(board(on_connect), ping_interval=0.01, ping_timeout=0.01) as stage:
        async with stage.talk() as client:
            assert (await client.get("event", event="echo", data=1)) == 1


# A new token


@both
async def test_a_new_token_of_the_same_person_prolongs_the_connection(spelling: str) -> None:
    seen: list[Any] = []

    @event("who")
    async def who(self: Any) -> Any:
        seen.append(self.websocket.user is self.user)
        return [self.user.identity, list(self.user.scopes), list(self.websocket.auth.scopes)]

    async def on_connect(self: Any, websocket: WebSocket) -> None:
        self.websocket = websocket
        await websocket.accept()

    async with Stage(board(who, on_connect)) as stage, stage.talk("ann", ttl=50, spelling=spelling) as ann:
        assert ann.welcome["ttl_ms"] <= 50_000
        assert await ann.get("event", event="who") == ["ann", [], ["authenticated"]]
        answer = await ann.get("refresh", token=token("ann", ttl=500, scopes=["admin"]))
        assert 400_000 < answer["ttl_ms"] <= 500_000
        assert await ann.get("event", event="who") == ["ann", ["admin"], ["authenticated", "admin"]]
        assert seen == [True, True]


async def test_a_token_without_an_end_makes_a_connection_without_an_end() -> None:
    class Loose:
        def verify(self, proof: str) -> Identity:
            return Identity(proof)

    async with Stage(Board, tokens=Loose()) as stage:
        async with connect(stage.app, "/ws", token="ann", subprotocols=[JSON]) as client:
            ann = Talk(client)
            await ann.hear()
            assert await ann.get("refresh", token="ann") == {"ttl_ms": None}
            assert not stage.rt._expiring


async def test_a_token_that_is_not_good_or_not_the_same_persons_is_refused() -> None:
    async with Stage(Board) as stage, stage.talk("ann") as ann, stage.talk() as guest:
        assert await ann.refused("refresh", token=token("bob")) == "forbidden"
        assert await ann.refused("refresh", token="no token") == "unauthorized"
        assert await guest.refused("refresh", token=token("bob")) == "forbidden"
        assert await ann.refused("refresh", token=5) == "invalid"
        user = stage.connection.user
        await stage.rt._backend.ledger.revoke("user:ann", 1e12)
        answer = await ann.ask("refresh", token=token("ann"))
        assert (answer["code"], answer["message"]) == ("unauthorized", "this identity has been revoked")
        assert stage.connection.user is user
        assert stage.connection.is_open


def test_a_token_does_not_show_in_what_is_written_about_its_frame() -> None:
    assert repr(Refresh("a secret", 1)) == "Refresh(ref=1)"


async def test_where_nobody_verifies_tokens_none_is_taken() -> None:
    async with Stage(Board, tokens=None) as stage, stage.talk() as client:
        answer = await client.ask("refresh", token=token("ann"))
        assert (answer["code"], answer["message"]) == ("forbidden", "tokens are not refreshed here")


async def test_the_groups_that_a_client_joined_are_authorised_again() -> None:
    async def authorize(self: Any, group: str) -> bool:
        return group == "board:free" or "member" in self.user.scopes

    async with Stage(board(authorize)) as stage, stage.talk("bob") as bob:
        proof = token("ann", scopes=["member"])
        async with connect(stage.app, "/ws", token=proof, subprotocols=[JSON]) as client:
            ann = Talk(client)
            await ann.hear()
            await ann.say(emit("join", data="board:given"))
            await ann.hear()
            for group in ("board:free", "board:paid", "board:gone"):
                await ann.get("join", group=group)
            await ann.get("leave", group="board:gone")
            await bob.get("join", group="board:free")
            await ann.say({**whisper("cursor", {"x": 1, "y": 1}), "group": "board:paid"})
            await ann.say({"type": "refresh", "ref": 99, "token": token("ann")})
            left, answer = await ann.heard(2)
            assert left == {"type": "left", "group": "board:paid", "code": "forbidden", "rejoin": False}
            assert answer["ref"] == 99
            assert stage.connection.groups == {"board:free", "board:given"}
            assert await ann.refused("join", group="board:paid") == "forbidden"
            await ann.get("refresh", token=token("ann"))


async def test_an_authorize_that_refuses_by_raising_takes_the_client_out_too() -> None:
    async def authorize(self: Any, group: str) -> bool:
        if "member" not in self.user.scopes:
            raise EventError("forbidden", "members only")
        return True

    async with Stage(board(authorize)) as stage:
        proof = token("ann", scopes=["member"])
        async with connect(stage.app, "/ws", token=proof, subprotocols=[JSON]) as client:
            ann = Talk(client)
            await ann.hear()
            for group in ("board:1", "board:2"):
                await ann.get("join", group=group)
            await ann.say({"type": "refresh", "ref": 99, "token": token("ann")})
            await turns(30)
            assert stage.connection.groups == frozenset()


async def test_where_the_host_cannot_say_whether_a_client_may_stay_it_may_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def authorize(self: Any, group: str) -> bool:
        if "member" not in self.user.scopes and group == "board:1":
            raise KeyError("a bug")
        return True

    async with Stage(board(authorize)) as stage:
        proof = token("ann", scopes=["member"])
        async with connect(stage.app, "/ws", token=proof, subprotocols=[JSON]) as client:
            ann = Talk(client)
            await ann.hear()
            for group in ("board:1", "board:2"):
                await ann.get("join", group=group)
            await ann.say({"type": "refresh", "ref": 99, "token": token("ann")})
            left, answer = await ann.heard(2)
            assert (left["group"], left["code"], answer["type"]) == ("board:1", "forbidden", "reply")
            assert stage.connection.groups == {"board:2"}
    assert stage.rt.stats()["failed"] == 1
    assert "authorize raised KeyError" in caplog.text


async def test_a_join_that_is_under_way_ends_with_the_right_to_it() -> None:
    allowed, gate = [True], anyio.Event()

    async def authorize(self: Any, group: str) -> bool:
        return allowed[0]

    async with Stage(board(authorize), history={"board": History(10, 60)}) as stage, stage.talk("ann") as ann:
        broker = stage.rt._backend.broker
        read = broker.read

        async def slowly(group: str, history: History) -> Any:
            await gate.wait()
            return await read(group, history)

        broker.read = slowly  # type: ignore[method-assign]
        await ann.say({"type": "join", "ref": 1, "group": "board"})
        await turns()
        allowed[0] = False
        await ann.say({"type": "refresh", "ref": 2, "token": token("ann")})
        await turns()
        gate.set()
        await turns(50)
        assert stage.connection.groups == frozenset()


class Slow:
    """A verifier that takes its time."""

    def __init__(self) -> None:
        self.gate = anyio.Event()
        self.asked = 0

    async def verify(self, proof: str) -> Identity:
        self.asked += 1
        if self.asked > 1:  # the first is the handshake's
            await self.gate.wait()
        if proof == "away":
            raise Unavailable("the keys cannot be fetched")
        return tokens.verify(proof)


async def test_one_refresh_at_a_time_and_none_waits_for_a_handler() -> None:
    verifier, gate = Slow(), anyio.Event()
    async with Stage(gated(gate), tokens=verifier) as stage, stage.talk("ann") as ann:
        await ann.say(emit("wait", 1), {"type": "refresh", "ref": 2, "token": token("ann")})
        await ann.say({"type": "refresh", "ref": 3, "token": token("ann")})
        assert await ann.answers(3) == {3: "busy"}
        assert verifier.asked == 2
        verifier.gate.set()
        assert await ann.answers(2) == {2: "reply"}
        await ann.get("refresh", token=token("ann"))
        assert await ann.refused("refresh", token="away") == "unavailable"
        await ann.get("refresh", token=token("ann"))
        gate.set()
        await ann.answers(1)


async def test_a_refresh_is_no_part_of_its_batch() -> None:
    async with Stage(stopping(EventError("full", retry_after=1))) as stage, stage.talk("ann") as ann:
        for _ in range(2):
            await ann.say(emit("stop", 1), {"type": "refresh", "ref": 2, "token": token("ann")})
            assert await ann.answers(1, 2) == {1: "full", 2: "reply"}


# What the host asks


@both
async def test_a_client_answers_what_the_host_asks_while_its_handler_waits(spelling: str) -> None:
    @event("delete")
    async def delete(self: Any, data: str) -> Any:
        return await self.call("confirm", {"delete": data})

    async with Stage(board(delete)) as stage, stage.talk(spelling=spelling) as client:
        for number, answer in enumerate(([True], None, {"a": 1.5}), 1):
            await client.say(emit("delete", 1, data="board"))
            asked = await client.hear()
            assert asked == {"type": "event", "event": "confirm", "data": {"delete": "board"}, "ref": number}
            await client.say({"type": "reply", "ref": number, **({} if answer is None else {"data": answer})})
            assert await client.hear() == {"type": "reply", "ref": 1, "data": answer}
            await client.say({"type": "reply", "ref": number, "data": "again"}, {"type": "reply", "ref": 77})
        await client.say({"type": "error", "ref": 78, "code": "no"})
        await client.silent()


async def test_what_the_client_refuses_or_cannot_spell_is_an_event_error() -> None:
    async with Stage(Board) as stage, stage.talk(spelling=PACK) as client:
        raised: list[EventError] = []

        async def ask() -> None:
            with pytest.raises(EventError) as caught:
                await stage.connection.call("confirm")
            raised.append(caught.value)

        for answer in ({"type": "error", "code": "declined", "message": "not now"}, {"type": "reply", "data": {1: 2}}):
            async with anyio.create_task_group() as group:
                group.start_soon(ask)
                await client.say({**answer, "ref": (await client.hear())["ref"]})
        assert [(error.code, error.temporary) for error in raised] == [("declined", False), ("invalid", False)]
        assert str(raised[0]) == "declined: not now"


async def test_a_call_ends_with_its_time_and_nobody_minds_the_late_answer() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        with pytest.raises(TimeoutError):
            await stage.connection.call("confirm", timeout=0.01)
        await client.say({"type": "reply", "ref": (await client.hear())["ref"], "data": 1})
        assert await client.get("event", event="echo", data=1) == 1
        assert stage.connection._dialogue is not None
        assert not stage.connection._dialogue._calls


async def test_a_call_ends_when_the_client_leaves() -> None:
    codes: list[int] = []

    @event("ask")
    async def ask(self: Any, data: int) -> None:
        try:
            await self.call("confirm", data)
        except WebSocketDisconnect as error:
            codes.append(error.code)
            raise

    async with Stage(board(ask)) as stage, stage.talk() as client:
        await client.say(emit("ask", 1, data=1))
        await client.hear()
        await client.client.close(4321)
        await until(lambda: codes == [4321])
        await until(lambda: not stage.rt.connections)
        assert "failed" not in stage.rt.stats(), "it is no bug of the handler's"


async def test_a_call_to_a_client_that_has_left_ends_at_once() -> None:
    async with Stage(Board) as stage:
        async with stage.talk():
            connection = stage.connection
        await until(lambda: not stage.rt.connections)
        with pytest.raises(WebSocketDisconnect):
            await connection.call("confirm", timeout=0.05)


async def test_what_is_no_data_is_the_callers_error() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        with pytest.raises(TypeError):
            await stage.connection.call("confirm", object())
        with pytest.raises(EventError):
            await stage.connection.call("", 1)
        await client.silent()


async def test_a_call_that_could_not_be_said_leaves_nothing_behind() -> None:
    async with Stage(Board) as stage, stage.talk():
        with pytest.raises(TypeError):
            await stage.connection.call("confirm", object())
        assert stage.connection._dialogue is not None
        assert not stage.connection._dialogue._calls


async def test_a_plain_client_cannot_be_asked() -> None:
    async with Stage(Board) as stage, stage.plain():
        with pytest.raises(RuntimeError, match="plain protocol, which has no answers"):
            await stage.connection.call("confirm")


# The end


async def test_who_is_sent_away_by_a_restart_is_told_when_to_come_back() -> None:
    async with Stage(Board) as stage, stage.talk() as client, stage.plain() as plain:
        await client.get("join", group="board")
        await stage.rt.broadcast("board", "last")
        await stage.rt.drain()
        last, goodbye = await client.heard(2)
        assert last["data"] == "last"
        assert 0 <= goodbye.pop("retry_after_ms") <= 1010
        assert goodbye == {"type": "goodbye", "code": 1012, "reason": "service restart"}
        assert await client.client.closed() == await plain.closed() == 1012
        assert plain.pending == ()


async def test_who_is_sent_away_for_good_hears_no_goodbye() -> None:
    async with Stage(Board) as stage, stage.talk("ann") as ann:
        await stage.rt.disconnect("ann")
        assert await ann.client.closed() == 4500
        assert ann.client.pending == ()


async def test_after_a_close_the_rest_of_a_batch_is_not_looked_at() -> None:
    ran: list[int] = []

    @event("bye")
    async def bye(self: Any) -> None:
        await self.close(4321)

    @event("note")
    async def note(self: Any) -> None:
        ran.append(1)

    async with Stage(board(bye, note)) as stage, stage.talk() as client:
        await client.say(emit("bye", 1), emit("note", 2))
        assert await client.client.closed() == 4321
    assert ran == []


async def test_a_batch_whose_frame_closes_the_connection_ends_there(narrow: None) -> None:
    gate = anyio.Event()
    async with Stage(gated(gate)) as stage, stage.talk() as client:
        await client.say(*[emit("wait")] * 4)
        for _ in range(4):
            await client.say(echo())
        await turns()
        assert stage.connection.is_open
        await client.say({"type": "pong"}, echo(), {"type": "join", "ref": 9})
        assert await client.client.closed() == 4002
        assert all(frame.get("ref") != 9 for raw in client.client.pending for frame in frames_of(raw))
        gate.set()


async def test_a_handler_closes_by_raising() -> None:
    @event("close")
    async def end(self: Any) -> None:
        raise WebSocketException(4321, "so it is")

    async with Stage(board(end)) as stage, stage.talk() as client:
        await client.say(emit("close", 1))
        assert await client.client.closed() == 4321


async def test_a_connection_ends_also_where_the_end_of_its_whisper_cannot_be_said() -> None:
    async def unable(*_: Any) -> None:
        raise Unavailable("the backend rests")

    async with Stage(Board) as stage:
        async with pair(stage) as (ann, bob):
            await ann.say(whisper("cursor", {"x": 1, "y": 1}))
            await bob.hear()
            stage.rt._backend.broker.publish = unable  # type: ignore[method-assign, assignment]
        await turns(50)
        assert not stage.rt.connections


# Budgets that other nodes share


class Others(MemoryLimits):
    """The limits of all nodes, in one process; ``gate`` is waited for before anything is taken."""

    shared = True

    def __init__(self) -> None:
        super().__init__(anyio.current_time)
        self.gate = anyio.Event()
        self.gate.set()
        self.trouble: Exception | None = None

    async def take(self, dues: Any, seen: Any) -> float:
        await self.gate.wait()
        if self.trouble is not None:
            raise self.trouble
        return await super().take(dues, seen)

    def use_up(self, name: str, rate: str) -> None:
        """Another node has let pass all that there was for this budget."""
        limit = RateLimit(rate, per="user")
        amount = round(limit.rates[0][1] / limit.rates[0][0]) + 1
        assert not self.buckets.hit(name, limit, anyio.current_time(), amount)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """What stages of this test share."""
    made = Others()
    monkeypatch.setattr(Realtime, "limits", property(lambda self: made), raising=False)
    return made


PER_USER = [RateLimit("3/hour", per="user")]


@both
async def test_what_other_nodes_have_let_pass_counts(others: Others, spelling: str) -> None:
    made = board(limits=PER_USER)
    async with Stage(made) as one, Stage(made) as two:
        async with one.talk("ann", spelling=spelling) as here, two.talk("ann", spelling=spelling) as there:
            await here.say(*(echo(ref) for ref in range(2)))
            assert set((await here.answers(0, 1)).values()) == {"reply"}
            await there.say(*(echo(ref) for ref in range(4)))
            assert await there.answers(0, 1, 2, 3) == {0: "reply", 1: "rate_limited", 2: "skipped", 3: "rate_limited"}
            answer = await there.ask("join", group="board")
            assert (answer["message"], answer["temporary"]) == ("too many messages", True)
            assert 1_100_000 < answer["retry_after_ms"] <= 1_200_000


async def test_a_request_that_waits_for_other_nodes_keeps_its_place(others: Others) -> None:
    async with Stage(board(limits=PER_USER)) as stage, stage.talk("ann") as ann:
        others.gate = anyio.Event()
        await ann.say(echo(1, "a"), echo(2, "b"))
        await ann.say({"type": "leave", "ref": 3, "group": "board"})
        await ann.silent()
        others.gate.set()
        assert [frame["ref"] for frame in await ann.heard(3)] == [1, 2, 3]


async def test_the_limit_of_an_event_is_shared_too_and_named(others: Others) -> None:
    @event("count", limit=RateLimit("3/hour", per="user"))
    async def count(self: Any) -> None: ...

    made = board(count)
    async with Stage(made) as stage, stage.talk("ann") as ann, stage.talk() as guest:
        others.use_up(f"{made.__module__}.{made.__qualname__}:count:0:user:ann", "3/hour")
        answer = await ann.ask("event", event="count")
        assert (answer["code"], answer["message"]) == ("rate_limited", "too many count")
        assert (await ann.ask("event", event="echo"))["type"] == "reply"
        assert (await guest.ask("event", event="count"))["type"] == "reply", "a guest is no user"


async def test_a_whisper_that_other_nodes_leave_no_room_for_is_dropped_or_refused(others: Others) -> None:
    made = board(whispers={"typing": Whisper(bool, limit=RateLimit("3/hour", per="user"))})
    said = {"type": "whisper", "group": "board", "event": "typing", "data": True}
    async with Stage(made) as stage, stage.talk("ann") as ann, stage.talk("bob") as bob:
        for client in (ann, bob):
            await client.get("join", group="board")
        await ann.say(said)
        assert (await bob.hear())["from"] == "ann"
        others.trouble = EventError("rate_limited", "too many whispers", retry_after=1)
        await ann.say(said)
        await ann.silent()
        others.trouble = Unavailable("the backend rests")
        await ann.say(said)
        assert await ann.refused("whisper", group="board", event="typing", data=True) == "rate_limited", "of this node"
        async with stage.talk("cy") as cy:
            await cy.get("join", group="board")
            assert await cy.refused("whisper", group="board", event="typing", data=True) == "unavailable"
        await bob.silent()


async def test_where_nobody_can_say_what_other_nodes_let_pass_it_is_tried_again_later(others: Others) -> None:
    async with Stage(board(limits=PER_USER)) as stage, stage.talk("ann") as ann:
        others.trouble = Unavailable("the backend rests")
        answer = await ann.ask("event", event="echo")
        assert (answer["code"], answer["temporary"]) == ("unavailable", True)
        others.trouble = None
        assert (await ann.ask("event", event="echo"))["type"] == "reply"


async def test_what_only_this_connection_pays_for_asks_no_other_node(others: Others) -> None:
    others.trouble = RuntimeError("asked")
    async with Stage(board(limits=[RateLimit("9/hour")])) as stage, stage.talk("ann") as ann:
        assert (await ann.ask("event", event="echo"))["type"] == "reply"
    async with Stage(board(limits=PER_USER)) as stage, stage.talk() as guest:
        assert (await guest.ask("event", event="echo"))["type"] == "reply"


async def test_a_plain_client_pays_in_its_order_too(others: Others) -> None:
    class Echo(RealtimeEndpoint):
        limits = PER_USER

        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()

        async def on_receive(self, websocket: WebSocket, data: Any) -> None:
            await self.push(data)

    async with Stage(Echo) as one, Stage(Echo) as two, one.plain("ann") as here, two.plain("ann") as there:
        await here.send_json(0)
        assert await here.receive_json() == 0
        others.gate = anyio.Event()
        for number in range(3):
            await there.send_json(number)
        await there.silent()
        others.gate.set()
        heard = [await there.receive_json() for _ in range(3)]
        assert heard[:2] == [0, 1]
        assert heard[2]["code"] == "rate_limited"
