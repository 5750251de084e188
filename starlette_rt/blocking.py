"""The verbs of a `Realtime` for code that has no event loop: a script, a cron job, a worker of a task queue.

The law of this file: one thread runs the loop, every verb waits for its end, and nothing is decided here. What a
verb does and raises stands with its namesake.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from .backends.base import Published
from .exceptions import NotRunning
from .presence import Member

if TYPE_CHECKING:
    from .history import Position, Publication

T = TypeVar("T")


class Blocking:
    """A running `Realtime` whose verbs wait: ``with Realtime(url).blocking() as rt: rt.broadcast("news", data)``.

    May be used from several threads. At its end what was said has left, or a second has passed.
    """

    def __init__(self, realtime: Any) -> None:
        self._realtime = realtime  # a `Realtime`, which stands on a higher floor
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Blocking:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self._realtime))
            self._stack = stack.pop_all()
        self._portal = portal
        return self

    def __exit__(self, *_: object) -> None:
        self._portal = None
        self._stack.close()

    def broadcast(self, group: str, data: Any, event: str = "message", **options: Any) -> Published:
        """See `Realtime.broadcast`."""
        found: Published = self._wait(partial(self._realtime.broadcast, group, data, event, **options))
        return found

    def push(self, identity: str, data: Any, event: str = "message") -> Published:
        """See `Realtime.push`."""
        found: Published = self._wait(partial(self._realtime.push, identity, data, event))
        return found

    def online(self, identities: Iterable[str]) -> set[str]:
        """See `Realtime.online`."""
        found: set[str] = self._wait(partial(self._realtime.online, identities))
        return found

    def presence(self, group: str, *, after: str | None = None, limit: int | None = None) -> dict[str, Member]:
        """See `Realtime.presence`."""
        found: dict[str, Member] = self._wait(partial(self._realtime.presence, group, after=after, limit=limit))
        return found

    def count(self, group: str, connections: bool = False) -> int:
        """See `Realtime.count`."""
        found: int = self._wait(partial(self._realtime.count, group, connections))
        return found

    def history(self, group: str, last: int = 50) -> tuple[list[Publication], Position]:
        """See `Realtime.history`."""
        found: tuple[list[Publication], Position] = self._wait(partial(self._realtime.history, group, last))
        return found

    def position(self, group: str) -> Position:
        """See `Realtime.position`."""
        found: Position = self._wait(partial(self._realtime.position, group))
        return found

    def disconnect(self, identity: str | None = None, **options: Any) -> None:
        """See `Realtime.disconnect`."""
        self._wait(partial(self._realtime.disconnect, identity, **options))

    def revoke(self, identity: str | None = None, **options: Any) -> None:
        """See `Realtime.revoke`."""
        self._wait(partial(self._realtime.revoke, identity, **options))

    def _wait(self, call: Callable[[], Awaitable[T]]) -> T:
        """Have the loop do it. Raises `NotRunning` outside of the ``with``."""
        if self._portal is None:
            raise NotRunning("write `with rt.blocking() as rt:` around the work")
        return self._portal.call(call)
