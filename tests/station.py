"""The app that the fleet tests drive: a station that says numbered things, on one Redis with others.

The law of this file: it is what a team would write, on the public names only, and every answer says what became of
the request: a publication was accepted, was refused at once, or its publisher cannot know. What its environment leaves
out is as the package has it. The one look inside is when Redis was taken to be away: on a busy machine that may be
more often than the test has caused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import History, Realtime, RealtimeEndpoint, RealtimeMiddleware, TokenSigner, Unavailable

KEPT = History(2000, 300)  # all that a test says

logging.basicConfig(format="%(levelname)s:     %(name)s: %(message)s")  # from WARNING on

rt = Realtime(
    os.environ["REDIS_URL"],
    history={"kept:*": KEPT},
    presence_grace=float(os.environ.get("PRESENCE_GRACE", 10.0)),
)
tokens = TokenSigner(["a-key-for-the-tests-of-32-bytes!"])


class Station(RealtimeEndpoint):
    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.push(os.getpid(), "served by")

    async def authorize(self, group: str) -> bool:
        return True

    async def on_track(self, group: str, meta: Any) -> Any:
        return meta


async def say(request: Request) -> JSONResponse:
    """Broadcast ``n`` with ``size`` bytes to ``group``; what could not be said at once may have been said."""
    query = request.query_params
    data = {"n": int(query["n"]), "padding": "x" * int(query.get("size", 0))}
    turns: list[bool] = []
    asyncio.get_running_loop().call_soon(turns.append, True)
    try:
        published = await rt.broadcast(query["group"], data, "said", exclude=query.get("exclude"))
    except Unavailable as error:
        return JSONResponse({"verdict": "doubtful" if turns else "refused", "why": str(error)}, 503)
    return JSONResponse({"verdict": "accepted", "shared": published.shared})


async def present(request: Request) -> JSONResponse:
    """Who is present in ``group``, and with how many connections."""
    members = await rt.presence(request.query_params["group"])
    return JSONResponse({key: len(member.metas) for key, member in members.items()})


async def online(request: Request) -> JSONResponse:
    return JSONResponse(sorted(await rt.online(request.query_params["names"].split(","))))


async def push(request: Request) -> JSONResponse:
    published = await rt.push(request.path_params["name"], request.query_params["data"], "pushed")
    return JSONResponse(published.shared)


async def kick(request: Request) -> JSONResponse:
    await rt.disconnect(request.path_params["name"])
    return JSONResponse("gone")


async def revoke(request: Request) -> JSONResponse:
    await rt.revoke(request.path_params["name"])
    return JSONResponse("revoked")


async def aways(request: Request) -> JSONResponse:
    """From when to when Redis was away, by the clock that all processes share; the last may go on."""
    return JSONResponse(away)


async def health(request: Request) -> JSONResponse:
    return JSONResponse({"pid": os.getpid(), "reasons": rt.health().reasons, "held": rt.stats()})


away: list[list[float]] = []


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    link: Any = rt._backend.broker._link  # type: ignore[attr-defined]
    link.on_down.append(lambda: away.append([time.monotonic()]))
    link.on_up.append(lambda: away[-1].append(time.monotonic()) if away and len(away[-1]) == 1 else None)
    yield


app = Starlette(
    lifespan=lifespan,
    routes=[
        WebSocketRoute("/ws", Station),
        Route("/say", say, methods=["POST"]),
        Route("/present", present),
        Route("/online", online),
        Route("/push/{name}", push, methods=["POST"]),
        Route("/kick/{name}", kick, methods=["POST"]),
        Route("/revoke/{name}", revoke, methods=["POST"]),
        Route("/aways", aways),
        Route("/health", health),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
)
