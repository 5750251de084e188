"""What an idle connection weighs: `python -m tests.benchmarks.idle [--write docs/benchmarks.md]`.

A bare Starlette `WebSocketEndpoint` that accepts and waits, against a `RealtimeEndpoint` whose connections have
joined a group and are tracked in its presence, and against the rivals, whose connections have joined a group: 5,000
of them, deflate off, the same uvicorn and the same loop for all in Python. Two more rows have deflate on, as uvicorn
has by default, and clients that offer it as browsers do. Each round starts fresh processes, there and back again (A B
C, C B A). Of the server's process alone:

    (resident memory at N connections - resident memory at none, after a warm-up of 100) / N

and the number of asyncio tasks at N, less those at none: one for each connection is what ASGI itself costs. The
median of the rounds is shown. About seven minutes; needs 2 N + 100 open files over two processes (`ulimit -n`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.benchmarks import common, rivals

RIVALS = ["python-socketio", "channels", "litestar", "broadcaster", "socketio", "ws"]
CONNECTIONS, ROUNDS, WARM_UP = 5_000, 3, 100
SETTLE = 1.0  # seconds: the last handshakes are over and their buffers returned
REFERENCES = ["bare", "socketio"]  # whom the others are compared with


def deflating(contender: common.Contender) -> common.Contender:
    """The same with uvicorn's own default, and clients that make use of it."""
    command = " ".join(contender.command).replace("--ws-per-message-deflate false", "").split()
    name, title = f"{contender.name}-deflate", f"{contender.title}, deflate"
    return replace(contender, name=name, title=title, command=command, load=["--deflate"])


BARE = common.uvicorn("bare", "bare `WebSocketEndpoint`", "by_hand:idle")
GENERIC = common.uvicorn("generic", "starlette_rt, any server", "realtime:idle")
QUICK = common.uvicorn("fast", "starlette_rt, its uvicorn class", "realtime:idle", common.FAST)
CONTENDERS = [
    BARE,
    *(rivals.CONTENDERS[name] for name in RIVALS),
    GENERIC,
    QUICK,
    *map(deflating, (BARE, GENERIC, QUICK)),
]


@dataclass(frozen=True)
class Weight:
    """What one connection took in one round: resident bytes, objects that the collector tracks, and tasks."""

    resident: float
    objects: float
    tasks: float


def weigh(contender: common.Contender, connections: int) -> Weight:
    """One fresh server, first warmed up, then filled."""
    with common.Server(contender) as server, common.Load(server, "hear") as load:
        load.order(do="connect", count=WARM_UP)
        load.order(do="drop")
        empty = reading(server, 0)
        load.order(do="connect", count=connections)
        full = reading(server, connections)
    return Weight(*((after - before) / connections for before, after in zip(empty, full, strict=True)))


def reading(server: common.Server, members: int) -> tuple[int, int, int]:
    """Resident bytes, tracked objects and tasks once the server has exactly `members` connections."""
    server.until("/members", lambda seen: seen == members)
    time.sleep(SETTLE)
    resident = server.rss()  # first, because to count the objects takes memory too
    counts = server.ask("/tasks")
    return resident, counts["objects"], counts["tasks"]


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the table."""
    common.open_files()
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    rivals.prepare(contenders)
    weights: dict[str, list[Weight]] = {contender.name: [] for contender in contenders}
    for contender in common.interleaved(contenders, arguments.rounds):
        weights[contender.name].append(weigh(contender, arguments.connections))
    return report(contenders, {name: middle(some) for name, some in weights.items()})


def middle(weights: Sequence[Weight]) -> Weight:
    """The median of each figure."""
    return Weight(
        statistics.median(each.resident for each in weights),
        statistics.median(each.objects for each in weights),
        statistics.median(each.tasks for each in weights),
    )


def report(contenders: Sequence[common.Contender], weights: dict[str, Weight]) -> str:
    """The figures of all, and the ratios to the references that take part."""
    references = [name for name in REFERENCES if name in weights]
    head = ["an idle connection", "resident, bytes", *(f"ratio to {name}" for name in references), "objects", "tasks"]
    rows = []
    for contender in contenders:
        mine = weights[contender.name]
        ratios = [ratio(mine.resident, weights[name].resident) for name in references]
        asyncio = [f"{mine.objects:.1f}", f"{mine.tasks:.2f}"] if mine.tasks else ["-", "-"]  # Node.js has neither
        rows.append([contender.title, f"{mine.resident:,.0f}", *ratios, *asyncio])
    versions = rivals.facts(contenders)
    return common.table(head, rows) + (f"\n\nInstalled beside them: {versions}." if versions else "")


def ratio(mine: float, theirs: float) -> str:
    """One to the other; a few connections may fit into what is there."""
    return f"{mine / theirs:.2f}" if theirs else "-"


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("idle", "tests.benchmarks.idle", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
