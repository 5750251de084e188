"""The app that the black-box tests drive: one endpoint that does what a message asks, and routes to look inside.

The law of this file: it uses the public names only, and answers questions about the process over HTTP, so that
a test needs nothing but a WebSocket client and an HTTP client.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import (
    Connection,
    EventError,
    Identity,
    OutboxLimits,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
)

rt = Realtime(
    outbox=OutboxLimits(bytes=int(os.environ.get("OUTBOX_BYTES", 1024 * 1024)), stall=3.0),
    presence_grace=float(os.environ.get("PRESENCE_GRACE", 10.0)),
)
tokens = TokenSigner(["a-key-for-the-tests-of-32-bytes!"])
ended: list[tuple[str, int]] = []


class Live(RealtimeEndpoint):
    """Does what it is told: ``{"do": verb, …}``."""

    async def on_connect(self, websocket: WebSocket) -> None:
        how = websocket.query_params.get("connect", "accept")
        if how == "http":
            raise HTTPException(402, "pay first", {"X-Price": "1"})
        if how == "fail":
            raise RuntimeError("a bug in on_connect")
        if how == "event":
            raise EventError("full", "no seat", retry_after=2.0)
        if how == "silent":
            return
        await websocket.accept()
        if how == "fail-later":
            raise RuntimeError("a bug in on_connect")
        if how == "close":
            raise WebSocketException(4321, "not today")
        await self.join("all")

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        if not isinstance(data, dict):
            return await self.push({"echo": data})
        await getattr(self, "do_" + str(data.get("do")), self.do_nothing)(websocket, data)

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        ended.append((self.user.identity, close_code))

    async def do_nothing(self, websocket: WebSocket, data: Any) -> None:
        await self.push({"echo": data})

    async def do_join(self, websocket: WebSocket, data: Any) -> None:
        await self.join(data["group"], presence=data.get("presence"))

    async def do_leave(self, websocket: WebSocket, data: Any) -> None:
        await self.leave(data["group"])

    async def do_track(self, websocket: WebSocket, data: Any) -> None:
        await self.track(data["group"], data.get("meta"))

    async def do_say(self, websocket: WebSocket, data: Any) -> None:
        exclude = self.connection if data.get("others") else None
        await self.broadcast(data["group"], data["data"], data.get("event", "message"), exclude=exclude)

    async def do_send(self, websocket: WebSocket, data: Any) -> None:
        await websocket.send_json(data["data"])

    async def do_fail(self, websocket: WebSocket, data: Any) -> None:
        raise RuntimeError("a bug in on_receive")

    async def do_refuse(self, websocket: WebSocket, data: Any) -> None:
        raise EventError("no", "not like this", retry_after=0.5)

    async def do_sleep(self, websocket: WebSocket, data: Any) -> None:
        await anyio.sleep(data["seconds"])
        await self.push("slept")

    async def do_last_words(self, websocket: WebSocket, data: Any) -> None:
        await self.push("last words")
        await self.close(4100, "bye")


class Echo(RealtimeEndpoint):
    encoding = None

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.push(data)


class Bytes(RealtimeEndpoint):
    encoding = "bytes"

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await websocket.send_bytes(data)


class Style:
    """The function style, as a raw route."""

    @staticmethod
    async def pull(websocket: WebSocket) -> None:
        connection: Connection
        async with rt.accept(websocket, anonymous=True) as connection:
            await connection.join("pull")
            async for data in connection:
                await connection.push({"got": data})


async def login(request: Request) -> PlainTextResponse:
    return PlainTextResponse(tokens.sign(Identity(request.path_params["name"])))


async def say(request: Request) -> JSONResponse:
    """Broadcast ``count`` messages of ``size`` bytes to ``group``, a few per turn."""
    query = request.query_params
    padding = "x" * int(query.get("size", 100))
    start = int(query.get("start", 0))
    for number in range(int(query.get("count", 1))):
        await rt.broadcast(query["group"], {"n": start + number, "padding": padding})
        if number % int(query.get("turn", 1)) == 0:
            await anyio.sleep(0)
    return JSONResponse("said")


async def stats(request: Request) -> JSONResponse:
    """What the process holds, with the garbage collected first."""
    gc.collect()
    alive = sum(isinstance(each, Connection) for each in gc.get_objects())
    return JSONResponse({**rt.stats(), "alive": alive, "ended": ended})


async def push_route(request: Request) -> JSONResponse:
    await rt.push(request.path_params["name"], {"for": request.path_params["name"]})
    return JSONResponse("pushed")


def push_sync(request: Request) -> JSONResponse:
    rt.push_sync(request.path_params["name"], {"sync": True})
    return JSONResponse("pushed")


async def kick(request: Request) -> JSONResponse:
    await rt.disconnect(request.path_params["name"])
    return JSONResponse("gone")


async def foreign(websocket: WebSocket) -> None:
    """Somebody else's socket."""
    await websocket.accept()
    await websocket.send_json({"user": websocket.user.display_name})
    await websocket.send_text(await websocket.receive_text())
    await websocket.close(4999)


app = Starlette(
    routes=[
        WebSocketRoute("/ws", Live),
        WebSocketRoute("/echo", Echo),
        WebSocketRoute("/bytes", Bytes),
        WebSocketRoute("/pull", Style.pull),
        WebSocketRoute("/foreign", foreign),
        Route("/login/{name}", login, methods=["POST"]),
        Route("/say", say, methods=["POST"]),
        Route("/stats", stats),
        Route("/push/{name}", push_route, methods=["POST"]),
        Route("/push-sync/{name}", push_sync, methods=["POST"]),
        Route("/kick/{name}", kick, methods=["POST"]),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
)
