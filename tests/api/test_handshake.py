"""The parameters of `/1.0/events`, and the time that long queries and fields take."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import falcon.request
import pytest

from guestapi.api.errors import BadRequest
from guestapi.api.handshake import event_format_of, since_of, types_of
from guestapi.notifications.events import EventFormat
from tests.api.fakes import Client, MemoryStore, instance

CONFIG, DEVICE = frozenset({"config"}), frozenset({"device"})


@pytest.mark.parametrize(
    ("query", "types"),
    [
        ("", None),
        ("type", None),
        ("type=", None),
        ("type=&type=config", None),
        ("type=config", CONFIG),
        ("a=b&type=config&type=device", CONFIG),
        ("%74%79pe=config", CONFIG),
        ("t%79%70e=%63onfig", CONFIG),
        ("type=config%2Cdevice", CONFIG | DEVICE),
        ("type=config,device,x", CONFIG | DEVICE),
        ("type=x", frozenset()),
        ("types=config", None),
        ("xtype=config", None),
        ("type=config;x&type=device", DEVICE),
        ("type=%zz&type=device", DEVICE),
        ("type=config%&type=device", DEVICE),
        ("type=con+fig", frozenset()),
    ],
)
def test_types(query: str, types: frozenset[str] | None) -> None:
    """The first `type` counts, decoded as Go decodes it; unknown types are dropped."""
    assert types_of(query) == types


def test_since() -> None:
    """The header field takes precedence over the query; any value that is no id is refused."""
    assert since_of({}, "") is None
    assert since_of({}, "a=1&since=12") == 12
    assert since_of({}, "s%69nce=%31%32") == 12
    assert since_of({"HTTP_LAST_EVENT_ID": "7"}, "since=12") == 7
    assert since_of({"HTTP_LAST_EVENT_ID": ""}, "since=12") == 12
    assert since_of({}, "since=" + "%39" * 18) == 10**18 - 1
    for wrong in ("since", "since=", "since=x", "since=" + "9" * 19, "since=" + "%39" * 19, "since=-1"):
        with pytest.raises(BadRequest):
            since_of({}, wrong)


@pytest.mark.parametrize(
    ("accepts", "wanted"),
    [
        ("text/event-stream", EventFormat.SERVER_SENT),
        ("a/b, Text/Event-Stream;q=1 ,c", EventFormat.SERVER_SENT),
        ("text/event-stream2", EventFormat.LINES),
        ("xtext/event-stream", EventFormat.LINES),
        ("a;text/event-stream", EventFormat.LINES),
    ],
)
def test_format(accepts: str, wanted: EventFormat) -> None:
    """A media type in Accept, with parameters or not, selects server-sent events."""
    assert event_format_of({"HTTP_ACCEPT": accepts}) is wanted


def steps(run: Callable[[], object]) -> int:
    """Count the function calls, in Python and in C, of `run`."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    # Objects of earlier tests that are freed meanwhile would be counted.
    gc.collect()
    gc.disable()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


LONG = ["&" * 16000, "a&" * 8000, "a=b&" * 4000, "%74&" * 4000, "&type;" * 2600, "&%74%79%70" * 1600]


@pytest.mark.parametrize("path", ["/", "/1.0", "/1.0/config", "/1.0/config/user.a", "/1.0/meta-data", "/no/such"])
def test_queries_are_not_parsed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon does not parse the query, and a long one takes as many steps as a short one."""

    def parse(*_arguments: object, **_options: object) -> dict[str, Any]:
        raise AssertionError("a query is parsed")

    monkeypatch.setattr(falcon.request, "parse_query_string", parse)
    guest = Client(MemoryStore(instance({"user.a": "1"})))
    expected = guest.ask(path, query="a=1")
    short = steps(lambda: guest.ask(path, query="a=1"))
    for query in LONG:
        assert guest.ask(path, query=query) == expected
        assert steps(lambda query=query: guest.ask(path, query=query)) == short  # type: ignore[misc]  # bound at once


def test_long_queries_and_fields_take_few_steps() -> None:
    """The events resource reads any long query or field in as many steps as a short one."""

    def read(query: str) -> Callable[[], object]:
        return lambda: (types_of(query), since_of({}, query), event_format_of({"HTTP_ACCEPT": query}))

    most = steps(read("a=1"))
    assert all(steps(read(query)) <= most for query in LONG)


def test_path_of_thousands_of_segments_takes_few_steps() -> None:
    """A path with more segments than any endpoint is refused without further steps."""
    guest = Client(MemoryStore(instance()))
    # The first one loads what all need.
    guest.ask("/a/b/c/d/e/f")
    few = steps(lambda: guest.ask("/a/b/c/d/e/f"))
    assert guest.ask("/a" * 8000).status == 404
    assert steps(lambda: guest.ask("/a" * 8000)) == few


@pytest.mark.parametrize("query", ["type=device", "a=1&" * 4000 + "t%79pe=device"])
def test_events_gets_its_query(query: str) -> None:
    """The events resource gets the query, which Falcon does not see."""
    guest = Client(MemoryStore(instance()))
    assert guest.ask("/1.0/events", query=query + "&since=x").status == 400
    assert guest.ask("/1.0/events", query=query).status == 200
