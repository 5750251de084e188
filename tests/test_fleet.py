"""A fleet of processes on one Redis: killed, frozen, restarted, begun later, and of two versions.

The law of this file: every node is a uvicorn of its own, and what is promised of a fleet is seen from outside, by
listeners that come back by themselves. Who is present is compared with who is there, on every node and for everybody
who watches.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.audience import (
    SOON,
    Listener,
    Speaker,
    account,
    ask,
    errors,
    eventually,
    gather,
    longest_gap,
    tally,
    token,
    until,
)
from tests.fleet import Front, Node, fleet, front
from tests.redises import RedisServer
from tests.servers import HOST, ROOT
from tests.wires import Wire

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

APP, QUIET = "tests.station:app", ["--no-access-log"]
PEOPLE, KEPT, LOOSE = "people", "kept:news", "loose"
GRACE = 1.0  # seconds that who has left is shown on
GONE = 10.0  # seconds after which nobody of a killed node is shown
RUNS = 5  # murders in CI


@pytest.fixture
def anyio_backend() -> str:
    """Redis is for asyncio."""
    return "asyncio"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@contextmanager
def nodes_on(redis: RedisServer, size: int = 3, args: Sequence[str] = (), **env: str) -> Iterator[list[Node]]:
    """Start nodes on one Redis, whose members are shown on for a short while only."""
    env = {"REDIS_URL": redis.url, "PRESENCE_GRACE": str(GRACE), **env}
    with fleet(APP, size, env, [*QUIET, *args]) as nodes:
        yield nodes


def door(node: Node) -> str:
    return f"{node.url}/ws"


def doors(nodes: Sequence[Node]) -> list[str]:
    return [door(node) for node in nodes]


async def people(stack: AsyncExitStack, node: Node, count: int, others: Sequence[Node] = (), tag: str = "") -> Any:
    """Let some come to ``node`` who are present and see who is; they come back to ``others``, or to the same."""
    names = [f"{node.port}{tag}.{number}" for number in range(count)]
    there = doors(others) if others else [door(node)]
    found = await gather(stack, names, lambda _: [door(node), *there], [KEPT])
    for each in found:
        each.doors = there
        await each.join(PEOPLE, presence="members")
        await each.track(PEOPLE, {"name": each.name})
    return found


async def agree(
    nodes: Sequence[Node], there: Sequence[Listener], within: float = SOON, watchers: Sequence[Listener] | None = None
) -> None:
    """Wait until each node and each of ``watchers``, or of ``there``, sees those and nobody else, each once."""
    truth = dict.fromkeys((each.name for each in there), 1)
    for node in nodes:
        await eventually(lambda node=node: present(node), truth.__eq__, within)  # type: ignore[misc]
    for each in there if watchers is None else watchers:
        await eventually(lambda each=each: seen_by(each), truth.__eq__, within)  # type: ignore[misc]


async def present(node: Node) -> dict[str, int]:
    """Who is present by what a node knows, and with how many connections."""
    found: dict[str, int] = await ask(node, f"/present?group={PEOPLE}")
    return found


async def seen_by(watcher: Listener) -> dict[str, int]:
    """Who is present by what a watcher was told."""
    return watcher.present(PEOPLE)


def left(watcher: Listener, since: float = 0.0) -> list[tuple[float, dict[str, str | None]]]:
    """The diffs by which somebody was gone altogether, with when they came: who, and why."""
    diffs = ((at, {key: gone.get("reason") for key, gone in diff["leaves"].items()}) for at, diff in watcher.leaves)
    whole = ((at, {key: why for key, why in gone.items() if why is not None}) for at, gone in diffs)
    return [(at, gone) for at, gone in whole if gone and at >= since]


def no_bugs(nodes: Sequence[Node]) -> None:
    assert [line for node in nodes for line in errors(node)] == []


# Killed


async def murder(redis: RedisServer, nodes: list[Node], seed: int) -> str:
    """Kill one of three nodes at some moment; who was there is gone, or comes back elsewhere with nothing missing."""
    chance = random.Random(seed)
    victim = chance.choice(nodes)
    others = [node for node in nodes if node is not victim]
    async with AsyncExitStack() as stack:
        mortals = await people(stack, victim, 5, tag=f"m{seed}")
        movers = await people(stack, victim, 5, others, tag=f"b{seed}")
        watchers = [each for node in others for each in await people(stack, node, 3, tag=f"w{seed}")]
        await agree(nodes, [*mortals, *movers, *watchers])
        speaker = await stack.enter_async_context(Speaker(KEPT, *nodes))
        await until(lambda: len(speaker.said) > 5, "something said")
        await asyncio.sleep(chance.uniform(0.0, 1.0))  # leases are renewed at any time
        victim.kill()
        killed, speaker.through = time.monotonic(), others
        names = {each.name for each in mortals}
        for watcher in watchers:
            await until(lambda watcher=watcher: left(watcher, killed), "anybody gone", GONE)  # type: ignore[misc]
        gone = max(left(watcher, killed)[0][0] for watcher in watchers) - killed
        await agree(others, [*movers, *watchers], 3.0)
        for watcher in watchers:
            assert [why for _, why in left(watcher, killed)] == [dict.fromkeys(names, "node_lost")]
        await until(lambda: all(each.recovered[KEPT] for each in movers), "everybody back")
        await speaker.stop()
        last = await speaker.accepted()
        everybody = [*movers, *watchers]
        await until(lambda: all(each.last(KEPT) == last.number for each in everybody), "the last one")
        assert {recovered for each in movers for recovered in each.recovered[KEPT]} == {True}
        books = [account(each.record[KEPT], speaker) for each in everybody]
        for sums in books:
            assert sums.sent == sums.accepted + sums.doubtful
            assert sums.delivered == sums.accepted + sums.doubtful_delivered
            assert sums.doubtful <= 1
            assert not sums.again
        gap = max(longest_gap(each.record[KEPT]) for each in movers)
        no_bugs(others)
    victim.start()
    return f"seed {seed}: gone after {gone:.2f} s; {len(movers)} back, nothing missing, longest gap {gap:.2f} s"


async def murders(redis: RedisServer, seeds: Sequence[int]) -> None:
    with nodes_on(redis) as nodes:
        for seed in seeds:
            print(await murder(redis, nodes, seed))


@pytest.mark.system
async def test_members_of_a_killed_node_are_gone_and_its_clients_miss_nothing(redis: RedisServer) -> None:
    await murders(redis, range(RUNS))


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_hundred_nodes_are_killed(redis: RedisServer) -> None:
    await murders(redis, range(100, 200))


# Frozen


@pytest.mark.system
async def test_a_node_that_was_frozen_for_long_wakes_without_ghosts_and_with_all_its_members(
    redis: RedisServer,
) -> None:
    with nodes_on(redis) as nodes:
        *others, frozen = nodes
        async with AsyncExitStack() as stack, AsyncExitStack() as leaving:
            stayers = await people(stack, frozen, 4, tag="s")
            leavers = await people(leaving, frozen, 3, tag="l")
            movers = await people(stack, frozen, 3, others, tag="m")
            watchers = [each for node in others for each in await people(stack, node, 2, tag="w")]
            await agree(nodes, [*stayers, *leavers, *movers, *watchers])
            speaker = await stack.enter_async_context(Speaker(KEPT, *others))
            asleep = time.monotonic()
            frozen.freeze()
            for each in movers:
                each.cut()
            await leaving.aclose()
            await agree(others, [*movers, *watchers], 14.0)
            names = {each.name for each in (*stayers, *leavers)}
            for watcher in watchers:
                assert [why for _, why in left(watcher)] == [dict.fromkeys(names, "node_lost")]
            await asyncio.sleep(asleep + 15.0 - time.monotonic())
            frozen.thaw()
            awake = time.monotonic()
            await agree(nodes, [*stayers, *movers, *watchers])
            print(f"\nthe views agree {time.monotonic() - awake:.2f} s after it woke")
            new = await people(stack, frozen, 1, tag="n")
            await agree(nodes, [*stayers, *movers, *watchers, *new])
            await speaker.stop()
            last = await speaker.accepted()
            everybody = [*stayers, *movers, *watchers]
            await until(lambda: all(each.last(KEPT) == last.number for each in everybody), "the last one")
            books = [account(each.record[KEPT], speaker) for each in everybody]
            assert all(sums.delivered == sums.accepted == sums.sent and not sums.again for sums in books), books
        no_bugs(nodes)


def leases(redis: RedisServer) -> dict[bytes, float]:
    """The generations that there are, and when their leases end, by the clock of Redis."""
    flat = redis.ask("ZRANGE", "rt:{nodes}:leases", 0, -1, "WITHSCORES")
    return {name: float(end) for name, end in zip(flat[::2], flat[1::2], strict=True)}


def clock(redis: RedisServer) -> float:
    seconds, microseconds = redis.ask("TIME")
    return float(seconds) * 1000 + float(microseconds) / 1000


@contextmanager
def nodes_by_wire(redis: RedisServer, size: int = 3) -> Iterator[tuple[list[Node], list[Wire]]]:
    """Start nodes on one Redis, each with a line of its own to it."""
    with ExitStack() as stack:
        wires = [stack.enter_context(Wire(redis.port)) for _ in range(size)]
        urls = [redis.url_through(wire.port) for wire in wires]
        yield [stack.enter_context(nodes_on(redis, 1, REDIS_URL=url))[0] for url in urls], wires


@pytest.mark.system
async def test_nobody_is_taken_for_dead_where_all_leases_have_run_out_together(redis: RedisServer) -> None:
    with nodes_by_wire(redis) as (nodes, (_, *late)):
        async with AsyncExitStack() as stack:
            there = [each for node in nodes for each in await people(stack, node, 3)]
            await agree(nodes, there)
            before = leases(redis)
            assert len(before) == len(nodes)
            for wire in late:
                wire.cut()
            redis.pause()
            await asyncio.sleep(8.0)
            redis.resume()
            assert max(before.values()) < clock(redis)  # all of them have run out
            await until(lambda: held(redis) == 1, "one lease held again", 3.0)
            await asyncio.sleep(3.0)  # the others have not been heard of for longer than a lease lives
            for wire in late:
                wire.mend()
            await until(lambda: held(redis) == len(nodes), "every lease held again", 3.0)
            assert leases(redis).keys() == before.keys()
            there += await people(stack, nodes[0], 1, tag="new")
            await agree(nodes, there)
            assert [left(each) for each in there] == [[]] * len(there)
        no_bugs(nodes)


def held(redis: RedisServer) -> int:
    """How many leases are held."""
    now = clock(redis)
    return sum(end > now for end in leases(redis).values())


# Restarted


@contextmanager
def behind_nginx(nodes: Sequence[Node]) -> Iterator[Front]:
    """Put nginx in front of three nodes: the documented file with one more line."""
    with front("nginx", nodes[:2]) as proxy:
        path = proxy.cert.parent / "nginx.conf"
        lines = "\n".join(f"server {HOST}:{node.port} max_fails=0;" for node in nodes)
        first, second = (rf"server {HOST}:{node.port}[^;]*;" for node in nodes[:2])
        three, count = re.subn(rf"{first}\s+{second}", lines, path.read_text("utf-8"))
        assert count == 1
        path.write_text(three, "utf-8")
        proxy.send_signal(signal.SIGHUP)
        yield proxy


async def served(proxy: Front) -> int:
    """Ask through the proxy who answers."""
    async with httpx.AsyncClient(verify=proxy.trust, timeout=SOON) as http:
        pid: int = (await http.get(f"{proxy.http}/health")).json()["pid"]
        return pid


@pytest.mark.system
async def test_a_rolling_restart_loses_nothing_and_says_nothing_twice_where_there_is_history(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nodes_on(redis) as nodes, behind_nginx(nodes) as proxy:
        monkeypatch.setenv("SSL_CERT_FILE", str(proxy.cert))
        await eventually(lambda: served(proxy), lambda pid: pid == nodes[2].pid)
        async with AsyncExitStack() as stack:
            names = [f"{proxy.port}.{number}" for number in range(60)]
            listeners = await gather(stack, names, lambda _: [f"{proxy.url}/ws"], [KEPT, LOOSE])
            kept, loose = [await stack.enter_async_context(Speaker(group, *nodes)) for group in (KEPT, LOOSE)]
            await until(lambda: len(kept.said) > 10, "something said")
            for node in nodes:
                kept.through = loose.through = [other for other in nodes if other is not node]
                count = len(kept.said)
                await until(lambda count=count: len(kept.said) > count + 1, "what was on its way said")  # type: ignore[misc]
                began = {each: each.connections for each in listeners if each.served_by == node.pid}
                assert began, "nobody was with it"
                await asyncio.to_thread(node.restart)
                await until(
                    lambda began=began: all(e.connections > n and e.ready.is_set() for e, n in began.items()),
                    "all back",
                )  # type: ignore[misc]
            await kept.stop()
            await loose.stop()
            for speaker in (kept, loose):
                last = await speaker.accepted()
                group = speaker.group
                await until(lambda: all(each.last(group) == last.number for each in listeners), "the last one")  # noqa: B023
            books = [account(each.record[KEPT], kept) for each in listeners]
            print(f"\nwith history: {tally(books)}")
            print(f"longest gap: {max(longest_gap(each.record[KEPT]) for each in listeners):.2f} s")
            # only printed: who speaks through another node each time has no order promised without a history
            said = loose.numbers("accepted")
            missed = [len(said - {line.number for line in each.record[LOOSE]}) for each in listeners]
            print(
                f"without: {len(loose.said)} said, {max(missed)} missed at most, {sum(missed) / len(missed):.1f} each"
            )
            assert all(sums.delivered == sums.sent == sums.accepted and not sums.again for sums in books)
            assert {answer for each in listeners for answer in each.recovered[KEPT]} == {True}
        no_bugs(nodes)


# Several workers of one uvicorn


@contextmanager
def alone(worker: int, workers: Sequence[int]) -> Iterator[None]:
    """Let only ``worker`` be awake, so that it is the one who accepts."""
    others = [pid for pid in workers if pid != worker]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


async def with_each(stack: AsyncExitStack, node: Node, workers: Sequence[int]) -> list[Listener]:
    """Return a listener with each of the workers of one port."""
    found = []
    for number, worker in enumerate(workers):
        with alone(worker, workers):
            listener = Listener(f"{node.port}.{number}", [door(node)])
            await stack.enter_async_context(listener)
            await listener.connected()
        await until(lambda: listener.served_by is not None, "the worker's name")  # noqa: B023
        assert listener.served_by == worker
        await listener.join(LOOSE)
        await listener.join(PEOPLE, presence="members")
        await listener.track(PEOPLE, {})
        found.append(listener)
    return found


@pytest.mark.system
async def test_three_workers_of_one_uvicorn_are_one_fleet_by_the_url_alone(redis: RedisServer) -> None:
    with nodes_on(redis, 1, ["--workers", "3"]) as (node,):
        workers = await until(lambda: pids if len(pids := node.workers()) == 3 else [], "three workers")
        await eventually(lambda: subscribers(redis), lambda count: count == 3)
        async with AsyncExitStack() as stack:
            peers = await with_each(stack, node, workers)
            first, *_ = names = [each.name for each in peers]
            await agree([node], peers)
            async with Speaker(LOOSE, node) as speaker:
                await until(lambda: len(speaker.said) > 10, "something said")
            last = await ask(node, f"/say?group={LOOSE}&n={len(speaker.said)}", "POST")
            assert last == {"verdict": "accepted", "shared": "yes"}
            await until(lambda: all(each.last(LOOSE) == len(speaker.said) for each in peers), "the last one")
            assert all(not account(each.record[LOOSE][:-1], speaker).silent for each in peers)
            for name, peer in zip(names, peers, strict=True):
                assert await ask(node, f"/push/{name}?data=hello", "POST") == "yes"
                assert (await peer.hear(type="event", event="pushed"))["data"] == "hello"
            assert await ask(node, f"/online?names={','.join(names)},nobody") == sorted(names)
            await ask(node, f"/kick/{first}", "POST")
            await until(lambda: peers[0].code == 4500, "the first one sent away")
            await agree([node], peers[1:])
            await eventually(lambda: ask(node, f"/online?names={first}"), lambda seen: seen == [])
        no_bugs([node])


async def subscribers(redis: RedisServer) -> int:
    """How many processes hear."""
    return int(redis.ask("PUBSUB", "NUMSUB", "rt:probe")[1])


# Begun later


@pytest.mark.system
async def test_who_was_revoked_cannot_come_in_on_a_node_that_started_later(redis: RedisServer) -> None:
    with nodes_on(redis, 2) as nodes:
        async with AsyncExitStack() as stack:
            (bad,) = await gather(stack, ["bad"], lambda _: [door(nodes[0])], [LOOSE])
            (good,) = await gather(stack, ["good"], lambda _: [door(nodes[0])], [LOOSE])
            assert await ask(nodes[1], "/revoke/bad", "POST") == "revoked"
            await until(lambda: bad.code == 4501, "the revoked one sent away")
            with nodes_on(redis, 1) as (later,):
                for node in (*nodes, later):
                    assert await refusal(node, "bad") == 401
                    async with Listener("good", [door(node)]) as again:
                        await again.connected()
            assert good.code is None
            assert good.connections == 1
        no_bugs(nodes)


async def refusal(node: Node, name: str) -> int:
    """The status by which ``name`` is refused."""
    with pytest.raises(InvalidStatus) as refused:
        await connect(door(node), additional_headers={"Authorization": f"Bearer {token(name)}"}, proxy=None)
    return refused.value.response.status_code


# Two versions


def release(folder: Path, raise_by: int) -> dict[str, Any]:
    """Lay the package and the app into ``folder``, with the format of what is stored and sent raised by so much."""
    shutil.copytree(ROOT / "starlette_rt", folder / "starlette_rt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests" / "station.py", folder / "station.py")
    path = folder / "starlette_rt" / "backends" / "redis" / "connection.py"
    source, count = re.subn(
        r"^FORMAT = (\d+)", lambda found: f"FORMAT = {int(found[1]) + raise_by}", path.read_text("utf-8"), flags=re.M
    )
    assert count == 1
    path.write_text(source, "utf-8")
    return {"args": [*QUIET, "--app-dir", str(folder)], "env": {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}}


@contextmanager
def version(redis: RedisServer, folder: Path, raise_by: int) -> Iterator[Node]:
    """Run one node of a version that stands in ``folder``."""
    folder.mkdir()
    options = release(folder, raise_by)
    env = {"REDIS_URL": redis.url, "PRESENCE_GRACE": str(GRACE), **options["env"]}
    with fleet("station:app", 1, env, options["args"]) as (node,):
        yield node


@pytest.mark.system
async def test_an_old_version_skips_what_it_cannot_read_and_its_members_know(
    redis: RedisServer, tmp_path: Path
) -> None:
    with version(redis, tmp_path / "old", 0) as old, version(redis, tmp_path / "new", 1) as new:
        async with AsyncExitStack() as stack:
            olds, news = [await people(stack, node, 3) for node in (old, new)]
            for each in (*olds, *news):
                await each.join(LOOSE)
            await agree([new], [*olds, *news], watchers=news)
            await agree([old], olds)
            kept, loose = Speaker(KEPT, old, new), Speaker(LOOSE, old, new)
            for speaker in (kept, loose):
                async with speaker:
                    await until(lambda: len(speaker.said) > 20, "enough said by each in turn")  # noqa: B023
                    await speaker.stop()
                    speaker.through = [old]
                    last = [await speaker.accepted() for _ in range(3)][-1]
                    heard = [each.record[speaker.group] for each in (*olds, *news)]
                    await until(lambda: all(lines[-1].number == last.number for lines in heard), "the last one")  # noqa: B023
            books = [account(each.record[KEPT], kept) for each in (*olds, *news)]
            print(f"\nwith history: {tally(books)}")
            assert [sums.silent for sums in books] == [()] * len(books)
            by_new = tuple(said.number for said in loose.said if said.number % 2 and said.number < len(loose.said) - 3)
            assert {account(each.record[LOOSE], loose).silent for each in news} == {()}
            assert {account(each.record[LOOSE], loose).silent for each in olds} == {by_new}
        no_bugs([old, new])
