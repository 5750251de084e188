"""python-socketio across nodes, as its documentation shows it: an `AsyncRedisManager`, and a room that is emitted to.

The WebSocket transport only. What must not live here: anything that happens once per delivery and that
python-socketio would not do itself.
"""

from __future__ import annotations

import os
from typing import Any

import socketio
from starlette.applications import Starlette

from tests.benchmarks.apps.control import Control
from tests.benchmarks.apps.stamp import stamped

GROUP = "lobby"
manager = socketio.AsyncRedisManager(os.environ["REDIS_URL"])
sio = socketio.AsyncServer(async_mode="asgi", client_manager=manager, transports=["websocket"])
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
    """One message to the room, wherever its members are."""
    await sio.emit("message", stamped(data), room=GROUP)


app = socketio.ASGIApp(sio, other_asgi_app=Starlette(routes=Control(say, lambda: len(active)).routes()))
