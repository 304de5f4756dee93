"""Writes a follower's observations to the store in batches, and repeats a batch until it is written.

It has its own thread, because a commit waits for the disk and a store may be locked for seconds; the follower continues
meanwhile. A new observation of a key replaces one that is not written yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Condition
from typing import Protocol

from guestapi.errors import GuestapiError
from guestapi.model import Init
from guestapi.sources.doorbell import RING_SECONDS, DoorbellCaller
from guestapi.sources.observed import Observed, Problem

log = logging.getLogger(__name__)

#: Seconds until the next try after the store could not be written: first, and longest; they double between.
_FIRST_RETRY, _LAST_RETRY = 0.05, 2.0
#: Seconds between two records of the follower's status; `guestapi check` treats one as stale after thirty.
NOTE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Status:
    """The status of a follower.

    Attributes:
        contact: when it last agreed with its runtime, in seconds of Unix time; 0.0: never.
        fault: why it cannot follow the runtime, in one sentence; empty: it can.
        lag: seconds from the latest observation to its commit.
    """

    contact: float = 0.0
    fault: str = ""
    lag: float = 0.0


class Ledger(Protocol):
    """Where observations are written: the store. Each method is one transaction."""

    def known(self) -> Mapping[str, Init | None]:
        """Return key and init of each instance of this source."""

    def write(
        self, observed: Sequence[Observed], gone: Collection[str], refused: Sequence[Problem]
    ) -> Sequence[Problem]:
        """Write observations; return the problems.

        Args:
            observed: instances that exist.
            gone: keys that no longer exist.
            refused: containers that exist and cannot be instances.
        """

    def note(self, status: Status) -> None:
        """Record the follower's status."""


@dataclass(slots=True)
class _Batch:
    """A batch: the latest observation of each key (None: it is gone), the hooks that wait for it, and its age."""

    wanted: dict[str, Observed | Problem | None] = field(default_factory=dict)
    callers: dict[str, list[DoorbellCaller]] = field(default_factory=dict)
    since: float = 0.0

    def add(self, key: str, what: Observed | Problem | None) -> None:
        self.wanted[key] = what
        self.since = self.since or time.monotonic()

    def add_before(self, older: _Batch) -> None:
        """Add a batch that could not be written before."""
        self.wanted = {**older.wanted, **self.wanted}
        self.since = older.since or self.since
        for key, callers in older.callers.items():
            self.callers.setdefault(key, []).extend(callers)


class Recorder:
    """Used by a follower's loop; `run` belongs to its own thread."""

    def __init__(
        self,
        ledger: Ledger,
        loaded: Callable[[Mapping[str, Init | None]], None],
        written: Callable[[Collection[str], Sequence[Problem]], None],
    ) -> None:
        """Open the store.

        Args:
            ledger: where to write.
            loaded: called by the thread with the store's content, after the first read and after each `check`.
            written: called by the thread after each commit, with the keys and the problems.
        """
        self._ledger = ledger
        self._loaded, self._written = loaded, written
        self._condition = Condition()
        self._batch = _Batch()
        self._busy = True
        self._unchecked = False
        self._stop_at: float | None = None
        self._outage = ""
        self._status = Status()
        self._noted = Status()
        self._noted_at = -NOTE_SECONDS
        self._lag = 0.0
        #: When the thread last made progress, in seconds of the monotonic clock.
        self.beat = time.monotonic()

    @property
    def outage(self) -> str:
        """Why the store cannot be written; empty if it can."""
        return self._outage

    def submit(self, key: str, what: Observed | Problem | None, caller: DoorbellCaller | None = None) -> None:
        """Queue an observation; the caller is answered when it is written."""
        with self._condition:
            self._batch.add(key, what)
            if caller is not None:
                self._batch.callers.setdefault(key, []).append(caller)
            self._condition.notify()

    def check(self) -> None:
        """Have the store read again: it may have been restored from a backup, or an instance removed."""
        with self._condition:
            self._unchecked = True
            self._condition.notify()

    def tell(self, status: Status) -> None:
        """Queue the follower's status."""
        with self._condition:
            self._status = status
            if _is_news(status, self._noted):
                self._condition.notify()

    def stop(self, seconds: float) -> None:
        """Wait until everything is written, at most so many seconds, and end the thread's work."""
        with self._condition:
            self._stop_at = time.monotonic() + seconds
            self._condition.notify()
            while (self._busy or self._batch.wanted) and (left := self._stop_at - time.monotonic()) > 0:
                self._condition.wait(left)

    def run(self) -> None:
        """Write, until `stop`."""
        retry = _FIRST_RETRY
        loaded = False
        while not self._is_over():
            batch = self._take() if loaded else _Batch()
            try:
                if not loaded:
                    known = self._ledger.known()
                    loaded = True
                    self._loaded(known)
                else:
                    self._write(batch)
                    self._note()
                    if self._unchecked:
                        known = self._ledger.known()
                        self._unchecked = False
                        self._loaded(known)
                retry = _FIRST_RETRY
                if self._outage:
                    log.warning("the store can be written again")
                    self._outage = ""
            except GuestapiError as error:
                # The store is locked, full or missing. The batch is written when that has passed.
                if not self._outage:
                    log.error("what was observed cannot be written yet: %s", error)
                self._outage = str(error)
                self._put_back(batch)
                self._pause(retry)
                retry = min(2 * retry, _LAST_RETRY)

    def _is_over(self) -> bool:
        with self._condition:
            if self._stop_at is None:
                return False
            return not self._batch.wanted or time.monotonic() > self._stop_at

    def _has_work(self) -> bool:
        """Whether the thread has something to do, or is to end."""
        news = _is_news(self._status, self._noted)
        return bool(self._batch.wanted) or self._unchecked or news or self._stop_at is not None

    def _take(self) -> _Batch:
        """Wait for a batch or for the next status, and return it."""
        with self._condition:
            self._busy = False
            self._condition.notify_all()
            until = self._noted_at + NOTE_SECONDS
            while not self._has_work():
                self.beat = time.monotonic()
                if (left := until - self.beat) <= 0:
                    break
                self._condition.wait(left)
            batch, self._batch = self._batch, _Batch()
            self._busy = True
            self.beat = time.monotonic()
            return batch

    def _write(self, batch: _Batch) -> None:
        if not batch.wanted:
            return
        try:
            problems = self._ledger.write(*_sorted(batch))
        except GuestapiError:
            raise
        except Exception:
            # A container with any property must not keep others from being registered.
            if len(batch.wanted) > 1:
                for key, what in batch.wanted.items():
                    self._write(_Batch({key: what}, {key: batch.callers.get(key, [])}, batch.since))
                return
            log.exception("%s cannot be registered", next(iter(batch.wanted)))
            _answer(batch, dict.fromkeys(batch.wanted, "it cannot be registered, see the journal"))
            return
        self._lag = time.monotonic() - batch.since
        refused = {one.key: one.reason + (f"; {one.hint}" if one.hint else "") for one in problems if one.refused}
        _answer(batch, refused)
        self._written(batch.wanted.keys(), problems)

    def _note(self) -> None:
        with self._condition:
            status = replace(self._status, lag=self._lag)
        if time.monotonic() >= self._noted_at + NOTE_SECONDS or _is_news(status, self._noted):
            self._ledger.note(status)
            self._noted, self._noted_at = status, time.monotonic()

    def _put_back(self, batch: _Batch) -> None:
        now = time.monotonic()
        for key, callers in batch.callers.items():
            # Hooks that have given up are closed, so that they use no descriptors.
            for caller in callers:
                if caller.since < now - RING_SECONDS:
                    caller.answer(self._outage)
            batch.callers[key] = [caller for caller in callers if caller.since >= now - RING_SECONDS]
        with self._condition:
            self._batch.add_before(batch)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._condition:
            while (left := until - time.monotonic()) > 0 and self._stop_at is None:
                self.beat = time.monotonic()
                self._condition.wait(left)
        if self._stop_at is not None:
            time.sleep(_FIRST_RETRY)
        self.beat = time.monotonic()


def _is_news(now: Status, noted: Status) -> bool:
    """Whether a hook may wait for the answer."""
    return now.fault != noted.fault or bool(now.contact) != bool(noted.contact)


def _sorted(batch: _Batch) -> tuple[list[Observed], list[str], list[Problem]]:
    observed = [what for what in batch.wanted.values() if isinstance(what, Observed)]
    gone = [key for key, what in batch.wanted.items() if what is None]
    refused = [what for what in batch.wanted.values() if isinstance(what, Problem)]
    return observed, gone, refused


def _answer(batch: _Batch, refused: Mapping[str, str]) -> None:
    for key, callers in batch.callers.items():
        what = batch.wanted.get(key)
        reason = what.reason if isinstance(what, Problem) else refused.get(key)
        for caller in callers:
            caller.answer(reason)
