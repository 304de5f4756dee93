"""A file beside the database that is touched after each commit, so that processes that follow the log read it at once.

The bell only saves time. A ring is missing if a writer was killed before it could ring; then a process that follows the
log finds the change at its next regular look.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from guestapi.store.files import create

if TYPE_CHECKING:
    from pathlib import Path


def bell(database: Path) -> Path:
    """The bell of a database."""
    return database.with_name(os.path.basename(_bell(str(database))))


def ring(database: str) -> None:
    """Notify all listening processes that something was committed. A failure is logged, and is no error of the commit.

    Root does this in a directory of the service's user, so links are not followed.
    """
    path = _bell(database)
    try:
        os.utime(path, follow_symlinks=False)
    except FileNotFoundError:
        _hang(path)
    except OSError as error:
        _warn(f"{path}: cannot be rung: {error.strerror}")


def _bell(database: str) -> str:
    return f"{database}-bell"


def _hang(path: str) -> None:
    try:
        create(path)
    except FileExistsError:
        pass  # Another writer was quicker, and making it rings it.
    except OSError as error:
        _warn(f"{path}: cannot be made: {error.strerror}")


def _warn(text: str) -> None:
    # PERF: loaded for a warning alone. A command that sets a key has no other use for it.
    import logging

    logging.getLogger(__name__).warning("%s", text)
