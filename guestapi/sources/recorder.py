"""Writes what a follower has observed to the store: in batches, again and again until it is written.

A thread of its own, since a commit takes as long as the disk does, and a store may be locked for seconds: the follower
goes on looking meanwhile. What is observed anew before it is written replaces what was observed before.
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

#: Seconds until the first new try after the store could not be written, and at the most; they double in between.
_FIRST_RETRY, _LAST_RETRY = 0.05, 2.0
#: Seconds between two notes of how the follower is; `guestapi check` takes one for stale after thirty.
NOTE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Status:
    """How a follower is.

    Attributes:
        contact: when it last saw that its runtime was as it thinks, in seconds of Unix time; 0.0: never.
        fault: what keeps it from that, in one sentence; empty: nothing does.
        lag: seconds from the latest observation to its commit.
    """

    contact: float = 0.0
    fault: str = ""
    lag: float = 0.0


class Ledger(Protocol):
    """Where observations are written: the store. Each method is one transaction, done or not done."""

    def known(self) -> Mapping[str, Init | None]:
        """Key and init of each instance of this source."""

    def write(
        self, observed: Sequence[Observed], gone: Collection[str], refused: Sequence[Problem]
    ) -> Sequence[Problem]:
        """Make the store so; what could not be taken over.

        Args:
            observed: what is there.
            gone: keys of what is there no more.
            refused: what is there, and can be no instance.
        """

    def note(self, status: Status) -> None:
        """Write down how the follower is."""


@dataclass(slots=True)
class _Batch:
    """What is to be written: of each key the latest (None: it is gone), who waits for it, and since when."""

    wanted: dict[str, Observed | Problem | None] = field(default_factory=dict)
    callers: dict[str, list[DoorbellCaller]] = field(default_factory=dict)
    since: float = 0.0

    def add(self, key: str, what: Observed | Problem | None) -> None:
        self.wanted[key] = what
        self.since = self.since or time.monotonic()

    def add_before(self, older: _Batch) -> None:
        """Take over what could not be written before."""
        self.wanted = {**older.wanted, **self.wanted}
        self.since = older.since or self.since
        for key, callers in older.callers.items():
            self.callers.setdefault(key, []).extend(callers)


class Recorder:
    """Made and used by a follower's loop; `run` is the thread's."""

    def __init__(
        self,
        ledger: Ledger,
        loaded: Callable[[Mapping[str, Init | None]], None],
        written: Callable[[Collection[str], Sequence[Problem]], None],
    ) -> None:
        """Open the store.

        Args:
            ledger: where to write.
            loaded: called by the thread with what the store has: once it could be read, and after each `check`.
            written: called by the thread after each commit, with keys and what could not be taken over.
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
        #: When the thread last came to something, in seconds of the monotonic clock.
        self.beat = time.monotonic()

    @property
    def outage(self) -> str:
        """Why the store cannot be written; empty if it can."""
        return self._outage

    def submit(self, key: str, what: Observed | Problem | None, caller: DoorbellCaller | None = None) -> None:
        """Have something written, and then the caller answered."""
        with self._condition:
            self._batch.add(key, what)
            if caller is not None:
                self._batch.callers.setdefault(key, []).append(caller)
            self._condition.notify()

    def check(self) -> None:
        """Have the store read again: it may have been put back from a backup, or somebody has removed an instance."""
        with self._condition:
            self._unchecked = True
            self._condition.notify()

    def tell(self, status: Status) -> None:
        """Have it noted how the follower is."""
        with self._condition:
            self._status = status
            if _is_news(status, self._noted):
                self._condition.notify()

    def stop(self, seconds: float) -> None:
        """Wait until all is written, so long at the most, and end the thread's work."""
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
                # Locked, full, missing: that passes, and all that is lost until then is time.
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
        """Whether there is something to write, to note, to read, or no more to do."""
        news = _is_news(self._status, self._noted)
        return bool(self._batch.wanted) or self._unchecked or news or self._stop_at is not None

    def _take(self) -> _Batch:
        """What is to be written now; waits for it, or for the next note."""
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
            # Nothing that a container is may keep the others from being registered.
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
            # Who has given up keeps no descriptor here.
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
    """Whether somebody may be waiting to read this."""
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
