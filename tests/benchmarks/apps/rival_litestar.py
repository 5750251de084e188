"""Litestar's channels plugin on its memory backend, as its documentation shows it: a subscription that sends.

Litestar serves the sockets and the lifespan; the benchmark's HTTP routes are a Starlette app beside it. What must
not live here: a cleverness that the documentation of Litestar does not have.
"""

from __future__ import annotations

from typing import Any

from litestar import Litestar, WebSocket, websocket
from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend
from litestar.exceptions import WebSocketDisconnect
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from tests.benchmarks.apps.control import Control

GROUP = "lobby"
plugin = ChannelsPlugin(backend=MemoryChannelsBackend(), channels=[GROUP])
active: set[object] = set()


@websocket("/ws")
async def listen(socket: WebSocket, channels: ChannelsPlugin) -> None:
    """One member: what is published is sent from the subscriber's task, and this one reads until the peer has left."""
    await socket.accept()
    async with channels.start_subscription([GROUP]) as subscriber, subscriber.run_in_background(socket.send_text):
        active.add(subscriber)
        try:
            while True:
                await socket.receive_text()
        except WebSocketDisconnect:
            active.remove(subscriber)


async def say(data: dict[str, Any]) -> None:
    """One message to the channel; the plugin encodes it, once."""
    plugin.publish(data, GROUP)


sockets = Litestar([listen], plugins=[plugin])
http = Starlette(routes=Control(say, lambda: len(active)).routes())


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """HTTP to one side, all else to the other."""
    await (http if scope["type"] == "http" else sockets)(scope, receive, send)
