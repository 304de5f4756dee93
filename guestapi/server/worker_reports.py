"""What a worker hands over each second of what it counts."""

from __future__ import annotations

import os
import time
from pathlib import Path

from guestapi.metrics.counters import WorkerCounters
from guestapi.metrics.handover import ReportDirectory
from guestapi.metrics.report import WorkerReport
from guestapi.notifications.broker import Broker
from guestapi.server.context import WorkerContext
from guestapi.settings import MetricsSettings


class WorkerReports:
    """Writes the reports of a worker."""

    def __init__(self, settings: MetricsSettings, number: int, counters: WorkerCounters) -> None:
        """Write nothing yet.

        Args:
            settings: where reports go.
            number: of the worker, never used again by this service.
            counters: the worker's.
        """
        self._directory = ReportDirectory(Path(settings.directory))
        self._number = number
        self._counters = counters
        self._started = time.time()

    def write(self, context: WorkerContext, broker: Broker, *, answers: bool) -> None:
        """Hand over what was counted until now.

        Args:
            context: the worker's.
            broker: the worker's.
            answers: whether the worker has answered its own request.
        """
        counters = self._counters
        for instance_id, durations, hits in context.cache.take_hits():
            counters.count_cached(instance_id, durations, hits)
        connections = context.admission.quota.sizes()
        report = WorkerReport(
            pid=os.getpid(),
            at=time.time(),
            started=self._started,
            answers=answers,
            counts=counters.counts(),
            connections=sum(connections.values()),
            streams=len(broker),
            instances=counters.take_activity(connections, broker.sizes()),
        )
        self._directory.write_worker(self._number, report)
