"""What is recorded of sources: how they are, what could not be taken over, and which readiness their daemons know."""

from __future__ import annotations

from collections.abc import Sequence

from guestapi.model import Instance, Problem, SourceStatus
from guestapi.store import steps
from guestapi.store.lookup import Moment, is_placed, list_instances, load_all, problem_of
from guestapi.store.transaction import Change

_RECORD = "INSERT OR REPLACE INTO sources (name, socket, connected, contact, lag, fault) VALUES (?, ?, ?, ?, ?, ?)"
_PROBLEMS = (
    "SELECT source, key, project, name, reason, hint, refused FROM source_problems WHERE source = ? AND key = ? "
    "ORDER BY number"
)
_ADD_PROBLEM = (
    "INSERT INTO source_problems (number, source, key, project, name, reason, hint, refused) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_UNACKNOWLEDGED = (
    "SELECT id FROM instances WHERE source = ? AND init_pid IS NOT NULL AND acknowledged_ready IS NOT NULL "
    "AND acknowledged_ready != ready"
)


def record_status(change: Change, status: SourceStatus) -> None:
    """Record how a source is."""
    values = (status.name, status.socket, status.connected, status.contact, status.lag, status.fault)
    change.connection.execute(_RECORD, values)


def record_problems(change: Change, source: str, key: str, problems: Sequence[Problem]) -> list[Problem]:
    """Record what could not be taken over of one instance, in the place of what was recorded before.

    Returns:
        Those of `problems` that were not recorded before.
    """
    before = [problem_of(row) for row in change.connection.execute(_PROBLEMS, (source, key))]
    if before == list(problems):
        return []
    change.connection.execute("DELETE FROM source_problems WHERE source = ? AND key = ?", (source, key))
    rows = [
        (number, one.source, one.key, one.project, one.name, one.reason, one.hint, one.refused)
        for number, one in enumerate(problems)
    ]
    change.connection.executemany(_ADD_PROBLEM, rows)
    return [problem for problem in problems if problem not in before]


def list_problem_keys(store: Moment, source: str) -> set[str]:
    """The keys of a source's instances of which something could not be taken over."""
    query = "SELECT DISTINCT key FROM source_problems WHERE source = ?"
    return {key for (key,) in store.connection.execute(query, (source,))}


def list_keys(store: Moment, source: str) -> set[str]:
    """The keys of all instances that belong to a source and exist there, as far as is known."""
    query = "SELECT source_key FROM instances WHERE source = ? AND source_key IS NOT NULL"
    return {key for (key,) in store.connection.execute(query, (source,))}


def count_instances(store: Moment, source: str) -> tuple[int, int]:
    """How many instances belong to a source, and how many of them run as far as is known."""
    query = "SELECT count(*), count(init_pid) FROM instances WHERE source = ?"
    total, running = store.connection.execute(query, (source,)).fetchone()
    return total, running


def forget_source(change: Change, name: str) -> int:
    """Remove a source with all its instances, and what was recorded of it; how many instances those were.

    Those that a fleet has placed here stay, without a container.
    """
    owned = list_instances(change, source=name)
    for instance in owned:
        if is_placed(change, instance):
            steps.unbind(change, instance)
        else:
            steps.remove(change, instance)
    change.connection.execute("DELETE FROM sources WHERE name = ?", (name,))
    change.connection.execute("DELETE FROM source_problems WHERE source = ?", (name,))
    return len(owned)


def list_unacknowledged(store: Moment, source: str) -> list[Instance]:
    """Which instances of a source have said something of their readiness that their daemon does not know yet."""
    return load_all(store, _UNACKNOWLEDGED, (source,))


def acknowledge(change: Change, instance: Instance) -> None:
    """Record that the daemon knows what the instance, as it was then, had said."""
    change.connection.execute(
        "UPDATE instances SET acknowledged_ready = ? WHERE id = ? AND run = ?",
        (instance.ready, instance.id, instance.run),
    )


def merge_ready(change: Change, instance: Instance, held: bool) -> None:
    """Bring together what the instance said and what its daemon holds; of the two, the one that is new counts."""
    query = "SELECT acknowledged_ready FROM instances WHERE id = ?"
    (acknowledged,) = change.connection.execute(query, (instance.id,)).fetchone()
    if acknowledged == held:
        return  # What the instance may have said since is told to the daemon: `list_unacknowledged`.
    if instance.ready == acknowledged or (acknowledged is None and held):
        steps.set_ready(change, instance.id, instance.run, held)
    change.connection.execute("UPDATE instances SET acknowledged_ready = ? WHERE id = ?", (held, instance.id))
