"""The chat of `before.py` on starlette_rt: the same URL, the same texts, no list of sockets.

What lives here is the smallest step over: nothing changes for the clients, and nobody needs a token yet.
"""

from fastapi import FastAPI, WebSocket

from starlette_rt import Realtime, RealtimeMiddleware

app = FastAPI()
rt = Realtime()
app.add_middleware(RealtimeMiddleware, realtime=rt)


@app.websocket("/ws/{client_id}")
async def chat(websocket: WebSocket, client_id: int):
    async with rt.accept(websocket, anonymous=True, encoding="text") as connection:
        await connection.join("chat")
        async for text in connection:
            await connection.push(f"You wrote: {text}")
            await connection.broadcast("chat", f"Client {client_id} says: {text}")
    await rt.broadcast("chat", f"Client {client_id} has left")
