"""What every test file has: the event loops under test, and examples that are not timed."""

from __future__ import annotations

import hypothesis
import pytest

# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Each async test runs on asyncio and on trio unless its module narrows this fixture."""
    return str(request.param)
