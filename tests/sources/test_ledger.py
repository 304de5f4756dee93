"""The store as a follower writes it, on a host that has none yet."""

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
    """Settings with a store that is not made yet, and a template."""
    url = f"sqlite:///{tmp_path}/store.db"
    return Settings(store=StoreSettings(url=url), hooks=HookSettings(template={"user.by": "template"}))


@pytest.fixture
def ledger(settings: Settings) -> StoreLedger:
    """A follower's ledger."""
    return StoreLedger(settings, "lxc", Path("/run/lxc.sock"))


def test_first_container_of_a_host(settings: Settings, ledger: StoreLedger) -> None:
    """The store is made by who needs it first, a follower too; its container is registered with the template."""
    observed = Observed("/var/lib/lxc web", "default", "web", init=init(100))
    assert ledger.write([observed], (), ()) == []
    with view(settings.store.url) as store:
        web = find_instance(store, "default", "web")
    assert web is not None
    assert (web.source, web.key, web.init) == ("lxc", observed.key, observed.init)
    assert web.config == {"user.by": "template"}


def test_empty_store_is_made(settings: Settings, ledger: StoreLedger, tmp_path: Path) -> None:
    """To ask what is known makes the store, too, and nothing is known."""
    assert ledger.known() == {}
    assert (tmp_path / "store.db").exists()


def test_store_that_cannot_be_made(tmp_path: Path) -> None:
    """Where there is no directory for it, that is said; once there is, the same ledger goes on."""
    place = tmp_path / "later"
    settings = Settings(store=StoreSettings(url=f"sqlite:///{place}/store.db"))
    ledger = StoreLedger(settings, "lxc", Path("/run/lxc.sock"))
    for _time in range(2):
        with pytest.raises(GuestapiError, match=str(place)):
            ledger.known()
    place.mkdir()
    assert ledger.known() == {}


def test_what_is_known(settings: Settings, ledger: StoreLedger) -> None:
    """Containers of this source, running or not, and those that could not be registered; not another source's."""
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
def test_how_the_follower_is(settings: Settings, ledger: StoreLedger, status: Status, connected: bool) -> None:
    """A follower is connected if it has had contact and nothing keeps it from more."""
    ledger.note(status)
    with view(settings.store.url) as store:
        assert list_sources(store) == [
            SourceStatus("lxc", "/run/lxc.sock", connected, status.contact, status.lag, status.fault)
        ]
