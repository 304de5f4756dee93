"""Debian's unmodified cloud-init in a container: DataSourceLXD finds its data at guestapi's /dev/lxd/sock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.harness.containers import Container
from tests.harness.service import COMMAND, Service

#: The directory into which `make test` unpacks the package.
UNPACKED = COMMAND.parents[1] / "cloud-init" / "usr/lib/python3/dist-packages"

#: Runs in the container, on the system's Python, as cloud-init itself does.
FIND = """
import json
import os
from cloudinit import helpers
from cloudinit.sources import DataSourceLXD as module

os.makedirs("/tmp/run")
os.makedirs("/tmp/cloud/instance")
paths = helpers.Paths({"cloud_dir": "/tmp/cloud", "run_dir": "/tmp/run"})
source = module.DataSourceLXD({}, None, paths)
print(json.dumps({
    "found": source.get_data(),
    "metadata": source.metadata,
    "user-data": source.userdata_raw,
    "vendor-data": source.vendordata_raw,
    "network-config": source.network_config,
    "crawled": source._crawled_metadata,
    "instance-id": source.get_instance_id(),
    "unchanged": source.check_instance_id(None),
    "subplatform": source.subplatform,
}))
"""

# ASCII only: cloud-init 22.4 guesses the encoding of a body (requests' ``.text``) and guesses wrong, with LXD too.
USER_DATA = "#cloud-config\nruncmd:\n- [echo, hello]\n"
VENDOR_DATA = "#cloud-config\npackages: [curl]\n"
NETWORK = "version: 2\nethernets:\n  eth0:\n    dhcp4: true\n"
DEVICES = {"eth0": {"type": "nic", "nictype": "bridged"}, "root": {"type": "disk", "path": "/"}}


def find(service: Service, name: str, config: dict[str, str]) -> dict[str, object]:
    """Return what the data source finds in a container with this configuration."""
    with service.container(name, config, DEVICES) as container:
        ran = container.run("env", f"PYTHONPATH={UNPACKED}", "/usr/bin/python3", "-c", FIND)
        assert ran.code == 0, ran.err
        found: dict[str, object] = json.loads(ran.out.splitlines()[-1])
        found["expected-id"] = service.instance(name).cloud_init_id
    return found


@pytest.fixture(scope="module", autouse=True)
def unpacked() -> None:
    """Check that `make test` has unpacked the package."""
    assert Path(UNPACKED).is_dir(), "run the tests by 'make test', which unpacks Debian's cloud-init"


@pytest.mark.parametrize("namespace", ["cloud-init", "user"])
def test_data_source_finds_everything(service: Service, namespace: str) -> None:
    """The data source finds meta-data, user-data, vendor-data, network and devices, with keys of either namespace."""
    config = {
        f"{namespace}.user-data": USER_DATA,
        f"{namespace}.vendor-data": VENDOR_DATA,
        f"{namespace}.network-config": NETWORK,
        "user.meta-data": "extra: more\n",
        "user.other": "%s\r\n end",
    }
    found = find(service, f"ci-{namespace}", config)
    assert found["found"] is True
    assert found["metadata"] == {
        "instance-id": found["expected-id"],
        "local-hostname": f"ci-{namespace}",
        "extra": "more",
    }
    assert found["instance-id"] == found["expected-id"]
    assert found["unchanged"] is True
    assert found["user-data"] == USER_DATA
    assert found["vendor-data"] == VENDOR_DATA
    assert found["network-config"] == {"version": 2, "ethernets": {"eth0": {"dhcp4": True}}}
    crawled = found["crawled"]
    assert isinstance(crawled, dict)
    assert crawled["devices"] == DEVICES
    assert crawled["config"]["user.other"] == config["user.other"]
    assert "/dev/lxd/sock" in str(found["subplatform"])


def test_data_source_finds_a_bare_instance(service: Service) -> None:
    """With no configuration, the data source finds identity and devices, and generates a network configuration."""
    found = find(service, "ci-bare", {})
    assert found["found"] is True
    assert found["instance-id"] == found["expected-id"]
    assert found["user-data"] is None
    assert "eth0" in json.dumps(found["network-config"])


def test_data_source_finds_ssh_keys(service: Service) -> None:
    """At a socket of lxd-6, cloud-init finds SSH keys as users in vendor-data and user-data, and not as keys."""
    key = "ssh-ed25519 AAAA bob@home"
    config = {"cloud-init.ssh-keys.bob": f"bob:{key}", "cloud-init.user-data": USER_DATA}
    with Container([(service.sockets["lxd-6"].parent, "/dev/lxd")], hostname="ci-keys") as container:
        service.add("ci-keys", container, config, DEVICES)
        try:
            ran = container.run("env", f"PYTHONPATH={UNPACKED}", "/usr/bin/python3", "-c", FIND)
        finally:
            service.remove("ci-keys")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    assert found["found"] is True
    users = ["default", {"name": "bob", "ssh_authorized_keys": [key]}]
    for document in ("user-data", "vendor-data"):
        assert found[document].startswith("#cloud-config\n")
        assert yaml.safe_load(found[document])["users"] == users
    assert yaml.safe_load(found["user-data"])["runcmd"] == [["echo", "hello"]]
    assert "ssh-keys" not in json.dumps(found["crawled"])
