"""Fixtures of the attacks, and the table of what others noticed of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.containers import Container
from tests.harness.service import Service
from tests.hostile.arena import Arena, Report, inside

_REPORTS = pytest.StashKey[list[Report]]()


@pytest.fixture(scope="package")
def arena(pytestconfig: pytest.Config) -> Iterator[Arena]:
    """A service of two workers, and the instance to which nothing may happen."""
    with Service(dialects=["incus"]) as service, service.container("victim", {"user.foo": "bar"}) as victim:
        arena = Arena(service, victim)
        pytestconfig.stash[_REPORTS] = arena.reports
        yield arena


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What another instance noticed, attack by attack: figures to look at, on which no test depends."""
    reports = config.stash.get(_REPORTS, [])
    if not reports:
        return
    terminalreporter.section("what another instance noticed of attacks: ms; how often it found the queue full; MiB")
    columns = ["answered", "p50", "p99", "max", "full", "grown", "left"]
    terminalreporter.write_line(f"{'attack':16}{''.join(f'{name:>9}' for name in columns)}  what the attacker saw")
    for one in reports:
        if one.victim:
            times = "".join(f"{one.victim[name] * 1000:9.1f}" for name in ("p50", "p99", "max"))
            memory = f"{one.grown / (1 << 20):9.1f}{one.left / (1 << 20):9.1f}"
            counts = f"{one.name:16}{one.victim['answered']:9}{times}{one.victim['full']:9}"
            terminalreporter.write_line(f"{counts}{memory}  {one.attacker}")
