"""Where log lines go: to the journal, with fields, if stderr is the journal; otherwise to stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Hashable

import systemd.journal

#: Seconds until the same error is logged again.
_REPEAT_SECONDS = 10.0


class LogThrottle:
    """Limits how often the same thing is logged, and counts what was left out."""

    def __init__(
        self,
        seconds: float = _REPEAT_SECONDS,
        *,
        lines: int = 1,
        keys: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Remember nothing yet.

        Args:
            seconds: length of a period, which begins with its first line.
            lines: the most lines about one key in a period.
            keys: how many different keys are remembered. The oldest is forgotten first.
            clock: returns seconds.
        """
        self._seconds = seconds
        self._lines = lines
        self._keys = keys
        self._clock = clock
        self._periods: dict[Hashable, _Period] = {}

    def admit(self, key: Hashable = None) -> int | None:
        """Decide whether a line about `key` may be logged now.

        Returns:
            None if not. Otherwise how many lines about it were left out before; above 0 only at the begin of a period.
        """
        now = self._clock()
        period = self._periods.get(key)
        if period is not None and now < period.until:
            if period.lines < self._lines:
                period.lines += 1
                return 0
            period.left_out += 1
            return None
        if period is not None:
            del self._periods[key]
        elif len(self._periods) >= self._keys:
            del self._periods[next(iter(self._periods))]
        self._periods[key] = _Period(now + self._seconds)
        return 0 if period is None else period.left_out


class _Period:
    __slots__ = ("left_out", "lines", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.lines = 1
        self.left_out = 0


class StateLog:
    """Logs a sentence about the state of something once, until another sentence is true of it."""

    def __init__(self, logger: logging.Logger, level: int = logging.WARNING) -> None:
        """Log nothing yet.

        Args:
            logger: where the sentences go.
            level: their level.
        """
        self._logger = logger
        self._level = level
        self._latest: dict[Hashable, str] = {}

    def log(self, subject: Hashable, sentence: str) -> None:
        """Log the sentence, unless it was the latest about this subject."""
        if self._latest.get(subject) != sentence:
            self._latest[subject] = sentence
            self._logger.log(self._level, "%s", sentence)

    def forget(self, subject: Hashable) -> None:
        """Log the next sentence about this subject, whatever it is."""
        self._latest.pop(subject, None)


class ThrottledLog:
    """Logs a sentence about a subject at most once in some seconds, then with how often it was left out."""

    def __init__(self, logger: logging.Logger, level: int) -> None:
        """Log nothing yet.

        Args:
            logger: where the sentences go.
            level: their level.
        """
        self._logger = logger
        self._level = level
        self._throttle = LogThrottle()

    def log(self, sentence: str, subject: Hashable = None) -> None:
        """Log the sentence, unless one about this subject was logged a moment ago.

        Args:
            sentence: what is logged.
            subject: what it is about; None: the sentence itself.
        """
        left_out = self._throttle.admit(sentence if subject is None else subject)
        if left_out is not None:
            self._logger.log(self._level, "%s", _counted(sentence, left_out))


class JournalHandler(logging.Handler):
    """Sends a record to the journal, with the fields in its attribute ``fields``, if it has any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record, as logging.Handler requires."""
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


class ErrorThrottle(logging.Filter):
    """Logs an error at most once in some seconds, because a guest may cause any number of the same one."""

    def __init__(self) -> None:
        super().__init__()
        self._throttle = LogThrottle()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record is logged, as logging.Filter requires."""
        if record.levelno < logging.ERROR or record.exc_info:
            return True
        message = record.getMessage()
        left_out = self._throttle.admit(message)
        if left_out is None:
            return False
        if left_out:
            record.msg, record.args = "%s", (_counted(message, left_out),)
        return True


def _counted(sentence: str, left_out: int) -> str:
    return f"{sentence} ({left_out} more times before)" if left_out else sentence


def to_journal() -> bool:
    """Tell whether stderr is connected to the journal (systemd.exec(5), $JOURNAL_STREAM)."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: str) -> None:
    """Send the log lines of this package and of gunicorn to the journal or stderr.

    Args:
        level: the least that is logged, like ``info``. A later call may change it.
    """
    handler: logging.Handler
    if to_journal():
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s [%(process)d] %(levelname)s %(message)s"))
    handler.addFilter(ErrorThrottle())
    for name in ("guestapi", "gunicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
