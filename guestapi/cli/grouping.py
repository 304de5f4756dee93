"""How commands are grouped, called by other names, and say what was typed wrongly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from guestapi.cli.words import MisuseError, explain
from guestapi.errors import OperatorError

F = TypeVar("F", bound=Callable[..., Any])

#: Other names of verbs, as operators of Incus and of containers type them. A verb of that name is itself.
ALIASES = {"ls": "list", "rm": "remove", "delete": "remove", "info": "show"}

#: Where in a context the project stands that was given last.
_PROJECT = "guestapi.project"


class _Explained(click.Command):
    """A command that says how it is called whatever is wrong with the call."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """As click.Command."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if error.ctx is None:
                # An option without its value: click does not say whose it is.
                error.ctx = click.Context(self, info_name=info_name, parent=parent, **self.context_settings)
            raise


class Verb(_Explained):
    """A command that takes mistakes in its words for a wrong call, too.

    Attributes:
        takes_fleet: with --fleet, it is about the instances of the fleet. Any other command refuses --fleet.
    """

    takes_fleet = False

    def invoke(self, ctx: click.Context) -> Any:
        """As click.Command."""
        if ctx.find_root().params.get("fleet") and not self.takes_fleet:
            raise OperatorError("this command is not about instances of a fleet", "leave --fleet out")
        try:
            return super().invoke(ctx)
        except MisuseError as error:
            raise click.UsageError(explain(error.message, error.hint), ctx) from None


class FleetVerb(Verb):
    """A command about the instances of this host or, with --fleet, of the fleet."""

    takes_fleet = True


class Noun(_Explained, click.Group):
    """A group of verbs.

    Attributes:
        aliases: other names of verbs, which are not listed.
    """

    command_class = Verb
    aliases: Mapping[str, str] = ALIASES

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click.Group; a noun without a verb is a mistake, but for the program itself."""
        if not args and ctx.parent is not None and not ctx.resilient_parsing:
            raise click.UsageError(
                explain("A command is missing.", f"there are {', '.join(self.list_commands(ctx))}"), ctx
            )
        return super().parse_args(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """As click.Group; an alias is the verb that it stands for."""
        found = super().get_command(ctx, cmd_name)
        if found is None and cmd_name in self.aliases:
            return super().get_command(ctx, self.aliases[cmd_name])
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click.Group; one that does not exist is named beside those that do."""
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(explain(f"No such command {name!r}.", self._suggest(ctx, name)), ctx)
        return super().resolve_command(ctx, args)

    def _suggest(self, ctx: click.Context, name: str) -> str:
        # Loaded for mistakes alone.
        from difflib import get_close_matches

        known = self.list_commands(ctx)
        near = get_close_matches(name, [*known, *self.aliases], 1, 0.6)
        return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


class FleetNoun(Noun):
    """A group of verbs about the instances of this host or, with --fleet, of the fleet."""

    command_class = FleetVerb


def takes_project(text: str) -> Callable[[F], F]:
    """Give a command or a group --project; who is called below it or with it finds it by `project_of`.

    Args:
        text: what the option is, for the help.
    """
    return click.option("--project", metavar="PROJECT", expose_value=False, callback=_remember, help=text)


def project_of(ctx: click.Context) -> str | None:
    """The project that was given, be it before the noun, before the verb or behind it; the last one counts."""
    found: str | None = ctx.meta.get(_PROJECT)
    return found


def _remember(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.meta[_PROJECT] = value
