"""A worker without free descriptors."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.service import USER, Service
from tests.server.inside import talk, talks

pytestmark = pytest.mark.root


def limit_descriptors(pid: int, soft: int) -> None:
    """Set another soft limit of descriptors for a running worker."""
    # A user may limit its own processes; root would need a capability that some machines do not give.
    become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    subprocess.run([*become, "prlimit", f"--pid={pid}", f"--nofile={soft}:"], check=True)


def test_no_descriptor_left() -> None:
    """The instance with most connections loses some, others are served, and the worker goes on with a raised limit."""
    with (
        Service(workers=1, dialects=["incus"]) as service,
        service.container("c1", {"user.foo": "bar"}) as c1,
        service.container("c2", {"user.foo": "bar"}) as c2,
        talk(c2) as guest,
    ):
        assert guest.ask("/1.0/config/user.foo").text == "bar"
        # The worker knows its init from now on, so four descriptors suffice for a connection of it.
        assert c1.ask("/1.0/config/user.foo").text == "bar"
        before = service.workers
        taken = {int(path.name) for path in Path(f"/proc/{before[0]}/fd").iterdir()}
        # The kernel gives the lowest number that is free; four are left.
        least = [number for number in range(1024) if number not in taken][4]

        def crowd() -> ExitStack | None:
            """Lower the limit and open connections; None if the worker's check, each second, came in between."""
            limit_descriptors(before[0], least)
            with ExitStack() as stack:
                stack.enter_context(talks(c1, 40))
                end = time.monotonic() + 3
                while time.monotonic() < end:
                    if "cannot accept" in service.log.read_text():
                        return stack.pop_all()
                    time.sleep(0.02)
            limit_descriptors(before[0], 1024)
            assert c1.ask("/1.0/config/user.foo").text == "bar"
            return None

        while (held := crowd()) is None:
            pass
        with held:
            # Time for the worker's periodic check, which comes each second.
            time.sleep(1.5)
            assert guest.ask("/1.0/config/user.foo").text == "bar"
            checked = json.loads(service.command("check", "--format", "json", check=False).stdout)
            assert [one["check"] for one in checked if not one["ok"]] == ["socket incus"]
            limit_descriptors(before[0], 1024)
            assert c1.ask("/1.0/config/user.foo").text == "bar"
        assert service.workers == before
        assert "LimitNOFILE=" in service.log.read_text()
        assert "Traceback" not in service.log.read_text()
