"""Two layers of configuration and devices: which value counts, and who has set it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.model import Device
from guestapi.store.layers import Layer, Layers, merge_devices

NIC: Device = {"type": "nic", "name": "eth0", "mtu": "1500"}


def test_value_of_the_operator_counts() -> None:
    """For a key in both layers, the operator's value counts; the origin names its layer."""
    layers = Layers(Layer({"b": "source", "c": "source"}), Layer({"c": "operator", "a": "operator"}))
    assert layers.config == {"a": "operator", "b": "source", "c": "operator"}
    assert list(layers.config) == ["a", "b", "c"]
    assert [layers.origin(key) for key in layers.config] == ["operator", "source", "operator"]


@pytest.mark.parametrize(
    ("source", "operator", "merged"),
    [
        ({"eth0": NIC}, {}, {"eth0": NIC}),
        ({}, {"gpu": {"type": "gpu"}}, {"gpu": {"type": "gpu"}}),
        # With a type, the operator's device replaces the source's completely.
        ({"eth0": NIC}, {"eth0": {"type": "disk"}}, {"eth0": {"type": "disk"}}),
        # Without a type, it amends the source's device.
        (
            {"eth0": NIC},
            {"eth0": {"mtu": "9000", "limits.max": "1"}},
            {"eth0": {**NIC, "mtu": "9000", "limits.max": "1"}},
        ),
        ({"eth0": NIC}, {"eth0": {"mtu": ""}}, {"eth0": {"type": "nic", "name": "eth0"}}),
        ({"eth0": NIC}, {"eth0": {}}, {"eth0": NIC}),
        # An amendment of a missing device has no effect.
        ({}, {"eth0": {"mtu": "9000"}}, {}),
        ({"eth1": NIC}, {"eth0": {"mtu": "9000"}}, {"eth1": NIC}),
    ],
)
def test_devices(source: dict[str, Device], operator: dict[str, Device], merged: dict[str, Device]) -> None:
    """A device of the operator's replaces or amends the source's."""
    layers = Layers(Layer({}, source), Layer({}, operator))
    assert layers.devices == merged
    for name in merged:
        assert layers.device_origin(name) == ("operator" if name in operator else "source")


def test_empty_layers_are_false() -> None:
    """A layer without configuration and devices is false."""
    assert not Layer()
    assert Layer({"a": "1"})
    assert Layer({}, {"eth0": NIC})


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.dictionaries(st.sampled_from(["type", "x"]), st.sampled_from(["", "1"])))
    )
)
def test_merged_devices_have_a_type(rows: list[tuple[str, Device]]) -> None:
    """In any case every merged device has a type."""
    merged = merge_devices(sorted(rows, key=lambda row: row[0]))
    assert all(definition.get("type") for definition in merged.values())
