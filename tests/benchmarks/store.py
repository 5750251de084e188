"""A real redis-server for a benchmark, and what it has counted: commands, bytes, CPU time.

What must live here: starting it, asking it for its counts, and leaving out of them what the asking itself took. What
must not: what a contender says to it. Without persistence, on the loopback interface, ended by who started it.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Self

from tests.benchmarks.common import ROOT, START_DEADLINE, Process

COMMAND = re.compile(r"^cmdstat_([^:]+):calls=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Counts:
    """What Redis has done: calls of each command, those of scripts included, bytes in and out, CPU seconds, when."""

    calls: Counter[str]
    received: float
    sent: float
    cpu: float
    at: float

    def __sub__(self, before: Counts) -> Counts:
        calls = Counter({name: count - before.calls[name] for name, count in self.calls.items()})
        received, sent = self.received - before.received, self.sent - before.sent
        return Counts(+calls, received, sent, self.cpu - before.cpu, self.at - before.at)

    @property
    def total(self) -> int:
        """Calls of all commands."""
        return self.calls.total()

    @property
    def bytes(self) -> float:
        """Bytes both ways."""
        return self.received + self.sent


class RedisServer(Process):
    """One redis-server; `url` says where. Raises `SystemExit` where there is none on the PATH."""

    def __init__(self) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise SystemExit("this benchmark needs redis-server on the PATH")
        self.folder = TemporaryDirectory()
        with socket.create_server(("127.0.0.1", 0)) as door:
            self.port = door.getsockname()[1]
        quiet = ["--save", "", "--appendonly", "no", "--loglevel", "warning", "--dir", self.folder.name]
        command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", *quiet]
        super().__init__(command, 0, ROOT, {}, stdout=subprocess.DEVNULL)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.asked = self.answered = 0  # bytes that only the asking took

    def __enter__(self) -> Self:
        try:
            self.line = self.dial()
            self.replies = self.line.makefile("rb")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if hasattr(self, "line"):
            self.replies.close()
            self.line.close()
        super().__exit__(*exc_info)
        self.folder.cleanup()

    def dial(self) -> socket.socket:
        """Connect once it listens; raises `TimeoutError`, or `RuntimeError` if it has ended."""
        end = time.monotonic() + START_DEADLINE
        while time.monotonic() < end:
            if self.child.poll() is not None:
                raise RuntimeError("redis-server has ended at once; was its port taken?")
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=START_DEADLINE)
            except ConnectionRefusedError:
                time.sleep(0.02)
        raise TimeoutError("redis-server does not listen")

    def before(self) -> Counts:
        """The counts at the start of a measurement: the CPU time last, so that the asking is not in it."""
        seen = self.counts()
        return Counts(seen.calls, seen.received, seen.sent, self.cpu(), time.monotonic())

    def since(self, before: Counts) -> Counts:
        """What was done since `before`: the CPU time first."""
        spent, now = self.cpu(), time.monotonic()
        seen = self.counts()
        return Counts(seen.calls, seen.received, seen.sent, spent, now) - before

    def counts(self) -> Counts:
        """The counts now, without what this connection has caused."""
        request = b"*2\r\n$4\r\nINFO\r\n$3\r\nall\r\n"
        self.asked += len(request)
        text, size = self.ask(request)
        received = int(field(text, "total_net_input_bytes")) - self.asked
        sent = int(field(text, "total_net_output_bytes")) - self.answered
        self.answered += size
        calls = Counter({name: int(calls) for name, calls in COMMAND.findall(text) if name != "info"})
        return Counts(calls, received, sent, 0.0, 0.0)

    def ask(self, request: bytes) -> tuple[str, int]:
        """One request with a reply that is a string; the reply and its bytes on the wire."""
        self.line.sendall(request)
        head = self.replies.readline()
        size = int(head[1:])
        return self.replies.read(size + 2).decode(), len(head) + size + 2

    def version(self) -> str:
        """The version of the server."""
        return field(self.ask(b"*2\r\n$4\r\nINFO\r\n$6\r\nserver\r\n")[0], "redis_version")


def field(text: str, name: str) -> str:
    """One field of INFO."""
    found = re.search(rf"^{name}:(.*?)\r?$", text, re.MULTILINE)
    assert found is not None, name
    return found[1]
