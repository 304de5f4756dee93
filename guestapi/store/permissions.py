"""What the operator allows instances, of what no instance has otherwise: by project, or one by one.

1. A permission of a project and one of an instance add up: either is enough.
2. Each instance that one concerns gets another revision, so no worker answers by what it has in memory.
"""

from __future__ import annotations

from typing import NamedTuple

from guestapi import names
from guestapi.audit import AuditRecord
from guestapi.model import Instance
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import Moment
from guestapi.store.policies import note_changed
from guestapi.store.transaction import Change
from guestapi.switches import ATTRIBUTES

#: What can be allowed.
FEATURES = (ATTRIBUTES,)

_LIST = (
    "SELECT coalesce(permissions.project, instances.project), name, feature FROM permissions "
    "LEFT JOIN instances ON instances.id = instance_id ORDER BY 1, name, feature"
)
_PUT = "INSERT OR IGNORE INTO permissions (project, instance_id, feature) VALUES (?, ?, ?)"
_REMOVE = "DELETE FROM permissions WHERE project IS ? AND instance_id IS ? AND feature = ?"


class Permission(NamedTuple):
    """What is allowed, and where.

    Attributes:
        project: to whose instances.
        instance: name of the one instance; None: to all.
        feature: one of `FEATURES`.
    """

    project: str
    instance: str | None
    feature: str


def list_permissions(store: Moment) -> list[Permission]:
    """All permissions, by project, instance and feature; those of a project before those of its instances."""
    return [Permission(*row) for row in store.connection.execute(_LIST)]


def allow(change: Change, project: str, instance: Instance | None, feature: str) -> None:
    """Allow something. Allowed again, nothing changes.

    Args:
        change: the transaction.
        project: to whose instances.
        instance: the one instance; None: to all.
        feature: one of `FEATURES`.

    Raises:
        InvalidNameError: the project cannot be one.
    """
    names.check_project(project)
    if change.connection.execute(_PUT, (*_scope(project, instance), feature)).rowcount:
        _record(change, "permission.add", project, instance, feature)


def disallow(change: Change, project: str, instance: Instance | None, feature: str) -> None:
    """Allow something no more.

    Raises:
        ConflictError: it was not allowed there.
    """
    if not change.connection.execute(_REMOVE, (*_scope(project, instance), feature)).rowcount:
        where = f"project {project!r}" if instance is None else f"instance {instance.name!r}"
        raise ConflictError(f"{feature} is not allowed to {where}", "'guestapi policy list' shows what is, and where")
    _record(change, "permission.remove", project, instance, feature)


def _scope(project: str, instance: Instance | None) -> tuple[str | None, int | None]:
    """The columns of a permission's row."""
    return (project, None) if instance is None else (None, instance.id)


def _record(change: Change, action: str, project: str, instance: Instance | None, feature: str) -> None:
    note_changed(change, project, instance)
    name, number = ("", 0) if instance is None else (instance.name, instance.id)
    change.record(AuditRecord(action, project, name, pattern=feature, instance_id=number))
