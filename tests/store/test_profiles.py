"""Profiles: the configuration that instances get from them, and a change of one for all its instances."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guestapi import names
from guestapi.model import Device, Instance, Profile
from guestapi.names import InvalidNameError
from guestapi.settings import EventSettings, Settings, StoreSettings
from guestapi.store import backup, profiles, steps
from guestapi.store.errors import ConflictError, UnknownProfileError
from guestapi.store.lookup import get_instance, get_layers
from guestapi.store.reading import Reader, ValueReader
from guestapi.store.rows import entries, load_layers
from guestapi.store.transaction import Change
from guestapi.store.writing import Writer
from tests.store.processes import add, config_of, init, known, log_entries

MIB = 1 << 20


def create(
    writer: Writer, name: str, config: Mapping[str, str] | None = None, devices: Mapping[str, Device] | None = None
) -> Profile:
    """Create a profile in a transaction of its own."""
    with writer.change() as change:
        return profiles.create(change, "default", name, config=config, devices=devices)


def assign(writer: Writer, name: str, *wanted: str) -> Instance:
    """Assign exactly these profiles to an instance."""
    with writer.change() as change:
        found = tuple(profiles.get_profile(change, "default", one) for one in wanted)
        return steps.assign(change, get_instance(change, "default", name), found)


def edit(
    writer: Writer, name: str, config: Mapping[str, str] | None = None, devices: Mapping[str, Device] | None = None
) -> None:
    """Replace the content of a profile."""
    with writer.change() as change:
        profiles.edit(change, profiles.get_profile(change, "default", name), config=config, devices=devices)


def test_order_of_layers(settings: Settings, writer: Writer) -> None:
    """Of one key the operator's value takes precedence, then the source's, then that of the last profile."""
    create(writer, "first", {"user.a": "first", "user.b": "first"}, {"d": {"type": "gpu"}})
    create(writer, "last", {"user.b": "last", "user.c": "last"}, {"d": {"type": "disk", "path": "/x"}})
    add(writer, "c1", **{"user.c": "operator"})
    changed = assign(writer, "c1", "first", "last")
    assert changed.config == {"user.a": "first", "user.b": "last", "user.c": "operator"}
    assert list(changed.config) == sorted(changed.config)
    assert changed.devices == {"d": {"type": "disk", "path": "/x"}}
    assert changed.profiles == ("first", "last")
    with writer.change() as change:
        layers = get_layers(change, changed)
    assert [layers.origin(f"user.{key}") for key in "abc"] == ["profile first", "profile last", "operator"]
    assert layers.device_origin("d") == "profile last"
    assert assign(writer, "c1", "last", "first").config["user.b"] == "first"
    assert assign(writer, "c1").config == {"user.c": "operator"}


def test_operator_amends_a_device_of_a_profile(writer: Writer) -> None:
    """The operator's options without a type amend the profile's device, and have no effect without it."""
    create(writer, "net", devices={"eth0": {"type": "nic", "mtu": "1500"}})
    add(writer)
    with writer.change() as change:
        found = steps.assign(
            change, get_instance(change, "default", "c1"), (profiles.get_profile(change, "default", "net"),)
        )
        found = steps.replace_devices(change, found, {"eth0": {"mtu": "9000"}})
    assert found.devices == {"eth0": {"type": "nic", "mtu": "9000"}}
    edit(writer, "net", devices={})
    with writer.change() as change:
        assert get_instance(change, "default", "c1").devices == {}


def test_reader_sees_a_change_at_once(settings: Settings, writer: Writer, reader: Reader) -> None:
    """After a change of a profile, a worker reads the new values of its instances at once, large ones included."""
    create(writer, "p", {"user.a": "old"})
    number = add(writer).id
    assign(writer, "c1", "p")
    before = reader.instance(number)
    assert before is not None
    assert before.config == {"user.a": "old"}
    edit(writer, "p", {"user.a": "new", "user.large": "x" * MIB})
    after = reader.instance(number)
    assert after is not None
    assert after.config == {"user.a": "new"}
    assert after.large == {"user.large"}
    assert ValueReader(settings.store.url).value(after, "user.large") == "x" * MIB
    assert ValueReader(settings.store.url).value(after, "user.none") is None
    with writer.change() as change:
        steps.configure(change, get_instance(change, "default", "c1"), {"user.large": "y" * MIB})
    assert ValueReader(settings.store.url).value(after, "user.large") == "y" * MIB


def test_change_is_one_transaction_with_an_event_each(settings: Settings, writer: Writer) -> None:
    """A change of a profile is one transaction, with one event for each instance whose configuration it changes."""
    create(writer, "p", {"user.a": "1"})
    create(writer, "q", {"user.a": "q"})
    with writer.change() as change:
        for number in range(250):
            made = steps.add(change, "default", f"c{number}", profiles=(profiles.get_profile(change, "default", "p"),))
            steps.start(change, made, init(number + 1))
    with writer.change() as change:
        steps.configure(change, get_instance(change, "default", "c7"), {"user.a": "own"})
    assign(writer, "c8", "p", "q")
    revisions = {one.name: one.revision for one in known(settings)}
    before = len(log_entries(settings))
    edit(writer, "p", {"user.a": "2"})
    entries = log_entries(settings)[before:]
    assert len(entries) == 248
    assert {kind for kind, _metadata, _guest in entries} == {"config"}
    assert {metadata for _kind, metadata, _guest in entries} == {'{"key":"user.a","old_value":"1","value":"2"}'}
    assert all(guest for _kind, _metadata, guest in entries)
    grown = {one.name: one.revision - revisions[one.name] for one in known(settings)}
    assert {name for name, growth in grown.items() if not growth} == {"c7", "c8"}
    assert set(grown.values()) == {0, 1}


def test_log_keeps_all_of_one_change(settings: Settings) -> None:
    """The log keeps all entries of a profile's change, even above its limit, so that workers can deliver them."""
    short = Writer(msgspec.structs.replace(settings, events=EventSettings(keep_entries=5)), create=True)
    with short.change() as change:
        shared = profiles.create(change, "default", "p")
        for number in range(20):
            steps.add(change, "default", f"c{number}", profiles=(shared,))
    edit(short, "p", {"user.a": "1"})
    assert [kind for kind, _metadata, _guest in log_entries(settings)] == ["config"] * 20


def test_limit_of_the_merged_configuration(settings: Settings) -> None:
    """A change that would exceed an instance's limit is refused with the instance's name, and changes nothing."""
    small = Settings(store=StoreSettings(url=settings.store.url, configuration_bytes=MIB))
    writer = Writer(small, create=True)
    create(writer, "p", {"user.a": "1"})
    add(writer, "c1", **{"user.b": "x" * (MIB - 100)})
    add(writer, "c2", **{"user.a": "x" * (MIB - 100)})
    assign(writer, "c1", "p")
    assign(writer, "c2", "p")
    create(writer, "q", {"user.c": "x" * 200})
    attempts: tuple[Callable[[], object], ...] = (
        lambda: edit(writer, "p", {"user.a": "x" * 200}),
        lambda: assign(writer, "c1", "p", "q"),
    )
    for attempt in attempts:
        with pytest.raises(ConflictError, match="'c1' would have"):
            attempt()
    assert config_of(small, "c1")["user.a"] == "1"
    # A profile's value that the instance's own value overrides does not count.
    with writer.change() as change:
        steps.remove(change, get_instance(change, "default", "c1"))
    edit(writer, "p", {"user.a": "x" * 200})
    with pytest.raises(ConflictError, match="a profile may have"):
        edit(writer, "p", {"user.a": "x" * MIB})


def test_number_of_merged_keys_is_bounded(settings: Settings, writer: Writer) -> None:
    """Keys of profiles count for the instances that have them, once; a profile itself has as many at the most."""
    create(writer, "p", {"user.p": "1"})
    add(writer, "c1", **{f"user.{number:04}": "x" for number in range(4094)})
    assign(writer, "c1", "p")
    edit(writer, "p", {"user.p": "1", "user.q": "1"})
    # The instance has this key itself.
    edit(writer, "p", {"user.p": "1", "user.q": "1", "user.0001": "y"})
    with pytest.raises(ConflictError, match="4096 keys, devices and options together, not 4097 as 'c1'"):
        edit(writer, "p", {"user.p": "1", "user.q": "1", "user.r": "1"})
    assert "user.r" not in config_of(settings, "c1")
    with pytest.raises(ConflictError, match="a profile may have 4096 keys"):
        create(writer, "q", {f"user.{number}": "x" for number in range(4097)})


def test_more_than_the_bound_may_become_fewer(
    settings: Settings, writer: Writer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A profile from a time without the bound can be changed as long as it is not more, and is restored."""
    many = {f"user.{number:04}": "x" for number in range(5000)}
    monkeypatch.setattr(names, "MOST_ENTRIES", 10_000)
    with writer.change() as change:
        profiles.create(change, "default", "p", config=many, entries=10_000)
    add(writer)
    assign(writer, "c1", "p")
    monkeypatch.undo()
    backup.back_up(settings.store.url, tmp_path / "saved.db")
    edit(writer, "p", many | {"user.0000": "y", "user.0001": ""})
    assert len(config_of(settings, "c1")) == 4999
    with pytest.raises(ConflictError, match="4999 keys"):
        edit(writer, "p", many)
    backup.restore(settings, tmp_path / "saved.db")
    assert config_of(settings, "c1") == many


def test_names_of_profiles(writer: Writer) -> None:
    """An invalid name and the name of another profile are refused; ``default`` can be neither renamed nor removed."""
    for name in ("", "a,b", "a b", "a/b", "-a", ".", "a\nb", "x" * 256, "\udc80"):
        with pytest.raises(InvalidNameError, match="profile name"):
            create(writer, name)
    create(writer, "p")
    with pytest.raises(ConflictError, match="exists already"):
        create(writer, "p")
    with writer.change() as change:
        found = profiles.get_profile(change, "default", "p")
        for name in ("default", "p"):
            with pytest.raises(ConflictError, match="exists already"):
                profiles.rename(change, found, name)
        profiles.rename(change, found, "q")
        with pytest.raises(UnknownProfileError):
            profiles.get_profile(change, "default", "p")
        default = profiles.get_profile(change, "default", "default")
        with pytest.raises(ConflictError, match="'default' cannot be removed"):
            profiles.remove(change, default)
        with pytest.raises(ConflictError, match="'default' cannot be renamed"):
            profiles.rename(change, default, "x")


def test_profile_in_use_is_not_removed(writer: Writer) -> None:
    """A profile can be removed only when no instance has it; a removed instance has none."""
    create(writer, "p")
    add(writer)
    assign(writer, "c1", "p")
    with pytest.raises(ConflictError, match="twice"):
        assign(writer, "c1", "p", "p")
    with writer.change() as change:
        with pytest.raises(ConflictError, match="instance 'c1' has it"):
            profiles.remove(change, profiles.get_profile(change, "default", "p"))
        steps.remove(change, get_instance(change, "default", "c1"))
        profiles.remove(change, profiles.get_profile(change, "default", "p"))
        assert profiles.list_profiles(change) == []


#: Few names and values, so that they collide. Another NIC or user-data changes the cloud-init id.
KEYS = st.sampled_from(["user.a", "cloud-init.user-data", "limits.x"])
CONFIGS = st.dictionaries(KEYS, st.sampled_from(["1", "2"]), max_size=3)
DEVICES = st.dictionaries(
    st.sampled_from(["eth0", "d"]),
    st.sampled_from([{"type": "nic"}, {"type": "nic", "mtu": "1"}, {"type": "disk"}, {"type": "disk", "size": "1"}]),
    max_size=2,
)
AMENDED = st.dictionaries(
    st.sampled_from(["eth0", "d"]), st.sampled_from([{"mtu": "2"}, {"type": "gpu"}, {"mtu": "", "x": "1"}]), max_size=2
)


@given(
    contents=st.lists(st.tuples(CONFIGS, DEVICES), min_size=3, max_size=3),
    after=st.tuples(CONFIGS, DEVICES),
    users=st.lists(
        st.tuples(
            st.permutations(["p0", "p1", "p2"]).map(tuple),
            st.integers(0, 3),
            CONFIGS,
            AMENDED,
            st.sampled_from([None, "lxc", "incus"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
)
@hypothesis_settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
def test_change_equals_changes_of_each_instance(
    writer: Writer,
    contents: list[tuple[dict[str, str], dict[str, Device]]],
    after: tuple[dict[str, str], dict[str, Device]],
    users: list[tuple[tuple[str, ...], int, dict[str, str], dict[str, Device], str | None, bool]],
) -> None:
    """A change of a profile has the same result and events as a change of each instance's own layers."""
    with suppress(_Undone), writer.change() as change:
        _compare(change, contents, after, users)
        raise _Undone


def _compare(
    change: Change,
    contents: list[tuple[dict[str, str], dict[str, Device]]],
    after: tuple[dict[str, str], dict[str, Device]],
    users: list[tuple[tuple[str, ...], int, dict[str, str], dict[str, Device], str | None, bool]],
) -> None:
    made = [
        profiles.create(change, "default", f"p{number}", config=config, devices=devices)
        for number, (config, devices) in enumerate(contents)
    ]
    expected: dict[int, tuple[dict[str, str], dict[str, Device], bool]] = {}
    for number, (order, count, config, devices, source, runs) in enumerate(users):
        applied = tuple(one for name in order[:count] for one in made if one.name == name)
        instance = steps.add(
            change,
            "default",
            f"c{number}",
            config=config,
            devices={name: one for name, one in devices.items() if "type" in one},
            source=source,
            key=str(number) if source else None,
            checked=True,
            profiles=applied,
        )
        if source is None:
            known_devices = load_layers(change.connection, instance.id)
            amending = {name: one for name, one in devices.items() if "type" in one or name in known_devices.devices}
            instance = steps.replace_devices(change, instance, amending)
        if runs:
            instance = steps.start(change, instance, init(number + 1))
        layers = load_layers(change.connection, instance.id)
        new = replace(made[0], config=after[0], devices=after[1])
        wanted = replace(layers, profiles=tuple(new if one.id == new.id else one for one in layers.profiles))
        expected[instance.id] = (wanted.config, wanted.devices, wanted.config != layers.config)
    known_entries = _entries(change)
    ids = {number: get_instance(change, "default", f"c{place}") for place, number in enumerate(expected)}
    profiles.edit(change, made[0], config=after[0], devices=after[1])
    spread = _entries(change)[len(known_entries) :]
    for number, (config, devices, _differs) in expected.items():
        before = ids[number]
        found = get_instance(change, "default", before.name)
        assert (found.config, found.devices) == (config, devices)
        changed = (found.config, found.devices) != (before.config, before.devices)
        assert found.revision - before.revision == changed
        daemon = before.source == "incus"
        nics = [{name for name, one in each.devices.items() if one["type"] == "nic"} for each in (before, found)]
        over = before.config.get("cloud-init.user-data") != found.config.get("cloud-init.user-data") or (
            nics[0] != nics[1]
        )
        assert (found.cloud_init_id != before.cloud_init_id) == (over and not daemon)
        own = [entry for entry in spread if entry[0] == number]
        for _number, kind, metadata, guest in own:
            document = json.loads(metadata)
            if kind == "config":
                assert document["old_value"] == before.config.get(document["key"], "")
                assert document["value"] == found.config.get(document["key"], "")
                assert guest == (found.running and document["key"].startswith("user."))
        keys = {json.loads(entry[2])["key"] for entry in own if entry[1] == "config"}
        assert len(keys) == sum(entry[1] == "config" for entry in own)
        assert keys == {
            key for key in before.config.keys() | found.config.keys() if before.config.get(key) != found.config.get(key)
        }
        names = {json.loads(entry[2])["name"] for entry in own if entry[1] == "device"}
        assert names == {
            name
            for name in before.devices.keys() | found.devices.keys()
            if before.devices.get(name) != found.devices.get(name)
        }


class _Undone(Exception):  # noqa: N818 - no error, but the end of a transaction that is not committed.
    pass


def _entries(change: Change) -> list[tuple[int, str, str, bool]]:
    found = entries(change.connection, 0, 1_000_000).found
    return [(one.instance_id, one.type, one.metadata, one.for_guest) for one in found]


def test_no_profiles_of_a_project_that_cannot_be(settings: Settings, writer: Writer) -> None:
    """Text that no store can have names no project, and so no profile."""
    create(writer, "p", {"user.a": "1"})
    with writer.change() as change:
        assert profiles.list_profiles(change, "\udcff") == []
        assert [one.name for one, _users in profiles.list_profiles(change, "default")] == ["p"]
