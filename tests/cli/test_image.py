"""`guestapi image`: commands, output and effects."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Guestapi
from tests.harness.service import COMMAND
from tests.harness.waiting import TIMEOUT

#: Begins and ends as a file of xz does.
CONTENT = b"\xfd7zXZ\0" + b"image" * 998 + b"\0\0YZ"
FP = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file to import."""
    path = tmp_path / "debian.tar.xz"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def imported(guestapi: Guestapi, file: Path) -> Guestapi:
    """The command, with one imported image."""
    assert guestapi.good("image", "import", str(file), "--public", "--alias", "debian/13") == f"{FP}\n"
    return guestapi


def listed(guestapi: Guestapi) -> Any:
    """Return all images."""
    return guestapi("image", "list", "--format", "json").json


def test_import_and_show(imported: Guestapi, file: Path) -> None:
    """An imported image is shown by alias, fingerprint and its beginning, as a table and as JSON."""
    shown = imported("image", "show", "debian/13", "--format", "json").json
    created = shown.pop("created")
    assert created.endswith("Z")
    assert shown == {
        "fingerprint": FP,
        "aliases": ["debian/13"],
        "type": "container",
        "public": True,
        "cached": False,
        "size": 5000,
        "files": [{"extension": ".tar.xz", "size": 5000}],
    }
    assert listed(imported) == [{**shown, "created": created}]
    for name in (FP, FP[:12], "debian/13"):
        table = imported.good("image", "show", name)
        assert FP in table
        assert str(imported.directory / "images" / FP) in table
    row = imported.good("image", "list").splitlines()[1]
    assert re.split(" {2,}", row)[:5] == ["debian/13", FP[:12], "container", "yes", "5.0 kB"]


def test_import_of_two_files(guestapi: Guestapi, file: Path, tmp_path: Path) -> None:
    """Metadata and root file system make one image; the first file is the metadata."""
    root = b"hsqs" + bytes(92)
    (tmp_path / "root.squashfs").write_bytes(root)
    fingerprint = hashlib.sha256(CONTENT + root).hexdigest()
    assert guestapi.good("image", "import", str(file), str(tmp_path / "root.squashfs")) == f"{fingerprint}\n"
    (one,) = listed(guestapi)
    assert [part["extension"] for part in one["files"]] == [".tar.xz", ".squashfs"]
    assert one["public"] is False


def test_errors_are_one_sentence(imported: Guestapi, file: Path, tmp_path: Path) -> None:
    """An error is one sentence that names its subject, and changes nothing."""
    before = listed(imported)
    for words, named in [
        (["import", str(file)], FP),
        (["import", str(tmp_path / "missing")], "missing"),
        (["import", str(tmp_path)], str(tmp_path)),
        (["show", "nope"], "'nope'"),
        (["remove", "nope"], "'nope'"),
        (["set", "nope", "--public"], "'nope'"),
        (["set", FP, "--no-alias", "other"], "'other'"),
        (["verify", "nope"], "'nope'"),
    ]:
        assert named in imported.fails("image", *words)
    assert listed(imported) == before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.tar.xz", bytes(5000), "x.tar.xz: is not an image, whatever its name says"),
        ("x.tar.gz", b"<html>404</html>" * 100, "x.tar.gz: is not an image, whatever its name says"),
        ("x.squashfs", bytes(5000), "x.squashfs: is not an image, whatever its name says"),
        ("x.qcow2", b"QFI\xfb" + bytes(8), "x.qcow2: is qcow2, but cut short"),
        ("x.iso", bytes(40000), "x.iso: is not an image, whatever its name says"),
        ("x.img", bytes(100_000), "x.img: is not an image, whatever its name says"),
        ("x.tar.xz", CONTENT[:-4], "x.tar.xz: is xz, but cut short"),
        ("x.tar.xz", CONTENT[:-1], "x.tar.xz: is xz, but cut short"),
        ("x.tar.gz", b"\x1f\x8b\x08", "x.tar.gz: is gzip, but cut short"),
        ("x.squashfs", b"hsqs" + bytes(36) + b"\0\x10" + bytes(100), "x.squashfs: is squashfs, but cut short"),
        ("x.squashfs", b"hsqs", "x.squashfs: is squashfs, but cut short"),
        ("x.tar", bytes(257) + b"ustar" + bytes(1000), "x.tar: is tar, but cut short"),
        ("x.tar", bytes(257) + b"ustar" + bytes(250) + b"x" * 512, "x.tar: is tar, but cut short"),
        ("notes", b"a text", "notes: is not an image, by its name and its beginning"),
    ],
)
def test_file_that_is_no_image(guestapi: Guestapi, tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    """A file that is not an image by its content, or was cut short, is refused, whatever its name says."""
    (tmp_path / name).write_bytes(content)
    assert sentence in guestapi.fails("image", "import", str(tmp_path / name))
    assert not (guestapi.directory / "images").exists()


def test_real_files_are_images(guestapi: Guestapi, tmp_path: Path) -> None:
    """What tar and its compressors write is taken, under any name; so is a disk without a partition table."""
    (tmp_path / "metadata.yaml").write_text("architecture: x86_64\n")
    for name, option in (("a.tar", "-c"), ("b.tar.gz", "-cz"), ("c.tar.xz", "-cJ"), ("d", "-cj")):
        subprocess.run(["tar", option, "-f", tmp_path / name, "-C", tmp_path, "metadata.yaml"], check=True)
    (tmp_path / "e.img").write_bytes(bytes(1080) + b"\x53\xef" + bytes(1000))
    for name in ("a.tar", "b.tar.gz", "c.tar.xz", "d", "e.img"):
        guestapi.good("image", "import", str(tmp_path / name))
    assert len(listed(guestapi)) == 5


@pytest.mark.parametrize(
    "words",
    [["import"], ["import", "a", "b", "c"], ["set", "x"], ["show"], ["remove"], ["set", "x", "--public", "--what"]],
)
def test_misuse(imported: Guestapi, words: list[str]) -> None:
    """Wrong usage shows the usage."""
    imported.misuse("image", *words)


def test_set(imported: Guestapi) -> None:
    """set makes all its changes at once, or none."""
    imported.good("image", "set", FP[:6], "--private", "--cached", "--alias", "a", "--no-alias", "debian/13")
    (one,) = listed(imported)
    assert (one["public"], one["cached"], one["aliases"]) == (False, True, ["a"])
    imported.fails("image", "set", "a", "--public", "--no-alias", "b")
    imported.good("image", "set", "a", "--no-cached")
    (one,) = listed(imported)
    assert (one["public"], one["cached"], one["aliases"]) == (False, False, ["a"])


def test_remove(imported: Guestapi) -> None:
    """remove removes the image and deletes its file."""
    imported.good("image", "remove", "debian/13")
    assert listed(imported) == []
    assert list((imported.directory / "images").iterdir()) == []


def test_verify(imported: Guestapi) -> None:
    """verify reads every byte; it exits with 0 and a line if all is right, or with 1 and the fault."""
    path = imported.directory / "images" / FP
    assert imported.good("image", "verify") == f"ok   {FP[:12]}: right\n"
    times = path.stat()
    path.write_bytes(b"J" + CONTENT[1:])
    os.utime(path, ns=(0, times.st_mtime_ns))
    for words in ([], [FP], ["debian/13"]):
        done = imported("image", "verify", *words)
        assert (done.code, done.err) == (1, "")
        assert done.out.startswith(f"FAIL {FP[:12]}: {path}: its content was changed")
    path.write_bytes(CONTENT[1:])
    assert "has 4999 bytes, 5000 were imported" in imported("image", "verify").out
    path.unlink()
    done = imported("image", "verify", "--format", "json")
    assert done.code == 1
    assert "No such file" in done.out


def test_verify_reports_stray_files(imported: Guestapi) -> None:
    """A file without an image, as a crash may leave it, is reported and no fault."""
    (imported.directory / "images" / ("0" * 64)).touch()
    done = imported("image", "verify")
    assert done.code == 0
    assert "0" * 64 in done.out
    assert imported("image", "verify", "--format", "json").json["strays"] == ["0" * 64]


def test_check(imported: Guestapi) -> None:
    """check counts images, and fails if one of them cannot be exported."""
    found = {one.split(":")[0]: one for one in imported("check").out.splitlines()}
    assert "1 known, 5000 bytes" in found["ok   images"]
    (imported.directory / "images" / FP).write_bytes(b"")
    found = {one.split(":")[0]: one for one in imported("check").out.splitlines()}
    assert "1 known, 1 cannot be given out" in found["FAIL images"]
    assert "has 0 bytes, 5000 were imported" in found["FAIL images"]


def test_directory_of_the_configuration(guestapi: Guestapi, file: Path, tmp_path: Path) -> None:
    """Images are in the configured directory."""
    with guestapi.config.open("a") as config:
        config.write(f'[images]\ndirectory = "{tmp_path}/elsewhere"\n')
    guestapi.good("image", "import", str(file))
    assert (tmp_path / "elsewhere" / FP).read_bytes() == CONTENT
    assert not (tmp_path / "images").exists()


def test_progress_bar(guestapi: Guestapi, file: Path) -> None:
    """A terminal shows a progress bar; standard output has only the fingerprint."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [COMMAND, "--config", guestapi.config, "image", "import", file],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    bar = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == f"{FP}\n".encode()
    assert "importing" in bar
    assert "5.0" in bar


def test_interrupted_import(guestapi: Guestapi, tmp_path: Path) -> None:
    """An interrupted or killed import leaves no image, and no file after the next import."""
    os.mkfifo(tmp_path / "endless.tar")
    begun: set[Path] = set()

    def begins() -> bool:
        """Return whether another import has begun to write; files of earlier ones may vanish at any time."""
        for path in (guestapi.directory / "images").glob(".import-*"):
            with suppress(FileNotFoundError):
                if path not in begun and path.stat().st_size:
                    begun.add(path)
                    return True
        return False

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with (
            subprocess.Popen(
                [COMMAND, "--config", guestapi.config, "image", "import", tmp_path / "endless.tar"]
            ) as run,
            (tmp_path / "endless.tar").open("wb", buffering=0) as pipe,
        ):
            pipe.write(CONTENT)
            until = time.monotonic() + TIMEOUT
            while not begins():
                assert time.monotonic() < until
                time.sleep(0.01)
            run.send_signal(number)
            assert run.wait(TIMEOUT) != 0
        assert listed(guestapi) == []
        if number == signal.SIGINT:
            assert list((guestapi.directory / "images").iterdir()) == []
    (tmp_path / "f.tar.bz2").write_bytes(b"BZh9")
    guestapi.good("image", "import", str(tmp_path / "f.tar.bz2"))
    assert len(list((guestapi.directory / "images").iterdir())) == 1
