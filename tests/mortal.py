"""The chat of docs/examples, for tests that kill it: it can be told to get stuck between a broadcast and its answer.

The law of this file: the chat itself is not touched, only what its handlers await. ``POST /stick/{n}`` lets the n-th
message from now be the last: it is broadcast, and its handler never ends. Start it with ``--app-dir`` of the chat.
"""

from __future__ import annotations

from typing import Any

import anyio
import app as chat  # type: ignore[import-not-found]  # by --app-dir
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

left = 0  # messages until one gets stuck; 0 is never
broadcast = chat.Chat.broadcast


async def stick(request: Request) -> Response:
    global left
    left = request.path_params["number"]
    return Response(status_code=204)


async def broadcast_and_stick(self: Any, *arguments: Any, **options: Any) -> Any:
    global left
    published = await broadcast(self, *arguments, **options)
    if left == 1:
        await anyio.sleep_forever()
    left = max(0, left - 1)
    return published


chat.Chat.broadcast = broadcast_and_stick
app: Starlette = chat.app
app.router.routes.insert(0, Route("/stick/{number:int}", stick, methods=["POST"]))
