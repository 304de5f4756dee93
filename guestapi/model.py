"""The nouns: plain, frozen, without behaviour that needs a store, a socket or a clock.

Those that are not about instances stand in `records`. They can be had from here, too, and are loaded when somebody
wants one: to make these classes takes a command that sets a key as long as to set it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from guestapi.records import Image as Image
    from guestapi.records import ImageFile as ImageFile
    from guestapi.records import Notification as Notification
    from guestapi.records import Problem as Problem
    from guestapi.records import Profile as Profile
    from guestapi.records import SourceStatus as SourceStatus

InstanceType = Literal["container", "virtual-machine"]

#: What a host name cannot have (RFC 1123, section 2.1), and how long it may be (RFC 1035, section 2.3.4).
_NO_HOST_NAME, _HOST_NAME_LENGTH = re.compile("[^A-Za-z0-9-]+"), 63

#: Inode numbers of PID namespaces have 32 bits (include/linux/ns_common.h). Numbers above are CIDs of virtual machines.
_FIRST_VSOCK_PLACE = 1 << 32

#: Sources that configure their instances themselves: nothing is set on these by hand.
DAEMONS = frozenset({"incus", "lxd"})

#: What `records` has.
_RECORDS = frozenset({"Image", "ImageFile", "Notification", "Problem", "Profile", "SourceStatus"})

#: A device's definition: option name to value, with at least ``type``.
Device = dict[str, str]


@dataclass(frozen=True, slots=True)
class Init:
    """The identity of a running instance: the one process that is PID 1 inside, or a virtual machine's VMM.

    A PID is handed out again, and so is the inode number of a PID namespace, as soon as its owner is gone. The first
    four fields together name one process of one boot for ever; two of these are equal if those are.

    Attributes:
        pid: as seen in the PID namespace of the service.
        start_time: clock ticks since boot (proc_pid_stat(5), field 22).
        boot_id: /proc/sys/kernel/random/boot_id when it was registered.
        namespace: inode number of its PID namespace (namespaces(7)); of a virtual machine: `vsock_place` of its CID, or
            of its `hybrid_number`.
        root_uid: which of our users was root inside when it was registered; None: not recorded.
        user_namespace: inode number of the user namespace that owns the PID namespace; of a virtual machine: which of
            the VMM's open files is its vsock device (`callers.machines.find_vsock`); None: not recorded.
    """

    pid: int
    start_time: int
    boot_id: str
    namespace: int
    root_uid: int | None = field(default=None, compare=False)
    user_namespace: int | None = field(default=None, compare=False)

    @property
    def is_machine(self) -> bool:
        """Whether it is the VMM of a virtual machine."""
        return cid_at(self.namespace) is not None

    @property
    def cid(self) -> int | None:
        """The context ID of a virtual machine (vsock(7)); None of a container, and of a machine without one."""
        cid = cid_at(self.namespace)
        return None if cid is None or is_hybrid(cid) else cid


def hybrid_number(pid: int) -> int:
    """Return what stands in the place of a CID for a machine whose VMM connects to a Unix socket (hybrid vsock).

    Args:
        pid: of the VMM. CIDs have 32 bits, so the number is none of them.
    """
    return _FIRST_VSOCK_PLACE + pid


def is_hybrid(cid: int) -> bool:
    """Whether a number in the place of a CID is a `hybrid_number`."""
    return cid >= _FIRST_VSOCK_PLACE


def vsock_place(cid: int) -> int:
    """Return what stands for a virtual machine where the number of a PID namespace stands for a container."""
    return _FIRST_VSOCK_PLACE + cid


def cid_at(place: int) -> int | None:
    """Return the CID for which a number stands; None if it is that of a PID namespace."""
    return place - _FIRST_VSOCK_PLACE if place >= _FIRST_VSOCK_PLACE else None


class KeyPolicy(NamedTuple):
    """What the operator has decided about some configuration keys (`key_policy`).

    Attributes:
        pattern: which keys; each ``*`` stands for any characters.
        hidden: no guest reads them.
        secret: their values are in no event, no log and nothing that the operator is shown.
        once: the first who asks gets the value, and nobody after that.
        uids: the users inside an instance who may read them besides root.
    """

    pattern: str
    hidden: bool = False
    secret: bool = False
    once: bool = False
    uids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Instance:
    """What the host says of one instance, at one moment.

    Attributes:
        id: the store's number of it, never given to another.
        revision: grows with every change of anything below.
        run: grows with every start and stop, so that what was learned in one run is not used in the next.
        uuid: fixed when it was added.
        cloud_init_id: the meta-data's instance-id; a new UUID whenever cloud-init should run again.
        location: name of the cluster member it runs on; None: of this host.
        ready: the workload said so in this run.
        init: its identity, or None while it does not run.
        config: what counts of all layers (`store.layers`).
        devices: as `config`.
        source: name of the source that it belongs to; None: it was added by hand.
        key: the source's own key of it; None: its source has no such container any more, or it has no source.
        hostname: the host name inside, as the runtime set it; None: it follows from `name`.
        kept: it stays when its source has it no more, although nothing of it is the operator's.
        large: keys that are set and whose values are not in `config`, because a worker reads large values when it is
            asked for them (`store.reading`).
        profiles: names of its profiles, the weakest first.
        policies: what the operator has decided about its keys and those of its project.
        allowed: what the operator allows it or its project, of what nobody has otherwise (`store.permissions`).
    """

    id: int
    revision: int
    run: int
    project: str
    name: str
    type: InstanceType
    uuid: str
    cloud_init_id: str
    location: str | None
    ready: bool
    init: Init | None
    config: Mapping[str, str]
    devices: Mapping[str, Device]
    source: str | None = None
    key: str | None = None
    hostname: str | None = None
    kept: bool = False
    large: frozenset[str] = frozenset()
    profiles: tuple[str, ...] = ()
    policies: tuple[KeyPolicy, ...] = ()
    allowed: frozenset[str] = frozenset()

    @property
    def running(self) -> bool:
        """Whether the store knows an init of it; the process itself may be gone already."""
        return self.init is not None

    @property
    def host_name(self) -> str:
        """The host name inside: as the runtime set it, else made of the name."""
        return (
            self.hostname or _NO_HOST_NAME.sub("-", self.name).strip("-")[:_HOST_NAME_LENGTH].rstrip("-") or "instance"
        )


def __getattr__(name: str) -> object:
    """The other nouns (PEP 562)."""
    if name not in _RECORDS:
        raise AttributeError(name)
    from guestapi import records

    return getattr(records, name)
