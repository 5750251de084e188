"""python-socketio as its documentation shows it: a room that is entered on connecting, and emitted to.

The WebSocket transport only. What must not live here: anything that happens once per delivery and that
python-socketio would not do itself.
"""

from __future__ import annotations

from typing import Any

import socketio
from starlette.applications import Starlette

from tests.benchmarks.apps.control import Control

GROUP = "lobby"
sio = socketio.AsyncServer(async_mode="asgi", transports=["websocket"])
active: set[str] = set()


@sio.event
async def connect(sid: str, environ: dict[str, Any]) -> None:
    """Join, and one more."""
    await sio.enter_room(sid, GROUP)
    active.add(sid)


@sio.event
async def disconnect(sid: str, reason: str) -> None:
    """One less."""
    active.remove(sid)


async def say(data: dict[str, Any]) -> None:
    """One message to the room."""
    await sio.emit("message", data, room=GROUP)


app = socketio.ASGIApp(sio, other_asgi_app=Starlette(routes=Control(say, lambda: len(active)).routes()))
