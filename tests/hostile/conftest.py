"""Fixtures of the attacks, and the table of what others noticed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest

from tests.harness.containers import Container
from tests.harness.service import Service
from tests.hostile.arena import Arena, Report, inside

#: Of a test's report.
_PROPERTY = "attack"


@pytest.fixture(scope="package")
def arena() -> Iterator[Arena]:
    """A service of two workers, and the instance to which nothing may happen."""
    with Service(dialects=["incus"]) as service, service.container("victim", {"user.foo": "bar"}) as victim:
        yield Arena(service, victim)


@pytest.fixture(scope="package")
def mallory(arena: Arena) -> Iterator[Container]:
    """The instance that attacks; it has a value of 2 MiB."""
    config = {"user.foo": "bar", "user.large": "x" * (1 << 21)}
    with arena.service.container("mallory", config) as container:
        # So that the workers have opened what they open once, the store in each of their threads.
        with inside(container, "attacks.py", "changes", "0.5") as changes:
            changes.ended()
        yield container


@pytest.fixture(scope="package")
def stranger(arena: Arena) -> Iterator[Container]:
    """A container that has the socket and is no instance."""
    with Container(arena.service.binds, hostname="stranger") as container:
        yield container


@pytest.fixture(autouse=True)
def noticed(arena: Arena, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Every test's attacks go into its report, from whichever process it ran in."""
    before = len(arena.reports)
    yield
    for report in arena.reports[before:]:
        record_property(_PROPERTY, {**asdict(report), "log": ""})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What another instance noticed, attack by attack: figures to look at, on which no test depends."""
    ended = [one for ones in terminalreporter.stats.values() for one in ones if getattr(one, "when", "") == "teardown"]
    lines = [Report(**value) for one in ended for name, value in one.user_properties if name == _PROPERTY]
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
