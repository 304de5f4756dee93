"""What is told to the journal, and how often."""

from __future__ import annotations

import logging
import time

import pytest

from guestapi.journal import Repeats


def record(level: int, text: str, *args: object) -> logging.LogRecord:
    """What a logger hands to its handlers."""
    return logging.LogRecord("guestapi", level, __file__, 1, text, args, None)


def test_same_error_is_told_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same error is told once in ten seconds, then with how often it came; others, and lesser lines, every time."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    repeats = Repeats()
    assert repeats.filter(record(logging.ERROR, "%s is broken", "store"))
    assert not any(repeats.filter(record(logging.ERROR, "%s is broken", "store")) for _time in range(500))
    assert repeats.filter(record(logging.ERROR, "%s is broken", "another"))
    assert all(repeats.filter(record(logging.INFO, "asked")) for _time in range(5))
    now += 11
    again = record(logging.ERROR, "%s is broken", "store")
    assert repeats.filter(again)
    assert again.getMessage() == "store is broken (500 more times before)"
    assert not repeats.filter(record(logging.ERROR, "%s is broken", "store"))


def test_many_different_errors_take_bounded_memory() -> None:
    """However many different errors there are, only some are remembered; each is told when it is new."""
    repeats = Repeats()
    assert all(repeats.filter(record(logging.ERROR, f"error {number}")) for number in range(1000))
    assert len(repeats._told) <= 100
