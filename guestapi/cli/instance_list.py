"""``guestapi instance list``: which instances there are, with the columns and of the kind that were asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping

import click

from guestapi.cli.common import Operator, has_truncate, print_json, print_table
from guestapi.cli.fleet_options import takes_host
from guestapi.cli.grouping import FleetVerb, project_of, takes_project
from guestapi.cli.printing import print_csv, print_yaml
from guestapi.cli.words import MisuseError
from guestapi.errors import OperatorError
from guestapi.key_policy import blanked
from guestapi.model import Instance
from guestapi.store.lookup import list_instances, list_projects

#: What can be shown and filtered by: its word, its letter for --columns, and how it is had.
_PROPERTIES: Mapping[str, tuple[str, Callable[[Instance], str]]] = {
    "project": ("e", lambda one: one.project),
    "name": ("n", lambda one: one.name),
    "type": ("t", lambda one: one.type),
    "status": ("s", lambda one: _operator().status(one)),
    "ready": ("r", lambda one: "Ready" if one.ready else ""),
    "pid": ("p", lambda one: str(one.init.pid) if one.init else ""),
    "source": ("o", lambda one: one.source or ""),
    "uuid": ("u", lambda one: one.uuid),
    "location": ("L", lambda one: one.location or ""),
    "hostname": ("h", lambda one: one.host_name),
    "key": ("k", lambda one: one.key or ""),
    "profiles": ("P", lambda one: ",".join(one.profiles)),
}
#: What cannot be had of a fleet's instances, and what is shown of them by default.
_OF_THIS_HOST = frozenset({"pid", "source", "hostname", "key"})
_DEFAULT_OF_FLEET = "entsrL"
_LETTERS = {letter: word for word, (letter, _get) in _PROPERTIES.items()}
_DEFAULT = "entsrpo"
#: The values that some properties can have: another one is a slip.
_VALUES = {
    "status": ("running", "stopped", "dead", "unknown"),
    "type": ("container", "virtual-machine"),
    "ready": ("Ready", ""),
}


@click.command(name="list", cls=FleetVerb)
@takes_project("Of this project alone.")
@click.argument("filter_", metavar="[FILTER]...", nargs=-1)
@click.option(
    "-c",
    "--columns",
    metavar="COLUMNS",
    help=f"Default: {_DEFAULT}, with --fleet {_DEFAULT_OF_FLEET}. Letters: "
    f"{', '.join(f'{letter} {word}' for letter, word in _LETTERS.items())}. With commas, also keys.",
)
@click.option(
    "-f",
    "--format",
    "form",
    type=click.Choice(["table", "compact", "csv", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print. A table in a pipe has no lines.",
)
@takes_host("With --fleet: of this host alone.")
@has_truncate
@click.pass_context
def list_(ctx: click.Context, filter_: tuple[str, ...], columns: str | None, form: str, truncate: bool) -> None:
    """List instances, whether they run, and the source that each belongs to.

    A FILTER is the beginning of a name, a pattern of names, or KEY=VALUE: status=running, type=container, or a key of
    the configuration. All must be met; VALUE can be a pattern.
    """
    operator: Operator = ctx.obj
    shown = _columns(columns or (_DEFAULT_OF_FLEET if operator.is_fleet else _DEFAULT))
    if operator.is_fleet and (foreign := sorted(_OF_THIS_HOST & {*shown, *(_key(word) for word in filter_)})):
        raise MisuseError(f"a fleet knows no {foreign[0]} of an instance", "its host does")
    conditions = [_condition(word) for word in filter_]
    found = _find(operator, project_of(ctx), whole=form in ("json", "yaml") or _has_keys(shown, filter_))
    found = [one for one in found if all(met(one) for met in conditions)]
    if form == "json":
        print_json([operator.described(one) for one in found])
    elif form == "yaml":
        print_yaml([operator.described(one) for one in found])
    else:
        headings = [word.upper() if word in _PROPERTIES else word for word in shown]
        rows = [[_value(one, word) for word in shown] for one in found]
        if form == "csv":
            print_csv(headings, rows)
        else:
            print_table(headings, rows, truncate=truncate, compact=form == "compact")


def _operator() -> Operator:
    found: Operator = click.get_current_context().obj
    return found


def _find(operator: Operator, project: str | None, *, whole: bool) -> list[Instance]:
    """All instances of a project, or of all projects; not `whole`: their configuration is not needed."""
    if operator.is_fleet:
        found = operator.fleet.list_instances(project, whole=whole)
        if not found and project not in (None, "default"):
            _check_project(project, operator.list_projects())
        return found
    with operator.view() as store:
        if project not in (None, "default"):
            _check_project(project, list_projects(store))
        return list_instances(store, project)


def _check_project(project: str | None, known: Collection[str]) -> None:
    if project not in known:
        raise OperatorError(f"no project {project!r}", "'guestapi project list' shows all")


def _has_keys(shown: Iterable[str], filters: Iterable[str]) -> bool:
    """Whether keys of the configuration, or profiles, are shown or filtered by."""
    words = (*shown, *(_key(word) for word in filters if "=" in word))
    return any("." in word or word == "profiles" for word in words)


def _key(word: str) -> str:
    """What a filter is about; a name has none."""
    key, equals, _value = word.partition("=")
    return key if equals else ""


def _columns(words: str) -> list[str]:
    """The columns that were asked for: ``nst``, ``n,s,t``, ``name,status``, or keys like ``n,user.role``."""
    parts: Iterable[str] = [part for part in words.split(",") if part] if "," in words or "." in words else words
    found: list[str] = []
    for part in parts:
        if part in _PROPERTIES or "." in part:
            found.append(part)
        elif all(letter in _LETTERS for letter in part):
            found += [_LETTERS[letter] for letter in part]
        else:
            named = ", ".join(f"{letter} ({word})" for letter, word in _LETTERS.items())
            raise MisuseError(
                f"--columns: {part!r} is not a column", f"there are {named}, and keys such as n,user.role"
            )
    if not found:
        raise MisuseError("--columns: no column is named", f"the default is {_DEFAULT}")
    return found


def _condition(word: str) -> Callable[[Instance], bool]:
    key, equals, value = word.partition("=")
    if not equals:
        return lambda one: one.name.startswith(word) or fnmatch.fnmatchcase(one.name, word)
    if key not in _PROPERTIES and "." not in key:
        raise MisuseError(
            f"{word!r}: there is nothing that is called {key!r}",
            f"filters are NAME, a key of the configuration, or one of {', '.join(_PROPERTIES)}",
        )
    known = _VALUES.get(key)
    if known is not None and not any(fnmatch.fnmatchcase(one.lower(), value.lower()) for one in known):
        raise MisuseError(f"{word!r}: {key} is never {value!r}", f"it is one of {', '.join(filter(None, known))}")
    if known is not None:
        return lambda one: fnmatch.fnmatchcase(_value(one, key).lower(), value.lower())
    return lambda one: fnmatch.fnmatchcase(_value(one, key), value)


def _value(one: Instance, word: str) -> str:
    if word in _PROPERTIES:
        return _PROPERTIES[word][1](one)
    return blanked(one, {word: one.config.get(word, "")})[word]
