"""Reports the status of a mirror to systemd, and in the store for ``guestapi check``."""

from __future__ import annotations

import logging
import math
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

#: Seconds between two checks whether the daemon still answers; each one is recorded.
CONTACT_SECONDS = 10.0
#: Seconds without an answer after which that is recorded, and between two checks of it.
_STALLED_SECONDS, _WATCH_SECONDS = 7.0, 1.0
#: Seconds after an answer in which a loss belongs to what was before: a daemon that goes on after a hang answers what
#: it was asked, and then ends its event streams.
_SETTLED_SECONDS = 5.0
#: Seconds between two notifications of systemd that say the same but for the lag.
_TELL_SECONDS = 1.0


@dataclass(slots=True)
class Progress:
    """The daemon as it was last seen.

    Attributes:
        contact: when it last answered, in seconds of Unix time; 0.0: never.
        lag: seconds from its latest change to its commit here.
        version: its name and version.
        waits: since when a request has had no answer (time.monotonic()); None: there is no request.
    """

    contact: float = 0.0
    lag: float = 0.0
    version: str = ""
    waits: float | None = None

    def renew(self) -> None:
        """Note the begin of a request, or an answer."""
        self.waits = time.monotonic()


class Report:
    """Records the status of a mirror when it changes, and every few seconds."""

    def __init__(
        self,
        writer: Writer,
        store: Views,
        name: str,
        socket: str,
        tell: Callable[[str], None],
        faults: Callable[[], Iterable[str]],
    ) -> None:
        """Record nothing yet.

        Args:
            writer: for changes of the store.
            store: for reading the store.
            name: the mirror's name.
            socket: the daemon's socket.
            tell: called with one sentence about the status.
            faults: returns the problems of single instances and images.
        """
        self._writer = writer
        self._store = store
        self._name = name
        self._socket = socket
        self._tell = tell
        self._faults = faults
        self._noted: SourceStatus | None = None
        self._alone = Lock()
        #: What systemd was told last, and when (time.monotonic()).
        self._counts, self._told = "", 0.0
        #: Since when the daemon answers (time.monotonic()); infinite: it does not, as the journal has been told.
        self._answers_since = -math.inf
        self.progress = Progress()

    def warn(self, why: str) -> None:
        """Log why the daemon does not answer, once until it has answered for a while."""
        with self._alone:
            if time.monotonic() > self._answers_since + _SETTLED_SECONDS:
                log.warning("%s; instances get the last known answers until it is back", why)
            self._answers_since = math.inf

    def note(self, lost: str = "", stalled: str = "") -> None:
        """Report the status, and record it if it has changed or the last record is old.

        Args:
            lost: why the daemon does not answer.
            stalled: why changes are not known.

        Raises:
            StoreError: the status cannot be recorded.
        """
        with self._alone:
            self._note(lost, stalled)

    def watch(self) -> None:
        """Record that a request has no answer, while the thread that sent it waits."""
        while True:
            time.sleep(_WATCH_SECONDS)
            since = self.progress.waits
            if since is not None and time.monotonic() > since + _STALLED_SECONDS:
                self.warn(f"{self._socket}: the daemon does not answer")
                try:
                    self.note(stalled="the daemon does not answer, so changes are not known")
                except StoreError as error:
                    log.error("%s", error)

    def _note(self, lost: str, stalled: str) -> None:
        if not lost and not stalled:
            self._answers_since = min(self._answers_since, time.monotonic())
        faults = [lost] if lost else [*([stalled] if stalled else []), *self._faults()]
        fault = faults[0] if faults else ""
        if len(faults) > 1:
            fault += f" (and {len(faults) - 1} more, see the journal)"
        now = SourceStatus(self._name, self._socket, not lost, self.progress.contact, self.progress.lag, fault)
        last = self._noted
        same = last is not None and (last.connected, last.fault) == (now.connected, now.fault)
        # In either direction, because the clock may have been set.
        if last is None or not same or abs(now.contact - last.contact) > CONTACT_SECONDS / 2:
            with self._writer.change() as change:
                statuses.record_status(change, now)
            self._noted = now
        with self._store.view() as store:
            total, running = statuses.count_instances(store, self._name)
        counts = f"{total} instances, {running} running"
        if same and counts == self._counts and time.monotonic() < self._told + _TELL_SECONDS:
            return
        self._counts, self._told = counts, time.monotonic()
        if lost:
            self._tell(f"{self._name} is lost, {counts} as last known: {lost}")
        else:
            version = self.progress.version
            self._tell(f"follows {version}: {counts}, lag {now.lag:.3f} s{'; ' if fault else ''}{fault}")
