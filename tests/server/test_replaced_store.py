"""When another database replaces the open one, the service uses nothing of the old one."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from guestapi.store.writing import Writer
from tests.harness.containers import Container, receive, request, send
from tests.harness.service import Service
from tests.server.inside import talk

pytestmark = pytest.mark.root


@pytest.fixture
def own() -> Iterator[Service]:
    """A service whose store the test replaces."""
    toml = "[limits]\nwrites_per_second = 0.1\n"
    with Service(workers=1, toml=toml, dialects=["incus"]) as running:
        yield running


def replace_store(own: Service) -> None:
    """Remove the database and create another one."""
    for suffix in ("", "-wal", "-shm"):
        (own.state / f"store.db{suffix}").unlink(missing_ok=True)
    own.writer = Writer(own.settings, create=True)


def test_id_reused_by_another_instance(own: Service) -> None:
    """A caller that was identified in the old store gets nothing of the instance with its id in the new one."""
    with Container(own.binds) as c1, Container(own.binds) as other:
        own.add("c1", c1, {"user.secret": "of c1"})
        assert c1.ask("/1.0/config/user.secret").text == "of c1"
        replace_store(own)
        own.add("other", other, {"user.secret": "of other"})
        assert c1.ask("/1.0/config/user.secret").status == 500
        assert c1.ask("/1.0", "PATCH", b'{"state":"Ready"}').status == 500
        assert not own.instance("other").ready
        assert other.ask("/1.0/config/user.secret").text == "of other"


def test_open_connection_after_a_replacement(own: Service) -> None:
    """An open connection, with cached responses, gets nothing of the instance that has its id in the new store."""
    with Container(own.binds) as c1, Container(own.binds) as other:
        before = own.add("c1", c1, {"user.secret": "of c1"})
        with talk(c1) as kept:
            # The second response comes from the cache.
            for _time in range(2):
                assert kept.ask("/1.0/config/user.secret").text == "of c1"
            replace_store(own)
            after = own.add("other", other, {"user.secret": "of other"})
            assert (after.id, after.run) == (before.id, before.run)
            for _time in range(2):
                answer = kept.ask("/1.0/config/user.secret")
                assert (answer.status, answer.text) == (500, "pid not in container?\n")
            assert kept.ask("/1.0", method="PATCH", body=b'{"state":"Ready"}').status == 500
            assert not own.instance("other").ready


def test_new_values_are_seen(own: Service) -> None:
    """After the store is restored, a guest reads the values of the new store, also over an open connection."""
    with Container(own.binds) as c1:
        before = own.add("c1", c1, {"user.foo": "old"})
        with talk(c1) as kept:
            # The second response comes from the cache.
            for _time in range(2):
                assert kept.ask("/1.0/config/user.foo").text == "old"
            replace_store(own)
            after = own.add("c1", c1, {"user.foo": "new"})
            assert (after.id, after.run, after.revision, after.init) == (
                before.id,
                before.run,
                before.revision,
                before.init,
            )
            for _time in range(2):
                assert kept.ask("/1.0/config/user.foo").text == "new"
        assert c1.ask("/1.0/config/user.foo").text == "new"


def test_state_cannot_be_changed_without_end(own: Service) -> None:
    """An instance that alternates Ready and Started gets 429 after its burst; another instance's change is accepted."""
    with Container(own.binds) as c1, Container(own.binds) as other:
        own.add("c1", c1)
        own.add("other", other)
        bodies = [json.dumps({"state": state}).encode() for state in ("Ready", "Started")]
        asked = []
        for number in range(40):
            asked += [send(request("/1.0", "PATCH", bodies[number % 2])), receive()]
        statuses = [response.status for response in c1.exchange(*asked).responses]
        assert statuses[:20] == [200] * 20
        assert 429 in statuses[20:]
        assert other.ask("/1.0", "PATCH", bodies[0]).status == 200
