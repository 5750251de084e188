"""What docs/deployment.md promises, on real processes: workers, a proxy in front with TLS, and Redis behind.

The law of this file: the proxies and the workers are started by the documented files. A test that stops or kills a
worker has a fleet of its own; the others share one.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.error import HTTPError

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection

from tests.fleet import Front, Node, fleet, front
from tests.peers import answered, ask, bearer, ending, eventually, hear, loud, name, refusal, visit
from tests.redises import REDISES, RedisServer
from tests.second_client import Client
from tests.servers import HOST, ROOT

pytestmark = pytest.mark.system

PAGE = ROOT / "docs" / "deployment.md"
SCRIPTS = ROOT / "starlette_rt" / "backends" / "redis" / "lua"
PROXIES = ["nginx", "haproxy"]
DOORS = [(kind, sticky) for kind in PROXIES for sticky in (False, True)]
ADA, BEN = "127.0.0.2", "127.0.0.3"  # addresses of two clients
PING, PATIENCE = "0.2", "1s"  # of the workers, and of a proxy with a WebSocket that says nothing
PACE = 0.02  # seconds between two messages of one who speaks without end
LONG = 3.0  # seconds, three times the proxy's patience


@pytest.fixture
def anyio_backend() -> str:
    """The client that comes back is one of asyncio."""
    return "asyncio"


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with fleet() as nodes:
        yield nodes


@pytest.fixture(scope="module", params=DOORS, ids=lambda door: door[0] + "-sticky" * door[1])
def door(request: pytest.FixtureRequest, nodes: list[Node]) -> Iterator[Front]:
    kind, sticky = request.param
    with front(kind, nodes, sticky=sticky) as door:
        yield door


def token(nodes: list[Node]) -> dict[str, str]:
    """A token for somebody new, from whichever worker runs."""
    return bearer(next(node for node in nodes if node.running), name())


@contextmanager
def came(
    door: Front, nodes: list[Node], path: str = "/ws", address: str = HOST, **options: Any
) -> Iterator[ClientConnection]:
    """Come through the door as somebody new, from this address."""
    headers = {**token(nodes), **options.pop("headers", {})}
    with visit(door, None, path, headers=headers, ssl=door.trust, source_address=(address, 0), **options) as peer:
        yield peer


def greeted(peer: ClientConnection) -> Any:
    """Return what the worker says of itself and its client."""
    return next(said for said in frames(peer) if "pid" in said)


def frames(peer: ClientConnection) -> Iterator[Any]:
    """What the worker says: in our protocol a frame alone or several in a list, and of an event its data."""
    while True:
        heard = hear(peer)
        for frame in heard if isinstance(heard, list) else [heard]:
            yield frame["data"] if frame.get("type") == "event" else frame


def worker(door: Front, nodes: list[Node], **options: Any) -> int:
    """Come and go; return the process that one was with."""
    with came(door, nodes, **options) as peer:
        pid: int = greeted(peer)["pid"]
        return pid


# A proxy in front


def test_large_messages_pass_both_ways_through_the_proxy(door: Front, nodes: list[Node]) -> None:
    with came(door, nodes) as peer:
        greeted(peer)
        said = "x" * 60_000
        peer.send(json.dumps(said))
        assert hear(peer) == said


def test_the_app_sees_the_scheme_the_host_and_the_address_of_its_client(door: Front, nodes: list[Node]) -> None:
    with came(door, nodes, address=ADA) as peer:
        seen = greeted(peer)
        assert (seen["scheme"], seen["host"], seen["ip"]) == ("wss", f"{HOST}:{door.port}", ADA)


def test_what_a_client_makes_up_about_its_way_is_not_believed(door: Front, nodes: list[Node]) -> None:
    made_up = {"X-Forwarded-For": "8.8.8.8", "X-Forwarded-Proto": "http"}
    with came(door, nodes, address=ADA, headers=made_up) as peer:
        seen = greeted(peer)
        assert (seen["scheme"], seen["ip"]) == ("wss", ADA)


def test_the_origin_of_the_proxy_is_the_apps_own_and_another_is_refused(door: Front, nodes: list[Node]) -> None:
    worker(door, nodes, origin=door.http)
    for foreign in ("https://evil.example", f"http://{HOST}:{door.port}", f"https://{HOST}"):
        response = refusal(door, headers=token(nodes), ssl=door.trust, origin=foreign)
        assert answered(response)[0] == 403


def test_a_limit_per_address_counts_the_clients_not_the_proxy(door: Front, nodes: list[Node]) -> None:
    with ExitStack() as stack:
        with pytest.raises(InvalidStatus) as refused:
            come_too_often(door, nodes, stack)
        assert answered(refused.value.response)[0] == 429
        greeted(stack.enter_context(came(door, nodes, "/one", BEN)))


def come_too_often(door: Front, nodes: list[Node], stack: ExitStack) -> None:
    """Come from one address once more than there are workers, which take one of it each."""
    for _ in [*nodes, "too often"]:
        stack.enter_context(came(door, nodes, "/one", ADA))


def test_the_workers_share_the_connections_unless_an_address_stays_with_its_worker(
    door: Front, nodes: list[Node]
) -> None:
    with ExitStack() as stack:
        workers = {greeted(stack.enter_context(came(door, nodes)))["pid"] for _ in range(6)}
    assert len(workers) == (1 if door.sticky else 2)


@pytest.mark.parametrize("kind", PROXIES)
def test_without_trust_in_the_proxy_its_own_origin_is_a_foreign_one(kind: str) -> None:
    with fleet(args=["--forwarded-allow-ips", "10.0.0.1"]) as nodes, front(kind, nodes) as door:
        response = refusal(door, headers=token(nodes), ssl=door.trust, origin=door.http)
        assert answered(response)[0] == 403
        with came(door, nodes, address=ADA) as peer:
            seen = greeted(peer)
            assert (seen["scheme"], seen["ip"]) == ("ws", HOST)


def test_no_ticket_stands_in_the_log_of_nginx(nodes: list[Node]) -> None:
    with front("nginx", nodes) as door:
        refusal(door, path="/ws?ticket=secret", ssl=door.trust)
        line = eventually(door.access.read_text, bool)
        assert '"GET /ws" 401' in line
        assert "secret" not in line


@pytest.mark.parametrize("kind", PROXIES)
def test_a_silent_websocket_outlives_the_patience_of_the_proxy_by_pings(kind: str) -> None:
    with fleet(args=["--ws-ping-interval", PING]) as nodes, front(kind, nodes, timeout=PATIENCE) as door:
        with came(door, nodes) as peer:
            greeted(peer)
            with pytest.raises(TimeoutError):
                peer.recv(LONG)
            peer.send('"still here"')
            assert hear(peer) == "still here"


@pytest.mark.parametrize("kind", PROXIES)
def test_a_silent_websocket_without_pings_does_not(kind: str, nodes: list[Node]) -> None:
    with front(kind, nodes, timeout=PATIENCE) as door, came(door, nodes) as peer:
        greeted(peer)
        with pytest.raises(ConnectionClosed):
            peer.recv(LONG)


# Workers that go and come


@pytest.fixture(params=PROXIES)
def own(request: pytest.FixtureRequest) -> Iterator[tuple[Front, list[Node]]]:
    """A door and a fleet that a test may harm."""
    with fleet() as nodes, front(request.param, nodes) as door:
        yield door, nodes


def both(door: Front, nodes: list[Node], stack: ExitStack, **options: Any) -> list[ClientConnection]:
    """Return a connection with each of the nodes, in their order."""
    found: dict[int, ClientConnection] = {}
    while len(found) < len(nodes):
        peer = stack.enter_context(came(door, nodes, **options))
        found[greeted(peer)["pid"]] = peer
    return [found[node.pid] for node in nodes]


def test_clients_of_a_worker_that_stops_read_1012_and_find_the_other(own: tuple[Front, list[Node]]) -> None:
    door, (first, second) = own
    with ExitStack() as stack:
        leaver, stayer = both(door, [first, second], stack)
        first.send_signal(signal.SIGTERM)
        assert ending(leaver)[0] == 1012
        assert {worker(door, [second]) for _ in range(4)} == {second.pid}
        assert first.wait() == -signal.SIGTERM
        assert loud(first.log()) == []
        assert {worker(door, [second]) for _ in range(4)} == {second.pid}
        stayer.send('"undisturbed"')
        assert hear(stayer) == "undisturbed"


def test_clients_of_our_protocol_are_told_when_to_come_back(own: tuple[Front, list[Node]]) -> None:
    door, (first, second) = own
    with ExitStack() as stack:
        leaver, _ = both(door, [first, second], stack, subprotocols=["rt.v1.json"])
        first.send_signal(signal.SIGTERM)
        goodbye = next(said for said in frames(leaver) if said["type"] == "goodbye")
        assert goodbye["code"] == 1012
        assert 0 <= goodbye["retry_after_ms"] <= 1100
        assert ending(leaver)[0] == 1012


def test_a_worker_that_is_back_gets_connections_again(own: tuple[Front, list[Node]]) -> None:
    door, (first, second) = own
    first.stop()
    assert worker(door, [second]) == second.pid
    first.start()
    with ExitStack() as stack:
        eventually(lambda: greeted(stack.enter_context(came(door, [first, second])))["pid"], first.pid.__eq__)


def test_clients_of_a_killed_worker_lose_their_connection_and_find_the_other(own: tuple[Front, list[Node]]) -> None:
    door, (first, second) = own
    with ExitStack() as stack:
        leaver, _ = both(door, [first, second], stack)
        first.kill()
        with pytest.raises(ConnectionClosed) as closed:
            leaver.recv(10)
        assert closed.value.rcvd is None
        assert {worker(door, [second]) for _ in range(4)} == {second.pid}


def test_every_worker_can_be_restarted_while_somebody_always_gets_in(own: tuple[Front, list[Node]]) -> None:
    door, nodes = own
    for node in nodes:
        others = [each for each in nodes if each is not node]
        node.stop()
        assert worker(door, others) == others[0].pid
        node.start()
        eventually(lambda pid=node.pid: worker(door, nodes), node.pid.__eq__)  # type: ignore[misc]


def test_a_worker_that_hangs_gets_no_newcomers_where_it_is_asked_whether_it_is_ready() -> None:
    asks = {"# option httpchk": "option httpchk"}
    with fleet() as (first, second), front("haproxy", [first, second], puts=asks) as door:
        first.freeze()
        eventually(door.log, lambda log: "worker1 is DOWN" in log)
        assert {worker(door, [second]) for _ in range(4)} == {second.pid}
        first.thaw()
        eventually(lambda: worker(door, [second]), first.pid.__eq__)


# Redis behind


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=PROXIES)
def shared(request: pytest.FixtureRequest, redis: RedisServer) -> Iterator[tuple[Front, list[Node]]]:
    """A door and a fleet that a test may harm, on one Redis."""
    with fleet(env={"REDIS_URL": redis.url}) as nodes, front(request.param, nodes) as door:
        yield door, nodes


def asked(node: Node, path: str, method: str = "GET") -> Any:
    """Ask, and again where the node says that Redis is away: on a busy machine it may seem so."""

    def answer() -> Any:
        try:
            return [ask(node, path, method)]
        except HTTPError as error:
            error.close()
            if error.code != 503:
                raise
            return []

    return eventually(answer, bool)[0]


def say(node: Node, group: str, data: str) -> None:
    asked(node, f"/say?group={group}&data={data}", "POST")


def present(node: Node, group: str) -> int:
    return len(asked(node, f"/present?group={group}"))


def tell(peer: ClientConnection, do: str, **what: Any) -> None:
    peer.send(json.dumps({"do": do, **what}))


def is_heard_by_all(node: Node, peers: list[ClientConnection]) -> bool:
    """Whether a broadcast on one node reaches clients wherever they are."""
    say(node, "all", "hello")
    return [hear(peer) for peer in peers] == ["hello"] * len(peers)


def test_a_broadcast_reaches_the_clients_of_every_worker(shared: tuple[Front, list[Node]]) -> None:
    door, nodes = shared
    with ExitStack() as stack:
        peers = both(door, nodes, stack)
        for node in nodes:
            assert is_heard_by_all(node, peers)


def test_presence_is_the_same_on_every_worker_and_a_killed_one_takes_its_members_along(redis: RedisServer) -> None:
    with fleet(env={"REDIS_URL": redis.url}) as nodes, ExitStack() as stack:
        for node in nodes:
            peer = stack.enter_context(visit(node, name()))
            greeted(peer)
            tell(peer, "track", group="all")
            assert hear(peer) == "tracked"
        for node in nodes:
            eventually(lambda node=node: present(node, "all"), (2).__eq__)  # type: ignore[misc]
        nodes[0].kill()
        eventually(lambda: present(nodes[1], "all"), (1).__eq__, within=20)


def test_two_workers_of_one_uvicorn_are_two_nodes(redis: RedisServer) -> None:
    with fleet(size=1, env={"REDIS_URL": redis.url}, args=["--workers", "2"]) as (node,), ExitStack() as stack:
        workers = eventually(node.workers, lambda pids: len(pids) == 2)
        peers = [stack.enter_context(with_the_other_asleep(node, worker, workers)) for worker in workers]
        assert is_heard_by_all(node, peers)


def test_uvicorn_restarts_its_workers_in_turn_and_somebody_always_gets_in(redis: RedisServer) -> None:
    with fleet(size=1, env={"REDIS_URL": redis.url}, args=["--workers", "2"]) as (node,), ExitStack() as stack:
        before = eventually(node.workers, lambda pids: len(pids) == 2)
        leavers = [stack.enter_context(with_the_other_asleep(node, worker, before)) for worker in before]
        node.send_signal(signal.SIGHUP)

        def now() -> list[int]:
            try:
                peer = visit(node, name())
            except InvalidStatus:  # uvicorn refuses whom it has half let in when a worker stops: they come again
                peer = visit(node, name())
            with peer:
                greeted(peer)
            return node.workers()

        eventually(now, lambda pids: len(pids) == 2 and not set(pids) & set(before), within=20)
        assert [ending(peer)[0] for peer in leavers] == [1012, 1012]


@contextmanager
def with_the_other_asleep(node: Node, worker: int, workers: list[int]) -> Iterator[ClientConnection]:
    """Connect while only ``worker`` is awake, so that it is the one who accepts."""
    headers = bearer(node, name())
    others = [pid for pid in workers if pid != worker]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        peer = visit(node, headers=headers)
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)
    with peer:
        assert greeted(peer)["pid"] == worker
        yield peer


def test_a_node_has_two_connections_to_redis_however_many_clients_it_has(redis: RedisServer) -> None:
    with fleet(env={"REDIS_URL": redis.url}) as nodes, ExitStack() as stack:
        for _ in range(20):
            for node in nodes:
                greeted(stack.enter_context(visit(node, name())))
        assert len(connections(redis)) == 2 * len(nodes)


def connections(redis: RedisServer) -> list[str]:
    """The lines of CLIENT LIST, without the one who asks."""
    listing: list[dict[str, str]] = redis.ask("CLIENT LIST")
    return [each["addr"] for each in listing if each["cmd"] != "client|list" and each["cmd"] != "client"]


@pytest.mark.parametrize("kind", REDISES)
def test_a_user_with_the_documented_rules_and_tls_is_enough(kind: str) -> None:
    with RedisServer(kind, tls=kind != "redis-6.2", rules=documented_rules()) as redis:
        with fleet(env={"REDIS_URL": redis.url}) as nodes, ExitStack() as stack:
            peers = [stack.enter_context(visit(node, name())) for node in nodes]
            for peer in peers:
                greeted(peer)
                for do in ("join", "track"):
                    tell(peer, do, group="kept:all")
                    hear(peer)
            assert is_heard_by_all(nodes[0], peers)
            say(nodes[0], "kept:all", "kept")
            assert [hear(peer) for peer in peers] == ["kept", "kept"]
            eventually(lambda: present(nodes[1], "kept:all"), (2).__eq__)
        refused = {entry["object"] for entry in redis.ask("ACL LOG")}
        assert refused <= {"client"}  # redis-py says its name and does not mind; 6.2 has no such command


def test_every_command_of_the_scripts_is_allowed_by_the_documented_rules(redis: RedisServer) -> None:
    words = documented_rules().split()
    allowed = {word[1:] for word in words if word[0] == "+"}
    for word in words:
        if word[:2] in ("+@", "-@") and word != "-@all":
            named = set(redis.ask("ACL CAT", word[2:]))
            allowed = allowed | named if word[0] == "+" else allowed - (named - {"info"})
    scripts = "".join(path.read_text("utf-8") for path in SCRIPTS.glob("*.lua"))
    used = {command.lower() for command in re.findall(r"redis\.p?call\(\s*['\"](\w+)", scripts)}
    assert {"get", "publish", "time"} <= used
    assert used - allowed == set()


def documented_rules() -> str:
    """The rules of the page, without the name and the password."""
    found = re.search(r"^ *user app on >\S+ (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert found, "the page shows no user"
    return found[1]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", PROXIES)
async def test_a_client_misses_nothing_while_every_worker_is_restarted(
    kind: str, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fleet(env={"REDIS_URL": redis.url}) as nodes, front(kind, nodes) as door:
        monkeypatch.setenv("SSL_CERT_FILE", str(door.cert))
        signed = token(nodes)["Authorization"].removeprefix("Bearer ")
        async with Client(f"{door.url}/ws", token=lambda: signed) as client:
            await client.join("kept:news")
            said = 0
            for node in nodes:
                other = next(each for each in nodes if each is not node)
                restart = asyncio.create_task(asyncio.to_thread(node.restart))
                while not restart.done():
                    await asyncio.to_thread(say, other, "kept:news", str(said))
                    await asyncio.sleep(PACE)
                    said += 1
                await restart
            await asyncio.to_thread(say, nodes[0], "kept:news", "end")
            heard = [(await client.hear(type="event", group="kept:news"))["data"] for _ in range(said + 1)]
            assert heard == [*map(str, range(said)), "end"]
            assert [frame["type"] for frame in client.log].count("welcome") in (2, 3)
