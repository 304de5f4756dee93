"""`guestapi device`: the devices of an instance."""

from __future__ import annotations

import json
from itertools import count

import pytest

from guestapi.model import Init
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.store.processes import log_entries

ETH0 = {"eth0": {"type": "nic", "name": "eth0"}}


def devices(guestapi: Guestapi) -> dict[str, dict[str, str]]:
    """Return the devices of c1."""
    found: dict[str, dict[str, str]] = guestapi("device", "list", "c1", "--format", "json").json
    assert found == guestapi.shown("c1")["devices"]
    return found


def news(guestapi: Guestapi, before: int) -> list[tuple[str, str]]:
    """Return action and name of the device events since then."""
    metadata = [json.loads(one) for _, one, _ in log_entries(guestapi.settings)[before:]]
    return [(one["action"], one["name"]) for one in metadata]


def test_add_set_remove(c1: Guestapi) -> None:
    """A device is added with its type and options, changed, and removed; the others stay."""
    before = len(log_entries(c1.settings))
    c1.good("device", "add", "c1", "root", "disk", "path=/", "pool=a=b")
    assert devices(c1) == {**ETH0, "root": {"type": "disk", "path": "/", "pool": "a=b"}}
    c1.good("device", "set", "c1", "root", "pool=c", "size=1GiB", "path=")
    assert devices(c1) == {**ETH0, "root": {"type": "disk", "pool": "c", "size": "1GiB"}}
    c1.good("device", "remove", "c1", "root")
    assert devices(c1) == ETH0
    assert news(c1, before) == [("added", "root"), ("updated", "root"), ("removed", "root")]


def test_add_without_options(c1: Guestapi) -> None:
    """A device needs only a type."""
    c1.good("device", "add", "c1", "kvm", "unix-char")
    assert devices(c1) == {**ETH0, "kvm": {"type": "unix-char"}}


def test_another_type(c1: Guestapi) -> None:
    """A change of the type gives events of a removed and an added device."""
    before = len(log_entries(c1.settings))
    c1.good("device", "set", "c1", "eth0", "type=disk")
    assert devices(c1)["eth0"]["type"] == "disk"
    assert news(c1, before) == [("removed", "eth0"), ("added", "eth0")]


def test_setting_what_is_set(c1: Guestapi) -> None:
    """Setting an option to its present value gives no event."""
    before = len(log_entries(c1.settings))
    c1.good("device", "set", "c1", "eth0", "name=eth0", "mtu=")
    assert news(c1, before) == []
    assert devices(c1) == ETH0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["add", "c1", "eth0", "nic"], "eth0"),
        (["add", "c1", "", "nic"], "device name"),
        (["add", "c1", "a\x1b", "nic"], "device name"),
        (["add", "c1", "x" * 1025, "nic"], "1025"),
        (["add", "c1", "eth1", ""], "type"),
        (["add", "c1", "eth1", "nic", "\x07=1"], "eth1"),
        (["set", "c1", "eth1", "a=1"], "eth1"),
        (["set", "c1", "eth0", "a=1", "type="], "type"),
        (["set", "c1", "eth0", "a=1", f"{'k' * 1025}=1"], "eth0"),
        (["remove", "c1", "eth1"], "eth1"),
    ],
)
def test_refusals(c1: Guestapi, words: list[str], named: str) -> None:
    """A refusal is one sentence that names its subject, with exit code 1, and changes nothing."""
    assert named in c1.fails("device", *words)
    assert devices(c1) == ETH0


@pytest.mark.parametrize(
    "words",
    [
        ["add", "c1", "eth1"],
        ["add", "c1", "eth1", "nic", "mtu"],
        ["add", "c1", "eth1", "nic", "type=disk"],
        ["add", "c1", "eth1", "nic", "a=1", "a=2"],
        ["set", "c1", "eth0"],
        ["set", "c1", "eth0", "a=1", "mtu"],
        ["set", "c1", "eth0", "a=1", "a=2"],
        ["remove", "c1"],
        ["remove", "c1", "eth0", "eth1"],
    ],
)
def test_called_wrongly(c1: Guestapi, words: list[str]) -> None:
    """Wrong usage exits with 2 and changes nothing."""
    assert c1.misuse("device", *words)
    assert devices(c1) == ETH0


def test_list_as_a_table(c1: Guestapi) -> None:
    """list prints a line for each device with its options."""
    c1.good("device", "add", "c1", "root", "disk", "path=/")
    (line,) = [line for line in c1.good("device", "list", "c1").splitlines() if "root" in line]
    assert "disk" in line
    assert "path=/" in line


def test_devices_of_a_source(c1: Guestapi) -> None:
    """The operator's options of a source's device are kept separately, and stay when the source changes the device."""

    def observe(**devices: dict[str, str]) -> dict[str, dict[str, str]]:
        with Writer(c1.settings).change() as change:
            assert reconcile(change, "incus-like", [Observed("1", "default", "web", devices=devices)]) == []
            assert (
                reconcile(change, "incus-like", [Observed("1", "default", "web", init=init(), devices=devices)]) == []
            )
        shown: dict[str, dict[str, str]] = c1.shown("web")["devices"]
        return shown

    pids = count(100)

    def init() -> Init:
        return Init(next(pids), 1, "boot", 1)

    nic = {"type": "nic", "name": "eth0", "mtu": "1500"}
    observe(eth0=nic)
    c1.good("device", "set", "web", "eth0", "limits.max=1Mbit", "mtu=")
    c1.good("device", "add", "web", "gpu", "gpu")
    assert observe(eth0={**nic, "hwaddr": "0a"}) == {
        "eth0": {"hwaddr": "0a", "limits.max": "1Mbit", "name": "eth0", "type": "nic"},
        "gpu": {"type": "gpu"},
    }
    assert {
        name: one["origin"] for name, one in c1("device", "list", "web", "--origin", "--format", "json").json.items()
    } == {
        "eth0": "operator",
        "gpu": "operator",
    }
    assert observe(lan0=nic) == {"gpu": {"type": "gpu"}, "lan0": nic}
    assert "comes from incus-like" in c1.fails("device", "remove", "web", "lan0")
    assert "incus-like" in c1.good("device", "list", "web", "--origin")
    assert observe(eth0=nic)["eth0"] == {"limits.max": "1Mbit", "name": "eth0", "type": "nic"}
    c1.good("device", "remove", "web", "eth0")
    c1.good("device", "remove", "web", "gpu")
    assert c1.shown("web")["devices"] == {"eth0": nic}
    assert "type" in c1.fails("device", "set", "web", "eth0", "type=")
