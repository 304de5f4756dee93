#!/usr/bin/env python3
"""Checks whether this checkout can be released: tag, version, changelog and manual pages must agree.

    tools/release_check.py [CHECKOUT]

Prints one line for each contradiction, and exits with 1 if there is any. Needs an environment in which guestapi is
installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

#: The kinds of change of Keep a Changelog.
GROUPS = frozenset({"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"})

_SECTION = re.compile(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
#: What is in no release yet.
_UNRELEASED = "[Unreleased]"
_HEAD = re.compile(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)")


@dataclass(frozen=True)
class Release:
    """A section of the changelog.

    Attributes:
        version: its three numbers.
        day: the date of the release.
        groups: the titles in it, such as "Added".
        empty: the titles without entries.
    """

    version: tuple[int, int, int]
    day: date
    groups: tuple[str, ...]
    empty: tuple[str, ...]

    def __str__(self) -> str:
        """Return the version as text."""
        return ".".join(map(str, self.version))


def read_version(checkout: Path) -> str:
    """Return the version in guestapi/__init__.py."""
    found = re.search(r'^__version__ = "(.*)"$', (checkout / "guestapi/__init__.py").read_text(), re.MULTILINE)
    return found[1] if found else ""


def read_changelog(checkout: Path) -> tuple[list[Release], list[str]]:
    """Return the releases in docs/changelog.md, newest first, and the problems of their form."""
    releases, problems = [], []
    for place, (head, body) in enumerate(_SECTION.findall((checkout / "docs/changelog.md").read_text("utf-8"))):
        if head == _UNRELEASED and place == 0:
            continue
        matched = _HEAD.fullmatch(head)
        try:
            day = date.fromisoformat(matched[4]) if matched else None
        except ValueError:
            day = None
        if matched is None or day is None:
            problems.append(f"docs/changelog.md: '## {head}' is not '## [VERSION] - YEAR-MONTH-DAY'")
            continue
        parts = re.split(r"^### (.*)\n", body, flags=re.MULTILINE)
        titles, texts = tuple(parts[1::2]), parts[2::2]
        empty = tuple(
            title for title, text in zip(titles, texts, strict=True) if not re.search(r"^- ", text, re.MULTILINE)
        )
        version = (int(matched[1]), int(matched[2]), int(matched[3]))
        releases.append(Release(version, day, titles, empty))
    return releases, problems


def check_changelog(releases: Sequence[Release], version: str) -> Iterator[str]:
    """Yield contradictions between the version and the changelog, and in the order of its releases."""
    if not releases:
        yield "docs/changelog.md has no release"
        return
    if str(releases[0]) != version:
        yield f"guestapi/__init__.py has version {version}, but the newest in docs/changelog.md is {releases[0]}"
    for later, earlier in pairwise(releases):
        if later.version <= earlier.version or later.day < earlier.day:
            yield f"docs/changelog.md: {later} of {later.day} stands before {earlier} of {earlier.day}"
    for release in releases:
        if not release.groups:
            yield f"docs/changelog.md: {release} has no group; use {', '.join(sorted(GROUPS))}"
        for group in release.groups:
            if group not in GROUPS:
                yield f"docs/changelog.md: {release} has the group '{group}'; use {', '.join(sorted(GROUPS))}"
        for group in release.empty:
            yield f"docs/changelog.md: {release} has nothing under '{group}'"


def check_tags(checkout: Path, version: str) -> Iterator[str]:
    """Yield contradictions between version, changelog and git's tags, of this commit and of others."""
    tags = _git(checkout, "tag", "--list", "v[0-9]*").split()
    here = _git(checkout, "tag", "--list", "v[0-9]*", "--points-at", "HEAD").split()
    for tag in here:
        if tag != f"v{version}":
            yield f"this commit has the tag {tag}, but guestapi/__init__.py has version {version}"
    if here and f"## {_UNRELEASED}\n" in (checkout / "docs/changelog.md").read_text(encoding="utf-8"):
        yield f"this commit has the tag {here[0]}, but docs/changelog.md has '## {_UNRELEASED}'"
    if f"v{version}" in tags and f"v{version}" not in here:
        yield f"{version} was released already: the tag v{version} is of another commit"


def check_manuals(directory: Path, release: Release) -> Iterator[str]:
    """Yield contradictions between a release and the heads of manual pages.

    Args:
        directory: the directory that tools/manual.py has written.
        release: the changelog's newest release.
    """
    pages = sorted(directory.glob("*.[1-8]"))
    if not pages:
        yield "tools/manual.py writes no page"
    for page in pages:
        head = page.read_text(encoding="utf-8").partition("\n")[0]
        if not head.endswith(f'"{release.day}" "guestapi {release}"'):
            yield f"{page.name} begins with {head}, but the newest release is {release} of {release.day}"


def check(checkout: Path) -> list[str]:
    """Return all contradictions of a checkout."""
    version = read_version(checkout)
    releases, problems = read_changelog(checkout)
    problems += check_changelog(releases, version)
    problems += check_tags(checkout, version)
    if problems:
        return problems
    with tempfile.TemporaryDirectory() as directory:
        made = subprocess.run(
            [sys.executable, "tools/manual.py", directory], cwd=checkout, capture_output=True, text=True, check=False
        )
        if made.returncode != 0:
            return [f"tools/manual.py failed: {(made.stderr or made.stdout).strip()}"]
        return list(check_manuals(Path(directory), releases[0]))


def _git(checkout: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", checkout, *words], capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and check.

    Args:
        arguments: the command line without the program's name; default: this process's own.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).resolve().parents[1])
    checkout = parser.parse_args(arguments).checkout
    problems = check(checkout)
    print(*problems, sep="\n", end="\n" if problems else "")
    if not problems:
        version = read_version(checkout)
        print(f"version, changelog, manual pages and tags agree: {version}. To release it: git tag v{version}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
