"""What it costs to count a request, as a part of what a repeated request costs, and what handing over takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from timeit import repeat

from benchmarks.contenders import service
from benchmarks.figures import Figure
from benchmarks.processes import SERVER_CORE, Inside, pin, processor_seconds
from benchmarks.requests import PATHS
from benchmarks.scale import SOCKET
from guestapi.metrics.counters import MEASURED, Durations, WorkerCounters
from guestapi.metrics.handover import ReportDirectory
from guestapi.metrics.report import WorkerReport

#: How often the statements that count are timed in a round.
_TIMES = 200_000
#: What a worker may have counted under: every route and status of three dialects that occurs.
_DIALECTS, _ROUTES, _CODES = 3, 12, 10
#: load.c, WARM_UP.
_WARM_UP = 0.1


class _Cached:
    __slots__ = ("durations", "hits")

    def __init__(self) -> None:
        self.durations = WorkerCounters().requests("incus", "/1.0/config/{key}", 200)
        self.hits = 0


def measure(rounds: int, seconds: float) -> Iterator[Figure]:
    """Both in turn, in one run, on the same processor."""
    counting, requests = [], []
    with service() as (running, container):
        pin([running.pid, *running.workers], SERVER_CORE)
        inside = Inside(container.pid)
        for _round in range(rounds):
            before = processor_seconds(running.workers)
            result = inside.load(SOCKET, "keep", 16, seconds, PATHS["config/KEY"])
            used = processor_seconds(running.workers) - before
            share = result["seconds"] / (result["seconds"] + _WARM_UP)
            requests.append(used * share / max(1, result["requests"]))
            counting.append(_count() / _TIMES)
    yield Figure("processor time of a repeated request", median(requests) * 1e6, "µs")
    yield Figure("  of which counting takes", median(counting) * 1e6, "µs")
    part = median(one / other for one, other in zip(counting, requests, strict=True))
    yield Figure("  part of it", part * 100, "%", 1)
    yield Figure("handing over once a second, of a second", _hand_over() * 100, "%", 1)


def _count() -> float:
    """Seconds that the statements of `server.connection` that count a repeated request take, without the loop."""
    cached, exchange, clock = _Cached(), None, time.monotonic

    def count() -> None:
        cached.hits = hits = cached.hits + 1
        began = clock() if exchange is not None or not hits % MEASURED else 0.0
        if began and not hits % MEASURED:
            cached.durations.measure(clock() - began, MEASURED)

    return _fastest(count) - _fastest(_nothing)


def _fastest(call: Callable[[], None]) -> float:
    return min(repeat(call, number=_TIMES, repeat=3))


def _nothing() -> None:
    """As long as a call takes."""


def _hand_over() -> float:
    """Seconds that one report takes of a worker that has counted under all names."""
    counters, durations = WorkerCounters(), Durations()
    for dialect in range(_DIALECTS):
        for route in range(_ROUTES):
            for code in range(_CODES):
                counters.requests(f"dialect {dialect}", f"/1.0/route {route}", 200 + code).add(0.001)
    with tempfile.TemporaryDirectory() as directory:
        reports = ReportDirectory(Path(directory))

        def write() -> None:
            for number in range(1, 1001):
                counters.count_cached(number, durations, 1)
            report = WorkerReport(
                pid=1,
                at=0.0,
                started=0.0,
                answers=True,
                counts=counters.counts(),
                connections=1,
                streams=1,
                instances=counters.take_activity({}, {}),
            )
            reports.write_worker(1, report)

        return min(repeat(write, number=20, repeat=5)) / 20
