"""Who is here: the members of one group, and what changed since the watchers last heard.

The law of this file: pure data. Time is an argument, in seconds of one clock that never steps back;
nothing here waits, sends, encodes or knows a connection beyond its id. The words are Phoenix's: a member
is a key (a user) with one meta per connection, and each meta has a `ref`. Metas are taken as they are
and shared: their size is checked before they come here, and nobody changes one afterwards.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, islice
from typing import Any

Meta = dict[str, Any]  # a JSON object; once tracked it also carries its "ref"


@dataclass(frozen=True, slots=True)
class Member:
    """One user of a group: its key, and one meta per connection, the newest last."""

    key: str
    metas: tuple[Meta, ...]


@dataclass(frozen=True, slots=True)
class Diff:
    """What changed, net: metas that came and metas that went, by key, and why members are gone.

    It turns the state of ``version - 1`` into that of ``version``: of each key drop the metas whose ref
    is in ``leaves``, then append those in ``joins``; a key without metas is gone. An update is a leave
    and a join of one key. ``reasons`` has an entry for each key that is gone altogether.
    """

    version: int
    joins: dict[str, tuple[Meta, ...]]
    leaves: dict[str, tuple[Meta, ...]]
    reasons: dict[str, str]


@dataclass(frozen=True, slots=True)
class State:
    """All members as of one version, in the order of their keys. It never changes."""

    version: int
    members: tuple[Member, ...]

    def page(self, after: str | None = None, limit: int = 200) -> tuple[tuple[Member, ...], str | None]:
        """Return up to ``limit`` members whose key follows ``after``, and the key to go on from, None at the end."""
        start = 0 if after is None else bisect_right(self.members, after, key=_key)
        page = self.members[start : start + limit]
        return page, page[-1].key if start + limit < len(self.members) else None


class Roster:
    """The members of one group, as they are and as its watchers know them.

    *As they are* is what ``members()`` and ``count()`` tell. *As the watchers know them* is what the diffs
    taken so far add up to: ``state()`` and ``page()`` tell that, so whoever is given a state at any moment
    and every diff taken after it knows exactly what all the others know. What changed since the last diff
    is in no state yet. Where nobody watches, the diffs may wait; they are netted, and do not grow beyond the
    members. Take that diff and drop it before the first watcher gets a state.

    ``close`` is for a connection that ended: its meta lingers, and is still shown, until the grace is over.
    The next ``track`` of the same key takes it over: with equal content nothing has happened, with other
    content it is an update. Every verb first lets go of what has outlived its grace.
    """

    __slots__ = (
        "_deadlines",
        "_known",
        "_lingering",
        "_members",
        "_metas",
        "_reasons",
        "_refs",
        "_state",
        "_tracked",
        "_version",
    )

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._tracked: dict[str, tuple[str, Meta]] = {}  # connection -> key and meta
        self._metas = 0
        self._lingering: dict[str, dict[str, tuple[float, Meta]]] = {}  # key -> ref -> deadline and meta
        self._deadlines: list[tuple[float, str, str]] = []  # a heap of deadline, key, ref; some taken over since
        self._known: dict[str, tuple[Meta, ...]] = {}  # the metas watchers know, of each key changed since
        self._reasons: dict[str, str] = {}  # of keys in _known that are gone
        self._refs = count(1)
        self._version = 0
        self._state: State | None = None

    def track(self, key: str, connection: str, meta: Meta, now: float) -> None:
        """Show ``connection`` under ``key`` with ``meta``; once tracked, this is an update.

        A ``ref`` of the host in ``meta`` is overwritten. Raises TypeError for what is no JSON object.
        """
        _check_meta(meta)
        self.expire(now)
        tracked = self._tracked.get(connection)
        if tracked is not None and tracked[0] != key:
            self.untrack(connection, now)
            tracked = None
        old = self._take_over(key, meta) if tracked is None else tracked[1]
        self._tracked[connection] = (key, self._show(key, old, meta))

    def update(self, connection: str, meta: Meta, now: float) -> bool:
        """Replace the meta of ``connection`` under a new ref; equal content changes nothing. False: not tracked."""
        if connection not in self._tracked:
            return False
        self.track(self._tracked[connection][0], connection, meta, now)
        return True

    def untrack(self, connection: str, now: float, reason: str = "left") -> bool:
        """Take ``connection`` out at once. False: it was not tracked."""
        self.expire(now)
        tracked = self._tracked.pop(connection, None)
        if tracked is None:
            return False
        self._swap(*tracked, None, reason)
        return True

    def close(self, connection: str, now: float, grace: float) -> bool:
        """Let the meta of a connection that ended linger for ``grace`` seconds. False: it was not tracked."""
        self.expire(now)
        tracked = self._tracked.pop(connection, None)
        if tracked is None:
            return False
        key, meta = tracked
        self._lingering.setdefault(key, {})[meta["ref"]] = (now + grace, meta)
        heappush(self._deadlines, (now + grace, key, meta["ref"]))
        self.expire(now)
        return True

    def expire(self, now: float) -> bool:
        """Let go of what has outlived its grace. True: someone has left."""
        left = False
        while self._deadlines and self._deadlines[0][0] <= now:
            due, key, ref = heappop(self._deadlines)
            deadline, meta = self._lingering.get(key, {}).get(ref, (None, None))
            if deadline == due:  # else it was taken over meanwhile
                self._unlinger(key, ref)
                self._swap(key, meta, None)
                left = True
        return left

    @property
    def deadline(self) -> float | None:
        """When ``expire`` may next have something to do; what was taken over meanwhile makes it early, never late."""
        return self._deadlines[0][0] if self._deadlines else None

    @property
    def changed(self) -> bool:
        """Whether ``take_diff`` would return a diff."""
        return bool(self._known)

    @property
    def empty(self) -> bool:
        """Nobody here, nothing lingering, nothing untold: if nobody watches it either, forget it."""
        return not self._members and not self._known

    def members(self) -> dict[str, Member]:
        """Return the members as they are, by key, in no promised order."""
        return dict(self._members)

    def count(self, connections: bool = False) -> int:
        """Return how many members, or how many metas of theirs, are shown now. Reads no list."""
        return self._metas if connections else len(self._members)

    def take_diff(self) -> Diff | None:
        """Return what changed since the last diff, or None; from here on the watchers know it."""
        if not self._known:
            return None
        known, self._known = self._known, {}
        reasons, self._reasons = self._reasons, {}
        self._version, self._state = self._version + 1, None
        shown = {key: self._shown(key) for key in known}
        return Diff(
            self._version,
            joins={key: came for key in known if (came := _without(shown[key], known[key]))},
            leaves={key: went for key in known if (went := _without(known[key], shown[key]))},
            reasons={key: reason for key, reason in reasons.items() if not shown[key]},
        )

    def state(self) -> State:
        """Return the members as the watchers know them: the same object until a diff is taken."""
        if self._state is None:
            known = self._members | {key: Member(key, metas) for key, metas in self._known.items()}
            members = (member for member in known.values() if member.metas)
            self._state = State(self._version, tuple(sorted(members, key=_key)))
        return self._state

    def page(self, after: str | None = None, limit: int = 200) -> tuple[tuple[Member, ...], str | None]:
        """Return a page of ``state()``."""
        return self.state().page(after, limit)

    def _shown(self, key: str) -> tuple[Meta, ...]:
        member = self._members.get(key)
        return member.metas if member else ()

    def _show(self, key: str, old: Meta | None, meta: Meta) -> Meta:
        """Put ``meta`` in the place of ``old``, unless they say the same; return the one that is shown."""
        if old is not None and _same(old, meta):
            return old
        new = {**meta, "ref": f"{next(self._refs):x}"}
        self._swap(key, old, new)
        return new

    def _swap(self, key: str, old: Meta | None, new: Meta | None, reason: str = "left") -> None:
        """Drop ``old`` from the metas of ``key`` and append ``new``, where they are; remember what watchers know."""
        before = self._shown(key)
        known = self._known.setdefault(key, before)
        after = before if old is None else tuple(meta for meta in before if meta is not old)
        after = after if new is None else (*after, new)
        self._metas += len(after) - len(before)
        if after:
            self._members[key] = Member(key, after)
        else:
            del self._members[key]
            self._reasons[key] = reason
        if after == known:  # what came has gone between two diffs: nobody will ever hear of it
            del self._known[key]
            self._reasons.pop(key, None)

    def _take_over(self, key: str, meta: Meta) -> Meta | None:
        """Return a lingering meta of ``key``: among the hundred oldest the one that says the same, else the oldest."""
        waiting = [old for _, old in islice(self._lingering.get(key, {}).values(), 100)]
        if not waiting:
            return None
        old = next((old for old in waiting if _same(old, meta)), waiting[0])
        self._unlinger(key, old["ref"])
        return old

    def _unlinger(self, key: str, ref: str) -> None:
        del self._lingering[key][ref]
        if not self._lingering[key]:
            del self._lingering[key]


def _key(member: Member) -> str:
    return member.key


def _without(metas: tuple[Meta, ...], others: tuple[Meta, ...]) -> tuple[Meta, ...]:
    refs = {meta["ref"] for meta in others}
    return tuple(meta for meta in metas if meta["ref"] not in refs)


def _same(old: Meta, meta: Meta) -> bool:
    """Whether both say the same in JSON, where 1, 1.0 and true are three values, which == does not tell apart."""
    new = {**meta, "ref": old["ref"]}
    return old == new and repr(old) == repr(new)


def _check_meta(meta: object) -> None:
    if not isinstance(meta, dict) or not all(isinstance(name, str) for name in meta):
        raise TypeError(f"a presence meta is a JSON object, a dict with str keys, not {meta!r:.80}")
