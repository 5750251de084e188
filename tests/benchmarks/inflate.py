"""The load generator with compression: the clients of `load.py`, which offer permessage-deflate and inflate.

A program that takes the orders of `load.py` and answers them; an `expect` is answered with `bytes` as well, what came
on the wire in the frames of messages, their headers included. What a client says goes uncompressed, as it may. Each
client inflates with a window of its own, which it keeps from message to message unless the server's answer let it
forget. What must not live here: a server, a judgement, and whatever `load.py` can do for both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import zlib
from dataclasses import dataclass

import picows
import uvloop

from tests.benchmarks import load

OFFER = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}  # what browsers offer
TAIL = b"\x00\x00\xff\xff"  # RFC 7692, section 7.2.2


class Tally(load.Tally):
    """It counts bytes as well."""

    bytes = 0

    def expect(self, goal: int) -> None:
        """Start anew."""
        super().expect(goal)
        self.bytes = 0


@dataclass(slots=True)
class Inflated:
    """A frame as `load.Client` wants it."""

    payload: bytes
    msg_type: picows.WSMsgType

    def get_payload_as_bytes(self) -> bytes:
        """As picows calls it."""
        return self.payload


class Client(load.Client):
    """A member that was asked whether it can inflate."""

    tally: Tally
    inflator: zlib._Decompress
    forgets = False
    window = 15

    def on_ws_connected(self, transport: picows.WSTransport) -> None:
        """Read what the server has answered to the offer."""
        answer = transport.response.headers.get("Sec-WebSocket-Extensions", "")
        window = re.search(r"server_max_window_bits=\"?(\d+)", answer)
        self.forgets = "server_no_context_takeover" in answer
        self.window = int(window[1]) if window else 15
        self.inflator = zlib.decompressobj(wbits=-self.window)
        super().on_ws_connected(transport)

    def on_ws_frame(self, transport: picows.WSTransport, frame: picows.WSFrame) -> None:
        """Count the bytes, and hand on what they say."""
        payload = frame.get_payload_as_bytes()
        size = len(payload)
        self.tally.bytes += size + (2 if size < 126 else 4 if size < 65536 else 10)
        if frame.rsv1:
            payload = self.inflated(payload)
        super().on_ws_frame(transport, Inflated(payload, frame.msg_type))  # type: ignore[arg-type]

    def inflated(self, payload: bytes) -> bytes:
        """The message; raises `zlib.error` for what is none."""
        if self.forgets:
            self.inflator = zlib.decompressobj(wbits=-self.window)
        return self.inflator.decompress(payload + TAIL)


class Load(load.Load):
    """Clients that inflate."""

    tally: Tally

    def __init__(self, url: str, socketio: bool, offer: list[str]) -> None:
        super().__init__(url, socketio, offer)
        self.tally = Tally()
        self.headers = {**(self.headers or {}), **OFFER}

    async def dial(self, turnstile: asyncio.Semaphore) -> None:
        """Open one client and wait until it is a member."""
        client = Client(self.tally, self.socketio)
        async with turnstile:
            await picows.ws_connect(
                lambda: client, self.url, extra_headers=self.headers, websocket_handshake_timeout=30, max_redirects=0
            )
            await client.joined.wait()
        self.clients.append(client)

    async def expect_total(self, total: int) -> dict[str, float]:
        """As for all clients, and the bytes."""
        heard = await super().expect_total(total)
        return {**heard, "bytes": self.tally.bytes}


async def main(arguments: argparse.Namespace) -> None:
    """Take orders until stdin ends."""
    clients = Load(arguments.url, arguments.socketio, arguments.offer)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        load.answer(await clients.obey(json.loads(line)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--socketio", action="store_true", help="shake hands as Engine.IO and Socket.IO do")
    parser.add_argument("--offer", nargs="*", default=[], metavar="PROTOCOL", help="subprotocols to offer")
    uvloop.run(main(parser.parse_args()))
