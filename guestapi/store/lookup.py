"""Queries of the store at one moment, for the operator's commands and within changes.

Every function takes an object with a connection: a `view.View`, or a `transaction.Change`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from guestapi.model import Instance
from guestapi.names import is_text
from guestapi.store import rows
from guestapi.store.errors import UnknownImageError, UnknownInstanceError
from guestapi.store.layers import Layers

if TYPE_CHECKING:
    from guestapi.records import Image, Notification, Problem, SourceStatus

_PLACED = "SELECT 1 FROM placements WHERE instance_id = ?"
_OWNER = "SELECT source, source_key FROM instances WHERE project = ? AND name = ?"
_STATUSES = "SELECT name, socket, connected, contact, lag, fault FROM sources ORDER BY name"
_PROBLEMS = (
    "SELECT source, key, project, name, reason, hint, refused FROM source_problems "
    "WHERE :source IS NULL OR source = :source ORDER BY source, project, name, key, number"
)


class Moment(Protocol):
    """The store at one moment."""

    @property
    def connection(self) -> sqlite3.Connection:
        """For the modules of this room alone."""
        ...


def find_corruption(store: Moment) -> str | None:
    """What is wrong with the database's pages, if anything is; all of them are read."""
    found = str(store.connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    return None if found == "ok" else " ".join(found.split())


def get_latest_entry(store: Moment) -> int:
    """The id of the change log's last entry, 0 if there was none yet."""
    return rows.latest(store.connection)


def has_entries(store: Moment, project: str, name: str | None = None) -> bool:
    """Whether the change log tells of a project, or of an instance of that name in it, which may be gone."""
    if not all(text is None or is_text(text) for text in (project, name)):
        return False
    query = "SELECT 1 FROM notifications WHERE project = ? AND (? IS NULL OR instance = ?) LIMIT 1"
    return store.connection.execute(query, (project, name, name)).fetchone() is not None


def read_entries(store: Moment, after: int, limit: int) -> rows.Entries:
    """Entries of the change log, of all instances, with all their metadata; see `rows.entries`."""
    read = rows.entries(store.connection, after, limit)
    found: list[Notification] = []
    size = 0
    for entry in read.found:
        if size > rows.ENTRIES_BYTES:
            break
        found.append(rows.complete(store.connection, entry))
        size += entry.left_out
    return read._replace(found=found, more=read.more or len(found) < len(read.found))


def list_instances(store: Moment, project: str | None = None, *, source: str | None = None) -> list[Instance]:
    """Instances by project and name.

    Args:
        store: where to look.
        project: of this one; None: of all.
        source: that belong to this source; None: of all, and those without.
    """
    if not all(name is None or is_text(name) for name in (project, source)):
        return []
    wanted = {"project": project, "source": source}
    where = " AND ".join(f"{column} = :{column}" for column, value in wanted.items() if value is not None) or "1"
    return load_all(store, f"SELECT id FROM instances WHERE {where} ORDER BY project, name", wanted)


def list_projects(store: Moment) -> dict[str, int]:
    """The projects, and how many instances each has; ``default`` is always there."""
    query = "SELECT project, count(*) FROM instances GROUP BY project"
    return dict(sorted({"default": 0, **dict(store.connection.execute(query))}.items()))


def find_instance(store: Moment, project: str, name: str) -> Instance | None:
    """The instance of that name, or None."""
    if not (is_text(project) and is_text(name)):
        return None
    found = load_all(store, "SELECT id FROM instances WHERE project = ? AND name = ?", (project, name))
    return next(iter(found), None)


def find_owner(store: Moment, project: str, name: str) -> tuple[str | None, str | None] | None:
    """Source and key of the instance of that name; None if there is none."""
    if not (is_text(project) and is_text(name)):
        return None
    row = store.connection.execute(_OWNER, (project, name)).fetchone()
    return None if row is None else (row[0], row[1])


def find_by_key(store: Moment, source: str, key: str) -> Instance | None:
    """The instance that a source has under a key of its own, or None."""
    found = load_all(store, "SELECT id FROM instances WHERE source = ? AND source_key = ?", (source, key))
    return next(iter(found), None)


def find_by_place(store: Moment, place: int) -> list[Instance]:
    """The instances that are registered with a PID namespace or a CID (`Init.namespace`)."""
    return load_all(store, "SELECT id FROM instances WHERE init_namespace = ?", (place,))


def get_instance(store: Moment, project: str, name: str) -> Instance:
    """The instance of that name.

    Raises:
        UnknownInstanceError: there is none.
    """
    found = find_instance(store, project, name)
    if found is None:
        where = "" if project == "default" else f" in project {project!r}"
        raise UnknownInstanceError(f"no instance {name!r}{where}", "'guestapi instance list' shows all")
    return found


def get_layers(store: Moment, instance: Instance) -> Layers:
    """Configuration and devices of an instance by the layer that they come from."""
    return rows.load_layers(store.connection, instance.id)


def is_placed(store: Moment, instance: Instance) -> bool:
    """Whether a fleet has placed an instance here (`placements`)."""
    # PERF: here, because a command that sets a key asks for nothing else of a fleet.
    return store.connection.execute(_PLACED, (instance.id,)).fetchone() is not None


def list_sources(store: Moment) -> list[SourceStatus]:
    """How the sources are, by name."""
    # PERF: loaded where it is asked for, as below.
    from guestapi.records import SourceStatus

    return [
        SourceStatus(name, socket, bool(connected), contact, lag, fault)
        for name, socket, connected, contact, lag, fault in store.connection.execute(_STATUSES)
    ]


def list_problems(store: Moment, source: str | None = None) -> list[Problem]:
    """What could not be taken over, of one source or of all, by source, project and name."""
    return [problem_of(row) for row in store.connection.execute(_PROBLEMS, {"source": source})]


def problem_of(row: tuple[Any, ...]) -> Problem:
    """The problem that the columns of a row of ``source_problems`` from ``source`` to ``refused`` tell of."""
    from guestapi.records import Problem

    source, key, project, name, reason, hint, refused = row
    return Problem(source, key, project, name, reason, hint, bool(refused))


def count_instances(store: Moment) -> tuple[int, int]:
    """How many instances there are, and how many of them run."""
    row = store.connection.execute("SELECT count(*), count(init_pid) FROM instances").fetchone()
    return row[0], row[1]


def name_instances(store: Moment, numbers: Iterable[int]) -> dict[int, tuple[str, str]]:
    """Project and name of instances, by their ids; those that are gone are not among them."""
    query = "SELECT id, project, name FROM instances WHERE id IN (SELECT value FROM json_each(?))"
    rows = store.connection.execute(query, (f"[{','.join(map(str, numbers))}]",))
    return {number: (project, name) for number, project, name in rows}


def count_entries(store: Moment) -> int:
    """How many entries the change log holds."""
    return int(store.connection.execute("SELECT count(*) FROM notifications").fetchone()[0])


def list_images(store: Moment) -> list[Image]:
    """All images, by fingerprint."""
    known = store.connection.execute("SELECT fingerprint FROM images ORDER BY fingerprint").fetchall()
    found = (rows.load_image(store.connection, one) for (one,) in known)
    return [image for image in found if image is not None]


def get_image(store: Moment, name: str) -> Image:
    """The image that an operator means: by alias, fingerprint, or the beginning of one fingerprint alone.

    Raises:
        UnknownImageError: there is none, or more than one.
    """
    known = is_text(name)
    alias = "SELECT fingerprint FROM image_aliases WHERE alias = ?"
    found = store.connection.execute(alias, (name,)).fetchall() if known else []
    if not found and name and known:
        begins = "SELECT fingerprint FROM images WHERE substr(fingerprint, 1, ?) = ? LIMIT 2"
        found = store.connection.execute(begins, (len(name), name.lower())).fetchall()
    if len(found) > 1:
        raise UnknownImageError(f"{name!r} is the beginning of more than one fingerprint", "give more of it")
    image = rows.load_image(store.connection, found[0][0]) if found else None
    if image is None:
        raise UnknownImageError(f"no image {name!r}", "'guestapi image list' shows all")
    return image


def load_all(store: Moment, query: str, parameters: Sequence[object] | Mapping[str, object]) -> list[Instance]:
    """The instances that a query has the ids of."""
    numbers = store.connection.execute(query, parameters).fetchall()
    found = (rows.load(store.connection, number) for (number,) in numbers)
    return [instance for instance in found if instance is not None]
