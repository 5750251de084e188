"""Apps that tests run under real servers, by import string: ``tests.apps:echo``. No test lives here."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket


class Echo(WebSocketEndpoint):
    encoding = "text"

    async def on_receive(self, websocket: WebSocket, data: str) -> None:
        await websocket.send_text(data)


echo = Starlette(routes=[WebSocketRoute("/ws", Echo)])
