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
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from tests.benchmarks import common

CONTENDERS = [
    common.uvicorn("loop", "hand-written Starlette loop", "by_hand:loop"),
    common.socketio(),
    common.uvicorn("generic", "starlette_rt, any server", "realtime:loop"),
    common.uvicorn("fast", "starlette_rt, its uvicorn class", "realtime:loop", common.FAST),
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


def sample(lane: common.Lane[Scenario, float], scenario: Scenario, arguments: argparse.Namespace) -> float:
    """Let the server speak, and return its microseconds per delivery."""
    turns = max(1, arguments.messages // scenario.burst)
    messages = turns * scenario.burst
    lane.load.order(do="expect", count=messages)
    before = lane.server.cpu()
    interval, size = 1 / scenario.pace, arguments.size
    lane.server.ask("/broadcast", "POST", turns=turns, burst=scenario.burst, interval=interval, size=size)
    heard = lane.load.answer()
    time.sleep(SETTLE)
    spent = lane.server.cpu() - before
    if heard["disorder"] or heard["lost"] or heard["received"] != messages * arguments.members:
        raise SystemExit(f"{lane.server.contender.title}: not every message arrived once and in order: {heard}")
    lane.busiest = max(lane.busiest, heard["busy"])
    return float(spent / heard["received"] * 1e6)


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    if any(contender.name == "socketio" for contender in contenders):
        common.prepare_socketio()
    with ExitStack() as stack:
        lanes = [common.enter(stack, contender, arguments.members) for contender in contenders]
        for scenario in SCENARIOS:
            common.measure(lanes, scenario, arguments.rounds, partial(sample, arguments=arguments))
        return common.comparison("server CPU per delivery", lanes, {each: each.title for each in SCENARIOS})


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
