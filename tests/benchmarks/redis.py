"""What one broadcast costs across two nodes: `python -m tests.benchmarks.redis [--write docs/benchmarks.md]`.

Every contender is two server processes on one redis-server of its own: one speaks, at the other are the members, 1,
50 and 500 in turn. All contenders are up at the same time. Each round lets each contender say the same number of
100-byte messages at the same moderate rate, to 50 members ten in one turn of the event loop as well, and reads the CPU
time of both nodes and of Redis, and what Redis has counted, before and after. Silent rounds of the same length, in
which nothing is said, are measured as well, and what they cost is taken off: the ticks of an idle server, renewals, and
the request that starts a round. Every client checks the order of what it hears, and a message that is lost, doubled or
out of order fails the run.

Each message carries the clock of its publisher, so every client knows how long it was on its way. The floor is raw
pub/sub: redis-py's `publish` in the speaking server, heard by a redis-py subscriber in the load generator.

The rounds run there and back again (A B C, C B A), and lower quartiles are compared, because noise only adds. Only
the ratios within one run mean anything; the microseconds are this machine's. Needs redis-server on the PATH; the
rivals are installed from PyPI and npm into `.bench/` (or `BENCH_CACHE`) at the first run. About three minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from tests.benchmarks import common
from tests.benchmarks.store import Counts, RedisServer

ROUNDS, SILENT_ROUNDS = 9, 3
MEMBERS, BURST = [1, 50, 500], 10
SETTLE = 0.05  # seconds after the last delivery: what a server still tidies up belongs to it
LENGTH = 0.3  # seconds of one round
ENGINE = "/socket.io/?EIO=4&transport=websocket"

PYTHON_SOCKETIO = ("python-socketio-redis", "python-socketio", "redis[hiredis]")
# channels_redis waits five seconds for a message, and redis-py 8 gives up a read after five: the client is lost.
CHANNELS = ("channels", "channels", "channels-redis", "redis[hiredis]<8")
RAW = ("redis-py", "redis[hiredis]")


def channels(layer: str) -> common.Contender:
    """Django Channels over one of its two layers, on the same uvicorn as the others."""
    made = common.uvicorn(f"channels-{layer}", f"channels_redis, {layer} layer", "across_channels:app")
    return common.with_python(replace(made, environment={"LAYER": layer}), CHANNELS[0])


def ours(name: str, title: str, group: str, ws: str = "websockets-sansio") -> common.Contender:
    """Our own, speaking to one of its two groups."""
    return replace(common.uvicorn(name, f"starlette_rt, {title}", "across:app", ws), environment={"GROUP": group})


CONTENDERS = [
    common.with_python(
        replace(
            common.uvicorn("python-socketio", "python-socketio", "across_socketio:app"),
            path=ENGINE,
            load=["--socketio"],
        ),
        PYTHON_SOCKETIO[0],
    ),
    channels("core"),
    channels("pubsub"),
    common.socketio(title="Node.js, Socket.IO, Redis adapter", program="across.js"),
    ours("generic", "any server", "lobby"),
    ours("fast", "its uvicorn class", "lobby", common.FAST),
    ours("generic-history", "any server, with history", "kept"),
    ours("fast-history", "its uvicorn class, with history", "kept", common.FAST),
    common.with_python(common.uvicorn("raw", "raw pub/sub, redis-py", "across_raw:app"), RAW[0]),
]


def prepare(names: set[str]) -> None:
    """Install what these contenders need."""
    for needs in (PYTHON_SOCKETIO, CHANNELS, RAW):
        if any(each.name in names and str(common.CACHE / needs[0]) in str(each.environment) for each in CONTENDERS):
            common.prepare_python(*needs)
    if "socketio" in names:
        common.prepare_socketio()


# -- lanes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """So many members, and so many turns in each round, with `burst` messages in each of them."""

    members: int
    turns: int
    burst: int = 1

    @property
    def messages(self) -> int:
        """Messages in each round."""
        return self.turns * self.burst

    @property
    def title(self) -> str:
        """The head of a column."""
        heard = f"to {self.members} member{'' if self.members == 1 else 's'}"
        return heard if self.burst == 1 else f"{heard}, {self.burst} per turn"


def scenarios(members: Sequence[int]) -> list[Scenario]:
    """At most 100 messages a second, and so few that no contender's core is full; once ten in one turn."""
    made = [Scenario(each, max(1, round(LENGTH * min(100, 1000 / each)))) for each in sorted(members)]
    return [*made[:-1], *(Scenario(each.members, 1, BURST) for each in made[1:-1]), *made[-1:]]


@dataclass(frozen=True)
class Round:
    """What one round took: CPU seconds of both nodes, what Redis has done, and microseconds until each delivery."""

    nodes: float
    redis: Counts
    delays: list[int] = field(default_factory=list)


@dataclass
class Across(common.Lane[Scenario, Round]):
    """Two nodes of one contender at work: `server` has the members, `speaker` speaks."""

    speaker: common.Server = field(kw_only=True)
    store: RedisServer = field(kw_only=True)
    silent: dict[Scenario, list[Round]] = field(default_factory=dict, kw_only=True)

    @property
    def raw(self) -> bool:
        """Whether this is the floor, which has one node and one subscriber."""
        return self.server is self.speaker

    def nodes(self) -> float:
        """CPU seconds of both nodes so far."""
        return self.speaker.cpu() + (0.0 if self.raw else self.server.cpu())

    def speak(self, turns: int, burst: int) -> None:
        """Let the first node speak for the length of one round."""
        interval = LENGTH / max(1, turns)
        self.speaker.ask("/broadcast", "POST", turns=turns, burst=burst, interval=interval, size=100)


def enter(stack: ExitStack, contender: common.Contender) -> Across:
    """Start Redis, both nodes and the load generator of a contender."""
    store = stack.enter_context(RedisServer())
    contender = replace(contender, environment={**contender.environment, "REDIS_URL": store.url})
    speaker = stack.enter_context(common.Server(contender))
    if contender.name == "raw":
        subscriber = stack.enter_context(Subscriber(store.url, contender))
        return Across(speaker, subscriber, speaker=speaker, store=store)
    server = stack.enter_context(common.Server(contender))
    return Across(server, stack.enter_context(common.Load(server, "hear")), speaker=speaker, store=store)


class Subscriber(common.Load):
    """The load generator that is no WebSocket client but a subscriber of Redis."""

    def __init__(self, url: str, contender: common.Contender) -> None:
        self.dial(url, "hear", ["--channel", "lobby"], contender.environment)


def fill(lane: Across, members: int) -> None:
    """Let there be so many members at the second node."""
    have = lane.server.ask("/members")
    if not lane.raw:
        lane.load.order(do="connect", count=members - have)
        lane.server.until("/members", lambda seen: seen == members)
    elif not lane.silent:
        lane.load.order(do="connect", count=1)


# -- rounds ----------------------------------------------------------------------------------------------------------


def sample(lane: Across, scenario: Scenario) -> Round:
    """Let the first node speak to all members at the second."""
    lane.load.order(do="expect", count=scenario.messages)
    before, nodes = lane.store.before(), lane.nodes()
    lane.speak(scenario.turns, scenario.burst)
    heard = lane.load.answer()
    time.sleep(max(SETTLE, before.at + LENGTH + SETTLE - time.monotonic()))  # no shorter than a silent round
    spent, redis = lane.nodes() - nodes, lane.store.since(before)
    delays = heard.pop("delays")
    if heard["disorder"] or heard["lost"] or len(delays) != scenario.messages * (1 if lane.raw else scenario.members):
        raise SystemExit(f"{lane.speaker.contender.title}: not every message arrived once and in order: {heard}")
    lane.busiest = max(lane.busiest, heard["busy"])
    return Round(spent, redis, delays)


def silence(lanes: list[Across], scenario: Scenario) -> None:
    """Rounds in which nothing is said, of all contenders at once: they are idle, and hardly in each other's way."""
    for _ in range(SILENT_ROUNDS):
        before = [(lane.store.before(), lane.nodes()) for lane in lanes]
        for lane in lanes:
            lane.speak(0, 1)
        time.sleep(LENGTH + SETTLE)
        for lane, (redis, nodes) in zip(lanes, before, strict=True):
            lane.silent.setdefault(scenario, []).append(Round(lane.nodes() - nodes, lane.store.since(redis)))


def run(arguments: argparse.Namespace) -> str:
    """All rounds of all contenders; returns the tables."""
    contenders = common.chosen(CONTENDERS, arguments.contenders)
    prepare({contender.name for contender in contenders})
    asked = scenarios(arguments.members)
    with ExitStack() as stack:
        lanes = [enter(stack, contender) for contender in contenders]
        for each in asked:
            for lane in lanes:
                fill(lane, each.members)
            silence(lanes, each)
            common.measure(lanes, each, arguments.rounds, sample)
        tables = [nodes_table(lanes, asked), delays_table(lanes, asked), redis_table(lanes, asked)]
        return "\n\n".join([*tables, f"{common.busy(lanes)} {facts(lanes)}"])


# -- figures ---------------------------------------------------------------------------------------------------------


def nodes_cost(lane: Across, scenario: Scenario) -> float:
    """Microseconds of both nodes for one message, less what silence costs."""
    spoken, silent = lane.samples[scenario], lane.silent[scenario]
    return per_message([each.nodes for each in spoken], [each.nodes for each in silent], scenario)


def redis_cost(lane: Across, scenario: Scenario) -> float:
    """Microseconds of Redis for one message, less what silence costs."""
    spoken, silent = lane.samples[scenario], lane.silent[scenario]
    return per_message([each.redis.cpu for each in spoken], [each.redis.cpu for each in silent], scenario)


def per_message(spoken: list[float], silent: list[float], scenario: Scenario) -> float:
    """Microseconds: the lower quartile of each kind of round, because noise only adds."""
    return (common.lower_quartile(spoken) - common.lower_quartile(silent)) / scenario.messages * 1e6


def per_broadcast(lane: Across, scenario: Scenario, of: Callable[[Counts], float]) -> float:
    """What Redis counted for one message, less what it counts in silence."""
    spoken = [each.redis for each in lane.samples[scenario]]
    idle = in_silence(lane, of) * sum(each.at for each in spoken)
    return (sum(map(of, spoken)) - idle) / (len(spoken) * scenario.messages)


def in_silence(lane: Across, of: Callable[[Counts], float]) -> float:
    """What Redis counts in a second in which nothing is said, however many members there are."""
    silent = [each.redis for some in lane.silent.values() for each in some]
    return sum(map(of, silent)) / sum(each.at for each in silent)


def commands(lane: Across, scenario: Scenario) -> str:
    """The commands of one message, those of scripts included: `1.00 publish`."""
    names = {name for each in lane.samples[scenario] for name in each.redis.calls}
    counts = {name: per_broadcast(lane, scenario, partial(calls, name)) for name in names}
    most = sorted(counts.items(), key=lambda item: (-round(item[1], 1), item[0]))
    return ", ".join(f"{count:.2f} `{name}`" for name, count in most if count > 0.05)


def received(redis: Counts) -> float:
    """Bytes that came to Redis."""
    return redis.received


def total(redis: Counts) -> float:
    """Calls of all commands."""
    return redis.total


def sent(redis: Counts) -> float:
    """Bytes that Redis sent."""
    return redis.sent


def calls(name: str, redis: Counts) -> int:
    """Calls of one command."""
    return redis.calls[name]


def percentile(delays: Sequence[float], per_cent: int) -> float:
    """In milliseconds."""
    return statistics.quantiles(delays, n=100, method="inclusive")[per_cent - 1] / 1000


# -- tables ----------------------------------------------------------------------------------------------------------


def nodes_table(lanes: list[Across], scenarios: list[Scenario]) -> str:
    """CPU of both nodes."""
    lanes = [lane for lane in lanes if not lane.raw]
    head, rows = ["CPU of both nodes, µs for each message"], [[lane.server.contender.title] for lane in lanes]
    for each in scenarios:
        head += [each.title, *["for each delivery"] * (each.members > 1), ratio_title(lanes)]
        figures = [nodes_cost(lane, each) for lane in lanes]
        for row, figure in zip(rows, figures, strict=True):
            row += [f"{figure:,.0f}", *[f"{figure / each.members:.1f}"] * (each.members > 1)]
            row.append(f"{figure / figures[0]:.2f}")
    return common.table(head, rows)


def ratio_title(lanes: list[Across]) -> str:
    """The head of a column of ratios."""
    return f"ratio to {lanes[0].server.contender.name}" if lanes else ""


def delays_table(lanes: list[Across], scenarios: list[Scenario]) -> str:
    """How long a message was on its way."""
    head, rows = ["on its way, ms"], [[lane.server.contender.title] for lane in lanes]
    for each in scenarios:
        head += [f"{each.title}: p50", "p99", *["p50 above raw"] * (lanes[-1].raw)]
        delays = [[delay for found in lane.samples[each] for delay in found.delays] for lane in lanes]
        floor = percentile(delays[-1], 50)
        for row, some in zip(rows, delays, strict=True):
            row += [f"{percentile(some, 50):.2f}", f"{percentile(some, 99):.2f}"]
            row += [f"{percentile(some, 50) - floor:.2f}"] * lanes[-1].raw
    return common.table(head, rows)


def redis_table(lanes: list[Across], scenarios: list[Scenario]) -> str:
    """What Redis did; its CPU time and its commands where most was said."""
    few = scenarios[0]
    head = ["Redis, for each message", "CPU, µs"]
    rows = [[lane.server.contender.title, f"{redis_cost(lane, few):.0f}"] for lane in lanes]
    for each in scenarios[:2]:  # the later ones say too little to be counted beside renewals
        head += [f"bytes in, {each.title}", "bytes out"]
        for row, lane in zip(rows, lanes, strict=True):
            row += [f"{per_broadcast(lane, each, count):,.0f}" for count in (received, sent)]
    head += ["commands a second in silence", f"commands, {few.title}"]
    for row, lane in zip(rows, lanes, strict=True):
        row.append(f"{in_silence(lane, total):.1f}")
        row.append(commands(lane, few))
    return f"{common.table(head, rows)}\n\nRedis counts the commands inside of scripts, too."


def facts(lanes: list[Across]) -> str:
    """The versions of Redis and of the rivals."""
    names = {lane.server.contender.name for lane in lanes}
    found = [f"Redis {lanes[0].store.version()}"]
    if "python-socketio" in names:
        found.append(common.python_facts(PYTHON_SOCKETIO[0], "python-socketio", "redis"))
    if names & {"channels-core", "channels-pubsub"}:
        found.append(common.python_facts(CHANNELS[0], "channels", "channels_redis", "redis"))
    if "socketio" in names:
        found.append(common.npm_facts("@socket.io/redis-adapter", "redis"))
    return f"{'; '.join(found)}."


def main() -> None:
    """Parse, run, print; write only where told."""
    parser = common.parser(__doc__)
    parser.add_argument("--members", type=int, nargs="+", default=MEMBERS)
    parser.set_defaults(rounds=ROUNDS)
    arguments = parser.parse_args()
    common.publish("redis", "tests.benchmarks.redis", run(arguments), arguments.write)


if __name__ == "__main__":
    main()
