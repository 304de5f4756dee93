"""The versions of gunicorn_h1c that tests run with: the installed one, and those from tools/parsers.

What guests receive must not depend on a parser's version. Tests of accepted and refused requests use the fixture
`parser` (tests/conftest.py), which runs them with each version. `ParserVersion.environment` makes a service use one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

NAME = "gunicorn_h1c"

#: The directories into which 'make test' and 'make test-fast' put other versions: in this environment, or in the one
#: around it.
DIRECTORIES = (Path(sys.prefix) / "parsers", Path(sys.prefix).parent / "parsers")


@dataclass(frozen=True)
class ParserVersion:
    """A version of gunicorn_h1c.

    Attributes:
        version: as in "0.6.10".
        directory: the directory to import it from; None: it is the installed one.
    """

    version: str
    directory: Path | None = None

    @property
    def environment(self) -> Mapping[str, str]:
        """Environment variables with which a Python program uses this version."""
        return {"PYTHONPATH": str(self.directory)} if self.directory else {}


def find_parsers() -> list[ParserVersion]:
    """Return the installed version, and the others from the directories."""
    installed = ParserVersion(version(NAME))
    found = [ParserVersion(each.name, each) for directory in DIRECTORIES for each in sorted(directory.glob("*"))]
    return [installed, *(each for each in found if each.version != installed.version)]


def load(parser: ParserVersion) -> ModuleType:
    """Import a version of gunicorn_h1c; ``import gunicorn_h1c`` still yields the installed one.

    Args:
        parser: one of `find_parsers`.

    Returns:
        the package.
    """
    if parser.directory is None:
        return importlib.import_module(NAME)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == NAME}
    sys.path.insert(0, str(parser.directory))
    try:
        return importlib.import_module(NAME)
    finally:
        sys.path.remove(str(parser.directory))
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
        sys.modules.update(kept)


@contextmanager
def use(parser: ParserVersion, module: ModuleType) -> Iterator[None]:
    """Let a module use a version of gunicorn_h1c for the length of the block.

    Args:
        parser: one of `find_parsers`.
        module: a module with ``from gunicorn_h1c import ...``.
    """
    installed, other = importlib.import_module(NAME), load(parser)
    names = [name for name in vars(module) if not name.startswith("__") and hasattr(installed, name)]
    replaced = {name: vars(module)[name] for name in names if vars(module)[name] is getattr(installed, name)}
    assert replaced, f"{module.__name__} imports nothing from {NAME}"
    for name in replaced:
        setattr(module, name, getattr(other, name))
    try:
        yield
    finally:
        for name, value in replaced.items():
            setattr(module, name, value)
