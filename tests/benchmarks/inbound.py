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
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from tests.benchmarks import common

ROUNDS, CLIENTS, EVENTS = 25, 50, 1_000
SETTLE = 0.05  # seconds after the last answer: what a server still tidies up belongs to it


def contender(name: str, title: str, app: str, dialect: str, ws: str = "websockets-sansio") -> common.Contender:
    """A contender on uvicorn, asked in this dialect."""
    return replace(common.uvicorn(name, title, app, ws), load=["--dialect", dialect])


CONTENDERS = [
    contender("naive", "hand-written Starlette loop, Pydantic", "typed_by_hand:app", "bare"),
    contender("generic", "starlette_rt, any server", "typed:app", "json"),
    contender("fast", "starlette_rt, its uvicorn class", "typed:app", "json", common.FAST),
    contender("msgpack", "the same in MessagePack", "typed:app", "msgpack", common.FAST),
    contender("once", "the same with an `id`, at most once", "typed:app", "once", common.FAST),
    common.with_python(
        replace(
            contender("python-socketio", "python-socketio", "typed_socketio:app", "socketio"),
            path="/socket.io/?EIO=4&transport=websocket",
        ),
        "python-socketio",
    ),
    replace(common.socketio(program="typed.js"), load=["--dialect", "socketio"]),
]


@dataclass(frozen=True)
class Scenario:
    """How many questions each client has on their way."""

    title: str
    outstanding: int


SCENARIOS = [Scenario("one on its way", 1), Scenario("eight on their way", 8)]


def sample(lane: common.Lane[Scenario, float], scenario: Scenario, arguments: argparse.Namespace) -> float:
    """Let the clients ask, and return the server's microseconds per event."""
    each = arguments.events // arguments.clients
    before = lane.server.cpu()
    heard = lane.load.order(do="ask", count=each, outstanding=scenario.outstanding)
    time.sleep(SETTLE)
    spent = lane.server.cpu() - before
    if heard["wrong"] or heard["lost"] or heard["answered"] != each * arguments.clients:
        raise SystemExit(f"{lane.server.contender.title}: not every event was answered once and rightly: {heard}")
    lane.busiest = max(lane.busiest, heard["busy"])
    return float(spent / heard["answered"] * 1e6)


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    names = {contender.name for contender in contenders}
    if "socketio" in names:
        common.prepare_socketio()
    if "python-socketio" in names:
        common.prepare_python("python-socketio", "python-socketio")
    with ExitStack() as stack:
        lanes = [common.enter(stack, contender, arguments.clients, "ask") for contender in contenders]
        for scenario in SCENARIOS:
            common.measure(lanes, scenario, arguments.rounds, partial(sample, arguments=arguments), warm_up=2)
        printed = common.comparison("server CPU per event", lanes, {each: each.title for each in SCENARIOS})
    if "python-socketio" in names:
        printed += f" Installed beside it: {common.python_facts('python-socketio', 'python-socketio')}."
    return printed


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
