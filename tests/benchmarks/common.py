"""What every benchmark needs: processes that are started, pinned, read and ended; rounds; and a table.

What must live here: reading the operating system (CPU, memory, the machine's facts), the order of the rounds and
their quartiles, the Markdown. What must not: what a contender is, or what is compared. Linux only: the figures
come from `/proc` and from the process's CPU clock. A process is only ever ended by the one that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".bench"  # ignores itself, see `prepare_socketio`
SOCKETIO = Path(__file__).parent / "apps" / "socketio"
DEADLINE = 150.0  # seconds for one answer of a process
START_DEADLINE = 30.0  # seconds until a server must listen

T = TypeVar("T")


# -- contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One server under test: its short name, its title in the table, its command with the `{fd}` it listens on."""

    name: str
    title: str
    command: Sequence[str]
    path: str = "/ws"
    load: Sequence[str] = ()
    cwd: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)


def uvicorn(name: str, title: str, app: str, ws: str = "websockets-sansio") -> Contender:
    """A contender on uvicorn with uvloop, no compression and no access log; its pings stay at their default."""
    options = f"--fd {{fd}} --loop uvloop --http httptools --ws {ws}"
    quiet = "--ws-per-message-deflate false --no-access-log --log-level warning"
    command = [sys.executable, "-m", "uvicorn", f"tests.benchmarks.apps.{app}", *options.split(), *quiet.split()]
    return Contender(name, title, command)


def socketio(name: str = "socketio", title: str = "Node.js, Socket.IO") -> Contender:
    """Socket.IO on Node.js; `prepare_socketio` must have run."""
    return Contender(
        name,
        title,
        ["node", "server.js", "{fd}"],
        path="/socket.io/?EIO=4&transport=websocket",
        load=["--socketio"],
        cwd=CACHE / "socketio",
        environment={"NODE_ENV": "production"},
    )


def prepare_socketio() -> None:
    """Install Socket.IO from npm into `.bench/socketio`, unless it is there; raises `SystemExit` with the reason."""
    target = socketio().cwd
    target.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    for source in SOCKETIO.iterdir():
        shutil.copy(source, target)
    if (target / "node_modules" / "socket.io").exists():
        return
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--omit=dev", "--loglevel=error"]
    try:
        subprocess.run(["npm", "install", *options], cwd=target, check=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"Socket.IO could not be installed ({error}); leave it out of --contenders") from error


# -- processes -------------------------------------------------------------------------------------------------------


def cores() -> tuple[int, int] | None:
    """The core for servers and the one for load generators, or None where there is only one."""
    mine = sorted(os.sched_getaffinity(0))
    return (mine[0], mine[-1]) if len(mine) > 1 else None


class Process:
    """A child pinned to one core, ended and waited for at the end of its `with` block."""

    def __init__(self, command: Sequence[str], role: int, cwd: Path, environment: dict[str, str], **pipes: Any) -> None:
        pair = cores()
        self.child = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            preexec_fn=(lambda: os.sched_setaffinity(0, {pair[role]})) if pair else None,
            **pipes,
        )
        self.pid = self.child.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.child.terminate()
        try:
            self.child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait(timeout=10)

    def cpu(self) -> float:
        """CPU seconds, user and system, of all threads and the ended ones too: the process's own CPU clock."""
        return time.clock_gettime((~self.pid << 3) | 2)  # clock_getcpuclockid(3), as the C library computes it

    def rss(self) -> int:
        """Resident bytes."""
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024


class Server(Process):
    """A contender's process, asked over HTTP."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as door:  # so that no port is ever guessed
            self.port = door.getsockname()[1]
            fd = door.fileno()
            command = [part.format(fd=fd) for part in contender.command]
            super().__init__(command, 0, contender.cwd, contender.environment, pass_fds=[fd])

    def __enter__(self) -> Self:
        try:
            self.until("/members", lambda members: members == 0, START_DEADLINE)
        except BaseException:
            self.__exit__()
            raise
        return self

    def ask(self, path: str, method: str = "GET", **query: object) -> Any:
        """One HTTP request on a connection of its own; returns the decoded JSON."""
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as response:
            return json.load(response)

    def until(self, path: str, holds: Callable[[Any], bool], deadline: float = START_DEADLINE) -> Any:
        """Ask until the answer will do; raises `TimeoutError` with the last answer."""
        end = time.monotonic() + deadline
        seen: Any = None
        while time.monotonic() < end and self.child.poll() is None:
            try:
                seen = self.ask(path)
            except urllib.error.URLError as error:
                seen = error
            else:
                if holds(seen):
                    return seen
            time.sleep(0.05)
        raise TimeoutError(f"{self.contender.title}: {path} still says {seen!r}")


class Load(Process):
    """The load generator for one server, see `load.py`."""

    def __init__(self, server: Server) -> None:
        contender = server.contender
        url = f"ws://127.0.0.1:{server.port}{contender.path}"
        command = [sys.executable, "-m", "tests.benchmarks.load", url, *contender.load]
        super().__init__(command, 1, ROOT, {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def order(self, **order: object) -> dict[str, Any]:
        """Give one order and return the first answer."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(order).encode() + b"\n")
        self.child.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for one more answer; raises `TimeoutError` or, if the process has died, `RuntimeError`."""
        assert self.child.stdout is not None
        ready, _, _ = select.select([self.child.stdout], [], [], DEADLINE)
        if not ready:
            raise TimeoutError("the load generator has not answered")
        if not (line := self.child.stdout.readline()):
            raise RuntimeError("the load generator has died")
        return dict(json.loads(line))


# -- rounds ----------------------------------------------------------------------------------------------------------


def interleaved(contenders: Sequence[T], rounds: int) -> Iterator[T]:
    """Every contender once per round, there and back again (A B C, C B A, …): a drift of the machine hits all alike."""
    for number in range(rounds):
        yield from contenders if number % 2 == 0 else reversed(contenders)


def lower_quartile(samples: Sequence[float]) -> float:
    """Noise only ever adds, so the lower quartile is the figure; with fewer than two samples the sample."""
    return statistics.quantiles(samples, n=4, method="inclusive")[0] if len(samples) > 1 else samples[0]


# -- the page --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def facts() -> str:
    """One line about the machine and one about the software, as the table's footnote."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    pinned = "servers and load generator each pinned to a core of their own" if cores() else "one core for everything"
    packages = ", ".join(f"{name} {version(name)}" for name in ("starlette", "uvicorn", "uvloop", "picows"))
    return (
        f"Machine: {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.release()}; {pinned}.  \n"
        f"Software: Python {platform.python_version()}, {packages}{node_facts()}."
    )


def node_facts() -> str:
    """Node's and Socket.IO's versions, if they are here."""
    package = socketio().cwd / "node_modules" / "socket.io" / "package.json"
    if not package.exists():
        return ""
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return f", Node.js {node.removeprefix('v')}, Socket.IO {json.loads(package.read_text())['version']}"


def command_line(module: str) -> str:
    """The command that was given, without where it wrote to."""
    words = re.sub(r"--write[ =]\S+ ?", "", " ".join(sys.argv[1:]))
    return f"python -m {module} {words}".strip()


def publish(section: str, module: str, body: str, write: Path | None) -> None:
    """Print the section; with `write`, put it between that page's `<!-- section -->` markers as well."""
    text = f"{body}\n\n{facts()}  \nCommand: `{command_line(module)}`"
    print(f"\n{text}")
    if write is None:
        return
    page = write.read_text(encoding="utf-8")
    start, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    if start not in page or end not in page:
        raise SystemExit(f"{write} has no section {start} … {end}")
    before, rest = page.split(start, 1)
    write.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--rounds", type=int, default=None, help="interleaved rounds")
    made.add_argument("--contenders", nargs="+", default=None, metavar="NAME", help="only these")
    made.add_argument("--write", type=Path, default=None, metavar="PAGE", help="put the table into this page")
    return made


def chosen(contenders: Sequence[Contender], names: Sequence[str] | None) -> list[Contender]:
    """Those that were asked for, in the table's order; raises `SystemExit` for an unknown name."""
    known = [contender.name for contender in contenders]
    if unknown := set(names or []) - set(known):
        raise SystemExit(f"unknown contender {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [contender for contender in contenders if names is None or contender.name in names]
