"""Images in the store: imports, refusals, changed files, and what a killed process leaves."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guestapi.model import Image
from guestapi.names import InvalidNameError
from guestapi.settings import ImageSettings, Settings, StoreSettings
from guestapi.store import image_steps, images
from guestapi.store.errors import ConflictError, UnknownImageError
from guestapi.store.image_steps import set_image
from guestapi.store.images import ImageFileError, directory, import_image, open_files, remove_image, verify_image
from guestapi.store.lookup import get_image, list_images
from guestapi.store.reading import Reader
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.harness.service import USER
from tests.store.processes import Other, other_process


@pytest.fixture
def where(settings: Settings) -> Path:
    """The directory of images, which does not exist yet."""
    return directory(settings)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file to import."""
    path = tmp_path / "My Image.TAR.gz"
    path.write_bytes(b"image" * 1000)
    return path


def known(settings: Settings) -> list[Image]:
    """Return all images of the store."""
    with view(settings.store.url) as store:
        return list_images(store)


def opened(where: Path, image: Image) -> bytes:
    """Return the contents of an image's files, as a guest would receive them."""
    content = b""
    for descriptor in open_files(where, image):
        with os.fdopen(descriptor, "rb") as file:
            content += file.read()
    return content


def test_unified_image(settings: Settings, writer: Writer, reader: Reader, where: Path, source: Path) -> None:
    """One file becomes an image with its SHA-256 as fingerprint, the given properties, and the type from its name."""
    image = import_image(writer, where, [source], public=True, aliases=["b", "a", "b"])
    assert image.fingerprint == hashlib.sha256(source.read_bytes()).hexdigest()
    assert [(file.extension, file.size) for file in image.files] == [(".tar.gz", 5000)]
    assert (image.type, image.public, image.cached, image.aliases) == ("container", True, False, ("a", "b"))
    assert abs(image.created - time.time()) < 60
    assert known(settings) == [image]
    assert reader.image(image.fingerprint) == image
    assert opened(where, image) == source.read_bytes()
    assert [path.name for path in where.iterdir()] == [image.fingerprint]


def test_split_image(settings: Settings, writer: Writer, where: Path, source: Path, tmp_path: Path) -> None:
    """Two files become one image with the SHA-256 of both in a row; a disk image makes it a virtual machine's."""
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(b"QFI\xfb")
    image = import_image(writer, where, [source, disk])
    assert image.fingerprint == hashlib.sha256(source.read_bytes() + disk.read_bytes()).hexdigest()
    assert [file.extension for file in image.files] == [".tar.gz", ".qcow2"]
    assert image.type == "virtual-machine"
    assert opened(where, image) == source.read_bytes() + disk.read_bytes()
    assert {path.name for path in where.iterdir()} == {image.fingerprint, f"{image.fingerprint}.rootfs"}


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("a.tar.xz", ".tar.xz"),
        ("a.b.squashfs", ".squashfs"),
        ("a.img.xz", ".xz"),
        ("a.tar.gz.part", ""),
        ("tar", ""),
        ('a"\r\nX: y', ""),
        ("a.tar.gz\n", ""),
    ],
)
def test_extension(writer: Writer, where: Path, tmp_path: Path, name: str, extension: str) -> None:
    """The extension is a known one, or none, so a file's name cannot inject a header field."""
    (tmp_path / name).write_bytes(b"x")
    assert import_image(writer, where, [tmp_path / name]).files[0].extension == extension


def test_refused_imports(settings: Settings, writer: Writer, where: Path, source: Path, tmp_path: Path) -> None:
    """A file that is unreadable, empty or imported already, and an alias in use, are refused without any change."""
    import_image(writer, where, [source], aliases=["a"])
    before, files = known(settings), sorted(where.iterdir())
    (tmp_path / "empty").touch()
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(ImageFileError, match="No such file"):
        import_image(writer, where, [tmp_path / "missing"])
    with pytest.raises(ImageFileError, match="Is a directory"):
        import_image(writer, where, [tmp_path])
    with pytest.raises(ImageFileError, match="is empty"):
        import_image(writer, where, [source, tmp_path / "empty"])
    with pytest.raises(ConflictError, match="there already"):
        import_image(writer, where, [source])
    with pytest.raises(ConflictError, match="alias 'a' is one of"):
        import_image(writer, where, [tmp_path / "other"], aliases=["a"])
    for alias in ("", "-a", "a\nb", "f" * 64):
        with pytest.raises(InvalidNameError, match="alias"):
            import_image(writer, where, [tmp_path / "other"], aliases=[alias])
    assert (known(settings), sorted(where.iterdir())) == (before, files)


def test_configured_directory(settings: Settings, tmp_path: Path) -> None:
    """The directory is the one in the settings, or else `images` beside the database."""
    assert directory(settings) == tmp_path / "images"
    assert directory(Settings(store=settings.store, images=ImageSettings(directory="/srv/i"))) == Path("/srv/i")


@pytest.mark.root
@pytest.mark.parametrize("elsewhere", [False, True])
def test_owner_and_mode_of_files(users_directory: Path, source: Path, tmp_path: Path, elsewhere: bool) -> None:
    """After an import by root, only owner and group of the state directory have access to directory and files."""
    place = ImageSettings(directory=f"{tmp_path}/images" if elsewhere else None)
    settings = Settings(store=StoreSettings(url=f"sqlite:///{users_directory}/store.db"), images=place)
    before = os.umask(0)
    try:
        image = import_image(Writer(settings, create=True), directory(settings), [source])
    finally:
        os.umask(before)
    for path, mode in ((directory(settings), 0o40770), (directory(settings) / image.fingerprint, 0o100640)):
        status = path.stat()
        assert (status.st_uid, status.st_gid, status.st_mode) == (USER, USER, mode)


def test_names_of_images(settings: Settings, writer: Writer, where: Path, tmp_path: Path) -> None:
    """Commands accept an alias, a fingerprint or its unique beginning; workers accept only a fingerprint."""
    made = []
    for number in range(17):
        (tmp_path / "f").write_bytes(b"%d" % number)
        made.append(import_image(writer, where, [tmp_path / "f"], aliases=[f"alias-{number}"]))
    with view(settings.store.url) as store:
        assert get_image(store, "alias-3") == made[3]
        assert get_image(store, made[3].fingerprint) == made[3]
        assert get_image(store, made[3].fingerprint[:12].upper()) == made[3]
        firsts = [image.fingerprint[0] for image in made]
        common = next(first for first in firsts if firsts.count(first) > 1)
        with pytest.raises(UnknownImageError, match="more than one"):
            get_image(store, common)
        for wrong in ("", "nope", "%", "_" * 64, made[0].fingerprint + "0"):
            with pytest.raises(UnknownImageError, match="no image"):
                get_image(store, wrong)
    reader = Reader(settings.store.url)
    assert [reader.image(name) for name in (made[0].fingerprint[:12], "alias-0", made[0].fingerprint.upper())] == [
        None
    ] * 3
    reader.close()


def test_alias_takes_precedence(settings: Settings, writer: Writer, where: Path, source: Path, tmp_path: Path) -> None:
    """An alias takes precedence over another image's fingerprint with that beginning."""
    first = import_image(writer, where, [source])
    (tmp_path / "f").write_bytes(b"f")
    second = import_image(writer, where, [tmp_path / "f"], aliases=[first.fingerprint[:8]])
    with view(settings.store.url) as store:
        assert get_image(store, first.fingerprint[:8]) == second


def test_changes_are_seen_at_once(writer: Writer, reader: Reader, where: Path, source: Path) -> None:
    """An open reader sees imports, changes and removals at its next read."""
    image = import_image(writer, where, [source])
    with writer.change() as change:
        set_image(change, image, public=True, cached=True, add_aliases=["x", "y"])
    seen = reader.image(image.fingerprint)
    assert seen is not None
    assert (seen.public, seen.cached, seen.aliases) == (True, True, ("x", "y"))
    with writer.change() as change:
        set_image(change, seen, public=False, remove_aliases=["x"])
    seen = reader.image(image.fingerprint)
    assert seen is not None
    assert (seen.public, seen.cached, seen.aliases) == (False, True, ("y",))
    with pytest.raises(ConflictError, match="has no alias 'x'"), writer.change() as change:
        set_image(change, seen, public=True, remove_aliases=["x"])
    assert reader.image(image.fingerprint) == seen
    remove_image(writer, where, "y")
    assert reader.image(image.fingerprint) is None
    assert list(where.iterdir()) == []


def truncate(path: Path) -> None:
    """Remove the file's last byte, and keep its time."""
    times = path.stat()
    os.truncate(path, times.st_size - 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def link(path: Path) -> None:
    """Replace the file by a link to the same content."""
    os.rename(path, path.with_suffix(".x"))
    path.symlink_to(path.with_suffix(".x"))


def fifo(path: Path) -> None:
    """Replace the file by a pipe without a writer."""
    path.unlink()
    os.mkfifo(path)


def rewrite(path: Path) -> None:
    """Change a byte of the file."""
    with path.open("r+b") as file:
        file.write(b"J")


@pytest.mark.parametrize("spoil", [Path.unlink, truncate, link, fifo, rewrite])
def test_invalid_files(writer: Writer, where: Path, source: Path, spoil: Callable[[Path], None]) -> None:
    """A missing, truncated, changed or replaced file is not opened, and verification names it in one sentence."""
    image = import_image(writer, where, [source])
    spoil(where / image.fingerprint)
    held = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ImageFileError, match=str(where / image.fingerprint)) as raised:
        open_files(where, image)
    fault = verify_image(writer, where, image).fault
    assert fault is not None
    assert str(where / image.fingerprint) in fault
    assert "\n" not in fault + str(raised.value)
    assert len(os.listdir("/proc/self/fd")) == held


def test_change_with_the_old_size_and_time(writer: Writer, where: Path, source: Path) -> None:
    """A change with the old size and time is found by verification, which reads the content."""
    image = import_image(writer, where, [source])
    path = where / image.fingerprint
    rewrite(path)
    os.utime(path, ns=(0, image.files[0].mtime_ns))
    assert "content was changed" in (verify_image(writer, where, image).fault or "")


def test_restored_files(settings: Settings, writer: Writer, where: Path, source: Path) -> None:
    """Files with another time and the right content, as after a restore, are accepted after verification."""
    image = import_image(writer, where, [source])
    os.utime(where / image.fingerprint, ns=(0, 10**18))
    with pytest.raises(ImageFileError, match="guestapi image verify"):
        open_files(where, image)
    verdict = verify_image(writer, where, image)
    assert (verdict.fault, verdict.renewed) == (None, True)
    (renewed,) = known(settings)
    assert opened(where, renewed) == source.read_bytes()
    assert verify_image(writer, where, renewed).renewed is False


def test_leftovers_are_cleaned(writer: Writer, where: Path, source: Path) -> None:
    """An import removes the temporary files of killed imports, but not those of a running one."""
    where.mkdir(0o700)
    (where / ".import-dead").write_bytes(b"half")
    (where / ".import-alive").write_bytes(b"half")
    with (where / ".import-alive").open("rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        image = import_image(writer, where, [source])
        assert {path.name for path in where.iterdir()} == {".import-alive", image.fingerprint}
    assert images.stray_files(where, [image]) == []


def test_stray_files(writer: Writer, where: Path, source: Path) -> None:
    """A file without an image, as a crash may leave it, is found, and is replaced when its image is imported again."""
    image = import_image(writer, where, [source])
    with writer.change() as change:
        image_steps.remove_image(change, image)
    assert images.stray_files(where, []) == [image.fingerprint]
    (where / image.fingerprint).write_bytes(b"other content")
    again = import_image(writer, where, [source])
    assert opened(where, again) == source.read_bytes()
    assert images.stray_files(where, [again]) == []


IMPORTING = """
from pathlib import Path
from guestapi.store.images import directory, import_image, remove_image
writer = Writer(settings)
pace, *names = receive().split()
sources = [Path(name) for name in names]
while True:
    send("go")
    image = import_image(writer, directory(settings), sources)
    send("done")
    if pace == "hold":
        receive()
    remove_image(writer, directory(settings), image.fingerprint)
"""


def test_killed_imports(settings: Settings, writer: Writer, where: Path, tmp_path: Path) -> None:
    """After an import or a removal is killed at any moment, each known image is complete; the next import cleans up."""
    sources = [tmp_path / "meta.tar.xz", tmp_path / "root.squashfs"]
    for source in sources:
        source.write_bytes(os.urandom(3 << 20))
    known_at_the_end = 0

    def import_again(other: Other, words: int, pace: str) -> None:
        other.write_line(" ".join([pace, *map(str, sources)]))
        for _word in range(words):
            other.read_line()

    for attempt in range(24):
        with other_process(settings, IMPORTING) as other:
            # Some are killed between import and removal, whatever the load is.
            import_again(other, 1 + attempt % 2, "hold" if attempt % 8 == 7 else "go")
            # No event to wait for: the kill may come at any moment.
            time.sleep(attempt * 0.0015)
            other.kill()
        for image in known(settings):
            known_at_the_end += 1
            assert verify_image(writer, where, image).fault is None
            remove_image(writer, where, image.fingerprint)
    whole = import_image(writer, where, sources)
    assert opened(where, whole) == b"".join(source.read_bytes() for source in sources)
    assert {path.name for path in where.iterdir()} == {whole.fingerprint, f"{whole.fingerprint}.rootfs"}
    assert known_at_the_end, "no import was complete before it was killed"


def test_simultaneous_imports(settings: Settings, writer: Writer, where: Path, source: Path) -> None:
    """Of two simultaneous imports of one image, one succeeds, and the other is refused because it exists."""
    code = """
from pathlib import Path
from guestapi.store.images import directory, import_image
writer = Writer(settings)
source = Path(receive())
send("ready")
receive()
try:
    import_image(writer, directory(settings), [source])
    send("imported")
except GuestapiError as error:
    send(error)
"""
    with other_process(settings, code) as first, other_process(settings, code) as second:
        for other in (first, second):
            other.write_line(str(source))
            assert other.read_line() == "ready"
        for other in (first, second):
            other.write_line("go")
        said = sorted([first.read_line(), second.read_line()])
    assert said[1] == "imported"
    assert "is there already" in said[0]
    (image,) = known(settings)
    assert opened(where, image) == source.read_bytes()
