"""guestapi as users get it: the package, built for the machine's own Debian, installed and upgraded with dpkg.

$GUESTAPI_INSTALL=tree installs the files of `make install` instead, as on other distributions.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.machine.image import CHECKOUT, DEBIAN_ROOT
from tests.machine.virtual import VirtualMachine

#: "deb" or "tree".
KIND = os.environ.get("GUESTAPI_INSTALL", "deb")

#: Run in the checkout, in a root of the machine's Debian.
_TREE = """
make install DESTDIR=/tmp/tree >/dev/null
tar -C /tmp/tree -czf /srv/out/guestapi.tar.gz .
"""

#: The steps that `make install` omits with DESTDIR.
_UNPACK = """
tar -C / -xzf /root/guestapi.tar.gz
systemd-sysusers guestapi.conf
chown guestapi:guestapi /var/lib/guestapi
systemctl daemon-reload
"""


@dataclass(frozen=True)
class Product:
    """The first version to install, and the second one for an upgrade."""

    first: Path
    second: Path

    def install(self, vm: VirtualMachine) -> None:
        """Install guestapi on a machine, without enabling more than the package does."""
        self._install(vm, self.first)

    def upgrade(self, vm: VirtualMachine) -> None:
        """Install the newer version, as `apt upgrade` does."""
        self._install(vm, self.second)
        if KIND == "tree":
            vm.run("systemctl", "reload-or-restart", "guestapi.service")

    def _install(self, vm: VirtualMachine, file: Path) -> None:
        if KIND == "tree":
            vm.put(file, "/root/guestapi.tar.gz")
            vm.script(_UNPACK, timeout=1800)
        else:
            vm.put(file, f"/root/{file.name}")
            vm.run("dpkg", "--install", f"/root/{file.name}", timeout=1800)


@contextmanager
def built(suite: str) -> Iterator[Product]:
    """Build guestapi of this checkout for a suite of Debian.

    Args:
        suite: Debian's name of it, such as "trixie".

    Yields:
        the files, which are removed afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="guestapi-product-", dir="/var/tmp") as name:
        directory = Path(name)
        if KIND == "tree":
            packages = subprocess.check_output([CHECKOUT / "tools/packages", "list", "debian"], text=True).split()
            run = [str(DEBIAN_ROOT), "run", suite, "--package", *packages, "--checkout"]
            subprocess.run([*run, f"--bind={directory}:/srv/out", "--", "sh", "-ec", _TREE], check=True)
            (file,) = directory.iterdir()
            yield Product(file, file)
        else:
            subprocess.run(["make", "-C", CHECKOUT, "deb", f"DEB_SUITES={suite}"], check=True)
            release = {"bookworm": "deb12", "trixie": "deb13"}[suite]
            files = (CHECKOUT / "dist").glob(f"guestapi_*+{release}_*.deb")
            file = max(files, key=lambda path: path.stat().st_mtime)
            yield Product(file, _renumber(file, directory))


def _renumber(file: Path, directory: Path) -> Path:
    """Pack the same files again as a newer version of the package."""
    unpacked = directory / "unpacked"
    subprocess.run(["dpkg-deb", "--raw-extract", file, unpacked], check=True)
    control = unpacked / "DEBIAN/control"
    text, replaced = re.subn(r"^(Version: .*)$", r"\1+newer", control.read_text(), flags=re.MULTILINE)
    assert replaced == 1
    control.write_text(text)
    newer = directory / "newer.deb"
    subprocess.run(
        ["dpkg-deb", "--build", "-Zgzip", "--root-owner-group", unpacked, newer], check=True, stdout=subprocess.DEVNULL
    )
    return newer
