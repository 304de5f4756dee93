"""Forwards the readiness that instances report to the daemon."""

from __future__ import annotations

import logging
import math
import time
from functools import partial

from guestapi.callers.namespaces import is_alive
from guestapi.journal import StateLog
from guestapi.mirror import translate
from guestapi.mirror.daemon import DaemonClient
from guestapi.mirror.daemon_model import GoneError, RefusedError, SlowError
from guestapi.mirror.keys import Place
from guestapi.model import Instance
from guestapi.store import statuses
from guestapi.store.view import Views
from guestapi.store.writing import Writer

log = logging.getLogger(__name__)

#: Seconds until the next look whether the daemon's operation with an instance has ended, and between two reports of one
#: instance: an instance that changes its state all the time must not keep the daemon busy.
_PACE_SECONDS = 1.0
#: Seconds for reports before the mirror looks at events again. The daemon needs 50 ms for each instance, and a
#: container that starts meanwhile has two seconds (`settings.CallerSettings.wait_seconds`).
_AT_ONCE_SECONDS = 0.5
#: Seconds until the daemon is asked again for its operations after it did not answer.
_UNTOLD_SECONDS = 60.0


class Readiness:
    """The readiness that one daemon's instances have reported, until the daemon has it."""

    def __init__(self, writer: Writer, store: Views, name: str, daemon: DaemonClient) -> None:
        """Forward nothing yet.

        Args:
            writer: for changes of the store.
            store: for reading the store.
            name: the mirror's name.
            daemon: the daemon with the instances.
        """
        self._writer = writer
        self._store = store
        self._name = name
        self._daemon = daemon
        #: Project and name of instances for which the daemon refused. They are left out while they are in this set.
        self.refused: set[Place] = set()
        self._log = StateLog(log)
        #: When an instance was last reported to the daemon; old entries are removed.
        self._told: dict[Place, float] = {}
        #: Until when the daemon is not asked for its operations, because it did not answer.
        self._untold_until = 0.0

    def pass_on(self) -> float:
        """Forward what was reported.

        Returns:
            Seconds until the next report is due; infinite if everything was forwarded.

        Raises:
            DaemonError: it does not answer.
            StoreError: the store cannot be used.
        """
        with self._store.view() as store:
            unacknowledged = [
                one for one in statuses.list_unacknowledged(store, self._name) if _place(one) not in self.refused
            ]
        if not unacknowledged:
            return math.inf
        # A change of an instance that the daemon is restarting makes the restart fail (Incus 6.0). What an instance
        # reports while it shuts down is obsolete afterwards.
        began = time.monotonic()
        self._told = {key: at for key, at in self._told.items() if at > began - _PACE_SECONDS}
        later = self._told.keys() | self._tasks(began)
        for instance in unacknowledged:
            if _place(instance) not in later:
                self._tell(instance)
                self._told[_place(instance)] = time.monotonic()
                if time.monotonic() > began + _AT_ONCE_SECONDS:
                    return 0.0
        return _PACE_SECONDS if any(_place(instance) in later for instance in unacknowledged) else math.inf

    def _tasks(self, now: float) -> set[Place]:
        """Return the instances with a running operation; none if another cluster member delays the daemon's answer."""
        if now < self._untold_until:
            return set()
        try:
            return self._daemon.tasks()
        except SlowError:
            self._untold_until = now + _UNTOLD_SECONDS
            return set()

    def forget(self, place: Place) -> None:
        """Forget an instance that is gone."""
        self.refused.discard(place)
        self._log.forget(place)

    def _tell(self, instance: Instance) -> None:
        try:
            done = self._daemon.configure(
                instance.project,
                instance.name,
                {translate.READY: "true" if instance.ready else "false"},
                # The daemon would accept it for a stopped instance, too, and keep it for the next run.
                while_=partial(_is_alive, instance),
            )
        except GoneError:
            return  # An event follows.
        except RefusedError as error:
            # It may be forbidden for ever, for example in a restricted project.
            self.refused.add(_place(instance))
            name = f"{instance.name} in project {instance.project}"
            self._log.log(_place(instance), f"{name}: its readiness is not taken: {error}")
            return
        if done:
            with self._writer.change() as change:
                statuses.acknowledge(change, instance)


def _place(instance: Instance) -> Place:
    return instance.project, instance.name


def _is_alive(instance: Instance) -> bool:
    return instance.init is not None and is_alive(instance.init)
