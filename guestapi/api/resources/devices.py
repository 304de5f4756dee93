"""``/1.0/devices``: what the instance has been given."""

from __future__ import annotations

import falcon

from guestapi.api.encoding import JSON, encode
from guestapi.api.errors import NotFound
from guestapi.model import Device, Instance


class Devices:
    """``GET /1.0/devices``: all devices by name."""

    lasting = True

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """A JSON object, sorted at both levels."""
        instance: Instance = req.context.instance
        resp.content_type = JSON
        resp.data = encode({name: shown(instance, name) for name in instance.devices})


class DeviceUrls:
    """``GET /1.0/devices`` of old: the URLs of those NICs whose ``nictype`` is listed."""

    lasting = True

    def __init__(self, nic_types: frozenset[str]) -> None:
        self._nic_types = nic_types

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """A JSON list."""
        devices = req.context.instance.devices
        resp.content_type = JSON
        resp.data = encode([f"/1.0/device/{name}" for name in devices if _is_listed(devices[name], self._nic_types)])


class DeviceDefinition:
    """``GET /1.0/device/{name}`` of old: one of the listed NICs."""

    lasting = True

    def __init__(self, nic_types: frozenset[str]) -> None:
        self._nic_types = nic_types

    def on_get(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """A JSON object; 404 for what is not listed."""
        instance: Instance = req.context.instance
        if not _is_listed(instance.devices.get(name, {}), self._nic_types):
            raise NotFound
        resp.content_type = JSON
        resp.data = encode(shown(instance, name))


def shown(instance: Instance, name: str) -> Device:
    """A device as its instance sees it: a NIC without a hardware address has the one that the manager gave it."""
    device = instance.devices[name]
    address = instance.config.get(f"volatile.{name}.hwaddr")
    if device["type"] == "nic" and "hwaddr" not in device and address is not None:
        device = {**device, "hwaddr": address}
    return dict(sorted(device.items()))


def _is_listed(device: Device, nic_types: frozenset[str]) -> bool:
    return device.get("type") == "nic" and device.get("nictype") in nic_types
