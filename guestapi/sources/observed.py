"""The input of the reconciler: instances that exist at a source now, and problems with them.

Rules: these classes have no behaviour. They hold what a runtime made of an instance, never what a guest or an image
asked for. A source fills them; only `reconcile` turns them into changes of the store.
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
        key: identifies it for ever within its source. It survives renames and restarts, and no guest can choose it.
        project: the project that the instance is to be in.
        name: the name that the instance is to have; the runtime's own.
        type: container or virtual machine; None: what it was before, or a container.
        hostname: the host name inside, as the runtime set it; None: it follows from `name`.
        init: the running init with its root user; None: it exists, but does not run.
        config: configuration that the source provides; an empty value is none.
        devices: devices that the source provides; None: nothing new is known of this init, so its recorded devices,
            host name and problems are kept, unless there are new ones.
        uuid: the instance's UUID, where the source knows one; None: the store makes one and keeps it.
        cloud_init_id: the meta-data's instance-id, where the source knows one; None: the store's.
        location: the cluster member; None: this host.
        ready: the instance's readiness at the source; None: the source does not store it.
        problems: one sentence for each thing that cannot be told of it.
    """

    key: str
    project: str
    name: str
    type: InstanceType | None = "container"
    hostname: str | None = None
    init: Init | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] | None = field(default_factory=dict)
    uuid: str | None = None
    cloud_init_id: str | None = None
    location: str | None = None
    ready: bool | None = None
    problems: tuple[str, ...] = ()
