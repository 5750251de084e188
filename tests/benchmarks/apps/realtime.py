"""Our own contender: one middleware line, one endpoint, plain JSON, nobody authenticated.

`loop` joins a group and hears what is broadcast; `idle` joins and is tracked in the group's presence. What must
not live here: a setting that a reader of the documentation would not find.
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import Realtime, RealtimeEndpoint, RealtimeMiddleware
from tests.benchmarks.apps.control import Control

rt = Realtime()
GROUP = "lobby"


class Listener(RealtimeEndpoint):
    """A member of the group; the count is the only thing that we add."""

    anonymous = True
    opened = 0

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept and join the group that is asked for."""
        await websocket.accept()
        number = websocket.query_params.get("g")
        await self.join(f"g{number}" if number else GROUP)
        Listener.opened += 1

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The count again."""
        Listener.opened -= 1


class Present(Listener):
    """A member whom the group's presence shows as well."""

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept, join, and be seen."""
        await super().on_connect(websocket)
        await self.track(GROUP, {"name": "somebody"})


async def say(data: dict[str, Any], group: str = GROUP) -> None:
    """One message to one group."""
    await rt.broadcast(group, data)


def app(endpoint: type[Listener]) -> Starlette:
    """The application around one endpoint."""
    return Starlette(
        routes=[WebSocketRoute("/ws", endpoint), *Control(say, lambda: Listener.opened).routes()],
        middleware=[Middleware(RealtimeMiddleware, realtime=rt)],
    )


loop = app(Listener)
idle = app(Present)
