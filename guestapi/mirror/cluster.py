"""Finds the instances of this member of a cluster, without waiting for the other members.

The daemon has the names of all instances in its database, and returns them at once. Everything else about an instance
comes from its member, which may hang. So the mirror requests the names, and then each instance that is or may be of
this member, with a deadline. An instance of another member is not requested again for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from guestapi.mirror import translate
from guestapi.mirror.daemon import DaemonClient
from guestapi.mirror.daemon_model import (
    DaemonEvent,
    DaemonInstance,
    GoneError,
    RefusedError,
    Server,
    UnreadableError,
    happened,
)
from guestapi.mirror.keys import Place

#: Seconds for which an instance counts as another member's: if its description says so, and if there was no answer.
_KEEP_SECONDS, _RETRY_SECONDS = 3600.0, 60.0
#: Most requests for instances at a time. A member that hangs delays each one by `daemon.ONE_SECONDS`.
_AT_ONCE = 16


@dataclass(slots=True)
class MemberInstances:
    """The instances of this member.

    Attributes:
        instances: as the daemon describes them.
        unreadable: the errors of malformed descriptions, by project and name.
        untold: why there is no description of known instances, by project and name.
    """

    instances: list[DaemonInstance] = field(default_factory=list)
    unreadable: dict[Place, str] = field(default_factory=dict)
    untold: dict[Place, RefusedError] = field(default_factory=dict)


class Members:
    """Finds out which instances are of this member."""

    def __init__(self, daemon: DaemonClient) -> None:
        """Send no request yet.

        Args:
            daemon: this member's daemon.
        """
        self._daemon = daemon
        #: Until when an instance is taken to be of another member (time.monotonic()).
        self._elsewhere: dict[Place, float] = {}

    def find(self, server: Server, known: Collection[Place], progress: Callable[[], None]) -> MemberInstances:
        """Find the instances of this member, or all of a daemon that is in no cluster.

        Args:
            server: the daemon.
            known: project and name of the instances that the store has.
            progress: called after each answer.

        Raises:
            DaemonError: the daemon does not answer.
        """
        if not server.environment.server_clustered:
            listed, unreadable = self._daemon.instances()
            return MemberInstances([one for one in listed if translate.is_here(one, server)], unreadable)
        places, now = self._daemon.places(), time.monotonic()
        progress()
        self._elsewhere = {place: until for place, until in self._elsewhere.items() if place in places and until > now}
        found = MemberInstances()
        threads = ThreadPoolExecutor(_AT_ONCE)
        try:
            # Known instances first: they are here, or were.
            wanted = sorted(places - self._elsewhere.keys(), key=lambda place: (place not in known, place))
            asked = [(place, threads.submit(self._daemon.instance, *place)) for place in wanted]
            for place, answer in asked:
                self._sort(found, place, answer, server, place in known)
                progress()
        finally:
            threads.shutdown(cancel_futures=True)
        return found

    def concerns(self, event: DaemonEvent, server: Server, known: Collection[Place]) -> bool:
        """Tell whether an event may be about this member.

        Args:
            event: of any member.
            server: the daemon.
            known: project and name of the instances that the store has.
        """
        host = server.environment
        if not host.server_clustered or event.location in (*translate.NOWHERE, host.server_name):
            what = happened(event)
            if what is not None and what.target[0] == "instances":
                # It may have been moved from another member.
                self._elsewhere.pop(what.target[1:], None)
            return True
        what = happened(event)
        if what is None or what.target[0] != "instances":
            return True
        # An instance that was here may be there now.
        _kind, project, name = what.target
        old = (what.context or {}).get("old_name")
        return (project, name) in known or (project, old) in known

    def _sort(
        self, found: MemberInstances, place: Place, answer: Future[DaemonInstance], server: Server, is_known: bool
    ) -> None:
        seconds = _KEEP_SECONDS
        try:
            instance = answer.result()
        except GoneError:
            return
        except UnreadableError as error:
            if is_known:
                found.unreadable[place] = str(error)
                return
        except RefusedError as error:
            if is_known:
                found.untold[place] = error
                return
            seconds = _RETRY_SECONDS
        else:
            if translate.is_here(instance, server):
                found.instances.append(instance)
                return
            if instance.location in (*translate.NOWHERE, server.environment.server_name):
                # A virtual machine of this member.
                return
        self._elsewhere[place] = time.monotonic() + seconds
