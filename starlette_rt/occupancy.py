"""Whether anybody anywhere is in a group, for a host that wants to know when that begins and ends.

The law of this file: nodes are counted, not connections. A node with members of a group is present in a hidden
group beside it, as members are in theirs, so that a node that dies is taken out as they are; whoever fills or
empties that group, by its own doing or by taking out the dead, tells its host. What is told of one group on one
node comes one after the other, and what was undone before it could be told is not.
"""

from __future__ import annotations

import inspect
import secrets
from collections import deque
from collections.abc import Awaitable, Callable

from .backends.base import PresenceStore
from .loop import Tasks

HIDDEN = "\0occupied:"  # no group of a host can begin with a control character

Hook = Callable[[str], Awaitable[object] | object]


class Occupancy:
    """Calls ``occupied`` with a group when its first member on all nodes has come, ``vacated`` when its last has gone.

    ``fail`` is told what a hook raises.
    """

    def __init__(
        self,
        store: PresenceStore,
        tasks: Tasks,
        occupied: Hook | None,
        vacated: Hook | None,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._store, self._tasks, self._fail = store, tasks, fail
        self._hooks: dict[bool, Hook | None] = {True: occupied, False: vacated}
        self._node = secrets.token_urlsafe(9)
        self._here: dict[str, bool] = {}  # groups about which the store is being told, and what is so now
        self._untold: dict[str, deque[bool]] = {}  # groups about which the host is being told

    def crowd(self, group: str, occupied: bool) -> None:
        """A group has got its first member on this node or lost its last."""
        busy = group in self._here
        self._here[group] = occupied
        if not busy:
            self._tasks.spawn(self._keep, group)

    async def _keep(self, group: str) -> None:
        """Tell the store what is so, until it knows."""
        told: bool | None = None
        while told != self._here[group]:
            told = self._here[group]
            if told:
                await self._store.track(HIDDEN + group, self._node, self._node, {})
            else:
                await self._store.untrack(HIDDEN + group, self._node, self._node)
        del self._here[group]

    def counted(self, group: str, before: int, after: int) -> None:
        """The store has seen how many are present in ``group``, once for all nodes."""
        if group.startswith(HIDDEN) and bool(before) != bool(after):
            self._changed(group.removeprefix(HIDDEN), occupied=bool(after))

    def _changed(self, group: str, *, occupied: bool) -> None:
        untold = self._untold.get(group)
        if untold is None:
            self._untold[group] = deque([occupied])
            self._tasks.spawn(self._tell, group)
        elif untold and untold[-1] != occupied:
            untold.pop()
        else:
            untold.append(occupied)

    async def _tell(self, group: str) -> None:
        """Tell the host, one after the other."""
        untold = self._untold[group]
        while untold:
            hook = self._hooks[untold.popleft()]
            if hook is not None:
                await self._call(hook, group)
        del self._untold[group]

    async def _call(self, hook: Hook, group: str) -> None:
        try:
            outcome = hook(group)
            if inspect.isawaitable(outcome):
                await outcome
        except Exception as error:
            self._fail(error)
