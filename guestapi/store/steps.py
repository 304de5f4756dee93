"""The steps of a change that are about instances. Each one writes the new state and its entries of the change log.

Rules: `write` alone changes an instance, so that its revision, its run and the change log always fit what changed; but
for a change of a profile, which `profile_users` brings to all instances that have it. Configuration and devices have
layers (`layers`); events are the difference between the merged layers before and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from guestapi import names
from guestapi.audit import AuditRecord
from guestapi.model import DAEMONS, Device, Init, Instance, InstanceType
from guestapi.store import changes
from guestapi.store.errors import ConflictError
from guestapi.store.layer_rows import check_size, write_layers
from guestapi.store.layers import Layer, Layers
from guestapi.store.lookup import find_owner, get_instance, is_placed
from guestapi.store.recorded import record_add, record_write
from guestapi.store.rows import load, load_layers
from guestapi.store.transaction import Change, tell

if TYPE_CHECKING:
    from guestapi.records import Profile

_BY_INIT = "SELECT id, name FROM instances WHERE init_pid = ? AND init_start_time = ? AND init_boot_id = ?"
#: What to do about an instance that a fleet has placed here.
PLACED_HINT = "'guestapi --fleet ...' changes it for whichever host it is on"
#: Columns that are called otherwise in `Instance`.
_ATTRIBUTES = {"source_key": "key"}


class Wanted(NamedTuple):
    """What an instance is to be after a change.

    Attributes:
        before: its configuration and devices as they are in this transaction.
        layers: its configuration and devices.
        init: its init; None: it does not run.
        columns: other columns of its row that are to have these values.
        live_options: which options of a device can be updated, as `changes.LIVE_OPTIONS`; None: all but its type.
    """

    before: Layers
    layers: Layers
    init: Init | None
    columns: Mapping[str, object] = MappingProxyType({})
    live_options: Mapping[str, tuple[str, ...]] | None = None


def add(
    change: Change,
    project: str,
    name: str,
    *,
    type: InstanceType = "container",  # noqa: A002 - the field's word
    instance_uuid: str | None = None,
    location: str | None = None,
    config: Mapping[str, str] | None = None,
    devices: Mapping[str, Device] | None = None,
    source: str | None = None,
    key: str | None = None,
    hostname: str | None = None,
    cloud_init_id: str | None = None,
    checked: bool = False,
    init: Init | None = None,
    profiles: tuple[Profile, ...] = (),
) -> Instance:
    """Add an instance.

    Args:
        change: the transaction.
        project: as of `Instance`, like all that is not described here.
        name: as of `Instance`.
        type: as of `Instance`.
        instance_uuid: its UUID; None: a new one.
        location: as of `Instance`.
        config: its source's if it has one, else the operator's.
        devices: as `config`.
        source: as of `Instance`.
        key: as of `Instance`.
        hostname: as of `Instance`.
        cloud_init_id: as of `Instance`; None: the UUID.
        checked: they were checked before (`sources.sanitize`), by the rules for what daemons take.
        init: the process by which it runs already; None: it does not run yet.
        profiles: its profiles, the weakest first.

    Returns:
        The instance.

    Raises:
        InvalidNameError: a name or value cannot be taken.
        ConflictError: there is one of that name, or one with that UUID.
    """
    check_free(change, project, name)
    identity = names.check_uuid(instance_uuid) if instance_uuid is not None else _new_uuid()
    if find_by_uuid(change, identity) is not None:
        raise ConflictError(f"uuid {identity} belongs to another instance already", "leave it out for a new one")
    values: dict[str, object] = {
        "revision": 1,
        "run": 0,
        "ready": False,
        "project": project,
        "name": name,
        "type": type,
        "uuid": identity,
        "cloud_init_id": cloud_init_id or identity,
        "location": names.check_location(location) if location is not None else None,
        "source": source,
        "source_key": key,
        "hostname": hostname,
        "kept": source is None,
    }
    happened = [changes.lifecycle("instance-added", project, name)]
    if init is not None:
        _check_init_is_free(change, None, init)
        happened.append(changes.lifecycle("instance-started", project, name))
        values |= {**_columns_of(init), "run": 1}
    layer = Layer(config or {}, devices or {})
    if not checked:
        layer = Layer(names.check_config(layer.config), names.check_devices(layer.devices))
    layers = Layers(Layer(), layer, profiles) if source is None else Layers(layer, Layer(), profiles)
    if not checked:
        check_size(change, project, name, layers)
    statement = f"INSERT INTO instances ({', '.join(values)}) VALUES ({', '.join(f':{column}' for column in values)})"
    number = change.connection.execute(statement, values).lastrowid
    assert number is not None, "it was inserted"
    write_layers(change, number, Layers(), layers)
    created = reload(change, number)
    tell(change, created, happened, running=False)
    record_add(change, created, layers)
    return created


def get_editable(change: Change, project: str, name: str) -> Instance:
    """The instance of that name, to be changed by hand.

    Raises:
        UnknownInstanceError: there is none.
        ConflictError: its daemon configures it, and would undo the change.
    """
    instance = get_instance(change, project, name)
    if instance.source in DAEMONS:
        raise ConflictError(f"instance {name!r} is mirrored from {instance.source}", "change it there")
    return instance


def remove(change: Change, instance: Instance) -> None:
    """Take an instance away, running or not, and all that is known of it."""
    change.connection.execute("DELETE FROM instances WHERE id = ?", (instance.id,))
    tell(change, instance, [changes.lifecycle("instance-removed", instance.project, instance.name)], running=False)
    change.record(AuditRecord("instance.remove", instance.project, instance.name, instance_id=instance.id))


def refuse_placed(change: Change, instance: Instance) -> None:
    """Make sure that an instance is this host's own, to be changed or removed by hand.

    Raises:
        ConflictError: a fleet has placed it here, and would undo the change.
    """
    if is_placed(change, instance):
        raise ConflictError(f"instance {instance.name!r} belongs to the fleet", PLACED_HINT)


def start(change: Change, instance: Instance, init: Init) -> Instance:
    """Record that the instance runs now, and which process is its init; if it is so already, nothing changes.

    Raises:
        ConflictError: that process is another instance's init.
    """
    layers = load_layers(change.connection, instance.id)
    return write(change, instance, Wanted(layers, layers, init))


def stop(change: Change, instance: Instance) -> Instance:
    """Record that the instance does not run any more. Said of one that does not run, nothing changes."""
    layers = load_layers(change.connection, instance.id)
    return write(change, instance, Wanted(layers, layers, None))


def unbind(change: Change, instance: Instance) -> Instance:
    """Record that an instance has no container any more, and take away what its source provided."""
    layers = load_layers(change.connection, instance.id)
    columns = {"source": None, "source_key": None, "hostname": None}
    return write(change, instance, Wanted(layers, replace(layers, source=Layer()), None, columns))


def configure(change: Change, instance: Instance, config: Mapping[str, str]) -> Instance:
    """Set keys of the operator's; one set to the empty string is unset, and what its source provides counts again.

    Raises:
        InvalidNameError: a key or value cannot be taken.
        ConflictError: the instance would have too much configuration.
    """
    layers = load_layers(change.connection, instance.id)
    wanted = {**layers.operator.config, **names.check_config(config)}
    source = layers.source
    if instance.source is None:
        # There is no source that would replace what a hook of an earlier version has left here.
        source = Layer({key: value for key, value in source.config.items() if key not in config}, source.devices)
    operator = Layer({key: value for key, value in wanted.items() if value}, layers.operator.devices)
    # What is set to another value is set anew by that.
    if again := [key for key, value in config.items() if value and layers.config.get(key) == value]:
        # PERF: loaded for what hardly ever happens.
        from guestapi.store.policies import renew

        renew(change, instance, again)
    return _write_operator(change, instance, layers, replace(layers, source=source, operator=operator))


def replace_devices(change: Change, instance: Instance, devices: Mapping[str, Device]) -> Instance:
    """Give the instance exactly these devices of the operator's; those of its source stay, if it has one.

    Raises:
        InvalidNameError: a name, option or value cannot be taken.
        ConflictError: the instance would have too much configuration.
    """
    layers = load_layers(change.connection, instance.id)
    source = layers.source if instance.source is not None else Layer(layers.source.config)
    checked = names.check_devices(devices, amending=replace(layers, source=source, operator=Layer()).devices)
    operator = Layer(layers.operator.config, checked)
    return _write_operator(change, instance, layers, replace(layers, source=source, operator=operator))


def assign(change: Change, instance: Instance, profiles: tuple[Profile, ...]) -> Instance:
    """Give the instance exactly these profiles, the weakest first.

    Raises:
        ConflictError: the instance would have too much configuration, or one of them twice.
    """
    refuse_twice(instance.name, profiles)
    layers = load_layers(change.connection, instance.id)
    return _write_operator(change, instance, layers, replace(layers, profiles=profiles))


def refuse_twice(name: str, profiles: tuple[Profile, ...]) -> None:
    """Raise ConflictError if the instance of that name would have one of these profiles twice."""
    ids = [profile.id for profile in profiles]
    for profile in profiles:
        if ids.count(profile.id) > 1:
            raise ConflictError(f"instance {name!r} cannot have profile {profile.name!r} twice", "name it once")


def rename(change: Change, instance: Instance, project: str, name: str) -> Instance:
    """Call it `name`, of `project`, from now on.

    Raises:
        InvalidNameError: the name cannot be taken.
        ConflictError: another instance has it, or a fleet has placed this one here.
    """
    refuse_placed(change, instance)
    check_free(change, project, name)
    layers = load_layers(change.connection, instance.id)
    return write(change, instance, Wanted(layers, layers, instance.init, {"project": project, "name": name}))


def set_ready(change: Change, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
    """Record what the workload says of itself.

    Args:
        change: the transaction.
        instance_id: the instance whose workload says it.
        run: in which run it was identified.
        ready: True for ``Ready``, False for ``Started``.
        init: as which it was identified, for the store may be another by now; None: do not compare.

    Returns:
        Whether it was recorded; False if that run is over.
    """
    instance = load(change.connection, instance_id)
    if instance is None or instance.run != run or instance.init is None or init not in (None, instance.init):
        return False
    if instance.ready == ready:
        # Said again, it is no news: a guest could fill the log with it.
        return True
    _set(change, instance, {"ready": ready})
    # The mirror of a daemon wants to know of either.
    action = "instance-ready" if ready else "instance-updated"
    event = changes.lifecycle(action, instance.project, instance.name)
    tell(change, instance, [event], running=True, by_guest=True)
    change.record(AuditRecord("instance.ready", instance.project, instance.name, instance_id=instance.id))
    return True


def write(change: Change, old: Instance, wanted: Wanted) -> Instance:
    """Make an instance what it is to be, as one change; what is so already is left alone.

    The entries of the change log are in the order in which it must have happened: the new name, the end of the old run,
    the changes of configuration and devices, the start of the new run.

    Args:
        change: the transaction.
        old: the instance as it is in this transaction.
        wanted: what it is to be.

    Returns:
        The instance afterwards.

    Raises:
        ConflictError: the init is another instance's.
    """
    columns = dict(wanted.columns)
    project, name = str(columns.get("project", old.project)), str(columns.get("name", old.name))
    # What the layers had, not what the instance had: a value that was given and counts as unset since is in them.
    states = (wanted.before.config, wanted.layers.config, wanted.before.devices, wanted.layers.devices)
    differences = list(changes.find_differences(*states, wanted.live_options))
    if "cloud_init_id" not in columns and changes.cloud_init_starts_over(*states):
        columns["cloud_init_id"] = _new_uuid()
    happened: list[changes.ChangeEvent] = []
    if (project, name) != (old.project, old.name):
        happened.append(changes.lifecycle("instance-renamed", project, name))
    restarted = wanted.init != old.init
    if restarted:
        # A notice is for one run.
        change.connection.execute("DELETE FROM notices WHERE instance_id = ?", (old.id,))
    if old.key is not None and columns.get("source_key", old.key) != old.key:
        # The container that has said something of itself is gone; the instance stays for another one.
        change.connection.execute("DELETE FROM attributes WHERE instance_id = ?", (old.id,))
    if restarted and old.init is not None:
        happened.append(changes.lifecycle("instance-stopped", project, name))
    happened += differences
    if restarted and wanted.init is not None:
        _check_init_is_free(change, old, wanted.init)
        happened.append(changes.lifecycle("instance-started", project, name))
    columns |= _init_columns(old, wanted.init, restarted)
    changed = {column: value for column, value in columns.items() if _is_other(old, column, value)}
    if wanted.before == wanted.layers and not changed:
        return old
    if not happened:
        # Whoever waits for a change of the instance hears of every one.
        happened.append(changes.lifecycle("instance-updated", project, name))
    write_layers(change, old.id, wanted.before, wanted.layers)
    _set(change, old, changed)
    new = reload(change, old.id)
    tell(change, new, happened, running=old.running and not restarted)
    record_write(change, old, new, (wanted.before, wanted.layers), changed.keys())
    if new.policies and new.project != old.project:
        from guestapi.store.policies import conceal

        conceal(change, new.project, new)
    return new


def check_free(change: Change, project: str, name: str) -> None:
    """Make sure that an instance can have this project and name.

    Raises:
        InvalidNameError: it cannot be a name.
        ConflictError: another instance has it.
    """
    check_name(project, name)
    if find_owner(change, project, name) is not None:
        raise ConflictError(f"instance {name!r} exists already in project {project!r}", "choose another name")


def check_name(project: str, name: str) -> str:
    """Return `name` if an instance can have it and this project.

    Raises:
        InvalidNameError: it cannot.
    """
    names.check_project(project)
    return names.check_instance(name)


def park(change: Change, instance: Instance, name: str) -> None:
    """Give an instance another name for the rest of the transaction, without an entry of the change log."""
    _set(change, instance, {"name": name})


def find_by_uuid(change: Change, identity: str) -> int | None:
    """The id of the instance with a UUID, in its canonical form; None if there is none."""
    row = change.connection.execute("SELECT id FROM instances WHERE uuid = ?", (identity,)).fetchone()
    return None if row is None else int(row[0])


def reload(change: Change, number: int) -> Instance:
    """An instance that this transaction knows to be there, as it is now."""
    instance = load(change.connection, number)
    assert instance is not None, "written in this transaction"
    return instance


def find_by_init(change: Change, init: Init) -> tuple[int, str] | None:
    """Id and name of the instance that a process is the init of; None if there is none."""
    found = change.connection.execute(_BY_INIT, (init.pid, init.start_time, init.boot_id)).fetchone()
    return None if found is None else (found[0], found[1])


def _new_uuid() -> str:
    # PERF: loaded here, since most commands need none.
    import uuid

    return str(uuid.uuid4())


def _check_init_is_free(change: Change, instance: Instance | None, init: Init) -> None:
    other = find_by_init(change, init)
    if other is not None and (instance is None or other[0] != instance.id):
        raise ConflictError(
            f"process {init.pid} is the init of instance {other[1]!r} already", "give the PID of this one's init"
        )


def _write_operator(change: Change, instance: Instance, before: Layers, after: Layers) -> Instance:
    """Write what the operator wants an instance to have, if it is within the bound."""
    refuse_placed(change, instance)
    check_size(change, instance.project, instance.name, after, before)
    # That of a daemon's instance is the daemon's.
    columns = {"cloud_init_id": instance.cloud_init_id} if instance.source in DAEMONS else {}
    return write(change, instance, Wanted(before, after, instance.init, columns))


def _init_columns(old: Instance, init: Init | None, restarted: bool) -> dict[str, object]:
    """The columns of an init that are to change."""
    if not restarted:
        if init is None:
            return {}
        # The same process; what was not recorded of its root may be by now.
        recorded = {"init_root_uid": init.root_uid, "init_user_namespace": init.user_namespace}
        return {column: value for column, value in recorded.items() if value is not None}
    ends = (old.init is not None) + (init is not None)
    columns: dict[str, object] = {"run": old.run + ends, "ready": False, "acknowledged_ready": None}
    return columns | _columns_of(init)


def _columns_of(init: Init | None) -> dict[str, object]:
    return {
        "init_pid": init and init.pid,
        "init_start_time": init and init.start_time,
        "init_boot_id": init and init.boot_id,
        "init_namespace": init and init.namespace,
        "init_root_uid": init and init.root_uid,
        "init_user_namespace": init and init.user_namespace,
    }


def _is_other(old: Instance, column: str, value: object) -> bool:
    """Whether a column is to have another value than it has."""
    if column.startswith("init_"):
        return value != (old.init and getattr(old.init, column.removeprefix("init_")))
    # What `Instance` does not have is written only with a new run.
    return value != getattr(old, _ATTRIBUTES.get(column, column), None)


def _set(change: Change, instance: Instance, columns: Mapping[str, object]) -> None:
    """Write columns of an instance, as a new revision."""
    assigned = "".join(f", {column} = :{column}" for column in columns)
    statement = f"UPDATE instances SET revision = revision + 1{assigned} WHERE id = :id"
    change.connection.execute(statement, {**columns, "id": instance.id})
