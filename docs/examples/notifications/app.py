"""Notifications for each user, beside the JWT login that a FastAPI app already has.

What lives here is such an app: `OAuth2PasswordBearer` and `current_user` are what FastAPI's own pages teach, and they
guard the WebSocket route without a change, because a token that came as a subprotocol is put into the request's
`Authorization` header. A browser connects with `new WebSocket(url, ["rt.plain", "rt.token." + token])`.
It needs FastAPI 0.144 or newer: before, FastAPI's security classes did not see WebSockets at all.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import jwt
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from fastapi.security import OAuth2PasswordBearer
from pydantic import BaseModel

from starlette_rt import Identity, Realtime, RealtimeMiddleware

SECRET = os.environ.get("NOTIFICATIONS_SECRET", "development-only-change-me-to-32-bytes")
PEOPLE = {"ada": "Ada Lovelace", "ben": "Ben Okri"}

rt = Realtime()
app = FastAPI(title="Notifications")
app.add_middleware(RealtimeMiddleware, realtime=rt)
oauth2 = OAuth2PasswordBearer(tokenUrl="token")


class User(BaseModel):
    """A person this app knows."""

    id: str
    name: str


def current_user(token: Annotated[str, Depends(oauth2)]) -> User:
    """The app's own dependency: whoever the token speaks of, or 401."""
    try:
        claims = jwt.decode(token, SECRET, algorithms=["HS256"])
        return User(id=claims["sub"], name=PEOPLE[claims["sub"]])
    except (jwt.InvalidTokenError, KeyError):
        raise HTTPException(401, "this token is not valid", {"WWW-Authenticate": "Bearer"}) from None


CurrentUser = Annotated[User, Depends(current_user)]


@app.post("/token/{user_id}")
def token(user_id: str) -> dict[str, str]:
    """Your own login stands here; this one asks for no password."""
    if user_id not in PEOPLE:
        raise HTTPException(404, "nobody of this name")
    expires = datetime.now(UTC) + timedelta(hours=1)
    return {"access_token": jwt.encode({"sub": user_id, "exp": expires}, SECRET, "HS256"), "token_type": "bearer"}


@app.websocket("/notifications")
async def notifications(websocket: WebSocket, user: CurrentUser) -> None:
    """One window of one user: nothing to receive, only to be there for what is pushed."""
    async with rt.accept(websocket, identity=Identity(user.id, display_name=user.name)) as connection:
        await connection.wait_closed()


@app.post("/documents/{document}/share/{reader}", status_code=202)
async def share(document: str, reader: str, user: CurrentUser) -> dict[str, Any]:
    """Tell another user, in all their windows; from an `async def` route one awaits."""
    if reader not in PEOPLE:
        raise HTTPException(404, "nobody of this name")
    await rt.push(reader, {"document": document, "by": user.name}, "document_shared")
    return {"online": bool(await rt.online([reader]))}


@app.post("/reports", status_code=202)
def report(user: CurrentUser) -> None:
    """Tell the user who asked; a `def` route runs in a thread and uses the verb that ends in `_sync`."""
    began = time.monotonic()
    lines = sum(1 for line in range(100_000) if line % 7 == 0)  # the slow work of a real report
    rt.push_sync(user.id, {"lines": lines, "seconds": round(time.monotonic() - began, 3)}, "report_ready")
