"""The app that the scenarios of the second client talk to: typed handlers, whispers and a history.

The law of this file: it offers what ``tests.test_second_client.Make`` says, and what a test needs to see every frame
there is, with the public names only but for one look inside.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import anyio
from msgspec import Struct
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import (
    EventError,
    History,
    Identity,
    RateLimit,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
    Whisper,
    event,
)

KEY = "a-key-for-the-tests-of-32-bytes!"

kept = {"~*": History(50, 300)} if "KEEP_PUSHES" in os.environ else {}
rt = Realtime(
    os.environ.get("REDIS_URL", "memory://"),
    history={"hist:*": History(100, 300), **kept},
    presence_grace=0.1,
    ping_interval=float(os.environ.get("PING_INTERVAL", 25)),
    ping_timeout=float(os.environ.get("PING_TIMEOUT", 20)),
)
tokens = TokenSigner([KEY])
said: Counter[str] = Counter()


class Text(Struct):
    text: str


class Sum(Struct):
    a: int
    b: int


class Speaking(RealtimeEndpoint):
    anonymous = True
    whispers = {"typing": Whisper(Any, expires=5)}  # type: ignore[arg-type]

    later = 0

    async def on_connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await self.join("hist:lobby")

    async def authorize(self, group: str) -> bool:
        return group.startswith(("open:", "hist:"))

    async def on_track(self, group: str, meta: dict[str, Any]) -> Any:
        return meta

    @event("say")
    async def say(self, data: Text, group: str) -> dict[str, int]:
        said[group] += 1
        number = said[group]
        await self.broadcast(group, {"text": data.text, "by": self.user.identity}, "said")
        return {"n": number}

    @event("say_others")
    async def say_others(self, data: Text, group: str) -> None:
        await self.broadcast(group, {"text": data.text, "by": self.user.identity}, "said", exclude=self.connection)

    @event("kick_me")
    async def kick_me(self, group: str) -> None:
        await self.leave(group)

    @event("add")
    async def add(self, data: Sum) -> int:
        return data.a + data.b

    @event("slow")
    async def slow(self, data: float) -> None:
        await anyio.sleep(min(data, 5.0))

    @event("fail")
    async def fail(self) -> None:
        raise RuntimeError("a bug in a handler")

    @event("refuse")
    async def refuse(self) -> None:
        raise EventError("no", "not like this")

    @event("later")
    async def try_later(self) -> str:
        self.later += 1
        if self.later % 3:
            raise EventError("later", "not yet", retry_after=0.05)
        return "ok"

    @event("call_me")
    async def call_me(self, data: Any) -> Any:
        return await self.call("confirm", data)


class Tight(Speaking):
    """The same with a limit that a queue of five hundred events meets many times."""

    limits = (RateLimit("100/second"),)


async def token(request: Request) -> Response:
    """A token that runs out soon, so that it is refreshed."""
    return PlainTextResponse(tokens.sign(Identity(request.path_params["name"]), ttl=8))


async def drain(request: Request) -> Response:
    """Say goodbye to everybody."""
    await rt.drain(5)
    return PlainTextResponse("")


async def push(request: Request) -> Response:
    """Push the text of the path to a person."""
    published = await rt.push(request.path_params["name"], request.path_params["text"], "notice")
    return PlainTextResponse("kept" if published.position is not None else "said")


async def lose(request: Request) -> Response:
    """Forget what a group remembers, as a failover would, and look: its members hear of it. The one look inside."""
    group = request.path_params["group"]
    broker: Any = rt._backend.broker
    if "REDIS_URL" in os.environ:
        await broker._link.command("DEL", *broker._names(group).keys)
    else:
        broker._logs.pop(group)
    stream = rt._streams.get(group)
    assert stream is not None
    await stream.check()
    return PlainTextResponse("")


app = Starlette(
    routes=[
        WebSocketRoute("/ws", Speaking),
        WebSocketRoute("/tight", Tight),
        Mount("/rt", rt.static()),
        Route("/token/{name}", token),
        Route("/drain", drain, methods=["POST"]),
        Route("/push/{name}/{text}", push, methods=["POST"]),
        Route("/lose/{group}", lose, methods=["POST"]),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
)
