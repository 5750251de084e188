"""The verbs for code that has no event loop: in a script, in several threads, on memory and on a real Redis.

The law of this file: whoever speaks here has no loop. Who listens is an app in a loop of its own, or Redis itself.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import redis

from starlette_rt import ConfigurationError, History, NotRunning, Position, Realtime, RealtimeEndpoint, Unavailable
from starlette_rt.blocking import Blocking
from starlette_rt.testing import connect
from tests.redises import RedisServer, every_redis_server, every_redis_url, redis_server, redis_url
from tests.servers import HOST, ROOT
from tests.test_realtime import live, token
from tests.wires import free_port

__all__ = ["every_redis_server", "every_redis_url", "redis_server", "redis_url"]  # fixtures

pytestmark = pytest.mark.system

SOON = 10.0
KEPT = {"kept:*": History(100, 60), "~kept": History(100, 60)}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Member(RealtimeEndpoint):
    async def on_connect(self, websocket: Any) -> None:
        await websocket.accept()
        await self.join("g")
        await self.track("g", {"at": "the door"})
        await self.push("ready")


@contextmanager
def heard(url: str, *channels: str) -> Iterator[Callable[[], int]]:
    """Listen as another process would; yields what counts the messages that have come since."""
    with redis.Redis.from_url(url, protocol=2) as client, client.pubsub() as listener:
        listener.subscribe(*channels)
        for _ in channels:
            assert listener.get_message(timeout=SOON)

        def count() -> int:
            client.publish(channels[0], "fence")
            found = 0
            while (message := listener.get_message(timeout=SOON)) is None or message["data"] != b"fence":
                found += message is not None
            return found

        yield count


# What it says and asks.


@pytest.mark.parametrize("backend", ["memory", "redis"])
def test_every_verb_does_what_its_namesake_does(backend: str, request: pytest.FixtureRequest) -> None:
    url = "memory://" if backend == "memory" else request.getfixturevalue("redis_url")
    with Realtime(url, history=KEPT).blocking() as rt:
        assert rt.broadcast("g", 1) == (None, "yes")
        places = [rt.broadcast("kept:a", number, "said", exclude="s").position for number in range(3)]
        assert rt.push("ann", {"x": b"\0"}, "pushed").shared == "yes"
        found, position = rt.history("kept:a", last=2)
        assert [(each.event, each.data, each.exclude) for each in found] == [("said", 1, "s"), ("said", 2, "s")]
        assert position == rt.position("kept:a") == places[2]
        assert isinstance(position, Position)
        assert rt.online(["ann", "bob"]) == set()
        assert rt.presence("g", limit=5) == {}
        assert rt.count("g") == rt.count("g", connections=True) == 0
        rt.disconnect("ann", code=4000, reason="bye")
        rt.disconnect(connection="nobody's")
        rt.revoke("ann", ttl=60)
        rt.revoke(token="t")


def test_what_a_verb_refuses_it_refuses_here_too() -> None:
    with Realtime(history=KEPT).blocking() as rt:
        with pytest.raises(TypeError):
            rt.broadcast("g", object())
        with pytest.raises(ValueError, match="key="):
            rt.broadcast("g", 1, key="k")
        with pytest.raises(TypeError, match="one of them"):
            rt.revoke()
        with pytest.raises(ConfigurationError, match="no history"):
            rt.history("g")
        with pytest.raises(TypeError, match="list of identities"):
            rt.online("ann")
        assert rt.broadcast("g", 1).shared == "yes"


@pytest.mark.anyio
async def test_those_who_are_connected_elsewhere_hear_it_and_are_known(redis_url: str) -> None:
    def work() -> tuple[Any, ...]:
        with Realtime(redis_url, history=KEPT).blocking() as rt:
            rt.broadcast("g", "to all")
            rt.push("ann", "to you")
            known = rt.online(["ann", "bob"]), list(rt.presence("g")), rt.count("g"), rt.count("g", connections=True)
            rt.disconnect("ann", reason="bye")
            return known

    app = live(Realtime(redis_url), Member)
    async with connect(app, "/ws", token=token("ann")) as one, connect(app, "/ws", token=token("ann")) as two:
        for client in (one, two):
            assert await client.receive_json() == "ready"
        with anyio.fail_after(SOON):
            assert await anyio.to_thread.run_sync(work) == ({"ann"}, ["ann"], 1, 2)
        for client in (one, two):
            assert [await client.receive_json(), await client.receive_json()] == ["to all", "to you"]
            await client.closed()
            assert client.close_reason == "bye"


# How it lives.


def test_what_was_said_has_left_at_the_end(every_redis_url: str) -> None:
    with heard(every_redis_url, "rt:{g}:b") as count:
        with Realtime(every_redis_url).blocking() as rt:
            for number in range(500):
                rt.broadcast("g", number)
        assert count() == 500
        assert count() == 0


def test_a_script_says_something_and_ends(redis_url: str) -> None:
    script = f"""
from starlette_rt import Realtime

with Realtime({redis_url!r}).blocking() as rt:
    for number in range(10):
        rt.broadcast("g", number)
print("done")
"""
    with heard(redis_url, "rt:{g}:b") as count:
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=40
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
        assert count() == 10


def test_several_threads_may_use_it_and_each_has_its_order(redis_url: str) -> None:
    with Realtime(redis_url, history=KEPT).blocking() as rt:

        def say(name: str) -> None:
            for number in range(20):
                rt.broadcast("kept:a", [name, number])

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(say, "abcd"))
        found, _ = rt.history("kept:a", last=100)
        for name in "abcd":
            assert [each.data[1] for each in found if each.data[0] == name] == list(range(20))
        assert len(found) == 80


def test_outside_of_its_block_it_says_what_to_write() -> None:
    rt = Realtime().blocking()
    assert isinstance(rt, Blocking)
    for _ in range(2):
        with pytest.raises(NotRunning, match=r"with rt.blocking\(\) as rt"):
            rt.broadcast("g", 1)
        with rt as entered:
            assert entered is rt
            assert rt.broadcast("g", 1).shared == "yes"
    with pytest.raises(NotRunning):
        rt.online(["ann"])


def test_its_loop_is_gone_after_it_also_when_the_body_raises() -> None:
    before = threading.active_count()

    def fail() -> None:
        with Realtime().blocking() as rt:
            rt.broadcast("g", 1)
            assert threading.active_count() > before
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert threading.active_count() == before


def test_a_redis_that_refuses_is_an_error_of_the_start_and_leaves_no_thread(redis_server: RedisServer) -> None:
    before = threading.active_count()
    rt = Realtime(f"redis://app:wrong@{HOST}:{redis_server.port}/0").blocking()
    with pytest.raises(ConfigurationError, match="redis refuses"):
        rt.__enter__()
    assert threading.active_count() == before
    with pytest.raises(NotRunning):
        rt.broadcast("g", 1)


def test_a_redis_that_is_away_is_said_by_each_verb() -> None:
    with Realtime(f"redis://{HOST}:{free_port()}/0", history=KEPT).blocking() as rt:
        assert rt.broadcast("g", 1).shared == "queued"
        assert rt.broadcast("g", 1, ephemeral=True).shared == "no"
        for call in (
            lambda: rt.broadcast("kept:a", 1),
            lambda: rt.history("kept:a"),
            lambda: rt.online(["ann"]),
            lambda: rt.revoke("ann"),
        ):
            with pytest.raises(Unavailable):
                call()


def test_one_realtime_runs_in_one_loop_at_a_time() -> None:
    realtime = Realtime()
    with realtime.blocking() as rt:
        with pytest.raises(ConfigurationError, match="another event loop"):
            realtime.blocking().__enter__()
        assert rt.broadcast("g", 1).shared == "yes"
