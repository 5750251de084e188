"""The uvicorn seam against real sockets: order, pauses, ends, and a peer's garbage.

A server runs in a thread with a bare ASGI app; the test's own thread is the peer, and calls into the
server's loop. The two loops share the tests. Nothing any peer does may leave a record above INFO.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import queue
import random
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeVar

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus, ProtocolError
from websockets.extensions import Extension
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect
from websockets.uri import parse_uri

import starlette_rt
import starlette_rt.uvicorn
from starlette_rt.protocols.framing import DEFLATED, FRAMED, beyond, frame
from starlette_rt.seams import SEAM_EXTENSION, Carrier, Seam
from starlette_rt.uvicorn import (
    RELIES_ON,
    Arrivals,
    RealtimeWebSocketProtocol,
    Writable,
    carrier_for,
    fitted,
    misfits,
)

T = TypeVar("T")

PATIENCE = 10.0  # seconds; a wait that takes so long has failed
LOOPS = ["asyncio", "uvloop"] if importlib.util.find_spec("uvloop") else ["asyncio"]
BLOCK = frame(b"x" * 60_000)

on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


class Ear:
    """A listener that writes down what it is told, and may finish when the server closes."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.resumed = threading.Event()
        self.closing: Callable[[int], None] = lambda code: None

    def on_message(self, raw: str | bytes) -> bool:
        return False  # the application reads

    def on_pause(self) -> None:
        self.told.append("pause")

    def on_resume(self) -> None:
        self.told.append("resume")
        self.resumed.set()

    def on_closing(self, code: int) -> None:
        self.told.append(f"closing {code}")
        self.closing(code)


class Visit:
    """What the app saw of one connection."""

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seam: RealtimeWebSocketProtocol = scope["extensions"][SEAM_EXTENSION]
        self.receive, self.send = receive, send
        self.ear = Ear()
        self.events: list[Any] = []
        self.error: BaseException | None = None
        self.may_accept = asyncio.Event()
        self.may_return = asyncio.Event()
        self.accepted = threading.Event()
        self.done = threading.Event()


class Server(uvicorn.Server):
    """uvicorn's, which says when it listens."""

    report: Callable[[], None]

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.report()


class Site:
    """A running server and its bare ASGI app, seen from another thread.

    ``/`` attaches and accepts, ``/late`` attaches and waits before the accept, ``/plain`` never attaches and
    echoes, ``/denied`` attaches and refuses with 418, ``/brief`` returns without a close when told to.
    """

    def __init__(self, loop: str, **options: Any) -> None:
        self.visits: queue.Queue[Visit] = queue.Queue()
        self.started = threading.Event()
        config = uvicorn.Config(
            self.app,
            port=0,
            interface="asgi3",
            loop=loop,
            ws=RealtimeWebSocketProtocol,
            lifespan="off",
            log_config=None,
            **options,
        )
        self.server = Server(config)
        self.server.report = self.began
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def began(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.started.set()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        visit = Visit(scope, receive, send)
        try:
            if scope["path"] != "/plain":
                visit.seam.attach(visit.ear)
            self.visits.put(visit)
            await self.live(visit, scope["path"])
        except BaseException as error:
            visit.error = error
            raise
        finally:
            visit.done.set()

    async def live(self, visit: Visit, path: str) -> None:
        visit.events.append(await visit.receive())
        if path == "/denied":
            await visit.send({"type": "websocket.http.response.start", "status": 418, "headers": []})
            await visit.send({"type": "websocket.http.response.body", "body": b"tea"})
            return await wait_for(visit.may_return)  # uvicorn logs an ERROR for whoever returns before the end
        if path == "/late":
            await visit.may_accept.wait()
        await visit.send({"type": "websocket.accept"})
        visit.accepted.set()
        if path == "/brief":
            return await wait_for(visit.may_return)
        while visit.events[-1]["type"] != "websocket.disconnect":
            visit.events.append(message := await visit.receive())
            if path == "/plain" and "text" in message:
                await visit.send({"type": "websocket.send", "text": message["text"]})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the server's loop and return what it returned."""

        async def called() -> T:
            return function(*args)

        return self.run_in_loop(called())

    def run_in_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def visit(self) -> Visit:
        return self.visits.get(timeout=PATIENCE)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, bounded, until the loop has made it true."""

        async def waiting() -> None:
            async with asyncio.timeout(PATIENCE):
                while not condition():  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.002)

        self.run_in_loop(waiting())

    def forgotten(self) -> None:
        """Wait until no WebSocket is left in the process."""
        self.until(lambda: not self.server.server_state.connections)

    @contextmanager
    def peer(self, path: str = "/", **options: Any) -> Iterator[tuple[ClientConnection, Visit]]:
        with connect(f"ws://127.0.0.1:{self.port}{path}", compression=None, open_timeout=PATIENCE, **options) as client:
            yield client, self.visit()


async def wait_for(event: asyncio.Event) -> None:
    await event.wait()


class Deaf:
    """A peer at the level of bytes, which reads only when told to."""

    def __init__(self, site: Site, path: str = "/") -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", site.port))
        self.protocol = ClientProtocol(parse_uri(f"ws://127.0.0.1:{site.port}{path}"), max_size=None)
        self.protocol.send_request(self.protocol.connect())
        self.flush()

    def __enter__(self) -> Deaf:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        self.socket.sendall(b"".join(self.protocol.data_to_send()))

    def shake_hands(self) -> None:
        while self.protocol.state is State.CONNECTING:
            self.protocol.receive_data(self.socket.recv(4096))

    def read(self, count: int) -> list[str | bytes]:
        """Read until ``count`` more messages have come."""
        read: list[str | bytes] = []
        while len(read) < count:
            self.protocol.receive_data(self.socket.recv(1 << 20))
            read += messages(self.protocol)
        return read

    def read_to_end(self) -> tuple[list[str | bytes], int | None]:
        """Return all messages and the code of the Close frame, if one came before the end of the stream."""
        read: list[str | bytes] = []
        try:
            while data := self.socket.recv(1 << 20):
                self.protocol.receive_data(data)
                read += messages(self.protocol)
        except ConnectionError:
            pass
        return read, self.protocol.close_rcvd.code if self.protocol.close_rcvd else None


def messages(protocol: ClientProtocol) -> list[str | bytes]:
    events = [event for event in protocol.events_received() if isinstance(event, Frame)]
    data = [event for event in events if event.opcode in (Opcode.TEXT, Opcode.BINARY)]
    return [bytes(event.data).decode() if event.opcode is Opcode.TEXT else bytes(event.data) for event in data]


def masked(head: int, payload: bytes) -> bytes:
    """Return one small frame as a client sends it; the mask is zero."""
    assert len(payload) < 126
    return bytes((head, 0x80 | len(payload), 0, 0, 0, 0)) + payload


def closed_with(client: ClientConnection) -> int:
    with pytest.raises(ConnectionClosed) as caught:
        client.recv(PATIENCE)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code


def fill(seam: Seam) -> int:
    """Write until the seam refuses; return how many blocks it took."""
    return next(count for count in range(1000) if not seam.write(BLOCK))


@contextmanager
def running(loop: str, **options: Any) -> Iterator[Site]:
    site = Site(loop, **options)
    site.thread.start()
    assert site.started.wait(PATIENCE)
    try:
        yield site
    finally:
        site.stop()


@pytest.fixture(scope="module", params=LOOPS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """One server per loop for all tests that leave it running."""
    with running(request.param) as site:
        yield site


@pytest.fixture(autouse=True)
def _nothing_above_info(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    if request.node.get_closest_marker("system") is not None:
        assert [record for record in caplog.get_records("call") if record.levelno > logging.INFO] == []


# Writing.


@pytest.mark.system
def test_what_is_written_arrives(site: Site) -> None:
    with site.peer() as (client, visit):
        assert site.call(visit.seam.write, FRAMED.join([frame("hi"), frame(b"\x00\xff"), frame("y" * 70_000)]))
        assert [client.recv(PATIENCE) for _ in range(3)] == ["hi", b"\x00\xff", "y" * 70_000]


async def write_and_send(visit: Visit, count: int) -> list[str]:
    for number in range(0, count, 2):
        assert visit.seam.write(frame(f"{number} written {'abc' * 20}"))
        await visit.send({"type": "websocket.send", "text": f"{number + 1} sent {'abc' * 20}"})
    return [f"{number} {'sent' if number % 2 else 'written'} {'abc' * 20}" for number in range(count)]


@pytest.mark.system
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_writing_and_asgi_sending_share_one_order_with_and_without_deflate(site: Site, compression: str | None) -> None:
    with connect(f"ws://127.0.0.1:{site.port}/", compression=compression) as client:
        visit = site.visit()
        assert ("Sec-WebSocket-Extensions" in client.response.headers) == (compression is not None)
        said = site.run_in_loop(write_and_send(visit, 40))
        assert [client.recv(PATIENCE) for _ in said] == said


@pytest.mark.system
def test_nothing_is_written_before_the_accept(site: Site) -> None:
    with Deaf(site, "/late") as peer:
        visit = site.visit()
        assert not site.call(visit.seam.write, frame("too early"))
        site.call(visit.seam.close, 1000, "")  # nothing to close yet
        site.call(visit.may_accept.set)
        assert visit.accepted.wait(PATIENCE)
        assert site.call(visit.seam.write, frame("now"))
        peer.shake_hands()
        assert messages(peer.protocol) or peer.read(1) == ["now"]


@pytest.mark.system
def test_nothing_is_written_to_a_denied_handshake_and_the_denial_is_asgis(site: Site) -> None:
    with pytest.raises(InvalidStatus) as caught, connect(f"ws://127.0.0.1:{site.port}/denied"):
        raise AssertionError("it was accepted")
    visit = site.visit()
    assert (caught.value.response.status_code, caught.value.response.body) == (418, b"tea")
    assert not site.call(visit.seam.write, frame("too late"))
    site.forgotten()
    site.call(visit.may_return.set)
    assert visit.done.wait(PATIENCE)


@pytest.mark.system
def test_a_handshake_that_uvicorn_itself_refuses_leaves_no_trace(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), PATIENCE) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert peer.recv(4096).startswith(b"HTTP/1.1 4")
    site.forgotten()


@pytest.mark.system
def test_a_socket_that_nobody_attached_to_is_uvicorns(site: Site) -> None:
    with site.peer("/plain") as (client, visit):
        client.send("hello")
        assert client.recv(PATIENCE) == "hello"
        client.close(1001)
        assert visit.done.wait(PATIENCE)
    assert visit.events[-1]["code"] == 1001
    assert visit.ear.told == []
    site.forgotten()


# Pausing.


@pytest.mark.system
def test_a_peer_that_does_not_read_pauses_the_seam_and_reading_resumes_it(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        count = site.call(fill, visit.seam)
        assert visit.ear.told == ["pause"]
        assert not site.call(visit.seam.write, frame("refused"))
        read = peer.read(count)
        assert visit.ear.resumed.wait(PATIENCE)
        assert visit.ear.told == ["pause", "resume"]
        assert site.call(visit.seam.write, frame("accepted"))
        assert [len(message) for message in read] == [60_000] * count
        assert peer.read(1) == ["accepted"]


@pytest.mark.system
def test_whoever_attaches_to_a_paused_transport_is_told_at_once(site: Site) -> None:
    with Deaf(site, "/plain") as peer:
        peer.shake_hands()
        visit = site.visit()
        site.call(fill, visit.seam)
        assert visit.ear.told == []
        site.call(visit.seam.attach, visit.ear)
        assert visit.ear.told == ["pause"]
        peer.read(1)
        peer.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            peer.read(1000)
        assert visit.ear.resumed.wait(PATIENCE)


@pytest.mark.system
def test_a_transport_lost_while_paused_holds_nobody_back(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        site.call(fill, visit.seam)
        site.call(visit.seam.abort)
        assert visit.done.wait(PATIENCE)
        assert visit.ear.told == ["pause", "resume"]
        assert not site.call(visit.seam.write, BLOCK)
        site.call(visit.seam.resume_writing)
        assert not site.call(visit.seam.write, BLOCK)
        assert visit.ear.told == ["pause", "resume"]


@pytest.mark.system
def test_a_pause_of_a_socket_that_nobody_attached_to_ends_with_it(site: Site) -> None:
    with Deaf(site, "/plain") as peer:
        peer.shake_hands()
        visit = site.visit()
        site.call(fill, visit.seam)
        peer.read(1)
    assert visit.done.wait(PATIENCE)
    site.forgotten()


# Closing.


@pytest.mark.system
def test_a_close_follows_what_was_written_and_nothing_follows_it(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()

        def say_and_close() -> list[bool]:
            said = [visit.seam.write(frame("last words"))]
            visit.seam.close(4001, "token expired")
            visit.seam.close(4002, "again")
            return [*said, visit.seam.write(frame("after"))]

        assert site.call(say_and_close) == [True, False]
        assert peer.read(1) == ["last words"]
        while peer.protocol.close_rcvd is None:
            peer.protocol.receive_data(peer.socket.recv(4096))
        peer.flush()  # the echo
        assert peer.read_to_end() == ([], 4001)
        assert peer.protocol.close_rcvd.reason == "token expired"
        assert visit.done.wait(PATIENCE)
        assert visit.events[-1] == {"type": "websocket.disconnect", "code": 4001, "reason": "token expired"}
        site.forgotten()


@pytest.mark.system
def test_a_close_resumes_reading_so_that_the_echo_is_seen(site: Site) -> None:
    with site.peer("/brief") as (client, visit):
        client.send("nobody reads this")
        site.until(lambda: visit.seam.read_paused)
        site.call(visit.seam.close, 1000, "")
        assert closed_with(client) == 1000
        site.forgotten()
        site.call(visit.may_return.set)
        assert visit.done.wait(PATIENCE)


@pytest.mark.system
def test_after_a_close_asgi_sending_says_that_the_client_has_gone(site: Site) -> None:
    with site.peer("/brief") as (_, visit):
        site.call(visit.seam.close, 1000, "")
        for message in ({"type": "websocket.send", "text": "after"}, {"type": "websocket.close", "code": 1000}):
            with pytest.raises(ClientDisconnected):
                site.run_in_loop(visit.send(message))
        site.call(visit.may_return.set)


@pytest.mark.system
def test_after_an_asgi_close_nothing_is_written(site: Site) -> None:
    with site.peer() as (client, visit):
        site.run_in_loop(visit.send({"type": "websocket.close", "code": 3000}))
        assert not site.call(visit.seam.write, frame("after"))
        site.call(visit.seam.close, 1000, "")
        assert closed_with(client) == 3000


@pytest.mark.system
def test_a_code_that_may_not_be_sent_is_refused_without_effect(site: Site) -> None:
    with site.peer() as (client, visit):
        for code, reason in [(1005, ""), (999, ""), (1000, "x" * 124)]:
            with pytest.raises(ProtocolError):
                site.call(visit.seam.close, code, reason)
        assert site.call(visit.seam.write, frame("still here"))
        assert client.recv(PATIENCE) == "still here"


@pytest.mark.system
def test_after_the_peers_close_nothing_is_written(site: Site) -> None:
    with site.peer() as (client, visit):
        client.close(1001)
        assert visit.done.wait(PATIENCE)
        assert not site.call(visit.seam.write, frame("after"))
        assert visit.events[-1]["code"] == 1001
    site.forgotten()


@pytest.mark.system
def test_a_close_while_paused_comes_after_what_was_taken(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        count = site.call(fill, visit.seam)
        site.call(visit.seam.close, 4000, "slow consumer")
        read = peer.read(count)
        while peer.protocol.close_rcvd is None:
            peer.protocol.receive_data(peer.socket.recv(4096))
        assert len(read) == count
        assert peer.protocol.close_rcvd.code == 4000
        peer.flush()
        site.forgotten()


# Ends that a peer which never reads would put off for ever.


@pytest.mark.system
def test_abort_makes_the_process_forget_the_connection(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        site.call(fill, visit.seam)
        site.call(visit.seam.abort)
        assert visit.done.wait(PATIENCE)
        assert not site.call(lambda: site.server.server_state.connections)
        site.call(visit.seam.abort)  # once more does nothing


def by_close(site: Site, peer: Deaf, visit: Visit) -> None:
    site.call(visit.seam.close, 4000, "slow consumer")


def by_the_peers_close(site: Site, peer: Deaf, visit: Visit) -> None:
    peer.protocol.send_close(1000)
    peer.flush()


def by_close_and_echo(site: Site, peer: Deaf, visit: Visit) -> None:
    site.call(visit.seam.close, 4000, "slow consumer")
    by_the_peers_close(site, peer, visit)


def by_garbage(site: Site, peer: Deaf, visit: Visit) -> None:
    peer.socket.sendall(b"\xff" * 20)


def by_end_of_stream(site: Site, peer: Deaf, visit: Visit) -> None:
    peer.socket.shutdown(socket.SHUT_WR)


def by_missing_pong(site: Site, peer: Deaf, visit: Visit) -> None:
    site.call(visit.seam.keepalive_timeout)


def by_return(site: Site, peer: Deaf, visit: Visit) -> None:
    site.call(visit.may_return.set)


def by_asgi_close(site: Site, peer: Deaf, visit: Visit) -> None:
    site.run_in_loop(asgi_close(visit))
    site.call(visit.may_return.set)


async def asgi_close(visit: Visit) -> None:
    visit.seam.writable.set()  # as one whose send had passed the gate just before
    await visit.send({"type": "websocket.close", "code": 1000})


ENDS = [
    by_close,
    by_the_peers_close,
    by_close_and_echo,
    by_garbage,
    by_end_of_stream,
    by_missing_pong,
    by_return,
    by_asgi_close,
]


@pytest.mark.system
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_a_deadline_ends_what_a_deaf_peer_would_put_off(site: Site, end: Callable[[Site, Deaf, Visit], None]) -> None:
    with Deaf(site, "/brief") as peer:
        peer.shake_hands()
        visit = site.visit()
        visit.seam.close_timeout = 0.2
        site.call(fill, visit.seam)
        end(site, peer, visit)
        site.forgotten()
        site.call(visit.may_return.set)
        assert visit.done.wait(PATIENCE)
        assert visit.ear.told == ["pause", "resume"]


@pytest.mark.system
def test_a_deadline_ends_a_peer_that_reads_but_never_echoes(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        visit.seam.close_timeout = 0.2
        site.call(visit.seam.close, 1000, "")
        assert peer.read_to_end() == ([], 1000)
        site.forgotten()


@pytest.mark.system
def test_no_deadline_remains_after_the_end(site: Site) -> None:
    with site.peer() as (client, visit):
        client.close()
        assert visit.done.wait(PATIENCE)
    site.forgotten()
    assert visit.seam._deadline is not None
    assert visit.seam._deadline.cancelled()
    assert visit.seam._listener is None


# The server's shutdown.


@pytest.mark.system
def test_shutdown_gives_notice_and_what_is_queued_comes_before_1012(site: Site) -> None:
    with site.peer() as (client, visit):

        def finish(code: int) -> None:
            assert visit.seam.write(frame("queued 1"))
            site.loop.call_soon(visit.seam.write, frame("queued 2"))
            site.loop.call_soon(visit.seam.close, code, "service restart")

        visit.ear.closing = finish
        site.call(visit.seam.shutdown)
        assert [client.recv(PATIENCE), client.recv(PATIENCE)] == ["queued 1", "queued 2"]
        assert closed_with(client) == 1012
        assert visit.done.wait(PATIENCE)
        assert visit.ear.told == ["closing 1012"]
        assert visit.events[-1]["code"] == 1012
        site.forgotten()


@pytest.mark.system
def test_shutdown_does_not_wait_for_the_echo(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        visit.ear.closing = lambda code: visit.seam.close(code, "")
        began = time.monotonic()
        site.call(visit.seam.shutdown)
        assert peer.read_to_end() == ([], 1012)
        site.forgotten()
        assert time.monotonic() - began < visit.seam.shutdown_timeout


@pytest.mark.system
@pytest.mark.parametrize("closes", [True, False])
def test_a_deaf_peer_puts_off_the_shutdown_for_its_deadline_at_most(
    site: Site, monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    monkeypatch.setattr(RealtimeWebSocketProtocol, "shutdown_timeout", 0.2)
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        if closes:
            visit.ear.closing = lambda code: visit.seam.close(code, "")
        site.call(fill, visit.seam)
        site.call(visit.seam.shutdown)
        site.forgotten()
        assert visit.done.wait(PATIENCE)
        assert visit.ear.told == ["pause", "closing 1012", "resume"]


@pytest.mark.system
def test_a_second_shutdown_does_not_wait_for_the_listener(site: Site) -> None:
    with site.peer() as (client, visit):
        site.call(visit.seam.shutdown)
        assert site.call(visit.seam.write, frame("draining"))
        site.call(visit.seam.shutdown)
        assert client.recv(PATIENCE) == "draining"
        assert closed_with(client) == 1012
        assert visit.ear.told == ["closing 1012"]


@pytest.mark.system
def test_shutdown_without_a_listener_is_uvicorns(site: Site) -> None:
    with site.peer("/plain") as (client, visit):
        site.call(visit.seam.shutdown)
        assert closed_with(client) == 1012
        assert visit.done.wait(PATIENCE)
    site.forgotten()


@pytest.mark.system
def test_shutdown_before_the_accept_is_uvicorns(site: Site) -> None:
    with Deaf(site, "/late") as peer:
        visit = site.visit()
        site.call(visit.seam.shutdown)
        assert peer.socket.recv(4096).startswith(b"HTTP/1.1 500")
        site.forgotten()
        assert visit.ear.told == []
        site.call(visit.may_accept.set)
        assert visit.done.wait(PATIENCE)
        assert isinstance(visit.error, ClientDisconnected)


@pytest.mark.system
def test_shutdown_after_a_close_goes_on_with_it(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        site.call(visit.seam.close, 4000, "")
        site.call(visit.seam.shutdown)
        assert peer.read_to_end() == ([], 4000)
        assert visit.ear.told == []
        site.forgotten()


@pytest.mark.system
@pytest.mark.parametrize("path", ["/", "/plain"])
def test_shutdown_survives_a_peer_that_has_closed_and_does_not_read(
    site: Site, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RealtimeWebSocketProtocol, "shutdown_timeout", 0.2)
    with Deaf(site, path) as peer:
        peer.shake_hands()
        visit = site.visit()
        visit.seam.close_timeout = 0.2
        site.call(fill, visit.seam)
        by_the_peers_close(site, peer, visit)
        site.until(visit.seam.transport.is_closing)
        site.call(visit.seam.shutdown)
        if path == "/plain":
            site.call(visit.seam.abort)
        site.forgotten()


@pytest.mark.system
@pytest.mark.parametrize("loop", LOOPS)
def test_a_whole_server_stops_with_notice_to_all(loop: str) -> None:
    with running(loop) as site, site.peer() as (attached, visit), site.peer("/plain") as (plain, _), Deaf(site) as deaf:
        deaf.shake_hands()
        deaf_visit = site.visit()
        site.call(fill, deaf_visit.seam)
        deaf_visit.ear.closing = lambda code: deaf_visit.seam.abort()

        def finish(code: int) -> None:
            visit.seam.write(frame("goodbye"))
            visit.seam.close(code, "")

        visit.ear.closing = finish
        site.stop()
        assert attached.recv(PATIENCE) == "goodbye"
        assert (closed_with(attached), closed_with(plain)) == (1012, 1012)
        assert not site.server.server_state.connections


# Through TLS the transport is another one.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the files of a certificate for localhost and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    pem = serialization.Encoding.PEM
    parts = {
        "certificate": built.sign(key, hashes.SHA256()).public_bytes(pem),
        "key": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    }
    folder = tmp_path_factory.mktemp("tls")
    for part, text in parts.items():
        (folder / part).write_bytes(text)
    return str(folder / "certificate"), str(folder / "key")


@pytest.fixture(scope="module", params=LOOPS)
def tls_site(request: pytest.FixtureRequest, certificate: tuple[str, str]) -> Iterator[Site]:
    with running(request.param, ssl_certfile=certificate[0], ssl_keyfile=certificate[1]) as site:
        yield site


@contextmanager
def tls_peer(site: Site, path: str) -> Iterator[tuple[ClientConnection, Visit]]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    url = f"wss://127.0.0.1:{site.port}{path}"
    with connect(url, ssl=context, max_size=None, ping_interval=None, close_timeout=1) as client:
        yield client, site.visit()


@pytest.mark.system
def test_through_tls_order_pause_and_close_are_the_same(tls_site: Site) -> None:
    with tls_peer(tls_site, "/") as (client, visit):
        said = tls_site.run_in_loop(write_and_send(visit, 20))
        assert [client.recv(PATIENCE) for _ in said] == said
        count = tls_site.call(fill, visit.seam)
        tls_site.call(visit.seam.close, 4000, "slow consumer")
        assert not tls_site.call(visit.seam.write, frame("after"))
        assert [len(client.recv(PATIENCE)) for _ in range(count)] == [60_000] * count
        assert closed_with(client) == 4000
        tls_site.forgotten()
        assert visit.ear.told == ["pause", "resume"]


@pytest.mark.system
def test_through_tls_a_deadline_ends_a_deaf_peer(tls_site: Site) -> None:
    with tls_peer(tls_site, "/brief") as (_, visit):  # its queue is short: beyond it the client does not read
        visit.seam.close_timeout = 0.2
        tls_site.call(fill, visit.seam)
        tls_site.call(visit.may_return.set)
        tls_site.forgotten()
        assert visit.ear.told == ["pause", "resume"]


# What a peer should not send.

CLOSE_FRAME = masked(0x88, struct.pack("!H", 1000))
BAD_TEXT = masked(0x81, b"\xff\xfe")

NONSENSE = [
    pytest.param([BAD_TEXT], 1007, id="no UTF-8"),
    pytest.param([masked(0x01, b"\xc3"), masked(0x80, b"\x28")], 1007, id="no UTF-8 in two fragments"),
    pytest.param([BAD_TEXT + BAD_TEXT], 1007, id="no UTF-8 twice at once"),
    pytest.param([BAD_TEXT + masked(0x89, b"ping") + masked(0x82, b"more")], 1007, id="no UTF-8, then more"),
    pytest.param([BAD_TEXT + CLOSE_FRAME], 1000, id="no UTF-8 and a Close at once"),
    pytest.param([BAD_TEXT + b"\xff\xff"], 1002, id="no UTF-8 and garbage at once"),
    pytest.param([b"\x81\x02hi"], 1002, id="unmasked"),
    pytest.param([b"\xff" * 40], 1002, id="garbage"),
    pytest.param([masked(0x83, b"")], 1002, id="an opcode that is none"),
    pytest.param([masked(0x80, b"")], 1002, id="a continuation of nothing"),
    pytest.param([masked(0x09, b"")], 1002, id="a fragmented ping"),
    pytest.param([masked(0x88, struct.pack("!H", 1005))], 1002, id="a code that is none"),
    pytest.param([masked(0x88, b"\x03\xe8\xff")], 1007, id="a reason that is no UTF-8"),
    pytest.param([masked(0x01, b"a") + CLOSE_FRAME], 1002, id="a Close within a message"),
    pytest.param([b"\x82\xff" + struct.pack("!Q", 1 << 40) + b"\0" * 4], 1009, id="a terabyte"),
]


@pytest.mark.system
@pytest.mark.parametrize("path", ["/", "/plain"])
@pytest.mark.parametrize(("pieces", "code"), NONSENSE)
def test_nonsense_is_answered_with_its_code(site: Site, path: str, pieces: list[bytes], code: int) -> None:
    with Deaf(site, path) as peer:
        peer.shake_hands()
        visit = site.visit()
        for piece in pieces:
            peer.socket.sendall(piece)
        assert peer.read_to_end() == ([], code)
        assert visit.done.wait(PATIENCE)
        assert [event["type"] for event in visit.events] == ["websocket.connect", "websocket.disconnect"]
        site.forgotten()


@pytest.mark.system
@pytest.mark.parametrize("nonsense", [BAD_TEXT, CLOSE_FRAME, b"\x81\x02hi", BAD_TEXT + CLOSE_FRAME])
def test_nonsense_before_the_accept_ends_the_handshake(site: Site, nonsense: bytes) -> None:
    with Deaf(site, "/late") as peer:
        visit = site.visit()
        peer.socket.sendall(nonsense)
        assert peer.read_to_end() == ([], None)
        site.forgotten()
        site.call(visit.may_accept.set)
        assert visit.done.wait(PATIENCE)
        assert isinstance(visit.error, ClientDisconnected)


@pytest.mark.system
def test_text_that_is_no_utf8_after_our_close_is_nothing(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        site.call(visit.seam.close, 4000, "")
        peer.socket.sendall(BAD_TEXT + masked(0x81, b"good") + CLOSE_FRAME)
        assert peer.read_to_end() == ([], 4000)
        site.forgotten()


@pytest.mark.system
def test_good_text_in_fragments_arrives_whole(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        peer.socket.sendall(masked(0x01, b"\xc3") + masked(0x80, b"\xa9") + masked(0x82, b"\xff") + CLOSE_FRAME)
        assert visit.done.wait(PATIENCE)
        assert [event.get("text") for event in visit.events] == [None, "é", None, None]
        assert visit.events[2]["bytes"] == b"\xff"


@pytest.mark.system
def test_random_frames_leave_no_trace_and_disturb_no_neighbour(site: Site) -> None:
    dice = random.Random(2)
    with site.peer("/plain") as (neighbour, _):
        for _ in range(100):
            with Deaf(site, dice.choice(["/", "/plain", "/late"])) as peer:
                visit = site.visit()
                for _ in range(dice.randrange(1, 5)):
                    head = dice.choice([0x01, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A, 0xC1, dice.randrange(256)])
                    sent = bytearray(masked(head, dice.randbytes(dice.randrange(20))))
                    if dice.random() < 0.3:
                        sent[dice.randrange(len(sent))] ^= 1 << dice.randrange(8)
                    with suppress(ConnectionError):  # it may have been sent away already
                        peer.socket.sendall(sent)
                site.call(visit.may_accept.set)
            neighbour.send("still there?")
            assert neighbour.recv(PATIENCE) == "still there?"
            assert visit.done.wait(PATIENCE)
            assert visit.error is None or isinstance(visit.error, ClientDisconnected)
        site.until(lambda: len(site.server.server_state.connections) == 1)


# What an attached connection holds instead of asyncio's queue and event.


def waiting(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start to wait in a task; it has begun when the loop has had a turn."""
    return asyncio.get_running_loop().create_task(coroutine)


@pytest.mark.unit
@pytest.mark.anyio
@on_asyncio
async def test_events_are_read_in_order_also_those_from_before() -> None:
    before: asyncio.Queue[int] = asyncio.Queue()
    before.put_nowait(1)
    arrivals = Arrivals(asyncio.get_running_loop(), before)
    arrivals.put_nowait(2)
    assert not arrivals.empty()
    assert [await arrivals.get(), await arrivals.get()] == [1, 2]
    assert arrivals.empty()


@pytest.mark.unit
@pytest.mark.anyio
@on_asyncio
async def test_a_reader_that_waits_gets_what_comes_and_only_one_may_wait() -> None:
    arrivals = Arrivals(asyncio.get_running_loop(), asyncio.Queue())
    reader = waiting(arrivals.get())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="read by another task"):
        await arrivals.get()
    arrivals.put_nowait(1)
    arrivals.put_nowait(2)
    assert await reader == 1
    assert await arrivals.get() == 2


@pytest.mark.unit
@pytest.mark.anyio
@on_asyncio
async def test_a_reader_that_gives_up_takes_nothing_with_it() -> None:
    arrivals = Arrivals(asyncio.get_running_loop(), asyncio.Queue())
    reader = waiting(arrivals.get())
    await asyncio.sleep(0)
    arrivals.put_nowait(1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await arrivals.get() == 1


@pytest.mark.unit
@pytest.mark.anyio
@on_asyncio
async def test_all_who_wait_until_writing_is_possible_go_on_and_one_may_give_up() -> None:
    writable = Writable(asyncio.get_running_loop())
    await writable.wait()
    writable.clear()
    writable.clear()
    writers = [waiting(writable.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    writers[0].cancel()
    await asyncio.sleep(0)
    assert [writer.done() for writer in writers] == [True, False, False]
    writable.set()
    writable.clear()
    await asyncio.gather(*writers[1:])
    writable.set()
    writable.set()
    await writable.wait()


# Short messages, read without a parser. The transport is paper, so that every cut of the bytes can be tried.


class Paper(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written: list[bytes] = []
        self.closing = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        """Nothing is read here."""

    def resume_reading(self) -> None:
        """Nothing is read here."""


class Taker:
    """Listens to all but every n-th message, which the app is to read."""

    def __init__(self, leaves: int) -> None:
        self.leaves, self.asked, self.direct = leaves, 0, 0
        self.heard: list[str | bytes] = []

    def on_message(self, raw: str | bytes) -> bool:
        self.asked += 1
        if self.leaves and self.asked % self.leaves == 0:
            return False
        self.direct += 1
        self.heard.append(raw)
        return True

    def on_pause(self) -> None:
        raise AssertionError

    def on_resume(self) -> None:
        raise AssertionError

    def on_closing(self, code: int) -> None:
        raise AssertionError


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def read_on_paper(
    chunks: list[bytes], leaves: int = 0, early: bytes = b"", **options: Any
) -> tuple[Taker, Paper, list[bytes]]:
    """Feed ``chunks`` to the class, and return who listened, the transport, and what was left to the parser."""
    taker, accepted = Taker(leaves), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"][SEAM_EXTENSION].attach(taker)
        await receive()
        if early:
            await asyncio.sleep(0)
        await send({"type": "websocket.accept"})
        accepted.set()
        while (message := await receive())["type"] != "websocket.disconnect":
            taker.heard.append(message.get("text") if message.get("text") is not None else message["bytes"])

    config = uvicorn.Config(app, interface="asgi3", lifespan="off", log_config=None, ws_ping_interval=None, **options)
    config.load()
    protocol, paper = RealtimeWebSocketProtocol(config, ServerState(), {}), Paper()
    parsed: list[bytes] = []
    receive_data = protocol.conn.receive_data
    protocol.conn.receive_data = lambda data=b"": (parsed.append(data), receive_data(data))[1]  # type: ignore[method-assign]
    protocol.connection_made(paper)
    protocol.data_received(HANDSHAKE)
    if early:
        protocol.data_received(early)
    await accepted.wait()
    parsed.clear()
    for chunk in chunks:
        protocol.data_received(chunk)
        for _ in range(3):
            await asyncio.sleep(0)  # the app reads what is in its queue
    protocol.connection_lost(None)
    await asyncio.wait_for(asyncio.gather(*protocol.tasks), PATIENCE)
    return taker, paper, parsed


def client_frame(opcode: Opcode, data: bytes, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)


def said(message: str | bytes) -> bytes:
    if isinstance(message, str):
        return client_frame(Opcode.TEXT, message.encode())
    return client_frame(Opcode.BINARY, message)


def frames_of(message: str | bytes, cuts: list[int], ping: bool) -> list[bytes]:
    """Return a message as a client may send it: in fragments, with a ping before each."""
    data, opcode = (message.encode(), Opcode.TEXT) if isinstance(message, str) else (message, Opcode.BINARY)
    parts = pieces(data, cuts) or [b""]
    frames = []
    for number, part in enumerate(parts):
        frames += [client_frame(Opcode.PING, b"?")] if ping else []
        frames.append(client_frame(Opcode.CONT if number else opcode, part, number == len(parts) - 1))
    return frames


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Return ``data`` cut at these places; no piece is empty."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(places)]


messages_said = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.sampled_from(["a" * 125, "b" * 126, "é" * 200, b"c" * 65535, b"d" * 65536]),
)


@pytest.mark.unit
@given(
    st.lists(st.tuples(messages_said, st.lists(st.integers(0, 300), max_size=2), st.booleans()), max_size=12),
    st.lists(st.integers(0, 5000), max_size=8),
    st.integers(0, 3),
)
def test_however_messages_are_cut_they_arrive_whole_and_in_order(
    sayings: list[tuple[str | bytes, list[int], bool]], cuts: list[int], leaves: int
) -> None:
    frames = [frame for saying in sayings for frame in frames_of(*saying)]
    taker, paper, _ = asyncio.run(read_on_paper(pieces(b"".join(frames), cuts), leaves))
    assert taker.heard == [message for message, _, _ in sayings]
    pings = [frame for frame in frames if frame[0] & 0x0F == Opcode.PING]
    assert b"".join(paper.written[1:]) == b"\x8a\x01?" * len(pings)


@pytest.mark.unit
@pytest.mark.parametrize("twin", [lambda *args: (beyond(*args)[0], False), lambda *args: (0, beyond(*args)[1])])
def test_the_test_above_finds_who_forgets_where_frames_begin(
    monkeypatch: pytest.MonkeyPatch, twin: Callable[..., tuple[int, bool]]
) -> None:
    monkeypatch.setattr(starlette_rt.uvicorn, "beyond", twin)
    inner = said("inner")
    head = bytes((0x82, 0x80 | len(inner), 0, 0, 0, 0))  # masked with zeros: its payload looks like a frame
    first, last = frames_of("ab", [1], False)
    heard = [asyncio.run(read_on_paper(chunks))[0].heard for chunks in ([head, inner], [first, said("inner"), last])]
    assert "inner" in heard[0] + heard[1]


@pytest.mark.unit
def test_what_looks_like_a_frame_within_another_is_none() -> None:
    inner = said("inner")
    head = bytes((0x82, 0x80 | len(inner), 0, 0, 0, 0))
    assert asyncio.run(read_on_paper([head, inner]))[0].heard == [inner]


@pytest.mark.unit
def test_whole_short_messages_are_not_parsed() -> None:
    chunks = [said("a"), said(b"b" * 126) + said("c" * 65535), said("")]
    taker, _, parsed = asyncio.run(read_on_paper(chunks))
    assert taker.heard == ["a", b"b" * 126, "c" * 65535, ""]
    assert taker.direct == 4
    assert parsed == []


LONG = said(b"d" * 65536)
NOT_SHORTEST = b"\x81\xfe\x00\x01" + bytes(4) + b"e"


@pytest.mark.unit
@pytest.mark.parametrize("odd", [LONG, NOT_SHORTEST, client_frame(Opcode.PING, b"?")], ids=len)
def test_after_what_only_the_parser_reads_short_messages_pass_it_by_again(odd: bytes) -> None:
    taker, _, parsed = asyncio.run(read_on_paper([said("a") + odd, said("b")]))
    assert parsed == [odd]
    assert (taker.heard[0], taker.heard[-1]) == ("a", "b")


@pytest.mark.unit
@pytest.mark.parametrize("size", [1, 2, 6, 30, 130])
def test_a_message_that_comes_in_two_pieces_is_the_parsers(size: int) -> None:
    whole = said("a" * 126)
    chunks = [said("0"), whole[:size], whole[size:], said("1")]
    taker, _, parsed = asyncio.run(read_on_paper(chunks))
    assert taker.heard == ["0", "a" * 126, "1"]
    lost = size < 4  # within the head: where the next frame begins is not known any more
    assert parsed == (chunks[1:] if lost else chunks[1:3])


@pytest.mark.unit
def test_what_comes_before_the_accept_is_the_parsers_and_so_is_all_that_follows() -> None:
    late = said("b")
    taker, _, parsed = asyncio.run(read_on_paper([late], early=said("a")))
    assert taker.heard == ["a", "b"]
    assert parsed == [late]


@pytest.mark.unit
def test_a_message_over_the_servers_bound_is_refused_by_the_parser() -> None:
    taker, paper, _ = asyncio.run(read_on_paper([said("a" * 101)], ws_max_size=100))
    assert taker.heard == []
    assert paper.written[-1][2:4] == (1009).to_bytes(2)


@pytest.mark.unit
def test_text_that_is_no_text_is_refused_after_what_came_before_it() -> None:
    taker, paper, _ = asyncio.run(read_on_paper([said("a") + client_frame(Opcode.TEXT, b"\xff")]))
    assert taker.heard == ["a"]
    assert paper.written[-1][2:4] == (1007).to_bytes(2)


if sys.version_info >= (3, 12):

    @pytest.mark.system
    def test_an_eager_task_finds_the_seam_in_its_scope() -> None:
        with running("asyncio") as site:
            site.call(site.loop.set_task_factory, asyncio.eager_task_factory)
            with site.peer() as (client, visit):
                assert site.call(visit.seam.write, frame("hi"))
                assert client.recv(PATIENCE) == "hi"


# The seam's own word, and stepping aside.


@pytest.mark.unit
@pytest.mark.parametrize(
    ("agreed", "carrier"),
    [
        ([], FRAMED),
        ([PerMessageDeflate(False, True, 15, 12)], DEFLATED),
        ([PerMessageDeflate(False, True, 15, 15)], DEFLATED),
        ([PerMessageDeflate(False, True, 15, 11)], FRAMED),  # it cannot look back so far
        ([PerMessageDeflate(False, False, 15, 12)], FRAMED),  # it remembers what it was sent before
    ],
)
def test_compressed_is_shared_only_with_whom_it_was_agreed(agreed: list[Extension], carrier: Carrier) -> None:
    assert carrier_for(agreed) is carrier


@pytest.mark.unit
def test_the_installed_uvicorn_has_all_that_is_relied_on(caplog: pytest.LogCaptureFixture) -> None:
    assert misfits(WebSocketsSansIOProtocol) == []
    assert issubclass(RealtimeWebSocketProtocol, WebSocketsSansIOProtocol)
    assert fitted(RealtimeWebSocketProtocol) is RealtimeWebSocketProtocol
    assert caplog.records == []


@pytest.mark.unit
@pytest.mark.parametrize("method", RELIES_ON)
def test_a_method_that_is_not_there_is_named(method: str) -> None:
    other = type("Other", (WebSocketsSansIOProtocol,), {method: None})
    assert misfits(other) == [f"no {method}()"]


@pytest.mark.unit
def test_a_name_that_a_method_no_longer_mentions_is_named() -> None:
    other = type("Other", (WebSocketsSansIOProtocol,), {"run_asgi": lambda self: None, "shutdown": lambda self: None})
    assert misfits(other) == [
        "no close_timer in run_asgi()",
        "no close_sent in shutdown()",
        "no close_timer in shutdown()",
    ]


@pytest.mark.unit
def test_a_name_that_is_taken_already_is_named() -> None:
    other = type("Other", (WebSocketsSansIOProtocol,), {"write": lambda self, data: None})
    assert misfits(other) == ["a write of its own"]


@pytest.mark.unit
def test_where_it_does_not_fit_the_class_below_is_used_and_a_warning_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    below = type("Below", (WebSocketsSansIOProtocol,), {"handle_close": None})
    ours = type("Ours", (below,), {})
    assert fitted(ours) is below
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Below does not fit starlette_rt Ours (no handle_close())" in record.getMessage()
    assert "uvicorn 0.52.1 to 0.54 do" in record.getMessage()


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """Return a function that imports the module once more; the first one comes back after the test."""
    monkeypatch.setattr(starlette_rt, "uvicorn", starlette_rt.uvicorn)
    monkeypatch.delitem(sys.modules, "starlette_rt.uvicorn")
    return lambda: importlib.import_module("starlette_rt.uvicorn")


@pytest.mark.unit
def test_an_uvicorn_that_does_not_fit_gives_its_own_class(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    older = type("WebSocketsSansIOProtocol", (asyncio.Protocol,), {})
    monkeypatch.setattr("uvicorn.protocols.websockets.websockets_sansio_impl.WebSocketsSansIOProtocol", older)
    assert anew().RealtimeWebSocketProtocol is older
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.unit
@pytest.mark.parametrize("module", ["uvicorn.protocols.websockets.websockets_sansio_impl", "websockets.frames"])
def test_without_uvicorn_or_websockets_the_import_names_the_line_to_type(
    monkeypatch: pytest.MonkeyPatch, anew: Callable[[], ModuleType], module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "uvicorn\[standard\]"'):
        anew()


@pytest.mark.unit
def test_uvicorn_finds_the_class_by_its_name(anew: Callable[[], ModuleType]) -> None:
    config = uvicorn.Config(lambda: None, ws="starlette_rt.uvicorn:RealtimeWebSocketProtocol", log_config=None)
    config.load()
    assert config.ws_protocol_class is anew().RealtimeWebSocketProtocol


@pytest.mark.system
def test_a_handshake_that_never_ends_does_not_stop_the_servers_shutdown(site: Site) -> None:
    # websockets takes no more than 128 header lines; httptools has no such bound and hands the upgrade over.
    lines = [f"X-{number}: 1" for number in range(200)]
    head = ["GET / HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket", *lines, "", ""]
    with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as peer:
        peer.sendall("\r\n".join(head).encode())

        def pending() -> list[Any]:
            held = site.server.server_state.connections
            return [each for each in held if isinstance(each, RealtimeWebSocketProtocol)]

        site.until(lambda: bool(pending()))
        site.call(lambda: pending()[0].shutdown())
        site.forgotten()


@pytest.mark.system
def test_a_deaf_seam_reads_nothing_more_and_its_close_still_arrives(site: Site) -> None:
    with Deaf(site) as peer:
        peer.shake_hands()
        visit = site.visit()
        site.call(visit.accepted.is_set)

        def expel() -> None:
            visit.seam.close(4003, "enough")
            visit.seam.deafen()

        site.call(expel)
        for _ in range(3):
            peer.protocol.send_text(b"flood")
            peer.flush()
        before = len(visit.events)
        site.call(visit.seam.abort)
        assert peer.read_to_end() == ([], 4003)
        assert visit.done.wait(PATIENCE)
        assert len(visit.events) <= before + 1, "nothing but the disconnect"
        site.call(visit.seam.deafen)  # a second time, on what has ended: nothing
        site.forgotten()
