"""Notices from inside real containers, with a service of two workers."""

from __future__ import annotations

import json

import pytest

from guestapi.callers.namespaces import examine
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from tests.harness.containers import Container
from tests.harness.service import Service
from tests.harness.waiting import until

pytestmark = pytest.mark.root

NOTICES = "/1.0/guestapi/notices"


def listed(container: Container) -> list[dict[str, str]]:
    """The notices that a container is told of."""
    found: list[dict[str, str]] = json.loads(container.ask(NOTICES).text)
    return found


def acknowledge(container: Container, number: str) -> int:
    """Acknowledge a notice; return the status of the answer."""
    return container.ask(f"{NOTICES}/{number}/ack", "POST").status


def announce(service: Service, seconds: str) -> str:
    """Announce a stop; return the notice's id."""
    return service.command("notice", "web", "stop", "--in", seconds).stdout.strip()


def test_acknowledgements(service: Service) -> None:
    """Acknowledged twice it is 204 twice; by another instance, after the time and after a restart it is 404."""
    with service.container("web") as web, service.container("db") as db:
        number = announce(service, "1h")
        assert acknowledge(db, number) == 404
        assert [one["status"] for one in listed(web)] == ["pending"]
        assert listed(db) == []
        assert [acknowledge(web, number) for _time in range(2)] == [204, 204]
        assert [one["status"] for one in listed(web)] == ["acknowledged"]
        soon = announce(service, "1s")
        until(lambda: soon not in [one["id"] for one in listed(web)], "its time")
        assert acknowledge(web, soon) == 404
        assert [one["id"] for one in listed(web)] == [number]
        with service.writer.change() as change:
            stopped = steps.stop(change, get_instance(change, "default", "web"))
            steps.start(change, stopped, examine(web.pid))
        assert listed(web) == []
        assert acknowledge(web, number) == 404
        assert acknowledge(web, "0" * 16) == 404
