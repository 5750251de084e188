"""The benchmarks still run: each with tiny numbers, on real servers.

The law of this file: it tests that a benchmark measures, refuses and writes as it says, never how fast anything is;
a figure from a shared machine is not a test, but a count of commands is. The rivals come from npm and PyPI and take
part only where the environment says `BENCH_SOCKETIO=1`. What needs redis-server says so where there is none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(200)]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RIVALS = ["loop", "socketio"] if os.environ.get("BENCH_SOCKETIO") == "1" else ["loop"]
needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not on the PATH")


def bench(name: str, *options: str) -> str:
    """Run one benchmark as its reader would, and return what it printed."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def tables(printed: str) -> list[list[list[str]]]:
    """The cells of each table's rows, without its head."""
    blocks = [block.splitlines() for block in printed.split("\n\n") if block.lstrip().startswith("|")]
    lines = [[line for line in block if line.startswith("|")][2:] for block in blocks]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in lines]


def rows(printed: str) -> list[list[str]]:
    """The cells of the only table's rows."""
    (table,) = tables(printed)
    return table


def listener() -> tuple[object, SimpleNamespace]:
    """A client of the load generator that expects two messages, and its transport."""
    from tests.benchmarks.load import Client, Tally

    tally = Tally()
    tally.expect(2)
    return Client(tally, socketio=False), SimpleNamespace(disconnect=lambda: None)


def asker(dialect: str, questions: int) -> tuple[Any, SimpleNamespace]:
    """A client of the other load generator that has asked so many questions, and its transport."""
    from tests.benchmarks.ask import DIALECTS, Asker
    from tests.benchmarks.load import Tally

    tally = Tally()
    tally.expect(questions)
    client, asked = Asker(tally, DIALECTS[dialect]), []
    transport = SimpleNamespace(send=lambda kind, payload: asked.append(payload), asked=asked)
    client.transport = transport
    client.start(questions, 2)
    return client, transport


def frame(payload: bytes) -> SimpleNamespace:
    """A text frame as picows hands it over."""
    return SimpleNamespace(get_payload_as_bytes=lambda: payload, msg_type=1)


def test_fanout_measures_each_contender_in_both_ways_of_speaking() -> None:
    contenders = [*RIVALS, "generic", "fast"]
    printed = bench("fanout", "--members", "20", "--rounds", "2", "--messages", "10", "--contenders", *contenders)
    table = rows(printed)
    assert len(table) == len(contenders)
    assert all(float(cell) > 0 for row in table for cell in row[1:])
    assert "python -m tests.benchmarks.fanout --members 20" in printed


def test_inbound_measures_each_contender_with_one_question_and_with_eight_on_their_way() -> None:
    contenders = ["naive", "generic", "fast", "msgpack", "once"]
    contenders += ["python-socketio", "socketio"] if "socketio" in RIVALS else []
    printed = bench("inbound", "--clients", "4", "--events", "80", "--rounds", "2", "--contenders", *contenders)
    table = rows(printed)
    assert len(table) == len(contenders)
    assert all(float(cell) > 0 for row in table for cell in row[1:])
    assert "python -m tests.benchmarks.inbound --clients 4" in printed


def test_an_idle_connection_owns_one_task() -> None:
    table = rows(bench("idle", "--connections", "50", "--rounds", "1"))
    assert [row[-1] for row in table] == ["1.00"] * 3


def test_a_benchmark_writes_only_between_its_markers_and_only_where_told(tmp_path: Path) -> None:
    before = PAGE.read_bytes()
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- idle -->\nold\n<!-- /idle -->\nbelow\n")
    bench("idle", "--connections", "10", "--rounds", "1", "--contenders", "bare", "--write", str(page))
    text = page.read_text()
    assert re.match(r"above\n<!-- idle -->\n\n\| an idle connection .*<!-- /idle -->\nbelow\n$", text, re.DOTALL)
    assert "old" not in text
    assert "Command: `python -m tests.benchmarks.idle --connections 10 --rounds 1 --contenders bare`" in text
    assert PAGE.read_bytes() == before


def test_a_page_without_the_markers_is_refused_and_left_alone(tmp_path: Path) -> None:
    from tests.benchmarks.common import publish

    page = tmp_path / "page.md"
    page.write_text("nothing to replace\n")
    with pytest.raises(SystemExit, match="has no section"):
        publish("idle", "tests.benchmarks.idle", "| table |", page)
    assert page.read_text() == "nothing to replace\n"


def test_the_page_has_a_section_for_each_benchmark() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for section in ("fanout", "inbound", "idle", "redis", "presence"):
        assert text.index(f"<!-- {section} -->") < text.index(f"<!-- /{section} -->")


def test_an_unknown_contender_is_refused_with_the_known_ones() -> None:
    from tests.benchmarks.common import chosen
    from tests.benchmarks.fanout import CONTENDERS

    with pytest.raises(SystemExit, match="unknown contender lopp; there are loop, socketio, generic, fast"):
        chosen(CONTENDERS, ["lopp"])


def test_the_load_generator_is_content_with_messages_in_order() -> None:
    client, transport = listener()
    for payload in (b'{"seq":10000000,"pad":"x"}', b'42["message",{"seq":10000001,"pad":"x"}]'):
        client.on_ws_frame(transport, frame(payload))
    assert (client.tally.received, client.tally.disorder, client.tally.done.is_set()) == (2, 0, True)


@pytest.mark.parametrize("second", [10000000, 10000002, 9999999], ids=["doubled", "one lost", "overtaken"])
def test_the_load_generator_notices_disorder(second: int) -> None:
    client, transport = listener()
    for number in (10000000, second):
        client.on_ws_frame(transport, frame(b'{"seq":%08d,"pad":"x"}' % number))
    assert client.tally.disorder == 1


@pytest.mark.parametrize(
    ("dialect", "payload"),
    [
        ("json", b'{"type":"reply","ref":%d,"data":{"stored":%d}}'),
        ("bare", b'[{"type":"reply","ref":%d,"data":{"stored":%d}}]'),
        ("socketio", b'43%d[{"stored":%d}]'),
    ],
)
def test_who_asks_asks_again_for_each_right_answer(dialect: str, payload: bytes) -> None:
    client, transport = asker(dialect, questions=3)
    for number in (10000001, 10000002, 10000003):
        client.on_ws_frame(transport, frame(payload % (number, number)))
    assert (len(transport.asked), client.tally.disorder, client.tally.done.is_set()) == (3, 0, True)


@pytest.mark.parametrize(
    ("ref", "stored"), [(10000001, 10000002), (10000003, 10000003), (10000001, -1)], ids=["wrong", "not asked", "error"]
)
def test_who_asks_notices_a_wrong_answer(ref: int, stored: int) -> None:
    client, transport = asker("json", questions=3)
    client.on_ws_frame(transport, frame(b'{"type":"reply","ref":%d,"data":{"stored":%d}}' % (ref, stored)))
    assert client.tally.disorder == 1


def test_who_asks_takes_a_refusal_for_a_wrong_answer_and_answers_pings() -> None:
    client, transport = asker("json", questions=3)
    client.on_ws_frame(transport, frame(b'{"type":"ping"}'))
    client.on_ws_frame(transport, frame(b'{"type":"error","ref":10000001,"code":"busy","message":"","temporary":true}'))
    assert transport.asked[2] == b'{"type":"pong"}'
    assert client.tally.disorder == 1


def test_rounds_go_there_and_back_again() -> None:
    from tests.benchmarks.common import interleaved

    assert "".join(interleaved("ABC", 3)) == "ABCCBAABC"


def test_http_prints_the_price_of_a_request() -> None:
    assert re.fullmatch(
        r"bare [\d.]+ µs, through the middleware [\d.]+ µs: -?[\d.]+ µs for each HTTP request\n", bench("http")
    )


@needs_redis
def test_across_nodes_a_broadcast_is_one_command_of_redis_and_each_contender_is_measured() -> None:
    ours = ["generic", "fast", "generic-history", "fast-history"]
    rivals = ["python-socketio", "channels-core", "channels-pubsub", "socketio"] if "socketio" in RIVALS else []
    floor = ["raw"] if rivals else []  # redis-py of its own comes from PyPI, too
    printed = bench("redis", "--members", "1", "5", "20", "--rounds", "2", "--contenders", *rivals, *ours, *floor)
    nodes, delays, redis = tables(printed)
    assert len(nodes) == len(rivals + ours)
    assert len(delays) == len(redis) == len(rivals + ours + floor)
    assert all(float(cell.replace(",", "")) > 0 for row in [*nodes, *delays] for cell in row[1:3])
    commands = {row[0]: dict(reversed(count.split()) for count in row[-1].split(", ")) for row in redis}
    assert set(commands["starlette_rt, any server"]) == {"`publish`"}
    assert 0.9 < float(commands["starlette_rt, any server"]["`publish`"]) < 1.1  # renewals are no whole numbers
    assert 0.9 < float(commands["starlette_rt, its uvicorn class, with history"]["`evalsha`"]) < 1.1
    assert "python -m tests.benchmarks.redis --members 1 5 20" in printed


@needs_redis
def test_presence_asks_its_three_questions() -> None:
    few = ["--storms", "20", "--returns", "20", "--groups", "5", "--silence", "0.5"]
    storms, silence, returns = tables(bench("presence", *few))
    assert [row[0] for row in storms] == ["nobody watches", "each watches the count", "each watches the members"]
    assert [row[0] for row in silence] == ["5 idle members", "25 idle members"]
    recovered = {row[0]: row[1] for row in returns}
    assert recovered["20 guests who recover"] == recovered["20 users who recover"] == "20"


@needs_redis
def test_what_asking_redis_takes_is_not_counted() -> None:
    from tests.benchmarks.store import RedisServer

    with RedisServer() as store:
        before = store.before()
        for _ in range(3):
            nothing = store.since(before)
            assert (nothing.total, nothing.received, nothing.sent) == (0, 0, 0)


@needs_redis
def test_what_others_ask_of_redis_is_counted_to_the_byte() -> None:
    from tests.benchmarks.store import RedisServer

    with RedisServer() as store, socket.create_connection(("127.0.0.1", store.port), timeout=5) as other:
        before = store.before()
        other.sendall(b"PING\r\n" * 2)
        heard = b""
        while len(heard) < 14:
            heard += other.recv(100)
        since = store.since(before)
    assert (dict(since.calls), since.received, since.sent) == ({"ping": 2}, 12, 14)
    assert since.at > 0


def test_a_message_carries_the_clock_and_is_no_longer_for_it() -> None:
    from tests.benchmarks.apps.stamp import now, stamped

    plain = {"seq": 10_000_000, "pad": "x" * 75}
    before = now()
    message = stamped(plain)
    assert before <= message["at"] <= now()
    assert len(json.dumps(message, separators=(",", ":"))) == len(json.dumps(plain, separators=(",", ":"))) == 100


def test_the_load_generator_tells_how_long_a_message_was_on_its_way() -> None:
    from tests.benchmarks.apps.stamp import now
    from tests.benchmarks.hear import Delayed
    from tests.benchmarks.load import Tally

    tally, delays = Tally(), []
    tally.expect(1)
    client = Delayed(tally, socketio=False, delays=delays)
    client.on_ws_frame(SimpleNamespace(), frame(b'{"seq":10000000,"at":%d,"pad":""}' % (now() - 5000)))
    assert 5000 <= delays[0] < 5_000_000
    assert tally.done.is_set()


def test_who_comes_says_its_line_and_is_there_when_it_is_answered() -> None:
    from tests.benchmarks.hear import Comer
    from tests.benchmarks.load import Tally

    said: list[bytes] = []
    transport = SimpleNamespace(send=lambda kind, payload: said.append(payload))
    comer = Comer(Tally(), "join")
    comer.on_ws_connected(transport)
    comer.on_ws_frame(transport, frame(b'{"type":"welcome"}'))
    comer.on_ws_frame(transport, frame(b'{"type":"ping"}'))
    assert not comer.joined.is_set()
    comer.on_ws_frame(transport, frame(b'{"type":"reply","ref":1,"data":{"recovered":true}}'))
    assert comer.joined.is_set()
    assert comer.recovered
    assert said == [b"join", b'{"type":"pong"}']


def test_a_round_across_nodes_says_less_to_more_members() -> None:
    from tests.benchmarks.redis import scenarios

    assert [(each.members, each.messages, each.burst) for each in scenarios([500, 1, 50])] == [
        (1, 30, 1),
        (50, 6, 1),
        (50, 10, 10),
        (500, 1, 1),
    ]


def test_a_rival_that_cannot_be_installed_is_named() -> None:
    from tests.benchmarks.common import install

    with pytest.raises(SystemExit, match=r"a rival could not be installed .*leave it out of --contenders"):
        install("a rival", [sys.executable, "-c", "raise SystemExit(1)"], ROOT)
