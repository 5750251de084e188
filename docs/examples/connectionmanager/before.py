"""The chat that many FastAPI apps begin with: a list of sockets and a loop over it.

What lives here is the usual pattern in our own words, kept as short as it is usually found, so that `after.py`
can be compared with it. Do not build on it: docs/connectionmanager.md says what is missing.
"""

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

app = FastAPI()


class ConnectionManager:
    def __init__(self):
        self.sockets: list[WebSocket] = []

    async def connect(self, websocket: WebSocket):
        await websocket.accept()
        self.sockets.append(websocket)

    def disconnect(self, websocket: WebSocket):
        self.sockets.remove(websocket)

    async def tell(self, websocket: WebSocket, text: str):
        await websocket.send_text(text)

    async def broadcast(self, text: str):
        for websocket in self.sockets:
            await websocket.send_text(text)


manager = ConnectionManager()


@app.websocket("/ws/{client_id}")
async def chat(websocket: WebSocket, client_id: int):
    await manager.connect(websocket)
    try:
        while True:
            text = await websocket.receive_text()
            await manager.tell(websocket, f"You wrote: {text}")
            await manager.broadcast(f"Client {client_id} says: {text}")
    except WebSocketDisconnect:
        manager.disconnect(websocket)
        await manager.broadcast(f"Client {client_id} has left")
