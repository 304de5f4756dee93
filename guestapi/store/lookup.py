"""Queries of the store at one moment, for the operator's commands and within changes.

Every function takes an object with a connection: a `view.View`, or a `transaction.Change`.
"""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy import Connection, Select, bindparam, func, select

from guestapi.model import Image, Instance, Problem, SourceStatus
from guestapi.names import is_text
from guestapi.store import rows
from guestapi.store.errors import UnknownImageError, UnknownInstanceError
from guestapi.store.layers import Layers
from guestapi.store.tables import image_aliases, images, instances, source_problems, sources

_STATUS = [sources.c[name] for name in ("name", "socket", "connected", "contact", "lag", "fault")]
# PERF: made once; asked for each instance that is added or observed.
_OWNER = select(instances.c.source, instances.c.source_key).where(
    instances.c.project == bindparam("project"), instances.c.name == bindparam("name")
)
_PROBLEM = [source_problems.c[name] for name in ("source", "key", "project", "name", "reason", "hint", "refused")]


class Moment(Protocol):
    """The store at one moment."""

    @property
    def connection(self) -> Connection:
        """For the modules of this room alone."""
        ...


def find_corruption(store: Moment) -> str | None:
    """What is wrong with the database's pages, if anything is; all of them are read."""
    found = str(store.connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
    return None if found == "ok" else " ".join(found.split())


def get_latest_entry(store: Moment) -> int:
    """The id of the change log's last entry, 0 if there was none yet."""
    return rows.latest(store.connection)


def read_entries(store: Moment, after: int, limit: int) -> rows.Entries:
    """Entries of the change log, of all instances; see `rows.entries`."""
    return rows.entries(store.connection, after, limit)


def list_instances(store: Moment, project: str | None = None, *, source: str | None = None) -> list[Instance]:
    """Instances by project and name.

    Args:
        store: where to look.
        project: of this one; None: of all.
        source: that belong to this source; None: of all, and those without.
    """
    if not all(name is None or is_text(name) for name in (project, source)):
        return []
    query = select(instances.c.id).order_by(instances.c.project, instances.c.name)
    if project is not None:
        query = query.where(instances.c.project == project)
    if source is not None:
        query = query.where(instances.c.source == source)
    return _load(store, query)


def find_instance(store: Moment, project: str, name: str) -> Instance | None:
    """The instance of that name, or None."""
    if not (is_text(project) and is_text(name)):
        return None
    query = select(instances.c.id).where(instances.c.project == project, instances.c.name == name)
    return next(iter(_load(store, query)), None)


def find_owner(store: Moment, project: str, name: str) -> tuple[str | None, str | None] | None:
    """Source and key of the instance of that name; None if there is none."""
    if not (is_text(project) and is_text(name)):
        return None
    row = store.connection.execute(_OWNER, {"project": project, "name": name}).first()
    return None if row is None else (row.source, row.source_key)


def find_by_key(store: Moment, source: str, key: str) -> Instance | None:
    """The instance that a source has under a key of its own, or None."""
    query = select(instances.c.id).where(instances.c.source == source, instances.c.source_key == key)
    return next(iter(_load(store, query)), None)


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


def list_sources(store: Moment) -> list[SourceStatus]:
    """How the sources are, by name."""
    query = select(*_STATUS).order_by(sources.c.name)
    return [SourceStatus(*row) for row in store.connection.execute(query)]


def list_problems(store: Moment, source: str | None = None) -> list[Problem]:
    """What could not be taken over, of one source or of all, by source, project and name."""
    columns = source_problems.c
    query = select(*_PROBLEM).order_by(columns.source, columns.project, columns.name, columns.key, columns.number)
    if source is not None:
        query = query.where(columns.source == source)
    return [Problem(*row) for row in store.connection.execute(query)]


def list_images(store: Moment) -> list[Image]:
    """All images, by fingerprint."""
    query = select(images.c.fingerprint).order_by(images.c.fingerprint)
    found = (rows.load_image(store.connection, one) for one in store.connection.execute(query).scalars().all())
    return [image for image in found if image is not None]


def get_image(store: Moment, name: str) -> Image:
    """The image that an operator means: by alias, fingerprint, or the beginning of one fingerprint alone.

    Raises:
        UnknownImageError: there is none, or more than one.
    """
    known = is_text(name)
    alias = select(image_aliases.c.fingerprint).where(image_aliases.c.alias == name)
    found = list(store.connection.execute(alias).scalars()) if known else []
    if not found and name and known:
        begins = func.substr(images.c.fingerprint, 1, len(name)) == name.lower()
        found = list(store.connection.execute(select(images.c.fingerprint).where(begins).limit(2)).scalars())
    if len(found) > 1:
        raise UnknownImageError(f"{name!r} is the beginning of more than one fingerprint", "give more of it")
    image = rows.load_image(store.connection, found[0]) if found else None
    if image is None:
        raise UnknownImageError(f"no image {name!r}", "'guestapi image list' shows all")
    return image


def _load(store: Moment, query: Select[Any]) -> list[Instance]:
    """The instances that `query` has the ids of."""
    found = (rows.load(store.connection, number) for number in store.connection.execute(query).scalars().all())
    return [instance for instance in found if instance is not None]
