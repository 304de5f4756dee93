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
        record_property(PROPERTY, {**asdict(report), "log": ""})
