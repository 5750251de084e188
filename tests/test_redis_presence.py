"""Who is present on all nodes of one Redis: nodes that come, die, freeze and leave, and a Redis that comes and goes.

The law of this file: a node here is a `Link` with its leases and its presence, as a process has them; several of them
stand in one test, and the servers are real. What every store guarantees is asked by the tests of test_backends.py.
Where a lease has to run out it is a short one, but for the test that measures the true one; the grace of those who
linger is taken from the keys of Redis. No test sleeps to be right: what must not happen is looked for when something
later has happened.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
import redis
from anyio.lowlevel import checkpoint

from starlette_rt.backends.redis import changes as changing
from starlette_rt.backends.redis import nodes as leases
from starlette_rt.backends.redis import presence as presences
from starlette_rt.backends.redis.changes import CHANGE, Changes, Operation
from starlette_rt.backends.redis.connection import Link
from starlette_rt.backends.redis.following import READ
from starlette_rt.backends.redis.nodes import Nodes
from starlette_rt.backends.redis.presence import RedisPresence
from starlette_rt.backends.redis.replica import Change, Counts, Replica, Shown, Tally, found_of
from starlette_rt.feed import Feed
from starlette_rt.hub import Hub, Wire
from starlette_rt.metrics import Metrics
from starlette_rt.presence import Diff
from starlette_rt.protocols.plain import PLAIN
from starlette_rt.seams import ASGI
from tests import test_backends as contract
from tests.redises import RedisServer, cluster, every_redis_server, every_redis_url, redis_server, redis_url
from tests.test_feed import Watcher

__all__ = ["every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = [pytest.mark.system, pytest.mark.anyio]

SCRIPTS = (*leases.SCRIPTS, *presences.SCRIPTS)
PREFIX = "t"
GRACE = contract.GRACE
SOON = 10.0  # seconds for what has to happen and takes no time of its own


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Node:
    """What one process has of the things under test. ``shift`` is how far its clock is ahead."""

    def __init__(self, url: str, grace: float = GRACE) -> None:
        self.shift = 0.0
        self.changed: list[str] = []
        self.counted: list[tuple[str, int, int]] = []
        self.link = Link(url, prefix=PREFIX, scripts=SCRIPTS)
        self.nodes = Nodes(self.link)
        self.presence = RedisPresence(self.link, self.nodes, grace, lambda: time.monotonic() + self.shift)
        self.presence.on_count = lambda *found: self.counted.append(found)
        self.diffs: list[Diff] = []

    async def start(self) -> None:
        await self.link.start()
        await self.presence.start(self._changes)
        self.sweeper = self.link.tasks.spawn(self._sweep)

    def _changes(self, group: str) -> None:
        """Take every diff at once, as a feed does for its watchers."""
        self.changed.append(group)
        if (diff := self.presence.take(group, watched=True)) is not None:
            self.diffs.append(diff)

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(0.05)
            self.presence.sweep()

    async def stop(self) -> None:
        await self.presence.stop()
        self.sweeper.cancel()
        await self.link.stop()

    async def die(self) -> None:
        """End as a killed process does: nothing is said any more."""
        self.freeze()
        self.sweeper.cancel()
        self.link._pipe.up = False
        await self.link.stop()

    def freeze(self) -> None:
        """Hold the lease no more, and look at nothing."""
        if self.nodes._running is not None:
            self.nodes._running.cancel()
            self.nodes._running = None

    def thaw(self) -> None:
        """Go on."""
        if self.nodes._running is None:
            self.nodes._running = self.link.tasks.spawn(self.nodes._run)

    async def track(self, *names: str, group: str = "g", meta: dict[str, Any] | None = None) -> None:
        """Track connections ``1 of ada``; each belongs to the last word."""
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(self.presence.track, group, name.split()[-1], name, meta or {})

    async def untrack(self, name: str, group: str = "g") -> None:
        await self.presence.untrack(group, name.split()[-1], name)

    def close(self, name: str, group: str = "g") -> None:
        self.presence.close([group], name.split()[-1], name)

    async def follow(self, group: str = "g") -> None:
        await self.presence.follow(group, "members")
        self.diffs.clear()

    async def members(self, group: str = "g") -> list[str]:
        return sorted(await self.presence.members(group))

    def seen(self, group: str = "g") -> list[str]:
        """Return who the watchers of this node see."""
        return [member.key for member in self.presence.known(group).members]

    def leaves(self) -> dict[str, str]:
        """Return why who has left, as the watchers were told."""
        return {key: reason for diff in self.diffs for key, reason in diff.reasons.items()}


@asynccontextmanager
async def fleet(url: str, size: int = 2, grace: float = GRACE, there: bool = True) -> AsyncIterator[list[Node]]:
    """Start so many nodes, on a Redis that is ``there``, and stop those that still run."""
    async with AsyncExitStack() as stack:
        made = [Node(url, grace) for _ in range(size)]
        for node in made:
            await node.start()
            stack.push_async_callback(node.stop)
            if there:
                await until(lambda it=node: it.link.up and it.nodes.held, "a node that Redis knows")
        yield made


async def until(look: Callable[[], Any], what: str, within: float = SOON) -> None:
    with anyio.move_on_after(within):
        while not look():  # noqa: ASYNC110
            await anyio.sleep(0.005)
        return
    pytest.fail(f"there was not {what} in {within} s")


async def until_it(look: Callable[[], Awaitable[Any]], what: str, within: float = SOON) -> None:
    with anyio.move_on_after(within):
        while not await look():  # noqa: ASYNC110
            await anyio.sleep(0.005)
        return
    pytest.fail(f"there was not {what} in {within} s")


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out in a second."""
    for name, seconds in {"LEASE": 1.0, "LOOK": 0.1, "QUARANTINE": 1.0, "BURIAL": 1.0, "LATE": 0.2}.items():
        monkeypatch.setattr(leases, name, seconds)


def keys(client: redis.Redis, group: str = "g") -> set[str]:
    """Return the kinds of keys that Redis has of ``group``."""
    start = f"{PREFIX}:{{{group}}}:"
    return {key.decode().removeprefix(start) for key in client.scan_iter(f"{start}*")}


def age(client: redis.Redis, seconds: float) -> None:
    """Let the grace of all who linger be so much nearer to its end."""
    for key in client.scan_iter(f"{PREFIX}:*}}:l"):
        for connection in client.zrange(key, 0, -1):
            client.zincrby(key, -1000 * seconds, connection)
    for name in client.zrange(f"{PREFIX}:{{nodes}}:due", 0, -1):
        client.zincrby(f"{PREFIX}:{{nodes}}:due", -1000 * seconds, name)


def age_here(node: Node, seconds: float) -> None:
    """Let this node know of it."""
    node.shift += seconds
    lingering = node.presence._changes._lingering
    for group, due in tuple(lingering.items()):
        milliseconds = round(1000 * seconds)
        lingering[group] = due._replace(at=due.at - milliseconds, reminder=due.reminder - milliseconds)


class RedisStage(contract.Stage):
    """One node on Redis, whose time the test moves."""

    def __init__(self, node: Node, client: redis.Redis) -> None:
        super().__init__()
        self.node, self.client = node, client
        self.backend = contract.Backend(None, node.presence, None, None)  # type: ignore[arg-type]

    async def start(self) -> None:
        await self.node.link.start()
        await self.node.presence.start(self.changed.append)

    async def stop(self) -> None:
        await self.node.presence.stop()
        await self.node.link.stop()

    async def pass_time(self, seconds: float) -> None:
        await self.still()
        age(self.client, seconds)
        age_here(self.node, seconds)
        self.backend.presence.sweep()
        await self.still()

    async def still(self) -> None:
        """Wait until nothing is on its way, to Redis or from it."""
        await until(lambda: not any(share.idle for share in self.node.presence._shares.values()), "silence")
        for _ in range(3):  # a task that was started has said what it says, and what follows from the answer
            await self.node.link._pipe.flushed(SOON)
            await anyio.wait_all_tasks_blocked()
        for group, replica in self.node.presence._following._replicas.items():
            version = int(self.client.hget(f"{PREFIX}:{{{group}}}:v", "v") or 0)
            await until(lambda it=replica, version=version: it.version == version, "the last version")


@pytest.fixture
async def stage(every_redis_url: str) -> AsyncIterator[RedisStage]:
    """One node of a Redis of each version; what the tests of the contract ask for."""
    with redis.Redis.from_url(every_redis_url, protocol=2) as client:
        yield RedisStage(Node(every_redis_url), client)


@pytest.fixture
def client(redis_url: str) -> Any:
    with redis.Redis.from_url(redis_url, protocol=2) as client:
        yield client


# What every store guarantees.

test_who_is_tracked_is_shown = contract.test_who_is_tracked_is_shown_at_once_and_reported
test_a_group_need_not_be_followed = contract.test_a_group_need_not_be_followed_to_be_asked
test_who_is_followed_can_be_counted = contract.test_who_is_followed_can_be_counted_without_asking
test_a_count_is_reported_once = contract.test_a_count_is_reported_once_for_each_change_of_the_number
test_a_member_has_one_meta_for_each_connection = contract.test_a_member_has_one_meta_for_each_connection
test_nobody_is_where_nobody_tracked = contract.test_nobody_is_in_a_group_that_nobody_tracked
test_a_diff_is_net = contract.test_a_diff_is_net_and_taken_once
test_who_untracks_is_gone = contract.test_who_untracks_is_gone_at_once
test_who_closes_lingers = contract.test_who_closes_lingers_for_the_grace
test_who_comes_back_was_never_away = contract.test_who_comes_back_within_the_grace_was_never_away
test_who_comes_back_otherwise_is_an_update = contract.test_who_comes_back_with_something_else_to_say_is_an_update
test_a_connection_can_be_somebody_else = contract.test_a_connection_can_be_tracked_as_somebody_else
test_members_can_be_asked_for_by_page = contract.test_members_can_be_asked_for_by_page_in_the_order_of_their_keys
test_an_empty_group_is_forgotten = contract.test_an_empty_group_is_forgotten_unless_it_is_watched


# Nodes together.


async def test_what_one_node_tracks_the_watchers_of_another_see(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada", meta={"name": "Ada"})
        await two.follow()
        assert two.seen() == ["ada"]
        await one.track("2 of bob")
        await until(lambda: two.seen() == ["ada", "bob"], "a second member")
        assert [sorted(diff.joins) for diff in two.diffs] == [["bob"]]
        await one.track("1 of ada", meta={"name": "Ada L."})
        await until(lambda: len(two.diffs) == 2, "an update")
        assert [meta["name"] for meta in two.diffs[1].joins["ada"]] == ["Ada L."]
        await one.untrack("2 of bob")
        await until(lambda: two.seen() == ["ada"], "a leave")
        assert two.leaves() == {"bob": "left"}


async def test_a_member_has_metas_on_several_nodes(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada", meta={"at": 1})
        await two.track("2 of ada", meta={"at": 2})
        members = await one.presence.members("g")
        assert contract.refs(members["ada"].metas) == [{"at": 1}, {"at": 2}]
        assert await two.presence.count("g") == 1
        assert await two.presence.count("g", connections=True) == 2


async def test_who_reloads_and_comes_to_another_node_was_never_away(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 3) as [one, two, three]:
        await one.track("1 of ada", "2 of bob")
        await three.follow()
        one.close("1 of ada")
        await two.track("3 of ada")
        await two.untrack("3 of ada")  # of whom nothing is left that could linger
        await until(lambda: three.seen() == ["bob"], "the leave of the connection that took over")
        assert len(three.diffs) == 1
        assert keys(client) >= {"u", "e", "k"}
        assert client.exists(f"{PREFIX}:{{g}}:l") == 0


async def test_without_the_take_over_a_reload_would_be_seen(redis_url: str) -> None:
    """The negative twin: another user's connection takes nobody's place."""
    async with fleet(redis_url, 3) as [one, two, three]:
        await one.track("1 of ada")
        await three.follow()
        one.close("1 of ada")
        await two.track("3 of eve")
        await until(lambda: three.seen() == ["ada", "eve"], "both")


async def test_the_metas_of_a_page_are_those_of_its_members_and_in_the_order_of_keys(redis_url: str) -> None:
    names = ["a", "a b", "a\u00e9", "ab", "b", "\u00e9", "\U0001f600", "z"]
    async with fleet(redis_url) as [one, two]:
        await one.track(*(f"{number} of {name}" for number, name in enumerate(names) if " " not in name))
        await one.presence.track("g", "a b", "space", {})
        await one.presence.track("g", "b", "second", {"n": 2})
        expected = sorted(names)
        found: list[str] = []
        while page := await two.presence.members("g", after=found[-1] if found else None, limit=3):
            assert len(page) <= 3
            found += page
        assert found == expected
        assert len((await two.presence.members("g", after="a\u00e9", limit=1))["b"].metas) == 2
        assert list(await two.presence.members("g", after="b")) == expected[expected.index("b") + 1 :]


async def test_a_page_reads_no_more_than_it_shows(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track(*(f"{number} of u{number:04}" for number in range(1000)))
        client.config_resetstat()
        assert len(await two.presence.members("g", after="u0500", limit=10)) == 10
        stats = client.info("commandstats")
        assert stats["cmdstat_hget"]["calls"] == 10
        assert "cmdstat_hgetall" not in stats


async def test_who_follows_first_reads_the_group_and_the_others_do_not(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        client.config_resetstat()
        async with anyio.create_task_group() as tasks:
            for _ in range(200):
                tasks.start_soon(two.presence.follow, "g", "members")
        assert two.seen() == ["ada"]
        assert client.info("commandstats")["cmdstat_hgetall"]["calls"] == 1


async def test_who_counts_is_told_the_number_and_reads_no_list(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        client.config_resetstat()
        await two.presence.follow("g", "count")
        assert two.presence.size("g") == 1
        two.changed.clear()
        await one.track("2 of bob", "3 of cleo")
        await until(lambda: two.presence.size("g") == 3, "three")
        await one.track("3 of cleo", meta={"away": True})
        await one.untrack("2 of bob")
        await until(lambda: two.presence.size("g") == 2, "two")
        assert two.changed == ["g", "g"]  # what changes no number is not told
        assert two.seen() == []
        assert "cmdstat_hgetall" not in client.info("commandstats")
        two.presence.unfollow("g", "count")
        assert two.presence.size("g") == 0


async def test_a_group_is_followed_without_a_gap_while_it_changes(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        async with anyio.create_task_group() as tasks:
            for number in range(300):
                tasks.start_soon(one.track, f"{number} of u{number}")
                if number == 150:
                    tasks.start_soon(two.follow)
                await checkpoint()
        await until(lambda: len(two.seen()) == 300, "everybody")


async def test_what_was_missed_is_found_with_the_next_change(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet(redis_url) as [one, two]:
        await two.follow()
        with monkeypatch.context() as deaf:
            deaf.setattr(Replica, "receive", lambda *_: True)
            await one.track("1 of ada", "2 of bob")
            await one.untrack("2 of bob")
        await one.track("3 of cleo")
        await until(lambda: two.seen() == ["ada", "cleo"], "what was missed")


async def test_a_subscriber_that_was_lost_is_made_up_for(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        await two.follow()
        await two.presence.follow("g", "count")
        two.link._subscriber.lose("the test says so")
        await one.track("2 of bob")
        await until(lambda: two.seen() == ["ada", "bob"], "what was missed")
        await until(lambda: two.presence.size("g") == 2, "the count that was missed")


async def test_what_cannot_be_read_is_read_later_though_nothing_changes(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        entries, kept = f"{PREFIX}:{{g}}:e", f"{PREFIX}:{{g}}:kept"
        client.rename(entries, kept)
        client.set(entries, "not a hash")
        await two.follow()
        await two.presence.follow("g", "count")
        assert two.seen() == []
        client.rename(kept, entries)
        await until(lambda: two.seen() == ["ada"], "the members")
        two.presence.unfollow("g", "members")
        await until(lambda: two.presence.size("g") == 1, "the count")


async def test_watchers_on_two_nodes_are_told_the_same_state_and_diffs(redis_url: str) -> None:
    async with AsyncExitStack() as stack:
        worlds = []
        for _ in range(2):
            node = Node(redis_url)
            hub = Hub(asyncio.get_running_loop().call_soon, Metrics())
            await node.link.start()
            feed = Feed(hub, node.presence, node.link.tasks)
            hub.on_crowd = feed.crowd
            await node.presence.start(feed.changed)
            stack.push_async_callback(node.link.stop)
            stack.push_async_callback(node.presence.stop)
            stack.callback(feed.close)
            worlds.append((node, hub, feed))
        (one, *_), (two, hub, feed) = worlds
        await one.track("1 of ada")
        told = []
        for how in ("members", "members", "count"):
            watcher = Watcher(Wire(PLAIN["json"], ASGI))
            hub.join(watcher, "g")
            await feed.watch(watcher, "g", how)
            told.append(watcher)
        await two.track("2 of bob")
        await one.track("3 of cleo")
        await until(lambda: told[2].heard[-1:] == [{"type": "presence_count", "group": "g", "count": 3}], "the count")
        members, same, _ = (watcher.take() for watcher in told)
        assert members == same
        assert list(members[0]["members"]) == ["ada"]
        assert sorted(key for diff in members[1:] for key in diff["joins"]) == ["bob", "cleo"]
        assert [diff["version"] - members[0]["version"] for diff in members[1:]] == list(range(1, len(members)))
        for watcher in told:
            hub.forget(watcher)
        assert not two.presence._following._replicas
        assert not two.presence._following._tallies


# Cost.


async def test_a_storm_of_five_thousand_is_few_scripts(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await two.presence.follow("g", "count")
        client.config_resetstat()
        await one.track(*(f"{number} of u{number}" for number in range(5000)))
        scripts = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        assert scripts <= 5000 / presences.OPERATIONS + 15  # those of the leases, too
        await until(lambda: two.presence.size("g") == 5000, "all")


async def test_changes_that_wait_for_each_other_are_one_script_each(redis_url: str, client: redis.Redis) -> None:
    """The negative twin: who waits for the answer each time has as many scripts as changes."""
    async with fleet(redis_url, 1) as [one]:
        client.config_resetstat()
        for number in range(100):
            await one.track(f"{number} of ada")
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= 100


async def test_operations_of_one_connection_keep_their_order(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(one.presence.track, "g", "ada", "1", {"n": number})
            tasks.start_soon(one.presence.untrack, "g", "ada", "1")
            tasks.start_soon(one.presence.track, "g", "ada", "1", {"n": "last"})
        assert contract.refs((await two.presence.members("g"))["ada"].metas) == [{"n": "last"}]


async def test_idle_members_cost_redis_nothing_but_the_leases(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track(*(f"{number} of u{number}" for number in range(10_000)))
        await two.presence.follow("g", "members")
        await two.presence.follow("g", "count")
        client.config_resetstat()
        begun = time.monotonic()
        looks = one.nodes._looked, two.nodes._looked
        await until(lambda: one.nodes._looked > looks[0] + 1.5 and two.nodes._looked > looks[1] + 1.5, "some looks")
        lasted = time.monotonic() - begun
        stats = {name: value["calls"] for name, value in client.info("commandstats").items()}
        probes = {"cmdstat_publish", "cmdstat_pubsub|numsub", "cmdstat_pubsub"}
        inside = {"cmdstat_time", "cmdstat_zscore", "cmdstat_zadd", "cmdstat_zrangebyscore", "cmdstat_zrange"}
        asked = {"cmdstat_info", "cmdstat_config|resetstat", "cmdstat_config"}
        assert set(stats) <= {"cmdstat_evalsha"} | probes | inside | asked
        assert stats["cmdstat_evalsha"] <= 2 * (lasted / (leases.LOOK * (1 - leases.JITTER)) + 1)


# The end of a node.


@pytest.mark.usefixtures("brisk")
async def test_the_members_of_a_dead_node_leave_by_one_diff_that_says_why(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url, 3) as [one, two, three]:
        await two.follow()
        await three.follow()
        await one.track("1 of ada", "2 of bob", "3 of cleo")
        await one.track("4 of ada", group="other")
        await three.track("5 of cleo", "6 of dan")
        await until(lambda: len(two.seen()) == 4, "everybody")
        generation = one.nodes.generation
        two.diffs.clear()
        await one.die()
        await until(lambda: two.seen() == three.seen() == ["cleo", "dan"], "the end of who was on it")
        assert [(sorted(diff.leaves), diff.joins) for diff in two.diffs] == [(["ada", "bob", "cleo"], {})]
        assert two.leaves() == {"ada": "node_lost", "bob": "node_lost"}
        await until_it(lambda: gone(two, "other"), "the end of another group")
        await until(lambda: not client.keys(f"*g:{{{generation}}}"), "the end of its index")
        await until(lambda: client.zscore(f"{PREFIX}:{{nodes}}:leases", generation) is None, "the end of its lease")
        assert keys(client, "other") <= {"v", "dead", f"a:{generation}"}


async def gone(node: Node, group: str) -> bool:
    return not await node.members(group)


async def test_members_of_a_dead_node_are_gone_within_ten_seconds(redis_url: str) -> None:
    """With the true times. The nodes have been up for a while before one dies, as they are in life."""
    async with fleet(redis_url) as [one, two]:
        await two.follow()
        await one.track("1 of ada")
        await until(lambda: two.nodes.settled, "a node that may judge", leases.QUARANTINE * 1.5)
        begun = time.monotonic()
        await one.die()
        await until(lambda: two.seen() == [], "the end", 12)
        assert time.monotonic() - begun < 10
        assert two.leaves() == {"ada": "node_lost"}


@pytest.mark.usefixtures("brisk")
async def test_a_node_that_lives_is_not_reaped_however_long_it_says_nothing(redis_url: str) -> None:
    """The negative twin."""
    async with fleet(redis_url, 3) as [one, two, dying]:
        await two.follow()
        await one.track("1 of ada")
        await dying.track("2 of bob")
        await until(lambda: two.seen() == ["ada", "bob"], "both")
        await dying.die()
        await until(lambda: two.seen() == ["ada"], "the end of who is dead")
        assert one.counted.count(("g", 1, 0)) == two.counted.count(("g", 1, 0)) == 0


@pytest.mark.usefixtures("brisk")
async def test_the_count_of_a_dead_node_is_told_once_on_all_nodes(redis_url: str) -> None:
    async with fleet(redis_url, 4) as nodes:
        *others, dying = nodes
        await dying.track("1 of ada", group="\0occupied:x")
        assert dying.counted == [("\0occupied:x", 0, 1)]
        await dying.die()
        await until(lambda: any(node.counted for node in others), "the end")
        await until_it(lambda: gone(others[0], "\0occupied:x"), "nobody")
        for node in others:
            await until(lambda it=node, seen=node.nodes._looked: it.nodes._looked > seen, "another look")
        assert [found for node in others for found in node.counted] == [("\0occupied:x", 1, 0)]


@pytest.mark.usefixtures("brisk")
async def test_a_frozen_node_that_wakes_registers_under_a_new_name(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await two.follow()
        await one.track("1 of ada", "2 of bob")
        await one.track("3 of ada", group="other")
        before = one.nodes.generation
        one.freeze()
        await until(lambda: two.seen() == [], "the end of a node that is taken for dead")
        assert two.leaves() == {"ada": "node_lost", "bob": "node_lost"}
        one.thaw()
        await until(lambda: two.seen() == ["ada", "bob"], "all of it back")
        await until_it(lambda: there(two, "other", ["ada"]), "also elsewhere")
        assert one.nodes.generation != before
        await no_ghosts(client, "g", {"1 of ada": one, "2 of bob": one})


async def there(node: Node, group: str, members: list[str]) -> bool:
    return await node.members(group) == members


async def no_ghosts(client: redis.Redis, group: str, holders: dict[str, Node]) -> None:
    """Wait until Redis has these connections and no others, each under the name that its node has now."""

    async def exact() -> bool:
        found = await found_of([b"", 0, 0, 0, flat(client.hgetall(f"{PREFIX}:{{{group}}}:e")), []])
        entries = {each.connection for each in found.shown}
        sets = {node: f"{PREFIX}:{{{group}}}:m:{node.nodes.generation}" for node in holders.values()}
        held = {name.decode(): node for node, key in sets.items() for name in client.smembers(key)}
        others = {kind for kind in keys(client, group) if kind.startswith("m:")}
        return (
            entries == set(holders)
            and held == holders
            and others == {f"m:{node.nodes.generation}" for node in holders.values()}
            and client.hlen(f"{PREFIX}:{{{group}}}:n") == len(sets)
        )

    await until_it(exact, "exactly these connections")


def flat(found: dict[bytes, bytes]) -> list[bytes]:
    return [part for pair in found.items() for part in pair]


@pytest.mark.usefixtures("brisk")
async def test_what_a_frozen_node_says_before_it_knows_is_refused_and_said_again(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url) as [one, two]:
        await two.follow()
        await one.track("1 of ada")
        old = one.nodes.generation
        one.freeze()
        await until(lambda: two.seen() == [], "the end of a node that is taken for dead")
        await one.track("3 of cleo", group="new")  # where nobody has fenced it
        assert one.nodes.generation == old
        await one.track("2 of bob")  # fenced in this group
        assert one.nodes.generation != old
        one.close("1 of ada")
        one.thaw()
        await until(lambda: two.seen() == ["bob"], "who is there now")
        await until_it(lambda: there(two, "new", ["cleo"]), "and there")
        await no_ghosts(client, "new", {"3 of cleo": one})
        await no_ghosts(client, "g", {"2 of bob": one})


@pytest.mark.usefixtures("brisk")
async def test_what_was_written_under_a_reaped_name_is_found(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        old = one.nodes.generation
        one.freeze()
        await until_it(lambda: gone(two, "g"), "the end of a node that is taken for dead")
        # What was on its way in a group that nobody had to fence, of a connection that ended meanwhile.
        await one.link.command("SADD", one.presence._changes.index(old), "late")
        await one.presence._changes.run("late", old, [("t", "9", "ghost", b"\x80")])
        assert await two.members("late") == ["ghost"]
        one.thaw()
        await until_it(lambda: gone(two, "late"), "the end of the ghost")
        await until_it(lambda: there(two, "g", ["ada"]), "who is alive")


@pytest.mark.usefixtures("brisk")
async def test_without_its_index_a_dead_node_is_found_by_who_reads_the_group(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        client.delete(one.presence._changes.index(one.nodes.generation))
        await one.die()
        await until(lambda: one.nodes.generation not in two.nodes._ends, "the burial")
        await two.follow()
        await until(lambda: two.seen() == [], "the end of who was left behind")
        assert two.leaves() == {"ada": "node_lost"}


@pytest.mark.usefixtures("brisk")
async def test_without_being_read_who_was_left_behind_would_stay(redis_url: str, client: redis.Redis) -> None:
    """The negative twin."""
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        client.delete(one.presence._changes.index(one.nodes.generation))
        await one.die()
        await until(lambda: one.nodes.generation not in two.nodes._ends, "the burial")
        assert await two.members() == ["ada"]


@pytest.mark.usefixtures("brisk")
async def test_a_node_that_leaves_lets_its_members_linger_and_another_lets_them_go(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url, 3) as [one, two, three]:
        await two.follow()
        await one.track("1 of ada", "2 of bob")
        await until(lambda: two.seen() == ["ada", "bob"], "both")
        generation = one.nodes.generation
        await one.stop()
        assert client.zscore(f"{PREFIX}:{{nodes}}:leases", generation) is None
        assert not client.keys(f"*g:{{{generation}}}")
        assert client.zcard(f"{PREFIX}:{{g}}:l") == 2
        await three.track("3 of ada")  # a deploy: one of them comes back elsewhere
        assert two.seen() == ["ada", "bob"]
        age(client, GRACE)
        await until(lambda: two.seen() == ["ada"], "the end of the grace")
        assert two.leaves() == {"bob": "left"}
        assert len(two.diffs) == 2
        await until(lambda: client.zcard(f"{PREFIX}:{{nodes}}:due") == 0, "the end of the reminder")
        await one.start()


@pytest.mark.usefixtures("brisk")
async def test_without_a_reminder_who_lingers_would_stay_for_ever(
    redis_url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative twin."""
    monkeypatch.setattr(Nodes, "remind", lambda *_: None)
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        await one.stop()
        age(client, GRACE)
        looked = two.nodes._looked
        await until(lambda: two.nodes._looked > looked + 3 * leases.LATE, "some looks")
        assert await two.members() == ["ada"]
        await one.start()


async def test_who_closes_on_a_node_that_stays_leaves_in_time(redis_url: str) -> None:
    async with fleet(redis_url, grace=0.3) as [one, two]:
        await two.follow()
        await one.track("1 of ada")
        await until(lambda: two.seen() == ["ada"], "a member")
        begun = time.monotonic()
        one.close("1 of ada")
        await until(lambda: two.seen() == [], "the end of the grace")
        assert time.monotonic() - begun >= 0.3
        assert two.leaves() == {"ada": "left"}


async def test_without_a_grace_who_closes_is_gone_at_once(redis_url: str) -> None:
    async with fleet(redis_url, 1, grace=0.0) as [one]:
        await one.track("1 of ada")
        one.close("1 of ada")
        await until_it(lambda: gone(one, "g"), "nobody")


# Redis away.


@pytest.mark.usefixtures("brisk")
async def test_after_an_outage_in_which_all_leases_have_run_out_nobody_is_reaped() -> None:
    with RedisServer() as server:
        async with fleet(server.url) as [one, two]:
            await one.track("1 of ada")
            await two.track("2 of bob")
            await one.follow()
            await two.follow()
            names = one.nodes.generation, two.nodes.generation
            await until(lambda: one.nodes.settled and two.nodes.settled, "nodes that may judge")
            server.pause()
            paused = time.monotonic()
            await until(lambda: time.monotonic() - paused > 2 * leases.LEASE, "all leases over")
            server.resume()
            await until(lambda: one.nodes.settled and two.nodes.settled, "nodes that may judge again")
            assert (one.nodes.generation, two.nodes.generation) == names
            assert one.seen() == two.seen() == ["ada", "bob"]
            assert one.diffs == two.diffs == []


async def test_a_node_that_has_just_come_condemns_nobody(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        one.freeze()
        await two.link.command("ZADD", "t:{nodes}:leases", 1, one.nodes.generation)  # it has run out long ago
        await two.nodes._look()
        assert not two.nodes.settled
        assert two.nodes._dead() == []
        assert two.nodes.alive(one.nodes.generation)


async def test_without_the_quarantine_it_would(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin."""
    monkeypatch.setattr(leases, "QUARANTINE", 0.0)
    async with fleet(redis_url) as [one, two]:
        one.freeze()
        await two.link.command("ZADD", "t:{nodes}:leases", 1, one.nodes.generation)
        await two.nodes._renew()
        assert two.nodes._dead() == [one.nodes.generation]
        assert not two.nodes.alive(one.nodes.generation)


@pytest.mark.usefixtures("brisk")
async def test_a_redis_that_has_forgotten_everything_learns_it_again_and_nobody_flaps(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url, 3) as [one, two, three]:
        await one.track("1 of ada", "2 of bob")
        await two.track("3 of bob", "4 of cleo")
        await three.follow()
        await three.presence.follow("g", "count")
        await until(lambda: three.seen() == ["ada", "bob", "cleo"], "everybody")
        three.diffs.clear()
        client.flushall()
        await until(lambda: client.hlen(f"{PREFIX}:{{g}}:e") == 4, "everything back")
        await no_ghosts(client, "g", {"1 of ada": one, "2 of bob": one, "3 of bob": two, "4 of cleo": two})
        await one.track("5 of dan")
        await until(lambda: three.seen() == ["ada", "bob", "cleo", "dan"], "what has come since")
        assert three.presence.size("g") == 4
        assert three.leaves() == {}
        assert [sorted(diff.joins) for diff in three.diffs] == [["dan"]]


async def test_what_a_node_tracks_its_own_watchers_see_though_redis_has_forgotten_it(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url, 1) as [one]:
        await one.track("1 of ada")
        client.flushall()
        await one.follow()  # before the next look finds out
        assert one.seen() == ["ada"]


@pytest.mark.usefixtures("brisk")
async def test_without_the_grace_of_a_replica_everybody_would_flap(
    redis_url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative twin."""
    async with fleet(redis_url) as [one, two]:
        await one.track("1 of ada")
        await two.follow()
        monkeypatch.setattr(two.presence._following._replicas["g"], "_grace", 0.0)
        client.flushall()
        await two.track("2 of bob")
        await until(lambda: two.leaves() == {"ada": "left"}, "a leave of one who is there")
        await until(lambda: two.seen() == ["ada", "bob"], "her return")


async def test_while_redis_is_away_tracking_succeeds_and_nobody_leaves() -> None:
    with RedisServer() as server:
        async with fleet(server.url) as [one, two]:
            await one.track("1 of ada", "2 of bob")
            await two.track("3 of cleo")
            await one.follow()
            await two.presence.follow("g", "count")
            server.kill()
            await until(lambda: not one.link.up and not two.link.up, "an outage")
            begun = time.monotonic()
            await one.track("4 of dan")
            await one.untrack("2 of bob")
            await two.track("5 of eve", group="new")
            assert time.monotonic() - begun < 1
            assert one.seen() == await one.members() == ["ada", "cleo", "dan"]
            assert await one.presence.count("g") == 3
            assert await two.presence.count("g") == 3  # the last that was known
            assert await two.presence.count("g", connections=True) == 1
            assert await two.members() == ["cleo"]  # nobody follows here, and this node knows its own
            assert await two.members("new") == ["eve"]
            assert one.leaves() == {"bob": "left"}
            server.start()
            await until_it(lambda: there(two, "g", ["ada", "cleo", "dan"]), "all registered")
            await until_it(lambda: there(one, "new", ["eve"]), "all registered")
            await until(lambda: two.presence.size("g") == 3, "the count")
            assert one.leaves() == {"bob": "left"}


async def test_who_closes_while_redis_is_away_lingers_from_its_return() -> None:
    with RedisServer(keep=True) as server:
        async with fleet(server.url, grace=1.0) as [one, two]:
            await one.track("1 of ada", "2 of bob")
            server.kill()
            await until(lambda: not one.link.up and not two.link.up, "an outage")
            one.close("1 of ada")
            server.start()
            await until(lambda: server.ask("ZCARD", f"{PREFIX}:{{g}}:l") == 1, "one who lingers")
            assert await two.members() == ["ada", "bob"]
            await until_it(lambda: there(two, "g", ["bob"]), "the end of the grace")


async def test_what_comes_and_goes_while_redis_is_away_leaves_nothing_behind() -> None:
    with RedisServer() as server:
        async with fleet(server.url, 1) as [one]:
            await one.track("1 of ada")
            server.kill()
            await until(lambda: not one.link.up, "an outage")
            for number in range(1000):
                await one.track("2 of bob", group=f"g{number}")
                one.close("2 of bob", group=f"g{number}")
            assert set(one.presence._shares) == {"g"}


async def test_a_watcher_can_begin_while_redis_is_away() -> None:
    with RedisServer() as server:
        async with fleet(server.url) as [one, two]:
            await one.track("1 of ada")
            await two.track("2 of bob")
            server.kill()
            await until(lambda: not one.link.up and not two.link.up, "an outage")
            with anyio.fail_after(2):
                await one.presence.follow("g", "members")
                await one.presence.follow("g", "count")
            assert one.seen() == ["ada"]
            server.start()
            await until(lambda: one.seen() == ["ada", "bob"], "everybody")


async def test_a_redis_that_refuses_to_write_is_tried_again(redis_url: str, client: redis.Redis) -> None:
    async with fleet(redis_url) as [one, two]:
        try:
            client.config_set("maxmemory", 1)
            await one.track("1 of ada")
            assert await two.members() == []
        finally:
            client.config_set("maxmemory", 0)
        await until_it(lambda: there(two, "g", ["ada"]), "a later success")


@pytest.mark.usefixtures("brisk")
async def test_a_group_that_redis_refuses_holds_up_no_other_and_is_tried_again(
    redis_url: str, client: redis.Redis
) -> None:
    async with fleet(redis_url, 3) as [one, two, dying]:
        client.set(f"{PREFIX}:{{bad}}:e", "not a hash")
        for node in (one, dying):
            await node.track("1 of ada", group="bad")
        await one.track("1 of ada")
        await dying.track("2 of bob")
        name = one.nodes.generation
        one.nodes.lose(name)
        await until(lambda: one.nodes._told[1:2] == (one.nodes.generation,) != (name,), "a registration")
        await no_ghosts(client, "g", {"1 of ada": one, "2 of bob": dying})
        await dying.die()
        await until_it(lambda: there(two, "g", ["ada"]), "the end of who is dead")
        client.delete(f"{PREFIX}:{{bad}}:e")
        await until_it(lambda: there(two, "bad", ["ada"]), "the group")
        await until(lambda: len(client.zrange("t:{nodes}:leases", 0, -1)) == 2, "the end of its burial")


async def test_a_stop_while_redis_is_away_or_frozen_is_short() -> None:
    with RedisServer() as server:
        one, two = Node(server.url), Node(server.url)
        for node in (one, two):
            await node.start()
            await node.track("1 of ada")
        server.pause()
        begun = time.monotonic()
        await one.stop()
        assert time.monotonic() - begun < 5
        server.resume()
        server.kill()
        await two.stop()
        assert time.monotonic() - begun < 8


async def test_a_node_that_starts_before_redis_registers_when_it_is_there() -> None:
    with RedisServer() as server:
        server.kill()
        async with fleet(server.url, 1, there=False) as [one]:
            await one.track("1 of ada")
            assert await one.members() == ["ada"]
            server.start()
            await until(lambda: server.ask("HLEN", f"{PREFIX}:{{g}}:e") == 1, "the registration")


async def test_a_store_can_be_stopped_and_started_again(redis_url: str) -> None:
    async with fleet(redis_url) as [one, two]:
        for number in range(3):
            await one.track(f"{number} of ada")
            await one.stop()
            assert not one.presence._shares
            await one.start()
        assert await two.members() == ["ada"]


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_all_nodes_end_with_the_same_members(seed: int) -> None:
    """Three nodes say this and that while connections, data, scripts and leases are lost, and Redis dies."""
    chance = random.Random(seed)
    groups, users = ["g", "h"], ["ada", "bob", "cleo"]
    with RedisServer(keep=bool(seed % 2)) as server:
        async with fleet(server.url, 3, grace=0.3) as nodes:
            here: dict[tuple[str, str], tuple[Node, dict[str, Any]]] = {}  # what ought to be there
            for node in nodes:
                for group in groups:
                    await node.follow(group)
            disturbances: list[Callable[[Node], object]] = [
                lambda node: node.link._subscriber.lose("the test says so"),
                lambda node: node.link._pipe.lose("the test says so"),
                lambda node: server.ask("FLUSHALL"),
                lambda node: server.ask("SCRIPT", "FLUSH"),
                lambda node: node.nodes.lose(node.nodes.generation),
                lambda node: (node.freeze(), server.ask("ZADD", "t:{nodes}:leases", -1, node.nodes.generation)),
                lambda node: server.restart(kill=True),
            ]
            async with anyio.create_task_group() as tasks:
                for number in range(400):
                    group, node = chance.choice(groups), chance.choice(nodes)
                    mine = [key for key, (holder, _) in here.items() if holder is node and key[0] == group]
                    verb = chance.choice(["track", "track", "update", "untrack", "close"])
                    if verb == "track" or not mine:
                        name = f"{number} of {chance.choice(users)}"
                        here[group, name] = node, {"n": number % 3}
                        tasks.start_soon(node.presence.track, group, name.split()[-1], name, {"n": number % 3})
                    else:
                        _, name = key = chance.choice(mine)
                        if verb == "update":
                            here[key] = node, {"n": number % 3}
                            tasks.start_soon(node.presence.track, group, name.split()[-1], name, {"n": number % 3})
                        else:
                            del here[key]
                            tasks.start_soon(node.untrack, name, group) if verb == "untrack" else node.close(
                                name, group
                            )
                    if number % 40 == 20:
                        chance.choice(disturbances)(node)
                    await anyio.sleep(chance.choice([0, 0, 0.001, 0.01]))
            for node in nodes:
                node.thaw()
            expected = {group: shown_as(here, group) for group in groups}

            def same() -> bool:
                return all(
                    shown_by(node.presence._following._replicas[group].roster.members()) == expected[group]
                    for node in nodes
                    for group in groups
                )

            await until(same, "the same everywhere", 20)
            for group in groups:
                there = {name: node for (each, name), (node, _) in here.items() if each == group}
                with redis.Redis.from_url(server.url, protocol=2) as client:
                    await no_ghosts(client, group, there)
                for node in nodes:
                    node.presence.unfollow(group, "members")
                    assert shown_by(await node.presence.members(group)) == expected[group]


def shown_as(here: dict[tuple[str, str], tuple[Node, dict[str, Any]]], group: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for (each, name), (_, meta) in here.items():
        if each == group:
            found.setdefault(name.split()[-1], []).append(meta["n"])
    return {user: sorted(numbers) for user, numbers in found.items()}


def shown_by(members: dict[str, Any]) -> dict[str, list[int]]:
    return {user: sorted(meta["n"] for meta in member.metas) for user, member in members.items()}


# What is said twice.

SAID: dict[str, list[Operation]] = {
    "track": [("t", "3", "cleo", b"\x80")],
    "update": [("t", "1", "ada", b"\x81\xa1n\x01")],
    "take over": [("t", "4", "dan", b"\x80")],
    "untrack": [("x", "1", "", b"")],
    "close": [("c", "1", "", b"")],
    "all": [("x", "1", "", b""), ("x", "2", "", b""), ("x", "9", "", b"")],
    "reap": [changing.REAP],
    "expire": [changing.EXPIRE],
}


def stored(client: redis.Redis) -> dict[str, Any]:
    """Return what Redis has of the group, but for the times."""
    found: dict[str, Any] = {}
    for kind in "uen":
        found[kind] = client.hgetall(f"{PREFIX}:{{g}}:{kind}")
    for kind in ("k", "l"):
        found[kind] = client.zrange(f"{PREFIX}:{{g}}:{kind}", 0, -1)
    return found | {kind: client.smembers(f"{PREFIX}:{{g}}:{kind}") for kind in keys(client) if kind[0] == "m"}


@pytest.mark.parametrize("operations", SAID.values(), ids=SAID)
async def test_what_is_said_twice_is_done_once(
    redis_url: str, client: redis.Redis, operations: list[Operation]
) -> None:
    async with fleet(redis_url, 1) as [one]:
        changes, generation = one.presence._changes, one.nodes.generation
        await one.track("1 of ada")
        await changes.run("g", generation, [("t", "1", "ada", b"\x80"), ("t", "2", "bob", b"\x80")])
        await changes.run(
            "g", generation, [("x", "1 of ada", "", b""), ("t", "9", "dan", b"\x80"), ("c", "9", "", b"")]
        )
        arguments = changes._arguments("g", generation, operations)
        answers = [await one.link.call(CHANGE, changes.keys("g", generation), arguments)]
        once = stored(client)
        answers.append(await one.link.call(CHANGE, changes.keys("g", generation), arguments))
        assert stored(client) == once
        assert answers[0][:3] == answers[1][:3]  # and nothing was told again


async def test_an_answer_that_was_lost_is_the_same_the_second_time(redis_url: str) -> None:
    async with fleet(redis_url, 1) as [one]:
        changes, generation = one.presence._changes, one.nodes.generation
        first = changes._arguments("g", generation, [("t", "1", "ada", b"\x80")])
        keys = changes.keys("g", generation)
        answer = await one.link.call(CHANGE, keys, first)
        assert answer[3:5] == [0, 1]
        assert await one.link.call(CHANGE, keys, first) == answer
        assert (await one.link.call(CHANGE, keys, [*first[:2], "another", *first[3:]]))[3:5] == [1, 1]


# Slots.


async def test_every_script_keeps_to_its_keys_and_they_to_one_slot() -> None:
    """In a cluster a key that is not declared, or lies elsewhere, is an error."""
    with cluster() as servers:
        link = Link(servers.url, prefix=PREFIX, scripts=SCRIPTS)
        nodes = Nodes(link)
        changes = Changes(link, nodes, GRACE, lambda *_: None)
        for server in servers.servers:
            for script in SCRIPTS:
                server.ask("SCRIPT", "LOAD", script.body)
        groups = {servers.of(link.group_key(f"g{number}", "e")).port: f"g{number}" for number in range(50)}
        assert len(groups) == 3

        def call(script: Any, keys: list[bytes], arguments: list[Any]) -> Any:
            return servers.of(keys[0]).ask("EVALSHA", script.sha, len(keys), *keys, *arguments)

        places = set()
        for group in groups.values():
            everything = [("t", "1", "ada", b"\x80"), ("t", "2", "bob", b"\x80"), ("c", "1", "", b"")]
            everything += [("t", "3", "ada", b"\x80"), ("x", "2", "", b""), changing.EXPIRE, changing.REAP]
            for operation in everything:
                reply = call(CHANGE, changes.keys(group, "gen"), changes._arguments(group, "gen", [operation]))
                assert reply[0] == b"ok"
            reads = [link.group_key(group, kind) for kind in ("u", "e", "k", "n", "v")]
            assert call(READ, reads, [])[2:4] == [0, 0]
            assert call(READ, reads, [10, "a"])[4] == []
            places.add(servers.of(reads[0]).port)
        for generation in ("gen", "other", "third"):
            places.add(servers.of(changes.index(generation)).port)
        assert len(places) == 3
        leased = [nodes._leases, nodes._reminders]
        assert call(leases.TAKE_OR_HOLD, leased, ["take", "gen", 1000, 100, 100, 10])[0] == b"ok"
        assert call(leases.CONDEMN, leased[:1], ["gen", 1000]) == 0
        assert call(leases.SETTLE, leased[1:], ["g", 1, 0]) == 0
        foreign = next(group for port, group in groups.items() if port != servers.of(leased[0]).port)
        with pytest.raises(redis.ResponseError):  # the negative twin
            servers.of(leased[0]).ask("EVAL", "redis.call('GET', ARGV[1])", 1, leased[0], link.group_key(foreign, "e"))


# A copy, without Redis.


def change(version: int, *events: list[Any], epoch: str = "e") -> Change:
    return Change(1, epoch, version, list(events))


async def copy(*shown: Shown, version: int = 5, grace: float = 10.0) -> Replica:
    replica = Replica(grace)
    replica.begin()
    assert await replica.adopt("e", version, shown, 0.0)
    replica.roster.take_diff()
    return replica


def members(replica: Replica) -> dict[str, list[Any]]:
    return {key: contract.refs(member.metas) for key, member in replica.roster.members().items()}


async def test_a_copy_takes_what_follows_and_nothing_else() -> None:
    replica = await copy(Shown("1", "ada", {"n": 1}))
    assert replica.receive(change(5, [0, "eve", "9", {}]), 0.0)  # it was in what was read
    assert replica.receive(change(6, [0, "bob", "2", {}], [0, "ada", "1", {"n": 2}]), 0.0)
    assert members(replica) == {"ada": [{"n": 2}], "bob": [{}]}
    assert replica.receive(change(7, [2, "ada", "3", "1", {"n": 2}], [1, "bob", "2", "left"]), 0.0)
    assert members(replica) == {"ada": [{"n": 2}]}
    assert not replica.receive(change(9), 0.0)
    assert not replica.receive(change(8), 0.0)  # once there is a gap, it must be read
    assert not (await copy()).receive(change(1, epoch="another"), 0.0)


async def test_a_copy_keeps_what_is_told_while_it_is_read() -> None:
    replica = await copy()
    replica.begin()
    for version in (5, 6, 7, 8):
        assert replica.receive(change(version, [0, f"u{version}", str(version), {}]), 0.0)
    assert await replica.adopt("e", 6, [Shown("6", "u6", {})], 0.0)
    assert sorted(members(replica)) == ["u6", "u7", "u8"]
    replica.begin()
    replica.receive(change(11), 0.0)
    assert not await replica.adopt("e", 9, [], 0.0)


async def test_a_copy_that_is_told_too_much_while_it_is_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starlette_rt.backends.redis.replica.HELD", 3)
    replica = await copy()
    replica.begin()
    for version in range(6, 10):
        replica.receive(change(version), 0.0)
    assert not await replica.adopt("e", 5, [], 0.0)


async def test_of_a_group_that_was_empty_the_first_change_follows() -> None:
    replica = Replica(10.0)
    assert await replica.adopt("", 0, [], 0.0)
    assert replica.receive(change(1, [0, "ada", "1", {}]), 0.0)
    assert replica.epoch == "e"


async def test_who_is_missing_in_what_was_read_again_lingers_in_the_copy() -> None:
    replica = await copy(Shown("1", "ada", {}), Shown("2", "bob", {}))
    assert await replica.adopt("f", 1, [Shown("2", "bob", {})], 100.0)
    assert sorted(members(replica)) == ["ada", "bob"]
    replica.show(Shown("1", "ada", {}), 105.0)
    assert replica.roster.take_diff() is None
    await replica.adopt("f", 2, [], 106.0)
    assert replica.roster.expire(116.0)
    assert members(replica) == {}


async def test_who_waits_for_a_version_waits_for_no_longer_than_that() -> None:
    replica = await copy()
    with anyio.fail_after(1):
        await replica.passed("e", 5, 10)
        await replica.passed("another epoch", 6, 10)
        await replica.passed("e", 6, 0.01)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(replica.passed, "e", 7, 10)
            await anyio.wait_all_tasks_blocked()
            replica.receive(change(6), 0.0)
            replica.receive(change(7), 0.0)
    assert len(replica._passing) == 0


def test_counts_are_told_when_they_differ_and_those_of_an_empty_redis_wait() -> None:
    tally = Tally(10.0)
    assert tally.receive(Counts(1, "e", 3, 4, 5), 0.0)
    assert not tally.receive(Counts(1, "e", 3, 9, 9), 0.0)
    assert not tally.receive(Counts(1, "e", 4, 4, 6), 0.0)
    assert not tally.receive(Counts(1, "f", 1, 1, 1), 0.0)  # Redis has come back empty
    assert tally.size(1.0) == 4
    assert not tally.expire(9.0)
    assert tally.receive(Counts(1, "f", 2, 6, 6), 9.0)
    assert tally.size(9.0) == 6
    assert not tally.expire(10.0)
    tally.receive(Counts(1, "g", 1, 2, 2), 11.0)
    assert tally.size(20.0) == 6
    assert tally.expire(21.0)
    assert tally.size(21.0) == 2


async def test_what_another_format_adds_is_not_minded() -> None:
    entry = msgspec.msgpack.encode([1, "gen", 3, 1, "ada", {"n": 1}, "new"])
    assert entry[:1] == b"\x97"
    found = await found_of([b"e", 3, 1, 1, [b"1", b"\x01\xa3gen\x03\x01\xa3ada\x81\xa1n\x01", b"2", None], [b"gen"]])
    assert found.shown == [Shown("1", "ada", {"n": 1})]
    assert found.generations == ["gen"]
