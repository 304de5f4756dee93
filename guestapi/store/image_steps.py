"""The steps of a change that are about images (`transaction.Change`); their files are the matter of `images`."""

from __future__ import annotations

from collections.abc import Iterable

from guestapi import names
from guestapi.audit import AuditRecord
from guestapi.model import Image
from guestapi.store.errors import ConflictError
from guestapi.store.rows import load_image
from guestapi.store.transaction import Change


def add_image(change: Change, image: Image) -> None:
    """Make an image known whose files are in place.

    Raises:
        InvalidNameError: an alias cannot be taken.
        ConflictError: it is known already, or another image has the alias.
    """
    if load_image(change.connection, image.fingerprint) is not None:
        raise ConflictError(f"image {image.fingerprint} is there already", "'guestapi image set' changes it")
    change.connection.execute(
        "INSERT INTO images (fingerprint, type, public, cached, created, source) VALUES (?, ?, ?, ?, ?, ?)",
        (image.fingerprint, image.type, image.public, image.cached, image.created, image.source),
    )
    _write_files(change, image)
    for alias in dict.fromkeys(image.aliases):
        _add_alias(change, image.fingerprint, alias)
    change.record(AuditRecord("image.add", image=image.fingerprint))


def set_image(
    change: Change,
    image: Image,
    *,
    public: bool | None = None,
    cached: bool | None = None,
    add_aliases: Iterable[str] = (),
    remove_aliases: Iterable[str] = (),
) -> None:
    """Change what is said of an image; None leaves as it is.

    Raises:
        InvalidNameError: an alias cannot be taken.
        ConflictError: another image has the alias, or this one has not the alias that it shall lose.
    """
    public = image.public if public is None else public
    cached = image.cached if cached is None else cached
    statement = "UPDATE images SET public = ?, cached = ? WHERE fingerprint = ?"
    change.connection.execute(statement, (public, cached, image.fingerprint))
    for alias in dict.fromkeys(remove_aliases):
        if alias not in image.aliases:
            raise ConflictError(
                f"image {image.fingerprint[:12]} has no alias {alias!r}", "'guestapi image list' shows all"
            )
        change.connection.execute("DELETE FROM image_aliases WHERE alias = ?", (alias,))
    for alias in dict.fromkeys(add_aliases):
        if alias not in image.aliases:
            _add_alias(change, image.fingerprint, alias)
    change.record(AuditRecord("image.set", image=image.fingerprint))


def record_files(change: Change, image: Image) -> None:
    """Its files were found to be right, though they look different: this is how they look now."""
    change.connection.execute("DELETE FROM image_files WHERE fingerprint = ?", (image.fingerprint,))
    _write_files(change, image)


def remove_image(change: Change, image: Image) -> None:
    """Forget an image; its files are left."""
    change.connection.execute("DELETE FROM images WHERE fingerprint = ?", (image.fingerprint,))
    change.record(AuditRecord("image.remove", image=image.fingerprint))


def _write_files(change: Change, image: Image) -> None:
    change.connection.executemany(
        "INSERT INTO image_files (fingerprint, number, extension, size, mtime_ns) VALUES (?, ?, ?, ?, ?)",
        [
            (image.fingerprint, number, file.extension, file.size, file.mtime_ns)
            for number, file in enumerate(image.files)
        ],
    )


def _add_alias(change: Change, fingerprint: str, alias: str) -> None:
    names.check_alias(alias)
    query = "SELECT fingerprint FROM image_aliases WHERE alias = ?"
    if (other := change.connection.execute(query, (alias,)).fetchone()) is not None:
        raise ConflictError(f"alias {alias!r} is one of image {other[0][:12]} already", "take it from there first")
    change.connection.execute("INSERT INTO image_aliases (alias, fingerprint) VALUES (?, ?)", (alias, fingerprint))
