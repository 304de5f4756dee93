"""`guestapi check` on what virtual machines need: the relay, and the handover socket."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import Guestapi
from tests.harness.vmm import Vmm

#: Says that the units in $ACTIVE are active, which are patterns of the shell.
_SYSTEMCTL = """#!/bin/sh
case $1 in is-active) case " $ACTIVE " in *" $2 "*) echo inactive; echo active;; *) echo inactive;; esac;; esac
"""
VSOCK, HYBRID = "guestapi-vsock.socket", "guestapi-hybrid@*.socket"
Look = Callable[..., tuple[bool, str] | None]


@pytest.fixture
def look(guestapi: Guestapi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Returns what `guestapi check` finds while the given units are active."""
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(_SYSTEMCTL)
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("guestapi.cli.relay._DEVICE", tmp_path / "vhost-vsock")
    with guestapi.config.open("a") as file:
        file.write(f'[[listener]]\npath = "{tmp_path / "handover"}"\ndialect = "handover"\n')

    def find(*active: str) -> tuple[bool, str] | None:
        monkeypatch.setenv("ACTIVE", " ".join(active))
        found = {one["check"]: one for one in json.loads(guestapi("check", "--format", "json").out)}
        return (found["relay"]["ok"], found["relay"]["text"]) if "relay" in found else None

    guestapi.good("instance", "add", "c1")
    return find


def told(found: tuple[bool, str] | None, ok: bool, *words: str) -> bool:
    """Whether a finding says this."""
    return found is not None and found[0] is ok and all(word in found[1] for word in words)


def test_a_host_without_virtual_machines(look: Look, tmp_path: Path) -> None:
    """Nothing is said of a relay where nothing has to do with virtual machines."""
    assert look() is None
    (tmp_path / "vhost-vsock").touch()
    assert told(look(), True, "0 virtual machines known, 0 running", f"systemctl enable --now {VSOCK}")


def test_a_machine_that_does_not_run(guestapi: Guestapi, look: Look, tmp_path: Path) -> None:
    """While none runs, a relay that is off is no failure; without the handover socket one that is on is."""
    guestapi.good("instance", "add", "vm", "--type", "virtual-machine")
    assert told(look(), True, "1 virtual machines known, 0 running", VSOCK)
    assert told(look(VSOCK), False, str(tmp_path / "handover"), "systemctl restart guestapi-handover.socket")
    (tmp_path / "handover").touch()
    assert told(look(VSOCK), True, f"{VSOCK} is active")
    assert told(look(HYBRID), True, "guestapi-hybrid@.socket is active")


@pytest.mark.root
def test_a_machine_that_runs(guestapi: Guestapi, look: Look, tmp_path: Path) -> None:
    """While one runs that cannot ask, it is a failure, and the hint starts what is missing."""
    guestapi.good("instance", "add", "vm", "--type", "virtual-machine")
    (tmp_path / "handover").touch()
    with Vmm("guest-cid=42") as vmm:
        guestapi.good("instance", "register", "vm", "--cid", "42", "--pid", str(vmm.pid))
        assert told(look(), False, "1 running", f"systemctl enable --now {VSOCK}")
        assert told(look(HYBRID), False, "1 running", f"systemctl enable --now {VSOCK}")
        assert told(look(VSOCK), True, "1 running")
        guestapi.good("instance", "unregister", "vm")
        guestapi.good("instance", "register", "vm", "--hybrid-vsock", "--pid", str(vmm.pid))
        assert told(look(VSOCK), False, "hybrid", "virtual-machines.md")
        assert told(look(HYBRID), True, "1 running")
    assert told(look(), True, "0 running")
