"""One peer's bounded queue of what it has not been handed yet, and what happens when it is full.

The law of this file: "may this be dropped?" is answered here and nowhere else. Pure data: no clock, no
socket, no counting; every push returns a fact and the caller counts it. An outbox exists only while its
peer is behind. Bounds are in messages and in bytes of payload, whatever the payload is.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

from .exceptions import ConfigurationError

Overflow = Literal["disconnect", "drop_oldest", "drop_newest"]

OVERFLOW = -1  # what `Outbox.push` returns when the peer is to be disconnected


class Entry:
    """One message spelled for one kind of peer; shared by all of them.

    An ``ephemeral`` entry may always be dropped, and one with a ``key`` supersedes the queued one of the
    same key, full or not: only the latest is of use. ``until`` is the time after which it is of none.
    """

    __slots__ = ("ephemeral", "key", "payload", "size", "until")

    def __init__(
        self, payload: Any, size: int, ephemeral: bool = False, key: str | None = None, until: float | None = None
    ) -> None:
        self.payload: Any = payload
        self.size: int = size
        self.ephemeral: bool = ephemeral
        self.key: str | None = key
        self.until: float | None = until


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """The bounds of every outbox, and what happens beyond them.

    ``bytes`` and ``messages`` bound one peer's backlog. ``overflow`` says what a full outbox does with a
    message that is not ephemeral: ``disconnect`` the peer (the default), ``drop_oldest`` or
    ``drop_newest``. Ephemeral messages go first in every case, those with a key are kept one per key
    (the policy ``latest``). A message of more than ``bytes`` has no room even in an empty outbox: it ends
    the peer under ``disconnect`` and is itself dropped otherwise. ``stall`` is how many seconds a peer may
    take nothing at all, ``close`` how many it has to take its backlog when the host closes it. Raises
    `ConfigurationError` for bounds that are not greater than zero.
    """

    bytes: int = 1024 * 1024
    messages: int = 4096
    overflow: Overflow = "disconnect"
    stall: float = 5.0
    close: float = 5.0

    def __post_init__(self) -> None:
        if min(self.bytes, self.messages, self.stall, self.close) <= 0:
            raise ConfigurationError("OutboxLimits: every bound must be greater than zero")
        if self.overflow not in ("disconnect", "drop_oldest", "drop_newest"):
            raise ConfigurationError(
                f'OutboxLimits: unknown overflow {self.overflow!r}; write "disconnect", "drop_oldest" or '
                '"drop_newest" (the latest per key is what broadcast(..., ephemeral=True, key=...) keeps)'
            )


class Outbox:
    """The backlog of one peer, oldest first."""

    __slots__ = ("_entries", "_ephemeral", "_keys", "_limits", "_next", "size")

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._ephemeral: OrderedDict[int, None] = OrderedDict()  # the numbers of the ephemeral ones
        self._keys: dict[str, int] = {}
        self._next = 0
        self.size: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, entry: Entry) -> int:
        """Queue one entry; return how many entries were lost by it, itself included, or `OVERFLOW`.

        After `OVERFLOW` the peer is to be disconnected; what is still queued is of no more use.
        """
        lost, policy = 0, self._limits.overflow
        possible = entry.size <= self._limits.bytes
        if entry.key is not None and entry.key in self._keys:
            self._remove(self._keys[entry.key])
            lost = 1
        while not self._fits(entry):
            if entry.ephemeral:
                return lost + 1
            if possible and self._ephemeral:
                self._remove(next(iter(self._ephemeral)))
            elif policy == "disconnect":
                return OVERFLOW
            elif possible and policy == "drop_oldest":
                self._remove(next(iter(self._entries)))
            else:
                return lost + 1
            lost += 1
        self._append(entry)
        return lost

    def take(self, now: float, most: int = 65536) -> tuple[list[Entry], int]:
        """Remove and return the oldest entries, at least one if there is any, up to ``most`` bytes.

        Those whose time is over at ``now`` are left out; the second value is how many.
        """
        taken: list[Entry] = []
        lapsed, room = 0, most
        while self._entries:
            number = next(iter(self._entries))
            until = self._entries[number].until
            if until is not None and until <= now:
                self._remove(number)
                lapsed += 1
                continue
            room -= self._entries[number].size
            if taken and room < 0:
                break
            taken.append(self._remove(number))
        return taken, lapsed

    def _fits(self, entry: Entry) -> bool:
        return self.size + entry.size <= self._limits.bytes and len(self._entries) < self._limits.messages

    def _append(self, entry: Entry) -> None:
        self._entries[self._next] = entry
        if entry.ephemeral:
            self._ephemeral[self._next] = None
        if entry.key is not None:
            self._keys[entry.key] = self._next
        self._next += 1
        self.size += entry.size

    def _remove(self, number: int) -> Entry:
        entry = self._entries.pop(number)
        if entry.ephemeral:
            del self._ephemeral[number]
        if entry.key is not None:
            del self._keys[entry.key]
        self.size -= entry.size
        return entry
