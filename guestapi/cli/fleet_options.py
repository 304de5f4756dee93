"""The options of commands that are for a fleet. Nothing of a fleet is loaded for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from guestapi.cli.seconds import Seconds
from guestapi.cli.words import MisuseError
from guestapi.errors import OperatorError

if TYPE_CHECKING:
    from guestapi.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

#: Where in a context these options stand.
_OPTIONS = "guestapi.fleet"


def fleet_url(settings: Settings) -> str:
    """Return the URL of the fleet's database.

    Raises:
        OperatorError: it is not set.
    """
    if settings.fleet.url is None:
        raise OperatorError(
            "fleet.url is not set", 'in guestapi.toml, below [fleet]: url = "postgresql://db1,db2,db3/guestapi"'
        )
    return settings.fleet.url


def changes_instances(command: F) -> F:
    """Give a command that changes instances the options of a fleet."""
    option = click.option(
        "--if-revision",
        **_remembered("With --fleet: if the instance has this revision."),
        type=click.IntRange(min=0),
        metavar="N",
    )
    return changes_profiles(option(command))


def changes_profiles(command: F) -> F:
    """Give a command that changes profiles the options of a fleet."""
    for option in reversed(
        (
            click.option("--wait", **_remembered("With --fleet: until the hosts have applied it."), is_flag=True),
            click.option(
                "--timeout",
                **_remembered("With --wait: give up then, with exit 1."),
                type=Seconds(min=0),
                metavar="SECONDS",
            ),
            click.option(
                "--operation",
                **_remembered("With --fleet: names the change; asked for again, it changes nothing."),
                type=click.UUID,
                metavar="UUID",
            ),
        )
    ):
        command = option(command)
    return command


def takes_host(text: str) -> Callable[[F], F]:
    """Give a command --host, which is for a fleet."""
    return click.option("--host", **_remembered(text), metavar="HOST")


def _remembered(text: str) -> dict[str, Any]:
    return {"expose_value": False, "callback": _remember, "help": text}


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is None or value is False:
        return
    if not ctx.find_root().params.get("fleet"):
        raise MisuseError(f"{parameter.opts[0]} is for a fleet", "'guestapi --fleet ...' is")
    ctx.meta.setdefault(_OPTIONS, {})[parameter.name] = value


def given_options(ctx: click.Context) -> dict[str, Any]:
    """The options of a fleet that were given, by their names."""
    found: dict[str, Any] = ctx.meta.get(_OPTIONS, {})
    if "timeout" in found and "wait" not in found:
        raise MisuseError("--timeout says nothing without --wait")
    return found
