"""The steps of a change that are about images (`transaction.Change`); their files are the matter of `images`."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import delete, insert, select, update

from guestapi import names
from guestapi.model import Image
from guestapi.store.errors import ConflictError
from guestapi.store.rows import load_image
from guestapi.store.tables import image_aliases, image_files, images
from guestapi.store.transaction import Change


def add_image(change: Change, image: Image) -> None:
    """Make an image known whose files are in place.

    Raises:
        InvalidNameError: an alias cannot be taken.
        ConflictError: it is known already, or another image has the alias.
    """
    if load_image(change.connection, image.fingerprint) is not None:
        raise ConflictError(f"image {image.fingerprint} is there already", "'guestapi image set' changes it")
    values = {name: getattr(image, name) for name in ("fingerprint", "type", "public", "cached", "created", "source")}
    change.connection.execute(insert(images).values(values))
    _write_files(change, image)
    for alias in dict.fromkeys(image.aliases):
        _add_alias(change, image.fingerprint, alias)


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
    values = {"public": image.public if public is None else public}
    values["cached"] = image.cached if cached is None else cached
    change.connection.execute(update(images).where(images.c.fingerprint == image.fingerprint).values(values))
    for alias in dict.fromkeys(remove_aliases):
        if alias not in image.aliases:
            raise ConflictError(f"image {image.fingerprint[:12]} has no alias {alias!r}")
        change.connection.execute(delete(image_aliases).where(image_aliases.c.alias == alias))
    for alias in dict.fromkeys(add_aliases):
        if alias not in image.aliases:
            _add_alias(change, image.fingerprint, alias)


def record_files(change: Change, image: Image) -> None:
    """Its files were found to be right, though they look different: this is how they look now."""
    change.connection.execute(delete(image_files).where(image_files.c.fingerprint == image.fingerprint))
    _write_files(change, image)


def remove_image(change: Change, image: Image) -> None:
    """Forget an image; its files are left."""
    change.connection.execute(delete(images).where(images.c.fingerprint == image.fingerprint))


def _write_files(change: Change, image: Image) -> None:
    for number, file in enumerate(image.files):
        values = {"extension": file.extension, "size": file.size, "mtime_ns": file.mtime_ns}
        change.connection.execute(insert(image_files).values(fingerprint=image.fingerprint, number=number, **values))


def _add_alias(change: Change, fingerprint: str, alias: str) -> None:
    names.check_alias(alias)
    query = select(image_aliases.c.fingerprint).where(image_aliases.c.alias == alias)
    if (other := change.connection.execute(query).scalar()) is not None:
        raise ConflictError(f"alias {alias!r} is one of image {other[:12]} already")
    change.connection.execute(insert(image_aliases).values(alias=alias, fingerprint=fingerprint))
