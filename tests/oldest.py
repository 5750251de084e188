"""Print the lower bounds of pyproject.toml as pins, for the run of the tests on the oldest versions.

Read from there and written nowhere else, so that a bound which is raised is at once the one that is tested. The
package's own dependencies count, with those of its extras, and uvicorn, which the demo group bounds because one class
of ours stands on it.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

BOUND = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,]+\])?>=(?P<version>[\w.]+)")


def pins(pyproject: dict[str, Any]) -> list[str]:
    """The lower bounds as ``name==version``."""
    project = pyproject["project"]
    extras = [each for extra in project.get("optional-dependencies", {}).values() for each in extra]
    found = map(BOUND.match, [*project["dependencies"], *extras, *pyproject["dependency-groups"]["demo"]])
    return [f"{bound['name']}=={bound['version']}" for bound in found if bound]


if __name__ == "__main__":
    print("\n".join(pins(tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")))))
