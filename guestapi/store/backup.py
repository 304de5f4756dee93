"""Backup and restore of the store while commands, hooks, mirrors and guests go on writing.

1. A backup is what the store held at one moment, as one file. Nobody waits for it.
2. A restore is one transaction of the same steps that every other change takes. So guests hear of what differs,
   revisions and the change log go on growing, and no file is exchanged under a process that has it open.
3. What is a fact of now is not restored: which instances run, how ready they are, what sources say. But an instance
   that the store does not know any more runs if its init, the very process, still does.
4. All or nothing: what cannot be restored is an error before anything is written.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from guestapi.audit import AuditRecord
from guestapi.callers.namespaces import is_alive
from guestapi.errors import OperatorError
from guestapi.model import DAEMONS, Image, Instance
from guestapi.settings import Settings
from guestapi.store import attributes, image_steps, images, notices, permissions, policies, profile_restore, steps
from guestapi.store.attributes import Attribute
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError, explain, explained, missing
from guestapi.store.layers import Layers
from guestapi.store.lookup import (
    find_by_key,
    find_instance,
    get_instance,
    is_placed,
    list_images,
    list_instances,
)
from guestapi.store.migrations import ATTRIBUTES_SINCE, PROFILES_SINCE, check_version
from guestapi.store.notices import SavedNotice
from guestapi.store.permissions import Permission
from guestapi.store.placements import list_placed
from guestapi.store.policies import ScopedPolicy, Spend
from guestapi.store.profile_restore import ProfileExchange, SavedProfiles
from guestapi.store.profiles import ensure_default
from guestapi.store.rows import load_layers
from guestapi.store.transaction import Change
from guestapi.store.view import view
from guestapi.store.writing import Writer

#: What SQLite calls the files that it keeps beside a database (sqlite.org/wal.html).
_COMPANIONS = ("-wal", "-shm")
#: Stands before the name of an instance that is about to get another: no name begins so.
_PARKED = "\0"


@dataclass(frozen=True, slots=True)
class Saved:
    """What a backup holds.

    Attributes:
        instances, images: how many.
        size: bytes of the file.
    """

    instances: int
    images: int
    size: int


@dataclass(slots=True)
class Restored:
    """What a restore did.

    Attributes:
        added, changed, removed: names of instances, with their projects where that is not ``default``.
        missing_images: fingerprints of images that the backup knows and whose files are gone.
        damaged: where the damaged store was put; None if it was whole.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    missing_images: list[str] = field(default_factory=list)
    damaged: Path | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    """An instance of a backup, with both of its layers."""

    instance: Instance
    layers: Layers
    #: The fleet's.
    placed: bool


@dataclass(frozen=True, slots=True)
class _Content:
    entries: list[_Entry]
    images: list[Image]
    #: None: it was written by a version that had none.
    profiles: SavedProfiles | None
    policies: list[ScopedPolicy]
    spends: list[Spend]
    notices: list[SavedNotice]
    #: None: it was written by a version that had none.
    permissions: list[Permission] | None
    attributes: dict[int, list[Attribute]]


def back_up(url: str, target: Path, *, replace: bool = False) -> Saved:
    """Write what the store holds now to a file that root alone can read, and verify it.

    The file appears whole or not at all.

    Args:
        url: ``store.url``.
        target: the file.
        replace: replace the file if there is one.

    Returns:
        What is in it.

    Raises:
        StoreError: the store cannot be read.
        OperatorError: the file cannot be written.
    """
    source = database_file(url)
    if target.is_dir():
        raise OperatorError(f"{target}: is a directory", "give the name of a file in it")
    if not replace and os.path.lexists(target):
        raise _exists(target)
    with _draft(target) as draft:
        _copy_database(source, draft)
        saved = _describe(draft, target)
        _sync(draft)
        try:
            if replace:
                draft.replace(target)
            else:
                # link(2) does not replace what somebody has put there meanwhile.
                target.hardlink_to(draft)
            _sync(target.parent)
        except FileExistsError:
            raise _exists(target) from None
        except OSError as error:
            raise OperatorError(
                f"{target}: cannot be written: {error.strerror}", "give a file in a directory that exists"
            ) from None
    return saved


def restore(
    settings: Settings, file: Path, *, audit: Callable[[Sequence[AuditRecord]], None] | None = None
) -> Restored:
    """Make the store hold what a backup holds, but for what is a fact of now.

    Policies of the backup are added to those that hold; none is taken away, so nothing becomes readable by them.
    Profiles become those of the backup; one that only instances have that are not in it stays.
    Instances are matched by UUID. Those of the backup get its name, its configuration and devices of the operator, its
    profiles, and its cloud-init id; missing ones are added. Instances that were added by hand and are not in the backup
    are removed. What a source provides stays as the source sees it now, and instances of daemons are left to their
    mirrors.

    Args:
        settings: the configuration; the store is made if it is missing, and replaced if it is damaged.
        file: the backup.
        audit: as of `Writer`.

    Returns:
        What was changed.

    Raises:
        OperatorError: the file is no backup, or cannot be restored as a whole. Nothing was changed.
        StoreError: the store cannot be written.
    """
    content = _read(file, database_file(settings.store.url))
    damaged = _put_damaged_aside(database_file(settings.store.url))
    writer = Writer(settings, create=True, audit=audit)
    restored = Restored(damaged=damaged)
    with writer.change() as change:
        exchange = None if content.profiles is None else profile_restore.begin(change, content.profiles)
        _restore_instances(change, content.entries, restored, exchange)
        if exchange is not None:
            profile_restore.finish(change, exchange)
        _restore_policies(change, content)
        _restore_notices(change, content)
        _restore_permissions(change, content)
        _restore_attributes(change, content)
        _restore_images(change, content.images, images.directory(settings), restored)
    return restored


def _restore_instances(
    change: Change, entries: list[_Entry], restored: Restored, exchange: ProfileExchange | None
) -> None:
    # Whether the fleet still has its instances here is for its database to say, not for a backup.
    placed = list_placed(change)
    wanted = {
        one.instance.uuid: one
        for one in entries
        if one.instance.source not in DAEMONS and not one.placed and one.instance.uuid not in placed
    }
    present = {one.uuid: one for one in list_instances(change) if one.uuid not in placed}
    for uuid, instance in present.items():
        if instance.source is None and uuid not in wanted:
            steps.remove(change, instance)
            restored.removed.append(_label(instance))
    pairs: list[tuple[_Entry, Instance | None]] = []
    for uuid, entry in wanted.items():
        found = present.get(uuid)
        if found is None and entry.instance.source is not None and entry.instance.key is not None:
            # The same container, registered anew since: it becomes again what it was.
            found = find_by_key(change, entry.instance.source, entry.instance.key)
            if found is not None and found.uuid in placed:
                # The fleet has taken it over since.
                continue
        pairs.append((entry, found))
    for entry, found in pairs:
        if found is not None and _name(found) != _name(entry.instance):
            steps.park(change, found, f"{_PARKED}{found.id}")
    for entry, found in pairs:
        holder = find_instance(change, *_name(entry.instance))
        if holder is not None and (found is None or holder.id != found.id):
            owner = "the fleet" if holder.uuid in placed else holder.source
            raise OperatorError(
                f"{_label(entry.instance)}: another instance has its name now, of {owner}",
                f"rename or remove that one in {owner} and restore again",
            )
        _restore_instance(change, entry, found, restored, exchange)


def _restore_instance(
    change: Change, entry: _Entry, found: Instance | None, restored: Restored, exchange: ProfileExchange | None
) -> None:
    instance, layers = entry.instance, entry.layers
    added = found is None
    if found is None:
        found = steps.add(
            change,
            instance.project,
            instance.name,
            type=instance.type,
            instance_uuid=instance.uuid,
            location=instance.location,
            source=instance.source,
            key=instance.key,
            hostname=instance.hostname,
            cloud_init_id=instance.cloud_init_id,
        )
        restored.added.append(_label(instance))
        before = Layers()
    else:
        before = load_layers(change.connection, found.id)
    # What a source sees now counts, not what it saw then.
    is_seen = found.source is not None and not added
    if exchange is not None:
        wanted = tuple(exchange.by_saved[one.id] for one in layers.profiles)
    elif added and layers.profiles:
        wanted = (ensure_default(change, instance.project),)
    else:
        wanted = before.profiles
    after = Layers(before.source if is_seen else layers.source, layers.operator, wanted)
    columns: dict[str, object] = {
        "project": instance.project,
        "name": instance.name,
        "uuid": instance.uuid,
        "cloud_init_id": instance.cloud_init_id,
        "kept": instance.kept,
    }
    if not is_seen:
        columns |= {"location": instance.location, "hostname": instance.hostname}
    init = found.init
    if added and instance.init is not None and is_alive(instance.init):
        # The store was lost, not the instance: the very process that was registered still runs.
        init = instance.init
    written = steps.write(change, steps.reload(change, found.id), steps.Wanted(before, after, init, columns))
    if written.revision != found.revision and not added:
        restored.changed.append(_label(instance))


def _restore_policies(change: Change, content: _Content) -> None:
    """Have the policies of a backup hold, besides those that hold; and what was given once, stay given."""
    uuids = {one.instance.id: one.instance.uuid for one in content.entries}
    for project, name, policy in content.policies:
        instance = None if name is None else find_instance(change, project, name)
        if name is None or instance is not None:
            policies.put(change, project, instance, policy)
    for one in content.spends:
        number = steps.find_by_uuid(change, uuids[one.instance_id])
        if number is not None and one.spent:
            policies.mark_spent(change, number, one)


def _restore_notices(change: Change, content: _Content) -> None:
    """Announce again what is not past, to instances that are in the run that the backup knew."""
    saved = {one.instance.id: one.instance for one in content.entries}
    for notice in content.notices:
        then = saved[notice.instance_id]
        number = steps.find_by_uuid(change, then.uuid)
        if number is not None and then.init is not None and steps.reload(change, number).init == then.init:
            notices.put_back(change, steps.reload(change, number), notice)


def _restore_permissions(change: Change, content: _Content) -> None:
    """Allow what was allowed then, and no more, but to instances that the backup does not know."""
    if content.permissions is None:
        return
    uuids = {(one.instance.project, one.instance.name): one.instance.uuid for one in content.entries}
    wanted: dict[Permission, Instance | None] = {}
    for one in content.permissions:
        if one.instance is None:
            wanted[one] = None
        elif (number := steps.find_by_uuid(change, uuids[one.project, one.instance])) is not None:
            found = steps.reload(change, number)
            wanted[Permission(found.project, found.name, one.feature)] = found
    for one in permissions.list_permissions(change):
        instance = None if one.instance is None else get_instance(change, one.project, one.instance)
        if one not in wanted and (instance is None or instance.uuid in uuids.values()):
            permissions.disallow(change, one.project, instance, one.feature)
    for one, instance in wanted.items():
        permissions.allow(change, one.project, instance, one.feature)


def _restore_attributes(change: Change, content: _Content) -> None:
    """Have instances say again what they said of themselves, if they say nothing now."""
    for entry in content.entries:
        number = steps.find_by_uuid(change, entry.instance.uuid)
        if number is not None and (said := content.attributes.get(entry.instance.id)):
            attributes.put_back(change, steps.reload(change, number), said)


def _restore_images(change: Change, wanted: list[Image], where: Path, restored: Restored) -> None:
    present = {one.fingerprint: one for one in list_images(change)}
    own = [one for one in wanted if one.source not in DAEMONS]
    for image in present.values():
        # First: an alias may have gone from one image to another.
        if image.source not in DAEMONS:
            image_steps.set_image(change, image, remove_aliases=image.aliases)
    taken = {alias for one in present.values() if one.source in DAEMONS for alias in one.aliases}
    for image in own:
        aliases = [alias for alias in image.aliases if alias not in taken]
        if (found := present.get(image.fingerprint)) is not None:
            bare = Image(found.fingerprint, found.type, found.public, found.cached, found.created, found.files, ())
            image_steps.set_image(change, bare, public=image.public, cached=image.cached, add_aliases=aliases)
        elif _has_files(where, image):
            image_steps.add_image(change, image)
        else:
            restored.missing_images.append(image.fingerprint)
    for fingerprint in present.keys() - {one.fingerprint for one in own}:
        image = present[fingerprint]
        if image.source not in DAEMONS:
            # Imported since, its files are there: it keeps the names that nobody else has.
            bare = Image(fingerprint, image.type, image.public, image.cached, image.created, image.files, ())
            free = [alias for alias in image.aliases if not any(alias in one.aliases for one in own)]
            image_steps.set_image(change, bare, add_aliases=free)


def _has_files(where: Path, image: Image) -> bool:
    try:
        for descriptor in images.open_files(where, image):
            os.close(descriptor)
    except images.ImageFileError:
        return False
    return True


def _read(file: Path, live: Path) -> _Content:
    """Everything that a backup holds, verified, and upgraded if an older version wrote it; the file stays as it is."""
    with tempfile.TemporaryDirectory(prefix="guestapi-restore-") as directory:
        copy = Path(directory, "backup.db")
        try:
            if live.exists() and file.samefile(live):
                raise OperatorError(f"{file}: is the store itself", "give the file of a backup")
            shutil.copyfile(file, copy)
            # A plain copy of a store has what was committed last beside it.
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{file}-wal", f"{copy}-wal")
        except OSError as error:
            raise OperatorError(
                f"{file}: cannot be read: {error.strerror}", "give a file of 'guestapi backup'"
            ) from None
        try:
            with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
                fault = _find_fault(connection)
                if fault is None:
                    (version,) = connection.execute("PRAGMA user_version").fetchone()
                    check_version(connection, file, create=False)
        except sqlite3.Error as error:
            fault = str(error)
        if fault is not None:
            raise OperatorError(
                f"{file}: is not a backup of guestapi, or is damaged: {fault}",
                "nothing was changed; give the file of a backup",
            )
        with view(f"sqlite:///{copy}") as store:
            entries = [
                _Entry(one, load_layers(store.connection, one.id), is_placed(store, one))
                for one in list_instances(store)
            ]
            saved = None if version < PROFILES_SINCE else profile_restore.read_saved(store)
            kept = policies.list_policies(store), policies.list_spends(store), notices.read_saved(store)
            allowed = None if version < ATTRIBUTES_SINCE else permissions.list_permissions(store)
            said = attributes.read_saved(store)
            return _Content(entries, list_images(store), saved, *kept, allowed, said)


def _put_damaged_aside(database: Path) -> Path | None:
    """Rename a store that is not a database any more, so that a new one can be made; where it is then."""
    if not database.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
            fault = _find_fault(connection)
    except sqlite3.OperationalError as error:
        raise explain(error, database) from None
    except sqlite3.DatabaseError as error:
        fault = str(error)
    if fault is None:
        return None
    aside = database.with_name(f"{database.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
    try:
        # Under no name, it can be opened by nobody else; what was committed last goes with it.
        database.rename(aside)
        for companion in _COMPANIONS:
            with suppress(FileNotFoundError):
                Path(f"{database}{companion}").rename(f"{aside}{companion}")
    except OSError as error:
        raise StoreError(f"{database}: is damaged ({fault}) and cannot be put aside: {error.strerror}") from None
    return aside


def _find_fault(connection: sqlite3.Connection) -> str | None:
    """What is wrong with a database's pages and references; None if nothing is."""
    found = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
    if found != "ok":
        return " ".join(found.split())
    broken = connection.execute("PRAGMA foreign_key_check").fetchone()
    return None if broken is None else f"table {broken[0]} refers to what is not there"


def _copy_database(source: Path, draft: Path) -> None:
    if not source.exists():
        raise missing(source)
    with explained(source), closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True)) as live:
        check_version(live, source, create=False)
        with closing(sqlite3.connect(draft)) as copy:
            live.backup(copy)
            # One file: nothing is left beside it.
            copy.execute("PRAGMA journal_mode = DELETE")


def _describe(draft: Path, target: Path) -> Saved:
    with explained(target), closing(sqlite3.connect(draft)) as copy:
        fault = _find_fault(copy)
        if fault is not None:
            raise StoreError(f"the store is damaged: {fault}", "'guestapi restore FILE' puts an earlier backup back")
        counts = [copy.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("instances", "images")]
    return Saved(counts[0], counts[1], draft.stat().st_size)


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A new empty file beside `target`, which is gone afterwards."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise OperatorError(
            f"{target}: cannot be written: {error.strerror}", "give a file in a directory that exists"
        ) from None
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
    finally:
        for path in (draft, *(Path(f"{draft}{companion}") for companion in (*_COMPANIONS, "-journal"))):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(target: Path) -> OperatorError:
    return OperatorError(f"{target}: is there already", "--force replaces it")


def _name(instance: Instance) -> tuple[str, str]:
    return instance.project, instance.name


def _label(instance: Instance) -> str:
    return instance.name if instance.project == "default" else f"{instance.name} in project {instance.project}"
