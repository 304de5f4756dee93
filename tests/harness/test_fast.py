"""Fast tests start nothing on the host: others are deselected, or fail with the name of the missing mark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: A test of each kind: with the fixture, with the mark, with neither, and one that starts nothing.
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
    """With `--fast`, tests with the mark or fixture are deselected, and a `Service` in any other test fails."""
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
