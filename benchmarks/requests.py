"""Requests: what each contender answers in a second, how quickly, and at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.figures import Figure
from benchmarks.processes import processor_seconds

#: What is asked for. All but the last repeat one request, which guestapi answers again without asking the application;
#: the last is too many different ones to be kept, so that every request goes all the way.
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
    """One contender under one load: the median of its rounds, but all errors and the worst answer.

    Attributes:
        rate: requests answered in a second.
        share: of what the first contender answers, the median of what it is in each round: a machine that is now fast
            and now slow makes less of a difference to it than to a quotient of medians.
        p50, p99, longest: microseconds from the request to the last byte of its answer.
        cost: microseconds of processor time for each request.
        errors: answers other than 200, or none, in all rounds.
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
    """Put each load on all contenders, taking turns in short rounds; yields their cells load by load.

    Args:
        contenders: the first is what the others are measured by.
        rounds: how many.
        seconds: how long each is.
        paths: of `PATHS`.
        loads: by manner (of `MANNERS`), how many connections at a time.
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
                        # The load's warm-up is in the processor time too, so go by time, not by counted requests.
                        share = result["seconds"] / (result["seconds"] + _WARM_UP)
                        result["cost"] = used * share * 1e6 / max(1, result["requests"])
                        found[contender.name].append(result)
                floor = [result["requests"] for result in found[contenders[0].name]]
                yield [_cell(manner, path, number, name, results, floor) for name, results in found.items()]


#: load.c, WARM_UP.
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
    """What is to be reached, as far as it was measured."""
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
