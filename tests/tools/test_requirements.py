"""The lock files: the requirements of pyproject.toml with hashes, and one version of each package for all purposes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
CLIENT = tomllib.loads((CHECKOUT / "client/pyproject.toml").read_text())
#: The requirements of each purpose.
ASKED: dict[str, list[str]] = {
    "build": PYPROJECT["build-system"]["requires"],
    "run": PYPROJECT["project"]["dependencies"],
    "client": CLIENT["project"]["dependencies"],
    **PYPROJECT["project"]["optional-dependencies"],
}


def locked(purpose: str) -> dict[str, str]:
    """Return names and versions in a lock file; each entry must have a hash."""
    entries = re.split(r"\n(?=\S)", (CHECKOUT / f"requirements/{purpose}.txt").read_text())
    found = {}
    for entry in entries:
        if not entry.startswith("#"):
            requirement = re.match(r"(\S+)==(\S+)", entry)
            assert requirement, entry
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry
            found[requirement[1]] = requirement[2]
    return found


@pytest.mark.parametrize("purpose", ASKED)
def test_requirements_are_locked(purpose: str) -> None:
    """Each requirement of pyproject.toml is locked in a permitted version."""
    there = locked(purpose)
    for asked in map(Requirement, ASKED[purpose]):
        assert there[canonicalize_name(asked.name)] in asked.specifier, f"{asked}: run make lock"


def test_every_lock_has_a_purpose() -> None:
    """Every lock file belongs to an existing purpose."""
    assert {path.stem for path in (CHECKOUT / "requirements").glob("*.txt")} == set(ASKED)


def test_purposes_agree() -> None:
    """A package has the same version for all purposes, so that they can be installed together."""
    versions: dict[str, set[str]] = {}
    for purpose in ASKED:
        for name, version in locked(purpose).items():
            versions.setdefault(name, set()).add(version)
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}
