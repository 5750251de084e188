"""What an idle connection weighs: `python -m tests.benchmarks.idle [--write docs/benchmarks.md]`.

A bare Starlette `WebSocketEndpoint` that accepts and waits, against a `RealtimeEndpoint` whose connections have
joined a group and are tracked in its presence; 5,000 of them, deflate off, the same uvicorn and the same loop. Each
round starts fresh processes, there and back again (A B C, C B A). Of the server's process alone:

    (resident memory at N connections - resident memory at none, after a warm-up of 100) / N

and the number of asyncio tasks at N, less those at none: one for each connection is what ASGI itself costs. The
median of the rounds is shown. About two minutes; needs 2 N + 100 open files over two processes (`ulimit -n`).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import dataclass

from tests.benchmarks import common

OURS = "starlette_rt.uvicorn:RealtimeWebSocketProtocol"
CONTENDERS = [
    common.uvicorn("bare", "bare `WebSocketEndpoint`", "by_hand:idle"),
    common.uvicorn("generic", "starlette_rt, any server", "realtime:idle"),
    common.uvicorn("fast", "starlette_rt, its uvicorn class", "realtime:idle", OURS),
]
CONNECTIONS, ROUNDS, WARM_UP = 5_000, 3, 100
SETTLE = 1.0  # seconds: the last handshakes are over and their buffers returned


@dataclass(frozen=True)
class Weight:
    """What one connection took in one round: resident bytes, objects that the collector tracks, and tasks."""

    resident: float
    objects: float
    tasks: float


def weigh(contender: common.Contender, connections: int) -> Weight:
    """One fresh server, first warmed up, then filled."""
    with common.Server(contender) as server, common.Load(server) as load:
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
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    weights: dict[str, list[Weight]] = {contender.name: [] for contender in contenders}
    for contender in common.interleaved(contenders, arguments.rounds):
        weights[contender.name].append(weigh(contender, arguments.connections))
    return report(contenders, weights)


def report(contenders: list[common.Contender], weights: dict[str, list[Weight]]) -> str:
    """Medians, and the ratio to the first contender."""
    head = ["an idle connection", "resident, bytes", f"ratio to {contenders[0].name}", "objects", "tasks"]
    rows: list[list[str]] = []
    first = 0.0
    for contender in contenders:
        resident = statistics.median(weight.resident for weight in weights[contender.name])
        objects = statistics.median(weight.objects for weight in weights[contender.name])
        tasks = statistics.median(weight.tasks for weight in weights[contender.name])
        first = first or resident
        ratio = f"{resident / first:.2f}" if first else "-"  # a few connections may fit into what is there
        rows.append([contender.title, f"{resident:,.0f}", ratio, f"{objects:.1f}", f"{tasks:.2f}"])
    return common.table(head, rows)


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("idle", "tests.benchmarks.idle", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
