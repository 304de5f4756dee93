"""Says how a mirror does: to systemd, and in the store, where ``guestapi check`` looks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock

from guestapi.model import SourceStatus
from guestapi.store import statuses
from guestapi.store.errors import StoreError
from guestapi.store.view import Views
from guestapi.store.writing import Writer

log = logging.getLogger(__name__)

#: Seconds between two looks whether the daemon still answers; each is written down.
CONTACT_SECONDS = 10.0
#: Seconds without an answer after which that is written down, and between two looks whether that is so.
_STALLED_SECONDS, _WATCH_SECONDS = 7.0, 1.0


@dataclass(slots=True)
class Progress:
    """What is known of the daemon.

    Attributes:
        contact: when it last answered, in seconds of Unix time; 0.0: never.
        lag: seconds from its latest change to its commit here.
        version: its name and version.
        waits: since when nothing was told of what was asked for (time.monotonic()); None: nothing is asked for.
    """

    contact: float = 0.0
    lag: float = 0.0
    version: str = ""
    waits: float | None = None

    def renew(self) -> None:
        """Note that something is asked for, or was told."""
        self.waits = time.monotonic()


class Report:
    """Writes down how a mirror does, whenever that changes, and every few seconds."""

    def __init__(
        self,
        writer: Writer,
        store: Views,
        name: str,
        socket: str,
        tell: Callable[[str], None],
        faults: Callable[[], Iterable[str]],
    ) -> None:
        """Write nothing yet.

        Args:
            writer: of the store.
            store: where to look at it.
            name: of the mirror.
            socket: the daemon's.
            tell: called with one sentence about how things are.
            faults: returns what is wrong with single instances and images.
        """
        self._writer = writer
        self._store = store
        self._name = name
        self._socket = socket
        self._tell = tell
        self._faults = faults
        self._noted: SourceStatus | None = None
        self._alone = Lock()
        self.progress = Progress()

    @property
    def connected(self) -> bool:
        """Whether the daemon is there, or nothing was said of it yet."""
        return self._noted is None or self._noted.connected

    def note(self, lost: str = "", stalled: str = "") -> None:
        """Tell how things are, and write it down if it has changed or was long ago.

        Args:
            lost: why the daemon is away.
            stalled: why nothing is known of what has changed.

        Raises:
            StoreError: it cannot be written down.
        """
        with self._alone:
            self._note(lost, stalled)

    def watch(self) -> None:
        """Write it down when the daemon does not tell what it was asked for: the thread that has asked only waits."""
        while True:
            time.sleep(_WATCH_SECONDS)
            since = self.progress.waits
            if since is not None and time.monotonic() > since + _STALLED_SECONDS:
                try:
                    self.note(stalled="the daemon does not answer, so changes are not known")
                except StoreError as error:
                    log.error("%s", error)

    def _note(self, lost: str, stalled: str) -> None:
        faults = [lost] if lost else [*([stalled] if stalled else []), *self._faults()]
        fault = faults[0] if faults else ""
        if len(faults) > 1:
            fault += f" (and {len(faults) - 1} more, see the journal)"
        now = SourceStatus(self._name, self._socket, not lost, self.progress.contact, self.progress.lag, fault)
        last = self._noted
        same = last is not None and (last.connected, last.fault) == (now.connected, now.fault)
        # As far from now as that in either direction: the clock may have been set.
        if last is None or not same or abs(now.contact - last.contact) > CONTACT_SECONDS / 2:
            with self._writer.change() as change:
                statuses.record_status(change, now)
            self._noted = now
        with self._store.view() as store:
            total, running = statuses.count_instances(store, self._name)
        counts = f"{total} instances, {running} running"
        if lost:
            self._tell(f"{self._name} is lost, {counts} as last known: {lost}")
        else:
            version = self.progress.version
            self._tell(f"follows {version}: {counts}, lag {now.lag:.3f} s{'; ' if fault else ''}{fault}")
