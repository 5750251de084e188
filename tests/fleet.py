"""Many processes of one app, and a proxy in front: what a deployment is, on one machine.

The law of this file: what is started here is what docs/examples/deployment shows, read from there; only ports, paths,
the app and the time-outs are put in, and a documented line that is not there any more is an error. Every process is a
test's own and is gone with the ``with`` block. It knows nothing of the app.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from tests.servers import HOST, READY, ROOT, STOP, Server
from tests.wires import certificate, free_port

EXAMPLES = ROOT / "docs" / "examples" / "deployment"
APP = "tests.deployed:app"


class Node(Server):
    """One server process of a fleet, on a port that stays its own however often it is started.

    With ``--workers`` among its arguments it is several processes, which `kill` and `freeze` reach too.
    """

    def __init__(self, command: Sequence[str], port: int, env: Mapping[str, str], output: IO[bytes]) -> None:
        self._command, self._env = command, env
        self._frozen = False
        super().__init__(port, _launch(command, output, env), output)

    def ready(self) -> None:
        """Return when it accepts connections. Raises `RuntimeError` with its log."""
        if not _listens(self):
            raise RuntimeError(f"a server did not come up on port {self.port}; its log:\n{self.log()}")

    def start(self) -> None:
        """Start it again, on its port, and return when it is ready."""
        assert not self.running
        self._process = _launch(self._command, self._output, self._env)
        self.pid = self._process.pid
        self.ready()

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """See `Server.stop`; a frozen one is thawed first."""
        self.thaw()
        return super().stop(sig)

    def restart(self) -> None:
        """Stop and start it, as a deploy does."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End it, and its workers, as the kernel does."""
        if self.running:
            self.send_signal(signal.SIGKILL)
        self.wait()

    def freeze(self) -> None:
        """Stop it where it is; its connections stay open."""
        os.killpg(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._frozen = True

    def thaw(self) -> None:
        """Let a frozen one go on."""
        if self._frozen and self.running:
            os.killpg(self.pid, signal.SIGCONT)
        self._frozen = False

    def workers(self) -> list[int]:
        """Return the processes that serve, where it was started with ``--workers``."""
        return [pid for pid in self._family()[1:] if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextmanager
def fleet(
    app: str = APP, size: int = 2, env: Mapping[str, str] | None = None, args: Sequence[str] = ()
) -> Iterator[list[Node]]:
    """Serve ``app`` in ``size`` processes by the documented line, and yield them when all are ready.

    ``args`` are added to the line and win over what stands there; ``env`` is added to the environment.
    """
    with ExitStack() as stack:
        nodes = []
        for _ in range(size):
            port = free_port()
            output = stack.enter_context(tempfile.NamedTemporaryFile(prefix="node-", suffix=".log"))
            nodes.append(Node([*documented_line(app, port), *args], port, env or {}, output))
            stack.callback(_end, nodes[-1])
        for node in nodes:  # they came up together
            node.ready()
        yield nodes


def documented_line(app: str, port: int) -> list[str]:
    """Return the command line of the systemd unit, for ``app`` on ``port``."""
    unit = (EXAMPLES / "app@.service").read_text("utf-8").replace("\\\n", " ")
    found = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert found, "the unit has no ExecStart"
    puts = {"/srv/app/.venv/bin/python": sys.executable, "app:app": app, "%i": str(port)}
    words = shlex.split(found[1])
    assert puts.keys() <= set(words), f"the unit starts something else: {found[1]}"
    return [puts.get(word, word) for word in words]


class Front(Server):
    """A proxy in front of a fleet, which answers on ``url`` (``wss://…``) and ``http`` (``https://…``).

    ``cert`` is its certificate, ``trust`` is for clients and knows it; ``sticky`` is whether an address comes back to
    its node.
    """

    def __init__(
        self, port: int, process: subprocess.Popen[bytes], output: IO[bytes], folder: Path, sticky: bool
    ) -> None:
        super().__init__(port, process, output)
        self.sticky = sticky
        self.url, self.http = f"wss://{HOST}:{port}", f"https://{HOST}:{port}"
        self.cert = folder / "cert.pem"
        self.trust = ssl.create_default_context(cafile=self.cert)
        self.trust.sslsocket_class = Turns
        self.access = folder / "access.log"  # nginx writes one


class Turns(ssl.SSLSocket):
    """A TLS socket that one thread may read while another writes.

    OpenSSL does not allow that: the tickets that a server sends after the handshake, read while the first request is
    written, have made that request vanish. So nothing here waits inside of OpenSSL, and each call has its turn.
    """

    _turn: threading.Lock | None = None  # once the handshake is over
    _patience: float | None = None

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        super().settimeout(0)
        self._turn = threading.Lock()

    def settimeout(self, value: float | None) -> None:
        self._patience = value
        if self._turn is None:
            super().settimeout(value)

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        received: bytes = self._in_turn(super().recv, buflen, flags)
        return received

    def send(self, data: Any, flags: int = 0) -> int:
        sent: int = self._in_turn(super().send, data, flags)
        return sent

    def _in_turn(self, act: Callable[..., Any], *arguments: Any) -> Any:
        assert self._turn is not None
        while True:
            with self._turn:
                try:
                    return act(*arguments)
                except ssl.SSLWantReadError:
                    wants = [self], [], []
                except ssl.SSLWantWriteError:
                    wants = [], [self], []
            try:
                ready = select.select(*wants, self._patience)
            except ValueError:
                raise ConnectionAbortedError("closed by the other thread") from None
            if not any(ready):
                raise TimeoutError


@contextmanager
def front(
    kind: str,
    nodes: Sequence[Server],
    *,
    sticky: bool = False,
    timeout: str = "60s",
    puts: Mapping[str, str] | None = None,
) -> Iterator[Front]:
    """Put ``nginx`` or ``haproxy`` in front of two nodes, by the documented file, and yield it when it listens.

    ``sticky`` lets an address come back to its node, ``timeout`` is how long a WebSocket may say nothing, ``puts`` is
    what else to put in the place of what. Skips the test where the proxy is not installed.
    """
    program = shutil.which(kind) or shutil.which(kind, path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip(f"{kind} is not on the PATH")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{kind}-")))
        output = stack.enter_context((folder / "log").open("wb"))
        certificate(folder)
        port = free_port()
        arguments = {"nginx": _nginx, "haproxy": _haproxy}[kind](
            folder, port, {**_workers(nodes), **(puts or {})}, sticky, timeout
        )
        process = _launch([program, *arguments], output)
        running = Front(port, process, output, folder, sticky)
        stack.callback(_end, running)
        if not _listens(running):
            raise RuntimeError(f"{kind} did not come up; its log:\n{running.log()}")
        yield running


def _nginx(folder: Path, port: int, more: Mapping[str, str], sticky: bool, timeout: str) -> list[str]:
    temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    puts = {
        "http {": "http {\n" + "".join(f"{name}_temp_path {folder}/{name};\n" for name in temporary),
        "/run/nginx.pid": f"{folder}/pid",
        "/var/log/nginx/access.log": f"{folder}/access.log",
        "/etc/ssl/app/": f"{folder}/",
        "listen 443 ssl": f"listen {HOST}:{port} ssl",
        "proxy_read_timeout 60s": f"proxy_read_timeout {timeout}",
        "proxy_send_timeout 60s": f"proxy_send_timeout {timeout}",
        **({"least_conn;": "hash $remote_addr consistent;"} if sticky else {}),
    }
    path = _render("nginx.conf", folder, {**puts, **more})
    return ["-p", str(folder), "-c", str(path), "-e", "stderr", "-g", "daemon off;"]


def _haproxy(folder: Path, port: int, more: Mapping[str, str], sticky: bool, timeout: str) -> list[str]:
    puts = {
        "/etc/ssl/app/": f"{folder}/",
        "bind :443": f"bind {HOST}:{port}",
        "timeout client 60s": f"timeout client {timeout}",
        "timeout server 60s": f"timeout server {timeout}",
        "timeout tunnel 60s": f"timeout tunnel {timeout}",
        **({"balance leastconn": "balance source\n    hash-type consistent"} if sticky else {}),
    }
    return ["-db", "-f", str(_render("haproxy.cfg", folder, {**puts, **more}))]


def _workers(nodes: Sequence[Server]) -> dict[str, str]:
    assert len(nodes) == 2, "the documented files have two workers"
    return {f"{HOST}:{8001 + number}": f"{HOST}:{node.port}" for number, node in enumerate(nodes)}


def _render(name: str, folder: Path, puts: Mapping[str, str]) -> Path:
    """Write the documented file ``name`` into ``folder``, with these things in place of those."""
    text = (EXAMPLES / name).read_text("utf-8")
    missing = [old for old in puts if old not in text]
    assert not missing, f"{name} does not say {missing} any more"
    for old, new in puts.items():
        text = text.replace(old, new)
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def _launch(command: Sequence[str], output: IO[bytes], env: Mapping[str, str] | None = None) -> subprocess.Popen[Any]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own: SIGKILL takes the workers along
    )


def _end(server: Server) -> None:
    """Stop it and print the end of its log, which pytest shows under a test that failed."""
    server.stop()
    print(f"-- port {server.port}:", *server.log().splitlines()[-30:], sep="\n")


def _listens(server: Server) -> bool:
    """Whether the server accepts a connection before its time is over."""
    deadline = time.monotonic() + READY
    while server.running and time.monotonic() < deadline:
        try:
            socket.create_connection((HOST, server.port), timeout=STOP).close()
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False
