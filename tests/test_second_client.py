"""The protocol twice over: the second client against the examples of the page, and scenarios for a real server.

The law of this file: what is expected here stands in docs/protocol.md; nothing comes from the package. The fake
server says what a script tells it. SCENARIOS get a way to make clients and know of the server what `Make` says.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from tests.second_client import NO_VERSION_1, Client, Frame, Lost, Presence, Refused, Spelling, decode, encode, texts

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parent.parent / "docs" / "protocol.md"
SPELLINGS: list[Spelling] = ["json", "msgpack"]
PATIENCE = 10.0  # seconds; what takes so long does not come


@pytest.fixture
def anyio_backend() -> str:
    """The client is one of asyncio."""
    return "asyncio"


@pytest.fixture(params=SPELLINGS)
def spelling(request: pytest.FixtureRequest) -> Spelling:
    kind: Spelling = request.param
    return kind


def examples(side: str) -> dict[str, list[Any]]:
    """The frames of a chapter of the page, by heading."""
    found: dict[str, list[Any]] = {}
    chapter = heading = ""
    inside = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```json"
        elif line.startswith("## "):
            chapter = line[3:]
        elif line.startswith("### "):
            heading = line[4:]
        elif inside and chapter == side:
            found.setdefault(heading, []).append(json.loads(line))
    return found


CLIENT = examples("What the client says")
SERVER = examples("What the server says")
WELCOME: Frame = SERVER["welcome"][0]
GROUP = "board:7"
FRESH: Frame = {"position": None, "recovered": True, "events": []}


# ---- a fake server


class Peer:
    """One connection of the fake server."""

    def __init__(self, socket: ServerConnection, spelling: Spelling) -> None:
        self.socket, self.spelling = socket, spelling
        self.waiting: list[Frame] = []

    async def say(self, *frames: Frame) -> None:
        await self.socket.send(encode(frames[0] if len(frames) == 1 else list(frames), self.spelling))

    async def batch(self) -> list[Frame]:
        """The frames of the next message."""
        async with asyncio.timeout(PATIENCE):
            message = await self.socket.recv()
        assert isinstance(message, str) == (self.spelling == "json")
        value = decode(message)
        return value if isinstance(value, list) else [value]

    async def next(self, kind: str) -> Frame:
        """The next frame, which is of this type."""
        self.waiting = self.waiting or await self.batch()
        frame = self.waiting.pop(0)
        assert frame["type"] == kind, frame
        return frame

    async def reply(self, frame: Frame, data: Any = None) -> None:
        await self.say(reply(frame, data))


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class Refusal:
    """Answers a handshake with an HTTP status."""

    status: HTTPStatus
    body: Frame


@dataclass
class Fake:
    """Runs the n-th script for the n-th handshake; a script that does not come to its end is an error."""

    spelling: Spelling
    scripts: list[Script | Refusal]
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)

    def refuse(self, socket: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request)
        if not isinstance(refusal := self.scripts[0], Refusal):
            return None
        del self.scripts[0]
        return socket.respond(refusal.status, json.dumps(refusal.body))

    def select(self, socket: ServerConnection, offers: Any) -> Subprotocol | None:
        return next((each for each in offers if each in ("rt.v1.json", "rt.v1.msgpack")), None)

    async def run(self, socket: ServerConnection) -> None:
        script = self.scripts.pop(0)
        assert not isinstance(script, Refusal)
        try:
            await script(Peer(socket, self.spelling))
        except Exception as error:
            self.errors.append(error)
        else:
            await socket.wait_closed()


@asynccontextmanager
async def fake(spelling: Spelling, *scripts: Script | Refusal, speaks: bool = True) -> AsyncIterator[Fake]:
    it = Fake(spelling, list(scripts))
    select = it.select if speaks else lambda socket, offers: None
    async with serve(
        it.run,
        "127.0.0.1",
        0,
        process_request=it.refuse,
        select_subprotocol=select,
        ping_interval=None,
        close_timeout=1,
    ) as server:
        it.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws"
        yield it
    assert not it.errors, it.errors
    assert not it.scripts, "a connection that was expected did not come"


def reply(frame: Frame, data: Any = None) -> Frame:
    return {"type": "reply", "ref": frame["ref"], "data": data}


def error(frame: Frame, code: str, temporary: bool = False, **more: Any) -> Frame:
    return {"type": "error", "ref": frame["ref"], "code": code, "message": "", "temporary": temporary, **more}


def said(text: str, offset: int, **more: Any) -> Frame:
    place = {"offset": offset, "tag": f"tag{offset}"}
    return {"type": "event", "event": "said", "group": GROUP, "data": {"text": text}, **place, **more}


def at(offset: int, epoch: str = "x3kQ") -> Frame:
    return {"epoch": epoch, "offset": offset, "tag": f"tag{offset}"}


def bare(frame: Frame) -> Frame:
    """Without what a client chooses."""
    return {key: value for key, value in frame.items() if key not in ("ref", "id")}


def immediate(client: Client) -> list[float]:
    """Let the client not wait but note how long it would have, with the longest jitter."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    client.sleep, client.uniform = sleep, max
    return waits


# ---- the examples of the page


@pytest.mark.unit
def test_every_example_is_the_same_in_both_spellings(spelling: Spelling) -> None:
    frames = [frame for chapter in (CLIENT, SERVER) for each in chapter.values() for frame in each]
    assert len(frames) >= 35
    for frame in frames:
        assert decode(encode(frame, spelling)) == frame
    assert decode(encode(frames, spelling)) == frames


@pytest.mark.unit
async def test_the_client_says_each_example_of_a_client(spelling: Spelling) -> None:
    frames: list[Frame] = []
    page: Frame = {"members": {}, "after": None}
    data: Frame = {"join": FRESH, "presence": page, "refresh": {"ttl_ms": 1}}

    async def script(peer: Peer) -> None:
        await peer.say(WELCOME)
        while not frames or frames[-1].get("event") != "last":
            for frame in await peer.batch():
                frames.append(frame)
                if frame["type"] not in ("reply", "error", "pong") and "ref" in frame:
                    await peer.reply(frame, data.get(frame["type"]))
                if frame.get("event") == "typing" and frame.get("stop"):
                    calls = [{"type": "event", "event": each, "ref": 9} for each in ("yes", "no")]
                    await peer.say({"type": "ping"}, *calls)

    async def yes(data: Any) -> Any:
        return {"agreed": True}

    async def no(data: Any) -> Any:
        raise Refused("declined", "not now")

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        client.handlers |= {"yes": yes, "no": no}
        await client.join(GROUP)
        client.groups[GROUP].position = CLIENT["join"][1]["position"]
        await client.join(GROUP, presence="members")
        await client.join(GROUP, last=50, presence="count")
        await client.emit("say", {"text": "hello"}, GROUP)
        await client.track(GROUP, {"name": "Ada"})
        await client.track(GROUP, {"name": "Ada", "away": True}, kind="update")
        await client.untrack(GROUP)
        await client.request("presence", group=GROUP, after="ada", limit=CLIENT["presence"][0]["limit"])
        await client.request("refresh", token="eyJz…")
        await client.leave(GROUP)
        await client.whisper(GROUP, "typing", {"where": "title"})
        await client.whisper(GROUP, "typing", stop=True)
        async with asyncio.timeout(PATIENCE):
            while {"pong", "reply", "error"} - {frame["type"] for frame in frames}:
                await client.request("presence", group=GROUP)
        await client.emit("last")
    for heading, shown in CLIENT.items():
        for frame in shown:
            assert bare(frame) in [bare(each) for each in frames], heading
    refs = [frame["ref"] for frame in frames if "ref" in frame and frame["type"] not in ("reply", "error")]
    assert len(set(refs)) == len(refs)


@pytest.mark.unit
async def test_each_example_of_a_server_does_what_the_page_says(spelling: Spelling) -> None:
    calls: list[Any] = []

    async def confirm(data: Any) -> Any:
        calls.append(data)
        return {"agreed": True}

    async def script(peer: Peer) -> None:
        await peer.say(WELCOME)
        await peer.say(SERVER["joined"][0])
        call = SERVER["event"][3]
        await peer.say({**SERVER["joined"][0], "position": at(43)})  # told again: the older position is asked from
        join = await peer.next("join")
        assert join["position"] == SERVER["joined"][0]["position"]
        await peer.reply(join, SERVER["reply"][2]["data"])  # not recovered, with a snapshot
        await peer.say({**SERVER["reset"][0], "position": {**at(43), "tag": "02ab77e1"}})
        await peer.say(*SERVER["event"])
        await peer.say(*SERVER["whisper"], *SERVER["presence_state"], *SERVER["presence_diff"])
        await peer.say(*SERVER["presence_count"], SERVER["error"][1])
        assert await peer.next("reply") == {**CLIENT["reply, error"][0], "ref": call["ref"]}
        await peer.say(*SERVER["ping"])
        await peer.next("pong")
        await peer.say(*SERVER["left"])
        asked = await peer.next("event")
        await peer.say({**SERVER["error"][0], "ref": asked["ref"]})
        again = await peer.next("event")
        assert bare(again) == bare(asked)
        assert again["id"] == asked["id"]
        await peer.say({**SERVER["reply"][0], "ref": again["ref"]})
        await peer.say(*SERVER["goodbye"])
        await peer.socket.close(SERVER["goodbye"][0]["code"])

    async def second(peer: Peer) -> None:
        await peer.say(WELCOME)

    async with fake(spelling, script, second) as server, Client(server.url, spelling=spelling) as client:
        waits = immediate(client)
        client.handlers["confirm"] = confirm
        assert (await client.hear(type="stale"))["snapshot"] == {"title": "Plans"}
        assert (await client.hear(event="said"))["offset"] == 44
        assert (await client.hear(event="notice"))["data"] == "your export is ready"
        await client.hear(event="confirm")
        assert (await client.hear(type="whisper"))["from"] == "ada"
        await client.hear(type="presence_diff")
        assert (await client.hear(type="presence_count"))["count"] == client.groups[GROUP].count == 1204
        assert set(client.groups[GROUP].people.members) == {"ada", "cyd"}
        assert client.groups[GROUP].position == {"epoch": "x3kQ", "offset": 45, "tag": "118c90de"}
        assert (await client.hear(type="error"))["code"] == "bad_message"
        await client.hear(type="left", code="forbidden")
        assert client.groups == {}
        assert await client.emit("say") == {"stored": 17}
        await client.hear(type="goodbye")
        await client.hear(type="welcome")
        await client.hear(type="welcome")
        assert waits == [0.8, 1.73]
        assert calls == [{"delete": GROUP}]


# ---- opening and coming back


@pytest.mark.unit
@pytest.mark.parametrize("bearer", [False, True])
async def test_a_handshake_offers_a_spelling_a_session_and_a_token(spelling: Spelling, bearer: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(WELCOME)

    async with fake(spelling, script) as server:
        async with Client(server.url, spelling=spelling, token=lambda: "a.b-c_d", bearer=bearer) as client:
            await client.connected()
        headers = server.requests[0].headers
        offers = headers["Sec-WebSocket-Protocol"].split(", ")
        assert offers[0] == f"rt.v1.{spelling}"
        assert offers[1] == f"rt.session.{client.session}"
        assert 22 <= len(client.session) <= 64
        assert offers[2:] == ([] if bearer else ["rt.token.a.b-c_d"])
        assert headers.get("Authorization") == ("Bearer a.b-c_d" if bearer else None)


@pytest.mark.unit
async def test_a_route_without_version_1_ends_the_client(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.socket.wait_closed()

    async with fake(spelling, script, speaks=False) as server, Client(server.url, spelling=spelling) as client:
        with pytest.raises(Lost):
            await client.connected()
        assert client.code == NO_VERSION_1


@pytest.mark.unit
async def test_a_refused_handshake_is_tried_again_when_that_makes_sense(spelling: Spelling) -> None:
    busy = Refusal(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "unavailable", "message": "", "retry_after_ms": 9000})
    closed = Refusal(HTTPStatus.UNAUTHORIZED, {"error": "unauthorized", "message": ""})
    async with fake(spelling, busy, closed) as server, Client(server.url, spelling=spelling) as client:
        waits = immediate(client)
        with pytest.raises(Lost):
            await client.connected()
        assert waits == [9.0]
        assert client.code == 4501


@pytest.mark.unit
async def test_the_close_codes_say_whether_a_client_comes_back(spelling: Spelling) -> None:
    chapter = PAGE.read_text(encoding="utf-8").split("## Close codes")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in chapter.splitlines() if line.startswith("| ")]
    codes = {int(code): back == "yes" for codes, _, back in rows[1:] for code in codes.split(",")}
    assert len(codes) >= 16
    for code, back in codes.items():

        async def script(peer: Peer, code: int = code) -> None:
            if code == 1006:
                peer.socket.transport.abort()
            else:
                await peer.socket.close(code)

        async def second(peer: Peer) -> None:
            await peer.say(WELCOME)

        scripts = [script, second] if back else [script]
        async with fake(spelling, *scripts) as server, Client(server.url, spelling=spelling) as client:
            immediate(client)
            if back:
                await client.connected()
            else:
                with pytest.raises(Lost):
                    await client.connected()
                assert client.code == code


@pytest.mark.unit
async def test_waits_between_attempts_double_up_to_a_cap_and_begin_anew(spelling: Spelling) -> None:
    async def away(peer: Peer) -> None:
        await peer.socket.close(1012)

    async def short(peer: Peer) -> None:
        await peer.say(WELCOME)
        await peer.socket.close(1001)

    async def last(peer: Peer) -> None:
        await peer.say(WELCOME)

    scripts = [away, away, away, away, short, last]
    async with fake(spelling, *scripts) as server:
        async with Client(server.url, spelling=spelling, base=1.0, cap=10.0) as client:
            waits = immediate(client)
            await client.hear(type="welcome")
            await client.hear(type="welcome")
            assert waits == [2.0, 4.0, 8.0, 10.0, 2.0]


@pytest.mark.unit
async def test_a_silent_connection_is_taken_for_dead(spelling: Spelling) -> None:
    async def silent(peer: Peer) -> None:
        await peer.say({**WELCOME, "ping_interval_ms": 20, "ping_timeout_ms": 30})

    async def second(peer: Peer) -> None:
        await peer.say(WELCOME)

    async with fake(spelling, silent, second) as server, Client(server.url, spelling=spelling) as client:
        immediate(client)
        await client.hear(type="welcome")
        await client.hear(type="welcome")


@pytest.mark.unit
async def test_after_a_loss_groups_are_joined_in_one_batch_and_then_the_queue_is_sent(spelling: Spelling) -> None:
    first: list[Frame] = []

    async def script(peer: Peer) -> None:
        await peer.say(WELCOME)
        for name, position in ((GROUP, at(1)), ("plain", None)):
            await peer.reply(await peer.next("join"), {**FRESH, "position": position})
            if name == GROUP:
                await peer.reply(await peer.next("track"))
        await peer.say(said("two", 2), {"type": "event", "event": "said", "group": "plain", "data": {"text": "p"}})
        first.extend(await peer.batch())
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.say(WELCOME)
        one, two = await peer.batch()
        assert bare(one) == {"type": "join", "group": GROUP, "position": at(2)}
        assert bare(two) == {"type": "join", "group": "plain"}
        await peer.say(said("four", 4))  # before the reply: held back
        data = {"position": at(4), "recovered": True, "events": [said("three", 3), said("four", 4)]}
        await peer.say(reply(two, FRESH), error(one, "rate_limited", True, retry_after_ms=10))
        (again,) = await peer.batch()
        assert bare(again) == bare(one)
        await peer.reply(again, data)
        track = await peer.next("track")
        assert track["meta"] == {"name": "Ada"}
        await peer.reply(track)
        events = await peer.batch()
        assert [bare(each) for each in events[: len(first)]] == [bare(each) for each in first]
        assert [each["id"] for each in events[: len(first)]] == [each["id"] for each in first]
        await peer.say(*(reply(each, each["data"]) for each in events))

    async with fake(spelling, script, second) as server, Client(server.url, spelling=spelling) as client:
        immediate(client)
        await client.join(GROUP)
        await client.track(GROUP, {"name": "Ada"})
        await client.join("plain")
        await client.hear(event="said", group="plain")
        answers = [client.post("say", n, GROUP) for n in range(3)]
        assert [await client.wait(each) for each in answers] == [0, 1, 2]
        assert texts(client.heard) == ["two", "three", "four"]
        assert client.gaps == []
        assert client.groups[GROUP].position == at(4)


@pytest.mark.unit
async def test_a_group_that_the_server_joins_too_is_asked_for_once(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(WELCOME)
        await peer.reply(await peer.next("join"), {**FRESH, "position": at(1)})
        await peer.next("event")
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.say(WELCOME, {"type": "joined", "group": GROUP, "position": at(2)}, said("3", 3))
        events = [said("2", 2), said("3", 3)]
        await peer.reply(await peer.next("join"), {"position": at(3), "recovered": True, "events": events})
        await peer.reply(await peer.next("event"))

    async with fake(spelling, script, second) as server, Client(server.url, spelling=spelling) as client:
        immediate(client)
        await client.join(GROUP)
        await client.emit("say")
        assert texts(client.heard) == ["2", "3"]
        assert client.groups[GROUP].position == at(3)


@pytest.mark.unit
async def test_what_was_refused_for_a_time_may_be_sent_again_however_late(spelling: Spelling) -> None:
    now = 0.0

    async def script(peer: Peer) -> None:
        nonlocal now
        await peer.say(WELCOME)
        asked = await peer.next("event")
        now = WELCOME["once_ms"] / 1000
        await peer.say(error(asked, "unavailable", True))
        await peer.reply(await peer.next("event"), "ok")

    async with fake(spelling, script) as server:
        async with Client(server.url, spelling=spelling, clock=lambda: now) as client:
            immediate(client)
            assert await client.emit("say") == "ok"


@pytest.mark.unit
async def test_an_event_is_not_sent_again_when_its_id_is_forgotten(spelling: Spelling) -> None:
    now = 0.0

    async def script(peer: Peer) -> None:
        nonlocal now
        await peer.say({**WELCOME, "once_ms": 60000})
        await peer.next("event")
        now = 60.0
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.say({**WELCOME, "once_ms": 60000})
        await peer.reply(await peer.next("event"), "fresh")

    async with fake(spelling, script, second) as server:
        async with Client(server.url, spelling=spelling, clock=lambda: now) as client:
            immediate(client)
            with pytest.raises(Refused, match="outcome_unknown"):
                await client.emit("say")
            assert await client.emit("say") == "fresh"


# ---- refs, batches, the queue


@pytest.mark.unit
async def test_a_stopped_batch_is_sent_again_from_where_it_stopped(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.say({**WELCOME, "window": 4})
        await peer.reply(await peer.next("event"))
        batch = await peer.batch()
        assert [each["data"] for each in batch] == [0, 1, 2, 3]
        refusals = [error(batch[1], "rate_limited", True, retry_after_ms=700)]
        refusals += [error(each, "skipped", True) for each in batch[2:]]
        await peer.say(reply(batch[0], "ok"), *refusals)
        again = await peer.batch()
        assert [each["data"] for each in again] == [1, 2, 3, 4]
        assert [each["id"] for each in again[:3]] == [each["id"] for each in batch[1:]]
        await peer.say(reply(again[0], "ok"), error(again[1], "no"), *(reply(each, "ok") for each in again[2:]))

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        waits = immediate(client)
        first = client.post("say")
        await client.wait(first)
        answers = [client.post("say", n) for n in range(5)]
        assert await client.wait(answers[0]) == "ok"
        with pytest.raises(Refused, match="no"):
            await client.wait(answers[2])
        assert [await client.wait(answers[n]) for n in (1, 3, 4)] == ["ok"] * 3
        assert waits == [0.7]


@pytest.mark.unit
async def test_a_batch_keeps_to_the_window_and_the_size(spelling: Spelling) -> None:
    sizes: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.say({**WELCOME, "window": 10, "max_size": 1000})
        answered = 0
        while answered < 30:
            batch = await peer.batch()
            sizes.append(len(batch))
            message = encode(batch, peer.spelling)
            assert len(message.encode() if isinstance(message, str) else message) <= 1000
            await peer.say(*map(reply, batch))
            answered += len(batch)

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        await client.connected()
        answers = [client.post("say", "x" * (200 if n < 15 else 1)) for n in range(30)]
        with pytest.raises(Refused, match="too_large"):
            await client.emit("say", "x" * 1000)
        for each in answers:
            await client.wait(each)
        assert max(sizes) == 10
        assert 1 < min(sizes) < 5


@pytest.mark.unit
async def test_unknown_types_and_fields_are_ignored_also_in_a_batch(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(
            {"type": "zzz", "ref": 1}, {**WELCOME, "zzz": 1}, {"type": "joined", "group": GROUP, "position": None}
        )
        asked = await peer.next("event")
        await peer.say({"type": "zzz"}, reply({"ref": 10**6}), {**reply(asked, "ok"), "zzz": [1]})

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        assert await client.emit("say") == "ok"
        assert list(client.groups) == [GROUP]


@pytest.mark.unit
async def test_a_call_that_nobody_handles_is_answered(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(WELCOME, {"type": "event", "event": "zzz", "ref": 0})
        assert (await peer.next("error"))["code"] == "unknown_event"
        await peer.say({"type": "event", "event": "done"})

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        await client.hear(event="done")


# ---- positions


@pytest.mark.unit
async def test_what_was_held_back_follows_the_reply_each_offset_once(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(WELCOME, {"type": "joined", "group": GROUP, "position": at(3)})
        await peer.say({"type": "joined", "group": GROUP, "position": at(9)})
        asked = await peer.next("join")
        assert asked["position"] == at(3)
        await peer.say(said("5", 5), said("4", 4), said("3", 3))  # ahead of the reply
        skip = {"type": "event", "group": GROUP, "offset": 10, "tag": "tag10", "skip": True}
        await peer.say(skip, said("11", 11, id="a"))
        events = [said(str(n), n) for n in (5, 6, 7, 8)] + [said("9", 9, id="b")]
        await peer.reply(asked, {"position": at(9), "recovered": True, "events": events})
        await peer.say(said("12", 12, id="a"), said("13", 13, id="b"), said("13", 13), said("14", 14))
        await peer.say({"type": "event", "event": "done"})

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        await client.hear(event="done")
        assert texts(client.heard) == ["4", "5", "6", "7", "8", "9", "11", "14"]
        assert not [frame for frame in client.heard if "skip" in frame]
        assert client.groups[GROUP].position == at(14)
        assert client.gaps == []


@pytest.mark.unit
async def test_what_is_not_recovered_begins_at_the_position_of_the_reply(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(WELCOME)
        await peer.reply(await peer.next("join"), {**FRESH, "position": at(90)})
        asked = await peer.next("join")
        await peer.say(said("lost", 2), said("4", 4))
        events = [said("2", 2), said("3", 3)]
        await peer.reply(asked, {"position": at(3, "new"), "recovered": False, "events": events, "snapshot": "s"})
        await peer.say({"type": "event", "event": "done"})

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        await client.join(GROUP)
        await client.join(GROUP)
        await client.hear(event="done")
        assert (await client.hear(type="stale"))["snapshot"] == "s"
        assert texts(client.heard) == ["2", "3", "4"]
        assert client.groups[GROUP].position == at(4, "new")


@pytest.mark.unit
async def test_a_join_that_is_refused_loses_the_past_but_not_the_server_s_joining(spelling: Spelling) -> None:
    async def script(peer: Peer) -> None:
        await peer.say(WELCOME, {"type": "joined", "group": GROUP, "position": at(3)})
        await peer.say({"type": "joined", "group": GROUP, "position": at(9)}, said("10", 10))
        asked = await peer.next("join")
        await peer.say(error(asked, "forbidden"), said("11", 11))
        asked = await peer.next("join")
        assert asked["group"] == "closed"
        await peer.say(error(asked, "forbidden"))

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        await client.hear(type="stale")
        await client.hear(event="said", offset=11)
        assert texts(client.heard) == ["10"]
        assert client.groups[GROUP].position == at(11)
        with pytest.raises(Refused, match="forbidden"):
            await client.join("closed")
        assert list(client.groups) == [GROUP]


# ---- presence and whispers


@pytest.mark.unit
def test_a_diff_drops_and_appends_metas_and_an_old_one_is_ignored() -> None:
    people = Presence()
    diff = SERVER["presence_diff"][0]
    assert people.diff(diff)
    assert people.members == {}
    people.state(SERVER["presence_state"][0])
    partly = {"version": 6, "joins": {"ada": {"metas": [{"ref": "9"}]}}, "leaves": {"bob": {"metas": [{"ref": "2"}]}}}
    assert people.diff(partly)
    assert [meta["ref"] for meta in people.members["ada"]] == ["1", "9"]
    assert [meta["ref"] for meta in people.members["bob"]] == ["4"]
    assert people.diff(diff)
    assert "cyd" not in people.members
    assert people.diff({**diff, "version": 7})
    assert set(people.members) == {"ada", "cyd"}
    assert not people.diff({**diff, "version": 9})


@pytest.mark.unit
async def test_a_missing_diff_makes_the_client_ask_for_the_state(spelling: Spelling) -> None:
    state, diff = SERVER["presence_state"][0], SERVER["presence_diff"][0]

    async def script(peer: Peer) -> None:
        await peer.say(WELCOME)
        await peer.reply(await peer.next("join"), FRESH)
        await peer.say(state, {**diff, "version": 7})
        again = await peer.next("join")
        assert bare(again) == {"type": "join", "group": GROUP, "presence": "members"}
        await peer.say(reply(again, FRESH), {**state, "version": 7})
        page = await peer.next("presence")
        await peer.reply(page, {"members": state["members"], "after": "bob"})
        page = await peer.next("presence")
        assert page["after"] == "bob"
        await peer.reply(page, {"members": diff["joins"], "after": None})

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling) as client:
        await client.join(GROUP, presence="members")
        await client.hear(type="presence_state", version=7)
        assert client.groups[GROUP].people.version == 7
        assert set(await client.people(GROUP)) == {"ada", "bob", "cyd"}


@pytest.mark.unit
async def test_a_whisper_is_over_after_its_time_or_at_stop(spelling: Spelling) -> None:
    now = 0.0
    whisper, stop = SERVER["whisper"]

    async def script(peer: Peer) -> None:
        await peer.say(WELCOME, {"type": "joined", "group": GROUP, "position": None})
        await peer.say(whisper, {**whisper, "from": "bob"}, stop)

    async with fake(spelling, script) as server, Client(server.url, spelling=spelling, clock=lambda: now) as client:
        await client.hear(type="whisper", stop=True)
        assert client.whispering(GROUP) == {("typing", "bob"): {"where": "title"}}
        now = 5.0
        assert client.whispering(GROUP) == {}


# ---- scenarios for a real server


class Make(Protocol):
    """Makes a client of the scenario's spelling, not yet connected. ``who`` gets a valid token; without it a guest.

    The route offers the event handlers

    - ``say``: data ``{"text": str}`` to a group; broadcasts ``said`` with ``{"text", "by"}`` to it, the sender too, and
      returns ``{"n": int}``, how many were said in this group;
    - ``add``: data ``{"a": int, "b": int}``; returns the sum;
    - ``slow``: data is the number of seconds that it takes;
    - ``fail``: has a bug; ``refuse``: refuses with the code ``no``;
    - ``later``: a temporary error with 50 ms the first two times on a connection, then ``"ok"``, and so on;
    - ``call_me``: calls ``confirm`` on this client and returns what it answers.

    Anybody may join ``open:*`` (no history) and ``hist:*`` (a history of 100), nobody ``closed:*``; every client is
    joined to ``hist:lobby`` by the server. ``typing`` may be whispered and expires after 5 s. Tracking is allowed with
    the client's meta.
    """

    def __call__(self, *, who: str | None = None, **options: Any) -> Client: ...


Scenario = Callable[[Make], Awaitable[None]]
SCENARIOS: list[Scenario] = []


def scenario(run: Scenario) -> Scenario:
    SCENARIOS.append(run)
    return run


def fresh(kind: str) -> str:
    """A group that no other test uses."""
    return f"{kind}:{secrets.token_hex(8)}"


async def code_of(answer: Awaitable[Any]) -> str:
    with pytest.raises(Refused) as refused:
        await answer
    return refused.value.code


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def logged(client: Client, kind: str) -> list[Frame]:
    """The frames of a type that the server has said to this client."""
    return [frame for frame in client.log if frame["type"] == kind]


async def alive(client: Client) -> None:
    """It answers still, on the connection that it had."""
    before = len(logged(client, "welcome"))
    assert await client.request("event", event="add", data={"a": 1, "b": 2}) == 3
    assert len(logged(client, "welcome")) == before


async def again(client: Client, meanwhile: Awaitable[Any] | None = None) -> None:
    """Cut the line, let something happen, and wait for the next connection."""
    await client.connected()
    before = len(logged(client, "welcome"))
    client.cut()
    if meanwhile is not None:
        await meanwhile
    await until(lambda: len(logged(client, "welcome")) > before and client.ready.is_set())


@scenario
async def the_welcome_comes_first_and_is_complete(make: Make) -> None:
    async with make(who="ada") as ada, make() as guest:
        for client in (ada, guest):
            await client.connected()
            welcome = client.log[0]
            assert welcome["type"] == "welcome"
            assert welcome.keys() >= WELCOME.keys()
            for key in ("ping_interval_ms", "ping_timeout_ms", "once_ms", "window", "max_size"):
                assert type(welcome[key]) is int, key
                assert welcome[key] > 0
        assert ada.welcome["identity"] == "ada"
        assert guest.welcome["identity"].startswith("guest:")
        assert ada.welcome["connection"] != guest.welcome["connection"]


@scenario
async def the_first_offer_that_is_known_is_chosen_and_others_are_not_echoed(make: Make) -> None:
    client = make(who="ada")
    url, token = client.url, client.token() if client.token else ""
    secret = ["rt.session." + "s" * 22, f"rt.token.{token}"]
    for offers, chosen in (
        ([*secret, "zzz", "rt.v9.json", "rt.v1.msgpack", "rt.v1.json"], "rt.v1.msgpack"),
        (["rt.v1.json", *secret, "rt.v1.msgpack"], "rt.v1.json"),
    ):
        async with asyncio.timeout(PATIENCE):
            async with connect(url, subprotocols=[Subprotocol(each) for each in offers], proxy=None) as socket:
                assert socket.subprotocol == chosen
                welcome = decode(await socket.recv())
                welcome = welcome[0] if isinstance(welcome, list) else welcome
                assert welcome["type"] == "welcome"


@scenario
async def a_session_is_the_same_guest_again(make: Make) -> None:
    async with make() as first, make() as other:
        await first.connected()
        await other.connected()
        identity = first.welcome["identity"]
        assert identity != other.welcome["identity"]
        assert first.session not in identity
        await again(first)
        assert first.welcome["identity"] == identity


@scenario
async def a_wrong_token_is_refused_for_good_with_a_status_and_with_a_close_code(make: Make) -> None:
    url = urlsplit(make().url)
    for origin in (None, f"http://{url.netloc}"):
        async with make(token=lambda: "nonsense", origin=origin) as client:
            with pytest.raises(Lost):
                await client.connected()
            assert client.code == 4501
            assert client.log == []


@scenario
async def handlers_answer_and_refuse(make: Make) -> None:
    async with make() as client:
        assert await client.emit("add", {"a": 2, "b": 3}) == 5
        assert await code_of(client.emit("fail")) == "internal"
        assert await code_of(client.emit("refuse")) == "no"
        assert await code_of(client.emit("zzz")) == "unknown_event"
        with pytest.raises(Refused) as refused:
            await client.emit("add", {"a": "x", "b": 3})
        assert refused.value.code == "invalid"
        assert "a" in refused.value.message
        assert not refused.value.temporary
        assert await code_of(client.emit("add")) == "invalid"
        await alive(client)


@scenario
async def an_event_without_ref_is_handled_and_answered_only_if_it_is_refused(make: Make) -> None:
    name = fresh("open")
    async with make() as client:
        await client.join(name)
        await client.send({"type": "event", "event": "say", "group": name, "data": {"text": "quiet"}})
        assert (await client.hear(event="said"))["data"]["text"] == "quiet"
        await client.send({"type": "event", "event": "zzz"})
        refused = await client.hear(type="error")
        assert refused["code"] == "unknown_event"
        assert "ref" not in refused
        assert logged(client, "reply")[1:] == []


@scenario
async def refs_of_all_sizes_come_back(make: Make) -> None:
    async with make() as client:
        await client.connected()
        for ref in (0, 1, 2**31, 2**53 - 1):
            await client.send({"type": "event", "ref": ref, "event": "add", "data": {"a": ref % 7, "b": 0}})
            assert await client.hear(type="reply", ref=ref) == {"type": "reply", "ref": ref, "data": ref % 7}


@scenario
async def groups_are_joined_left_and_closed(make: Make) -> None:
    name = fresh("open")
    say: Frame = {"event": "say", "group": name, "data": {"text": "hi"}}
    async with make() as client, make() as other:
        assert await code_of(client.request("event", **say)) == "not_joined"
        assert await code_of(client.request("whisper", group=name, event="typing")) == "not_joined"
        assert await code_of(client.request("track", group=name, meta={})) == "not_joined"
        assert await code_of(client.request("presence", group=name)) == "not_joined"
        assert await client.request("leave", group=name) is None
        assert await code_of(client.join(fresh("closed"))) == "forbidden"
        assert await client.join(name) == FRESH
        assert await client.join(name) == FRESH
        await other.join(name)
        assert await client.request("event", **say) == {"n": 1}
        heard = await other.hear(event="said", group=name)
        assert heard["data"] == {"text": "hi", "by": client.welcome["identity"]}
        assert {"offset", "tag", "id", "ref"}.isdisjoint(heard)
        assert await client.leave(name) is None
        assert await code_of(client.request("event", **say)) == "not_joined"
        assert await other.emit("say", {"text": "still"}, name) == {"n": 2}
        await alive(client)
        assert [frame["data"]["text"] for frame in client.log if frame.get("event") == "said"] == ["hi"]


@scenario
async def a_history_has_positions_and_gives_the_last_events(make: Make) -> None:
    name = fresh("hist")
    async with make() as writer, make() as reader:
        start = (await writer.join(name))["position"]
        assert start.keys() >= {"epoch", "offset", "tag"}
        for n in range(5):
            await writer.emit("say", {"text": str(n)}, name)
        assert (await writer.hear(event="said"))["offset"] == start["offset"] + 1
        data = await reader.join(name, last=3)
        assert data["recovered"] is True
        assert [event["data"]["text"] for event in data["events"]] == ["2", "3", "4"]
        assert data["position"] == {**start, "offset": start["offset"] + 5, "tag": data["events"][-1]["tag"]}
        assert (await reader.join(name))["events"] == []  # it has a position now, and nothing was missed
        recovered = await reader.request("join", group=name, position=start)
        assert recovered["recovered"] is True
        assert [event["data"]["text"] for event in recovered["events"]] == ["0", "1", "2", "3", "4"]
        assert len({event["id"] for event in recovered["events"]}) == 5
        await writer.emit("say", {"text": "5"}, name)
        assert (await reader.hear(event="said", offset=start["offset"] + 6))["data"]["text"] == "5"
        assert writer.gaps == reader.gaps == []


@scenario
async def what_was_missed_is_recovered_once_and_in_order(make: Make) -> None:
    name = fresh("hist")
    async with make() as writer, make() as reader:
        await reader.join(name)
        await writer.join(name)
        by = writer.welcome["identity"]

        async def meanwhile(turn: int) -> None:
            for each in [writer.post("say", {"text": f"{turn} {n}"}, name) for n in range(10)]:
                await writer.wait(each)

        for turn in range(3):
            await writer.emit("say", {"text": f"{turn} live"}, name)
            await reader.hear(event="said", data={"text": f"{turn} live", "by": by})
            await again(reader, meanwhile(turn))
            for n in range(10):
                assert (await reader.hear(event="said"))["data"] == {"text": f"{turn} {n}", "by": by}
        await until(lambda: reader.groups[name].position == writer.groups[name].position)
        assert not [frame for frame in reader.heard if frame["type"] in ("stale", "event")]
        assert reader.gaps == []


@scenario
async def what_is_too_long_for_a_reply_is_recovered_all_the_same(make: Make) -> None:
    name = fresh("hist")
    long = "x" * 6000
    async with make() as writer, make() as reader:
        await reader.join(name)
        await writer.join(name)
        by = writer.welcome["identity"]

        async def meanwhile() -> None:
            for each in [writer.post("say", {"text": f"{n} {long}"}, name) for n in range(60)]:
                await writer.wait(each)

        await again(reader, meanwhile())
        for n in range(60):
            assert (await reader.hear(event="said"))["data"] == {"text": f"{n} {long}", "by": by}
        assert reader.gaps == []
        assert not [frame for frame in reader.heard if frame["type"] in ("stale", "event")]


@scenario
async def more_groups_than_the_window_are_joined_again(make: Make) -> None:
    async with make() as client, make() as other:
        await client.connected()
        names = [fresh("hist") for _ in range(client.welcome["window"] + 10)]
        for name in names:
            await client.join(name)
        await again(client)
        assert not [frame for frame in client.heard if frame["type"] in ("stale", "left", "error")]
        for name in (names[0], names[-1]):
            await other.join(name)
            await other.emit("say", {"text": name}, name)
            await client.hear(event="said", group=name)


@scenario
async def the_server_s_own_group_is_recovered_when_it_is_joined_again(make: Make) -> None:
    name = "hist:lobby"
    async with make() as writer, make() as reader:
        joined = await reader.hear(type="joined", group=name)
        assert joined["position"].keys() >= {"epoch", "offset", "tag"}
        await writer.hear(type="joined", group=name)
        mine = [secrets.token_hex(8) for _ in range(5)]

        async def meanwhile() -> None:
            for text in mine:
                await writer.emit("say", {"text": text}, name)

        await again(reader, meanwhile())
        await reader.hear(type="joined", group=name)
        by = writer.welcome["identity"]
        for text in mine:
            await reader.hear(event="said", data={"text": text, "by": by})
        await writer.emit("say", {"text": "live"}, name)
        await reader.hear(event="said", data={"text": "live", "by": by})
        assert reader.gaps == []


@scenario
async def what_the_server_cannot_prove_is_not_recovered(make: Make) -> None:
    name = fresh("hist")
    async with make() as client:
        there = (await client.join(name))["position"]
        for _ in range(105):  # more than the history holds
            await client.emit("say", {"text": "x"}, name)
        await until(lambda: len(texts(client.heard)) == 105)
        now = client.groups[name].position
        assert now is not None
        wrong = [
            {**now, "epoch": "zzz"},
            {**now, "tag": "zzz"},
            {**now, "offset": now["offset"] + 1000},
            {"epoch": now["epoch"], "offset": there["offset"], "tag": there["tag"]},
        ]
        for position in wrong:
            answer = await client.request("join", group=name, position=position)
            assert answer["recovered"] is False, position
            assert answer["position"] == now
        assert (await client.request("join", group=name, position=now)) == {
            "position": now,
            "recovered": True,
            "events": [],
        }


@scenario
async def an_id_is_handled_once_and_answered_alike(make: Make) -> None:
    name = fresh("hist")
    async with make() as client, make() as other:
        await client.join(name)
        await other.join(name)
        event: Frame = {"event": "say", "group": name, "data": {"text": "once"}, "id": secrets.token_hex(8)}
        assert await client.request("event", **event) == {"n": 1}
        assert await client.request("event", **event) == {"n": 1}
        await again(client)
        assert await client.request("event", **event) == {"n": 1}
        assert await other.request("event", **event) == {"n": 2}  # another guest's id is another id
        refused: Frame = {"event": "refuse", "id": secrets.token_hex(8)}
        assert await code_of(client.request("event", **refused)) == "no"
        assert await code_of(client.request("event", **refused)) == "no"
        await other.hear(event="said")
        await other.hear(event="said")
        assert await other.request("event", **event | {"id": secrets.token_hex(8)}) == {"n": 3}
        assert [frame["data"]["text"] for frame in other.log if frame.get("event") == "said"] == ["once"] * 3


@scenario
async def an_identity_is_recognised_from_another_session(make: Make) -> None:
    name, who = fresh("open"), "u" + secrets.token_hex(6)
    event: Frame = {"event": "say", "group": name, "data": {"text": "once"}, "id": secrets.token_hex(8)}
    for _ in range(2):
        async with make(who=who) as client:
            await client.join(name)
            assert await client.request("event", **event) == {"n": 1}


@scenario
async def a_queue_survives_cuts_in_order_and_at_most_once(make: Make) -> None:
    name = fresh("hist")
    async with make() as client, make() as witness:
        await client.join(name)
        await witness.join(name)
        answers = [client.post("say", {"text": str(n)}, name) for n in range(200)]
        for n in (10, 60, 110, 160):
            await client.wait(answers[n])
            client.cut()
        assert [await client.wait(each) for each in answers] == [{"n": n + 1} for n in range(200)]
        for n in range(200):
            await witness.hear(event="said", data={"text": str(n), "by": client.welcome["identity"]})
        assert not [frame for frame in witness.heard if frame["type"] == "event"]
        assert witness.gaps == client.gaps == []


@scenario
async def a_batch_stops_at_its_first_temporary_error(make: Make) -> None:
    name = fresh("open")
    async with make() as client:
        await client.join(name)
        say: Frame = {"type": "event", "event": "say", "group": name, "data": {"text": "x"}}
        ids: list[Frame] = [{"id": secrets.token_hex(8)} for _ in range(4)]
        batch = [say | ids[0], {"type": "event", "event": "later"} | ids[1], say | ids[2], say | ids[3]]
        for _ in range(2):
            first, later, *rest = await client.wait(client.exchange(*batch))
            assert first == {"n": 1}
            assert (later.temporary, later.retry_after_ms) == (True, 50)
            assert [(each.code, each.temporary) for each in rest] == [("skipped", True)] * 2
        assert await client.wait(client.exchange(*batch)) == [{"n": 1}, "ok", {"n": 2}, {"n": 3}]


@scenario
async def a_permanent_error_does_not_stop_a_batch(make: Make) -> None:
    add: Frame = {"type": "event", "event": "add", "data": {"a": 1, "b": 1}}
    async with make() as client:
        await client.connected()
        refused, added = await client.wait(client.exchange({"type": "event", "event": "refuse"}, add))
        assert (refused.code, added) == ("no", 2)


@scenario
async def a_queue_waits_for_what_is_refused_for_a_time(make: Make) -> None:
    name = fresh("open")
    async with make() as client:
        await client.join(name)
        answers = [
            client.post("say", {"text": "a"}, name),
            client.post("later"),
            client.post("say", {"text": "b"}, name),
        ]
        assert [await client.wait(each) for each in answers] == [{"n": 1}, "ok", {"n": 2}]
        assert (await client.hear(event="said"))["data"]["text"] == "a"
        assert (await client.hear(event="said"))["data"]["text"] == "b"


@scenario
async def frames_are_handled_in_the_order_in_which_they_were_sent(make: Make) -> None:
    name = fresh("open")
    async with make() as client:
        await client.join(name)
        frames = [{"type": "event", "event": "say", "group": name, "data": {"text": str(n)}} for n in range(20)]
        answers = await client.wait(client.exchange({"type": "event", "event": "slow", "data": 0.1}, *frames))
        assert answers[1:] == [{"n": n + 1} for n in range(20)]
        for n in range(20):
            assert (await client.hear(event="said"))["data"]["text"] == str(n)


@scenario
async def what_is_beyond_the_window_is_busy(make: Make) -> None:
    async with make() as client:
        await client.connected()
        slow = [
            client.exchange({"type": "event", "event": "slow", "data": 0 if number else 3})
            for number in range(client.welcome["window"] + 1)
        ]
        answers = [each[0] for each in await client.wait(asyncio.gather(*slow), 60.0)]
        busy = [each for each in answers if isinstance(each, Refused)]
        assert [(each.code, each.temporary) for each in busy] == [("busy", True)]
        await alive(client)


@scenario
async def the_server_calls_and_is_answered(make: Make) -> None:
    async def confirm(data: Any) -> Any:
        return {"agreed": [True, None, "ä"]}

    async def decline(data: Any) -> Any:
        raise Refused("declined", "not now")

    async with make() as client:
        client.handlers["confirm"] = confirm
        assert await client.emit("call_me") == {"agreed": [True, None, "ä"]}
        call = await client.hear(event="confirm")
        assert type(call["ref"]) is int
        client.handlers["confirm"] = decline
        await code_of(client.emit("call_me"))
        await alive(client)


@scenario
async def unknown_types_and_fields_are_ignored(make: Make) -> None:
    async with make() as client:
        await client.connected()
        await client.send(
            {"type": "zzz", "group": 7}, {"type": "pong", "zzz": 1}, {"type": "reply", "ref": 77, "data": 1}
        )
        await client.send({"type": "zzz"})
        assert await client.request("event", event="add", data={"a": 1, "b": 1}, zzz={"a": []}) == 2
        assert not logged(client, "error")
        await alive(client)


@scenario
async def names_and_ids_have_bounds(make: Make) -> None:
    name = fresh("open")
    async with make() as client:
        await client.join(name)
        longest = name + "x" * (255 - len(name))
        assert (await client.join(longest))["recovered"] is True
        for wrong in ("", longest + "x", "open:\n", "open:\0", "~open"):
            assert await code_of(client.request("join", group=wrong)) in ("bad_name", "too_large", "forbidden"), wrong
        assert await code_of(client.request("event", event="x" * 255)) == "unknown_event"
        for wrong in ("", "x" * 256, "say\n"):
            assert await code_of(client.request("event", event=wrong)) in ("bad_name", "too_large"), wrong
        add: Frame = {"event": "add", "data": {"a": 1, "b": 1}}
        assert await client.request("event", **add, id="x" * 64) == 2
        for wrong in ("", "x" * 65, "x\n"):
            assert await code_of(client.request("event", **add, id=wrong)) in ("bad_name", "invalid", "too_large"), (
                wrong
            )
        await alive(client)


@scenario
async def what_has_the_wrong_type_is_invalid(make: Make) -> None:
    name = fresh("open")
    async with make() as client:
        await client.join(name)
        for wrong in (
            {"type": "join"},
            {"type": "join", "group": 7},
            {"type": "join", "group": name, "last": "many"},
            {"type": "join", "group": name, "position": {"epoch": 1}},
            {"type": "join", "group": name, "presence": "zzz"},
            {"type": "event"},
            {"type": "event", "event": "add", "id": 7},
            {"type": "track", "group": name, "meta": "ada"},
            {"type": "presence", "group": name, "limit": 0},
            {"type": "presence", "group": name, "limit": 201},
            {"type": "whisper", "group": name},
            {"type": "refresh"},
        ):
            (answer,) = await client.wait(client.exchange(wrong))
            assert isinstance(answer, Refused), wrong
            assert (answer.code, answer.temporary) in (("invalid", False), ("bad_name", False)), wrong
        for ref in (-1, 2**53, "1", 1.5):
            await client.send({"type": "event", "ref": ref, "event": "add", "data": {"a": 1, "b": 1}})
            refused = await client.hear(type="error")
            assert refused["code"] == "invalid", ref
        await alive(client)


@scenario
async def what_is_no_frame_is_a_bad_message(make: Make) -> None:
    async with make() as client:
        await client.connected()
        broken: list[str | bytes] = (
            ["{", "[{]", '{"type": "pong"} x'] if client.spelling == "json" else [b"\xc1", b"\x81\xa4"]
        )
        for message in broken:
            await client.send_message(message)
            assert (await client.hear(type="error"))["code"] == "bad_message", message
        for value in (7, "x", None, {}, {"type": 7}, [7]):
            await client.send_message(encode(value, client.spelling))
            assert (await client.hear(type="error"))["code"] in ("bad_message", "invalid"), value
        await alive(client)


@scenario
async def messages_have_bounds(make: Make) -> None:
    async with make() as client:
        await client.connected()
        event: Frame = {"type": "event", "event": "add"}
        deep: Any = []
        for _ in range(70):
            deep = [deep]
        huge = "x" * client.welcome["max_size"]
        for frames in (
            [{**event, "data": deep}],
            [{**event, "data": [0] * 10_001}],
            [{**event, "data": huge}],
            [event] * 1001,
        ):
            await client.send(*frames)
            refused = await client.hear(type="error")
            assert refused["code"] == "too_large", str(frames)[:100]
            assert not refused["temporary"]
        await client.send(*[{"type": "pong"}] * 1000)
        assert await code_of(client.request("event", event="zzz", data=[0] * 9_900)) == "unknown_event"
        await alive(client)


@scenario
async def who_keeps_being_refused_is_closed(make: Make) -> None:
    async with make() as client:
        await client.connected()
        for _ in range(500):
            if client.code is not None:
                break
            with suppress(Lost):
                await client.send({"type": "event", "event": "zzz"})
            await asyncio.sleep(0.002)  # what is sent after the Close may cost the client its reading of it
        assert client.code == 4502


@scenario
async def the_other_kind_of_message_is_closed(make: Make) -> None:
    async with make() as client:
        await client.connected()
        wrong: str | bytes = b"\x80" if client.spelling == "json" else "{}"
        await client.send_message(wrong)
        await until(lambda: client.code is not None)
        assert client.code == 1003


@scenario
async def a_whisper_is_relayed_to_the_others_and_stops(make: Make) -> None:
    name = fresh("open")
    async with make(who="ada") as ada, make(who="bob") as bob:
        await ada.join(name)
        await bob.join(name)
        assert await ada.request("whisper", group=name, event="typing", data={"where": "title"}) is None
        heard = await bob.hear(type="whisper")
        assert heard == {**SERVER["whisper"][0], "group": name}
        assert bob.whispering(name) == {("typing", "ada"): {"where": "title"}}
        await ada.whisper(name, "typing", stop=True)
        assert await bob.hear(type="whisper") == {**SERVER["whisper"][1], "group": name}
        assert bob.whispering(name) == {}
        await ada.whisper(name, "typing", {"where": "body"})
        await bob.hear(type="whisper", data={"where": "body"})
        await ada.leave(name)
        assert (await bob.hear(type="whisper"))["stop"] is True
        assert await code_of(bob.request("whisper", group=name, event="zzz")) == "unknown_whisper"
        assert not logged(ada, "whisper")


@scenario
async def presence_is_a_state_and_diffs(make: Make) -> None:
    name = fresh("open")
    async with make(who="ada") as ada, make(who="bob") as bob, make(who="bob") as phone:
        await ada.join(name, presence="members")
        state = await ada.hear(type="presence_state", group=name)
        assert (state["members"], state["after"]) == ({}, None)
        people = ada.groups[name].people
        for client, meta in ((bob, {"name": "Bob"}), (phone, {"name": "Bob", "phone": True})):
            await client.join(name)
            await client.track(name, meta)
        await until(lambda: people_of(ada, name) == {"bob": [{"name": "Bob"}, {"name": "Bob", "phone": True}]})
        await bob.track(name, {"name": "Bob", "away": True}, kind="update")
        await ada.track(name, {"name": "Ada"})
        await until(lambda: {"name": "Bob", "away": True} in people_of(ada, name)["bob"] and "ada" in people.members)
        assert {"name": "Bob"} not in people_of(ada, name)["bob"]
        assert len({meta["ref"] for metas in people.members.values() for meta in metas}) == 3
        page = await ada.request("presence", group=name, limit=1)
        assert (list(page["members"]), page["after"]) == (["ada"], "ada")
        assert by_ref(await ada.people(name, limit=1)) == by_ref(people.members)
        await phone.leave(name)
        await bob.untrack(name)
        await until(lambda: "bob" not in people.members)
        gone = logged(ada, "presence_diff")[-1]
        assert gone["leaves"]["bob"]["reason"] == "left"
        await phone.join(name, presence="members")
        assert set((await phone.hear(type="presence_state"))["members"]) == {"ada"}


def by_ref(members: dict[str, list[Frame]]) -> dict[str, list[Frame]]:
    """The page does not say in which order the metas of a member stand."""
    return {who: sorted(metas, key=lambda meta: str(meta["ref"])) for who, metas in members.items()}


def people_of(client: Client, name: str) -> dict[str, list[Any]]:
    """The metas that a client knows of, without their refs."""
    members = client.groups[name].people.members
    return {who: [{k: v for k, v in meta.items() if k != "ref"} for meta in metas] for who, metas in members.items()}


@scenario
async def presence_may_be_a_count_and_changed_by_another_join(make: Make) -> None:
    name = fresh("open")
    async with make(who="ada") as ada, make(who="bob") as bob:
        await ada.join(name, presence="count")
        assert (await ada.hear(type="presence_count"))["count"] == 0
        await bob.join(name)
        await bob.track(name, {})
        assert (await ada.hear(type="presence_count"))["count"] == 1
        assert not logged(ada, "presence_state") + logged(ada, "presence_diff")
        await ada.join(name, presence="members")
        assert set((await ada.hear(type="presence_state"))["members"]) == {"bob"}


@scenario
async def a_member_that_comes_back_is_present_again(make: Make) -> None:
    name = fresh("open")
    async with make(who="ada") as ada, make(who="bob") as bob:
        await ada.join(name, presence="members")
        await bob.join(name)
        await bob.track(name, {"name": "Bob"})
        await ada.hear(type="presence_diff")
        await again(bob)
        await until(lambda: people_of(ada, name) == {"bob": [{"name": "Bob"}]})
        assert list(await ada.people(name)) == ["bob"]


@scenario
async def what_is_tracked_has_bounds(make: Make) -> None:
    name = fresh("open")
    async with make(who="ada") as ada:
        await ada.join(name)
        assert await code_of(ada.request("track", group=name, meta={"name": "x" * 5000})) == "too_large"
        await ada.track(name, {"name": "x" * 3900})
        await alive(ada)


@scenario
async def a_token_is_refreshed(make: Make) -> None:
    async with make(who="ada") as ada:
        await ada.connected()
        assert ada.token is not None
        answer = await ada.request("refresh", token=ada.token())
        assert answer["ttl_ms"] is None or answer["ttl_ms"] > 0
        await code_of(ada.request("refresh", token="nonsense"))
        bob = make(who="bob").token
        assert bob is not None
        await code_of(ada.request("refresh", token=bob()))
        await alive(ada)
        assert ada.welcome["identity"] == "ada"


@scenario
async def both_spellings_meet(make: Make) -> None:
    name = fresh("hist")
    async with make(spelling="json") as text, make(spelling="msgpack") as packed:
        await text.join(name)
        await packed.join(name)
        await text.emit("say", {"text": "ä \U0001f600"}, name)
        await packed.emit("say", {"text": "ö"}, name)
        for client in (text, packed):
            assert (await client.hear(event="said"))["data"]["text"] == "ä \U0001f600"
            assert (await client.hear(event="said"))["data"]["text"] == "ö"
        assert text.groups[name].position == packed.groups[name].position
        await packed.whisper(name, "typing", {"raw": b"\xff\x00\xfe"})
        assert (await text.hear(type="whisper"))["data"] == {"raw": "/wD+"}


@scenario
async def a_ping_is_answered_and_keeps_the_connection(make: Make) -> None:
    """Says something where the server pings within two seconds."""
    async with make() as client:
        await client.connected()
        if client.welcome["ping_interval_ms"] <= 2000:
            await until(lambda: len(logged(client, "ping")) >= 3)
        await client.send({"type": "pong"})
        await alive(client)


@pytest.mark.unit
def test_every_scenario_is_a_sentence_of_its_own() -> None:
    names = [each.__name__ for each in SCENARIOS]
    assert len(set(names)) == len(names) >= 35
