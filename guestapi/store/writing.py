"""Every change of the store: one transaction that holds the new state and what is told about it, or nothing.

A `Writer` makes `Change`s; a `Change` is one transaction. The functions of `steps`, `image_steps` and `statuses` take
it. Commands, mirrors and followers all use them, so names are checked there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from guestapi.model import Init, Instance
from guestapi.store import steps
from guestapi.store.bell import ring
from guestapi.store.engine import KeptConnections, open_writer
from guestapi.store.errors import explained
from guestapi.store.transaction import Change, trim

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from guestapi.audit import AuditRecord
    from guestapi.store.options import Options


R_co = TypeVar("R_co", covariant=True)


class WorkloadReport(Protocol[R_co]):
    """What a workload says of itself, to be recorded."""

    def record(self, change: Change) -> R_co:
        """Record it in this transaction, and return what became of it."""
        ...


class ReadyReport(NamedTuple):
    """Whether a workload is ready; attributes as the arguments of `steps.set_ready`."""

    instance_id: int
    run: int
    ready: bool
    init: Init | None

    def record(self, change: Change) -> bool:
        """As `WorkloadReport`; as `steps.set_ready`."""
        return steps.set_ready(change, self.instance_id, self.run, self.ready, self.init)


class Writer:
    """Changes the store. May be used by several threads: every transaction has a connection of its own."""

    def __init__(
        self,
        settings: Options,
        *,
        create: bool = False,
        keep: bool = False,
        audit: Callable[[Sequence[AuditRecord]], None] | None = None,
    ) -> None:
        """Open the store.

        Args:
            settings: where it is, and its bounds.
            create: make it if it is missing.
            keep: leave it open between changes, for a process that makes many and ends by being killed.
            audit: called after each commit with what is recorded of the change; None: nothing is.

        Raises:
            StoreError: it is missing or cannot be used.
        """
        self._database = open_writer(settings.store.url, lock_seconds=settings.store.lock_seconds, create=create)
        self._connections = KeptConnections(self._database) if keep else None
        self._configuration_bytes = settings.store.configuration_bytes
        self._keep = settings.events
        self._audit = audit

    @property
    def state_directory(self) -> Path:
        """The directory of the database; its owner is the service's user."""
        from pathlib import Path

        return Path(self._database.path).parent

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction: committed, durably, at the end of the block; undone if it raises.

        Raises:
            StoreBusyError: another writer held the store for too long.
            StoreError: it cannot be written.
        """
        with explained(self._database.path), self._connection() as connection:
            # At once: a writer must not find out at its first write that what it has read is stale.
            connection.execute("BEGIN IMMEDIATE")
            try:
                change = Change(connection, self._configuration_bytes)
                yield change
                if change.told:
                    trim(change, self._keep.keep_entries, self._keep.keep_seconds)
                connection.execute("COMMIT")
            finally:
                # SQLite may have ended it by itself, after an error.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            # Before the connection is closed: listeners wait for this.
            if change.told:
                ring(self._database.path)
        if self._audit is not None and (records := change.take_records()):
            self._audit(records)

    def _connection(self) -> AbstractContextManager[sqlite3.Connection]:
        return self._connections.use() if self._connections is not None else closing(self._database.connect())

    def spend(self, instance: Instance, key: str, pid: int, uid: int) -> str | None:
        """Give the value of a key that is given once, in a transaction of its own; see `policies.spend`."""
        # PERF: loaded by workers alone.
        from guestapi.store import policies

        with self.change() as change:
            return policies.spend(change, instance, key, pid, uid)

    def acknowledge(self, instance: Instance, notice_id: str) -> bool:
        """Record that an instance has acknowledged a notice, in a transaction of its own; see `notices.acknowledge`."""
        # PERF: loaded by workers alone.
        from guestapi.store import notices

        report = notices.AcknowledgementReport(instance.id, instance.run, instance.init, notice_id)
        return self.record_all([report])[0]

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """Write what the workload says of itself, in a transaction of its own; see `steps.set_ready`."""
        return self.record_all([ReadyReport(instance_id, run, ready, init)])[0]

    def record_all(self, reports: Sequence[WorkloadReport[R_co]]) -> list[R_co]:
        """Write what several workloads say of themselves, in one transaction: it costs about as much as one of them.

        Args:
            reports: in the order in which they were made.

        Returns:
            What became of each.

        Raises:
            StoreError: none of them was recorded.
        """
        with self.change() as change:
            return [one.record(change) for one in reports]
