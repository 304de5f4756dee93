"""With --fleet, a command finds the instances that it is about in the fleet's database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from uuid import UUID

import click

from guestapi.audit_log import by_operator
from guestapi.cli.fleet_options import fleet_url, given_options
from guestapi.errors import OperatorError
from guestapi.fleet import moving
from guestapi.fleet.engine import session
from guestapi.fleet.moving import Move
from guestapi.fleet.operating import AlreadyDoneError, FleetStore, Place, Wishes, new_operation
from guestapi.fleet.plan import FleetInstance, Result, Writing
from guestapi.model import Instance, Profile
from guestapi.settings import Settings
from guestapi.store.definitions import Definition
from guestapi.store.transaction import Change


class FleetSide:
    """The fleet's database, for one command."""

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet.

        Args:
            settings: where the database is.
        """
        url = fleet_url(settings)
        self._connect = lambda: session(url)
        self._store = FleetStore(self._connect, settings.store.configuration_bytes)

    def view(self, places: Sequence[Place], profiles: Sequence[Place] = ()) -> AbstractContextManager[Change]:
        """Look at instances and profiles, which are named."""
        return self._store.view(places, profiles)

    @contextmanager
    def change(
        self,
        places: Sequence[Place],
        hosts: Sequence[str] = (),
        writing: Writing | None = None,
        profiles: Sequence[Place] = (),
        *,
        edited: Sequence[Place] = (),
    ) -> Iterator[Change]:
        """Change instances or profiles; afterwards, say what is certain, and wait if that is wanted.

        Args:
            places: as of `FleetStore.change`, like all that follows.
            hosts: as there.
            writing: as there.
            profiles: as there.
            edited: as there.
        """
        context = click.get_current_context()
        given: dict[str, Any] = given_options(context)
        operation: UUID = given.get("operation") or new_operation()
        wishes = Wishes(operation, given.get("host"), given.get("if_revision"))
        try:
            with self._store.change(places, wishes, hosts, writing, profiles, edited=edited) as change:
                yield change
        except KeyboardInterrupt:
            done = "the change is made and stays" if self._store.committed else "nothing was changed"
            raise OperatorError(f"ended by Ctrl-C; {done}") from None
        except AlreadyDoneError as error:
            click.echo(error.message, err=True)
            assert self._store.result is not None, "it was found"
            _finish(self._store, self._store.result, given)
            context.exit()
        result = self._store.result
        assert result is not None, "it was committed"
        if records := change.take_records():
            by_operator(f"{context.command_path} (fleet)")(records)
        _finish(self._store, result, given)

    def locate(self, definitions: Iterable[Definition]) -> list[Definition]:
        """Have definitions of instances that are changed name the host of each; as `FleetStore.locate`."""
        return self._store.locate(definitions, given_options(click.get_current_context()).get("host"))

    def move(self, place: Place, to: str, *, fenced: bool) -> str:
        """Have an instance go to another host; one sentence that says how far it is."""
        given = given_options(click.get_current_context())
        wishes = Wishes(given.get("operation") or new_operation(), None, given.get("if_revision"))
        try:
            ordered = moving.move(self._connect, place, to, fenced=fenced, wishes=wishes)
        except AlreadyDoneError as error:
            click.echo(error.message, err=True)
            ordered = moving.find_move(self._connect, place)
        there = f"{place[1]} is on {ordered.to}"
        if not given.get("wait"):
            return there if ordered.done else _moving(place[1], ordered)
        if ordered.to != to:
            raise OperatorError(
                f"{there if ordered.done else _moving(place[1], ordered)}; it does not go to {to}",
                "another command has sent it there since, or this operation was another one",
            )
        timeout = given.get("timeout")
        until = None if timeout is None else time.monotonic() + timeout
        try:
            left = moving.wait_until_there(self._connect, ordered, until)
        except KeyboardInterrupt:
            raise OperatorError("ended by Ctrl-C; the move goes on", "the same command waits again") from None
        if left is not None:
            raise OperatorError(f"not within {timeout:g} s: {_moving(place[1], left)}", "the move goes on")
        return there

    def list_instances(self, project: str | None, *, whole: bool) -> list[Instance]:
        """Return instances by project and name, of the host that was given or of all."""
        given = given_options(click.get_current_context())
        return self._store.list_instances(project, given.get("host"), whole=whole)

    def list_projects(self) -> dict[str, int]:
        """Return the projects, and how many instances each has."""
        return self._store.list_projects()

    def wait_until(
        self, places: Sequence[Place], is_met: Callable[[FleetInstance], bool], until: float | None
    ) -> list[str]:
        """Wait until instances are as they should be; all as of `FleetStore.wait_until`."""
        return self._store.wait_until(places, is_met, until)

    def list_profiles(self, project: str | None) -> list[tuple[Profile, int]]:
        """Return the profiles of a project, or of all (None), each with the number of instances that have it."""
        return self._store.list_profiles(project)

    def list_users(self, profile: Profile, limit: int) -> list[Place]:
        """Return project and name of the first instances that have a profile that was looked at."""
        return self._store.list_users(profile, limit)

    def facts(self, instance: Instance) -> FleetInstance:
        """Return what the database has of an instance that was read."""
        return self._store.known[instance.id]


def _finish(store: FleetStore, result: Result, given: dict[str, Any]) -> None:
    """Wait for the hosts, if that is wanted."""
    if not given.get("wait"):
        return
    timeout = given.get("timeout")
    try:
        behind = store.wait(result, None if timeout is None else time.monotonic() + timeout)
    except KeyboardInterrupt:
        raise OperatorError(
            "ended by Ctrl-C; the change is made and stays, and not all hosts were waited for",
            "'guestapi fleet host list' shows how far they are behind",
        ) from None
    if behind:
        names = ", ".join(
            f"{one.host} (last contact {'never' if one.age is None else f'{one.age:.0f} s ago'})" for one in behind
        )
        raise OperatorError(
            f"the change is made and stays, but {names} has not applied it within {timeout:g} s",
            "it is applied as soon as the host can reach the database",
        )


def _moving(name: str, move: Move) -> str:
    seen = "was never in contact" if move.age is None else f"was in contact {move.age:.0f} s ago"
    if move.done:
        return f"{name} is {move.to}'s, which has not applied it yet"
    host = move.instance.host
    return f"{name} goes to {move.to} as soon as {host} releases it; {host} is {move.state} and {seen}"
