"""A machine that becomes a host of a fleet, as docs/fleet.md says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Protocol

from tests.harness import witness
from tests.harness.certificates import Authority

UNIT = "guestapi-fleet.service"
_TRIES = 20
_TOML = "/etc/guestapi/guestapi.toml"
_FLEET = """[fleet]
url = "{url}"
host = "{name}"
certificate = "/etc/ssl/guestapi/fleet.crt"
key = "/etc/ssl/guestapi/fleet.key"
ca = "/etc/ssl/guestapi/fleet-ca.crt"
"""
#: A container whose init has a program ask for its configuration all the time; see tests/harness/witness.py.
_LXC = """lxc.uts.name = {name}
lxc.rootfs.path = dir:{root}
lxc.init.cmd = /sbin/init
lxc.net.0.type = empty
lxc.autodev = 1
lxc.mount.auto = proc:mixed sys:ro
lxc.mount.entry = /usr usr none bind,ro 0 0
lxc.include = /etc/guestapi/lxc-guestapi.conf
"""
_INIT = """#!/bin/sh
/usr/bin/python3 -I /witness.py /record 2>/errors &
trap 'exit 0' 30 37
while :; do
    sleep 1000 &
    wait
done
"""


class MachineCommands(Protocol):
    """A machine on which root runs commands."""

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program."""

    def write(self, path: str, content: str) -> Any:
        """Write a file, whose directory is there."""


def join(machine: MachineCommands, name: str, authority: Authority, url: str, lxcpath: str) -> None:
    """Have a machine, on which psycopg is installed, follow a fleet, and see containers of LXC.

    Args:
        machine: guestapi is installed there.
        name: of the host, which was added to the fleet.
        authority: whose certificates the server takes.
        url: of the fleet's database; `reached_at` makes one.
        lxcpath: where its containers are. Machines that share a network need one each: monitors of LXC have abstract
            sockets that are named after it.
    """
    machine.run("mkdir", "-p", "/etc/ssl/guestapi", lxcpath)
    own = authority.directory / name
    authority.certificate(name, own)
    for source, target in ((f"{own}.crt", "fleet.crt"), (f"{own}.key", "fleet.key"), (authority.own, "fleet-ca.crt")):
        machine.write(f"/etc/ssl/guestapi/{target}", Path(source).read_text())
    machine.run("chmod", "600", "/etc/ssl/guestapi/fleet.key")
    toml = machine.run("cat", _TOML).stdout
    toml = toml.replace("[fleet]\n", _FLEET.format(url=url, name=name))
    machine.write(_TOML, toml.replace('paths = ["/var/lib/lxc"]', f'paths = ["{lxcpath}"]'))
    # On a busy machine the server may take longer than the command waits.
    joined = ""
    for _ in range(_TRIES):
        joined = machine.run("guestapi", "fleet", "join", check=False).stdout
        if joined:
            break
    assert joined.startswith(f"host {name} can follow fleet ")
    machine.run("systemctl", "enable", "--now", UNIT, "guestapi-lxc.service")


def reached_at(address: str, port: int, database: str) -> str:
    """The URL of a server whose certificate is for localhost, at the address where the machine reaches it."""
    return f"postgresql://localhost:{port}/{database}?hostaddr={address}"


def make_container(machine: MachineCommands, lxcpath: str, name: str) -> str:
    """Make a container of LXC that records what it is told.

    Args:
        machine: where.
        lxcpath: has NAME/rootfs, as tests/harness/rootfs.py makes it.
        name: of the container.

    Returns:
        The path of the record.
    """
    root = f"{lxcpath}/{name}/rootfs"
    machine.write(f"{lxcpath}/{name}/config", _LXC.format(name=name, root=root))
    machine.write(f"{root}/sbin/init", _INIT)
    assert witness.__file__ is not None
    machine.write(f"{root}/witness.py", Path(witness.__file__).read_text())
    return f"{root}/record"
