"""A client that was written from docs/protocol.md alone, and the server: every scenario, both spellings, both seams.

The law of this file: it puts together what stands elsewhere, ``tests.second_client`` and ``tests.speaking``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from starlette_rt import Identity
from tests.redises import RedisServer
from tests.second_client import Client, Spelling
from tests.servers import Server, serve
from tests.speaking import tokens
from tests.test_second_client import SCENARIOS, SPELLINGS, Scenario

pytestmark = [pytest.mark.system, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=["uvicorn", "uvicorn-rt", "redis"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    env = {"PING_INTERVAL": "1.5", "PING_TIMEOUT": "1.5"}
    with ExitStack() as stack:
        kind = request.param
        if kind == "redis":
            kind, env["REDIS_URL"] = "uvicorn-rt", stack.enter_context(RedisServer()).url
        server = stack.enter_context(serve("tests.speaking:app", kind, env=env))
        yield server
        log = server.log()
        assert "Traceback" not in log.replace("a bug in a handler", "") or "a bug in a handler" in log
        assert " WARNING " not in log


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_the_second_client_and_the_server_agree(scenario: Scenario, spelling: Spelling, server: Server) -> None:
    def make(*, who: str | None = None, **options: Any) -> Client:
        token = (lambda: tokens.sign(Identity(who))) if who is not None else None
        return Client(f"{server.url}/ws", **{"spelling": spelling, "token": token, **options})

    await scenario(make)
