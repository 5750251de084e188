"""The HTTP side of a Python contender: how a benchmark counts its members and makes it speak at a fixed rate.

What must live here: what is equal for all Python contenders. What must not: a WebSocket, or anything that
happens once per delivery; the cost of these routes must vanish beside what is measured.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

FIRST = 10_000_000  # eight digits for ever, so that every message has the same size
FRAME = len('{"seq":10000000,"pad":""}')

Say = Callable[[dict[str, Any]], Awaitable[object]]


class Control:
    """Routes over one contender: `say(data)` broadcasts, `members()` counts the sockets that would hear it."""

    def __init__(self, say: Say, members: Callable[[], int]) -> None:
        self.say = say
        self.members = members
        self.sequence = FIRST
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
        """Answer at once and speak from a task: `turns` times `burst` messages, one turn every `interval` seconds."""
        query = request.query_params
        pad = "x" * (int(query["size"]) - FRAME)
        turns, burst, interval = int(query["turns"]), int(query["burst"]), float(query["interval"])
        self.speaking = asyncio.create_task(self.speak(turns, burst, interval, pad))
        return JSONResponse(turns * burst, status_code=202)

    async def speak(self, turns: int, burst: int, interval: float, pad: str) -> None:
        """Keep to the clock rather than to the pause: a slow contender gets no easier rate than a quick one."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(turns):
            for _ in range(burst):
                await self.say({"seq": self.sequence, "pad": pad})
                self.sequence += 1
            due += interval
            await asyncio.sleep(max(0.0, due - loop.time()))
