"""Which readiness the daemon is told of, and when: the last one, not too often, and not while it is at the instance."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import pytest

from guestapi.callers.namespaces import boot_id, start_time
from guestapi.mirror.daemon import Daemon, RefusedError
from guestapi.mirror.readiness import Readiness
from guestapi.model import Init
from guestapi.settings import Settings, StoreSettings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store.lookup import get_instance
from guestapi.store.view import Views
from guestapi.store.writing import Writer

KEY = ("default", "c1")
UUID = "11111111-2222-3333-4444-555555555555"


class Listening(Daemon):
    """A daemon that writes down what it is told, for how often and when is what counts here."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.told: list[str] = []
        self.busy: set[tuple[str, str]] = set()
        self.refuses = False

    def tasks(self) -> set[tuple[str, str]]:
        """As the real one."""
        return self.busy

    def configure(self, project: str, name: str, config: Mapping[str, str], *, while_: Callable[[], bool]) -> bool:
        """As the real one."""
        assert (project, name) == KEY
        assert while_()
        self.told += config.values()
        if self.refuses:
            raise RefusedError("forbidden")
        return True


class Guest:
    """A running instance, its daemon, and what is between them, at a time that tests set."""

    def __init__(self, settings: Settings) -> None:
        self._writer = Writer(settings, create=True)
        self.daemon = Listening()
        self.readiness = Readiness(self._writer, Views(settings.store.url), "incus", self.daemon)
        self.now = 1000.0
        init = Init(os.getpid(), start_time(os.getpid()), boot_id(), 1)
        with self._writer.change() as change:
            reconcile(change, "incus", [Observed(UUID, *KEY, init=init, uuid=UUID, ready=False)])
            self._instance = get_instance(change, *KEY)

    def say(self, ready: bool) -> None:
        """As by PATCH /1.0."""
        assert self._writer.set_ready(self._instance.id, self._instance.run, ready)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """One that has said nothing yet."""
    guest = Guest(Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/store.db")))
    with patch("guestapi.mirror.readiness.time.monotonic", lambda: guest.now):
        yield guest


def test_it_is_told_once(guest: Guest) -> None:
    """What was said is told at once, once; nothing is told of who has said nothing."""
    assert guest.readiness.pass_on() == float("inf")
    guest.say(True)
    assert guest.readiness.pass_on() == float("inf")
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.told == ["true"]


def test_who_changes_its_mind_all_the_time(guest: Guest) -> None:
    """Of many changes in a second the daemon is told of one, and then of the last."""
    for number in range(101):
        guest.say(number % 2 == 0)
        wait = guest.readiness.pass_on()
    assert (guest.daemon.told, wait) == (["true"], float("inf"))
    guest.say(False)
    assert guest.readiness.pass_on() == 1.0
    guest.now += 1.0
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.told == ["true", "false"]


def test_daemon_that_is_at_the_instance(guest: Guest) -> None:
    """While the daemon restarts the instance, say, it is told nothing of it."""
    guest.daemon.busy = {KEY}
    guest.say(True)
    assert guest.readiness.pass_on() == 1.0
    assert guest.daemon.told == []
    guest.daemon.busy = {("other", "c1")}
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.told == ["true"]


def test_daemon_that_refuses(guest: Guest) -> None:
    """What the daemon refuses is tried again only when there is news of the instance."""
    guest.daemon.refuses = True
    guest.say(True)
    for _time in range(3):
        assert guest.readiness.pass_on() == float("inf")
        guest.now += 10
    assert guest.daemon.told == ["true"]
    guest.daemon.refuses = False
    guest.readiness.refused.discard(KEY)
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.told == ["true", "true"]
