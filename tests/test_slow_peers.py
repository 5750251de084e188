"""A peer that does not read costs its own bound and nobody else anything.

The law of this file: real servers, loopback sockets, and peers that are raw and fast, so that it is never the test
which is slow. What is said is paced by the members' own reading: the machine may be as loaded as it likes, as long
as the peer under test is the only one that falls behind. Figures are printed, run with ``-s`` to see them.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.peers import Member, Raw, ask, bearer, eventually, frame, hear, hello, loud, settle, stats, visit
from tests.servers import Server, serve

pytestmark = [pytest.mark.system, pytest.mark.timeout(150)]

APP = "tests.live:app"
KINDS = ["uvicorn", "uvicorn-rt"]
MEMBERS, MESSAGES, SIZE, STEP = 200, 2000, 4000, 20
WARM = 200  # messages before the peer comes: buffers and allocator have their size
BOUND = 1024 * 1024  # bytes of one outbox, the default
GONE = 10.0  # seconds
KERNEL = 4096  # bytes asked of the kernel to receive into, so that a peer that does not read is soon known


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(kind: str) -> Iterator[Server]:
    with serve(APP, kind) as server:
        yield server
        assert loud(server.log()) == []


def test_a_peer_that_never_reads_is_gone_in_time_and_the_others_lose_nothing(server: Server, kind: str) -> None:
    asyncio.run(beside_a_crowd(server, kind))


async def beside_a_crowd(server: Server, kind: str) -> None:
    async with crowd(server) as members:
        await publish(server, members, 0, WARM)
        deaf = Raw(server, bearer(server, "deaf"), buffer=KERNEL)
        base = server.rss()
        watching = asyncio.create_task(watch(server))
        began = time.monotonic()
        await publish(server, members, WARM, WARM + MESSAGES)
        took = time.monotonic() - began
        gone, peak = await asyncio.wait_for(watching, GONE + 5)
        peak = max(peak, server.rss())
        with deaf:
            await asyncio.to_thread(deaf.end)
        growth = peak - base
        print(
            f"\n{kind}: {MESSAGES} in {took:.1f} s; gone {gone:.1f} s after it was known; grown {growth / 1e6:.2f} MB"
        )
        assert gone < GONE
        assert growth < BOUND + 2_000_000
        assert {member.seen for member in members} == {WARM + MESSAGES - 1}
        assert [member.wrong for member in members if member.wrong] == []
        assert not any(member.lost for member in members)
        now = ask(server, "/stats?full=1")
        assert (now["ended"], now["connections"], now["alive"]) == ([["deaf", 4000]], MEMBERS, MEMBERS)
        assert now["evicted.4000"] == 1


@asynccontextmanager
async def crowd(server: Server) -> AsyncIterator[list[Member]]:
    """Members that read all they can, as long as the block lasts."""
    greeting = hello(server, headers=bearer(server, "member"))
    loop = asyncio.get_running_loop()
    members: list[Member] = []
    try:
        for _ in range(MEMBERS):
            _, member = await loop.create_connection(lambda: Member(greeting), "127.0.0.1", server.port)
            members.append(member)
            await asyncio.wait_for(member.ready, GONE)
        yield members
    finally:
        for member in members:
            member.transport.abort()


async def publish(server: Server, members: list[Member], first: int, end: int) -> None:
    """Say the numbers from ``first`` to ``end`` and let the members keep up."""
    for start in range(first, end, STEP):
        path = f"/say?group=all&size={SIZE}&count={STEP}&start={start}&turn=5"
        await asyncio.to_thread(ask, server, path, "POST")
        for member in members:
            await asyncio.wait_for(member.heard(start + STEP - 1), 30)


async def watch(server: Server) -> tuple[float, int]:
    """Return how long the peer stayed after the server first could know, and the largest size of the process.

    It can know when a write to it stays unfinished: the last moment at which nobody was behind, as seen from
    outside, is before that.
    """
    known, peak = time.monotonic(), 0
    while True:
        peak = max(peak, server.rss())
        asked = time.monotonic()
        now = await asyncio.to_thread(ask, server, "/stats")
        if now["connections"] == MEMBERS:
            return time.monotonic() - known, peak
        if now["slow"] == 0:
            known = asked
        await asyncio.sleep(0.05)


def test_a_wider_bound_would_show_in_the_process() -> None:
    """The twin of the figure above: what is queued for a peer is seen in the size of the process."""
    with serve(APP, "uvicorn-rt", env={"OUTBOX_BYTES": str(64 * BOUND)}) as server:
        ask(server, "/say?group=nobody&size=60000&count=200", "POST")
        with Raw(server, bearer(server, "deaf"), buffer=KERNEL):
            base = server.rss()
            ask(server, "/say?group=all&size=60000&count=200", "POST")
            assert server.rss() - base > BOUND + 2_000_000


def test_a_peer_that_takes_nothing_is_gone_by_time_when_nothing_more_is_said(server: Server, kind: str) -> None:
    with visit(server, "ann", max_size=None) as ann, Raw(server, bearer(server, "deaf"), buffer=KERNEL):
        said = 0
        while not ask(server, "/stats")["slow"]:  # until its kernel is full, and no further
            ask(server, f"/say?group=all&size=60000&count=2&start={said}", "POST")
            assert [hear(ann)["n"], hear(ann)["n"]] == [said, said + 1]
            said += 2
            assert said < 400, "24 MB are in no kernel's buffer"
        known = time.monotonic()
        now = eventually(lambda: ask(server, "/stats?full=1"), lambda now: now["connections"] == 1, GONE)
        print(f"\n{kind}: {said * 60} kB said; gone {time.monotonic() - known:.1f} s after its kernel was full")
        assert now["ended"] == [["deaf", 4000]]
        settle(ann)


def test_a_slow_reader_reads_its_code(server: Server) -> None:
    """It takes a little now and then, falls behind, and reads on when it has been given up: it sees why."""
    with visit(server, "ann", max_size=None) as ann, Raw(server, bearer(server, "slow"), buffer=KERNEL) as slow:
        hurry = threading.Event()
        seen: list[Any] = []
        reading = threading.Thread(target=read_slowly, args=(slow, hurry, seen), daemon=True)
        reading.start()
        said = 0
        while not ask(server, "/stats").get("evicted.4000"):
            count = ask(server, f"/say?group=all&size=60000&count=4&start={said}&until=evicted", "POST")
            assert [hear(ann)["n"] for _ in range(count)] == list(range(said, said + count))
            said += count
            assert said < 1000, "60 MB are in no kernel's buffer"
        hurry.set()
        reading.join(GONE)
        assert not reading.is_alive()
        assert seen.pop() == 4000
        assert seen == list(range(len(seen)))
        assert len(seen) < said
        settle(ann)
        assert ask(server, "/stats?full=1")["ended"] == [["slow", 4000]]


def read_slowly(peer: Raw, hurry: threading.Event, seen: list[Any]) -> None:
    """Read the numbers, resting between two messages until told to hurry; at last the close code."""
    while True:
        opcode, payload = peer.read()
        if opcode == 8:
            seen.append(int.from_bytes(payload[:2]))
            return
        seen.append(json.loads(payload)["n"])
        hurry.wait(0.2)


def test_a_peer_that_floods_on_after_its_close_is_dropped_and_disturbs_nobody(server: Server) -> None:
    with visit(server, "neighbour") as neighbour, Raw(server, bearer(server, "flooder")) as flooder:
        with pytest.raises(OSError, match=r"reset|Broken pipe"):  # forty megabytes fit into no buffer
            flooder.send(frame(b"x") * 6_000_000)
        settle(neighbour)
        assert eventually(lambda: stats(server), lambda seen: seen["alive"] == 1)["disconnected.4502"] == 1
