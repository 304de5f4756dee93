"""Which mounts show guestapi's sockets: by device and inode, whatever their names, and with hanging file systems."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestapi.settings import ListenSocket
from guestapi.sources import places
from guestapi.sources.places import Places
from tests.harness.containers import Container
from tests.harness.waiting import TIMEOUT


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The directory of a socket."""
    directory = tmp_path / "guestapi"
    directory.mkdir()
    return directory


def of(directory: Path) -> Places:
    """Return the places of a socket in a directory."""
    return Places.of([ListenSocket(path=f"{directory}/sock")])


def test_directory_link_and_socket(place: Path, tmp_path: Path) -> None:
    """The directory by any path, and the socket itself, are recognised; another path with the same name is not."""
    (tmp_path / "link").symlink_to(place)
    (place / "sock").touch()
    (tmp_path / "false").mkdir()
    look = of(place).look()
    for ok in (place, tmp_path / "link", place / "../guestapi", place / "sock"):
        assert look.has(str(ok)), ok
    for no in ("", "/", str(tmp_path), str(tmp_path / "false"), "/no/such", "a\0b", "guestapi"):
        assert not look.has(no), no


def test_missing_socket_directory(place: Path) -> None:
    """A missing directory, as while the socket's unit is stopped, is recognised by its path."""
    look = of(place / "later").look()
    assert look.has(f"{place}/later")
    assert not look.has(f"{place}/other")


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A file system whose /hangs does not answer until the event is set."""
    go = threading.Event()
    real = os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).startswith("/hangs"):
            go.wait(TIMEOUT)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(places, "_STAT_SECONDS", 0.1)
    yield go
    go.set()
    for thread in list(places._stuck.values()):
        thread.join()


def test_hanging_file_system(place: Path, hanging: threading.Event) -> None:
    """A file system that hangs costs its timeout once, and delays nothing else."""
    look = of(place).look()
    began = time.monotonic()
    for _ in range(50):
        assert not look.has("/hangs/a")
        assert look.has(str(place))
    assert time.monotonic() - began < 3
    assert len(places._stuck) == 1
    hanging.set()
    for thread in list(places._stuck.values()):
        thread.join()
    assert not look.has("/hangs/a")
    assert places._stuck == {}


@pytest.mark.root
def test_mounted_in_a_container(place: Path, tmp_path: Path) -> None:
    """The kernel's mounts decide: a directory with the same name elsewhere is not guestapi's."""
    false = tmp_path / "x/guestapi"
    false.mkdir(parents=True)
    tmp_path.chmod(0o755)
    with Container([(place, "/dev/incus")]) as with_it, Container([(false, "/dev/incus")]) as without:
        assert of(place).look().mounted_in(with_it.pid)
        assert not of(place).look().mounted_in(without.pid)


@pytest.mark.root
def test_imitated_mount(place: Path) -> None:
    """Root in a container can put any text into mountinfo; only device and root decide."""
    with Container([]) as container:
        words = ["nsenter", "-t", str(container.pid), "-U", "-m", "--setuid", "0", "--setgid", "0", "sh", "-c"]
        script = f"mount -t tmpfs tmpfs /mnt && mkdir -p /mnt{place} /mnt/at && mount --bind /mnt{place} /mnt/at"
        subprocess.run([*words, script], check=True, capture_output=True)
        text = Path(f"/proc/{container.pid}/mountinfo").read_text()
        assert f" {place} /mnt/at " in text
        assert not of(place).look().mounted_in(container.pid)
