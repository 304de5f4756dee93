"""Follows one container runtime: the loop that every source but a daemon's mirror runs in.

    hook rings ----> at_doorbell ----.
    runtime changes, slow timer ----> observe (thread) ----> Recorder (thread) ----> store
    an init ends (pidfd) -----------'

Three threads. The loop never waits for the runtime or for the store, so each container is observed when its hook
rings, before its init runs. A second thread asks the runtime, one `_Look` at a time. The `Recorder` writes.

A follower keeps no state between two runs and observes everything when it starts, so it may be killed at any moment. It
observes everything again each minute, because an event may be missed.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from threading import Thread

from guestapi.callers.machines import is_alive
from guestapi.errors import SourceError
from guestapi.model import Init
from guestapi.sources.doorbell import DoorbellCaller, DoorbellServer, Ring
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.recorder import Ledger, Recorder, Status
from guestapi.sources.source import Changes, Found, Source, Unclear
from guestapi.systemd import notify, watchdog_seconds

log = logging.getLogger(__name__)

#: Seconds between two looks at all containers.
LOOK_SECONDS = 60.0
#: Seconds between two looks after which every instance is written again: the store may have been changed.
THOROUGH_SECONDS = 600.0
#: Seconds from the end of an init to the look that shows whether its container is gone or runs again.
_AFTER_END = 0.5
#: Seconds from when a name becomes free to a look at refused containers, so that the release is written first.
_AFTER_FREE = 0.2
#: Seconds from a ring that could not be used to a look at all containers: one of them may be unknown.
_AFTER_BAD_RING = 1.0
#: Seconds until the next try after the runtime could not be asked: first, and longest.
_FIRST_RETRY, _LAST_RETRY = 0.2, 30.0
#: Most containers that one look asks about one by one; each may take as long as the source's deadline.
_AT_ONCE = 32
#: The operator is told of a container after so many looks without a result.
_TOLD_AFTER = 4
#: Longest sleep of the loop, in seconds.
_TICK = 1.0
#: Seconds without progress after which a thread counts as hung. A look is bounded by its source.
_HUNG = 150.0
#: Seconds for the first look at all containers, after which its absence is a fault: a monitor may hang for a while.
_FIRST_LOOK = 20.0
_NOT_YET = "it has not yet looked at all containers since its start"
#: Seconds for writing the last observations when the follower stops.
_STOP_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class _Look:
    """A look at the runtime: the question, and then the result.

    Attributes:
        keys: which containers; None: all.
        known: keys and inits that the follower knew when it asked.
        number: the number of the latest event then.
        found: observations by key; None: the container is gone.
        error: why the runtime could not be asked; None: it answered.
    """

    keys: Collection[str] | None
    known: Mapping[str, Init | None]
    number: int
    found: Mapping[str, Found | None] | None = None
    error: SourceError | None = None


class Follower:
    """The loop. `run` is called once."""

    def __init__(self, source: Source, ledger: Ledger, doorbell: Path, tell: Callable[..., None] = notify) -> None:
        """Prepare to follow.

        Args:
            source: the runtime to follow.
            ledger: where observations are written.
            doorbell: path of the socket at which hooks ring.
            tell: called with fields for systemd, as of sd_notify(3).
        """
        self._source = source
        self._tell = tell
        self._selector = DefaultSelector()
        self._path = doorbell
        self._recorder = Recorder(
            ledger,
            lambda known: self._post(lambda: self._compare(known)),
            lambda keys, problems: self._post(lambda: self._written(keys, problems)),
        )
        self._looks: SimpleQueue[_Look | None] = SimpleQueue()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        #: Keys and inits in the store or observed since; and the last observation of each key.
        self._known: dict[str, Init | None] = {}
        self._latest: dict[str, Observed] = {}
        #: Keys whose last write was refused. They are written again at each look.
        self._refused: set[str] = set()
        #: Number of the latest event, and of the latest of each key. An older look at the key is out of date.
        self._number = 0
        self._numbers: dict[str, int] = {}
        #: pidfd and init of each that runs.
        self._watched: dict[str, tuple[int, Init]] = {}
        self._changes: Changes | None = None
        self._changes_at, self._changes_retry = 0.0, _FIRST_RETRY
        #: When to look at all containers, and when at single keys; whether a look is in progress.
        self._all_at = float("inf")
        self._due: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self._looking = False
        self._look_retry = _FIRST_RETRY
        #: Whether this look also writes unchanged instances; and when the next such look is due.
        self._thorough, self._thorough_at = False, 0.0
        self._looked_since = time.monotonic()
        # Until the first look has ended, the start stands for it: a follower that has just started is not a fault.
        self._contact, self._fault = time.time(), ""
        self._has_looked = False
        self._reported = -_TICK
        self._stopping = False

    def run(self) -> None:
        """Follow until `stop`.

        Raises:
            SourceError: another follower of this source runs.
        """
        doorbell = DoorbellServer(self._selector, self._path, self._rung, self._look_soon)
        self._selector.register(self._wake, EVENT_READ, self._read_inbox)
        _start(self._recorder.run)
        _start(self._look_for_ever)
        # Hooks can ring from here on; the content of the store is not needed for that.
        self._tell("READY=1")
        # Less than half of systemd's watchdog interval.
        tick = min(_TICK, (watchdog_seconds() or 3 * _TICK) / 3)
        while not self._stopping:
            for key, _events in self._selector.select(max(0.0, min(tick, self._next() - time.monotonic()))):
                key.data()
            doorbell.tidy()
            self._open_changes()
            self._ask()
            self._report()
        self._tell("STOPPING=1")
        doorbell.close()
        self._looks.put(None)
        self._recorder.stop(_STOP_SECONDS)

    def stop(self) -> None:
        """Have `run` write what was observed, and return. May be called by a signal's handler, or another thread."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)

    def _post(self, call: Callable[[], None]) -> None:
        """Have the loop call a function. May be called by any thread."""
        self._inbox.append(call)
        os.eventfd_write(self._wake, 1)

    def _read_inbox(self) -> None:
        os.eventfd_read(self._wake)
        while self._inbox:
            self._inbox.popleft()()

    def _compare(self, known: Mapping[str, Init | None]) -> None:
        """Compare with the store, which is read at the start and after each look at all containers."""
        first = self._all_at == float("inf")
        differs = {key: init for key, init in known.items() if key not in self._refused} != self._registered()
        self._known = {**known, **self._known}
        if first:
            self._all_at = 0.0
        elif differs:
            # The store was changed by another program; or a write is pending, and then this costs one look.
            self._all_at = min(self._all_at, time.monotonic() + _AFTER_END)
            self._thorough_at = 0.0

    def _registered(self) -> dict[str, Init | None]:
        """Return what the store should hold."""
        return {key: init for key, init in self._known.items() if key in self._latest and key not in self._refused}

    # What is told: by hooks, pidfds and the runtime.

    def _rung(self, ring: Ring, caller: DoorbellCaller) -> None:
        try:
            found = self._source.at_doorbell(ring)
        except SourceError as error:
            log.error("%s hook: %s", self._source.name, error)
            caller.answer(str(error))
            self._look_soon()
            return
        except Exception:
            # A container with any property must not keep others from being registered.
            log.exception("%s hook: a container cannot be registered", self._source.name)
            caller.answer("it cannot be registered, see the journal")
            return
        if found is None:
            caller.answer()
            return
        self._take(found, caller)

    def _look_soon(self) -> None:
        """Look at all containers soon: a ring could not be used."""
        if self._all_at != float("inf"):
            self._all_at = min(self._all_at, time.monotonic() + _AFTER_BAD_RING)

    def _written(self, keys: Collection[str], problems: Sequence[Problem]) -> None:
        """Note that the recorder has written these keys, except for `problems`."""
        self._refused -= set(keys)
        for problem in problems:
            if problem.refused:
                self._refused.add(problem.key)
                if problem.holder is not None:
                    # If the holder is gone, the name is free.
                    self._look_at(problem.holder, 0.0)

    def _take(self, found: Observed | Problem, caller: DoorbellCaller | None = None) -> None:
        """Take over an observation that was made just now."""
        key, latest = found.key, self._latest.get(found.key)
        self._number += 1
        self._numbers[key] = self._number
        self._due.pop(key, None)
        if isinstance(found, Observed):
            if found.devices is None and latest is not None and latest.init == found.init:
                # Keep what was seen before the init ran.
                hostname = latest.hostname if found.hostname is None else found.hostname
                problems = found.problems or latest.problems
                found = replace(found, devices=latest.devices, hostname=hostname, problems=problems)
            if latest is not None and (latest.project, latest.name) != (found.project, found.name):
                self._look_at_refused()
            self._known[key] = found.init
            self._latest[key] = found
        if caller is None and found == latest and key not in self._refused and not self._thorough:
            return  # The store holds it already.
        self._recorder.submit(key, found, caller)
        if isinstance(found, Observed):
            self._watch(key, found.init)

    def _watch(self, key: str, init: Init | None) -> None:
        """Watch for the end of this init, in place of an earlier one of the same key."""
        pidfd, watched = self._watched.get(key, (-1, None))
        if watched is not None:
            if watched == init:
                return
            self._unwatch(key)
        if init is None:
            return
        try:
            pidfd = os.pidfd_open(init.pid)
        except ProcessLookupError:
            self._ended(key, init)
            return
        if not is_alive(init):
            os.close(pidfd)
            self._ended(key, init)
            return
        self._watched[key] = pidfd, init
        self._selector.register(pidfd, EVENT_READ, lambda: self._ended(key, init))

    def _unwatch(self, key: str) -> None:
        pidfd, _init = self._watched.pop(key)
        self._selector.unregister(pidfd)
        os.close(pidfd)

    def _ended(self, key: str, init: Init) -> None:
        """Note that an init has ended."""
        if key in self._watched:
            self._unwatch(key)
        latest = self._latest.get(key)
        if latest is not None and latest.init == init:
            self._take(replace(latest, init=None, devices=None, ready=None))
        self._look_at(key, _AFTER_END)

    def _open_changes(self) -> None:
        if self._changes is not None or time.monotonic() < self._changes_at:
            return
        try:
            self._changes = self._source.changes()
            self._selector.register(self._changes, EVENT_READ, self._read_changes)
        except SourceError as error:
            self._retry_changes(error)
            return
        self._changes_retry = _FIRST_RETRY
        # Events between were missed.
        self._all_at = min(self._all_at, time.monotonic()) if self._all_at != float("inf") else self._all_at

    def _read_changes(self) -> None:
        assert self._changes is not None
        try:
            keys = self._changes.read()
        except SourceError as error:
            self._selector.unregister(self._changes)
            self._changes.close()
            self._changes = None
            self._retry_changes(error)
            return
        if keys is None:
            self._all_at = min(self._all_at, time.monotonic())
        for key in keys or ():
            self._look_at(key, 0.0)

    def _retry_changes(self, error: SourceError) -> None:
        self._blame(str(error))
        self._changes_at = time.monotonic() + self._changes_retry
        self._changes_retry = min(2 * self._changes_retry, _LAST_RETRY)

    # What is asked.

    def _look_at(self, key: str, seconds: float) -> None:
        """Look at a container in so many seconds."""
        at = time.monotonic() + seconds
        self._due[key] = min(at, self._due.get(key, at))

    def _look_at_refused(self) -> None:
        """Look at the refused containers: a name became free that one of them may want."""
        for key in self._refused:
            self._look_at(key, _AFTER_FREE)

    def _next(self) -> float:
        """Return when the loop must act even if no event arrives."""
        if self._looking:
            return float("inf")
        changes = self._changes_at if self._changes is None else float("inf")
        return min(self._all_at, changes, *self._due.values())

    def _ask(self) -> None:
        """Begin the look that is due, unless one is in progress."""
        now = time.monotonic()
        if self._looking or self._all_at == float("inf"):
            return
        if now >= self._all_at:
            self._due.clear()
            self._begin(None)
        elif keys := [key for key, at in self._due.items() if at <= now][:_AT_ONCE]:
            for key in keys:
                del self._due[key]
            self._begin(keys)

    def _begin(self, keys: Collection[str] | None) -> None:
        self._looking = True
        self._looked_since = time.monotonic()
        self._looks.put(_Look(keys, dict(self._known), self._number))

    def _look_for_ever(self) -> None:
        """The thread that asks the runtime."""
        while (look := self._looks.get()) is not None:
            try:
                if look.keys is None:
                    found: dict[str, Found | None] = {one.key: one for one in self._source.observe(look.known)}
                else:
                    found = {key: self._source.observe_one(key, look.known.get(key)) for key in look.keys}
                done = replace(look, found=found)
            except SourceError as error:
                done = replace(look, error=error)
            except Exception as error:
                log.exception("%s cannot be looked at", self._source.name)
                done = replace(look, error=SourceError(f"{self._source.name} cannot be looked at: {error}"))
            self._post(lambda done=done: self._looked(done))  # type: ignore[misc]  # mypy infers no default's type

    def _looked(self, look: _Look) -> None:
        """Take over the result of a look."""
        self._looking = False
        self._looked_since = time.monotonic()
        now = time.monotonic()
        if look.error is not None or look.found is None:
            self._blame(str(look.error))
            if look.keys is None:
                self._all_at = now + self._look_retry
            for key in look.keys or ():
                self._look_at(key, self._look_retry)
            self._look_retry = min(2 * self._look_retry, _LAST_RETRY)
            return
        self._look_retry = _FIRST_RETRY
        if self._changes is not None:
            self._fault = ""
        self._contact, self._has_looked = time.time(), True
        wanted = dict(look.found)
        self._thorough = look.keys is None and now >= self._thorough_at
        if self._thorough:
            self._thorough_at = now + THOROUGH_SECONDS
        if look.keys is None:
            self._all_at = now + LOOK_SECONDS
            wanted.update(dict.fromkeys(look.known.keys() - look.found.keys()))
        for key, found in wanted.items():
            if self._numbers.get(key, 0) > look.number:
                continue  # An event has happened since; the result is out of date.
            self._tries.pop(key, None) if not isinstance(found, Unclear) else None
            if found is None:
                self._forget(key)
            elif isinstance(found, Unclear):
                # For example while a hook runs.
                times = self._tries[key] = self._tries.get(key, 0) + 1
                self._look_at(key, min(_FIRST_RETRY * 2 ** min(times, 10), _LAST_RETRY))
                if times == _TOLD_AFTER and self._known.get(key) is None:
                    self._known[key] = None
                    reason = f"it is not registered: {found.reason}"
                    self._recorder.submit(key, Problem(self._source.name, key, "", key, reason, refused=True))
            else:
                self._take(found)
        if look.keys is None and not self._thorough:
            # Not after a thorough look, because instances that cannot be written would be written again and again.
            self._recorder.check()
        self._thorough = False

    def _forget(self, key: str) -> None:
        """Remove a container that is gone."""
        if key in self._watched:
            self._unwatch(key)
        self._refused.discard(key)
        for known in (self._known, self._latest, self._numbers, self._due):
            known.pop(key, None)
        self._recorder.submit(key, None)
        self._look_at_refused()

    # How it is.

    def _blame(self, fault: str) -> None:
        if fault != self._fault:
            log.error("%s", fault)
        self._fault = fault

    def _report(self) -> None:
        now = time.monotonic()
        if now < self._reported + _TICK / 2:
            return
        self._reported = now
        if not self._fault and self._has_looked:
            self._contact = time.time()
        elif not self._fault and time.time() - self._contact > _FIRST_LOOK:
            self._blame(_NOT_YET)
        self._recorder.tell(Status(self._contact, self._fault))
        running = len(self._watched)
        status = f"STATUS=follows {self._source.name}: {len(self._known)} containers known, {running} running"
        if fault := self._fault or self._recorder.outage:
            status += f"; {fault}"
        looks = now - self._looked_since if self._looking else 0.0
        if max(now - self._recorder.beat, looks) < _HUNG:
            self._tell("WATCHDOG=1", status)
        else:
            self._tell(status)


def _start(task: Callable[[], None]) -> None:
    """Run a thread without which the process is of no use: if it fails, the process ends, and is started anew."""

    def run() -> None:
        try:
            task()
        except BaseException:
            log.critical("cannot go on", exc_info=True)
            os._exit(1)

    Thread(target=run, daemon=True).start()
