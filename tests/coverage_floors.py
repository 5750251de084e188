"""The gate on coverage: every branch of floors 0 to 5, 94 % of each file that speaks to Redis, and 95 % in all.

Read from the JSON report of coverage.py: ``python -m tests.coverage_floors coverage.json``. The floors below the
facade are where a wrong branch loses messages in silence, so nothing is forgiven there. What answers a server that
dies in the middle of something is met by chance there, and only nearly all of it in each run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path, PurePath
from typing import Any

from tests.floors import FLOORS, PACKAGE

COMPLETE_UP_TO = 5
BY_CHANCE, OF_THAT = "backends/redis/", 94
IN_ALL = 95


def floor(file: str) -> int:
    """The floor of a file of the package; one that is in no table counts as the lowest."""
    parts = PurePath(file.replace("\\", "/")).with_suffix("").parts
    inside = parts[parts.index(PACKAGE) + 1 :]
    return FLOORS.get(".".join(inside[:-1] if inside[-1] == "__init__" else inside), 0)


def shortfalls(report: dict[str, Any]) -> list[str]:
    """What is missing, one sentence each; an empty list is a pass."""
    missing = [
        f"{file} (floor {floor(file)}) lacks lines {facts['missing_lines']}, branches {facts['missing_branches']}"
        for file, facts in sorted(report["files"].items())
        if floor(file) <= COMPLETE_UP_TO and not is_enough(file, facts)
    ]
    covered = report["totals"]["percent_covered"]
    if covered < IN_ALL:
        missing.append(f"{covered:.2f} % are covered in all, {IN_ALL} % are asked for")
    return missing


def is_enough(file: str, facts: dict[str, Any]) -> bool:
    """Whether as much of a file is covered as is asked for."""
    if BY_CHANCE in file.replace("\\", "/"):
        return bool(facts["summary"]["percent_covered"] >= OF_THAT)
    return not (facts["missing_lines"] or facts["missing_branches"])


def main(path: str) -> int:
    missing = shortfalls(json.loads(Path(path).read_text("utf-8")))
    print("\n".join(missing) or f"coverage: every branch of floors 0 to {COMPLETE_UP_TO}, over {IN_ALL} % in all")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
