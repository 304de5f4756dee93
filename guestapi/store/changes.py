"""From two states of an instance to what is to be told about the difference. Pure: no SQL, no clock but `timestamp`.

Order (docs/events.md): configuration first, then devices removed, updated, added; by name within each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from guestapi.model import Device

#: What makes cloud-init run again in the guest: a change of one of these, or of the set of NICs.
_CLOUD_INIT_KEYS = frozenset(
    f"{namespace}.{key}"
    for namespace in ("cloud-init", "user")
    for key in ("user-data", "vendor-data", "network-config")
)


#: Options that Incus and LXD change on a running device, by its type, or what they begin with. A change of any other
#: takes the device away and adds it anew (measured with Incus 6.0.4 and LXD 5.0.2, recorded with Incus 7.0.2).
LIVE_OPTIONS = {
    "disk": ("limits.", "size"),
    "nic": ("ipv4.address", "ipv4.routes", "ipv6.address", "ipv6.routes", "limits.", "security."),
}

#: What the metadata of entries about a key begin with, by their type.
_BEFORE_KEY = {"config": ('{"key":',), "lifecycle": ('{"action":"key-spent","key":',)}
_DECODER = json.JSONDecoder()


class ChangeEvent(NamedTuple):
    """One thing to tell: ``guest`` says whether the instance itself may hear of it."""

    type: str
    metadata: dict[str, Any]
    guest: bool


def find_differences(
    old_config: Mapping[str, str],
    new_config: Mapping[str, str],
    old_devices: Mapping[str, Device],
    new_devices: Mapping[str, Device],
    live: Mapping[str, tuple[str, ...]] | None = None,
) -> Iterator[ChangeEvent]:
    """Everything that changed, in the order in which listeners hear of it. An absent value is the empty string.

    Args:
        old_config: configuration before.
        new_config: configuration after.
        old_devices: devices before.
        new_devices: devices after.
        live: which options of a device can be updated, as `LIVE_OPTIONS`; None: all but its type.
    """
    for key in sorted(old_config.keys() | new_config.keys()):
        old, new = old_config.get(key, ""), new_config.get(key, "")
        if old != new:
            yield ChangeEvent("config", {"key": key, "old_value": old, "value": new}, guest=key.startswith("user."))
    removed, updated, added = [], [], []
    for name in sorted(old_devices.keys() | new_devices.keys()):
        before, after = old_devices.get(name), new_devices.get(name)
        if before == after:
            continue
        if before is not None and after is not None and _is_update(before, after, live):
            updated.append(_device("updated", name, after))
            continue
        if before is not None:
            removed.append(_device("removed", name, before))
        if after is not None:
            added.append(_device("added", name, after))
    yield from (*removed, *updated, *added)


def key_of(kind: str, metadata: str) -> str | None:
    """Return the configuration key that an entry of the change log is about; None if it is about something else.

    Args:
        kind: type of the entry.
        metadata: of the entry, as JSON.
    """
    begin = next((one for one in _BEFORE_KEY.get(kind, ()) if metadata.startswith(one)), None)
    if begin is None:
        return None
    # The values may have megabytes, so they are not decoded.
    key, _end = _DECODER.raw_decode(metadata, len(begin))
    return str(key)


def lifecycle(action: str, project: str, name: str) -> ChangeEvent:
    """`action` (``instance-started`` and the like) happened to an instance: news for the host's operator."""
    return ChangeEvent("lifecycle", {"action": action, "name": name, "project": project}, guest=False)


def cloud_init_starts_over(
    old_config: Mapping[str, str],
    new_config: Mapping[str, str],
    old_devices: Mapping[str, Device],
    new_devices: Mapping[str, Device],
) -> bool:
    """Whether the guest's cloud-init has to take the instance for a new one."""
    return any(old_config.get(key, "") != new_config.get(key, "") for key in _CLOUD_INIT_KEYS) or (
        _nics(old_devices) != _nics(new_devices)
    )


def timestamp(now_ns: int | None = None) -> str:
    """RFC 3339 in the host's zone, with up to nine fractional digits, trailing zeros cut, as Go's RFC3339Nano."""
    now_ns = time.time_ns() if now_ns is None else now_ns
    seconds, fraction = divmod(now_ns, 10**9)
    local = datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
    moment, zone = local[:19], local[19:]
    digits = f".{fraction:09d}".rstrip("0").rstrip(".")
    return f"{moment}{digits}{'Z' if zone == '+00:00' else zone}"


def _device(action: str, name: str, definition: Device) -> ChangeEvent:
    return ChangeEvent(
        "device", {"action": action, "config": dict(sorted(definition.items())), "name": name}, guest=True
    )


def _is_update(before: Device, after: Device, live: Mapping[str, tuple[str, ...]] | None) -> bool:
    if before["type"] != after["type"]:
        return False
    changed = (option for option in before.keys() | after.keys() if before.get(option) != after.get(option))
    return live is None or all(option.startswith(live.get(after["type"], ())) for option in changed)


def _nics(devices: Mapping[str, Device]) -> set[str]:
    return {name for name, definition in devices.items() if definition["type"] == "nic"}
