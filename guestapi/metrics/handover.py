"""How workers hand over what they count: one file for each, in a directory of the service.

Rules: a file is replaced whole, by rename(2), so that nobody reads half of one. A worker that is killed loses what it
counted since its last report. The arbiter adds what an ended worker had counted to its own file, then removes the
worker's: who reads the workers' files first and the arbiter's then, and skips those that it says it has added, counts
each worker once, whenever that happens. So no sum ever becomes smaller.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from guestapi.metrics.report import Counts, ServiceReport, WorkerReport, add_counts

log = logging.getLogger(__name__)

T = TypeVar("T")

_SERVICE = "service"
_WORKER = "worker-"
#: Begins the name of a file that is not complete yet.
_DRAFT = "."
#: Of so many workers it is remembered that they were added, which is more than end while somebody reads.
_REMEMBERED = 256
#: Seconds after which a report counts as one of a worker that does not answer.
FRESH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Reports:
    """What a service has handed over.

    Attributes:
        service: the arbiter's; None: the service does not run, or hands nothing over.
        workers: those of workers that have not ended, as far as is known.
        counts: the sum of all.
    """

    service: ServiceReport | None
    workers: tuple[WorkerReport, ...]
    counts: Counts


class ReportDirectory:
    """The directory with the files. Where it cannot be used, nothing is handed over, and that is logged once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._broken = False
        self._service = ServiceReport()

    def clear(self) -> None:
        """Remove what an earlier service has left. For the arbiter."""
        for name in self._names():
            self._remove(name)

    def write_worker(self, number: int, report: WorkerReport) -> None:
        """Hand a worker's report over.

        Args:
            number: of the worker, never used again by this service.
            report: what it has counted.
        """
        self._write(f"{_WORKER}{number}", report)

    def write_service(self, *, workers: int, started: int, alive: Collection[int]) -> None:
        """Hand the arbiter's report over, with what workers had counted that have ended.

        Args:
            workers: how many there are to be.
            started: how many were started.
            alive: the numbers of those that run.
        """
        ended = [number for number in self._numbers() if number not in alive and number not in self._service.folded]
        found = {number: report for number in ended if (report := self._read_worker(number)) is not None}
        service = ServiceReport(
            workers=workers,
            started=started,
            ended=add_counts([self._service.ended, *(report.counts for report in found.values())]),
            folded=[*self._service.folded, *found][-_REMEMBERED:],
        )
        if service != self._service and self._write(_SERVICE, service):
            self._service = service
        for number in ended:
            if number in self._service.folded:
                self._remove(f"{_WORKER}{number}")

    def read(self) -> Reports:
        """Everything that was handed over. In this order: see the rules."""
        workers = {number: self._read_worker(number) for number in self._numbers()}
        service = self._read(_SERVICE, ServiceReport)
        folded = service.folded if service else []
        alive = tuple(one for number, one in workers.items() if one is not None and number not in folded)
        return Reports(
            service, alive, add_counts([*([service.ended] if service else []), *(one.counts for one in alive)])
        )

    def _numbers(self) -> list[int]:
        names = (name.removeprefix(_WORKER) for name in self._names() if name.startswith(_WORKER))
        return sorted(int(name) for name in names if name.isdecimal())

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._path)
        except OSError:
            return []

    def _read_worker(self, number: int) -> WorkerReport | None:
        return self._read(f"{_WORKER}{number}", WorkerReport)

    def _read(self, name: str, kind: type[T]) -> T | None:
        try:
            return msgspec.json.decode((self._path / name).read_bytes(), type=kind)
        except (OSError, msgspec.DecodeError):
            return None

    def _write(self, name: str, report: WorkerReport | ServiceReport) -> bool:
        draft = self._path / f"{_DRAFT}{name}"
        try:
            draft.write_bytes(msgspec.json.encode(report))
            draft.rename(self._path / name)
        except OSError as error:
            if not self._broken and not isinstance(error, FileNotFoundError):
                log.warning("%s: metrics cannot be handed over: %s", self._path, error.strerror)
            self._broken = True
            return False
        self._broken = False
        return True

    def _remove(self, name: str) -> None:
        try:
            (self._path / name).unlink()
        except OSError:
            pass  # Nobody reads it again: it was added, or is of an earlier service.
