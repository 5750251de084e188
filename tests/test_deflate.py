"""Never a corrupted stream, whatever is mixed: shared frames, compressed or not, and what uvicorn compresses itself.

The law of this file: readers that we did not write say what was heard (zlib by the letter of RFC 7692, websockets,
Node.js, Chromium), and the twins at the end of the first part show that they would notice.

What can go wrong, and what cannot. A frame that was compressed with a context of its own refers to nothing outside
itself: whoever gets only such frames reads them rightly, with a window that is kept as with one that is not, as long
as the window is large enough. But on a connection whose server keeps its context, the server's own compressor knows
nothing of the shared frame that the peer's window now holds: its next message points too short a way back, and
decodes to wrong text, mostly without an error. So compressed frames are shared only where the answer to the handshake
promised `server_no_context_takeover`, which binds the server's own compressor too. And frames of one compressor that
goes on from message to message cannot be shared at all: a peer that missed one reads garbage ever after.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints
from urllib.parse import quote_plus, unquote_plus

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect as connect_async
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from starlette_rt.protocols.framing import DEFLATE_FROM, DEFLATED, FRAMED, WINDOW, deflated
from starlette_rt.seams import Carrier
from starlette_rt.uvicorn import RealtimeWebSocketProtocol
from tests.nodes import find
from tests.peers import ask, eventually, hello, loud
from tests.prose import KINDS, digits, message, prose
from tests.servers import ROOT, Server, serve
from tests.test_uvicorn import LOOPS, PATIENCE, Site, Visit, running
from tests.wires import certificate

Messages = list[str | bytes]

TAIL = b"\x00\x00\xff\xff"
EDGES = [0, 1, 125, 126, DEFLATE_FROM - 1, DEFLATE_FROM, DEFLATE_FROM + 1, 4095, 4097, 65535, 65536]
SIZES = st.one_of(st.sampled_from(EDGES), st.integers(0, 3 * DEFLATE_FROM))
ways = st.sampled_from(["deflated", "framed", "own"])
spoken = st.lists(st.tuples(ways, st.builds(message, st.sampled_from(KINDS), st.integers(0, 99), SIZES)), max_size=12)
ALL = [(way, message(kind, 1, size)) for size in EDGES for kind in KINDS for way in ("deflated", "framed", "own")]


# What a peer reads.


def frames(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The first byte and the payload of each frame of a server."""
    while data:
        size, head = data[1], 2
        if size > 125:
            head = 4 if size == 126 else 10
            size = int.from_bytes(data[2:head])
        yield data[0], data[head : head + size]
        data = data[head + size :]


class Peer:
    """Reads frames by the letter of RFC 7692, section 7.2.2, with a window that is kept or is not.

    It inflates by small pieces: zlib holds to its window only between two of them.
    """

    def __init__(self, keeps: bool, window: int = 15) -> None:
        self.keeps, self.window = keeps, window
        self.inflator = zlib.decompressobj(wbits=-window)

    def read(self, data: bytes) -> Messages:
        return [self.understood(head, payload) for head, payload in frames(data)]

    def understood(self, head: int, payload: bytes) -> str | bytes:
        assert head & 0xB0 == 0x80, "every message is one frame, and RSV2 and RSV3 are nobody's"
        if head & 0x40:
            if not self.keeps:
                self.inflator = zlib.decompressobj(wbits=-self.window)
            payload = b"".join(self.inflated(payload + TAIL))
        return payload.decode() if head & 15 == Opcode.TEXT else payload

    def inflated(self, rest: bytes) -> Iterator[bytes]:
        while rest:
            yield self.inflator.decompress(rest, 500)
            assert not self.inflator.eof, "a final block, behind which nothing more can come"
            rest = self.inflator.unconsumed_tail


def own_compressor(keeps: bool, window: int = WINDOW) -> ServerProtocol:
    """What uvicorn sends with: its settings, with or without the promise not to keep the context."""
    factory = ServerPerMessageDeflateFactory(not keeps, False, window, WINDOW, {"memLevel": 5})
    server = ServerProtocol(state=State.OPEN, max_size=None)
    server.extensions = [factory.process_request_params([("client_max_window_bits", None)], [])[1]]
    return server


def sent(server: ServerProtocol, said: str | bytes) -> bytes:
    """One message from the server's own compressor."""
    server.send_text(said.encode()) if isinstance(said, str) else server.send_binary(said)
    return b"".join(server.data_to_send())


def wire(mix: Sequence[tuple[str, str | bytes]], server: ServerProtocol) -> bytes:
    """All that goes to one peer."""
    ways: dict[str, Callable[[str | bytes], bytes]] = {
        "deflated": DEFLATED.frame,
        "framed": FRAMED.frame,
        "own": lambda said: sent(server, said),
    }
    return DEFLATED.join([ways[way](said) for way, said in mix])


def heard_by_websockets(data: bytes, answer: dict[str, str | None]) -> Messages:
    """Read as a client to which this was answered; a chunk may end anywhere."""
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    client.extensions = [ClientPerMessageDeflateFactory().process_response_params([*answer.items()], [])]
    for start in range(0, len(data), 5000):
        client.receive_data(data[start : start + 5000])
    assert client.parser_exc is None
    heard = [event for event in client.events_received() if isinstance(event, Frame)]
    return [bytes(each.data).decode() if each.opcode is Opcode.TEXT else bytes(each.data) for each in heard]


@pytest.mark.unit
@settings(max_examples=60)
@given(window=st.integers(WINDOW, 15), keeps=st.booleans(), mix=spoken)
@example(window=WINDOW, keeps=False, mix=ALL)
@example(window=WINDOW, keeps=True, mix=ALL)
def test_any_mix_is_read_rightly_by_the_letter_of_the_rfc(
    window: int, keeps: bool, mix: list[tuple[str, str | bytes]]
) -> None:
    data = wire(mix, own_compressor(keeps=False))
    assert Peer(keeps, window).read(data) == [said for _, said in mix]


@pytest.mark.unit
@settings(max_examples=60)
@given(
    window=st.sampled_from([None, *range(WINDOW, 16)]),
    client=st.sampled_from([None, "client_no_context_takeover"]),
    mix=spoken,
)
@example(window=None, client=None, mix=ALL)
@example(window=WINDOW, client=None, mix=ALL)
def test_any_mix_is_read_rightly_by_websockets_under_every_answer(
    window: int | None, client: str | None, mix: list[tuple[str, str | bytes]]
) -> None:
    answer: dict[str, str | None] = {"server_no_context_takeover": None}
    answer |= {"server_max_window_bits": str(window)} if window else {}
    answer |= {client: None} if client else {"client_max_window_bits": "12"}
    assert heard_by_websockets(wire(mix, own_compressor(keeps=False)), answer) == [said for _, said in mix]


@pytest.mark.unit
@settings(max_examples=30)
@given(mix=spoken)
@example(mix=ALL)
def test_what_is_shared_may_stand_alone_even_where_the_context_is_kept(mix: list[tuple[str, str | bytes]]) -> None:
    shared = [(way, said) for way, said in mix if way != "own"]
    data = wire(shared, own_compressor(keeps=True))
    assert heard_by_websockets(data, {}) == Peer(keeps=True).read(data) == [said for _, said in shared]


@pytest.mark.unit
@given(said=st.builds(message, st.sampled_from(KINDS), st.integers(0, 99), SIZES))
def test_a_shared_frame_is_never_longer_than_an_uncompressed_one(said: str | bytes) -> None:
    assert len(DEFLATED.frame(said)) <= len(FRAMED.frame(said))
    assert DEFLATED.frame(said) == DEFLATED.frame(said), "it depends on nothing but the message"


# The twins: what these readers say to what must not be done.


def conversation(count: int) -> list[tuple[str, str | bytes]]:
    """Texts of one vocabulary, one shared in compressed form after each of the server's own."""
    return [("deflated" if number % 2 else "own", prose(number, 1000)) for number in range(count)]


@pytest.mark.unit
@pytest.mark.parametrize("keeps", [False, True], ids=["promised", "not promised"])
def test_beside_a_compressor_that_keeps_its_context_shared_frames_make_wrong_text_without_an_error(keeps: bool) -> None:
    mix = conversation(100)
    heard = heard_by_websockets(wire(mix, own_compressor(keeps)), {} if keeps else {"server_no_context_takeover": None})
    wrong = [number for number, (each, (_, said)) in enumerate(zip(heard, mix, strict=True)) if each != said]
    assert wrong == ([*range(2, 100, 2)] if keeps else []), "49 of the server's own 50, and never a shared one"


@pytest.mark.unit
def test_frames_of_a_compressor_that_goes_on_cannot_be_shared() -> None:
    compressor = zlib.compressobj(1, zlib.DEFLATED, -WINDOW)
    texts = [prose(number, 1000) for number in range(50)]
    packed = [compressor.compress(text.encode()) + compressor.flush(zlib.Z_SYNC_FLUSH) for text in texts]
    whole, late = zlib.decompressobj(wbits=-15), zlib.decompressobj(wbits=-15)
    assert [whole.decompress(each).decode() for each in packed] == texts
    with pytest.raises(zlib.error, match="too far back"):
        late.decompress(packed[1])  # it came one message later than the others
    missed = zlib.decompressobj(wbits=-15)
    heard = [missed.decompress(each) for number, each in enumerate(packed) if number != 20]
    assert heard[:20] == [text.encode() for text in texts[:20]]
    assert all(each != text.encode() for each, text in zip(heard[20:], texts[21:], strict=True))


@pytest.mark.unit
@pytest.mark.parametrize("window", [9, 10, 11])
def test_a_window_that_is_too_small_is_an_error_at_the_peer(window: int) -> None:
    assert window < WINDOW
    far = bytes(random.Random(1).randbytes(3000)) * 2
    assert Peer(False, WINDOW).read(deflated(far)) == [far]
    with pytest.raises(zlib.error, match="too far back"):
        Peer(False, window).read(deflated(far))


# Real servers, and all kinds of clients at once: what is shared is framed once for all of them.

Way = Literal["shared", "joined", "plain", "own", "rest"]
WAYS: tuple[Way, ...] = ("shared", "shared", "joined", "plain", "own", "own", "rest")
ANSWER = "permessage-deflate; server_no_context_takeover; server_max_window_bits=12; client_max_window_bits=12"
OFFERS: dict[str, ClientPerMessageDeflateFactory | None] = {
    "nothing": None,
    "permessage-deflate": ClientPerMessageDeflateFactory(client_max_window_bits=None),
    "any client window": ClientPerMessageDeflateFactory(),
    "client window 9": ClientPerMessageDeflateFactory(client_max_window_bits=9),
    "window 9": ClientPerMessageDeflateFactory(server_max_window_bits=9),
    "window 10": ClientPerMessageDeflateFactory(server_max_window_bits=10),
    "window 12": ClientPerMessageDeflateFactory(server_max_window_bits=12),
    "window 15": ClientPerMessageDeflateFactory(server_max_window_bits=15),
    "server forgets": ClientPerMessageDeflateFactory(server_no_context_takeover=True),
    "client forgets": ClientPerMessageDeflateFactory(client_no_context_takeover=True),
    "all": ClientPerMessageDeflateFactory(True, True, 12, 9),
}
UNSHARED = {"nothing", "window 9", "window 10"}  # whoever offers this gets uncompressed frames


@dataclass(frozen=True)
class Deed:
    """Something that is said to everybody, or a little rest in which pings and the peers have their turn."""

    way: Way
    said: tuple[str | bytes, ...] = ()


def program(seed: object, count: int) -> list[Deed]:
    """So many deeds, most of them of texts that share their words."""
    dice = random.Random(f"program {seed}")
    return [deed(dice) for _ in range(count)]


def deed(dice: random.Random, most: int = 30_000) -> Deed:
    """One deed with messages of no more than so many bytes."""
    way = dice.choice(WAYS)
    many = {"rest": 0, "joined": dice.randint(2, 6)}.get(way, 1)
    return Deed(way, tuple(any_message(dice, most) for _ in range(many)))


def any_message(dice: random.Random, most: int) -> str | bytes:
    size = min(most, dice.choice([*EDGES[:-2], dice.randrange(3000), dice.randrange(most)]))
    return message(dice.choice(["prose", "prose", *KINDS]), dice.random(), size)


def messages(deeds: Sequence[Deed]) -> Messages:
    """All that is said, in order."""
    return [said for deed in deeds for said in deed.said]


async def recite(visits: Sequence[Visit], deeds: Sequence[Deed]) -> None:
    """In the server's loop: do it all, to everybody."""
    for deed in deeds:
        if deed.way == "rest":
            await asyncio.sleep(0.002)
        payloads: dict[Carrier, bytes] = {}
        for visit in visits:
            await say(visit, deed, payloads)


async def say(visit: Visit, deed: Deed, payloads: dict[Carrier, bytes]) -> None:
    if deed.way == "own":
        for said in deed.said:
            await visit.send({"type": "websocket.send", "text" if isinstance(said, str) else "bytes": said})
        return
    carrier = FRAMED if deed.way == "plain" else visit.seam.carrier
    if carrier not in payloads:
        payloads[carrier] = carrier.join([carrier.frame(said) for said in deed.said])
    while not visit.seam.write(payloads[carrier]):
        assert visit.seam.conn.state is State.OPEN
        await asyncio.sleep(0.001)


def visits(site: Site, names: Sequence[str]) -> list[Visit]:
    """The visits of all clients, in the order of their names."""
    found = {unquote_plus(visit.seam.scope["query_string"].decode()): visit for visit in visited(site, len(names))}
    return [found[f"name={name}"] for name in names]


def visited(site: Site, count: int) -> list[Visit]:
    come = [site.visit() for _ in range(count)]
    assert all(visit.accepted.wait(PATIENCE) for visit in come)
    return come


def start(site: Site, come: Sequence[Visit], deeds: Sequence[Deed]) -> Future[None]:
    """Begin to recite; the caller reads meanwhile."""
    return asyncio.run_coroutine_threadsafe(recite(come, deeds), site.loop)


@pytest.fixture(autouse=True)
def _nothing_above_info(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    assert [record for record in caplog.get_records("call") if record.levelno > logging.INFO] == []


@pytest.fixture(scope="module", params=LOOPS)
def pinging(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A server that pings all the time, so that pings fall between any two frames."""
    with running(request.param, ws_ping_interval=0.004, ws_per_message_deflate=True) as site:
        yield site


@pytest.mark.system
@pytest.mark.parametrize("seed", range(4))
def test_clients_with_every_offer_hear_one_mix_each_as_it_was_said(pinging: Site, seed: int) -> None:
    deeds = program(seed, 60)
    heard, back = asyncio.run(listen_together(pinging, deeds))
    for name in OFFERS:
        assert heard[name] == messages(deeds), name
        assert back[name] == messages(deeds)[:5], f"{name}, in the other direction"
    pinging.forgotten()


async def listen_together(site: Site, deeds: Sequence[Deed]) -> tuple[dict[str, Messages], dict[str, Messages]]:
    """What the clients have heard, and what the application has heard of them."""
    clients = {name: await visitor(site, name) for name in OFFERS}
    come = await asyncio.to_thread(visits, site, list(OFFERS))
    for visit, (name, client) in zip(come, clients.items(), strict=True):
        answer = answered(client.response)
        assert ("server_no_context_takeover" in answer) == (OFFERS[name] is not None), answer
        assert visit.seam.carrier is (FRAMED if name in UNSHARED else DEFLATED), f"{name}: {answer}"
    reciting = asyncio.wrap_future(start(site, come, deeds))
    listening = [converse(client, messages(deeds)) for client in clients.values()]
    heard = await asyncio.wait_for(asyncio.gather(*listening), PATIENCE)
    await reciting
    for client, visit in zip(clients.values(), come, strict=True):
        await client.close()
        await asyncio.to_thread(visit.done.wait, PATIENCE)
    return dict(zip(OFFERS, heard, strict=True)), {
        name: [event.get("text", event.get("bytes")) for event in visit.events if event["type"] == "websocket.receive"]
        for name, visit in zip(OFFERS, come, strict=True)
    }


async def visitor(site: Site, name: str) -> Any:
    offer = OFFERS[name]
    url = f"ws://127.0.0.1:{site.port}/?name={quote_plus(name)}"
    return await connect_async(url, compression=None, extensions=[offer] if offer else None, max_size=None)


def answered(response: Any) -> str:
    return str(response.headers.get("Sec-WebSocket-Extensions", ""))


async def converse(client: Any, expected: Messages) -> Messages:
    """Say the first five messages oneself, and hear as many as are expected."""
    for said in expected[:5]:
        await client.send(said)
    return [await client.recv() for _ in expected]


def listen(client: ClientConnection, count: int) -> Messages:
    """Hear so many messages, or fewer if the connection ends."""
    heard: Messages = []
    try:
        while len(heard) < count:
            heard.append(client.recv(PATIENCE))
    except ConnectionClosed:
        pass
    return heard


@pytest.mark.system
@pytest.mark.parametrize("name", OFFERS)
def test_through_tls_and_to_a_client_in_a_thread_the_same(secured: Site, name: str) -> None:
    deeds, offer = program(name, 30), OFFERS[name]
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    url = f"wss://127.0.0.1:{secured.port}/"
    options: dict[str, Any] = {"ssl": context, "max_size": None, "extensions": [offer] if offer else None}
    with connect(url, compression=None, **options) as client:
        reciting = start(secured, visited(secured, 1), deeds)
        assert listen(client, len(messages(deeds))) == messages(deeds)
        reciting.result(PATIENCE)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = certificate(tmp_path_factory.mktemp("tls"))
    with running(LOOPS[-1], ssl_certfile=made.cert, ssl_keyfile=made.key, ws_ping_interval=0.004) as site:
        yield site


@pytest.mark.system
def test_a_peer_that_offers_several_ways_gets_one_that_can_be_shared(pinging: Site) -> None:
    offers = "permessage-deflate; server_max_window_bits=8, permessage-deflate; client_max_window_bits; nonsense=1"
    assert answer_to(pinging, f"x-other, {offers}, permessage-deflate") == (
        "permessage-deflate; server_no_context_takeover; server_max_window_bits=12"
    )
    (visit,) = visited(pinging, 1)
    assert visit.seam.carrier is DEFLATED


def answer_to(site: Site, offers: str) -> str:
    """The extensions that the server answers a handshake with."""
    with socket.create_connection(("127.0.0.1", site.port), PATIENCE) as peer:
        peer.sendall(hello(cast("Server", site), headers={"Sec-WebSocket-Extensions": offers}, path="/"))
        head = b""
        while b"\r\n\r\n" not in head:
            head += peer.recv(4096)
    found = re.search(rb"^Sec-WebSocket-Extensions: (.*)\r$", head, re.MULTILINE | re.IGNORECASE)
    return found[1].decode() if found else ""


class Careless(RealtimeWebSocketProtocol):
    """The twin: it shares compressed frames though it never promised to forget."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for factory in cast("list[Any]", self.conn.available_extensions):
            factory.server_no_context_takeover = False

    def run_asgi(self) -> Any:
        running = super().run_asgi()
        self.carrier = DEFLATED
        return running


@pytest.mark.system
def test_without_the_promise_these_clients_hear_what_nobody_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_uvicorn.RealtimeWebSocketProtocol", Careless)
    deeds = [Deed("own" if way == "own" else "shared", (str(said),)) for way, said in conversation(40)]
    with running(LOOPS[-1]) as site, connect(f"ws://127.0.0.1:{site.port}/") as client:
        reciting = start(site, visited(site, 1), deeds)
        heard = listen(client, 40)
        reciting.result(PATIENCE)
        assert len(heard) == 40, "and not one error"
        wrong = [number for number, (each, said) in enumerate(zip(heard, messages(deeds), strict=True)) if each != said]
        assert wrong == [*range(2, 40, 2)]


# Clients in another language. `ws` is a rival of the benchmarks and takes part where it is installed for them.

SCRIPT = ROOT / "tests" / "js" / "deflate.mjs"
CACHE = Path(os.environ.get("BENCH_CACHE", ROOT / ".bench"))
WS = next((folder for folder in CACHE.glob("*/node_modules/ws")), None)
WISHES: dict[str, Any] = {
    "off": False,
    "on": True,
    "server forgets": {"serverNoContextTakeover": True},
    "both forget": {"serverNoContextTakeover": True, "clientNoContextTakeover": True},
    "window 9": {"serverMaxWindowBits": 9},
    "window 10, client 9": {"serverMaxWindowBits": 10, "clientMaxWindowBits": 9},
    "window 15": {"serverMaxWindowBits": 15},
    "no client window": {"clientMaxWindowBits": False},
}
CLIENTS = {"node": {"with": "node"}} | {
    name: {"with": "ws", "options": {"perMessageDeflate": wish}} for name, wish in WISHES.items() if WS is not None
}


def digest(said: str | bytes) -> str:
    """What tests/js/deflate.mjs says that it heard."""
    return hashlib.sha256(b"t" + said.encode() if isinstance(said, str) else b"b" + said).hexdigest()


@pytest.mark.system
@pytest.mark.parametrize("seed", ["here", "there"])
def test_node_and_ws_hear_one_mix_each_as_it_was_said(pinging: Site, seed: str) -> None:
    deeds = program(seed, 150)
    expected = [digest(said) for said in messages(deeds)]
    url, node = f"ws://127.0.0.1:{pinging.port}/", str(find())
    command = [node, str(SCRIPT), url, str(len(expected)), json.dumps(CLIENTS), str(WS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as clients:
        reciting = start(pinging, visits(pinging, list(CLIENTS)), deeds)
        told, _ = clients.communicate(timeout=40)
        reciting.result(PATIENCE)
    assert clients.returncode == 0
    for name, client in json.loads(told).items():
        assert ("server_no_context_takeover" in client["extensions"]) == (name != "off"), client["extensions"]
        assert client["heard"] == expected, name
    pinging.forgotten()


OPEN = """
([url, count]) => new Promise((opened, failed) => {
  const socket = new WebSocket(url);
  const heard = [];
  socket.binaryType = "arraybuffer";
  socket.onopen = () => opened(socket.extensions);
  socket.onerror = failed;
  socket.onmessage = ({ data }) => {
    heard.push(typeof data === "string" ? ["t", data] : ["b", btoa(String.fromCharCode(...new Uint8Array(data)))]);
    if (heard.length === count) socket.close();
  };
  window.told = new Promise((resolve) => { socket.onclose = () => resolve(JSON.stringify(heard)); });
})
"""


@pytest.mark.system
def test_chromium_negotiates_it_and_hears_two_thousand_messages_as_they_were_said() -> None:
    dice = random.Random("for a browser")
    deeds = [deed(dice, most=2000) for _ in range(1_700)]
    said = messages(deeds)
    assert len(said) > 2_000
    with chromium() as page, running(LOOPS[-1], ws_ping_interval=0.004) as site:
        assert page.evaluate(OPEN, [f"ws://127.0.0.1:{site.port}/", len(said)]) == ANSWER
        reciting = start(site, visited(site, 1), deeds)
        heard = json.loads(page.evaluate("window.told"))
        reciting.result(PATIENCE)
    assert [text if kind == "t" else b64decode(text) for kind, text in heard] == said


@contextmanager
def chromium() -> Iterator[Any]:
    """An empty page of a browser."""
    driver = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the PATH")
    with driver.sync_playwright() as playwright:
        # An empty page comes from nowhere, and from there Chromium lets nobody speak to this machine.
        flags = ["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser.new_page()
        browser.close()


# The whole stack.


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("tests.reciting:app", "uvicorn-rt") as server:
        yield server
        assert loud(server.log()) == []


@dataclass(frozen=True)
class Member:
    """A client of the whole stack: what it offers, and in which groups it is."""

    deflate: bool
    protocol: Literal["rt.v1.json", "rt.plain", ""]
    groups: tuple[str, ...]

    @contextmanager
    def connect(self, server: Server, **options: Any) -> Iterator[ClientConnection]:
        path = "/ws?" + "&".join(f"group={group}" for group in self.groups)
        protocols = {"subprotocols": [Subprotocol(self.protocol)]} if self.protocol else {}
        extensions = [ClientPerMessageDeflateFactory()] if self.deflate else None
        options = {"ping_interval": None, "max_size": None, **protocols, **options}
        with connect(server.url + path, compression=None, extensions=extensions, **options) as client:
            assert answered(client.response) == (ANSWER if self.deflate else "")
            while "all joined" not in client.recv(PATIENCE):
                pass  # rt.v1 says more
            yield client


MEMBERS = [
    Member(deflate, protocol, groups)
    for deflate in (True, False)
    for protocol in get_args(get_type_hints(Member)["protocol"])
    for groups in (("large",), ("small",), ("large", "small"))
]
SAID = {"large": (16_000, 12), "small": (100, 60)}  # bytes of text, messages


def heard_in(client: ClientConnection, counts: dict[str, int]) -> dict[str, list[tuple[int, str]]]:
    """Number and text of so many messages of each group, in the order in which they came."""
    heard: dict[str, list[tuple[int, str]]] = {group: [] for group in counts}
    while any(len(heard[group]) < count for group, count in counts.items()):
        for data in broadcasts(client.recv(PATIENCE)):
            heard[data["group"]].append((data["n"], data["text"]))
    return heard


def broadcasts(raw: str | bytes) -> Iterator[dict[str, Any]]:
    """What a message carries of what was recited; rt.v1 has batches and frames of its own."""
    decoded = json.loads(raw)
    for frame in decoded if isinstance(decoded, list) else [decoded]:
        if "text" in frame:
            yield frame
        elif frame["type"] == "event":
            yield frame["data"]


def expected_in(groups: Sequence[str], said: dict[str, tuple[int, int]]) -> dict[str, list[tuple[int, str]]]:
    return {
        group: [(number, prose(f"{group} {number}", said[group][0])) for number in range(said[group][1])]
        for group in groups
    }


@pytest.mark.system
def test_members_with_and_without_compression_hear_the_same_texts(server: Server) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(member.connect(server)) for member in MEMBERS]
        with ThreadPoolExecutor(len(MEMBERS) + len(SAID)) as pool:
            for group, (size, count) in SAID.items():
                pool.submit(ask, server, f"/recite?group={group}&size={size}&start=0&end={count}", "POST")
            counts = [{group: SAID[group][1] for group in member.groups} for member in MEMBERS]
            for member, heard in zip(MEMBERS, pool.map(heard_in, clients, counts), strict=True):
                assert heard == expected_in(member.groups, SAID), member


@pytest.mark.system
def test_a_peer_that_reads_late_hears_all_of_it_as_it_was_said(server: Server) -> None:
    """Every write is whole or not at all, compressed or not; what waits in the outbox is framed when it leaves."""
    with socket.socket() as door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        door.connect(("127.0.0.1", server.port))
        late = Member(True, "rt.v1.json", ("digits", "small"))
        with late.connect(server, sock=door, max_queue=1) as client:
            count = fall_behind(server)
            assert heard_in(client, {"digits": count, "small": count}) == {
                "digits": [(number, digits(f"digits {number}", 60_000)) for number in range(count)],
                **expected_in(["small"], {"small": (100, count)}),
            }
            eventually(lambda: ask(server, "/stats")["slow"], lambda slow: slow == 0)


def fall_behind(server: Server) -> int:
    """Say so many messages in both groups that a peer which does not read has some in its outbox."""
    count = waiting = 0
    while waiting < 3:
        for group, size in (("digits", 60_000), ("small", 100)):
            ask(server, f"/recite?group={group}&size={size}&start={count}&end={count + 10}", "POST")
        count += 10
        waiting += ask(server, "/stats")["slow"]
    return count
