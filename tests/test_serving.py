"""The servers that tests run against come up, answer, can be measured, and go."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.sync.client import connect

from tests.servers import SERVERS, Server, serve

pytestmark = pytest.mark.system


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serve(server=request.param) as server:
        yield server


def test_an_echo_comes_back_through_a_real_server(server: Server) -> None:
    assert echoed(server) == "hello"


def echoed(server: Server) -> str | bytes:
    with connect(f"{server.url}/ws", open_timeout=10) as websocket:
        websocket.send("hello")
        return websocket.recv(timeout=10)


def test_a_running_server_can_be_measured(server: Server) -> None:
    assert 10_000_000 < server.rss() < 1_000_000_000
    assert 0 < server.cpu() < 60


@pytest.mark.parametrize("kind", SERVERS)
def test_stop_ends_the_process_and_all_its_workers(kind: str) -> None:
    with serve(server=kind) as server:
        echoed(server)  # granian loses a SIGTERM that comes before its worker is up
        family = server._family()
        code = server.stop()
        assert not server.running
        assert [pid for pid in family if alive(pid)] == []
        assert server.stop() == code != -signal.SIGKILL


def alive(pid: int) -> bool:
    """Whether the process still runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killing_takes_the_workers_along() -> None:
    with serve(server="granian") as server:
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL


def test_environment_and_arguments_reach_the_server_and_its_words_reach_the_log() -> None:
    with serve(env={"UVICORN_LOG_LEVEL": "debug"}, args=["--no-access-log"]) as server:
        echoed(server)
        server.send_signal(signal.SIGTERM)
        server.wait()
        assert "Application startup complete" in server.log()
        assert "GET /ws" in server.log()  # debug: the handshake as it came


def test_a_server_that_cannot_come_up_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match="did not come up"), serve("tests.apps:nothing"):
        pass


def test_a_server_that_stays_is_reported_with_its_log() -> None:
    with serve() as server, pytest.raises(TimeoutError, match=r"had not ended after 0.01 s; its log:\nINFO"):
        server.wait(0.01)


def test_a_server_that_is_not_installed_skips_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS, "missing", SERVERS["uvicorn"]._replace(needs=("no_such_server",)))
    with pytest.raises(pytest.skip.Exception, match="missing needs no_such_server"), serve(server="missing"):
        pass
