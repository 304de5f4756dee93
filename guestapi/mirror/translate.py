"""An instance as Incus or LXD describes it -> the same as the store has it. Pure: asks neither daemon nor kernel.

The guest-facing workers hold what they need for their answers and nothing else, so of the configuration only that
comes over. What a guest may not read it cannot tell from what is not there (403 either way).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from guestapi import names
from guestapi.dialects import DIALECTS
from guestapi.mirror.daemon import Instance, Server
from guestapi.model import Init
from guestapi.store.mirroring import Mirrored

#: What the daemons write for an instance that is on no cluster member.
_NOWHERE = ("", "none")
#: What they call an instance that has no init.
STOPPED = frozenset({"Error", "Stopped"})
#: The extension of the API that gives an instance's readiness a place (LXD 5.0 has none).
_HAS_READY = "instance_ready_state"
#: Where they keep what the guest said of itself, and the meta-data's instance-id.
READY = "volatile.last_state.ready"
_CLOUD_INIT_ID = "volatile.cloud-init.instance-id"
_UUID = "volatile.uuid"

_READABLE = tuple({prefix for dialect in DIALECTS.values() for prefix in dialect.readable})
_SWITCHES = frozenset(key for dialect in DIALECTS.values() for key in (dialect.switch, dialect.images_switch))


def has_ready(server: Server) -> bool:
    """Whether the daemon holds an instance's readiness."""
    return _HAS_READY in server.api_extensions


def is_here(instance: Instance, server: Server) -> bool:
    """Whether an instance is one that calls through a socket of this host: a container, not of another member."""
    host = server.environment
    here = not host.server_clustered or instance.location in (*_NOWHERE, host.server_name)
    return here and instance.type == "container"


def mirrored(instance: Instance, server: Server, init: Init | None) -> Mirrored:
    """What the store shall hold of an instance.

    Args:
        instance: as the daemon has it.
        server: the daemon itself.
        init: of the instance, if it runs.
    """
    host = server.environment
    config = instance.expanded_config or {}
    location = instance.location
    identity = _uuid(instance, config)
    return Mirrored(
        project=instance.project,
        name=instance.name,
        type="container",
        uuid=identity,
        cloud_init_id=config.get(_CLOUD_INIT_ID) or identity,
        location=location if location not in _NOWHERE else host.server_name or None,
        ready=config.get(READY) == "true" if has_ready(server) else None,
        # An empty value is none.
        config={key: value for key, value in config.items() if value and _is_needed(key)},
        devices={
            device: {option: value for option, value in options.items() if value}
            for device, options in (instance.expanded_devices or {}).items()
        },
        init=init,
    )


def _is_needed(key: str) -> bool:
    hardware_address = key.startswith("volatile.") and key.endswith(".hwaddr")
    return key.startswith(_READABLE) or key in _SWITCHES or hardware_address


def _uuid(instance: Instance, config: Mapping[str, str]) -> str:
    try:
        return names.check_uuid(config.get(_UUID, ""))
    except names.InvalidNameError:
        # It has none before its first start: what is the same for as long as it is the same instance.
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{instance.project}/{instance.name}/{instance.created_at}"))
