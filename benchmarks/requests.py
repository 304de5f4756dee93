"""Requests: rate, response times and cost of each contender."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.figures import Figure
from benchmarks.processes import processor_seconds

#: The paths of each load. All but the last repeat one request, which guestapi answers from its cache; the last one has
#: too many different requests to be cached, so that every request reaches the application.
PATHS = {
    "config/KEY": ["/1.0/config/user.foo"],
    "/1.0": ["/1.0"],
    "meta-data": ["/1.0/meta-data"],
    "devices": ["/1.0/devices"],
    "512 different": [f"/1.0/config/user.foo?{number}" for number in range(512)],
}
MANNERS = {"keep": "keep-alive", "new": "new connection"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender under one load: the median of its rounds, except for errors and the longest response.

    Attributes:
        rate: responses per second.
        share: the ratio to the first contender's responses, as the median of the ratios of all rounds: a machine whose
            speed varies affects it less than a ratio of medians.
        p50, p99, longest: microseconds from the request to the last byte of its response.
        cost: microseconds of processor time for each request.
        errors: missing responses, and those with another status than 200, in all rounds.
    """

    manner: str
    path: str
    connections: int
    contender: str
    rate: float
    share: float
    p50: float
    p99: float
    longest: float
    cost: float
    errors: int


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    seconds: float,
    paths: Sequence[str],
    loads: Mapping[str, Sequence[int]],
) -> Iterator[list[Cell]]:
    """Put each load on all contenders, which take turns in short rounds; yield the cells load by load.

    Args:
        contenders: the first one is what the others are compared with.
        rounds: the number of rounds.
        seconds: the length of each round.
        paths: names in `PATHS`.
        loads: for each manner (of `MANNERS`), the numbers of connections at a time.
    """
    for manner, connections in loads.items():
        for path in paths:
            for number in connections:
                found: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
                for _round in range(rounds):
                    for contender in contenders:
                        before = processor_seconds(contender.pids)
                        result = contender.inside.load(contender.socket, manner, number, seconds, PATHS[path])
                        used = processor_seconds(contender.pids) - before
                        # The processor time includes the load's warm-up, so it is scaled by time, not by counted
                        # requests.
                        share = result["seconds"] / (result["seconds"] + _WARM_UP)
                        result["cost"] = used * share * 1e6 / max(1, result["requests"])
                        found[contender.name].append(result)
                floor = [result["requests"] for result in found[contenders[0].name]]
                yield [_cell(manner, path, number, name, results, floor) for name, results in found.items()]


#: WARM_UP in load.c.
_WARM_UP = 0.1


def _cell(manner: str, path: str, connections: int, name: str, results: list[dict[str, Any]], floor: list[int]) -> Cell:
    return Cell(
        manner,
        path,
        connections,
        name,
        rate=median(result["requests"] / result["seconds"] for result in results),
        share=median(result["requests"] / max(1, most) for result, most in zip(results, floor, strict=True)),
        p50=median(result["p50"] for result in results),
        p99=median(result["p99"] for result in results),
        longest=max(result["max"] for result in results),
        cost=median(result["cost"] for result in results),
        errors=sum(result["errors"] for result in results),
    )


def targets(cells: Sequence[Cell]) -> Iterator[Figure]:
    """Yield the targets of the measured cells."""
    found = {(cell.manner, cell.connections, cell.contender[:3]): cell for cell in cells if cell.path == "config/KEY"}
    for manner, number, least in (("keep", 16, 0.70), ("new", 16, 0.60), ("new", 64, 0.60)):
        if ours := found.get((manner, number, "(c)")):
            yield Figure(f"{MANNERS[manner]}, {number} connections: (c) of (a)", ours.share, "", least=least)
    if ours := found.get(("keep", 16, "(c)")):
        stock = found["keep", 16, "(b)"]
        yield Figure("keep-alive, 16 connections: (c) of (b)", ours.rate / max(1, stock.rate), "", least=3)
    if ours := found.get(("keep", 64, "(c)")):
        yield Figure("keep-alive, 64 connections: p99 of p50", ours.p99 / ours.p50, "", most=4)
    if cells:
        yield Figure("errors, of all", sum(cell.errors for cell in cells), "", most=0)
