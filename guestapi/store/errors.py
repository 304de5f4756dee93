"""What can go wrong with the store, and the one place that turns the driver's errors into sentences."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from guestapi.errors import GuestapiError, OperatorError

if TYPE_CHECKING:
    from pathlib import Path


#: What to do where a user may not do what root may.
AS_ROOT = "run this as root"


class StoreError(GuestapiError):
    """The store cannot be used."""


class StoreBusyError(StoreError):
    """Another writer held the store for longer than ``store.lock_seconds``. A later attempt may succeed."""


class ConflictError(OperatorError):
    """The change does not fit what the store holds."""


class UnknownInstanceError(OperatorError):
    """There is no such instance."""


class UnknownProfileError(OperatorError):
    """There is no such profile."""


class UnknownImageError(OperatorError):
    """There is no such image, or more than one."""


@contextmanager
def explained(file: Path | str, cleanup: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Raise the driver's errors within the block as a `StoreError`.

    Args:
        file: the database.
        cleanup: called before the error is raised.

    Raises:
        StoreError: the driver raised an error.
    """
    try:
        yield
    except sqlite3.Error as error:
        cleanup()
        raise explain(error, file) from None


def explain(error: sqlite3.Error, file: Path | str) -> StoreError:
    """Turn what the driver says into a sentence for the operator."""
    # The primary result code is the low byte (sqlite.org/rescode.html).
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusyError(f"{file}: another writer holds the store", "try again")
    if code == sqlite3.SQLITE_CANTOPEN:
        return missing(file)
    return StoreError(f"{file}: {error}", AS_ROOT if code == sqlite3.SQLITE_READONLY and os.geteuid() else None)


def missing(file: Path | str) -> StoreError:
    """What to say of a database that is not there, or not to be seen by this user."""
    try:
        os.stat(file)
        seen = os.access(file, os.R_OK)
    except PermissionError:
        seen = False
    except OSError:
        seen = True
    if not seen:
        return StoreError(f"{file}: permission denied", AS_ROOT)
    return StoreError(f"{file}: missing or not readable", "'guestapi instance add' as root makes it")
