"""Notices in the store: whom they are for, when they are past, and what cancels them."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from guestapi.callers.namespaces import boot_id
from guestapi.model import Init, Instance
from guestapi.settings import Settings
from guestapi.store import notices, steps
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import get_instance
from guestapi.store.notices import Notice
from guestapi.store.reading import Reader
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.store.processes import log_entries

INIT = Init(100, 5, boot_id(), 7)


@pytest.fixture
def web(writer: Writer) -> Instance:
    """A running instance; another one, db, runs beside it."""
    with writer.change() as change:
        for number, name in enumerate(("db", "web")):
            steps.start(change, steps.add(change, "default", name), replace(INIT, pid=100 + number, namespace=number))
        return get_instance(change, "default", "web")


def send(writer: Writer, instance: Instance, what: str = "stop", seconds: float = 60.0) -> Notice:
    """Announce something."""
    with writer.change() as change:
        return notices.send(change, get_instance(change, instance.project, instance.name), what, seconds)


def test_send_and_acknowledge(writer: Writer, reader: Reader, web: Instance, settings: Settings) -> None:
    """A notice is listed at once; acknowledged twice, it is written and told once."""
    sent = send(writer, web)
    assert reader.notices(web.id) == [sent]
    assert (sent.type, sent.text, sent.status) == ("stop", "", "pending")
    assert sent.not_before == pytest.approx(time.time() + 60, abs=5)
    assert writer.acknowledge(web, sent.id)
    assert writer.acknowledge(web, sent.id)
    assert reader.notices(web.id) == [sent._replace(status="acknowledged")]
    told = [(metadata, for_guest) for kind, metadata, for_guest in log_entries(settings) if kind == "notice"]
    assert ['"status":"acknowledged"' in metadata for metadata, _for_guest in told] == [False, True]
    assert all(for_guest for _metadata, for_guest in told)


def test_free_text(writer: Writer, reader: Reader, web: Instance) -> None:
    """Any other word is a text, as it is given."""
    send(writer, web, "Stop \x1b now\n")
    assert [(one.type, one.text) for one in reader.notices(web.id)] == [("text", "Stop \x1b now\n")]


def test_of_another_instance(writer: Writer, reader: Reader, web: Instance) -> None:
    """Another instance neither sees a notice nor acknowledges it, nor does another run or a replaced instance."""
    sent = send(writer, web)
    with writer.change() as change:
        db = get_instance(change, "default", "db")
    assert reader.notices(db.id) == []
    assert not writer.acknowledge(db, sent.id)
    assert not writer.acknowledge(replace(web, run=web.run + 1), sent.id)
    assert not writer.acknowledge(replace(web, init=INIT), sent.id)
    assert [one.status for one in reader.notices(web.id)] == ["pending"]


def test_past(writer: Writer, reader: Reader, web: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """When its time has come, a notice is not listed and cannot be acknowledged; a waiter still finds it."""
    sent = send(writer, web)
    monkeypatch.setattr(notices, "now", lambda: sent.due)
    assert reader.notices(web.id) == []
    assert not writer.acknowledge(web, sent.id)
    with writer.change() as change:
        found = notices.find(change, sent.id)
    assert found is not None
    assert found.status == "pending"


def test_clock_is_set(writer: Writer, reader: Reader, web: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is set back or on neither delays a notice nor brings it forward; its time of day follows."""
    sent = send(writer, web)
    real = time.time
    for shift in (-86400.0, 86400.0):
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda shift=shift: real() + shift)
            (found,) = reader.notices(web.id)
            assert found.due == sent.due
            assert found.not_before - (real() + shift) == pytest.approx(60, abs=5)
            assert writer.acknowledge(web, sent.id)
    assert reader.notices(web.id)[0].document["not_before"] == sent.document["not_before"]


def test_restart_and_removal_cancel(writer: Writer, reader: Reader, web: Instance) -> None:
    """The end of the run cancels its notices, also of an instance that is started at once; so does the removal."""
    first = send(writer, web)
    with writer.change() as change:
        again = steps.start(change, get_instance(change, "default", "web"), replace(INIT, pid=300, namespace=30))
        assert notices.find(change, first.id) is None
        assert notices.read_saved(change) == []
    assert reader.notices(web.id) == []
    assert not writer.acknowledge(again, first.id)
    second = send(writer, web)
    with writer.change() as change:
        steps.stop(change, get_instance(change, "default", "web"))
        assert notices.find(change, second.id) is None
    with pytest.raises(ConflictError, match="does not run"):
        send(writer, web)
    with writer.change() as change:
        steps.start(change, get_instance(change, "default", "web"), replace(INIT, pid=301))
    third = send(writer, web)
    with writer.change() as change:
        steps.remove(change, get_instance(change, "default", "web"))
        assert notices.find(change, third.id) is None
        assert notices.list_all(change) == []


def test_rename_keeps(writer: Writer, reader: Reader, web: Instance) -> None:
    """A new name changes nothing of a notice."""
    sent = send(writer, web)
    with writer.change() as change:
        steps.rename(change, get_instance(change, "default", "web"), "default", "shop")
    assert reader.notices(web.id) == [sent]


def test_bounds(writer: Writer, web: Instance) -> None:
    """An instance has at most `MOST_NOTICES`; a text has bytes, and not too many."""
    for _ in range(notices.MOST_NOTICES):
        send(writer, web)
    with pytest.raises(ConflictError, match="has 16 notices"):
        send(writer, web)
    for text in ("", " \n", "ä" * (notices.TEXT_BYTES // 2 + 1), "a\0b", "\ud800", "\udcff", "\udfff"):
        with pytest.raises(ConflictError, match=r"text"):
            send(writer, web, text)


def test_cancel(writer: Writer, reader: Reader, web: Instance, settings: Settings) -> None:
    """One is cancelled by its id, else all are; the instance hears of each."""
    sent = [send(writer, web, word) for word in ("stop", "freeze", "migrate")]
    with writer.change() as change:
        notices.cancel(change, web, sent[1].id)
        with pytest.raises(ConflictError, match="has no notice"):
            notices.cancel(change, get_instance(change, "default", "db"), sent[0].id)
    assert reader.notices(web.id) == [sent[0], sent[2]]
    with writer.change() as change:
        assert len(notices.cancel(change, web, None)) == 2
    assert reader.notices(web.id) == []
    with view(settings.store.url) as store:
        assert notices.list_all(store) == []
    assert sum('"status":"cancelled"' in metadata for _kind, metadata, _for_guest in log_entries(settings)) == 3
