"""Mounts from the host in a container, by device and root, within bounds, and with any text in the lines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.sources import mountinfo
from guestapi.sources.mountinfo import MountsError, disks, parse, path_of, place_of, read, visible

HOST = parse(
    b"20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    b"21 20 8:2 / /srv rw - ext4 /dev/sda2 rw\n"
    b"22 20 0:30 / /run rw - tmpfs tmpfs rw\n"
    b"23 21 8:2 /deep /srv/again rw - ext4 /dev/sda2 rw\n"
)


def of(*lines: str) -> dict[str, dict[str, str]]:
    """Return the disks of a container with these mounts below its root file system."""
    root = "100 99 8:1 /var/lib/lxc/web/rootfs / rw - ext4 /dev/sda1 rw"
    inside = parse("\n".join([root, *lines]).encode())
    found = dict(disks(inside, HOST, {("0:30", "/guestapi")}))
    assert found.pop("/") == {"type": "disk", "path": "/"}
    return found


@pytest.mark.parametrize(
    ("line", "disk"),
    [
        ("101 100 8:2 /files /srv/files rw - ext4 /dev/sda2 rw", {"source": "/srv/files", "path": "/srv/files"}),
        ("101 100 8:1 /usr /usr ro - ext4 /dev/sda1 rw", {"source": "/usr", "path": "/usr", "readonly": "true"}),
        ("101 100 8:1 /usr /usr rw - ext4 /dev/sda1 ro", {"source": "/usr", "path": "/usr", "readonly": "true"}),
        # The mount with the longest matching root gives the source.
        ("101 100 8:2 /deep/er /x rw - ext4 /dev/sda2 rw", {"source": "/srv/again/er", "path": "/x"}),
        (r"101 100 8:2 /my\040files /a\134b rw - ext4 /dev/sda2 rw", {"source": "/srv/my files", "path": "/a\\b"}),
        # A device's file system that the host has not mounted.
        ("101 100 8:9 / /data rw - ext4 /dev/sdb9 rw", {"source": "/dev/sdb9", "path": "/data"}),
        # File systems of the container's own, and those of every container.
        ("101 100 0:50 / /tmp rw - tmpfs tmpfs rw", None),
        ("101 100 0:51 / /proc rw - proc proc rw", None),
        ("101 100 8:1 /dev/null /dev/null rw - ext4 /dev/sda1 rw", None),
        ("101 100 0:30 /x /dev/tty7 rw - tmpfs tmpfs rw", None),
        ("101 100 0:30 /x /proc/cpuinfo rw - tmpfs tmpfs rw", None),
        # A device node that the operator provides is a disk.
        ("101 100 8:1 /dev/fuse /dev/fuse rw - ext4 /dev/sda1 rw", {"source": "/dev/fuse", "path": "/dev/fuse"}),
        # The directory of guestapi's socket is recognised by device and root, at any path, and not by its name.
        ("101 100 0:30 /guestapi /dev/incus rw - tmpfs tmpfs rw", None),
        ("101 100 0:30 /guestapi /anywhere rw - tmpfs tmpfs rw", None),
        ("101 100 8:2 /guestapi /dev/incus rw - ext4 x rw", {"source": "/srv/guestapi", "path": "/dev/incus"}),
    ],
)
def test_disks(line: str, disk: dict[str, str] | None) -> None:
    """Each kind of mount gives the expected disk, or none."""
    assert list(of(line).values()) == ([{"type": "disk", **disk}] if disk else [])


def test_mounted_over() -> None:
    """A mount that another mount covers is no disk."""
    first = "101 100 8:2 /a /x rw - ext4 /dev/sda2 rw"
    assert of(first, "102 101 8:2 /b /x rw - ext4 /dev/sda2 rw")["/x"]["source"] == "/srv/b"
    below = "101 100 8:2 /a /x/y rw - ext4 /dev/sda2 rw"
    assert list(of(below, "102 100 0:50 / /x rw - tmpfs tmpfs rw")) == []
    # A mount below the covering one is visible.
    assert list(of("101 100 0:50 / /x rw - tmpfs tmpfs rw", "102 101 8:2 /a /x/y rw - ext4 /d rw")) == ["/x/y"]


@given(st.binary(max_size=200), st.integers(0, 3))
def test_garbage(data: bytes, number: int) -> None:
    """Malformed lines are left out, and circular parents are no problem."""
    line = b"%d %d 8:1 /a /b rw - ext4 x rw\n" % (number, 3 - number)
    mounts = parse(data + b"\n" + line + line + b"3 3 8:1 / / rw - ext4 x rw\n1 0 8:1 / /b/c rw - ext4 x rw")
    assert len(mounts) >= 4
    visible(mounts)
    disks(mounts, mounts, set())


def test_places() -> None:
    """A path gives its device and root, and these give a path on the host."""
    assert place_of("/srv/again/x", HOST) == ("8:2", "/deep/x")
    assert place_of("/run", HOST) == ("0:30", "/")
    assert place_of("/", HOST) == ("8:1", "/")
    assert path_of(("8:2", "/deep"), HOST) == "/srv/again"
    assert path_of(("8:3", "/deep"), HOST) is None
    assert place_of("/x", []) is None


@pytest.mark.root
def test_real_mounts(tmp_path: Path) -> None:
    """A real mount of a process has its source on the host."""
    source = tmp_path / "a source"
    source.mkdir()
    mount = f'mount --bind "{source}" /srv && mount -o remount,ro,bind /srv && echo done && exec sleep 100'
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", mount], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
            outside = read(os.getpid(), mountinfo.HOST_BYTES)
            found = disks(read(process.pid), outside, set())
            assert found["/srv"] == {"type": "disk", "source": str(source), "path": "/srv", "readonly": "true"}
            place = place_of(str(source), outside)
            assert place is not None
            assert "/srv" not in disks(read(process.pid), outside, {place})
        finally:
            process.kill()


@pytest.mark.root
def test_bounds() -> None:
    """Only a bounded part of a process's mounts is read."""
    many = (
        "mount -t tmpfs x /mnt; mkdir /mnt/a /mnt/b; mount --make-rshared /mnt; for i in 1 2 3 4 5 6 7 8 9 10 11; do "
    )
    many += "mount --rbind /mnt /mnt/a; done; echo done; exec sleep 100"
    with subprocess.Popen(["unshare", "--mount", "sh", "-c", many], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
            with pytest.raises(MountsError, match="more mounts than fit in 16 KiB"):
                read(process.pid, 1 << 14)
        finally:
            process.kill()


def test_no_such_process() -> None:
    """A process that does not exist is an error."""
    with pytest.raises(MountsError, match="cannot be read"):
        read(1 << 22)
