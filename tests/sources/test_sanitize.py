"""`sanitize`: parts of an observation that the store cannot hold are left out, each with a sentence."""

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
    """Return an observation with this configuration and these devices."""
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
def test_invalid_key_is_left_out(key: str, value: str, named: str) -> None:
    """One invalid key is left out; all other keys and the switches remain."""
    good = {"user.good": "1", "security.guestapi": "false"}
    found = sanitize("incus", observed({**good, key: value}, {"eth0": NIC}), LIMIT)
    assert (found.config, found.devices) == (good, {"eth0": NIC})
    (sentence,) = found.left_out
    assert named in sentence
    assert "left out" in sentence
    assert len(sentence) < 300


def test_long_name_of_what_is_too_large() -> None:
    """What is left out because of its size is named by its first 40 characters."""
    keys = {"user." + "k" * 36: "x" * LIMIT}
    (sentence,) = sanitize("incus", observed(keys), LIMIT).left_out
    assert sentence.startswith(f"'user.{'k' * 35}' is left out: its {LIMIT + 41} bytes ")
    (sentence,) = sanitize("incus", observed(devices={"d" * 41: {"type": "x" * LIMIT}}), LIMIT).left_out
    assert sentence.startswith(f"device '{'d' * 40}' is left out")


def test_everything_daemons_accept_is_accepted() -> None:
    """Keys up to 1,024 bytes, control characters in them, and values of any size within the limit are accepted."""
    config = {"user." + "k" * 1019: "1", "user.\n\x1b[2J": "\0", "user.data": "x" * (LIMIT // 2)}
    found = sanitize("incus", observed(config, {"a\tb": {"type": "nic", "x\ny": "1"}}), LIMIT)
    assert (found.config, found.left_out) == (config, ())
    assert found.devices == {"a\tb": {"type": "nic", "x\ny": "1"}}


def test_invalid_device_is_left_out() -> None:
    """A device without a type, or with an invalid option, is left out alone."""
    devices = {
        "eth0": NIC,
        "": NIC,
        "none": {"name": "x"},
        "big": {"type": "disk", "k" * 1025: "1"},
        "empty": NIC | {"a": ""},
    }
    found = sanitize("lxc", observed(devices=devices), LIMIT)
    assert found.devices == {"eth0": NIC, "empty": NIC}
    assert len(found.left_out) == 3


@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.dictionaries(st.text(), st.text())))
def test_result_is_valid_for_any_input(config: dict[str, str], devices: dict[str, Device]) -> None:
    """The result of any input fits the limit, passes the store's checks, and is a part of the input."""
    limit = 64
    switches = dict.fromkeys(sorted(SWITCHES)[:1], "false")
    found = sanitize("incus", observed({**config, **switches}, devices), limit)
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
    """If not everything fits, the largest values are left out."""
    found = sanitize("incus", observed({f"user.{size}": "x" * size for size in (10, 1000, 100)}), 200)
    assert {key: len(value) for key, value in found.config.items()} == {"user.10": 10, "user.100": 100}
    assert [sentence[:11] for sentence in found.left_out] == ["'user.1000'"]


def test_devices_beyond_the_limit_are_named() -> None:
    """The smallest devices that fit together stay; the others are named, and so are keys that no longer fit."""
    sizes = {"a": 300, "b": 500, "c": 600}
    devices: dict[str, Device] = {
        name: {"type": "disk", "path": "p" * (size - len(f"{name}typediskpath"))} for name, size in sizes.items()
    }
    found = sanitize("incus", observed({"user.a": "x" * 194, "user.b": "x" * 195}, devices), 1000)
    assert found.devices == {"a": devices["a"], "b": devices["b"]}
    assert found.config == {"user.a": "x" * 194}
    assert [sentence.split(" is left out")[0] for sentence in found.left_out] == ["device 'c'", "'user.b'"]


def test_too_many_keys_and_devices() -> None:
    """Of more keys and devices than may be, switches stay, then devices, then the shortest keys."""
    devices: dict[str, Device] = {f"eth{number}": {"type": "nic"} for number in range(1000)}
    config = {f"user.{number:04}": "x" * (number // 100) for number in range(100, 3000)} | {"security.devlxd": "false"}
    found = sanitize("incus", observed(config, devices), LIMIT)
    assert found.devices == devices
    assert names.count_entries(found.config, devices) == 4096
    assert found.config["security.devlxd"] == "false"
    assert max(found.config) == f"user.{100 + 2094:04}"
    assert "there may be 4096 keys, devices and options in all" in found.left_out[0]
    assert found.left_out[-1] == "786 further things are left out"


def test_container_sets_no_switch() -> None:
    """A container's image, labels or annotations can set no switch."""
    said = observed({"security.guestapi.images": "true", "security.anything": "1", "user.a": "container"})
    found = sanitize("podman", said, LIMIT)
    assert found.config == {"user.a": "container"}
    assert len(found.left_out) == 2
    assert all("cannot set this for itself" in sentence for sentence in found.left_out)


def test_invalid_host_name() -> None:
    """A host name that would be invalid in meta-data is left out; the instance's name is used instead."""
    assert sanitize("lxc", observed(hostname="web.example.org"), LIMIT).hostname == "web.example.org"
    found = sanitize("lxc", observed(hostname="web\ninstance-id: x"), LIMIT)
    assert found.hostname is None
    assert "host name" in found.left_out[0]


def test_sentences_are_bounded() -> None:
    """The number of sentences is bounded; the last one gives the number of the rest."""
    found = sanitize("incus", observed({f"user.{n}": "\ud800" for n in range(1000)}), LIMIT)
    assert len(found.left_out) == 20
    assert found.left_out[-1] == "981 further things are left out"
    for count, last in ((20, "value of 'user.19'"), (21, "2 further things")):
        sentences = sanitize("incus", observed({f"user.{n}": "\ud800" for n in range(count)}), LIMIT).left_out
        assert len(sentences) == 20
        assert sentences[-1].startswith(last)
