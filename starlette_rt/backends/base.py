"""The four roles that a backend plays, and what each guarantees.

The law of this file: interfaces and values only. `Realtime` speaks to these and to nothing else, so that
one process and a fleet differ by a URL. A technology lives in a neighbour of this file and imports its
client library itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from ..history import History, Position, Publication, Reading
from ..limits import RateLimit
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

    async def start(self, deliver: Callable[[Publication], None]) -> None:
        """Begin; ``deliver`` is called on the loop for each publication that this node is to deliver."""

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

    async def stop(self) -> None:
        """End; nothing is delivered after it."""


class PresenceStore(Protocol):
    """Who is present in which group: members by key, one meta per connection.

    A change is visible to `members` at once and reported to the ``changed`` callback of `start`;
    ``take`` returns what has changed since it was called last, net.
    """

    async def start(self, changed: Callable[[str], None]) -> None: ...
    async def stop(self) -> None: ...
    async def track(self, group: str, key: str, connection: str, meta: dict[str, Any]) -> None: ...
    async def untrack(self, group: str, key: str, connection: str) -> None: ...

    def close(self, groups: Sequence[str], key: str, connection: str) -> None:
        """A connection has ended: its metas linger for the grace, then leave."""

    def sweep(self) -> None:
        """Let leave whose grace is over; called about once a second."""

    def take(self, group: str, *, watched: bool) -> Diff | None:
        """What has changed since the last call; a group that is empty and not ``watched`` is forgotten with it."""
        ...

    def known(self, group: str) -> State:
        """The members as those know them who have applied every diff taken so far."""
        ...

    async def members(self, group: str, after: str | None = None, limit: int | None = None) -> dict[str, Member]: ...
    async def count(self, group: str, connections: bool = False) -> int: ...


class LimitStore(Protocol):
    """Budgets shared by all nodes."""

    async def hit(self, key: str, limit: RateLimit, amount: int = 1) -> float:
        """Take ``amount`` and return 0.0, or take nothing and return the seconds to wait."""
        ...


class Claim(NamedTuple):
    """What became of a key that may be taken once.

    ``first``: it is yours. ``running``: ``holder`` has it and has not settled it. ``answered``: it is settled,
    with ``answer``, which is empty where there was no room to keep it. ``free``: nobody has it, which only
    `Ledger.outcome` says.
    """

    state: Literal["first", "running", "answered", "free"]
    holder: str = ""
    answer: bytes = b""


class Ledger(Protocol):
    """What may happen once, and who may come no more."""

    async def claim(self, key: str, ttl: float, holder: str = "") -> Claim:
        """Take ``key`` for ``ttl`` seconds if nobody has it; of those who ask at the same time one is first."""
        ...

    async def settle(self, key: str, answer: bytes, ttl: float) -> None:
        """Keep ``answer`` under ``key`` for ``ttl`` seconds, claimed or not; the first answer stays."""

    async def release(self, key: str) -> None:
        """Give ``key`` back, so that the next one is first; a settled one stays settled."""

    async def outcome(self, key: str, deadline: float) -> Claim:
        """Wait for up to ``deadline`` seconds while ``key`` is running, and return what it is then: never ``first``."""
        ...

    async def revoke(self, rule: str, until: float) -> None:
        """Refuse tokens under ``rule`` (``user:…`` or ``token:…``) until this wall-clock time; never shortened."""

    async def revoked(self, rules: Sequence[str]) -> bool:
        """Whether one of ``rules`` is revoked now."""
        ...


class Backend(NamedTuple):
    """The four roles of one technology."""

    broker: Broker
    presence: PresenceStore
    limits: LimitStore
    ledger: Ledger
