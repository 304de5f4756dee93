"""Containers of OCI runtimes, as their bundles describe them: the state that a hook gets, and the bundle's config.json.

github.com/opencontainers/runtime-spec, runtime.md "State" and config.md. Shared by the sources of podman, Docker and
of crun and runc alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from msgspec import Struct

from guestapi.errors import SourceError
from guestapi.model import Device
from guestapi.names import KEY_BYTES
from guestapi.sources.processes import arguments, is_roots, parent

CONFIG_PREFIX = "guestapi.config."
#: Never taken from annotations, the operator's included: these switch the guest API itself on and off.
_SWITCHES = "security."
#: Bytes of a file that a runtime writes. A config.json has some 10 KiB; the annotations of an image come on top.
_FILE_BYTES = 16 << 20
#: Most bytes of an id, which is the name of a directory of the runtime (limits.h, NAME_MAX).
_ID_BYTES = 255
#: How many generations above an init its conmon can be: crun or runc and a helper process may be between.
_GENERATIONS = 5
#: Below which directories runtimes mount what every container needs, and single files that podman mounts.
_USUAL = re.compile(r"/(proc|sys|dev/(console|mqueue|pts|shm|init))(/.*)?|/run/podman-init")
#: Files that podman keeps for a container or its pod, like /etc/hosts, and mounts in it.
_KEPT = re.compile(r"-containers/[0-9a-f]{64}/userdata/")
#: Where podman keeps a volume. One that an image declares has 64 hexadecimal digits for a name.
_VOLUME = re.compile(r"/volumes/([^/]+)/_data\Z")
_ANONYMOUS = re.compile("[0-9a-f]{64}")
#: Where podman and CRI-O have a container's bundle (containers/storage): DRIVER-containers/ID/userdata.
_STORED = re.compile(r"-containers/([^/]+)/userdata/?\Z")

T = TypeVar("T")


class BundleError(SourceError):
    """A runtime's description of a container cannot be used."""


class _State(Struct):
    id: str
    pid: int = 0
    status: str = ""
    bundle: str = ""


class _Namespace(Struct):
    type: str
    path: str = ""


class _Linux(Struct):
    namespaces: list[_Namespace] | None = None


class _Mount(Struct):
    destination: str = ""
    type: str = ""
    source: str = ""
    options: list[str] | None = None


class _Config(Struct):
    hostname: str = ""
    mounts: list[_Mount] | None = None
    annotations: dict[str, str] | None = None
    linux: _Linux | None = None


@dataclass(frozen=True, slots=True)
class Bind:
    """A path of the host that is mounted in a container.

    Attributes:
        source: on the host.
        path: inside.
        readonly: it is mounted read-only.
    """

    source: str
    path: str
    readonly: bool


@dataclass(frozen=True, slots=True)
class Bundle:
    """A container as its bundle describes it.

    Attributes:
        id: the whole one.
        pid: of its init, on the host; None: it has none now.
        hostname: the host name that the runtime sets inside; empty: none.
        mounts: paths of the host that are mounted inside.
        annotations: of the operator and, with podman, of the image.
        has_own_pid_namespace: the runtime makes one for it; otherwise, its processes are in another's.
        is_stored: podman or CRI-O made the bundle and manages the container.
    """

    id: str
    pid: int | None
    hostname: str
    mounts: tuple[Bind, ...]
    annotations: Mapping[str, str]
    has_own_pid_namespace: bool
    is_stored: bool

    @property
    def binds(self) -> tuple[str, ...]:
        """The paths on the host."""
        return tuple(mount.source for mount in self.mounts)


def read_state(state: bytes) -> Bundle | None:
    """The container that a runtime's hook is called for; None if it has ended.

    Args:
        state: what the runtime gives its hook on standard input.

    Raises:
        BundleError: it is not a state, or its bundle cannot be read.
    """
    found = _decode(state, _State, "standard input of the hook")
    if not is_id(found.id):
        raise BundleError(f"{found.id[:80]!r} is not the id of a container")
    if found.status == "stopped":
        return None
    if found.pid <= 0:
        raise BundleError("the state has no pid", "the hook is for the stages createRuntime and poststop")
    return read_config(f"{found.bundle}/config.json", found.id, found.pid, found.bundle)


def read_config(file: str, key: str, pid: int | None, bundle: str) -> Bundle:
    """Read a container's config.json.

    Args:
        file: the config.json, or a copy that the runtime keeps.
        key: the container's id.
        pid: of its init.
        bundle: the bundle's directory.

    Raises:
        BundleError: it cannot be read.
    """
    config = _decode(read_file(file), _Config, file)
    namespaces = config.linux.namespaces or [] if config.linux else []
    return Bundle(
        key,
        pid,
        config.hostname,
        tuple(
            Bind(_absolute(bundle, mount.source), mount.destination, "ro" in (mount.options or []))
            for mount in config.mounts or []
            if mount.type == "bind" or {"bind", "rbind"} & set(mount.options or [])
        ),
        config.annotations or {},
        any(one.type == "pid" and not one.path for one in namespaces),
        is_stored(bundle),
    )


def _absolute(bundle: str, source: str) -> str:
    """A mount's source; a relative one is below the bundle (config.md, "mounts")."""
    return source if os.path.isabs(source) else os.path.normpath(os.path.join(bundle, source))


def is_id(text: str) -> bool:
    """Whether `text` can be the id of a container of crun or runc."""
    return text.isprintable() and "/" not in text and text not in ("", ".", "..") and len(text.encode()) <= _ID_BYTES


def is_stored(bundle: str) -> bool:
    """Whether podman or CRI-O has made the bundle in a directory. What an image says does not count for that."""
    return _STORED.search(bundle) is not None


def read_file(file: str) -> bytes:
    """A file that a runtime has written.

    Raises:
        BundleError: there is none, it is not a regular file, or it is too large.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise BundleError(f"{file[:200]!r}: {getattr(error, 'strerror', None) or error}") from None
    with open(descriptor, "rb", buffering=0) as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _FILE_BYTES:
            raise BundleError(f"{file[:200]!r} is not a file of at most {_FILE_BYTES >> 20} MiB")
        return opened.read(_FILE_BYTES)


def decode(content: bytes, kind: type[T]) -> T | None:
    """JSON as `kind`; None if it is something else."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _decode(content: bytes, kind: type[T], what: str) -> T:
    found = decode(content, kind)
    if found is None:
        raise BundleError(f"{what[:200]!r} is not what the OCI runtime specification says")
    return found


def conmon_name(pid: int, key: str) -> str | None:
    """The name of a container of podman, as its conmon was told it (``conmon -c ID -n NAME``).

    Args:
        pid: of its init. It is not below another container's conmon, so no guest can choose what is found.
        key: the container's id.
    """
    for _ in range(_GENERATIONS):
        pid = parent(pid)
        if pid <= 1:
            return None
        words = arguments(pid)
        if _following(words, "-c") == key and is_roots(pid):
            return _following(words, "-n")
    return None


def _following(words: list[str], option: str) -> str | None:
    """The word after the first `option`."""
    place = words.index(option) + 1 if option in words else len(words)
    return words[place] if place < len(words) else None


def configuration(annotations: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the configuration in annotations or labels, and a sentence for each key that is not used."""
    found = {
        key.removeprefix(CONFIG_PREFIX): value for key, value in annotations.items() if key.startswith(CONFIG_PREFIX)
    }
    switches = sorted(key for key in found if key.startswith(_SWITCHES))
    for key in switches:
        del found[key]
    if not switches:
        return found, ()
    return found, (f"annotation {CONFIG_PREFIX}{switches[0][:80]} is not used: no annotation sets {_SWITCHES}*",)


def podman_disks(mounts: Iterable[Bind]) -> list[Device]:
    """Return the mounts that the operator gave, of all those that podman makes, as podman's API will list them."""
    found = []
    for mount in mounts:
        volume = _VOLUME.search(mount.source)
        if _USUAL.fullmatch(mount.path) or _KEPT.search(mount.source):
            continue
        if volume is None or not _ANONYMOUS.fullmatch(volume[1]):
            found.append(disk(volume[1] if volume else mount.source, mount.path, readonly=mount.readonly))
    return found


def disk(source: str, path: str, *, readonly: bool) -> Device:
    """A disk device."""
    device = {"type": "disk", "source": source, "path": path}
    return {**device, "readonly": "true"} if readonly else device


def disk_devices(disks: Iterable[Device]) -> tuple[dict[str, Device], tuple[str, ...]]:
    """Disks by name: the path inside, with hyphens in the place of slashes.

    Args:
        disks: each has a ``path``.

    Returns:
        The devices, and a sentence for each that has no name of its own.
    """
    found: dict[str, Device] = {}
    problems = []
    for disk in disks:
        name = disk["path"].strip("/").replace("/", "-")
        if name in found:
            problems.append(
                f"guests do not see the mount at {disk['path'][:80]!r}: {found[name]['path'][:80]!r} has that name"
            )
        elif not name or len(name.encode(errors="replace")) > KEY_BYTES:
            problems.append(f"guests do not see the mount at {disk['path'][:80]!r}: no device can have that name")
        else:
            found[name] = disk
    return found, tuple(problems)
