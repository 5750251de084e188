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
    TokenError,
    TokenSigner,
    Unavailable,
    Whisper,
    dialogue,
    event,
)
from starlette_rt import connection as connections
from starlette_rt.connection import Connection
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
        await client.say(echo(1), {"type": "join", "ref": 2}, emit("", 3), {"type": "event", "ref": 4, "event": 5}, echo(5))
        assert await client.answers(1, 2, 3, 4, 5) == {1: "reply", 2: "invalid", 3: "bad_name", 4: "invalid", 5: "reply"}
        await client.silent()


@both
async def test_a_message_that_holds_no_frame_is_answered_without_a_ref(spelling: str) -> None:
    async with Stage(Board) as stage, stage.talk(spelling=spelling) as client:
        for raw in (b"\xc1", b"[1"):
            await client.client.send(raw)
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


async def test_who_keeps_on_sending_what_is_refused_is_closed() -> None:
    async with Stage(Board) as stage, stage.talk() as client:
        await client.say(*[emit("nothing")] * 51)
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
        raise {"refuse": EventError("full", "no seat"), "wait": EventError("full", retry_after=2)}.get(data) or KeyError(1)

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


async def test_a_batch_stops_where_the_limit_of_an_event_is_met() -> None:
    @event("rare", limit=RateLimit("1/hour"))
    async def rare(self: Any) -> None: ...

    async with Stage(board(rare)) as stage, stage.talk() as client:
        await client.say(emit("rare", 1), emit("rare", 2), echo(3))
        assert await client.answers(1, 2, 3) == {1: "reply", 2: "rate_limited", 3: "skipped"}


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
    """Four requests may wait."""
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
        await client.say(emit("wait", 0))
        await turns()
        for ref in range(1, 7):
            await client.say(echo(ref))
        busy = await client.heard(2)
        assert busy[0] == {
            "type": "error",
            "ref": 5,
            "code": "busy",
            "message": "too many requests are unanswered",
            "temporary": True,
            "retry_after_ms": 100,
        }
        assert (busy[1]["ref"], busy[1]["code"]) == (6, "busy")
        await client.say(echo())  # nothing to answer
        gate.set()
        assert set((await client.answers(0, 1, 2, 3, 4)).values()) == {"reply"}
        assert await client.get("event", event="echo", data="again") == "again"
        assert stage.rt.stats().get("rejected.busy") is None, "it does not count as a refusal"


async def test_a_batch_stops_at_the_window(narrow: None) -> None:
    gate = anyio.Event()
    async with Stage(gated(gate)) as stage, stage.talk() as client:
        await client.say(emit("wait", 0))
        await turns()
        await client.say(*(echo(ref) for ref in range(1, 20)))
        refused = await client.answers(*range(5, 20))
        assert refused == {5: "busy", **dict.fromkeys(range(6, 20), "skipped")}
        gate.set()
        await client.answers(0, 1, 2, 3, 4)


@pytest.mark.parametrize("kind", ["event", "leave"])
async def test_twice_the_window_is_too_much(kind: str, narrow: None) -> None:
    gate = anyio.Event()
    frame = echo() if kind == "event" else {"type": "leave", "group": "board"}
    room = 4 if kind == "event" else 8  # a leave is let in for longer
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
            for ref in range(1, 9):
                await client.say(echo(ref))
            assert set((await client.answers(5, 6, 7, 8)).values()) == {"busy"}
            gates[gate].set()
            await client.answers(0, 1, 2, 3, 4)
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
