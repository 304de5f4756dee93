"""How the commands about profiles take the name of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from guestapi.cli.common import Operator
from guestapi.errors import GuestapiError
from guestapi.model import Profile
from guestapi.store.errors import UnknownProfileError
from guestapi.store.lookup import Moment
from guestapi.store.profiles import DEFAULT, ensure_default, get_profile, list_profiles
from guestapi.store.transaction import Change

F = TypeVar("F", bound=Callable[..., Any])


def takes_profile(command: F) -> F:
    """Give a command the NAME of a profile, and --project."""
    command = click.argument("name", shell_complete=_complete)(command)
    return click.option("--project", default="default", show_default=True, help="The profile's project.")(command)


def find_named(operator: Operator, store: Moment, project: str, name: str) -> Profile:
    """The profile of that name. In a fleet, ``default`` is a profile like others: there may be none.

    Raises:
        UnknownProfileError: there is none.
    """
    found = get_profile(store, project, name)
    if operator.is_fleet and not found.id:
        raise UnknownProfileError(f"no profile {name!r}", "'guestapi profile list' shows all")
    return found


def in_project(change: Change, project: str, name: str) -> Profile:
    """The profile of that name, to be given to an instance; ``default`` is made if it is missing.

    Raises:
        UnknownProfileError: there is none.
    """
    return ensure_default(change, project) if name == DEFAULT else get_profile(change, project, name)


def _complete(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    # To ask a fleet's database would take longer than a shell waits.
    if ctx.find_root().params.get("fleet"):
        return []
    try:
        with Operator(ctx.find_root().params.get("config")).view() as store:
            known = list_profiles(store, ctx.params.get("project"))
    except GuestapiError:
        return []
    return [CompletionItem(one.name) for one, _users in known if one.name.startswith(incomplete)]
