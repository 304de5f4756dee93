"""What is recorded of changes of an instance (`guestapi.audit`)."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from guestapi.audit import AuditRecord
from guestapi.model import Instance
from guestapi.store.layer_rows import find_names
from guestapi.store.layers import Layers
from guestapi.store.transaction import Change

#: Columns that other actions than instance.configure stand for, and what goes with them.
_RECORDED_APART = frozenset(
    {
        *("project", "name", "run", "ready", "acknowledged_ready"),
        *("init_pid", "init_start_time", "init_boot_id", "init_namespace", "init_root_uid", "init_user_namespace"),
    }
)


def record_add(change: Change, instance: Instance, layers: Layers) -> None:
    """Record that an instance was added, with what it was given."""
    keys, devices, profiles = find_names(Layers(), layers)
    change.record(
        AuditRecord(
            "instance.add",
            instance.project,
            instance.name,
            keys=keys,
            devices=devices,
            profiles=profiles,
            instance_id=instance.id,
        )
    )
    if instance.init is not None:
        change.record(AuditRecord("instance.start", instance.project, instance.name, instance_id=instance.id))


def record_write(
    change: Change, old: Instance, new: Instance, layers: tuple[Layers, Layers], columns: AbstractSet[str]
) -> None:
    """Record a change of an instance, one thing after the other.

    Args:
        change: the transaction.
        old: the instance before.
        new: the instance afterwards.
        layers: its layers before and afterwards.
        columns: which columns of its row were changed.
    """
    keys, devices, profiles = find_names(*layers)
    where = (new.project, new.name)
    restarted = new.init != old.init
    if (old.project, old.name) != where:
        change.record(AuditRecord("instance.rename", *where, before=f"{old.project}/{old.name}", instance_id=new.id))
    if restarted and old.init is not None:
        change.record(AuditRecord("instance.stop", *where, instance_id=new.id))
    if keys or devices or profiles or columns - _RECORDED_APART:
        configured = AuditRecord("instance.configure", *where, keys=keys, devices=devices, profiles=profiles)
        change.record(configured._replace(instance_id=new.id))
    if restarted and new.init is not None:
        change.record(AuditRecord("instance.start", *where, instance_id=new.id))
