"""The source libvirt with a real libvirtd, and the follower of its domains."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.harness.followers import RealFollower, instances, status
from tests.harness.libvirt import Libvirt
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import until

pytestmark = pytest.mark.root

VSOCK = "<vsock model='virtio'><cid auto='no' address='42'/></vsock>"

#: Prints what the source sees.
_LOOK = """
import json
from guestapi.settings import Settings
from guestapi.sources.libvirt import LibvirtSource
print(json.dumps([[type(one).__name__, one.key] for one in LibvirtSource(Settings()).observe({})]))
"""


@pytest.fixture(scope="module")
def libvirt() -> Iterator[Libvirt]:
    """A libvirtd without domains."""
    with Libvirt() as running:
        yield running


@pytest.fixture(scope="module")
def followed(libvirt: Libvirt) -> Iterator[tuple[Service, RealFollower]]:
    """A service, and the follower of libvirt."""
    service = Service(dialects=["incus"])
    service.write_config(f'[sources]\ndoorbells = "{service.root}/doorbells"\n')
    with service, RealFollower(service, "libvirt", libvirt.enter) as follower:
        yield service, follower


def look(libvirt: Libvirt) -> dict[str, str]:
    """Return what the source sees: kinds by UUID."""
    done = subprocess.run([*libvirt.enter, sys.executable, "-c", _LOOK], stdout=subprocess.PIPE, check=True)
    return {key: kind for kind, key in json.loads(done.stdout)}


def test_domains_as_libvirt_has_them(libvirt: Libvirt) -> None:
    """A domain with a vsock device is seen; one without is not, whether it runs or not."""
    seen, unseen = libvirt.define("seen", VSOCK), libvirt.define("unseen")
    libvirt.virsh("start", "unseen")
    assert "id=" in libvirt.virsh("dumpxml", "unseen").splitlines()[0]
    assert look(libvirt) == {seen: "Observed"}
    for uuid in (seen, unseen):
        libvirt.attempt("destroy", uuid)
        libvirt.virsh("undefine", uuid)
    assert look(libvirt) == {}


def test_the_store_follows(libvirt: Libvirt, followed: tuple[Service, RealFollower]) -> None:
    """What is defined, renamed and removed in libvirt is so in the store, and what the operator has set stays."""
    service, _follower = followed
    uuid = libvirt.define("web", VSOCK)
    until(lambda: status(service, "web") == "stopped", "the instance of a domain")
    one = instances(service)["web"]
    assert (one["uuid"], one["type"], one["source"]) == (uuid, "virtual-machine", "libvirt")
    libvirt.virsh("domrename", "web", "shop")
    until(lambda: status(service, "shop") == "stopped", "the new name")
    assert instances(service).keys() == {"shop"}
    command = [str(COMMAND), "--config", str(service.config), "config", "set", "shop", "user.role=frontend"]
    subprocess.run(command, check=True)
    libvirt.virsh("undefine", "shop")
    plain = libvirt.define("plain", VSOCK)
    until(lambda: status(service, "plain") == "stopped", "another instance")
    assert instances(service)["shop"]["config"] == {"user.role": "frontend"}
    libvirt.virsh("undefine", plain)
    until(lambda: "plain" not in instances(service), "the end of an instance without settings")


def test_libvirtd_that_is_away(libvirt: Libvirt, followed: tuple[Service, RealFollower]) -> None:
    """While libvirt does not answer, nothing is removed, and the fault is told; afterwards all is followed again."""
    service, follower = followed
    libvirt.define("stays", VSOCK)
    until(lambda: status(service, "stays") == "stopped", "the instance of a domain")
    libvirt.stop()
    follower.kill()
    follower.start()
    until(lambda: "cannot reach libvirt" in follower.log.read_text(), "the follower's complaint")
    assert status(service, "stays") == "stopped"
    libvirt.start()
    libvirt.virsh("undefine", "stays")
    until(lambda: "stays" not in instances(service), "the end of the instance")
