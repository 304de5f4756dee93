"""A table of the figures that the victim measured during attacks; no test depends on them."""

from __future__ import annotations

import pytest

from tests.hostile.arena import AttackReport

#: The name of the property of a test's report that holds an attack.
PROPERTY = "attack"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the victim's figures for each attack. For tests/conftest.py, the only plugin that all processes load."""
    ended = [one for ones in terminalreporter.stats.values() for one in ones if getattr(one, "when", "") == "teardown"]
    lines = [AttackReport(**value) for one in ended for name, value in one.user_properties if name == PROPERTY]
    if not lines:
        return
    terminalreporter.section("what another instance noticed of attacks: ms; how often it found the queue full; MiB")
    columns = ["answered", "p50", "p99", "max", "full", "grown", "left"]
    terminalreporter.write_line(f"{'attack':16}{''.join(f'{name:>9}' for name in columns)}  what the attacker saw")
    for one in lines:
        if one.victim:
            times = "".join(f"{one.victim[name] * 1000:9.1f}" for name in ("p50", "p99", "max"))
            memory = f"{one.grown / (1 << 20):9.1f}{one.left / (1 << 20):9.1f}"
            counts = f"{one.name:16}{one.victim['answered']:9}{times}{one.victim['full']:9}"
            terminalreporter.write_line(f"{counts}{memory}  {one.attacker}")
