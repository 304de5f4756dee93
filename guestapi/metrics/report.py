"""What workers and arbiter hand over, as it stands in files."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class CountedRequests(msgspec.Struct, frozen=True, array_like=True):
    """Requests with the same dialect, route and status.

    Attributes:
        dialect: name of the socket's dialect.
        route: template of the path, or `counters.OTHER`.
        code: status of the responses.
        count, buckets, seconds: as of `counters.Durations`.
    """

    dialect: str
    route: str
    code: int
    count: int
    buckets: list[int]
    seconds: float


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that only grows; attributes as of `counters.WorkerCounters`.

    Attributes:
        requests: by dialect, route and status.
        limits: how often each limit was exceeded.
        cached: how many responses were sent again.
        event_seconds: the sum of `event_ages`.
    """

    requests: list[CountedRequests] = []
    limits: dict[str, int] = {}
    cached: int = 0
    events: int = 0
    event_ages: list[int] = []
    event_seconds: float = 0.0
    lines: int = 0
    lines_left_out: int = 0


class InstanceActivity(msgspec.Struct, frozen=True, array_like=True):
    """What an instance did with one worker in the last second.

    Attributes:
        instance_id: the store's number of it.
        requests: requests that were answered, refused ones among them.
        refusals: requests and connections that exceeded a limit.
        connections: open connections.
        streams: how many of these are streams of events.
    """

    instance_id: int
    requests: int
    refusals: int
    connections: int
    streams: int


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker hands over each second.

    Attributes:
        pid: of the worker.
        at: when it was written, in seconds of Unix time.
        started: when the worker started, in seconds of Unix time.
        answers: whether the worker has answered its own request.
        counts: what it has counted.
        connections, streams: how many are open.
        instances: the busiest.
    """

    pid: int
    at: float
    started: float
    answers: bool
    counts: Counts
    connections: int
    streams: int
    instances: list[InstanceActivity]


class ServiceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the arbiter hands over.

    Attributes:
        workers: how many there are to be.
        started: how many workers were started.
        ended: what workers that have ended had counted.
        folded: the numbers of those workers of which files may still be there, but are in `ended` already.
    """

    workers: int = 0
    started: int = 0
    ended: Counts = Counts()
    folded: list[int] = []


def add_counts(all_counts: Iterable[Counts]) -> Counts:
    """The sum of what several workers have counted."""
    requests: dict[tuple[str, str, int], CountedRequests] = {}
    limits: dict[str, int] = {}
    total = Counts()
    for one in all_counts:
        for new in one.requests:
            key = new.dialect, new.route, new.code
            old = requests.get(key)
            requests[key] = new if old is None else _add_requests(old, new)
        for limit, count in one.limits.items():
            limits[limit] = limits.get(limit, 0) + count
        total = Counts(
            cached=total.cached + one.cached,
            events=total.events + one.events,
            event_ages=_add_lists(total.event_ages, one.event_ages),
            event_seconds=total.event_seconds + one.event_seconds,
            lines=total.lines + one.lines,
            lines_left_out=total.lines_left_out + one.lines_left_out,
        )
    return msgspec.structs.replace(total, requests=list(requests.values()), limits=limits)


def _add_requests(old: CountedRequests, new: CountedRequests) -> CountedRequests:
    count, buckets = old.count + new.count, _add_lists(old.buckets, new.buckets)
    return CountedRequests(old.dialect, old.route, old.code, count, buckets, old.seconds + new.seconds)


def _add_lists(old: list[int], new: list[int]) -> list[int]:
    return [one + other for one, other in zip(old, new, strict=True)] if old and new else list(old or new)
