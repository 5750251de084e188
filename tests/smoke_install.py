"""Use the installed package as its user would: run by CI with the Python of a fresh venv, far from the sources.

It imports nothing but the package, Starlette and the standard library, so it finds what a wheel forgot: a file, a
dependency, a name. Each function below is one use; a new part of the package adds one.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.resources
import sys

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

import starlette_rt
from starlette_rt import History, Identity, Realtime, RealtimeEndpoint, RealtimeMiddleware, TokenSigner, event
from starlette_rt.testing import connect


def every_promised_name_is_there() -> None:
    for name in starlette_rt.__all__:
        assert getattr(starlette_rt, name) is not None, name


def it_is_the_installed_package_and_nothing_else_came_along() -> None:
    assert str(starlette_rt.__file__).startswith(sys.prefix), starlette_rt.__file__
    files = importlib.metadata.files("starlette-rt") or []
    folders = {file.parts[0] for file in files}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"starlette_rt"}, folders


def type_checkers_may_read_it() -> None:
    assert importlib.resources.files(starlette_rt).joinpath("py.typed").is_file()


def a_token_is_signed_and_verified() -> None:
    tokens = TokenSigner(["a-key-for-the-smoke-test-of-32-bytes"])
    identity = tokens.verify(tokens.sign(Identity("ann", display_name="Ann")))
    assert identity.identity == "ann"


def a_broadcast_without_any_app() -> None:
    async def main() -> None:
        async with Realtime() as rt:
            await rt.broadcast("lobby", {"text": "hello"})
            assert await rt.count("lobby") == 0

    asyncio.run(main())


def two_people_chat() -> None:
    class Chat(RealtimeEndpoint):
        async def on_connect(self, websocket: WebSocket) -> None:
            await websocket.accept()
            await self.join("lobby")

        async def on_receive(self, websocket: WebSocket, data: str) -> None:
            await self.broadcast("lobby", {"from": self.user.identity, "text": data})

    tokens = TokenSigner(["a-key-for-the-smoke-test-of-32-bytes"])
    app = Starlette(
        routes=[WebSocketRoute("/ws", Chat)],
        middleware=[Middleware(RealtimeMiddleware, realtime=Realtime(), tokens=tokens)],
    )

    async def scene() -> None:
        ann, ben = tokens.sign(Identity("ann")), tokens.sign(Identity("ben"))
        async with connect(app, "/ws", token=ann) as one, connect(app, "/ws", token=ben) as other:
            await one.send_json("hello")
            assert await one.receive_json() == await other.receive_json() == {"from": "ann", "text": "hello"}

    asyncio.run(scene())


def an_event_is_acknowledged_and_what_was_missed_is_recovered() -> None:
    class Chat(RealtimeEndpoint):
        anonymous = True

        async def authorize(self, group: str) -> bool:
            return True

        @event("say")
        async def say(self, data: str, group: str) -> int:
            published = await self.broadcast(group, data, "said")
            assert published.position is not None
            return published.position.offset

    rt = Realtime(history={"lobby": History(10, 60)})
    app = Starlette(routes=[WebSocketRoute("/ws", Chat)], middleware=[Middleware(RealtimeMiddleware, realtime=rt)])

    async def scene() -> None:
        async with connect(app, "/ws", subprotocols=["rt.v1.json"]) as client:
            assert (await client.receive_json())["type"] == "welcome"
            await client.send_json({"type": "join", "ref": 1, "group": "lobby"})
            place = (await client.receive_json())["data"]["position"]
            await client.send_json({"type": "event", "ref": 2, "event": "say", "group": "lobby", "data": "hello"})
            said, answered = await client.receive_json()
            assert (said["data"], answered) == ("hello", {"type": "reply", "ref": 2, "data": 1})
            await client.send_json({"type": "join", "ref": 3, "group": "lobby", "position": place})
            assert (await client.receive_json())["data"]["events"] == [said]

    asyncio.run(scene())


def the_client_for_browsers_came_along() -> None:
    statics = importlib.resources.files(starlette_rt).joinpath("statics")
    assert all(statics.joinpath(f"starlette-rt.{kind}").is_file() for kind in ("js", "d.ts"))
    assert Realtime().static() is not None


def main() -> None:
    every_promised_name_is_there()
    it_is_the_installed_package_and_nothing_else_came_along()
    type_checkers_may_read_it()
    a_token_is_signed_and_verified()
    a_broadcast_without_any_app()
    two_people_chat()
    an_event_is_acknowledged_and_what_was_missed_is_recovered()
    the_client_for_browsers_came_along()
    print(f"starlette-rt {importlib.metadata.version('starlette-rt')} is installed and works")


if __name__ == "__main__":
    main()
