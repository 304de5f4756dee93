"""The table of dialects agrees with protocol.md, and the methods of its rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.dialects import DIALECTS, Dialect

EVERY = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)

#: protocol.md, "Dialects": socket, switch, readable, describes, PATCH, devices listed, name as id.
TABLE = {
    "incus": ("/var/lib/incus/guestapi/sock", "security.guestapi", ("user.", "cloud-init."), True, True, None, False),
    "lxd": ("/var/lib/lxd/devlxd/sock", "security.devlxd", ("user.", "cloud-init."), True, True, None, False),
    "lxd-6": ("/var/lib/lxd/devlxd/sock", "security.devlxd", ("user.", "cloud-init."), True, True, None, False),
    "lxd-legacy": ("/var/lib/lxd/devlxd/sock", "security.devlxd", ("user.",), False, False, {"ipvlan"}, True),
}


def test_table_agrees_with_the_protocol() -> None:
    """The dialects differ exactly as in protocol.md."""
    found = {
        name: (
            one.socket,
            one.switch,
            tuple(sorted(one.readable, reverse=True)),
            one.describes_instance,
            one.describes_instance,
            one.listed_nic_types,
            one.name_is_instance_id,
        )
        for name, one in DIALECTS.items()
    }
    assert found == TABLE
    assert all(one.images_switch == f"{one.switch}.images" for one in DIALECTS.values())


@pytest.mark.parametrize(
    ("name", "still_open"),
    [
        ("incus", {("GET", "/"), ("GET", "/1.0")}),
        ("lxd", {("GET", "/")}),
        ("lxd-legacy", {("GET", "/"), ("GET", "/1.0")}),
    ],
)
def test_paths_open_when_switched_off(name: str, still_open: set[tuple[str, str]]) -> None:
    """When switched off, lxd still answers `/`, and the other dialects also `GET /1.0`."""
    assert DIALECTS[name].open_when_off == still_open


@EVERY
def test_names_of_dialects(dialect: Dialect) -> None:
    """Each dialect is listed under its own name."""
    assert DIALECTS[dialect.name] is dialect


@EVERY
@pytest.mark.parametrize("key", ["user.a", "user.", "user.meta-data", "user.a/b", "user.\u00e9"])
def test_user_keys_are_readable(dialect: Dialect, key: str) -> None:
    """user.* is readable in every dialect."""
    assert dialect.is_readable(key)


@pytest.mark.parametrize(("name", "reads"), [("incus", True), ("lxd", True), ("lxd-legacy", False)])
def test_cloud_init_keys(name: str, reads: bool) -> None:
    """cloud-init.* is readable, except in lxd-legacy."""
    assert DIALECTS[name].is_readable("cloud-init.user-data") is reads


@EVERY
@pytest.mark.parametrize(
    "key", ["", "user", "users.a", "User.a", " user.a", "xuser.a", "cloud-init", "cloud-init-x", "cloud_init.a"]
)
def test_similar_keys_are_not_readable(dialect: Dialect, key: str) -> None:
    """A key is readable only with a complete prefix up to its dot, in lower case."""
    assert not dialect.is_readable(key)


@EVERY
@given(key=st.sampled_from(["security.", "limits.", "volatile.", "environment.", "raw.", "image."]), rest=st.text())
def test_host_keys_are_not_readable(dialect: Dialect, key: str, rest: str) -> None:
    """Keys of the host are not readable in any dialect."""
    assert not dialect.is_readable(key + rest)


@EVERY
@pytest.mark.parametrize("value", ["false", "False", "FALSE", "0", "no", "off", "Off"])
def test_switch_turns_off(dialect: Dialect, value: str) -> None:
    """A value of the switch that Incus takes for false, in any case, turns the API off."""
    assert not dialect.switched_on({dialect.switch: value})


@EVERY
@pytest.mark.parametrize("value", ["true", "1", "yes", "on", "", "TRUE"])
def test_switch_is_on_by_default(dialect: Dialect, value: str) -> None:
    """Without the switch, or with a true or empty value, the API is on."""
    assert dialect.switched_on({})
    assert dialect.switched_on({dialect.switch: value})


@EVERY
def test_switches_of_other_dialects_are_ignored(dialect: Dialect) -> None:
    """A dialect ignores the switches of other dialects."""
    for other in DIALECTS.values():
        if other.switch != dialect.switch:
            assert dialect.switched_on({other.switch: "false"})
            assert not dialect.images_allowed({other.images_switch: "true"})


@EVERY
@pytest.mark.parametrize("value", ["true", "True", "1", "yes", "on", "ON"])
def test_images_are_allowed_by_their_switch(dialect: Dialect, value: str) -> None:
    """Image export is permitted if its switch is true."""
    assert dialect.images_allowed({dialect.images_switch: value})


@EVERY
@pytest.mark.parametrize("value", ["", "false", "0", "no", "off", "maybe", " true", "2"])
def test_images_are_not_allowed_by_default(dialect: Dialect, value: str) -> None:
    """Any other value, and the API's own switch, do not permit image export."""
    assert not dialect.images_allowed({})
    assert not dialect.images_allowed({dialect.images_switch: value})
    assert not dialect.images_allowed({dialect.switch: "true"})


def test_origin_is_checked_for_incus() -> None:
    """The dialect of Incus refuses a WebSocket whose Origin is not the Host."""
    assert {name: dialect.checks_origin for name, dialect in DIALECTS.items() if "lxd" not in name} == {"incus": True}


def test_what_some_dialects_do_alone() -> None:
    """SSH keys are merged into vendor-data by LXD 6; Incus and the oldest LXD decode routes."""
    assert {name for name, dialect in DIALECTS.items() if dialect.merges_ssh_keys} == {"lxd-6"}
    assert {name for name, dialect in DIALECTS.items() if dialect.decodes_routes} == {"incus", "lxd-legacy"}
