"""What a group remembers: publications in a chain, places in it, and whether two ends of it fit together.

The law of this file: pure data. Time and randomness are arguments; nothing here waits, sends or knows a
connection. Each publication of a group with history carries its ``offset``, a random ``tag``, and as ``prev``
the tag of the one before it. So two ends fit if offset and tag agree, and not merely the number: a log that
was set back and has gone on elsewhere reuses the numbers, never the tags. What cannot be proven is a break.
"""

from __future__ import annotations

import math
import random
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec

from .exceptions import ConfigurationError

V = TypeVar("V")

Random = Callable[[], str]
Link = Literal["next", "seen", "break"]

SEEN = 256  # ids that a log, and each node that follows it, remembers of what was published last
IDS_TTL = 3600.0  # seconds after the last publication during which a log remembers them
EPOCH_TTL = 86400.0  # seconds after its last use during which a log keeps at least its epoch and its top
GROUPS = 10_000  # names of groups whose policy is remembered


class Position(msgspec.Struct, frozen=True):
    """A place in a group's history: after the publication ``offset``, whose tag is ``tag``."""

    epoch: str
    offset: int
    tag: str

    def asdict(self) -> dict[str, Any]:
        """Return it as JSON data, for a page that hands it to its client."""
        return msgspec.structs.asdict(self)


class Publication(msgspec.Struct, frozen=True):
    """One broadcast on its way: plain data, so that any backend can carry it.

    ``json`` is the data spelled as JSON, ``exclude`` the session that does not get it. ``id`` names it, so
    that one seen before is recognised; ``once`` says that the name came out of a client's event: then it can
    come again, even from another process. ``offset``, ``tag`` and ``prev`` are its place in the chain of a
    group with history. The tag belongs to the place: what is published again gets another one, or the place
    that it has. One with a ``sender`` is a whisper of that member, over after ``expires_ms``, or the end of
    one (``stop``).
    """

    group: str
    event: str
    data: Any
    json: bytes
    exclude: str | None = None
    ephemeral: bool = False
    key: str | None = None
    id: str = ""
    once: bool = False
    offset: int | None = None
    tag: str = ""
    prev: str = ""
    sender: str | None = None
    expires_ms: int | None = None
    stop: bool = False


@dataclass(frozen=True, slots=True)
class History:
    """What is kept of a group: the last ``size`` events, until ``ttl`` seconds after the last one.

    Raises ConfigurationError for numbers that cannot work.
    """

    size: int
    ttl: float

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ConfigurationError(f"History(size={self.size!r}): size is how many events are kept, 1 or more")
        if isinstance(self.ttl, bool) or not isinstance(self.ttl, int | float) or not 0 < self.ttl < math.inf:
            raise ConfigurationError(f"History(ttl={self.ttl!r}): ttl is how many seconds they are kept, more than 0")


WRITE = 'write history={"board:*": History(size=100, ttl=300)}'


class Policies:
    """Which groups have a history: by pattern (`fnmatch`, with case), the first that matches.

    Raises ConfigurationError for what is no pattern or no `History`.
    """

    def __init__(self, patterns: Mapping[str, History] | None = None) -> None:
        if not isinstance(patterns, Mapping | None):
            raise ConfigurationError(f"history={patterns!r}: {WRITE}")
        self._patterns = tuple((patterns or {}).items())
        for pattern, history in self._patterns:
            if not isinstance(pattern, str) or not pattern or not isinstance(history, History):
                raise ConfigurationError(f"history={{{pattern!r}: {history!r}}}: {WRITE}")
        self.of: Callable[[str], History | None] = lru_cache(GROUPS)(self._first) if self._patterns else nothing

    def _first(self, group: str) -> History | None:
        kept = (history for pattern, history in self._patterns if matches(group, pattern))
        return next(kept, None)


def matches(group: str, pattern: str) -> bool:
    """Whether ``pattern`` means ``group``. What is pushed to people is meant by patterns that begin so, like ``~*``."""
    return (group[:1] == "~") == (pattern[:1] == "~") and fnmatchcase(group, pattern)


def nothing(group: str) -> None:
    """Return what is kept of a group where no pattern was given."""


def new_tag() -> str:
    """Return 32 random bits, which tell two publications with the same offset apart."""
    return f"{random.getrandbits(32):08x}"


def new_epoch() -> str:
    """Return a name that no other log has."""
    return secrets.token_urlsafe(9)


class Window(Generic[V]):
    """The last ``size`` keys that were put, with a value each; the oldest is forgotten first."""

    __slots__ = ("_seen", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._seen: OrderedDict[Hashable, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._seen

    def get(self, key: Hashable) -> V | None:
        """Return the value of ``key``, ``None`` if it has not been seen lately."""
        return self._seen.get(key)

    def put(self, key: Hashable, value: V) -> None:
        """Remember ``key`` as the newest."""
        self._seen[key] = value
        self._seen.move_to_end(key)
        if len(self._seen) > self._size:
            self._seen.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._seen.clear()


class Reading(NamedTuple):
    """What a log holds at one moment: where it ends, and the last publications up to there."""

    position: Position
    entries: Sequence[Publication]


# The chain.


def follows(position: Position, publication: Publication) -> bool:
    """Whether ``publication`` is the next one after ``position``."""
    return publication.offset == position.offset + 1 and publication.prev == position.tag


def after(position: Position, publication: Publication) -> Position:
    """Return the place behind ``publication``, which follows ``position``."""
    return Position(position.epoch, position.offset + 1, publication.tag)


def link(position: Position, publication: Publication, tag_at: Callable[[int], str | None]) -> Link:
    """Say how ``publication`` fits behind ``position``; ``tag_at`` knows the tags of what was before.

    ``seen`` is a duplicate. ``break`` is everything else: something is missing, or the log is not what it was.
    """
    if follows(position, publication):
        return "next"
    offset = publication.offset or 0
    return "seen" if offset <= position.offset and tag_at(offset) == publication.tag else "break"


def begin(position: Position, top: Position, kept: int) -> int | None:
    """Return where, among the last ``kept`` publications up to ``top``, that begins which ``position`` lacks.

    It is ``kept`` if nothing is lacking, and ``None`` if it cannot be among them. Whether the first one
    really follows ``position`` is still to be seen.
    """
    if position.epoch != top.epoch:
        return None
    if position.offset == top.offset:
        return kept if position.tag == top.tag else None
    start = kept - (top.offset - position.offset)
    return start if 0 <= start < kept else None


def missed(position: Position, reading: Reading) -> list[Publication] | None:
    """Return what was published after ``position``, or ``None`` if that cannot be proven from ``reading``.

    It is proven if the epoch is the same, and either nothing was published, or the next one is kept, was
    said after the one with the position's tag, and from there to the top none is lacking.
    """
    start = begin(position, reading.position, len(reading.entries))
    if start is None:
        return None
    lacking = list(reading.entries[start:])
    for publication in lacking:
        if not follows(position, publication):
            return None
        position = after(position, publication)
    return lacking if position == reading.position else None


def contradicts(reading: Reading, offset: int, tag: str) -> bool:
    """Whether ``reading`` proves that the publication ``offset`` with this tag is not, or no longer, in its chain."""
    top, entries = reading
    if offset >= top.offset:
        return (offset, tag) != (top.offset, top.tag)
    index = len(entries) - (top.offset - offset) - 1
    if index >= 0:
        return entries[index].tag != tag
    return index == -1 and entries[0].prev != tag


def merge(
    position: Position, reading: Reading, live: Iterable[Publication]
) -> tuple[list[Publication], list[Publication]] | None:
    """Put together what was read and what came ``live`` since the reading was asked for, by offset.

    Returns what follows ``position``, in order and each once, and what of ``live`` does not fit behind that:
    for it one has to read again. ``None`` if the reading does not continue ``position``.
    """
    told = missed(position, reading)
    if told is None:
        return None
    end, left = reading.position, []
    oldest = end.offset - len(reading.entries)  # the one before those that are kept: its tag is known too
    tags = {end.offset: end.tag}
    for entry in reversed(reading.entries):
        tags[offset_of(entry) - 1] = entry.prev
    for publication in sorted(live, key=offset_of):
        if follows(end, publication):
            told.append(publication)
            end = after(end, publication)
            tags[end.offset] = end.tag
        elif offset_of(publication) >= oldest and tags.get(offset_of(publication)) != publication.tag:
            left.append(publication)
    return told, left


def offset_of(publication: Publication) -> int:
    """Return the offset, which everything in a chain has."""
    return publication.offset or 0


# The log.


class Log:
    """The one true state of a group with history: its epoch, where it ends, and the last publications.

    The epoch is made with the log, which is when the first one asks, be it a join or a publisher: a position
    without an epoch would fit any log that is as empty. ``ttl`` counts from the last publication; epoch and top
    are kept longer, so that who missed nothing is told so.
    """

    __slots__ = ("_entries", "_history", "_ids", "_published", "_used", "position")

    def __init__(self, history: History, now: float, epoch: Random = new_epoch) -> None:
        self.position: Position = Position(epoch(), 0, "")
        self._history = history
        self._entries: deque[Publication] = deque(maxlen=history.size)
        self._ids: Window[Position] = Window(SEEN)
        self._published = self._used = now

    def append(
        self, publication: Publication, now: float, tag: Random = new_tag
    ) -> tuple[Position, Publication | None]:
        """Return the place that ``publication`` got, and itself with that place; ``None`` if it had got it before."""
        self._touch(now)
        if publication.id and (first := self._ids.get(publication.id)) is not None:
            return first, None
        epoch, offset, prev = self.position.epoch, self.position.offset + 1, self.position.tag
        self.position = Position(epoch, offset, tag())
        placed = msgspec.structs.replace(publication, offset=offset, tag=self.position.tag, prev=prev)
        self._entries.append(placed)
        self._published = now
        if publication.id:
            self._ids.put(publication.id, self.position)
        return self.position, placed

    def read(self, now: float) -> Reading:
        """Return what is kept."""
        self._touch(now)
        return Reading(self.position, tuple(self._entries))

    def renew(self, seen: Position, now: float, epoch: Random = new_epoch) -> Position:
        """Begin a new epoch where the old one ends, if that is still where ``seen`` is; return where it ends now."""
        self._touch(now)
        mine = self.position
        if (mine.epoch, mine.tag) == (seen.epoch, seen.tag):
            self.position = Position(epoch(), mine.offset, mine.tag)
        return self.position

    def outlived(self, now: float) -> bool:
        """Whether the time of the log itself is over. One in which nothing was ever said has less of it."""
        kept = EPOCH_TTL if self.position.offset else 0.0
        return now >= self._used + max(self._history.ttl, kept)

    def expire(self, now: float) -> None:
        """Forget the publications, and the ids, whose time is over."""
        if now >= self._published + self._history.ttl:
            self._entries.clear()
        if now >= self._published + max(self._history.ttl, IDS_TTL):
            self._ids.clear()

    def _touch(self, now: float) -> None:
        self._used = now
        self.expire(now)
