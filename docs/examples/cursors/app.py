"""A board on which everybody sees everybody's pointer: ephemeral broadcasts in a FastAPI app.

What lives here is one endpoint and the page that draws. A pointer's place is worth sending only while it is news:
`ephemeral=True` with a `key` lets a slow reader skip to the newest place of each pointer, and `exclude` spares the
sender its own. Start it with `uvicorn --app-dir docs/examples/cursors app:app` and open two windows.
"""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import FastAPI, Path, WebSocket
from fastapi.responses import FileResponse
from msgspec import Meta, Struct

from starlette_rt import RateLimit, Realtime, RealtimeEndpoint, RealtimeMiddleware

PAGE = FilePath(__file__).parent / "index.html"
ANIMALS = ("Badger", "Crane", "Dormouse", "Fox", "Hare", "Heron", "Lynx", "Otter", "Robin", "Swift", "Vole", "Wren")

rt = Realtime()
app = FastAPI(title="Cursors")
app.add_middleware(RealtimeMiddleware, realtime=rt)


class Move(Struct):
    """Where a pointer is, as a share of the board's width and height."""

    x: Annotated[float, Meta(ge=0, le=1)]
    y: Annotated[float, Meta(ge=0, le=1)]


class Board(RealtimeEndpoint):
    """One visitor's pointer on one board; nobody needs to sign in."""

    anonymous = True
    board: str
    limits = (RateLimit("60/second"),)

    async def on_connect(self, websocket: WebSocket) -> None:
        """Come onto the board and learn who one is."""
        await websocket.accept()
        await self.join(self.group)
        await self.push(self.visitor, "welcome")

    async def on_receive(self, websocket: WebSocket, data: Move) -> None:
        """Show this pointer's place to the others."""
        pointer = {**self.visitor, "x": data.x, "y": data.y}
        await self.broadcast(
            self.group, pointer, "moved", exclude=self.connection, ephemeral=True, key=self.connection.id
        )

    async def on_disconnect(self, websocket: WebSocket, close_code: int) -> None:
        """Take the pointer off the board."""
        await self.broadcast(self.group, self.visitor, "gone")

    @property
    def group(self) -> str:
        """The group of the board that this visitor looks at."""
        return f"board:{self.board}"

    @property
    def visitor(self) -> dict[str, Any]:
        """Who this is to the others; everything follows from the connection's random id."""
        number = sum(self.connection.id.encode())
        return {"id": self.connection.id, "name": ANIMALS[number % len(ANIMALS)], "hue": number * 47 % 360}


@app.get("/")
def page() -> FileResponse:
    """The page; the board's name stands behind the #."""
    return FileResponse(PAGE)


@app.websocket("/boards/{board}")
async def board(websocket: WebSocket, board: Annotated[str, Path(pattern=r"^[a-z0-9-]{1,40}$")]) -> None:
    """FastAPI has checked the name of the board; the endpoint does the rest."""
    await Board.serve(websocket, board=board)
