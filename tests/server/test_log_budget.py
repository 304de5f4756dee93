"""`LogBudget` and `RequestLog`: an instance's log lines are bounded, and never suppress those of another."""

from __future__ import annotations

from typing import Any, cast

import pytest

from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller
from guestapi.server.access_log import RequestLog, requests
from guestapi.server.exchange import Exchange
from guestapi.server.log_budget import BURST_SECONDS, LogBudget
from guestapi.settings import LogSettings
from guestapi.wsgi import CALLER, INSTANCE, Environ
from tests.api.fakes import caller, instance
from tests.harness.clock import ManualClock
from tests.server.test_access_log import Records


def written(budget: LogBudget, key: int, count: int, size: int = 100) -> int:
    """Try to write `count` lines; return how many were admitted."""
    admitted = 0
    for _line in range(count):
        if budget.admit(key):
            budget.charge(key, size)
            admitted += 1
    return admitted


def test_many_lines_do_not_suppress_another_instance_s() -> None:
    """However many lines an instance writes, another one can write all its twenty in the same second."""
    budget = LogBudget(100, 1 << 20, ManualClock())
    assert written(budget, 1, 100_000) == 100
    assert written(budget, 2, 20) == 20


def test_equal_parts() -> None:
    """In a second, all instances together write at most twice the limit of lines, and each gets an equal share."""
    clock = ManualClock()
    budget = LogBudget(100, 1 << 20, clock)
    for _second in range(3):
        clock.now += 1
        counts = [0] * 20
        for _round in range(50):
            for key in range(20):
                counts[key] += written(budget, key, 1)
        assert sum(counts) <= 200
        assert min(counts) >= 5
    clock.now += 1
    assert written(budget, 1, 1000) >= 100


def test_bytes_over_a_long_time() -> None:
    """In an hour, an instance can write its bytes per second plus its burst, and no more."""
    clock = ManualClock()
    budget = LogBudget(100, 1024, clock)
    lines = 0
    for _second in range(3600):
        clock.now += 1
        lines += written(budget, 1, 200, 300)
    assert lines * 300 <= (3600 + BURST_SECONDS) * 1024 + 300
    assert lines * 300 >= 3600 * 1024


def test_entries_are_bounded() -> None:
    """The number of entries of instances that no longer write is bounded."""
    clock = ManualClock()
    budget = LogBudget(100, 1024, clock)
    for key in range(10_000):
        clock.now += 0.01
        written(budget, key, 1)
    assert len(budget._bytes) <= 4096
    assert len(budget._counts) <= 100


def exchange(target: str, status: str = "404 Not Found", *, method: str = "GET", who: Caller | None = None) -> Exchange:
    """Return an exchange with instance 7 for which the application noted no instance."""
    who = who or caller()
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "RAW_URI": target, CALLER: who}
    return Exchange(cast("Environ", environ), who, "incus", status, [], 0, 0.001)


@pytest.fixture
def records() -> Any:
    """Collect log records about requests."""
    handler = Records()
    requests.addHandler(handler)
    requests.setLevel("INFO")
    yield handler
    requests.removeHandler(handler)


def test_lines_are_printable_and_short(records: Records) -> None:
    """A line has only printable characters and a bounded length, whatever the bytes of the request."""
    log = RequestLog(LogSettings(), {7: instance()}.get)
    log.log_exchange(exchange("/\x9b31m\x07\x00\x7f\xe2\x80\xae%9b"))
    log.log_exchange(exchange("/" + "\x9b" * 16000, method="M" * 16000))
    log.log_refusal(caller(), "incus", 400, "\u202e\x9b\n" * 5000, None)
    assert records.seen[0][0].startswith("default/c1: GET /%9B31m%07%00%7F%E2%80%AE%9b -> 404")
    assert all(line.isprintable() and len(line) < 1200 for line, _fields in records.seen)
    assert len(records.seen) == 3


def test_unknown_paths_have_an_instance(records: Records) -> None:
    """A response for which the application noted no instance is logged with its caller's instance."""
    log = RequestLog(LogSettings(), {7: instance()}.get)
    log.log_exchange(exchange("/no/such"))
    (line, fields) = records.seen[0]
    assert line.startswith("default/c1: GET /no/such -> 404")
    assert (fields["INSTANCE"], fields["PROJECT"], fields["STATUS"]) == ("c1", "default", "404")
    noted = exchange("/x")
    noted.instance = instance()
    assert INSTANCE not in noted.environ
    log.log_exchange(noted)
    assert records.seen[1][1]["INSTANCE"] == "c1"


def test_suppressed_lines_are_counted(records: Records) -> None:
    """The number of suppressed lines is logged once in ten seconds for each instance."""
    clock = ManualClock()
    log = RequestLog(LogSettings(requests_per_second=10), {7: instance()}.get, clock)
    stranger = Caller(Credentials(1, 0, 0), container=4026532999)
    for _request in range(500):
        log.log_exchange(exchange("/x"))
        log.log_exchange(exchange("/x", who=stranger))
    assert len(records.seen) <= 20
    records.seen.clear()
    log.flush()
    assert sorted(line.split(":")[0] for line, _fields in records.seen) == ["default/c1", "unknown caller"]
    assert all("more requests were not logged" in line for line, _fields in records.seen)
    clock.now += 5
    log.log_exchange(exchange("/x"))
    log.flush()
    assert sum(int(fields["COUNT"]) for line, fields in records.seen if "COUNT" in fields) >= 980
