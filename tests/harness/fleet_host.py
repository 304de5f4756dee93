"""A machine that becomes a host of a fleet, as docs/fleet.md says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Protocol

from tests.harness.postgresql import Postgres

UNIT = "guestapi-fleet.service"
_TOML = "/etc/guestapi/guestapi.toml"
_FLEET = """[fleet]
url = "postgresql://localhost:{port}/{database}?hostaddr={address}"
host = "{name}"
certificate = "/etc/ssl/guestapi/fleet.crt"
key = "/etc/ssl/guestapi/fleet.key"
ca = "/etc/ssl/guestapi/fleet-ca.crt"
"""


class MachineCommands(Protocol):
    """A machine on which root runs commands."""

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program."""

    def write(self, path: str, content: str) -> Any:
        """Write a file, whose directory is there."""


def join(machine: MachineCommands, name: str, server: Postgres, database: str, lxcpath: str, address: str) -> None:
    """Have a machine, on which psycopg is installed, follow a fleet, and see containers of LXC.

    Args:
        machine: guestapi is installed there.
        name: of the host, which was added to the fleet.
        server: has the database.
        database: of the fleet.
        lxcpath: where its containers are. Machines that share a network need one each: monitors of LXC have abstract
            sockets that are named after it.
        address: at which the server is reached from the machine.
    """
    machine.run("mkdir", "-p", "/etc/ssl/guestapi", lxcpath)
    own = server.directory / name
    server.certificate(name, own)
    for source, target in (
        (f"{own}.crt", "fleet.crt"),
        (f"{own}.key", "fleet.key"),
        (server.directory / "ca.crt", "fleet-ca.crt"),
    ):
        machine.write(f"/etc/ssl/guestapi/{target}", Path(source).read_text())
    machine.run("chmod", "600", "/etc/ssl/guestapi/fleet.key")
    toml = machine.run("cat", _TOML).stdout
    fleet = _FLEET.format(port=server.port, database=database, address=address, name=name)
    toml = toml.replace("[fleet]\n", fleet).replace('paths = ["/var/lib/lxc"]', f'paths = ["{lxcpath}"]')
    machine.write(_TOML, toml)
    assert machine.run("guestapi", "fleet", "join").stdout.startswith(f"host {name} can follow fleet ")
    machine.run("systemctl", "enable", "--now", UNIT, "guestapi-lxc.service")
