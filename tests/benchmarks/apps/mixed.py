"""Our own contender where targets overlap: each member is in three of four groups, is pushed to, and sees who is there.

A turn says so many messages to the four groups in turn and, in their midst, one to a single client; all share one
counter, so that a member of some hears rising numbers. Everybody is in the "lobby" as well, for the turns that all
hear. What must not live here: a setting that a reader of the documentation would not find.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import count, repeat
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from starlette_rt import Connection, Realtime, RealtimeEndpoint, RealtimeMiddleware
from tests.benchmarks.apps.control import FRAME, Control

rt = Realtime()
GROUPS = ["g0", "g1", "g2", "g3"]
LOBBY = "lobby"
SOMEBODY = "somebody"  # in the place of a group: the next client alone
TRACKED = 5  # clients that the presence of their groups shows
UPDATE = 0.25  # seconds between two changes of what presence says, each of one client in one group

connections: list[Connection] = []
updates = count(1)  # never the same meta twice, which would be no change
sizes: Counter[str] = Counter({SOMEBODY: 1})  # how many hear what is said there


class Member(RealtimeEndpoint):
    """A member of three groups, who watches them; the list and the counts are the only things that we add."""

    anonymous = True

    async def on_connect(self, websocket: WebSocket) -> None:
        """Accept and join; a few are tracked."""
        await websocket.accept()
        number = int(websocket.query_params["n"])
        for group in groups_of(number):
            await self.join(group, presence="members")
            if number < TRACKED:
                await self.track(group, {"updates": 0})
        await self.join(LOBBY)
        connections.append(self.connection)
        sizes.update([*groups_of(number), LOBBY])

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """The list and the counts again."""
        connections.remove(self.connection)
        sizes.subtract([*groups_of(int(websocket.query_params["n"])), LOBBY])


def groups_of(number: int) -> list[str]:
    """All but one."""
    return [group for place, group in enumerate(GROUPS) if place != number % len(GROUPS)]


def turn_of(broadcasts: int, burst: int) -> list[str]:
    """To whom each message of a turn is said; without broadcasts to the groups, to everybody."""
    if not broadcasts:
        return [LOBBY] * burst
    turn = [GROUPS[number % len(GROUPS)] for number in range(broadcasts)]
    return [*turn[: broadcasts // 2], SOMEBODY, *turn[broadcasts // 2 :]]


async def say(data: dict[str, Any], target: str) -> None:
    """One message to one group, or to the next client."""
    if target == SOMEBODY:
        await connections[data["seq"] % len(connections)].push(data)
    else:
        await rt.broadcast(target, data)


class MixedControl(Control):
    """Speaks to many targets in one turn while presence changes."""

    def routes(self) -> list[Route]:
        """What the benchmark asks, and how much it may expect."""
        return [*super().routes(), Route("/expected", self.on_expected)]

    async def on_expected(self, request: Request) -> JSONResponse:
        """How many messages all members together would hear."""
        turns, turn = asked(request)
        return JSONResponse(turns * sum(sizes[target] for target in turn))

    async def on_broadcast(self, request: Request) -> JSONResponse:
        """As every contender, but with `broadcasts`: so many to the groups in turn, and one to a client.

        With `changes=1` what presence says changes meanwhile.
        """
        turns, turn = asked(request)
        interval, pad = float(request.query_params["interval"]), "x" * (int(request.query_params["size"]) - FRAME)
        said = self.speak(turns, [(target,) for target in turn], interval, repeat(pad))
        self.speaking = asyncio.create_task(
            while_changing(said) if request.query_params.get("changes") == "1" else said
        )
        return JSONResponse(turns * len(turn), status_code=202)


def asked(request: Request) -> tuple[int, Sequence[str]]:
    """The number of turns, and one of them."""
    query = request.query_params
    return int(query["turns"]), turn_of(int(query.get("broadcasts", 0)), int(query["burst"]))


async def while_changing(speaking: Any) -> None:
    """Change what presence says until all has been said."""
    changing = asyncio.create_task(change())
    try:
        await speaking
    finally:
        changing.cancel()
        with suppress(asyncio.CancelledError):
            await changing


async def change() -> None:
    """One client after the other, in one of its groups after the other."""
    tracked = [connection for connection in connections if connection.tracked]
    for number in updates:
        connection = tracked[number % len(tracked)]
        await connection.update(connection.tracked[number % len(connection.tracked)], {"updates": number})
        await asyncio.sleep(UPDATE)


app = Starlette(
    routes=[WebSocketRoute("/ws", Member), *MixedControl(say, lambda: sizes[LOBBY]).routes()],
    middleware=[Middleware(RealtimeMiddleware, realtime=rt)],
)
