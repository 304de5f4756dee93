"""Converts the description of an instance by Incus or LXD to an observation. Pure: uses neither daemon nor kernel.

Workers store only the configuration that their answers need, so only that part is copied. A guest cannot distinguish a
key that it may not read from one that is not set: both are answered 403.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import msgspec
from msgspec import Struct, field

from guestapi import names
from guestapi.dialects import DIALECTS
from guestapi.mirror.daemon_model import DaemonInstance, Environment, Server
from guestapi.model import Init
from guestapi.sources.observed import Observed
from guestapi.sources.sanitize import SWITCHES

#: The daemons' location of an instance that is on no cluster member.
NOWHERE = ("", "none")
#: The daemons' status of an instance that has no init.
STOPPED = frozenset({"Error", "Stopped"})
#: The API extension for an instance's readiness (LXD 5.0 has none).
_HAS_READY = "instance_ready_state"
#: The keys of the reported readiness, the meta-data's instance-id, the UUID, and the ID maps of the present and the
#: last run.
READY = "volatile.last_state.ready"
_CLOUD_INIT_ID = "volatile.cloud-init.instance-id"
_UUID = "volatile.uuid"
_ID_MAPS = ("volatile.idmap.current", "volatile.last_state.idmap")

_READABLE = tuple({prefix for dialect in DIALECTS.values() for prefix in dialect.readable})


class _Mapping(Struct):
    """An entry of an ID map: a range of IDs that begins at `inside` in the instance and at `outside` on the host."""

    users: bool = field(name="Isuid", default=False)
    outside: int = field(name="Hostid", default=0)
    inside: int = field(name="Nsid", default=0)
    count: int = field(name="Maprange", default=0)


def has_ready(server: Server) -> bool:
    """Whether the daemon stores the readiness of instances."""
    return _HAS_READY in server.api_extensions


def is_here(instance: DaemonInstance, server: Server) -> bool:
    """Whether an instance uses a socket of this host: it is a container, and not another member's."""
    host = server.environment
    here = not host.server_clustered or instance.location in (*NOWHERE, host.server_name)
    return here and instance.type == "container"


def observe(instance: DaemonInstance, server: Server, init: Init | None) -> Observed:
    """Describe an instance for the reconciler.

    Args:
        instance: the daemon's description.
        server: the daemon's own description.
        init: the instance's init, if it runs.
    """
    host = server.environment
    config = instance.expanded_config or {}
    location = instance.location
    identity = identify(instance)
    return Observed(
        key=identity,
        project=instance.project,
        name=instance.name,
        hostname=instance.name,
        init=init,
        # An empty value means that the key is not set.
        config={key: value for key, value in config.items() if value and _is_needed(key)},
        devices={
            device: {option: value for option, value in options.items() if value}
            for device, options in (instance.expanded_devices or {}).items()
        },
        uuid=identity,
        cloud_init_id=config.get(_CLOUD_INIT_ID) or identity,
        location=location if location not in NOWHERE else _lone_location(host),
        ready=config.get(READY) == "true" if has_ready(server) else None,
    )


def _lone_location(host: Environment) -> str | None:
    """Return the location of an instance that is on no cluster member: LXD has none for its guests."""
    return None if host.server == "lxd" else host.server_name or None


def identify(instance: DaemonInstance) -> str:
    """Return the UUID of an instance: the daemon's, else one that stays for as long as the instance exists."""
    config: Mapping[str, str] = instance.expanded_config or {}
    try:
        return names.check_uuid(config.get(_UUID, ""))
    except names.InvalidNameError:
        # It has none before its first start.
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{instance.project}/{instance.name}/{instance.created_at}"))


def root_uid(instance: DaemonInstance) -> int | None:
    """Return the host user who is root in a running instance, by the daemon's ID map; None if it has none."""
    config = instance.expanded_config or {}
    text = next((config[key] for key in _ID_MAPS if config.get(key)), "")
    try:
        entries = msgspec.json.decode(text, type=list[_Mapping])
    except msgspec.DecodeError:
        return None
    if not entries:
        # A privileged container has no map: its users are the host's.
        return 0
    for entry in entries:
        if entry.users and entry.inside <= 0 < entry.inside + entry.count:
            return entry.outside - entry.inside
    return None


def _is_needed(key: str) -> bool:
    hardware_address = key.startswith("volatile.") and key.endswith(".hwaddr")
    return key.startswith(_READABLE) or key in SWITCHES or hardware_address
