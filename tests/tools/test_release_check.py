"""The release check: a checkout passes only if tag, version, changelog and manual pages agree."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import release_check
from tools.release_check import check

CHECKOUT = Path(__file__).parents[2]
CHANGELOG = """# Changelog

## [1.2.0] - 2026-11-26

### Added

- Something.

## [1.1.9] - 2026-11-25

### Fixed

- Something else.
"""
#: A substitute for tools/manual.py: writes pages with the version and date of `CHANGELOG`.
MANUAL = """import pathlib, sys
page = pathlib.Path(sys.argv[1]) / "guestapi.1"
page.write_text('.TH GUESTAPI 1 "2026-11-26" "guestapi 1.2.0"\\n')
"""


def git(checkout: Path, *words: str) -> None:
    """Run git with an identity of its own."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "-C", checkout, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of a project without contradictions."""
    for name, text in {
        "guestapi/__init__.py": '__version__ = "1.2.0"\n',
        "docs/changelog.md": CHANGELOG,
        "tools/manual.py": MANUAL,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "all")
    return tmp_path


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Return a mistake: another text in a file."""

    def mistake(checkout: Path) -> None:
        text = (checkout / file).read_text()
        assert old in text
        (checkout / file).write_text(text.replace(old, new))

    return mistake


def tag(name: str, *, later: bool = False) -> Callable[[Path], None]:
    """Return a mistake: a tag of the commit, or of the commit before with `later`."""

    def mistake(checkout: Path) -> None:
        git(checkout, "tag", name)
        if later:
            git(checkout, "commit", "-q", "--allow-empty", "-m", "more")

    return mistake


def test_agreement(checkout: Path) -> None:
    """A checkout without contradictions passes, with and without the tag."""
    assert check(checkout) == []
    git(checkout, "tag", "v1.2.0")
    git(checkout, "tag", "some-other-tag")
    assert check(checkout) == []


def test_what_is_in_no_release(checkout: Path) -> None:
    """Changes without a version may be there until the commit has the tag of a release."""
    replace("docs/changelog.md", "## [1.2.0]", "## [Unreleased]\n\n### Added\n\n- More.\n\n## [1.2.0]")(checkout)
    assert check(checkout) == []
    git(checkout, "tag", "v1.2.0")
    assert check(checkout) == ["this commit has the tag v1.2.0, but docs/changelog.md has '## [Unreleased]'"]


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (
            replace("guestapi/__init__.py", "1.2.0", "1.3.0"),
            "version 1.3.0, but the newest in docs/changelog.md is 1.2.0",
        ),
        (replace("docs/changelog.md", "[1.2.0] - 2026-11-26", "Unreleased"), "'## Unreleased' is not"),
        (replace("docs/changelog.md", "[1.1.9] - 2026-11-25", "[Unreleased]"), "'## [Unreleased]' is not"),
        (replace("docs/changelog.md", "2026-11-26", "2026-11-31"), "is not '## [VERSION] - YEAR-MONTH-DAY'"),
        (replace("docs/changelog.md", "[1.1.9]", "[1.2.1]"), "1.2.0 of 2026-11-26 stands before 1.2.1"),
        (replace("docs/changelog.md", "2026-11-25", "2026-11-27"), "stands before 1.1.9 of 2026-11-27"),
        (replace("docs/changelog.md", "### Added", "### News"), "has the group 'News'"),
        (replace("docs/changelog.md", "### Added\n", ""), "1.2.0 has no group"),
        (replace("docs/changelog.md", "- Something.\n", ""), "1.2.0 has nothing under 'Added'"),
        (replace("tools/manual.py", "guestapi 1.2.0", "guestapi 1.1.9"), "guestapi.1 begins with"),
        (replace("tools/manual.py", "2026-11-26", "2026-11-20"), "guestapi.1 begins with"),
        (replace("tools/manual.py", "page.write_text", "raise SystemExit"), "tools/manual.py failed"),
        (tag("v1.2.1"), "this commit has the tag v1.2.1"),
        (tag("v1.2.0", later=True), "1.2.0 was released already"),
    ],
)
def test_contradiction(checkout: Path, mistake: Callable[[Path], None], text: str) -> None:
    """Each contradiction is found, and reported in one sentence."""
    mistake(checkout)
    assert any(text in problem for problem in check(checkout)), check(checkout)


def test_exit_status(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 0 without contradictions, and with 1 and a report of them otherwise."""
    assert release_check.main([str(checkout)]) == 0
    assert "1.2.0" in capsys.readouterr().out
    replace("guestapi/__init__.py", "1.2.0", "1.3.0")(checkout)
    assert release_check.main([str(checkout)]) == 1
    assert "version 1.3.0" in capsys.readouterr().out


def test_this_checkout() -> None:
    """This checkout has no contradictions, except for tags, which a clone may lack."""
    version = release_check.read_version(CHECKOUT)
    releases, problems = release_check.read_changelog(CHECKOUT)
    assert [*problems, *release_check.check_changelog(releases, version)] == []
