"""Turns an instance as Incus or LXD describes it into an observation. Pure: asks neither daemon nor kernel.

Workers hold only what they need for their answers, so only that part of the configuration is copied. A guest cannot
tell keys that it may not read from keys that are not set: the answer is 403 either way.
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

#: What the daemons write for an instance that is on no cluster member.
NOWHERE = ("", "none")
#: What they call an instance that has no init.
STOPPED = frozenset({"Error", "Stopped"})
#: The extension of the API that gives an instance's readiness a place (LXD 5.0 has none).
_HAS_READY = "instance_ready_state"
#: Where they keep what the guest said of itself, the meta-data's instance-id, the UUID, and the maps of user IDs: of
#: the run that is, and of the last one.
READY = "volatile.last_state.ready"
_CLOUD_INIT_ID = "volatile.cloud-init.instance-id"
_UUID = "volatile.uuid"
_ID_MAPS = ("volatile.idmap.current", "volatile.last_state.idmap")

_READABLE = tuple({prefix for dialect in DIALECTS.values() for prefix in dialect.readable})


class _Mapping(Struct):
    """One entry of an instance's ID map: so many IDs from `inside` on are those from `outside` on."""

    users: bool = field(name="Isuid", default=False)
    outside: int = field(name="Hostid", default=0)
    inside: int = field(name="Nsid", default=0)
    count: int = field(name="Maprange", default=0)


def has_ready(server: Server) -> bool:
    """Whether the daemon holds an instance's readiness."""
    return _HAS_READY in server.api_extensions


def is_here(instance: DaemonInstance, server: Server) -> bool:
    """Whether an instance is one that calls through a socket of this host: a container, not of another member."""
    host = server.environment
    here = not host.server_clustered or instance.location in (*NOWHERE, host.server_name)
    return here and instance.type == "container"


def observe(instance: DaemonInstance, server: Server, init: Init | None) -> Observed:
    """Describe an instance for the reconciler.

    Args:
        instance: as the daemon has it.
        server: the daemon itself.
        init: of the instance, if it runs.
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
        # An empty value is none.
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
    """The location of an instance that is on no cluster member: LXD tells its guests none."""
    return None if host.server == "lxd" else host.server_name or None


def identify(instance: DaemonInstance) -> str:
    """The UUID by which an instance is known: the daemon's, else one that stays while it is the same instance."""
    config: Mapping[str, str] = instance.expanded_config or {}
    try:
        return names.check_uuid(config.get(_UUID, ""))
    except names.InvalidNameError:
        # It has none before its first start.
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{instance.project}/{instance.name}/{instance.created_at}"))


def root_uid(instance: DaemonInstance) -> int | None:
    """Which user of the host is root in a running instance, as the daemon says; None if it does not."""
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
