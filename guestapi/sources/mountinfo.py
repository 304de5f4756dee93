"""The mounts of a process (proc_pid_mountinfo(5)), and which of them a runtime made from what lies on this host.

A container's root can mount and unmount anything: fifteen ``mount --bind`` made 65,000 mounts, which took 27 seconds to
read; and it can make a line contain any text. So the read is bounded, it happens before the init runs, and two mounts
are the same directory only if their device and root are equal, never by their text alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from guestapi.errors import SourceError
from guestapi.model import Device

#: Most bytes of a mountinfo that are read. A line has 100 to 300; the kernel takes up to 0.25 s for 64 KiB where there
#: are tens of thousands of mounts.
BYTES = 1 << 18
#: The same for a process of the host, where root alone mounts, possibly thousands of file systems.
HOST_BYTES = 4 << 20
#: proc_pid_mountinfo(5): blank, tab, newline and backslash are written in octal.
_OCTAL = re.compile(rb"\\([0-7]{3})")
#: Below these, runtimes mount what every container needs. Other mounts below them are told.
_KERNEL = ("/proc", "/sys")
#: What runtimes put into every container's /dev (runtime-spec, config-linux.md "Default Devices"; LXC's autodev).
_DEV = frozenset(
    ("/dev/" + name)
    for name in ("console", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "tty", "urandom", "zero", "log")
) | frozenset({"/dev/pts/ptmx"})
_TERMINAL = re.compile(r"/dev/(lxc/)?(tty[0-9]+|console)")


class MountsError(SourceError):
    """The mounts of a process cannot be read, or are too many."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line.

    Attributes:
        id, parent: of this mount, and of the one that it is mounted on.
        device: ``MAJOR:MINOR`` of its file system.
        root: which directory of that file system it shows.
        path: where it is, below the root directory of the process.
        readonly: it is mounted read-only.
        kind: of the file system, like ``ext4``.
        source: as the file system names it, like ``/dev/sda1``; a guest can choose it.
    """

    id: int
    parent: int
    device: str
    root: str
    path: str
    readonly: bool
    kind: str
    source: str

    @property
    def place(self) -> tuple[str, str]:
        """Device and root, which are equal for all mounts of one directory."""
        return self.device, self.root


def read(pid: int, limit: int = BYTES) -> list[Mount]:
    """Read the mounts of a process.

    Args:
        pid: the process.
        limit: most bytes to read.

    Raises:
        MountsError: there is no such process, or there is more than `limit`.
    """
    try:
        with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as file:
            data = bytearray()
            while len(data) <= limit and (part := file.read(min(1 << 16, limit + 1 - len(data)))):
                data += part
    except OSError as error:
        raise MountsError(f"mounts of process {pid} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise MountsError(f"process {pid} has more mounts than fit in {limit >> 10} KiB")
    return parse(bytes(data))


def parse(data: bytes) -> list[Mount]:
    """Parse a mountinfo. Malformed lines are left out."""
    return [mount for line in data.split(b"\n") if (mount := _parse_line(line)) is not None]


def _parse_line(line: bytes) -> Mount | None:
    # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    before, dash, after = line.partition(b" - ")
    fields, behind = before.split(b" "), after.split(b" ")
    if not dash or len(fields) < 6 or len(behind) < 3:
        return None
    try:
        number, parent = int(fields[0]), int(fields[1])
    except ValueError:
        return None
    options = fields[5].split(b",") + behind[2].split(b",")
    root, path, kind, source = (_text(field) for field in (fields[3], fields[4], behind[0], behind[1]))
    return Mount(number, parent, fields[2].decode(errors="replace"), root, path, b"ro" in options, kind, source)


def _text(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field))


def visible(mounts: Iterable[Mount]) -> list[Mount]:
    """Return the mounts that are visible, not those that are covered by another mount."""
    mounts = list(mounts)
    at = {(mount.parent, mount.path) for mount in mounts if mount.id != mount.parent}
    reachable: dict[int, bool] = {}
    known = {mount.id: mount for mount in mounts}

    def is_reachable(mount: Mount) -> bool:
        """Whether the path of its mount point leads to it."""
        way: list[Mount] = []
        one: Mount | None = mount
        while one is not None and one.id not in reachable:
            # Preset, because a hostile mountinfo can have circles of parents.
            reachable[one.id] = True
            way.append(one)
            one = known.get(one.parent)
        for one in reversed(way):
            parent = known.get(one.parent)
            above = parent is None or parent is one or reachable[parent.id]
            # A sibling above its mount point was mounted later; otherwise it would be the parent.
            reachable[one.id] = above and not any((one.parent, path) in at for path in _above(one.path))
        return reachable[mount.id]

    return [mount for mount in mounts if is_reachable(mount) and (mount.id, mount.path) not in at]


def _above(path: str) -> list[str]:
    """Return the directories above a path, without the root directory."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(2, len(parts))]


def place_of(directory: str, mounts: Sequence[Mount]) -> tuple[str, str] | None:
    """Return device and root of a directory, as a bind mount of it would have them.

    Args:
        directory: its absolute path, without symbolic links.
        mounts: those of a process that has the directory at this path.

    Returns:
        None if it is below none of these mounts.
    """
    best: Mount | None = None
    for mount in visible(mounts):
        if _is_below(directory, mount.path) and (best is None or len(mount.path) >= len(best.path)):
            best = mount
    if best is None:
        return None
    return best.device, _join(best.root, directory[len(best.path.rstrip("/")) :])


def path_of(place: tuple[str, str], mounts: Sequence[Mount]) -> str | None:
    """Return a path of a directory for a process with these mounts; None if they do not show it."""
    device, root = place
    best: Mount | None = None
    for mount in mounts:
        if (
            mount.device == device
            and _is_below(root, mount.root)
            and (best is None or len(mount.root) > len(best.root))
        ):
            best = mount
    return None if best is None else _join(best.path, root[len(best.root.rstrip("/")) :])


def _is_below(path: str, above: str) -> bool:
    return above == "/" or path == above or path.startswith(above.rstrip("/") + "/")


def _join(above: str, rest: str) -> str:
    return above.rstrip("/") + "/" + rest.strip("/") if rest.strip("/") else above


def disks(inside: Sequence[Mount], outside: Sequence[Mount], own: Collection[tuple[str, str]]) -> Mapping[str, Device]:
    """Return what is mounted from this host in a container, as disk devices by their paths inside.

    Args:
        inside: the mounts of its init, which has not run yet.
        outside: the mounts of a host process that sees their sources.
        own: device and root of the guest API's socket directories, which are not devices of the container.

    Returns:
        For the root file system, and for each directory or file of this host and each block device that is mounted:
        type, path, where it is known source, and readonly. What runtimes mount in every container (/proc, /sys and
        most of /dev) is left out, and so are file systems that are the container's alone, like a tmpfs.
    """
    found: dict[str, Device] = {}
    reachable = visible(outside)
    for mount in visible(inside):
        if mount.path == "/":
            found["/"] = {"type": "disk", "path": "/"}
            continue
        if mount.place in own or _is_usual(mount.path):
            continue
        source = path_of(mount.place, reachable)
        if source is None and mount.root == "/" and mount.source.startswith("/dev/"):
            source = mount.source
        if source is None:
            continue
        found[mount.path] = {"type": "disk", "source": source, "path": mount.path}
        if mount.readonly:
            found[mount.path]["readonly"] = "true"
    return found


def _is_usual(path: str) -> bool:
    return any(_is_below(path, one) for one in _KERNEL) or path in _DEV or _TERMINAL.fullmatch(path) is not None
