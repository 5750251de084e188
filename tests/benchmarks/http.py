"""What an HTTP request pays for passing the middleware: `python -m tests.benchmarks.http`.

An ASGI app that does nothing, called bare and through `RealtimeMiddleware`, in turn, in many short rounds; the
difference of the lower quartiles is the price. A server, a router and a response would only hide it. Five seconds.
"""

from __future__ import annotations

import asyncio
import statistics
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starlette_rt import Realtime, RealtimeMiddleware, TokenSigner

ROUNDS, CALLS = 60, 20_000


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """The app behind the middleware."""


async def never() -> Message:
    """Nobody receives."""
    raise AssertionError


async def lost(message: Message) -> None:
    """Nobody sends."""


async def price(app: ASGIApp) -> float:
    """Microseconds of one call, in one round."""
    scope: Scope = {"type": "http", "path": "/", "headers": []}
    began = time.perf_counter()
    for _ in range(CALLS):
        await app(scope, never, lost)
    return (time.perf_counter() - began) / CALLS * 1e6


async def main() -> None:
    """Interleave the two and print the lower quartiles."""
    tokens = TokenSigner(["a-key-for-the-benchmark-of-32-bytes!"])
    wrapped = RealtimeMiddleware(nothing, realtime=Realtime(), tokens=tokens)
    rounds = [(await price(nothing), await price(wrapped)) for _ in range(ROUNDS)]
    bare, through = (statistics.quantiles(prices, n=4)[0] for prices in zip(*rounds, strict=True))
    print(f"bare {bare:.2f} µs, through the middleware {through:.2f} µs: {through - bare:.2f} µs for each HTTP request")


if __name__ == "__main__":
    asyncio.run(main())
