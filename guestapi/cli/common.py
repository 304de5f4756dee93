"""What the commands share: the context they run in, their options and arguments, and how they print."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
from click.shell_completion import CompletionItem

from guestapi import settings as settings_module
from guestapi.callers.namespaces import is_alive
from guestapi.cli.words import MisuseError, explain, printable
from guestapi.errors import GuestapiError
from guestapi.model import Device, Instance
from guestapi.settings import Settings
from guestapi.store.lookup import list_instances
from guestapi.store.view import View, view
from guestapi.store.writing import Writer

F = TypeVar("F", bound=Callable[..., Any])

#: Control characters that JSON leaves as they are, and halves of surrogate pairs, which no terminal can be sent.
_UNPRINTED = re.compile("[\x7f-\x9f\ud800-\udfff]")


class Operator:
    """The context of a command (click's ``obj``): where the configuration is, and what it leads to."""

    def __init__(self, config: str | None) -> None:
        self.file: Path | None = settings_module.find(config)

    @cached_property
    def settings(self) -> Settings:
        """The configuration; raises SettingsError."""
        return settings_module.load(self.file)

    @cached_property
    def writer(self) -> Writer:
        """The store, to change it, made if it is missing; raises StoreError."""
        return Writer(self.settings, create=True)

    def view(self) -> AbstractContextManager[View]:
        """The store, to look at it; raises StoreError."""
        return view(self.settings.store.url)


class OneSentence(click.Group):
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
    """Print `sentence` on stderr, below it `hint` if there is one, and exit 1."""
    raise click.ClickException(explain(sentence, hint))


def warn(sentences: Iterable[str]) -> None:
    """Print what looks like a mistake on stderr; it was done all the same."""
    for sentence in sentences:
        click.echo(f"Warning: {explain(sentence)}", err=True)


def _complete_instance(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        operator = Operator(ctx.find_root().params.get("config"))
        with operator.view() as store:
            known = list_instances(store, ctx.params.get("project"))
    except GuestapiError:
        return []
    return [CompletionItem(instance.name) for instance in known if instance.name.startswith(incomplete)]


def takes_instance(command: F) -> F:
    """Give a command NAME and --project."""
    command = click.argument("name", shell_complete=_complete_instance)(command)
    return click.option("--project", default="default", show_default=True, help="The instance's project.")(command)


def has_format(command: F) -> F:
    """Give a command --format; it gets ``as_json``."""
    option = click.option(
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


def described(instance: Instance) -> dict[str, Any]:
    """An instance as ``--format json`` shows it."""
    return {
        "name": instance.name,
        "project": instance.project,
        "type": instance.type,
        "status": status(instance),
        "state": "Ready" if instance.ready else "Started",
        "pid": instance.init.pid if instance.init else None,
        "uuid": instance.uuid,
        "cloud_init_id": instance.cloud_init_id,
        "location": instance.location,
        "source": instance.source,
        "key": instance.key,
        "hostname": instance.host_name,
        "config": dict(instance.config),
        "devices": dict(instance.devices),
        "profiles": list(instance.profiles),
    }


def print_value(value: str) -> None:
    """Print a value as it is, whatever is in it, and a line break."""
    # click.echo would take escape sequences away, and write in the encoding of the environment.
    sys.stdout.buffer.write(value.encode() + b"\n")
    sys.stdout.buffer.flush()


def print_json(document: object) -> None:
    """Print `document`, readable by humans too."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    click.echo(_UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table; nothing in it is taken for markup, and control characters cannot reach the terminal."""
    # Loaded for tables alone: hooks print none, and are in a hurry.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        # A pipe has no width: do not fold what a script wants to read.
        console = Console(width=10_000)
        table.expand = False
    console.print(table)


def origin_name(instance: Instance, layer: str) -> str:
    """The name of a layer's owner: ``operator``, the name of the instance's source, or ``profile NAME``."""
    return layer if layer != "source" else instance.source or "hook"


def print_pairs(config: Iterable[tuple[str, str]], origins: Mapping[str, str] | None = None) -> None:
    """Print keys and values, and where they come from if `origins` says so."""
    rows = ([key, _shorten(value)] for key, value in config)
    _print_with_origins(["KEY", "VALUE"], rows, origins)


def print_devices(devices: Iterable[tuple[str, Device]], origins: Mapping[str, str] | None = None) -> None:
    """Print devices and their definitions, and where they come from if `origins` says so."""
    rows = ([name, device["type"], _options(device)] for name, device in devices)
    _print_with_origins(["DEVICE", "TYPE", "OPTIONS"], rows, origins)


def _print_with_origins(columns: list[str], rows: Iterable[list[str]], origins: Mapping[str, str] | None) -> None:
    if origins is None:
        print_table(columns, rows)
    else:
        print_table([*columns, "ORIGIN"], ([*row, origins[row[0]]] for row in rows))


def has_origin(command: F) -> F:
    """Give a command --origin."""
    return click.option("--origin", is_flag=True, help="Show who set it: the operator, its source, or a profile.")(
        command
    )


def _options(device: Device) -> str:
    return " ".join(f"{key}={value}" for key, value in device.items() if key != "type")


def _shorten(value: str) -> str:
    lines = value.splitlines() or [""]
    return lines[0][:120] + (f" … ({len(value.encode())} bytes)" if len(lines) > 1 or len(lines[0]) > 120 else "")
