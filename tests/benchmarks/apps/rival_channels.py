"""Django Channels on one node: a consumer that is added to a group, and `group_send` over the in-memory layer.

The text is encoded once, by who says it; the tutorial does so for each member. What must not live here: a
cleverness that the documentation of Channels does not have.
"""

from __future__ import annotations

import json
from typing import Any

from django.conf import settings

settings.configure(
    SECRET_KEY="development-only",
    CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
)

from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402 - after the settings
from channels.layers import get_channel_layer  # noqa: E402
from channels.routing import ProtocolTypeRouter  # noqa: E402
from starlette.applications import Starlette  # noqa: E402

from tests.benchmarks.apps.control import Control  # noqa: E402

GROUP = "lobby"


class Listener(AsyncWebsocketConsumer):
    """A member of the group; the count is the only thing that we add."""

    opened = 0

    async def connect(self) -> None:
        """Join and accept."""
        await self.channel_layer.group_add(GROUP, self.channel_name)
        await self.accept()
        Listener.opened += 1

    async def disconnect(self, code: int) -> None:
        """Leave, and the count again."""
        await self.channel_layer.group_discard(GROUP, self.channel_name)
        Listener.opened -= 1

    async def chat_message(self, event: dict[str, Any]) -> None:
        """What the group hears."""
        await self.send(text_data=event["text"])


async def say(data: dict[str, Any]) -> None:
    """One message to the group."""
    text = json.dumps(data, separators=(",", ":"))
    await get_channel_layer().group_send(GROUP, {"type": "chat.message", "text": text})


http = Starlette(routes=Control(say, lambda: Listener.opened).routes())
app = ProtocolTypeRouter({"http": http, "websocket": Listener.as_asgi()})
