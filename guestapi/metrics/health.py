"""Whether the service answers, and whether all of it does."""

from __future__ import annotations

import time

from guestapi.metrics.handover import FRESH_SECONDS, Reports
from guestapi.metrics.report import WorkerReport
from guestapi.store.errors import StoreError
from guestapi.store.lookup import get_latest_entry
from guestapi.store.view import view

_SILENT = "the service does not run, or hands no reports over"


def answering(reports: Reports, now: float | None = None) -> list[WorkerReport]:
    """The workers that have answered their own request a short time ago.

    Args:
        reports: what the service has handed over.
        now: seconds of Unix time; None: the present.
    """
    now = time.time() if now is None else now
    # A report from the future was written before the clock was set back, and is replaced within a second.
    return [one for one in reports.workers if one.answers and abs(now - one.at) < FRESH_SECONDS]


def find_failure(reports: Reports) -> str | None:
    """Why guests get no answers, in one sentence; None if a worker answers."""
    if answering(reports):
        return None
    return "no worker answers" if reports.service else _SILENT


def find_fault(reports: Reports, url: str) -> str | None:
    """What is not as it is to be, in one sentence; None if all workers answer and the store can be read.

    Args:
        reports: what the service has handed over.
        url: ``store.url``.
    """
    try:
        with view(url) as store:
            get_latest_entry(store)
    except StoreError:
        # The sentence may name a path; the journal and 'guestapi check' have it.
        return "the store cannot be read"
    if reports.service is None:
        return _SILENT
    wanted = reports.service.workers
    if (count := len(answering(reports))) < wanted and count:
        return f"{count} of {wanted} workers answer"
    return find_failure(reports)
