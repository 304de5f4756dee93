"""The files of images: how they come into their directory whole, and how they are opened and checked.

Rules: a file has the fingerprint for its name (``.rootfs`` behind it for the second of a split image) only when it is
whole and on the disk. A row is written after its files are in place and deleted before they are taken away, so a crash
leaves files without a row at the worst; these are never sent. Renames happen under the store's write lock, so two
processes that import or remove the same image do it one after the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex

from guestapi.model import Image, ImageFile, InstanceType
from guestapi.settings import Settings
from guestapi.store import image_formats, image_steps
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.files import give
from guestapi.store.lookup import get_image, list_images
from guestapi.store.writing import Writer

#: Bytes that are read at a time.
_BLOCK = 1 << 20
#: Of files that are being imported. None of these is a fingerprint.
_TEMPORARY = ".import-"

_GIVE = "give the files of an image"

#: A file of an image on its way in: its name, and its bytes in blocks.
Part = tuple[str, Iterable[bytes]]
#: Called with how many more bytes have been read.
Progress = Callable[[int], None]


class ImageFileError(StoreError):
    """A file of an image cannot be read or written, or has changed."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of checking an image's files.

    Attributes:
        image: what was checked.
        fault: one sentence; None if every byte is right.
        renewed: the files are right but look different (restored from a backup, say); so the store was told.
    """

    image: Image
    fault: str | None
    renewed: bool = False


def directory(settings: Settings) -> Path:
    """Where image files lie.

    Raises:
        StoreError: that depends on ``store.url``, which names no file.
    """
    if settings.images.directory is not None:
        return Path(settings.images.directory)
    return database_file(settings.store.url).with_name("images")


def paths(where: Path, image: Image) -> list[Path]:
    """The files of an image."""
    return [where / name for name in _names(image.fingerprint, len(image.files))]


def import_image(
    writer: Writer,
    where: Path,
    sources: Sequence[Path],
    *,
    public: bool = False,
    aliases: Sequence[str] = (),
    progress: Progress = lambda _count: None,
) -> Image:
    """Take an image in: copy, sync, rename, and only then make it known.

    Args:
        writer: the store.
        where: the images' directory, made if it is missing.
        sources: one file, or metadata and root file system.
        public: as of `Image`.
        aliases: as of `Image`.
        progress: is told of what was copied.

    Raises:
        ImageFileError: a file cannot be read or written.
        ConflictError: the image is there already, or another has the alias.
        InvalidNameError: an alias cannot be taken.
    """
    kind: InstanceType = (
        "virtual-machine" if image_formats.extension(sources[-1].name) in image_formats.DISKS else "container"
    )
    draft = Image("", kind, public, False, time.time(), (), tuple(sorted(set(aliases))))
    with ExitStack() as stack:
        parts = [(source.name, _blocks(stack.enter_context(_reading(source)), source)) for source in sources]
        return receive_image(writer, where, draft, parts, progress=progress)


def refuse_other(source: Path) -> None:
    """Refuse a file that is not an image's, or that is cut short, as far as its first and last bytes tell.

    Raises:
        ImageFileError: it is none, or cannot be read.
    """
    if source.exists() and not source.is_file():
        # A pipe cannot be read twice; what else it is, the import will say.
        return
    with _reading(source) as descriptor:
        fault = image_formats.fault(source.name, descriptor)
    if fault is not None:
        raise ImageFileError(f"{source}: {fault}", image_formats.WHAT_IS_TAKEN)


def receive_image(
    writer: Writer,
    where: Path,
    draft: Image,
    parts: Iterable[Part],
    *,
    progress: Progress = lambda _count: None,
) -> Image:
    """Take an image in, wherever its bytes come from, as `import_image` does.

    Args:
        writer: the store.
        where: the images' directory, made if it is missing.
        draft: the image without its files; its fingerprint, if it has one, is what they must turn out to have.
        parts: one file, or metadata and root file system: name, and blocks of bytes. Read one after the other.
        progress: is told of what was copied.

    Raises:
        ImageFileError: a file cannot be read or written, or the bytes are not those of that fingerprint.
        ConflictError: the image is there already, or another has the alias.
        InvalidNameError: an alias cannot be taken.
    """
    _make_directory(where, writer.state_directory)
    _clean(where)
    digest = hashlib.sha256()
    with ExitStack() as stack:
        drafts, files = [], []
        for name, blocks in parts:
            file = stack.enter_context(_draft(where, writer.state_directory))
            _copy(name, blocks, file, digest.update, progress)
            drafts.append(file)
            status = os.fstat(file.descriptor)
            files.append(ImageFile(image_formats.extension(name), status.st_size, status.st_mtime_ns))
        if not 1 <= len(files) <= len(_names("", 2)):
            raise ImageFileError(f"image {draft.fingerprint[:12]}: has {len(files)} files; one or two are an image")
        fingerprint = digest.hexdigest()
        if draft.fingerprint not in ("", fingerprint):
            raise ImageFileError(
                f"image {draft.fingerprint[:12]}: what came has another fingerprint, {fingerprint[:12]}"
            )
        image = replace(draft, fingerprint=fingerprint, files=tuple(files))
        with writer.change() as change:
            # First the row, which may be refused; it counts only when the block has ended, and the files are there.
            image_steps.add_image(change, image)
            try:
                for file, path in zip(drafts, paths(where, image), strict=True):
                    os.rename(file.path, path)
                _sync_directory(where)
            except OSError as error:
                raise ImageFileError(f"{where}: cannot be written: {error.strerror}") from None
    return image


def remove_image(writer: Writer, where: Path, name: str) -> Image:
    """Forget the image that an operator calls `name`, then take its files away.

    Raises:
        UnknownImageError: there is none.
        ImageFileError: the files cannot be taken away; it is forgotten all the same.
    """
    with writer.change() as change:
        image = get_image(change, name)
        image_steps.remove_image(change, image)
    with writer.change() as change:
        # It may have been imported again meanwhile.
        if image.fingerprint not in {one.fingerprint for one in list_images(change)}:
            for path in paths(where, image):
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise ImageFileError(f"{path}: cannot be removed: {error.strerror}") from None
    return image


def open_files(where: Path, image: Image) -> list[int]:
    """Open the files of an image, each of which looks as it did when it was imported.

    Returns:
        Descriptors, to be closed by the caller.

    Raises:
        ImageFileError: one is missing, is not a regular file, or has changed.
    """
    opened: list[int] = []
    try:
        for path, file in zip(paths(where, image), image.files, strict=True):
            descriptor = _open(path)
            opened.append(descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageFileError(f"{path}: is not a regular file")
            if status.st_size != file.size:
                raise ImageFileError(f"{path}: has {status.st_size} bytes, {file.size} were imported")
            if status.st_mtime_ns != file.mtime_ns:
                raise ImageFileError(
                    f"{path}: was changed after it was imported", "'guestapi image verify' reads it all"
                )
    except ImageFileError:
        for descriptor in opened:
            os.close(descriptor)
        raise
    return opened


def verify_image(writer: Writer, where: Path, image: Image, progress: Progress = lambda _count: None) -> Verdict:
    """Read all of an image's files. If every byte is right, how they look now is what they are compared with later."""
    digest = hashlib.sha256()
    files = []
    for path, file in zip(paths(where, image), image.files, strict=True):
        try:
            descriptor = _open(path)
        except ImageFileError as error:
            return Verdict(image, str(error))
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                return Verdict(image, f"{path}: is not a regular file")
            if before.st_size != file.size:
                return Verdict(image, f"{path}: has {before.st_size} bytes, {file.size} were imported")
            for block in _blocks(descriptor, path):
                digest.update(block)
                progress(len(block))
            files.append(replace(file, mtime_ns=before.st_mtime_ns))
        except ImageFileError as error:
            return Verdict(image, str(error))
        finally:
            os.close(descriptor)
    if digest.hexdigest() != image.fingerprint:
        which = paths(where, image)[-1] if len(files) == 1 else f"{where / image.fingerprint} or its .rootfs"
        return Verdict(image, f"{which}: its content was changed, the SHA-256 is {digest.hexdigest()[:12]}...")
    if tuple(files) == image.files:
        return Verdict(image, None)
    with writer.change() as change:
        image_steps.record_files(change, replace(image, files=tuple(files)))
    return Verdict(image, None, renewed=True)


def stray_files(where: Path, known: Sequence[Image]) -> list[str]:
    """Names in the directory that belong to no image, be it after a crash; those of running imports do not count."""
    try:
        present = {entry.name for entry in os.scandir(where)}
    except OSError:
        return []
    expected = {path.name for image in known for path in paths(where, image)}
    return sorted(name for name in present - expected if not name.startswith(_TEMPORARY))


def _names(fingerprint: str, count: int) -> list[str]:
    return [fingerprint, f"{fingerprint}.rootfs"][:count]


@dataclass(frozen=True, slots=True)
class _Draft:
    path: Path
    descriptor: int


@contextmanager
def _draft(where: Path, state: Path) -> Iterator[_Draft]:
    """A new file under a temporary name, which is gone at the end of the block if it was not renamed.

    As long as it is locked (flock(2)), a process is writing it. The lock ends with the process.
    """
    while True:
        path = where / f"{_TEMPORARY}{token_hex(8)}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ImageFileError(f"{where}: cannot be written: {error.strerror}") from None
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            break
        # Between open and flock another process removed it as a leftover.
        os.close(descriptor)
    try:
        give(descriptor, state.stat(), 0o640)
        yield _Draft(path, descriptor)
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def _reading(source: Path) -> Iterator[int]:
    try:
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageFileError(f"{source}: {error.strerror}", _GIVE) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _copy(
    name: str, blocks: Iterable[bytes], draft: _Draft, update: Callable[[bytes], None], progress: Progress
) -> None:
    try:
        for block in blocks:
            update(block)
            _write(draft.descriptor, block)
            progress(len(block))
        if not os.fstat(draft.descriptor).st_size:
            raise ImageFileError(f"{name}: is empty", _GIVE)
        os.fsync(draft.descriptor)
    except OSError as error:
        raise ImageFileError(f"{draft.path.parent}: cannot be written: {error.strerror}") from None


def _blocks(descriptor: int, path: Path) -> Iterator[bytes]:
    while True:
        try:
            block = os.read(descriptor, _BLOCK)
        except OSError as error:
            raise ImageFileError(f"{path}: {error.strerror}", _GIVE) from None
        if not block:
            return
        yield block


def _write(descriptor: int, block: bytes) -> None:
    left = memoryview(block)
    while left:
        left = left[os.write(descriptor, left) :]


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: a FIFO in its place must not block the process.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ImageFileError(f"{path}: {error.strerror}") from None


def _make_directory(where: Path, state: Path) -> None:
    try:
        os.mkdir(where, 0o700)
    except FileExistsError:
        return
    except OSError as error:
        raise ImageFileError(f"{where}: cannot be made: {error.strerror}") from None
    descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # As the database: the owner of the state directory is the service's user.
        give(descriptor, state.stat(), 0o770)
    finally:
        os.close(descriptor)
    _sync_directory(where.parent)


def _sync_directory(where: Path) -> None:
    descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clean(where: Path) -> None:
    """Take away what killed imports have left."""
    for path in where.glob(f"{_TEMPORARY}*"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # A running process is writing it.
        finally:
            os.close(descriptor)
