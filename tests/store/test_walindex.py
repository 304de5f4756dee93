"""The header of the write-ahead log's index shows every commit, of any process, at any state of the log."""

from __future__ import annotations

import mmap
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from guestapi.settings import Settings
from guestapi.store import engine, steps
from guestapi.store.engine import database_file
from guestapi.store.lookup import get_instance
from guestapi.store.reading import Reader
from guestapi.store.walindex import header, map_index
from guestapi.store.writing import Writer
from tests.store.processes import add, other_process
from tests.store.test_reading import value


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The SQL statements of every connection that is opened from now on."""
    asked: list[str] = []
    connect = engine._connect

    def traced(file: str, lock_seconds: float) -> sqlite3.Connection:
        connection = connect(file, lock_seconds)
        connection.set_trace_callback(asked.append)
        return connection

    monkeypatch.setattr(engine, "_connect", traced)
    return asked


def test_current_instance_needs_no_statement(statements: list[str], settings: Settings, writer: Writer) -> None:
    """A current instance is read again without any statement; after a change there is at least one."""
    one, other = add(writer, "one"), add(writer, "other")
    with closing(Reader(settings.store.url)) as reader:
        assert reader.instance(one.id) == one
        reader.running_in(1)
        statements.clear()
        for _time in range(3):
            assert reader.instance(one.id) == one
        assert statements == []
        with writer.change() as change:
            steps.configure(change, other, {"user.a": "1"})
        statements.clear()
        assert reader.instance(one.id) == one
        assert statements != []


def test_header_shows_every_commit(settings: Settings, writer: Writer, reader: Reader) -> None:
    """The header changes with each commit of another process, and is the same without one and after a read."""
    code = """
writer = Writer(settings)
with writer.change() as change:
    steps.add(change, "default", "c1")
while value := receive():
    with writer.change() as change:
        steps.configure(change, get_instance(change, "default", "c1"), {"user.a": value})
    send("done")
"""
    reader.latest()
    index = map_index(database_file(settings.store.url))
    assert index is not None
    seen = {header(index)}
    with other_process(settings, code) as other:
        for number in range(1, 30):
            other.write_line(str(number))
            assert other.read_line() == "done"
            assert header(index) not in seen
            seen.add(header(index))
            reader.latest()
            assert header(index) in seen


@pytest.mark.parametrize("mode", ["PASSIVE", "FULL", "RESTART", "TRUNCATE"])
def test_checkpoints(settings: Settings, writer: Writer, reader: Reader, mode: str) -> None:
    """Checkpoints that empty or restart the log hide no later change."""
    one = add(writer, **{"user.a": "0"})
    for number in range(1, 6):
        assert value(reader, one.id) == str(number - 1)
        with closing(sqlite3.connect(database_file(settings.store.url))) as connection:
            assert connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()[0] == 0
        with writer.change() as change:
            steps.configure(change, get_instance(change, "default", "c1"), {"user.a": str(number)})
        assert value(reader, one.id) == str(number)


def test_deleted_index(settings: Settings, writer: Writer, reader: Reader) -> None:
    """After SQLite has deleted the index with the last connection, a new reader sees changes as before."""
    one = add(writer, **{"user.a": "0"})
    index = database_file(settings.store.url).with_name("store.db-shm")
    for number in range(1, 6):
        assert value(reader, one.id) == str(number - 1)
        assert index.exists()
        reader.close()
        assert not index.exists()
        assert value(reader, one.id) == str(number - 1)
        with writer.change() as change:
            steps.configure(change, get_instance(change, "default", "c1"), {"user.a": str(number)})
        assert value(reader, one.id) == str(number)


def test_closing_a_reader_leaves_locks_alone(settings: Settings, writer: Writer, reader: Reader) -> None:
    """A reader that closes and opens again releases no lock of a writer in the same process (fcntl_locking(2))."""
    code = """
writer = Writer(Settings(store=StoreSettings(url=sys.argv[1], lock_seconds=0.05)))
while receive():
    try:
        with writer.change() as change:
            steps.add(change, "default", "c2")
        send("changed")
    except StoreError as error:
        send(type(error).__name__)
"""
    reader.latest()
    with other_process(settings, code) as other:
        with writer.change() as change:
            steps.add(change, "default", "c1")
            for _time in range(3):
                reader.close()
                reader.latest()
                other.write_line("change")
                assert other.read_line() == "StoreBusyError"
        other.write_line("change")
        assert other.read_line() == "changed"


def test_readers_keep_few_descriptors(settings: Settings, writer: Writer, reader: Reader) -> None:
    """A reader that closes and opens the same store repeatedly keeps no additional descriptors."""
    with writer.change():
        reader.latest()
        before = len(os.listdir("/proc/self/fd"))
        for _time in range(20):
            reader.close()
            reader.latest()
        assert len(os.listdir("/proc/self/fd")) == before


def test_store_without_a_log(settings: Settings, writer: Writer) -> None:
    """A database without a write-ahead log is read, too, and its changes are seen."""
    one = add(writer, **{"user.a": "0"})
    with closing(sqlite3.connect(database_file(settings.store.url))) as connection:
        assert connection.execute("PRAGMA journal_mode = DELETE").fetchone() == ("delete",)
    with closing(Reader(settings.store.url)) as reader:
        for number in range(1, 4):
            with writer.change() as change:
                steps.configure(change, get_instance(change, "default", "c1"), {"user.a": str(number)})
            assert value(reader, one.id) == str(number)
            assert value(reader, one.id) == str(number)


def test_size_of_the_header() -> None:
    """The header is the 48 bytes that SQLite itself compares; the bytes after it change without a commit."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    for number in range(mmap.PAGESIZE):
        before = header(page)
        page[number] ^= 0xFF
        assert (header(page) != before) == (number < 48)


@pytest.mark.parametrize(("size", "mapped"), [(0, False), (mmap.PAGESIZE - 1, False), (mmap.PAGESIZE, True)])
def test_index_that_is_too_short(tmp_path: Path, size: int, mapped: bool) -> None:
    """An index of less than a page is not mapped, because it may lack the header; one page suffices."""
    database = tmp_path / "store.db"
    with (tmp_path / "store.db-shm").open("wb+") as index:
        index.truncate(size)
        assert (map_index(database) is not None) == mapped
