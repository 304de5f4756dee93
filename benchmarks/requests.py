"""Requests: what each contender answers in a second, how quickly, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.processes import processor_seconds

PATHS = {
    "config/KEY": "/1.0/config/user.foo",
    "/1.0": "/1.0",
    "meta-data": "/1.0/meta-data",
    "devices": "/1.0/devices",
}
MANNERS = {"keep": "keep-alive", "new": "new connection"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender under one load: the median of its rounds, but all errors and the worst answer.

    Attributes:
        rate: requests answered in a second.
        p50, p99, longest: microseconds from the request to the last byte of its answer.
        cost: microseconds of processor time for each request.
        errors: answers other than 200, or none, in all rounds.
    """

    manner: str
    path: str
    connections: int
    contender: str
    rate: float
    p50: float
    p99: float
    longest: float
    cost: float
    errors: int

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds: float,
    connections: Sequence[int],
    paths: Sequence[str],
    manners: Sequence[str],
) -> Iterator[list[Cell]]:
    """Put each load on all contenders, taking turns in short rounds; yields their cells load by load."""
    for manner in manners:
        for path in paths:
            for number in connections:
                found: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
                for _round in range(rounds):
                    for contender in contenders:
                        before = processor_seconds(contender.pids)
                        result = contender.inside.load(contender.socket, manner, number, seconds, [PATHS[path]])
                        used = processor_seconds(contender.pids) - before
                        # The load's warm-up is in the processor time too, so go by time, not by counted requests.
                        share = result["seconds"] / (result["seconds"] + _WARM_UP)
                        result["cost"] = used * share * 1e6 / max(1, result["requests"])
                        found[contender.name].append(result)
                yield [_cell(manner, path, number, name, results) for name, results in found.items()]


#: load.c, WARM_UP.
_WARM_UP = 0.1


def _cell(manner: str, path: str, connections: int, name: str, results: list[dict[str, Any]]) -> Cell:
    return Cell(
        manner,
        path,
        connections,
        name,
        rate=median(result["requests"] / result["seconds"] for result in results),
        p50=median(result["p50"] for result in results),
        p99=median(result["p99"] for result in results),
        longest=max(result["max"] for result in results),
        cost=median(result["cost"] for result in results),
        errors=sum(result["errors"] for result in results),
    )
