"""Layers of configuration and devices: profiles, what the source provides, and what the operator set. Pure.

Rules: a guest sees the layers merged. Of one key, the strongest layer's value counts: the operator's, else the
source's, else that of the last profile that has it. A device of the operator's that has a type replaces the device of
that name of all other layers; one without a type amends it, option by option (an empty option takes the other's away),
and counts only while there is such a device. Devices of profiles and of sources have a type.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from guestapi.model import Device

if TYPE_CHECKING:
    from guestapi.records import Profile

#: How the layers of an instance itself are stored; of two, the greater one wins. Profiles are weaker than both.
SOURCE, OPERATOR = 0, 1


@dataclass(frozen=True, slots=True)
class Layer:
    """Configuration and devices of one layer."""

    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.config or self.devices)


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of an instance; `profiles` from the weakest to the strongest."""

    source: Layer = Layer()
    operator: Layer = Layer()
    profiles: tuple[Profile, ...] = ()

    @property
    def config(self) -> dict[str, str]:
        """The configuration that counts, sorted by key."""
        merged: dict[str, str] = {}
        for layer in self._in_order():
            merged.update(layer.config)
        return dict(sorted(merged.items()))

    @property
    def devices(self) -> dict[str, Device]:
        """The devices that count, sorted by name."""
        layers = [layer.devices for layer in self._in_order()]
        names = sorted({name for layer in layers for name in layer})
        return merge_devices((name, layer[name]) for name in names for layer in layers if name in layer)

    def origin(self, key: str) -> str:
        """Which layer the value of a configuration key comes from: ``operator``, ``source``, or ``profile NAME``."""
        return self._origin("config", key)

    def device_origin(self, name: str) -> str:
        """Which layer a device comes from, as `origin`; one that the operator has amended is the operator's."""
        return self._origin("devices", name)

    def _in_order(self) -> tuple[Layer | Profile, ...]:
        return (*self.profiles, self.source, self.operator)

    def _origin(self, kind: Literal["config", "devices"], name: str) -> str:
        if name in getattr(self.operator, kind):
            return "operator"
        if name not in getattr(self.source, kind):
            for profile in reversed(self.profiles):
                if name in getattr(profile, kind):
                    return f"profile {profile.name}"
        return "source"


def merge_devices(rows: Iterable[tuple[str, Device]]) -> dict[str, Device]:
    """The devices that count.

    Args:
        rows: name and definition, sorted by name, of one name the weakest layer's first.
    """
    merged: dict[str, Device] = {}
    for name, definition in rows:
        if definition.get("type"):
            merged[name] = definition
        elif (base := merged.get(name)) is not None:
            amended = {**base, **definition, "type": base["type"]}
            merged[name] = {key: value for key, value in sorted(amended.items()) if value}
    return merged
