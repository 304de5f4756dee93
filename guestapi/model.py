"""The nouns: plain, frozen, without behaviour that needs a store, a socket or a clock."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

InstanceType = Literal["container", "virtual-machine"]

#: What a host name cannot have (RFC 1123, section 2.1), and how long it may be (RFC 1035, section 2.3.4).
_NO_HOST_NAME, _HOST_NAME_LENGTH = re.compile("[^A-Za-z0-9-]+"), 63

#: Sources that configure their instances themselves: nothing is set on these by hand.
DAEMONS = frozenset({"incus", "lxd"})

#: A device's definition: option name to value, with at least ``type``.
Device = dict[str, str]


@dataclass(frozen=True, slots=True)
class Init:
    """The identity of a running instance: the one process that is PID 1 inside.

    A PID is handed out again, and so is the inode number of a PID namespace, as soon as its owner is gone. The first
    four fields together name one process of one boot for ever; two of these are equal if those are.

    Attributes:
        pid: as seen in the PID namespace of the service.
        start_time: clock ticks since boot (proc_pid_stat(5), field 22).
        boot_id: /proc/sys/kernel/random/boot_id when it was registered.
        namespace: inode number of its PID namespace (namespaces(7)).
        root_uid: which of our users was root inside when it was registered; None: not recorded.
        user_namespace: inode number of the user namespace that owns the PID namespace; None: not recorded.
    """

    pid: int
    start_time: int
    boot_id: str
    namespace: int
    root_uid: int | None = field(default=None, compare=False)
    user_namespace: int | None = field(default=None, compare=False)


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


@dataclass(frozen=True, slots=True)
class Profile:
    """A named set of configuration and devices that instances share.

    Attributes:
        id: the store's number of it, never given to another.
        project: the project whose instances may have it.
        name: what it is called there.
        description: what the operator says of it.
        config: its configuration.
        devices: its devices; each has a type.
    """

    id: int
    project: str
    name: str
    description: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of an image, as it was when it was imported or last verified.

    Attributes:
        extension: what its kind is called, like ``.tar.gz``; empty if that is not known.
        size: in bytes.
        mtime_ns: when it was last modified, in nanoseconds of Unix time (inode(7)).
    """

    extension: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Image:
    """An image that instances may be allowed to download.

    Attributes:
        fingerprint: SHA-256 of its files in a row, 64 hexadecimal digits in lower case.
        type: what can be made of it.
        public: every instance that may export images may have it.
        cached: as public: it is there for the instances of this host.
        created: when it was imported, in seconds of Unix time.
        files: one if it is unified; metadata and root file system if it is split.
        aliases: other names that the operator has for it, sorted.
        source: name of the daemon that it was copied from; None: the operator has imported it.
    """

    fingerprint: str
    type: InstanceType
    public: bool
    cached: bool
    created: float
    files: tuple[ImageFile, ...]
    aliases: tuple[str, ...]
    source: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def exported(self) -> bool:
        """Whether guests may have it at all."""
        return self.public or self.cached


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """How a source of instances is, as its mirror or follower last wrote it.

    Attributes:
        name: of the source, like ``incus`` or ``lxc``.
        socket: where the daemon or runtime is asked; empty if nothing listens.
        connected: the source is followed now.
        contact: when it last answered, in seconds of Unix time; 0.0: never.
        lag: seconds from the source's latest change to its commit here.
        fault: what keeps the store from being as the source, in one sentence; empty if nothing does.
    """

    name: str
    socket: str
    connected: bool
    contact: float
    lag: float
    fault: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something of an instance that could not be taken over from its source.

    Attributes:
        source: name of the source.
        key: the source's key of the instance.
        project: the project that the instance was to be in.
        name: the name that the instance was to have.
        reason: one sentence: what is missing, and why.
        hint: what to do about it; None if nothing needs to be done.
        refused: the instance is not registered at all; otherwise, something of it is left out.
        holder: key of the same source's instance that has the name; None: the name is not what is wrong.
    """

    source: str
    key: str
    project: str
    name: str
    reason: str
    hint: str | None = None
    refused: bool = False
    holder: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Notification:
    """One entry of the change log.

    Attributes:
        id: its place in the order of commits; never used again, without order between stores.
        instance_id, project, instance: the instance that it is about.
        type: ``config``, ``device`` or ``lifecycle``.
        timestamp: RFC 3339 with the host's zone offset.
        metadata: compact JSON.
        for_guest: the guest API delivers it to the instance; otherwise it is for the host's operator alone.
    """

    id: int
    instance_id: int
    project: str
    instance: str
    type: str
    timestamp: str
    metadata: str
    for_guest: bool
