"""Keeps the store as a running Incus or LXD is: compares everything once, then follows what happens.

What is written is always what the daemon has at the time of the look, never what an event says. So events may come
late, twice or in any order, and two changes that follow each other quickly may become one.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

from guestapi import model
from guestapi.callers.namespaces import NotAnInitError, examine, is_alive
from guestapi.mirror import translate
from guestapi.mirror.daemon import Daemon, DaemonError, GoneError, Instance, RefusedError, Server, SlowError
from guestapi.mirror.images import ImageMirror
from guestapi.mirror.news import News, Work
from guestapi.mirror.readiness import Key, Readiness
from guestapi.model import Init
from guestapi.names import InvalidNameError
from guestapi.settings import Settings
from guestapi.store import mirroring
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.errors import ConflictError, StoreError
from guestapi.store.mirroring import Mirrored
from guestapi.store.view import Views
from guestapi.store.writing import Writer

log = logging.getLogger(__name__)

#: Seconds between two looks whether the daemon still answers; each is written down.
CONTACT_SECONDS = 10.0
#: Seconds after which everything is compared though no event has asked for it; and if something is not as it should be.
_COMPARE_SECONDS, _REPAIR_SECONDS = 600.0, 60.0
#: Seconds until the first new try after the daemon was lost, and at the most; they double in between.
_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0
#: Seconds until an instance is looked at again of which the daemon could not tell how it is, and how often.
_AGAIN_SECONDS, _AGAIN_TIMES = 0.1, 50
#: Above so many instances to look at, one question for all is less work for the daemon than one for each.
_SINGLE_LOOKS = 16
#: How many instances' states the daemon is asked for at a time; it needs 25 to 45 ms for one.
_AT_ONCE = 8


class Mirror:
    """Mirrors one daemon into the store. One thread does it all; others wait for news, and copy images."""

    def __init__(self, settings: Settings, name: str, socket: str, tell: Callable[[str], None]) -> None:
        """Args:
        settings: the store's.
        name: of the mirror, ``incus`` or ``lxd``.
        socket: the daemon's.
        tell: called with one sentence about how things are, again and again, for as long as the mirror works.

        Raises:
            StoreError: the store cannot be used.
        """
        self._url = settings.store.url
        self._writer = Writer(settings, create=True)
        self._store = Views(self._url)
        self._name = name
        self._daemon = Daemon(socket)
        self._images = ImageMirror(settings, self._writer, self._store, name, Daemon(socket))
        self._readiness = Readiness(self._writer, self._store, name, self._daemon)
        self._tell = tell
        self._news = News()
        self._server = Server()
        self._compared = self._asked = -_COMPARE_SECONDS
        self._faults: dict[Key, str] = {}
        #: What the journal has been told of an instance.
        self._logged: dict[Key, str] = {}
        self._again: dict[Key, int] = {}
        with self._store.view() as store:
            # What an earlier run has learned is as old as it is.
            known = [one for one in store.mirrors() if one.name == name]
        self._contact = known[0].contact if known else 0.0
        self._lag = 0.0
        self._noted: model.Mirror | None = None

    def run(self) -> None:
        """Mirror until the process ends; a daemon that is not there is waited for."""
        _start(self._listen, Doorbell(database_file(self._url)))
        _start(self._images.run)
        retry = _FIRST_RETRY
        while True:
            began = time.monotonic()
            try:
                self._follow()
            except (DaemonError, StoreError) as error:
                self._lost(str(error))
            if time.monotonic() - began > _LAST_RETRY:
                retry = _FIRST_RETRY
            # Not all mirrors of a rack at the same moment.
            time.sleep(retry * random.uniform(0.5, 1))
            retry = min(2 * retry, _LAST_RETRY)

    def _follow(self) -> None:
        """Be connected: compare, then follow, until the daemon is lost."""
        with self._daemon.events() as events:
            # First listen, then look: what happens in between is looked at once more.
            self._news = news = News()
            _start(news.read, events)
            seconds = CONTACT_SECONDS
            while True:
                work = news.take(_AGAIN_SECONDS if self._again else seconds)
                work.instances |= self._again.keys()
                if work.anything or time.monotonic() > self._asked + CONTACT_SECONDS / 2:
                    self._do(work)
                    self._asked, self._contact = time.monotonic(), time.time()
                seconds = min(self._readiness.pass_on(), CONTACT_SECONDS)
                self._note("")

    def _do(self, work: Work) -> None:
        late = time.monotonic() > self._compared + (_REPAIR_SECONDS if self._faults else _COMPARE_SECONDS)
        if work.everything or late or len(work.instances) > _SINGLE_LOOKS:
            self._server = self._daemon.server()
            self._compare()
            self._compared = time.monotonic()
        elif work.instances:
            gone = [key for key in sorted(work.instances) if not self._look(*key)]
            # Last: one that has another name by now was found again above.
            for key in gone:
                self._forget(*key)
        else:
            # Does it answer at all?
            self._server = self._daemon.server()
        if work.anything or late:
            # Images, or whether there is anybody who may have them.
            self._images.look()
        if work.since:
            self._lag = max(0.0, time.time() - work.since)

    def _compare(self) -> None:
        """Make everything in the store as the daemon has it."""
        wanted = {_key(one): one for one in self._daemon.instances() if translate.is_here(one, self._server)}
        with self._store.view() as store:
            known = {_key(one): one for one in store.instances() if one.source == self._name}
        self._faults.clear()
        self._readiness.refused.clear()
        again, self._again = self._again, {}
        threads = ThreadPoolExecutor(_AT_ONCE)
        try:
            looks = [threads.submit(self._see, instance, known.get(key)) for key, instance in wanted.items()]
            for number, key in enumerate(wanted, 1):
                try:
                    self._write(known.get(key), looks[number - 1].result(), wanted.__contains__)
                except RefusedError as error:
                    self._try_again(key, again.get(key, 0), error)
                self._tell(f"compares everything: {number} of {len(wanted)} instances")
        finally:
            threads.shutdown(cancel_futures=True)
        # Last: one that has another name by now was found again above.
        for key in known.keys() - wanted.keys():
            self._forget(*key)

    def _look(self, project: str, name: str) -> bool:
        """Make one instance in the store as the daemon has it; False if the daemon has none, or not here."""
        self._faults.pop((project, name), None)
        self._readiness.refused.discard((project, name))
        tries = self._again.pop((project, name), 0)
        with self._store.view() as store:
            known = store.find(project, name)
        try:
            instance = self._daemon.instance(project, name)
            if not translate.is_here(instance, self._server):
                return False
            self._write(known, self._see(instance, known), self._is_there)
        except GoneError:
            return False
        except RefusedError as error:
            self._try_again((project, name), tries, error)
        return True

    def _is_there(self, key: Key) -> bool:
        try:
            self._daemon.instance(*key)
        except GoneError:
            return False
        return True

    def _try_again(self, key: Key, tries: int, error: RefusedError) -> None:
        """Look again in a moment; an instance that is about to start or to end has no state at times."""
        if tries < _AGAIN_TIMES and not isinstance(error, SlowError):
            self._again[key] = tries + 1
        else:
            self._fail(key, error)

    def _fail(self, key: Key, error: Exception) -> None:
        self._faults[key] = f"{key[1]} in project {key[0]} is not mirrored: {error}"
        if self._logged.get(key) != self._faults[key]:
            self._logged[key] = self._faults[key]
            log.error("%s", self._logged[key])

    def _see(self, instance: Instance, known: model.Instance | None) -> Mirrored:
        """An instance as it is now.

        Args:
            instance: as it was a moment ago.
            known: as the store has it.

        Raises:
            GoneError: it was deleted meanwhile.
            RefusedError: the daemon cannot tell now.
        """
        if not _has_started(instance, known):
            # One that is alive is the one that it has, whatever the daemon is about to do with it.
            init = known.init if known is not None and _is_alive(known) else None
        elif (init := self._init_of(instance)) is not None:
            # What was seen before may be of an earlier run, or of another instance of that name.
            instance = self._daemon.instance(*_key(instance))
        return translate.mirrored(instance, self._server, init)

    def _init_of(self, instance: Instance) -> Init | None:
        state = self._daemon.state(*_key(instance))
        if state.pid <= 0:
            return None
        try:
            return examine(state.pid)
        except NotAnInitError as error:
            # It has just ended, and the daemon will say so; or else the mirror is not where the daemon is.
            log.warning("%s in project %s: %s", instance.name, instance.project, error)
            return None

    def _write(self, known: model.Instance | None, wanted: Mirrored, is_there: Callable[[Key], bool]) -> None:
        """Make an instance so, unless it is; `is_there`: whether the daemon has one of that project and name."""
        try:
            if known is None or known.uuid != wanted.uuid:
                with self._store.view() as store:
                    wanted = mirroring.with_own_uuid(store, self._name, wanted, is_there)
            if known is not None and known.source == self._name and mirroring.is_same(known, wanted):
                return
            with self._writer.change() as change:
                mirroring.mirror(change, self._name, wanted)
        except (ConflictError, InvalidNameError) as error:
            # Of this one nothing was written; the others are no worse for it.
            self._fail((wanted.project, wanted.name), error)

    def _forget(self, project: str, name: str) -> None:
        self._logged.pop((project, name), None)
        self._readiness.forget((project, name))
        with self._writer.change() as change:
            instance = change.find(project, name)
            if instance is not None and instance.source == self._name:
                change.remove(instance)

    def _listen(self, doorbell: Doorbell) -> None:
        """Hear when somebody has written to the store: an instance may have said that it is ready."""
        while True:
            if doorbell.wait(_COMPARE_SECONDS):
                self._news.ring()

    def _lost(self, why: str) -> None:
        if self._noted is None or self._noted.connected:
            log.warning("%s; instances get the last known answers until it is back", why)
        try:
            self._note(why)
        except StoreError as error:
            log.error("%s", error)

    def _note(self, lost: str) -> None:
        """Tell how things are, and write it down if it has changed or was long ago; `lost`: why the daemon is away."""
        faults = [lost] if lost else [*self._faults.values(), *self._images.faults]
        fault = faults[0] if faults else ""
        if len(faults) > 1:
            fault += f" (and {len(faults) - 1} more, see the journal)"
        now = model.Mirror(self._name, self._daemon.socket, not lost, self._contact, self._lag, fault)
        last = self._noted
        same = last is not None and (last.connected, last.fault) == (now.connected, now.fault)
        # As far from now as that in either direction: the clock may have been set.
        if last is None or not same or abs(now.contact - last.contact) > CONTACT_SECONDS / 2:
            with self._writer.change() as change:
                mirroring.note_mirror(change, now)
            self._noted = now
        with self._store.view() as store:
            total, running = mirroring.count(store, self._name)
        counts = f"{total} instances, {running} running"
        if lost:
            self._tell(f"{self._name} is lost, {counts} as last known: {lost}")
        else:
            version = f"{self._server.environment.server} {self._server.environment.server_version}".strip()
            self._tell(f"follows {version}: {counts}, lag {self._lag:.3f} s{'; ' if fault else ''}{fault}")


def _start(task: Callable[..., None], *arguments: object) -> None:
    """Run something in a thread, without which the process is of no use: if it fails, the process ends."""

    def run() -> None:
        try:
            task(*arguments)
        except BaseException:
            log.critical("cannot go on", exc_info=True)
            # Whoever looks after the process starts it again, and then everything is compared.
            os._exit(1)

    Thread(target=run, daemon=True).start()


def _key(instance: Instance | model.Instance) -> Key:
    return instance.project, instance.name


def _has_started(instance: Instance, known: model.Instance | None) -> bool:
    """Whether an instance runs of which no living init is known."""
    return instance.status not in translate.STOPPED and not (known is not None and _is_alive(known))


def _is_alive(known: model.Instance) -> bool:
    return known.init is not None and is_alive(known.init)
