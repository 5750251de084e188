"""Fixtures that every test file may use: the event loops under test, nothing else."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Each async test runs on asyncio and on trio unless its module narrows this fixture."""
    return str(request.param)
