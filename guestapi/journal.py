"""Where log lines go: to the journal, with fields of their own, if stderr is the journal; to stderr elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time

import systemd.journal

#: Seconds until the same error is told again, and of how many different ones that is remembered.
_REPEAT_SECONDS, _REMEMBERED = 10.0, 100


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


class Repeats(logging.Filter):
    """Lets an error pass that was not told in the last seconds: a guest may bring about as many as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """As logging.Filter."""
        if record.levelno < logging.ERROR or record.exc_info:
            return True
        message, now = record.getMessage(), time.monotonic()
        if now < self._told.get(message, -_REPEAT_SECONDS) + _REPEAT_SECONDS:
            self._left_out[message] = self._left_out.get(message, 0) + 1
            return False
        if len(self._told) >= _REMEMBERED:
            self._told.clear()
            self._left_out.clear()
        self._told[message] = now
        if times := self._left_out.pop(message, 0):
            record.msg, record.args = "%s (%d more times before)", (message, times)
        return True


def set_up(level: str) -> None:
    """Send this package's log lines, and gunicorn's, to where they belong. May be called again with another level."""
    handler: logging.Handler
    if to_journal():
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(levelname)s %(message)s"))
    handler.addFilter(Repeats())
    for name in ("guestapi", "gunicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
