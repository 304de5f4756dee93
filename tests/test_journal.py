"""Throttles of the log."""

from __future__ import annotations

import logging

import pytest

from guestapi import journal
from guestapi.journal import ErrorThrottle, LogThrottle, StateLog


def record(level: int, text: str, *args: object) -> logging.LogRecord:
    """Return a log record."""
    return logging.LogRecord("guestapi", level, __file__, 1, text, args, None)


def test_repeated_errors_are_throttled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error is logged once in ten seconds, then with its count; other errors and levels are always logged."""
    now = 1000.0
    monkeypatch.setattr(journal, "LogThrottle", lambda: LogThrottle(clock=lambda: now))
    throttle = ErrorThrottle()
    assert throttle.filter(record(logging.ERROR, "%s is broken", "store"))
    assert not any(throttle.filter(record(logging.ERROR, "%s is broken", "store")) for _time in range(500))
    assert throttle.filter(record(logging.ERROR, "%s is broken", "another"))
    assert all(throttle.filter(record(logging.INFO, "asked")) for _time in range(5))
    now += 11
    again = record(logging.ERROR, "%s is broken", "store")
    assert throttle.filter(again)
    assert again.getMessage() == "store is broken (500 more times before)"
    assert not throttle.filter(record(logging.ERROR, "%s is broken", "store"))


def test_throttle_counts_suppressed_lines() -> None:
    """In a period, a number of lines for a key is admitted; the next period begins with the number of the others."""
    now = 0.0
    throttle = LogThrottle(1.0, lines=2, clock=lambda: now)
    assert [throttle.admit("a") for _line in range(5)] == [0, 0, None, None, None]
    assert throttle.admit("b") == 0
    now = 1.5
    assert [throttle.admit("a") for _line in range(3)] == [3, 0, None]
    assert throttle.admit("b") == 0


def test_many_different_errors_take_bounded_memory() -> None:
    """A new error is always logged. Of many errors the oldest are dropped, so they count as new again."""
    throttle = LogThrottle(keys=100, clock=lambda: 0.0)
    assert [throttle.admit(number) for number in range(1000)] == [0] * 1000
    assert [throttle.admit(number) for number in range(900, 1000)] == [None] * 100
    assert throttle.admit(0) == 0


def test_state_is_logged_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    """A sentence about a subject is logged when it differs from the last one about it."""
    states = StateLog(logging.getLogger("guestapi.test"), logging.ERROR)
    with caplog.at_level(logging.INFO):
        for subject, sentence in [(1, "a"), (1, "a"), (2, "a"), (1, "b"), (1, "a"), (2, "a")]:
            states.log(subject, sentence)
        states.forget(2)
        states.log(2, "a")
    assert [record.message for record in caplog.records] == ["a", "a", "b", "a", "a"]
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
