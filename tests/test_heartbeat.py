"""Who is still there: the wheel with a clock that the test moves, and clients that answer or do not.

The law of this file: time is an argument of the wheel. Of a live connection the sweeper is not waited for: the test
turns the wheel itself and says what time it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import anyio
import pytest

from starlette_rt import ConfigurationError, OutboxLimits, Realtime, event, heartbeat
from starlette_rt import connection as connections
from starlette_rt.exceptions import CloseCode
from starlette_rt.heartbeat import LATE, TICKS, Heartbeats
from tests.test_dialogue import Board, Stage, board, both, emit, turns, until

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


class Peer:
    """Notes what becomes of it."""

    def __init__(self, *, answers_pings: bool = True) -> None:
        self.answers_pings = answers_pings
        self.heard = True
        self.pinged = False
        self.active_at = 0.0
        self.due = 0
        self.pings = 0
        self.ends: list[int] = []

    def ping(self) -> None:
        self.pings += 1

    def begin_close(self, code: int, reason: str = "", /) -> None:
        assert reason == CloseCode(code).reason
        self.ends.append(code)

    def give_up(self, code: CloseCode, /) -> None:
        self.ends.append(code)


@pytest.fixture(autouse=True)
def at_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ping comes after a whole interval, less nearly nothing."""
    monkeypatch.setattr(heartbeat, "random", lambda: 1.0)


def wheel(interval: float = 20.0, timeout: float = 10.0, idle: float | None = None) -> Heartbeats:
    beats = Heartbeats(interval, timeout, idle)
    beats.tick(0.0)
    return beats


def turn(beats: Heartbeats, since: int, to: int) -> None:
    """Turn the wheel twice a second."""
    for half in range(2 * since + 1, 2 * to + 1):
        beats.tick(half / 2)


def test_one_who_answers_is_asked_every_interval_and_never_closed() -> None:
    beats, peer = wheel(), Peer()
    beats.add(peer, 0.0)
    asked = []
    for half in range(1, 400):
        before = peer.pings
        beats.tick(half / 2)
        if peer.pings > before:
            asked.append(half / 2)
            peer.heard = True
    assert peer.ends == []
    assert asked[0] == 20.5
    gaps = {later - earlier for earlier, later in pairwise(asked)}
    assert gaps == {21.0}, "each step is rounded up to the next half second"


def test_one_who_answers_nothing_is_given_up_when_interval_and_timeout_are_over() -> None:
    beats, peer = wheel(), Peer()
    beats.add(peer, 0.0)
    turn(beats, 0, 21)
    assert (peer.pings, peer.heard) == (1, False)
    turn(beats, 21, 30)
    assert peer.ends == []
    turn(beats, 30, 31)
    assert peer.ends == [CloseCode.PING_TIMEOUT]
    turn(beats, 31, 200)
    assert (peer.ends, peer.pings) == ([CloseCode.PING_TIMEOUT], 1), "and that is all"


def test_anything_that_is_heard_is_an_answer_however_late_in_its_time() -> None:
    beats, peer = wheel(), Peer()
    beats.add(peer, 0.0)
    turn(beats, 0, 30)
    peer.heard = True
    turn(beats, 30, 41)
    assert (peer.ends, peer.pings) == ([], 1)
    turn(beats, 41, 51)
    assert (peer.ends, peer.pings) == ([], 2)
    turn(beats, 51, 53)
    assert peer.ends == [CloseCode.PING_TIMEOUT], "it was heard of once"


def test_many_who_came_at_once_are_asked_at_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([0.0, 0.5, 0.999])
    monkeypatch.setattr(heartbeat, "random", lambda: next(numbers))
    beats, peers = wheel(), [Peer() for _ in range(3)]
    for peer in peers:
        beats.add(peer, 0.0)
    first = {}
    for half in range(1, 50):
        beats.tick(half / 2)
        for number, peer in enumerate(peers):
            if peer.pings:
                first.setdefault(number, half / 2)
    assert first == {0: 10.5, 1: 15.5, 2: 20.0}


def test_one_who_has_gone_is_not_asked() -> None:
    beats, peer, other = wheel(), Peer(), Peer()
    beats.add(peer, 0.0)
    beats.add(other, 0.0)
    beats.discard(peer)
    beats.discard(peer)
    beats.discard(Peer())
    turn(beats, 0, 40)
    assert (peer.pings, other.pings) == (0, 1)


def test_who_has_been_forgotten_altogether_is_not_asked_and_who_comes_then_is() -> None:
    beats, peer, late = wheel(), Peer(), Peer()
    beats.add(peer, 0.0)
    turn(beats, 0, 5)
    beats.clear()
    beats.tick(100.0)
    beats.add(late, 100.0)
    turn(beats, 100, 125)
    assert (peer.pings, late.pings) == (0, 1)


def test_a_loop_that_stood_still_judges_nobody_by_what_it_has_not_read() -> None:
    beats, peer = wheel(), Peer()
    beats.add(peer, 0.0)
    turn(beats, 0, 25)
    assert peer.pings == 1
    beats.tick(60.0)
    assert peer.ends == []
    peer.heard = True  # it has been read now
    turn(beats, 60, 62)
    assert peer.ends == []


def test_a_loop_that_stood_still_judges_in_its_next_turn() -> None:
    beats, peer = wheel(), Peer()
    beats.add(peer, 0.0)
    turn(beats, 0, 25)
    beats.tick(60.0)
    turn(beats, 60, 62)
    assert peer.ends == [CloseCode.PING_TIMEOUT]


def test_a_turn_that_is_a_little_late_sees_to_everybody() -> None:
    beats, peer = wheel(), Peer()
    beats.add(peer, 0.0)
    turn(beats, 0, 30)
    beats.tick(30.5 + LATE / TICKS)
    assert peer.ends == [CloseCode.PING_TIMEOUT]


def test_a_first_turn_that_comes_late_forgets_nobody() -> None:
    beats, peer = Heartbeats(1.0, 1.0, None), Peer()
    beats.add(peer, 100.0)
    beats.tick(104.0)
    turn(beats, 104, 110)
    assert peer.pings or peer.ends


def test_who_asks_for_nothing_for_too_long_is_closed_though_it_answers() -> None:
    beats, peer = wheel(idle=50.0), Peer()
    beats.add(peer, 0.0)
    for half in range(1, 120):
        beats.tick(half / 2)
        peer.heard = True
        assert half > 100 or not peer.ends
        if half == 20:
            peer.active_at = 1.0
    assert (peer.ends, peer.pings > 1) == ([CloseCode.IDLE], True)


def test_who_asks_now_and_then_stays() -> None:
    beats, peer = wheel(idle=50.0), Peer()
    beats.add(peer, 0.0)
    for half in range(1, 400):
        beats.tick(half / 2)
        peer.heard = True
        if half % 60 == 0:
            peer.active_at = half / 2
    assert peer.ends == []


def test_an_idle_time_below_the_interval_is_kept() -> None:
    beats, peer = wheel(idle=5.0), Peer()
    beats.add(peer, 0.0)
    turn(beats, 0, 5)
    assert peer.ends == []
    turn(beats, 5, 6)
    assert (peer.ends, peer.pings) == ([CloseCode.IDLE], 0)


def test_one_who_knows_no_pings_gets_none_and_may_be_idle() -> None:
    beats, peer, other = wheel(idle=50.0), Peer(answers_pings=False), Peer(answers_pings=False)
    beats.add(peer, 0.0)
    beats.add(other, 0.0)
    turn(beats, 0, 40)
    other.active_at = 40.0
    peer.heard = other.heard = False
    turn(beats, 40, 51)
    assert (peer.ends, peer.pings) == ([CloseCode.IDLE], 0)
    turn(beats, 51, 90)
    assert other.ends == []
    turn(beats, 90, 92)
    assert other.ends == [CloseCode.IDLE]


def test_one_who_knows_no_pings_is_nobodys_business_where_idling_is_allowed() -> None:
    beats, peer = wheel(), Peer(answers_pings=False)
    beats.add(peer, 0.0)
    turn(beats, 0, 100)
    assert (peer.ends, peer.pings) == ([], 0)
    assert not beats._wheel


@pytest.mark.parametrize("times", [(20, 21), (20, 0), (20, -1), (0, 0), (float("nan"), 1)], ids=str)
def test_times_that_cannot_work_say_what_to_write(times: Any) -> None:
    with pytest.raises(ConfigurationError, match="ping_timeout is a number of seconds"):
        Realtime(ping_interval=times[0], ping_timeout=times[1])


@pytest.mark.parametrize("idle", [0, -1, float("nan")])
def test_an_idle_time_that_cannot_work_says_what_to_write(idle: float) -> None:
    with pytest.raises(ConfigurationError, match="idle_timeout is a number of seconds"):
        Realtime(idle_timeout=idle)


def test_the_narrowest_times_are_times() -> None:
    assert Realtime(ping_interval=1, ping_timeout=1, idle_timeout=0.1).heartbeats.interval == 1


# Clients


class Clock:
    """The time of a stage, which the test moves; each move turns the wheel in small steps."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._time, self._on = stage, stage.rt.tasks.time, 0.0
        stage.rt.tasks.time = self  # type: ignore[method-assign, assignment]

    def __call__(self) -> float:
        return self._time() + self._on

    async def move(self, seconds: int) -> None:
        for _ in range(2 * seconds):
            self._on += 0.5
            self._stage.rt._look()
            await turns()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeper does not look by itself, and who is given up has no time left."""
    monkeypatch.setattr("starlette_rt.realtime.SWEEP", 60.0)


@both
async def test_a_client_that_answers_pings_stays(spelling: str, still: None) -> None:
    async with Stage(Board) as stage, stage.talk(spelling=spelling) as client:
        clock = Clock(stage)
        for _ in range(4):
            await clock.move(27)
            assert await client.hear() == {"type": "ping"}
            await client.say({"type": "pong"})
            await turns()
        assert stage.connection.is_open
        await client.silent()


async def test_a_client_of_which_nothing_is_heard_is_closed(still: None) -> None:
    async with Stage(Board) as stage, stage.talk() as client, stage.plain() as plain:
        clock = Clock(stage)
        await clock.move(27)
        assert await client.hear() == {"type": "ping"}
        await clock.move(21)
        assert await client.client.closed() == 4006
        assert client.client.close_reason == "ping timeout"
        assert plain.pending == ()
        assert plain.close_code is None


async def test_a_client_that_takes_not_even_the_close_is_dropped(still: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "GIVE_UP", 3.0)
    async with Stage(Board, outbox=OutboxLimits(stall=100)) as stage, stage.talk() as client:
        clock = Clock(stage)
        client.client.stall()
        await clock.move(47)
        assert (client.client.close_code, stage.connection.close_code) == (None, 4006)
        await clock.move(4)
        assert await client.client.closed() == 1006
        assert stage.rt.stats()["aborted"] == 1


@pytest.mark.parametrize("said", ["event", "malformed", "reply"])
async def test_anything_that_a_client_says_is_an_answer(said: str, still: None) -> None:
    frame: Any = {
        "event": emit("echo"),
        "malformed": {"type": "join"},
        "reply": {"type": "reply", "ref": 5},
    }[said]
    async with Stage(Board) as stage, stage.talk() as client:
        clock = Clock(stage)
        for _ in range(3):
            await clock.move(27)
            await client.say(frame)
            await turns()
        assert stage.connection.is_open


async def test_who_has_not_been_accepted_yet_is_not_asked(still: None) -> None:
    gate = anyio.Event()

    async def on_connect(self: Any, websocket: Any) -> None:
        await gate.wait()
        await websocket.accept()

    async with Stage(board(on_connect)) as stage, anyio.create_task_group() as group:

        async def come() -> None:
            async with stage.talk() as client:
                await client.silent()

        group.start_soon(come)
        await until(lambda: len(stage.rt.connections) == 1)
        await Clock(stage).move(27)
        gate.set()


async def test_who_asks_for_nothing_but_stays_alive_is_idle(still: None) -> None:
    async with Stage(Board, idle_timeout=60.0) as stage, stage.talk() as client, stage.plain() as plain:
        clock = Clock(stage)
        for _ in range(2):
            await clock.move(20)
            await client.say({"type": "pong"})
            await plain.send_json("I ask")
            await turns()
        await clock.move(35)
        assert await client.client.closed() == 4007
        assert client.client.close_reason == "idle for too long"
        assert plain.close_code is None
        await clock.move(27)
        assert await plain.closed() == 4007


async def test_who_asks_is_not_idle(still: None) -> None:
    async with Stage(Board, idle_timeout=60.0) as stage, stage.talk() as client:
        clock = Clock(stage)
        for _ in range(10):
            await clock.move(15)
            await client.say(emit("echo"))
            await turns()
        assert stage.connection.is_open


async def test_a_connection_that_has_ended_is_on_no_wheel(still: None) -> None:
    async with Stage(Board) as stage:
        async with stage.talk(), stage.talk():
            assert sum(map(len, stage.rt.heartbeats._wheel.values())) == 2
        await until(lambda: not stage.rt.connections)
        assert sum(map(len, stage.rt.heartbeats._wheel.values())) == 0


async def test_a_client_is_asked_also_while_its_handler_works(still: None) -> None:
    gate = anyio.Event()

    @event("wait")
    async def wait(self: Any) -> None:
        await gate.wait()

    async with Stage(board(wait)) as stage, stage.talk() as client:
        clock = Clock(stage)
        await client.say(emit("wait", 1))
        await clock.move(27)
        assert await client.hear() == {"type": "ping"}
        await client.say({"type": "pong"})
        await clock.move(21)
        assert stage.connection.is_open
        gate.set()
        assert await client.answers(1) == {1: "reply"}


async def test_one_who_has_left_and_whose_handler_still_works_is_not_given_up(still: None) -> None:
    gate = anyio.Event()

    @event("wait")
    async def wait(self: Any) -> None:
        await gate.wait()

    async with Stage(board(wait)) as stage, stage.talk() as client:
        clock = Clock(stage)
        await client.say(emit("wait", 1))
        await clock.move(27)
        await client.client.close()
        await clock.move(21)
        assert len(stage.rt.connections) == 1
        gate.set()
        await until(lambda: not stage.rt.connections)
        assert stage.rt.stats()["disconnected.1000"] == 1
