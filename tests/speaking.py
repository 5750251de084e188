"""The app that the scenarios of the second client talk to: typed handlers, whispers and a history.

The law of this file: it offers what ``tests.test_second_client.Make`` says, with the public names only.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import anyio
from msgspec import Struct
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import (
    EventError,
    History,
    Realtime,
    RealtimeEndpoint,
    RealtimeMiddleware,
    TokenSigner,
    Whisper,
    event,
)

KEY = "a-key-for-the-tests-of-32-bytes!"

rt = Realtime(
    history={"hist:*": History(100, 300)},
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


app = Starlette(
    routes=[WebSocketRoute("/ws", Speaking), Mount("/rt", rt.static())],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
)
