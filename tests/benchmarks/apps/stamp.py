"""When a message was said: the publisher's clock in the message itself, for the benchmarks that measure delays.

What must live here: the clock that all processes of one machine share, and how a message of `Control` carries it
without becoming longer. What must not: a contender.
"""

from __future__ import annotations

import time
from typing import Any

EPOCH = 10**15  # added, so that a time has sixteen digits whenever the machine was started
STAMP = len('"at":1000000000000000,')


def now() -> int:
    """The monotonic clock in microseconds, plus `EPOCH`."""
    return EPOCH + time.monotonic_ns() // 1000


def stamped(data: dict[str, Any], due: int | None = None) -> dict[str, Any]:
    """The same message, as long as before, with the present time in it; with the time at which it was `due`, if late.

    Who speaks late because the server stood still would else call the message quick, and say fewer of them meanwhile.
    """
    return {"seq": data["seq"], "at": now() if due is None else min(due, now()), "pad": data["pad"][STAMP:]}
