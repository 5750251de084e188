"""Our own contender across nodes: one URL makes it one of many.

`GROUP` says which group is spoken to: `lobby` has no history, `kept` has one. What must not live here: a setting
that a reader of the documentation would not find.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import History, Realtime, RealtimeEndpoint, RealtimeMiddleware
from tests.benchmarks.apps.control import Control
from tests.benchmarks.apps.stamp import stamped

rt = Realtime(os.environ["REDIS_URL"], history={"kept": History(100, 300)})
GROUP = os.environ.get("GROUP", "lobby")


class Listener(RealtimeEndpoint):
    """A member of the group; the count is the only thing that we add."""

    anonymous = True
    opened = 0

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept and join."""
        await websocket.accept()
        await self.join(GROUP)
        Listener.opened += 1

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The count again."""
        Listener.opened -= 1


async def say(data: dict[str, Any]) -> None:
    """One message to the group, wherever its members are."""
    await rt.broadcast(GROUP, stamped(data))


app = Starlette(
    routes=[WebSocketRoute("/ws", Listener), *Control(say, lambda: Listener.opened).routes()],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt)],
)
