"""The store for a worker's application: reads are immediate, writes run in a thread beside the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, cast

from gevent.hub import get_hub

from guestapi.audit_log import by_guest
from guestapi.encoding import printable
from guestapi.model import Image, Init, Instance
from guestapi.notifications.broker import Broker
from guestapi.server.group_commit import GroupCommit
from guestapi.server.instance_locks import InstanceLocks
from guestapi.settings import Settings
from guestapi.store import images
from guestapi.store.attributes import AttributeReport, Outcome
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.notices import AcknowledgementReport
from guestapi.store.reading import Reader, ValueReader, Version
from guestapi.store.writing import ReadyReport, WorkloadReport, Writer

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class OffloadedStore:
    """A `Reader` in the event loop's thread and a `Writer` in threads beside it. It implements `api.app.Store`.

    Attributes:
        broker: the subscriptions to the change log.
        doorbell: tells when the log has new entries.
    """

    def __init__(self, settings: Settings) -> None:
        """Open the store if possible. If not, each later call tries again.

        Args:
            settings: where the store is, and how many streams an instance may have.

        Raises:
            StoreError: ``store.url`` is not the URL of a store.
        """
        self._settings = settings
        self._reader = Reader(settings.store.url)
        try:
            # Before a client waits for it.
            self._reader.latest()
        except StoreError as error:
            # Other workers may have read enough to continue. If this one did not start, gunicorn would stop them all.
            log.error("%s", error)
        self.broker = Broker(
            self._reader,
            queue_limit=settings.limits.stream_queue,
            subscriptions_per_instance=settings.limits.streams_per_instance,
        )
        self.doorbell = Doorbell(database_file(settings.store.url))
        self._writer: Writer | None = None
        self._audit = by_guest()
        self._reports: GroupCommit[WorkloadReport[object], object] = GroupCommit(self._write_reports)
        self._values = ValueReader(settings.store.url)
        self._value_locks = InstanceLocks()
        self._report_locks = InstanceLocks()
        #: As `Reader.instance` and `Reader.running_in`. PERF: a request calls them several times.
        self.instance = self._reader.instance
        #: As `Reader.policies_of`.
        self.policies_of = self._reader.policies_of
        #: As `Reader.seen`.
        self.seen = self._reader.seen
        self.running_in = self._reader.running_in
        #: As `Reader.notices`.
        self.notices = self._reader.notices
        #: As `Reader.attributes` and `Reader.attribute`.
        self.attributes = self._reader.attributes
        self.attribute = self._reader.attribute
        #: As `Reader.snapshot_of`.
        self.snapshot_of = self._reader.snapshot_of
        self._images = images.directory(settings)

    def version(self) -> Version:
        """As `Reader.version`."""
        return self._reader.version()

    def has_sources(self) -> bool:
        """As `Reader.has_sources`."""
        return self._reader.has_sources()

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """As `Writer.set_ready`, in one transaction with what others say at the same time. Only its greenlet waits."""
        return cast("bool", self._reports.submit(ReadyReport(instance_id, run, ready, init)))

    def write_attribute(
        self, instance: Instance, path: str, value: bytes | None, holds: Callable[[bytes | None], bool] | None
    ) -> Outcome:
        """As `store.attributes.write`, in one transaction with what others say at the same time.

        Only the calling greenlet waits. An instance has one write at a time on its way, so none fills the next
        transactions, and others wait for one of each at the most.
        """
        with self._report_locks.hold(instance.id):
            return cast("Outcome", self._reports.submit(AttributeReport(instance, path, value, holds)))

    def read_value(self, instance: Instance, key: str) -> str | None:
        """As `store.reading.ValueReader.value`, in a thread of gevent's pool.

        Only the calling greenlet waits, and only for other values of the same instance: an instance with many large
        values reads one at a time, so it occupies one thread and the memory of one value.
        """
        with self._value_locks.hold(instance.id):
            return in_thread(self._values.value, instance, key)

    def read_value_at(self, instance: Instance, key: str, build: Callable[[str], T]) -> tuple[T | None, int]:
        """As `store.reading.ValueReader.value_at`, in a thread as `read_value`, where something is made of it, too."""

        def read() -> tuple[T | None, int]:
            value, event_id = self._values.value_at(instance, key)
            return None if value is None else build(value), event_id

        with self._value_locks.hold(instance.id):
            return in_thread(read)

    def read_whole(self, instance: Instance, build: Callable[[Instance], T]) -> tuple[Instance, int, T] | None:
        """As `store.reading.ValueReader.whole`, in a thread as `read_value`, where something is made of it, too.

        Args:
            instance: as `instance` has returned it.
            build: makes something of the whole instance.

        Returns:
            The instance, the id of the change log's last entry at the same moment, and what was made of it; None if the
            instance is gone.
        """

        def read() -> tuple[Instance, int, T] | None:
            whole, event_id = self._values.whole(instance)
            return None if whole is None else (whole, event_id, build(whole))

        with self._value_locks.hold(instance.id):
            return in_thread(read)

    def spend(self, instance: Instance, key: str, pid: int, uid: int) -> str | None:
        """As `Writer.spend`, in a thread as `read_value`. The journal says who got the value."""
        with self._value_locks.hold(instance.id):
            value = in_thread(self._spend, instance, key, pid, uid)
        if value is not None:
            who = f"{instance.project}/{instance.name}"
            log.info("%s: the value of %s was given once, to pid %d of user %d", who, printable(key), pid, uid)
        return value

    def _spend(self, instance: Instance, key: str, pid: int, uid: int) -> str | None:
        if self._writer is None:
            self._writer = Writer(self._settings, audit=self._audit)
        return self._writer.spend(instance, key, pid, uid)

    def acknowledge(self, instance: Instance, notice_id: str) -> bool:
        """As `Writer.acknowledge`, in one transaction with what others say at the same time; as `write_attribute`."""
        report = AcknowledgementReport(instance.id, instance.run, instance.init, notice_id)
        with self._report_locks.hold(instance.id):
            return cast("bool", self._reports.submit(report))

    def _write_reports(self, reports: Sequence[WorkloadReport[object]]) -> list[object]:
        return in_thread(self._record_all, reports)

    def _record_all(self, reports: Sequence[WorkloadReport[object]]) -> list[object]:
        if self._writer is None:
            self._writer = Writer(self._settings, audit=self._audit)
        return self._writer.record_all(reports)

    def image(self, fingerprint: str) -> Image | None:
        """As `Reader.image`."""
        return self._reader.image(fingerprint)

    def open_image(self, image: Image) -> list[int]:
        """As `store.images.open_files`, in a thread of gevent's pool. Only the calling greenlet waits for the disk."""
        return in_thread(images.open_files, self._images, image)


def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread of gevent's pool. Its exception is raised here; gevent would also print it."""
    result: list[T] = []

    def call() -> Exception | None:
        try:
            result.append(function(*args, **kwargs))
        except Exception as error:
            return error
        return None

    error: Exception | None = get_hub().threadpool.apply(call)
    if error is not None:
        raise error
    return result[0]
