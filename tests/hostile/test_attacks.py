"""While one instance attacks, another always gets correct answers; afterwards the service has released everything."""

from __future__ import annotations

import pytest

from tests.harness.containers import Container
from tests.hostile.arena import HOLDING, OTHERS, Arena, AttackReport
from tests.hostile.attacks import ATTACKS

MIB = 1 << 20
GROWN = {"waits": HOLDING, "unread": HOLDING, "slow_readers": HOLDING, "endless": 8 * MIB}

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("hostile")]


def assert_harmless(arena: Arena, report: AttackReport) -> None:
    """The victim got correct answers, and the workers held little for the attack and have released its memory."""
    assert report.victim["failed"] == []
    assert report.victim["answered"] >= 10
    assert "Traceback" not in report.log, report.log[-4000:]
    assert "[CRITICAL]" not in report.log, report.log[-4000:]
    assert report.grown < GROWN.get(report.name, OTHERS)
    assert report.left < 48 * MIB
    assert arena.victim.ask("/1.0/config/user.foo").text == "bar"


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(arena: Arena, mallory: Container, name: str) -> None:
    """The victim gets every answer, the workers survive and release everything, and the attacker is served again."""
    report = arena.attack(name, mallory)
    assert_harmless(arena, report)
    assert mallory.ask("/1.0/config/user.foo").text == "bar"
