"""The records of two hosts' containers show whether both had an instance at a time."""

from __future__ import annotations

import pytest

from tests.harness.witness import WitnessedAnswer, check_order, read_record

ROLE = "frontend"


def asked(*at: float, body: str = ROLE, status: int = 200) -> list[WitnessedAnswer]:
    """Answers on both kinds of connections to what was asked then, each after half a second."""
    return [WitnessedAnswer(how, one, one + 0.5, status, body) for one in at for how in ("kept", "new")]


def test_one_after_the_other() -> None:
    """The new host's first answer comes after the old one's last."""
    unknown = asked(2.0, 6.0, body="pid not in container?", status=500)
    assert check_order(ROLE, asked(1.0) + unknown, asked(3.0, 4.0)) == 2.0


def test_both() -> None:
    """What was asked at the old host after the new one had answered must have no data."""
    with pytest.raises(AssertionError):
        check_order(ROLE, asked(1.0, 3.6), asked(3.0, 4.0))


def test_nobody_asked() -> None:
    """Hosts at which nobody has asked, before and after, show nothing."""
    with pytest.raises(AssertionError):
        check_order(ROLE, asked(1.0), asked(3.0))
    with pytest.raises(AssertionError):
        check_order(ROLE, asked(6.0, status=500), asked(3.0))
    new_alone = [one for one in asked(1.0, 6.0, status=500) if one.how == "new"]
    with pytest.raises(AssertionError):
        check_order(ROLE, asked(1.0) + new_alone, asked(3.0))


def test_a_line_that_is_being_written() -> None:
    """It does not count yet."""
    assert read_record("new 1.0 1.5 200 frontend\nkept 2.0 2.5 2") == [WitnessedAnswer("new", 1.0, 1.5, 200, ROLE)]
