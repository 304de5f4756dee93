"""A power cut during writes: every acknowledged change is in the store after the next boot."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.machine import guests
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

WRITER = Path(__file__).with_name("inside") / "writer.py"
STORE = "/var/lib/guestapi/store.db"

#: Seconds that the writers write; ext4 flushes by itself after five (its commit interval).
SECONDS = 12.0

#: The operator's command; it writes two keys in one transaction.
_COMMAND = """
n=0
while n=$((n + 1)); do guestapi config set web1 user.command=$n user.command-twin=$n >/dev/null && echo $n; done
"""


class Acknowledged:
    """The last number of a writer that has arrived here."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.last = 0
        self._process = process
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # The machine may stop in the middle of a line.
            if line.endswith("\n"):
                self.last = int(line)

    def close(self) -> None:
        """Read the rest of the output."""
        self._thread.join()
        self._process.wait()


def test_nothing_acknowledged_is_lost(vm: VirtualMachine) -> None:
    """After a power cut with three writers the store is intact, with every acknowledged transaction."""
    # The first line of guestapi's command names its interpreter.
    python = vm.run("sh", "-c", 'head -n1 "$(readlink -f "$(command -v guestapi)")"').stdout.removeprefix("#!").split()
    vm.put(WRITER, "/root/writer.py")
    writers = {
        "user.first": Acknowledged(vm.spawn(*python, "/root/writer.py", "user.first")),
        "user.second": Acknowledged(vm.spawn(*python, "/root/writer.py", "user.second")),
        "user.command": Acknowledged(vm.spawn("sh", "-c", _COMMAND)),
    }
    until = time.monotonic() + 600
    while not all(writer.last for writer in writers.values()):
        assert time.monotonic() < until, {key: writer.last for key, writer in writers.items()}
        time.sleep(0.2)
    time.sleep(SECONDS)
    vm.cut_power()
    for writer in writers.values():
        writer.close()
    vm.start()
    assert vm.run("sqlite3", "-cmd", ".timeout 60000", STORE, "pragma integrity_check").stdout == "ok\n"
    listed = json.loads(vm.run("guestapi", "instance", "list", "--format", "json").stdout)
    (config,) = (one["config"] for one in listed if one["name"] == "web1")
    there = {key: int(config[key]) for key in writers}
    acknowledged = {key: writer.last for key, writer in writers.items()}
    assert {key: int(config[f"{key}-twin"]) for key in writers} == there
    assert {key for key in writers if there[key] < acknowledged[key]} == set(), (acknowledged, there)


def test_containers_are_answered_after_a_cut(vm: VirtualMachine) -> None:
    """After a power cut, containers that start at boot get their configuration as after any boot."""
    vm.script("rm -f /var/lib/lxc/web2/rootfs/asked; sync")
    vm.cut_power()
    vm.start()
    first = guests.first_act(vm, "/var/lib/lxc/web2/rootfs")
    assert (first.status, first.answer) == (200, "role of web2"), first
