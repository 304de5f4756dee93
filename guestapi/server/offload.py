"""The store as the application of a worker sees it: looks are immediate, writes leave the event loop alone."""

from __future__ import annotations

from gevent.hub import get_hub

from guestapi.model import Image, Init
from guestapi.notifications.broker import Broker
from guestapi.settings import Settings
from guestapi.store import images
from guestapi.store.doorbell import Doorbell
from guestapi.store.reading import Reader
from guestapi.store.schema import database_file
from guestapi.store.writing import Writer


class OffloadedStore:
    """A `Reader` for the event loop's thread, and a `Writer` for threads beside it (`api.app.Store`).

    Attributes:
        broker: who listens to the change log.
        doorbell: when to look there.
    """

    def __init__(self, settings: Settings) -> None:
        """Open the store.

        Raises:
            StoreError: it cannot be used.
        """
        self._reader = Reader(settings.store.url)
        self.broker = Broker(
            self._reader,
            queue_limit=settings.limits.stream_queue,
            listeners_per_instance=settings.limits.streams_per_instance,
        )
        self.doorbell = Doorbell(database_file(settings.store.url))
        self._writer = Writer(settings)
        #: As `Reader.instance`; asked several times at each request.
        self.instance = self._reader.instance
        self._images = images.directory(settings)

    def running_in(self, namespace: int) -> list[tuple[int, int, Init]]:
        """As `Reader.running_in`."""
        return self._reader.running_in(namespace)

    def mirrored(self) -> bool:
        """As `Reader.mirrored`."""
        return self._reader.mirrored()

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """As `Writer.set_ready`, in a thread of gevent's pool; only the calling greenlet waits for it."""
        noted: bool = get_hub().threadpool.apply(self._writer.set_ready, (instance_id, run, ready, init))
        return noted

    def image(self, fingerprint: str) -> Image | None:
        """As `Reader.image`."""
        return self._reader.image(fingerprint)

    def open_image(self, image: Image) -> list[int]:
        """As `store.images.open_files`, in a thread of gevent's pool: a disk that sleeps holds up this caller alone."""
        opened: list[int] = get_hub().threadpool.apply(images.open_files, (self._images, image))
        return opened
