"""What the mirror of a running daemon writes: its instances as the daemon has them, and how the mirror itself is.

Steps of a `Change`, as those in `writing`. A mirror touches what it has brought, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from uuid import UUID, uuid5

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from guestapi.model import Device, Init, Instance, InstanceType, Mirror
from guestapi.store.errors import ConflictError
from guestapi.store.rows import load
from guestapi.store.tables import instances, mirrors
from guestapi.store.view import View
from guestapi.store.writing import Change


@dataclass(frozen=True, slots=True)
class Mirrored:
    """An instance as its daemon has it now. Attributes as of `model.Instance`.

    ``ready``: what the daemon holds; None: it does not hold that at all.
    """

    project: str
    name: str
    type: InstanceType
    uuid: str
    cloud_init_id: str
    location: str | None
    ready: bool | None
    config: Mapping[str, str]
    devices: Mapping[str, Device]
    init: Init | None


def mirror(change: Change, source: str, wanted: Mirrored) -> None:
    """Make an instance as `wanted`; what is so already is left alone.

    Args:
        change: the transaction.
        source: name of the mirror.
        wanted: the instance.

    Raises:
        ConflictError: there is an instance of that name that the mirror has not brought.
        InvalidNameError: a name or value cannot be taken.
    """
    instance = change.find(wanted.project, wanted.name)
    if instance is not None and instance.source != source:
        whose = f"of the mirror {instance.source!r}" if instance.source else "added by hand or by a hook"
        raise ConflictError(f"instance {wanted.name!r} in project {wanted.project!r} is there already, {whose}")
    if instance is not None and instance.uuid != wanted.uuid:
        # Deleted, and another made in its place: nothing of the old one is the new one's.
        change.remove(instance)
        instance = None
    if instance is None:
        instance = _renamed(change, source, wanted) or change.add(
            wanted.project, wanted.name, type=wanted.type, instance_uuid=wanted.uuid, source=source
        )
    if instance.init is not None and instance.init != wanted.init:
        # First: whoever listened there is gone, and hears of no change that was made since.
        instance = change.stop(instance)
    instance = change.replace(
        instance,
        config=wanted.config,
        devices=wanted.devices,
        cloud_init_id=wanted.cloud_init_id,
        location=wanted.location,
    )
    if wanted.init is not None:
        instance = change.start(instance, wanted.init)
        if wanted.ready is not None:
            _merge_ready(change, instance, wanted.ready)


def with_own_uuid(view: View, source: str, wanted: Mirrored, is_there: Callable[[tuple[str, str]], bool]) -> Mirrored:
    """An instance with a UUID that no other one has.

    Two of a daemon's may have one: a backup that is imported beside its original keeps it.

    Args:
        view: the store.
        source: name of the mirror.
        wanted: the instance, with the daemon's UUID.
        is_there: whether the daemon has an instance of that project and name.
    """
    name = f"{wanted.project}/{wanted.name}"
    own = replace(wanted, uuid=str(uuid5(UUID(wanted.uuid), name)))
    query = select(instances.c.project, instances.c.name, instances.c.uuid, instances.c.source)
    found = view.connection.execute(query.where(instances.c.uuid.in_([wanted.uuid, own.uuid]))).all()
    if any(row.uuid == own.uuid for row in found):
        # Once it has that, it keeps it, even if the other one is gone.
        return own
    for row in found:
        key = row.project, row.name
        if key != (wanted.project, wanted.name) and (row.source != source or is_there(key)):
            return own
    return wanted


def is_same(instance: Instance, wanted: Mirrored) -> bool:
    """Whether the store has an instance as the daemon has it; then `mirror` would change nothing."""
    ready = wanted.ready is None or wanted.ready == instance.ready
    same = (getattr(instance, one.name) == getattr(wanted, one.name) for one in fields(Mirrored) if one.name != "ready")
    return ready and all(same)


def unsaid(view: View, source: str) -> list[Instance]:
    """Which instances of a mirror have said something of their readiness that their daemon does not know yet."""
    query = select(instances.c.id).where(
        instances.c.source == source,
        instances.c.init_pid.is_not(None),
        instances.c.told_ready.is_not(None),
        instances.c.told_ready != instances.c.ready,
    )
    found = (load(view.connection, number) for number in view.connection.execute(query).scalars().all())
    return [instance for instance in found if instance is not None]


def note_said(change: Change, said: Instance) -> None:
    """The daemon knows now what the instance, as it was then, had said."""
    change.connection.execute(
        update(instances).where(instances.c.id == said.id, instances.c.run == said.run).values(told_ready=said.ready)
    )


def count(view: View, source: str) -> tuple[int, int]:
    """How many instances a mirror has brought, and how many of them run as far as is known."""
    query = select(func.count(), func.count(instances.c.init_pid)).where(instances.c.source == source)
    total, running = view.connection.execute(query).one()
    return total, running


def note_mirror(change: Change, mirror: Mirror) -> None:
    """Write down how a mirror is."""
    values = {name: getattr(mirror, name) for name in ("name", "socket", "connected", "contact", "lag", "fault")}
    statement = insert(mirrors).values(values)
    change.connection.execute(statement.on_conflict_do_update(index_elements=[mirrors.c.name], set_=values))


def forget_mirror(change: Change, name: str) -> int:
    """Take a mirror away, with all that it has brought; how many instances those were."""
    brought = [one for one in change.instances() if one.source == name]
    for instance in brought:
        change.remove(instance)
    change.connection.execute(delete(mirrors).where(mirrors.c.name == name))
    return len(brought)


def _renamed(change: Change, source: str, wanted: Mirrored) -> Instance | None:
    """The same instance under its new name, if it had another."""
    query = select(instances.c.project, instances.c.name).where(
        instances.c.uuid == wanted.uuid, instances.c.source == source
    )
    was = change.connection.execute(query).first()
    return None if was is None else change.rename(change.instance(*was), wanted.project, wanted.name)


def _merge_ready(change: Change, instance: Instance, held: bool) -> None:
    """Bring together what the instance said and what its daemon holds; of the two, the one that is new counts."""
    query = select(instances.c.told_ready).where(instances.c.id == instance.id)
    told = change.connection.execute(query).scalar_one()
    if told == held:
        return  # What the instance may have said since is told to the daemon: `unsaid`.
    if instance.ready == told or (told is None and held):
        change.set_ready(instance.id, instance.run, held)
    change.connection.execute(update(instances).where(instances.c.id == instance.id).values(told_ready=held))
