"""What presence costs across nodes: `python -m tests.benchmarks.presence [--write docs/benchmarks.md]`.

Two nodes of our own on one redis-server, and three questions.

A storm: 500 and 5,000 users come at once, half to each node, into one group in which each is tracked; each watches
nothing, the count, or the members. Bytes on the wire to and from Redis and CPU time for each who comes: ten times as
many must not cost much more each.

Silence: what Redis is asked for in every second when one member of each group is there, and when 10,000 more are.

A restart: 10,000 clients of one node come back to a fresh one, in 100 groups. They join with the position that they
saw last and recover what they missed, as guests or as users; or they are tracked, and their members have lingered.
Commands of Redis, beside those for 1,000 clients: they should follow the groups and not the clients.

Each storm and each restart has a fresh Redis and fresh nodes. One round each, there and back again with more; lower
quartiles are shown. Needs redis-server on the PATH and 2 N + 100 open files over two processes. About three minutes.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks import common
from tests.benchmarks.store import Counts, RedisServer

STORMS, RETURNS, GROUPS, ROUNDS = [500, 5_000], [1_000, 10_000], 100, 1
WATCHES = {"none": "nobody watches", "count": "each watches the count", "members": "each watches the members"}
MISSED = 3  # things said in each group while its clients were away
SETTLE = 1.5  # seconds after the last one has come: counts are told at most once a second
SILENCE = 6.0  # seconds that are measured: three renewals of each lease
V1 = ["--offer", "rt.v1.json"]


@dataclass(frozen=True)
class Kind:
    """How the clients of a restart come back."""

    title: str
    query: str
    lines: bool  # whether each says with which position it joins
    lingers: bool = False  # whether they have been there before


KINDS = [
    Kind("guests who recover", "join=0", lines=True),
    Kind("users who recover", "join=0&user=user{n}", lines=True),
    Kind("users who are tracked", "group=live:{g}&user=user{n}&track=1", lines=False, lingers=True),
]


# -- nodes -----------------------------------------------------------------------------------------------------------


def contender(store: RedisServer, query: str, options: Sequence[str] = ()) -> common.Contender:
    """One node of ours, and what its clients dial."""
    made = common.uvicorn("ours", "starlette_rt", "present:app", common.FAST)
    return replace(made, path=f"/ws?{query}", load=options, environment={"REDIS_URL": store.url})


class Node:
    """One server with its load generator."""

    def __init__(self, stack: ExitStack, made: common.Contender) -> None:
        self.server = stack.enter_context(common.Server(made))
        self.load = stack.enter_context(common.Load(self.server, "hear"))

    def begin(self, count: int, first: int, lines: Sequence[str] = ()) -> None:
        """Let so many come and do not wait."""
        self.load.begin(do="come", count=count, first=first, lines=list(lines))

    def arrived(self, count: int) -> int:
        """Wait until they are there; how many of them have recovered."""
        recovered = self.load.answer()["recovered"]
        self.server.until("/members", lambda seen: seen == count)
        return int(recovered)


@contextmanager
def fresh(query: str, options: Sequence[str] = ()) -> Iterator[tuple[RedisServer, list[Node], ExitStack]]:
    """A Redis and two nodes on it."""
    with ExitStack() as stack:
        store = stack.enter_context(RedisServer())
        made = contender(store, query, options)
        yield store, [Node(stack, made), Node(stack, made)], stack


@dataclass(frozen=True)
class Spent:
    """What happened meanwhile: CPU seconds of the nodes, and what Redis has done."""

    nodes: float
    redis: Counts


class Meter:
    """Measures from its making until it is read."""

    def __init__(self, store: RedisServer, nodes: Sequence[Node]) -> None:
        self.store, self.nodes = store, nodes
        self.redis, self.cpu = store.before(), self.used()

    def used(self) -> float:
        """CPU seconds of the nodes so far."""
        return sum(node.server.cpu() for node in self.nodes)

    def read(self) -> Spent:
        """What has been spent."""
        return Spent(self.used() - self.cpu, self.store.since(self.redis))


# -- the storm -------------------------------------------------------------------------------------------------------


def storm(watch: str, count: int) -> Spent:
    """So many come at once, half to each node."""
    query = "group=stage&track=1&user=user{n}" + ("" if watch == "none" else f"&watch={watch}")
    with fresh(query) as (store, nodes, _):
        meter = Meter(store, nodes)
        half = count // 2
        for place, node in enumerate(nodes):
            node.begin(half, place * half)
        for node in nodes:
            node.arrived(half)
        for node in nodes:
            node.server.until("/present", lambda seen: seen == 2 * half, group="stage")
        time.sleep(SETTLE)
        return meter.read()


def storms(sizes: Sequence[int], rounds: int) -> str:
    """All storms; returns the table."""
    lanes = [(watch, size) for watch in WATCHES for size in sizes]
    found: dict[tuple[str, int], list[Spent]] = {lane: [] for lane in lanes}
    for lane in common.interleaved(lanes, rounds):
        found[lane].append(storm(*lane))
    head = ["for each who comes"]
    for size in sizes:
        head += [f"{size:,}: bytes", "scripts", "CPU of the nodes, µs", "CPU of Redis, µs"]
    head += ["ratio of bytes", "of CPU"]
    return common.table(head, [storm_row(watch, sizes, found) for watch in WATCHES])


def storm_row(watch: str, sizes: Sequence[int], found: dict[tuple[str, int], list[Spent]]) -> list[str]:
    """What each who came took, and the ratio of the largest storm to the smallest."""
    row, figures = [WATCHES[watch]], []
    for size in sizes:
        spent = found[watch, size]
        bytes, scripts, nodes, redis = (
            common.lower_quartile(values) / size
            for values in zip(
                *(
                    (each.redis.bytes, each.redis.calls["evalsha"], each.nodes * 1e6, each.redis.cpu * 1e6)
                    for each in spent
                ),
                strict=True,
            )
        )
        figures.append((bytes, nodes + redis))
        row += [f"{bytes:,.0f}", f"{scripts:.2f}", f"{nodes:,.0f}", f"{redis:,.0f}"]
    (few_bytes, few_cpu), (many_bytes, many_cpu) = figures[0], figures[-1]
    return [*row, f"{many_bytes / few_bytes:.2f}", f"{many_cpu / few_cpu:.2f}"]


# -- silence and a restart -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Return:
    """So many clients who have come back."""

    kind: Kind
    count: int
    recovered: int
    spent: Spent


def silent(store: RedisServer, nodes: Sequence[Node], seconds: float) -> Spent:
    """Nothing happens for a while."""
    meter = Meter(store, nodes)
    time.sleep(seconds)
    return meter.read()


def comeback(kind: Kind, count: int, arguments: argparse.Namespace, quiet: dict[int, Spent] | None = None) -> Return:
    """A node goes, and its clients come back to a fresh one; what silence took meanwhile goes into ``quiet``."""
    groups = arguments.groups
    with fresh(kind.query, V1 if kind.lines else ()) as (store, (stays, goes), stack):
        places = stays.server.ask("/say", "POST", groups=groups, count=1 + MISSED) if kind.lines else []
        lines = [line(number, place) for number, place in enumerate(places)] or [""] * groups
        stays.begin(groups, count, lines)  # one in each group stays where it is
        stays.arrived(groups)
        if quiet is not None:
            quiet[groups] = silent(store, [stays, goes], arguments.silence)
        if kind.lingers:
            goes.begin(count, 0, lines)
            goes.arrived(count)
            time.sleep(SETTLE)
        if quiet is not None:
            quiet[groups + count] = silent(store, [stays, goes], arguments.silence)
        goes.load.order(do="drop")
        goes.server.__exit__()
        comes = Node(stack, goes.server.contender)
        meter = Meter(store, [comes])
        comes.begin(count, 0, lines)
        recovered = comes.arrived(count)
        time.sleep(SETTLE)
        return Return(kind, count, recovered, meter.read())


def line(number: int, place: dict[str, Any]) -> str:
    """What a client says that has seen so much of this group."""
    return json.dumps({"type": "join", "ref": 1, "group": f"kept:{number}", "position": place})


def silence_table(quiet: dict[int, Spent]) -> str:
    """What is asked of Redis while nobody does anything."""
    head = ["two nodes, for each second", "commands", "bytes", "CPU of the nodes, ms", "CPU of Redis, ms", "which"]
    rows = []
    for members, spent in quiet.items():
        redis, seconds = spent.redis, spent.redis.at
        which = ", ".join(f"{count / seconds:.1f} `{name}`" for name, count in redis.calls.most_common(5))
        figures = [redis.total / seconds, redis.bytes / seconds]
        cpu = [spent.nodes / seconds * 1000, redis.cpu / seconds * 1000]
        rows.append([f"{members:,} idle members", *(f"{each:,.1f}" for each in [*figures, *cpu]), which])
    return common.table(head, rows)


def returns_table(found: Sequence[Return], groups: int) -> str:
    """What is asked of Redis when clients come back."""
    head = [f"coming back, {groups} groups", "recovered", "commands", "for each client", "scripts", "subscribes"]
    head += ["bytes for each client", "CPU of the node, µs", "CPU of Redis, µs"]
    rows = []
    for each in found:
        redis, count = each.spent.redis, each.count
        row = [f"{count:,} {each.kind.title}", f"{each.recovered:,}" if each.kind.lines else "-", f"{redis.total:,}"]
        row += [f"{redis.total / count:.2f}", f"{redis.calls['evalsha']:,}", f"{redis.calls['subscribe']:,}"]
        row += [f"{redis.bytes / count:,.0f}"]
        row += [f"{cpu / count * 1e6:,.0f}" for cpu in (each.spent.nodes, redis.cpu)]
        rows.append(row)
    return common.table(head, rows)


# -- all of it -------------------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> str:
    """All questions; returns the tables."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    quiet: dict[int, Spent] = {}
    found = []
    table = storms(arguments.storms, arguments.rounds)
    for kind in KINDS:
        for count in arguments.returns:
            asked = quiet if kind.lingers and count == arguments.returns[-1] else None
            found.append(comeback(kind, count, arguments, asked))
    return "\n\n".join([table, silence_table(quiet), returns_table(found, arguments.groups), NOTE])


NOTE = "Commands are as Redis counts them, those inside scripts included."


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__, contenders=False)
    parser.add_argument("--storms", type=int, nargs="+", default=STORMS, metavar="N", help="who come at once")
    parser.add_argument("--returns", type=int, nargs="+", default=RETURNS, metavar="N", help="who come back")
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--silence", type=float, default=SILENCE, metavar="S", help="seconds that silence is measured")
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("presence", "tests.benchmarks.presence", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
