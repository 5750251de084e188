"""How long others wait while 5,000 are told: `python -m tests.benchmarks.wait [--write docs/benchmarks.md]`.

Each contender is one server process with 5,000 members in one group, which is told one message of 100 bytes, twice a
second. Meanwhile somebody asks the same process over one HTTP connection, again and again with a millisecond between;
how long the answers take is how long the loop was held. A server that writes to all members in one go lets nobody in
before it has done. Shown are the median and the longest of all answers of a round, in milliseconds, lower quartiles
over the rounds, which run there and back again (A B C, C B A); first those without a broadcast, for comparison. What
this compares is one machine's; the members' clients share its other core with the one who asks. About two minutes.
"""

from __future__ import annotations

import argparse
import http.client
import socket
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass

from tests.benchmarks import common, rivals

NAMES = ["loop", "socketio", "ws", "generic", "fast"]
CONTENDERS = [contender for name, contender in rivals.CONTENDERS.items() if name in NAMES]
ROUNDS, MEMBERS, TURNS, PACE, SIZE = 9, 5_000, 4, 2.0, 100
GAP = 0.001  # seconds between an answer and the next question
QUIET, TOLD = "nobody is told", "all are told"


@dataclass(frozen=True)
class Waits:
    """Milliseconds that the answers of one round took."""

    median: float
    longest: float


Lane = common.Lane[str, Waits]


class Asker:
    """Somebody who asks the server something small, over one connection."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def ask(self) -> float:
        """Milliseconds until the answer was there."""
        began = time.perf_counter()
        self.connection.request("GET", "/members")
        # else an answer in two parts waits 40 ms for our acknowledgement of the first
        self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self.connection.getresponse().read()
        return (time.perf_counter() - began) * 1e3

    def ask_for(self, seconds: float) -> Waits:
        """Ask again and again for so long."""
        end, waits = time.monotonic() + seconds, [self.ask()]
        while time.monotonic() < end:
            time.sleep(GAP)
            waits.append(self.ask())
        self.connection.close()
        return Waits(statistics.median(waits), max(waits))


def sample(lane: Lane, scenario: str) -> Waits:
    """One round of one contender."""
    server, asker = lane.server, Asker(lane.server.port)
    if scenario == QUIET:
        return asker.ask_for(TURNS / PACE)
    armed = lane.load.order(do="expect", count=TURNS)["armed"]
    server.ask("/broadcast", "POST", turns=TURNS, burst=1, interval=1 / PACE, size=SIZE)
    waits = asker.ask_for(TURNS / PACE)
    heard = lane.load.answer()
    if heard["disorder"] or heard["lost"] or heard["received"] != TURNS * armed:
        raise SystemExit(f"{server.contender.title}: not every message arrived once and in order: {heard}")
    lane.busiest = max(lane.busiest, heard["busy"])
    return waits


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    common.open_files()
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    rivals.prepare(contenders)
    with ExitStack() as stack:
        lanes: list[Lane] = [common.enter(stack, rivals.silent(each), arguments.members) for each in contenders]
        for scenario in (QUIET, TOLD):
            common.measure(lanes, scenario, arguments.rounds, sample)
        return f"{report(lanes)}\n\n{common.busy(lanes)}"


def report(lanes: list[Lane]) -> str:
    """Lower quartiles of the median and of the longest wait."""
    head = ["somebody else waits, ms"]
    rows = [[lane.server.contender.title] for lane in lanes]
    for scenario in (QUIET, TOLD):
        head += [f"{scenario}: median", "longest"]
        for row, lane in zip(rows, lanes, strict=True):
            rounds = lane.samples[scenario]
            figures = [[each.median for each in rounds], [each.longest for each in rounds]]
            row += [f"{common.lower_quartile(found):.1f}" for found in figures]
    return common.table(head, rows)


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--members", type=int, default=MEMBERS)
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("wait", "tests.benchmarks.wait", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
