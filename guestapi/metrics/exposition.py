"""What Prometheus is told. Every metric of the service is defined here, once.

Rules: no label has a value that a guest can choose, and no label has more values than the configuration gives it:
dialects, route templates, status codes, names of limits and of sources.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

import guestapi
from guestapi.metrics.counters import EVENT_BOUNDS, REFUSED, REQUEST_BOUNDS
from guestapi.metrics.handover import ReportDirectory, Reports
from guestapi.metrics.health import answering
from guestapi.records import SourceStatus
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import count_entries, count_instances, list_problems, list_sources
from guestapi.store.placements import list_placed, read_status
from guestapi.store.view import View, view

#: Each metric with its help, and the labels that it has.
METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "guestapi_build_info": ("Version of guestapi", ("version",)),
    "guestapi_requests": ("Requests that were answered", ("dialect", "route", "code")),
    "guestapi_request_seconds": ("From the end of a request's head to the end of its response", ("dialect", "route")),
    "guestapi_cached_responses": ("Responses that were sent again without asking the application", ()),
    "guestapi_limit_excesses": ("How often instances exceeded a limit", ("limit",)),
    "guestapi_connections": ("Open connections of known callers", ()),
    "guestapi_streams": ("Open streams of events", ()),
    "guestapi_events": ("Events that were given to streams", ()),
    "guestapi_event_age_seconds": ("From the commit of an entry of the change log to its delivery", ()),
    "guestapi_request_log_lines": ("Lines of the log about requests, written and left out", ("result",)),
    "guestapi_workers": ("Workers that answer", ()),
    "guestapi_workers_wanted": ("Workers that there are to be", ()),
    "guestapi_worker_starts": ("Workers that were started", ()),
    "guestapi_store_up": ("Whether the store can be read", ()),
    "guestapi_store_bytes": ("Size of the files of the store", ("file",)),
    "guestapi_change_log_entries": ("Entries of the change log", ()),
    "guestapi_instances": ("Instances that the store knows", ("state",)),
    "guestapi_fleet_revision": ("Up to which revision the store is as the fleet's database", ()),
    "guestapi_fleet_instances": ("Instances that the fleet has placed on this host", ()),
    "guestapi_source_connected": ("Whether a source is followed", ("source",)),
    "guestapi_source_contact_seconds": ("Time since a source last answered", ("source",)),
    "guestapi_source_lag_seconds": ("From a source's latest change to its commit", ("source",)),
    "guestapi_source_problems": ("What could not be taken over from a source", ("source",)),
}


class ServiceCollector(Collector):
    """Reads what the service has handed over, and the store, whenever it is asked."""

    def __init__(self, reports: ReportDirectory, url: str) -> None:
        """Read nothing yet.

        Args:
            reports: where the service hands over.
            url: ``store.url``.
        """
        self._reports = reports
        self._url = url

    def collect(self) -> Iterator[Metric]:
        """All metrics, as prometheus_client asks for them."""
        yield _gauge("guestapi_build_info", [((guestapi.__version__,), 1)])
        yield from _of_workers(self._reports.read())
        yield from self._of_files()
        try:
            with view(self._url) as store:
                found = list(_of_store(store))
        except StoreError:
            found = []
        yield _gauge("guestapi_store_up", [((), bool(found))])
        yield from found

    def _of_files(self) -> Iterator[Metric]:
        try:
            database = database_file(self._url)
            log = database.with_name(f"{database.name}-wal")
            sizes = [((kind,), file.stat().st_size) for kind, file in (("database", database), ("log", log))]
        except (StoreError, OSError):
            return
        yield _gauge("guestapi_store_bytes", sizes)


def write_metrics(reports: ReportDirectory, url: str) -> bytes:
    """All metrics in Prometheus's text format.

    Args:
        reports: where the service hands over.
        url: ``store.url``.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(reports, url))
    return generate_latest(registry)


def _of_workers(reports: Reports) -> Iterator[Metric]:
    counts = reports.counts
    yield _counter(
        "guestapi_requests",
        [((one.dialect, one.route, str(one.code)), one.count) for one in counts.requests],
    )
    durations: dict[tuple[str, str], tuple[list[int], float]] = {}
    for one in counts.requests:
        if one.route != REFUSED:
            buckets, seconds = durations.get((one.dialect, one.route), ([0] * len(one.buckets), 0.0))
            summed = [old + new for old, new in zip(buckets, one.buckets, strict=True)]
            durations[one.dialect, one.route] = summed, seconds + one.seconds
    help_text, labels = METRICS["guestapi_request_seconds"]
    histogram = HistogramMetricFamily("guestapi_request_seconds", help_text, labels=labels)
    for label_values, (buckets, seconds) in durations.items():
        histogram.add_metric(label_values, _cumulative(REQUEST_BOUNDS, buckets), seconds)
    yield histogram
    yield _counter("guestapi_cached_responses", [((), counts.cached)])
    yield _counter("guestapi_limit_excesses", [((limit,), count) for limit, count in sorted(counts.limits.items())])
    workers = answering(reports)
    yield _gauge("guestapi_connections", [((), sum(one.connections for one in workers))])
    yield _gauge("guestapi_streams", [((), sum(one.streams for one in workers))])
    yield _counter("guestapi_events", [((), counts.events)])
    help_text, _labels = METRICS["guestapi_event_age_seconds"]
    ages = HistogramMetricFamily("guestapi_event_age_seconds", help_text)
    ages.add_metric((), _cumulative(EVENT_BOUNDS, counts.event_ages), counts.event_seconds)
    yield ages
    lines = [(("written",), counts.lines), (("left_out",), counts.lines_left_out)]
    yield _counter("guestapi_request_log_lines", lines)
    yield _gauge("guestapi_workers", [((), len(workers))])
    yield _gauge("guestapi_workers_wanted", [((), reports.service.workers if reports.service else 0)])
    yield _counter("guestapi_worker_starts", [((), reports.service.started if reports.service else 0)])


def _of_store(store: View) -> Iterator[Metric]:
    known, running = count_instances(store)
    yield _gauge("guestapi_instances", [(("running",), running), (("stopped",), known - running)])
    yield _gauge("guestapi_change_log_entries", [((), count_entries(store))])
    now, sources = time.time(), list_sources(store)
    if (fleet := read_status(store)) is not None:
        # It is followed as a source is.
        sources.append(SourceStatus("fleet", "", fleet.connected, fleet.contact, fleet.lag, fleet.fault))
        yield _gauge("guestapi_fleet_revision", [((), fleet.cursor.revision)])
        yield _gauge("guestapi_fleet_instances", [((), len(list_placed(store)))])
    yield _gauge("guestapi_source_connected", [((one.name,), one.connected) for one in sources])
    contacts = [((one.name,), max(0.0, now - one.contact)) for one in sources if one.contact]
    yield _gauge("guestapi_source_contact_seconds", contacts)
    yield _gauge("guestapi_source_lag_seconds", [((one.name,), one.lag) for one in sources])
    problems = [((one.name,), len(list_problems(store, one.name))) for one in sources]
    yield _gauge("guestapi_source_problems", problems)


def _gauge(name: str, samples: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    help_text, labels = METRICS[name]
    family = GaugeMetricFamily(name, help_text, labels=labels)
    for label_values, value in samples:
        family.add_metric(label_values, value)
    return family


def _counter(name: str, samples: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    help_text, labels = METRICS[name]
    family = CounterMetricFamily(name, help_text, labels=labels)
    for label_values, value in samples:
        family.add_metric(label_values, value)
    return family


def _cumulative(bounds: tuple[float, ...], buckets: list[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus has them: each counts what is in the smaller ones, too."""
    found, total = [], 0
    for bound, count in zip((*map(str, bounds), "+Inf"), buckets or [0] * (len(bounds) + 1), strict=True):
        total += count
        found.append((bound, float(total)))
    return found
