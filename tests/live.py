"""The app that the black-box tests drive: one endpoint that does what a message asks, and routes to look inside.

The law of this file: it uses the public names only, and answers questions about the process over HTTP, so that
a test needs nothing but a WebSocket client and an HTTP client.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import anyio.lowlevel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import (
    Connection,
    ConnectionLimits,
    EventError,
    Identity,
    OutboxLimits,
    RateLimit,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
)

rt = Realtime(
    outbox=OutboxLimits(bytes=int(os.environ.get("OUTBOX_BYTES", 1024 * 1024))),
    presence_grace=float(os.environ.get("PRESENCE_GRACE", 10.0)),
)
asleep = Realtime()  # nobody starts it
tokens = TokenSigner(["a-key-for-the-tests-of-32-bytes!"])
ended: list[tuple[str, int]] = []  # who has left, with the code that on_disconnect was told
over: list[bool] = []  # whether the host's own lifespan has ended
left: list[str] = []  # bodies of the function style that have come to their end


class Live(RealtimeEndpoint):
    """Does what it is told: ``{"do": verb, …}``; anything else is echoed."""

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
        if how == "early":  # what is said before the accept waits for it
            await self.push("before")
            await self.join("early")
            await self.broadcast("early", "to all before")
        await websocket.accept()
        if how == "fail-later":
            raise RuntimeError("a bug in on_connect")
        if how == "close":
            raise WebSocketException(4321, "not today")
        await self.join("all")

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        steps = data.get("steps", [data]) if isinstance(data, dict) else [data]
        for step in steps:
            verb = str(step.get("do")) if isinstance(step, dict) else "nothing"
            await getattr(self, "do_" + verb, self.do_nothing)(websocket, step)

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        ended.append((self.user.identity, close_code))
        if over:
            print("INFO:     1 has been told goodbye late", flush=True)

    async def do_nothing(self, websocket: WebSocket, data: Any) -> None:
        await self.push({"echo": data})

    async def do_who(self, websocket: WebSocket, data: Any) -> None:
        user = self.user
        await self.push([user.identity, user.is_authenticated, sorted(self.connection.groups)])

    async def do_join(self, websocket: WebSocket, data: Any) -> None:
        await self.join(data["group"], presence=data.get("presence"))

    async def do_leave(self, websocket: WebSocket, data: Any) -> None:
        await self.leave(data["group"])

    async def do_track(self, websocket: WebSocket, data: Any) -> None:
        await self.track(data["group"], data.get("meta"))

    async def do_untrack(self, websocket: WebSocket, data: Any) -> None:
        await self.untrack(data["group"])

    async def do_say(self, websocket: WebSocket, data: Any) -> None:
        exclude = self.connection if data.get("others") else None
        await self.broadcast(data["group"], data["data"], data.get("event", "message"), exclude=exclude)

    async def do_big(self, websocket: WebSocket, data: Any) -> None:
        await self.broadcast(data["group"], "x" * data["size"])

    async def do_push(self, websocket: WebSocket, data: Any) -> None:
        await self.push(data["data"])

    async def do_send(self, websocket: WebSocket, data: Any) -> None:
        await websocket.send_json(data["data"])

    async def do_read(self, websocket: WebSocket, data: Any) -> None:
        await websocket.receive_text()

    async def do_fail(self, websocket: WebSocket, data: Any) -> None:
        raise RuntimeError("a bug in on_receive")

    async def do_refuse(self, websocket: WebSocket, data: Any) -> None:
        raise EventError("no", "not like this", retry_after=0.5)

    async def do_close(self, websocket: WebSocket, data: Any) -> None:
        await websocket.close(data["code"], data.get("reason"))

    async def do_raise(self, websocket: WebSocket, data: Any) -> None:
        raise WebSocketException(data["code"], "raised")

    async def do_last_words(self, websocket: WebSocket, data: Any) -> None:
        await self.push("last words")
        await self.close(4100, "bye")
        await self.push("never said")


@dataclass
class Move:
    piece: str
    x: int = 0


class Typed(RealtimeEndpoint):
    async def on_receive(self, websocket: WebSocket, data: Move) -> None:
        await self.push({"moved": data.piece, "x": data.x})


@dataclass
class Act:
    do: Literal["join", "leave", "track", "untrack", "say", "push", "raw"]
    group: str = "public"
    event: str = "message"
    data: Any = None


class Public(RealtimeEndpoint):
    """Does what anybody asks, and has no bug that bad input could find."""

    anonymous = True

    async def on_receive(self, websocket: WebSocket, data: Act) -> None:
        if data.do == "join":
            await self.join(data.group, presence="members" if data.data else None)
        elif data.do == "leave":
            await self.leave(data.group)
        elif data.do == "track":
            await self.track(data.group, {"length": len(data.event)})
        elif data.do == "untrack":
            await self.untrack(data.group)
        elif data.do == "say":
            await self.broadcast(data.group, data.data, data.event, exclude=self.connection)
        elif data.do == "raw":
            await websocket.send_json(data.data)
        else:
            await self.push(data.data, data.event)


class Anything(RealtimeEndpoint):
    encoding = None

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.push(data)


class Text(RealtimeEndpoint):
    encoding = "text"

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.push(data)


class Bytes(RealtimeEndpoint):
    encoding = "bytes"

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await websocket.send_bytes(data)


class Small(RealtimeEndpoint):
    max_message_size = 100
    limits = (RateLimit("5/minute"),)

    async def on_receive(self, websocket: WebSocket, data: Any) -> None:
        await self.push(data)


async def pull(websocket: WebSocket) -> None:
    """The function style."""
    connection: Connection
    async with rt.accept(websocket, anonymous=True) as connection:
        await connection.join("pull")
        try:
            async for data in connection:
                await connection.push({"got": data})
                if data == "enough":
                    break
        finally:
            left.append(connection.user.identity)


async def watch(websocket: WebSocket) -> None:
    """The function style for one who only listens, named by the host's own code."""
    identity = Identity(websocket.path_params["name"])
    async with rt.accept(websocket, identity=identity) as connection:
        await connection.push({"user": connection.user.identity})
        try:
            await connection.wait_closed()
            await anyio.sleep_forever()
        finally:
            left.append(identity.identity)


async def serve(websocket: WebSocket) -> None:
    """An endpoint run by the host's own route."""
    await Live.serve(websocket, identity=Identity(websocket.path_params["name"]))


async def foreign(websocket: WebSocket) -> None:
    """Somebody else's socket."""
    await websocket.accept()
    await websocket.send_json({"authenticated": websocket.user.is_authenticated, "name": websocket.user.display_name})
    await websocket.send_text(await websocket.receive_text())
    await websocket.close(4999)


async def login(request: Request) -> JSONResponse:
    return JSONResponse(tokens.sign(Identity(request.path_params["name"])))


async def say(request: Request) -> JSONResponse:
    """Broadcast ``count`` messages of ``size`` bytes to ``group``, ``turn`` of them in one turn of the loop.

    With ``until=evicted`` it ends as soon as a peer has been given up.
    """
    query = request.query_params
    padding = "x" * int(query.get("size", 100))
    start, turn = int(query.get("start", 0)), int(query.get("turn", 1))
    said = 0
    for said in range(1, int(query.get("count", 1)) + 1):
        await rt.broadcast(query["group"], {"n": start + said - 1, "padding": padding})
        if said % turn == 0:
            await anyio.lowlevel.checkpoint()
        if "until" in query and rt.stats().get("evicted.4000"):
            break
    return JSONResponse(said)


def say_sync(request: Request) -> JSONResponse:
    rt.broadcast_sync(request.query_params["group"], {"sync": True})
    return JSONResponse("said")


async def push_to(request: Request) -> JSONResponse:
    await rt.push(request.path_params["name"], {"for": request.path_params["name"]})
    return JSONResponse("pushed")


def push_sync(request: Request) -> JSONResponse:
    rt.push_sync(request.path_params["name"], {"sync": True})
    return JSONResponse("pushed")


async def kick(request: Request) -> JSONResponse:
    await rt.disconnect(request.path_params["name"])
    return JSONResponse("gone")


async def drain(request: Request) -> JSONResponse:
    await rt.drain(5.0)
    return JSONResponse("drained")


async def online(request: Request) -> JSONResponse:
    return JSONResponse(sorted(await rt.online(request.query_params["names"].split(","))))


async def present(request: Request) -> JSONResponse:
    group = request.query_params["group"]
    members = await rt.presence(group)
    return JSONResponse([await rt.count(group), await rt.count(group, connections=True), sorted(members)])


async def stats(request: Request) -> JSONResponse:
    """What the process holds: with ``full``, also connections and tasks that nobody has let go of."""
    if "full" not in request.query_params:
        return JSONResponse(rt.stats())
    gc.collect()
    alive = sum(isinstance(each, Connection) for each in gc.get_objects())
    here = {"alive": alive, "tasks": len(asyncio.all_tasks()), "ended": ended, "left": left}
    return JSONResponse({**rt.stats(), **here})


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The host's own: it ends after every on_disconnect has run, and says how many did."""
    yield
    over.append(True)
    print(f"INFO:     {len(ended)} have been told goodbye", flush=True)


def middleware(realtime: Realtime, **options: Any) -> list[Middleware]:
    return [Middleware(RealtimeMiddleware, realtime=realtime, tokens=tokens, **options)]


app = Starlette(
    routes=[
        WebSocketRoute("/ws", Live),
        WebSocketRoute("/typed", Typed),
        WebSocketRoute("/public", Public),
        WebSocketRoute("/anything", Anything),
        WebSocketRoute("/text", Text),
        WebSocketRoute("/bytes", Bytes),
        WebSocketRoute("/small", Small),
        WebSocketRoute("/pull", pull),
        WebSocketRoute("/watch/{name}", watch),
        WebSocketRoute("/serve/{name}", serve),
        WebSocketRoute("/foreign", foreign),
        WebSocketRoute("/capped", Live, middleware=middleware(rt, connections=ConnectionLimits(total=2, per_user=1))),
        WebSocketRoute("/asleep", Live, middleware=middleware(asleep)),
        Route("/login/{name}", login, methods=["POST"]),
        Route("/say", say, methods=["POST"]),
        Route("/say-sync", say_sync, methods=["POST"]),
        Route("/push/{name}", push_to, methods=["POST"]),
        Route("/push-sync/{name}", push_sync, methods=["POST"]),
        Route("/kick/{name}", kick, methods=["POST"]),
        Route("/drain", drain, methods=["POST"]),
        Route("/online", online),
        Route("/present", present),
        Route("/stats", stats),
    ],
    middleware=middleware(rt),
    lifespan=lifespan,
)
