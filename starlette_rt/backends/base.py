"""The four roles that a backend plays, and what each guarantees.

The law of this file: interfaces and values only. `Realtime` speaks to these and to nothing else, so that
one process and a fleet differ by a URL. A technology lives in a neighbour of this file and imports its
client library itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from ..history import History, Position, Publication, Reading
from ..limits import Buckets, Due
from ..presence import Diff, Member, State


class Published(NamedTuple):
    """What became of a broadcast.

    ``position`` is its place in the group's history, ``None`` for a group without one. ``shared`` says
    whether other nodes have it: ``yes``, ``queued`` for when the backend is back, or ``no``.
    """

    position: Position | None
    shared: Literal["yes", "queued", "no"]


class Broker(Protocol):
    """Brings every publication to every node that has members of its group, and keeps the logs.

    The publications of one node to one group arrive in the order of the calls. A group with history has one log
    (`history.Log` says what it is), and its publications arrive with offset, tag and prev; they may be lost, come
    twice or out of order on the way, which who receives them finds out by these three.
    """

    async def start(self, deliver: Callable[[Publication], None], resumed: Callable[[], None]) -> None:
        """Begin; ``deliver`` is called on the loop for each publication that this node is to deliver.

        ``resumed`` is called when delivery was interrupted and goes on: something may have been missed. A backend
        that is away is waited for; one that is there and refuses us raises `ConfigurationError`.
        """

    def subscribe(self, group: str) -> None:
        """Bring this node what is published to ``group``, until `unsubscribe` was called as often."""

    def unsubscribe(self, group: str) -> None:
        """Take back one `subscribe`."""

    async def subscribed(self, group: str) -> None:
        """Wait until whatever is published to ``group`` from now on arrives. Raises `Unavailable`."""

    async def subscribed_elsewhere(self, groups: Collection[str]) -> set[str]:
        """Return those of ``groups`` to which a node is subscribed, this one or another. Raises `Unavailable`."""
        ...

    async def publish(self, publication: Publication, history: History | None) -> Published:
        """Deliver here and everywhere, with ``history`` after appending to the group's log, in one step.

        Raises `Unavailable` if it was accepted nowhere. One whose id the log has seen is delivered to nobody and
        returns what the first one returned; without ``history`` that holds for those with ``once``. It may be
        called again with the same publication by who cannot know whether it was accepted.
        """
        ...

    async def read(self, group: str, history: History) -> Reading:
        """Return where the group's log ends and what it keeps, in one step; a log that is not there is begun.

        The answer is no older than the question, and what is published after it arrives live, at nodes that
        follow the group. Raises `Unavailable`.
        """
        ...

    async def position(self, group: str, history: History) -> Position:
        """Return where the group's log ends, no older than the question; a log that is not there is begun.

        Raises `Unavailable`.
        """
        ...

    async def renew(self, group: str, history: History, seen: Position) -> Position:
        """Give the log a new epoch, if it is still the epoch of ``seen`` and ends with its tag, in one step.

        Offset, tag and publications stay. Returns where the log ends then, whoever has renewed it. Raises
        `Unavailable`.
        """
        ...

    def sweep(self) -> None:
        """Forget what has outlived its time; called about twice a second."""

    def troubles(self) -> list[str]:
        """Return what is wrong now, in sentences; empty if nothing is."""
        ...

    async def stop(self) -> None:
        """End; nothing is delivered after it."""


Watch = Literal["members", "count"]  # what those see who watch a group's presence


class PresenceStore(Protocol):
    """Who is present in which group: members by key, one meta per connection.

    A change is visible to `members` when `track` or `untrack` has returned. A node with watchers follows the group:
    from then on its changes, wherever they are made, are reported to the ``changed`` callback of `start`, and `take`
    returns what has changed since it was called last, net. While other nodes cannot be reached tracking succeeds here
    and is told them later, nobody leaves, and what is asked for is answered with what was known last.

    ``on_count``, if it is set, is called with a group and the members it had and has, once on all nodes together for
    each change of that number.
    """

    on_count: Callable[[str, int, int], None] | None

    async def start(self, changed: Callable[[str], None]) -> None:
        """Begin; ``changed`` is called on the loop with a group that is followed and has changed. It must not raise."""

    async def stop(self) -> None:
        """End; whoever is still tracked lingers on the other nodes, as if closed."""

    async def track(self, group: str, key: str, connection: str, meta: dict[str, Any]) -> None:
        """Show ``connection`` under ``key``, or with another meta."""

    async def untrack(self, group: str, key: str, connection: str) -> None:
        """Show ``connection`` no more; one that is not tracked is nothing."""

    def close(self, groups: Sequence[str], key: str, connection: str) -> None:
        """A connection has ended: its metas linger for the grace, then leave."""

    def sweep(self) -> None:
        """Let leave whose grace is over; called about once a second."""

    async def follow(self, group: str, part: Watch) -> None:
        """Have the members of ``group``, or their number, at hand here from now on, up to date; again is nothing."""

    def unfollow(self, group: str, part: Watch) -> None:
        """Nobody here watches any more."""

    def take(self, group: str, *, watched: bool) -> Diff | None:
        """What has changed since the last call; a group that is empty and not ``watched`` is forgotten with it."""
        ...

    def known(self, group: str) -> State:
        """The members as those know them who have applied every diff taken so far, of a group that is followed."""
        ...

    def size(self, group: str) -> int:
        """How many members a group that is followed has, as far as this node knows."""
        ...

    async def members(self, group: str, after: str | None = None, limit: int | None = None) -> dict[str, Member]:
        """Return the members, or a page of them in the order of their keys: ``limit`` that follow ``after``."""
        ...

    async def count(self, group: str, connections: bool = False) -> int:
        """Return how many members, or connections of theirs, there are; reads no list."""
        ...


class LimitStore(Protocol):
    """Budgets and caps that all nodes share.

    ``shared`` is false where this node is all there is: its own buckets and counters know everything then, and
    nothing here need be asked. ``fail_open`` says what is done while the others cannot be asked: this node's own
    limits hold alone, or, where it is false, `take` raises `Unavailable`.
    """

    shared: bool
    fail_open: bool

    async def take(self, dues: Sequence[Due], seen: Buckets) -> float:
        """Take all ``dues`` and return 0.0, or the seconds to wait and take nothing of the one that refuses.

        ``math.inf`` for what never passes. ``dues`` of one subject are taken together or not at all. ``seen`` are
        this node's own buckets: they learn what a refusal has told.
        """
        ...

    async def take_cap(self, identity: str, most: int) -> bool:
        """Count one more connection of ``identity``, or none and return false if that were more than ``most``."""
        ...

    def release_cap(self, identity: str) -> None:
        """A connection that `take_cap` has counted is over."""

    def sweep(self) -> None:
        """Say again what has not been heard, and forget what is over; called about twice a second."""


class Claim(NamedTuple):
    """What became of a key that may be taken once.

    ``first``: it is yours. ``lost``: it is yours too, but somebody had begun, whose node has gone; nobody knows how
    far it got. ``running``: somebody has it and has not settled it. ``answered``: it is settled, with ``answer``,
    which is empty where there was no room to keep it. ``free``: nobody has it, which only `Ledger.outcome` says.
    ``holder`` is the name of the claim, not of who made it. ``local`` says that other nodes do not know of it.
    """

    state: Literal["first", "lost", "running", "answered", "free"]
    holder: str = ""
    answer: bytes = b""
    local: bool = False


MAX_ANSWER = 256 * 1024  # bytes of an answer; of a larger one a ledger keeps that it is there


class Ledger(Protocol):
    """What may happen once, and who may come no more.

    While other nodes cannot be asked, a key is claimed on this node alone. ``fail_open`` says what is done about
    revocations that could not be read since the start: nobody is revoked, or, where it is false, `revoked` raises
    `Unavailable`.
    """

    fail_open: bool

    async def claim(self, key: str, ttl: float, *, shared: bool = False) -> Claim:
        """Take ``key`` for ``ttl`` seconds if nobody has it; of those who ask at the same time one is first.

        With ``shared`` it is claimed on all nodes or not at all: raises `Unavailable` where it is not.
        """
        ...

    async def settle(self, key: str, answer: bytes, ttl: float) -> bytes:
        """Keep ``answer`` under ``key`` for ``ttl`` seconds, claimed or not, and return the one that stays: the first.

        Of one that is larger than `MAX_ANSWER` only the fact is kept.
        """
        ...

    async def release(self, key: str, holder: str) -> None:
        """Give ``key`` back, so that the next one is first; a settled one stays settled, and so does another claim."""

    async def outcome(self, key: str, deadline: float) -> Claim:
        """Wait for up to ``deadline`` seconds while ``key`` is running, and return what it is then.

        Never ``first``. ``lost`` means that whoever has it is gone: who claims it now gets it.
        """
        ...

    async def revoke(self, rule: str, until: float) -> None:
        """Refuse tokens under ``rule`` (``user:…`` or ``token:…``) until this wall-clock time; never shortened.

        Raises `Unavailable` if it holds on this node alone.
        """

    async def revoked(self, rules: Sequence[str]) -> bool:
        """Whether this node knows that one of ``rules`` is revoked now."""
        ...

    def note(self, rule: str, until: float) -> None:
        """Another node has revoked ``rule``."""

    def revocations(self) -> list[tuple[str, float]]:
        """Return what this node knows to be revoked now: each rule and until when."""
        ...

    async def load(self) -> None:
        """Learn what has been revoked, and tell what only this node knows. Raises `Unavailable`."""


class Backend(NamedTuple):
    """The four roles of one technology."""

    broker: Broker
    presence: PresenceStore
    limits: LimitStore
    ledger: Ledger
