"""What becomes of an error in the host's own code: it is logged with its traceback, and not too often.

The law of this file: an exception of a handler is never swallowed and never floods a log. Each place in the
host's code is logged at most once a minute under the logger ``starlette_rt.handler``; the record says how
many were held back before it. We put no payload, no token and no identity into the record: the traceback
names the line, and what the exception says is the host's own word.
"""

from __future__ import annotations

import logging
import math
from types import TracebackType

logger: logging.Logger = logging.getLogger("starlette_rt.handler")

PERIOD = 60.0  # seconds between two records of one place
MAX_PLACES = 256  # places remembered, those logged last; a program with more has other troubles


class FaultLog:
    """Logs the failures of one process's handlers."""

    def __init__(self) -> None:
        self._places: dict[tuple[object, ...], tuple[float, int]] = {}

    def report(self, error: BaseException, now: float) -> bool:
        """Log ``error`` unless its place was logged within a minute; return whether it was."""
        place = place_of(error)
        last, held = self._places.get(place, (-math.inf, 0))
        if now - last < PERIOD:
            self._places[place] = last, held + 1
            return False
        self._places.pop(place, None)
        if len(self._places) >= MAX_PLACES:
            del self._places[next(iter(self._places))]  # the one logged longest ago: the order is that of the records
        self._places[place] = now, 0
        more = f" ({held} more since its last record)" if held else ""
        logger.error("%s raised %s%s", culprit(error), type(error).__name__, more, exc_info=error)
        return True


def culprit(error: BaseException) -> str:
    """Return the name of the host's function that ``error`` came through first."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] != __package__:
            return f"{module}.{trace.tb_frame.f_code.co_qualname}"
        trace = trace.tb_next
    return "a handler"


def place_of(error: BaseException) -> tuple[object, ...]:
    """Return what tells one bug from another: the type of the error, the host's line it came from, and its notes.

    A line of ours, which many handlers share, stands only where there is none of the host's.
    """
    line: tuple[object, ...] = ()
    trace: TracebackType | None = error.__traceback__
    hosts = False
    while trace is not None:
        ours = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == __package__
        if not (hosts and ours):
            line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        hosts = hosts or not ours
        trace = trace.tb_next
    return type(error), *line, *getattr(error, "__notes__", ())
