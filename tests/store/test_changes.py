"""The events of a change: which, in which order, with which content. Without a store."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guestapi.encoding import to_json
from guestapi.model import Device
from guestapi.store import changes
from guestapi.store.changes import ChangeEvent

NIC: Device = {"type": "nic", "name": "eth0"}
DISK: Device = {"type": "disk", "path": "/"}

CONFIGS = st.dictionaries(st.sampled_from(["user.a", "user.b", "cloud-init.x", "limits.cpu"]), st.text(max_size=3))
DEVICES = st.dictionaries(
    st.sampled_from("abcd"),
    st.fixed_dictionaries({"type": st.sampled_from(["nic", "disk"])}, optional={"path": st.text(max_size=2)}),
)


def config_events(old: Mapping[str, str], new: Mapping[str, str]) -> list[ChangeEvent]:
    """Return the events of a change of the configuration."""
    return list(changes.find_differences(old, new, {}, {}))


def device_actions(old: Mapping[str, Device], new: Mapping[str, Device]) -> list[tuple[str, str, Any]]:
    """Return action, name and definition of each event of a change of the devices."""
    events = list(changes.find_differences({}, {}, old, new))
    assert all(event.type == "device" and event.guest for event in events)
    return [(event.metadata["action"], event.metadata["name"], event.metadata["config"]) for event in events]


def test_config_event() -> None:
    """A changed key gives an event with its old and new value; the empty string stands for unset."""
    (changed,) = config_events({"user.a": "1"}, {"user.a": "2"})
    assert (changed.type, changed.guest) == ("config", True)
    assert list(changed.metadata.items()) == [("key", "user.a"), ("old_value", "1"), ("value", "2")]
    (added,) = config_events({}, {"user.a": "2"})
    assert added.metadata == {"key": "user.a", "old_value": "", "value": "2"}
    (removed,) = config_events({"user.a": "1"}, {})
    assert removed.metadata == {"key": "user.a", "old_value": "1", "value": ""}


@pytest.mark.parametrize(
    ("old", "new"),
    [({}, {}), ({"user.a": ""}, {}), ({}, {"user.a": ""}), ({"user.a": "x"}, {"user.a": "x"})],
)
def test_unchanged_keys_give_no_event(old: dict[str, str], new: dict[str, str]) -> None:
    """An empty value equals an unset one, and an unchanged key gives no event."""
    assert config_events(old, new) == []


@pytest.mark.parametrize(
    ("key", "guest"),
    [
        ("user.a", True),
        ("user.meta-data", True),
        ("cloud-init.user-data", False),
        ("security.guestapi", False),
        ("limits.cpu", False),
        ("environment.PATH", False),
        ("volatile.eth0.hwaddr", False),
        ("userx.a", False),
    ],
)
def test_guests_receive_only_user_keys(key: str, guest: bool) -> None:
    """A change of a user.* key is an event for the guest; that of any other key is not."""
    (event,) = config_events({}, {key: "1"})
    assert event.guest is guest


def test_device_events() -> None:
    """Events of added and updated devices have the new definition, those of removed ones the old one."""
    wider = {**NIC, "mtu": "9000"}
    assert device_actions({}, {"eth0": NIC}) == [("added", "eth0", NIC)]
    assert device_actions({"eth0": NIC}, {"eth0": wider}) == [("updated", "eth0", wider)]
    assert device_actions({"eth0": NIC}, {}) == [("removed", "eth0", NIC)]
    assert device_actions({"eth0": NIC}, {"eth0": dict(reversed(NIC.items()))}) == []


def test_device_of_another_type_is_another_device() -> None:
    """A device that changes its type is removed and added, not updated."""
    assert device_actions({"a": NIC}, {"a": DISK}) == [("removed", "a", NIC), ("added", "a", DISK)]


def test_renamed_device_is_another_device() -> None:
    """A device with another name is a removal and an addition."""
    assert device_actions({"eth0": NIC}, {"eth1": NIC}) == [("removed", "eth0", NIC), ("added", "eth1", NIC)]


def test_order() -> None:
    """Events of configuration come first, then of removed, updated and added devices, each sorted by name."""
    wider = {**NIC, "mtu": "9000"}
    events = changes.find_differences(
        {"user.z": "1", "user.b": "1"},
        {"user.a": "1", "user.b": "2"},
        {"n2": NIC, "n1": NIC, "gone2": DISK, "gone1": NIC, "turned": NIC},
        {"new2": NIC, "new1": DISK, "n1": wider, "n2": wider, "turned": DISK},
    )
    assert [
        (one.metadata.get("action", one.type), one.metadata.get("name", one.metadata.get("key"))) for one in events
    ] == [
        ("config", "user.a"),
        ("config", "user.b"),
        ("config", "user.z"),
        ("removed", "gone1"),
        ("removed", "gone2"),
        ("removed", "turned"),
        ("updated", "n1"),
        ("updated", "n2"),
        ("added", "new1"),
        ("added", "new2"),
        ("added", "turned"),
    ]


@given(CONFIGS, CONFIGS, DEVICES, DEVICES)
def test_events_lead_from_the_old_state_to_the_new(
    old: dict[str, str], new: dict[str, str], old_devices: dict[str, Device], new_devices: dict[str, Device]
) -> None:
    """Applying the events in order to the old state gives the new state."""
    config = {key: value for key, value in old.items() if value}
    devices = dict(old_devices)
    for event in changes.find_differences(old, new, old_devices, new_devices):
        metadata = event.metadata
        if event.type == "config":
            assert config.pop(metadata["key"], "") == metadata["old_value"]
            config |= {metadata["key"]: metadata["value"]} if metadata["value"] else {}
        elif metadata["action"] == "removed":
            assert devices.pop(metadata["name"]) == metadata["config"]
        else:
            assert (metadata["name"] in devices) == (metadata["action"] == "updated")
            devices[metadata["name"]] = metadata["config"]
    assert config == {key: value for key, value in new.items() if value}
    assert devices == new_devices


@pytest.mark.parametrize("namespace", ["cloud-init", "user"])
@pytest.mark.parametrize("name", ["user-data", "vendor-data", "network-config"])
@pytest.mark.parametrize(("old", "new"), [("", "x"), ("x", "y"), ("x", "")])
def test_cloud_init_starts_over_for_its_keys(namespace: str, name: str, old: str, new: str) -> None:
    """Setting, changing and unsetting any of cloud-init's six keys makes it run again."""
    key = f"{namespace}.{name}"
    assert changes.cloud_init_starts_over({key: old} if old else {}, {key: new} if new else {}, {}, {})


@pytest.mark.parametrize(
    "key", ["user.meta-data", "user.foo", "cloud-init.ssh-keys.me", "user.user-data2", "limits.cpu", "user-data"]
)
def test_cloud_init_ignores_other_keys(key: str) -> None:
    """No other key makes cloud-init run again."""
    assert not changes.cloud_init_starts_over({}, {key: "x"}, {}, {})


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ({}, {"eth0": NIC}, True),
        ({"eth0": NIC}, {}, True),
        ({"eth0": NIC}, {"eth1": NIC}, True),
        ({"eth0": NIC}, {"eth0": DISK}, True),
        ({"eth0": NIC}, {"eth0": {**NIC, "hwaddr": "00:16:3e:00:00:01"}}, False),
        ({"eth0": NIC}, {"eth0": NIC, "root": DISK}, False),
        ({"root": DISK}, {}, False),
    ],
)
def test_cloud_init_starts_over_for_another_set_of_nics(
    old: dict[str, Device], new: dict[str, Device], again: bool
) -> None:
    """cloud-init runs again when the set of NIC names changes, not when a NIC or another device changes."""
    assert changes.cloud_init_starts_over({}, {}, old, new) is again


@pytest.mark.parametrize(
    ("zone", "now", "expected"),
    [
        ("UTC0", 0, "1970-01-01T00:00:00Z"),
        ("UTC0", 1_700_000_000_000_000_000, "2023-11-14T22:13:20Z"),
        ("UTC0", 1_700_000_000_000_000_001, "2023-11-14T22:13:20.000000001Z"),
        ("UTC0", 1_700_000_000_120_000_000, "2023-11-14T22:13:20.12Z"),
        ("UTC0", 1_700_000_000_999_999_999, "2023-11-14T22:13:20.999999999Z"),
        ("XST-5:45", 1_700_000_000_000_000_000, "2023-11-15T03:58:20+05:45"),
        ("EST5", 1_700_000_000_100_000_000, "2023-11-14T17:13:20.1-05:00"),
        # The hour that occurs twice on a day in autumn.
        ("CET-1CEST,M3.5.0,M10.5.0/3", 1_761_438_600_000_000_000, "2025-10-26T02:30:00+02:00"),
        ("CET-1CEST,M3.5.0,M10.5.0/3", 1_761_442_200_000_000_000, "2025-10-26T02:30:00+01:00"),
    ],
)
def test_timestamp(monkeypatch: pytest.MonkeyPatch, zone: str, now: int, expected: str) -> None:
    """A timestamp is in the host's time zone, with up to nine digits of a second, without trailing zeros."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert changes.timestamp(now) == expected
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.integers(0, 2**62))
@example(10**9)
@example(10**9 - 1)
def test_timestamp_keeps_nanoseconds(now: int) -> None:
    """A timestamp keeps the nanosecond."""
    written = re.fullmatch(r"([0-9-]+T[0-9:]+)(?:\.(\d{1,9}))?(?:Z|([+-]\d\d):(\d\d))", changes.timestamp(now))
    assert written is not None
    moment, fraction, hours, minutes = written.groups()
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0) * (-1 if (hours or "").startswith("-") else 1))
    seconds = datetime.fromisoformat(moment).replace(tzinfo=timezone(offset)) - datetime.fromtimestamp(0, UTC)
    assert seconds // timedelta(seconds=1) * 10**9 + int((fraction or "").ljust(9, "0")) == now
    assert not (fraction or "").endswith("0")


def test_default_timestamp() -> None:
    """The default timestamp is the present time."""
    before = datetime.now(UTC) - timedelta(seconds=1)
    assert before <= datetime.fromisoformat(changes.timestamp()) <= datetime.now(UTC)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("<b>&", r'"\u003cb\u003e\u0026"'),
        ("\u2028\u2029", r'"\u2028\u2029"'),
        ("a/b'c", '"a/b\'c"'),
        ('"\\', r'"\"\\"'),
        ("\n\r\t", r'"\n\r\t"'),
        ("\0\x1f", r'"\u0000\u001f"'),
        ("\x7fé\U0001f600", '"\x7fé\U0001f600"'),
        (r"\u003c", r'"\\u003c"'),
    ],
)
def test_metadata_is_escaped_as_go_does(value: str, written: str) -> None:
    """Characters with a meaning in HTML or JavaScript are escaped in lower-case hexadecimal, as by Go."""
    assert to_json({"value": value}, html=True).decode() == f'{{"value":{written}}}'


@given(st.dictionaries(st.text(), st.text()))
def test_metadata_is_json(metadata: dict[str, Any]) -> None:
    """Any text is encoded as JSON with the same content in the same order, on one line."""
    encoded = to_json(metadata, html=True).decode()
    assert list(json.loads(encoded).items()) == list(metadata.items())
    assert not set("<>&\n\r\u2028\u2029") & set(encoded)


def test_lifecycle_events_are_not_for_guests() -> None:
    """Lifecycle events go only to the operator, with project and name."""
    event = changes.lifecycle("instance-started", "p", "c1")
    assert (event.type, event.guest) == ("lifecycle", False)
    assert event.metadata == {"action": "instance-started", "name": "c1", "project": "p"}


def test_key_of_an_entry() -> None:
    """An entry about a configuration key names it, however it is escaped; any other entry is about none."""
    for key in ("user.a", 'user."\\', "user.\n\u00e9"):
        assert changes.key_of("config", to_json({"key": key, "old_value": "", "value": "x"}).decode()) == key
    lifecycle = changes.lifecycle("instance-added", "default", "c1")
    assert changes.key_of(lifecycle.type, to_json(lifecycle.metadata).decode()) is None
    assert changes.key_of("config", '{"other":"user.a"}') is None


@pytest.mark.parametrize(
    ("after", "actions"),
    [
        ({"type": "nic", "parent": "br0", "limits.max": "2"}, ["updated"]),
        ({"type": "nic", "parent": "br0"}, ["updated"]),
        ({"type": "nic", "parent": "br1", "limits.max": "1"}, ["removed", "added"]),
        ({"type": "nic", "parent": "br1", "limits.max": "2"}, ["removed", "added"]),
        ({"type": "disk", "parent": "br0", "limits.max": "1"}, ["removed", "added"]),
        ({"type": "nic", "parent": "br0", "limits.max": "1"}, []),
    ],
)
def test_options_that_can_be_updated(after: Device, actions: list[str]) -> None:
    """A device is updated if all options that differ can be; otherwise it is another device, removed and added."""
    before: Device = {"type": "nic", "parent": "br0", "limits.max": "1"}
    live = {"nic": ("limits.",)}
    found = [event.metadata["action"] for event in changes.find_differences({}, {}, {"d": before}, {"d": after}, live)]
    assert found == actions
