"""The turn log by itself: peers that note what they are offered, and a loop whose turns end when the test says so."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from starlette_rt import hub as hub_module
from starlette_rt.frames import Ping, PresenceCount, Raw, Reply, ServerFrame
from starlette_rt.hub import MAX_BATCH, SLICE, Batch, Except, Group, Hub, Message, Only, Wire
from starlette_rt.metrics import Counters
from starlette_rt.protocols.plain import Plain
from starlette_rt.protocols.v1 import V1S
from starlette_rt.seams import ASGI

pytestmark = pytest.mark.unit


class Turns:
    """Stands for the event loop."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []

    def end(self) -> int:
        """End one turn; return how many callbacks were due."""
        due, self.due = self.due, []
        for callback in due:
            callback()
        return len(due)

    def rest(self) -> None:
        while self.end():
            pass


class Spelling(Plain):
    """Counts how often something is spelled."""

    def __init__(self, encoding: str = "json") -> None:
        super().__init__(encoding)  # type: ignore[arg-type]
        self.spelled = 0

    def encode(self, frame: ServerFrame) -> str | bytes | None:
        self.spelled += 1
        return super().encode(frame)


class Recorder:
    """A peer that takes everything."""

    def __init__(self, session: str, wire: Wire) -> None:
        self.session, self.wire = session, wire
        self.memberships: tuple[Group, ...] = ()
        self.batches: list[Batch] = []

    def offer(self, batch: Batch, /) -> None:
        assert batch.payload == tuple(entry.payload for entry in batch.entries)
        self.batches.append(batch)

    @property
    def heard(self) -> list[str]:
        return [entry.payload["text"] for batch in self.batches for entry in batch.entries]


class World:
    """A hub, its turns, and peers by name."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.metrics = Counters()
        self.hub = Hub(self.schedule, self.metrics)
        self.spelling = Spelling()
        self.wire = Wire(self.spelling, ASGI)

    def schedule(self, callback: Callable[[], None]) -> None:
        self.turns.due.append(callback)

    def peer(self, *groups: str, session: str = "s", wire: Wire | None = None) -> Recorder:
        peer = Recorder(session, wire or self.wire)
        for group in groups:
            self.hub.join(peer, group)
        return peer

    def broadcast(self, group: str, text: str, exclude: Except = None) -> None:
        self.hub.deliver(group, Message(Raw(text), len(text)), exclude)

    def push(self, peer: Recorder, text: str) -> None:
        self.hub.say(peer, Message(Raw(text), len(text)))


@pytest.fixture
def world() -> World:
    return World()


# Saying


def test_what_one_turn_says_leaves_at_its_end_in_one_write(world: World) -> None:
    peer = world.peer("a")
    for text in "123":
        world.broadcast("a", text)
    assert not peer.batches
    assert world.turns.end() == 1
    assert peer.heard == ["1", "2", "3"]
    assert len(peer.batches) == 1


def test_groups_and_pushes_of_one_turn_keep_the_order_of_the_calls(world: World) -> None:
    peer, other = world.peer("a", "b"), world.peer("b")
    world.broadcast("a", "1")
    world.broadcast("b", "2")
    world.broadcast("a", "3")
    world.push(peer, "4")
    world.turns.end()
    assert peer.heard == ["1", "2", "3", "4"]
    assert other.heard == ["2"]
    assert len(peer.batches) == 1


def test_an_answer_leaves_after_what_the_others_are_told(world: World) -> None:
    """A process that dies in between has told everybody, and the one who asked asks again."""
    written: list[Recorder] = []

    class Noting(Recorder):
        def offer(self, batch: Batch, /) -> None:
            written.append(self)
            super().offer(batch)

    ann, bob, cat = (Noting(name, world.wire) for name in ("ann", "bob", "cat"))
    for peer in (ann, bob, cat):
        world.hub.join(peer, "lobby")
    world.broadcast("lobby", "said")
    world.push(ann, "answer")
    world.turns.end()
    assert [peer.session for peer in written] == ["bob", "cat", "ann"]
    assert ann.heard == ["said", "answer"]


def test_the_excluded_session_alone_does_not_hear_it(world: World) -> None:
    sender, other = world.peer("a", session="x"), world.peer("a", session="y")
    world.broadcast("a", "1", exclude="x")
    world.turns.end()
    world.broadcast("a", "2", exclude="x")
    world.broadcast("a", "3")
    world.turns.end()
    assert sender.heard == ["3"]
    assert other.heard == ["1", "2", "3"]


def test_one_session_alone_may_hear_it_in_its_place_among_the_rest(world: World) -> None:
    left_out, other = world.peer("a", session="x"), world.peer("a", session="y")
    world.broadcast("a", "1", exclude="x")
    world.broadcast("a", "2", exclude=Only("x"))
    world.broadcast("a", "3", exclude=Only("x"))
    world.broadcast("a", "4")
    world.turns.end()
    world.broadcast("a", "5", exclude=Only("x"))
    world.turns.end()
    assert left_out.heard == ["2", "3", "4", "5"]
    assert other.heard == ["1", "4"]


def test_a_group_that_nobody_is_in_costs_no_turn(world: World) -> None:
    world.broadcast("nowhere", "1")
    assert not world.turns.due


def test_a_push_alone_reaches_its_peer_only(world: World) -> None:
    peer, other = world.peer("a"), world.peer("a")
    world.push(peer, "1")
    world.turns.end()
    assert peer.heard == ["1"]
    assert not other.batches


def test_a_message_is_spelled_once_for_each_wire_and_its_bytes_are_shared(world: World) -> None:
    text = Spelling("text")
    bare = Wire(text, ASGI)
    peers = [world.peer("a") for _ in range(3)] + [world.peer("a", wire=bare) for _ in range(2)]
    world.broadcast("a", "1")
    world.turns.end()
    assert (world.spelling.spelled, text.spelled) == (1, 1)
    assert peers[0].batches[0] is peers[2].batches[0]
    assert peers[3].batches[0] is peers[4].batches[0]


def test_peers_that_hear_the_same_of_a_mixed_turn_share_one_batch(world: World) -> None:
    both, again, one = world.peer("a", "b"), world.peer("a", "b"), world.peer("a")
    world.broadcast("a", "1")
    world.broadcast("a", "2")
    world.broadcast("b", "3")
    world.turns.end()
    assert both.batches[0] is again.batches[0]
    assert both.heard == ["1", "2", "3"]
    assert one.heard == ["1", "2"]
    assert world.spelling.spelled == 3


def test_what_has_no_spelling_on_a_wire_is_not_offered_there(world: World) -> None:
    bare = world.peer("a", wire=Wire(Plain("text"), ASGI))
    told = world.peer("a")
    world.hub.deliver("a", Message(PresenceCount("a", 1)))
    world.turns.end()
    world.hub.deliver("a", Message(PresenceCount("a", 2)))
    world.push(told, "2")
    world.push(bare, "3")
    world.turns.end()
    assert bare.heard == ["3"]
    world.hub.deliver("a", Message(PresenceCount("a", 3)))
    world.push(told, "4")
    world.turns.end()
    assert bare.heard == ["3"]
    assert len(told.heard) == 5


def test_every_message_for_every_receiver_is_counted(world: World) -> None:
    peers = [world.peer("a") for _ in range(3)]
    world.broadcast("a", "1")
    world.push(peers[0], "2")
    world.turns.end()
    assert world.metrics.totals["delivered"] == 4


# When the log is full


def test_a_full_log_is_flushed_before_its_turn_ends(world: World) -> None:
    peer = world.peer("a")
    for number in range(hub_module.MAX_ENTRIES - 1):
        world.broadcast("a", str(number))
    assert not peer.batches
    world.broadcast("a", "last")
    assert peer.heard[-1] == "last"
    world.push(peer, "next")
    world.turns.rest()
    assert peer.heard[-1] == "next"
    assert len(peer.batches) == 2


def test_a_log_for_many_small_groups_may_be_longer(world: World) -> None:
    peer = world.peer("a", "b", "c")
    for number in range(3 * (hub_module.MAX_ENTRIES - 1)):
        world.broadcast("abc"[number % 3], str(number))
    assert not peer.batches
    world.broadcast("a", "last")
    assert len(peer.batches) == 1


def test_a_log_from_which_too_much_is_due_is_flushed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MAX_ENTRIES", 4)
    monkeypatch.setattr(hub_module, "MAX_DUE", 6)
    peers = [world.peer("a", "b", "c", "d") for _ in range(2)]
    for group in "abc":
        world.broadcast(group, group)  # six are due, of three messages: as many as four in a turn may be said to one
    assert not peers[0].batches
    world.push(peers[0], "and")
    assert peers[0].heard[-1] == "and"
    world.turns.rest()
    assert [len(peer.batches) for peer in peers] == [1, 1]


def test_many_bytes_are_flushed_before_their_turn_ends(world: World) -> None:
    peer = world.peer("a")
    half = "x" * (hub_module.MAX_BYTES // 2)
    world.broadcast("a", half)
    assert not peer.batches
    world.broadcast("a", half)
    assert len(peer.heard) == 2
    world.broadcast("a", half)
    assert len(peer.heard) == 2  # the bytes are counted anew


def test_a_log_that_was_full_tells_who_fills_it_to_take_a_breath(world: World) -> None:
    world.peer("a")
    for number in range(hub_module.MAX_ENTRIES - 1):
        world.broadcast("a", str(number))
    assert not world.hub.pressed
    world.broadcast("a", "last")
    assert world.hub.pressed


def test_a_turn_that_ends_with_an_empty_log_writes_nothing(world: World) -> None:
    peer = world.peer("a")
    world.broadcast("a", "1")
    world.hub.leave(peer, "a")
    assert world.turns.end() == 1
    assert len(peer.batches) == 1


# Membership


def test_who_joins_hears_what_is_said_afterwards_only(world: World) -> None:
    old = world.peer("a")
    world.broadcast("a", "1")
    new = world.peer("a")
    world.broadcast("a", "2")
    world.turns.end()
    assert old.heard == ["1", "2"]
    assert new.heard == ["2"]


def test_who_leaves_hears_what_was_said_before(world: World) -> None:
    peer, other = world.peer("a"), world.peer("a")
    world.broadcast("a", "1")
    assert world.hub.leave(peer, "a")
    world.broadcast("a", "2")
    world.turns.end()
    assert peer.heard == ["1"]
    assert other.heard == ["1", "2"]


def test_a_join_elsewhere_does_not_end_a_turn(world: World) -> None:
    peer = world.peer("a")
    world.broadcast("a", "1")
    world.peer("b")
    assert not peer.batches


def test_joining_twice_is_joining_once(world: World) -> None:
    peer = world.peer("a")
    assert not world.hub.join(peer, "a")
    world.broadcast("a", "1")
    world.turns.end()
    assert peer.heard == ["1"]


def test_it_knows_who_is_in_a_group(world: World) -> None:
    peer, other = world.peer("a"), world.peer()
    assert world.hub.has(peer, "a")
    assert not world.hub.has(other, "a")
    assert not world.hub.has(peer, "nowhere")
    world.hub.leave(peer, "a")
    assert not world.hub.has(peer, "a")


def test_leaving_what_one_is_not_in_is_false(world: World) -> None:
    peer, _ = world.peer(), world.peer("a")
    assert not world.hub.leave(peer, "a")
    assert not world.hub.leave(peer, "nowhere")


def test_a_group_without_members_is_gone_and_its_crowd_is_told(world: World) -> None:
    told: list[tuple[str, bool]] = []
    world.hub.on_crowd = lambda name, occupied: told.append((name, occupied))
    one, two = world.peer("a"), world.peer("a")
    world.hub.leave(one, "a")
    assert told == [("a", True)]
    world.hub.forget(two)
    assert told == [("a", True), ("a", False)]
    assert not world.hub.groups


def test_a_forgotten_peer_is_in_nothing_and_others_hear_on(world: World) -> None:
    peer, other = world.peer("a", "b"), world.peer("b")
    world.broadcast("b", "1")
    world.hub.forget(peer)
    world.broadcast("b", "2")
    world.turns.end()
    assert peer.heard == ["1"]
    assert other.heard == ["1", "2"]
    assert {group.name for group in peer.memberships} == {"a", "b"}  # its owner drops them when it likes
    assert list(world.hub.groups) == ["b"]


def test_nothing_keeps_a_forgotten_peer_alive(world: World) -> None:
    peer, other = world.peer("a"), world.peer("a")
    world.broadcast("a", "1")
    world.push(peer, "2")
    world.turns.rest()
    world.hub.forget(peer)
    world.push(other, "3")
    world.turns.rest()
    alive = weakref.ref(peer)
    del peer
    gc.collect()
    assert alive() is None


# The last words of a peer


def test_settling_a_peer_writes_what_was_said_to_it_or_to_its_groups(world: World) -> None:
    peer = world.peer("a")
    world.push(peer, "1")
    world.hub.settle_peer(peer)
    assert peer.heard == ["1"]
    world.broadcast("a", "2")
    world.hub.settle_peer(peer)
    assert peer.heard == ["1", "2"]


def test_settling_a_peer_leaves_the_turn_of_the_others_alone(world: World) -> None:
    peer, other = world.peer("a"), world.peer("b")
    world.broadcast("b", "1")
    world.hub.settle_peer(peer)
    assert not other.batches


# More receivers than one slice


def crowd(world: World, size: int) -> list[Recorder]:
    return [world.peer("a", session=str(number)) for number in range(size)]


def hearing(peers: list[Recorder]) -> int:
    return sum(bool(peer.heard) for peer in peers)


def test_a_large_group_is_written_in_slices_with_a_breath_between(world: World) -> None:
    peers = crowd(world, 2 * SLICE + 1)
    world.broadcast("a", "1")
    counts = [hearing(peers) for _ in range(5) if world.turns.end() or True]
    assert counts == [SLICE, 2 * SLICE, 2 * SLICE + 1, 2 * SLICE + 1, 2 * SLICE + 1]
    assert not world.turns.due


def test_a_mixed_turn_of_a_large_group_is_written_in_slices_too(world: World) -> None:
    peers = crowd(world, SLICE + 1)
    world.broadcast("a", "1")
    world.push(peers[-1], "2")
    world.turns.end()
    assert hearing(peers) == SLICE
    world.turns.rest()
    assert peers[-1].heard == ["1", "2"]


def test_what_is_said_between_two_slices_overtakes_nothing(world: World) -> None:
    peers = crowd(world, SLICE + 1)
    world.broadcast("a", "1")
    world.turns.end()
    world.push(peers[-1], "2")
    world.broadcast("a", "3")
    world.turns.rest()
    assert peers[-1].heard == ["1", "2", "3"]
    assert peers[0].heard == ["1", "3"]


def test_a_flush_while_slices_wait_does_not_ask_for_a_second_breath(world: World) -> None:
    crowd(world, SLICE + 1)
    world.broadcast("a", "1")
    world.turns.end()
    world.broadcast("a", "2")
    world.hub.flush()
    assert len(world.turns.due) == 2  # the breath of the first flush, and the end of the turn
    world.turns.rest()


def test_who_joins_between_two_slices_does_not_hear_what_was_said_before(world: World) -> None:
    crowd(world, SLICE + 1)
    world.broadcast("a", "1")
    world.turns.end()
    late = world.peer("a")
    world.turns.rest()
    assert not late.heard


def test_who_leaves_between_two_slices_still_hears_what_was_said_before(world: World) -> None:
    peers = crowd(world, SLICE + 1)
    world.broadcast("a", "1")
    world.turns.end()
    world.hub.leave(peers[-1], "a")
    world.turns.rest()
    assert peers[-1].heard == ["1"]


def test_settling_a_peer_between_two_slices_writes_what_it_has_not_got(world: World) -> None:
    peers = crowd(world, SLICE + 1)
    world.broadcast("a", "1")
    world.turns.end()
    world.hub.settle_peer(peers[-1])
    assert peers[-1].heard == ["1"]


# What leaves together


def entries(wire: Wire, count: int) -> list[Any]:
    return [message.entry(wire) for message in (Message(Reply(ref, None)) for ref in range(count))]


@pytest.mark.parametrize("name", V1S)
@pytest.mark.parametrize("count", [1, 2, MAX_BATCH, MAX_BATCH + 1, 2 * MAX_BATCH])
def test_what_leaves_together_is_one_message_of_a_protocol_with_batches_within_reason(name: str, count: int) -> None:
    protocol = V1S[name]
    wire = Wire(protocol, ASGI)
    messages = wire.join(entries(wire, count))
    assert len(messages) == -(-count // MAX_BATCH)
    assert {message["type"] for message in messages} == {"websocket.send"}
    kind = "text" if name == "rt.v1.json" else "bytes"
    heard = [frame for message in messages for frame in protocol.decode_server(message[kind])]
    assert [frame.ref for frame in heard] == list(range(count))  # type: ignore[union-attr]


def test_what_leaves_together_stays_apart_where_the_protocol_has_no_batches() -> None:
    wire = Wire(Plain("json"), ASGI)
    assert wire.v1 is None
    spelled = [Message(PresenceCount("g", count)).entry(wire) for count in range(3)]
    assert len(wire.join([entry for entry in spelled if entry is not None])) == 3
    assert Message(Ping()).entry(wire) is None


def test_a_message_hands_its_terms_to_every_entry() -> None:
    message = Message(Raw("x"), 1, ephemeral=True, key="cursor", until=5.0)
    for wire in (Wire(Plain("json"), ASGI), Wire(V1S["rt.v1.json"], ASGI)):
        entry = message.entry(wire)
        assert entry is not None
        assert (entry.ephemeral, entry.key, entry.until) == (True, "cursor", 5.0)
        assert message.entry(wire) is entry
