"""Two contenders without any library of ours: the hand-written broadcast loop, and a bare endpoint that only idles.

The loop is the `ConnectionManager` of many a tutorial, at its best: the text is encoded once for everybody, and
nobody else's socket is touched. What must not live here: a cleverness that those tutorials do not have.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.benchmarks.apps.control import Control


class ConnectionManager:
    """A list of sockets and a loop over it."""

    def __init__(self) -> None:
        self.active: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        """Accept and remember."""
        await websocket.accept()
        self.active.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        """Forget."""
        self.active.remove(websocket)

    async def broadcast(self, data: dict[str, Any]) -> None:
        """Encode once, send to each in turn."""
        text = json.dumps(data, separators=(",", ":"))
        for websocket in self.active:
            await websocket.send_text(text)


GROUP = "lobby"
managers: defaultdict[str, ConnectionManager] = defaultdict(ConnectionManager)  # one for each group


async def chat(websocket: WebSocket) -> None:
    """One member of the group that it asks for: reads until the peer has left."""
    number = websocket.query_params.get("g")
    manager = managers[f"g{number}" if number else GROUP]
    await manager.connect(websocket)
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        manager.disconnect(websocket)


async def say(data: dict[str, Any], group: str = GROUP) -> None:
    """One message to one group."""
    await managers[group].broadcast(data)


class Bare(WebSocketEndpoint):
    """The least that Starlette offers: accepts, and waits."""

    encoding = "text"
    opened = 0

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept; the count is the only thing that we add."""
        await websocket.accept()
        Bare.opened += 1

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The count again."""
        Bare.opened -= 1


loop_control = Control(say, lambda: sum(len(manager.active) for manager in managers.values()))
idle_control = Control(say, lambda: Bare.opened)

loop = Starlette(routes=[WebSocketRoute("/ws", chat), *loop_control.routes()])
idle = Starlette(routes=[WebSocketRoute("/ws", Bare), *idle_control.routes()])
