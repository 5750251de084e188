"""The same on python-socketio, as its documentation shows it: an event whose return value is the acknowledgement.

The data is not validated, because python-socketio has nothing for that. The WebSocket transport only.
"""

from __future__ import annotations

from typing import Any

import socketio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

sio = socketio.AsyncServer(async_mode="asgi", transports=["websocket"])
active: set[str] = set()


@sio.event
async def connect(sid: str, environ: dict[str, Any]) -> None:
    """One more."""
    active.add(sid)


@sio.event
async def disconnect(sid: str, reason: str) -> None:
    """One less."""
    active.remove(sid)


@sio.event
async def say(sid: str, data: dict[str, Any]) -> dict[str, int]:
    """The handler: what it returns is the acknowledgement."""
    return {"stored": data["n"]}


async def members(request: Request) -> JSONResponse:
    """How many sockets are open."""
    return JSONResponse(len(active))


app = socketio.ASGIApp(sio, other_asgi_app=Starlette(routes=[Route("/members", members)]))
