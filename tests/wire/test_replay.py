"""The recordings of a live Incus, replayed against the real service from real containers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.harness.containers import Container, Exchanged
from tests.harness.service import Service
from tests.wire import recordings
from tests.wire.peers import INCUS
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

CASES = INCUS.load()


@pytest.fixture(scope="module")
def containers(service: Service) -> Iterator[dict[str, Container]]:
    """The recorded containers."""
    with running(INCUS, service) as found:
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
    with waiting(INCUS, [case for case in CASES if case.name in INCUS.waits], service) as begun:
        yield begun


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in INCUS.waits], ids=lambda case: case.name)
def test_recorded_exchange(
    case: Case, service: Service, containers: dict[str, Container], fingerprints: dict[str, str]
) -> None:
    """Each recorded exchange has the recorded result, except for the differences in the table."""
    case, name = case.renamed(fingerprints), instance_of(case)
    prepare(INCUS, case, service, name)
    compare(INCUS, case, service, name, sender(INCUS, case, service, containers)(steps_of(INCUS, case)))


@pytest.mark.parametrize(("name", "seconds"), INCUS.waits.items())
def test_recorded_wait(service: Service, waits: dict[str, Future[Exchanged]], name: str, seconds: float) -> None:
    """A connection ends after 3 s without a head, 3 s into a body, or 30 s idle, but accepts a request after 20 s."""
    (case,) = (case for case in CASES if case.name == name)
    result = waits[name].result()
    compare(INCUS, case, service, f"slow-{name}", result)
    # A busy machine may add seconds, but fewer than the difference between two limits.
    assert seconds <= result.seconds + 0.1 < seconds + 15


def test_every_difference_is_needed() -> None:
    """Every rule in the table of differences applies to a case."""
    check_rules_are_needed(INCUS, CASES)
