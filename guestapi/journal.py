"""Where log lines go: to the journal, with fields of their own, if stderr is the journal; to stderr elsewhere."""

from __future__ import annotations

import logging
import os
import sys

import systemd.journal


def to_journal() -> bool:
    """Whether stderr is connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class JournalHandler(logging.Handler):
    """Sends a record with the fields in its attribute ``fields``, which `RequestLog` sets."""

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler."""
        try:
            systemd.journal.send(
                self.format(record),
                PRIORITY=str(systemd.journal.JournalHandler.map_priority(record.levelno)),
                SYSLOG_IDENTIFIER="guestapi",
                LOGGER=record.name,
                **getattr(record, "fields", {}),
            )
        except Exception:
            self.handleError(record)


def set_up(level: str) -> None:
    """Send this package's log lines, and gunicorn's, to where they belong. May be called again with another level."""
    handler: logging.Handler
    if to_journal():
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(levelname)s %(message)s"))
    for name in ("guestapi", "gunicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
