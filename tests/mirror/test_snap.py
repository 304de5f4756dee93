"""The LXD of the snap, whose directory is below /var/snap: its mirror, and what `guestapi check` says about it.

The daemon is Debian's LXD with the snap's directory, in a mount namespace of its own. There is no snapd.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.cli.mirror import SNAP_SOCKET
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.daemon import Daemon
from tests.harness.mirroring import MirrorProcess
from tests.harness.service import COMMAND, Service
from tests.mirror.host import MirrorHost

#: LXD's socket in its instances, where docs/incus.md puts guestapi's.
SOCKET = "/dev/lxd/sock"


@pytest.fixture
def snap() -> Iterator[tuple[Daemon, Service]]:
    """The daemon, and a service without a mirror."""
    with Service(workers=1, dialects=["lxd"]) as service, Daemon("lxd", str(Path(SNAP_SOCKET).parent)) as daemon:
        Writer(service.settings, create=True)
        yield daemon, service


def findings(daemon: Daemon, service: Service) -> dict[str, dict[str, object]]:
    """Return what `guestapi check` finds where the snap is, by check."""
    command = [*daemon.enter_mounts, str(COMMAND), "--config", str(service.config), "check", "--format", "json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return {one["check"]: one for one in json.loads(ran.stdout)}


@pytest.mark.root
def test_the_snap_is_found_and_mirrored(snap: tuple[Daemon, Service]) -> None:
    """`check` names a snap that nothing mirrors; with the mirror and the device of docs/incus.md, guestapi answers."""
    daemon, service = snap
    found = findings(daemon, service)["mirror lxd"]
    assert found["ok"]
    assert "guestapi-mirror-lxd-snap does not run" in str(found["text"])
    with MirrorProcess(service, "lxd", None, daemon.enter_mounts) as mirror:
        host = MirrorHost(daemon, service, mirror)
        place = [f"source={service.sockets['lxd'].parent}", f"path={Path(SOCKET).parent}"]
        daemon.client("profile", "device", "add", "default", "guestapi", "disk", *place)
        with host.launched("web", "-c", "user.foo=bar"):
            assert daemon.ask("web", "/1.0/config/user.foo", SOCKET).text == "bar"
            # LXD 5.0 itself tells its guests no state.
            assert json.loads(daemon.ask("web", "/1.0", SOCKET).text)["state"] == "Started"
            daemon.client("config", "set", "web", "user.foo=baz")
            host.wait(lambda: daemon.ask("web", "/1.0/config/user.foo", SOCKET).text == "baz")
            found = findings(daemon, service)["mirror lxd"]
            assert found["ok"]
            assert f"follows {SNAP_SOCKET}, 1 instances, 1 running" in str(found["text"])
            found = findings(daemon, service)["guest socket lxd"]
            assert found["ok"]
            assert "device: 1 of 1 running instances" in str(found["text"])


@pytest.mark.parametrize("words", [("incus", "--snap"), ("lxd", "--snap", "--socket", "/x")])
def test_snap_is_of_lxd(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Only LXD has a snap, and its socket is at one place."""
    ran = Guestapi(tmp_path)("mirror", *words)
    assert ran.code == 2
    assert "--snap is for lxd" in ran.err
