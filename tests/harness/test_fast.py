"""Fast tests start nothing on the host: what would is left out, or fails and says which mark is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: A test of each kind that may be overlooked: marked, known by its fixture, and neither.
TESTS = """
from collections.abc import Iterator
import pytest
from tests.harness.service import Service

@pytest.fixture
def own() -> Iterator[Service]:
    with Service() as running:
        yield running

def test_fixture(own: Service) -> None: ...

@pytest.mark.root
def test_marked() -> None: ...

def test_unmarked() -> None:
    Service()

def test_fast() -> None: ...
"""


def test_selection(tmp_path: Path) -> None:
    """With `--fast`, tests that say that they need the host are left out, and one that does not say so fails."""
    (tmp_path / "test_it.py").write_text(TESTS)
    words = ["-m", "pytest", "--fast", "-p", "tests.conftest", "--rootdir", str(tmp_path), "-c", "/dev/null", "-p"]
    done = subprocess.run(
        [sys.executable, *words, "no:cacheprovider", tmp_path / "test_it.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert "1 failed, 1 passed, 2 deselected" in done.stdout, done.stdout + done.stderr
    assert "is marked with pytest.mark.root" in done.stdout
