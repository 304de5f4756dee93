"""When readiness is sent to the daemon: the last one, not too often, and not during the daemon's own operations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import pytest

from guestapi.callers.namespaces import boot_id, start_time
from guestapi.mirror.daemon import DaemonClient
from guestapi.mirror.daemon_model import RefusedError, SlowError
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


class ReadinessDaemon(DaemonClient):
    """A daemon that records the readiness it gets."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.written: list[str] = []
        self.busy: set[tuple[str, str]] = set()
        self.refuses = False
        self.hangs = False
        self.asked = 0

    def tasks(self) -> set[tuple[str, str]]:
        """Return the instances with running operations, or nothing in time."""
        self.asked += 1
        if self.hangs:
            raise SlowError("no answer")
        return self.busy

    def configure(self, project: str, name: str, config: Mapping[str, str], *, while_: Callable[[], bool]) -> bool:
        """Record the configuration, and refuse it if the test says so."""
        assert (project, name) == KEY
        assert while_()
        self.written += config.values()
        if self.refuses:
            raise RefusedError("forbidden")
        return True


class ReadyGuest:
    """A running instance, its daemon, and the readiness between them, with a clock that the test sets."""

    def __init__(self, settings: Settings) -> None:
        self._writer = Writer(settings, create=True)
        self.daemon = ReadinessDaemon()
        self.readiness = Readiness(self._writer, Views(settings.store.url), "incus", self.daemon)
        self.now = 1000.0
        init = Init(os.getpid(), start_time(os.getpid()), boot_id(), 1)
        with self._writer.change() as change:
            reconcile(change, "incus", [Observed(UUID, *KEY, init=init, uuid=UUID, ready=False)])
            self._instance = get_instance(change, *KEY)

    def report(self, ready: bool) -> None:
        """Report readiness as by PATCH /1.0."""
        assert self._writer.set_ready(self._instance.id, self._instance.run, ready)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[ReadyGuest]:
    """An instance that has not reported readiness."""
    guest = ReadyGuest(Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/store.db")))
    with patch("guestapi.mirror.readiness.time.monotonic", lambda: guest.now):
        yield guest


def test_readiness_is_sent_once(guest: ReadyGuest) -> None:
    """Reported readiness is sent at once, and only once; without a report nothing is sent."""
    assert guest.readiness.pass_on() == float("inf")
    guest.report(True)
    assert guest.readiness.pass_on() == float("inf")
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.written == ["true"]


def test_frequent_changes(guest: ReadyGuest) -> None:
    """Of many changes in a second the daemon gets the first, and later the last."""
    for number in range(101):
        guest.report(number % 2 == 0)
        wait = guest.readiness.pass_on()
    assert (guest.daemon.written, wait) == (["true"], float("inf"))
    guest.report(False)
    assert guest.readiness.pass_on() == 1.0
    guest.now += 1.0
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.written == ["true", "false"]


def test_running_operation_of_the_daemon(guest: ReadyGuest) -> None:
    """While the daemon has an operation on the instance, such as a restart, it gets no readiness."""
    guest.daemon.busy = {KEY}
    guest.report(True)
    assert guest.readiness.pass_on() == 1.0
    assert guest.daemon.written == []
    guest.daemon.busy = {("other", "c1")}
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.written == ["true"]


def test_daemon_that_refuses(guest: ReadyGuest) -> None:
    """Refused readiness is sent again only after an event of the instance."""
    guest.daemon.refuses = True
    guest.report(True)
    for _time in range(3):
        assert guest.readiness.pass_on() == float("inf")
        guest.now += 10
    assert guest.daemon.written == ["true"]
    guest.daemon.refuses = False
    guest.readiness.refused.discard(KEY)
    assert guest.readiness.pass_on() == float("inf")
    assert guest.daemon.written == ["true", "true"]


def test_another_member_hangs(guest: ReadyGuest) -> None:
    """Where the daemon cannot tell what it is doing, it gets readiness all the same, and is not asked all the time."""
    guest.daemon.hangs = True
    for number in range(5):
        guest.report(number % 2 == 0)
        guest.readiness.pass_on()
        guest.now += 2
    assert guest.daemon.written == ["true", "false", "true", "false", "true"]
    assert guest.daemon.asked == 1
    guest.now += 60
    guest.report(False)
    guest.readiness.pass_on()
    assert guest.daemon.asked == 2
