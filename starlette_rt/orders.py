"""What one node wants done on all of them: who is sent away, and who may come no more.

The law of this file: an order is done at once where it is given, and by every other node in the order of giving,
also by one that could not hear just then: orders are the publications of a hidden group with history. A node that
starts later has no need of them; who may come no more it learns from the ledger. It knows no connection.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from itertools import count
from typing import Literal

import anyio
import msgspec

from .backends.base import Broker, Ledger
from .exceptions import CloseCode, Unavailable
from .frames import encode
from .history import History, Position, Publication
from .loop import Handle, Tasks
from .streams import Streams

logger: logging.Logger = logging.getLogger("starlette_rt")

ORDERS = "\0orders"  # no group of a host can begin with a control character
KEPT = History(1000, 3600)
REVOKED = "revoked"
PAUSE = 1.0  # seconds between two attempts to hear of orders


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """Send away whom it names, with this code; ``revoke`` also says until when they may not come back."""

    do: Literal["disconnect", "revoke"]
    code: int
    reason: str = ""
    identity: str | None = None
    connection: str | None = None
    token: str | None = None
    until: float = 0.0

    @property
    def rule(self) -> str:
        """What is revoked."""
        return f"user:{self.identity}" if self.identity is not None else f"token:{self.token}"


class Orders:
    """Gives the orders of this node and hears those of the others; ``obey`` does one here."""

    def __init__(self, broker: Broker, ledger: Ledger, tasks: Tasks, obey: Callable[[Order], None]) -> None:
        self._broker, self._ledger, self._tasks, self._obey = broker, ledger, tasks, obey
        self._streams: Streams[bool] = Streams(broker, tasks, self._is_new, self._heard, self._broke)
        self._node = secrets.token_urlsafe(6)
        self._numbers = count(1)
        self._untold: dict[str, Publication] = {}  # revocations that could not be told, by what is revoked
        self._trying: Handle | None = None

    async def start(self) -> None:
        """Begin to hear, and learn who may come no more; where the backend is away, when it is back."""
        if self._broker.troubles() or not await self._catch_up():
            self._try()

    def _try(self) -> None:
        self._give_up()
        self._trying = self._tasks.spawn(self._keep_trying)

    def _give_up(self) -> None:
        if self._trying is not None:
            self._trying.cancel()

    async def _keep_trying(self) -> None:
        while not await self._catch_up():  # noqa: ASYNC110 - nobody says when it can be
            await anyio.sleep(PAUSE)

    async def _catch_up(self) -> bool:
        """Hear of orders from now on, know what was revoked and let it be known; false if that cannot be now."""
        try:
            await self._streams.follow(ORDERS, KEPT)
            await self._learn()
            await self._tell()
        except Unavailable:
            return False
        return True

    async def _learn(self) -> None:
        await self._ledger.load()
        for rule, until in self._ledger.revocations():
            kind, _, name = rule.partition(":")
            who = {"identity" if kind == "user" else "token": name}
            self._obey(Order("revoke", CloseCode.UNAUTHORIZED, REVOKED, until=until, **who))

    async def _tell(self) -> None:
        for rule, publication in tuple(self._untold.items()):
            await self._broker.publish(publication, KEPT)
            if self._untold.get(rule) is publication:
                del self._untold[rule]

    async def give(self, order: Order) -> None:
        """Do ``order`` here and have it done everywhere.

        Raises `Unavailable` if it was done here alone; a revocation is told later.
        """
        self._obey(order)
        data = msgspec.to_builtins(order)
        publication = Publication(ORDERS, self._node, data, encode(data), id=f"{self._node}{next(self._numbers):x}")
        try:
            await self._broker.publish(publication, KEPT)
        except Unavailable as error:
            if order.do == "revoke":
                self._untold[order.rule] = publication
                self._try()
            raise Unavailable(f"this node alone has done it: {error}") from None

    # What arrives.

    def receive(self, publication: Publication) -> None:
        """An order has arrived, perhaps not for the first time."""
        self._streams.receive(publication)

    def _is_new(self, publication: Publication, seen: bool) -> bool:
        return not seen and publication.event != self._node

    def _heard(self, publication: Publication, new: bool) -> None:
        if not new:
            return
        try:
            order = msgspec.convert(publication.data, Order)
        except msgspec.ValidationError as error:
            logger.warning("an order of another version is not understood: %s", error)
            return
        if order.do == "revoke":
            self._ledger.note(order.rule, order.until)
        self._obey(order)

    def _broke(self, group: str, position: Position) -> None:
        """Some may have been missed that nobody can tell us any more: who may come no more is read again."""
        self._try()

    def tick(self, now: float) -> None:
        """See to what is due; called about twice a second."""
        self._streams.tick(now)

    def recheck(self) -> None:
        """Delivery was interrupted: see what was missed."""
        self._streams.recheck()

    def close(self) -> None:
        """Hear no more."""
        self._give_up()
        self._streams.close()
