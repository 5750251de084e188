"""The app that the whole stack is tested with under compression: who joins what it is asked to, and hears texts.

The law of this file: public names only. What is said is made of its number by tests/prose.py, so that a peer knows
what it ought to hear.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import OutboxLimits, Realtime, RealtimeEndpoint, RealtimeMiddleware
from tests.prose import digits, prose

rt = Realtime(outbox=OutboxLimits(bytes=64 * 1024 * 1024, stall=30.0))


class Listening(RealtimeEndpoint):
    """A member of each ``group`` of the query."""

    anonymous = True

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        for group in websocket.query_params.getlist("group"):
            await self.join(group)
        await self.push("all joined")


async def recite(request: Request) -> JSONResponse:
    """Broadcast the texts from ``start`` to ``end`` of ``size`` characters to ``group``: digits or prose."""
    query = request.query_params
    group, size = query["group"], int(query["size"])
    text = digits if group == "digits" else prose
    for number in range(int(query["start"]), int(query["end"])):
        await rt.broadcast(group, {"group": group, "n": number, "text": text(f"{group} {number}", size)})
    return JSONResponse(None)


async def stats(request: Request) -> JSONResponse:
    return JSONResponse(rt.stats())


app = Starlette(
    routes=[
        WebSocketRoute("/ws", Listening),
        Route("/recite", recite, methods=["POST"]),
        Route("/stats", stats),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt)],
)
