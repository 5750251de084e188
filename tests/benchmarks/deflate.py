"""What compression costs and saves: `python -m tests.benchmarks.deflate [--write docs/benchmarks.md]`.

Each contender is there twice, with permessage-deflate and without: a server process with 500 members in one group, as
in `fanout.py`. The members offer what browsers offer, inflate what they hear and check its order (`inflate.py`).
What is said is prose of a small vocabulary, never the same text twice: a kilobyte and sixteen. For each delivery the
table has the CPU time of the server's process, all threads (Node.js compresses in threads of their own), and the bytes
on the wire, the frames' headers included. The contenders compress as they do by default: uvicorn with a window of
4 kB, which it keeps from message to message; Socket.IO and ws with one of 32 kB, kept as well, and Socket.IO nothing
of less than 1,024 bytes; our class once for all members, with no memory of what came before.

The rounds run there and back again (A B C, C B A), and lower quartiles are compared, because noise only adds. Only
the ratios within one run mean anything; the microseconds are this machine's. About eight minutes.
"""

from __future__ import annotations

import itertools
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tests.benchmarks import common, rivals
from tests.prose import prose

NAMES = ["loop", "socketio", "ws", "generic", "fast"]
ROUNDS = 5
SETTLE = 0.05  # seconds after the last delivery: what a server still tidies up belongs to it

texts = itertools.count()  # the seeds: no round says what another has said


@dataclass(frozen=True)
class Scenario:
    """`turns` messages of `size` bytes of JSON in each round, `pace` of them a second."""

    title: str
    size: int
    turns: int
    pace: float


SCENARIOS = [Scenario("1 kB", 1_024, turns=8, pace=4.0), Scenario("16 kB", 16_384, turns=4, pace=1.0)]


@dataclass(frozen=True)
class Round:
    """What one delivery took: microseconds of the server, bytes on the wire; and the load generator's busy share."""

    cost: float
    bytes: float
    busy: float


Lane = common.Lane[Scenario, Round]


def deflating(contender: common.Contender) -> common.Contender:
    """The same with compression: uvicorn is told by its option, Node.js by the environment."""
    command = list(contender.command)
    option = "--ws-per-message-deflate"
    if option in command:
        command[command.index(option) + 1] = "true"
    return replace(contender, command=command, environment={**contender.environment, "DEFLATE": "1"})


# -- measuring -------------------------------------------------------------------------------------------------------


def speak(server: common.Server, text: str, **query: object) -> None:
    """Have the server say the text in pieces."""
    url = f"http://127.0.0.1:{server.port}/broadcast?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(url, data=text.encode(), headers={"Content-Type": "text/plain"}, method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        json.load(response)


def sample(lane: Lane, scenario: Scenario) -> Round:
    """Let the server speak, and tell what a delivery cost it and how long it was."""
    text = prose(next(texts), scenario.turns * scenario.size)
    members = lane.load.order(do="expect", count=scenario.turns)["armed"]
    before = lane.server.cpu()
    speak(lane.server, text, turns=scenario.turns, burst=1, interval=1 / scenario.pace, size=scenario.size)
    heard = lane.load.answer()
    time.sleep(SETTLE)
    spent = lane.server.cpu() - before
    if heard["disorder"] or heard["lost"] or heard["received"] != scenario.turns * members:
        raise SystemExit(f"{lane.server.contender.title}: not every message arrived once and in order: {heard}")
    return Round(spent / heard["received"] * 1e6, heard["bytes"] / heard["received"], heard["busy"])


def run(contenders: Sequence[common.Contender], scenarios: Sequence[Scenario], members: int, rounds: int) -> list[Lane]:
    """All rounds of all contenders, each without compression and then with it."""
    common.open_files()
    rivals.prepare(contenders)
    twice = [each for contender in contenders for each in (contender, deflating(contender))]
    with ExitStack() as stack:
        lanes: list[Lane] = [common.enter(stack, contender, members, "inflate") for contender in twice]
        for scenario in scenarios:
            common.measure(lanes, scenario, rounds, sample)
        return lanes


# -- telling ---------------------------------------------------------------------------------------------------------


def cost(lane: Lane, scenario: Scenario) -> float:
    """The lower quartile in microseconds."""
    return common.lower_quartile([each.cost for each in lane.samples[scenario]])


def length(lane: Lane, scenario: Scenario) -> float:
    """The mean in bytes."""
    lengths = [each.bytes for each in lane.samples[scenario]]
    return sum(lengths) / len(lengths)


def report(lanes: Sequence[Lane], scenarios: Sequence[Scenario]) -> str:
    """The table; each contender's two lanes are one row."""
    pairs = [*zip(lanes[::2], lanes[1::2], strict=True)]
    first = pairs[0][1]
    head = ["for each delivery"]
    rows = [[off.server.contender.title] for off, _ in pairs]
    for scenario in scenarios:
        head += [f"{scenario.title}, µs", "compressed, µs", f"ratio to {first.server.contender.name}"]
        head += ["bytes", "compressed, bytes"]
        for row, (off, on) in zip(rows, pairs, strict=True):
            row += [f"{cost(off, scenario):.2f}", f"{cost(on, scenario):.2f}"]
            row += [f"{cost(on, scenario) / cost(first, scenario):.2f}"]
            row += [f"{length(off, scenario):,.0f}", f"{length(on, scenario):,.0f}"]
    versions = rivals.facts([off.server.contender for off, _ in pairs])
    busiest = max(each.busy for lane in lanes for rounds in lane.samples.values() for each in rounds)
    said = f"The load generator, which inflates, was never busier than {busiest:.0%} of its core."
    return f"{common.table(head, rows)}\n\n{said}{f' {versions}.' if versions else ''}"


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--members", type=int, default=500)
    parser.add_argument("--messages", type=int, default=None, help="in each round of each size")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    scenarios = [replace(each, turns=arguments.messages or each.turns) for each in SCENARIOS]
    if arguments.messages:  # a smoke run need not wait
        scenarios = [replace(each, pace=40.0) for each in scenarios]
    contenders = common.chosen([rivals.CONTENDERS[name] for name in NAMES], arguments.contenders)
    lanes = run(contenders, scenarios, arguments.members, arguments.rounds)
    common.publish("deflate", "tests.benchmarks.deflate", report(lanes, scenarios), arguments.write)


if __name__ == "__main__":
    main()
