"""A pytest plugin for CI: a skipped test fails the run.

On a contributor's machine a test may be skipped for want of a browser or a server; CI has them all, so a skip there
means that something was not tested which everybody believes to be. Used as ``pytest -p tests.plugin_noskip``.
"""

from __future__ import annotations

import pytest


def _skipped(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", ())) if reporter else 0  # a worker of pytest-xdist reports to nobody


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turn a good end into a bad one if anything was skipped (or nothing else was collected)."""
    if _skipped(session.config) and exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say why the run fails though no test did."""
    if count := _skipped(config):
        terminalreporter.write_line(
            f"{count} skipped, and skipped tests are refused here (-p tests.plugin_noskip)", red=True
        )
