"""What one delivered broadcast costs the server: `python -m tests.benchmarks.fanout [--write docs/benchmarks.md]`.

Every contender is one server process with 500 members in one group, all of them up at the same time. Each round
lets each contender say the same number of 100-byte messages at the same moderate rate, and reads the CPU time of
its process (user and system, all threads) before and after: microseconds per delivered message. Two ways of
speaking: one message at a time, and ten in one turn of the event loop. Every client checks the order of what it
hears while it is measured, and a message that is lost or out of order fails the run.

The rounds run there and back again (A B C, C B A), and lower quartiles are compared, because noise only adds. Only
the ratios within one run mean anything; the microseconds are this machine's. Socket.IO is installed from npm into
`.bench/` at the first run. About three minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass

from tests.benchmarks import common

CONTENDERS = [
    common.uvicorn("loop", "hand-written Starlette loop", "by_hand:loop"),
    common.socketio(),
    common.uvicorn("generic", "starlette_rt, any server", "realtime:loop"),
    common.uvicorn(
        "fast", "starlette_rt, its uvicorn class", "realtime:loop", "starlette_rt.uvicorn:RealtimeWebSocketProtocol"
    ),
]
ROUNDS = 9
SETTLE = 0.05  # seconds after the last delivery: what a server still tidies up belongs to it


@dataclass(frozen=True)
class Scenario:
    """A way of speaking: `burst` messages in each turn, `pace` turns a second."""

    title: str
    burst: int
    pace: float


SCENARIOS = [Scenario("one at a time", 1, 40.0), Scenario("ten per turn", 10, 8.0)]


@dataclass
class Lane:
    """One contender at work, with its samples per scenario in microseconds per delivery."""

    server: common.Server
    load: common.Load
    samples: dict[Scenario, list[float]]
    busiest: float = 0.0  # the load generator's largest share of its core

    def round(self, scenario: Scenario, messages: int, size: int, members: int) -> float:
        """Let the server speak, and return its microseconds per delivery."""
        self.load.order(do="expect", count=messages)
        before = self.server.cpu()
        turns = messages // scenario.burst
        self.server.ask("/broadcast", "POST", turns=turns, burst=scenario.burst, interval=1 / scenario.pace, size=size)
        heard = self.load.answer()
        time.sleep(SETTLE)
        spent = self.server.cpu() - before
        title = self.server.contender.title
        if heard["disorder"] or heard["lost"] or heard["received"] != messages * members:
            raise SystemExit(f"{title}: not every message arrived once and in order: {heard}")
        self.busiest = max(self.busiest, heard["busy"])
        return spent / heard["received"] * 1e6


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    if any(contender.name == "socketio" for contender in contenders):
        common.prepare_socketio()
    with ExitStack() as stack:
        lanes = [enter(stack, contender, arguments.members) for contender in contenders]
        for scenario in SCENARIOS:
            messages = max(1, arguments.messages // scenario.burst) * scenario.burst
            for lane in lanes:  # warm caches, and let Node compile what it runs
                lane.round(scenario, messages, arguments.size, arguments.members)
            for lane in common.interleaved(lanes, arguments.rounds):
                lane.samples[scenario].append(lane.round(scenario, messages, arguments.size, arguments.members))
        return report(lanes)


def enter(stack: ExitStack, contender: common.Contender, members: int) -> Lane:
    """Start a contender and its load generator, and connect every member."""
    server = stack.enter_context(common.Server(contender))
    load = stack.enter_context(common.Load(server))
    load.order(do="connect", count=members)
    server.until("/members", lambda seen: seen == members)
    return Lane(server, load, {scenario: [] for scenario in SCENARIOS})


def report(lanes: list[Lane]) -> str:
    """Lower quartiles, medians beside them, and the ratio to the first contender."""
    head = ["server CPU per delivery"]
    rows = [[lane.server.contender.title] for lane in lanes]
    for scenario in SCENARIOS:
        head += [f"{scenario.title}, µs", "median", f"ratio to {lanes[0].server.contender.name}"]
        figures = [common.lower_quartile(lane.samples[scenario]) for lane in lanes]
        for row, lane, figure in zip(rows, lanes, figures, strict=True):
            row += [f"{figure:.2f}", f"{statistics.median(lane.samples[scenario]):.2f}", f"{figure / figures[0]:.2f}"]
    busiest = max(lane.busiest for lane in lanes)
    return f"{common.table(head, rows)}\n\nThe load generator was never busier than {busiest:.0%} of its core."


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--members", type=int, default=500)
    parser.add_argument("--messages", type=int, default=80, help="per contender, scenario and round")
    parser.add_argument("--size", type=int, default=100, help="bytes of JSON in one message")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("fanout", "tests.benchmarks.fanout", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
