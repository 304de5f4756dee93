"""The doorbell: who listens hears each commit, and ringing endangers neither the commit nor the host."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.doorbell import Doorbell, bell
from guestapi.store.writing import Writer
from tests.harness.service import USER
from tests.store.processes import add, config_of, database, init, other_process


@pytest.fixture
def doorbell(settings: Settings, writer: Writer) -> Iterator[Doorbell]:
    """A listener at a store in which nothing was changed yet."""
    listener = Doorbell(database(settings))
    yield listener
    listener.close()


def rings(listener: Doorbell, seconds: float = 10) -> bool:
    """Wait until something is heard: whether it was a ring."""
    return bool(select.select([listener.fileno()], [], [], seconds)[0]) and listener.heard()


def test_each_commit_is_heard(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """Every change that is told rings, the very first as well, and also one by another process."""
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


def test_only_the_bell_is_waited_for(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """Who waits is not woken by other files that come and change beside the store, as SQLite's do."""
    database(settings).with_name("store.db-other").touch()
    assert not doorbell.wait(0.05)
    add(writer)
    assert doorbell.wait(10)


def test_state_rings_whatever_it_is(writer: Writer, doorbell: Doorbell) -> None:
    """Ready and Started both ring, though Started is no news for any listener: a daemon's mirror tells the daemon."""
    with writer.change() as change:
        one = steps.start(change, steps.add(change, "default", "c1"), init(100))
    assert rings(doorbell)
    for ready in (True, False, True):
        assert writer.set_ready(one.id, one.run, ready)
        assert rings(doorbell)
        assert writer.set_ready(one.id, one.run, ready), "said again"
        assert not doorbell.wait(0.05)
    assert not writer.set_ready(one.id, one.run + 1, False), "of another run"
    assert not doorbell.wait(0.05)


def test_nothing_new_does_not_ring(writer: Writer, doorbell: Doorbell) -> None:
    """A transaction that changes nothing, or is undone, wakes nobody."""
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
    """Within the transaction nothing is heard: who is woken finds what he was woken for."""
    with writer.change() as change:
        steps.add(change, "default", "c1", config={"a": "1"})
        assert not doorbell.heard()
    assert rings(doorbell)
    assert config_of(settings) == {"a": "1"}


def test_bell_that_was_taken_away(settings: Settings, writer: Writer, doorbell: Doorbell) -> None:
    """When somebody has deleted the bell, the next change rings all the same."""
    add(writer)
    assert rings(doorbell)
    bell(database(settings)).unlink()
    add(writer, "c2")
    assert rings(doorbell)


@pytest.mark.root
def test_bell_that_cannot_be_rung(users_directory: Path) -> None:
    """What is committed is committed: a bell that the writer may not touch does not make the change an error."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{users_directory}/store.db"))
    add(Writer(settings, create=True))
    # As a root's command leaves it that was killed before it gave the bell away.
    os.chown(bell(database(settings)), 0, 0)
    code = """
with Writer(settings).change() as change:
    steps.configure(change, get_instance(change, "default", "c1"), {"a": "1"})
say("no error")
"""
    with other_process(settings, code, USER) as other:
        said = other.hear()
    assert config_of(settings) == {"a": "1"}
    assert said == "no error"


@pytest.mark.root
def test_root_follows_no_link_of_the_service(users_directory: Path, tmp_path: Path) -> None:
    """The directory is the service's: a link that it plants there makes root create, give away or touch nothing."""
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
