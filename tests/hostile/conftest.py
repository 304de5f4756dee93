"""Fixtures of the attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest

from tests.harness.containers import Container
from tests.harness.service import Service
from tests.hostile.arena import Arena, inside
from tests.hostile.table import PROPERTY


@pytest.fixture(scope="package")
def arena() -> Iterator[Arena]:
    """A service of two workers, and the victim, whose requests must not be disturbed."""
    with Service(dialects=["incus"]) as service, service.container("victim", {"user.foo": "bar"}) as victim:
        yield Arena(service, victim)


@pytest.fixture(scope="package")
def mallory(arena: Arena) -> Iterator[Container]:
    """The instance that attacks; it has a value of 2 MiB."""
    config = {"user.foo": "bar", "user.large": "x" * (1 << 21)}
    with arena.service.container("mallory", config) as container:
        # Makes the workers open what they open only once, such as the store in each of their threads.
        with inside(container, "attacks.py", "changes", "0.5") as changes:
            changes.ended()
        arena.service.command("policy", "allow", "attributes", "--instance", "mallory")
        # The change log has entries of 4 MiB for who resumes.
        for number in range(4):
            arena.service.configure("mallory", user_large=str(number) * (1 << 21))
        yield container


@pytest.fixture(scope="package")
def stranger(arena: Arena) -> Iterator[Container]:
    """A container that has the socket but is not registered as an instance."""
    with Container(arena.service.binds, hostname="stranger") as container:
        yield container


@pytest.fixture(autouse=True)
def noticed(arena: Arena, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Record the attacks of each test in its report, from any process of the test run."""
    before = len(arena.reports)
    yield
    for report in arena.reports[before:]:
        record_property(PROPERTY, {**asdict(report), "log": ""})
