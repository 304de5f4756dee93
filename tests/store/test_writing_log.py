"""The change log: which entries a change writes, for whom, and how long they stay."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from contextlib import closing, suppress
from itertools import count

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec.structs import replace

from guestapi.audit import MOST_RECORDS, AuditRecord
from guestapi.model import Device, Instance
from guestapi.settings import EventSettings, Settings, StoreSettings
from guestapi.store import profiles, steps
from guestapi.store.engine import database_file
from guestapi.store.lookup import get_instance
from guestapi.store.reading import Reader
from guestapi.store.tables import PART_BYTES
from guestapi.store.transaction import savepoint
from guestapi.store.walindex import map_index
from guestapi.store.writing import ReadyReport, Writer
from tests.store.processes import add, init, known, log_entries, start

NIC: Device = {"type": "nic", "name": "eth0"}


def test_ready_is_an_event_for_the_operator(settings: Settings, writer: Writer) -> None:
    """Ready is an event for the operator, not for guests; Started is none."""
    one = start(writer, add(writer))
    log = log_entries(settings)
    writer.set_ready(one.id, one.run, False)
    assert log_entries(settings) == log
    writer.set_ready(one.id, one.run, True)
    (event,) = log_entries(settings)[len(log) :]
    assert event == ("lifecycle", '{"action":"instance-ready","name":"c1","project":"default"}', False)


def test_lifecycle_events(settings: Settings, writer: Writer) -> None:
    """Adding, starting, stopping and removing an instance give events in this order, for the operator only."""
    one = start(writer, add(writer))
    with writer.change() as change:
        steps.stop(change, one)
        steps.remove(change, one)
    assert [(kind, json.loads(metadata)["action"], guest) for kind, metadata, guest in log_entries(settings)] == [
        ("lifecycle", f"instance-{action}", False) for action in ("added", "started", "stopped", "removed")
    ]


def test_events_for_running_guests(settings: Settings, writer: Writer) -> None:
    """A change of a user.* key or a device of a running instance is an event for the guest; no other one is."""
    one = add(writer)

    def news(instance: Instance) -> list[tuple[str, bool]]:
        before = len(log_entries(settings))
        with writer.change() as change:
            now = steps.configure(change, instance, {"user.a": str(before), "limits.cpu": str(before)})
            steps.replace_devices(change, now, {} if now.devices else {"eth0": NIC})
        return [(kind, guest) for kind, _, guest in log_entries(settings)[before:]]

    assert news(one) == [("config", False), ("config", False), ("device", False)]
    assert news(start(writer, known(settings)[0])) == [("config", False), ("config", True), ("device", True)]


def test_unchanged_values_give_no_event(settings: Settings, writer: Writer) -> None:
    """Setting a key to its value and unsetting an unset one leave revision, cloud-init id and log unchanged."""
    with writer.change() as change:
        one = steps.add(change, "default", "c1", config={"user.user-data": "x"}, devices={"eth0": NIC})
    log = log_entries(settings)
    with writer.change() as change:
        assert steps.configure(change, one, {"user.user-data": "x", "user.none": ""}) == one
        assert steps.replace_devices(change, one, {"eth0": dict(reversed(NIC.items()))}) == one
    assert log_entries(settings) == log


def test_every_change_is_told(settings: Settings, writer: Writer) -> None:
    """A change of which no event tells is told as such, once, for the operator: whoever waits looks again."""
    with writer.change() as change:
        steps.add(change, "default", "c1", source="lxc", key="k", hostname="inside")
    before = len(log_entries(settings))
    for _time in range(2):
        with writer.change() as change:
            steps.unbind(change, get_instance(change, "default", "c1"))
    (told,) = log_entries(settings)[before:]
    assert told == ("lifecycle", '{"action":"instance-updated","name":"c1","project":"default"}', False)


def test_log_is_trimmed_by_count(settings: Settings, writer: Writer) -> None:
    """Only the configured number of the latest entries stays, and their ids go on growing."""
    short = Writer(replace(settings, events=EventSettings(keep_entries=5)))
    one = start(short, add(short))
    for number in range(20):
        with short.change() as change:
            one = steps.configure(change, one, {"user.a": str(number)})
    log = log_entries(settings)
    assert [json.loads(metadata)["value"] for _, metadata, _ in log] == ["15", "16", "17", "18", "19"]
    with short.change() as change:
        steps.configure(change, one, {f"user.b{number}": "1" for number in range(8)})
    assert [json.loads(metadata)["key"] for _, metadata, _ in log_entries(settings)] == [
        f"user.b{n}" for n in range(3, 8)
    ]
    assert Reader(settings.store.url).latest() == 2 + 20 + 8


def test_excess_is_trimmed_from_time_to_time(settings: Settings, writer: Writer) -> None:
    """A log of many entries grows by a hundredth of what it keeps before it is cut to that, so few changes count it."""
    keep = 300
    long = Writer(replace(settings, events=EventSettings(keep_entries=keep)))
    one = add(long)
    with long.change() as change:
        one = steps.configure(change, one, {f"user.{number}": "1" for number in range(keep + 99)})
    sizes = []
    with closing(sqlite3.connect(database_file(settings.store.url))) as connection:
        for number in range(12):
            with long.change() as change:
                one = steps.configure(change, one, {"user.a": str(number)})
            sizes.append(connection.execute("SELECT count(*) FROM notifications").fetchone()[0])
    assert sizes == [keep + 1, keep + 2, keep + 3, keep] * 3


def test_events_of_others_stay_in_the_log(settings: Settings, writer: Writer) -> None:
    """However often instances report readiness, another one's events stay; of their own, the latest stay."""
    short = Writer(replace(settings, events=EventSettings(keep_entries=20)))
    quiet = start(short, add(short, "quiet"))
    noisy = [start(short, add(short, f"noisy{number}"), number + 2) for number in range(3)]
    with short.change() as change:
        steps.configure(change, quiet, {"user.a": "1"})
    before = log_entries(settings)
    for ready in (True, False) * 30:
        reports = [ReadyReport(one.id, one.run, ready, one.init) for one in noisy]
        assert short.record_all(reports) == [True] * 3
    log = log_entries(settings)
    assert log[: len(before)] == before
    assert len(log) == len(before) + 3 * 16


def test_reports_are_one_transaction(settings: Settings, writer: Writer) -> None:
    """Simultaneous readiness reports of several instances are one commit, with a result for each."""
    one, other = start(writer, add(writer, "c1")), start(writer, add(writer, "c2"), 3)
    reports = [
        ReadyReport(one.id, one.run, True, None),
        ReadyReport(one.id, one.run + 1, False, None),
        ReadyReport(other.id, other.run, True, other.init),
    ]
    database = database_file(settings.store.url)
    # The index of the write-ahead log exists only while a connection is open.
    reader = Reader(settings.store.url)
    reader.latest()
    index = map_index(database)
    assert index is not None
    commits = int.from_bytes(index[8:12], sys.byteorder)
    assert writer.record_all(reports) == [True, False, True]
    # "iChange" (sqlite.org/walformat.html, section 2.1) counts transactions.
    assert int.from_bytes(index[8:12], sys.byteorder) == commits + 1
    reader.close()
    assert [one.ready for one in known(settings)] == [True, True]


def test_log_is_trimmed_by_age(settings: Settings, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries older than configured are removed by the next change; younger ones stay."""
    now = time.time_ns()
    for age in (3601, 3500, 0):
        monkeypatch.setattr(time, "time_ns", lambda age=age: now - age * 10**9)
        monkeypatch.setattr(time, "time", lambda age=age: now / 1e9 - age)
        add(writer, f"age-{age}")
    assert [json.loads(metadata)["name"] for _, metadata, _ in log_entries(settings)] == ["age-3500", "age-0"]


@pytest.mark.parametrize("ahead", [3600, 100 * 365 * 86400])
def test_log_is_trimmed_after_the_clock_was_set_back(
    settings: Settings, writer: Writer, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """An entry with a time in the future counts as old as the first change after it, and is removed an hour later."""
    begin = time.time_ns()

    def add_at(seconds: int, name: str) -> list[str]:
        monkeypatch.setattr(time, "time_ns", lambda: begin + seconds * 10**9)
        monkeypatch.setattr(time, "time", lambda: begin / 1e9 + seconds)
        add(writer, name)
        return [json.loads(metadata)["name"] for _, metadata, _ in log_entries(settings)]

    assert add_at(0, "before") == ["before"]
    assert add_at(ahead, "ahead")[-1] == "ahead"
    kept = add_at(10, "back")
    assert kept[-2:] == ["ahead", "back"]
    assert add_at(3000, "later") == [*kept, "later"]
    assert add_at(3611, "last") == ["later", "last"]
    assert add_at(3611 + 2999, "end") == ["last", "end"]


KEYS = st.sampled_from(["user.a", "user.b", "user.user-data", "cloud-init.x", "limits.cpu"])
VALUES = st.sampled_from(["", "1", "2"]) | st.text(max_size=5)
DEVICES = st.dictionaries(
    st.sampled_from(["eth0", "eth1", "root"]),
    st.fixed_dictionaries({"type": st.sampled_from(["nic", "disk"])}, optional={"path": st.text(max_size=3)}),
)
STEPS = st.lists(
    st.tuples(st.just("config"), st.dictionaries(KEYS, VALUES)) | st.tuples(st.just("devices"), DEVICES), max_size=8
)
_names = count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A store that all examples share; each has an instance of its own."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db"))
    Writer(settings, create=True)
    return settings


@hypothesis_settings(max_examples=30, deadline=None)
@given(STEPS)
def test_store_is_a_dict(
    shared: Settings, wanted_steps: list[tuple[str, dict[str, str]] | tuple[str, dict[str, Device]]]
) -> None:
    """Any sequence of changes gives the same result in a plain dict, and by replaying the log's entries."""
    name = f"c{next(_names)}"
    writer = Writer(shared)
    with writer.change() as change:
        one = steps.start(change, steps.add(change, "default", name), init(1000 + next(_names)))
    config: dict[str, str] = {}
    devices: dict[str, Device] = {}
    for kind, wanted in wanted_steps:
        with writer.change() as change:
            if kind == "config":
                # The first element determines the type of the second, which a type checker does not follow; below too.
                config |= wanted  # type: ignore[arg-type]
                steps.configure(change, get_instance(change, "default", name), wanted)  # type: ignore[arg-type]
            else:
                steps.replace_devices(change, get_instance(change, "default", name), wanted)  # type: ignore[arg-type]
                # An option that is set to the empty string is unset.
                devices = {one: {k: v for k, v in of.items() if v} for one, of in wanted.items()}  # type: ignore[union-attr]
    reader = Reader(shared.store.url)
    found = reader.instance(one.id)
    assert found is not None
    assert found.config == {key: value for key, value in config.items() if value}
    assert found.devices == devices
    replayed: tuple[dict[str, str], dict[str, Device]] = ({}, {})
    for entry in reader.entries(0, 1_000_000, instance_id=one.id).found:
        news = json.loads(entry.metadata)
        if entry.type == "config":
            replayed[0][news["key"]] = news["value"]
        elif news["action"] == "removed":
            del replayed[1][news["name"]]
        else:
            replayed[1][news["name"]] = news["config"]
    reader.close()
    assert {key: value for key, value in replayed[0].items() if value} == {
        key: value for key, value in found.config.items() if key.startswith("user.")
    }
    assert replayed[1] == devices


@pytest.mark.parametrize("more", [0, 1, PART_BYTES, PART_BYTES + 1])
def test_large_events_are_written_in_parts(settings: Settings, writer: Writer, more: int) -> None:
    """Metadata of more bytes than a part has are written in parts, beside other events of the same change."""
    one = add(writer)
    overhead = len(json.dumps({"key": "user.b", "old_value": "", "value": ""}, separators=(",", ":")))
    value = "x" * (PART_BYTES - overhead + more)
    with writer.change() as change:
        steps.configure(change, one, {"user.a": "1", "user.b": value, "user.c": "3"})
        assert change.told == 3
    reader = Reader(settings.store.url)
    found = reader.entries(1, 10).found
    assert [json.loads(entry.metadata)["value"] for entry in found[::2]] == ["1", "3"]
    assert found[1].left_out == (PART_BYTES + more if more else 0)
    content = b""
    while part := reader.entry_part(found[1], len(content)):
        assert len(part) <= PART_BYTES
        content += part
    reader.close()
    assert json.loads(content or found[1].metadata)["value"] == value


def test_part_of_a_transaction_is_undone(settings: Settings, writer: Writer) -> None:
    """A part that fails leaves no state, no entry and no record; the parts before and after it stay."""
    with writer.change() as change:
        for name in ("before", "undone", "after"):
            with suppress(KeyError), savepoint(change):
                steps.add(change, "default", name)
                change.unrecorded += 1
                if name == "undone":
                    raise KeyError
        assert (change.told, change.unrecorded) == (2, 2)
        assert [record.instance for record in change.records] == ["before", "after"]
    assert [one.name for one in known(settings)] == ["after", "before"]
    assert [json.loads(metadata)["name"] for _, metadata, _ in log_entries(settings)] == ["before", "after"]


@pytest.mark.parametrize("fails", [False, True])
def test_part_of_a_transaction_leaves_no_savepoint(writer: Writer, fails: bool) -> None:
    """Neither a part that succeeds nor one that fails leaves a savepoint: a transaction may have thousands of parts."""
    with writer.change() as change:
        with suppress(KeyError), savepoint(change):
            if fails:
                raise KeyError
        with pytest.raises(sqlite3.OperationalError, match="no such savepoint"):
            change.connection.execute("RELEASE part")


def test_change_of_many_instances_is_kept(settings: Settings, writer: Writer) -> None:
    """What tells many instances of one change is kept whole until the next change, and nothing else beside it."""
    short = Writer(replace(settings, events=EventSettings(keep_entries=5)))
    with short.change() as change:
        profile = profiles.create(change, "default", "p")
        for number in range(8):
            steps.assign(change, steps.add(change, "default", f"c{number}"), (profile,))
    with short.change() as change:
        profiles.edit(change, profiles.get_profile(change, "default", "p"), config={"user.a": "1"})
    told = [json.loads(metadata).get("key") for _type, metadata, _guest in log_entries(settings)]
    assert told == ["user.a"] * 8
    add(short, "last")
    assert len(log_entries(settings)) == 5


def test_entries_are_as_those_of_incus(settings: Settings, writer: Writer) -> None:
    """What HTML gives a meaning is escaped in an entry, as Go's encoding/json does it."""
    one = add(writer)
    with writer.change() as change:
        steps.configure(change, one, {"user.<a>": "<&>"})
    assert log_entries(settings)[-1][1] == (r'{"key":"user.\u003ca\u003e","old_value":"","value":"\u003c\u0026\u003e"}')


def test_part_of_a_transaction_that_has_ended(writer: Writer) -> None:
    """If SQLite has ended the transaction meanwhile, the first error is raised, not one about the savepoint."""

    def fail() -> None:
        with writer.change() as change, savepoint(change):
            change.connection.execute("ROLLBACK")
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_records_of_a_change_are_bounded(writer: Writer) -> None:
    """A change records as many steps as permitted, and the number of the others."""
    with writer.change() as change:
        for number in range(MOST_RECORDS):
            change.record(AuditRecord("test", instance=str(number)))
        assert [record.instance for record in change.take_records()] == [str(number) for number in range(MOST_RECORDS)]
        for _number in range(2):
            change.record(AuditRecord("test"))
        records = change.take_records()
        assert len(records) == MOST_RECORDS + 1
        assert (records[-1].action, records[-1].noticed) == ("more", 2)


def test_each_step_is_recorded_once(writer: Writer) -> None:
    """What is done with an instance is recorded with its name and number; what changes nothing is not."""
    with writer.change() as change:
        one = steps.start(change, steps.add(change, "default", "c1"), init(7))
        for _time in range(2):
            steps.set_ready(change, one.id, one.run, True)
            one = steps.configure(change, get_instance(change, "default", "c1"), {"user.a": "1"})
        one = steps.rename(change, one, "default", "c2")
        for _time in range(2):
            one = steps.stop(change, one)
        steps.remove(change, one)
        recorded = [(record.action.removeprefix("instance."), record.instance) for record in change.take_records()]
        assert {record.instance_id for record in change.take_records()} == {one.id}
    first = [(action, "c1") for action in ("add", "start", "ready", "configure")]
    assert recorded == [*first, *((action, "c2") for action in ("rename", "stop", "remove"))]
