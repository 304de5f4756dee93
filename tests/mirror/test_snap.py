"""The LXD of the snap, whose directory is below /var/snap: its mirror, and what `guestapi check` says about it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guestapi.store.lookup import list_instances
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.service import COMMAND
from tests.mirror.stub import Stub

#: Seconds to wait for an expected state.
PATIENCE = 30.0
#: Run by /bin/sh in a mount namespace of its own: gives it the snap's layout, with a daemon's socket, then runs "$@".
LAYOUT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work"
mount -t overlay overlay -o "lowerdir=/var,upperdir=$1/upper,workdir=$1/work" /var
mkdir -p /var/snap/lxd/common/lxd
touch /var/snap/lxd/common/lxd/unix.socket
mount --bind "$2" /var/snap/lxd/common/lxd/unix.socket
shift 2
exec "$@"
"""


@pytest.fixture
def guestapi(tmp_path: Path) -> Guestapi:
    """The command, with an empty store."""
    command = Guestapi(tmp_path)
    Writer(command.settings, create=True)
    (tmp_path / "covered").mkdir()
    return command


def beside_the_snap(guestapi: Guestapi, *words: str) -> list[str]:
    """Return a command that runs guestapi where the snap is."""
    enter = ["unshare", "--mount", "/bin/sh", "-c", LAYOUT, "sh"]
    places = [str(guestapi.directory / "covered"), str(guestapi.directory / "daemon")]
    return [*enter, *places, str(COMMAND), "--config", str(guestapi.config), *words]


def findings(guestapi: Guestapi) -> dict[str, dict[str, object]]:
    """Return what `guestapi check` finds where the snap is, by check."""
    command = beside_the_snap(guestapi, "check", "--format", "json")
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return {one["check"]: one for one in json.loads(ran.stdout)}


@pytest.mark.root
def test_the_snap_is_found_and_mirrored(guestapi: Guestapi) -> None:
    """`check` names a snap that nothing mirrors; `mirror lxd --snap` mirrors it, and `check` names its units."""
    instance = {"name": "web", "type": "container", "status": "Stopped", "expanded_config": {"user.foo": "bar"}}
    with Stub(guestapi.directory / "daemon", {"/1.0/instances": [instance]}):
        found = findings(guestapi)["mirror lxd"]
        assert found["ok"]
        assert "guestapi-mirror-lxd-snap does not run" in str(found["text"])
        command = beside_the_snap(guestapi, "mirror", "lxd", "--snap")
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=sys.stderr.fileno()) as process:
            try:
                until = time.monotonic() + PATIENCE
                while not mirrored(guestapi):
                    assert time.monotonic() < until
                    time.sleep(0.05)
                assert mirrored(guestapi) == {"web": {"user.foo": "bar"}}
                found = findings(guestapi)["mirror lxd"]
                assert found["ok"]
                assert "follows /var/snap/lxd/common/lxd/unix.socket, 1 instances" in str(found["text"])
            finally:
                process.kill()


def mirrored(guestapi: Guestapi) -> dict[str, dict[str, str]]:
    """Return the configurations of the store's instances, by name."""
    with view(guestapi.settings.store.url) as store:
        return {one.name: dict(one.config) for one in list_instances(store)}


@pytest.mark.parametrize("words", [("incus", "--snap"), ("lxd", "--snap", "--socket", "/x")])
def test_snap_is_of_lxd(guestapi: Guestapi, words: tuple[str, ...]) -> None:
    """Only LXD has a snap, and its socket is at one place."""
    ran = guestapi("mirror", *words)
    assert ran.code == 2
    assert "--snap is for lxd" in ran.err
