"""Fixtures, and who may skip: without root some tests cannot run, and say so; in CI that is a failure.

Two modules may run at a time, each in a process that has a `service` of its own (pytest-xdist), but never two tests of
one module: names on the host need only be a module's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.harness.containers import Container
from tests.harness.service import Service

CI = os.environ.get("CI") == "true"

#: These take a minute each and begin first, so that no process is left alone with one at the end. Not test_nspawn.py:
#: it has a `Machine` as test_systemd.py has, and there is one at a time.
LONG = ["test_systemd.py", "test_replay.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with who takes long; skip what needs root where there is none, except in CI."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if os.geteuid() == 0 or CI:
        return
    for item in items:
        if "service" in getattr(item, "fixturenames", ()) or item.get_closest_marker("root"):
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
