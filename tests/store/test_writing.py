"""Changes of the store: what a transaction contains, what it refuses, and its events."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing

import pytest

from guestapi import names
from guestapi.model import Device, Instance
from guestapi.names import InvalidNameError
from guestapi.settings import Settings
from guestapi.store import placements, steps
from guestapi.store.errors import ConflictError, StoreError, UnknownInstanceError
from guestapi.store.lookup import find_instance, get_instance
from guestapi.store.reading import Reader
from guestapi.store.transaction import Change
from guestapi.store.writing import Writer
from tests.store.processes import add, config_of, database, init, known, log_entries, start

#: Bytes, the limit of an instance's configuration and devices.
TOO_MUCH = 16 * 1024 * 1024
NIC: Device = {"type": "nic", "name": "eth0"}


def c1(change: Change) -> Instance:
    """Return the instance ``c1`` in a transaction."""
    return get_instance(change, "default", "c1")


class InterruptionError(Exception):
    """An error within a transaction."""


def test_added_instance_is_read_back(settings: Settings, writer: Writer) -> None:
    """An added instance is read back unchanged, to its last character, and does not run."""
    config = {"user.a": "%s\r\n\0é\U0001f600", "user.b": "x", "limits.cpu": "2"}
    devices = {"eth0": NIC, "root": {"type": "disk", "path": "/", "pool": "é\n"}}
    identity = str(uuid.uuid4())
    with writer.change() as change:
        given_back = steps.add(
            change,
            "p",
            "c1",
            type="virtual-machine",
            instance_uuid=identity.upper(),
            location="n1",
            config=config,
            devices=devices,
        )
    (found,) = known(settings)
    assert found == given_back
    assert (found.project, found.name, found.type, found.location) == ("p", "c1", "virtual-machine", "n1")
    assert (found.uuid, found.config, found.devices) == (identity, config, devices)
    assert (found.init, found.ready, found.running) == (None, False, False)


def test_generated_uuids(writer: Writer) -> None:
    """An instance without a given UUID gets one of its own, and another one as its cloud-init id."""
    first, second = add(writer, "c1"), add(writer, "c2")
    assert len({uuid.UUID(first.uuid), uuid.UUID(second.uuid)}) == 2
    assert uuid.UUID(first.cloud_init_id) != uuid.UUID(second.cloud_init_id)


def test_name_is_unique_in_its_project(settings: Settings, writer: Writer) -> None:
    """A second instance of the same name is refused in the same project, and accepted in another one."""
    add(writer)
    with pytest.raises(ConflictError, match="c1"):
        add(writer)
    with writer.change() as change:
        steps.add(change, "other", "c1")
    assert [(one.project, one.name) for one in known(settings)] == [("default", "c1"), ("other", "c1")]


def test_uuid_is_unique(writer: Writer) -> None:
    """A UUID of another instance is refused in any spelling."""
    first = add(writer)
    with pytest.raises(ConflictError, match=first.uuid), writer.change() as change:
        steps.add(change, "other", "c2", instance_uuid=first.uuid.upper().replace("-", ""))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda change: steps.add(change, "default", "not/a/name"),
        lambda change: steps.add(change, "de fault", "c2"),
        lambda change: steps.add(change, "default", "c2", instance_uuid="7"),
        lambda change: steps.add(change, "default", "c2", location="a\nb"),
        lambda change: steps.add(change, "default", "c2", config={"": "x"}),
        lambda change: steps.add(change, "default", "c2", config={"user.a": "\udcff"}),
        lambda change: steps.add(change, "default", "c2", devices={"eth0": {"name": "eth0"}}),
        lambda change: steps.add(change, "default", "c2", devices={"eth0": {"type": ""}}),
        lambda change: steps.add(change, "default", "c2", devices={"": NIC}),
        lambda change: steps.add(change, "default", "c2", devices={"eth0": {**NIC, "\x07": "x"}}),
        lambda change: steps.configure(change, c1(change), {"user.ok": "1", "user.\n": "1"}),
        lambda change: steps.configure(change, c1(change), {"user.ok": "1", "k" * 1025: "x"}),
        lambda change: steps.replace_devices(change, c1(change), {"ok": NIC, "b" * 1025: NIC}),
        lambda change: steps.replace_devices(change, c1(change), {"ok": NIC, "b": {}}),
    ],
)  # fmt: skip
def test_names_and_values_are_checked(settings: Settings, writer: Writer, wrong: Callable[[Change], Instance]) -> None:
    """An invalid name or value is refused, and nothing of its transaction remains."""
    add(writer)
    before, log = known(settings), log_entries(settings)

    def attempt() -> None:
        with writer.change() as change:
            steps.configure(change, c1(change), {"user.before": "1"})
            wrong(change)

    with pytest.raises(InvalidNameError):
        attempt()
    assert known(settings) == before
    assert log_entries(settings) == log


def test_size_limit_of_the_configuration(settings: Settings, writer: Writer) -> None:
    """16 MiB of configuration are accepted, even in one value; more is refused with the limit in the error."""
    value = "é" * ((TOO_MUCH - len("user.user-data")) // 2)
    add(writer, **{"user.user-data": value})
    assert config_of(settings) == {"user.user-data": value}
    with pytest.raises(ConflictError, match=r"16777216 bytes.*store\.configuration_bytes"), writer.change() as change:
        steps.configure(change, c1(change), {"user.b": "x" * 16})
    with pytest.raises(ConflictError, match="16777216"), writer.change() as change:
        steps.replace_devices(change, c1(change), {"disk": {"type": "disk", "source": "x" * 16}})
    with pytest.raises(ConflictError, match="16777216"), writer.change() as change:
        steps.add(change, "default", "c2", config={"user.a": "x" * TOO_MUCH})
    assert config_of(settings) == {"user.user-data": value}


def test_number_of_keys_and_devices_is_bounded(settings: Settings, writer: Writer) -> None:
    """An instance has 4,096 keys, devices and options at the most, however short they are."""
    many = {f"user.{number:04}": "x" for number in range(4093)}
    add(writer, **many)
    with writer.change() as change:
        steps.replace_devices(change, c1(change), {"eth0": NIC})
    for further in ({"user.one": "x"}, {"user.one": "x", "user.two": "x"}):
        refused = pytest.raises(ConflictError, match=r"4096 keys, devices and options together, not 409[78] as 'c1'")
        with refused, writer.change() as change:
            steps.configure(change, c1(change), further)
    with pytest.raises(ConflictError, match="4096"), writer.change() as change:
        steps.replace_devices(change, c1(change), {"eth0": NIC | {"mtu": "1500"}})
    assert config_of(settings) == many
    with writer.change() as change:
        steps.configure(change, c1(change), {"user.0000": "", "user.one": "x"})
    assert config_of(settings)["user.one"] == "x"


def test_more_than_the_bound_may_become_fewer(
    settings: Settings, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an instance has from a time without the bound is kept, and can be changed as long as it is not more."""
    monkeypatch.setattr(names, "MOST_ENTRIES", 10_000)
    add(writer, **{f"user.{number:04}": "x" for number in range(5000)})
    monkeypatch.undo()
    with writer.change() as change:
        steps.configure(change, c1(change), {"user.0000": "y"})
        steps.configure(change, c1(change), {"user.0001": ""})
    assert len(config_of(settings)) == 4999
    with pytest.raises(ConflictError, match="4096"), writer.change() as change:
        steps.configure(change, c1(change), {"user.a": "x"})


def test_transaction_is_all_or_nothing(settings: Settings, writer: Writer) -> None:
    """An error in a transaction leaves state and log unchanged, whatever steps came before."""
    first, _second = start(writer, add(writer, "c1", a="1")), add(writer, "c2")
    before, log = known(settings), log_entries(settings)

    def attempt() -> None:
        with writer.change() as change:
            steps.add(change, "default", "c3")
            steps.configure(change, first, {"a": "2", "user.b": "2"})
            steps.replace_devices(change, first, {"eth0": NIC})
            steps.set_ready(change, first.id, first.run, True)
            steps.stop(change, first)
            steps.remove(change, get_instance(change, "default", "c2"))
            raise InterruptionError

    with pytest.raises(InterruptionError):
        attempt()
    assert known(settings) == before
    assert log_entries(settings) == log


def test_steps_are_visible_after_the_commit(settings: Settings, writer: Writer, reader: Reader) -> None:
    """Other connections see all steps of a transaction and their events at its end, and none before."""
    with writer.change() as change:
        one = steps.add(change, "default", "c1")
        steps.configure(change, steps.start(change, one, init(7)), {"user.a": "1"})
        assert reader.instance(one.id) is None
        assert reader.latest() == 0
    found = reader.instance(one.id)
    assert found is not None
    assert (found.config, found.init) == ({"user.a": "1"}, init(7))
    assert reader.latest() == len(log_entries(settings)) == 3


def test_change_sees_its_own_steps(writer: Writer) -> None:
    """A transaction sees its own steps."""
    with writer.change() as change:
        one = steps.add(change, "default", "c1", config={"user.a": "1"})
        assert c1(change) == one
        steps.remove(change, one)
        assert find_instance(change, "default", "c1") is None
        with pytest.raises(UnknownInstanceError, match="c1"):
            c1(change)


def test_ids_are_never_used_again(writer: Writer) -> None:
    """An instance that is added again has another id, even if the removed one was the latest."""
    seen = set()
    for _ in range(3):
        one = add(writer)
        seen.add(one.id)
        with writer.change() as change:
            steps.remove(change, one)
    assert len(seen) == 3


def test_remove_leaves_nothing(settings: Settings, writer: Writer) -> None:
    """An instance is removed with its configuration and devices; one that is added later has none of them."""
    with writer.change() as change:
        one = steps.add(change, "default", "c1", config={"user.secret": "x"}, devices={"eth0": NIC})
        steps.remove(change, steps.start(change, one, init(7)))
    again = add(writer)
    assert (again.config, again.devices, again.init) == ({}, {}, None)
    with closing(sqlite3.connect(database(settings))) as connection:
        assert connection.execute("SELECT count(*) FROM config").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM devices").fetchone() == (0,)


def test_each_start_is_another_run(writer: Writer) -> None:
    """Each start and stop begins another run, which is not ready."""
    states = [add(writer)]
    made: list[Callable[[Change, Instance], Instance]] = [
        lambda change, one: steps.start(change, one, init(7)),
        lambda change, one: steps.start(change, one, init(8)),
        lambda change, one: steps.start(change, one, init(8, start_time=2)),
        lambda change, one: steps.stop(change, one),
    ]
    for step in made:
        with writer.change() as change:
            steps.set_ready(change, states[-1].id, states[-1].run, True)
            states.append(step(change, c1(change)))
    assert [one.ready for one in states] == [False] * 5
    assert sorted({one.run for one in states}) == [one.run for one in states]
    assert [one.init for one in states] == [None, init(7), init(8), init(8, start_time=2), None]


def test_repeated_start_and_stop(settings: Settings, writer: Writer) -> None:
    """A repeated start or stop neither resets Ready nor gives an event."""
    one = add(writer)
    with writer.change() as change:
        assert steps.stop(change, one) == one
    running = start(writer, one)
    assert writer.set_ready(running.id, running.run, True)
    before, log = known(settings), log_entries(settings)
    start(writer, before[0])
    assert known(settings) == before
    assert before[0].ready
    assert log_entries(settings) == log


def test_init_belongs_to_one_instance(settings: Settings, writer: Writer) -> None:
    """A process that is an instance's init cannot become another's until the first is stopped."""
    first, second = start(writer, add(writer, "c1")), add(writer, "c2")
    with pytest.raises(ConflictError, match="c1"):
        start(writer, second)
    with writer.change() as change:
        steps.stop(change, first)
        steps.start(change, second, init(100))
    assert [one.init for one in known(settings)] == [None, init(100)]


def test_ready_of_an_old_run_is_refused(settings: Settings, writer: Writer) -> None:
    """Readiness of an earlier run, or of a removed instance, is refused."""
    one = add(writer)
    assert not writer.set_ready(one.id, one.run, True)
    first = start(writer, one, 7)
    second = start(writer, first, 8)
    log = log_entries(settings)
    assert not writer.set_ready(one.id, first.run, True)
    assert not writer.set_ready(one.id, second.run + 1, True)
    assert not writer.set_ready(one.id + 1, second.run, True)
    assert not known(settings)[0].ready
    assert log_entries(settings) == log
    assert writer.set_ready(one.id, second.run, True)
    assert known(settings)[0].ready
    assert writer.set_ready(one.id, second.run, False)
    assert not known(settings)[0].ready


def test_empty_value_is_unset(settings: Settings, writer: Writer) -> None:
    """A key that is set to the empty string is unset, when it is added or later."""
    add(writer, a="", b="1", c="1")
    assert config_of(settings) == {"b": "1", "c": "1"}
    with writer.change() as change:
        steps.configure(change, c1(change), {"b": ""})
    assert config_of(settings) == {"c": "1"}


def test_changes_of_the_cloud_init_id(writer: Writer) -> None:
    """Another user-data or another NIC changes the cloud-init id; another key, or a start, does not."""
    ids = [add(writer).cloud_init_id]
    made: list[Callable[[Change, Instance], Instance]] = [
        lambda change, one: steps.configure(change, one, {"user.x": "1"}),
        lambda change, one: steps.start(change, one, init(7)),
        lambda change, one: steps.configure(change, one, {"cloud-init.user-data": "1"}),
        lambda change, one: steps.replace_devices(change, one, {"eth0": NIC}),
        lambda change, one: steps.replace_devices(change, one, {"eth0": {**NIC, "mtu": "9000"}}),
    ]
    for step in made:
        with writer.change() as change:
            ids.append(step(change, c1(change)).cloud_init_id)
    assert [ids.index(one) for one in ids] == [0, 0, 0, 3, 4, 4]
    assert all(str(uuid.UUID(one)) == one for one in ids)


def test_removed_instance_cannot_be_changed(settings: Settings, writer: Writer) -> None:
    """A change of a removed instance is an error, and writes nothing."""
    one = add(writer)
    with writer.change() as change:
        steps.remove(change, one)
    log = log_entries(settings)
    with pytest.raises(StoreError), writer.change() as change:
        steps.configure(change, one, {"user.a": "1"})
    assert log_entries(settings) == log


@pytest.mark.parametrize(
    "changed",
    [
        lambda change, one: steps.configure(change, one, {"user.a": "2"}),
        lambda change, one: steps.replace_devices(change, one, {}),
        lambda change, one: steps.assign(change, one, ()),
        lambda change, one: steps.rename(change, one, "default", "c2"),
        lambda change, one: steps.refuse_placed(change, one),
    ],
    ids=["configure", "devices", "profiles", "rename", "refuse"],
)
def test_placed_instance_is_changed_by_its_fleet(
    settings: Settings, writer: Writer, changed: Callable[[Change, Instance], object]
) -> None:
    """By hand, an instance that a fleet has placed here is not changed; when no fleet is followed any more, it is."""
    one = add(writer)
    with writer.change() as change:
        placements.place(change, one, 1)
    before = known(settings), log_entries(settings)
    with (
        pytest.raises(ConflictError, match="instance 'c1' belongs to the fleet; 'guestapi --fleet"),
        writer.change() as change,
    ):
        changed(change, one)
    assert (known(settings), log_entries(settings)) == before
    with writer.change() as change:
        placements.forget_fleet(change)
        changed(change, one)


def test_unset_key_has_the_source_s_value(writer: Writer) -> None:
    """A key that the operator has set and unset has the source's value again; without a source it has none."""
    for source in ("lxc", None):
        with writer.change() as change:
            name = source or "none"
            steps.add(change, "default", name, config={"user.a": "first", "user.b": "b"}, source=source, key=source)
            for value, expected in (("operator's", "operator's"), ("", "first" if source else None)):
                found = steps.configure(change, get_instance(change, "default", name), {"user.a": value})
                assert found.config.get("user.a") == expected
                assert found.config["user.b"] == "b"


def test_added_running_instance(writer: Writer) -> None:
    """Adding an instance with an init adds and starts it: it is in its first run."""
    with writer.change() as change:
        at_once = steps.add(change, "default", "at-once", init=init(1))
        later = steps.start(change, steps.add(change, "default", "later"), init(2))
    assert (at_once.init, at_once.run) == (init(1), later.run)
