"""The store at one moment, for the operator's command and for whoever writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, func, select

from guestapi.model import Image, Instance, Mirror
from guestapi.names import is_text
from guestapi.store.engine import database_file, open_reader
from guestapi.store.errors import UnknownImageError, UnknownInstanceError, explained
from guestapi.store.rows import Entries, entries, latest, load, load_image, snapshot
from guestapi.store.tables import image_aliases, images, instances, mirrors

_MIRROR = [mirrors.c[name] for name in ("name", "socket", "connected", "contact", "lag", "fault")]


class View:
    """The store at one moment, for the operator's command.

    Attributes:
        connection: for the modules of this room alone.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def fault(self) -> str | None:
        """What is wrong with the database's pages, if anything is; all of them are read."""
        found = str(self.connection.exec_driver_sql("PRAGMA quick_check(1)").scalar())
        return None if found == "ok" else " ".join(found.split())

    def latest(self) -> int:
        """As the function `latest`."""
        return latest(self.connection)

    def entries(self, after: int, limit: int) -> Entries:
        """As the function `entries`, of all instances."""
        return entries(self.connection, after, limit)

    def instances(self, project: str | None = None) -> list[Instance]:
        """All instances, of one project or of all, by project and name."""
        if project is not None and not is_text(project):
            return []
        query = select(instances.c.id).order_by(instances.c.project, instances.c.name)
        if project is not None:
            query = query.where(instances.c.project == project)
        found = (load(self.connection, number) for number in self.connection.execute(query).scalars().all())
        return [instance for instance in found if instance is not None]

    def find(self, project: str, name: str) -> Instance | None:
        """The instance of that name, or None."""
        if not (is_text(project) and is_text(name)):
            return None
        query = select(instances.c.id).where(instances.c.project == project, instances.c.name == name)
        number = self.connection.execute(query).scalar()
        return None if number is None else load(self.connection, number)

    def instance(self, project: str, name: str) -> Instance:
        """The instance of that name.

        Raises:
            UnknownInstanceError: there is none.
        """
        found = self.find(project, name)
        if found is None:
            where = "" if project == "default" else f" in project {project!r}"
            raise UnknownInstanceError(f"no instance {name!r}{where}; 'guestapi instance list' shows all")
        return found

    def mirrors(self) -> list[Mirror]:
        """How the mirrors of daemons are, by name."""
        query = select(*_MIRROR).order_by(mirrors.c.name)
        return [Mirror(*row) for row in self.connection.execute(query)]

    def images(self) -> list[Image]:
        """All images, by fingerprint."""
        found = self.connection.execute(select(images.c.fingerprint).order_by(images.c.fingerprint)).scalars().all()
        return [image for one in found if (image := load_image(self.connection, one)) is not None]

    def image(self, name: str) -> Image:
        """The image that an operator means: by alias, fingerprint, or the beginning of one fingerprint alone.

        Raises:
            UnknownImageError: there is none, or more than one.
        """
        known = is_text(name)
        alias = select(image_aliases.c.fingerprint).where(image_aliases.c.alias == name)
        found = list(self.connection.execute(alias).scalars()) if known else []
        if not found and name and known:
            begins = func.substr(images.c.fingerprint, 1, len(name)) == name.lower()
            found = list(self.connection.execute(select(images.c.fingerprint).where(begins).limit(2)).scalars())
        if len(found) > 1:
            raise UnknownImageError(f"{name!r} is the beginning of more than one fingerprint; give more of it")
        image = load_image(self.connection, found[0]) if found else None
        if image is None:
            raise UnknownImageError(f"no image {name!r}; 'guestapi image list' shows all")
        return image


class Views:
    """Looks at the store again and again: it is opened, and each statement compiled, once."""

    def __init__(self, url: str) -> None:
        """Args:
        url: ``store.url``.

        Raises:
            StoreError: the store is missing or cannot be used.
        """
        self._file = database_file(url)
        self._engine = open_reader(url)

    @contextmanager
    def view(self) -> Iterator[View]:
        """Look at the store as it is now, and stays until the end of the block.

        Raises:
            StoreError: it cannot be used any more.
        """
        with explained(self._file), self._engine.connect() as connection, snapshot(connection):
            yield View(connection)


@contextmanager
def view(url: str) -> Iterator[View]:
    """Look once at the store at the SQLAlchemy URL `url`; as `Views` does.

    Raises:
        StoreError: it is missing or cannot be used.
    """
    with Views(url).view() as store:
        yield store
