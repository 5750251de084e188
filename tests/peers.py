"""The other end of the wire for tests of real servers: polite clients, raw ones, and what a log may say.

The law of this file: it knows RFC 6455 and the routes of `tests.live`, nothing of the package. Every wait has a
deadline. A raw peer sends whatever bytes it is given, good or bad, and reads only when it is told to.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import socket
import struct
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.servers import HOST, Server

PATIENCE = 10.0  # seconds; a wait that takes so long has failed
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA

_QUIET = re.compile(r"INFO: |\[[^]]*\] \[\d+\] \[INFO\]|\[INFO\]|$")  # uvicorn's lines, hypercorn's, granian's


_numbers = itertools.count()


def name(prefix: str = "n") -> str:
    """Return a name that no other test has."""
    return f"{prefix}{next(_numbers)}"


def ask(server: Server, path: str, method: str = "GET") -> Any:
    """Return the JSON that a route answers."""
    request = urllib.request.Request(server.http + path, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def stats(server: Server) -> Any:
    """Return all that the process can say about itself."""
    return ask(server, "/stats?full=1")


def goodbyes(server: Server, who: str) -> list[int]:
    """Return the codes that on_disconnect was told for ``who``."""
    return [code for name, code in stats(server)["ended"] if name == who]


def bearer(server: Server, name: str) -> dict[str, str]:
    """Return the header with a fresh token for ``name``."""
    return {"Authorization": "Bearer " + ask(server, f"/login/{name}", "POST")}


def visit(server: Server, name: str | None = None, path: str = "/ws", **options: Any) -> ClientConnection:
    """Connect as ``name``, or as nobody."""
    headers = {**(bearer(server, name) if name else {}), **options.pop("headers", {})}
    options = {"open_timeout": PATIENCE, "close_timeout": PATIENCE, **options}
    return connect(server.url + path, additional_headers=headers, **options)


def browser(server: Server, token: str, path: str = "/ws") -> ClientConnection:
    """Connect as a page of the app's own origin does, with our protocol and its token."""
    return visit(server, path=path, subprotocols=["rt.plain", f"rt.token.{token}"], origin=server.http)


def refusal(server: Server, who: str | None = None, path: str = "/ws", **options: Any) -> Any:
    """Return the response of a handshake that is refused."""
    try:
        visit(server, who, path, **options).close()
    except InvalidStatus as error:
        return error.response
    raise AssertionError("the handshake was not refused")


def answered(response: Any) -> tuple[int, Any]:
    """Return the status and the JSON of a refusal."""
    assert response.headers["content-type"] == "application/json"
    return response.status_code, json.loads(response.body)


def tell(peer: ClientConnection, do: str, **what: Any) -> None:
    """Have the endpoint do something; see `tests.live.Live`."""
    peer.send(json.dumps({"do": do, **what}))


def hear(peer: ClientConnection) -> Any:
    """Return the next message, decoded."""
    return json.loads(peer.recv(timeout=PATIENCE))


def settle(peer: ClientConnection) -> None:
    """Return when the server has handled all that ``peer`` has told it; nothing else may have been said to it."""
    tell(peer, "echo")
    assert hear(peer) == {"echo": {"do": "echo"}}


def ending(peer: ClientConnection) -> tuple[int, str]:
    """Read to the end and return the code and reason of the server's Close frame."""
    with suppress(ConnectionClosed):
        while True:
            peer.recv(timeout=PATIENCE)
    close = peer.protocol.close_rcvd
    assert close is not None, "there was no Close frame"
    return close.code, close.reason


def eventually(look: Callable[[], Any], wanted: Callable[[Any], bool], within: float = PATIENCE) -> Any:
    """Return the first thing ``look()`` sees that is ``wanted``; fail with the last one when the time is over."""
    deadline = time.monotonic() + within
    while not wanted(seen := look()):
        assert time.monotonic() < deadline, f"after {within} s it was still {seen}"
        time.sleep(0.02)
    return seen


def loud(log: str) -> list[str]:
    """Return the lines of a server's log that are not at INFO."""
    return [line for line in log.splitlines() if not _QUIET.match(line)]


def frame(
    payload: bytes, opcode: int = TEXT, fin: bool = True, mask: bytes | None = b"\0\0\0\0", rsv: int = 0
) -> bytes:
    """Return a client's frame. A mask of zeros is a legal one and leaves the payload readable."""
    size = len(payload)
    first, masked = (0x80 if fin else 0) | rsv << 4 | opcode, 0x80 if mask is not None else 0
    if size < 126:
        head = bytes((first, masked | size))
    elif size < 65536:
        head = struct.pack(">BBH", first, masked | 126, size)
    else:
        head = struct.pack(">BBQ", first, masked | 127, size)
    if mask and any(mask):
        payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
    return head + (mask or b"") + payload


def hello(server: Server, path: str = "/ws", headers: dict[str, str] | None = None) -> bytes:
    """Return a client's handshake."""
    lines = {
        "Host": f"{HOST}:{server.port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Version": "13",
        **(headers or {}),
    }
    said = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items()), "", ""]
    return "\r\n".join(said).encode()


class Raw:
    """A socket that has shaken hands and does nothing by itself: no pong, no Close, no reading ahead."""

    def __init__(
        self, server: Server, headers: dict[str, str] | None = None, path: str = "/ws", buffer: int | None = None
    ) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.connect((HOST, server.port))
        self.socket.sendall(hello(server, path, headers))
        self.received = bytearray()
        self._upgrade()

    def _upgrade(self) -> None:
        while (end := self.received.find(b"\r\n\r\n")) < 0:
            self.more()
        assert self.received.startswith(b"HTTP/1.1 101"), bytes(self.received)
        del self.received[: end + 4]

    def more(self) -> None:
        """Read once. Raises `EOFError` at the end of the stream."""
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        self.received += data

    def read(self) -> tuple[int, bytes]:
        """Return the opcode and payload of the next frame."""
        while (found := parse(self.received)) is None:
            self.more()
        opcode, payload, length = found
        del self.received[:length]
        return opcode, payload

    def close_code(self) -> int:
        """Read until the Close frame and return its code; raises what the stream ends with if there is none."""
        while True:
            opcode, payload = self.read()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2])

    def end(self) -> None:
        """Read what there is until the stream ends, in whatever way."""
        with suppress(EOFError, ConnectionError):
            while True:
                self.received.clear()
                self.more()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def vanish(self) -> None:
        """Reset the connection, as a host does that knows nothing of it any more."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.vanish()


def parse(data: bytearray, start: int = 0) -> tuple[int, bytes, int] | None:
    """Return opcode, payload and length of the server's frame at ``start``, ``None`` if it is not there whole."""
    have = len(data) - start
    if have < 2:
        return None
    size, head = data[start + 1] & 127, 2
    if size > 125:
        head = 4 if size == 126 else 10
        if have < head:
            return None
        size = int.from_bytes(data[start + 2 : start + head])
    if have < head + size:
        return None
    return data[start] & 15, bytes(data[start + head : start + head + size]), head + size


class Roster:
    """Who is there, kept as a client keeps it: a state once, then diffs, whose metas go by their refs."""

    def __init__(self, peer: ClientConnection, group: str) -> None:
        self._peer, self._group = peer, group
        state = hear(peer)
        assert (state["type"], state["group"], state["after"]) == ("presence_state", group, None)
        self._version = state["version"]
        self._metas = {key: member["metas"] for key, member in state["members"].items()}

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Hear diffs until the members are as wanted; return them with their metas, without the refs."""
        while not wanted(members := self._members()):
            self._apply(hear(self._peer))
        return members

    def _members(self) -> dict[str, Any]:
        shown = {key: [dict(meta) for meta in metas] for key, metas in self._metas.items() if metas}
        assert all(meta.pop("ref") for metas in shown.values() for meta in metas)
        return shown

    def _apply(self, diff: dict[str, Any]) -> None:
        self._version += 1
        assert (diff["type"], diff["group"], diff["version"]) == ("presence_diff", self._group, self._version)
        for key, member in diff["leaves"].items():
            gone = {meta["ref"] for meta in member["metas"]}
            self._metas[key] = [meta for meta in self._metas[key] if meta["ref"] not in gone]
        for key, member in diff["joins"].items():
            self._metas[key] = self._metas.get(key, []) + member["metas"]


class Member(asyncio.Protocol):
    """One of many: reads as fast as it can and checks that ``{"n": 0…}`` comes whole and in order.

    ``seen`` is the last number, ``wrong`` the first frame that was not the next one.
    """

    def __init__(self, greeting: bytes) -> None:
        self._greeting = greeting
        self._data = bytearray()
        self._up = False
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.seen, self.wrong, self.lost = -1, b"", False
        self._goal = 0
        self._reached = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._greeting)

    def data_received(self, data: bytes) -> None:
        self._data += data
        start = 0 if self._up else self._upgrade()
        while self._up and (found := parse(self._data, start)) is not None:
            opcode, payload, length = found
            self._heard(opcode, payload)
            start += length
        del self._data[:start]

    def _upgrade(self) -> int:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return 0
        self._up = True
        self.ready.set_result(None)
        return end + 4

    def _heard(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self.transport.write(frame(payload, PONG))
        elif opcode == TEXT and payload.startswith(b'{"n":%d,' % (self.seen + 1)):
            self.seen += 1
            if self.seen >= self._goal:
                self._reached.set()
        else:
            self.wrong = self.wrong or bytes((opcode,)) + payload[:100]

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._reached.set()

    async def heard(self, number: int) -> None:
        """Return when ``number`` has been heard, or the connection lost."""
        self._goal = number
        if self.seen < number and not self.lost:
            self._reached.clear()
            await self._reached.wait()
