"""At most once: what a repetition of a client's event meets, and how what came of it is known again.

The law of this file: an event with an id is handled when nobody has begun it, and answered as it was answered
before when somebody has. Who asks is the key together with the id, so nobody can answer for another. What a
handler publishes meanwhile is named after the event that it handles, so that a handler which ran one and a half
times still says each thing once. It knows no wire and no connection.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any, NamedTuple

import anyio
import msgspec
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocketDisconnect

from .backends.base import Claim, Ledger
from .exceptions import EventError, Unavailable
from .frames import printable
from .protocols.v1 import V1S

PACKED = V1S["rt.v1.msgpack"]  # how an answer is kept, whatever the asker speaks

ONCE = 3600.0  # seconds that an answer is kept
WAIT = 30.0  # seconds that a repetition waits for the first to end

INTERNAL = EventError("internal", "the server failed to handle this message")
UNKNOWN = EventError("outcome_unknown", "this event was begun, and nobody knows how it ended")


class Origin:
    """The event that is being handled; it names what is published meanwhile, in the order of publishing."""

    __slots__ = ("_count", "_key")

    def __init__(self, key: str) -> None:
        self._key = key
        self._count = 0

    def name(self) -> str:
        """Return the id of the next publication: the same in each run of the same event."""
        self._count += 1
        digest = blake2b(f"{self._key}\n{self._count}".encode("utf-8", "surrogatepass"), digest_size=9)
        return urlsafe_b64encode(digest.digest()).decode()


ORIGIN: ContextVar[Origin | None] = ContextVar("starlette_rt.origin", default=None)


class Outcome(NamedTuple):
    """What came of an event: plain data, and whether it was handled once on this node only, others not having heard."""

    data: Any
    local: bool = False


async def once(ledger: Ledger, key: str, run: Callable[[], Awaitable[Any]], *, rerun: bool) -> Outcome:
    """Return the plain data that ``run`` returns, or what it returned when ``key`` came first; so with refusals.

    Raises `EventError`: what the handler refused with, ``internal`` for one that failed, ``outcome_unknown`` for
    one that was begun and never ended (it runs again if ``rerun``), ``unavailable`` while it is still running.
    """
    claim = await ledger.claim(key, ONCE)
    while claim.state == "running":
        claim = await _ended(ledger, key)
    if claim.state == "answered":
        return Outcome(answer_of(claim.answer))
    if claim.state == "lost" and not rerun:  # unless whoever was thought to be gone has been faster
        return Outcome(answer_of(await ledger.settle(key, NOBODY_KNOWS, ONCE)))
    return Outcome(await _first(ledger, key, claim.holder, run, rerun), claim.local)


async def _ended(ledger: Ledger, key: str) -> Claim:
    """Wait until the one who has begun is done, and ask again."""
    if (await ledger.outcome(key, WAIT)).state == "running":
        raise EventError("unavailable", "this event is still being handled", retry_after=1.0)
    return await ledger.claim(key, ONCE)


async def _first(ledger: Ledger, key: str, holder: str, run: Callable[[], Awaitable[Any]], rerun: bool) -> Any:
    """Run, and leave a verdict whatever happens."""
    verdict: bytes | None = None if rerun else NOBODY_KNOWS
    token = ORIGIN.set(Origin(key))
    try:
        result = await run()
        verdict = bytes(PACKED.raw({"data": result}))
        return result
    except WebSocketDisconnect:
        raise  # the client left in the middle: how far it got is not known
    except Exception as error:
        verdict = verdict_of(error)
        raise
    finally:
        ORIGIN.reset(token)
        await conclude(ledger, key, holder, verdict)


async def conclude(ledger: Ledger, key: str, holder: str, verdict: bytes | None) -> None:
    """Keep the verdict, or let the next one be first; also for one that is cancelled meanwhile."""
    try:
        await _conclude(ledger, key, holder, verdict)
    except BaseException:  # a scope around the first attempt would cost as much as the rest
        with anyio.CancelScope(shield=True):
            await _conclude(ledger, key, holder, verdict)
        raise


async def _conclude(ledger: Ledger, key: str, holder: str, verdict: bytes | None) -> None:
    if verdict is None:
        await ledger.release(key, holder)
    else:
        await ledger.settle(key, verdict, ONCE)


def verdict_of(error: Exception) -> bytes | None:
    """Return the answer that is kept for what a handler raised; None for what may succeed when it is tried again."""
    if isinstance(error, Unavailable) or (isinstance(error, EventError) and error.temporary):
        return None
    if isinstance(error, HTTPException):
        return refusal(EventError(f"http_{error.status_code}", str(error.detail)))
    return refusal(error if isinstance(error, EventError) else INTERNAL)


def refusal(error: EventError) -> bytes:
    """Return the answer that says ``error``."""
    return bytes(PACKED.raw({"code": printable(error.code), "message": printable(error.message)}))


NOBODY_KNOWS = refusal(UNKNOWN)


def answer_of(answer: bytes) -> Any:
    """Return what the first one returned, or raise what it raised; that it was handled may be all that is known."""
    if not answer:
        raise EventError("outcome_unknown", "this event was handled, and its answer is not kept any more")
    verdict = msgspec.msgpack.decode(answer)
    if "code" in verdict:
        raise EventError(verdict["code"], verdict["message"])
    return verdict["data"]
