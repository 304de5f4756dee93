"""Collects from a daemon's events where a mirror has to look. Uses neither the store nor the daemon.

An event only says where to look. Many events of one instance cause one look, and the queue grows with the number of
instances, not of events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from threading import Condition

from guestapi.mirror.daemon_model import DaemonError, DaemonEvent, happened

#: Events that change nothing that a guest can read, by the second word of the action.
_IRRELEVANT = frozenset({"backup", "console", "exec", "file", "log", "metadata", "snapshot"})
#: Kinds of objects whose changes may change any instance.
_FAR_REACHING = frozenset({"cluster", "profiles", "projects"})


@dataclass(slots=True)
class SyncBatch:
    """A batch of places to look at.

    Attributes:
        everything: all instances.
        instances: project and name of single ones.
        images: the list of images.
        since: when the first event happened, in seconds of Unix time; 0.0: there is none.
    """

    everything: bool = False
    instances: set[tuple[str, str]] = field(default_factory=set)
    images: bool = False
    since: float = 0.0

    @property
    def anything(self) -> bool:
        """Whether the batch contains anything."""
        return self.everything or self.images or bool(self.instances)

    def add(self, event: DaemonEvent) -> bool:
        """Add an event; return whether it causes a look."""
        what = happened(event)
        if what is None:
            return False
        kind, project, name = what.target
        if kind == "instances" and name:
            if what.action.removeprefix("instance-").partition("-")[0] in _IRRELEVANT:
                return False
            self.instances.add((project, name))
            if isinstance(old := (what.context or {}).get("old_name"), str):
                self.instances.add((project, old))
        elif kind in _FAR_REACHING:
            self.everything = True
        elif kind == "images":
            self.images = True
        else:
            return False
        self.since = self.since or _seconds(event.timestamp)
        return True


class SyncQueue:
    """A `SyncBatch` that collects until it is taken. One thread takes it, others add events."""

    def __init__(self, concerns: Callable[[DaemonEvent], bool] = lambda _event: True) -> None:
        """Begin with a look at all instances.

        Args:
            concerns: returns whether an event is about this member.
        """
        self._concerns = concerns
        self._condition = Condition()
        self._work = SyncBatch(everything=True, images=True)
        self._lost: DaemonError | None = None
        self._wake = True

    def read(self, events: Iterable[DaemonEvent]) -> None:
        """Collect events until the daemon is lost; `take` raises then."""
        try:
            for event in events:
                if not self._concerns(event):
                    continue
                with self._condition:
                    if self._work.add(event):
                        self._notify()
        except DaemonError as error:
            with self._condition:
                self._lost = error
                self._notify()

    def ring(self) -> None:
        """Wake `take`: the store has changed."""
        with self._condition:
            self._notify()

    def take(self, seconds: float) -> SyncBatch:
        """Wait for events, at most so many seconds, and return the batch.

        Raises:
            DaemonError: the daemon is lost.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._wake, seconds)
            self._check()
            work, self._work, self._wake = self._work, SyncBatch(), False
            return work

    def check(self) -> None:
        """Raise DaemonError if the daemon is lost."""
        with self._condition:
            self._check()

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _notify(self) -> None:
        self._wake = True
        self._condition.notify()


def _seconds(timestamp: str) -> float:
    try:
        return datetime.fromisoformat(timestamp).timestamp()
    except ValueError:
        return 0.0
