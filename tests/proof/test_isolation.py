"""The isolation proof: whatever instances do, in whatever order, nobody is ever answered what is another's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.harness.machine import CHECKOUT

pytestmark = pytest.mark.root

#: How many steps the walk has; 100,000 take about a quarter of an hour: ``PROOF_STEPS=100000 pytest tests/proof``.
STEPS = int(os.environ.get("PROOF_STEPS", "2000"))
OWN_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
#: What has to have happened, often, for the walk to have proven anything.
HAPPENED = [
    "connections",
    "secrets",
    "namespace numbers used again",
    "pids used again on purpose",
    "asked after the pid was used again",
    "asked without an instance",
    "asked by another instance",
    "answered 200",
    "answered 401",
    "answered 403",
    "answered 500",
    "streams",
    "streams ended",
    "observed by lxc",
    "observed by podman",
    "observed by incus",
    "observations refused",
    "adopted",
    "released",
    "renamed by a source",
    "removed by a source",
    "bytes of events",
]


@pytest.mark.timeout(300 + STEPS)
def test_no_answer_carries_a_byte_of_another_instance(record_property: Callable[[str, object], None]) -> None:
    """Every answer is exactly what its instance must be told, or a refusal.

    That holds across thousands of starts and ends, while names, PIDs and namespaces are used again, sources see
    containers of one name, and connections and streams are held open all the while.
    """
    walk = subprocess.run(
        [*OWN_NAMESPACE, sys.executable, "-m", "tests.proof.walk", str(STEPS)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert walk.returncode == 0, walk.stderr[-20_000:]
    happened = json.loads(walk.stdout)
    for name, count in happened.items():
        record_property(name, count)
    assert happened["steps"] >= STEPS
    assert [name for name in HAPPENED if not happened.get(name)] == []
