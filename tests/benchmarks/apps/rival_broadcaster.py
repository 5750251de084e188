"""broadcaster on `memory://`, as its README shows it: each socket has a task that sends what it is subscribed to.

The text is encoded once, by who says it. What must not live here: a cleverness that the README does not have.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from broadcaster import Broadcast
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from tests.benchmarks.apps.control import Control

GROUP = "lobby"
broadcast = Broadcast("memory://")
active: set[WebSocket] = set()


async def listen(websocket: WebSocket) -> None:
    """One member: one task reads until the peer has left, and the other one sends."""
    await websocket.accept()
    async with anyio.create_task_group() as tasks:

        async def read() -> None:
            async for _ in websocket.iter_text():
                pass
            active.remove(websocket)
            tasks.cancel_scope.cancel()

        tasks.start_soon(read)
        await send(websocket)


async def send(websocket: WebSocket) -> None:
    """What the channel says, to this member."""
    async with broadcast.subscribe(channel=GROUP) as subscriber:
        active.add(websocket)
        async for event in subscriber:
            await websocket.send_text(event.message)


async def say(data: dict[str, Any]) -> None:
    """One message to the channel."""
    await broadcast.publish(channel=GROUP, message=json.dumps(data, separators=(",", ":")))


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Connected as long as the app runs."""
    async with broadcast:
        yield


app = Starlette(routes=[WebSocketRoute("/ws", listen), *Control(say, lambda: len(active)).routes()], lifespan=lifespan)
