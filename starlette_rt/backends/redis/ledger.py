"""What may happen once and who may come no more, for all nodes of one Redis.

The law of this file: Redis decides while it is there. Beside it stands the ledger in memory, which knows what runs
on this node: a repetition that comes back here waits without asking Redis, and while Redis is away keys are claimed
on this node alone, and the claim says so. What came of them is told when Redis is back. Every claim has a name of
its own that begins with the generation of its node, so that a command which is said twice does nothing twice, and
the claim of a node that has gone can change hands.

A key of Redis holds one claim or its answer; `lua/claim.lua` says how. Revocations are one sorted set, of which each
node has a copy: a handshake asks nobody.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import anyio

from ...exceptions import Unavailable
from ..base import Claim
from ..memory import FREE, Clock, MemoryLedger, bounded
from .connection import FORMAT, Link, Script, escaped, lifetime
from .nodes import Nodes

CLAIM, SETTLE, RELEASE, REVOKE = (Script(name) for name in ("claim", "claim_settle", "claim_release", "revoke"))
SCRIPTS = (CLAIM, SETTLE, RELEASE, REVOKE)

PAUSES = 0.02, 0.5  # seconds between two looks at what runs on another node: the first, and the longest
RETRIES = 0.5, 5.0  # seconds until something is told again that Redis has refused: the first, and the longest
OWED = 10_000  # verdicts that wait for Redis to come back; beyond, the oldest goes
RULES = 500  # revocations in one command
FOREVER = 9e15  # milliseconds: the last that a sorted set tells apart from the one before


class RedisLedger:
    """Claims, answers and revocations of all nodes of one Redis. See `Ledger`."""

    def __init__(self, link: Link, nodes: Nodes, wall: Clock = time.time) -> None:
        self.fail_open: bool = True
        self._link, self._nodes = link, nodes
        self._here = MemoryLedger(wall)
        self._owed: OrderedDict[str, str] = OrderedDict()  # key -> the claim to give back; empty: it is settled
        self._telling = Errand(link, self._tell)
        self._loading = Errand(link, self.load)
        self._loaded: object = None  # the life of the link in which revocations were read
        link.on_resumed.append(self._loading.run)
        nodes.on_held.append(self._came)

    async def _came(self) -> None:
        """Redis is there, and may know nothing of what this node does."""
        self._loading.run()
        self._telling.run()

    # Once.

    async def claim(self, key: str, ttl: float, *, shared: bool = False) -> Claim:
        name = f"{self._nodes.generation}.{secrets.token_urlsafe(9)}"
        mine = await self._here.claim(key, ttl, holder=name)
        if mine.state != "first":
            return mine
        try:
            found, left = await self._ask(key, ttl, name)
        except Unavailable:
            if shared:
                await self._give_back(key, name)
                raise
            return Claim("first", name, local=True)
        except BaseException:
            await self._give_back(key, name)
            raise
        if found.state == "answered":
            await self._here.settle(key, found.answer, left)
        elif found.state == "running":
            await self._here.release(key, name)
        return found

    async def _ask(self, key: str, ttl: float, name: str) -> tuple[Claim, float]:
        """Return what Redis says of ``key``, and for how many seconds an answer stays."""
        found, left = await self._asked(key, ttl, name, "")
        if found.state == "running" and self._lost(found.holder):
            return await self._asked(key, ttl, name, found.holder)
        return found, left

    async def _asked(self, key: str, ttl: float, name: str, heir_of: str) -> tuple[Claim, float]:
        reply = await self._link.call(CLAIM, [self._key(key)], [FORMAT, name, lifetime(ttl), heir_of])
        match reply:
            case [b"answered", answer, left]:
                return Claim("answered", "", answer), left / 1000
            case [b"running", holder]:
                return Claim("running", holder.decode()), 0.0
            case [b"lost"]:
                return Claim("lost", name), 0.0
        return Claim("first", name), 0.0

    async def settle(self, key: str, answer: bytes, ttl: float) -> bytes:
        answer = bounded(answer)
        try:
            other = await self._link.call(SETTLE, [self._key(key)], [FORMAT, answer, lifetime(ttl)])
        except Unavailable:
            stays = await self._here.settle(key, answer, ttl)
            self._owe(key, "")
            return stays
        stays = answer if other is None else bytes(other)
        await self._here.settle(key, stays, ttl)
        return stays

    async def release(self, key: str, holder: str) -> None:
        await self._here.release(key, holder)
        try:
            await self._link.call(RELEASE, [self._key(key)], [holder])
        except Unavailable:
            self._owe(key, holder)

    async def outcome(self, key: str, deadline: float) -> Claim:
        end = self._link.tasks.time() + deadline
        found = await self._here.outcome(key, deadline)  # at once where it does not run here
        return found if found.state != "free" else await self._watch(key, end)

    async def _watch(self, key: str, end: float) -> Claim:
        """Look at what runs on another node until it is over; what was seen last holds while Redis is away."""
        found, (pause, longest) = FREE, PAUSES
        while True:
            found = await self._seen(key, found)
            now = self._link.tasks.time()
            if found.state != "running" or now >= end:
                return found
            await anyio.sleep(min(pause, end - now))
            pause = min(2 * pause, longest)

    async def _seen(self, key: str, before: Claim) -> Claim:
        try:
            kept: bytes | None = await self._link.command("GET", self._key(key))
            if kept is None:
                return FREE
            if kept[1:2] == b"a":
                return Claim("answered", "", kept[2:])
            holder = kept[2:].decode()
            return Claim("lost" if self._lost(holder) else "running", holder)
        except Unavailable:
            return before

    def _lost(self, name: str) -> bool:
        """Whether the node that made a claim lives no more."""
        return not self._nodes.alive(name.rpartition(".")[0])

    def _key(self, key: str) -> bytes:
        return self._link.key("o", f"{{{escaped(key)}}}")

    # What Redis has not heard.

    async def _give_back(self, key: str, name: str) -> None:
        """Take a claim back of which nobody knows whether Redis has it."""
        await self._here.release(key, name)
        self._owe(key, name)

    def _owe(self, key: str, name: str) -> None:
        """Remember what to tell: a verdict outweighs that a claim is given back."""
        if self._owed.get(key) != "":
            self._owed[key] = name
        if len(self._owed) > OWED:
            self._owed.popitem(last=False)
        self._telling.run()

    async def _tell(self) -> None:
        """Tell Redis all that it has not heard. Raises `Unavailable`."""
        while self._owed:
            key, name = next(iter(self._owed.items()))
            await self._told(key, name)
            if self._owed.get(key) == name:
                del self._owed[key]

    async def _told(self, key: str, name: str) -> None:
        if name:
            await self._link.call(RELEASE, [self._key(key)], [name])
            return
        claim, left = self._here.look(key)
        if claim.state == "answered":
            await self._link.call(SETTLE, [self._key(key)], [FORMAT, claim.answer, lifetime(left)])

    # Revocations.

    async def revoke(self, rule: str, until: float) -> None:
        self.note(rule, until)
        try:
            await self._link.call(REVOKE, [self._rules], [0, *spelled([(rule, until)])])
        except Unavailable:
            self._loading.run()
            raise

    async def revoked(self, rules: Sequence[str]) -> bool:
        if not self.fail_open and self._loaded is not self._link.tasks:
            raise Unavailable("revocations could not be read yet")
        return await self._here.revoked(rules)

    def note(self, rule: str, until: float) -> None:
        self._here.note(rule, until)

    def revocations(self) -> list[tuple[str, float]]:
        return self._here.revocations()

    async def load(self) -> None:
        reply = await self._link.call(REVOKE, [self._rules], [1])
        known = {rule.decode("utf-8", "surrogatepass"): float(ms) for rule, ms in zip(*[iter(reply)] * 2, strict=True)}
        for rule, ms in known.items():
            self.note(rule, ms / 1000)
        self._loaded = self._link.tasks
        unknown = [(rule, until) for rule, until in self.revocations() if wall_ms(until) > known.get(rule, 0.0)]
        for start in range(0, len(unknown), RULES):
            await self._link.call(REVOKE, [self._rules], [0, *spelled(unknown[start : start + RULES])])

    @property
    def _rules(self) -> bytes:
        return self._link.key("{revoked}")


class Errand:
    """Something to be done in Redis, by one task at a time, until it has succeeded or Redis is away."""

    def __init__(self, link: Link, do: Callable[[], Awaitable[None]]) -> None:
        self._link, self._do = link, do
        self._wanted = False
        self._busy: object = None  # the life of the link in which a task is at it

    def run(self) -> None:
        """Do it, or do it again; does nothing while Redis is away."""
        self._wanted = True
        if self._link.up and self._busy is not self._link.tasks:
            self._busy = self._link.tasks
            self._link.tasks.spawn(self._run)

    async def _run(self) -> None:
        pause, longest = RETRIES
        try:
            while self._wanted and self._link.up:
                self._wanted = False
                try:
                    await self._do()
                except Unavailable:
                    self._wanted = True
                    await anyio.sleep(pause)
                    pause = min(2 * pause, longest)
        finally:
            self._busy = None


def spelled(rules: Iterable[tuple[str, float]]) -> list[Any]:
    """Return revocations as `lua/revoke.lua` takes them."""
    return [part for rule, until in rules for part in (wall_ms(until), rule.encode("utf-8", "surrogatepass"))]


def wall_ms(until: float) -> int:
    """Return a wall-clock time in milliseconds; for ever is a long time."""
    return round(min(until * 1000, FOREVER))
