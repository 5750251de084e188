"""What one typed event with its acknowledgement costs the server: `python -m tests.benchmarks.inbound`.

Every contender is one server process with 50 clients. Each client asks, waits for the answer, checks it, and asks
again: with one question on its way, and with eight. An event holds a line of text and a number, and the answer holds
the number. Ours decodes it into a dataclass, with a limit on the class and one on the event, and counts; the loop by
hand validates with Pydantic and has no limits; both Socket.IO servers validate nothing. Each round lets every
contender answer the same number of questions, and reads the CPU time of its process (user and system, all threads)
before and after: microseconds per event. A wrong answer or a lost client fails the run.

The rounds run there and back again (A B C, C B A), and lower quartiles are compared, because noise only adds. Only
the ratios within one run mean anything; the microseconds are this machine's. Socket.IO is installed from npm and
python-socketio from PyPI into `.bench/` at the first run. About two minutes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tests.benchmarks import common

FAST = "starlette_rt.uvicorn:RealtimeWebSocketProtocol"
PYTHON_SOCKETIO = common.CACHE / "python-socketio"
ROUNDS, CLIENTS, EVENTS = 25, 50, 1_000
SETTLE = 0.05  # seconds after the last answer: what a server still tidies up belongs to it


def contender(name: str, title: str, app: str, dialect: str, ws: str = "websockets-sansio") -> common.Contender:
    """A contender on uvicorn, asked in this dialect."""
    return replace(common.uvicorn(name, title, app, ws), load=["--dialect", dialect])


CONTENDERS = [
    contender("naive", "hand-written Starlette loop, Pydantic", "typed_by_hand:app", "bare"),
    contender("generic", "starlette_rt, any server", "typed:app", "json"),
    contender("fast", "starlette_rt, its uvicorn class", "typed:app", "json", FAST),
    contender("msgpack", "the same in MessagePack", "typed:app", "msgpack", FAST),
    contender("once", "the same with an `id`, at most once", "typed:app", "once", FAST),
    replace(
        contender("python-socketio", "python-socketio", "typed_socketio:app", "socketio"),
        path="/socket.io/?EIO=4&transport=websocket",
        environment={"PYTHONPATH": f"{common.ROOT}:{PYTHON_SOCKETIO}"},
    ),
    replace(common.socketio(), command=["node", "typed.js", "{fd}"], load=["--dialect", "socketio"]),
]


def prepare_python_socketio() -> None:
    """Install python-socketio from PyPI into `.bench/`, unless it is there; raises `SystemExit` with the reason."""
    if (PYTHON_SOCKETIO / "socketio").exists():
        return
    common.CACHE.mkdir(exist_ok=True)
    (common.CACHE / ".gitignore").write_text("*\n")
    options = ["--quiet", "--quiet", "--disable-pip-version-check", "--target", str(PYTHON_SOCKETIO)]
    try:
        subprocess.run([sys.executable, "-m", "pip", "install", *options, "python-socketio"], check=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"python-socketio could not be installed ({error}); leave it out of --contenders") from error


@dataclass(frozen=True)
class Scenario:
    """How many questions each client has on their way."""

    title: str
    outstanding: int


SCENARIOS = [Scenario("one on its way", 1), Scenario("eight on their way", 8)]


class Ask(common.Load):
    """The load generator for one server, see `ask.py`."""

    def __init__(self, server: common.Server) -> None:
        url = f"ws://127.0.0.1:{server.port}{server.contender.path}"
        command = [sys.executable, "-m", "tests.benchmarks.ask", url, *server.contender.load]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        common.Process.__init__(self, command, 1, common.ROOT, {}, **pipes)


@dataclass
class Lane:
    """One contender at work, with its samples per scenario in microseconds per event."""

    server: common.Server
    load: Ask
    samples: dict[Scenario, list[float]]
    busiest: float = 0.0  # the load generator's largest share of its core

    def round(self, scenario: Scenario, clients: int, events: int) -> float:
        """Let the clients ask, and return the server's microseconds per event."""
        before = self.server.cpu()
        heard = self.load.order(do="ask", count=events // clients, outstanding=scenario.outstanding)
        time.sleep(SETTLE)
        spent = self.server.cpu() - before
        if heard["wrong"] or heard["lost"] or heard["answered"] != events // clients * clients:
            raise SystemExit(f"{self.server.contender.title}: not every event was answered once and rightly: {heard}")
        self.busiest = max(self.busiest, heard["busy"])
        return spent / heard["answered"] * 1e6


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    names = {contender.name for contender in contenders}
    if "socketio" in names:
        common.prepare_socketio()
    if "python-socketio" in names:
        prepare_python_socketio()
    with ExitStack() as stack:
        lanes = [enter(stack, contender, arguments.clients) for contender in contenders]
        for scenario in SCENARIOS:
            for lane in [*lanes, *lanes]:  # warm caches, and let Node compile what it runs
                lane.round(scenario, arguments.clients, arguments.events)
            for lane in common.interleaved(lanes, arguments.rounds):
                lane.samples[scenario].append(lane.round(scenario, arguments.clients, arguments.events))
        return report(lanes)


def enter(stack: ExitStack, contender: common.Contender, clients: int) -> Lane:
    """Start a contender and its load generator, and connect every client."""
    server = stack.enter_context(common.Server(contender))
    load = stack.enter_context(Ask(server))
    load.order(do="connect", count=clients)
    server.until("/members", lambda seen: seen == clients)
    return Lane(server, load, {scenario: [] for scenario in SCENARIOS})


def report(lanes: list[Lane]) -> str:
    """Lower quartiles, medians beside them, and the ratio to the first contender."""
    head = ["server CPU per event"]
    rows = [[lane.server.contender.title] for lane in lanes]
    for scenario in SCENARIOS:
        head += [f"{scenario.title}, µs", "median", f"ratio to {lanes[0].server.contender.name}"]
        figures = [common.lower_quartile(lane.samples[scenario]) for lane in lanes]
        for row, lane, figure in zip(rows, lanes, figures, strict=True):
            row += [f"{figure:.2f}", f"{statistics.median(lane.samples[scenario]):.2f}", f"{figure / figures[0]:.2f}"]
    busiest = max(lane.busiest for lane in lanes)
    return (
        f"{common.table(head, rows)}\n\nThe load generator was never busier than {busiest:.0%} of its core."
        f"{python_socketio_facts(lanes)}"
    )


def python_socketio_facts(lanes: list[Lane]) -> str:
    """python-socketio's version, if it took part."""
    if all(lane.server.contender.name != "python-socketio" for lane in lanes):
        return ""
    (found,) = PYTHON_SOCKETIO.glob("python_socketio-*.dist-info")
    return f" python-socketio is {found.name.removeprefix('python_socketio-').removesuffix('.dist-info')}."


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--events", type=int, default=EVENTS, help="per contender, scenario and round")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("inbound", "tests.benchmarks.inbound", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
