"""What one check of a rate limit costs, from 10 to 1,000,000 keys: ``python -m tests.benchmarks.limits``.

The law of this file: it measures and prints, and asserts nothing. All sizes stay in memory together and
take turns in short rounds, forwards and backwards; the lower quartile of the rounds is shown, since noise
only ever adds. Users are drawn at random, so large sizes also pay for memory that is in no cache: the bare
dictionary in the same rounds shows how much. The fixed window of the `limits` library's async memory
storage runs at sizes where a round ends in reasonable time, with the turn of the loop its sweep needs.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from itertools import count as count_up
from pathlib import Path

if not __package__:  # run as a file, this folder would hide the library of the same name
    sys.path[0] = str(Path(__file__).parents[2])

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from starlette_rt.limits import Buckets, Meter, RateLimit

LIMIT = "1000000/day"  # never reached: every check is one that passes
SIZES = (10, 1_000, 100_000, 1_000_000)
LIBRARY_SIZES = {10: 1_000, 1_000: 200}  # keys: checks per round
ROUNDS = 15
CHECKS = 5_000

Round = Callable[[], Awaitable[float]]  # one round; microseconds per check


def rounds_of(action: Callable[[str], object], users: Callable[[], list[str]]) -> Round:
    """One round of ``action`` over the ``users`` chosen for it; choosing is not timed."""

    async def once() -> float:
        chosen = users()
        before = time.perf_counter()
        for user in chosen:
            action(user)
        return (time.perf_counter() - before) / len(chosen) * 1e6

    return once


def meter(size: int) -> tuple[list[str], Callable[[str], object]]:
    """``size`` users with an entry each, and the whole check as a connection makes it for every message."""
    place, buckets = Meter("bench", [RateLimit(LIMIT, per="user")]), Buckets(max_keys=size)
    users = [f"user-{number}" for number in range(size)]

    def check(user: str) -> float:
        return place.check({}, buckets, user, None, 100, 0.0)

    for user in users:
        check(user)
    return users, check


def known(size: int) -> Round:
    """Checks of users that have an entry."""
    users, check = meter(size)
    return rounds_of(check, lambda: random.choices(users, k=CHECKS))


def newcomers(size: int) -> Round:
    """Checks of users never seen, each of which takes the place of another: the dearest there is."""
    (_, check), serial = meter(size), count_up()
    return rounds_of(check, lambda: [f"new-{next(serial)}" for _ in range(CHECKS)])


def bare(size: int) -> Round:
    """A dictionary of the same keys and values, read and written once."""
    users = [f"user-{number}" for number in range(size)]
    entries = {"bench:0:user:" + user: (float(number),) for number, user in enumerate(users)}

    def touch(user: str) -> None:
        key = "bench:0:user:" + user
        entries[key] = (entries[key][0] + 1.0,)

    return rounds_of(touch, lambda: random.choices(users, k=CHECKS))


async def library(size: int, checks: int) -> Round:
    """The fixed window of `limits` over ``size`` known users."""
    limiter, limit = FixedWindowRateLimiter(MemoryStorage()), parse(LIMIT)
    users = [f"user-{number}" for number in range(size)]
    for user in users:
        await limiter.hit(limit, user)

    async def once() -> float:
        chosen = random.choices(users, k=checks)
        before = time.perf_counter()
        for user in chosen:
            await limiter.hit(limit, user)
            await asyncio.sleep(0)
        return (time.perf_counter() - before) / checks * 1e6

    return once


def bytes_per_key(size: int = 100_000) -> float:
    """What one entry takes in memory, its key included."""
    buckets, limit = Buckets(max_keys=size), RateLimit(LIMIT)
    tracemalloc.start()
    for number in range(size):
        buckets.hit(f"user-{number}", limit, 0.0)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / size


async def main() -> None:
    """Measure in interleaved rounds and print the table."""
    rounds: dict[tuple[str, int], Round] = {}
    for size in SIZES:
        rounds["ours, known keys", size] = known(size)
        rounds["ours, new key for old", size] = newcomers(size)
        rounds["a bare dictionary", size] = bare(size)
    for size, checks in LIBRARY_SIZES.items():
        rounds["limits, fixed window", size] = await library(size, checks)
    taken: dict[tuple[str, int], list[float]] = {name: [] for name in rounds}
    for number in range(ROUNDS):
        for name in list(rounds)[:: 1 if number % 2 else -1]:
            taken[name].append(await rounds[name]())
    print("µs per check" + " " * 12 + "".join(f"{size:>12,} keys" for size in SIZES))
    quartile = {name: statistics.quantiles(figures)[0] for name, figures in taken.items()}
    for size in SIZES:
        quartile["known less bare", size] = quartile["ours, known keys", size] - quartile["a bare dictionary", size]
    for row in dict.fromkeys(name for name, _ in quartile):
        cells = [quartile.get((row, size)) for size in SIZES]
        print(f"{row:24}" + "".join(f"{'-':>17}" if cell is None else f"{cell:>17.2f}" for cell in cells))
    print(f"one entry of ours: {bytes_per_key():.0f} bytes, key included")


if __name__ == "__main__":
    asyncio.run(main())
