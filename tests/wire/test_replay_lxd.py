"""The recordings of a live LXD 5.0, replayed against the real service from real containers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.harness.containers import Container, Exchanged
from tests.harness.service import Service
from tests.wire import recordings
from tests.wire.peers import LXD
from tests.wire.recordings import Case
from tests.wire.replaying import (
    check_rules_are_needed,
    compare,
    imported,
    instance_of,
    prepare,
    running,
    sender,
    steps_of,
    waiting,
)

CASES = LXD.load()


@pytest.fixture(scope="module")
def containers(service: Service) -> Iterator[dict[str, Container]]:
    """The recorded containers."""
    with running(LXD, service) as found:
        yield found


@pytest.fixture(scope="module")
def fingerprints(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Images like the recorded ones: the imported fingerprints by the recorded ones."""
    with imported(service, tmp_path_factory.mktemp("images"), recordings.public_image(CASES)) as found:
        yield found


@pytest.fixture(scope="module", autouse=True)
def waits(service: Service) -> Iterator[dict[str, Future[Exchanged]]]:
    """The results of the exchanges that wait for a time limit.

    They begin before the first test; the last tests use them.
    """
    with waiting(LXD, [case for case in CASES if case.name in LXD.waits], service) as begun:
        yield begun


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in LXD.waits], ids=lambda case: f"{case.name}-{case.sender}"
)
def test_recorded_exchange(
    case: Case, service: Service, containers: dict[str, Container], fingerprints: dict[str, str]
) -> None:
    """Each recorded exchange has the recorded result, except for the differences in the table."""
    case, name = case.renamed(fingerprints), instance_of(case)
    prepare(LXD, case, service, name)
    compare(LXD, case, service, name, sender(LXD, case, service, containers)(steps_of(LXD, case)))


@pytest.mark.parametrize("name", LXD.waits)
def test_recorded_wait(service: Service, waits: dict[str, Future[Exchanged]], name: str) -> None:
    """As with LXD 5.0, a connection without a head, or idle, is open after 35 s, longer than in any other dialect."""
    (case,) = (case for case in CASES if case.name == name)
    compare(LXD, case, service, f"slow-{name}", waits[name].result())


def test_every_difference_is_needed() -> None:
    """Every rule in the table of differences applies to a case."""
    check_rules_are_needed(LXD, CASES)
