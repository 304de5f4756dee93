"""The doorbell: every listener is woken by each commit, and ringing endangers neither the commit nor the host."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.bell import bell
from guestapi.store.doorbell import Doorbell
from guestapi.store.writing import Writer
from tests.harness.service import USER
from tests.harness.waiting import TIMEOUT
from tests.store.processes import add, config_of, database, init, other_process


@pytest.fixture
def doorbell(settings: Settings, writer: Writer) -> Iterator[Doorbell]:
    """A listener at an empty store."""
    listener = Doorbell(database(settings))
    yield listener
    listener.close()


def rings(listener: Doorbell, seconds: float = 10) -> bool:
    """Wait for an event of the directory; return whether it was a ring."""
    return bool(select.select([listener.fileno()], [], [], seconds)[0]) and listener.heard()


def test_each_commit_rings(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """Every change rings, from the first one on, and also one by another process."""
    add(writer)
    assert rings(doorbell)
    assert not doorbell.heard()
    add(writer, "c2")
    assert rings(doorbell)
    with other_process(
        settings, "with Writer(settings).change() as change: steps.add(change, 'default', 'c3')"
    ) as other:
        other.done()
    assert rings(doorbell)


def test_wait_lasts(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """A wait without a ring lasts as long as was asked for, also if other files change meanwhile."""
    database(settings).with_name("store.db-other").touch()
    began = time.monotonic()
    assert not doorbell.wait(0.05)
    assert time.monotonic() - began >= 0.05


def test_other_files_do_not_ring(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """Other files that are created and changed beside the store, such as SQLite's, do not ring."""
    database(settings).with_name("store.db-other").touch()
    assert not doorbell.wait(0.05)
    add(writer)
    assert doorbell.wait(TIMEOUT)


def test_every_change_of_readiness_rings(writer: Writer, doorbell: Doorbell) -> None:
    """A change to Ready or to Started rings, although Started is no event: the mirror reports both to its daemon."""
    with writer.change() as change:
        one = steps.start(change, steps.add(change, "default", "c1"), init(100))
    assert rings(doorbell)
    for ready in (True, False, True):
        assert writer.set_ready(one.id, one.run, ready)
        assert rings(doorbell)
        assert writer.set_ready(one.id, one.run, ready), "a repeated state"
        assert not doorbell.wait(0.05)
    assert not writer.set_ready(one.id, one.run + 1, False), "of another run"
    assert not doorbell.wait(0.05)


def test_empty_transaction_does_not_ring(writer: Writer, doorbell: Doorbell) -> None:
    """A transaction that changes nothing, or is rolled back, does not ring."""
    one = add(writer, a="1")
    assert rings(doorbell)
    with writer.change() as change:
        steps.configure(change, one, {"a": "1"})

    def attempt() -> None:
        with writer.change() as change:
            steps.configure(change, one, {"a": "2"})
            raise KeyError

    with pytest.raises(KeyError):
        attempt()
    assert not doorbell.heard()


def test_ring_comes_after_the_commit(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """The ring comes after the commit, so a woken reader finds the change."""
    with writer.change() as change:
        steps.add(change, "default", "c1", config={"a": "1"})
        assert not doorbell.heard()
    assert rings(doorbell)
    assert config_of(settings) == {"a": "1"}


def test_deleted_doorbell(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """After the doorbell's file was deleted, the next change rings nevertheless."""
    add(writer)
    assert rings(doorbell)
    bell(database(settings)).unlink()
    add(writer, "c2")
    assert rings(doorbell)


@pytest.mark.root
def test_inaccessible_doorbell(users_directory: Path) -> None:
    """A doorbell that the writer may not touch does not make its change fail."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{users_directory}/store.db"))
    add(Writer(settings, create=True))
    # As a command of root leaves it that was killed before it changed the owner.
    os.chown(bell(database(settings)), 0, 0)
    code = """
with Writer(settings).change() as change:
    steps.configure(change, get_instance(change, "default", "c1"), {"a": "1"})
send("no error")
"""
    with other_process(settings, code, USER) as other:
        said = other.read_line()
    assert config_of(settings) == {"a": "1"}
    assert said == "no error"


@pytest.mark.root
def test_root_follows_no_symbolic_link(users_directory: Path, tmp_path: Path) -> None:
    """A symbolic link in the service's directory cannot make root create, change or touch another file."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{users_directory}/store.db"))
    writer = Writer(settings, create=True)
    missing, existing = tmp_path / "missing", tmp_path / "existing"
    existing.touch()
    os.utime(existing, (1, 1))
    for name, target in (("c1", missing), ("c2", existing)):
        bell(database(settings)).unlink(missing_ok=True)
        bell(database(settings)).symlink_to(target)
        add(writer, name)
    assert not missing.exists()
    assert existing.stat().st_uid == 0
    assert existing.stat().st_mtime == 1


def test_wait_sleeps_until_the_kernel_reports(doorbell: Doorbell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait asks the kernel once, for as long as it lasts, in milliseconds."""
    asked: list[int] = []

    def read(timeout: int) -> list[object]:
        asked.append(timeout)
        time.sleep(timeout / 1000)
        return []

    monkeypatch.setattr(vars(doorbell)["_inotify"], "read", read)
    assert not doorbell.wait(0.2)
    assert asked[0] in range(100, 201)
    assert all(timeout < asked[0] for timeout in asked[1:])
