"""Makes the store equal to a running Incus or LXD: compares all instances once, then follows the daemon's events.

The store gets what the daemon has at the time of the look, never the content of an event. So events may come late,
twice or in any order, and two quick changes may become one.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Thread

from guestapi import model
from guestapi.audit_log import by_source
from guestapi.callers.namespaces import NotAnInitError, examine, is_alive
from guestapi.journal import StateLog
from guestapi.mirror import keys, translate
from guestapi.mirror.cluster import Members
from guestapi.mirror.daemon import DaemonClient
from guestapi.mirror.daemon_model import DaemonError, DaemonInstance, GoneError, RefusedError, Server, SlowError
from guestapi.mirror.images import ImageMirror, may_export
from guestapi.mirror.keys import Place
from guestapi.mirror.readiness import Readiness
from guestapi.mirror.report import CONTACT_SECONDS, Report
from guestapi.mirror.sync_queue import SyncBatch, SyncQueue
from guestapi.model import Init, Problem
from guestapi.settings import Settings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import is_current, reconcile
from guestapi.store import statuses, steps
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import find_by_key, find_instance, list_instances, list_sources
from guestapi.store.view import Views
from guestapi.store.writing import Writer

log = logging.getLogger(__name__)

#: Seconds between two comparisons of all instances without an event; and while an instance has a problem.
_COMPARE_SECONDS, _REPAIR_SECONDS = 600.0, 60.0
#: Seconds until the next try after the daemon was lost: first, and longest; they double between.
_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0
#: Seconds until the next look at an instance whose state the daemon could not return, and how often.
_AGAIN_SECONDS, _AGAIN_TIMES = 0.1, 50
#: Most instances in a transaction, which takes about a tenth of a second.
_BATCH = 50
#: For more instances than this, one request for all is less work for the daemon than one for each.
_SINGLE_LOOKS = 16
#: Most requests for states at a time; one takes the daemon 25 to 45 ms.
_AT_ONCE = 8


class Mirror:
    """Mirrors one daemon into the store, in one thread. Other threads wait for events, and copy images."""

    def __init__(self, settings: Settings, name: str, socket: str, tell: Callable[[str], None]) -> None:
        """Open the store.

        Args:
            settings: the store's.
            name: of the mirror, ``incus`` or ``lxd``.
            socket: the daemon's.
            tell: called with one sentence about the mirror's status, again and again while the mirror works.

        Raises:
            StoreError: the store cannot be used.
        """
        self._url = settings.store.url
        self._writer = Writer(settings, create=True, keep=True, audit=by_source(name))
        self._store = Views(self._url)
        self._name = name
        self._daemon = DaemonClient(socket)
        self._images = ImageMirror(settings, self._writer, self._store, name, DaemonClient(socket))
        self._readiness = Readiness(self._writer, self._store, name, self._daemon)
        self._tell = tell
        self._queue = SyncQueue()
        self._server = Server()
        self._compared = self._asked = -_COMPARE_SECONDS
        #: Why an instance cannot be observed, by project and name.
        self._faults: dict[Place, str] = {}
        self._log = StateLog(log, logging.ERROR)
        self._members = Members(self._daemon)
        #: Project and name of the instances in the store. The thread that reads events uses it.
        self._known: frozenset[Place] = frozenset()
        self._again: dict[Place, int] = {}
        with self._store.view() as store:
            # The time of contact of an earlier run still holds.
            known = [one for one in list_sources(store) if one.name == name]
            #: Keys of instances with problems.
            self._problems = statuses.list_problem_keys(store, name)
            self._known = frozenset(map(_place, list_instances(store, source=name)))
        self._report = Report(
            self._writer, self._store, name, socket, tell, lambda: [*self._faults.values(), *self._images.faults]
        )
        self._report.progress.contact = known[0].contact if known else 0.0

    def run(self) -> None:
        """Mirror until the process ends. If the daemon does not run, wait for it."""
        _start(self._listen, Doorbell(database_file(self._url)))
        _start(self._images.run)
        _start(self._report.watch)
        retry = _FIRST_RETRY
        while True:
            began = time.monotonic()
            try:
                self._follow()
            except (DaemonError, StoreError) as error:
                self._lost(str(error))
            if time.monotonic() - began > _LAST_RETRY:
                retry = _FIRST_RETRY
            # A random part, so that not all mirrors of a rack connect at the same moment.
            time.sleep(retry * random.uniform(0.5, 1))
            retry = min(2 * retry, _LAST_RETRY)

    def _follow(self) -> None:
        """Connect, compare, then follow until the daemon is lost."""
        with self._daemon.events() as events:
            # Subscribe first, then compare: changes in between cause one more look.
            self._queue = queue = SyncQueue(lambda one: self._members.concerns(one, self._server, self._known))
            _start(queue.read, events)
            seconds = CONTACT_SECONDS
            while True:
                batch = queue.take(_AGAIN_SECONDS if self._again else seconds)
                batch.instances |= self._again.keys()
                if batch.anything or time.monotonic() > self._asked + CONTACT_SECONDS / 2:
                    self._report.progress.renew()
                    self._do(batch)
                    self._asked, self._report.progress.contact = time.monotonic(), time.time()
                seconds = min(self._readiness.pass_on(), CONTACT_SECONDS)
                # A daemon that hung may have answered at last, and have lost its event stream meanwhile.
                queue.check()
                self._report.progress.waits = None
                self._report.note()

    def _do(self, batch: SyncBatch) -> None:
        wrong = bool(self._faults or self._problems)
        late = time.monotonic() > self._compared + (_REPAIR_SECONDS if wrong else _COMPARE_SECONDS)
        if batch.everything or late or len(batch.instances) > _SINGLE_LOOKS:
            self._meet()
            self._compare()
            self._compared = time.monotonic()
        elif batch.instances:
            self._look(sorted(batch.instances))
        else:
            # Check that the daemon answers.
            self._meet()
        if batch.everything or batch.images or late:
            self._images.look()
        if batch.since:
            self._report.progress.lag = max(0.0, time.time() - batch.since)

    def _meet(self) -> None:
        """Request the daemon's description, which shows that it answers."""
        self._server = self._daemon.server()
        host = self._server.environment
        self._report.progress.version = f"{host.server} {host.server_version}".strip()

    def _compare(self) -> None:
        """Make all instances in the store equal to the daemon's."""
        with self._store.view() as store:
            known = list_instances(store, source=self._name)
        at = {_place(one): one for one in known}
        self._known = frozenset(at)
        found = self._members.find(self._server, at.keys(), self._report.progress.renew)
        wanted, unreadable = {_place(one): one for one in found.instances}, found.unreadable
        self._faults.clear()
        self._readiness.refused.clear()
        again, self._again = self._again, {}
        for place, untold in found.untold.items():
            self._try_again(place, again.get(place, 0), untold)
        observations: dict[Place, Observed] = {}
        threads = ThreadPoolExecutor(_AT_ONCE)
        try:
            looks = [threads.submit(self._see, instance, at.get(place)) for place, instance in wanted.items()]
            for number, place in enumerate(wanted, 1):
                try:
                    observations[place] = looks[number - 1].result()
                except RefusedError as error:
                    self._try_again(place, again.get(place, 0), error)
                self._report.progress.renew()
                self._tell(f"compares everything: {number} of {len(wanted)} instances")
        finally:
            threads.shutdown(cancel_futures=True)
        for place, why in unreadable.items():
            self._suspend(place, why)
        identities = {place: translate.identify(one) for place, one in wanted.items()}
        identities |= {place: observed.key for place, observed in observations.items()}
        chosen = keys.choose_keys(identities.items(), keys.by_key(known))
        stays = unreadable.keys() | found.untold.keys()
        present = {*chosen.values(), *(one.key for place, one in at.items() if place in stays)}
        gone = {str(one.key): _place(one) for one in known if one.key is not None and one.key not in present}
        # Instances that were never registered are gone, too.
        gone |= dict.fromkeys(self._problems - present - gone.keys(), ("", ""))
        self._write(
            [keys.with_key(observed, chosen[place]) for place, observed in observations.items()],
            gone,
            {one.key: one for one in known if one.key is not None},
        )

    def _look(self, places: list[Place]) -> None:
        """Make single instances in the store equal to the daemon's."""
        with self._store.view() as store:
            found = [find_instance(store, *place) for place in places]
        at = {_place(one): one for one in found if one is not None and one.source == self._name}
        observations: list[Observed] = []
        missing: list[Place] = []
        for place, look in self._looks(places, at):
            self._faults.pop(place, None)
            self._readiness.refused.discard(place)
            tries = self._again.pop(place, 0)
            try:
                observed = look()
                observations += [] if observed is None else [observed]
                missing += [place] if observed is None else []
            except GoneError:
                missing.append(place)
            except RefusedError as error:
                # Another member may not answer for an instance that is not here.
                if place in at or not isinstance(error, SlowError):
                    self._try_again(place, tries, error)
            self._report.progress.renew()
        held = [known for one in observations if (known := at.get(_place(one))) is not None and known.key == one.key]
        # PERF: usually each is known by its own key, and a second look at the store is not needed.
        if len(held) < len(observations):
            candidates = {key for one in observations for key in (one.key, keys.own_key(_place(one), one.key))}
            with self._store.view() as store:
                held = [one for key in candidates if (one := find_by_key(store, self._name, key)) is not None]
            named = keys.by_key(held)
            observations = [
                keys.with_key(one, keys.choose_key(_place(one), one.key, named, self._has)) for one in observations
            ]
        seen = {observed.key for observed in observations}
        # An instance that has a new name is not gone.
        gone = {str(one.key): place for place in missing if (one := at.get(place)) is not None and one.key not in seen}
        self._write(observations, gone, {one.key: one for one in held if one.key is not None})

    def _looks(
        self, places: list[Place], at: Mapping[Place, model.Instance]
    ) -> Iterator[tuple[Place, Callable[[], Observed | None]]]:
        """Look at several instances at a time; yield for each a function that returns its result or raises."""
        if len(places) == 1:
            # PERF: usually it is one instance, for whose event a guest waits.
            yield places[0], partial(self._look_at, places[0], at.get(places[0]))
            return
        threads = ThreadPoolExecutor(_AT_ONCE)
        try:
            looks = [(place, threads.submit(self._look_at, place, at.get(place))) for place in places]
            for place, look in looks:
                yield place, look.result
        finally:
            threads.shutdown(cancel_futures=True)

    def _look_at(self, place: Place, known: model.Instance | None) -> Observed | None:
        """As `_see`, for an instance of which only the name is known; None if it is another member's."""
        instance = self._daemon.instance(*place)
        return self._see(instance, known) if translate.is_here(instance, self._server) else None

    def _has(self, place: Place, identity: str) -> bool:
        """Whether the daemon has an instance of that project, name and UUID."""
        try:
            return translate.identify(self._daemon.instance(*place)) == identity
        except GoneError:
            return False

    def _try_again(self, place: Place, tries: int, error: RefusedError) -> None:
        """Look again soon: an instance that is about to start or to end may have no state."""
        if tries < _AGAIN_TIMES and not isinstance(error, SlowError):
            self._again[place] = tries + 1
        else:
            self._fail(place, str(error))

    def _fail(self, place: Place, why: str) -> None:
        self._faults[place] = f"{place[1]} in project {place[0]} is not mirrored: {why}"
        self._log.log(place, self._faults[place])

    def _suspend(self, place: Place, why: str) -> None:
        """Stop serving an instance whose description is malformed."""
        self._fail(place, why)
        with self._writer.change() as change:
            instance = find_instance(change, *place)
            if instance is not None and instance.source == self._name:
                steps.stop(change, instance)

    def _see(self, instance: DaemonInstance, known: model.Instance | None) -> Observed:
        """Observe an instance.

        Args:
            instance: its description.
            known: the instance in the store.

        Raises:
            GoneError: it was deleted meanwhile.
            RefusedError: the daemon cannot return the state now.
        """
        if known is not None and known.init is not None and is_alive(known.init):
            # A live init is still the instance's, even if the daemon is about to restart it.
            init: Init | None = known.init
            if known.init.root_uid is None and (again := _examine(instance, known.init.pid)) == known.init:
                init = again
        elif instance.status in translate.STOPPED:
            init = None
        elif (init := self._init_of(instance)) is not None:
            # The earlier look may be of an earlier run, or of another instance with that name.
            instance = self._daemon.instance(*_place(instance))
        return translate.observe(instance, self._server, init)

    def _init_of(self, instance: DaemonInstance) -> Init | None:
        state = self._daemon.state(*_place(instance))
        return _examine(instance, state.pid) if state.pid > 0 else None

    def _write(self, observations: list[Observed], gone: dict[str, Place], known: dict[str, model.Instance]) -> None:
        """Write instances that differ from the store.

        Args:
            observations: the daemon's instances.
            gone: project and name of instances that the daemon no longer has, by key.
            known: the instances in the store, by key.
        """
        changed = [
            observed
            for observed in observations
            if observed.key in self._problems
            or (one := known.get(observed.key)) is None
            or not is_current(one, self._name, observed)
        ]
        others_export = bool(gone) or any(
            may_export(config) for one in changed for config in (one.config, _config(known.get(one.key)))
        )
        # Renamed instances come first, so that their old names are free in later transactions.
        changed.sort(key=lambda one: one.key not in known or _place(known[one.key]) == _place(one))
        moved = sum(one.key in known and _place(known[one.key]) != _place(one) for one in changed)
        while changed or gone:
            count = max(moved, _BATCH)
            batch, changed, moved = changed[:count], changed[count:], 0
            with self._writer.change() as change:
                problems = reconcile(change, self._name, batch, gone=gone.keys())
            for place in gone.values():
                self._log.forget(place)
                self._readiness.forget(place)
            self._problems -= gone.keys() | {observed.key for observed in batch}
            self._remember(problems)
            self._known = (self._known | {_place(one) for one in batch}) - set(gone.values())
            gone = {}
        if others_export:
            self._images.look()

    def _remember(self, problems: list[Problem]) -> None:
        self._problems |= {problem.key for problem in problems}
        if any(problem.holder is not None for problem in problems):
            # The other instance with that name has changed, too: compare all instances.
            self._compared = -_COMPARE_SECONDS

    def _listen(self, doorbell: Doorbell) -> None:
        """Wake the mirror when the store has changed: an instance may have reported that it is ready."""
        while True:
            if doorbell.wait(_COMPARE_SECONDS):
                self._queue.ring()

    def _lost(self, why: str) -> None:
        self._report.progress.waits = None
        self._report.warn(why)
        try:
            self._report.note(lost=why)
        except StoreError as error:
            log.error("%s", error)


def _start(task: Callable[..., None], *arguments: object) -> None:
    """Run a thread without which the process is of no use: if it fails, the process ends."""

    def run() -> None:
        try:
            task(*arguments)
        except BaseException:
            log.critical("cannot go on", exc_info=True)
            # systemd starts the mirror again, which then compares all instances.
            os._exit(1)

    Thread(target=run, daemon=True).start()


def _place(instance: DaemonInstance | model.Instance | Observed) -> Place:
    return instance.project, instance.name


def _config(instance: model.Instance | None) -> Mapping[str, str]:
    return instance.config if instance is not None else {}


def _examine(instance: DaemonInstance, pid: int) -> Init | None:
    """Return the init of an instance, if that process can be one."""
    try:
        return examine(pid, stated_root_uid=translate.root_uid(instance))
    except NotAnInitError as error:
        # It has just ended, and an event follows; or the mirror is in another PID namespace than the daemon.
        log.warning("%s in project %s: %s", instance.name, instance.project, error)
        return None
