"""From events to what is to be looked at: nothing missed, nothing twice, nothing that does not matter."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import msgspec
import pytest

from guestapi.mirror.daemon import DaemonError, Event
from guestapi.mirror.news import News, Work


def event(action: str, source: str, **context: str) -> Event:
    """A lifecycle event."""
    metadata = msgspec.json.encode({"action": action, "source": source, "context": context})
    return Event("lifecycle", "2026-01-01T00:00:01.5Z", msgspec.Raw(metadata))


def work(*events: Event) -> Work:
    """What there is to do after them."""
    collected = Work()
    for one in events:
        collected.add(one)
    return collected


def test_instance_is_looked_at_once_whatever_happens_to_it() -> None:
    """Many events of one instance are one look, and the first of them tells since when."""
    done = work(*[event("instance-updated", "/1.0/instances/c1")] * 1000)
    assert (done.instances, done.since) == ({("default", "c1")}, 1767225601.5)


def test_project_is_in_the_source() -> None:
    """Of two projects' instances of one name, the right one is looked at; names are decoded."""
    assert work(event("instance-started", "/1.0/instances/c%31?project=a%2Fb")).instances == {("a/b", "c1")}


def test_renamed_instance_is_looked_at_under_both_names() -> None:
    """The old name is looked at too, so that it is forgotten."""
    done = work(event("instance-renamed", "/1.0/instances/new", old_name="old"))
    assert done.instances == {("default", "new"), ("default", "old")}


@pytest.mark.parametrize("source", ["/1.0/profiles/default", "/1.0/projects/p", "/1.0/cluster/members/n1"])
def test_what_may_change_all_has_all_looked_at(source: str) -> None:
    """A profile, a project or the cluster may change any instance."""
    assert work(event("profile-updated", source)).everything


def test_images_are_looked_at_apart() -> None:
    """An image that comes or goes has nothing to do with instances."""
    done = work(event("image-created", "/1.0/images/abc"))
    assert (done.images, done.instances, done.everything) == (True, set(), False)


@pytest.mark.parametrize(
    "other",
    [
        event("instance-exec", "/1.0/instances/c1"),
        event("instance-snapshot-created", "/1.0/instances/c1/snapshots/s1"),
        event("network-updated", "/1.0/networks/br0"),
        event("", ""),
        event("instance-updated", "/1.0/instances"),
        Event("lifecycle", "never", msgspec.Raw(b"[]")),
        Event("lifecycle", "", msgspec.Raw(b'{"action":1}')),
    ],
)
def test_what_does_not_matter_is_passed_over(other: Event) -> None:
    """Neither a command that is run in an instance nor an event of an unknown form is a reason to look."""
    assert work(other) == Work()


def test_first_everything_is_looked_at() -> None:
    """Whoever begins to follow has everything to look at."""
    first = News().take(0)
    assert first.everything
    assert first.images


def test_waiting_ends_with_news_and_with_the_daemon() -> None:
    """Who waits is woken by the next event, and is told when the daemon is lost."""
    going = threading.Event()

    def events() -> Iterator[Event]:
        going.wait()
        yield event("instance-started", "/1.0/instances/c1")
        going.clear()
        going.wait()
        raise DaemonError("gone")

    news = following(events())
    going.set()
    assert news.take(10).instances == {("default", "c1")}
    assert news.take(0) == Work()
    going.set()
    with pytest.raises(DaemonError, match="gone"):
        news.take(10)


def test_ring_wakes_with_nothing_to_look_at() -> None:
    """Who rings has news of the store, not of the daemon."""
    news = following([])
    news.ring()
    assert news.take(10) == Work()


def following(events: Iterable[Event]) -> News:
    """News of these events, past the first look."""
    news = News()
    news.take(0)
    threading.Thread(target=news.read, args=(events,), daemon=True).start()
    return news
