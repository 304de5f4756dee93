"""A fleet: one host with a service and a listener, 999 simulated hosts, and PostgreSQL with a synchronous standby."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks.contenders import CHECKOUT, INSTANCE, TOML, service
from benchmarks.figures import Figure
from benchmarks.processes import Inside, processor_seconds
from benchmarks.scale import listening
from guestapi.fleet import engine, membership, operating, setup
from guestapi.fleet.engine import session
from guestapi.fleet.operating import FleetStore, Wishes, new_operation
from guestapi.store import profiles, steps
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from tests.harness.containers import Container
from tests.harness.postgresql import Postgres, binaries
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import until

HOSTS, EACH = 1000, 100
#: Instances of the large change, as many of each host.
_CHANGED = 10_000
#: Single changes with one host and with all, and seconds between two.
_CHANGES, _CHANGES_OF_ALL, _PAUSE = 200, 100, 0.02
_DATABASE = "guestapi"
_CONF = """
fsync = on
max_connections = 1200
shared_buffers = '256MB'
synchronous_standby_names = 'ANY 1 (*)'
"""
#: A thousand certificates would take a minute to make, and prove nothing here.
_ANY_HOST = "hostssl all +guestapi_host 127.0.0.1/32 trust clientcert=verify-ca\n"
#: An instance with 1 KiB of configuration, and a device.
_DEFINITION = f"""---
name: i{{number}}
location: h{{host}}
profiles: {{profiles}}
config:
  user.number: "0"
  user.data: {"a" * 1000}
devices:
  eth0:
    type: nic
    nictype: bridged
    parent: br0
"""
_OF_HOSTS = "SELECT count(*) FROM guestapi.seen WHERE host <> 'h0' AND contact > %s"


class BenchFleet:
    """The servers, and an operator."""

    def __init__(self, primary: Postgres) -> None:
        self.primary = primary
        with primary.connect() as connection:
            connection.execute(f"CREATE DATABASE {_DATABASE}".encode())
        with primary.connect(_DATABASE) as connection:
            setup.init(connection)
            connection.execute("CREATE ROLE anna LOGIN IN ROLE guestapi_operator")
            for number in range(HOSTS):
                setup.add_host(connection, f"h{number}")
        self.operator = primary.url_of_host("anna", _DATABASE, "anna")
        self.store = FleetStore(lambda: session(self.operator), 1 << 20)
        self.of_host = primary.url_of_host("host", _DATABASE, "guestapi_host_{}")

    def change(self, names: Sequence[str], value: int) -> None:
        """Set a key of instances."""
        with self.store.change([("default", name) for name in names], Wishes(new_operation())) as change:
            for name in names:
                steps.configure(change, get_instance(change, "default", name), {"user.number": str(value)})

    def wait_for_all(self, since: object) -> None:
        """Wait until each simulated host has said that it follows, after a moment of the database's clock."""
        with self.primary.connect(_DATABASE) as connection:
            until(lambda: connection.execute(_OF_HOSTS, (since,)).fetchone() == (HOSTS - 1,), "all hosts")

    def now(self) -> object:
        """The database's clock."""
        with self.primary.connect(_DATABASE) as connection:
            return (connection.execute("SELECT clock_timestamp()").fetchone() or (None,))[0]

    def used(self) -> float:
        """Seconds of processor time that the primary's processes have used."""
        total = 0.0
        for pid in self.primary.processes:
            # One that looks after tables may have ended.
            with suppress(FileNotFoundError):
                total += processor_seconds([pid])
        return total


def measure() -> Iterator[Figure]:
    """Measure one change with one host, then with 1,000; how these connect; and a change of 10,000 instances."""
    with _servers() as primary:
        fleet = BenchFleet(primary)
        yield from _apply(fleet)
        with service() as (running, container), _following(fleet, running):
            yield from _single(fleet, container, "1 host", _CHANGES)
            before = fleet.now()
            began = time.monotonic()
            with _simulated(fleet):
                fleet.wait_for_all(before)
                yield Figure(f"{HOSTS - 1} hosts come, until all have everything", time.monotonic() - began, "s")
                yield from _idle(fleet)
                yield from _single(fleet, container, f"{HOSTS:,} hosts", _CHANGES_OF_ALL)
                yield from _many(fleet)
                yield from _shared(fleet)
                yield from _storm(fleet)


def _apply(fleet: BenchFleet) -> Iterator[Figure]:
    """The operator's command that adds all instances, on a terminal, so with its bars."""
    with tempfile.TemporaryDirectory(prefix="apply-", dir="/var/tmp") as name:
        directory, config = Path(name, "definitions"), Path(name, "guestapi.toml")
        directory.mkdir()
        for host in range(HOSTS):
            numbers = range(host, HOSTS * EACH, HOSTS)
            text = "".join(
                _DEFINITION.format(number=number, host=host, profiles="[shared]" if number < _CHANGED else "[]")
                for number in numbers
            )
            (directory / f"h{host}.yaml").write_text(text)
        config.write_text(f'[store]\nurl = "sqlite:///{name}/guestapi.db"\n[fleet]\nurl = "{fleet.operator}"\n')
        with fleet.store.change((), Wishes(new_operation()), edited=[("default", "shared")]) as change:
            profiles.create(change, "default", "shared", config={"user.shared": "0"})
        began = time.monotonic()
        ours, theirs = pty.openpty()
        words = ["--config", str(config), "--fleet", "apply", "-f", str(directory)]
        command = subprocess.Popen([COMMAND, *words], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown = _last_shown(ours)
        os.close(ours)
        _pid, status, used = os.wait4(command.pid, 0)
        command.returncode = os.waitstatus_to_exitcode(status)
        assert shown.rstrip().endswith(f"{HOSTS * EACH} added, 0 changed, 0 removed, 0 unchanged"), shown
    with fleet.primary.connect(_DATABASE) as connection:
        # As autovacuum does within a minute.
        connection.execute("ANALYZE")
    yield Figure(f"`apply` of {HOSTS * EACH:,} definitions", time.monotonic() - began, "s", 120)
    yield Figure("  memory of it, at most", used.ru_maxrss / 1024, "MiB", 1024)


def _last_shown(terminal: int) -> str:
    """Read what a command shows on a terminal, until it ends."""
    shown = b""
    # EIO: it has ended.
    with suppress(OSError):
        while part := os.read(terminal, 65536):
            shown = (shown + part)[-1000:]
    return shown.decode(errors="replace")


def _single(fleet: BenchFleet, container: Container, hosts: str, times: int) -> Iterator[Figure]:
    """One change, from the operator's first question to the event at the listener."""
    with listening(Inside(container.pid, None), 1) as listeners:
        fleet.change([INSTANCE], 1)
        listeners.next()
        whole, after_commit, commits = [], [], []
        for number in range(2, times + 2):
            time.sleep(_PAUSE)
            with _committing() as at:
                began = time.monotonic()
                fleet.change([INSTANCE], number)
                answered = time.monotonic()
            event = listeners.next()
            assert event["value"] == number, event
            whole.append(event["last"] - began)
            after_commit.append(event["last"] - at[0])
            commits.append(answered - at[0])
    limits = (20.0, 50.0) if hosts == "1 host" else (None, None)
    yield Figure(
        f"{hosts}: a change, from COMMIT to the listener, p50 of {times}", _ms(after_commit, 50), "ms", limits[0]
    )
    yield Figure("  p99", _ms(after_commit, 99), "ms", limits[1])
    yield Figure("  of it, until COMMIT was answered, p50", _ms(commits, 50), "ms")
    yield Figure("  from the first question of the operator, which connects first, p50", _ms(whole, 50), "ms")
    yield Figure("  p99", _ms(whole, 99), "ms")


def _idle(fleet: BenchFleet, seconds: float = 5.0) -> Iterator[Figure]:
    before = fleet.used()
    time.sleep(seconds)
    yield Figure(
        f"{HOSTS:,} hosts that look each second: the primary uses of a core",
        (fleet.used() - before) / seconds * 100,
        "%",
    )


def _many(fleet: BenchFleet) -> Iterator[Figure]:
    names = [f"i{number}" for number in range(_CHANGED)]
    began = time.monotonic()
    fleet.change(names, 1)
    answered = time.monotonic()
    result = fleet.store.result
    assert result is not None
    assert not fleet.store.wait(result, time.monotonic() + 300)
    yield Figure(f"a change of {_CHANGED:,} instances of {HOSTS:,} hosts is committed after", answered - began, "s")
    yield Figure("  and every host has it after", time.monotonic() - began, "s")


def _shared(fleet: BenchFleet) -> Iterator[Figure]:
    """A change of the profile that the same instances have."""
    began = time.monotonic()
    with fleet.store.change((), Wishes(new_operation()), edited=[("default", "shared")]) as change:
        profiles.edit(change, profiles.get_profile(change, "default", "shared"), config={"user.shared": "1"})
    answered = time.monotonic()
    result = fleet.store.result
    assert result is not None
    assert not fleet.store.wait(result, time.monotonic() + 300)
    yield Figure(f"a change of a profile of {_CHANGED:,} instances of {HOSTS:,} hosts", answered - began, "s")
    yield Figure("  and every host has it after", time.monotonic() - began, "s", 10)


def _storm(fleet: BenchFleet) -> Iterator[Figure]:
    """The primary ends, and all hosts come back at once."""
    fleet.primary.stop()
    fleet.primary.start()
    began, before = time.monotonic(), fleet.now()
    taken: list[float] = []
    fleet.change([INSTANCE], 1_000_000)
    taken.append(time.monotonic() - began)
    fleet.wait_for_all(before)
    yield Figure(f"the primary restarts: until {HOSTS - 1} hosts follow again", time.monotonic() - began, "s")
    yield Figure("  an operator's change meanwhile", taken[0], "s")


def _ms(taken: list[float], percent: int) -> float:
    if percent == 50:
        return median(taken) * 1000
    return sorted(taken)[len(taken) * percent // 100] * 1000


@contextmanager
def _committing() -> Iterator[list[float]]:
    """Yield the time at which a change is about to be committed."""
    at: list[float] = []

    def commit(connection: Any) -> None:
        at.append(time.monotonic())
        engine.commit(connection)

    with patch.object(operating, "commit", commit):
        yield at


@contextmanager
def _servers() -> Iterator[Postgres]:
    """A primary on this disk, and a standby that has to confirm each change."""
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/var/tmp") as directory:
        place = Path(directory)
        place.chmod(0o711)
        for name in ("primary", "standby"):
            (place / name).mkdir(mode=0o700)
        primary = Postgres(place / "primary", binaries())
        primary.make()
        with (primary.data / "postgresql.conf").open("a") as conf:
            conf.write(_CONF)
        hba = primary.data / "pg_hba.conf"
        hba.write_text(_ANY_HOST + hba.read_text())
        primary.start()
        try:
            standby = primary.standby(place / "standby")
            standby.start()
            try:
                yield primary
            finally:
                standby.stop()
        finally:
            primary.stop()


@contextmanager
def _following(fleet: BenchFleet, running: Service) -> Iterator[None]:
    """Have the service's host be h0, and its instance belong to the fleet."""
    url = fleet.of_host.format("h0")
    running.write_config(f'{TOML}\n[fleet]\nurl = "{url}"\nhost = "h0"\n')
    with view(running.settings.store.url) as store, session(fleet.operator) as connection:
        membership.import_instances(connection, store, "h0")
    command = [str(COMMAND), "--config", str(running.config), "fleet", "follow"]
    with (running.root / "follow.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as follower:
        try:
            until(lambda: len(running.listed()) == EACH + 1, "the follower")
            yield
        finally:
            follower.kill()


@contextmanager
def _simulated(fleet: BenchFleet) -> Iterator[None]:
    """Run the other hosts."""
    words = [sys.executable, "-m", "benchmarks.fleet_hosts", fleet.of_host, "1", str(HOSTS - 1)]
    # Its processes end with its standard input.
    with subprocess.Popen(words, stdin=subprocess.PIPE, cwd=CHECKOUT):
        yield
