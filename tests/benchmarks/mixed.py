"""What order costs where targets overlap: `python -m tests.benchmarks.mixed [--write docs/benchmarks.md]`.

500 clients of `rt.v1.json`, each a member of three of four groups that overlap. A turn says twelve messages to the four
groups in turn, of which each member hears nine, and in their midst one to a single client, so that members get
different combinations. All carry one rising number, and every client checks that it rises: what one task says reaches
each connection in the order of the calls. Meanwhile the server changes what presence says of five of them, one four
times a second, and all members of that group are told. This is compared with ten messages per turn to one group that
everybody is in: the same server, the same clients, one after the other in each round.

A delivered frame is one event or one presence diff that a member receives, alone or in a batch. More ways of speaking
show what is what: the same while presence does not change, and with nine broadcasts, of which a member hears six or
seven, so that fewer share the price of its one write in a turn. The last columns count WebSocket messages, which are
batches of events, or a diff. All figures are CPU time of the server's process. What is lost or out of order fails the
run. About four minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product

from tests.benchmarks import common

OPTIONS = ["--offer", "rt.v1.json", "--rising"]
CONTENDERS = [
    replace(made, path="/ws?n={n}", load=OPTIONS)
    for made in (
        common.uvicorn("generic", "starlette_rt, any server", "mixed:app"),
        common.uvicorn("fast", "starlette_rt, its uvicorn class", "mixed:app", common.FAST),
    )
]
ROUNDS = 9
PACE = 20.0  # turns a second
SETTLE = 0.05  # seconds after the last delivery: what a server still tidies up belongs to it


@dataclass(frozen=True)
class Way:
    """A way of speaking: so many broadcasts to the groups in each turn and a push, or ten messages to everybody."""

    title: str
    broadcasts: int
    changes: bool = False


TO_ALL = Way("ten to all", 0)
WAYS = [
    TO_ALL,
    Way("twelve to three of four groups and a push, presence changes", 12, changes=True),
    Way("the same, presence does not change", 12),
    Way("nine and a push, presence changes", 9, changes=True),
]


@dataclass(frozen=True)
class Found:
    """One round: microseconds for each frame and for each WebSocket message, and what each member heard in a turn."""

    frame: float
    message: float
    heard: float
    diffs: float


Lane = common.Lane[Way, Found]


def sample(lane: Lane, way: Way, arguments: argparse.Namespace) -> Found:
    """Let the server speak one way."""
    turns = arguments.turns
    query = {"turns": turns, "burst": 10, "interval": 1 / PACE, "size": arguments.size}
    query |= {"broadcasts": way.broadcasts, "changes": int(way.changes)}
    expected = lane.server.ask("/expected", **query)
    lane.load.order(do="expect", total=expected)
    before = lane.server.cpu()
    lane.server.ask("/broadcast", "POST", **query)
    heard = lane.load.answer()
    time.sleep(SETTLE)
    spent = (lane.server.cpu() - before) * 1e6
    if heard["disorder"] or heard["lost"] or heard["received"] != expected:
        raise SystemExit(f"{lane.server.contender.title}: not every message arrived once and in order: {heard}")
    lane.busiest = max(lane.busiest, heard["busy"])
    shares = turns * arguments.members
    frames = expected + heard["diffs"]
    return Found(spent / frames, spent / heard["frames"], expected / shares, heard["diffs"] / shares)


def measure(lanes: Sequence[Lane], arguments: argparse.Namespace) -> None:
    """All ways of all contenders in each round, so that each is compared with its neighbour in time."""
    work = list(product(lanes, WAYS))
    for lane, way in work:
        sample(lane, way, arguments)  # warms caches
    for lane, way in common.interleaved(work, arguments.rounds):
        lane.samples.setdefault(way, []).append(sample(lane, way, arguments))


def row(lane: Lane, way: Way) -> list[str]:
    """One way of one contender, beside ten to all."""
    found, base = lane.samples[way], lane.samples[TO_ALL]
    title = f"{lane.server.contender.title}: {way.title}"
    cells = [f"{statistics.mean(values):.2f}" for values in ([e.heard for e in found], [e.diffs for e in found])]
    frames = [common.lower_quartile([each.frame for each in rounds]) for rounds in (found, base)]
    messages = [common.lower_quartile([each.message for each in rounds]) for rounds in (found, base)]
    cells += [f"{frames[0]:.2f}", f"{frames[0] / frames[1]:.2f}"]
    return [title, *cells, f"{messages[0]:.1f}", f"{messages[0] / messages[1]:.2f}"]


HEAD = ["server CPU", "events for each member and turn", "presence diffs", "for each frame, µs", "ratio to ten to all"]
HEAD += ["for each WebSocket message, µs", "ratio to ten to all"]


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    with ExitStack() as stack:
        lanes: list[Lane] = [common.enter(stack, contender, arguments.members) for contender in contenders]
        measure(lanes, arguments)
        rows = [row(lane, way) for lane in lanes for way in WAYS]
        return "\n\n".join([common.table(HEAD, rows), common.busy(lanes)])


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--members", type=int, default=500)
    parser.add_argument("--turns", type=int, default=30, help="per contender, way and round")
    parser.add_argument("--size", type=int, default=100, help="bytes of JSON in one message")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("mixed", "tests.benchmarks.mixed", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
