"""What ``guestapi top`` shows: what the service has handed over and what the store knows. Pure but for `look`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING

from guestapi.encoding import printable
from guestapi.metrics.handover import ReportDirectory, Reports
from guestapi.metrics.health import answering
from guestapi.metrics.report import InstanceActivity
from guestapi.store.lookup import count_instances, list_problems, list_sources, name_instances
from guestapi.store.view import view

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

#: By what instances can be sorted: what it is called, and the key that does it.
SORTS: dict[str, str] = {
    "requests": "r",
    "refusals": "x",
    "connections": "c",
    "streams": "s",
    "name": "n",
}
_COLUMNS = ("PROJECT", "INSTANCE", "REQUESTS/S", "REFUSALS/S", "CONNECTIONS", "STREAMS")


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """A worker: its PID, whether it answers, seconds since its start, and what it has open."""

    pid: int
    answers: bool
    seconds: float
    connections: int
    streams: int


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A source: its name, whether it is followed, seconds since it answered, its lag, and how many problems it has."""

    name: str
    connected: bool
    seconds: float | None
    lag: float
    problems: int


@dataclass(frozen=True, slots=True)
class InstanceLine:
    """What an instance did in the last second, with all workers."""

    project: str
    name: str
    requests: int
    refusals: int
    connections: int
    streams: int


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything at one moment.

    Attributes:
        wanted: how many workers there are to be.
        known, running: instances of the store.
        workers, sources, instances: a line for each.
    """

    wanted: int
    known: int
    running: int
    workers: tuple[WorkerLine, ...]
    sources: tuple[SourceLine, ...]
    instances: tuple[InstanceLine, ...]


def look(directory: ReportDirectory, url: str) -> Overview | None:
    """What is so now; None if the service hands nothing over.

    Args:
        directory: where it hands over.
        url: ``store.url``.

    Raises:
        StoreError: the store cannot be read.
    """
    reports = directory.read()
    if reports.service is None:
        return None
    now = time.time()
    activity = _sum(reports)
    with view(url) as store:
        known, running = count_instances(store)
        names = name_instances(store, activity)
        sources = tuple(
            SourceLine(
                one.name,
                one.connected,
                max(0.0, now - one.contact) if one.contact else None,
                one.lag,
                len(list_problems(store, one.name)),
            )
            for one in list_sources(store)
        )
    fresh = {id(one) for one in answering(reports, now)}
    workers = tuple(
        WorkerLine(one.pid, id(one) in fresh, max(0.0, now - one.started), one.connections, one.streams)
        for one in reports.workers
    )
    instances = tuple(
        InstanceLine(*names[number], one.requests, one.refusals, one.connections, one.streams)
        for number, one in activity.items()
        if number in names
    )
    return Overview(reports.service.workers, known, running, workers, sources, instances)


def choose(overview: Overview, sort: str, wanted: str) -> Overview:
    """The instances that are wanted, in order.

    Args:
        overview: everything.
        sort: of `SORTS`; by name the first comes first, by numbers the largest.
        wanted: part of the project or the name; empty: all.
    """
    found = [one for one in overview.instances if wanted in one.name or wanted in one.project]
    found.sort(key=lambda one: (one.project, one.name))
    if sort != "name":
        found.sort(key=attrgetter(sort), reverse=True)
    return replace(overview, instances=tuple(found))


def render(overview: Overview, rows: int | None = None) -> RenderableType:
    """The overview as `rich` prints it: no boxes, so that it can be cut into columns.

    Args:
        overview: what is shown.
        rows: the most lines of instances; None: all.
    """
    from rich.console import Group

    instances = overview.instances if rows is None else overview.instances[: max(rows, 1)]
    lines: list[RenderableType] = [_headline(overview), ""]
    lines.append(_table(("WORKER", "STATE", "UP", "CONNECTIONS", "STREAMS"), map(_worker, overview.workers)))
    if overview.sources:
        lines += ["", _table(("SOURCE", "STATE", "CONTACT", "LAG", "PROBLEMS"), map(_source, overview.sources))]
    lines += ["", _table(_COLUMNS, map(_instance, instances))]
    return Group(*lines)


def print_once(overview: Overview, console: Console) -> None:
    """Print an overview and no more."""
    console.print(render(overview))


def height(overview: Overview) -> int:
    """How many lines are not of instances."""
    return 6 + len(overview.workers) + (len(overview.sources) + 2 if overview.sources else 0)


def _sum(reports: Reports) -> dict[int, InstanceActivity]:
    found: dict[int, InstanceActivity] = {}
    for report in answering(reports):
        for one in report.instances:
            old = found.get(one.instance_id, InstanceActivity(one.instance_id, 0, 0, 0, 0))
            found[one.instance_id] = InstanceActivity(
                one.instance_id,
                old.requests + one.requests,
                old.refusals + one.refusals,
                old.connections + one.connections,
                old.streams + one.streams,
            )
    return found


def _headline(overview: Overview) -> RenderableType:
    from rich.text import Text

    answer = sum(one.answers for one in overview.workers)
    requests = sum(one.requests for one in overview.instances)
    refusals = sum(one.refusals for one in overview.instances)
    return Text(
        f"{answer} of {overview.wanted} workers answer; {overview.running} of {overview.known} instances run; "
        f"{requests} requests/s, {refusals} refusals/s"
    )


def _worker(one: WorkerLine) -> tuple[str, ...]:
    state = "answers" if one.answers else "silent"
    return str(one.pid), state, _duration(one.seconds), str(one.connections), str(one.streams)


def _source(one: SourceLine) -> tuple[str, ...]:
    contact = "never" if one.seconds is None else _duration(one.seconds)
    state = "followed" if one.connected else "not followed"
    return one.name, state, contact, f"{one.lag:.3f} s", str(one.problems)


def _instance(one: InstanceLine) -> tuple[str, ...]:
    return one.project, one.name, str(one.requests), str(one.refusals), str(one.connections), str(one.streams)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        # Names get what numbers leave; what a guest or a source has chosen is cut off then, not folded.
        name = number < 2
        table.add_column(column, no_wrap=not name, justify="left" if name else "right")
    for row in rows:
        table.add_row(*(Text(printable(cell), no_wrap=True, overflow="ellipsis") for cell in row))
    return table
