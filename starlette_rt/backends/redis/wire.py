"""One open connection to Redis: bytes out, answers in.

The law of this file: redis-py opens the connection (the address, TLS, the user, the database) and is done with it
then; from there on the transport is ours, and hiredis alone reads what arrives, without a task and without a copy.
What an answer means is its owner's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, RedisError, ResponseError

Argument = bytes | str | int | float
Make = Callable[[], AbstractConnection]

pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]


class Refusal(Exception):
    """What Redis answers instead: a word for programs and a sentence."""

    @property
    def word(self) -> str:
        """The word: ``NOSCRIPT``, ``READONLY``, ``OOM``, ``ERR`` …"""
        return str(self).partition(" ")[0]


class Refused(Exception):
    """Redis is there and does not let us in, or not do what we must."""


class Wire(asyncio.Protocol):
    """An open connection: ``on_answer`` takes each answer, ``on_lost`` its end, ``on_room`` that there is room again.

    ``writer`` is what it was opened with; it is kept, because it would close the transport with its own end.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._transport = writer.transport
        self._parser = hiredis.Reader(protocolError=Refusal, replyError=Refusal)
        self.on_answer: Callable[[Any], None] = ignore
        self.on_lost: Callable[[], None] = nothing
        self.on_room: Callable[[], None] = nothing
        self.full: bool = False  # whether what is written waits here
        self.lost: bool = False
        self._transport.set_protocol(self)

    def write(self, commands: list[bytes]) -> None:
        """Write ``commands`` at once."""
        if not self._transport.is_closing():
            self._transport.write(b"".join(commands))

    def drop(self) -> None:
        """Let go of it now, with whatever it has not sent, and hear no more of it."""
        self.on_answer = ignore
        self._transport.abort()

    # What the loop calls.

    def data_received(self, data: bytes) -> None:
        """The hot loop: everything that has arrived, answer by answer."""
        self._parser.feed(data)
        gets = self._parser.gets
        try:
            while (answer := gets()) is not False:
                self.on_answer(answer)
        except Refusal:  # these bytes are no answers
            self.drop()

    def pause_writing(self) -> None:
        self.full = True

    def resume_writing(self) -> None:
        self.full = False
        self.on_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.on_lost()


async def opened(make: Make) -> Wire:
    """Return a new connection. Raises `Refused`, `OSError`, or `RedisError` for one that is not ready yet."""
    connection = make()
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        return Wire(taken(connection))
    except (AuthenticationError, ResponseError) as error:
        raise Refused(str(error)) from None
    finally:
        if connection._writer is not None:
            taken(connection).transport.abort()


def taken(connection: AbstractConnection) -> asyncio.StreamWriter:
    """Take the transport away from redis-py, which will neither close it nor complain that it is open."""
    writer, connection._reader, connection._writer = connection._writer, None, None
    assert writer is not None
    return writer


async def answers(wire: Wire, commands: list[bytes]) -> list[Any]:
    """Say ``commands`` and return their answers. Raises `OSError` if the connection is lost before."""
    found: list[Any] = []
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(answer: Any) -> None:
        found.append(answer)
        if len(found) == len(commands) and not done.done():
            done.set_result(None)

    def end() -> None:
        if not done.done():
            done.set_exception(ConnectionResetError("redis has closed the connection"))

    wire.on_answer, wire.on_lost = take, end
    wire.write(commands)
    if wire.lost:
        end()
    await done
    return found


def ignore(_: Any) -> None:
    """Nobody wants it."""


def nothing() -> None:
    """Nobody has to know."""


__all__ = ["Argument", "Make", "RedisError", "Refusal", "Refused", "Wire", "answers", "opened", "pack"]
