"""What is told of a change: which events, in which order, in which words. Pure, so without a store."""

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
    """Events when the configuration alone changes."""
    return list(changes.find_differences(old, new, {}, {}))


def device_actions(old: Mapping[str, Device], new: Mapping[str, Device]) -> list[tuple[str, str, Any]]:
    """Action, name and definition of each event when devices alone change."""
    events = list(changes.find_differences({}, {}, old, new))
    assert all(event.type == "device" and event.guest for event in events)
    return [(event.metadata["action"], event.metadata["name"], event.metadata["config"]) for event in events]


def test_config_event() -> None:
    """A changed key is told with its old and its new value; absent is the empty string."""
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
def test_nothing_is_told_of_nothing(old: dict[str, str], new: dict[str, str]) -> None:
    """An empty value equals an unset one, and a key that keeps its value is no news."""
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
def test_guests_hear_of_user_keys_alone(key: str, guest: bool) -> None:
    """A change of a user.* key is news for the guest, that of any other key is not."""
    (event,) = config_events({}, {key: "1"})
    assert event.guest is guest


def test_device_events() -> None:
    """Added and updated devices come with their new definition, removed ones with their old."""
    wider = {**NIC, "mtu": "9000"}
    assert device_actions({}, {"eth0": NIC}) == [("added", "eth0", NIC)]
    assert device_actions({"eth0": NIC}, {"eth0": wider}) == [("updated", "eth0", wider)]
    assert device_actions({"eth0": NIC}, {}) == [("removed", "eth0", NIC)]
    assert device_actions({"eth0": NIC}, {"eth0": dict(reversed(NIC.items()))}) == []


def test_device_of_another_type_is_another_device() -> None:
    """A device that changes its type is removed and added, not updated."""
    assert device_actions({"a": NIC}, {"a": DISK}) == [("removed", "a", NIC), ("added", "a", DISK)]


def test_renamed_device_is_another_device() -> None:
    """The same definition under another name is removed and added."""
    assert device_actions({"eth0": NIC}, {"eth1": NIC}) == [("removed", "eth0", NIC), ("added", "eth1", NIC)]


def test_order() -> None:
    """Configuration comes first, then devices removed, updated, added; by name within each."""
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
    """Who applies the events to the old state, in their order, has the new one."""
    config = {key: value for key, value in old.items() if value}
    devices = dict(old_devices)
    for event in changes.find_differences(old, new, old_devices, new_devices):
        told = event.metadata
        if event.type == "config":
            assert config.pop(told["key"], "") == told["old_value"]
            config |= {told["key"]: told["value"]} if told["value"] else {}
        elif told["action"] == "removed":
            assert devices.pop(told["name"]) == told["config"]
        else:
            assert (told["name"] in devices) == (told["action"] == "updated")
            devices[told["name"]] = told["config"]
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
    """cloud-init runs again when NICs come or go by name, not when one is changed, and not for other devices."""
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
        # The hour that a day in autumn has twice.
        ("CET-1CEST,M3.5.0,M10.5.0/3", 1_761_438_600_000_000_000, "2025-10-26T02:30:00+02:00"),
        ("CET-1CEST,M3.5.0,M10.5.0/3", 1_761_442_200_000_000_000, "2025-10-26T02:30:00+01:00"),
    ],
)
def test_timestamp(monkeypatch: pytest.MonkeyPatch, zone: str, now: int, expected: str) -> None:
    """A moment is written in the host's zone, with nine digits at the most and no zeros at their end."""
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
def test_timestamp_loses_nothing(now: int) -> None:
    """From what is written, the very nanosecond can be read again."""
    written = re.fullmatch(r"([0-9-]+T[0-9:]+)(?:\.(\d{1,9}))?(?:Z|([+-]\d\d):(\d\d))", changes.timestamp(now))
    assert written is not None
    moment, fraction, hours, minutes = written.groups()
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0) * (-1 if (hours or "").startswith("-") else 1))
    seconds = datetime.fromisoformat(moment).replace(tzinfo=timezone(offset)) - datetime.fromtimestamp(0, UTC)
    assert seconds // timedelta(seconds=1) * 10**9 + int((fraction or "").ljust(9, "0")) == now
    assert not (fraction or "").endswith("0")


def test_timestamp_is_of_now() -> None:
    """Without a moment given, it is the present one."""
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
    """What HTML and JavaScript would take for theirs is escaped in lower-case hexadecimal; other text is as it is."""
    assert to_json({"value": value}, html=True).decode() == f'{{"value":{written}}}'


@given(st.dictionaries(st.text(), st.text()))
def test_metadata_is_json(metadata: dict[str, Any]) -> None:
    """Whatever text goes in, the JSON says the same, in the same order, in one line."""
    encoded = to_json(metadata, html=True).decode()
    assert list(json.loads(encoded).items()) == list(metadata.items())
    assert not set("<>&\n\r\u2028\u2029") & set(encoded)


def test_lifecycle_is_no_guests_news() -> None:
    """What happened to an instance as a whole is told to the host's operator alone, by project and name."""
    event = changes.lifecycle("instance-started", "p", "c1")
    assert (event.type, event.guest) == ("lifecycle", False)
    assert event.metadata == {"action": "instance-started", "name": "c1", "project": "p"}
