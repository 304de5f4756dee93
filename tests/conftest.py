"""Fixtures; who may skip: without root some tests cannot run, and say so; in CI that is a failure; and who runs alone.

Two tests may run at a time, each in a process that has a service of its own (pytest-xdist). Those of one module never
do, nor those of modules with the same `xdist_group`: what they share on the host is theirs alone then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness.containers import Container
from tests.harness.machine import Installed
from tests.harness.service import Service

CI = os.environ.get("CI") == "true"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep modules together, groups of them first, for these take longest; skip what needs root where there is none."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    if os.geteuid() == 0 or CI:
        return
    for item in items:
        if {"service", "machine"} & set(getattr(item, "fixturenames", ())) or item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root: containers, and a service of another user"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI a skipped test is one that should have run."""
    # pluggy's wrappers are typed without what their yield returns.
    report = yield
    if CI and report.skipped:  # type: ignore[attr-defined]
        report.outcome = "failed"  # type: ignore[attr-defined]
        report.longrepr = f"skipped in CI: {report.longrepr}"  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """A service with two workers that all tests share; each uses instances of its own."""
    with Service() as running:
        yield running


@pytest.fixture(scope="session")
def c1(service: Service) -> Iterator[Container]:
    """A container that runs as instance c1. Who changes its configuration, changes it back."""
    with service.container("c1", {"user.foo": "bar"}) as container:
        yield container


@pytest.fixture(scope="session")
def machine() -> Iterator[Installed]:
    """A machine of its own, a real systemd as PID 1, on which guestapi is installed; half a minute until it is."""
    with Installed() as booted:
        yield booted
