"""One method for each fact worth counting; nothing here decides anything.

`Metrics` is the interface and does nothing: subclass it and hand it to `Realtime(metrics=…)` to feed a
metrics system. `Counters` is the default, plain integers in this process, read by `Realtime.stats()`.
Methods are called on the loop's thread and must neither block nor raise.
"""

from __future__ import annotations

from collections import defaultdict


class Metrics:
    """The facts of one process; each method is called once per fact and does nothing by default."""

    def connected(self) -> None:
        """A connection of ours was accepted."""

    def disconnected(self, code: int) -> None:
        """An accepted connection has ended with this close code."""

    def refused(self, status: int, code: str) -> None:
        """A handshake was refused with this HTTP status and error code."""

    def received(self, size: int) -> None:
        """A message of this many bytes arrived."""

    def rejected(self, code: str) -> None:
        """A message was answered with this error code."""

    def published(self) -> None:
        """A broadcast or push was accepted from the host's code."""

    def delivered(self, count: int) -> None:
        """So many messages were handed to connections."""

    def dropped(self, count: int) -> None:
        """So many queued messages were dropped or superseded for a slow peer."""

    def evicted(self, code: int) -> None:
        """A peer was given up with this close code because it could not keep up."""

    def aborted(self) -> None:
        """A transport was dropped because the peer did not finish the close in time."""

    def failed(self) -> None:
        """A handler of the host raised."""


class Counters(Metrics):
    """Counts every fact since it was made; ``totals`` has a name for each, dotted where it has a code."""

    def __init__(self) -> None:
        self.totals: defaultdict[str, int] = defaultdict(int)  # a `Counter` takes five times as long for one more

    def connected(self) -> None:
        self.totals["connected"] += 1

    def disconnected(self, code: int) -> None:
        self.totals["disconnected"] += 1
        self.totals[f"disconnected.{code}"] += 1

    def refused(self, status: int, code: str) -> None:
        self.totals["refused"] += 1
        self.totals[f"refused.{status}.{code}"] += 1

    def received(self, size: int) -> None:
        self.totals["received"] += 1
        self.totals["received_bytes"] += size

    def rejected(self, code: str) -> None:
        self.totals[f"rejected.{code}"] += 1

    def published(self) -> None:
        self.totals["published"] += 1

    def delivered(self, count: int) -> None:
        self.totals["delivered"] += count

    def dropped(self, count: int) -> None:
        self.totals["dropped"] += count

    def evicted(self, code: int) -> None:
        self.totals[f"evicted.{code}"] += 1

    def aborted(self) -> None:
        self.totals["aborted"] += 1

    def failed(self) -> None:
        self.totals["failed"] += 1
