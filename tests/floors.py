"""The floors of the house: which module stands where, and who imports whom.

This file holds the one table and reads imports from source without running it. What the rules are stands in
tests/test_house.py; tests/coverage_floors.py reads the table too. A module is named by its dotted path inside
the package, a row without a file is an error, and so is a file without a row.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "starlette_rt"

FLOORS: dict[str, int] = {
    "exceptions": 0,
    "metrics": 0,
    "loop": 0,
    "faults": 0,
    "history": 1,
    "identity": 1,
    "limits": 1,
    "outbox": 1,
    "presence": 2,
    "tokens": 2,
    "events": 2,
    "admission": 2,
    "frames": 3,
    "protocols": 4,
    "protocols.plain": 4,
    "protocols.bounds": 4,
    "protocols.v1": 4,
    "protocols.framing": 4,
    "backends": 4,
    "backends.base": 4,
    "backends.memory": 4,
    "backends.redis": 4,
    "backends.redis.broker": 4,
    "backends.redis.changes": 4,
    "backends.redis.connection": 4,
    "backends.redis.following": 4,
    "backends.redis.ledger": 4,
    "backends.redis.limits": 4,
    "backends.redis.nodes": 4,
    "backends.redis.pipe": 4,
    "backends.redis.presence": 4,
    "backends.redis.replica": 4,
    "backends.redis.subscriber": 4,
    "backends.redis.wire": 4,
    "seams": 4,
    "hub": 5,
    "connection": 5,
    "dialogue": 5,
    "feed": 5,
    "once": 5,
    "heartbeat": 5,
    "blocking": 5,
    "orders": 5,
    "occupancy": 5,
    "acceptance": 5,
    "gate": 5,
    "streams": 5,
    "realtime": 6,
    "middleware": 7,
    "endpoints": 7,
    "uvicorn": 8,
    "testing": 9,
    "testing.client": 9,
    "testing.server": 9,
    "": 10,  # the package's own __init__: it imports from everywhere, and nothing imports from it
}


class Import(NamedTuple):
    """One imported name, dotted from its top package; ``typing_only`` if it stands under ``if TYPE_CHECKING:``."""

    name: str
    typing_only: bool


def modules(package: Path) -> dict[str, Path]:
    """Every module below ``package`` by its dotted name; a package is named like its folder, the root ``""``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if _is_package(path) else parts)] = path
    return found


def imports(path: Path, module: str) -> set[Import]:
    """Every import in the file, wherever it stands; ``from a import b`` counts as ``a.b``, module or not."""
    tree = ast.parse(path.read_text("utf-8"))
    guarded = {id(inner) for node in ast.walk(tree) if _is_typing_guard(node) for inner in _body(node)}
    # The package that a single leading dot means.
    parts = [PACKAGE, *filter(None, module.split("."))]
    here = parts if _is_package(path) else parts[:-1]
    return {Import(name, id(node) in guarded) for node in ast.walk(tree) for name in _imported(node, here)}


def neighbours(package: Path) -> dict[str, set[str]]:
    """Who imports whom inside ``package``, typing included, by the names of ``modules()``."""
    known = modules(package)
    return {
        module: {_module_of(found.name, known) for found in imports(path, module) if _is_ours(found.name)} - {module}
        for module, path in known.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of ``graph`` in order, or an empty list."""
    left = dict(graph)
    while leaves := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in leaves:
            del left[module]
    # Everything left has a neighbour that is left too, so a walk must come back to where it was.
    walk: list[str] = []
    step = min(left, default=None)
    while step is not None and step not in walk:
        walk.append(step)
        step = min(left[step] & left.keys())
    return walk if step is None else walk[walk.index(step) :]


def _is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def _is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _body(node: ast.AST) -> Iterator[ast.AST]:
    for statement in getattr(node, "body", ()):
        yield from ast.walk(statement)


def _imported(node: ast.AST, here: list[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = here[: len(here) - node.level + 1] if node.level else []
        base = [*parents, *filter(None, [node.module])]
        yield from (".".join([*base, alias.name]) for alias in node.names)


def _module_of(name: str, known: dict[str, Path]) -> str:
    """The deepest module of ours that ``name`` names: the module itself, or the one that an attribute belongs to."""
    parts = name.split(".")[1:]
    while ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts)
