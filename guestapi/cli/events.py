"""``guestapi events``: the change log as it grows, of all instances and everything that happens to them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from guestapi.cli.common import Operator, complete_instance, given_project
from guestapi.cli.grouping import Verb, project_of, takes_project
from guestapi.cli.words import MisuseError, printable
from guestapi.errors import OperatorError
from guestapi.model import Notification
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import get_instance, get_latest_entry, has_entries, list_projects, read_entries

_TYPES = frozenset({"attribute", "config", "device", "lifecycle", "notice"})

#: Entries that are read at a time, and seconds after which to look although the bell did not ring.
_BATCH, _LOOK_SECONDS = 256, 1.0


@click.command(cls=Verb)
@takes_project("Of this project alone; with NAME: default.")
@click.argument("name", required=False, shell_complete=complete_instance)
@click.option(
    "--type", "types", metavar="TYPE[,TYPE]...", help="Of these alone: attribute, config, device, lifecycle, notice."
)
@click.option("--since", type=click.IntRange(min=0), metavar="ID", help="Begin after this entry; 0: with the oldest.")
@click.option("-f", "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def events(ctx: click.Context, name: str | None, types: str | None, since: int | None, form: str) -> None:
    """Follow what happens to instances, of NAME or of all, until interrupted."""
    wanted = frozenset(types.split(",")) if types else None
    if unknown := (wanted or frozenset()) - _TYPES:
        raise MisuseError(f"--type {min(unknown)!r} is none of {', '.join(sorted(_TYPES))}")
    operator: Operator = ctx.obj
    project = project_of(ctx) if name is None else given_project(ctx)
    if project is not None:
        _refuse_unknown(operator, project, name)
    try:
        for entry in _follow(operator, since):
            if isinstance(entry, str):
                click.echo(entry, err=True)
            elif (
                name in (None, entry.instance)
                and project in (None, entry.project)
                and (not wanted or entry.type in wanted)
            ):
                click.echo(_as_json(entry) if form == "json" else _as_text(entry))
    except KeyboardInterrupt:
        pass  # This is how one ends it.


def _refuse_unknown(operator: Operator, project: str, name: str | None) -> None:
    """Refuse a project or an instance that is neither there nor in the log: nothing would ever be printed."""
    with operator.view() as store:
        if has_entries(store, project, name):
            return
        if name is not None:
            get_instance(store, project, name)
        elif project not in list_projects(store):
            raise OperatorError(f"no project {project!r}", "'guestapi project list' shows all")


def _follow(operator: Operator, since: int | None) -> Iterator[Notification | str]:
    """Entries as they come, and a sentence where some are missing."""
    with operator.view() as store:
        latest = get_latest_entry(store)
    try:
        doorbell = Doorbell(database_file(operator.settings.store.url))
    except OSError as error:
        raise StoreError(f"the store's directory cannot be watched: {error.strerror}") from None
    position = latest if since is None else since
    while True:
        with operator.view() as store:
            if position > get_latest_entry(store):
                yield f"the log does not reach up to {position}, only to {get_latest_entry(store)}"
                position = 0
            entries = read_entries(store, position, _BATCH)
        if entries.oldest > position + 1:
            yield f"the log does not reach back to {position + 1}, only to {entries.oldest}"
            position = entries.oldest - 1
        for entry in entries.found:
            yield entry
            position = entry.id
        if not entries.more:
            doorbell.wait(_LOOK_SECONDS)


def _as_json(entry: Notification) -> str:
    document = {
        "id": entry.id,
        "timestamp": entry.timestamp,
        "project": entry.project,
        "instance": entry.instance,
        "type": entry.type,
        "metadata": json.loads(entry.metadata),
    }
    return json.dumps(document, ensure_ascii=False)


def _as_text(entry: Notification) -> str:
    metadata = json.loads(entry.metadata)
    if entry.type == "config":
        what = f"{metadata['key']}: {metadata['old_value']!r:.60} -> {metadata['value']!r:.60}"
    elif entry.type == "device":
        what = f"{metadata['name']} {metadata['action']}"
    elif entry.type == "attribute":
        what = f"{metadata['path']} {metadata['action']}"
    elif entry.type == "notice":
        what = f"{metadata['id']} {metadata['status']}: {metadata['type']} {metadata['text']}".rstrip()
    elif metadata["action"] == "key-spent":
        what = f"key-spent {metadata['key']}, pid {metadata['pid']} of user {metadata['uid']}"
    else:
        what = metadata["action"]
    return printable(f"{entry.timestamp} {entry.id} {entry.project}/{entry.instance} {entry.type} {what}")
