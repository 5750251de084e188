"""No contender but the floor under them: redis-py's `publish`, heard by a redis-py subscriber in the load generator.

What must not live here: a WebSocket.
"""

from __future__ import annotations

import json
import os
from typing import Any

from redis.asyncio import Redis
from starlette.applications import Starlette

from tests.benchmarks.apps.control import Control
from tests.benchmarks.apps.stamp import stamped

client = Redis.from_url(os.environ["REDIS_URL"])


async def say(data: dict[str, Any]) -> None:
    """One message to the channel."""
    await client.publish("lobby", json.dumps(stamped(data), separators=(",", ":")))


app = Starlette(routes=Control(say, lambda: 0).routes())
