"""Admission and eviction of connections, without a socket."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.http.errors import ProtocolError
from guestapi.server.admission import TOO_MANY_CONNECTIONS, Admission, ConnectionQuota, PendingConnections
from guestapi.settings import LimitSettings
from tests.api.fakes import caller


@dataclass(eq=False)
class Holding:
    """A stand-in for a connection, idle or not, that records whether it was ended."""

    idle: bool = False
    ended: bool = False

    def abort(self) -> None:
        """Record the end."""
        self.ended = True


def anywhere() -> int:
    """Return the number of a container."""
    return 1


def quota(each: int = 4, most: int = 10) -> tuple[ConnectionQuota, list[int | None]]:
    """Make a quota; return it and the list of instances whose connections are evicted."""
    ended: list[int | None] = []
    return ConnectionQuota(each, most, ended.append), ended


def enter(held: ConnectionQuota, instance_id: int | None, count: int = 1, *, idle: bool = False) -> list[Holding]:
    """Add `count` connections of an instance, which must be admitted."""
    made = [Holding(idle) for _number in range(count)]
    assert [held.add(instance_id, one) for one in made] == [None] * count
    return made


def test_limit_of_each_instance() -> None:
    """An instance gets as many connections as its limit, however many others have, and one more when one ends."""
    held, _ended = quota()
    first, *_others = enter(held, 1, 4)
    rejection = held.add(1, Holding())
    assert rejection
    assert (rejection.status, rejection.limit) == (429, "connections_per_instance")
    assert held.rejection(1) == rejection == TOO_MANY_CONNECTIONS
    enter(held, 2, 4)
    held.remove(1, first)
    held.remove(1, first)
    enter(held, 1)
    assert held.add(1, Holding()) == TOO_MANY_CONNECTIONS


def test_closed_connections_leave_no_entries() -> None:
    """The tables keep no entry of a closed connection, whether it was refused, evicted or served."""
    held, empty = (ConnectionQuota(4, 10, print) for _time in range(2))
    for instance_id in (None, *range(1, 500)):
        for one in enter(held, instance_id, 4 if instance_id else 3):
            held.remove(instance_id, one)
            held.remove(instance_id, one)
        assert held.begin_linger(instance_id)
        held.end_linger(instance_id)
    assert _tables(held) == _tables(empty)
    pending = PendingConnections(3)
    for pid in range(500):
        while pending.add(pid, anywhere):
            pass
        for _time in range(3):
            pending.remove(pid, caller(instance_id=pid))
    assert _tables(pending) == _tables(PendingConnections(3))


def _tables(held: object) -> dict[str, object]:
    """Return the attributes; dictionaries for counters, because a counter of zeros equals an empty one."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(held).items()}


def test_unknown_callers_have_one_quota() -> None:
    """All unknown callers share one quota. Beyond it they get the same answer as any unknown caller: 500."""
    held, _ended = quota()
    enter(held, None, 4)
    rejection = held.add(None, Holding())
    assert rejection
    assert (rejection.status, rejection.text) == (500, "pid not in container?")


def test_root_has_reserved_places() -> None:
    """Users other than root get seven eighths of an instance's places; root evicts their idle connections."""
    held, ended = quota(each=16, most=1000)
    others = [Holding(idle=number == 5) for number in range(20)]
    refused = [held.add(1, one, root=False) for one in others]
    assert refused == [None] * 14 + [TOO_MANY_CONNECTIONS] * 6
    enter(held, 1, 2)
    assert not any(one.ended for one in others)
    enter(held, 1)
    assert [one.ended for one in others[:14]] == [number == 5 for number in range(14)]
    # The remaining ones are not idle, and root already has its reserve.
    assert held.add(1, Holding()) == TOO_MANY_CONNECTIONS
    assert held.add(1, Holding(), root=False) == TOO_MANY_CONNECTIONS
    assert ended == []
    # In a full worker, the greediest instance loses connections of users other than root first.
    enter(held, 2, 14)
    assert held.add(2, Holding(), full=True) is None
    assert [one.ended for one in others[:3]] == [True, False, False]
    for one in others:
        held.remove(1, one)
    assert vars(held)["_others"] == {}


def test_root_has_reserved_requests() -> None:
    """Requests of users other than root leave an eighth of their instance's burst to root."""
    admission = Admission(LimitSettings(requests_per_second=0.001, requests_burst=16), quota()[0], descriptors=1000)

    def refused(count: int, *, root: bool) -> int:
        found = 0
        for _request in range(count):
            try:
                admission.check_request(1, root=root)
            except ProtocolError:
                found += 1
        return found

    assert refused(20, root=False) == 6
    assert refused(2, root=True) == 0
    assert refused(1, root=True) == 1


def test_places_of_others_that_end() -> None:
    """When one of many connections of users other than root ends, one more of them is admitted, and not another."""
    held, _ended = quota(each=16, most=1000)
    others = [Holding() for _number in range(14)]
    for one in others:
        assert held.add(1, one, root=False) is None
    held.remove(1, others[0])
    assert [held.add(1, Holding(), root=False) for _time in range(2)] == [None, TOO_MANY_CONNECTIONS]


def test_eviction_from_the_greediest_instance() -> None:
    """In a full worker, an instance with few connections evicts one of the greediest: an idle one or the oldest."""
    held, ended = quota()
    greedy = enter(held, 1, 3)
    idle = enter(held, 1, idle=True)
    enter(held, 2, 3)
    enter(held, 3, 3)
    enter(held, 4)
    assert ended == [1]
    assert [one.ended for one in (*greedy, *idle)] == [False, False, False, True]
    # Now 1, 2 and 3 have three connections each. 4 has one and may have a second: still fewer than the others.
    enter(held, 4)
    assert len(ended) == 2
    # No instance has two connections more than another, so none may evict: they would evict each other for ever.
    rejection = held.add(4, Holding())
    assert rejection
    assert (rejection.status, rejection.limit) == (500, "worker_connections")
    assert len(ended) == 2


@pytest.mark.parametrize(
    ("idle", "ended"),
    [(set(), 1), ({0}, 0), ({2}, 2), ({0, 2}, 2), ({0, 1, 2}, 1)],
    ids=["none", "0", "2", "both", "all"],
)
def test_connection_that_gives_way(idle: set[int], ended: int) -> None:
    """Of the greediest instance an idle connection gives way, of users other than root first; else their oldest."""
    held, _evicted = quota(each=16, most=1000)
    connections = [Holding(idle=number in idle) for number in range(4)]
    for number, one in enumerate(connections):
        assert held.add(1, one, root=number in (0, 3)) is None
    assert held.add(2, Holding(), full=True) is None
    assert [number for number, one in enumerate(connections) if one.ended] == [ended]


def test_full_without_descriptors() -> None:
    """A worker with few free descriptors counts as full, whatever the number of connections."""
    held, ended = quota(most=1000)
    enter(held, 1, 3)
    assert held.add(2, Holding(), full=True) is None
    assert ended == [1]
    rejection = held.add(3, Holding(), full=True)
    assert rejection is None
    assert held.add(4, Holding(), full=True) is not None


def test_descriptors_are_left_free() -> None:
    """Of 1,000 descriptors, admitted connections leave 64 free and pending ones 16; below that, accepting pauses."""
    limits = LimitSettings()
    for descriptor, full in ((935, False), (936, True)):
        held, ended = quota(most=5)
        admission = Admission(limits, held, descriptors=1000)
        enter(held, 1, 3)
        assert admission.add(2, Holding(), descriptor) is None
        assert ended == ([1] if full else [])
    admission = Admission(limits, quota()[0], descriptors=1000)
    assert [admission.must_pause(descriptor) for descriptor in (0, 983, 984, 999)] == [False, False, True, True]


def refusal(admission: Admission, instance_id: int | None) -> str | None:
    """Return the limit that a request of an instance exceeds, with its status, or None."""
    try:
        admission.check_request(instance_id)
    except ProtocolError as error:
        return f"{error.status} {error.limit}"
    return None


def test_requests_are_counted_by_instance() -> None:
    """Each instance has its own burst; unknown callers, who get the same answer in any case, are not counted."""
    limits = LimitSettings(requests_per_second=0.001, requests_burst=3)
    admission = Admission(limits, quota()[0], descriptors=1000)
    assert [refusal(admission, 1) for _time in range(4)] == [None, None, None, "429 requests_per_second"]
    assert [refusal(admission, None) for _time in range(9)] == [None] * 9
    assert refusal(admission, 2) is None
    unlimited = Admission(LimitSettings(), quota()[0], descriptors=1000)
    assert [refusal(unlimited, 1) for _time in range(1000)] == [None] * 1000


def test_unread_bytes_of_others_leave_root_a_part() -> None:
    """Users other than root are refused earlier, and what they leave unread does not take root's eighth."""
    most = 1 << 16
    admission = Admission(LimitSettings(unsent_per_instance=most), quota()[0], descriptors=1000)
    admission.add_unsent(1, most - most // 8 - 1, root=False)
    admission.check_request(1, root=False)
    # An answer may be larger than what was left.
    admission.add_unsent(1, most, root=False)
    with pytest.raises(ProtocolError):
        admission.check_request(1, root=False)
    admission.check_request(1)
    admission.add_unsent(1, most // 8 - 1)
    admission.check_unsent(1)
    admission.add_unsent(1, 1)
    with pytest.raises(ProtocolError):
        admission.check_unsent(1)
    admission.add_unsent(1, -most // 8)
    admission.check_request(1)
    admission.add_unsent(1, most // 8 + 1 - 2 * most, root=False)
    assert not admission.unsent


def test_unread_bytes_are_counted_by_instance() -> None:
    """An instance at its limit of unread bytes is refused until it reads some; its entry goes when all is read."""
    most = 1 << 16
    admission = Admission(LimitSettings(unsent_per_instance=most), quota()[0], descriptors=1000)
    admission.add_unsent(1, most - 1)
    assert refusal(admission, 1) is None
    admission.add_unsent(1, 1)
    assert refusal(admission, 1) == "429 unsent_per_instance"
    assert refusal(admission, 2) is None
    assert refusal(admission, None) is None
    # A large response is checked again when it is ready, because many requests may have waited for it.
    with pytest.raises(ProtocolError):
        admission.check_unsent(1)
    admission.check_unsent(2)
    admission.add_unsent(1, -1)
    assert refusal(admission, 1) is None
    admission.add_unsent(1, 1 - most)
    assert admission.unsent == {}


def test_lingering_is_bounded() -> None:
    """At most sixteen refused connections of an instance stay open for their clients to read the refusal."""
    held, _ended = quota()
    assert [held.begin_linger(1) for _time in range(17)] == [True] * 16 + [False]
    assert held.begin_linger(2)
    held.end_linger(1)
    assert held.begin_linger(1)
    assert not held.begin_linger(1)


@given(st.lists(st.tuples(st.sampled_from([None, 1, 2, 3, 4, 5]), st.booleans(), st.booleans()), max_size=80))
def test_limits_hold_in_any_order(steps: list[tuple[int | None, bool, bool]]) -> None:
    """In any order of arrivals and ends, neither an instance nor the worker exceeds its limit."""
    held, _ended = quota(each=4, most=9)
    living: list[tuple[int | None, Holding]] = []
    for instance_id, comes, idle in steps:
        if comes:
            one = Holding(idle)
            if held.add(instance_id, one) is None:
                living.append((instance_id, one))
        else:
            for pair in [pair for pair in living if pair[0] == instance_id][:1]:
                held.remove(*pair)
                living.remove(pair)
        living = [pair for pair in living if not pair[1].ended]
        assert len(living) <= 9
        counts = [sum(whose == other for whose, _one in living) for other in (None, 1, 2, 3, 4, 5)]
        assert max(counts) <= 4
        if len(living) == 9:
            # An instance without a connection gets one, unless every instance has one at the most.
            poor = next((other for other in (1, 2, 3, 4, 5) if counts[(None, 1, 2, 3, 4, 5).index(other)] == 0), None)
            if poor is not None and max(counts) > 1:
                fresh = Holding()
                assert held.add(poor, fresh) is None
                held.remove(poor, fresh)
                living = [pair for pair in living if not pair[1].ended]


def test_pending_connections_count_by_process() -> None:
    """A process may have as many pending connections as an instance; the count of another process is separate."""
    pending = PendingConnections(3)
    assert [pending.add(7, anywhere) for _time in range(4)] == [True, True, True, False]
    assert pending.add(8, anywhere)
    assert pending.rejection(7) == (None, TOO_MANY_CONNECTIONS)
    pending.remove(7, caller(instance_id=42))
    assert pending.add(7, anywhere)
    assert not pending.add(7, anywhere)
    assert pending.rejection(7) == (42, TOO_MANY_CONNECTIONS)
    for _time in range(3):
        pending.remove(7, caller(instance_id=42))
    assert [pending.add(7, anywhere) for _time in range(4)] == [True, True, True, False]


def test_unknown_process_gets_the_answer_of_unknown_callers() -> None:
    """A process that was identified as unknown gets the answer of unknown callers; an unidentified one gets 429."""
    pending = PendingConnections(2)
    for _time in range(3):
        pending.add(7, anywhere)
    pending.remove(7, None)
    pending.add(7, anywhere)
    assert not pending.add(7, anywhere)
    assert pending.rejection(7) == (None, TOO_MANY_CONNECTIONS)
    pending.remove(7, caller(instance_id=None))
    pending.add(7, anywhere)
    assert not pending.add(7, anywhere)
    assert pending.rejection(7)[1].status == 500


def test_process_without_pending_connections_is_always_admitted() -> None:
    """A process without a pending connection gets one, however many others are pending."""
    pending = PendingConnections(300)
    for pid in range(1, 5):
        for _time in range(256):
            pending.add(pid, anywhere)
    assert not pending.add(1, anywhere)
    assert pending.add(5, anywhere)
    assert not pending.add(5, anywhere)


@pytest.mark.parametrize(("containers", "each"), [(1, 4488), (9, 898), (99, 100)])
def test_containers_share_the_room(containers: int, each: int) -> None:
    """Of the room that is left when there are very many, containers get the same, and leave as much; at least 100."""
    pending = PendingConnections(100, 10_000)
    first = [pid for pid in range(1, 1025) if pending.add(pid, anywhere)]
    added: dict[int, list[int]] = {container: [] for container in range(containers)}
    for pid in range(2_000, 2_000 + 6_000 * containers):
        container = pid % containers
        if pending.add(pid, lambda container=container: container):  # type: ignore[misc]  # mypy has no type for it
            added[container].append(pid)
    assert {len(pids) for pids in added.values()} <= {each - 1, each, each + 1}
    # Who comes last has a place, too.
    assert pending.add(1_000_000, lambda: containers)
    for pid in (*first, *(pid for pids in added.values() for pid in pids), 1_000_000):
        pending.remove(pid, None)
    assert _tables(pending) == _tables(PendingConnections(100, 10_000))


def test_container_with_thousands_of_processes() -> None:
    """Without room, a container may add only as many processes as an instance has connections.

    So it takes a bounded number of the worker's descriptors, and other containers are still admitted.
    """
    pending = PendingConnections(100)
    admitted = [pid for pid in range(1, 60_000) if pending.add(pid, anywhere)]
    assert len(admitted) == 1024 + 100
    assert pending.rejection(59_999)[1].status == 500
    assert pending.add(60_000, lambda: 2)
    for pid in (*admitted, 60_000):
        pending.remove(pid, None)
    assert _tables(pending) == _tables(PendingConnections(100))
