"""A chat with groups, presence and a page: the demonstration of starlette_rt.

What lives here is what a host writes itself: who comes in, which groups a client may join and as whom it is seen
there, and what becomes of a message. The package does the rest: it remembers the last messages of each group, says
what a client missed, handles a repeated message once, and relays who is typing. The page is in `static/`; nothing is
built. Start it with `make demo`, or with `uvicorn --app-dir docs/examples/chat app:app`, and open two windows.
With `REDIS_URL` in its environment any number of workers make one chat. It is a demonstration: a name needs no
password here, and without Redis the server forgets the messages when it is restarted.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

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

STATIC = Path(__file__).parent / "static"
GROUPS_AT_ONCE = 12
KEPT = 50

rt = Realtime(os.environ.get("REDIS_URL", "memory://"), history={"*": History(size=KEPT, ttl=86_400)})
tokens = TokenSigner([os.environ.get("CHAT_SECRET", "development-only-change-me-to-32-bytes")])


class Say(Struct):
    """A message; `id` is the page's own name for it, by which every page knows it again."""

    text: Annotated[str, Meta(pattern=r"\S", max_length=1000)]
    id: Annotated[str, Meta(min_length=1, max_length=40)]


class Chat(RealtimeEndpoint):
    """One person's window: what it may ask for, and what the others see of it."""

    limits = (RateLimit("60/10 second"),)  # of everything that a window asks for
    max_message_size = 16 * 1024
    whispers = {"typing": Whisper(None, expires=5)}

    async def authorize(self, group: str) -> bool:
        """Everybody may join every group with a proper name, a dozen at once."""
        joined = self.connection.groups
        if group not in joined and len(joined) >= GROUPS_AT_ONCE:
            raise EventError("too_many_groups", f"{GROUPS_AT_ONCE} groups at once are enough; leave one first")
        return re.fullmatch(r"\w[\w-]{0,39}", group) is not None

    async def on_track(self, group: str, meta: dict[str, Any]) -> dict[str, Any]:
        """Who is present is seen under the name that they came in with, whatever their page says."""
        return {"name": self.user.display_name}

    @event("say", limit=RateLimit("10/5 second"))
    async def say(self, data: Say, group: str) -> dict[str, Any]:
        """Broadcast a message to a group that the sender is in; the sender's page hears when it was said."""
        message = {
            "id": data.id,
            "from": self.user.identity,
            "name": self.user.display_name,
            "text": data.text.strip(),
            "at": round(time.time() * 1000),
        }
        await self.broadcast(group, message, "said")
        return {"at": message["at"]}

    async def snapshot(self, group: str) -> list[Any]:
        """Return the last messages, for a page that missed more than can be proven, as after a restart."""
        messages, _ = await rt.history(group, last=KEPT)
        return [message.data for message in messages]


async def page(request: Request) -> Response:
    """The page itself; everything else it needs is under /static and /rt."""
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
        Mount("/rt", rt.static()),
        Mount("/static", StaticFiles(directory=STATIC)),
    ],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt, tokens=tokens)],
)
