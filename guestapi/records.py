"""The nouns that are not about instances: profiles, images, how sources are, and entries of the change log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


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
        uuid: the fleet's key of it, if it is the fleet's; None: it is this host's own.
    """

    id: int
    project: str
    name: str
    description: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, dict[str, str]] = field(default_factory=dict)
    uuid: str | None = None


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
    type: Literal["container", "virtual-machine"]
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
        metadata: compact JSON; only its beginning, with the key, if it is large and was not read.
        for_guest: the guest API delivers it to the instance; otherwise it is for the host's operator alone.
        left_out: bytes of the whole metadata, if it was not read; otherwise 0.
    """

    id: int
    instance_id: int
    project: str
    instance: str
    type: str
    timestamp: str
    metadata: str
    for_guest: bool
    left_out: int = 0
