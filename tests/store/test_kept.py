"""Connections that stay open between uses: what they show and write is always what lies at the path."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guestapi.settings import Settings
from guestapi.store import steps
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import list_instances
from guestapi.store.view import Views, view
from guestapi.store.writing import Writer


@pytest.fixture
def kept(settings: Settings) -> Writer:
    """A writer that keeps the store open."""
    return Writer(settings, create=True, keep=True)


def add(writer: Writer, name: str) -> None:
    """Add an instance."""
    with writer.change() as change:
        steps.add(change, "default", name)


def names(views: Views) -> list[str]:
    """Return the names of all instances."""
    with views.view() as store:
        return [one.name for one in list_instances(store)]


def open_files() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def replace(settings: Settings, directory: Path) -> None:
    """Put a copy of the database, without what was written last, in its place."""
    file = database_file(settings.store.url)
    file.rename(directory / "aside.db")
    for companion in ("-wal", "-shm"):
        Path(f"{file}{companion}").unlink(missing_ok=True)
    Writer(settings, create=True)


def test_each_look_sees_what_others_have_committed(settings: Settings, kept: Writer) -> None:
    """A look sees every commit before it, by whatever connection, and the descriptors do not become more."""
    views, other = Views(settings.store.url), Writer(settings)
    opened = []
    for number in range(20):
        add(other if number % 2 else kept, f"c{number}")
        assert len(names(views)) == number + 1
        opened.append(open_files())
    # SQLite may leave some open for their next use while other connections have locks (os_unix.c, setPendingFd).
    assert opened[-1] <= opened[3]


def test_another_file_in_its_place(settings: Settings, kept: Writer, tmp_path: Path) -> None:
    """Another database that is put in its place is the one that is read and written from then on."""
    views = Views(settings.store.url)
    add(kept, "old")
    assert names(views) == ["old"]
    replace(settings, tmp_path)
    assert names(views) == []
    add(kept, "new")
    assert names(views) == ["new"]
    with view(settings.store.url) as store:
        assert [one.name for one in list_instances(store)] == ["new"]


def test_a_database_that_is_gone(settings: Settings, kept: Writer, tmp_path: Path) -> None:
    """Without the file, neither is anything read nor written; when it is back, both go on."""
    views, file = Views(settings.store.url), database_file(settings.store.url)
    add(kept, "a")
    assert names(views) == ["a"]
    shutil.move(file, tmp_path / "aside.db")
    with pytest.raises(StoreError):
        names(views)
    with pytest.raises(StoreError):
        add(kept, "lost")
    shutil.move(tmp_path / "aside.db", file)
    add(kept, "b")
    assert names(views) == ["a", "b"]


def test_after_a_failure(settings: Settings, kept: Writer) -> None:
    """What a change wrote that failed is undone, and the next change and look work."""
    views = Views(settings.store.url)

    def fail() -> None:
        with kept.change() as change:
            steps.add(change, "default", "undone")
            raise ZeroDivisionError

    def fail_to_look() -> None:
        with views.view():
            raise ZeroDivisionError

    for failing in (fail, fail_to_look):
        with pytest.raises(ZeroDivisionError):
            failing()
    add(kept, "a")
    assert names(views) == ["a"]


def test_several_threads(settings: Settings, kept: Writer) -> None:
    """Threads that use it at the same time get all of their changes written."""
    views = Views(settings.store.url)

    def work(number: int) -> None:
        add(kept, f"c{number}")
        assert f"c{number}" in names(views)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(40)))
    assert len(names(views)) == 40
