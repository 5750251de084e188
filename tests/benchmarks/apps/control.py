"""The HTTP side of a Python contender: how a benchmark counts its members and makes it speak at a fixed rate.

What must live here: what is equal for all Python contenders. What must not: a WebSocket, or anything that
happens once per delivery; the cost of these routes must vanish beside what is measured.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.benchmarks.apps.stamp import now, stamped

FIRST = 10_000_000  # eight digits for ever, so that every message has the same size
FRAME = len('{"seq":10000000,"pad":""}')

Say = Callable[..., Awaitable[object]]


class Control:
    """Routes over one contender: `say(data)` broadcasts, `members()` counts the sockets that would hear it.

    A contender that has many groups takes a second argument, `say(data, group)`; the others are never asked for it.
    """

    def __init__(self, say: Say, members: Callable[[], int]) -> None:
        self.say = say
        self.members = members
        self.sequence = FIRST
        self.stamps = False
        self.speaking: asyncio.Task[None] | None = None

    def routes(self) -> list[Route]:
        """What the benchmark asks over HTTP."""
        return [
            Route("/members", self.on_members),
            Route("/tasks", self.on_tasks),
            Route("/broadcast", self.on_broadcast, methods=["POST"]),
        ]

    async def on_members(self, request: Request) -> JSONResponse:
        """How many sockets are open, and in the group."""
        return JSONResponse(self.members())

    async def on_tasks(self, request: Request) -> JSONResponse:
        """How many tasks the loop has, and how many objects the collector tracks after a full collection."""
        gc.collect()
        return JSONResponse({"tasks": len(asyncio.all_tasks()), "objects": len(gc.get_objects())})

    async def on_broadcast(self, request: Request) -> JSONResponse:
        """Answer at once and speak from a task: `turns` times `burst` messages, one turn every `interval` seconds.

        With `groups` each turn says that many to each of "g0", "g1", …; without, to the one group that all are in.
        A text as the request's body is what they say, piece by piece, so that no two messages say the same.
        With `stamp=1` each carries the time at which it was due: see `stamp.py`.
        """
        query = request.query_params
        length, text = int(query["size"]) - FRAME, (await request.body()).decode()
        pads = pieces(text, length) if text else itertools.repeat("x" * length)
        turns, burst, interval = int(query["turns"]), int(query["burst"]), float(query["interval"])
        groups: list[tuple[str, ...]] = [(f"g{number}",) for number in range(int(query.get("groups", 0)))] or [()]
        self.stamps = query.get("stamp") == "1"
        self.speaking = asyncio.create_task(self.speak(turns, burst * groups, interval, pads))
        return JSONResponse(turns * burst * len(groups), status_code=202)

    async def speak(self, turns: int, turn: Sequence[tuple[str, ...]], interval: float, pads: Iterator[str]) -> None:
        """Keep to the clock rather than to the pause: a slow contender gets no easier rate than a quick one."""
        loop = asyncio.get_running_loop()
        due, first = loop.time(), now()
        for number in range(turns):
            for group in turn:
                data = {"seq": self.sequence, "pad": next(pads)}
                if self.stamps:
                    data = stamped(data, first + round(number * interval * 1e6))
                await self.say(data, *group)
                self.sequence += 1
            due += interval
            await asyncio.sleep(max(0.0, due - loop.time()))


def pieces(text: str, length: int) -> Iterator[str]:
    """Cut pieces of this length off a text; whoever asks sends one that is long enough."""
    return (text[at : at + length] for at in range(0, len(text), length))
