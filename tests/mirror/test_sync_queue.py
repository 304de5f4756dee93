"""From events to what is to be looked at: nothing missed, nothing twice, nothing that does not matter."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import msgspec
import pytest

from guestapi.mirror.daemon import DaemonError, DaemonEvent
from guestapi.mirror.sync_queue import SyncBatch, SyncQueue


def event(action: str, source: str, **context: str) -> DaemonEvent:
    """A lifecycle event."""
    metadata = msgspec.json.encode({"action": action, "source": source, "context": context})
    return DaemonEvent("lifecycle", "2026-01-01T00:00:01.5Z", msgspec.Raw(metadata))


def collect(*events: DaemonEvent) -> SyncBatch:
    """What there is to do after them."""
    collected = SyncBatch()
    for one in events:
        collected.add(one)
    return collected


def test_instance_is_looked_at_once_whatever_happens_to_it() -> None:
    """Many events of one instance are one look, and the first of them tells since when."""
    done = collect(*[event("instance-updated", "/1.0/instances/c1")] * 1000)
    assert (done.instances, done.since) == ({("default", "c1")}, 1767225601.5)


def test_project_is_in_the_source() -> None:
    """Of two projects' instances of one name, the right one is looked at; names are decoded."""
    assert collect(event("instance-started", "/1.0/instances/c%31?project=a%2Fb")).instances == {("a/b", "c1")}


def test_renamed_instance_is_looked_at_under_both_names() -> None:
    """The old name is looked at too, so that it is forgotten."""
    done = collect(event("instance-renamed", "/1.0/instances/new", old_name="old"))
    assert done.instances == {("default", "new"), ("default", "old")}


@pytest.mark.parametrize("source", ["/1.0/profiles/default", "/1.0/projects/p", "/1.0/cluster/members/n1"])
def test_what_may_change_all_has_all_looked_at(source: str) -> None:
    """A profile, a project or the cluster may change any instance."""
    assert collect(event("profile-updated", source)).everything


def test_images_are_looked_at_apart() -> None:
    """An image that comes or goes has nothing to do with instances."""
    done = collect(event("image-created", "/1.0/images/abc"))
    assert (done.images, done.instances, done.everything) == (True, set(), False)


@pytest.mark.parametrize(
    "other",
    [
        event("instance-exec", "/1.0/instances/c1"),
        event("instance-snapshot-created", "/1.0/instances/c1/snapshots/s1"),
        event("network-updated", "/1.0/networks/br0"),
        event("", ""),
        event("instance-updated", "/1.0/instances"),
        DaemonEvent("lifecycle", "never", msgspec.Raw(b"[]")),
        DaemonEvent("lifecycle", "", msgspec.Raw(b'{"action":1}')),
    ],
)
def test_what_does_not_matter_is_passed_over(other: DaemonEvent) -> None:
    """Neither a command that is run in an instance nor an event of an unknown form is a reason to look."""
    assert collect(other) == SyncBatch()


def test_first_everything_is_looked_at() -> None:
    """Whoever begins to follow has everything to look at."""
    first = SyncQueue().take(0)
    assert first.everything
    assert first.images


def test_waiting_ends_with_news_and_with_the_daemon() -> None:
    """Who waits is woken by the next event, and is told when the daemon is lost."""
    going = threading.Event()

    def events() -> Iterator[DaemonEvent]:
        going.wait()
        yield event("instance-started", "/1.0/instances/c1")
        going.clear()
        going.wait()
        raise DaemonError("gone")

    queue = following(events())
    going.set()
    assert queue.take(10).instances == {("default", "c1")}
    assert queue.take(0) == SyncBatch()
    going.set()
    with pytest.raises(DaemonError, match="gone"):
        queue.take(10)


def test_ring_wakes_with_nothing_to_look_at() -> None:
    """Who rings has news of the store, not of the daemon."""
    queue = following([])
    queue.ring()
    assert queue.take(10) == SyncBatch()


def following(events: Iterable[DaemonEvent]) -> SyncQueue:
    """SyncQueue of these events, past the first look."""
    queue = SyncQueue()
    queue.take(0)
    threading.Thread(target=queue.read, args=(events,), daemon=True).start()
    return queue
