"""How long a message is on its way to 500 members: `python -m tests.benchmarks.latency [--write docs/benchmarks.md]`.

Each contender is one server process with 500 members in one group; all are up at the same time, and one speaks. First
it says single messages of 100 bytes without a pause, as fast as it can: its saturation, in deliveries a second. Then it
says them at a steady rate, and each client tells how long each message took. Once all keep the same rate, half of what
saturates Socket.IO on Node.js (or the first contender, without it): only this compares them. Once each keeps half of
its own. Who cannot keep a rate has no delay to speak of, since it grows for as long as one speaks, and has no figure.

The time begins when a message was due, and not when a server that stood still came to say it: what waits behind a
pause is late as well. It ends in the load generator, whose own queue is in it, for all alike; so is up to a
millisecond of the timer, which on libuv, under uvloop and under Node.js, knows no less. uvicorn's pings are off.

The rounds run there and back again (A B C, C B A). Percentiles are those of one round, over all its deliveries, and
lower quartiles over the rounds are shown; for the saturation it is the upper quartile, because noise only slows. About
eight minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.benchmarks import common, rivals

NAMES = ["loop", "python-socketio", "litestar", "broadcaster", "socketio", "ws", "generic", "fast"]
CONTENDERS = [contender for name, contender in rivals.CONTENDERS.items() if name in NAMES]
REFERENCE = "socketio"
ROUNDS, SATURATIONS, MEMBERS, SIZE = 5, 3, 500, 100
SECONDS = 3.0  # of speaking, in one round
PERCENTILES = [50, 99, 99.9]
PROBE = 20  # messages that tell how many make a round
SETTLE = 0.1  # seconds between two rounds


@dataclass(frozen=True)
class Round:
    """Milliseconds that the percentiles of all deliveries took, and the load generator's share of its core."""

    delays: list[float]
    busy: float


@dataclass
class Lane(common.Lane[str, Round]):
    """One contender at work; messages a second at which it speaks, and how fast it can."""

    saturation: float = field(default=0.0, kw_only=True)  # messages a second
    rates: dict[str, float] = field(default_factory=dict, kw_only=True)
    pressed: float = field(default=0.0, kw_only=True)  # the load generator's share of its core at saturation


def enter(stack: ExitStack, contender: common.Contender, members: int) -> Lane:
    """Start a contender and its load generator, and connect every client."""
    made = common.enter(stack, rivals.silent(contender), members, "hear")
    return Lane(made.server, made.load)


def say(lane: Lane, turns: int, rate: float) -> Round:
    """Let it say so many messages at so many a second, 0 for without a pause; raises `SystemExit` for a lost one."""
    armed = lane.load.order(do="expect", count=turns, percentiles=PERCENTILES)["armed"]
    interval = 1 / rate if rate else 0.0
    lane.server.ask("/broadcast", "POST", turns=turns, burst=1, interval=interval, size=SIZE, stamp=1)
    heard = lane.load.answer()
    time.sleep(SETTLE)
    if heard["disorder"] or heard["lost"] or heard["delays"] != turns * armed:
        raise SystemExit(f"{lane.server.contender.title}: not every message arrived once and in order: {heard}")
    return Round([delay / 1000 for delay in heard["percentiles"]], heard["busy"])


def pace(lane: Lane, turns: int) -> float:
    """Messages a second without a pause."""
    since = time.monotonic()
    lane.pressed = say(lane, turns, 0.0).busy
    return turns / (time.monotonic() - since - SETTLE)


def saturate(lanes: Sequence[Lane], seconds: float) -> None:
    """Find out how fast each can speak."""
    turns = {lane.server.contender.name: max(PROBE, round(pace(lane, PROBE) * seconds)) for lane in lanes}
    found: dict[str, list[float]] = {name: [] for name in turns}
    for lane in common.interleaved(lanes, SATURATIONS):
        name = lane.server.contender.name
        found[name].append(pace(lane, turns[name]))
    for lane in lanes:
        lane.saturation = statistics.quantiles(found[lane.server.contender.name], n=4, method="inclusive")[2]


def choose(lanes: Sequence[Lane], rate: float | None) -> None:
    """The same rate for all who can keep it, and half of its own for each."""
    named = {lane.server.contender.name: lane for lane in lanes}
    same = rate or named.get(REFERENCE, lanes[0]).saturation / 2
    for lane in lanes:
        lane.rates = {"own": lane.saturation / 2}
        if lane.saturation > same:
            lane.rates["same"] = same


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    rivals.prepare(contenders)

    def sample(lane: Lane, scenario: str) -> Round:
        rate = lane.rates[scenario]
        found = say(lane, max(1, round(rate * arguments.seconds)), rate)
        lane.busiest = max(lane.busiest, found.busy)
        return found

    with ExitStack() as stack:
        lanes = [enter(stack, contender, arguments.members) for contender in contenders]
        saturate(lanes, arguments.seconds)
        choose(lanes, arguments.rate)
        for scenario in ("same", "own"):
            able = [lane for lane in lanes if scenario in lane.rates]
            common.measure(able, scenario, arguments.rounds, sample)
        return report(lanes, arguments.members)


def report(lanes: Sequence[Lane], members: int) -> str:
    """Delays at the same rate, with the ratio of p99 to the reference, and at half of each contender's own."""
    same = next((lane.rates["same"] for lane in lanes if "same" in lane.rates), 0.0)
    titles = [f"p{each:g}" for each in PERCENTILES]
    named = {lane.server.contender.name: lane for lane in lanes}
    reference = named.get(REFERENCE, lanes[0])
    head = [f"to {members} members, ms", f"{same:.0f} a second: {titles[0]}", *titles[1:]]
    head += [f"p99 to {reference.server.contender.name}", "saturation, deliveries a second"]
    head += ["half of it, a second", *titles]
    rows = [[lane.server.contender.title, *row(lane, reference, members)] for lane in lanes]
    most = max(lane.pressed for lane in lanes)
    versions = rivals.facts(lane.server.contender for lane in lanes)
    note = f"Without a pause it was at {most:.0%} at most."
    note += f" Installed beside them: {versions}." if versions else ""
    return f"{common.table(head, rows)}\n\n{common.busy(lanes)} {note}"


def row(lane: Lane, reference: Lane, members: int) -> list[str]:
    """The figures of one contender."""
    ratio = "-"
    if (mine := delays(lane, "same")) and (theirs := delays(reference, "same")):
        ratio = f"{mine[1] / theirs[1]:.2f}" if theirs[1] else "-"
    found = [f"{each:.2f}" for each in mine] or ["-"] * len(PERCENTILES)
    own = [f"{each:.2f}" for each in delays(lane, "own")]
    return [*found, ratio, f"{lane.saturation * members:,.0f}", f"{lane.rates['own']:.0f}", *own]


def delays(lane: Lane, scenario: str) -> list[float]:
    """The lower quartile of each percentile over the rounds; none where there were no rounds."""
    rounds = [each.delays for each in lane.samples.get(scenario, ())]
    return [common.lower_quartile(some) for some in zip(*rounds, strict=True)]


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--members", type=int, default=MEMBERS)
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="of speaking, in one round")
    parser.add_argument("--rate", type=float, default=None, metavar="R", help="messages a second, the same for all")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("latency", "tests.benchmarks.latency", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
