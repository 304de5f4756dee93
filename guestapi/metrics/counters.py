"""What a worker counts. No I/O.

Rules: counting a request that is answered again takes less than a hundredth of what the answer takes, so everything is
a plain number, and what can be summed up later is. Nothing is
counted under a name that a guest can choose: routes are templates, limits are settings, and what no route answers is
counted under one name.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from guestapi.metrics.report import CountedRequests, Counts, InstanceActivity

#: The upper bounds of the durations of requests, and of the ages of events when they are delivered, in seconds.
REQUEST_BOUNDS = (0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
EVENT_BOUNDS = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0)
#: The route of what no route answers; and of what the server refuses before there is one, or a duration.
OTHER, REFUSED = "other", "refused"
#: Of responses that are sent again, one in so many is measured and stands for the others: reading the clock twice takes
#: as long as all else that counts them. A power of two.
MEASURED = 16
#: The most instances that are handed over: the busiest of a second.
_MOST_INSTANCES = 100


class Durations:
    """How many durations were how long.

    Attributes:
        count: how many there were, also of those that were not measured.
        buckets: numbers of durations up to each bound, and of longer ones.
        seconds: their sum.
    """

    __slots__ = ("_bounds", "buckets", "count", "seconds")

    def __init__(self, bounds: tuple[float, ...] = REQUEST_BOUNDS) -> None:
        self._bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.seconds = 0.0
        self.count = 0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.count += 1
        self.measure(seconds, 1)

    def measure(self, seconds: float, times: int) -> None:
        """Note a duration that stands for as many."""
        self.buckets[bisect_left(self._bounds, seconds)] += times
        self.seconds += times * seconds


class WorkerCounters:
    """All counters of a worker.

    Attributes:
        events: how many events were given to streams.
        event_ages: how old the oldest entry of the change log was in each batch that was delivered.
        lines: how many lines were logged about requests.
        lines_left_out: how many were not, because the instance had no budget left.
    """

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, int], Durations] = {}
        self._limits: Counter[str] = Counter()
        self._cached = 0
        self.events = 0
        self.event_ages = Durations(EVENT_BOUNDS)
        self.lines = 0
        self.lines_left_out = 0
        #: Requests and refusals of each instance since the last report.
        self._activity: dict[int, list[int]] = {}

    def requests(self, dialect: str, route: str, code: int) -> Durations:
        """The durations of requests with these properties, to be added to."""
        key = dialect, route, code
        found = self._requests.get(key)
        if found is None:
            found = self._requests[key] = Durations()
        return found

    def count_instance(self, instance_id: int | None, *, requests: int = 0, refusals: int = 0) -> None:
        """Count what an instance did; None stands for callers in no registered instance."""
        if instance_id is not None:
            activity = self._activity.setdefault(instance_id, [0, 0])
            activity[0] += requests
            activity[1] += refusals

    def count_cached(self, instance_id: int, durations: Durations, hits: int) -> None:
        """Count responses that were sent again; one in `MEASURED` of them was measured already."""
        self._cached += hits
        durations.count += hits
        self.count_instance(instance_id, requests=hits)

    def count_limit(self, instance_id: int | None, limit: str) -> None:
        """Count that a limit was exceeded."""
        self._limits[limit] += 1
        self.count_instance(instance_id, refusals=1)

    def counts(self) -> Counts:
        """Everything that was counted since the worker started."""
        requests = [
            CountedRequests(dialect, route, code, found.count, list(found.buckets), found.seconds)
            for (dialect, route, code), found in self._requests.items()
        ]
        return Counts(
            requests=requests,
            limits=dict(self._limits),
            cached=self._cached,
            events=self.events,
            event_ages=list(self.event_ages.buckets),
            event_seconds=self.event_ages.seconds,
            lines=self.lines,
            lines_left_out=self.lines_left_out,
        )

    def take_activity(self, connections: Mapping[int, int], streams: Mapping[int, int]) -> list[InstanceActivity]:
        """What the busiest instances did since the last call.

        Args:
            connections: how many each instance has.
            streams: how many of these are streams of events.
        """
        activity, self._activity = self._activity, {}
        known: Iterable[int] = activity.keys() | connections.keys()
        found = []
        for one in known:
            requests, refusals = activity.get(one, (0, 0))
            found.append(InstanceActivity(one, requests, refusals, connections.get(one, 0), streams.get(one, 0)))
        found.sort(key=lambda one: (one.requests + one.refusals, one.connections), reverse=True)
        return found[:_MOST_INSTANCES]
