"""Follows the fleet's database: the loop of ``guestapi fleet follow``.

    NOTIFY, or a second has passed ----> state, and the log after the cursor; or everything
                                     ----> differences, 50 instances and the cursor a transaction ----> store
    what the store says of placed instances ----> report

One thread, and one more that ends a question without an answer (`engine.Session`). The cursor is read from the store
each time, so a store that was lost or restored is found out. Nothing is kept between two runs: the process may be
killed at any moment.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from guestapi.audit_log import by_source
from guestapi.errors import SourceError
from guestapi.fleet import inventory
from guestapi.fleet.engine import FleetError, LateError, Session
from guestapi.fleet.inventory import HostLook, HostState, PlacedProfile, PlacedRow, Placement, Said
from guestapi.fleet.placing import (
    is_same,
    is_same_profile,
    write_placements,
    write_profile,
)
from guestapi.settings import Settings
from guestapi.sources.sanitize import FLEET
from guestapi.store import placed_profiles, placements, statuses
from guestapi.store.errors import StoreError
from guestapi.store.placements import Cursor, FleetStatus, Placed
from guestapi.store.view import Views
from guestapi.store.writing import Writer

log = logging.getLogger(__name__)

#: Seconds between two looks without a notification.
LOOK_SECONDS = 1.0
#: Seconds between two records of the contact, here and in the database.
_CONTACT_SECONDS = 5.0
#: Seconds between two looks at everything, at most; and while a placement cannot be taken.
_COMPARE_SECONDS, _REPAIR_SECONDS = 600.0, 60.0
#: Seconds until the next try after the database was lost: first, and longest; they double between.
_FIRST_RETRY, _LAST_RETRY = 0.1, 5.0
#: How many times as long as usual the database may take when it was too slow before; doubled for each time. When all
#: hosts come at once, each has its answer late, and would be later still if they ended each other's questions.
_MOST_FACTOR = 8.0
#: Most instances in a transaction, which takes about a tenth of a second.
BATCH = 50

#: Yields instances with all that they have, in order.
_Read = Callable[[Iterable[PlacedRow]], Iterator[Placement]]


class _Step(NamedTuple):
    """What one transaction writes, and the cursor afterwards; None: it stays."""

    placements: list[Placement]
    gone: Collection[str]
    cursor: Cursor | None
    profiles: Sequence[PlacedProfile] = ()


class FleetFollower:
    """Keeps the store as the fleet's database has this host."""

    def __init__(self, settings: Settings, connect: Callable[[float], Session], tell: Callable[[str], None]) -> None:
        """Open the store.

        Args:
            settings: the store's.
            connect: opens a session by the role of this host, with this deadline factor.
            tell: called with one sentence about the status, again and again while it works.

        Raises:
            StoreError: the store cannot be used.
        """
        self._settings = settings
        self._connect, self._tell = connect, tell
        self._open()
        self._deadline_factor = 1.0
        #: What the database has of what this host has said, by UUID; and when an instance was last reported.
        self._said: dict[str, Said] = {}
        self._reported: dict[str, float] = {}
        self._contacted = -_CONTACT_SECONDS
        #: When everything is to be looked at; and the tables with which the store agrees up to its cursor. None: what
        #: they had was not written to its end, or what leaves was not released.
        self._compare_at = 0.0
        self._settled_at: tuple[int, int] | None = None
        self._applied = -1
        with self._store.view() as store:
            self._status = placements.read_status(store) or FleetStatus()
        self._noted_at = -_COMPARE_SECONDS

    def run(self) -> None:
        """Follow until the process ends. If the database cannot be reached, wait for it."""
        retry = _FIRST_RETRY
        while True:
            began = time.monotonic()
            try:
                self.follow()
            except SourceError as error:
                self._lose(error)
                if isinstance(error, LateError):
                    self._deadline_factor = min(2 * self._deadline_factor, _MOST_FACTOR)
            except StoreError as error:
                log.error("%s", error)
                self._reopen()
            if time.monotonic() - began > _LAST_RETRY:
                retry = _FIRST_RETRY
            # A random part, so that not all hosts connect at the same moment.
            time.sleep(retry * random.uniform(0.5, 1))
            retry = min(2 * retry, _LAST_RETRY)

    def follow(self, until: Callable[[], bool] = lambda: False) -> None:
        """Connect, look at everything, then follow.

        Args:
            until: asked after each look; True ends it.

        Raises:
            FleetError: the database is lost, or not the one that this host follows.
            StoreError: the store cannot be used.
        """
        with self._connect(self._deadline_factor) as session:
            state = inventory.read_state(session)
            self._admit(state)
            inventory.listen(session, state.host)
            place = self._resume(session, state)
            self._contacted = -_CONTACT_SECONDS
            began = time.monotonic()
            while True:
                self._look(session)
                self._settled_at = place
                # Only what was written for a notification says how long that took.
                self._report(session, state.host)
                self._contact(session, time.monotonic() - began)
                self._deadline_factor = session.deadline_factor = 1.0
                if until():
                    return
                session.wait(LOOK_SECONDS)
                began = time.monotonic()

    def _resume(self, session: Session, state: HostState) -> tuple[int, int]:
        """Go on from the cursor, if the tables are those that were followed before; otherwise look at everything.

        When all hosts come back at once, the log costs the database much less.
        """
        place = inventory.read_place(session)
        if place == self._settled_at:
            # What was said last may have been lost with the server.
            self._said = inventory.read_said(session, state.host)
        else:
            self._compare_at = 0.0
        return place

    def _look(self, session: Session) -> None:
        """Look whether something has changed, and at what, with one question."""
        with self._store.view() as store:
            stored = placements.read_cursor(store)
            troubled = bool(statuses.list_problem_keys(store, FLEET))
        found = inventory.look(session, stored)
        state = found.state
        self._admit(state)
        if troubled:
            self._compare_at = min(self._compare_at, time.monotonic() + _REPAIR_SECONDS)
        late = time.monotonic() > self._compare_at
        same = stored[:2] == state.cursor[:2]
        if late or not same or state.oldest > stored.revision or state.cursor.revision < stored.revision:
            if state.cursor.revision < stored.revision:
                log.warning(
                    "the database has revision %d, and had %d: what was changed between is lost",
                    state.cursor.revision,
                    stored.revision,
                )
            self._look_at_all(session, stored)
        elif state.cursor.revision > stored.revision:
            self._take_changes(session, stored, found)
        with self._store.view() as store:
            self._status = self._status._replace(cursor=placements.read_cursor(store))

    def _admit(self, state: HostState) -> None:
        """Refuse a database that is not the one that the store knows, or an older history of it."""
        with self._store.view() as store:
            stored = placements.read_cursor(store)
        if stored.fleet not in ("", state.cursor.fleet):
            raise FleetError(
                f"this is fleet {state.cursor.fleet}, but this host belongs to {stored.fleet}",
                "correct fleet.url of guestapi.toml",
            )
        if state.cursor.timeline < stored.timeline:
            raise FleetError(
                f"the server has timeline {state.cursor.timeline} of the database, and timeline {stored.timeline} was "
                "seen already: it is a primary that was replaced",
                "if it was restored from a dump, 'guestapi fleet follow --anew'",
            )

    def _look_at_all(self, session: Session, stored: Cursor) -> None:
        self._settled_at = None
        with session.snapshot():
            state = inventory.read_state(session)
            listed = inventory.list_mine(session, state.host)
            self._said = inventory.read_said(session, state.host)
            with self._store.view() as store:
                placed = placements.list_placed(store)
                troubled = statuses.list_problem_keys(store, FLEET)
            staying = [one for one in listed if not one.leaving]
            # Before the instances that have them.
            known = self._write_profiles(inventory.read_my_profiles(session), (stored, state.cursor))
            gone = (placed.keys() | troubled) - {one.uuid for one in staying} - known
            order = {one.uuid: state.cursor.revision for one in staying}
            read = partial(inventory.read_placements, session)
            self._write(read, (staying, sorted(gone), order), placed, (stored, state.cursor))
            self._remove_profiles_but(known)
        # A random part, so that hosts that were equally late are not so again.
        self._compare_at = time.monotonic() + _COMPARE_SECONDS * random.uniform(0.5, 1)
        self._release(session, [one for one in listed if one.leaving])

    def _take_changes(self, session: Session, stored: Cursor, found: HostLook) -> None:
        """Write what has changed; what is too much at once is read in parts."""
        self._settled_at = None
        if found.placements is not None:
            read = found.placements.__getitem__
            self._write_changes(lambda listed: (read(one.uuid) for one in listed), stored, found)
        else:
            with session.snapshot():
                state = inventory.read_state(session)
                changed = inventory.list_changed(session, state.host, stored.revision)
                found = HostLook(state, changed, None)
                shared = inventory.read_changed_profiles(session, (uuid for uuid, _first, _row in changed))
                known = self._write_profiles(shared, (stored, state.cursor))
                self._write_changes(partial(inventory.read_placements, session), stored, found, known)
        self._release(session, [one for _uuid, _first, one in found.changed if one is not None and one.leaving])

    def _write_changes(self, read: _Read, stored: Cursor, found: HostLook, known: Collection[str] = ()) -> None:
        """Write what has changed.

        Args:
            read: yields instances with all that they have.
            stored: the cursor of the store.
            found: what has changed, with its profiles, unless these are written already.
            known: UUIDs of those that are.
        """
        with self._store.view() as store:
            placed = placements.list_placed(store)
        staying = [one for _uuid, _first, one in found.changed if one is not None and not one.leaving]
        shared = {*known, *(one.uuid for one in found.profiles)}
        gone = [uuid for uuid, _first, one in found.changed if uuid not in shared and (one is None or one.leaving)]
        order = {uuid: first for uuid, first, _one in found.changed}
        differing = self._differing_profiles(found.profiles)
        self._write(read, (staying, gone, order), placed, (stored, found.state.cursor), differing)

    def _write(
        self,
        read: _Read,
        found: tuple[list[PlacedRow], list[str], Mapping[str, int]],
        placed: Mapping[str, Placed],
        cursors: tuple[Cursor, Cursor],
        profiles: Sequence[PlacedProfile] = (),
    ) -> None:
        """Write differences in transactions of 50 instances, the cursor with them.

        Args:
            read: yields instances with all that they have.
            found: instances that are here, UUIDs of those that are not any more, and for each instance the first
                revision that changed it; the first are in that order.
            placed: what the store has.
            cursors: the store's, and the one that it is to have.
            profiles: those that the store does not have so.
        """
        stored, wanted = cursors
        steps = _steps(found, placed, wanted, lambda some: self._differing(read(some), placed), profiles)
        self._write_steps(steps, stored, wanted)

    def _write_steps(self, steps: Iterable[_Step], stored: Cursor, wanted: Cursor) -> None:
        for step in steps:
            with self._writer.change() as change:
                if placements.read_cursor(change) != stored:
                    raise FleetError("the store was replaced meanwhile, so everything is looked at anew")
                for profile in step.profiles:
                    write_profile(change, profile)
                write_placements(change, step.placements, step.gone)
                # A placement that cannot be taken may be why nothing here has a profile: it would come again and again.
                if step.cursor == wanted and not statuses.list_problem_keys(change, FLEET):
                    placed_profiles.remove_unused(change, placed_profiles.list_unused(change))
                if step.cursor is not None:
                    placements.write_cursor(change, step.cursor)
                    stored = step.cursor

    def _write_profiles(self, found: Iterable[PlacedProfile], cursors: tuple[Cursor, Cursor]) -> set[str]:
        """Write those that the store does not have so, a transaction each; the UUIDs of all."""
        known = set()
        for one in found:
            known.add(one.uuid)
            if differing := self._differing_profiles([one]):
                self._write_steps([_Step([], (), None, differing)], *cursors)
        return known

    def _remove_profiles_but(self, known: Collection[str]) -> None:
        """Remove profiles that no instance here has, nor a placement that cannot be taken."""
        with self._store.view() as store:
            unused = [uuid for uuid in placed_profiles.list_unused(store) if uuid not in known]
        if unused:
            with self._writer.change() as change:
                placed_profiles.remove_unused(change, unused)

    def _differing_profiles(self, found: Iterable[PlacedProfile]) -> list[PlacedProfile]:
        """Those of the profiles that the store does not have so."""
        with self._store.view() as store:
            return [one for one in found if not is_same_profile(store, one)]

    def _differing(self, found: Iterable[Placement], placed: Mapping[str, Placed]) -> Iterator[Placement]:
        """Yield those of the instances that the store does not have so."""
        for one in found:
            with self._store.view() as store:
                same = is_same(store, one, placed.get(one.observed.key))
            if not same:
                yield one

    def _release(self, session: Session, leaving: Iterable[PlacedRow]) -> None:
        """Give up instances that are to leave: the store has none of them any more."""
        for one in leaving:
            if inventory.release(session, one.uuid, one.epoch):
                log.info("released %s in project %s", one.name, one.project)

    def _report(self, session: Session, host: str) -> None:
        """Say what the store has of placed instances, where the database does not have it."""
        with self._store.view() as store:
            states = placements.list_placed_states(store)
        now = time.monotonic()
        self._reported = {uuid: at for uuid, at in self._reported.items() if at > now - LOOK_SECONDS}
        for one in states:
            said = self._said.get(one.uuid)
            if one.uuid in self._reported or (said is None and not one.running):
                continue
            if said is not None and (said.epoch, *said[2:]) == one[1:]:
                continue
            newer = Said(one.epoch, 1 if said is None else said.seq + 1, one.run, one.running, one.ready)
            if inventory.report(session, one.uuid, newer):
                self._said[one.uuid] = newer
            self._reported[one.uuid] = now

    def _contact(self, session: Session, lag: float) -> None:
        """Record that the database has answered: here, and there."""
        now = time.monotonic()
        applied = self._status.cursor.revision
        if applied != self._applied:
            self._status = self._status._replace(lag=lag)
        if applied != self._applied or now > self._contacted + _CONTACT_SECONDS:
            with self._store.view() as store:
                troubled = statuses.list_problem_keys(store, FLEET)
            fault = f"{len(troubled)} instances are not here as they should be" if troubled else ""
            inventory.say_contact(session, applied, fault)
            self._applied, self._contacted = applied, now
        self._note(self._status._replace(connected=True, contact=time.time(), fault=""))

    def _lose(self, error: SourceError) -> None:
        if self._status.connected:
            log.warning("%s; instances get the last known answers until it is back", error)
        self._applied = -1
        try:
            self._note(self._status._replace(connected=False, fault=str(error)))
        except StoreError as failed:
            log.error("%s", failed)

    def _note(self, status: FleetStatus) -> None:
        """Record the status if it has changed, or the last record is old."""
        news = (status.connected, status.fault) != (self._status.connected, self._status.fault)
        self._status = status
        if news or time.monotonic() > self._noted_at + _CONTACT_SECONDS:
            with self._writer.change() as change:
                placements.record_fleet_status(change, status)
            self._noted_at = time.monotonic()
        what = f"revision {status.cursor.revision}"
        self._tell(f"follows the fleet: {what}" if status.connected else f"lost, {what} as last known: {status.fault}")

    def _open(self) -> None:
        url = self._settings.store.url
        self._writer = Writer(self._settings, create=True, keep=True, audit=by_source(FLEET))
        self._store = Views(url)

    def _reopen(self) -> None:
        try:
            self._open()
        except StoreError as error:
            log.error("%s", error)


def _steps(
    found: tuple[list[PlacedRow], list[str], Mapping[str, int]],
    placed: Mapping[str, Placed],
    wanted: Cursor,
    read: _Read,
    profiles: Sequence[PlacedProfile],
) -> Iterator[_Step]:
    """Yield what to write, a transaction each: what is gone, then what is renamed, since names are free then.

    Profiles come first, since instances refer to them. A change of few instances is one transaction.
    """
    staying, gone, first = found
    if len(staying) + len(gone) + len(profiles) <= BATCH:
        yield _Step(list(read(staying)), gone, wanted, profiles)
        return
    for profile in profiles:
        yield _Step([], (), None, [profile])
    for start in range(0, len(gone), BATCH):
        yield _Step([], gone[start : start + BATCH], None)
    renamed = [
        one for one in staying if (was := placed.get(one.uuid)) and (was.project, was.name) != (one.project, one.name)
    ]
    if renamed:
        # All at once: two may have changed their names with each other.
        yield _Step(list(read(renamed)), (), None)
    uuids = {one.uuid for one in renamed}
    batch: list[Placement] = []
    for one in read(one for one in staying if one.uuid not in uuids):
        if len(batch) == BATCH:
            before = first[one.observed.key] - 1
            # Whoever is killed now goes on here; unless it is the first look, whose cursor is written at the end.
            yield _Step(batch, (), wanted._replace(revision=before) if before < wanted.revision - 1 else None)
            batch = []
        batch.append(one)
    yield _Step(batch, (), wanted)
