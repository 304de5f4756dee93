"""Every change of the store: one transaction that holds the new state and what is told about it, or nothing.

A `Writer` gives `Change`s; a `Change` is one transaction with one or many steps. Whoever fills the store, the
operator's command, a runtime's hook or a mirror, comes through here, so names are checked here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import BindParameter, Connection, Delete, Table, bindparam, delete, insert, select, update

from guestapi import names
from guestapi.encoding import to_json
from guestapi.model import Device, Init, Instance, InstanceType
from guestapi.settings import Settings
from guestapi.store import changes
from guestapi.store.doorbell import ring
from guestapi.store.engine import database_file, open_writer
from guestapi.store.errors import ConflictError, explained
from guestapi.store.image_steps import ImageSteps
from guestapi.store.rows import load
from guestapi.store.tables import config, devices, instances, notifications

#: Where the key or name of a row that is to go stands in a statement.
_GONE: BindParameter[str] = bindparam("gone")

# PERF: made once. Every change needs them, and to make them takes as long as all else that it writes.
_log = notifications.c
_NOW: BindParameter[float] = bindparam("now")
_BEFORE = select(_log.written).order_by(_log.id.desc()).offset(bindparam("told")).limit(1)
_NOT_LATER = update(notifications).where(_log.written > _NOW).values(written=_NOW)
_LATEST = select(_log.id).order_by(_log.id.desc()).limit(1).scalar_subquery()
# The log is in the order of time, so this scan ends at the first entry that is young enough.
_YOUNG = select(_log.id).where(_log.written >= bindparam("since")).order_by(_log.id).limit(1).scalar_subquery()
_TRIM = delete(notifications).where((_log.id <= _LATEST - bindparam("keep")) | (_log.id < _YOUNG))


class Writer:
    """Changes the store. May be used by several threads: every transaction has a connection of its own."""

    def __init__(self, settings: Settings, *, create: bool = False) -> None:
        """Open the store; with `create`, make it if it is missing.

        Raises:
            StoreError: it is missing or cannot be used.
        """
        self._file = database_file(settings.store.url)
        self._engine = open_writer(settings.store.url, lock_seconds=settings.store.lock_seconds, create=create)
        self._keep = settings.events

    @property
    def state_directory(self) -> Path:
        """Where the database lies, and whose owner is the one who serves."""
        return self._file.parent

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction: committed, durably, at the end of the block; undone if it raises.

        Raises:
            StoreBusyError: another writer held the store for too long.
            StoreError: it cannot be written.
        """
        with explained(self._file), self._engine.connect() as connection:
            with connection.begin():
                step = Change(connection)
                yield step
                if step.told:
                    step.trim(self._keep.keep_entries, self._keep.keep_seconds)
            # Before the connection is closed: whoever listens waits for this.
            if step.told or step.rings:
                ring(self._file)

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """Note what the workload says of itself.

        Args:
            instance_id, run: who says it, and in which run it was identified.
            init: as which it was identified, for the store may be another by now; None: do not compare.
            ready: True for ``Ready``, False for ``Started``.

        Returns:
            Whether it was noted; False if that run is over.
        """
        with self.change() as change:
            return change.set_ready(instance_id, run, ready, init)


class Change(ImageSteps):
    """The steps of one transaction. Made by `Writer.change`."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        #: How many notifications this transaction has written.
        self.told = 0
        #: Whether somebody may be waiting for what it has changed, although it is no news for any listener.
        self.rings = False

    def add(
        self,
        project: str,
        name: str,
        *,
        type: InstanceType = "container",  # noqa: A002 - the field's word
        instance_uuid: str | None = None,
        location: str | None = None,
        config: Mapping[str, str] | None = None,
        devices: Mapping[str, Device] | None = None,
        source: str | None = None,
        cloud_init_id: str | None = None,
    ) -> Instance:
        """Add an instance, not running yet; attributes as of `Instance`.

        Raises:
            InvalidNameError: a name or value cannot be taken.
            ConflictError: there is one of that name, or one with that UUID.
        """
        self._check_free(project, name)
        identity = names.check_uuid(instance_uuid) if instance_uuid is not None else str(uuid.uuid4())
        if self.connection.execute(select(instances.c.id).where(instances.c.uuid == identity)).scalar() is not None:
            raise ConflictError(f"uuid {identity} belongs to another instance already")
        values = {
            "project": project,
            "name": name,
            "type": type,
            "uuid": identity,
            "cloud_init_id": cloud_init_id or identity,
            "location": names.check_location(location) if location is not None else None,
            "source": source,
        }
        (number,) = self.connection.execute(insert(instances).values(values)).inserted_primary_key or (0,)
        self._write(number, {}, names.check_config(config or {}), {}, names.check_devices(devices or {}))
        created = self._reload(number)
        self._tell(created, [changes.lifecycle("instance-added", project, name)])
        return created

    def own(self, project: str, name: str) -> Instance:
        """The instance of that name, to be changed by others than a mirror.

        Raises:
            UnknownInstanceError: there is none.
            ConflictError: a mirror brings it, and would undo the change.
        """
        instance = self.instance(project, name)
        if instance.source is not None:
            raise ConflictError(f"instance {name!r} is mirrored from {instance.source}: change it there")
        return instance

    def remove(self, instance: Instance) -> None:
        """Take an instance away, running or not, and all that is known of it."""
        self.connection.execute(delete(instances).where(instances.c.id == instance.id))
        self._tell(instance, [changes.lifecycle("instance-removed", instance.project, instance.name)])

    def start(self, instance: Instance, init: Init) -> Instance:
        """The instance runs now, and `init` is its init. Said again of the same process, it changes nothing.

        Raises:
            ConflictError: that process is another instance's init.
        """
        if instance.init == init:
            return instance
        other = self.connection.execute(
            select(instances.c.name).where(
                instances.c.init_pid == init.pid,
                instances.c.init_start_time == init.start_time,
                instances.c.init_boot_id == init.boot_id,
                instances.c.id != instance.id,
            )
        ).scalar()
        if other is not None:
            raise ConflictError(f"process {init.pid} is the init of instance {other!r} already")
        return self._run(instance, init, "instance-started")

    def stop(self, instance: Instance) -> Instance:
        """The instance runs no more. Said of one that does not run, it changes nothing."""
        return instance if instance.init is None else self._run(instance, None, "instance-stopped")

    def configure(self, instance: Instance, config: Mapping[str, str]) -> Instance:
        """Set keys; one set to the empty string is unset.

        Raises:
            InvalidNameError: a key or value cannot be taken.
        """
        wanted = {**instance.config, **names.check_config(config)}
        return self._update(instance, {key: value for key, value in wanted.items() if value}, instance.devices)

    def replace_devices(self, instance: Instance, devices: Mapping[str, Device]) -> Instance:
        """Give the instance exactly these devices.

        Raises:
            InvalidNameError: a name, option or value cannot be taken.
        """
        return self._update(instance, instance.config, names.check_devices(devices))

    def replace(
        self,
        instance: Instance,
        *,
        config: Mapping[str, str],
        devices: Mapping[str, Device],
        cloud_init_id: str,
        location: str | None,
    ) -> Instance:
        """Give the instance exactly this configuration and these devices, as one change, told as a daemon tells it.

        Args:
            instance: as it is in this transaction.
            config, devices: all of them; a value that is the empty string is none.
            cloud_init_id, location: as of `Instance`.

        Raises:
            InvalidNameError: a name or value cannot be taken.
        """
        wanted = {key: value for key, value in names.check_config(config).items() if value}
        columns = {"location": location and names.check_location(location), "cloud_init_id": cloud_init_id}
        return self._update(instance, wanted, names.check_devices(devices), columns, changes.LIVE_OPTIONS)

    def rename(self, instance: Instance, project: str, name: str) -> Instance:
        """Call it `name`, of `project`, from now on.

        Raises:
            InvalidNameError: the name cannot be taken.
            ConflictError: another instance has it.
        """
        self._check_free(project, name)
        self._set(instance, {"project": project, "name": name})
        self._tell(instance, [changes.lifecycle("instance-renamed", project, name)])
        return self._reload(instance.id)

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """As `Writer.set_ready`."""
        instance = load(self.connection, instance_id)
        if instance is None or instance.run != run or instance.init is None or init not in (None, instance.init):
            return False
        if instance.ready == ready:
            # Said again, it is no news: a guest could fill the log with it.
            return True
        self._set(instance, {"ready": ready})
        # The mirror of a daemon wants to know of either.
        self.rings = True
        if ready:
            self._tell(instance, [changes.lifecycle("instance-ready", instance.project, instance.name)])
        return True

    def trim(self, keep_entries: int, keep_seconds: int) -> None:
        """Cut the change log to its latest `keep_entries` entries, none older than `keep_seconds`."""
        now = time.time()
        if (self.connection.execute(_BEFORE, {"told": self.told}).scalar() or 0) > now:
            # The clock was set back. Of what is dated later than now, nobody can say how old it is; without a date
            # that comes to pass, an entry from a wrong year would keep all that are older.
            self.connection.execute(_NOT_LATER, {_NOW.key: now})
        self.connection.execute(_TRIM, {"keep": keep_entries, "since": now - keep_seconds})

    def _check_free(self, project: str, name: str) -> None:
        names.check_project(project)
        names.check_instance(name)
        if self.find(project, name) is not None:
            raise ConflictError(f"instance {name!r} exists already in project {project!r}")

    def _run(self, instance: Instance, init: Init | None, action: str) -> Instance:
        columns: dict[str, object] = {"init_pid": None, "init_start_time": None, "init_boot_id": None}
        columns |= {"init_namespace": None, "run": instances.c.run + 1, "ready": False, "told_ready": None}
        if init is not None:
            columns |= {"init_pid": init.pid, "init_start_time": init.start_time}
            columns |= {"init_boot_id": init.boot_id, "init_namespace": init.namespace}
        self._set(instance, columns)
        self._tell(instance, [changes.lifecycle(action, instance.project, instance.name)])
        return self._reload(instance.id)

    def _update(
        self,
        old: Instance,
        new_config: Mapping[str, str],
        new_devices: Mapping[str, Device],
        columns: Mapping[str, object] | None = None,
        live: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Instance:
        before_and_after = (old.config, new_config, old.devices, new_devices)
        events = list(changes.differences(*before_and_after, live))
        if columns is None:
            again = changes.cloud_init_starts_over(*before_and_after)
            columns = {"cloud_init_id": str(uuid.uuid4())} if again else {}
        if not events and all(getattr(old, name) == value for name, value in columns.items()):
            return old
        self._write(old.id, *before_and_after)
        self._set(old, columns)
        self._tell(old, events)
        return self._reload(old.id)

    def _set(self, instance: Instance, columns: Mapping[str, object]) -> None:
        """Write columns of an instance, as a new revision."""
        values = {**columns, "revision": instances.c.revision + 1}
        self.connection.execute(update(instances).where(instances.c.id == instance.id).values(values))

    def _write(
        self,
        number: int,
        old_config: Mapping[str, str],
        new_config: Mapping[str, str],
        old_devices: Mapping[str, Device],
        new_devices: Mapping[str, Device],
    ) -> None:
        # PERF: rows of a kind go in one statement, of which each would take ten times as long as a row.
        keys = [key for key in old_config.keys() | new_config.keys() if old_config.get(key) != new_config.get(key)]
        values = [{"instance_id": number, "key": key, "value": value} for key in keys if (value := new_config.get(key))]
        self._replace(delete(config).where(config.c.instance_id == number, config.c.key == _GONE), keys, config, values)
        named = [
            name for name in old_devices.keys() | new_devices.keys() if old_devices.get(name) != new_devices.get(name)
        ]
        rows = [
            {"instance_id": number, "name": name, "definition": dict(sorted(definition.items()))}
            for name in named
            if (definition := new_devices.get(name))
        ]
        self._replace(
            delete(devices).where(devices.c.instance_id == number, devices.c.name == _GONE), named, devices, rows
        )

    def _replace(self, remove: Delete, gone: list[str], table: Table, rows: list[dict[str, Any]]) -> None:
        if gone:
            self.connection.execute(remove, [{_GONE.key: one} for one in gone])
        if rows:
            self.connection.execute(insert(table), rows)

    def _tell(self, instance: Instance, events: Iterable[changes.Event]) -> None:
        now = time.time_ns()
        rows = [
            {
                "instance_id": instance.id,
                "project": instance.project,
                "instance": instance.name,
                "type": event.type,
                "timestamp": changes.timestamp(now),
                "written": now / 1e9,
                "metadata": to_json(event.metadata, html=True).decode(),
                # Nobody listens in an instance that does not run, and who starts later reads the new state.
                "for_guest": event.guest and instance.running,
            }
            for event in events
        ]
        if rows:
            self.connection.execute(insert(notifications), rows)
            self.told += len(rows)

    def _reload(self, number: int) -> Instance:
        instance = load(self.connection, number)
        assert instance is not None, "written in this transaction"
        return instance
