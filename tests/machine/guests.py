"""Containers of LXC and systemd-nspawn on a virtual machine, whose init first requests its configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import rootfs
from tests.machine.virtual import VirtualMachine

#: The init of every container. It sends one request, and writes the uptime before and after it and the response to
#: /asked. Then it waits for the signal to end: see tests/harness/rootfs.py.
_INIT = r"""#!/bin/sh
read began rest </proc/uptime
url=http://x/1.0/config/user.role
answer=$(/usr/bin/curl -sS --max-time 600 -w ' %{http_code}' --unix-socket /dev/incus/sock $url 2>&1)
read ended rest </proc/uptime
echo "$began $ended $answer" >/asked.new
mv /asked.new /asked
trap 'exit 0' 30 37
while :; do
    sleep 1000 &
    wait
done
"""

#: $1: "lxc" or "nspawn"; then the names. Each gets a role with its own name, as in docs/lxc.md and docs/nspawn.md.
_MAKE = r"""
kind=$1; shift
for name; do
    case $kind in
    lxc)
        root=/var/lib/lxc/$name/rootfs
        mkdir -p "$root"
        printf '%s\n' "lxc.uts.name = $name" "lxc.rootfs.path = dir:$root" 'lxc.net.0.type = empty' 'lxc.autodev = 1' \
            'lxc.mount.auto = proc:mixed sys:ro' 'lxc.mount.entry = /usr usr none bind,ro 0 0' \
            'lxc.include = /etc/guestapi/lxc-guestapi.conf' >"/var/lib/lxc/$name/config"
        ;;
    nspawn)
        root=/var/lib/machines/$name
        mkdir -p "$root"
        # A container on the host's network asks as early as one can.
        mkdir -p /etc/systemd/nspawn
        printf '[Network]\nVirtualEthernet=no\n' >"/etc/systemd/nspawn/$name.nspawn"
        ;;
    esac
    cp -a /root/rootfs/. "$root"
    cp /root/first-act "$root/sbin/init"
    cp /root/load.py "$root/load.py"
done
# A process each, and there are two processors.
printf '%s\n' "$@" | xargs -P 2 -I '{}' guestapi instance add '{}' --config 'user.role=role of {}'
"""

#: The program that sends requests from a container all the time.
LOAD = Path(__file__).with_name("inside") / "load.py"


@dataclass(frozen=True)
class FirstAct:
    """The result of a container's first request; times in seconds of the machine's uptime."""

    began: float
    ended: float
    answer: str
    status: int


def prepare(vm: VirtualMachine) -> None:
    """Copy the parts of containers to the machine."""
    assert rootfs.__file__ is not None
    vm.put(Path(rootfs.__file__), "/root/rootfs.py")
    vm.put(_INIT.encode(), "/root/first-act", "0755")
    vm.put(LOAD, "/root/load.py")
    vm.run("python3", "-I", "/root/rootfs.py", "/root/rootfs")


def make(vm: VirtualMachine, kind: str, names: Sequence[str]) -> None:
    """Make containers, each an instance with a configuration of its own, without starting them.

    Args:
        vm: the machine, with guestapi installed.
        kind: "lxc" or "nspawn".
        names: the names of the containers.
    """
    vm.script(_MAKE, kind, *names, timeout=1800)


def first_act(vm: VirtualMachine, root: str) -> FirstAct:
    """Wait for the end of a container's first request.

    Args:
        vm: the machine.
        root: the container's root directory.

    Returns:
        the result.
    """
    vm.wait_until(f"[ -e {root}/asked ]", 660, "journalctl -b -n 60 --no-pager; guestapi instance list")
    text = vm.run("cat", f"{root}/asked").stdout
    found = re.fullmatch(r"(\S+) (\S+) (.*?) ?(\d{3})\n", text, re.DOTALL)
    assert found, text
    return FirstAct(float(found[1]), float(found[2]), found[3], int(found[4]))


def statuses(vm: VirtualMachine) -> dict[str, str]:
    """Return the status of each instance by its name, as the operator sees it."""
    listed = json.loads(vm.run("guestapi", "instance", "list", "--format", "json").stdout)
    return {one["name"]: one["status"] for one in listed}


@dataclass
class ContainerLoad:
    """The results of a container's continuous requests."""

    requests: int = 0
    failures: tuple[str, ...] = ()
    longest: float = 0.0


@contextmanager
def load(vm: VirtualMachine, name: str) -> Iterator[ContainerLoad]:
    """Have an LXC container send requests all the time, on kept connections and on new ones.

    Args:
        vm: the machine.
        name: the name of a running container.

    Yields:
        the results, which are filled in at the end.
    """
    root = f"/var/lib/lxc/{name}/rootfs"
    vm.run("rm", "-f", f"{root}/stop", f"{root}/started")
    outcome = ContainerLoad()
    asking = vm.spawn("lxc-attach", "--clear-env", "-n", name, "--", "/usr/bin/python3", "/load.py", f"role of {name}")
    try:
        vm.wait_until(f"[ -e {root}/started ]", 300)
        yield outcome
    finally:
        vm.run("touch", f"{root}/stop")
        output, _ = asking.communicate(timeout=900)
    found = json.loads(output)
    outcome.requests, outcome.failures, outcome.longest = (
        found["requests"],
        tuple(found["failures"]),
        found["longest"],
    )
