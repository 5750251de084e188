"""Our own contender with many small groups: each client is in ten of them, and no two clients share more than one.

Client n of N is in the groups n, n + 37, n + 222, … modulo N: so each of N groups has ten members, too, and what is
said to one group after the other comes to a client from all over the turn. Everybody is in the "lobby" as well, the
one big group that the small ones are compared with. What must not live here: a setting that a reader of the
documentation would not find.
"""

from __future__ import annotations

import os
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import Realtime, RealtimeEndpoint, RealtimeMiddleware
from tests.benchmarks.apps.control import Control

rt = Realtime()
GROUP = "lobby"
RULER = (0, 1, 6, 10, 23, 26, 34, 41, 53, 55)  # Golomb's: no two differences are equal, so two clients share one group
LEAST = 2 * RULER[-1] + 1  # groups, so that this holds around the end, too
STRIDE = 37  # spreads the ten over all groups, if it does not divide their number
TOTAL = int(os.environ.get("GROUPS", LEAST))


class Member(RealtimeEndpoint):
    """A member of ten groups and of the big one; the count is the only thing that we add."""

    anonymous = True
    opened = 0

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept and join."""
        await websocket.accept()
        number = int(websocket.query_params["n"])
        for mark in RULER:
            await self.join(f"g{(number + STRIDE * mark) % TOTAL}")
        await self.join(GROUP)
        Member.opened += 1

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The count again."""
        Member.opened -= 1


async def say(data: dict[str, Any], group: str = GROUP) -> None:
    """One message to one group."""
    await rt.broadcast(group, data)


app = Starlette(
    routes=[WebSocketRoute("/ws", Member), *Control(say, lambda: Member.opened).routes()],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt)],
)
