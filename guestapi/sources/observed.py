"""What a source tells the reconciler: the instances that exist there now, and what of them could not be told.

Rules: these are nouns without behaviour. They hold what a runtime made of an instance, never what a guest or an image
asked for. A source fills them; `reconcile` alone turns them into changes of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from guestapi.model import Device, Init, InstanceType, Problem

__all__ = ["Observed", "Problem"]


@dataclass(frozen=True, slots=True)
class Observed:
    """A container or virtual machine that exists at its source now, running or not.

    Attributes:
        key: names it for ever within its source: it survives renames and restarts, and no guest can choose it.
        project: the project that the instance is to be in.
        name: the name that the instance is to have; the runtime's own.
        type: container or virtual machine.
        hostname: the host name inside, as the runtime set it; None: it follows from `name`.
        init: the running init, with what was recorded of its root; None: it exists, but does not run.
        config: configuration that the source provides; an empty value is none.
        devices: devices that the source provides; None: nothing new was seen of this init, so the devices, the host
            name and the problems that are known of it are kept, unless there are new ones.
        uuid: the instance's UUID, where the source knows one; None: the store makes one and keeps it.
        cloud_init_id: the meta-data's instance-id, where the source knows one; None: the store's.
        location: the cluster member; None: this host.
        ready: what the source holds of the instance's readiness; None: it does not hold that.
        problems: what could not be told of it, one sentence each.
    """

    key: str
    project: str
    name: str
    type: InstanceType = "container"
    hostname: str | None = None
    init: Init | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] | None = field(default_factory=dict)
    uuid: str | None = None
    cloud_init_id: str | None = None
    location: str | None = None
    ready: bool | None = None
    problems: tuple[str, ...] = ()
