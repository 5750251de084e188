"""The network of the tests: ports that are free, a certificate, and a TCP line that can be disturbed in every way.

The law of this file: it moves bytes and knows nothing of what they say. A `Wire` has a thread and an event loop of
its own, so that it goes on while the loop under test stands still; its verbs may be called from anywhere and have
been done when they return. tests/line.py is the plain one, cut or whole.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import pytest

from tests.servers import HOST, WORKER

Way = Literal["up", "down"]  # to the server, to the client
WAYS: tuple[Way, Way] = ("up", "down")
CHUNK, CHUNKS = 65536, 64  # bytes read at once, and how many such pieces wait in one direction of a connection
PROMPT = 5.0  # seconds for the line's own thread to do what it is told
# Below the ports of tests/servers.py, with a cluster's second port, 10,000 above, over them; each worker has its own.
PORTS = range(20000 + 250 * WORKER, 20250 + 250 * WORKER)


def free_port() -> int:
    """Return a port that nobody listens on now, and whose neighbour 10,000 above is free too."""
    while True:
        port = random.choice(PORTS)
        if _free(port) and _free(port + 10000):
            return port


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class Certificate(NamedTuple):
    """A certificate that signs itself, for localhost and 127.0.0.1; ``pem`` is both in one file."""

    cert: Path
    key: Path
    pem: Path


def certificate(folder: Path) -> Certificate:
    """Make a certificate in ``folder``. Skips the test where there is no openssl."""
    made = Certificate(folder / "cert.pem", folder / "key.pem", folder / "both.pem")
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run(
            [*line.split(), *names, "-keyout", made.key, "-out", made.cert], check=True, capture_output=True, timeout=20
        )
    except FileNotFoundError:
        pytest.skip("openssl is not on the PATH, and a certificate is needed")
    made.pem.write_bytes(made.cert.read_bytes() + made.key.read_bytes())
    return made


class _Call:
    """One connection through the line: the writers to either end."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.writers: dict[Way, asyncio.StreamWriter] = {"up": far, "down": near}
        self.torn = False  # bytes of it were lost: it can never be right again

    def end(self, reset: bool = False) -> None:
        for writer in self.writers.values():
            if reset:
                sock = writer.get_extra_info("socket")
                with suppress(OSError):  # it may have ended by itself
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def half_close(self, way: Way) -> None:
        with suppress(OSError, RuntimeError):
            self.writers[way].write_eof()


class Wire:
    """Listens on ``port`` of the loopback and passes on to another port there; a context manager.

    ``up`` and ``down`` count the bytes that were passed to the server and to the client, ``accepted`` the
    connections that came. Every verb that names no way means both.
    """

    def __init__(self, target: int) -> None:
        self.port = 0
        self.accepted = 0
        self.bytes: dict[Way, int] = {"up": 0, "down": 0}
        self._target = target
        self._calls: set[_Call] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._delay = 0.0
        self._lossy: set[Way] = set()
        self._refuses = False

    def __enter__(self) -> Self:
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="wire", daemon=True)
        self._thread.start()
        ready.result(PROMPT)
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._over.set)
        self._thread.join(PROMPT)

    # What a test may ask.

    @property
    def up(self) -> int:
        """Bytes that have gone to the server."""
        return self.bytes["up"]

    @property
    def down(self) -> int:
        """Bytes that have gone to the client."""
        return self.bytes["down"]

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._calls)

    def url(self, scheme: str = "redis") -> str:
        """Return the address of this end of the line."""
        return f"{scheme}://{HOST}:{self.port}"

    # What a test may do to it.

    def hold(self, *ways: Way) -> None:
        """Let nothing through until `mend`, which brings all of it: a network that loses packets for a while."""
        self._do(lambda: [self._gates[way].clear() for way in ways or WAYS])

    def swallow(self, *ways: Way) -> None:
        """Take all bytes and lose them: no answer, no error. `mend` ends the connections that have lost some."""
        self._do(lambda: self._lossy.update(ways or WAYS))

    def delay(self, seconds: float) -> None:
        """Let every byte that comes from now on arrive so much later, in its order."""
        self._do(lambda: setattr(self, "_delay", seconds))

    def drop(self, reset: bool = False) -> None:
        """End every connection, with a reset or politely; new ones get through."""
        self._do(lambda: self._end(reset))

    def cut(self, reset: bool = False) -> None:
        """End every connection, and each new one at once, until `mend`."""
        self._do(lambda: (setattr(self, "_refuses", True), self._end(reset)))

    def half_close(self, way: Way) -> None:
        """Tell one end of every connection that the other has nothing more to say, and listen on."""
        self._do(lambda: [call.half_close(way) for call in self._calls])

    def mend(self) -> None:
        """Be a good line again."""
        self._do(self._mend)

    def _mend(self) -> None:
        self._delay, self._refuses = 0.0, False
        self._lossy.clear()
        for call in [call for call in self._calls if call.torn]:
            call.end(reset=True)
        for gate in self._gates.values():
            gate.set()

    def _end(self, reset: bool) -> None:
        for call in self._calls:
            call.end(reset)

    def _do(self, act: Callable[[], Any]) -> None:
        done: Future[None] = Future()

        def do() -> None:
            try:
                act()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(do)
        done.result(PROMPT)

    # The thread.

    async def _serve(self, ready: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._gates: dict[Way, asyncio.Event] = {way: asyncio.Event() for way in WAYS}
        self._mend()
        server = await asyncio.start_server(self._connect, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set_result(None)
        await self._over.wait()
        server.close()
        self._end(reset=False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            if not self._refuses:
                far_reader, far = await asyncio.open_connection(HOST, self._target)
                await self._join(_Call(near, far), {"up": reader, "down": far_reader})
        except (OSError, asyncio.CancelledError):  # nobody there, or the end: a stream's own callback logs either
            pass
        finally:
            near.transport.abort()
            self._tasks.discard(task)

    async def _join(self, call: _Call, readers: dict[Way, asyncio.StreamReader]) -> None:
        self._calls.add(call)
        try:
            if not self._refuses:
                await asyncio.gather(*(self._pass(call, way, readers[way]) for way in WAYS))
        finally:
            self._calls.discard(call)
            call.end()

    async def _pass(self, call: _Call, way: Way, reader: asyncio.StreamReader) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS)
        reading = asyncio.create_task(self._read(reader, pieces))
        try:
            while True:
                due, data = await pieces.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                await self._gates[way].wait()
                if way in self._lossy:
                    call.torn = True
                elif not await self._write(call, way, data):
                    return
        finally:
            reading.cancel()

    async def _read(self, reader: asyncio.StreamReader, pieces: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Read until the end, which is a piece of no bytes; a task of its own, so that a delay delays nothing else."""
        data = b"?"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:
                data = b""
            await pieces.put((self._loop.time() + self._delay, data))

    async def _write(self, call: _Call, way: Way, data: bytes) -> bool:
        """Pass a piece on; false if it was the last."""
        if not data:
            call.half_close(way)
            return False
        self.bytes[way] += len(data)  # before: whoever has them may look at once
        try:
            call.writers[way].write(data)
            await call.writers[way].drain()
        except (OSError, RuntimeError):  # RuntimeError: this way was closed by `half_close`
            self.bytes[way] -= len(data)
        return True
