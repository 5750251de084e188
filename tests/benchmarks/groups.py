"""What many small groups cost: `python -m tests.benchmarks.groups [--write docs/benchmarks.md]`.

Groups of ten against one big group with the same clients, at equal messages for each member and turn, in two shapes.

Each client in one group: 1,900 groups of ten, each told one message in a turn, against 19,000 clients in one group and
one message in a turn. The contenders and their two servers come from `rivals.py`, one contender after the other; the
pings of uvicorn are put off, because those of 19,000 idle clients would be a part of every figure.

Each client in ten groups: 2,000 clients in 2,000 groups of ten that no two clients share but once, each told one
message in a turn, so that a member hears ten; against the same clients on the same server, all in one group, which is
told ten messages in a turn. Ours only.

The figures are CPU time of the server's process for each message that a member receives. Members of one group of many
share a counter with the others, so that they hear rising numbers: rising and complete is once and in order, and
anything else fails the run. The rounds run there and back again; lower quartiles are compared. Needs 20,000 open files
in one process (`ulimit -n`). About six minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tests.benchmarks import common, rivals
from tests.benchmarks.apps.groups import LEAST, RULER, STRIDE

TEN = 10  # members of a small group
GROUPS, CLIENTS, TURNS, ROUNDS = 1_900, 2_000, 4, 5
ONE = ["generic", "fast"]  # of `rivals.CONTENDERS`; others may be asked for
RATE = 20_000  # deliveries a second: what a turn takes follows from it
SETTLE = 0.05  # seconds after the last delivery: what a server still tidies up belongs to it
PART = 5_000  # clients that are connected with one order
SIZE = 100  # bytes of JSON in one message


@dataclass(frozen=True)
class Arm:
    """One way of speaking on one server: `burst` messages to each of so many groups, or to the one of all clients."""

    title: str
    lane: common.Lane[str, float]
    groups: int
    burst: int
    heard: int  # messages for each client and turn


# -- measuring -------------------------------------------------------------------------------------------------------


def sample(arm: Arm, clients: int, turns: int) -> float:
    """Let the server speak, and return its microseconds per delivery."""
    lane, expected = arm.lane, clients * arm.heard * turns
    lane.load.order(do="expect", total=expected)
    before = lane.server.cpu()
    query = {"turns": turns, "burst": arm.burst, "interval": clients * arm.heard / RATE, "size": SIZE}
    lane.server.ask("/broadcast", "POST", groups=arm.groups, **query)
    heard = lane.load.answer()
    time.sleep(SETTLE)
    spent = lane.server.cpu() - before
    if heard["disorder"] or heard["lost"] or heard["received"] != expected:
        raise SystemExit(f"{lane.server.contender.title}: not every message arrived once and in order: {heard}")
    lane.busiest = max(lane.busiest, heard["busy"])
    return float(spent / expected * 1e6)


def measure(arms: Sequence[Arm], clients: int, arguments: argparse.Namespace) -> None:
    """All rounds of both arms of one contender, after one that does not count."""
    for arm in arms:
        sample(arm, clients, 1)
    for arm in common.interleaved(arms, arguments.rounds):
        arm.lane.samples.setdefault(arm.title, []).append(sample(arm, clients, arguments.turns))


def in_one(stack: ExitStack, contender: common.Contender, groups: int) -> list[Arm]:
    """Each client in one group: a server where all are in the same, and one where each has nine companions."""
    patient = put_off(contender)
    glue = "&" if "?" in contender.path else "?"
    options = [*contender.load, "--groups", str(groups), "--rising"]
    apart = replace(patient, path=f"{contender.path}{glue}g={{g}}", load=options)
    big, many = (enter(stack, each, groups * TEN) for each in (patient, apart))
    return [Arm("big", big, 0, 1, 1), Arm("many", many, groups, 1, 1)]


def in_ten(stack: ExitStack, contender: common.Contender, clients: int) -> list[Arm]:
    """Each client in ten groups, and in the one of all: one server has both."""
    lane = enter(stack, replace(contender, environment={"GROUPS": str(clients)}), clients)
    return [Arm("big", lane, 0, TEN, TEN), Arm("many", lane, clients, 1, len(RULER))]


def enter(stack: ExitStack, contender: common.Contender, clients: int) -> common.Lane[str, float]:
    """Start a contender and connect every client, in parts, since one order must be obeyed within its deadline."""
    lane: common.Lane[str, float] = common.enter(stack, contender, 0)
    for start in range(0, clients, PART):
        lane.load.order(do="connect", count=min(PART, clients - start))
    lane.server.until("/members", lambda seen: seen == clients)
    return lane


def put_off(contender: common.Contender) -> common.Contender:
    """The same without pings of uvicorn's."""
    if "uvicorn" not in contender.command:
        return contender
    return replace(contender, command=[*contender.command, "--ws-ping-interval", "3600"])


OURS = [
    replace(put_off(made), path="/ws?n={n}", load=["--rising"])
    for made in (
        common.uvicorn("generic", "starlette_rt, any server", "groups:app"),
        common.uvicorn("fast", "starlette_rt, its uvicorn class", "groups:app", common.FAST),
    )
]


# -- telling ---------------------------------------------------------------------------------------------------------


def row(arms: Sequence[Arm]) -> list[str]:
    """One contender: both arms, and the ratio."""
    big, many = (common.lower_quartile(arm.lane.samples[arm.title]) for arm in arms)
    return [arms[0].lane.server.contender.title, f"{big:.2f}", f"{many:.2f}", f"{many / big:.2f}"]


def table(what: str, head: Sequence[str], rows: Sequence[list[str]]) -> str:
    """One shape."""
    return common.table([f"server CPU per delivery, {what}", *(f"{each}, µs" for each in head), "ratio"], rows)


def run(arguments: argparse.Namespace) -> str:
    """Both shapes; returns the tables."""
    common.open_files()
    asked = common.chosen(list(rivals.CONTENDERS.values()), arguments.contenders or ONE)
    rivals.prepare(asked)
    ones, tens, busiest = [], [], []
    for contender in asked:
        with ExitStack() as stack:
            arms = in_one(stack, contender, arguments.groups)
            measure(arms, arguments.groups * TEN, arguments)
            ones.append(row(arms))
            busiest += [arm.lane for arm in arms]
    for contender in (each for each in OURS if each.name in {one.name for one in asked}):
        with ExitStack() as stack:
            arms = in_ten(stack, contender, arguments.clients)
            measure(arms, arguments.clients, arguments)
            tens.append(row(arms))
            busiest += [arms[0].lane]
    groups, clients = arguments.groups, arguments.clients
    shapes = [table("each in one group", [f"one of {groups * TEN:,}", f"{groups:,} of ten"], ones)]
    if tens:
        shapes += [table("each in ten groups", [f"one of {clients:,}, ten per turn", f"{clients:,} of ten"], tens)]
    return "\n\n".join([*shapes, common.busy(busiest)])


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--groups", type=int, default=GROUPS, help="of ten clients, each in one")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="each in ten groups of as many")
    parser.add_argument("--turns", type=int, default=TURNS, help="per contender, arm and round")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    if arguments.clients < LEAST or arguments.clients % STRIDE == 0:
        raise SystemExit(f"--clients: at least {LEAST}, and no multiple of {STRIDE}, or two would share many groups")
    common.publish("groups", "tests.benchmarks.groups", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
