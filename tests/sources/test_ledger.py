"""A follower's ledger on a host without a store."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestapi.errors import GuestapiError
from guestapi.model import Problem, SourceStatus
from guestapi.settings import HookSettings, Settings, StoreSettings
from guestapi.sources.ledger import StoreLedger
from guestapi.sources.observed import Observed
from guestapi.sources.recorder import Status
from guestapi.store.lookup import find_instance, list_sources
from guestapi.store.view import view
from tests.store.processes import init


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a store that does not exist yet, and a template."""
    url = f"sqlite:///{tmp_path}/store.db"
    return Settings(store=StoreSettings(url=url), hooks=HookSettings(template={"user.by": "template"}))


@pytest.fixture
def ledger(settings: Settings) -> StoreLedger:
    """A follower's ledger."""
    return StoreLedger(settings, "lxc", Path("/run/lxc.sock"))


def test_first_container_of_a_host(settings: Settings, ledger: StoreLedger) -> None:
    """The first write creates the store, and registers its container with the template."""
    observed = Observed("/var/lib/lxc web", "default", "web", init=init(100))
    assert ledger.write([observed], (), ()) == []
    with view(settings.store.url) as store:
        web = find_instance(store, "default", "web")
    assert web is not None
    assert (web.source, web.key, web.init) == ("lxc", observed.key, observed.init)
    assert web.config == {"user.by": "template"}


def test_empty_store_is_made(settings: Settings, ledger: StoreLedger, tmp_path: Path) -> None:
    """Reading the known containers creates the store, too."""
    assert ledger.known() == {}
    assert (tmp_path / "store.db").exists()


def test_store_that_cannot_be_made(tmp_path: Path) -> None:
    """A missing directory of the store is an error; once it exists, the same ledger works."""
    place = tmp_path / "later"
    settings = Settings(store=StoreSettings(url=f"sqlite:///{place}/store.db"))
    ledger = StoreLedger(settings, "lxc", Path("/run/lxc.sock"))
    for _time in range(2):
        with pytest.raises(GuestapiError, match=str(place)):
            ledger.known()
    place.mkdir()
    assert ledger.known() == {}


def test_known_containers(settings: Settings, ledger: StoreLedger) -> None:
    """Known are this source's containers, running or not, and its refused ones; none of another source."""
    refused = Problem("lxc", "refused", "default", "bad", "it has no init")
    running, stopped = Observed("a", "default", "a", init=init(100)), Observed("b", "default", "b")
    assert list(ledger.write([running, stopped], (), [refused])) != []
    StoreLedger(settings, "podman", Path("/x")).write([Observed("c", "default", "c")], (), ())
    assert ledger.known() == {"a": running.init, "b": None, "refused": None}
    ledger.write([], {"a", "refused"}, ())
    assert ledger.known() == {"b": None}


@pytest.mark.parametrize(
    ("status", "connected"),
    [(Status(), False), (Status(contact=5.0), True), (Status(contact=5.0, fault="it hangs", lag=0.5), False)],
)
def test_status_of_the_follower(settings: Settings, ledger: StoreLedger, status: Status, connected: bool) -> None:
    """A follower counts as connected if it has had contact and has no fault."""
    ledger.note(status)
    with view(settings.store.url) as store:
        assert list_sources(store) == [
            SourceStatus("lxc", "/run/lxc.sock", connected, status.contact, status.lag, status.fault)
        ]
