"""What differs between the protocols that are spoken, as data.

Rules: adding a dialect is adding a row to `DIALECTS`; nothing else in the project asks for a dialect's name.
A listening socket speaks one dialect, whoever connects to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_FALSE = frozenset({"false", "0", "no", "off"})
_TRUE = frozenset({"true", "1", "yes", "on"})


@dataclass(frozen=True, slots=True)
class Dialect:
    """One protocol of the family.

    Attributes:
        name: what a socket unit's ``FileDescriptorName=`` and ``--socket NAME=PATH`` call it.
        unit: the systemd unit of its socket.
        socket: where the host's socket lies when nothing else is configured.
        directory: where an instance finds it, as ``sock``.
        switch: configuration key that turns the API off for an instance (default on).
        images_switch: configuration key that allows image export (default off).
        image_header: header field, name and value, that every exported image carries.
        readable: prefixes of the configuration keys that a guest may read.
        describes_instance: ``GET /1.0`` tells state, type and location, not the version alone.
        accepts_state: ``PATCH /1.0`` exists.
        listed_nic_types: None: ``/1.0/devices`` is one object with all devices. Otherwise it lists the URLs of the
            NICs of these ``nictype``s, and each has a resource of its own, ``/1.0/device/NAME``.
        name_is_instance_id: the meta-data's instance-id is the instance's name, not its cloud-init UUID.
        open_when_off: endpoints, by method and path, that answer although the instance is switched off.
    """

    name: str
    unit: str
    socket: str
    directory: str
    switch: str
    images_switch: str
    image_header: tuple[str, str] | None = None
    readable: tuple[str, ...] = ("cloud-init.", "user.")
    describes_instance: bool = True
    accepts_state: bool = True
    listed_nic_types: frozenset[str] | None = None
    name_is_instance_id: bool = False
    open_when_off: frozenset[tuple[str, str]] = frozenset({("GET", "/"), ("GET", "/1.0")})

    def reads(self, key: str) -> bool:
        """Whether a guest may read the configuration key `key`, set or not."""
        return key.startswith(self.readable)

    def switched_on(self, config: Mapping[str, str]) -> bool:
        """Whether the API is on for an instance with this configuration: unless its switch says false."""
        return config.get(self.switch, "").lower() not in _FALSE

    def images_allowed(self, config: Mapping[str, str]) -> bool:
        """Whether an instance with this configuration may export images: only if its switch says true."""
        return config.get(self.images_switch, "").lower() in _TRUE


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="incus",
            unit="guestapi.socket",
            socket="/var/lib/incus/guestapi/sock",
            directory="/dev/incus",
            switch="security.guestapi",
            images_switch="security.guestapi.images",
            image_header=("X-Incus-Type", "incus"),
        ),
        Dialect(
            name="lxd",
            unit="guestapi-lxd.socket",
            socket="/var/lib/lxd/devlxd/sock",
            directory="/dev/lxd",
            switch="security.devlxd",
            images_switch="security.devlxd.images",
            open_when_off=frozenset(),
        ),
        Dialect(
            name="lxd-legacy",
            unit="guestapi-lxd.socket",
            socket="/var/lib/lxd/devlxd/sock",
            directory="/dev/lxd",
            switch="security.devlxd",
            images_switch="security.devlxd.images",
            readable=("user.",),
            describes_instance=False,
            accepts_state=False,
            listed_nic_types=frozenset({"ipvlan"}),
            name_is_instance_id=True,
        ),
    )
}
