"""The app that is deployed in tests: many processes, a proxy in front, and Redis where the environment names one.

The law of this file: it is what a team would write, on the public names only, and says of itself which process it is
and what it knows of its caller.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import (
    ConnectionLimits,
    History,
    Identity,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
    Unavailable,
)

rt = Realtime(os.environ.get("REDIS_URL", "memory://"), history={"kept:*": History(1000, 300)})
tokens = TokenSigner(["a-key-for-the-tests-of-32-bytes!"])


def about(connection: HTTPConnection) -> dict[str, Any]:
    """What this process knows of its caller, and who it is itself."""
    client = connection.client
    return {
        "pid": os.getpid(),
        "ip": client.host if client else None,
        "scheme": connection.scope["scheme"],
        "host": connection.headers["host"],
    }


class Deployed(RealtimeEndpoint):
    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.join("all")
        await self.push(about(websocket))

    async def authorize(self, group: str) -> bool:
        return group.startswith("kept:")

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        if not isinstance(data, dict):
            await self.push(data)
        elif data["do"] == "say":
            await self.broadcast(data["group"], data["data"])
        elif data["do"] == "join":
            await self.join(data["group"])
            await self.push("joined")
        elif data["do"] == "track":
            await self.track(data["group"], {})
            await self.push("tracked")


async def login(request: Request) -> JSONResponse:
    return JSONResponse(tokens.sign(Identity(request.path_params["name"])))


async def ready(request: Request) -> JSONResponse:
    health = rt.health()
    return JSONResponse(health.reasons, 200 if health.ready else 503)


async def present(request: Request) -> JSONResponse:
    return JSONResponse(sorted(await rt.presence(request.query_params["group"])))


async def unavailable(request: Request, error: Exception) -> JSONResponse:
    """Redis was taken to be away, and nothing has happened: whoever asked may ask again."""
    return JSONResponse(str(error), 503)


async def say(request: Request) -> JSONResponse:
    await rt.broadcast(request.query_params["group"], request.query_params["data"])
    return JSONResponse(None)


limited = Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens, connections=ConnectionLimits(per_ip=1))

app = Starlette(
    routes=[
        WebSocketRoute("/ws", Deployed),
        WebSocketRoute("/one", Deployed, middleware=[limited]),
        Route("/login/{name}", login, methods=["POST"]),
        Route("/ready", ready),
        Route("/present", present),
        Route("/say", say, methods=["POST"]),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
    exception_handlers={Unavailable: unavailable},
)
