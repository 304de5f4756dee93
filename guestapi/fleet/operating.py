"""The operator's side of a fleet: commands change its instances by the same steps as those of this host's store.

Instances that a command names are read into a store in memory (`store.scratch`). The command changes them there, by
functions that know no fleet, and what differs afterwards is written to the database in one transaction (`plan`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID, uuid4

from guestapi.errors import OperatorError
from guestapi.fleet import plan, sharing
from guestapi.fleet.engine import FleetError, UncertainError, commit
from guestapi.fleet.plan import FleetInstance, Plan, Result, Writing
from guestapi.fleet.sharing import FleetProfile
from guestapi.fleet.statements import is_storable
from guestapi.model import Instance, Profile
from guestapi.store import profiles as profile_steps
from guestapi.store.definitions import Definition
from guestapi.store.errors import ConflictError, UnknownInstanceError
from guestapi.store.layers import Layer, Layers
from guestapi.store.scratch import load_instances, load_profiles, scratch
from guestapi.store.transaction import Change

if TYPE_CHECKING:
    import psycopg

#: Project and name of an instance, or of a profile.
Place = tuple[str, str]

#: Seconds to find out what became of a change whose confirmation was lost with its server, and between two tries.
_ASK_AGAIN_SECONDS, _ASK_AGAIN_PAUSE = 60.0, 0.5
#: Instances that are read at a time to see what a change of their profile means for them.
_USERS = 1_000
#: Seconds between two looks whether hosts have applied a change; and at least, as a multiple of what a look takes.
_WAIT_SECONDS, _PAUSES = 0.05, 9
#: Seconds between two looks what hosts say of instances.
_LOOK_SECONDS = 0.25


class Wishes(NamedTuple):
    """What an operator wants of a change.

    Attributes:
        operation: names the change: asked for again, it changes nothing.
        host: where instances are placed that are added and name none.
        if_revision: change the instance only if it has this revision.
    """

    operation: UUID
    host: str | None = None
    if_revision: int | None = None


class Behind(NamedTuple):
    """A host that has not applied a change yet."""

    host: str
    age: float | None


class FleetStore:
    """The instances of a fleet, for one command."""

    def __init__(
        self, connect: Callable[[], AbstractContextManager[psycopg.Connection[Any]]], configuration_bytes: int
    ) -> None:
        """Connect to nothing yet.

        Args:
            connect: opens a session by the role of an operator.
            configuration_bytes: how much the configuration and devices of an instance may have in all.
        """
        self._connect = connect
        self._configuration_bytes = configuration_bytes
        #: The fleet's instances and profiles that were read last, by the ids that they have in memory.
        self.known: dict[int, FleetInstance] = {}
        self.known_profiles: dict[int, FleetProfile] = {}
        #: Whether a change is made, and certain to stay.
        self.committed = False
        #: What the last change has done.
        self.result: Result | None = None

    @contextmanager
    def view(self, places: Sequence[Place], profiles: Sequence[Place] = ()) -> Iterator[Change]:
        """Look at instances and profiles; only those of these projects and names are there, and what instances have."""
        with self._connect() as connection, scratch(self._configuration_bytes) as change:
            self._load(connection, change, plan.read(connection, places), profiles)
            yield change

    def list_instances(self, project: str | None, host: str | None, *, whole: bool = True) -> list[Instance]:
        """Return instances by project and name.

        Args:
            project: of this one; None: of all.
            host: of this one; None: of all.
            whole: with their configuration and devices.

        Raises:
            FleetMisuseError: there is no such host.
        """
        with self._connect() as connection:
            is_readable = all(map(is_storable, filter(None, (project, host))))
            found = plan.read_all(connection, project, host, whole=whole) if is_readable else []
            if not found and host is not None:
                plan.check_host(connection, host)
            applied = {uuid for one in found for uuid in one.profiles}
            shared = {one.uuid: one for one in sharing.read(connection, (), applied)} if applied else {}
        self.known = dict(enumerate(found, 1))
        return [_merged(plan.as_instance(number, one), one, shared) for number, one in self.known.items()]

    def list_projects(self) -> dict[str, int]:
        """Return the projects, and how many instances each has."""
        with self._connect() as connection:
            return plan.list_projects(connection)

    def wait_until(
        self, places: Sequence[Place], is_met: Callable[[FleetInstance], bool], until: float | None
    ) -> list[str]:
        """Wait until all instances are as they should be, as far as their hosts say.

        Args:
            places: their projects and names.
            is_met: whether one is as it should be.
            until: when to give up, by the monotonic clock; None: never.

        Returns:
            The names of those that are not; none, if all are.

        Raises:
            UnknownInstanceError: one is not there, or not any more.
        """
        left = list(dict.fromkeys(places))
        with self._connect() as connection:
            while True:
                found = {(one.project, one.name): one for one in plan.read_facts(connection, left)}
                for place in left:
                    if place not in found:
                        raise unknown_instance(place)
                left = [place for place in left if not is_met(found[place])]
                if not left or (until is not None and time.monotonic() > until):
                    return [name for _project, name in left]
                time.sleep(_LOOK_SECONDS)

    def list_profiles(self, project: str | None) -> list[tuple[Profile, int]]:
        """Return the profiles of a project, or of all (None), each with the number of instances that have it."""
        if project is not None and not is_storable(project):
            return []
        with self._connect() as connection:
            found = sharing.read_all(connection, project)
        return [(sharing.as_profile(number, one), users) for number, (one, users) in enumerate(found, 1)]

    def list_users(self, profile: Profile, limit: int) -> list[Place]:
        """Return project and name of the first instances that have a profile that was read last."""
        known = self.known_profiles.get(profile.id)
        if known is None:
            return []
        with self._connect() as connection:
            return sharing.list_users(connection, known.uuid, limit)

    @contextmanager
    def change(
        self,
        places: Sequence[Place],
        wishes: Wishes,
        hosts: Iterable[str] = (),
        writing: Writing | None = None,
        profiles: Sequence[Place] = (),
        *,
        edited: Sequence[Place] = (),
    ) -> Iterator[Change]:
        """Change instances or profiles: all that the block does, or nothing.

        Args:
            places: projects and names of all instances that are changed or added.
            wishes: what the operator wants.
            hosts: hosts that instances may be placed on, besides that of `wishes`.
            writing: is told how many instances are written.
            profiles: projects and names of profiles that instances get.
            edited: projects and names of profiles that are changed, added or removed.

        Raises:
            ConflictError: the instance has another revision, or an instance would have too much.
            UncertainError: it was written, but it is not certain that it stays.
            FleetError: nothing was changed.
        """
        with self._connect() as connection, scratch(self._configuration_bytes) as change:
            connection.execute("BEGIN")
            wanted = {*hosts, *([] if wishes.host is None else [wishes.host])}
            known, states = plan.lock(connection, places, wanted, edited, profiles)
            if (done := plan.find_operation(connection, wishes.operation)) is not None:
                connection.execute("ROLLBACK")
                self.result = done
                raise AlreadyDoneError
            check_revision(known, wishes.if_revision)
            self._load(connection, change, known, [*profiles, *edited])
            yield change
            differences = plan.compare(change, self.known, self.known_profiles, wishes.host)
            sharing.check(connection, differences.shared)
            for before, after in differences.shared.changed:
                differences.changed.extend(self._find_changed(connection, before, after))
            plan.refuse_fenced(states, (one.host for one in differences.added))
            self.result = plan.write(connection, differences, wishes.operation, writing)
            try:
                commit(connection)
            except UncertainError as error:
                if not error.lost:
                    raise
                self._ask_again(differences, wishes.operation, error)
            self.committed = True

    def locate(self, definitions: Iterable[Definition], host: str | None) -> list[Definition]:
        """Have definitions of instances that were read name the host of each, so that nothing differs that is not said.

        Args:
            definitions: of these instances, and of others, which are added.
            host: where those are that name none.

        Raises:
            OperatorError: an instance is on another host, or it is not said where one is to be that is added.
        """
        hosts = {(one.project, one.name): one.host for one in self.known.values()}
        return [
            replace(one, location=plan.choose_host(one.name, hosts.get((one.project, one.name)), one.location or host))
            for one in definitions
        ]

    def wait(self, result: Result, until: float | None) -> list[Behind]:
        """Wait until all hosts have applied a change.

        Args:
            result: of the change.
            until: when to give up, by the monotonic clock; None: never.

        Returns:
            The hosts that have not; none, if all have.
        """
        with self._connect() as connection:
            while True:
                asked = time.monotonic()
                behind = [Behind(*one) for one in plan.find_behind(connection, result)]
                now = time.monotonic()
                if not behind or (until is not None and now > until):
                    return behind
                # Of very many hosts, the question takes its time.
                time.sleep(max(_WAIT_SECONDS, _PAUSES * (now - asked)))

    def _load(
        self,
        connection: psycopg.Connection[Any],
        change: Change,
        found: Sequence[FleetInstance],
        profiles: Sequence[Place],
    ) -> None:
        applied = {uuid for one in found for uuid in one.profiles}
        shared = sharing.read(connection, profiles, applied) if profiles or applied else []
        self.known, self.known_profiles = load(change, found, shared)

    def _find_changed(
        self, connection: psycopg.Connection[Any], before: FleetProfile, after: FleetProfile
    ) -> list[tuple[FleetInstance, FleetInstance]]:
        """Return the instances that get another cloud-init id by the change of a profile, before and afterwards.

        Raises:
            ConflictError: an instance would have too much.
        """
        if sharing.starts_over(before, after):
            uuids = sharing.list_instances_of(connection, before.uuid)
        else:
            uuids = sharing.find_large(connection, before, after, self._configuration_bytes)
        changed: list[tuple[FleetInstance, FleetInstance]] = []
        for start in range(0, len(uuids), _USERS):
            found = plan.read_whole(connection, uuids[start : start + _USERS])
            applied = {uuid for one in found for uuid in one.profiles}
            with scratch(self._configuration_bytes) as change:
                known, shared = load(change, found, sharing.read(connection, (), applied))
                number = next(number for number, one in shared.items() if one.uuid == before.uuid)
                profile_steps.edit(
                    change,
                    sharing.as_profile(number, before),
                    description=after.description,
                    config=after.config,
                    devices=after.devices,
                )
                changed.extend(plan.compare(change, known, shared, None).changed)
        return changed

    def _ask_again(self, differences: Plan, operation: UUID, lost: UncertainError) -> None:
        """Find out what became of a change whose confirmation was lost, and make it if it was not made."""
        until = time.monotonic() + _ASK_AGAIN_SECONDS
        has_conflicted = False
        while True:
            try:
                with self._connect() as connection:
                    connection.execute("BEGIN")
                    # Whoever still commits it holds these locks.
                    plan.lock_hosts(connection, differences.hosts)
                    if (done := plan.find_operation(connection, operation)) is not None:
                        connection.execute("ROLLBACK")
                        self.result = done
                        return
                    plan.check_unchanged(connection, differences)
                    self.result = plan.write(connection, differences, operation)
                    commit(connection)
                    return
            except ConflictError:
                # Whoever commits it may hold no locks: of a new profile there are none.
                if has_conflicted:
                    raise
                has_conflicted = True
            except UncertainError as error:
                if not error.lost:
                    raise
            except FleetError:
                pass
            if time.monotonic() > until:
                raise lost
            time.sleep(_ASK_AGAIN_PAUSE)


class AlreadyDoneError(OperatorError):
    """The operation was carried out before."""

    def __init__(self) -> None:
        super().__init__("this operation was carried out before; nothing was changed now")


def load(
    change: Change, instances: Iterable[FleetInstance], shared: Iterable[FleetProfile]
) -> tuple[dict[int, FleetInstance], dict[int, FleetProfile]]:
    """Have instances of the fleet in an empty store in memory, and profiles; both by the ids that they have there."""
    known, profiles_known = dict(enumerate(instances, 1)), dict(enumerate(shared, 1))
    load_profiles(change, (sharing.as_profile(number, one) for number, one in profiles_known.items()))
    numbers = {one.uuid: number for number, one in profiles_known.items()}
    load_instances(
        change,
        (plan.as_instance(number, one) for number, one in known.items()),
        {number: [numbers[uuid] for uuid in one.profiles] for number, one in known.items()},
    )
    return known, profiles_known


def _merged(instance: Instance, one: FleetInstance, shared: Mapping[str, FleetProfile]) -> Instance:
    """An instance with what its profiles give it."""
    applied = tuple(sharing.as_profile(0, shared[uuid]) for uuid in one.profiles if uuid in shared)
    if not applied:
        return instance
    layers = Layers(operator=Layer(one.config, one.devices), profiles=applied)
    names = tuple(profile.name for profile in applied)
    return replace(instance, config=layers.config, devices=layers.devices, profiles=names)


def unknown_instance(place: Place) -> UnknownInstanceError:
    """Return the error for an instance of the fleet that is not there."""
    project, name = place
    where = "" if project == "default" else f" in project {project!r}"
    return UnknownInstanceError(f"no instance {name!r}{where}", "'guestapi --fleet instance list' shows all")


def new_operation() -> UUID:
    """Return a name for a change."""
    return uuid4()


def check_revision(known: Sequence[FleetInstance], wanted: int | None) -> None:
    """Make sure that the one instance has the revision that is wanted; None: any.

    Raises:
        ConflictError: it has another one.
    """
    if wanted is None:
        return
    if len(known) != 1:
        raise OperatorError(f"--if-revision is for one instance, not {len(known)}", "leave it out")
    if known[0].revision != wanted:
        raise ConflictError(
            f"instance {known[0].name!r} has revision {known[0].revision}, not {wanted}; nothing was changed",
            f"'guestapi --fleet instance info {known[0].name}' shows what it is now",
        )
