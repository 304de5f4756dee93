"""What of an observation the store can take: what it cannot is left out alone, and named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi import names
from guestapi.model import Device
from guestapi.sources.observed import Observed
from guestapi.sources.sanitize import SWITCHES, sanitize

LIMIT = 1 << 20
NIC: Device = {"type": "nic", "name": "eth0"}


def observed(config: dict[str, str] | None = None, devices: dict[str, Device] | None = None, **more: str) -> Observed:
    """A container of which a source says this."""
    return Observed("key", "default", "web", config=config or {}, devices=devices or {}, **more)  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("user." + "k" * 1020, "1", "1025 bytes"),
        ("", "1", "must not be empty"),
        ("user.a", "\ud800", "valid UTF-8"),
        ("user.\udcff", "1", "valid UTF-8"),
        ("user.big", "x" * LIMIT, "too much"),
    ],
)
def test_bad_key_is_left_out_alone(key: str, value: str, named: str) -> None:
    """Of a configuration with one key that cannot be taken, all others come through, the switches among them."""
    good = {"user.good": "1", "security.guestapi": "false"}
    found = sanitize("incus", observed({**good, key: value}, {"eth0": NIC}), {}, LIMIT)
    assert (found.config, found.devices) == (good, {"eth0": NIC})
    (sentence,) = found.left_out
    assert named in sentence
    assert "left out" in sentence
    assert len(sentence) < 300


def test_what_daemons_take_is_taken() -> None:
    """Keys to 1,024 bytes, control characters in them, and values of any size that fits."""
    config = {"user." + "k" * 1019: "1", "user.\n\x1b[2J": "\0", "user.data": "x" * (LIMIT // 2)}
    found = sanitize("incus", observed(config, {"a\tb": {"type": "nic", "x\ny": "1"}}), {}, LIMIT)
    assert (found.config, found.left_out) == (config, ())
    assert found.devices == {"a\tb": {"type": "nic", "x\ny": "1"}}


def test_bad_device_is_left_out_alone() -> None:
    """A device without a type, or with an option that cannot be taken, costs the others nothing."""
    devices = {
        "eth0": NIC,
        "": NIC,
        "none": {"name": "x"},
        "big": {"type": "disk", "k" * 1025: "1"},
        "empty": NIC | {"a": ""},
    }
    found = sanitize("lxc", observed(devices=devices), {}, LIMIT)
    assert found.devices == {"eth0": NIC, "empty": NIC}
    assert len(found.left_out) == 3


@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.dictionaries(st.text(), st.text())))
def test_whatever_a_source_says(config: dict[str, str], devices: dict[str, Device]) -> None:
    """What comes through fits, passes every check of the store, and is what was said."""
    limit = 64
    switches = dict.fromkeys(sorted(SWITCHES)[:1], "false")
    found = sanitize("incus", observed({**config, **switches}, devices), {}, limit)
    assert switches.items() <= found.config.items()
    assert found.devices is not None
    rest = {key: value for key, value in found.config.items() if key not in switches}
    assert names.size_of(rest, found.devices) <= limit
    assert found.config.items() <= {**config, **switches}.items()
    assert all(found.config.values())
    for name, definition in found.devices.items():
        assert definition["type"]
        assert definition.items() <= devices[name].items()


def test_largest_goes_first() -> None:
    """If not everything fits, what is largest is left out, and what remains is all that fits."""
    found = sanitize("incus", observed({f"user.{size}": "x" * size for size in (10, 1000, 100)}), {}, 200)
    assert {key: len(value) for key, value in found.config.items()} == {"user.10": 10, "user.100": 100}
    assert [sentence[:11] for sentence in found.left_out] == ["'user.1000'"]


def test_devices_that_are_too_much_are_named() -> None:
    """The smallest devices stay, as long as they fit together; the others are named, and so are keys after them."""
    sizes = {"a": 300, "b": 500, "c": 600}
    devices: dict[str, Device] = {
        name: {"type": "disk", "path": "p" * (size - len(f"{name}typediskpath"))} for name, size in sizes.items()
    }
    found = sanitize("incus", observed({"user.a": "x" * 194, "user.b": "x" * 195}, devices), {}, 1000)
    assert found.devices == {"a": devices["a"], "b": devices["b"]}
    assert found.config == {"user.a": "x" * 194}
    assert [sentence.split(" is left out")[0] for sentence in found.left_out] == ["device 'c'", "'user.b'"]


def test_container_sets_no_switch() -> None:
    """Whatever a container's image, labels or annotations say, they switch nothing; the operator's template does."""
    said = observed({"security.guestapi.images": "true", "security.anything": "1", "user.a": "container"})
    template = {"security.guestapi": "false", "user.a": "template", "user.b": "template"}
    found = sanitize("podman", said, template, LIMIT)
    assert found.config == {"security.guestapi": "false", "user.a": "container", "user.b": "template"}
    assert len(found.left_out) == 2
    assert all("cannot set this for itself" in sentence for sentence in found.left_out)


def test_host_name_that_is_none() -> None:
    """A host name that could not stand in meta-data as it is is left out; the instance's name stands there then."""
    assert sanitize("lxc", observed(hostname="web.example.org"), {}, LIMIT).hostname == "web.example.org"
    found = sanitize("lxc", observed(hostname="web\ninstance-id: x"), {}, LIMIT)
    assert found.hostname is None
    assert "host name" in found.left_out[0]


def test_sentences_are_bounded() -> None:
    """However much of an instance cannot be taken, some sentences say so, and the last one says how many more."""
    found = sanitize("incus", observed({f"user.{n}": "\ud800" for n in range(1000)}), {}, LIMIT)
    assert len(found.left_out) == 20
    assert found.left_out[-1] == "981 further things are left out"
