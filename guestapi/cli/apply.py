"""``guestapi apply``: make instances what definitions in files say, in one transaction."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from guestapi.callers.machines import is_alive
from guestapi.cli.common import Operator, warn
from guestapi.cli.definitions import as_document, check, parse, to_yaml
from guestapi.cli.fleet_options import changes_instances, takes_host
from guestapi.cli.grouping import FleetVerb, project_of, takes_project
from guestapi.cli.words import MisuseError, printable
from guestapi.errors import OperatorError
from guestapi.model import Instance
from guestapi.store import steps
from guestapi.store.definitions import Definition, define, read_definition
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import find_instance, is_placed, list_instances
from guestapi.store.transaction import Change

#: What files in a directory are called that have definitions.
_SUFFIXES = frozenset({".yaml", ".yml", ".json"})

#: Called with what happened to an instance: added, changed, removed or unchanged; its label; its text before and after.
_Report = Callable[[str, str, str, str], None]
#: Begins a bar for a part of the work, with how much it is; what it returns is called with how much more is done.
_Bar = Callable[[str, int], Callable[[int], None]]


class _UndoneError(Exception):
    """Raised at the end of a dry run, so that the transaction is undone."""


@click.command(cls=FleetVerb)
@takes_project("Of definitions that name none.")
@click.option("-f", "--file", "files", multiple=True, required=True, metavar="FILE|DIR", help="'-': standard input.")
@click.option("--prune", is_flag=True, help="Remove instances of the same projects that are not defined.")
@click.option("--prune-source", "sources", multiple=True, metavar="SOURCE", help="With --prune: of this source, too.")
@click.option("--force", is_flag=True, help="With --prune: also those that run.")
@click.option("--dry-run", is_flag=True, help="Change nothing; print what would be changed.")
@takes_host("With --fleet: of those that name no location; with --prune: of this host alone.")
@changes_instances
@click.pass_context
def apply(
    ctx: click.Context, files: tuple[str, ...], prune: bool, sources: tuple[str, ...], force: bool, dry_run: bool
) -> None:
    """Make instances what definitions say: add those that are missing, change what differs, all or nothing.

    FILE has YAML documents as 'guestapi export' prints them; of DIR, all files named *.yaml, *.yml and *.json are read.
    """
    if (sources or force) and not prune:
        raise MisuseError(f"{'--prune-source' if sources else '--force'} says nothing without --prune")
    operator: Operator = ctx.obj
    counts: Counter[str] = Counter()

    def report(what: str, label: str, before: str, after: str) -> None:
        counts[what] += 1
        if what != "unchanged":
            lines.append(f"{what} {label}")
            if dry_run:
                lines.extend(_difference(before, after))

    lines: list[str] = []
    with _bars() as bar:
        wanted = _read(files, project_of(ctx), bar)
        if not wanted and prune:
            raise OperatorError(
                "nothing is defined, so --prune would remove everything", "'guestapi instance remove' does"
            )
        warnings = [warning for one in wanted for warning in check(one)]
        places, writing = _places(operator, wanted, prune), partial(bar, "writing")
        try:
            named = sorted({(one.project, name) for one in wanted for name in one.profiles})
            with operator.change_instances(*places, hosts=_hosts(wanted), writing=writing, profiles=named) as change:
                if operator.is_fleet:
                    wanted = operator.fleet.locate(wanted)
                advance = bar("applying", len(wanted))
                for one in wanted:
                    _define(change, one, report, texts=dry_run)
                    advance(1)
                if prune:
                    _refuse_running(operator, change, wanted, force)
                    _prune(change, wanted, frozenset(sources), force, report, texts=dry_run)
                if dry_run:
                    raise _UndoneError
        except _UndoneError:
            pass
    for line in lines:
        click.echo(printable(line))
    click.echo(
        f"{'would be ' if dry_run else ''}{counts['added']} added, {counts['changed']} changed, "
        f"{counts['removed']} removed, {counts['unchanged']} unchanged"
    )
    warn(warnings)


def _places(operator: Operator, wanted: Iterable[Definition], prune: bool) -> list[tuple[str, str]]:
    """Project and name of all instances that are concerned."""
    places = {(one.project, one.name) for one in wanted}
    if prune and operator.is_fleet:
        for project in {project for project, _name in places}:
            places |= {(one.project, one.name) for one in operator.fleet.list_instances(project, whole=False)}
    return sorted(places)


def _hosts(wanted: Iterable[Definition]) -> list[str]:
    """The hosts of a fleet that definitions name."""
    return sorted({one.location for one in wanted if one.location is not None})


def _refuse_running(operator: Operator, change: Change, wanted: Iterable[Definition], force: bool) -> None:
    """Make sure that no instance of the fleet is removed that runs on its host."""
    kept = {(one.project, one.name) for one in wanted}
    if not operator.is_fleet or force:
        return
    for one in list_instances(change):
        if (one.project, one.name) not in kept and operator.status(one) == "running":
            raise ConflictError(f"{_label(one.project, one.name)} is not defined, but runs", "--force removes it")


def _read(files: Iterable[str], project: str | None, bar: _Bar) -> list[Definition]:
    """All definitions, each of another instance."""
    if list(files).count("-") > 1:
        raise MisuseError("'-' is given twice, but standard input can be read once only")
    found: dict[tuple[str, str], str] = {}
    wanted: list[Definition] = []
    parts = [part for file in files for part in _parts(file)]
    advance = bar("reading", len(parts))
    for where, path in parts:
        for one in parse(_content(where, path), where, project=project):
            label = (one.project, one.name)
            if label in found:
                raise OperatorError(f"{where}: {_label(*label)} is defined already in {found[label]}", "define it once")
            found[label] = where
            wanted.append(one)
        advance(1)
    return wanted


def _parts(file: str) -> list[tuple[str, Path | None]]:
    """What is read of a file or a directory, by what it is called; None: standard input."""
    if file == "-":
        return [("standard input", None)]
    try:
        path = Path(file)
        if not path.is_dir():
            return [(file, path)]
        parts = sorted(one for one in path.iterdir() if one.suffix in _SUFFIXES and one.is_file())
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None
    if not parts:
        raise OperatorError(f"{file}: has no definitions", "they are in files named *.yaml, *.yml or *.json")
    return [(str(part), part) for part in parts]


def _content(where: str, path: Path | None) -> bytes:
    try:
        return sys.stdin.buffer.read() if path is None else path.read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(where, error) from None


def _unreadable(file: str, error: Exception) -> OperatorError:
    reason = getattr(error, "strerror", None) or "no file can be called so"
    return OperatorError(f"{file}: {reason}", "-f takes a file or a directory, or '-'")


def _define(change: Change, wanted: Definition, report: _Report, *, texts: bool) -> None:
    before = after = ""
    if texts and (found := find_instance(change, wanted.project, wanted.name)) is not None:
        before = _text(change, found)
    try:
        outcome = define(change, wanted)
    except OperatorError as error:
        raise OperatorError(f"{_label(wanted.project, wanted.name)}: {error.message}", error.hint) from None
    if texts and (found := find_instance(change, wanted.project, wanted.name)) is not None:
        after = _text(change, found)
    report(outcome, _label(wanted.project, wanted.name), before, after)


def _prune(
    change: Change, wanted: Iterable[Definition], sources: frozenset[str], force: bool, report: _Report, *, texts: bool
) -> None:
    """Remove what is not defined, of the projects that definitions are of.

    What a fleet has placed here stays. So does what a source owns, unless that is named.
    """
    kept = {(one.project, one.name) for one in wanted}
    for project in sorted({project for project, _name in kept}):
        for one in list_instances(change, project):
            if (one.project, one.name) in kept or (one.source is not None and one.source not in sources):
                continue
            if is_placed(change, one):
                continue
            label = _label(one.project, one.name)
            if one.init is not None and is_alive(one.init) and not force:
                raise ConflictError(f"{label} is not defined, but runs", "--force removes it all the same")
            before = _text(change, one) if texts else ""
            steps.remove(change, one)
            report("removed", label, before, "")


def _text(change: Change, instance: Instance) -> str:
    return to_yaml(as_document(read_definition(change, instance)))


def _difference(before: str, after: str) -> Iterator[str]:
    # Loaded for dry runs alone.
    from difflib import unified_diff

    lines = list(unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=2))
    yield from (f"  {line}" for line in lines[2:])


def _label(project: str, name: str) -> str:
    return name if project == "default" else f"{name} in project {project}"


@contextmanager
def _bars() -> Iterator[_Bar]:
    """Bars on stderr, if that is a terminal: one for each part of the work."""
    if not sys.stderr.isatty():
        yield lambda _what, _total: lambda _count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:

        def begin(what: str, total: int) -> Callable[[int], None]:
            return partial(bars.advance, bars.add_task(what, total=total))

        yield begin
