"""A second client of the protocol, written from docs/protocol.md alone; the tests drive servers with it.

The law of this file: it imports nothing of the package, and does what the page says. Where the page leaves a choice, a
comment says which one was made. Every wait of a caller has a deadline; clock, sleep and chance are arguments.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import msgpack
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, NegotiationError, WebSocketException
from websockets.typing import Origin, Subprotocol

Frame = dict[str, Any]
Spelling = Literal["json", "msgpack"]
STATUS = {401: 4501, 403: 4503, 429: 4003, 503: 4005}  # an HTTP refusal as the close code that says the same
NO_VERSION_1 = -1  # how a client ended that found no version 1 on the route
REMEMBERED = 1000  # ids of events per group; the page does not say how many a client keeps


class Refused(Exception):
    """An ``error`` frame, of either side."""

    def __init__(self, code: str, message: str = "", temporary: bool = False, retry_after_ms: int | None = None):
        super().__init__(code, message)
        self.code, self.message, self.temporary, self.retry_after_ms = code, message, temporary, retry_after_ms


class Lost(Exception):
    """The connection ended before the answer came."""


def encode(value: Any, spelling: Spelling) -> str | bytes:
    if spelling == "msgpack":
        packed: bytes = msgpack.packb(value)
        return packed
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=lambda raw: base64.b64encode(raw).decode())


def decode(message: str | bytes) -> Any:
    return json.loads(message) if isinstance(message, str) else msgpack.unpackb(message)


def comes_back(code: int) -> bool:
    """Whether a client opens a new connection after this close code; what is not in the table is an accident."""
    return code not in (1000, 1003, NO_VERSION_1) and not 4500 <= code <= 4999


@dataclass
class Presence:
    """The members of a group: a state, and the diffs that turn it into the next one."""

    version: int | None = None  # None: nothing that a diff could be applied to
    members: dict[str, list[Frame]] = field(default_factory=dict)
    after: str | None = None

    def state(self, frame: Frame) -> None:
        self.version, self.after = frame["version"], frame["after"]
        self.members = {key: list(member["metas"]) for key, member in frame["members"].items()}

    def diff(self, frame: Frame) -> bool:
        """Apply it if it is the next one; False says that one before it is missing."""
        if self.version is None or frame["version"] <= self.version:
            return True
        if frame["version"] > self.version + 1:
            self.version = None
            return False
        self.version = frame["version"]
        for key, member in frame["leaves"].items():
            gone = {meta["ref"] for meta in member["metas"]}
            self.members[key] = [meta for meta in self.members.get(key, []) if meta["ref"] not in gone]
        for key, member in frame["joins"].items():
            self.members.setdefault(key, []).extend(member["metas"])
        self.members = {key: metas for key, metas in self.members.items() if metas}
        return True


@dataclass
class Group:
    """What the client knows of one group."""

    mine: bool = False  # the client joined it, and does so again when it comes back
    presence: str | None = None  # what it asked for
    meta: Frame | None = None  # what it tracks
    position: Frame | None = None
    inside: bool = False  # on this connection
    entered: Frame | None = None  # the position of a `joined`, while what is older is asked for
    holding: bool = False  # a join is unanswered
    held: list[Frame] = field(default_factory=list)
    seen: dict[str, None] = field(default_factory=dict)
    people: Presence = field(default_factory=Presence)
    count: int | None = None
    whispers: dict[tuple[str, str], tuple[Any, float]] = field(default_factory=dict)  # (event, from): data, until


@dataclass
class Item:
    """A frame that is sent until it has an answer that is not temporary."""

    frame: Frame
    answer: asyncio.Future[Any]
    sent: float | None = None  # when it was first sent, while nobody knows whether it arrived


class Client:
    """``async with Client(url) as client``: connected, and again after each loss, until the server says for good.

    What the server says to the application stands in ``heard``; ``hear`` takes from it. A ``stale`` frame is the
    client's own: the application has to fetch a group anew, or gets its ``snapshot``.
    """

    def __init__(
        self,
        url: str,
        *,
        spelling: Spelling = "json",
        token: Callable[[], str] | None = None,
        bearer: bool = False,
        session: str | None = None,
        origin: str | None = None,
        patience: float = 10.0,
        base: float = 0.1,
        cap: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.url, self.spelling, self.token, self.bearer, self.origin = url, spelling, token, bearer, origin
        self.session = session or secrets.token_urlsafe(18)
        self.patience, self.base, self.cap = patience, base, cap
        self.clock, self.sleep, self.uniform = clock, sleep, uniform
        self.welcome: Frame = {}
        self.groups: dict[str, Group] = {}
        self.handlers: dict[str, Callable[[Any], Awaitable[Any]]] = {}
        self.heard: list[Frame] = []
        self.log: list[Frame] = []  # every frame of the server
        self.gaps: list[tuple[str, int, int]] = []  # offsets that did not follow each other
        self.code: int | None = None  # the close code that ended it for good
        self.ready = asyncio.Event()  # groups are joined again, or it has ended
        self._socket: ClientConnection | None = None
        self._pending: dict[int, tuple[Frame, asyncio.Future[Any]]] = {}
        self._ref = 0
        self._queue: list[Item] = []
        self._work = asyncio.Event()
        self._news = asyncio.Event()
        self._retry_after = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._group = asyncio.TaskGroup()  # a bug in a task of the client ends the body of `async with`
        self._exits = AsyncExitStack()

    # ---- the connection

    async def __aenter__(self) -> Client:
        await self._exits.enter_async_context(self._group)
        self._exits.callback(self._cancel)
        self._spawn(self._run())
        return self

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._exits.__aexit__(*error)
        except BaseExceptionGroup as group:
            if group.exceptions != (error[1],):
                raise  # else the caller's own error goes on as it is

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self) -> None:
        attempt = 0
        while True:
            self.welcome, self._retry_after = {}, 0.0
            code = await self._live()
            if not comes_back(code):
                return self._end(code)
            attempt = 1 if self.welcome else attempt + 1
            jitter = self.uniform(0, min(self.cap, self.base * 2 ** min(attempt, 30)))
            await self.sleep(max(self._retry_after, jitter))

    def _end(self, code: int) -> None:
        self.code = code
        for item in self._queue:
            settle(item.answer, Lost(code))
        self.ready.set()

    async def _live(self) -> int:
        """One connection, from the handshake to its close code."""
        try:
            async with asyncio.timeout(self.patience):
                socket = await self._connect()
        except NegotiationError:
            return NO_VERSION_1
        except InvalidStatus as error:
            with suppress(ValueError, AttributeError, TypeError):
                said = json.loads(error.response.body or b"{}")
                self._retry_after = (said.get("retry_after_ms") or 0) / 1000
            return STATUS.get(error.response.status_code, 1006)
        except (OSError, TimeoutError, WebSocketException):
            return 1006
        before = set(self._tasks)
        try:
            if socket.subprotocol != f"rt.v1.{self.spelling}":
                return NO_VERSION_1
            self._socket = socket
            return await self._listen(socket)
        finally:
            self._socket = None
            self.ready.clear()
            for task in self._tasks - before:  # what belongs to this connection ends with it
                task.cancel()
            self._forget()
            await socket.close()

    async def _connect(self) -> ClientConnection:
        offers, headers = [f"rt.v1.{self.spelling}", f"rt.session.{self.session}"], {}
        token = self.token() if self.token else None
        if token and self.bearer:
            headers["Authorization"] = f"Bearer {token}"
        elif token:
            offers.append(f"rt.token.{token}")
        return await connect(
            self.url,
            subprotocols=[Subprotocol(each) for each in offers],
            additional_headers=headers,
            origin=Origin(self.origin) if self.origin else None,
            ping_interval=None,  # the pings of the protocol are enough
            close_timeout=1.0,
            max_size=None,  # `max_size` is what a client may say; the page sets no bound for the server
            proxy=None,
        )

    async def _listen(self, socket: ClientConnection) -> int:
        while True:
            quiet = self.welcome.get("ping_interval_ms", 0) + self.welcome.get("ping_timeout_ms", 0)
            try:
                async with asyncio.timeout(quiet / 1000 or self.patience):
                    message = await socket.recv()
            except TimeoutError:
                return 1006
            except ConnectionClosed:
                return socket.close_code or 1006
            value = decode(message)
            for frame in value if isinstance(value, list) else [value]:
                self.log.append(frame)
                await self._take(frame)

    def _forget(self) -> None:
        """What was true of one connection only. Refs, presence and whispers do not outlive it; positions do."""
        for _, answer in self._pending.values():
            settle(answer, Lost())
        self._pending.clear()
        for group in self.groups.values():
            group.inside, group.holding, group.entered = False, False, None
            group.count, group.people = None, Presence()
            group.held.clear()
            group.whispers.clear()

    def cut(self) -> None:
        """Lose the connection without a word, as a network does."""
        if self._socket:
            self._socket.transport.abort()

    # ---- what the server says

    async def _take(self, frame: Frame) -> None:
        match frame.get("type"):
            case "welcome":
                self.welcome = frame
                for group in self.groups.values():
                    group.holding = group.mine  # a `joined` from here on finds the join under way
                self._spawn(self._come_back())
                self._tell(frame)
            case "ping":
                with suppress(Lost):
                    await self.send({"type": "pong"})
            case "reply" | "error":
                self._answered(frame)
            case "event":
                self._event(frame)
            case "goodbye":
                self._retry_after = frame.get("retry_after_ms", 0) / 1000
                self._tell(frame)
            case "joined" | "left" | "reset" | "presence_state" | "presence_diff" | "presence_count" | "whisper":
                self._group_frame(frame, frame["group"])
                self._tell(frame)

    def _group_frame(self, frame: Frame, name: str) -> None:
        if frame["type"] == "joined":
            return self._entered(name, frame["position"])
        group = self.groups.get(name)
        if group is None:
            return
        match frame["type"]:
            case "left":
                if frame["rejoin"] and group.mine:
                    self._join_again(name)
                else:
                    del self.groups[name]
            case "reset":
                group.position = frame["position"]
                group.held.clear()
            case "presence_state":
                group.people.state(frame)
            case "presence_diff":
                if not group.people.diff(frame):  # the page does not say how to mend it: ask for the state again
                    self._join_again(name)
            case "presence_count":
                group.count, group.people.version = frame["count"], None
            case "whisper":
                key = (frame["event"], frame["from"])
                if frame.get("stop"):
                    group.whispers.pop(key, None)
                else:
                    until = self.clock() + frame.get("expires_ms", float("inf")) / 1000
                    group.whispers[key] = (frame.get("data"), until)

    def _event(self, frame: Frame) -> None:
        if "ref" in frame:
            self._spawn(self._called(frame))
        if "group" not in frame:
            return self._tell(frame)
        group = self.groups.get(frame["group"])
        if group is None:
            return
        if group.holding:
            return group.held.append(frame)
        if "offset" in frame and group.position:
            now, offset = group.position["offset"], frame["offset"]
            if offset <= now:
                return
            if offset > now + 1:
                self.gaps.append((frame["group"], now, offset))
            group.position = {**group.position, "offset": offset, "tag": frame["tag"]}
        self._show(group, frame)

    def _show(self, group: Group, frame: Frame) -> None:
        """Hand an event of a group to the application, unless it is not for it or its id was seen in this group."""
        if frame.get("skip") or frame.get("id") in group.seen:
            return
        if "id" in frame:
            group.seen[frame["id"]] = None
            if len(group.seen) > REMEMBERED:
                del group.seen[next(iter(group.seen))]
        self._tell(frame)

    def _tell(self, frame: Frame) -> None:
        self.heard.append(frame)
        self._news.set()

    async def _called(self, frame: Frame) -> None:
        answer: Frame = {"type": "error", "ref": frame["ref"], "code": "unknown_event", "message": "no handler"}
        with suppress(Lost):  # an answer belongs to the connection of the call
            if handler := self.handlers.get(frame["event"]):
                try:
                    answer = {"type": "reply", "ref": frame["ref"], "data": await handler(frame.get("data"))}
                except Refused as error:
                    answer |= {"code": error.code, "message": error.message}
            await self.send(answer)

    def _answered(self, frame: Frame) -> None:
        sent, answer = self._pending.pop(frame.get("ref", -1), (None, None))
        if sent is None or answer is None:
            return self._tell(frame)  # an error without ref
        if frame["type"] == "reply":
            if sent["type"] == "join":
                self._merge(sent, frame["data"])
            return settle(answer, frame.get("data"))
        refused = Refused(
            frame["code"], frame.get("message", ""), frame.get("temporary", False), frame.get("retry_after_ms")
        )
        if sent["type"] == "join" and not refused.temporary:
            self._not_joined(sent.get("group", ""), refused)
        settle(answer, refused)

    # ---- groups

    def _entered(self, name: str, position: Frame | None) -> None:
        group = self.groups.setdefault(name, Group())
        group.inside, group.entered = True, position
        if group.holding:
            return
        if group.position and position and group.position != position:
            self._join_again(name)
        else:
            group.position, group.entered = position, None

    def _join(self, name: str, last: int | None = None) -> Frame:
        """The frame that asks for what was missed; from here on the group's events are held back."""
        group = self.groups.setdefault(name, Group())
        group.holding = True
        frame: Frame = {"type": "join", "group": name}
        if last is not None:
            frame["last"] = last
        elif group.position:
            frame["position"] = group.position
        if group.presence:
            frame["presence"] = group.presence
        return frame

    def _join_again(self, name: str) -> None:
        async def ask(items: list[Item]) -> None:
            with suppress(Lost):
                await self._deliver(items)

        self._spawn(ask([self._item(self._join(name))]))

    def _merge(self, sent: Frame, data: Frame) -> None:
        """Take the events of a reply to a join, and then what was held back, each offset once."""
        name, position, asked = sent["group"], data["position"], sent.get("position")
        group = self.groups.setdefault(name, Group())
        held, group.held = group.held, []
        group.inside, group.holding, group.entered = True, False, None
        if data["recovered"]:
            now = group.position  # further on than what was asked from, if another join was answered meanwhile
            floor = (
                max(asked["offset"], now["offset"] if now and now["epoch"] == asked["epoch"] else -1) if asked else -1
            )
            frames = [each for each in data["events"] + held if each.get("offset", floor + 1) > floor]
        else:
            floor = position["offset"] if position else -1
            frames = data["events"] + [each for each in held if each.get("offset", floor + 1) > floor]
            self._tell({"type": "stale", "group": name, "snapshot": data.get("snapshot")})
        if position is not None:
            frames = [frame for _, frame in sorted({each["offset"]: each for each in frames}.items())]
            offsets = [floor] * bool(asked and data["recovered"]) + [each["offset"] for each in frames]
            self.gaps += [(name, a, b) for a, b in pairwise(offsets) if b != a + 1]
            if frames and frames[-1]["offset"] > position["offset"]:
                position = {**position, "offset": frames[-1]["offset"], "tag": frames[-1]["tag"]}
        group.position = position
        for frame in frames:
            self._show(group, frame)

    def _not_joined(self, name: str, refused: Refused) -> None:
        group = self.groups.get(name)
        if group is not None and group.inside:  # the server's own joining stands; what was asked for is lost
            group.mine = False
            data: Frame = {
                "position": group.entered or group.position,
                "recovered": group.entered is None,
                "events": [],
            }
            return self._merge({"group": name, "position": group.position}, data)
        self.groups.pop(name, None)
        self._tell({"type": "left", "group": name, "code": refused.code, "rejoin": False})

    # ---- what the client says

    async def send(self, *frames: Frame) -> None:
        await self.send_message(encode(frames[0] if len(frames) == 1 else list(frames), self.spelling))

    async def send_message(self, message: str | bytes) -> None:
        if self._socket is None:
            raise Lost
        try:
            async with asyncio.timeout(self.patience):
                await self._socket.send(message)
        except ConnectionClosed as error:
            raise Lost from error

    async def exchange(self, *frames: Frame) -> list[Any]:
        """Send one batch; the answer to each of its frames, in order: data or :class:`Refused`.

        The page sets no time for an answer: it comes, or the connection ends.
        """
        answers: list[asyncio.Future[Any]] = []
        numbered: list[Frame] = []
        for frame in frames:
            self._ref += 1
            answers.append(asyncio.get_running_loop().create_future())
            numbered.append({**frame, "ref": self._ref})
            self._pending[self._ref] = (frame, answers[-1])
        await self.send(*numbered)
        done = await asyncio.gather(*answers)
        for answer in done:
            if isinstance(answer, Lost):
                raise answer
        return done

    async def _come_back(self) -> None:
        """Join again, then be present again, then send what is unanswered and what comes."""
        with suppress(Lost):
            mine = [name for name, group in self.groups.items() if group.mine]
            await self._deliver([self._item(self._join(name)) for name in mine])
            metas = {name: group.meta for name, group in self.groups.items() if group.meta is not None}
            tracks = [{"type": "track", "group": name, "meta": meta} for name, meta in metas.items()]
            await self._deliver([self._item(each) for each in tracks])
            self.ready.set()
            while True:
                await self._deliver(self._queue)
                self._work.clear()
                await self._work.wait()

    async def _deliver(self, queue: list[Item]) -> None:
        """Stop and wait: a batch, all its answers, and again from the first that met a temporary error."""
        refusals = 0
        while queue:
            batch = self._fill(queue)
            for item in batch:
                item.sent = self.clock() if item.sent is None else item.sent
            answers = await self.exchange(*(item.frame for item in batch)) if batch else []
            again: list[Item] = []
            wait: list[int | None] = []
            for item, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Refused) and answer.temporary:
                    item.sent = None  # it was not handled, so it may wait as long as it must
                    again.append(item)
                    wait.append(answer.retry_after_ms)
                else:
                    settle(item.answer, answer)
            queue[: len(batch)] = again
            refusals = refusals + 1 if again else 0
            if again:
                own = self.uniform(0, min(self.cap, self.base * 2 ** min(refusals, 30)))
                await self.sleep(max((each / 1000 for each in wait if each is not None), default=own))

    def _fill(self, queue: list[Item]) -> list[Item]:
        """The first items that fit into one message; what can never be sent (again) is settled here."""
        room = max(1, min(1000, self.welcome["window"] - len(self._pending)))
        size, once = 2, self.welcome["once_ms"] / 1000
        batch: list[Item] = []
        for item in list(queue):
            encoded = encode({**item.frame, "ref": 2**53 - 1}, self.spelling)
            length = len(encoded.encode() if isinstance(encoded, str) else encoded) + 2
            if item.sent is not None and self.clock() - item.sent >= once:
                settle(item.answer, Refused("outcome_unknown", "too late to ask"))
                queue.remove(item)
            elif length + 2 > self.welcome["max_size"]:
                settle(item.answer, Refused("too_large", "no message holds it"))
                queue.remove(item)
            elif len(batch) == room or size + length > self.welcome["max_size"]:
                break
            else:
                size += length
                batch.append(item)
        return batch

    def _item(self, frame: Frame) -> Item:
        return Item(frame, asyncio.get_running_loop().create_future())

    # ---- for the application

    async def wait(self, coming: Awaitable[Any], deadline: float | None = None) -> Any:
        """Its answer, or Refused, Lost or TimeoutError."""
        async with asyncio.timeout(deadline or self.patience):
            answer = await coming
        if isinstance(answer, Refused | Lost):
            raise answer
        return answer

    async def connected(self, deadline: float | None = None) -> Client:
        await self.wait(self.ready.wait(), deadline)
        if self.code is not None:
            raise Lost(self.code)
        return self

    async def request(self, kind: str, *, deadline: float | None = None, **fields: Any) -> Any:
        """One frame and its answer: no second attempt."""
        await self.connected(deadline)
        (answer,) = await self.wait(self.exchange({"type": kind, **fields}), deadline)
        if isinstance(answer, Refused):
            raise answer
        return answer

    def post(self, event: str, data: Any = None, group: str | None = None) -> asyncio.Future[Any]:
        """Queue an event: sent in order, handled at most once, across losses of the connection."""
        frame: Frame = {"type": "event", "id": secrets.token_urlsafe(12), "event": event}
        frame |= {} if group is None else {"group": group}
        item = self._item(frame | ({} if data is None else {"data": data}))
        if self.code is not None:
            settle(item.answer, Lost(self.code))
        self._queue.append(item)
        self._work.set()
        return item.answer

    async def emit(self, event: str, data: Any = None, group: str | None = None, deadline: float | None = None) -> Any:
        return await self.wait(self.post(event, data, group), deadline)

    async def join(self, name: str, *, last: int | None = None, presence: str | None = None) -> Any:
        """Be in a group from now on; temporary errors are waited for."""
        await self.connected()
        group = self.groups.setdefault(name, Group())
        group.mine, group.presence = True, presence or group.presence
        item = self._item(self._join(name, last))
        await self.wait(self._deliver([item]))
        return await self.wait(item.answer)

    async def leave(self, name: str) -> Any:
        self.groups.pop(name, None)
        return await self.request("leave", group=name)

    async def track(self, name: str, meta: Frame, *, kind: Literal["track", "update"] = "track") -> Any:
        answer = await self.request(kind, group=name, meta=meta)
        self.groups[name].meta = meta
        return answer

    async def untrack(self, name: str) -> Any:
        self.groups[name].meta = None
        return await self.request("untrack", group=name)

    async def people(self, name: str, limit: int = 200) -> dict[str, list[Frame]]:
        """All members, page by page."""
        members: dict[str, list[Frame]] = {}
        after: Frame = {}
        while True:
            page = await self.request("presence", group=name, limit=limit, **after)
            members |= {key: member["metas"] for key, member in page["members"].items()}
            if page["after"] is None:
                return members
            after = {"after": page["after"]}

    async def whisper(self, name: str, event: str, data: Any = None, *, stop: bool = False) -> None:
        await self.connected()
        say: Frame = {"stop": True} if stop else {"data": data}
        await self.send({"type": "whisper", "group": name, "event": event, **say})

    def whispering(self, name: str) -> dict[tuple[str, str], Any]:
        """What is whispered in a group now, by event and sender."""
        now = self.clock()
        return {key: data for key, (data, until) in self.groups[name].whispers.items() if until > now}

    async def hear(self, deadline: float | None = None, **match: Any) -> Frame:
        """Take out the first frame that looks like this."""

        async def search() -> Frame:
            while True:
                for at, frame in enumerate(self.heard):
                    if match.items() <= {key: frame.get(key) for key in match}.items():
                        return self.heard.pop(at)
                self._news.clear()
                await self._news.wait()

        frame: Frame = await self.wait(search(), deadline)
        return frame


def settle(answer: asyncio.Future[Any], value: Any) -> None:
    """Errors are values here: a future that nobody looks at must not complain."""
    if not answer.done():
        answer.set_result(value)


def texts(frames: Iterable[Frame]) -> list[Any]:
    """What the events among the frames said, for the tests."""
    return [frame["data"]["text"] for frame in frames if frame["type"] == "event" and frame.get("event") == "said"]
