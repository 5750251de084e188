"""The same without any library of ours: a loop that decodes, validates with Pydantic and answers.

It hears the same frames and says the same replies, but has no limits, no counts and no order to keep. What must
not live here: a cleverness that tutorials do not have.
"""

from __future__ import annotations

import json

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect


class Say(BaseModel):
    """What a client says."""

    text: str
    n: int


active: set[WebSocket] = set()


async def talk(websocket: WebSocket) -> None:
    """One client, until it has left."""
    await websocket.accept()
    active.add(websocket)
    try:
        while True:
            message = json.loads(await websocket.receive_text())
            if message["event"] == "say":
                said = Say.model_validate(message["data"])
                await websocket.send_json({"type": "reply", "ref": message["ref"], "data": {"stored": said.n}})
    except WebSocketDisconnect:
        active.remove(websocket)


async def members(request: Request) -> JSONResponse:
    """How many sockets are open."""
    return JSONResponse(len(active))


app = Starlette(routes=[WebSocketRoute("/ws", talk), Route("/members", members)])
