"""What the commands share: the context they run in, their options and arguments, and how they print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from guestapi import settings as settings_module
from guestapi.audit_log import AuditSink, by_operator
from guestapi.callers.machines import is_alive
from guestapi.cli.grouping import Noun, project_of, takes_project
from guestapi.cli.printing import print_devices as print_devices
from guestapi.cli.printing import print_json as print_json
from guestapi.cli.printing import print_pairs as print_pairs
from guestapi.cli.printing import print_table as print_table
from guestapi.cli.printing import print_value as print_value
from guestapi.cli.words import MisuseError, explain
from guestapi.errors import GuestapiError
from guestapi.key_policy import blanked
from guestapi.model import Instance
from guestapi.settings import Settings
from guestapi.store.lookup import Moment, list_instances, list_projects
from guestapi.store.transaction import Change
from guestapi.store.view import View, view
from guestapi.store.writing import Writer

if TYPE_CHECKING:
    from guestapi.cli.fleet_side import FleetSide
    from guestapi.fleet.plan import Writing
    from guestapi.records import Profile

F = TypeVar("F", bound=Callable[..., Any])

#: Commands that take --fleet, as hints name them.
_OF_FLEETS = re.compile(r"'guestapi (?=(?:apply|config|device|export|instance|profile|project)\b)")


class Operator:
    """The context of a command (click's ``obj``): where the configuration is, and what it leads to."""

    def __init__(self, config: str | None, *, fleet: bool = False) -> None:
        self.file: Path | None = settings_module.find(config)
        self.is_fleet = fleet

    @cached_property
    def settings(self) -> Settings:
        """The configuration; raises SettingsError."""
        return settings_module.load(self.file)

    @cached_property
    def writer(self) -> Writer:
        """The store, to change it, made if it is missing; raises StoreError."""
        assert not self.is_fleet, "its commands ask the fleet"
        return Writer(self.settings, create=True, audit=self.audit)

    @property
    def audit(self) -> AuditSink:
        """What records changes of the command that is called."""
        return by_operator(click.get_current_context().command_path)

    def view(self) -> AbstractContextManager[View]:
        """The store, to look at it; raises StoreError."""
        assert not self.is_fleet, "its commands ask the fleet"
        return view(self.settings.store.url)

    @cached_property
    def fleet(self) -> FleetSide:
        """The fleet's database; raises OperatorError."""
        # PERF: loaded for --fleet alone.
        from guestapi.cli.fleet_side import FleetSide

        return FleetSide(self.settings)

    def change_instances(
        self,
        *places: tuple[str, str],
        hosts: Sequence[str] = (),
        writing: Writing | None = None,
        profiles: Sequence[tuple[str, str]] = (),
    ) -> AbstractContextManager[Change]:
        """Change instances, of this host or of the fleet, in one transaction.

        Args:
            places: project and name of each instance that is changed or added.
            hosts: where added ones may be, besides --host.
            writing: is told how far the fleet's database has got.
            profiles: project and name of each profile that an instance gets.
        """
        return self.fleet.change(places, hosts, writing, profiles) if self.is_fleet else self.writer.change()

    def change_profiles(self, *places: tuple[str, str]) -> AbstractContextManager[Change]:
        """Change profiles, of this host or of the fleet, in one transaction; `places` as of `change_instances`."""
        return self.fleet.change((), edited=places) if self.is_fleet else self.writer.change()

    def view_profiles(self, *places: tuple[str, str]) -> AbstractContextManager[Moment]:
        """Look at profiles, of this host or of the fleet, by project and name."""
        return self.fleet.view((), places) if self.is_fleet else self.view()

    def list_profiles(self, project: str | None) -> list[tuple[Profile, int]]:
        """The profiles of a project, or of all (None), each with the number of instances that have it."""
        # PERF: loaded where it is asked for.
        from guestapi.store.profiles import list_profiles

        if self.is_fleet:
            return self.fleet.list_profiles(project)
        with self.view() as store:
            return list_profiles(store, project)

    def list_projects(self) -> dict[str, int]:
        """The projects, of this host or of the fleet, and how many instances each has."""
        if self.is_fleet:
            return self.fleet.list_projects()
        with self.view() as store:
            return list_projects(store)

    def view_instances(self, *places: tuple[str, str]) -> AbstractContextManager[Moment]:
        """Look at instances, of this host or of the fleet, by project and name."""
        return self.fleet.view(places) if self.is_fleet else self.view()

    def status(self, instance: Instance) -> str:
        """As `status`; of a fleet's instance, what its host has said."""
        return self.fleet.facts(instance).status if self.is_fleet else status(instance)

    def described(self, instance: Instance, *, reveal: bool = False) -> dict[str, Any]:
        """As `described`; of a fleet's instance, with what the fleet knows."""
        document = described(instance, reveal=reveal)
        if not self.is_fleet:
            return document
        facts = self.fleet.facts(instance)
        for key in ("pid", "location", "source", "key", "hostname"):
            del document[key]
        return {
            **{key: document.pop(key) for key in ("name", "project", "type")},
            "status": facts.status,
            "state": "Ready" if facts.ready else "Started",
            "host": facts.host,
            "next_host": facts.next_host,
            "epoch": facts.epoch,
            "revision": facts.revision,
            **{key: document[key] for key in ("uuid", "cloud_init_id", "config", "devices", "profiles")},
        }


class OneSentence(Noun):
    """A command group in which what an operator may cause ends in one sentence, not in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click.Group."""
        try:
            return super().invoke(ctx)
        except MisuseError as error:
            raise click.UsageError(explain(error.message, error.hint), click.get_current_context(silent=True)) from None
        except GuestapiError as error:
            fail(error.message, error.hint)


def fail(sentence: str, hint: str | None = None) -> NoReturn:
    """Print `sentence` on stderr, below it `hint` if there is one, and exit 1.

    With --fleet, a command that the hint names is one with --fleet, too.
    """
    context = click.get_current_context(silent=True)
    if hint and context is not None and context.find_root().params.get("fleet"):
        hint = _OF_FLEETS.sub("'guestapi --fleet ", hint)
    raise click.ClickException(explain(sentence, hint))


def warn(sentences: Iterable[str]) -> None:
    """Print what looks like a mistake on stderr; it was done all the same."""
    for sentence in sentences:
        click.echo(f"Warning: {explain(sentence)}", err=True)


def complete_instance(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of this host's instances that begin like that, for a shell."""
    # To ask a fleet's database would take longer than a shell waits.
    if ctx.find_root().params.get("fleet"):
        return []
    try:
        operator = Operator(ctx.find_root().params.get("config"))
        with operator.view() as store:
            known = list_instances(store, given_project(ctx))
    except GuestapiError:
        return []
    return [CompletionItem(instance.name) for instance in known if instance.name.startswith(incomplete)]


def takes_instance(command: F) -> F:
    """Give a command NAME and --project; it gets ``name`` and ``project``."""
    return in_project(click.argument("name", shell_complete=complete_instance)(command))


def in_project(command: F) -> F:
    """Give a command --project; it gets ``project``, which is ``default`` if none was given."""

    @wraps(command)
    def with_project(*arguments: Any, **options: Any) -> Any:
        return command(*arguments, project=given_project(click.get_current_context()), **options)

    option = takes_project("The instance's project, be it before or behind the verb (default: `default`).")
    return cast("F", option(with_project))


def given_project(ctx: click.Context) -> str:
    """The project that a command is about: ``default`` if none was given."""
    found = project_of(ctx)
    return "default" if found is None else found


def has_truncate(command: F) -> F:
    """Give a command --truncate."""
    return click.option("--truncate", is_flag=True, help="Shorten long values, and those of several lines.")(command)


def takes_instance_option(command: F) -> F:
    """Give a command --project and --instance; it gets ``project`` and ``instance``."""
    option = click.option(
        "--instance", metavar="NAME", shell_complete=complete_instance, help="Of this instance alone; else of all."
    )
    return in_project(option(command))


def has_reveal(command: F) -> F:
    """Give a command --reveal."""
    return click.option("--reveal", is_flag=True, help="Show values that a policy keeps secret.")(command)


def has_format(command: F) -> F:
    """Give a command --format; it gets ``as_json``."""
    option = click.option(
        "-f",
        "--format",
        "as_json",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        callback=lambda _ctx, _parameter, value: value == "json",
        help="How to print.",
    )
    return option(command)


def status(instance: Instance) -> str:
    """``running``, ``stopped``, or ``dead``: registered as running, but its init has ended without notice."""
    if instance.init is None:
        return "stopped"
    return "running" if is_alive(instance.init) else "dead"


def described(instance: Instance, *, reveal: bool = False) -> dict[str, Any]:
    """An instance as ``--format json`` shows it; with `reveal`, also values that policies keep secret."""
    return {
        "name": instance.name,
        "project": instance.project,
        "type": instance.type,
        "status": status(instance),
        "state": "Ready" if instance.ready else "Started",
        "pid": instance.init.pid if instance.init else None,
        **({"cid": instance.init.cid} if instance.init and instance.init.cid is not None else {}),
        "uuid": instance.uuid,
        "cloud_init_id": instance.cloud_init_id,
        "location": instance.location,
        "source": instance.source,
        "key": instance.key,
        "hostname": instance.host_name,
        "config": dict(instance.config) if reveal else blanked(instance, instance.config),
        "devices": dict(instance.devices),
        "profiles": list(instance.profiles),
    }


def origin_name(instance: Instance, layer: str) -> str:
    """The name of a layer's owner: ``operator``, the name of the instance's source, or ``profile NAME``."""
    return layer if layer != "source" else instance.source or "hook"


def has_origin(command: F) -> F:
    """Give a command --origin."""
    return click.option("--origin", is_flag=True, help="Show who set it: the operator, its source, or a profile.")(
        command
    )
