"""The JavaScript client: its own tests run here, and it stays small, typed and alone.

The law of this file: what the client does is tested in tests/js, in its own language; here is only what a Python
person would otherwise forget to run. Without a Node.js of version 22 or later there is nothing to run it with.
"""

from __future__ import annotations

import gzip
import re
import subprocess
from pathlib import Path

import pytest

from tests.nodes import find

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "starlette_rt" / "statics" / "starlette-rt.js"
TYPES = CLIENT.with_suffix(".d.ts")
TESTS = ROOT / "tests" / "js"
LARGEST = 16_384  # bytes of the gzipped client
FEWEST = 150  # tests: a pattern that matches no file would pass as well

EXPORTED = re.compile(r"^export (?:declare )?(?:async )?(?:abstract )?(?:class|function|const|let) (\w+)", re.MULTILINE)


@pytest.fixture(scope="module")
def node() -> Path:
    return find()


def summary(output: str) -> dict[str, int]:
    """The counts that the test runner of Node.js ends with."""
    return {name: int(count) for name, count in re.findall(r"^# (\w+) (\d+)$", output, re.MULTILINE)}


def exports(source: str) -> set[str]:
    return set(EXPORTED.findall(source))


def test_the_tests_of_the_client_pass(node: Path) -> None:
    command: list[str | Path] = [node, "--test", "--test-reporter=tap", f"{TESTS.as_posix()}/*.test.mjs"]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=280, check=False)
    counts = summary(run.stdout)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert (counts["fail"], counts["cancelled"], counts["skipped"], counts["todo"]) == (0, 0, 0, 0)
    assert counts["pass"] >= FEWEST


def test_a_failing_test_of_the_client_would_be_noticed(node: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.test.mjs"
    broken.write_text('import { test } from "node:test"; test("no", () => { throw new Error("no"); });', "utf-8")
    command: list[str | Path] = [node, "--test", "--test-reporter=tap", str(broken)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, summary(run.stdout)["fail"]) == (1, 1)


def test_the_client_is_small() -> None:
    assert len(gzip.compress(CLIENT.read_bytes(), mtime=0)) <= LARGEST


def test_the_client_stands_alone() -> None:
    source = CLIENT.read_text("utf-8")
    assert re.findall(r"^\s*import\b|\bimport\(|\brequire\(", source, re.MULTILINE) == []


def test_every_exported_name_has_a_type() -> None:
    names = exports(CLIENT.read_text("utf-8"))
    assert names >= {"connect", "RealtimeError"}
    assert names - exports(TYPES.read_text("utf-8")) == set()


def test_an_export_without_a_type_would_be_found() -> None:
    source, types = "export function connect() {}\nexport class Other {}", "export function connect(): void;"
    assert exports(source) - exports(types) == {"Other"}
