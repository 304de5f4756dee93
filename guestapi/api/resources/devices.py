"""``/1.0/devices``: the devices of the instance."""

from __future__ import annotations

import falcon

from guestapi.api.errors import NotFound
from guestapi.encoding import JSON, json_line
from guestapi.model import Device, Instance


class Devices:
    """``GET /1.0/devices``: all devices by name."""

    cacheable = True

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON object, sorted at both levels."""
        instance: Instance = req.context.instance
        resp.content_type = JSON
        resp.data = json_line({name: guest_view(instance, name) for name in instance.devices})


class DeviceUrls:
    """``GET /1.0/devices`` of ``lxd-legacy``: the URLs of the NICs whose ``nictype`` is listed."""

    cacheable = True

    def __init__(self, nic_types: frozenset[str]) -> None:
        self._nic_types = nic_types

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON list."""
        devices = req.context.instance.devices
        resp.content_type = JSON
        resp.data = json_line([f"/1.0/device/{name}" for name in devices if _is_listed(devices[name], self._nic_types)])


class DeviceDefinition:
    """``GET /1.0/device/{name}`` of ``lxd-legacy``: one of the listed NICs."""

    cacheable = True

    def __init__(self, nic_types: frozenset[str]) -> None:
        self._nic_types = nic_types

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """Answer with a JSON object.

        Raises:
            NotFound: no listed NIC has this name.
        """
        instance: Instance = req.context.instance
        if not _is_listed(instance.devices.get(name, {}), self._nic_types):
            raise NotFound
        resp.content_type = JSON
        resp.data = json_line(guest_view(instance, name))


def guest_view(instance: Instance, name: str) -> Device:
    """Return a device as its guest sees it. A NIC without a hardware address has the one that the daemon generated."""
    device = instance.devices[name]
    address = instance.config.get(f"volatile.{name}.hwaddr")
    if device["type"] == "nic" and "hwaddr" not in device and address is not None:
        device = {**device, "hwaddr": address}
    return dict(sorted(device.items()))


def visible_devices(instance: Instance, nic_types: frozenset[str] | None) -> dict[str, Device]:
    """Return all devices that the guest may see, as it sees them, sorted by name.

    Args:
        instance: the instance.
        nic_types: `Dialect.listed_nic_types`.
    """
    devices = instance.devices
    return {
        name: guest_view(instance, name)
        for name in sorted(devices)
        if nic_types is None or _is_listed(devices[name], nic_types)
    }


def _is_listed(device: Device, nic_types: frozenset[str]) -> bool:
    return device.get("type") == "nic" and device.get("nictype") in nic_types
