"""The Redis servers of the tests are real and do what they are told; the line to them is as bad as it is wanted.

The law of this file: it proves the instruments that other tests rely on, with a plain client of redis-py.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from tests import redises
from tests.redises import REDISES, Cluster, RedisServer, cluster, until
from tests.servers import HOST
from tests.test_serving import alive
from tests.wires import PORTS, Wire, certificate, free_port

pytestmark = pytest.mark.system

SOON = 5.0  # seconds; a wait that takes so long has failed
BIG = b"x" * 1_000_000

redis_server, redis_url = redises.redis_server, redises.redis_url
every_redis_server, every_redis_url = redises.every_redis_server, redises.every_redis_url


def client(url: str, timeout: float = SOON) -> redis.Redis:
    return redis.Redis.from_url(url, protocol=2, socket_timeout=timeout, socket_connect_timeout=timeout)


def ping(server: RedisServer, timeout: float = SOON) -> Any:
    with client(server.url, timeout) as peer:
        return peer.ping()


# Servers


@pytest.mark.parametrize("name", REDISES)
def test_a_server_of_each_version_answers_and_is_gone_with_its_folder(name: str) -> None:
    with RedisServer(name) as server:
        assert ping(server)
        assert server.version >= (6, 2)
        pid, folder = server.pid, server.folder
    assert not alive(pid)
    assert not folder.exists()


def test_a_server_is_gone_when_the_test_fails_too() -> None:
    server = RedisServer()
    with pytest.raises(redis.TimeoutError):
        fail_with(server)
    assert not alive(server.pid)


def fail_with(server: RedisServer) -> None:
    with server:
        server.pause()
        ping(server, 0.1)


def test_a_paused_server_says_nothing_and_goes_on_where_it_was() -> None:
    with RedisServer() as server, client(server.url, 0.1) as peer:
        peer.set("a", 1)
        server.pause()
        with pytest.raises(redis.TimeoutError):
            peer.get("a")
        assert server.running
        server.resume()
        assert ping(server)
        assert server.ask("GET", "a") == b"1"


def test_a_killed_server_refuses_and_is_back_on_its_port_without_its_data() -> None:
    with RedisServer() as server:
        server.ask("SET", "a", 1)
        server.kill()
        assert not server.running
        with pytest.raises(redis.ConnectionError):
            ping(server)
        server.start()
        assert server.ask("GET", "a") is None


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_a_server_that_keeps_its_data_has_them_again_unless_it_forgets(kill: bool) -> None:
    with RedisServer(keep=True) as server:
        server.ask("SET", "a", 1)
        server.restart(kill=kill)
        assert server.ask("GET", "a") == b"1"
        server.restart(kill=kill, empty=True)
        assert server.ask("GET", "a") is None


def test_a_server_with_tls_speaks_nothing_else() -> None:
    with RedisServer("redis", tls=True) as server:
        assert server.url.startswith("rediss://")
        assert ping(server)
        with pytest.raises(redis.ConnectionError):
            client(f"redis://{HOST}:{server.port}").ping()


def test_a_user_may_do_what_its_rules_say_and_the_test_anything() -> None:
    with RedisServer(rules="~rt:* &rt:* +ping +get +publish") as server, client(server.url) as peer:
        assert peer.get("rt:a") is None
        assert peer.publish("rt:a", "x") == 0
        for command in (["SET", "rt:a", "1"], ["GET", "b"], ["PUBLISH", "b", "x"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                peer.execute_command(*command)
        assert server.ask("SET", "b", 1)
        with pytest.raises(redis.exceptions.AuthenticationError):
            client(f"redis://{HOST}:{server.port}").ping()


def test_options_are_lines_of_the_configuration_and_a_bad_one_shows_the_log() -> None:
    with RedisServer(options={"maxmemory-policy": "noeviction", "timeout": 7}) as server:
        assert server.ask("CONFIG", "GET", "timeout") == [b"timeout", b"7"]
    with pytest.raises(RuntimeError, match="no-such-option"), RedisServer(options={"no-such-option": 1}):
        pass


def test_a_port_that_was_taken_meanwhile_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer() as first:
        ports = iter([first.port, free_port()])
        monkeypatch.setattr(redises, "free_port", lambda: next(ports))
        with RedisServer() as second:
            assert second.port != first.port
            assert ping(first)
            assert ping(second)


def test_a_replica_follows_and_can_become_a_master() -> None:
    with RedisServer() as master, RedisServer() as replica:
        master.ask("SET", "a", 1)
        replica.follow(master)
        assert replica.ask("GET", "a") == b"1"
        master.kill()
        replica.promote()
        assert replica.ask("SET", "a", 2)


def test_a_missing_server_skips_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redises, "FOUND", {"redis": None})
    for name in (None, "redis"):
        with pytest.raises(pytest.skip.Exception, match="neither on the PATH nor in a wheel"):
            RedisServer(name)


@pytest.fixture(scope="module", params=REDISES)
def three(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with cluster(request.param) as made:
        yield made


def test_a_cluster_shares_the_keys_and_a_client_finds_them(three: Cluster) -> None:
    with redis.RedisCluster.from_url(three.url, protocol=2) as peer:
        for number in range(20):
            assert peer.set(f"key:{number}", number)
    owners = {three.of(f"key:{number}").port for number in range(20)}
    assert owners == {server.port for server in three.servers}
    for number in range(20):
        assert three.of(f"key:{number}").ask("GET", f"key:{number}") == b"%d" % number


def test_each_test_finds_the_shared_server_empty(redis_url: str, redis_server: RedisServer) -> None:
    with client(redis_url) as peer:
        assert peer.dbsize() == 0
        peer.set("a", 1)
    assert redises.emptied(redis_server) == redis_url
    assert redis_server.ask("DBSIZE") == 0
    redis_server.pause()
    redises.emptied(redis_server)
    redis_server.kill()
    redises.emptied(redis_server)


def test_a_server_of_each_version_is_there_for_a_test(every_redis_url: str, every_redis_server: RedisServer) -> None:
    with client(every_redis_url) as peer:
        assert peer.dbsize() == 0
        assert every_redis_server.version >= (6, 2)


# Lines


@pytest.fixture
def wire(redis_url: str, redis_server: RedisServer) -> Iterator[Wire]:
    with Wire(redis_server.port) as wire:
        yield wire


@pytest.fixture
def peer(wire: Wire) -> Iterator[redis.Redis]:
    with client(wire.url(), 0.2) as peer:
        assert peer.ping()
        yield peer


def test_a_line_passes_everything_and_counts_it(wire: Wire, peer: redis.Redis) -> None:
    up, down = wire.up, wire.down
    peer.set("a", BIG)
    assert wire.up - up > len(BIG)
    assert peer.get("a") == BIG
    assert wire.down - down > len(BIG)
    assert (wire.accepted, wire.open) == (1, 1)
    peer.close()
    until(lambda: wire.open == 0, "no connection")


def test_a_line_that_holds_brings_all_of_it_later(wire: Wire, redis_server: RedisServer) -> None:
    with socket.create_connection((HOST, wire.port), SOON) as raw:
        wire.hold("up")
        raw.sendall(b"INCR a\r\n")
        assert silent(raw)
        assert redis_server.ask("GET", "a") is None
        wire.mend()
        assert raw.recv(100) == b":1\r\n"
        wire.hold("down")
        raw.sendall(b"INCR a\r\n")
        until(lambda: redis_server.ask("GET", "a") == b"2", "two")
        assert silent(raw)
        wire.mend()
        raw.settimeout(SOON)
        assert raw.recv(100) == b":2\r\n"


def silent(raw: socket.socket) -> bool:
    """Whether nothing comes for a moment. The socket keeps its patience."""
    raw.settimeout(0.1)
    try:
        return not raw.recv(100)
    except TimeoutError:
        return True
    finally:
        raw.settimeout(SOON)


def test_a_line_that_swallows_the_answer_lets_the_command_through(wire: Wire, redis_server: RedisServer) -> None:
    with socket.create_connection((HOST, wire.port), SOON) as raw:
        wire.swallow("down")
        raw.sendall(b"INCR a\r\n")
        until(lambda: redis_server.ask("GET", "a") == b"1", "one")
        assert silent(raw)
        wire.mend()
        with pytest.raises(ConnectionResetError):
            raw.recv(100)


def test_a_black_hole_says_nothing_to_those_who_are_there_and_to_those_who_come(wire: Wire, peer: redis.Redis) -> None:
    wire.swallow()
    with pytest.raises(redis.TimeoutError):
        peer.incr("a")
    with client(wire.url(), 0.1) as other, pytest.raises(redis.TimeoutError):
        other.ping()
    wire.mend()
    assert peer.get("a") is None


def test_a_late_line_is_late_both_ways_and_keeps_the_order(wire: Wire, redis_server: RedisServer) -> None:
    with socket.create_connection((HOST, wire.port), SOON) as raw:
        wire.delay(0.1)
        began = time.monotonic()
        raw.sendall(b"INCR a\r\n")
        raw.sendall(b"INCR a\r\n")
        answer = b""
        while len(answer) < 8:
            answer += raw.recv(100)
        assert answer == b":1\r\n:2\r\n"
        assert 0.2 <= time.monotonic() - began < SOON
        wire.mend()


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_dropped_connections_end_and_new_ones_get_through(wire: Wire, reset: bool) -> None:
    with socket.create_connection((HOST, wire.port), SOON) as raw:
        raw.sendall(b"PING\r\n")
        assert raw.recv(100) == b"+PONG\r\n"
        wire.drop(reset)
        if reset:
            with pytest.raises(ConnectionResetError):
                raw.recv(100)
        else:
            assert raw.recv(100) == b""
    with client(wire.url()) as peer:
        assert peer.ping()


def test_a_cut_line_lets_nobody_through_until_it_is_mended(wire: Wire, peer: redis.Redis) -> None:
    wire.cut()
    for _ in range(2):
        with pytest.raises((redis.ConnectionError, ConnectionError)), client(wire.url()) as other:
            other.ping()
    wire.mend()
    assert peer.ping()


def test_a_client_of_a_half_closed_line_reads_the_end_and_is_still_heard(wire: Wire, redis_server: RedisServer) -> None:
    with socket.create_connection((HOST, wire.port), SOON) as raw:
        raw.sendall(b"PING\r\n")
        assert raw.recv(100) == b"+PONG\r\n"
        wire.half_close("down")
        assert raw.recv(100) == b""
        raw.sendall(b"INCR a\r\n")
        until(lambda: redis_server.ask("GET", "a") == b"1", "one")


def test_a_server_of_a_half_closed_line_hears_the_end(wire: Wire, redis_server: RedisServer) -> None:
    with socket.create_connection((HOST, wire.port), SOON) as raw:
        raw.sendall(b"PING\r\n")
        assert raw.recv(100) == b"+PONG\r\n"
        wire.half_close("up")
        assert raw.recv(100) == b""  # Redis ends its side too


def test_a_line_to_nobody_ends_what_comes() -> None:
    with Wire(free_port()) as wire, socket.create_connection((HOST, wire.port), SOON) as raw:
        assert raw.recv(100) == b""


def test_a_line_ends_with_its_block_and_leaves_no_connection(redis_server: RedisServer) -> None:
    with Wire(redis_server.port) as wire:
        raw = socket.create_connection((HOST, wire.port), SOON)
        until(lambda: wire.open == 1, "a connection")
        wire.hold()
    with raw:
        assert raw.recv(100) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, wire.port), SOON)


def test_many_go_through_one_line_at_once(wire: Wire) -> None:
    def count(_: int) -> Any:
        with client(wire.url()) as peer:
            return [peer.incr("a") for _ in range(50)][-1]

    with ThreadPoolExecutor(20) as pool:
        assert max(pool.map(count, range(20))) == 1000


# Ports and certificates


def test_free_ports_leave_room_for_the_second_port_of_a_cluster() -> None:
    assert all(free_port() in PORTS for _ in range(20))
    assert max(PORTS) + 10000 < 32768


def test_a_taken_port_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    with socket.create_server((HOST, 0)) as taken:
        ports = iter([taken.getsockname()[1], free])
        monkeypatch.setattr("tests.wires.random.choice", lambda _: next(ports))
        assert free_port() == free


def test_a_certificate_is_made_or_the_test_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = certificate(tmp_path)
    assert made.pem.read_text() == made.cert.read_text() + made.key.read_text()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="openssl is not on the PATH"):
        certificate(tmp_path)
