"""What it costs when all come, all hear and all go: `python -m tests.benchmarks.storm [--write docs/benchmarks.md]`.

One server process and N clients, 1,000 and 19,000 (as many as fit into 20,000 open files). They come in a storm, 64
handshakes at a time, and join one group; the group is told some single messages, one after another has been written;
all close at once. CPU time of the server's process, user and system, of each phase: for each who comes, for each
message that a member hears, and for each who goes. A phase is over when `/members` says so and a moment has
passed. In the second one both sizes hear the same number of messages in all, at the same rate.

What one costs should not depend on how many there are: the ratio of the last size to the first says so. Each contender
starts afresh for each size and each round, and a few have come, heard and gone before. The rounds run there and back
again, three of them, because the large storm takes its time, and lower quartiles are shown. uvicorn's pings are off:
with 19,000 clients they would be a thousand a second, which is another question. About a quarter of an hour.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.benchmarks import common, rivals

NAMES = ["loop", "python-socketio", "socketio", "ws", "generic", "fast", "floor"]
CONTENDERS = [contender for name, contender in rivals.CONTENDERS.items() if name in NAMES]
SIZES, ROUNDS = [1_000, 19_000], 3
DELIVERIES = 95_000  # messages that all members together hear in one round
GAP = 40e-6  # seconds from one message to the next, for each member: no contender's core is full
WARM_UP = 300  # clients who come, hear and go before anything is measured
SETTLE = 0.3  # seconds after a phase: what a server still tidies up belongs to it
SPARE = 100  # open files that are no client's
GONE = 120.0  # seconds until the last of all has gone


@dataclass(frozen=True)
class Storm:
    """Microseconds of the server for each who came, each message that was heard, and each who went."""

    come: float
    hear: float
    go: float


PHASES: dict[str, Callable[[Storm], float]] = {
    "each who comes": lambda storm: storm.come,
    "each delivery": lambda storm: storm.hear,
    "each who goes": lambda storm: storm.go,
}


@dataclass
class Crowd:
    """The clients of one server, who do everything together."""

    server: common.Server
    load: common.Load
    members: int
    busy: float = field(default=0.0, init=False)  # the load generator's share of its core while they heard

    def come(self) -> None:
        """All of them connect and join."""
        self.load.order(do="connect", count=self.members)
        self.server.until("/members", lambda seen: seen == self.members)

    def hear(self, deliveries: int) -> int:
        """They are told single messages until they have heard about so many; how many it was."""
        turns = max(1, deliveries // self.members)
        self.load.order(do="expect", count=turns)
        interval = self.members * GAP / self.server.contender.share
        self.server.ask("/broadcast", "POST", turns=turns, burst=1, interval=interval, size=100)
        heard = self.load.answer()
        self.busy = max(self.busy, heard["busy"])
        if heard["disorder"] or heard["lost"] or heard["received"] != turns * self.members:
            raise SystemExit(f"{self.server.contender.title}: not every message arrived once and in order: {heard}")
        return int(heard["received"])

    def go(self) -> None:
        """All of them close."""
        self.load.order(do="drop")
        self.server.until("/members", lambda seen: seen == 0, GONE)


@contextmanager
def spent(server: common.Server) -> Iterator[list[float]]:
    """Put the microseconds of the server's CPU in the block, and shortly after it, into the list."""
    found: list[float] = []
    before = server.cpu()
    yield found
    time.sleep(SETTLE)
    found.append((server.cpu() - before) * 1e6)


def storm(contender: common.Contender, members: int, deliveries: int) -> tuple[Storm, float]:
    """One fresh server, first warmed up; also how busy the load generator was."""
    with common.Server(contender) as server, common.Load(server) as load:
        few, crowd = Crowd(server, load, min(WARM_UP, members)), Crowd(server, load, members)
        few.come()
        few.hear(min(10 * few.members, deliveries))
        few.go()
        time.sleep(SETTLE)
        with spent(server) as come:
            crowd.come()
        with spent(server) as hear:
            heard = crowd.hear(deliveries)
        with spent(server) as go:
            crowd.go()
    return Storm(come[0] / members, hear[0] / heard, go[0] / members), crowd.busy


def check_files(members: int) -> None:
    """Raise `SystemExit` if so many clients cannot be open in one process."""
    common.open_files()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE
    if members > most:
        raise SystemExit(f"a process may open {most:,} clients here (ulimit -n); choose other --members")


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    sizes: list[int] = arguments.members
    check_files(max(sizes))
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    rivals.prepare(contenders)
    lanes = [(contender, size) for size in sizes for contender in contenders]
    found: dict[tuple[str, int], list[Storm]] = {(contender.name, size): [] for contender, size in lanes}
    busiest = 0.0
    for contender, size in common.interleaved(lanes, arguments.rounds):
        measured, busy = storm(rivals.silent(contender), size, arguments.deliveries)
        found[contender.name, size].append(measured)
        busiest = max(busiest, busy)
    versions = rivals.facts(contenders)
    note = f"While they heard, the load generator was never busier than {busiest:.0%} of its core."
    note += f" Installed beside them: {versions}." if versions else ""
    return f"{report(contenders, sizes, found)}\n\n{note}"


def report(
    contenders: Sequence[common.Contender], sizes: Sequence[int], found: dict[tuple[str, int], list[Storm]]
) -> str:
    """Lower quartiles of each phase at each size, and the ratio of the last size to the first."""
    head, rows = ["server CPU, µs"], [[contender.title] for contender in contenders]
    for title, of in PHASES.items():
        head += [*(f"{title}: {size:,}" for size in sizes), "ratio"]
        for row, contender in zip(rows, contenders, strict=True):
            figures = [common.lower_quartile([of(each) for each in found[contender.name, size]]) for size in sizes]
            row += [*(f"{figure:,.1f}" for figure in figures), f"{figures[-1] / figures[0]:.2f}"]
    return common.table(head, rows)


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--members", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--deliveries", type=int, default=DELIVERIES, help="heard by all together in one round")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("storm", "tests.benchmarks.storm", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
