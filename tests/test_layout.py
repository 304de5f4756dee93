"""The layout of the package: which module may import which, and names that stand once."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import guestapi

PACKAGE = Path(guestapi.__file__).parent

#: The floors from the bottom to the top. A module imports from its own floor and from those below. A package stands for
#: all its modules, unless one of them is named itself.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "model", "encoding", "rate_limit", "journal", "dialects", "guest"}),
    frozenset({"names", "settings"}),
    frozenset({"systemd", "gunicorn_conf", "http"}),
    frozenset({"callers", "store"}),
    frozenset({"notifications"}),
    frozenset({"wsgi", "sources", "mirror"}),
    frozenset({"api"}),
    frozenset({"server"}),
    frozenset({"cli", "entry"}),
)

#: These packages contain only pure functions and values, so they import none of these modules.
PURE = {"http": {"socket", "gevent", "select", "subprocess"}, "notifications": {"socket", "gevent", "select"}}


def modules() -> dict[str, Path]:
    """Every module by its name below the package, like ``server.worker``; a package by its own name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = file
    return found


MODULES = modules()


def imported(file: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands: also in a function, and for typing alone."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    return {
        name: {
            inner
            for one in imported(file)
            if one.startswith("guestapi.") and (inner := one.removeprefix("guestapi.")) in MODULES and inner != name
        }
        for name, file in MODULES.items()
    }


GRAPH = graph()


def floor_of(module: str) -> int:
    """The floor on which a module stands."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, floor in enumerate(FLOORS):
            if ".".join(parts[:length]) in floor:
                return number
    raise AssertionError(f"{module} stands on no floor; add it to FLOORS")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_imported_from_above(module: str) -> None:
    """A module imports from its own floor and from lower ones."""
    above = {other for other in GRAPH[module] if floor_of(other) > floor_of(module)}
    assert not above, f"{module} imports from a floor above its own: {sorted(above)}"


def test_no_circle() -> None:
    """No module imports itself by way of others, not even for typing."""
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_class_names_stand_once() -> None:
    """A class name means one thing in the whole package."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name)
    assert not {name: where for name, where in found.items() if len(where) > 1}


@pytest.mark.parametrize("package", sorted(PURE))
def test_pure_packages(package: str) -> None:
    """Packages of pure functions import nothing that does I/O."""
    for name, file in MODULES.items():
        if name.split(".")[0] == package:
            bad = PURE[package] & {one.split(".")[0] for one in imported(file)}
            assert not bad, f"{name} imports {sorted(bad)}"
