"""The layout of the package: the permitted imports, and the uniqueness of class names."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import guestapi

PACKAGE = Path(guestapi.__file__).parent
CHECKOUT = Path(__file__).parents[1]

#: The levels from the lowest to the highest. A module imports from its own level and from lower ones. A package stands
#: for all its modules, except those that are named themselves.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            *("errors", "model", "records", "encoding", "rate_limit", "journal", "dialects", "switches", "defaults"),
            *("guest", "client", "key_policy", "audit", "audit_log"),
        }
    ),
    frozenset({"names", "settings", "known"}),
    frozenset({"systemd", "gunicorn_conf", "http", "relay", "identity"}),
    frozenset({"callers", "store"}),
    frozenset({"metrics"}),
    frozenset({"notifications"}),
    frozenset({"wsgi", "sources", "mirror", "fleet"}),
    frozenset({"api"}),
    frozenset({"server"}),
    frozenset({"cli", "entry"}),
)

#: Packages of pure functions and values, and the modules that they must not import.
PURE = {"http": {"socket", "gevent", "select", "subprocess"}, "notifications": {"socket", "gevent", "select"}}


def modules() -> dict[str, Path]:
    """Return every module by its name below the package, such as ``server.worker``; a package by its own name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = file
    return found


MODULES = modules()


def imported(file: Path) -> Iterator[str]:
    """Yield every module that a file imports anywhere, also in functions and for typing."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Return the modules of the package that each module imports."""
    return {
        name: {
            inner
            for one in imported(file)
            if one.startswith("guestapi.") and (inner := one.removeprefix("guestapi.")) in MODULES and inner != name
        }
        for name, file in MODULES.items()
    }


GRAPH = graph()


def level_of(module: str) -> int:
    """Return the level of a module."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, level in enumerate(LEVELS):
            if ".".join(parts[:length]) in level:
                return number
    raise AssertionError(f"{module} has no level; add it to LEVELS")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_imported_from_above(module: str) -> None:
    """A module imports from its own level and from lower ones."""
    above = {other for other in GRAPH[module] if level_of(other) > level_of(module)}
    assert not above, f"{module} imports from a level above its own: {sorted(above)}"


def test_no_circular_import() -> None:
    """There is no circle of imports, not even for typing."""
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def reached_by_workers() -> set[str]:
    """Return every module that a worker imports, also through others."""
    reached, new = set(), {"server.worker", "server.arbiter", "api.app", "store.reading"}
    while new:
        reached |= new
        new = {other for name in new for other in GRAPH[name]} - reached
    return reached


def test_workers_know_nothing_of_fleets() -> None:
    """No module of a worker imports `fleet`, not even through others; one module alone imports psycopg."""
    assert not [name for name in reached_by_workers() if name.startswith("fleet")]
    drivers = {name for name, file in MODULES.items() if "psycopg" in {one.split(".")[0] for one in runtime(file)}}
    assert drivers == {"fleet.engine"}


def test_workers_know_no_keys() -> None:
    """No module of a worker imports what signs, not even through others; two modules alone import the libraries."""
    assert {name for name in reached_by_workers() if name.startswith("identity")} == {"identity.messages"}
    libraries = {"jwt", "cryptography"}
    users = {name for name, file in MODULES.items() if libraries & {one.split(".")[0] for one in runtime(file)}}
    assert users == {"identity.keys", "identity.signer"}


def runtime(file: Path) -> Iterator[str]:
    """Yield every module that a file imports, but for typing."""
    tree = ast.parse(file.read_bytes())
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in typing:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in typing:
            yield node.module or ""


def test_class_names_are_unique() -> None:
    """A class name is defined once in the whole tree: package, tests, benchmarks and tools."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for place in ("guestapi", "tests", "benchmarks", "tools"):
        for file in (CHECKOUT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(str(file.relative_to(CHECKOUT)))
    assert not {name: where for name, where in found.items() if len(where) > 1}


@pytest.mark.parametrize("package", sorted(PURE))
def test_pure_packages(package: str) -> None:
    """Packages of pure functions do not import modules for I/O."""
    for name, file in MODULES.items():
        if name.split(".")[0] == package:
            bad = PURE[package] & {one.split(".")[0] for one in imported(file)}
            assert not bad, f"{name} imports {sorted(bad)}"
