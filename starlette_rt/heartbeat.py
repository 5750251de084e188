"""Who is still there: pings, and the end of those who answer none or say nothing for too long.

The law of this file: no timer of its own and no look at everybody. Each connection stands on a wheel under the
half second in which something is due for it, and whoever sweeps asks at each turn for what is due by now. Time
is an argument.
"""

from __future__ import annotations

from random import random
from typing import Protocol

from .exceptions import CloseCode, ConfigurationError

TICKS = 2  # slots of the wheel in a second
LATE = 6  # slots between two turns, from which on nobody is judged by what was heard


class Patient(Protocol):
    """What this asks of a connection. ``heard`` is set with every message that arrives."""

    heard: bool
    pinged: bool
    active_at: float
    due: int

    @property
    def answers_pings(self) -> bool: ...
    def ping(self) -> None: ...
    def begin_close(self, code: int, reason: str = "", /) -> None: ...
    def give_up(self, code: CloseCode, /) -> None: ...


class Heartbeats:
    """The wheel of one process.

    Each ``interval`` a peer that knows pings gets one, and has ``timeout`` to say anything at all. With ``idle``
    a peer that has said nothing but pongs for so long is closed. All in seconds. Raises `ConfigurationError` for
    times that cannot work.
    """

    def __init__(self, interval: float, timeout: float, idle: float | None) -> None:
        if not 0 < timeout <= interval:
            raise ConfigurationError("ping_timeout is a number of seconds, greater than 0 and at most ping_interval")
        if idle is not None and not idle > 0:
            raise ConfigurationError("idle_timeout is a number of seconds, greater than 0, or None")
        self.interval: float = interval
        self.timeout: float = timeout
        self.idle: float | None = idle
        self._wheel: dict[int, dict[Patient, None]] = {}
        self._turned: int | None = None

    def add(self, peer: Patient, now: float) -> None:
        """Begin to look after ``peer``; where many came at once, their pings are spread over half an interval."""
        peer.active_at = now
        if self._turned is None:
            self._turned = int(now * TICKS)
        if peer.answers_pings:
            self._put(peer, now + self.interval * (0.5 + random() / 2), now)
        elif self.idle is not None:
            self._put(peer, now + self.idle, now)

    def discard(self, peer: Patient) -> None:
        """Look after ``peer`` no longer."""
        slot = self._wheel.get(peer.due)
        if slot is not None:
            slot.pop(peer, None)

    def clear(self) -> None:
        """Forget everybody."""
        self._wheel.clear()
        self._turned = None

    def tick(self, now: float) -> None:
        """See to everybody for whom something is due."""
        last, self._turned = self._turned, int(now * TICKS)
        first = self._turned if last is None else last + 1
        late = self._turned - first > LATE
        for slot in range(first, self._turned + 1):
            for peer in self._wheel.pop(slot, ()):
                if late:  # the loop stood still: what they said meanwhile has not been read yet
                    self._put(peer, now, now)
                else:
                    self._see_to(peer, now)

    def _put(self, peer: Patient, when: float, now: float) -> None:
        if self.idle is not None and not peer.pinged:
            when = min(when, peer.active_at + self.idle)
        peer.due = int(max(when, now) * TICKS) + 1
        self._wheel.setdefault(peer.due, {})[peer] = None

    def _see_to(self, peer: Patient, now: float) -> None:
        if self.idle is not None and now - peer.active_at >= self.idle:
            return peer.begin_close(CloseCode.IDLE, CloseCode.IDLE.reason)
        if not peer.answers_pings:
            return self._put(peer, now + (self.idle or 0.0), now)
        if peer.pinged and not peer.heard:
            return peer.give_up(CloseCode.PING_TIMEOUT)
        if peer.pinged:
            peer.pinged = False
            return self._put(peer, now + self.interval - self.timeout, now)
        peer.pinged, peer.heard = True, False
        peer.ping()
        self._put(peer, now + self.timeout, now)
