"""What is recorded of sources: how they are, what could not be taken over, and which readiness their daemons know."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects import sqlite

from guestapi.model import Instance, Problem, SourceStatus
from guestapi.store import steps
from guestapi.store.lookup import Moment, list_instances
from guestapi.store.rows import load
from guestapi.store.tables import instances, source_problems, sources
from guestapi.store.transaction import Change

_PROBLEM = ("source", "key", "project", "name", "reason", "hint", "refused")


def record_status(change: Change, status: SourceStatus) -> None:
    """Record how a source is."""
    values = {name: getattr(status, name) for name in ("name", "socket", "connected", "contact", "lag", "fault")}
    statement = sqlite.insert(sources).values(values)
    change.connection.execute(statement.on_conflict_do_update(index_elements=[sources.c.name], set_=values))


def record_problems(change: Change, source: str, key: str, problems: Sequence[Problem]) -> list[Problem]:
    """Record what could not be taken over of one instance, in the place of what was recorded before.

    Returns:
        Those of `problems` that were not recorded before.
    """
    of_key = (source_problems.c.source == source, source_problems.c.key == key)
    columns = [source_problems.c[name] for name in _PROBLEM]
    query = select(*columns).where(*of_key).order_by(source_problems.c.number)
    before = [Problem(*row) for row in change.connection.execute(query)]
    if before == list(problems):
        return []
    change.connection.execute(delete(source_problems).where(*of_key))
    rows = [
        {"number": number, **{name: getattr(problem, name) for name in _PROBLEM}}
        for number, problem in enumerate(problems)
    ]
    if rows:
        change.connection.execute(insert(source_problems), rows)
    return [problem for problem in problems if problem not in before]


def list_problem_keys(store: Moment, source: str) -> set[str]:
    """The keys of a source's instances of which something could not be taken over."""
    query = select(source_problems.c.key).where(source_problems.c.source == source).distinct()
    return set(store.connection.execute(query).scalars())


def list_keys(store: Moment, source: str) -> set[str]:
    """The keys of all instances that belong to a source and exist there, as far as is known."""
    query = select(instances.c.source_key).where(instances.c.source == source, instances.c.source_key.is_not(None))
    return {str(key) for key in store.connection.execute(query).scalars()}


def count_instances(store: Moment, source: str) -> tuple[int, int]:
    """How many instances belong to a source, and how many of them run as far as is known."""
    query = select(func.count(), func.count(instances.c.init_pid)).where(instances.c.source == source)
    total, running = store.connection.execute(query).one()
    return total, running


def forget_source(change: Change, name: str) -> int:
    """Remove a source with all its instances, and what was recorded of it; how many instances those were."""
    owned = list_instances(change, source=name)
    for instance in owned:
        steps.remove(change, instance)
    change.connection.execute(delete(sources).where(sources.c.name == name))
    change.connection.execute(delete(source_problems).where(source_problems.c.source == name))
    return len(owned)


def list_unacknowledged(store: Moment, source: str) -> list[Instance]:
    """Which instances of a source have said something of their readiness that their daemon does not know yet."""
    query = select(instances.c.id).where(
        instances.c.source == source,
        instances.c.init_pid.is_not(None),
        instances.c.acknowledged_ready.is_not(None),
        instances.c.acknowledged_ready != instances.c.ready,
    )
    found = (load(store.connection, number) for number in store.connection.execute(query).scalars().all())
    return [instance for instance in found if instance is not None]


def acknowledge(change: Change, instance: Instance) -> None:
    """Record that the daemon knows what the instance, as it was then, had said."""
    change.connection.execute(
        update(instances)
        .where(instances.c.id == instance.id, instances.c.run == instance.run)
        .values(acknowledged_ready=instance.ready)
    )


def merge_ready(change: Change, instance: Instance, held: bool) -> None:
    """Bring together what the instance said and what its daemon holds; of the two, the one that is new counts."""
    query = select(instances.c.acknowledged_ready).where(instances.c.id == instance.id)
    acknowledged = change.connection.execute(query).scalar_one()
    if acknowledged == held:
        return  # What the instance may have said since is told to the daemon: `list_unacknowledged`.
    if instance.ready == acknowledged or (acknowledged is None and held):
        steps.set_ready(change, instance.id, instance.run, held)
    change.connection.execute(update(instances).where(instances.c.id == instance.id).values(acknowledged_ready=held))
