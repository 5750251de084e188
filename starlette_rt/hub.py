"""This process's connections and groups, and the turn log that keeps everything in order.

The law of this file: no await, no broker, no socket. What one turn of the event loop says is appended to
one ordered log of (target, message, exclude); the log is flushed when the turn ends, when it is full, and
before a join, a leave or a close that touches a target in it. A flush puts every message on its receivers
in the order in which it was said, and writes each receiver once; bytes are spelled once for each kind of
receiver and joined once for each combination. Per-group pending lists would be simpler and are wrong: what
was said to two groups and to one client would arrive out of order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from .frames import ServerFrame, size_of
from .metrics import Metrics
from .outbox import Entry
from .protocols.plain import Plain
from .protocols.v1 import V1
from .seams import Carrier

MAX_ENTRIES = 64  # messages to one target in the log before it is flushed
MAX_BYTES = 64 * 1024  # bytes in the log before it is flushed
MAX_DUE = 32 * 1024  # deliveries in the log before it is flushed, if it also holds MAX_ENTRIES messages
MAX_BATCH = 500  # frames in one message of a protocol that knows batches
SLICE = 64  # receivers written before the loop gets a breath: half a millisecond


class Wire:
    """One kind of receiver: a protocol on a carrier. There are few, and they are compared by identity.

    A protocol that knows batches is framed when it is joined, since what leaves together is one message of it.
    Any other is framed message by message, so that each is framed once for all combinations.
    """

    __slots__ = ("carrier", "protocol", "v1")

    def __init__(self, protocol: Plain | V1, carrier: Carrier) -> None:
        self.protocol: Plain | V1 = protocol
        self.carrier: Carrier = carrier
        self.v1: V1 | None = protocol if isinstance(protocol, V1) else None

    def payload(self, spelled: str | bytes) -> Any:
        """Return what an entry of the outbox holds of a spelled message."""
        return self.carrier.frame(spelled) if self.v1 is None else spelled

    def join(self, entries: list[Entry]) -> Any:
        """Return ``entries`` as the one payload that a seam takes."""
        if len(entries) == 1:
            alone = entries[0].payload
            return self.carrier.join((alone if self.v1 is None else self.carrier.frame(alone),))
        payloads = [entry.payload for entry in entries]
        if self.v1 is None:
            return self.carrier.join(payloads)
        parts = [payloads] if len(payloads) <= MAX_BATCH else batched(payloads, MAX_BATCH)
        return self.carrier.join([self.carrier.frame(self.v1.join(part)) for part in parts])


class Message:
    """One thing said, spelled once for each wire that asks."""

    __slots__ = ("_entries", "ephemeral", "frame", "key", "size", "until")

    def __init__(
        self,
        frame: ServerFrame,
        size: int = 0,
        *,
        ephemeral: bool = False,
        key: str | None = None,
        until: float | None = None,
    ) -> None:
        self.frame: ServerFrame = frame
        self.size: int = size
        self.ephemeral: bool = ephemeral
        self.key: str | None = key
        self.until: float | None = until
        self._entries: dict[Wire, Entry | None] = {}

    def entry(self, wire: Wire) -> Entry | None:
        """Return the message as ``wire`` carries it, or ``None`` if it has no spelling there."""
        if wire in self._entries:
            return self._entries[wire]
        spelled = wire.protocol.encode(self.frame)
        entry = None
        if spelled is not None:
            entry = Entry(wire.payload(spelled), size_of(spelled), self.ephemeral, self.key, self.until)
        self._entries[wire] = entry
        return entry


class Batch:
    """What one flush hands to one receiver: the entries, and their payload joined for writing."""

    __slots__ = ("entries", "payload")

    def __init__(self, entries: list[Entry], wire: Wire) -> None:
        self.entries: list[Entry] = entries
        self.payload: Any = wire.join(entries)


class Peer(Protocol):
    """What the hub asks of a connection."""

    session: str
    wire: Wire
    memberships: tuple[Group, ...]

    def offer(self, batch: Batch, /) -> None:
        """Take a batch: hand it on or queue it, never wait and never raise."""


class Group:
    """The members of one group on this node, in the order they came."""

    __slots__ = ("members", "name")

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.members: dict[Peer, Wire] = {}  # the wire of each, so that a flush need not touch the peer for it


class Only(NamedTuple):
    """In the place of who is excluded: nobody but this session gets it."""

    session: str


Target = Group | Any  # a group, or one peer
Except = str | Only | None  # the session that does not get it, or that alone does
LogEntry = tuple[Target, Message, Except]


class Hub:
    """The groups of one process and the log of the present turn.

    ``schedule`` calls a function when the turn of the loop has ended (asyncio's ``call_soon``).
    """

    def __init__(self, schedule: Callable[[Callable[[], None]], object], metrics: Metrics) -> None:
        self._schedule = schedule
        self._metrics = metrics
        self.groups: dict[str, Group] = {}
        self.on_crowd: Callable[[str, bool], None] = lambda name, occupied: None
        self.pressed: bool = False  # the log was full before its turn had ended: who fills it should take a breath
        self._log: list[LogEntry] = []
        self._bytes = 0
        self._crowded = False  # whether something in the log is for a group
        self._due = 0  # deliveries
        self._touched: dict[Target, int] = {}  # how many messages for each target
        self._scheduled = False
        self._writes: Iterator[tuple[Peer, Batch]] = iter(())
        self._writing = False

    # Membership. Each of these ends what was said before it, to the members of then.

    def has(self, peer: Peer, name: str) -> bool:
        """Whether ``peer`` is a member of the group ``name``."""
        group = self.groups.get(name)
        return group is not None and peer in group.members

    def join(self, peer: Peer, name: str) -> bool:
        """Make ``peer`` a member; false if it is one already."""
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = Group(name)
            self.on_crowd(name, True)
        elif peer in group.members:
            return False
        self.settle(group)
        group.members[peer] = peer.wire
        peer.memberships = (*peer.memberships, group)
        return True

    def leave(self, peer: Peer, name: str) -> bool:
        """End a membership; false if there was none."""
        group = self.groups.get(name)
        if group is None or peer not in group.members:
            return False
        self._remove(peer, group)
        peer.memberships = tuple(each for each in peer.memberships if each is not group)
        return True

    def forget(self, peer: Peer) -> None:
        """End every membership; ``peer.memberships`` stays readable until its owner drops it."""
        for group in peer.memberships:
            self._remove(peer, group)

    def _remove(self, peer: Peer, group: Group) -> None:
        self.settle(group)
        del group.members[peer]
        if not group.members:
            del self.groups[group.name]
            self.on_crowd(group.name, False)

    # Saying something.

    def deliver(self, name: str, message: Message, exclude: Except = None) -> None:
        """Say ``message`` to a group's members of this moment, except the session ``exclude``, or to `Only` one."""
        group = self.groups.get(name)
        if group is not None:
            self._crowded = True
            self._due += len(group.members)
            self._append(group, message, exclude)

    def say(self, peer: Peer, message: Message) -> None:
        """Say ``message`` to one peer, in its place among everything else that is said."""
        self._due += 1
        self._append(peer, message, None)

    def _append(self, target: Target, message: Message, exclude: Except) -> None:
        self._log.append((target, message, exclude))
        said = self._touched[target] = self._touched.get(target, 0) + 1
        self._bytes += message.size
        many = self._due >= MAX_DUE and len(self._log) >= MAX_ENTRIES
        if many or said >= MAX_ENTRIES or self._bytes >= MAX_BYTES:
            self.pressed = True
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._schedule(self._turn_ended)

    # Flushing.

    def settle(self, target: Target) -> None:
        """Flush if something in the log is for ``target``."""
        if target in self._touched:
            self.flush()

    def settle_peer(self, peer: Peer) -> None:
        """Flush if something in the log may be for ``peer``, and write all of it: what comes now is its last."""
        if peer in self._touched or not self._touched.keys().isdisjoint(peer.memberships):
            self.flush()
        self._write_all()

    def _turn_ended(self) -> None:
        self._scheduled = False
        if self._log:
            self.flush()

    def flush(self) -> None:
        """Put everything in the log on its receivers, in order, and begin to write."""
        self._write_all()
        log, self._log = self._log, []
        self._touched = {}
        self._bytes = self._due = 0
        crowded, self._crowded = self._crowded, False
        target, _, exclude = log[0]
        if not crowded:
            self._writes = personal(log)
        elif all(entry[0] is target and entry[2] == exclude for entry in log):
            self._writes = spread(target, [entry[1] for entry in log], exclude)
        else:
            self._writes = merge(log)
        self._write_slice()

    def _write_all(self) -> None:
        """Finish what is being written: nothing may overtake it."""
        self._write(None)

    def _write_slice(self) -> None:
        """Write a slice of the receivers; the rest goes on after a breath of the loop."""
        if self._write(SLICE) and not self._writing:
            self._writing = True
            self._schedule(self._go_on)

    def _go_on(self) -> None:
        self._writing = False
        self._write_slice()

    def _write(self, most: int | None) -> bool:
        """Offer up to ``most`` batches; true if more are left. The hot loop: one call for each receiver."""
        count = messages = 0
        for peer, batch in self._writes:
            peer.offer(batch)
            messages += len(batch.entries)
            count += 1
            if count == most:
                break
        if messages:
            self._metrics.delivered(messages)
        return count == most


def receivers(target: Target, exclude: Except) -> Iterable[Peer]:
    """Return who gets what is said to ``target``, as they are now."""
    if not isinstance(target, Group):
        return (target,)
    if exclude is None:
        return list(target.members)
    if isinstance(exclude, Only):
        return [peer for peer in target.members if peer.session == exclude.session]
    return [peer for peer in target.members if peer.session != exclude]


def personal(log: list[LogEntry]) -> Iterator[tuple[Peer, Batch]]:
    """Everything in the log has one receiver, as replies have: there is nothing to share."""
    lists: dict[Any, list[Message]] = {}
    for peer, message, _ in log:
        if peer in lists:
            lists[peer].append(message)
        else:
            lists[peer] = [message]
    for peer, messages in lists.items():
        batch = batch_of(messages, peer.wire)
        if batch is not None:
            yield peer, batch


def spread(target: Target, messages: list[Message], exclude: Except) -> Iterator[tuple[Peer, Batch]]:
    """Everything in the log has one target: the same bytes for all receivers of one wire."""
    if isinstance(target, Group) and exclude is None:
        return _spread(list(target.members), list(target.members.values()), messages)
    peers = list(receivers(target, exclude))
    return _spread(peers, [peer.wire for peer in peers], messages)


def _spread(peers: list[Peer], wires: list[Wire], messages: list[Message]) -> Iterator[tuple[Peer, Batch]]:
    batches: dict[Wire, Batch | None] = {}
    for peer, wire in zip(peers, wires, strict=True):
        if wire in batches:
            batch = batches[wire]
        else:
            batch = batches[wire] = batch_of(messages, wire)
        if batch is not None:
            yield peer, batch


class Combination:
    """Some of the targets of a log: what those receivers have in common that are in just these.

    Each is made of the one that lacks its last target, and held by all its receivers: a target costs a receiver one
    entry of a dictionary, and what they are written is joined once for each wire.
    """

    __slots__ = ("batches", "before", "places")

    def __init__(self, before: Combination | None, places: list[int]) -> None:
        self.before: Combination | None = before
        self.places: list[int] = places  # in the log, of what was said to the last target
        self.batches: dict[Wire, Batch | None] | None = None

    def batch(self, log: list[LogEntry], wire: Wire) -> Batch | None:
        """Return the messages of ``log`` that these receivers get, in its order, as one batch for ``wire``."""
        if self.batches is None:
            self.batches = {}
        if wire not in self.batches:
            self.batches[wire] = batch_of([log[place][1] for place in sorted(self._places())], wire)
        return self.batches[wire]

    def _places(self) -> Iterator[int]:
        at: Combination | None = self
        while at is not None:
            yield from at.places
            at = at.before


def merge(log: list[LogEntry]) -> Iterator[tuple[Peer, Batch]]:
    """Find each receiver's combination of targets, in one synchronous pass, and return the writes."""
    held: dict[Peer, Combination] = {}
    for (target, exclude), places in places_of(log).items():
        longer: dict[Combination | None, Combination] = {}
        for peer in receivers(target, exclude):
            before = held.get(peer)
            after = longer.get(before)
            if after is None:
                after = longer[before] = Combination(before, places)
            held[peer] = after
    for target, *_ in log:
        if target in held:  # one peer: its answer leaves after what others are told
            held[target] = held.pop(target)
    return _merged(held, log)


def places_of(log: list[LogEntry]) -> dict[tuple[Target, Except], list[int]]:
    """Return where in ``log`` something is said to each target, for each exclude."""
    places: dict[tuple[Target, Except], list[int]] = {}
    for place, (target, _, exclude) in enumerate(log):
        if (target, exclude) in places:
            places[target, exclude].append(place)
        else:
            places[target, exclude] = [place]
    return places


def _merged(held: dict[Peer, Combination], log: list[LogEntry]) -> Iterator[tuple[Peer, Batch]]:
    for peer, combination in held.items():
        batch = combination.batch(log, peer.wire)
        if batch is not None:
            yield peer, batch


def batch_of(messages: list[Message], wire: Wire) -> Batch | None:
    """Return ``messages`` as one batch for ``wire``; ``None`` if none of them has a spelling there."""
    entries = [entry for message in messages if (entry := message.entry(wire)) is not None]
    return Batch(entries, wire) if entries else None


def batched(payloads: list[Any], most: int) -> list[list[Any]]:
    """Return ``payloads`` in parts of at most ``most``."""
    return [payloads[start : start + most] for start in range(0, len(payloads), most)]
