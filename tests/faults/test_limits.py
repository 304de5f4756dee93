"""A worker that has no descriptor left."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness.service import USER, Service
from tests.server.inside import talk, talks
from tests.server.test_worker import until

pytestmark = pytest.mark.root


def limit_descriptors(pid: int, soft: int) -> None:
    """Give a running worker another limit."""
    # A user may limit its own processes; for root it takes a capability that not every machine gives.
    become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    subprocess.run([*become, "prlimit", f"--pid={pid}", f"--nofile={soft}:"], check=True)


def test_no_descriptor_left() -> None:
    """Whoever has most connections loses some, the others are served, and the worker is not lost; then all goes on."""
    with (
        Service(workers=1, dialects=["incus"]) as service,
        service.container("c1", {"user.foo": "bar"}) as c1,
        service.container("c2", {"user.foo": "bar"}) as c2,
        talk(c2) as guest,
    ):
        assert guest.ask("/1.0/config/user.foo").text == "bar"
        before = service.workers
        directory = Path(f"/proc/{before[0]}/fd")
        limit_descriptors(before[0], max(int(path.name) for path in directory.iterdir()) + 4)
        with talks(c1, 12):
            until(lambda: "cannot accept" in service.log.read_text(), "a word to the operator")
            # Long enough for it to look after itself, which it does each second.
            time.sleep(1.5)
            assert guest.ask("/1.0/config/user.foo").text == "bar"
            checked = json.loads(service.command("check", "--format", "json", check=False).stdout)
            assert [one["check"] for one in checked if not one["ok"]] == ["socket incus"]
            limit_descriptors(before[0], 1024)
            assert c1.ask("/1.0/config/user.foo").text == "bar"
        assert service.workers == before
        assert "LimitNOFILE=" in service.log.read_text()
        assert "Traceback" not in service.log.read_text()
