"""The house rules that a machine can hold, each with a made-up house that breaks it.

A rule is a small function from a folder to the sentences of what is wrong there; the first test of each asks the
package, the second shows that the rule would say no. The rules of taste are not here: they stand in docs/design.md.
"""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests import coverage_floors, oldest
from tests.floors import FLOORS, PACKAGE, circle, imports, modules, neighbours

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / PACKAGE


def house(folder: Path, **files: str) -> Path:
    """Build a made-up package; ``init=`` is its ``__init__`` and ``backends__memory=`` its ``backends/memory.py``."""
    for name, source in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path = path.with_stem("__init__") if path.stem == "init" else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, "utf-8")
    return folder


# Floors


def without_a_floor(package: Path, floors: dict[str, int]) -> list[str]:
    found = modules(package).keys()
    return [f"{name} stands on no floor" for name in sorted(found - floors.keys())] + [
        f"the floor of {name} has no such module" for name in sorted(floors.keys() - found)
    ]


def upward_imports(package: Path, floors: dict[str, int]) -> list[str]:
    return [
        f"{module} (floor {floors.get(module)}) imports {target} (floor {floors.get(target)})"
        for module, targets in neighbours(package).items()
        for target in sorted(targets)
        if floors.get(module, 0) < floors.get(target, 0)
    ]


def imports_of(package: Path, forbidden: frozenset[str], allowed: frozenset[str]) -> list[str]:
    """Run-time imports of ``forbidden`` modules outside the ``allowed`` modules of ours."""
    return [
        f"{module} imports {name}"
        for module, path in modules(package).items()
        if module not in allowed
        for name, typing_only in sorted(imports(path, module))
        if not typing_only and any(f"{name}.".startswith(f"{other}.") for other in forbidden)
    ]


STARLETTE_AT_THE_EDGE = frozenset({"starlette.endpoints", "starlette.responses", "starlette.websockets.WebSocket"})
THE_EDGE = frozenset({"middleware", "endpoints"})
OUTSIDE_WORLD = frozenset({"anyio", "asyncio", "redis", "socket", "starlette", "time", "trio"})
PURE_ROOMS = frozenset({"frames", "limits", "outbox", "presence", "protocols.framing", "protocols.plain"})


def test_every_module_has_a_floor_and_every_floor_its_modules() -> None:
    assert without_a_floor(HOUSE, FLOORS) == []


def test_a_module_without_a_floor_and_a_floor_without_its_module_are_found(tmp_path: Path) -> None:
    assert without_a_floor(house(tmp_path, stray=""), {"gone": 1}) == [
        "stray stands on no floor",
        "the floor of gone has no such module",
    ]


def test_a_module_imports_only_from_its_own_floor_and_below() -> None:
    assert upward_imports(HOUSE, FLOORS) == []


@pytest.mark.parametrize(
    "source",
    [
        "from starlette_rt.high import x",
        "from starlette_rt import high",
        "import starlette_rt.high",
        "from .high import x",
        "from . import high",
        "def f():\n    import starlette_rt.high",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from starlette_rt.high import x",
    ],
)
def test_an_import_from_a_higher_floor_is_found_however_it_is_written(tmp_path: Path, source: str) -> None:
    package = house(tmp_path, init="", low=source, high="")
    assert upward_imports(package, {"low": 1, "high": 2, "": 3}) == ["low (floor 1) imports high (floor 2)"]


def test_an_import_of_a_public_name_counts_as_one_of_the_package_itself(tmp_path: Path) -> None:
    package = house(tmp_path, init="", backends__init="", backends__memory="from .. import Realtime")
    assert neighbours(package)["backends.memory"] == {""}


def test_no_imports_run_in_a_circle() -> None:
    assert circle(neighbours(HOUSE)) == []


def test_a_circle_on_one_floor_is_found_also_through_typing(tmp_path: Path) -> None:
    typing = "if TYPE_CHECKING:\n    from starlette_rt.a import A"
    package = house(tmp_path, a="import starlette_rt.b", b="from .c import C", c=typing, d="from . import a", e="")
    assert circle(neighbours(package)) == ["a", "b", "c"]


def test_only_the_edge_imports_sockets_and_responses_of_starlette() -> None:
    assert imports_of(HOUSE, STARLETTE_AT_THE_EDGE, THE_EDGE) == []


def test_the_pure_rooms_know_neither_loop_nor_network_nor_clock() -> None:
    assert imports_of(HOUSE, OUTSIDE_WORLD, modules(HOUSE).keys() - PURE_ROOMS) == []


def test_a_forbidden_import_is_found_unless_it_is_for_typing(tmp_path: Path) -> None:
    typing = "if TYPE_CHECKING:\n    from starlette.websockets import WebSocket"
    package = house(tmp_path, hub="from starlette.websockets import WebSocket", realtime=typing, middleware="")
    assert imports_of(package, STARLETTE_AT_THE_EDGE, THE_EDGE) == ["hub imports starlette.websockets.WebSocket"]


# Files


FORBIDDEN_WORDS = {"channel", "config", "core", "helper", "helpers", "manager", "room", "topic", "types", "utils"}


def without_a_test_file(package: Path, tests: Path) -> list[str]:
    """Modules without a mirror.

    One in a folder may share the test file of its folder. One in a folder of a folder has a test file that is named
    after both, or shares that of a neighbour which imports it.
    """
    missing = []
    for module, path in modules(package).items():
        mirrors = _mirrors(module)
        exists = any((tests / mirror).exists() for mirror in mirrors) or _is_tested_with_a_neighbour(module, tests)
        if path.name != "__init__.py" and not exists:
            missing.append(f"{module} has no {' or '.join(mirrors)}")
    return missing


def _mirrors(module: str) -> list[str]:
    *folder, name = module.split(".")
    return [f"test_{part}.py" for part in (name, *folder)] if len(folder) < 2 else [f"test_{folder[-1]}_{name}.py"]


def _is_tested_with_a_neighbour(module: str, tests: Path) -> bool:
    *folder, _ = module.split(".")
    files = tests.glob(f"test_{folder[-1]}_*.py") if len(folder) > 1 else ()
    names = {name for file in files for found in imports(file, "") for name in (found.name, _parent(found.name))}
    return f"{PACKAGE}.{module}" in names


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def forbidden_names(package: Path) -> list[str]:
    return [module for module in modules(package) if FORBIDDEN_WORDS.intersection(re.split(r"[._]", module))]


def without_a_law(package: Path) -> list[str]:
    """Modules whose docstring is missing or a single line; an empty file has nothing to state."""
    missing = []
    for module, path in modules(package).items():
        source = path.read_text("utf-8")
        docstring = ast.get_docstring(ast.parse(source)) or ""
        if source.strip() and len(docstring.splitlines()) < 2:
            missing.append(module)
    return missing


def without_a_mark(tests: Path) -> list[str]:
    """Tests that no target would run, because they carry none of our marks."""
    return [
        f"{path.name}: {node.name}"
        for path in sorted(tests.rglob("test_*.py"))
        for tree in [ast.parse(path.read_text("utf-8"))]
        if not _marked(ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign))
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if node.name.lower().startswith("test") and not _marked(map(ast.unparse, node.decorator_list))
    ]


def _marked(sources: Iterator[str]) -> bool:
    return any(re.search(r"mark\.(unit|system|soak)\b", source) for source in sources)


def test_every_module_has_a_test_file() -> None:
    assert without_a_test_file(HOUSE, ROOT / "tests") == []


def test_a_module_without_a_test_file_is_found(tmp_path: Path) -> None:
    package = house(tmp_path / "package", init="", hub="", limits="", backends__memory="", backends__base="")
    tests = house(tmp_path / "tests", test_hub="", test_memory="")
    assert without_a_test_file(package, tests) == [
        "backends.base has no test_base.py or test_backends.py",
        "limits has no test_limits.py",
    ]


def test_a_module_deep_down_is_tested_under_the_name_of_its_folder_too(tmp_path: Path) -> None:
    parts = ("pipe", "replica", "nodes")
    package = house(tmp_path / "package", init="", pipe="", **{f"backends__redis__{part}": "" for part in parts})
    tests = house(tmp_path / "tests", test_pipe="", test_backends="", test_redis_presence=f"import {PACKAGE}.x")
    assert without_a_test_file(package, tests) == [
        f"backends.redis.{part} has no test_redis_{part}.py" for part in sorted(parts)
    ]
    house(tests, test_redis_pipe="", test_redis_presence=f"from {PACKAGE}.backends.redis.replica import Replica")
    house(tests, test_other=f"from {PACKAGE}.backends.redis import nodes")
    assert without_a_test_file(package, tests) == ["backends.redis.nodes has no test_redis_nodes.py"]


def test_no_module_has_a_name_that_means_anything() -> None:
    assert forbidden_names(HOUSE) == []


def test_a_name_that_means_anything_is_found(tmp_path: Path) -> None:
    package = house(tmp_path, utils="", hub="", test_helper="", helpers__x="", hubcore="")
    assert forbidden_names(package) == ["helpers.x", "test_helper", "utils"]


def test_every_module_states_its_law() -> None:
    assert without_a_law(HOUSE) == []


def test_a_module_that_states_no_law_is_found(tmp_path: Path) -> None:
    lawful = '"""What it is.\n\nAnd is not.\n"""\n'
    package = house(tmp_path, bare="x = 1\n", brief='"""What it is."""\n', lawful=lawful, empty="")
    assert without_a_law(package) == ["bare", "brief"]


def test_every_test_carries_a_mark() -> None:
    assert without_a_mark(ROOT / "tests") == []


def test_a_test_without_a_mark_is_found(tmp_path: Path) -> None:
    lost = "async def test_lost(): ...\n"
    house(tmp_path, test_a=f"pytestmark = pytest.mark.unit\n{lost}", test_b=f"@pytest.mark.slow\n{lost}")
    house(tmp_path, test_c=f"@pytest.mark.system\n{lost}", test_d="class TestLost: ...\ndef fixture(): ...\n")
    assert without_a_mark(tmp_path) == ["test_b.py: test_lost", "test_d.py: TestLost"]


# Functions


def function_lengths(package: Path) -> list[int]:
    """Lines of every function without its docstring."""
    functions = (
        node
        for path in modules(package).values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [_lines(node) - (_lines(node.body[0]) if ast.get_docstring(node) else 0) for node in functions]


def too_long(lengths: list[int]) -> list[str]:
    """A median of at most six lines, and at most thirty in nine of ten functions."""
    median = statistics.median(lengths)
    share = sum(length > 30 for length in lengths) / len(lengths)
    return [f"the median is {median} lines"] * (median > 6) + [f"{share:.0%} have over 30 lines"] * (share > 0.1)


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_are_short() -> None:
    assert too_long(function_lengths(HOUSE)) == []


def test_long_functions_are_found_and_docstrings_do_not_count(tmp_path: Path) -> None:
    documented = 'def f():\n    """One.\n\n    Two.\n    """\n    return 1\n'
    assert function_lengths(house(tmp_path, a=documented)) == [2]
    assert too_long([6] * 9 + [31]) == []
    assert too_long([7] * 8 + [31] * 2) == ["the median is 7.0 lines", "20% have over 30 lines"]


# The promise


def broken_promise(module: ModuleType) -> list[str]:
    """Names in ``__all__`` that cannot be imported, and public names that are not in it."""
    promised = set(module.__all__)
    public = {name for name in dir(module) if not name.startswith("_") and name != "annotations"}
    public = {name for name in public if not isinstance(getattr(module, name), ModuleType)}
    missing = {name for name in promised if not hasattr(module, name)}
    return sorted(f"{name} is missing" for name in missing) + sorted(
        f"{name} is not promised" for name in public - promised
    )


def versions(pyproject: str, changelog: str) -> tuple[str, str]:
    """The version of the package and the topmost one of the changelog."""
    topmost = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    return tomllib.loads(pyproject)["project"]["version"], topmost[1] if topmost else ""


def test_all_is_exactly_what_can_be_imported() -> None:
    assert broken_promise(importlib.import_module(PACKAGE)) == []


def test_a_broken_promise_is_found() -> None:
    module = ModuleType("made_up")
    vars(module).update(__all__=["Gone", "Kept"], Kept=1, Stray=2, pathlib=importlib.import_module("pathlib"))
    assert broken_promise(module) == ["Gone is missing", "Stray is not promised"]


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    package, changelog = versions(
        (ROOT / "pyproject.toml").read_text("utf-8"), (ROOT / "CHANGELOG.md").read_text("utf-8")
    )
    assert package == changelog


def test_a_changelog_of_another_version_is_found() -> None:
    assert versions('[project]\nversion = "2.0"', "# Changelog\n\n## 1.0 (unreleased)\n\n## 0.9\n") == ("2.0", "1.0")
    assert versions('[project]\nversion = "2.0"', "# Changelog\n") == ("2.0", "")


# What must not be in any file


# Spelled in two parts, so that this file does not contain what it looks for.
HOSTS = "|".join(
    re.escape(host) for host in ["pypi" + ".org", "files." + "pythonhosted", "registry." + "npmjs", "deb." + "debian"]
)
PRIVATE = re.compile(rf"(?<![\w.~-])/(?:work|root|home|tmp/w)/|{HOSTS}")


def files(root: Path) -> list[Path]:
    """What git tracks or would track; without git (an unpacked sdist), every file."""
    listing = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    paths = [root / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths or sorted(root.rglob("*")) if path.is_file()]


def private_lines(paths: list[Path]) -> list[str]:
    return [
        f"{path.name}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        if PRIVATE.search(line)
    ]


def test_no_file_names_a_path_of_one_machine_or_the_host_of_a_registry() -> None:
    assert private_lines(files(ROOT)) == []


def test_a_private_path_and_a_registry_are_found(tmp_path: Path) -> None:
    for name, line in {
        "a": "cd /wo" + "rk/x",
        "b": "https://pypi" + ".org/simple",
        "c": "docs/wo" + "rk/x ~/root/",
    }.items():
        (tmp_path / name).write_text(f"\n{line}\n", "utf-8")
    assert private_lines(sorted(files(tmp_path))) == ["a:2: cd /wo" + "rk/x", "b:2: https://pypi" + ".org/simple"]


# The instruments of CI


def report(*, branches: list[list[int]], total: float) -> dict[str, object]:
    """A coverage report with missing ``branches`` on floor 0, and some missing on a high floor."""
    return {
        "files": {
            "starlette_rt/exceptions.py": {"missing_lines": [], "missing_branches": branches},
            "starlette_rt/realtime.py": {"missing_lines": [1], "missing_branches": [[2, 3]]},
        },
        "totals": {"percent_covered": total},
    }


def test_full_coverage_of_the_lower_floors_and_most_of_the_rest_will_do() -> None:
    assert coverage_floors.shortfalls(report(branches=[], total=95.0)) == []


def test_a_missing_branch_below_and_too_little_in_all_are_found() -> None:
    assert coverage_floors.shortfalls(report(branches=[[7, -1]], total=94.99)) == [
        "starlette_rt/exceptions.py (floor 0) lacks lines [], branches [[7, -1]]",
        "94.99 % are covered in all, 95 % are asked for",
    ]


def test_of_what_a_dying_server_is_answered_with_nearly_all_is_asked_for() -> None:
    found = report(branches=[[7, -1]], total=99.0)
    facts = found["files"].pop("starlette_rt/exceptions.py")
    found["files"]["starlette_rt/backends/redis/pipe.py"] = {**facts, "summary": {"percent_covered": 94.0}}
    assert coverage_floors.shortfalls(found) == []
    facts["summary"] = {"percent_covered": 93.9}
    found["files"] = {"starlette_rt/backends/redis/pipe.py": facts}
    assert len(coverage_floors.shortfalls(found)) == 1


def test_the_lower_bounds_are_read_from_the_project() -> None:
    pyproject = {
        "project": {"dependencies": ["anyio>=4.11", "limits>=4.0,<6", "msgspec"]},
        "dependency-groups": {"demo": ["fastapi", "uvicorn[standard]>=0.50"], "test": [{"include-group": "demo"}]},
    }
    assert oldest.pins(pyproject) == ["anyio==4.11", "limits==4.0", "uvicorn==0.50"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("def test_a(): pass", 0),
        ("import pytest\n@pytest.mark.skip(reason='no browser')\ndef test_a(): pass", 1),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass\n", 1),
        ("import pytest\n@pytest.mark.xfail(strict=True)\ndef test_a(): assert False", 0),
    ],
    ids=["passed", "skipped", "module skipped", "xfailed"],
)
def test_a_skipped_test_fails_the_run_where_skips_are_refused(tmp_path: Path, body: str, status: int) -> None:
    path = house(tmp_path, test_made_up=f"{body}\n\ndef test_b(): pass\n") / "test_made_up.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.plugin_noskip",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
    ]
    run = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert run.returncode == status, run.stdout + run.stderr
    assert ("skipped tests are refused" in run.stdout) == bool(status)
