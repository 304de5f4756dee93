"""The isolation proof: whatever instances do, in whatever order, nobody is ever answered what is another's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.harness.machine import CHECKOUT
from tools.mutate import cover

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
    "pid and namespace number used again",
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


def walk(steps: int, *words: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Walk so many steps; `before` are words before the command."""
    command = [*before, *OWN_NAMESPACE, sys.executable, "-m", "tests.proof.walk", str(steps), *words]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    nowhere = subprocess.DEVNULL
    return subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False, stdin=nowhere
    )


@pytest.mark.timeout(300 + STEPS)
def test_no_answer_carries_a_byte_of_another_instance(record_property: Callable[[str, object], None]) -> None:
    """Every answer is exactly what its instance must be told, or a refusal.

    That holds across thousands of starts and ends, while names, PIDs and namespaces are used again, sources see
    containers of one name, and connections and streams are held open all the while.
    """
    happened: Counter[str] = Counter()
    # Of one walk hypothesis leaves some rules out, so what has to happen may need several.
    for _walk in range(8):
        walked = walk(STEPS)
        assert walked.returncode == 0, walked.stderr[-20_000:]
        happened.update(json.loads(walked.stdout))
        if all(happened[name] for name in HAPPENED):
            break
    for name, count in happened.items():
        record_property(name, count)
    assert happened["steps"] >= STEPS
    assert [name for name in HAPPENED if not happened.get(name)] == []


#: What is taken away, and what stands there then.
GUARDS = {
    "another run": ("guestapi/api/gate.py", "instance.run != caller.run or ", ""),
    "an init that has ended": ("guestapi/api/gate.py", " or not caller.init.alive()", ""),
    "another process of that PID": (
        "guestapi/callers/identify.py",
        "return live if started == init.start_time and live.alive() else None",
        "return live",
    ),
    "a caller that has ended": (
        "guestapi/callers/identify.py",
        "        return Caller(caller.credentials)\n",
        "        return caller\n",
    ),
    "an instance that has changed": (
        "guestapi/server/response_cache.py",
        "self._get_instance(self.key[0]) is instance and ",
        "",
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("guard", GUARDS)
def test_walk_notices_a_missing_guard(tmp_path: Path, guard: str) -> None:
    """Without any one of these guards somebody is told what is another's, and the walk finds it out."""
    file, there, instead = GUARDS[guard]
    source = (CHECKOUT / file).read_text()
    assert source.count(there) == 1
    walked = walk(
        20_000, "--no-shrink", before=cover(CHECKOUT / file, source.replace(there, instead).encode(), tmp_path)
    )
    assert walked.returncode != 0
    assert "state.teardown()" in walked.stderr, "found by the walk, by its steps"
