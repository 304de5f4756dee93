"""Ten hosts of a fleet with their followers, a writer, and what must be so after each fault."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

from guestapi.fleet import moving, setup
from guestapi.fleet.engine import FleetError, session
from guestapi.fleet.operating import FleetStore, Wishes, new_operation
from guestapi.store import profiles, steps
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import get_instance
from tests.fleet_faults.wire import Wire
from tests.harness import waiting
from tests.harness.clock import Clock
from tests.harness.machine import CHECKOUT
from tests.harness.replicated import Replicas

HOSTS, EACH = 10, 3
SECONDS = 90.0
DATABASE = "guestapi"
#: A profile that half of the instances have.
PROFILE = "shared"
_PROFILE = ("default", PROFILE)
_WATCHED = "tests.fleet_faults.watched"


class FieldHost:
    """A host: its store, its follower in a process of its own, and the network between it and the servers."""

    def __init__(self, name: str, directory: Path, servers: list[str], clock: Clock) -> None:
        self.name = name
        self.database = directory / "store.db"
        self.wire = Wire(servers)
        self._directory = directory
        self._config = directory / "guestapi.toml"
        self._log = directory / "log"
        self._environment = clock.environment
        ports = ",".join(map(str, self.wire.ports))
        hosts = ",".join("127.0.0.1" for _server in servers)
        url = f"postgresql://{name}@/{DATABASE}?host={hosts}&port={ports}&sslmode=disable&gssencmode=disable"
        self._config.write_text(
            f'[store]\nurl = "sqlite:///{self.database}"\n[fleet]\nurl = "{url}"\nhost = "{name}"\n'
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the follower."""
        command = [sys.executable, "-m", _WATCHED, str(self._directory), str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=CHECKOUT, env={**os.environ, **self._environment}
            )

    def kill(self) -> None:
        """End the follower, wherever it is."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def wait_for_its_end(self) -> None:
        """Wait until the follower has killed itself."""
        assert self._process is not None
        assert self._process.wait(SECONDS) == -signal.SIGKILL, self.log[-2000:]
        self._process = None

    def tell(self, action: str, point: str) -> None:
        """Have the follower do something at a point; see tests/fleet_faults/watched.py."""
        fresh = self._directory / "point.new"
        fresh.write_text(f"{action} {point}")
        fresh.rename(self._directory / "point")

    @property
    def is_held(self) -> bool:
        """Whether the follower waits at the point at which it was told to."""
        return (self._directory / "reached").exists()

    def go_on(self) -> None:
        """Have the follower go on from there."""
        (self._directory / "reached").unlink()

    def end(self) -> None:
        """End everything."""
        self.kill()
        self.wire.close()

    @property
    def log(self) -> str:
        """What the follower has said."""
        return self._log.read_text()

    @property
    def stays(self) -> dict[str, list[tuple[float, float]]]:
        """When the store may have had each instance: from before the commit that has placed it until after its end."""
        found: dict[str, list[tuple[float, float]]] = {}
        open_: dict[str, float] = {}
        placed: set[str] = set()
        pending: tuple[float, set[str]] | None = None
        for line in (self._directory / "record").read_text().splitlines():
            what, at, uuids = json.loads(line)
            now = set(uuids)
            if what == "commit":
                pending = (at, now)
                for uuid in now - placed:
                    open_.setdefault(uuid, at)
                continue
            # Committed; or a process begins and finds what its predecessor has left.
            for uuid in now - placed:
                open_.setdefault(uuid, at if pending is None else pending[0])
            for uuid in open_.keys() - now:
                found.setdefault(uuid, []).append((open_.pop(uuid), at))
            placed, pending = now, None
        for uuid, at in open_.items():
            found.setdefault(uuid, []).append((at, math.inf))
        return found

    def ask(self, query: str) -> list[tuple[object, ...]]:
        """What the store has; nothing, if it is not there."""
        if not self.database.exists():
            return []
        try:
            with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
                return connection.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []

    @property
    def placed(self) -> dict[str, dict[str, str]]:
        """Of each placed instance what it is, its devices, and its configuration with that of its profile, by name."""
        found: dict[str, dict[str, str]] = {}
        for number, name, *what in self.ask(
            "SELECT id, name, uuid, type, cloud_init_id, epoch FROM placements JOIN instances ON id = instance_id"
        ):
            found[str(name)] = dict(zip(_WHAT, map(str, what), strict=True))
            for key, value in self.ask(
                f"SELECT key, value FROM config WHERE instance_id = {number} UNION ALL "
                f"SELECT key, value FROM profile_config JOIN instance_profiles USING (profile_id) "
                f"WHERE instance_id = {number} UNION ALL "
                f"SELECT '(device) ' || name, definition FROM devices WHERE instance_id = {number}"
            ):
                found[str(name)][str(key)] = _canonical(str(key), str(value))
        return found


#: What an instance is, beside its keys and devices.
_WHAT = ("(uuid)", "(type)", "(cloud-init)", "(epoch)")


def _canonical(key: str, value: str) -> str:
    return json.dumps(json.loads(value), sort_keys=True) if key.startswith("(device)") else value


class FaultyFleet:
    """The fleet."""

    def __init__(self, replicas: Replicas, directory: Path, clocks: tuple[Clock, Clock]) -> None:
        self.replicas = replicas
        #: Of the servers and of the hosts.
        self.clocks = clocks
        self.hosts: list[FieldHost] = []
        self._directory = directory
        with replicas.primary.connect() as connection:
            connection.execute(f"CREATE DATABASE {DATABASE}".encode())
        with replicas.primary.connect(DATABASE) as connection:
            setup.init(connection)
            connection.execute("CREATE ROLE anna LOGIN IN ROLE guestapi_operator")
            for number in range(HOSTS):
                setup.add_host(connection, f"h{number}")
        self.url = replicas.url(DATABASE, "anna")
        self.fleet = FleetStore(lambda: session(self.url), 1 << 20)
        for number in range(HOSTS):
            place = directory / f"h{number}"
            place.mkdir()
            self.hosts.append(FieldHost(f"h{number}", place, [node.socket for node in replicas.nodes], clocks[1]))
        #: What was acknowledged of each instance, and what may have been written.
        self.acknowledged: dict[str, int] = {}
        self.maybe: dict[str, set[int]] = {}
        self.count = 0
        self._stop = Event()
        self._writer: Thread | None = None

    def __enter__(self) -> FaultyFleet:
        names = [f"i{number}" for number in range(HOSTS * EACH)]
        places = [("default", name) for name in names]
        with self.fleet.change(places, Wishes(new_operation()), self._names, edited=[_PROFILE]) as change:
            profile = profiles.create(change, *_PROFILE, config={"user.p": "0"})
            for number, name in enumerate(names):
                location, applied = f"h{number % HOSTS}", (profile,) if number % 2 else ()
                nic = {"type": "nic", "name": f"eth{number}"}
                steps.add(
                    change,
                    "default",
                    name,
                    location=location,
                    config={"user.n": "0"},
                    devices={"eth0": nic},
                    profiles=applied,
                )
        self.acknowledged = dict.fromkeys([*names, PROFILE], 0)
        self.maybe = {name: {0} for name in self.acknowledged}
        for host in self.hosts:
            host.start()
        self.settle()
        return self

    @property
    def _names(self) -> list[str]:
        return [host.name for host in self.hosts]

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end_writer()
        for host in self.hosts:
            host.end()

    def write(self) -> None:
        """Begin to change instances, one after the other, and their profile, all the time."""
        self._stop.clear()
        self._writer = Thread(target=self._write, daemon=True)
        self._writer.start()

    def wait_for_changes(self, count: int = 20) -> None:
        """Wait until this many more changes were acknowledged."""
        wanted = self.count + count
        until(lambda: self.count >= wanted, lambda: f"{self.count} of {wanted} changes")

    def settle(self) -> None:
        """End the writer, and wait until each host has what the database has."""
        self._end_writer()
        self.replicas.wait_for_standbys(1)
        until(lambda: all(host.placed == self.rows(host.name) for host in self.hosts), self._differences)

    def move(self, name: str, to: str) -> None:
        """Have an instance go to another host."""
        moving.move(lambda: session(self.url), ("default", name), to, fenced=False, wishes=Wishes(new_operation()))

    def applied(self, host: str) -> int:
        """The revision up to which a host has said that its store is as the database."""
        with self.replicas.primary.connect(DATABASE) as connection:
            row = connection.execute("SELECT applied FROM guestapi.seen WHERE host = %s", (host,)).fetchone()
        return -1 if row is None else int(row[0])

    def rows(self, host: str) -> dict[str, dict[str, str]]:
        """What the database has for a host, at one moment, as `FieldHost.placed`."""
        with self.replicas.primary.connect(DATABASE) as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            found: dict[str, dict[str, str]] = {
                name: dict(zip(_WHAT, what, strict=True))
                for name, *what in connection.execute(
                    "SELECT name, uuid::text, type, cloud_init_id::text, epoch::text FROM guestapi.instances "
                    "WHERE host = %s",
                    (host,),
                )
            }
            for name, key, value in connection.execute(
                "SELECT instances.name, key, value FROM guestapi.instances JOIN guestapi.config USING (uuid) "
                "WHERE host = %s UNION ALL SELECT instances.name, key, value FROM guestapi.instances "
                "JOIN guestapi.instance_profiles USING (uuid) JOIN guestapi.profile_config USING (profile) "
                "WHERE host = %s UNION ALL SELECT instances.name, '(device) ' || devices.name, "
                "convert_to(definition::text, 'UTF8') FROM guestapi.instances JOIN guestapi.devices USING (uuid) "
                "WHERE host = %s",
                (host, host, host),
            ):
                found[name][key] = _canonical(key, value.decode())
        return found

    def verify(self) -> None:
        """Everything that was acknowledged is there, and what listeners were told leads to what there is."""
        found = {name: config for host in self.hosts for name, config in self.rows(host.name).items()}
        assert {*found, PROFILE} == self.acknowledged.keys()
        assert len([config for config in found.values() if "user.p" in config]) == HOSTS * EACH // 2
        for name, config in found.items():
            # How many have the profile was counted above.
            for changed, key in ((name, "user.n"), *([(PROFILE, "user.p")] if "user.p" in config else [])):
                value = int(config[key])
                assert value >= self.acknowledged[changed], f"{changed}: {value} is older than what was acknowledged"
                assert value in self.maybe[changed]
        for host in self.hosts:
            self._replay(host)
        everywhere = [name for host in self.hosts for name in host.placed]
        assert len(everywhere) == len(set(everywhere))
        self._never_twice()

    def _never_twice(self) -> None:
        """No instance was in two stores at any moment."""
        stays: dict[str, list[tuple[float, float, str]]] = {}
        for host in self.hosts:
            for uuid, found in host.stays.items():
                stays.setdefault(uuid, []).extend((begin, end, host.name) for begin, end in found)
        for uuid, those in stays.items():
            for before, after in pairwise(sorted(those)):
                assert before[1] <= after[0], (uuid, before, after)

    def _replay(self, host: FieldHost) -> None:
        """Each event begins where the one before has ended, and the last one ends where the store is."""
        state: dict[tuple[object, str], str] = {}
        names = {number: str(name) for number, name in host.ask("SELECT id, name FROM instances")}
        for number, text in host.ask(
            "SELECT instance_id, metadata FROM notifications WHERE type = 'config' ORDER BY id"
        ):
            event = json.loads(str(text))
            key = event["key"]
            assert state.get((number, key), event["old_value"]) == event["old_value"], (host.name, number, event)
            state[number, key] = event["value"]
        placed = host.placed
        for (number, key), value in state.items():
            if number in names:
                assert placed[names[number]][key] == value, (host.name, names[number])

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            name = PROFILE if number % 7 == 0 else f"i{number % (HOSTS * EACH)}"
            value = max(self.maybe[name]) + 1
            self.maybe[name].add(value)
            try:
                if name == PROFILE:
                    with self.fleet.change((), Wishes(new_operation()), edited=[_PROFILE]) as change:
                        profile = profiles.get_profile(change, *_PROFILE)
                        profiles.edit(change, profile, config={"user.p": str(value)})
                else:
                    with self.fleet.change([("default", name)], Wishes(new_operation())) as change:
                        steps.configure(change, get_instance(change, "default", name), {"user.n": str(value)})
            except (FleetError, ConflictError):
                time.sleep(0.1)
                continue
            self.acknowledged[name] = value
            self.count += 1

    def _end_writer(self) -> None:
        self._stop.set()
        if self._writer is not None:
            self._writer.join(SECONDS)
            assert not self._writer.is_alive()
            self._writer = None

    def _differences(self) -> str:
        wrong = [host for host in self.hosts if host.placed != self.rows(host.name)]
        return "\n".join(
            f"{host.name}: {host.placed} is not {self.rows(host.name)}: {host.log[-500:]}" for host in wrong
        )


def until(true: Callable[[], object], what: str | Callable[[], str] = "a fault is overcome") -> None:
    """Wait until a condition is true, as long as a fault may take."""
    waiting.until(true, what, pause=0.1, seconds=SECONDS)


def lose(host: FieldHost) -> None:
    """Remove the store of a host."""
    for file in host.database.parent.glob("store.db*"):
        file.unlink(missing_ok=True)


def copy(host: FieldHost, target: Path) -> None:
    """Copy the store of a host as it is at one moment."""
    with closing(sqlite3.connect(host.database)) as connection, closing(sqlite3.connect(target)) as other:
        connection.backup(other)


def put_back(host: FieldHost, saved: Path) -> None:
    """Replace the store of a host, whose follower runs, by a copy."""
    fresh = host.database.with_name("fresh.db")
    shutil.copyfile(saved, fresh)
    for companion in ("-wal", "-shm"):
        Path(f"{host.database}{companion}").unlink(missing_ok=True)
    os.replace(fresh, host.database)
