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
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.benchmarks.plot import NAMES, svg
from tests.benchmarks.rivals import CONTENDERS

pytestmark = [pytest.mark.system, pytest.mark.timeout(200)]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
SVG = "{http://www.w3.org/2000/svg}"
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


def test_fanout_measures_each_contender_in_each_way_of_speaking(tmp_path: Path) -> None:
    chosen = ["loop", "generic-v1", "fast", "floor"]
    contenders = list(CONTENDERS) if "socketio" in RIVALS else chosen
    (tmp_path / "page.md").write_text("<!-- fanout -->\n<!-- /fanout -->\n")
    few = ["--members", "20", "--rounds", "1", "--messages", "5", "--scenarios", "one", "ten"]
    printed = bench("fanout", *few, "--contenders", *contenders, "--write", str(tmp_path / "page.md"))
    table = rows(printed)
    assert len(table) == len(contenders)
    ratios = [ratio for row in table for cell in row[2::2] for ratio in cell.split(" · ")]
    assert all(float(figure) > 0 for figure in [*ratios, *(cell for row in table for cell in row[1::2])])
    assert "python -m tests.benchmarks.fanout --members 20" in printed
    assert drawn((tmp_path / "images" / "fanout.svg").read_text()) == 2 * len(contenders)


def test_fanout_grows_to_many_members_without_whom_that_is_senseless() -> None:
    from tests.benchmarks.common import Lane
    from tests.benchmarks.fanout import SCENARIOS, Round, cost, ratios

    assert [each.members for each in SCENARIOS if each.without] == [5_000]
    lane: Any = Lane(SimpleNamespace(), SimpleNamespace())
    assert (cost(lane, SCENARIOS[0]), ratios(lane, [lane], SCENARIOS[0])) == (None, "-")
    lane.samples[SCENARIOS[0]] = [Round(2.0, 0.1)]
    assert ratios(lane, [lane, lane], SCENARIOS[0]) == "1.00 · 1.00"


def test_a_slow_rival_is_asked_for_less_in_the_same_time() -> None:
    from tests.benchmarks.fanout import SCENARIOS

    less = SCENARIOS[0].shared(0.1)
    assert (less.turns, less.pace, less.burst) == (5, 4.0, 1)
    assert SCENARIOS[0].shared(0.001).turns == 1


def test_each_rival_says_what_must_be_installed_for_it() -> None:
    from tests.benchmarks.rivals import NODE, PACKAGES

    needs = {contender.prepare for contender in CONTENDERS.values()}
    assert needs == {None, NODE, *PACKAGES}


@pytest.mark.parametrize(("size", "head"), [(100, b"\x81\x64"), (1000, b"\x81\x7e\x03\xe8")])
def test_the_floor_frames_what_the_others_say(size: int, head: bytes) -> None:
    from tests.benchmarks.apps.floor import EMPTY, Speaker

    speaker = Speaker()
    pad = "x" * (size - EMPTY)
    assert speaker.frame(pad) == head + b'{"seq":10000000,"pad":"%b"}' % pad.encode()
    assert b'"seq":10000001' in speaker.frame(pad)


def drawn(picture: str) -> int:
    """How many bars a well-formed picture holds, those of the legend aside; each has its figure."""
    tree = ElementTree.fromstring(picture)
    bars = [each for each in tree.iter(f"{SVG}rect") if float(each.attrib["x"]) == NAMES]
    assert all(float(each.attrib["width"]) > 0 for each in bars)
    assert sum(each.get("class") == "figure" for each in tree.iter(f"{SVG}text")) == len(bars)
    return len(bars)


def test_a_plot_has_a_bar_for_each_figure_and_the_longer_for_the_larger() -> None:
    figures = {"a loop": [10.0, 5.0], "a <slow> one": [340.0, None], "`quick`": [1.0, 0.1]}
    picture = svg("µs & more", ["alone", "together"], figures)
    assert drawn(picture) == 5
    widths = [float(each) for each in re.findall(r'width="([\d.]+)" height="12" rx="2"/><text class="figure"', picture)]
    assert sorted(widths, reverse=True) == [widths[index] for index in (2, 0, 1, 3, 4)]
    said = ElementTree.fromstring(picture).attrib["aria-label"]
    assert (
        said
        == "µs & more: a loop alone 10.00, together 5.00; a <slow> one alone 340.00; quick alone 1.00, together 0.10"
    )


def test_inbound_measures_each_contender_with_one_question_and_with_eight_on_their_way() -> None:
    contenders = ["naive", "generic", "fast", "msgpack", "once"]
    contenders += ["python-socketio", "socketio"] if "socketio" in RIVALS else []
    printed = bench("inbound", "--clients", "4", "--events", "80", "--rounds", "2", "--contenders", *contenders)
    table = rows(printed)
    assert len(table) == len(contenders)
    assert all(float(cell) > 0 for row in table for cell in row[1:])
    assert "python -m tests.benchmarks.inbound --clients 4" in printed


def test_an_idle_connection_owns_one_task() -> None:
    table = rows(bench("idle", "--connections", "50", "--rounds", "1", "--contenders", "bare", "generic", "fast"))
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
    names = re.search(r"^BENCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert names is not None
    for section in set(names[1].split()) - {"limits", "http"}:  # whose figures stand in the text
        assert text.index(f"<!-- {section} -->") < text.index(f"<!-- /{section} -->")


def test_an_unknown_contender_is_refused_with_the_known_ones() -> None:
    from tests.benchmarks.common import chosen

    with pytest.raises(SystemExit, match="unknown contender lopp; there are loop, python-socketio, channels"):
        chosen(list(CONTENDERS.values()), ["lopp"])


def test_an_unknown_scenario_is_refused_with_the_known_ones() -> None:
    from tests.benchmarks.fanout import asked

    with pytest.raises(SystemExit, match="unknown scenario tne; there are one, ten, 1kB, 16kB, many"):
        asked(SimpleNamespace(scenarios=["tne"]))  # type: ignore[arg-type]


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


def test_deflate_measures_each_contender_with_and_without_compression() -> None:
    from tests.benchmarks.deflate import NAMES

    contenders = NAMES if "socketio" in RIVALS else ["fast"]
    few = ["--members", "5", "--messages", "2", "--rounds", "1", "--contenders", *contenders]
    table = rows(bench("deflate", *few))
    assert len(table) == len(contenders)
    for _, *cells in table:
        short, long = ([float(cell.replace(",", "")) for cell in cells[at : at + 5]] for at in (0, 5))
        assert min(short + long) > 0
        assert 0 < short[3] - 1_024 < 20, "uncompressed, with the frame's header and Socket.IO's own"
        assert 0 < long[3] - 16_384 < 20
        assert short[4] < 0.6 * short[3]
        assert long[4] < 0.6 * long[3]


@pytest.mark.parametrize("answer", ["permessage-deflate; server_no_context_takeover", "permessage-deflate", ""])
def test_a_client_that_inflates_does_so_as_the_server_has_answered(answer: str) -> None:
    from tests.benchmarks.inflate import TAIL, Client, Tally

    client = Client(Tally(), socketio=False)
    client.tally.expect(3)
    headers = {"Sec-WebSocket-Extensions": answer} if answer else {}
    client.on_ws_connected(SimpleNamespace(response=SimpleNamespace(headers=headers)))  # type: ignore[arg-type]
    compressor = zlib.compressobj(wbits=-15)
    for number in (10_000_000, 10_000_001, 10_000_001):  # the last one is said twice
        payload = b'{"seq":%d,"pad":""}' % number
        if answer:
            if "no_context" in answer:
                compressor = zlib.compressobj(wbits=-15)
            payload = (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
        framed = SimpleNamespace(get_payload_as_bytes=lambda: payload, msg_type=1, rsv1=bool(answer))  # noqa: B023
        client.on_ws_frame(SimpleNamespace(), framed)  # type: ignore[arg-type]
    assert (client.tally.received, client.tally.disorder) == (3, 1)
    assert 0 < client.tally.bytes <= 3 * (len('{"seq":10000000,"pad":""}') + 2)


def test_the_load_generator_counts_each_message_of_a_batch_and_what_is_beside_them() -> None:
    client, _ = listener()
    said: list[bytes] = []
    transport: Any = SimpleNamespace(send=lambda kind, payload: said.append(payload))
    event = b'{"type":"event","event":"message","data":{"seq":%08d,"pad":"x"},"group":"g0"}'
    diff, ping = b'{"type":"presence_diff","group":"g0"}', b'{"type":"ping"}'
    client.on_ws_frame(transport, frame(b"[" + b",".join([event % 10000000, diff, event % 10000001, ping]) + b"]"))
    assert (client.tally.received, client.tally.disorder, client.tally.done.is_set()) == (2, 0, True)
    client.on_ws_frame(transport, frame(diff))
    client.on_ws_frame(transport, frame(b"[" + event % 10000003 + b"," + event % 10000004 + b"]"))
    tally = client.tally
    assert (tally.disorder, tally.diffs, tally.received - tally.batched + tally.apart) == (1, 2, 3)
    assert said == [b'{"type":"pong"}']


def test_the_load_generator_looks_again_when_the_messages_have_another_length() -> None:
    client, transport = listener()
    client.on_ws_frame(transport, frame(b'{"seq":10000000,"pad":"%s"}' % (b"x" * 25)))
    client.tally.expect(2)
    client.on_ws_frame(transport, frame(b'[{"seq":10000001},{"seq":10000002}]' + b" " * 14))  # as long as the other
    assert (client.tally.received, client.tally.disorder, client.tally.done.is_set()) == (2, 0, True)


@pytest.mark.parametrize(("second", "disorder"), [(10000007, 0), (10000000, 1), (9999999, 1)])
def test_members_of_some_groups_hear_numbers_that_rise(second: int, disorder: int) -> None:
    client, transport = listener()
    client.tally.rising = True
    for number in (10000000, second):
        client.on_ws_frame(transport, frame(b'{"seq":%08d,"pad":"x"}' % number))
    assert client.tally.disorder == disorder


def test_clients_say_who_they_are_and_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        options = [f"ws://127.0.0.1:{port}/ws?n={{n}}&g={{g}}", "--groups", "2"]
        command = [sys.executable, "-m", "tests.benchmarks.load", *options]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as load:
            assert load.stdin is not None
            load.stdin.write(b'{"do": "connect", "count": 3}\n')
            load.stdin.flush()
            door.settimeout(20)
            calls = [door.accept() for _ in range(3)]
            asked = {call.recv(1000).split(b" ")[1] for call, _ in calls}
            load.kill()
        for call, _ in calls:
            call.close()
    assert asked == {b"/ws?n=0&g=0", b"/ws?n=1&g=1", b"/ws?n=2&g=0"}
    assert {address for _, (address, _) in calls} == {f"127.{port >> 8}.{port & 255}.1"}


def test_mixed_compares_each_way_of_speaking_with_ten_to_all() -> None:
    few = ["--members", "8", "--turns", "3", "--rounds", "1", "--contenders", "fast"]
    table = rows(bench("mixed", *few))
    assert [float(row[1]) for row in table] == [10.0, 9.12, 9.12, 6.88]  # and an eighth of a push
    assert [float(row[2]) > 0 for row in table] == [False, True, False, True]
    assert [row[4] for row in table].count("1.00") >= 1
    assert all(float(cell) > 0 for row in table for cell in row[3:])


def test_a_turn_for_all_groups_has_its_push_in_their_midst() -> None:
    from tests.benchmarks.apps.mixed import groups_of, turn_of

    assert turn_of(0, 3) == ["lobby"] * 3
    assert turn_of(9, 10) == ["g0", "g1", "g2", "g3", "somebody", "g0", "g1", "g2", "g3", "g0"]
    assert groups_of(6) == ["g0", "g1", "g3"]


def test_groups_are_measured_in_both_shapes() -> None:
    few = ["--groups", "3", "--clients", "112", "--turns", "1", "--rounds", "1", "--contenders", "fast"]
    printed = bench("groups", *few)
    for table in tables(printed):
        assert [row[0] for row in table] == ["starlette_rt, its uvicorn class"]
        assert all(float(cell) > 0 for cell in table[0][1:])
    assert "one of 30, µs | 3 of ten, µs | ratio" in printed


def test_no_two_clients_share_more_than_one_of_their_ten_groups() -> None:
    from itertools import combinations

    from tests.benchmarks.apps.groups import LEAST, RULER, STRIDE

    for total in (LEAST + 1, 2_000):
        groups = [{(number + STRIDE * mark) % total for mark in RULER} for number in range(total)]
        assert {len(each) for each in groups} == {10}
        assert max(len(one & other) for one, other in combinations(groups, 2)) == 1


def test_too_few_clients_for_groups_of_their_own_are_refused() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.groups", "--clients", "100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--clients: at least 111" in done.stderr


def test_an_idle_connection_is_compared_with_those_who_take_part() -> None:
    from tests.benchmarks.idle import CONTENDERS, Weight, report

    bare, node = (next(each for each in CONTENDERS if each.name == name) for name in ("bare", "socketio"))
    node = replace(node, prepare=None)  # whether it is installed here or not
    table = rows(report([bare, node], {"bare": Weight(20_000, 95, 1), "socketio": Weight(10_000, 0, 0)}))
    assert [row[1:] for row in table] == [
        ["20,000", "1.00", "2.00", "95.0", "1.00"],
        ["10,000", "0.50", "1.00", "-", "-"],
    ]


def test_deflate_is_on_at_both_ends_where_a_row_says_so() -> None:
    from tests.benchmarks.hear import DEFLATE, Hearing
    from tests.benchmarks.idle import BARE, deflating

    assert "--ws-per-message-deflate" in BARE.command
    assert "--ws-per-message-deflate" not in deflating(BARE).command
    assert deflating(BARE).load == ["--deflate"]
    offers = Hearing("ws://127.0.0.1:1/", False, ["rt.v1.json"], None, deflate=True).headers
    assert offers == {"Sec-WebSocket-Protocol": "rt.v1.json", "Sec-WebSocket-Extensions": DEFLATE}


def test_a_storm_is_measured_in_its_three_phases() -> None:
    printed = bench("storm", "--members", "20", "--deliveries", "60", "--rounds", "1", "--contenders", "fast")
    (row,) = rows(printed)
    assert all(float(figure) > 0 for figure in row[1::2])
    assert row[2::2] == ["1.00"] * 3
    assert "python -m tests.benchmarks.storm --members 20" in printed


def test_a_storm_of_many_is_compared_with_one_of_few() -> None:
    from tests.benchmarks.storm import Storm, report

    few, many = Storm(100.0, 10.0, 40.0), Storm(150.0, 10.0, 20.0)
    (row,) = rows(report([CONTENDERS["fast"]], [10, 20], {("fast", 10): [few], ("fast", 20): [many]}))
    assert row[1:] == ["100.0", "150.0", "1.50", "10.0", "10.0", "1.00", "40.0", "20.0", "0.50"]


def test_a_storm_of_more_than_can_be_open_is_refused() -> None:
    from tests.benchmarks.storm import check_files

    with pytest.raises(SystemExit, match=r"a process may open [\d,]+ clients here"):
        check_files(1 << 62)


def test_a_storm_and_delays_are_measured_without_pings() -> None:
    from tests.benchmarks.rivals import silent

    assert silent(CONTENDERS["fast"]).command[-2:] == ["--ws-ping-interval", "3600"]
    assert silent(CONTENDERS["floor"]) is CONTENDERS["floor"]


def test_delays_are_measured_at_a_rate_for_all_and_at_one_for_each() -> None:
    few = ["--members", "10", "--seconds", "0.1", "--rounds", "1"]
    printed = bench("latency", *few, "--rate", "50", "--contenders", "fast")
    (row,) = rows(printed)
    same, own = [float(cell) for cell in row[1:4]], [float(cell) for cell in row[7:]]
    assert 0 <= same[0] <= same[1] <= same[2]
    assert 0 <= own[0] <= own[1] <= own[2]
    assert "50 a second: p50" in printed


def test_who_cannot_keep_the_rate_of_all_has_its_own() -> None:
    from tests.benchmarks.latency import Lane, Round, choose, row

    def lane(name: str, saturation: float) -> Any:
        return Lane(SimpleNamespace(contender=CONTENDERS[name]), SimpleNamespace(), saturation=saturation)  # type: ignore[arg-type]

    lanes = [lane("python-socketio", 20.0), lane("socketio", 100.0), lane("fast", 200.0)]
    choose(lanes, None)
    assert [each.rates for each in lanes] == [{"own": 10.0}, {"own": 50.0, "same": 50.0}, {"own": 100.0, "same": 50.0}]
    for each in lanes:
        each.samples = {scenario: [Round([1.0, each.saturation / 10, 30.0], 0.1)] for scenario in each.rates}
    assert row(lanes[0], lanes[1], 500) == ["-", "-", "-", "-", "10,000", "10", "1.00", "2.00", "30.00"]
    assert row(lanes[2], lanes[1], 500)[:5] == ["1.00", "20.00", "30.00", "2.00", "100,000"]


def test_percentiles_are_delays_that_were_measured() -> None:
    from tests.benchmarks.hear import percentiles

    delays = list(range(1000, 0, -1))
    assert percentiles(delays, [50, 99, 99.9, 100]) == [500, 990, 999, 1000]
    assert percentiles([7], [50, 99.9]) == [7, 7]
    assert percentiles([], [50]) == []


def test_what_is_said_late_carries_the_time_at_which_it_was_due() -> None:
    from tests.benchmarks.apps.stamp import now, stamped

    plain = {"seq": 10_000_000, "pad": "x" * 75}
    late, early = now() - 5_000, now() + 5_000_000
    assert stamped(plain, late)["at"] == late
    assert late < stamped(plain, early)["at"] <= now() < early


def test_wait_asks_beside_a_broadcast_and_without_one() -> None:
    few = ["--members", "8", "--rounds", "1", "--contenders", "fast"]
    ((title, *waits),) = rows(bench("wait", *few))
    assert title == "starlette_rt, its uvicorn class"
    assert len(waits) == 4
    assert all(float(longest) >= float(median) > 0 for median, longest in (waits[:2], waits[2:]))
