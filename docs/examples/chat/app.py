"""A chat with groups, presence and a page: the demonstration of starlette_rt.

What lives here is what a host writes itself: who comes in, what a client may ask, what is said to whom, and the
last messages of each group so that nobody enters an empty page. The page is in `static/`; nothing is built.
Start it with `make demo`, or with `uvicorn --app-dir docs/examples/chat app:app`, and open two windows.
It is a demonstration: a name needs no password here, and the last messages are gone after a restart.
"""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from starlette_rt import EventError, Identity, RateLimit, Realtime, RealtimeEndpoint, RealtimeMiddleware, TokenSigner

STATIC = Path(__file__).parent / "static"
LOBBY = "lobby"
GROUPS_AT_ONCE = 12

rt = Realtime()
tokens = TokenSigner([os.environ.get("CHAT_SECRET", "development-only-change-me-to-32-bytes")])

GroupName = Annotated[str, Meta(pattern=r"^\w[\w-]*\Z", max_length=40)]
Text = Annotated[str, Meta(pattern=r"\S", max_length=1000)]


class Enter(Struct, tag_field="kind", tag="enter"):
    """A client wants to be in these groups; after a reconnect it names all it was in."""

    groups: Annotated[list[GroupName], Meta(max_length=GROUPS_AT_ONCE)]


class Leave(Struct, tag_field="kind", tag="leave"):
    """A client has had enough of a group."""

    group: GroupName


class Say(Struct, tag_field="kind", tag="say"):
    """A message for a group; `id` is the client's own, by which it knows its message again."""

    group: GroupName
    text: Text
    id: Annotated[str, Meta(min_length=1, max_length=40)]


class Recent:
    """The last messages of the groups that spoke last, bounded in both directions."""

    def __init__(self, *, groups: int, messages: int) -> None:
        self.groups, self.messages = groups, messages
        self.kept: OrderedDict[str, deque[dict[str, Any]]] = OrderedDict()

    def add(self, message: dict[str, Any]) -> None:
        """Keep one message; the oldest of its group and the quietest group make way."""
        self.kept.setdefault(message["group"], deque(maxlen=self.messages)).append(message)
        self.kept.move_to_end(message["group"])
        if len(self.kept) > self.groups:
            self.kept.popitem(last=False)

    def of(self, group: str) -> list[dict[str, Any]]:
        """What was said last in this group, oldest first."""
        return list(self.kept.get(group, ()))


recent = Recent(groups=200, messages=50)


class Chat(RealtimeEndpoint):
    """One person's window: what it may ask for, and what the others see of it."""

    limits = (RateLimit("10/5 second"),)
    max_message_size = 8 * 1024

    async def on_connect(self, websocket: WebSocket) -> None:
        """Everybody begins in the lobby."""
        await websocket.accept()
        await self.enter(LOBBY)

    async def on_receive(self, websocket: WebSocket, data: Enter | Leave | Say) -> None:
        """One of three wishes, already decoded and validated by the annotation."""
        match data:
            case Enter(groups=groups):
                for group in groups:
                    await self.enter(group)
            case Leave(group=group):
                await self.leave(group)
            case Say():
                await self.say(data)

    async def enter(self, group: str) -> None:
        """Join a group, be seen in it, and hand this client what was said last."""
        if group not in self.connection.groups and len(self.connection.groups) >= GROUPS_AT_ONCE:
            raise EventError("too_many_groups", f"{GROUPS_AT_ONCE} groups at once are enough; leave one first")
        await self.join(group, presence="members")
        await self.track(group, {"name": self.user.display_name})
        await self.push({"group": group, "messages": recent.of(group)}, "recent")

    async def say(self, said: Say) -> None:
        """Broadcast a message to a group that the sender is in."""
        if said.group not in self.connection.groups:
            raise EventError("not_joined", "enter the group before you speak in it")
        message = {
            "group": said.group,
            "id": said.id,
            "from": self.user.identity,
            "name": self.user.display_name,
            "text": said.text.strip(),
            "at": round(time.time() * 1000),
        }
        recent.add(message)
        await self.broadcast(said.group, message)


async def page(request: Request) -> Response:
    """The page itself; everything else it needs is under /static."""
    return FileResponse(STATIC / "index.html")


async def login(request: Request) -> Response:
    """Hand out a token for a name. Your own login stands here; this one believes everybody."""
    name = " ".join(request.path_params["name"].split())
    if not re.fullmatch(r"[^\W_][\w .'-]{0,31}", name):
        return PlainTextResponse("A name has 1 to 32 letters, digits, spaces, dots or dashes.", status_code=400)
    return PlainTextResponse(tokens.sign(Identity(name.lower(), display_name=name)))


app = Starlette(
    routes=[
        Route("/", page),
        Route("/login/{name}", login, methods=["POST"]),
        WebSocketRoute("/ws", Chat),
        Mount("/static", StaticFiles(directory=STATIC)),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
)
