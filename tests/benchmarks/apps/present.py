"""Our own app for the benchmark of presence across nodes: whoever comes joins a group, watches it, is tracked in it.

The URL says what a client does: `group`, `user` (without one it is a guest), `watch=members` or `watch=count`,
`track=1`, and `join=0` for a client that joins by itself, with its position. What must not live here: a setting that a
reader of the documentation would not find.
"""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import History, Identity, Realtime, RealtimeEndpoint, RealtimeMiddleware

# The grace is longer than ten thousand clients need to come back to one core.
rt = Realtime(os.environ["REDIS_URL"], history={"kept:*": History(100, 300)}, presence_grace=60.0)


class Member(RealtimeEndpoint):
    """A member of the group that its URL names; the count is the only thing that we add."""

    anonymous = True
    opened = 0

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept, join, watch and be seen, as the URL says."""
        await websocket.accept()
        Member.opened += 1
        wants = websocket.query_params
        if wants.get("join") != "0":
            await self.join(wants["group"], presence=wants.get("watch"))
        if "track" in wants:
            await self.track(wants["group"], {"name": "somebody"})

    async def authorize(self, group: str) -> bool:
        """A client may join what has a history."""
        return group.startswith("kept:")

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The count again."""
        Member.opened -= 1


async def member(websocket: WebSocket) -> None:
    """One client; its user is whom it says it is."""
    user = websocket.query_params.get("user")
    await Member.serve(websocket, identity=Identity(user) if user else None)


async def members(request: Request) -> JSONResponse:
    """How many sockets are open."""
    return JSONResponse(Member.opened)


async def present(request: Request) -> JSONResponse:
    """How many connections are present in the group, on all nodes."""
    return JSONResponse(await rt.count(request.query_params["group"], connections=True))


async def say(request: Request) -> JSONResponse:
    """Say so many things to each of so many groups with a history; the positions after the first ones."""
    groups, count = int(request.query_params["groups"]), int(request.query_params["count"])
    places = [(await rt.broadcast(f"kept:{number}", {"text": "first"})).position for number in range(groups)]
    for number in range(groups):
        for _ in range(count - 1):
            await rt.broadcast(f"kept:{number}", {"text": "missed"})
    return JSONResponse([{"epoch": place.epoch, "offset": place.offset, "tag": place.tag} for place in places if place])


app = Starlette(
    routes=[
        WebSocketRoute("/ws", member),
        Route("/members", members),
        Route("/present", present),
        Route("/say", say, methods=["POST"]),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt)],
)
