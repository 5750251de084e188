"""At most once: the same event is handled when it comes first and answered as it was answered, whatever became of it.

The law of this file: the first half asks `once` itself, with a ledger in memory; the second half is clients that say
an event twice, over one connection or several.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from starlette_rt import EventError, History, Unavailable, event
from starlette_rt import connection as connections
from starlette_rt import once as module
from starlette_rt.backends.base import Claim, Ledger
from starlette_rt.backends.memory import MemoryLedger, memory
from starlette_rt.once import ONCE, ORIGIN, Origin, Outcome
from tests.test_dialogue import JSON, OTHER, PACK, SESSION, Frame, Stage, board, both, emit, turns, until

pytestmark = [pytest.mark.unit, pytest.mark.anyio]

Run = Callable[[], Awaitable[Any]]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A repetition waits for a moment only."""
    monkeypatch.setattr(module, "WAIT", 0.01)


class Counted:
    """Something to run, which counts how often it was."""

    def __init__(self, *results: Any) -> None:
        self.results = list(results)
        self.ran = 0

    async def __call__(self) -> Any:
        self.ran += 1
        result = self.results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result


async def once(ledger: Ledger, key: str, run: Run, *, rerun: bool) -> Any:
    """Return the data alone; that a ledger in memory has asked everybody there is goes without saying."""
    data, local = await module.once(ledger, key, run, rerun=rerun)
    assert not local
    return data


async def refused(ledger: Ledger, run: Run, rerun: bool = False) -> str:
    with pytest.raises(EventError) as caught:
        await once(ledger, "k", run, rerun=rerun)
    return caught.value.code


# By itself


@pytest.mark.parametrize(
    "result", [None, 1, "two", {"a": [1.5, None, True]}, b"raw", 2**64 - 1, -(2**63), ""], ids=repr
)
async def test_what_was_returned_first_is_returned_again(result: Any) -> None:
    ledger, run = MemoryLedger(), Counted(result, "never")
    for _ in range(3):
        assert await once(ledger, "k", run, rerun=False) == result
    assert run.ran == 1
    assert await once(ledger, "other", run, rerun=False) == "never", "another key is another event"


async def test_what_was_handled_is_not_handled_again_where_there_was_no_room_for_its_answer() -> None:
    ledger = MemoryLedger(size=10)
    ran: list[int] = []

    async def run() -> str:
        ran.append(1)
        return "x" * 20

    assert await once(ledger, "k", run, rerun=True) == "x" * 20
    assert await refused(ledger, run) == "outcome_unknown"
    assert ran == [1]


@pytest.mark.parametrize("rerun", [False, True])
async def test_a_refusal_is_remembered_and_so_is_a_failure(rerun: bool) -> None:
    for first, code in ((EventError("full", "no \ud800 seat"), "full"), (RuntimeError("a bug"), "internal")):
        ledger, run = MemoryLedger(), Counted(first, "never")
        with pytest.raises(type(first)):
            await once(ledger, "k", run, rerun=rerun)
        with pytest.raises(EventError) as caught:
            await once(ledger, "k", run, rerun=rerun)
        assert (caught.value.code, caught.value.temporary, run.ran) == (code, False, 1)
    assert caught.value.message == "the server failed to handle this message"


async def test_a_remembered_refusal_says_the_same_words() -> None:
    ledger, run = MemoryLedger(), Counted(EventError("full", "no \ud800 seat"))
    assert await refused(ledger, run) == "full"
    with pytest.raises(EventError, match="full: no \\? seat"):
        await once(ledger, "k", run, rerun=False)


async def test_a_temporary_refusal_is_not_remembered() -> None:
    ledger, run = MemoryLedger(), Counted(EventError("full", retry_after=0), EventError("full", retry_after=5), "in")
    assert [await refused(ledger, run), await refused(ledger, run)] == ["full", "full"]
    assert await once(ledger, "k", run, rerun=False) == "in"
    assert run.ran == 3


async def test_what_the_backend_could_not_do_can_be_tried_again() -> None:
    ledger, run = MemoryLedger(), Counted(Unavailable("the backend rests"), "in")
    with pytest.raises(Unavailable):
        await once(ledger, "k", run, rerun=False)
    assert await once(ledger, "k", run, rerun=False) == "in"


async def test_a_result_that_no_wire_carries_is_a_failure_that_is_remembered(hasty: None) -> None:
    ledger, run = MemoryLedger(), Counted("\ud800")
    with pytest.raises(UnicodeEncodeError):
        await once(ledger, "k", run, rerun=False)
    assert await refused(ledger, run) == "internal"


async def test_a_result_that_is_no_data_is_a_failure_that_is_remembered() -> None:
    ledger, run = MemoryLedger(), Counted(object())
    with pytest.raises(TypeError):
        await once(ledger, "k", run, rerun=False)
    assert await refused(ledger, run) == "internal"


@pytest.mark.parametrize("rerun", [False, True])
async def test_what_was_cancelled_has_no_known_end_unless_it_may_run_again(rerun: bool) -> None:
    ledger = MemoryLedger()

    async def hang() -> None:
        await anyio.sleep_forever()

    with anyio.move_on_after(0.001) as scope:
        await once(ledger, "k", hang, rerun=rerun)
    assert scope.cancelled_caught
    if rerun:
        assert await once(ledger, "k", Counted("again"), rerun=True) == "again"
    else:
        assert await refused(ledger, Counted()) == "outcome_unknown"


@pytest.mark.parametrize("rerun", [False, True])
async def test_a_verdict_stands_also_where_its_keeping_is_cancelled(rerun: bool) -> None:
    class Slow(MemoryLedger):
        async def settle(self, key: str, answer: bytes, ttl: float) -> bytes:
            await checkpoint()
            return await super().settle(key, answer, ttl)

        async def release(self, key: str, holder: str) -> None:
            await checkpoint()
            await super().release(key, holder)

    ledger = Slow()
    with anyio.CancelScope() as scope:

        async def cancelled() -> str:
            scope.cancel()
            return "done"

        await once(ledger, "done", cancelled, rerun=rerun)
    assert await once(ledger, "done", Counted("again"), rerun=rerun) == "done"
    with anyio.CancelScope() as scope:

        async def refused_for_now() -> str:
            scope.cancel()
            raise EventError("later", retry_after=1)

        await once(ledger, "later", refused_for_now, rerun=rerun)
    assert await once(ledger, "later", Counted("again"), rerun=rerun) == "again"


async def test_a_repetition_waits_for_what_is_running() -> None:
    ledger, gate, answers = MemoryLedger(), anyio.Event(), list[Any]()

    async def wait() -> str:
        await gate.wait()
        return "done"

    async def ask(run: Run) -> None:
        answers.append(await once(ledger, "k", run, rerun=False))

    never = Counted()
    async with anyio.create_task_group() as group:
        group.start_soon(ask, wait)
        await turns()
        for _ in range(3):
            group.start_soon(ask, never)
        await turns()
        assert answers == []
        gate.set()
    assert answers == ["done"] * 4
    assert never.ran == 0


async def test_of_those_who_wait_for_one_that_gave_up_one_is_the_next() -> None:
    ledger, gate, answers = MemoryLedger(), anyio.Event(), list[Any]()

    async def give_up() -> None:
        await gate.wait()
        raise EventError("later", retry_after=1)

    async def ask(run: Run) -> None:
        try:
            answers.append(await once(ledger, "k", run, rerun=False))
        except EventError as error:
            answers.append(error.code)

    run = Counted("second")
    async with anyio.create_task_group() as group:
        group.start_soon(ask, give_up)
        await turns()
        for _ in range(3):
            group.start_soon(ask, run)
        await turns()
        gate.set()
    assert sorted(answers) == ["later", "second", "second", "second"]
    assert run.ran == 1


async def test_what_runs_for_too_long_is_answered_unavailable(hasty: None) -> None:
    ledger = MemoryLedger()
    await ledger.claim("k", ONCE)
    with pytest.raises(EventError) as caught:
        await once(ledger, "k", Counted(), rerun=True)
    assert (caught.value.code, caught.value.retry_after) == ("unavailable", 1.0)


class Lost(MemoryLedger):
    """One in which another node had begun everything, and is gone."""

    async def claim(self, key: str, ttl: float, *, shared: bool = False, holder: str = "") -> Claim:
        claim = await super().claim(key, ttl, shared=shared, holder=holder)
        return claim._replace(state="lost") if claim.state == "first" else claim


async def test_what_a_node_that_is_gone_had_begun_has_no_known_outcome_for_ever() -> None:
    ledger, never = Lost(), Counted()
    for _ in range(2):
        assert await refused(ledger, never) == "outcome_unknown"
    assert (await ledger.claim("k", ONCE)).state == "answered"


async def test_what_a_node_that_is_gone_had_begun_runs_again_if_it_may() -> None:
    ledger, run = Lost(), Counted("again", "never")
    for _ in range(2):
        assert await once(ledger, "k", run, rerun=True) == "again"
    assert run.ran == 1


async def test_one_who_was_thought_to_be_gone_and_has_answered_is_believed() -> None:
    class Late(Lost):
        async def settle(self, key: str, answer: bytes, ttl: float) -> bytes:
            await super().settle(key, module.PACKED.raw({"data": "after all"}), ttl)
            return await super().settle(key, answer, ttl)

    ledger, never = Late(), Counted()
    for _ in range(2):
        assert await once(ledger, "k", never, rerun=False) == "after all"


async def test_one_who_waits_for_a_node_that_dies_takes_over() -> None:
    class Dying(MemoryLedger):
        dead = False

        async def claim(self, key: str, ttl: float, *, shared: bool = False, holder: str = "") -> Claim:
            return Claim("lost", "mine") if self.dead else Claim("running", "theirs")

        async def outcome(self, key: str, deadline: float) -> Claim:
            self.dead = True
            return Claim("lost", "theirs")

    assert await once(Dying(), "k", Counted("again"), rerun=True) == "again"
    assert await refused(Dying(), Counted()) == "outcome_unknown"


class Lonely(MemoryLedger):
    """One whose others cannot be asked."""

    async def claim(self, key: str, ttl: float, *, shared: bool = False, holder: str = "") -> Claim:
        claim = await super().claim(key, ttl, shared=shared, holder=holder)
        return claim._replace(local=claim.state == "first")


async def test_what_was_claimed_on_one_node_only_says_so() -> None:
    ledger, run = Lonely(), Counted("done", "never")
    assert await module.once(ledger, "k", run, rerun=False) == Outcome("done", local=True)
    assert await module.once(ledger, "k", run, rerun=False) == Outcome("done", local=False)


async def test_what_is_published_is_named_after_the_event_in_its_order() -> None:
    ledger, names = MemoryLedger(), list[list[str]]()

    async def publish() -> None:
        origin = ORIGIN.get()
        assert origin is not None
        names.append([origin.name() for _ in range(3)])

    for key in ("a", "b"):
        await once(ledger, key, publish, rerun=False)
        assert ORIGIN.get() is None, "and nothing afterwards"
    assert len({*names[0], *names[1]}) == 6
    assert names[0] == [Origin("a").name(), *names[0][1:]]
    assert all(len(name) <= 64 and name.isprintable() for name in names[0])
    assert Origin("\ud800").name(), "whatever the client has called it"


# Clients


def counting(**options: Any) -> tuple[Any, list[Any]]:
    """An endpoint whose event ``count`` says how often it was handled, and the data that it got."""
    got: list[Any] = []

    @event("count", **options)
    async def count(self: Any, data: Any) -> Any:
        got.append(data)
        return {"count": len(got), "data": data}

    return board(count), got


def again(ref: int, id: str = "one", **fields: Any) -> Frame:
    return emit("count", ref, id=id, **{"data": "x", **fields})


@both
async def test_the_same_id_is_handled_once_and_answered_twice(spelling: str) -> None:
    made, got = counting()
    async with Stage(made) as stage, stage.talk(spelling=spelling) as client:
        await client.say(again(1), again(2), again(3, data="other"), again(4, id="two"))
        counts = [frame["data"]["count"] for frame in await client.heard(4)]
        assert counts == [1, 1, 1, 2]
        assert await client.get("event", event="count", data="x") == {"count": 3, "data": "x"}
        assert await client.get("event", event="count", data="x") == {"count": 4, "data": "x"}, "without an id"
        assert len(got) == 4


async def test_an_id_is_a_persons_on_every_connection_in_every_spelling() -> None:
    made, got = counting()
    async with Stage(made) as stage:
        answers = []
        for spelling in (JSON, PACK, JSON):
            async with stage.talk("ann", spelling=spelling) as ann:
                answers.append(await ann.get("event", event="count", id="one", data=[1, None, "x"]))
        assert answers == [{"count": 1, "data": [1, None, "x"]}] * 3
        async with stage.talk("bob") as bob:
            assert (await bob.get("event", event="count", id="one"))["count"] == 2
        assert len(got) == 2


async def test_a_guest_is_known_by_its_session() -> None:
    made, _ = counting()
    async with Stage(made) as stage:
        for session, count in ((SESSION, 1), (SESSION, 1), (OTHER, 2), (None, 3), (None, 4)):
            async with stage.talk(session=session) as client:
                assert (await client.get("event", event="count", id="one"))["count"] == count


async def test_nobody_gets_the_answers_of_a_person_by_taking_its_name_for_a_session() -> None:
    made, _ = counting()
    name = "0c1f8a52-7d2e-4b0a-9f57-3a1f0b7b9a11"  # who is known by such a name has one that is a session as well
    async with Stage(made) as stage, stage.talk(name) as person, stage.talk(session=name) as guest:
        assert (await person.get("event", event="count", id="one", data="secret"))["count"] == 1
        assert (await guest.get("event", event="count", id="one"))["count"] == 2


async def test_what_stands_against_an_event_before_its_handler_is_not_remembered() -> None:
    made, _ = counting()
    async with Stage(made) as stage, stage.talk() as client:
        assert await client.refused("event", event="count", id="one", group="board") == "not_joined"
        await client.get("join", group="board")
        assert (await client.get("event", event="count", id="one", group="board"))["count"] == 1


@pytest.mark.parametrize(
    ("error", "first", "then"),
    [
        (EventError("full", "no seat"), "full", "full"),
        (EventError("full", retry_after=0), "full", "reply"),
        (RuntimeError("a bug"), "internal", "internal"),
        pytest.param(
            *(HTTPException(404, "no such board"), "http_404", "http_404"),
        ),
        pytest.param(
            *(Unavailable("the backend rests"), "unavailable", "reply"),
        ),
    ],
    ids=["refused", "temporary", "failed", "http", "unavailable"],
)
async def test_a_repetition_meets_what_became_of_the_first(error: Exception, first: str, then: str) -> None:
    ran: list[int] = []

    @event("count")
    async def count(self: Any) -> None:
        ran.append(1)
        if len(ran) == 1:
            raise error

    async with Stage(board(count)) as stage, stage.talk() as client:
        await client.say(again(1))
        assert await client.answers(1) == {1: first}
        await client.say(again(2))
        assert await client.answers(2) == {2: then}
        assert len(ran) == (2 if then == "reply" else 1)


async def test_a_repetition_on_another_connection_waits_for_the_first() -> None:
    gate, ran = anyio.Event(), list[int]()

    @event("count")
    async def count(self: Any) -> str:
        ran.append(1)
        await gate.wait()
        return "done"

    async with Stage(board(count)) as stage, stage.talk("ann") as one, stage.talk("ann") as two:
        await one.say(again(1))
        await turns()
        await two.say(again(1))
        await two.silent()
        gate.set()
        for client in (one, two):
            assert (await client.hear())["data"] == "done"
    assert ran == [1]


async def test_a_repetition_beside_the_first_waits_for_it() -> None:
    gate, ran = anyio.Event(), list[int]()

    @event("count", concurrency=5)
    async def count(self: Any) -> str:
        ran.append(1)
        await gate.wait()
        return "done"

    async with Stage(board(count)) as stage, stage.talk("ann") as client:
        await client.say(again(1), again(2), again(3, id="two"))
        await turns()
        assert ran == [1, 1]
        gate.set()
        assert set((await client.answers(1, 2, 3)).values()) == {"reply"}
    assert ran == [1, 1]


@pytest.mark.parametrize("rerun", [False, True])
async def test_what_was_cut_off_has_no_known_outcome_or_runs_again(
    rerun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.01)
    ran: list[int] = []

    @event("count", rerun=rerun)
    async def count(self: Any) -> str:
        ran.append(1)
        await self.broadcast("board", "one", "said")
        if len(ran) == 1:
            await anyio.sleep_forever()
        await self.broadcast("board", "two", "said")
        return "done"

    async with Stage(board(count)) as stage, stage.talk() as watcher:
        await watcher.get("join", group="board")
        async with stage.talk("ann") as ann:
            await ann.say(again(1))
            first = await watcher.hear()
        await until(lambda: len(stage.rt.connections) == 1)
        async with stage.talk("ann") as ann:
            await ann.say(again(1))
            answer = await ann.hear()
        if rerun:
            assert (answer["data"], len(ran)) == ("done", 2)
            second = await watcher.hear()
            assert [first["data"], second["data"]] == ["one", "two"], "each of them is said once"
            assert first["id"] != second["id"]
        else:
            assert (answer["code"], answer["temporary"], len(ran)) == ("outcome_unknown", False, 1)
        await watcher.silent()


async def test_what_a_handler_published_twice_has_one_id_and_one_place_in_the_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", 0.01)
    ran: list[int] = []

    @event("count", rerun=True)
    async def count(self: Any) -> str:
        ran.append(1)
        await self.broadcast("board", "one")
        if len(ran) == 1:
            await anyio.sleep_forever()
        return "done"

    async with Stage(board(count), history={"board": History(10, 60)}) as stage:
        async with stage.talk("ann") as ann:
            await ann.say(again(1))
            await until(lambda: ran == [1])
        await until(lambda: not stage.rt.connections)
        async with stage.talk("ann") as ann:
            await ann.get("event", event="count", id="one")
            found = await ann.get("join", group="board", last=10)
        assert [each["data"] for each in found["events"]] == ["one"]
        assert len(found["events"][0]["id"]) == 12
        await stage.rt.broadcast("board", "by the host")
        assert [each.once for each in (await stage.rt.history("board"))[0]] == [True, False]


async def test_a_handler_that_wrote_to_a_client_that_left_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    @event("count")
    async def count(self: Any) -> None:
        await self.connection.wait_closed()
        raise WebSocketDisconnect(1006)

    async with Stage(board(count)) as stage:
        async with stage.talk("ann") as ann:
            await ann.say(again(1))
            await turns()
        await until(lambda: not stage.rt.connections)
        assert "failed" not in stage.rt.stats()


@both
async def test_a_reply_says_where_an_event_was_handled_once_on_its_node_only(spelling: str) -> None:
    made, _ = counting()
    lonely = memory(grace=0, now=anyio.current_time)._replace(ledger=Lonely())
    async with Stage(made, backend=lonely) as stage, stage.talk("ann", spelling=spelling) as ann:
        answers = [await ann.ask("event", event="count", **fields) for fields in ({"id": "one"}, {"id": "one"}, {})]
        assert [answer.get("once") for answer in answers] == ["node", None, None]
        assert [answer["data"]["count"] for answer in answers] == [1, 1, 2]
