"""`observe`: the daemon's descriptions to observations, and which instances belong to this host."""

from __future__ import annotations

import uuid

import msgspec
import pytest

from guestapi.mirror.daemon_model import DaemonInstance, Environment, Server
from guestapi.mirror.translate import STOPPED, is_here, observe, root_uid

ALONE = Server(environment=Environment(server="incus", server_name="n1"), api_extensions=["instance_ready_state"])
CLUSTERED = Server(environment=Environment(server_name="n1", server_clustered=True))
UUID = "11111111-2222-3333-4444-555555555555"


def instance(**fields: object) -> DaemonInstance:
    """Return an instance as the daemon describes it."""
    usual = {"name": "c1", "type": "container", "status": "Running", "project": "p", "location": "none"}
    return msgspec.convert({**usual, **fields}, DaemonInstance)


def test_needed_keys_are_taken_over() -> None:
    """Only keys that a guest may read, the switches, and addresses of NICs are taken over; an empty value is unset."""
    needed = {
        "user.a": "1",
        "cloud-init.user-data": "#cloud-config",
        "security.guestapi": "false",
        "security.guestapi.images": "true",
        "security.devlxd": "true",
        "security.devlxd.images": "true",
        "volatile.eth0.hwaddr": "00:16:3e:00:00:01",
    }
    others = {
        "raw.lxc": "x",
        "environment.SECRET": "x",
        "volatile.idmap.current": "[]",
        "volatile.uuid": UUID,
        "security.privileged": "true",
        "limits.cpu": "2",
        "user.empty": "",
    }
    found = observe(instance(expanded_config={**needed, **others}), ALONE, None)
    assert found.config == needed


def test_names_and_ids() -> None:
    """Project, name and UUID are the daemon's; the instance-id is its cloud-init id, or else the UUID."""
    config = {"volatile.uuid": UUID}
    found = observe(instance(expanded_config=config), ALONE, None)
    assert (found.project, found.name, found.uuid, found.cloud_init_id) == ("p", "c1", UUID, UUID)
    other = str(uuid.uuid4())
    config["volatile.cloud-init.instance-id"] = other
    assert observe(instance(expanded_config=config), ALONE, None).cloud_init_id == other


def test_derived_uuid() -> None:
    """Without a UUID, one is derived that stays the same until the instance is created again."""
    first = observe(instance(created_at="2026-01-01T00:00:00Z"), ALONE, None)
    assert observe(instance(created_at="2026-01-01T00:00:00Z", status="Stopped"), ALONE, None).uuid == first.uuid
    assert observe(instance(created_at="2026-01-01T00:00:01Z"), ALONE, None).uuid != first.uuid


@pytest.mark.parametrize(
    ("value", "extensions", "ready"),
    [("true", ["instance_ready_state"], True), ("false", ["instance_ready_state"], False), ("true", [], None)],
)
def test_readiness_of_the_daemon(value: str, extensions: list[str], ready: bool | None) -> None:
    """A daemon without readiness gives None, which differs from not ready."""
    config = {"volatile.last_state.ready": value}
    assert observe(instance(expanded_config=config), Server(api_extensions=extensions), None).ready is ready


def test_null_is_empty() -> None:
    """null in the daemon's description is an empty value."""
    found = observe(instance(config=None, expanded_config=None, expanded_devices=None), ALONE, None)
    assert (found.config, found.devices, found.init) == ({}, {}, None)


def test_location() -> None:
    """The location is the cluster member that the instance runs on, or else the daemon's own name."""
    assert observe(instance(location="n2"), CLUSTERED, None).location == "n2"
    assert observe(instance(location="none"), ALONE, None).location == "n1"
    assert observe(instance(location=""), ALONE, None).location == "n1"
    assert observe(instance(location="none"), Server(), None).location is None


def test_empty_options_are_none() -> None:
    """An empty option counts as unset; a device without options has its type."""
    devices = {"eth0": {"type": "nic", "hwaddr": "", "parent": "br0"}, "none": {"type": "none"}}
    found = observe(instance(expanded_devices=devices), ALONE, None)
    assert found.devices == {"eth0": {"type": "nic", "parent": "br0"}, "none": {"type": "none"}}


@pytest.mark.parametrize(
    ("status", "stopped"), [("Error", True), ("Stopped", True), ("Running", False), ("Frozen", False)]
)
def test_which_instances_have_no_init(status: str, stopped: bool) -> None:
    """An instance in error has no init, like a stopped one, so its state is not requested."""
    assert (status in STOPPED) == stopped


def test_instances_of_this_host() -> None:
    """Virtual machines and instances on other cluster members do not belong to this host."""
    assert is_here(instance(), ALONE)
    assert is_here(instance(location="n1"), CLUSTERED)
    assert is_here(instance(location="n2"), ALONE), "without a cluster every instance is on this host"
    assert is_here(instance(location="none"), CLUSTERED)
    assert not is_here(instance(location="n2"), CLUSTERED)
    assert not is_here(instance(type="virtual-machine"), ALONE)


@pytest.mark.parametrize(
    ("config", "root"),
    [
        ({}, None),
        ({"volatile.idmap.current": "[]"}, 0),
        ({"volatile.last_state.idmap": '[{"Isuid":true,"Hostid":1000000,"Nsid":0,"Maprange":65536}]'}, 1000000),
        ({"volatile.idmap.current": '[{"Isgid":true,"Hostid":7,"Nsid":0,"Maprange":9}]'}, None),
        (
            {
                "volatile.idmap.current": '[{"Isuid":true,"Hostid":5,"Nsid":5,"Maprange":1},'
                '{"Isuid":true,"Isgid":true,"Hostid":2000,"Nsid":0,"Maprange":5}]',
                "volatile.last_state.idmap": '[{"Isuid":true,"Hostid":9,"Nsid":0,"Maprange":1}]',
            },
            2000,
        ),
        ({"volatile.idmap.current": "no JSON"}, None),
        ({"volatile.idmap.current": '{"Isuid":true}'}, None),
    ],
)
def test_root_uid_of_the_daemon(config: dict[str, str], root: int | None) -> None:
    """The root UID comes from the ID map of the present run; a container with an empty map has the host's users."""
    assert root_uid(instance(expanded_config=config)) == root
