"""What tests cost: the time of the processes that they start counts as theirs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

CHECKOUT = Path(__file__).parents[2]
TESTS = """
import subprocess, sys
BUSY = "import time\\nwhile time.process_time() < 0.3: pass"
def test_with_a_child():
    subprocess.run([sys.executable, "-I", "-S", "-c", BUSY], check=True, start_new_session=True)
def test_without():
    pass
"""


def test_children_count(tmp_path: Path) -> None:
    """A test has the processor time of a process that it starts, also in another session, and others have not."""
    (tmp_path / "test_it.py").write_text(TESTS)
    words = ["-p", "tools.costs", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        name: float(seconds) for seconds, name in re.findall(r"^ +([\d.]+)  \S*::(\w+)$", done.stdout, re.MULTILINE)
    }
    assert found["test_with_a_child"] >= 0.3
    assert found["test_without"] < 0.3
