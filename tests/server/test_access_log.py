"""`ExcessLog`: exceeded limits are logged in few lines for each instance, however often they are exceeded."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from guestapi.callers.credentials import machine_credentials
from guestapi.callers.identify import Caller
from guestapi.server.access_log import ExcessLog, RequestLog, requests
from guestapi.settings import LogSettings
from tests.api.fakes import instance


class Records(logging.Handler):
    """Collects log records."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the message and the fields."""
        self.seen.append((record.getMessage(), record.__dict__["fields"]))


@pytest.fixture
def records() -> Iterator[Records]:
    """Collect log records about requests."""
    handler = Records()
    requests.addHandler(handler)
    yield handler
    requests.removeHandler(handler)


def test_excesses_are_logged_once_in_ten_seconds(records: Records) -> None:
    """A thousand excesses give one line; later ones are logged after ten seconds; each instance has its own line."""
    now = 100.0
    excesses = ExcessLog({7: instance()}.get, lambda: now)
    for _time in range(1000):
        excesses.count(7, "writes_per_second")
    excesses.count(None, "connections_per_instance")
    assert excesses.flush() == 1001
    assert records.seen == [
        (
            "default/c1: limit writes_per_second exceeded 1000 times",
            {"LIMIT": "writes_per_second", "COUNT": "1000", "INSTANCE": "c1", "PROJECT": "default"},
        ),
        (
            "callers in no registered instance: limit connections_per_instance exceeded 1 times",
            {"LIMIT": "connections_per_instance", "COUNT": "1"},
        ),
    ]
    records.seen.clear()
    excesses.count(7, "writes_per_second")
    excesses.count(7, "streams_per_instance")
    now += 5
    assert excesses.flush() == 1
    assert [fields["LIMIT"] for _line, fields in records.seen] == ["streams_per_instance"]
    now += 5.5
    assert excesses.flush() == 1
    assert records.seen[-1][0] == "default/c1: limit writes_per_second exceeded 1 times"
    now += 100
    assert excesses.flush() == 0
    assert len(records.seen) == 2


def test_the_cid_of_a_virtual_machine_is_a_field(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    """A refused request of an unregistered virtual machine is logged with its CID, and with no process or user."""
    caplog.set_level(logging.INFO, requests.name)
    log = RequestLog(LogSettings(), lambda _id: None)
    log.log_refusal(Caller(machine_credentials(77)), "incus", 500, "pid not in container?", None)
    assert records.seen == [
        ("CID 77: 500, pid not in container?", {"DIALECT": "incus", "STATUS": "500", "CALLER_CID": "77"})
    ]
