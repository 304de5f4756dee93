"""Two layers of configuration and devices: what the source provides, and what the operator set, which wins. Pure.

Rules: a guest sees the layers merged. A key of the operator's replaces the source's. A device of the operator's that
has a type replaces the source's device of that name; one without a type amends it, option by option (an empty option
takes the source's away), and counts only while the source has such a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from guestapi.model import Device

#: How the layers are stored; of two, the greater one wins.
SOURCE, OPERATOR = 0, 1

#: What a layer is called where an operator sees it.
LayerName = Literal["source", "operator"]


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
    """Both layers of an instance."""

    source: Layer = Layer()
    operator: Layer = Layer()

    @property
    def config(self) -> dict[str, str]:
        """The configuration that counts, sorted by key."""
        merged = {**self.source.config, **self.operator.config}
        return dict(sorted(merged.items()))

    @property
    def devices(self) -> dict[str, Device]:
        """The devices that count, sorted by name."""
        layers = (self.source.devices, self.operator.devices)
        names = sorted(layers[0].keys() | layers[1].keys())
        return merge_devices((name, layer[name]) for name in names for layer in layers if name in layer)

    def origin(self, key: str) -> LayerName:
        """Which layer the value of a configuration key comes from."""
        return "operator" if key in self.operator.config else "source"

    def device_origin(self, name: str) -> LayerName:
        """Which layer a device comes from; one that the operator has amended is the operator's."""
        return "operator" if name in self.operator.devices else "source"


def merge_devices(rows: Iterable[tuple[str, Device]]) -> dict[str, Device]:
    """The devices that count.

    Args:
        rows: name and definition, sorted by name, of one name the source's before the operator's.
    """
    merged: dict[str, Device] = {}
    for name, definition in rows:
        if definition.get("type"):
            merged[name] = definition
        elif (base := merged.get(name)) is not None:
            amended = {**base, **definition, "type": base["type"]}
            merged[name] = {key: value for key, value in sorted(amended.items()) if value}
    return merged
