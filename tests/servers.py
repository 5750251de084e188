"""Run an app under a real server, in a process of its own, for the length of a ``with`` block.

The law of this file: it starts, watches and ends server processes and knows nothing of the apps in them. It ends no
process but its own; every wait has a deadline. A server that is not installed skips the test and says so. One row of
``SERVERS`` is one way to serve; a test that must hold everywhere is parametrised by ``SERVERS``.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
READY, STOP = 15.0, 5.0  # seconds a server gets to come up, and to go after a signal
# Each of pytest's workers has ports of its own: what a test has killed, it starts again on the same one. All are below
# the ports of outgoing connections, so that nobody takes one between our look and its use.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
PORTS = range(22000 + 1000 * WORKER, 23000 + 1000 * WORKER)
ATTEMPTS = 3


class Kind(NamedTuple):
    """One way to serve: the modules it needs, and what follows ``python -m``."""

    needs: tuple[str, ...]
    line: str


UVICORN = "uvicorn {app} --host {host} --port {port} --ws "
SERVERS: dict[str, Kind] = {
    "uvicorn": Kind(("uvicorn", "websockets"), UVICORN + "websockets-sansio"),
    "uvicorn-rt": Kind(
        ("uvicorn", "websockets", "starlette_rt.uvicorn"), UVICORN + "starlette_rt.uvicorn:RealtimeWebSocketProtocol"
    ),
    "uvicorn-wsproto": Kind(("uvicorn", "wsproto"), UVICORN + "wsproto"),
    "hypercorn": Kind(("hypercorn",), "hypercorn {app} --bind {host}:{port} --worker-class asyncio --workers 0"),
    "granian": Kind(("granian",), "granian {app} --interface asgi --host {host} --port {port} --workers 1"),
}


class Server:
    """A server that answers on ``url`` (``ws://…``) and ``http``."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        self.port = port
        self.url = f"ws://{HOST}:{port}"
        self.http = f"http://{HOST}:{port}"
        self.pid = process.pid
        self._process = process
        self._output = output

    def log(self) -> str:
        """All that the server has written so far, to either stream."""
        return Path(self._output.name).read_text(errors="replace")

    def rss(self) -> int:
        """Resident bytes of the process and its workers. Linux only, as is ``cpu``."""
        pages = [int(_proc(pid, "statm").split()[1]) for pid in self._family()]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """Seconds of user and system time that the process and its workers have used."""
        fields = [_proc(pid, "stat").rpartition(")")[2].split() for pid in self._family()]
        return sum(int(user) + int(system) for user, system in (each[11:13] for each in fields)) / os.sysconf(
            "SC_CLK_TCK"
        )

    def send_signal(self, sig: signal.Signals) -> None:
        """Send a signal and go on; SIGKILL takes the workers along, which would be orphans."""
        if sig == signal.SIGKILL:
            os.killpg(self.pid, sig)  # a group of its own, see _start
        else:
            self._process.send_signal(sig)

    def wait(self, timeout: float = STOP) -> int:
        """The exit code, once the process has ended. Raises ``TimeoutError`` with the log."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the server had not ended after {timeout} s; its log:\n{self.log()}") from None

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """Signal, wait five seconds, kill what is left, and return the exit code; harmless once it has ended."""
        if self._process.poll() is None:
            self.send_signal(sig)
            try:
                self._process.wait(STOP)
            except subprocess.TimeoutExpired:
                self.send_signal(signal.SIGKILL)
        return self._process.wait(STOP)

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def _family(self) -> list[int]:
        family = [self.pid]
        for pid in family:  # grows while it is walked
            family += [int(child) for child in _proc(pid, f"task/{pid}/children").split()]
        return family


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


@contextmanager
def serve(
    app: str = "tests.apps:echo",
    server: str = "uvicorn",
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve ``app`` (an import string, seen from the project's root) and yield the running ``Server``.

    ``server`` names a row of ``SERVERS``; ``args`` are added to its command line, ``env`` to the environment. The
    test is skipped if the server is not installed. Raises ``RuntimeError`` with the log if it does not come up.
    """
    missing = [name for name in SERVERS[server].needs if not _importable(name)]
    if missing:
        pytest.skip(f"{server} needs {', '.join(missing)}, which cannot be imported")
    with tempfile.NamedTemporaryFile(prefix="server-", suffix=".log") as output:
        running = _start(app, server, env or {}, args, output)
        try:
            yield running
        finally:
            running.stop()


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _start(app: str, server: str, env: Mapping[str, str], args: Sequence[str], output: IO[bytes]) -> Server:
    """Start on one free port after the other until the server answers; a process that ended may have lost its port."""
    log = ""
    for _ in range(ATTEMPTS):
        port = _free_port()
        line = SERVERS[server].line.format(app=app, host=HOST, port=port).split()
        process = subprocess.Popen(
            [sys.executable, "-m", *line, *args],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": _path(), **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running = Server(port, process, output)
        if _ready(running):
            return running
        running.stop()
        log = running.log()
        if "in use" not in log:
            break
    raise RuntimeError(f"{server} did not come up; its log:\n{log}")


def _ready(server: Server) -> bool:
    """Whether the server accepts a connection before its time is over."""
    deadline = time.monotonic() + READY
    while server.running and time.monotonic() < deadline:
        try:
            socket.create_connection((HOST, server.port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False


def _free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
