"""What workers hand over: each is counted once, whenever it ends and whoever reads meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from guestapi.metrics.counters import EVENT_BOUNDS, REQUEST_BOUNDS, WorkerCounters
from guestapi.metrics.handover import ReportDirectory
from guestapi.metrics.health import answering, find_failure
from guestapi.metrics.report import Counts, WorkerReport, add_counts

NOW = 1_764_000_000.0


def counters(requests: int) -> WorkerCounters:
    """Counters of a worker that has answered so many requests."""
    found = WorkerCounters()
    for _number in range(requests):
        found.requests("incus", "/1.0", 200).add(0.002)
    found.count_limit(7, "connections_per_instance")
    found.events = requests
    found.event_ages.add(0.01)
    return found


def report(counts: Counts, *, at: float = NOW, answers: bool = True) -> WorkerReport:
    """A report of a worker."""
    return WorkerReport(
        pid=1, at=at, started=NOW, answers=answers, counts=counts, connections=2, streams=1, instances=[]
    )


def total(directory: ReportDirectory) -> tuple[int, int, int]:
    """Requests, excesses and events of all workers."""
    counts = directory.read().counts
    requests = sum(one.count for one in counts.requests)
    return requests, counts.limits.get("connections_per_instance", 0), counts.events


def test_ended_workers_count_on(tmp_path: Path) -> None:
    """What a worker had counted stays in the sums after its end, and is there once."""
    arbiter = ReportDirectory(tmp_path)
    for number, requests in ((1, 10), (2, 20)):
        ReportDirectory(tmp_path).write_worker(number, report(counters(requests).counts()))
    arbiter.write_service(workers=2, started=2, alive={1, 2})
    assert total(arbiter) == (30, 2, 30)
    for _again in range(3):
        arbiter.write_service(workers=2, started=3, alive={2})
        assert total(ReportDirectory(tmp_path)) == (30, 2, 30)
    assert len(arbiter.read().workers) == 1
    ReportDirectory(tmp_path).write_worker(3, report(counters(5).counts()))
    arbiter.write_service(workers=2, started=3, alive={2, 3})
    assert total(arbiter) == (35, 3, 35)
    arbiter.write_service(workers=2, started=3, alive=set())
    assert total(arbiter) == (35, 3, 35)
    assert sorted(os.listdir(tmp_path)) == ["service"]
    arbiter.clear()
    assert total(arbiter) == (0, 0, 0)


def test_worker_is_not_counted_twice_while_it_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads between the arbiter's two steps sees the worker's file and its counts in the arbiter's: once."""
    arbiter = ReportDirectory(tmp_path)
    arbiter.write_worker(1, report(counters(10).counts()))
    seen: list[tuple[int, int, int]] = []
    remove = Path.unlink

    def look_first(path: Path, missing_ok: bool = False) -> None:
        seen.append(total(ReportDirectory(tmp_path)))
        remove(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", look_first)
    arbiter.write_service(workers=1, started=1, alive=set())
    assert seen == [(10, 1, 10)]
    assert total(arbiter) == (10, 1, 10)


def test_directory_that_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the directory nothing is handed over, and nothing fails; one that cannot be used is named once."""
    directory = ReportDirectory(tmp_path / "none")
    directory.write_worker(1, report(Counts()))
    directory.write_service(workers=1, started=1, alive={1})
    directory.clear()
    assert directory.read().service is None
    assert caplog.messages == []
    (tmp_path / "file").touch()
    directory = ReportDirectory(tmp_path / "file")
    for _again in range(3):
        directory.write_worker(1, report(Counts()))
    assert len(caplog.messages) == 1


def test_garbage_is_no_report(tmp_path: Path) -> None:
    """A file that is none of ours is not read as one."""
    for name, content in (("worker-1", b"{"), ("worker-x", b"{}"), ("service", b"[]"), (".worker-2", b"{}")):
        (tmp_path / name).write_bytes(content)
    found = ReportDirectory(tmp_path).read()
    assert (found.service, found.workers) == (None, ())


def test_who_answers(tmp_path: Path) -> None:
    """A worker answers if it has said so a short time ago; a clock that was set back for a moment changes nothing."""
    directory = ReportDirectory(tmp_path)
    for number, (at, answers) in enumerate([(NOW, True), (NOW - 60, True), (NOW, False), (NOW + 3, True)]):
        directory.write_worker(number, report(Counts(), at=at, answers=answers))
    assert len(answering(directory.read(), NOW)) == 2
    assert find_failure(directory.read()) == "the service does not run, or hands no reports over"
    directory.write_service(workers=4, started=4, alive={0, 1, 2, 3})
    assert find_failure(directory.read()) == "no worker answers"


def test_busiest_instances_are_handed_over() -> None:
    """However many instances ask, a bounded number is handed over, the busiest first; then counting begins anew."""
    found = WorkerCounters()
    for number in range(1, 1001):
        found.count_instance(number, requests=number)
    found.count_instance(None, requests=5)
    activity = found.take_activity({3: 9}, {3: 2})
    assert len(activity) == 100
    assert [one.instance_id for one in activity[:3]] == [1000, 999, 998]
    assert [(one.instance_id, one.connections, one.streams) for one in found.take_activity({3: 9}, {3: 2})] == [
        (3, 9, 2)
    ]


def test_sums_of_nothing() -> None:
    """The sum of no counts is no count; of some, what is there."""
    assert add_counts([]) == Counts()
    one = counters(3).counts()
    assert add_counts([Counts(), one, Counts()]) == one
    doubled = add_counts([one, one])
    assert doubled.requests[0].buckets == [2 * count for count in one.requests[0].buckets]
    assert len(one.requests[0].buckets) == len(REQUEST_BOUNDS) + 1
    assert len(one.event_ages) == len(EVENT_BOUNDS) + 1
    assert msgspec.json.decode(msgspec.json.encode(one), type=Counts) == one
