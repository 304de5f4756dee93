"""The isolation proof: in any order of events, no instance receives data of another one."""

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

#: The number of steps; 100,000 take about a quarter of an hour: ``PROOF_STEPS=100000 pytest tests/proof``.
STEPS = int(os.environ.get("PROOF_STEPS", "2000"))
OWN_NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
#: Events that must have occurred for the walk to be meaningful.
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
    "policies hidden",
    "policies secret",
    "policies once",
    "policies uids",
    "given once",
    "asked as a reader",
    "resumed",
    "answered 404",
    "waits",
    "waits that a change ended",
    "tokens of identity",
    "said",
    "asked for what was said",
    "announced",
    "cancelled",
    "acknowledged",
    "acknowledged again",
    "acknowledged by another",
    "acknowledged what is over",
    "asked for notices",
]


def walk(steps: int, *words: str, before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Walk that many steps; `before` is a prefix of the command."""
    command = [*before, *OWN_NAMESPACE, sys.executable, "-m", "tests.proof.walk", str(steps), *words]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    nowhere = subprocess.DEVNULL
    return subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False, stdin=nowhere
    )


@pytest.mark.timeout(300 + STEPS)
def test_no_answer_carries_a_byte_of_another_instance(record_property: Callable[[str, object], None]) -> None:
    """Every response is exactly the one for its instance, or a refusal.

    This holds over thousands of starts and ends, with reused names, PIDs and namespace numbers, sources with containers
    of the same name, and connections and streams that stay open.
    """
    happened: Counter[str] = Counter()
    # In each walk hypothesis leaves out some rules at random, so several walks may be needed for all events.
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


#: Guards: the file, the code that is removed, and its replacement.
GUARDS = {
    "another run": ("guestapi/api/gate.py", "instance.run != caller.run or ", ""),
    "an init that has ended": ("guestapi/api/gate.py", " or not (seen or caller.init.alive())", ""),
    "a look at each request": ("guestapi/api/gate.py", " and JUST_IDENTIFIED in environ", ""),
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
    "a value that was given": (
        "guestapi/store/rows.py",
        "SELECT key FROM spends WHERE instance_id = ? AND spent",
        "SELECT key FROM spends WHERE instance_id = ? AND 0",
    ),
    "a policy that hides": ("guestapi/key_policy.py", "    return rule.hidden or rule.once\n", "    return False\n"),
    "a user that a policy names": (
        "guestapi/api/gate.py",
        "return bool(uids) and caller.uid_inside in uids",
        "return bool(uids)",
    ),
    "whose attribute it is": (
        "guestapi/store/attributes.py",
        '"SELECT value FROM attributes JOIN instances ON id = instance_id WHERE id = ? AND uuid = ? AND path = ?"',
        '"SELECT value FROM attributes WHERE ? AND ? <> 0 AND path = ? ORDER BY written DESC"',
    ),
    "attributes that are not allowed": (
        "guestapi/api/resources/attributes.py",
        "    if ATTRIBUTES not in instance.allowed:\n",
        "    if not instance.id:\n",
    ),
    "whose notice it is": (
        "guestapi/store/notices.py",
        '"WHERE instance_id = ? AND notices.run = instances.run AND boot_id = ? AND due > ? ORDER BY due',
        '"WHERE ? <> 0 AND notices.run = instances.run AND boot_id = ? AND due > ? ORDER BY due',
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
    """Without any one of these guards an instance receives data of another one, and the walk detects it."""
    file, there, instead = GUARDS[guard]
    source = (CHECKOUT / file).read_text()
    assert source.count(there) == 1
    walked = walk(
        20_000, "--no-shrink", before=cover(CHECKOUT / file, source.replace(there, instead).encode(), tmp_path)
    )
    assert walked.returncode != 0
    assert "found by a step: " in walked.stderr, walked.stderr[-20_000:]
