"""The seam over ``send()``, driven by hand: what it gives to the relay runs when the test says so."""

from __future__ import annotations

import types
from collections.abc import Callable, Generator, Iterator
from functools import partial, wraps
from typing import Any, cast

import pytest
from starlette.types import Message

from starlette_rt.loop import Job, Relay, tasks
from starlette_rt.seams import ASGI, SEAM_EXTENSION, SendSeam, abort_transport, seam_for, stop_reading

pytestmark = pytest.mark.unit


class Cancelled(BaseException):
    """What a cancelled task sees."""


class Task:
    """What the relay does of one job: a step at a time, and after a step that did not end it, it waits."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._coroutine = job.run()
        self.done = self.waits = False

    def step(self) -> None:
        try:
            self._coroutine.send(None)
        except StopIteration:
            self.done = True
        else:
            if not self.waits:
                self.waits = True
                self._job.waits(self)

    def cancel(self) -> None:
        try:
            self._coroutine.throw(Cancelled())
        except Cancelled:
            self.done = True


@types.coroutine
def wait() -> Generator[None]:
    yield


class Stage:
    """A seam, the server below it, and the listener above it."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.heard: list[str] = []
        self.tasks: list[Task] = []
        self.full = self.gone = False
        self.aborted = self.deafened = 0
        self.transport = self  # a server's send is a method of what holds the transport
        self.seam = SendSeam(self.send, cast("Relay", self))
        self.seam.attach(self)

    async def send(self, message: Message) -> None:
        if self.full:
            await wait()
        if self.gone:
            raise OSError("the peer has left")
        self.sent.append(message)

    def add(self, job: Job) -> None:
        self.tasks.append(Task(job))

    def abort(self) -> None:
        self.aborted += 1

    def pause_reading(self) -> None:
        self.deafened += 1

    def on_pause(self) -> None:
        self.heard.append("pause")

    def on_resume(self) -> None:
        self.heard.append("resume")

    def on_closing(self, code: int) -> None:
        raise AssertionError("ASGI has no word for a shutdown")

    def write(self, *texts: str) -> bool:
        return self.seam.write(ASGI.join([ASGI.frame(text) for text in texts]))

    def run(self) -> None:
        """Let every task go on until it is done; bounded, because each step of a stalled one sends one message."""
        for _ in range(20):
            for task in self.tasks:
                if not task.done:
                    task.step()

    @property
    def texts(self) -> list[str]:
        return [message.get("text", f"close {message.get('code')}") for message in self.sent]


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.run()
    assert all(task.done for task in stage.tasks)


def test_messages_become_asgi_messages_of_their_kind() -> None:
    assert ASGI.frame("a") == {"type": "websocket.send", "text": "a"}
    assert ASGI.frame(b"a") == {"type": "websocket.send", "bytes": b"a"}
    assert ASGI.frame("") == {"type": "websocket.send", "text": ""}
    assert ASGI.join([ASGI.frame("a")]) == (ASGI.frame("a"),)


def test_what_is_written_is_sent_in_order(stage: Stage) -> None:
    assert stage.write("1", "2")
    stage.run()
    assert stage.write("3")
    stage.run()
    assert stage.texts == ["1", "2", "3"]
    assert all(task.done for task in stage.tasks)


def test_a_write_that_need_not_wait_pauses_nobody(stage: Stage) -> None:
    assert stage.write("1")
    stage.run()
    assert stage.heard == []


def test_who_asks_for_more_before_it_has_gone_is_told_when_to_come_back(stage: Stage) -> None:
    assert stage.write("1")
    assert not stage.write("2")
    assert not stage.seam.ready()
    assert stage.heard == ["pause"]
    stage.run()
    assert stage.texts == ["1"]
    assert stage.heard[-1] == "resume"
    assert stage.seam.ready()
    assert stage.write("3")


def test_a_peer_that_keeps_a_write_waiting_is_a_pause(stage: Stage) -> None:
    stage.full = True
    assert stage.write("1")
    stage.tasks[0].step()
    assert stage.heard == ["pause"]
    assert not stage.write("2")
    assert stage.heard == ["pause"], "its time runs from when it began"
    stage.run()
    assert stage.heard[-1] == "resume"
    assert stage.texts == ["1"]


def test_a_part_that_has_gone_is_said_by_another_pause(stage: Stage) -> None:
    stage.full = True
    stage.write("1", "2")
    stage.tasks[0].step()
    assert stage.heard == ["pause"]
    stage.tasks[0].step()
    assert stage.heard == ["pause", "pause"]
    stage.tasks[0].step()
    assert stage.heard == ["pause", "pause", "pause", "resume"]


def test_a_close_is_the_last_that_is_sent(stage: Stage) -> None:
    stage.seam.close(4321, "enough")
    stage.run()
    assert stage.sent == [{"type": "websocket.close", "code": 4321, "reason": "enough"}]
    assert not stage.write("late")


def test_a_close_waits_for_what_is_on_its_way(stage: Stage) -> None:
    stage.full = True
    stage.write("1", "2")
    stage.seam.close(1000, "")
    assert not stage.write("late")
    stage.run()
    assert stage.texts == ["1", "2", "close 1000"]


def test_a_second_close_does_nothing(stage: Stage) -> None:
    stage.full = True
    stage.seam.close(4001, "")
    stage.seam.close(4002, "")
    stage.run()
    stage.seam.close(4003, "")
    stage.run()
    assert stage.texts == ["close 4001"]


def test_a_peer_that_has_left_closes_the_seam(stage: Stage) -> None:
    stage.full = stage.gone = True
    stage.write("1", "2")
    stage.seam.close(1000, "")
    stage.run()
    assert stage.heard[-1] == "resume"  # what waits above is not kept waiting
    assert not stage.write("3")
    stage.seam.close(1000, "")
    stage.run()
    assert stage.sent == []


def test_an_abort_drops_what_is_on_its_way_and_the_transport(stage: Stage) -> None:
    stage.full = True
    stage.write("1")
    stage.tasks[0].step()  # it waits in the server now
    stage.seam.close(4000, "")
    stage.seam.abort()
    stage.run()
    assert stage.sent == []
    assert [task.done for task in stage.tasks] == [True]
    assert stage.aborted == 1
    assert not stage.write("3")


def test_an_abort_before_its_turn_leaves_nothing_to_send(stage: Stage) -> None:
    stage.write("1")
    stage.seam.close(4000, "")
    stage.seam.abort()
    stage.run()
    assert stage.sent == []
    assert stage.aborted == 1


def test_an_abort_in_the_turn_in_which_it_began_to_wait_ends_it(stage: Stage) -> None:
    stage.full = True
    stage.write("1")
    stage.tasks[0].waits = True  # the relay has not looked yet
    stage.tasks[0].step()
    stage.seam.abort()
    stage.seam.waits(stage.tasks[0])
    assert stage.tasks[0].done
    assert stage.sent == []


def test_an_idle_seam_is_aborted_too(stage: Stage) -> None:
    stage.seam.abort()
    assert stage.aborted == 1
    assert not stage.write("1")


def test_a_server_without_a_transport_to_drop_only_loses_its_writer() -> None:
    stage = Stage()
    seam = SendSeam(discard, cast("Relay", stage))
    seam.attach(stage)
    seam.deafen()
    seam.abort()
    assert not seam.write((ASGI.frame("1"),))
    assert (stage.aborted, stage.deafened) == (0, 0)


def test_a_deaf_seam_reads_nothing_before_its_close_and_nothing_after_it(stage: Stage) -> None:
    stage.seam.deafen()
    assert stage.deafened == 1
    stage.seam.close(4003, "enough")
    stage.run()
    assert stage.deafened == 2, "the server had begun to read again, for the peer's Close"


def test_a_seam_that_is_not_deaf_goes_on_reading_for_the_peers_close(stage: Stage) -> None:
    stage.seam.close(1000, "")
    stage.run()
    assert stage.deafened == 0


def test_a_transport_that_is_closing_need_not_stop_reading() -> None:
    def refuse() -> None:
        raise RuntimeError("Transport is closing")

    transport = types.SimpleNamespace(abort=lambda: None, pause_reading=refuse)
    assert stop_reading(types.SimpleNamespace(transport=transport))  # type: ignore[arg-type]
    assert not stop_reading(discard)


# Which seam a connection gets


async def discard(message: Message) -> None:
    """A server's ``send`` without a transport."""


@pytest.mark.anyio
async def test_a_server_that_brings_its_own_seam_is_asked_nothing_else() -> None:
    own = object()
    assert seam_for({"extensions": {SEAM_EXTENSION: own}}, discard, tasks()) is own


@pytest.mark.anyio
@pytest.mark.parametrize("scope", [{}, {"extensions": None}, {"extensions": {}}])
async def test_any_other_server_gets_the_seam_over_send(scope: dict[str, Any]) -> None:
    assert isinstance(seam_for(scope, discard, tasks()), SendSeam)


@pytest.mark.anyio
async def test_the_seam_over_send_drops_the_transport_that_send_belongs_to() -> None:
    server = Server()
    seam_for({}, server.send, tasks()).abort()
    assert server.transport.aborted == 1


# Finding the transport below send()


class Transport:
    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


class Server:
    def __init__(self) -> None:
        self.transport = Transport()

    async def send(self, message: Message) -> None:
        """Nobody reads."""


class Wrapper:
    """A middleware that keeps ``send`` on itself."""

    def __init__(self, send: Any) -> None:
        self._send = send

    async def __call__(self, message: Message) -> None:
        """Nobody reads."""


def closure(send: Any) -> Any:
    async def wrapped(message: Message) -> None:
        await send(message)

    return wrapped


@pytest.mark.parametrize("wrap", [lambda send: send, closure, partial, Wrapper, lambda send: closure(closure(send))])
def test_a_transport_is_found_below_wrappers(wrap: Callable[[Any], Any]) -> None:
    server = Server()
    assert abort_transport(wrap(server.send))
    assert server.transport.aborted == 1


def test_a_transport_is_found_below_a_decorated_function() -> None:
    server = Server()

    @wraps(server.send)
    async def decorated(message: Message) -> None:
        """It has no closure: ``__wrapped__`` leads on."""

    assert abort_transport(decorated)


def test_hypercorns_way_is_found() -> None:
    server = types.SimpleNamespace(writer=types.SimpleNamespace(transport=Transport()))
    assert abort_transport(server)  # type: ignore[arg-type]


def test_where_there_is_no_transport_nothing_is_done() -> None:
    assert not abort_transport(discard)


def test_a_transport_that_cannot_abort_is_none() -> None:
    assert not abort_transport(types.SimpleNamespace(transport=object()))  # type: ignore[arg-type]


def test_an_empty_cell_and_a_circle_of_wrappers_end_the_search() -> None:
    async def empty(message: Message) -> None:
        await unassigned(message)

    async def circle(message: Message) -> None:
        await circle(message)
        await empty(message)

    if not pytestmark:
        unassigned = discard
    assert not abort_transport(circle)


def test_the_search_is_bounded() -> None:
    server = Server()
    send: Any = server.send
    for _ in range(300):
        send = closure(send)
    assert not abort_transport(send)
    assert server.transport.aborted == 0
