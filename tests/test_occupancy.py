"""When the first member anywhere has come to a group, and when the last has gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import Identity, Realtime, RealtimeEndpoint, RealtimeMiddleware, TokenSigner
from starlette_rt.backends.memory import MemoryPresence
from starlette_rt.loop import Tasks, tasks
from starlette_rt.occupancy import HIDDEN, Hook, Occupancy
from starlette_rt.testing import connect

pytestmark = [pytest.mark.unit, pytest.mark.anyio]


class Stage:
    """Nodes on one store of presence, and what they have told their host."""

    def __init__(self, *, first: Hook | None = None) -> None:
        self.tasks: Tasks = tasks()
        self.store = MemoryPresence(10.0, self.tasks.time)
        self.told: list[Any] = []
        self.failed: list[BaseException] = []
        self.nodes = [self.node(first) for _ in range(2)]
        self.store.on_count = self.nodes[0].counted

    def node(self, first: Hook | None) -> Occupancy:
        return Occupancy(self.store, self.tasks, first or self.occupied, self.vacated, self.failed.append)

    def occupied(self, group: str) -> None:
        self.told.append(group)

    async def vacated(self, group: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.told.append(f"no {group}")

    async def settled(self) -> list[Any]:
        with anyio.fail_after(5):
            for _ in range(5):
                await anyio.wait_all_tasks_blocked()
        return self.told


async def test_it_is_told_when_the_first_node_has_members_and_when_the_last_has_none() -> None:
    stage = Stage()
    one, other = stage.nodes
    one.crowd("a", True)
    other.crowd("a", True)
    other.crowd("b", True)
    assert sorted(await stage.settled()) == ["a", "b"]
    one.crowd("a", False)
    assert len(await stage.settled()) == 2
    other.crowd("a", False)
    assert (await stage.settled())[2:] == ["no a"]


async def test_what_is_undone_before_it_can_be_told_is_not() -> None:
    gate = anyio.Event()
    stage = Stage(first=lambda group: gate.wait())
    one = stage.nodes[0]
    one.counted(f"{HIDDEN}a", 0, 1)
    await stage.settled()  # this is being told
    for occupied in (False, True, False):
        one.counted(f"{HIDDEN}a", int(not occupied), int(occupied))
    assert await stage.settled() == []
    gate.set()
    assert await stage.settled() == ["no a"]


async def test_of_one_group_one_thing_is_told_after_the_other() -> None:
    running: list[str] = []

    async def slow(group: str) -> None:
        assert not running
        running.append(group)
        await anyio.lowlevel.checkpoint()
        running.remove(group)

    stage = Stage(first=slow)
    for occupied in (True, False):
        stage.nodes[0].counted(f"{HIDDEN}a", int(not occupied), int(occupied))
        await anyio.lowlevel.checkpoint()
    await stage.settled()
    assert stage.failed == []


async def test_a_hook_that_raises_is_reported_and_the_next_is_called() -> None:
    def broken(group: str) -> None:
        raise ValueError(group)

    stage = Stage(first=broken)
    stage.nodes[0].crowd("a", True)
    await stage.settled()
    stage.nodes[0].crowd("a", False)
    assert await stage.settled() == ["no a"]
    assert [str(error) for error in stage.failed] == ["a"]


async def test_one_who_goes_as_soon_as_it_has_come_leaves_nothing_behind() -> None:
    stage = Stage()
    for occupied in (True, False, True, False):
        stage.nodes[0].crowd("a", occupied)
    await stage.settled()
    assert await stage.store.count(f"{HIDDEN}a") == 0


async def test_a_host_may_want_to_hear_of_one_of_the_two() -> None:
    stage = Stage()
    stage.store.on_count = Occupancy(stage.store, stage.tasks, None, stage.vacated, stage.failed.append).counted
    stage.nodes[0].crowd("a", True)
    await stage.settled()
    stage.nodes[0].crowd("a", False)
    assert await stage.settled() == ["no a"]


async def test_counts_of_other_groups_say_nothing() -> None:
    stage = Stage()
    stage.nodes[0].counted("a", 0, 1)
    stage.nodes[0].counted(f"{HIDDEN}a", 1, 2)
    assert await stage.settled() == []


async def until(met: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not met():  # noqa: ASYNC110 - what is waited for is not ours
            await anyio.sleep(0.01)


class Lobby(RealtimeEndpoint):
    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.join("lobby")


async def test_the_hosts_hooks_hear_of_groups_and_not_of_people() -> None:
    told: list[str] = []

    async def vacated(group: str) -> None:
        told.append(f"no {group}")

    rt = Realtime(on_group_occupied=told.append, on_group_vacated=vacated)
    tokens = TokenSigner(["a-key-for-the-tests-of-32-bytes!"])
    app = Starlette(
        routes=[WebSocketRoute("/ws", Lobby)],
        middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
    )
    async with rt:
        async with connect(app, "/ws", token=tokens.sign(Identity("alice"))):
            await until(lambda: bool(told))
            assert told == ["lobby"]
        await until(lambda: len(told) == 2)
    assert told == ["lobby", "no lobby"]
