"""What becomes of an error in the host's own code: it is logged with its traceback, and not too often.

The law of this file: an exception of a handler is never swallowed and never floods a log. Each place in the
host's code is logged at most once a minute under the logger ``starlette_rt.handler``; the record says how
many were held back. No payload, no token and no identity is in the record: the traceback names the line.
"""

from __future__ import annotations

import logging
from types import TracebackType

logger = logging.getLogger("starlette_rt.handler")

PERIOD = 60.0  # seconds between two records of one place
MAX_PLACES = 256  # places remembered; a program with more has other troubles


class FaultLog:
    """Logs the failures of one process's handlers."""

    def __init__(self) -> None:
        self._places: dict[tuple[object, ...], tuple[float, int]] = {}

    def report(self, error: BaseException, handler: str, now: float) -> bool:
        """Log ``error`` of ``handler`` unless its place was logged within a minute; return whether it was."""
        place = place_of(error)
        last, held = self._places.get(place, (None, 0))
        if last is not None and now - last < PERIOD:
            self._places[place] = last, held + 1
            return False
        if len(self._places) >= MAX_PLACES:
            self._places.clear()
        self._places[place] = now, 0
        more = f" ({held} more in the last minute)" if held else ""
        logger.error("%s raised %s%s", handler, type(error).__name__, more, exc_info=error)
        return True


def place_of(error: BaseException) -> tuple[object, ...]:
    """Return what tells one bug from another: the type of the error and the line it came from."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return (type(error),)
    return type(error), trace.tb_frame.f_code.co_filename, trace.tb_lineno
