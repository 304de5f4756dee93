"""What differs between the protocols, as data.

Rules: a new dialect is a new row of `DIALECTS`. Nothing else in the project depends on a dialect's name. A listening
socket has one dialect, whoever connects to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from guestapi.switches import FALSE, INCUS, INCUS_IMAGES, LXD, LXD_IMAGES, TRUE


@dataclass(frozen=True, slots=True)
class Dialect:
    """One protocol of the family.

    Attributes:
        name: as in ``FileDescriptorName=`` of a socket unit and in ``--socket NAME=PATH``.
        unit: systemd unit of its socket.
        socket: path of the socket on the host, unless configured otherwise.
        directory: directory in an instance where the socket is ``sock``.
        switch: configuration key that switches the API off for an instance (default: on).
        images_switch: configuration key that allows an instance to export images (default: off).
        image_header: name and value of the header field that every exported image has; None for none.
        readable: prefixes of the configuration keys that a guest may read.
        describes_instance: ``GET /1.0`` has state, type and location besides the version, and ``PATCH /1.0`` exists.
        listed_nic_types: None if ``/1.0/devices`` is one object with all devices. Otherwise it lists the URLs of the
            NICs of these ``nictype``s, and each has a resource ``/1.0/device/NAME``.
        name_is_instance_id: whether the meta-data's instance-id is the instance's name, not its cloud-init UUID.
        open_when_off: endpoints, by method and path, that answer although the API is switched off for the instance.
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
    listed_nic_types: frozenset[str] | None = None
    name_is_instance_id: bool = False
    open_when_off: frozenset[tuple[str, str]] = frozenset({("GET", "/"), ("GET", "/1.0")})

    def is_readable(self, key: str) -> bool:
        """Tell whether a guest may read the configuration key `key`, be it set or not."""
        return key.startswith(self.readable)

    def switched_on(self, config: Mapping[str, str]) -> bool:
        """Tell whether the API is on for an instance with this configuration. Only a false value switches it off."""
        return config.get(self.switch, "").lower() not in FALSE

    def images_allowed(self, config: Mapping[str, str]) -> bool:
        """Tell whether an instance with this configuration may export images. Only a true value allows it."""
        return config.get(self.images_switch, "").lower() in TRUE


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            name="incus",
            unit="guestapi.socket",
            socket="/var/lib/incus/guestapi/sock",
            directory="/dev/incus",
            switch=INCUS,
            images_switch=INCUS_IMAGES,
            image_header=("X-Incus-Type", "incus"),
        ),
        Dialect(
            name="lxd",
            unit="guestapi-lxd.socket",
            socket="/var/lib/lxd/devlxd/sock",
            directory="/dev/lxd",
            switch=LXD,
            images_switch=LXD_IMAGES,
            open_when_off=frozenset(),
        ),
        Dialect(
            name="lxd-legacy",
            unit="guestapi-lxd.socket",
            socket="/var/lib/lxd/devlxd/sock",
            directory="/dev/lxd",
            switch=LXD,
            images_switch=LXD_IMAGES,
            readable=("user.",),
            describes_instance=False,
            listed_nic_types=frozenset({"ipvlan"}),
            name_is_instance_id=True,
        ),
    )
}
