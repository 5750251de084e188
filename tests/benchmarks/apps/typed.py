"""Our own contender for what clients say: one typed event with an acknowledgement, limited and counted.

Limits that are never reached cost as much as those that are: the class has one and the event has one. The metrics
are the default ones. What must not live here: a setting that a reader of the documentation would not find.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import RateLimit, Realtime, RealtimeEndpoint, RealtimeMiddleware, event

rt = Realtime()


@dataclass
class Say:
    """What a client says."""

    text: str
    n: int


class Typed(RealtimeEndpoint):
    """A client that is asked for nothing but its events."""

    anonymous = True
    limits = [RateLimit("1000000/second")]
    opened = 0

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept; the count is the only thing that we add."""
        await websocket.accept()
        Typed.opened += 1

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The count again."""
        Typed.opened -= 1

    @event("say", limit=RateLimit("1000000/second"))
    async def say(self, data: Say) -> dict[str, int]:
        """The handler: what it returns is the acknowledgement."""
        return {"stored": data.n}


async def members(request: Request) -> JSONResponse:
    """How many sockets are open."""
    return JSONResponse(Typed.opened)


app = Starlette(
    routes=[WebSocketRoute("/ws", Typed), Route("/members", members)],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt)],
)
