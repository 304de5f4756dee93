"""What a worker reads: current data, without waiting for writers, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace as replace_instance
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from guestapi.dialects import DIALECTS
from guestapi.model import Device, KeyPolicy
from guestapi.settings import EventSettings, Settings, StoreSettings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import engine, policies, reading, rows, steps
from guestapi.store.errors import StoreError, UnknownInstanceError
from guestapi.store.lookup import find_instance, get_instance, list_instances, read_entries
from guestapi.store.reading import INSTANCE_BYTES, KEPT_BYTES, Reader, ValueReader
from guestapi.store.tables import BEGINNING_BYTES, PART_BYTES
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.store.processes import add, database, init, known, other_process, start

NIC: Device = {"type": "nic", "name": "eth0"}


def value(reader: Reader, instance_id: int, key: str = "user.a") -> str | None:
    """Return the value that the reader has for a key."""
    found = reader.instance(instance_id)
    assert found is not None
    return found.config.get(key)


def take_away(settings: Settings) -> None:
    """Delete the store."""
    for suffix in ("", "-wal", "-shm"):
        database(settings).with_name(database(settings).name + suffix).unlink(missing_ok=True)


def test_unknown_instance(reader: Reader) -> None:
    """An unknown id gives None."""
    assert reader.instance(1) is None
    assert reader.running_in(1) == []


def test_reader_sees_what_another_process_committed(settings: Settings, writer: Writer, reader: Reader) -> None:
    """After another process has committed a change, the next read shows it, every time."""
    code = """
writer = Writer(settings)
while value := receive():
    with writer.change() as change:
        steps.configure(change, get_instance(change, "default", "c1"), {"user.a": value})
    send("done")
"""
    one = add(writer, **{"user.a": "0"})
    assert value(reader, one.id) == "0"
    with other_process(settings, code) as other:
        for number in range(1, 50):
            other.write_line(str(number))
            assert other.read_line() == "done"
            assert value(reader, one.id) == str(number)


def test_every_change_is_seen(writer: Writer, reader: Reader) -> None:
    """A reader with an instance in memory sees every kind of change."""
    one = add(writer)
    assert reader.instance(one.id) == one
    with writer.change() as change:
        one = steps.configure(change, one, {"user.a": "1"})
    assert reader.instance(one.id) == one
    with writer.change() as change:
        one = steps.replace_devices(change, one, {"eth0": NIC})
    assert reader.instance(one.id) == one
    one = start(writer, one)
    assert reader.instance(one.id) == one
    writer.set_ready(one.id, one.run, True)
    found = reader.instance(one.id)
    assert found is not None
    assert found.ready
    with writer.change() as change:
        one = steps.stop(change, found)
    assert reader.instance(one.id) == one
    with writer.change() as change:
        steps.remove(change, one)
    assert reader.instance(one.id) is None


def test_removed_and_added_instance(writer: Writer, reader: Reader) -> None:
    """An instance that replaces a removed one, even in the same transaction, is another one."""
    one = add(writer, **{"user.a": "old"})
    assert value(reader, one.id) == "old"
    with writer.change() as change:
        steps.remove(change, one)
        again = steps.add(change, "default", "c1", config={"user.a": "new"})
    assert reader.instance(one.id) is None
    assert value(reader, again.id) == "new"


def test_uncommitted_change_is_not_seen(writer: Writer, reader: Reader) -> None:
    """A reader sees the state before a transaction until its commit, and after its rollback."""
    one = add(writer, **{"user.a": "1"})

    def attempt() -> None:
        with writer.change() as change:
            steps.configure(change, one, {"user.a": "2"})
            assert value(reader, one.id) == "1"
            raise KeyError

    with pytest.raises(KeyError):
        attempt()
    assert value(reader, one.id) == "1"


def test_reader_is_not_blocked_by_a_writer(settings: Settings, writer: Writer, reader: Reader) -> None:
    """During another process's transaction, open and new readers read without waiting."""
    code = """
with Writer(settings).change() as change:
    one = get_instance(change, "default", "c1")
    steps.configure(change, one, {f"user.{number}": "x" * 1_000_000 for number in range(8)} | {"user.a": "2"})
    send("within")
    receive()
"""
    one = add(writer, **{"user.a": "1"})
    with other_process(settings, code) as other:
        assert other.read_line() == "within"
        began = time.monotonic()
        assert value(reader, one.id) == "1"
        newcomer = Reader(settings.store.url)
        assert value(newcomer, one.id) == "1"
        with view(settings.store.url) as store:
            assert get_instance(store, "default", "c1") == one
        assert time.monotonic() - began < 4
        other.write_line("go on")
        other.done()
    assert value(reader, one.id) == value(newcomer, one.id) == "2"
    newcomer.close()


def test_open_while_the_last_writer_closes(settings: Settings, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last process to close the database removes the log under a lock; a reader that opens it then waits."""
    monkeypatch.setattr(engine, "_TIDYING_SECONDS", 30)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            with writer.change():
                pass

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for _time in range(100):
            reader = Reader(settings.store.url)
            assert reader.latest() == 0
            reader.close()
    finally:
        over.set()
        writing.join()


def test_instance_is_read_from_one_snapshot(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance is read from one snapshot, whenever a writer commits."""
    one = add(writer)
    numbers = iter(range(1000))
    within = False

    def commit() -> None:
        nonlocal within
        if not within:
            within, number = True, str(next(numbers))
            with writer.change() as change:
                changed = steps.configure(change, get_instance(change, "default", "c1"), {"user.a": number})
                steps.replace_devices(change, changed, {"eth0": {"type": "nic", "number": number}})
            within = False

    class Interrupted(sqlite3.Connection):
        """A connection before each of whose statements another connection commits."""

        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            commit()
            return super().execute(statement, *parameters)

    def connect(file: str, lock_seconds: float) -> sqlite3.Connection:
        return sqlite3.connect(file, timeout=lock_seconds, factory=Interrupted)

    monkeypatch.setattr(engine, "_connect", connect)
    for _ in range(10):
        found = reader.instance(one.id)
        assert found is not None
        assert found.config.get("user.a") == found.devices.get("eth0", {}).get("number")
    assert next(numbers) >= 10


def test_view_is_one_snapshot(settings: Settings, writer: Writer) -> None:
    """A view shows one snapshot until the end of its block."""
    add(writer)
    with view(settings.store.url) as store:
        assert [one.name for one in list_instances(store)] == ["c1"]
        add(writer, "c2")
        assert [one.name for one in list_instances(store)] == ["c1"]
        assert find_instance(store, "default", "c2") is None
    with view(settings.store.url) as store:
        assert [one.name for one in list_instances(store)] == ["c1", "c2"]


def test_view_finds_by_project(settings: Settings, writer: Writer) -> None:
    """Instances are found by project and name, and listed by project; a missing one is an error that names it."""
    with writer.change() as change:
        for project, name in (("q", "b"), ("p", "z"), ("q", "a")):
            steps.add(change, project, name)
    with view(settings.store.url) as store:
        assert [(one.project, one.name) for one in list_instances(store)] == [("p", "z"), ("q", "a"), ("q", "b")]
        assert [one.name for one in list_instances(store, "q")] == ["a", "b"]
        assert list_instances(store, "none") == []
        with pytest.raises(UnknownInstanceError, match="'z' in project 'q'"):
            get_instance(store, "q", "z")


def test_instances_of_a_namespace(writer: Writer, reader: Reader) -> None:
    """The instances of a namespace number are all that are registered with it, as long as they are."""
    first, second = add(writer, "c1"), add(writer, "c2")
    assert reader.running_in(init(7).namespace) == []
    first = start(writer, first, 7)
    assert reader.running_in(init(7).namespace) == [(first.id, first.run, init(7))]
    assert reader.running_in(init(8).namespace) == []
    # The number is in use again, and the first instance was not stopped.
    with writer.change() as change:
        second = steps.start(change, second, init(7, start_time=99))
    assert {(number, run) for number, run, _ in reader.running_in(init(7).namespace)} == {
        (first.id, first.run),
        (second.id, second.run),
    }
    with writer.change() as change:
        steps.stop(change, first)
        steps.remove(change, second)
    assert reader.running_in(init(7).namespace) == []


def test_unchanged_instance_is_reused(writer: Writer, reader: Reader) -> None:
    """Without a commit about an instance, its object is reused, whatever else is committed."""
    assert isinstance(reader.version(), bytes), "it is seen in memory whether anything was committed"
    one, other = add(writer, "c1"), add(writer, "c2")
    first = reader.instance(one.id)
    with writer.change() as change:
        steps.configure(change, other, {"user.a": "1"})
    assert reader.instance(one.id) is first


def test_kept_instances_are_bounded(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of kept instances is limited; beyond it, the oldest must be read again."""
    monkeypatch.setattr(reading, "KEPT_INSTANCES", 3)
    ids = [add(writer, f"c{number}").id for number in range(4)]
    first = [reader.instance(number) for number in ids[:3]]
    assert all(reader.instance(number) is one for number, one in zip(ids, first, strict=False))
    reader.instance(ids[3])
    assert reader.instance(ids[2]) is first[2]
    again = reader.instance(ids[0])
    assert again == first[0]
    assert again is not first[0]


@pytest.mark.parametrize("what", ["value", "wide value", "many keys", "device"])
def test_kept_bytes_are_bounded(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The bytes of kept instances are limited, whether they are in values, keys or devices."""
    monkeypatch.setattr(reading, "KEPT_BYTES", 100_000)
    with writer.change() as change:
        first, second = (
            steps.add(
                change,
                "default",
                name,
                config={
                    "value": {"user.a": "x" * 60_000},
                    "wide value": {"user.a": "\U0001f600" * 15_000},
                    "many keys": {f"user.{'k' * 240}{number}": "x" for number in range(250)},
                }.get(what),
                devices={"root": {"type": "disk", "path": "x" * 60_000}} if what == "device" else None,
            )
            for name in ("c1", "c2")
        )
    kept = reader.instance(first.id)
    reader.instance(second.id)
    # Outside of the assertion, whose message would show all the bytes.
    still_kept = reader.instance(first.id) is kept
    assert not still_kept


def test_instance_larger_than_the_limit(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance larger than the limit can be read, and others are kept after it."""
    monkeypatch.setattr(reading, "KEPT_BYTES", 1000)
    great, small = add(writer, "great", a="x" * 5000), add(writer, "small", a="x")
    assert value(reader, great.id, "a") == "x" * 5000
    first = reader.instance(small.id)
    assert reader.instance(small.id) is first


@pytest.mark.parametrize(("short", "kept"), [(0, True), (1, False)])
def test_kept_bytes_are_counted(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch, short: int, kept: bool
) -> None:
    """Instances of exactly the permitted bytes are kept; with a byte less permitted, the older one is dropped."""
    one, other = add(writer, "one", a="x"), add(writer, "other", a="xx")
    monkeypatch.setattr(reading, "KEPT_BYTES", sum(map(reading._size, (one, other))) - short)
    first = reader.instance(one.id)
    reader.instance(other.id)
    assert (reader.instance(one.id) is first) == kept


def test_changed_instance_counts_once(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that is changed and read repeatedly is counted once."""
    monkeypatch.setattr(reading, "KEPT_BYTES", 10_000)
    quiet, busy = add(writer, "quiet", a="x" * 1000), add(writer, "busy")
    first = reader.instance(quiet.id)
    for number in range(20):
        with writer.change() as change:
            busy = steps.configure(change, busy, {"user.a": str(number) * 1000})
        assert reader.instance(busy.id) == busy
    assert reader.instance(quiet.id) is first


def test_closed_reader_opens_again(writer: Writer, reader: Reader) -> None:
    """After close, the next read opens the store again, and is current."""
    one = start(writer, add(writer, **{"user.a": "1"}), 7)
    assert value(reader, one.id) == "1"
    assert reader.running_in(init(7).namespace)
    reader.close()
    with writer.change() as change:
        steps.configure(change, steps.stop(change, one), {"user.a": "2"})
    assert value(reader, one.id) == "2"
    assert reader.running_in(init(7).namespace) == []


def test_broken_store(settings: Settings, writer: Writer, reader: Reader) -> None:
    """A database that breaks under an open reader gives an error of one sentence that names the file."""
    one = add(writer, a="x" * 100_000)
    reader.close()
    content = bytearray(database(settings).read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    database(settings).write_bytes(content)
    for ask in (lambda: reader.instance(one.id), lambda: reader.running_in(7)):
        with pytest.raises(StoreError) as raised:
            ask()
        assert str(raised.value).startswith(f"{database(settings)}: ")
        assert "\n" not in str(raised.value)


def test_store_that_appears_later(settings: Settings) -> None:
    """A reader without a store raises an error at each read, and reads as soon as there is a store."""
    reader = Reader(settings.store.url)
    for _time in range(2):
        with pytest.raises(StoreError, match="missing"):
            reader.latest()
    one = add(Writer(settings, create=True), **{"user.a": "1"})
    assert value(reader, one.id) == "1"
    reader.close()


def test_deleted_store_is_noticed(settings: Settings, writer: Writer) -> None:
    """A store that was deleted and created again is noticed: while it is open, its inode number cannot be reused."""
    reader = Reader(settings.store.url)
    assert reader.latest() == 0
    number, replaced = database(settings).stat().st_ino, reader.replaced
    take_away(settings)
    with pytest.raises(StoreError):
        reader.latest()
    # File systems assign the lowest free inode number, or any.
    others = [database(settings).with_name(f"other-{count}") for count in range(20)]
    for other in others:
        other.touch()
    assert number not in {other.stat().st_ino for other in others}
    add(Writer(settings, create=True))
    assert reader.latest() == 1
    assert reader.replaced == replaced + 1
    reader.close()


def find_open(settings: Settings) -> list[str]:
    """Return what the descriptors of the store's database in this process refer to, in order."""
    links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    found = [os.readlink(link) for link in links if link.is_symlink()]
    return sorted(one for one in found if one.removesuffix(" (deleted)") == str(database(settings)))


def test_store_is_held_until_another_takes_its_place(settings: Settings, writer: Writer) -> None:
    """A closed reader holds the database's file, so that no other file gets its number; then only the next one's."""
    add(writer)
    reader = Reader(settings.store.url)
    for _time in range(2):
        reader.latest()
        reader.close()
        assert find_open(settings) == [str(database(settings))]
        take_away(settings)
        assert find_open(settings) == [f"{database(settings)} (deleted)"]
        add(Writer(settings, create=True))


def test_log_beside_a_store_that_was_closed(settings: Settings, writer: Writer) -> None:
    """A closed reader knows no write-ahead log: the number of one that it had open may be another's by now."""
    add(writer, "one")
    with closing(sqlite3.connect(database(settings))) as keeping:
        keeping.execute("SELECT count(*) FROM instances").fetchone()
        add(writer, "two")
        reader = Reader(settings.store.url)
        assert reader.latest() == 2
        reader.close()
        assert database(settings).with_name("store.db-wal").stat().st_size
        other = database(settings).with_name("other")
        shutil.copy(database(settings), other)
        other.rename(database(settings))
        assert reader.latest() == 2
        reader.close()


def test_log_of_another_store_is_not_read(settings: Settings, writer: Writer) -> None:
    """A restored copy beside the old write-ahead log is an error until that log is removed."""
    add(writer, "old")
    copy = database(settings).with_name("copy")
    with closing(sqlite3.connect(database(settings))) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    reader = Reader(settings.store.url)
    assert reader.latest() == 1
    add(writer, "new")
    assert reader.latest() == 2
    copy.rename(database(settings))
    with pytest.raises(StoreError, match="-wal"):
        reader.latest()
    for suffix in ("-wal", "-shm"):
        os.unlink(f"{database(settings)}{suffix}")
    assert reader.latest() == 1
    assert [one.name for one in known(settings)] == ["old"]
    reader.close()


def test_original_error_is_reported(settings: Settings, writer: Writer) -> None:
    """The original error is reported, not one of the rollback after it."""
    reader = Reader(settings.store.url)
    assert reader.latest() == 0
    one = add(writer, a="x" * 100_000)
    os.truncate(f"{database(settings)}-wal", 0)
    with pytest.raises(StoreError) as raised:
        reader.instance(one.id)
    assert "rollback" not in str(raised.value)
    reader.close()


def test_large_values_are_not_kept(settings: Settings, writer: Writer, reader: Reader) -> None:
    """Only a limited part of a large instance is kept in memory; every value can be read."""
    values = {f"user.{number:02}": str(number % 10) * 2_000_000 for number in range(6)}
    small = {f"user.small{number:04}": "s" * 3000 for number in range(1000)}
    one = add(writer, "large")
    with writer.change() as change:
        one = steps.configure(change, one, {**values, **small, "user.tiny": "t"})
    seen = reader.instance(one.id)
    assert seen is not None
    assert seen.large >= values.keys()
    assert sorted(seen.config.keys() | seen.large) == sorted(one.config)
    assert sum(len(value) for value in seen.config.values()) <= INSTANCE_BYTES
    assert seen.config["user.tiny"] == "t"
    reads = ValueReader(settings.store.url)
    assert all(reads.value(seen, key) == one.config[key] for key in sorted(seen.large)[:10])
    assert reads.value(seen, "user.none") is None


def test_switches_are_always_kept(writer: Writer, reader: Reader) -> None:
    """However many keys an instance has, its switches are kept in memory."""
    one = add(writer, "many")
    switches = {"security.guestapi": "false", "security.devlxd.images": "true"}
    with writer.change() as change:
        steps.configure(change, one, {f"user.{number}": "x" * 300 for number in range(4_000)} | switches)
    seen = reader.instance(one.id)
    assert seen is not None
    assert seen.large
    assert switches.items() <= seen.config.items()
    assert not DIALECTS["incus"].switched_on(seen.config)


def test_large_instance_drops_no_other(settings: Settings, writer: Writer, reader: Reader) -> None:
    """Reading a large instance does not drop others from memory."""
    others = [add(writer, f"c{number}") for number in range(20)]
    big = add(writer, "large")
    with writer.change() as change:
        steps.configure(change, big, {f"user.{number}": "v" * 60_000 for number in range(200)})
    before = [reader.instance(other.id) for other in others]
    for _time in range(3):
        reader.instance(big.id)
    assert all(reader.instance(other.id) is kept for other, kept in zip(others, before, strict=True))


@pytest.mark.parametrize("what", ["devices", "names"])
def test_instance_that_exceeds_what_is_kept_drops_no_other(writer: Writer, reader: Reader, what: str) -> None:
    """An instance whose devices or names alone exceed what a worker keeps is kept beside the others, one at a time."""
    others = [add(writer, f"c{number}") for number in range(20)]
    large = [add(writer, f"large{number}") for number in range(2)]
    for one in large:
        with writer.change() as change:
            if what == "devices":
                # One wide character makes Python keep each of the string's in four bytes.
                wide = "\U0001f600" + "x" * 900_000
                steps.replace_devices(change, one, {f"d{number}": {"type": "nic", "a": wide} for number in range(16)})
            else:
                steps.configure(change, one, {f"user.{number:04}{'n' * 1000}": "x" * 3000 for number in range(4000)})
    before = [reader.instance(other.id) for other in others]
    kept = reader.instance(large[0].id)
    assert kept is not None
    assert what == "names" or reading._size(kept) > KEPT_BYTES
    assert reader.instance(large[0].id) is kept
    for _time in range(10):
        for one in large:
            reader.instance(one.id)
    assert reader.instance(large[0].id) is not kept
    assert all(reader.instance(other.id) is one for other, one in zip(others, before, strict=True))


def test_large_value_of_the_operator_counts(settings: Settings, writer: Writer, reader: Reader) -> None:
    """For a key in both layers the operator's value counts, whichever of the two is large."""
    with writer.change() as change:
        reconcile(
            change,
            "lxc",
            [Observed(key="k", project="default", name="c1", config={"user.a": "s" * 70_000, "user.b": "s"})],
        )
        one = get_instance(change, "default", "c1")
        steps.configure(change, one, {"user.a": "o", "user.b": "o" * 70_000})
    seen = reader.instance(one.id)
    assert seen is not None
    assert (dict(seen.config), seen.large) == ({"user.a": "o"}, frozenset({"user.b"}))
    assert ValueReader(settings.store.url).value(seen, "user.b") == "o" * 70_000


def test_value_of_a_replaced_store(settings: Settings, writer: Writer, reader: Reader) -> None:
    """An id that belongs to another instance, in a replaced store, gives no value."""
    one = add(writer, "c1")
    with writer.change() as change:
        steps.configure(change, one, {"user.a": "secret" * 20_000})
    seen = reader.instance(one.id)
    assert seen is not None
    assert ValueReader(settings.store.url).value(replace_instance(seen, uuid=str(uuid4())), "user.a") is None


def test_entries_are_read_in_small_portions(writer: Writer, reader: Reader) -> None:
    """Fewer large entries are read at a time, and all in the end."""
    one = add(writer, "one")
    with writer.change() as change:
        steps.configure(change, one, {f"user.{number}": "x" * 60_000 for number in range(12)})
    portions, after = [], 1
    while True:
        read = reader.entries(after, 1000)
        portions.append(len(read.found))
        after = read.found[-1].id
        if not read.more:
            break
    assert portions == [5, 5, 2]
    assert len(reader.entries(1, 2).found) == 2
    first = len(reader.entries(1, 1).found[0].metadata)
    assert [len(reader.entries(1, 9, most_bytes=first - less).found) for less in (0, 1)] == [2, 1]
    assert len(reader.entries(1, 1000, most_bytes=100_000).found) == 2


#: JSON writes a control character as six bytes, so that one event has 24 MiB.
_CONTROLS = ["\x01" * (1 << 21), "\x02" * (1 << 21)]


def test_large_entries_are_read_part_by_part(settings: Settings, writer: Writer, reader: Reader) -> None:
    """The largest event that there can be is read in parts of 64 KiB; one of 64 KiB still is read at once."""
    one = add(writer, "one", **{"user.a": _CONTROLS[0]})
    overhead = len(json.dumps({"key": "user.b", "old_value": "", "value": ""}, separators=(",", ":")))
    with writer.change() as change:
        fits, exceeds = ("x" * (PART_BYTES - overhead + more) for more in (0, 1))
        steps.configure(change, one, {"user.a": _CONTROLS[1], "user.b": fits, "user.c": exceeds})
    largest, small, large = reader.entries(1, 1000).found
    assert (small.left_out, len(small.metadata)) == (0, PART_BYTES)
    assert large.left_out == PART_BYTES + 1
    assert len(large.metadata) == BEGINNING_BYTES
    assert largest.left_out > 24 * (1 << 20)
    for entry in (largest, large):
        parts: list[bytes] = []
        while part := reader.entry_part(entry, sum(map(len, parts))):
            parts.append(part)
        assert max(map(len, parts)) == PART_BYTES
        assert sum(map(len, parts)) == entry.left_out
        metadata = json.loads(b"".join(parts))
        assert metadata["value"] in (_CONTROLS[1], exceeds)
    with view(settings.store.url) as store:
        assert json.loads(read_entries(store, largest.id - 1, 1).found[0].metadata)["old_value"] == _CONTROLS[0]
        # Of large ones as many at a time as one can have in memory.
        read = read_entries(store, largest.id - 1, 3)
        assert (len(read.found), read.more) == (1, True)


def test_parts_of_an_entry_that_is_gone(settings: Settings, writer: Writer, reader: Reader) -> None:
    """Parts go with their entry, and are none of another entry that has its id in another store."""
    one = add(writer, "one")
    with writer.change() as change:
        steps.configure(change, one, {"user.a": "x" * 100_000})
    entry = reader.entries(1, 1).found[0]
    assert reader.entry_part(entry, 0) is not None
    assert reader.entry_part(replace_instance(entry, timestamp="2026-01-01T00:00:00Z"), 0) is None
    assert reader.entry_part(replace_instance(entry, instance_id=one.id + 1), 0) is None
    short = Settings(store=settings.store, events=EventSettings(keep_entries=1))
    for number in range(3):
        with Writer(short).change() as change:
            steps.configure(change, get_instance(change, "default", "one"), {"user.b": str(number)})
    assert reader.entry_part(entry, 0) is None
    with closing(sqlite3.connect(database(settings))) as connection:
        assert connection.execute("SELECT count(*) FROM notification_parts").fetchone() == (0,)


def test_instance_as_of_the_last_identification(settings: Settings, writer: Writer, reader: Reader) -> None:
    """`seen` gives the object that `instance` gives, if nothing was committed between; it never looks by itself."""
    one, other = add(writer), add(writer, "c2")
    assert reader.seen(one.id) is None, "nobody has looked yet"
    reader.running_in(1)
    assert reader.seen(one.id) is None, "it was not read yet"
    found = reader.instance(one.id)
    assert reader.seen(one.id) is found
    with writer.change() as change:
        steps.configure(change, other, {"user.a": "1"})
    assert reader.seen(one.id) is found, "as of the look before"
    reader.running_in(1)
    assert reader.seen(one.id) is None, "something was committed before the last look"
    assert reader.instance(one.id) is found
    assert reader.seen(one.id) is found
    take_away(settings)
    with pytest.raises(StoreError):
        reader.running_in(1)
    assert reader.seen(one.id) is None


def test_policies_as_they_are_now(settings: Settings, writer: Writer, reader: Reader) -> None:
    """`policies_of` gives what holds after each commit, of the instance and its project; none for one that is gone."""
    one, other = add(writer), add(writer, "c2")
    assert reader.policies_of(one.id) == ()
    hidden, secret = KeyPolicy("user.a", hidden=True), KeyPolicy("user.b", secret=True)
    with writer.change() as change:
        policies.put(change, "default", one, hidden)
    assert reader.policies_of(one.id) == (hidden,)
    assert reader.policies_of(other.id) == ()
    with writer.change() as change:
        policies.put(change, "default", None, secret)
    assert reader.policies_of(one.id) == (secret, hidden)
    assert reader.policies_of(other.id) == (secret,)
    with writer.change() as change:
        steps.remove(change, other)
    assert reader.policies_of(other.id) == ()
    with writer.change() as change:
        policies.remove(change, "default", one, "user.a")
        policies.remove(change, "default", None, "user.b")
    assert reader.policies_of(one.id) == ()
    take_away(settings)
    reader.close()
    with pytest.raises(StoreError):
        reader.policies_of(one.id)


@pytest.mark.parametrize("hidden", [False, True])
def test_policies_after_entries(settings: Settings, writer: Writer, reader: Reader, hidden: bool) -> None:
    """Who has read entries knows whether there are policies, as of the same moment, and need not look once more."""
    one = add(writer)
    assert reader.policies_of(one.id) == ()
    policy = KeyPolicy("user.a", hidden=True)
    with writer.change() as change:
        policies.put(change, "default", one, policy)
        if not hidden:
            policies.remove(change, "default", one, policy.pattern)
    reader.entries(0, 10)
    if hidden:
        assert reader.policies_of(one.id) == (policy,)
    reader.entries(0, 10)
    take_away(settings)
    assert reader.policies_of(one.id) == ((policy,) if hidden else ())


def test_limits_of_what_is_kept() -> None:
    """The limits of a worker's memory, from which security.md computes what one instance can make it hold."""
    limits = {
        "KEPT_INSTANCES": 1024,
        "KEPT_BYTES": 32 << 20,
        "KEPT_NAMESPACES": 4096,
        "READ_BYTES": 64 << 10,
        "INSTANCE_BYTES": 1 << 20,
        "ENTRIES_BYTES": 256 << 10,
        "LAST_ID": 2**63 - 1,
    }
    assert {name: getattr(reading, name) for name in limits} == limits


@pytest.mark.parametrize("ask", ["instance", "latest", "has_sources", "running_in", "snapshot_of"])
def test_connection_that_fails(reader: Reader, writer: Writer, ask: str) -> None:
    """After an error of the database, the next read opens another connection."""
    one = add(writer)
    arguments = {"instance": (one.id,), "snapshot_of": (one.id,), "running_in": (7,)}.get(ask, ())
    reader.latest()
    assert reader._connection is not None
    reader._connection.close()
    with pytest.raises(StoreError):
        getattr(reader, ask)(*arguments)
    getattr(reader, ask)(*arguments)


def test_used_instances_are_kept_longest(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that is still current after a commit counts as used, and another is dropped in its place."""
    monkeypatch.setattr(reading, "KEPT_INSTANCES", 2)
    used, unused, new = (add(writer, name) for name in ("used", "unused", "new"))
    first, second = reader.instance(used.id), reader.instance(unused.id)
    add(writer, "other")
    assert reader.instance(used.id) is first
    reader.instance(new.id)
    assert reader.instance(used.id) is first
    assert reader.instance(unused.id) is not second


def test_instance_and_id_of_one_moment(writer: Writer, reader: Reader) -> None:
    """`snapshot_of` gives the object in memory while it is current, a new one after a change, and the latest id."""
    assert reader.snapshot_of(1) == (None, 0)
    one = add(writer, **{"user.a": "1"})
    assert reader.snapshot_of(one.id) == (one, 1)
    kept = reader.instance(one.id)
    add(writer, "other")
    found, event_id = reader.snapshot_of(one.id)
    assert (found is kept, event_id) == (True, 2)
    with writer.change() as change:
        changed = steps.configure(change, one, {"user.a": "2"})
    assert reader.snapshot_of(one.id) == (changed, 3)
    with writer.change() as change:
        steps.remove(change, changed)
    assert reader.snapshot_of(one.id) == (None, 4)


def test_namespaces_are_bounded(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many namespaces as permitted are kept; with one more, the others are forgotten."""
    monkeypatch.setattr(reading, "KEPT_NAMESPACES", 3)
    found = [reader.running_in(number) for number in range(3)]
    assert all(reader.running_in(number) is found[number] for number in range(3))
    last = reader.running_in(3)
    assert reader.running_in(3) is last
    assert not any(reader.running_in(number) is found[number] for number in range(2))


def test_closed_reader_holds_no_log(settings: Settings, writer: Writer) -> None:
    """After close, no descriptor of the write-ahead log stays open."""

    def opened() -> int:
        links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        return sum(link.is_symlink() and os.readlink(link).startswith(f"{database(settings)}-wal") for link in links)

    one = add(writer)
    assert opened() == 0
    reader = Reader(settings.store.url)
    reader.instance(one.id)
    assert opened() == 1
    reader.close()
    assert opened() == 0


def test_closed_reader_counts_anew(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept before close counts no more."""
    one = add(writer, a="x")
    monkeypatch.setattr(reading, "KEPT_BYTES", reading._size(one))
    reader.instance(one.id)
    reader.close()
    again = reader.instance(one.id)
    assert reader.instance(one.id) is again


def test_replaced_store_without_a_log(settings: Settings, writer: Writer) -> None:
    """Nothing is kept of a store without a write-ahead log when another one takes its place."""
    one = start(writer, add(writer, "one", **{"user.a": "old"}), 7)
    with closing(sqlite3.connect(database(settings))) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    other = database(settings).with_name("other")
    shutil.copy(database(settings), other)
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("UPDATE config SET value = 'new'")
        connection.execute("UPDATE instances SET init_pid = NULL")
    reader = Reader(settings.store.url)
    assert value(reader, one.id) == "old"
    assert [number for number, _run, _init in reader.running_in(init(7).namespace)] == [one.id]
    other.rename(database(settings))
    assert reader.running_in(init(7).namespace) == []
    assert value(reader, one.id) == "new"
    reader.close()


def test_store_that_cannot_be_reached(settings: Settings, tmp_path: Path) -> None:
    """If the store's path cannot be followed, the error says why, and nothing read before counts."""
    there = tmp_path / "there"
    there.mkdir()
    moved = Settings(store=StoreSettings(url=f"sqlite:///{there}/store.db"))
    one = add(Writer(moved, create=True))
    reader = Reader(moved.store.url)
    reader.running_in(1)
    assert reader.instance(one.id) is reader.seen(one.id)
    there.rename(tmp_path / "away")
    there.touch()
    with pytest.raises(StoreError, match="Not a directory"):
        reader.running_in(1)
    assert reader.seen(one.id) is None
    there.unlink()
    (tmp_path / "away").rename(there)
    assert reader.instance(one.id) == one
    reader.close()


@pytest.mark.parametrize(("short", "complete"), [(0, True), (1, False)])
def test_instance_of_exactly_its_share(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch, short: int, complete: bool
) -> None:
    """An instance of exactly the permitted bytes is kept whole; with a byte less permitted, a part of it."""
    one = add(writer, **{"user.a": "x" * 100, "user.b": "y" * 200})
    monkeypatch.setattr(reading, "INSTANCE_BYTES", reading._size(one) - short)
    seen = reader.instance(one.id)
    assert seen is not None
    assert (seen.large == frozenset()) == complete


@pytest.mark.parametrize(("short", "kept"), [(0, {"user.a", "user.b"}), (1, {"user.a"})])
def test_values_that_fit(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch, short: int, kept: set[str]
) -> None:
    """Of a large instance, the smallest values are kept up to exactly the permitted bytes, with their keys."""
    one = add(writer, **{"user.c": "z" * 12, "user.a": "x" * 10, "user.b": "y" * 11})
    share = sum(sys.getsizeof(key) + sys.getsizeof(one.config[key]) for key in ("user.a", "user.b"))
    monkeypatch.setattr(reading, "INSTANCE_BYTES", share - short)
    seen = reader.instance(one.id)
    assert seen is not None
    assert seen.config.keys() == kept
    assert seen.large == one.config.keys() - kept


def test_whole_instance(settings: Settings, writer: Writer, reader: Reader) -> None:
    """`whole` has the values that a reader leaves out; a removed instance, or another of its id, is none."""
    one = add(writer, **{"user.a": "x" * 100_000})
    seen, reads = reader.instance(one.id), ValueReader(settings.store.url)
    assert seen is not None
    assert seen.large == {"user.a"}
    assert reads.whole(seen) == (one, 1)
    assert reads.value_at(seen, "user.a") == ("x" * 100_000, 1)
    assert reads.whole(replace_instance(seen, uuid=str(uuid4()))) == (None, 1)
    with writer.change() as change:
        steps.remove(change, one)
    assert reads.whole(seen) == (None, 2)
    assert reads.value_at(seen, "user.a") == (None, 2)


@pytest.mark.parametrize("statement", [rows._ENTRIES, rows._OWN_ENTRIES])
def test_entries_are_not_sorted(tmp_path: Path, statement: str) -> None:
    """Entries are read from an index, in order: for a batch of a resuming client, not the whole log is read."""
    Writer(Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/store.db")), create=True)
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        parameters = {"after": 0, "until": 1, "instance_id": 1}
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    assert plan
    assert not [step for step in plan if "TEMP B-TREE" in step]
