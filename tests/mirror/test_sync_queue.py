"""`SyncQueue`: from events to the instances and images to observe, without losses, duplicates and irrelevant ones."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import msgspec
import pytest

from guestapi.mirror.daemon_model import DaemonError, DaemonEvent
from guestapi.mirror.sync_queue import SyncBatch, SyncQueue


def event(action: str, source: str, **context: str) -> DaemonEvent:
    """Return a lifecycle event."""
    metadata = msgspec.json.encode({"action": action, "source": source, "context": context})
    return DaemonEvent("lifecycle", "2026-01-01T00:00:01.5Z", msgspec.Raw(metadata))


def collect(*events: DaemonEvent) -> SyncBatch:
    """Return the batch of these events."""
    collected = SyncBatch()
    for one in events:
        collected.add(one)
    return collected


def test_instance_is_observed_once() -> None:
    """Many events of one instance give one observation; the first event sets the time of the batch."""
    done = collect(*[event("instance-updated", "/1.0/instances/c1")] * 1000)
    assert (done.instances, done.since) == ({("default", "c1")}, 1767225601.5)


def test_project_is_in_the_source() -> None:
    """The source of an event has project and name, percent-encoded."""
    assert collect(event("instance-started", "/1.0/instances/c%31?project=a%2Fb")).instances == {("a/b", "c1")}


def test_renamed_instance_is_observed_under_both_names() -> None:
    """A renamed instance is also observed under its old name, so that this one is removed."""
    done = collect(event("instance-renamed", "/1.0/instances/new", old_name="old"))
    assert done.instances == {("default", "new"), ("default", "old")}


@pytest.mark.parametrize("source", ["/1.0/profiles/default", "/1.0/projects/p", "/1.0/cluster/members/n1"])
def test_events_that_concern_all_instances(source: str) -> None:
    """An event of a profile, a project or the cluster asks for an observation of all instances."""
    assert collect(event("profile-updated", source)).everything


def test_images_are_observed_separately() -> None:
    """An event of an image asks for an observation of the images only."""
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
def test_irrelevant_events(other: DaemonEvent) -> None:
    """Events of commands in an instance and those of unknown forms ask for no observation."""
    assert collect(other) == SyncBatch()


def test_first_batch_is_everything() -> None:
    """A new queue asks for an observation of everything."""
    first = SyncQueue().take(0)
    assert first.everything
    assert first.images


def test_wait_ends_with_an_event_or_an_error() -> None:
    """An event ends the wait; the loss of the daemon raises its error."""
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


def test_ring_ends_the_wait() -> None:
    """A ring ends the wait without anything to observe: it concerns the store, not the daemon."""
    queue = following([])
    queue.ring()
    assert queue.take(10) == SyncBatch()


def following(events: Iterable[DaemonEvent]) -> SyncQueue:
    """Return a queue that reads these events, after its first batch."""
    queue = SyncQueue()
    queue.take(0)
    threading.Thread(target=queue.read, args=(events,), daemon=True).start()
    return queue
