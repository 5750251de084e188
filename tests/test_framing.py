"""The frames of the shared path, read by two implementations that we did not write."""

from __future__ import annotations

import pytest
import wsproto.events
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri
from wsproto.connection import Connection, ConnectionType

from starlette_rt.protocols.framing import FRAMED, frame
from starlette_rt.seams import Carrier

pytestmark = pytest.mark.unit

Messages = list[str | bytes]

EDGES = ["", b"", "a" * 125, b"b" * 126, "é" * 63, b"c" * 65535, "d" * 65536]

texts = st.text(st.characters(exclude_categories=["Cs"]))
messages = st.lists(st.one_of(texts, st.binary()), max_size=20)
sizes = st.sampled_from([0, 1, 124, 125, 126, 127, 128, 65534, 65535, 65536, 65537])


def read_by_websockets(data: bytes) -> Messages:
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    client.receive_data(data)
    assert client.parser_exc is None
    read: Messages = []
    for event in client.events_received():
        assert isinstance(event, Frame)
        assert event.fin
        read.append(bytes(event.data).decode() if event.opcode is Opcode.TEXT else bytes(event.data))
    return read


def read_by_wsproto(data: bytes) -> Messages:
    client = Connection(ConnectionType.CLIENT)
    client.receive_data(data)
    read: Messages = []
    for event in client.events():
        assert isinstance(event, wsproto.events.Message)
        assert event.message_finished
        read.append(event.data if isinstance(event.data, str) else bytes(event.data))
    return read


READERS = [read_by_websockets, read_by_wsproto]


@pytest.mark.parametrize("read", READERS)
@given(said=messages)
@example(said=EDGES)
def test_any_sequence_of_frames_reads_as_the_same_messages(read, said: Messages) -> None:
    assert read(FRAMED.join([FRAMED.frame(message) for message in said])) == said


@pytest.mark.parametrize("read", READERS)
@given(size=sizes, binary=st.booleans())
def test_every_length_form_reads_as_the_same_message(read, size: int, binary: bool) -> None:
    message = b"\x00" * size if binary else "x" * size
    assert read(frame(message)) == [message]


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, b"\x81\x00"),
        (125, b"\x81\x7d"),
        (126, b"\x81\x7e\x00\x7e"),
        (65535, b"\x81\x7e\xff\xff"),
        (65536, b"\x81\x7f\x00\x00\x00\x00\x00\x01\x00\x00"),
    ],
)
def test_a_length_takes_its_shortest_form(size: int, head: bytes) -> None:
    assert frame("x" * size) == head + b"x" * size


def test_a_length_counts_bytes_and_not_characters() -> None:
    assert frame("é") == b"\x81\x02\xc3\xa9"


def test_text_is_text_and_bytes_are_binary() -> None:
    assert frame("é".encode()) == b"\x82\x02\xc3\xa9"


def test_what_is_no_text_is_refused_where_it_is_framed() -> None:
    with pytest.raises(UnicodeEncodeError):
        frame("\ud800")


def test_one_frame_alone_is_shared_and_not_copied() -> None:
    only = frame("hello")
    assert FRAMED.join([only]) is only


def test_nothing_joined_is_nothing() -> None:
    assert FRAMED.join([]) == b""


def test_the_carrier_is_one_of_a_seam() -> None:
    carrier: Carrier = FRAMED
    assert carrier.frame("hi") == frame("hi")
