"""What one delivered broadcast costs the server: `python -m tests.benchmarks.fanout [--write docs/benchmarks.md]`.

Every contender is one server process with 500 members in one group, all of them up at the same time; see `rivals.py`
for who they are. Each round lets each contender say its messages at a moderate rate, and reads the CPU time of its
process (user and system, all threads) before and after: microseconds per delivered message. Five scenarios: 100 bytes
one at a time, ten in one turn of the event loop, 1 kB and 16 kB one at a time, and at last 100 bytes to 5,000 members,
for which each load generator connects as many more. A slow rival is asked for a part of the messages at a part of the
rate (`share`), so that it can follow. Every client checks the order of what it hears while it is measured, and a
message that is lost or out of order fails the run.

The rounds run there and back again (A B C, C B A), and lower quartiles are compared, because noise only adds. Only
the ratios within one run mean anything; the microseconds are this machine's. The rivals are installed from npm and
PyPI into `.bench/` at the first run. With `--write` the figures are drawn as well, into `images/fanout.svg` beside the
page. About fifteen minutes for all; `--contenders` and `--scenarios` pick. Each process opens a file for each member.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks import common, plot, rivals

ROUNDS = 9
SETTLE = 0.05  # seconds after the last delivery: what a server still tidies up belongs to it
REFERENCES = ["loop", "socketio", "floor"]  # whom the others are compared with
DRAWN = ["one", "ten"]
PLOT = Path("images") / "fanout.svg"  # beside the page


@dataclass(frozen=True)
class Scenario:
    """A way of speaking: in each round `turns` turns, `pace` of them a second, of `burst` messages of `size` bytes."""

    name: str
    title: str
    turns: int
    pace: float
    burst: int = 1
    size: int = 100
    members: int = 500
    without: frozenset[str] = frozenset()  # for whom it makes no sense

    def shared(self, share: float) -> Scenario:
        """The same at a part of the rate for a part of the messages."""
        return replace(self, turns=max(1, round(self.turns * share)), pace=self.pace * share)


SCENARIOS = [
    Scenario("one", "one at a time", turns=50, pace=40.0),
    Scenario("ten", "ten per turn", turns=10, pace=8.0, burst=10),
    Scenario("1kB", "1 kB", turns=50, pace=40.0, size=1_000),
    Scenario("16kB", "16 kB", turns=12, pace=10.0, size=16_000),
    Scenario("many", "to many", turns=6, pace=4.0, members=5_000, without=frozenset({"channels"})),
]


@dataclass(frozen=True)
class Round:
    """What one delivery cost, in microseconds of the server, and the share of its core that the load generator took."""

    cost: float
    busy: float


Lane = common.Lane[Scenario, Round]


# -- measuring -------------------------------------------------------------------------------------------------------


def sample(lane: Lane, scenario: Scenario) -> Round:
    """Let the server speak, and tell what a delivery cost it."""
    asked = scenario.shared(lane.server.contender.share)
    messages = asked.turns * asked.burst
    lane.load.order(do="expect", count=messages)
    before = lane.server.cpu()
    query = {"turns": asked.turns, "burst": asked.burst, "interval": 1 / asked.pace, "size": asked.size}
    lane.server.ask("/broadcast", "POST", **query)
    heard = lane.load.answer()
    time.sleep(SETTLE)
    spent = lane.server.cpu() - before
    if heard["disorder"] or heard["lost"] or heard["received"] != messages * scenario.members:
        raise SystemExit(f"{lane.server.contender.title}: not every message arrived once and in order: {heard}")
    return Round(spent / heard["received"] * 1e6, heard["busy"])


def grow(lane: Lane, members: int) -> None:
    """Connect as many more as are missing."""
    there = lane.server.ask("/members")
    lane.load.order(do="connect", count=members - there)
    lane.server.until("/members", lambda seen: seen == members)


def run(contenders: Sequence[common.Contender], scenarios: Sequence[Scenario], rounds: int) -> list[Lane]:
    """All rounds of all contenders; those with fewer members come first."""
    common.open_files()
    rivals.prepare(contenders)
    with ExitStack() as stack:
        lanes: list[Lane] = [common.enter(stack, contender, 0) for contender in contenders]
        for scenario in sorted(scenarios, key=lambda each: each.members):
            able = [lane for lane in lanes if lane.server.contender.name not in scenario.without]
            for lane in able:
                grow(lane, scenario.members)
            common.measure(able, scenario, rounds, sample)
        return lanes


# -- telling ---------------------------------------------------------------------------------------------------------


def cost(lane: Lane, scenario: Scenario) -> float | None:
    """The lower quartile, or None for whom it was left out."""
    rounds = lane.samples.get(scenario)
    return common.lower_quartile([each.cost for each in rounds]) if rounds else None


def ratios(lane: Lane, references: Sequence[Lane], scenario: Scenario) -> str:
    """The cost as a multiple of each reference's."""
    figure, others = cost(lane, scenario), [cost(each, scenario) for each in references]
    if figure is None:
        return "-"
    return " · ".join("-" if other is None else f"{figure / other:.2f}" for other in others)


def report(lanes: Sequence[Lane], scenarios: Sequence[Scenario]) -> str:
    """The table, how busy the load generators were, and which versions were here."""
    references = [lane for lane in lanes if lane.server.contender.name in REFERENCES]
    compared = f"to {' · '.join(lane.server.contender.name for lane in references)}"
    head = ["server CPU per delivery"]
    rows = [[lane.server.contender.title] for lane in lanes]
    for scenario in scenarios:
        head += [f"{scenario.title}, µs", *([compared] if references else [])]
        for row, lane in zip(rows, lanes, strict=True):
            figure = cost(lane, scenario)
            row += ["-" if figure is None else f"{figure:.2f}"]
            row += [ratios(lane, references, scenario)] if references else []
    versions = rivals.facts([lane.server.contender for lane in lanes])
    installed = f" Installed beside them: {versions}." if versions else ""
    return f"{common.table(head, rows)}\n\n{busy(lanes, scenarios)}{installed}"


def busy(lanes: Sequence[Lane], scenarios: Sequence[Scenario]) -> str:
    """The sentence that says, for each scenario, whether the load generators were the bottleneck."""
    said = [
        f"{max(each.busy for lane in lanes for each in lane.samples.get(scenario, [])):.0%} ({scenario.title})"
        for scenario in scenarios
    ]
    return f"The load generators were never busier than these shares of their core: {', '.join(said)}."


def draw(lanes: Sequence[Lane], scenarios: Sequence[Scenario], page: Path) -> None:
    """The bars beside the page; they leave out what was not measured."""
    drawn = [scenario for scenario in scenarios if scenario.name in DRAWN]
    bars = {lane.server.contender.title: [cost(lane, each) for each in drawn] for lane in lanes}
    if drawn:
        plot.write(page.parent / PLOT, "µs of server CPU per delivery", [each.title for each in drawn], bars)


def asked(arguments: argparse.Namespace) -> list[Scenario]:
    """The scenarios that were asked for, as large as they were asked for; raises `SystemExit` for an unknown name."""
    known = [scenario.name for scenario in SCENARIOS]
    if unknown := set(arguments.scenarios) - set(known):
        raise SystemExit(f"unknown scenario {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [sized(each, arguments) for each in SCENARIOS if each.name in arguments.scenarios]


def sized(scenario: Scenario, arguments: argparse.Namespace) -> Scenario:
    """With the members and messages of the command line."""
    members = arguments.many if scenario.name == "many" else arguments.members
    turns = max(1, round(scenario.turns * arguments.messages / SCENARIOS[0].turns))
    title = f"to {members:,} members" if scenario.name == "many" else scenario.title
    return replace(scenario, members=members, turns=turns, title=title)


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--scenarios", nargs="+", default=[each.name for each in SCENARIOS], metavar="NAME")
    parser.add_argument("--members", type=int, default=500)
    parser.add_argument("--many", type=int, default=5_000, help="members of the last scenario")
    parser.add_argument(
        "--messages", type=int, default=SCENARIOS[0].turns, help="of the first; the others in proportion"
    )
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    scenarios = asked(arguments)
    contenders = common.chosen(list(rivals.CONTENDERS.values()), arguments.contenders)
    lanes = run(contenders, scenarios, arguments.rounds)
    common.publish("fanout", "tests.benchmarks.fanout", report(lanes, scenarios), arguments.write)
    if arguments.write is not None:
        draw(lanes, scenarios, arguments.write)


if __name__ == "__main__":
    main()
