"""Publications between nodes: the logs in Redis, and what has no log by publish and subscribe alone.

The law of this file: a group without history never waits for Redis. Its members here have a message at once, other
nodes hear it, or hear it later from a queue that is short in time and number. A group with history has one truth,
its log in Redis: what is accepted there is heard by everybody in its order, and what is not is refused.

A message on a channel begins with the format. Behind it stands either ``@offset tag prev ``, the place in a log, or
``:node number ``, who says it and the how-many-eth it is: a number that has been heard is dropped, so that what may
have been lost on a broken connection can be said again.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from itertools import count
from typing import Any, NamedTuple

import msgspec

from ...exceptions import Unavailable
from ...frames import encode
from ...history import (
    EPOCH_TTL,
    IDS_TTL,
    SEEN,
    History,
    Position,
    Publication,
    Reading,
    Window,
    new_epoch,
    new_tag,
)
from ..base import Published
from .connection import FORMAT, Link, Script, lifetime
from .wire import Argument

logger: logging.Logger = logging.getLogger("starlette_rt")

QUEUE = 1000  # messages that wait for Redis to come back
QUEUE_TTL = 5.0  # seconds that they wait
ON_TIME = 250  # milliseconds from the socket to the log that a publication has: later its publisher has given up
NAMES = 10_000  # groups whose names in Redis are remembered
NODES = 1000  # nodes whose last numbers are remembered
NUMBERS = 2 * QUEUE  # of each of them
WINDOW = (1 << NUMBERS) - 1
GATHER = 1.0  # seconds that the other nodes have to hear again before they are told what has waited
REPEATABLE = 10_000  # ids of publications without history that this node remembers
ONCE_TTL = 3600_000  # milliseconds that Redis does

PUBLISH, READ, RENEW, ONCE = Script("publish"), Script("read"), Script("renew"), Script("once")
SCRIPTS = (PUBLISH, READ, RENEW, ONCE)

SHARED = Published(None, "yes")
START = b"%d" % FORMAT
KNOWN = (b"%d" % FORMAT, b"%d" % (FORMAT - 1))


class Envelope(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What travels of a publication; its group is the channel's. Fields are only ever added at the end."""

    event: str
    data: Any
    id: str = ""
    exclude: str | None = None
    once: bool = False
    ephemeral: bool = False
    key: str | None = None
    sender: str | None = None
    expires_ms: int | None = None
    stop: bool = False


pack: Callable[[Envelope], bytes] = msgspec.msgpack.Encoder().encode
unpack: Callable[[bytes], Envelope] = msgspec.msgpack.Decoder(Envelope).decode


class Message(NamedTuple):
    """What other nodes are told without a log: ``mark`` is the key of one that may come again."""

    channel: bytes
    body: bytes
    mark: bytes | None
    lasting: bool


class Names(NamedTuple):
    """What Redis calls a group: its channel, and the keys of its log."""

    channel: bytes
    keys: tuple[bytes, ...]


class Heard:
    """Which of the last numbers of a node have been heard: the highest, and a bit for each below it.

    As the anti-replay window of RFC 4303, section 3.4.3.
    """

    __slots__ = ("_bits", "_highest")

    def __init__(self) -> None:
        self._highest = self._bits = 0

    def is_new(self, number: int) -> bool:
        """Whether ``number`` has not been heard; one that is too far back counts as heard."""
        ahead = number - self._highest
        if ahead > 0:
            self._bits = (self._bits << ahead | 1) & WINDOW if ahead < NUMBERS else 1
            self._highest = number
            return True
        bit = 1 << -ahead
        if bit > WINDOW or self._bits & bit:
            return False
        self._bits |= bit
        return True


class RedisBroker:
    """Brings publications to every node through one Redis. See `Broker`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._deliver: Callable[[Publication], None] = ignore
        self._resumed: Callable[[], None] = nothing
        self._wanted: Counter[str] = Counter()
        self._queue: deque[tuple[float, Message]] = deque()
        self._numbers = count(1)
        self._names: Callable[[str], Names] = lru_cache(NAMES)(self._named)
        self._peers = 0  # nodes that heard before Redis went
        self._held = False  # whether what is said waits for Redis, or behind what has waited
        self._heard: Window[Heard] = Window(NODES)
        self._said: Window[None] = Window(REPEATABLE)
        self._mine, self._epochs = b"", ""
        link.on_up.append(self._back)
        link.on_down.append(self._away)
        link.on_resumed.append(lambda: self._resumed())

    # Living.

    async def start(self, deliver: Callable[[Publication], None], resumed: Callable[[], None]) -> None:
        self._deliver, self._resumed = deliver, resumed
        self._epochs = new_epoch()
        await self._link.start()
        self._held = not self._link.up
        self._mine = b"%b:%b " % (START, self._link.node.encode())

    async def stop(self) -> None:
        await self._link.stop()
        self._deliver, self._resumed, self._mine = ignore, nothing, b""
        self._wanted.clear()
        self._queue.clear()
        self._heard.clear()
        self._said.clear()

    def sweep(self) -> None:
        self._drop_old()

    def troubles(self) -> list[str]:
        return [self._link.trouble] if self._link.trouble else []

    # Hearing.

    def subscribe(self, group: str) -> None:
        self._wanted[group] += 1
        if self._wanted[group] == 1:
            self._link.subscribe(self._names(group).channel, lambda message: self._arrived(group, message))

    def unsubscribe(self, group: str) -> None:
        self._wanted[group] -= 1
        if not self._wanted[group]:
            del self._wanted[group]
            self._link.unsubscribe(self._names(group).channel)

    async def subscribed(self, group: str) -> None:
        await self._link.subscribed(self._names(group).channel)

    async def subscribed_elsewhere(self, groups: Collection[str]) -> set[str]:
        """Return those of ``groups`` that somebody hears: Redis counts the subscribers, and a dead node is none."""
        channels = {self._names(group).channel: group for group in groups}
        if not channels:
            return set()
        found = await self._link.command("PUBSUB", "NUMSUB", *channels)
        return {channels[name] for name, count in zip(found[::2], found[1::2], strict=True) if int(count)}

    def _named(self, group: str) -> Names:
        key = partial(self._link.group_key, group)
        return Names(key("b"), (key("h"), key("l"), key("i")))

    def _arrived(self, group: str, message: bytes) -> None:
        """Take what arrives on a group's channel."""
        if message.startswith(self._mine):
            return  # members here have had it at once
        if message[1:2] == b"@":
            if (placed := placed_of(group, message)) is not None:
                self._deliver(placed)
        elif message[:1] in KNOWN:
            node, number, payload = message[2:].split(b" ", 2)
            if self._is_new(node, int(number)):
                self._take(publication_of(group, payload))

    def _is_new(self, node: bytes, number: int) -> bool:
        """Whether ``node`` has not said ``number`` lately."""
        heard = self._heard.get(node)
        if heard is None:
            heard = Heard()
            self._heard.put(node, heard)
        return heard.is_new(number)

    def _take(self, publication: Publication) -> None:
        if not (publication.once and self._repeats(publication)):
            self._deliver(publication)

    def _repeats(self, publication: Publication) -> bool:
        name = (publication.group, publication.id)
        known = name in self._said
        self._said.put(name, None)
        return known

    # Saying.

    async def publish(self, publication: Publication, history: History | None) -> Published:
        if history is not None:
            return Published(await self._append(publication, history), "yes")
        if not self._mine:
            return Published(None, "no")  # it does not run
        if publication.once and self._repeats(publication):
            return SHARED
        self._deliver(publication)
        message = self._message(publication)
        if not self._held and self._say(message):
            return SHARED
        return Published(None, "queued" if message.lasting and self._wait(message) else "no")

    def _message(self, publication: Publication) -> Message:
        """Return what the other nodes are told of a publication without history."""
        channel = self._names(publication.group).channel
        body = b"%b%d %b" % (self._mine, next(self._numbers), pack(envelope_of(publication)))
        mark = self._link.group_key(publication.group, f"o:{publication.id}") if publication.once else None
        return Message(channel, body, mark, not publication.ephemeral)

    def _say(self, message: Message) -> bool:
        """Tell the other nodes, again if it may have been lost on the way; false if Redis is away."""
        lost = partial(self._wait, message) if message.lasting else None
        if message.mark is not None:
            return self._link.cast_call(ONCE, [message.mark], [message.channel, message.body, ONCE_TTL], lost=lost)
        return self._link.cast("PUBLISH", message.channel, message.body, lost=lost)

    def _wait(self, message: Message) -> bool:
        """Keep a message for later; false if there is no room."""
        self._drop_old()
        if len(self._queue) >= QUEUE:
            return False
        self._queue.append((self._link.tasks.time(), message))
        return True

    async def _append(self, publication: Publication, history: History) -> Position:
        link, names = self._link, self._names(publication.group)
        epoch = f"{self._epochs}{next(self._numbers):x}"  # for a log that has none: never the same twice
        letter: tuple[Argument, ...] = (
            names.channel,
            pack(envelope_of(publication)),
            new_tag(),
            publication.id,
            epoch,
            *kept(history),
        )
        latest = 0

        def last() -> tuple[Argument, ...]:
            nonlocal latest
            latest = latest or link.now_ms() + ON_TIME  # where it is said again the time has not begun again
            return link.run_id, latest

        reply = await link.call(PUBLISH, names.keys, letter, last=last)
        if reply[0] == b"late":
            await link.look_at_clock()
            raise Unavailable("redis took too long to take this in; nobody has got it")
        return Position(reply[1].decode(), reply[2], reply[3].decode())

    async def read(self, group: str, history: History) -> Reading:
        if self._link.wants(self._names(group).channel):
            await self.subscribed(group)  # what comes after the answer arrives live
        epoch, offset, tag, entries = await self._look(group, history, history.size)
        placed = [placed_of(group, entry) for entry in entries]
        return Reading(
            Position(epoch.decode(), offset, tag.decode()), tuple(each for each in placed if each is not None)
        )

    async def position(self, group: str, history: History) -> Position:
        epoch, offset, tag, _ = await self._look(group, history, 0)
        return Position(epoch.decode(), offset, tag.decode())

    async def _look(self, group: str, history: History, size: int) -> Any:
        link, keys = self._link, self._names(group).keys
        args: list[Argument] = [new_epoch(), link.run_id, *lives(history), size, FORMAT]
        return await link.call(READ, keys[:2], args)

    async def renew(self, group: str, history: History, seen: Position) -> Position:
        link, keys = self._link, self._names(group).keys
        args: list[Argument] = [new_epoch(), link.run_id, *lives(history), seen.epoch, seen.tag, FORMAT]
        reply = await link.call(RENEW, keys[:2], args)
        return Position(reply[0].decode(), reply[1], reply[2].decode())

    # Away.

    def _away(self) -> None:
        self._held, self._peers = True, self._link.peers

    def _back(self) -> None:
        """Redis is there: say what has waited, when the others hear again."""
        if self._held:
            self._link.tasks.spawn(self._flush)

    async def _flush(self) -> None:
        await self._link.gathered(self._peers, GATHER)
        if not self._link.up:
            return  # the next return is another one
        self._held = False
        self._drop_old()
        queue, self._queue = self._queue, deque()
        for _, message in queue:
            self._say(message)

    def _drop_old(self) -> None:
        while self._queue and self._link.tasks.time() - self._queue[0][0] > QUEUE_TTL:
            self._queue.popleft()


def envelope_of(publication: Publication) -> Envelope:
    """Return what of ``publication`` travels."""
    return Envelope(
        publication.event,
        publication.data,
        publication.id,
        publication.exclude,
        publication.once,
        publication.ephemeral,
        publication.key,
        publication.sender,
        publication.expires_ms,
        publication.stop,
    )


def publication_of(group: str, payload: bytes, offset: int | None = None, tag: str = "", prev: str = "") -> Publication:
    """Return the publication that has travelled as ``payload``."""
    it = unpack(payload)
    json = b"" if it.stop else encode(it.data)
    return Publication(
        group,
        it.event,
        it.data,
        json,
        it.exclude,
        it.ephemeral,
        it.key,
        it.id,
        it.once,
        offset,
        tag,
        prev,
        it.sender,
        it.expires_ms,
        it.stop,
    )


def placed_of(group: str, entry: bytes) -> Publication | None:
    """Return a publication of a log; ``None`` for one in a format that this version cannot read."""
    if entry[:1] not in KNOWN:
        return None
    offset, tag, prev, payload = entry[2:].split(b" ", 3)
    return publication_of(group, payload, int(offset), tag.decode(), prev.decode())


@lru_cache
def kept(history: History) -> tuple[int, ...]:
    """Return what a log is told of how much it keeps: size, life of log, state and ids, how many ids, format."""
    ids = lifetime(max(history.ttl, IDS_TTL))
    return history.size, lifetime(history.ttl), lives(history)[0], ids, SEEN, FORMAT


def lives(history: History) -> tuple[int, int]:
    """Return for how many milliseconds the state of a log lives, and that of one in which nothing was ever said."""
    return lifetime(max(history.ttl, EPOCH_TTL)), lifetime(history.ttl)


def nothing() -> None:
    """Hear that live delivery was interrupted while nothing runs."""


def ignore(_: Any) -> None:
    """Take what arrives while nothing runs."""
