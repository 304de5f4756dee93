"""`guestapi notice` and `guestapi notices`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestapi.callers.namespaces import boot_id
from guestapi.model import Init, Instance
from guestapi.store import backup, notices, steps
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.cli.command import Done, Guestapi

INIT = Init(100, 5, boot_id(), 7)


@pytest.fixture
def running(c1: Guestapi) -> Guestapi:
    """The command, with a running instance c1."""
    start(c1, INIT)
    return c1


def start(guestapi: Guestapi, init: Init) -> None:
    """Register an init of c1."""
    with Writer(guestapi.settings).change() as change:
        steps.start(change, get_instance(change, "default", "c1"), init)


def listed(guestapi: Guestapi) -> list[dict[str, str]]:
    """All notices."""
    found: list[dict[str, str]] = guestapi("notices", "list", "--format", "json").json
    return found


def test_send_list_cancel(running: Guestapi) -> None:
    """The command prints the id; the list has it; what is cancelled is gone; control characters are escaped."""
    number = running.good("notice", "c1", "stop", "--in", "5m").strip()
    assert [(one["id"], one["instance"], one["type"], one["status"]) for one in listed(running)] == [
        (number, "c1", "stop", "pending")
    ]
    running.good("notice", "c1", "look \x1b[2J", "--in", "2h")
    assert "\x1b" not in running.good("notices", "list")
    assert "\\x1b[2J" in running.good("notices", "list", "c1")
    running.good("notices", "cancel", "c1", number)
    assert [one["type"] for one in listed(running)] == ["text"]
    running.good("notices", "cancel", "c1")
    assert listed(running) == []
    assert "has no notice 'x'" in running.fails("notices", "cancel", "c1", "x")


@pytest.mark.parametrize("given", ["0", "-1", "1w", "8d", "nan", "inf", "1e3", "", "5 m", "٣"])
def test_times(running: Guestapi, given: str) -> None:
    """A time that is none, or too long, is refused with one that would be right."""
    assert "is not a time like 60s, 5m or 2h, up to 7d" in running.misuse("notice", "c1", "stop", "--in", given)


def test_refusals(c1: Guestapi) -> None:
    """Instances that do not run or are not there are refused, and the time is needed."""
    assert "does not run" in c1.fails("notice", "c1", "stop", "--in", "5")
    assert "no instance 'c2'" in c1.fails("notice", "c2", "stop", "--in", "5")
    assert "--in" in c1.misuse("notice", "c1", "stop")


@pytest.fixture
def waiting(running: Guestapi) -> Iterator[Callable[..., tuple[threading.Thread, list[Done]]]]:
    """Begins to wait for a notice in a thread; returns the thread, and a list that gets what the command has done."""
    threads = []

    def begin(seconds: str = "60") -> tuple[threading.Thread, list[Done]]:
        done: list[Done] = []
        words = ("notice", "c1", "stop", "--in", seconds, "--wait")
        thread = threading.Thread(target=lambda: done.append(running(*words)))
        thread.start()
        threads.append(thread)
        until = time.monotonic() + 20
        while not current(running):
            assert time.monotonic() < until
        return thread, done

    yield begin
    for thread in threads:
        thread.join(30)


def current(guestapi: Guestapi) -> list[notices.NamedNotice]:
    """All notices, without the command."""
    with view(guestapi.settings.store.url) as store:
        return notices.list_all(store)


Waiting = Callable[..., tuple[threading.Thread, list[Done]]]


def test_wait_acknowledged(running: Guestapi, waiting: Waiting) -> None:
    """An acknowledgement ends the wait with 0, long before the time."""
    thread, done = waiting()
    with Writer(running.settings).change() as change:
        one: Instance = get_instance(change, "default", "c1")
        assert notices.acknowledge(change, one.id, one.run, one.init, current(running)[0].notice.id)
    thread.join(30)
    assert (done[0].code, done[0].err) == (0, "")


def test_wait_due(waiting: Waiting) -> None:
    """A guest that never acknowledges delays nothing: when the time has come, the command exits with 3."""
    begun = time.monotonic()
    thread, done = waiting("1.5")
    thread.join(30)
    assert done[0].code == 3
    assert time.monotonic() - begun >= 1.5


@pytest.mark.parametrize("ending", ["restart", "removal", "cancel"])
def test_wait_cancelled(running: Guestapi, waiting: Waiting, ending: str) -> None:
    """A restart, the removal and `notices cancel` end the wait with 1 and a sentence."""
    thread, done = waiting()
    with Writer(running.settings).change() as change:
        one = get_instance(change, "default", "c1")
        if ending == "restart":
            steps.start(change, one, Init(101, 6, boot_id(), 8))
        elif ending == "removal":
            steps.remove(change, one)
        else:
            notices.cancel(change, one, None)
    thread.join(30)
    assert done[0].code == 1
    assert "c1: the notice was cancelled" in done[0].err


def test_backup(running: Guestapi, tmp_path: Path) -> None:
    """A restore announces again what is not past to an instance in the same run, and nothing to one in another run."""
    number = running.good("notice", "c1", "stop", "--in", "1h").strip()
    file = tmp_path / "backup"
    backup.back_up(running.settings.store.url, file)
    running.good("notices", "cancel", "c1")
    backup.restore(running.settings, file)
    assert [one["id"] for one in listed(running)] == [number]
    start(running, Init(101, 6, boot_id(), 8))
    assert listed(running) == []
    backup.restore(running.settings, file)
    assert listed(running) == []
