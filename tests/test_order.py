"""One order for all: whatever the host says and whenever, every connection hears it in the order of the calls.

Random programs run against a model of a few lines, twice: on the hub alone, where turns end when the program says
so and slices and logs are short; and on whole connections, from Starlette's WebSocket down to ``send()``. The model
is told of each call in the same step as the call. What it says of a connection is what its client must have received,
no more, no less and in no other order; and when all have left, nothing may be left. A hub with a pending list for
each group, which is how one would write it first, fails both.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from itertools import count
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from starlette_rt import Identity, Realtime, RealtimeEndpoint, RealtimeMiddleware, feed, realtime
from starlette_rt import hub as hub_module
from starlette_rt.backends.base import Backend
from starlette_rt.backends.memory import MemoryBroker, MemoryLedger, MemoryLimits, MemoryPresence
from starlette_rt.connection import Connection
from starlette_rt.frames import Raw
from starlette_rt.hub import Batch, Group, Hub, Message, Wire, receivers
from starlette_rt.metrics import Metrics
from starlette_rt.protocols.plain import PLAIN
from starlette_rt.seams import ASGI
from starlette_rt.testing import Client, connect, lifespan

pytestmark = pytest.mark.unit

GROUPS = ("a", "b", "c")
PEERS = range(5)
GRACE = 10.0


class Model:
    """What everybody must have heard, who is where, and who is present."""

    def __init__(self) -> None:
        self.heard: dict[int, list[int]] = defaultdict(list)
        self.members: dict[str, set[int]] = defaultdict(set)
        self.gone: set[int] = set()

    def broadcast(self, group: str, number: int, exclude: int | None = None) -> None:
        for who in self.members[group] - self.gone - {exclude}:
            self.heard[who].append(number)

    def push(self, who: int, number: int) -> None:
        if who not in self.gone:
            self.heard[who].append(number)

    def ended(self, who: int) -> None:
        for members in self.members.values():
            members.discard(who)


class NaiveHub(Hub):
    """The hub one would write first: a pending list for each target, each settled by itself. It is wrong."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pending: dict[Any, list[tuple[Message, str | None]]] = {}

    def _append(self, target: Any, message: Message, exclude: str | None) -> None:
        if not self._pending:
            self._schedule(self.flush)
        self._pending.setdefault(target, []).append((message, exclude))

    def settle(self, target: Any) -> None:
        for message, exclude in self._pending.pop(target, ()):
            for peer in receivers(target, exclude):
                entry = message.entry(peer.wire)
                assert entry is not None
                peer.offer(Batch([entry], peer.wire.carrier))

    def settle_peer(self, peer: Any) -> None:
        for target in (peer, *peer.memberships):
            self.settle(target)

    def flush(self) -> None:
        for target in tuple(self._pending):
            self.settle(target)


groups, peers = st.sampled_from(GROUPS), st.sampled_from(PEERS)
saying = st.one_of(
    st.tuples(st.just("broadcast"), groups, st.none() | peers),
    st.tuples(st.just("push"), peers),
)
moving = st.one_of(
    st.tuples(st.just("join"), peers, groups),
    st.tuples(st.just("leave"), peers, groups),
)
turn = st.tuples(st.just("turn"))

# The hub alone


class Recorder:
    def __init__(self, number: int, wire: Wire) -> None:
        self.session, self.wire = str(number), wire
        self.memberships: tuple[Group, ...] = ()
        self.heard: list[int] = []
        self.closed = False

    def offer(self, batch: Batch, /) -> None:
        if not self.closed:
            self.heard += [int(entry.payload["text"]) for entry in batch.entries]


class Turns:
    """A hub with recorders, in turns that the program ends, and the model beside it."""

    def __init__(self, hub: type[Hub], population: int) -> None:
        self.due: list[Callable[[], None]] = []
        self.hub = hub(self.due.append, Metrics())
        self.model = Model()
        self.numbers = count(1)
        self.weight = 1
        wires = [Wire(PLAIN[encoding], ASGI) for encoding in ("json", "text")]
        self.peers: list[Any] = [Recorder(number, wires[number % 2]) for number in range(population)]

    def do(self, verb: str, *args: Any) -> None:
        getattr(self, verb)(*args)

    def _message(self, number: int) -> Message:
        return Message(Raw(str(number)), number % 20 * self.weight)

    def broadcast(self, group: str, exclude: int | None) -> None:
        number = next(self.numbers)
        self.model.broadcast(group, number, exclude)
        self.hub.deliver(group, self._message(number), None if exclude is None else str(exclude))

    def push(self, who: int) -> None:
        if who not in self.model.gone:
            number = next(self.numbers)
            self.model.push(who, number)
            self.hub.say(self.peers[who], self._message(number))

    def join(self, who: int, group: str) -> None:
        if who not in self.model.gone:
            self.model.members[group].add(who)
            self.hub.join(self.peers[who], group)

    def leave(self, who: int, group: str) -> None:
        self.model.members[group].discard(who)
        self.hub.leave(self.peers[who], group)

    def close(self, who: int) -> None:
        self.hub.settle_peer(self.peers[who])
        self.peers[who].closed = True
        self.model.gone.add(who)
        self.model.ended(who)
        self.hub.forget(self.peers[who])
        self.peers[who].memberships = ()

    def turn(self) -> None:
        due, self.due[:] = self.due[:], []
        for callback in due:
            callback()

    def check(self) -> None:
        while self.due:
            self.turn()
        for number, peer in enumerate(self.peers):
            assert peer.heard == self.model.heard[number], f"what {number} heard"
        members = {name: {int(peer.session) for peer in group.members} for name, group in self.hub.groups.items()}
        assert members == {name: members for name, members in self.model.members.items() if members}
        for number in range(len(self.peers)):
            self.close(number)
        assert not self.hub.groups
        assert not any(peer.memberships for peer in self.peers)


doomed = settings(deadline=None, database=None, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)


@contextmanager
def short(slice: int, entries: int, size: int) -> Iterator[None]:
    """Make slices and logs so short that random programs of some dozen steps meet their ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_module, "SLICE", slice)
        patch.setattr(hub_module, "MAX_ENTRIES", entries)
        patch.setattr(hub_module, "MAX_DUE", 2 * entries)
        patch.setattr(hub_module, "MAX_BYTES", size)
        yield


steps_of_hub = st.lists(st.one_of(saying, saying, moving, turn, st.tuples(st.just("close"), peers)), max_size=60)


def play_on_hub(hub: type[Hub], steps: list[Any], slice: int = 2) -> None:
    turns = Turns(hub, len(PEERS))
    with short(slice, entries=7, size=90):
        for number in PEERS:
            turns.join(number, GROUPS[number % 3])
        for step in steps:
            turns.do(*step)
        turns.check()


@settings(max_examples=300, deadline=None)
@given(steps_of_hub, st.integers(1, 6))
def test_the_hub_keeps_one_order_for_every_receiver(steps: list[Any], slice: int) -> None:
    play_on_hub(Hub, steps, slice)


def test_pending_lists_for_each_group_do_not() -> None:
    @settings(doomed, max_examples=300)
    @given(steps_of_hub)
    def naive(steps: list[Any]) -> None:
        play_on_hub(NaiveHub, steps)

    with pytest.raises(AssertionError, match="heard"):
        naive()


def test_a_crowd_of_several_slices_hears_one_order_while_people_come_and_go() -> None:
    """The real bounds: members for many slices, and more than a log holds, in messages and in bytes."""
    dice = random.Random(7)
    turns = Turns(Hub, population=max(600, 5 * hub_module.SLICE))
    everybody = range(len(turns.peers))
    for number in everybody:
        for group in dice.sample(GROUPS, 2):
            turns.join(number, group)
    verbs: list[Callable[[], None]] = [
        lambda: turns.broadcast(dice.choice(GROUPS), dice.choice(everybody)),
        lambda: turns.broadcast(dice.choice(GROUPS), None),
        lambda: turns.push(dice.choice(everybody)),
        lambda: turns.join(dice.choice(everybody), dice.choice(GROUPS)),
        lambda: turns.leave(dice.choice(everybody), dice.choice(GROUPS)),
        lambda: turns.close(dice.choice(everybody)),
        turns.turn,
    ]
    turns.weight = 1000
    for _ in range(300):
        dice.choice(verbs)()
    turns.weight = 1
    for _ in range(hub_module.MAX_ENTRIES + 10):
        turns.broadcast("a", None)
    turns.check()


# Whole connections


class World:
    """An app, its clients, and the model beside it."""

    def __init__(self) -> None:
        self.model = Model()
        self.tracked: dict[str, set[int]] = defaultdict(set)
        self.lingering: dict[str, set[int]] = defaultdict(set)
        self.watched: set[tuple[int, str]] = set()
        self.departed: set[int] = set()
        self.numbers = count(1)
        self.now = 0.0
        self.store = MemoryPresence(GRACE, lambda: self.now)
        limits = MemoryLimits(lambda: self.now)
        self.rt = Realtime(backend=Backend(MemoryBroker(), self.store, limits, MemoryLedger()))
        self.endpoints: dict[int, RealtimeEndpoint] = {}
        self.websockets: dict[int, WebSocket] = {}
        self.clients: dict[int, Client] = {}
        self.disconnected: list[int] = []
        self.connections: list[weakref.ref[Connection]] = []
        self.app = Starlette(
            routes=[WebSocketRoute("/{number:int}", member_of(self))],
            middleware=[Middleware(RealtimeMiddleware, realtime=self.rt, tokens=Names())],
        )

    # What happens on the server, told to the model in the same step.

    def arrived(self, who: int, endpoint: RealtimeEndpoint, websocket: WebSocket) -> None:
        self.endpoints[who], self.websockets[who] = endpoint, websocket
        self.connections.append(weakref.ref(endpoint.connection))
        self.model.members[f"~{name_of(who)}"].add(who)

    async def handle(self, who: int, group: str) -> None:
        """What a handler does: say, let a turn pass, and reply."""
        await self._broadcast(group)
        await checkpoint()
        await self._push(who)
        await self._broadcast(group, who)
        await self._push(who)

    def ended(self, who: int) -> None:
        """Called in the same step in which the connection is forgotten."""
        self.model.gone.add(who)
        self.model.ended(who)
        for group, tracked in self.tracked.items():
            if who in tracked:
                tracked.discard(who)
                self.lingering[group].add(who)
        self.disconnected.append(who)

    async def _push(self, who: int) -> None:
        number = next(self.numbers)
        self.model.push(who, number)
        await self.endpoints[who].push(number)

    async def _broadcast(self, group: str, exclude: int | None = None) -> None:
        number = next(self.numbers)
        self.model.broadcast(group, number, exclude)
        excluded = None if exclude is None else self.endpoints[exclude].connection
        await self.rt.broadcast(group, number, exclude=excluded)

    # The steps of a program.

    async def do(self, verb: str, *args: Any) -> None:
        if not (verb in PERSONAL and args[0] in self.model.gone):
            await getattr(self, verb)(*args)

    async def turn(self) -> None:
        await checkpoint()

    async def broadcast(self, group: str, exclude: int | None) -> None:
        await self._broadcast(group, exclude)

    async def push(self, who: int) -> None:
        await self._push(who)

    async def person(self, who: int) -> None:
        await self._push_to(name_of(who))

    async def _push_to(self, name: str) -> None:
        number = next(self.numbers)
        self.model.broadcast(f"~{name}", number)
        await self.rt.push(name, number)

    async def send_json(self, who: int) -> None:
        number = next(self.numbers)
        self.model.push(who, number)
        try:
            await self.websockets[who].send_json(number)
        except WebSocketDisconnect:
            assert who in self.model.gone

    async def ask(self, who: int, group: str) -> None:
        await self.clients[who].send_json(group)

    async def join(self, who: int, group: str) -> None:
        self.model.members[group].add(who)
        await self.endpoints[who].join(group)

    async def leave(self, who: int, group: str) -> None:
        self.model.members[group].discard(who)
        self.tracked[group].discard(who)
        self.watched.discard((who, group))
        await self.endpoints[who].leave(group)

    async def track(self, who: int, group: str) -> None:
        if who not in self.tracked[group]:
            self.tracked[group].add(who)
            self.lingering[group] -= {next((old for old in self.lingering[group] if name_of(old) == name_of(who)), -1)}
        await self.endpoints[who].track(group)

    async def untrack(self, who: int, group: str) -> None:
        self.tracked[group].discard(who)
        await self.endpoints[who].untrack(group)

    async def close(self, who: int) -> None:
        """Push, then close, in one turn."""
        await self._push(who)
        self.model.gone.add(who)
        await self.endpoints[who].close(4321)

    async def depart(self, who: int) -> None:
        """The peer leaves by itself; what is on its way to it then is nobody's."""
        self.model.gone.add(who)
        self.departed.add(who)
        await self.clients[who].close(1000)

    async def stall(self, who: int) -> None:
        self.clients[who].stall()

    async def resume(self, who: int) -> None:
        self.clients[who].resume()

    # The run.

    async def play(self, steps: list[Any]) -> None:
        async with lifespan(self.app):
            async with AsyncExitStack() as stack:
                for who in PEERS:
                    connected = connect(self.app, f"/{who}", token=name_of(who))
                    self.clients[who] = await stack.enter_async_context(connected)
                for group in GROUPS:
                    await self.join_and_watch(0, group)
                for step in steps:
                    await self.do(*step)
                for client in self.clients.values():
                    client.resume()
                await self.settle()
                await self.check()
            await self.until(lambda: not self.rt.connections)
            await self.check_that_nothing_is_left()
        assert not running(self.rt)
        self.endpoints.clear()
        self.websockets.clear()

    async def join_and_watch(self, who: int, group: str) -> None:
        self.model.members[group].add(who)
        self.watched.add((who, group))
        await self.endpoints[who].join(group, presence="members")

    async def until(self, ready: Callable[[], bool]) -> None:
        with anyio.move_on_after(3):
            while not ready():
                await checkpoint()

    async def settle(self) -> None:
        """Wait until everybody has heard as much as the model says and who was closed is closed, then a bit more."""
        staying = [who for who in PEERS if who not in self.departed]
        await self.until(lambda: all(len(self.heard(who)) >= len(self.model.heard[who]) for who in staying))
        await self.until(lambda: all(self.clients[who].close_code for who in self.model.gone))
        await self.until(lambda: set(self.disconnected) >= self.model.gone)
        for _ in range(30):
            await checkpoint()

    def heard(self, who: int) -> list[Any]:
        return [said for said in self.received(who) if isinstance(said, int)]

    def received(self, who: int) -> list[Any]:
        return [PLAIN["json"].decode(raw) for raw in self.clients[who].pending]

    def present(self, group: str) -> set[str]:
        return {name_of(who) for who in self.tracked[group] | self.lingering[group]}

    async def check(self) -> None:
        for who in PEERS:
            heard, expected = self.heard(who), self.model.heard[who]
            assert heard == (expected[: len(heard)] if who in self.departed else expected), f"what {who} heard"
            if who in self.model.gone and who not in self.departed:
                assert self.clients[who].close_code == 4321
        members = {
            name: {int(peer.session) for peer in group.members}  # type: ignore[attr-defined]
            for name, group in self.rt.hub.groups.items()
            if name[0] != "\0"
        }
        assert members == {name: members for name, members in self.model.members.items() if members}
        for group in GROUPS:
            assert set(await self.rt.presence(group)) == self.present(group)
        for who, group in self.watched:
            if who not in self.model.gone:
                assert picture(self.received(who), group) == self.present(group)

    async def check_that_nothing_is_left(self) -> None:
        assert sorted(self.disconnected) == list(PEERS)  # each once
        assert not self.rt.hub.groups
        assert not self.rt.watched
        self.now += GRACE
        self.store.sweep()
        await self.until(lambda: not self.store._rosters and len(running(self.rt)) == 1)
        assert not self.store._rosters
        assert len(running(self.rt)) == 1  # the sweeper


PERSONAL = {
    *("push", "person", "send_json", "ask", "join", "leave", "track", "untrack", "close", "depart", "stall", "resume")
}


def name_of(who: int) -> str:
    """Two connections are one person's."""
    return ("ada", "ada", "bob", "cleo", "dan")[who]


class Names:
    """A verifier that takes a name for a token."""

    def verify(self, token: str) -> Identity:
        return Identity(token)


def member_of(world: World) -> type[RealtimeEndpoint]:
    class Member(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            self.connection.session = str(self.scope["path_params"]["number"])
            await websocket.accept()
            world.arrived(int(self.connection.session), self, websocket)

        async def on_receive(self, websocket: WebSocket, data: str) -> None:
            await world.handle(int(self.connection.session), data)

        async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
            world.ended(int(self.connection.session))

    return Member


def running(rt: Realtime) -> Any:
    """The tasks of ours that run, on either loop."""
    return getattr(rt.tasks, "_tasks", None) or getattr(rt.tasks, "_running", ())


def picture(frames: list[Any], group: str) -> set[str]:
    """Who is present according to what a watcher was told."""
    metas: dict[str, dict[str, Any]] = {}
    for frame in frames:
        if isinstance(frame, dict) and frame["group"] == group:
            if frame["type"] == "presence_state":
                metas = {key: {meta["ref"]: meta for meta in said["metas"]} for key, said in frame["members"].items()}
            for key, said in frame.get("leaves", {}).items():
                for meta in said["metas"]:
                    del metas[key][meta["ref"]]
            for key, said in frame.get("joins", {}).items():
                metas.setdefault(key, {}).update({meta["ref"]: meta for meta in said["metas"]})
    return {key for key, shown in metas.items() if shown}


personal = st.sampled_from(["push", "person", "send_json", "stall", "resume", "push", "person", "send_json"])
steps_of_world = st.lists(
    st.one_of(
        saying,
        moving,
        st.tuples(personal, peers),
        st.tuples(st.sampled_from(["track", "untrack", "ask"]), peers, groups),
        turn,
        st.tuples(st.sampled_from(["close", "depart"]), peers),
    ),
    max_size=50,
)


def play(backend: str, steps: list[Any], hub: type[Hub] = Hub) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(realtime, "Hub", hub)
        patch.setattr(feed, "TICK", 0.0)
        patch.setattr(feed, "DIFF_PERIOD", 0.0)
        world = World()
        anyio.run(world.play, steps, backend=backend)
        gc.collect()
        assert [each() for each in world.connections] == [None] * len(PEERS)


@pytest.fixture
def frozen() -> Iterator[None]:
    """Let the garbage collector pass over what was there before, so that it can be asked often."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


thorough = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("frozen")
@thorough
@given(steps_of_world)
def test_every_client_hears_one_order_and_nothing_is_left_behind(steps: list[Any]) -> None:
    play("asyncio", steps)


@pytest.mark.usefixtures("frozen")
@settings(thorough, max_examples=40)
@given(steps_of_world)
def test_every_client_hears_one_order_and_nothing_is_left_behind_on_trio(steps: list[Any]) -> None:
    play("trio", steps)


def test_clients_of_pending_lists_for_each_group_do_not() -> None:
    @settings(doomed, max_examples=150)
    @given(steps_of_world)
    def naive(steps: list[Any]) -> None:
        play("asyncio", steps, NaiveHub)

    with pytest.raises(AssertionError, match="heard"):
        naive()
