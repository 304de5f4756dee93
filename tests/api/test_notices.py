"""Notices as guests see and acknowledge them."""

from __future__ import annotations

import json

import pytest

from guestapi.settings import LimitSettings
from guestapi.store.notices import Notice
from tests.api.fakes import ROOT, Client, MemoryStore, caller, instance
from tests.api.test_app import ALL, assert_error

NOTICES = "/1.0/guestapi/notices"
STOP = Notice("aa", "stop", "", 1e9, 5.0)
WORDS = Notice("bb", "text", "a \x1b[2J ä", 1e9, 6.0)


def announced() -> MemoryStore:
    """Return the store of an instance with two notices."""
    return MemoryStore(instance(), announced=[STOP, WORDS])


@pytest.mark.parametrize("dialect", ALL)
def test_list_and_acknowledge(dialect: str) -> None:
    """The list has exactly the five fields; an acknowledgement is 204 each time, and changes that notice alone."""
    client = Client(announced(), dialect)
    answer = client.ask(NOTICES)
    first, second = json.loads(answer.body)
    assert list(first) == ["id", "type", "text", "not_before", "status"]
    assert (first["id"], first["type"], first["text"], first["status"]) == ("aa", "stop", "", "pending")
    assert second["text"] == WORDS.text
    assert b"\x1b" not in answer.body
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("application/json", "no-store")
    for _ in range(2):
        done = client.ask(f"{NOTICES}/aa/ack", "POST")
        assert (done.status, done.body) == (204, b"")
    assert [one["status"] for one in json.loads(client.ask(NOTICES).body)] == ["acknowledged", "pending"]


def test_refusals() -> None:
    """Unknown notices are 404; other users get 401, and instances that are switched off 403; both change nothing."""
    store = announced()
    for path in (f"{NOTICES}/cc/ack", f"{NOTICES}/a%2Fa/ack", f"{NOTICES}/{'a' * 5000}/ack"):
        assert_error(Client(store).ask(path, "POST"), 404, "not found")
    for path, method in ((NOTICES, "GET"), (f"{NOTICES}/aa/ack", "POST")):
        other = Client(store, who=caller(uid=ROOT + 5))
        assert_error(other.ask(path, method), 401, "Access denied for non-root user")
        off = MemoryStore(instance({"security.guestapi": "false"}), announced=[STOP])
        assert_error(Client(off).ask(path, method), 403, "not authorized")
    assert store.announced == [STOP, WORDS]
    assert Client(store).ask(f"{NOTICES}/aa/ack").status == 405


def test_rate() -> None:
    """More acknowledgements than `writes_burst` at once are answered 429 with Retry-After."""
    client = Client(announced())
    burst = LimitSettings().writes_burst
    answers = [client.ask(f"{NOTICES}/aa/ack", "POST") for _ in range(burst + 1)]
    assert [one.status for one in answers] == [204] * burst + [429]
    assert_error(answers[-1], 429, "too many acknowledgements")
    assert answers[-1].headers["retry-after"] == "1"
