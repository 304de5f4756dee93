"""A follower's ledger on a host without a store."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from guestapi.errors import GuestapiError
from guestapi.model import Problem, SourceStatus
from guestapi.settings import HookSettings, Settings, StoreSettings
from guestapi.sources.ledger import StoreLedger
from guestapi.sources.observed import Observed
from guestapi.sources.recorder import Status
from guestapi.store import profiles
from guestapi.store.lookup import find_instance, get_layers, list_instances, list_sources
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.store.processes import init, known, log_entries, restore


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
    """If no store exists, a follower creates it; its container gets the keys of the template."""
    observed = Observed("/var/lib/lxc web", "default", "web", init=init(100))
    assert ledger.write([observed], (), ()) == []
    with view(settings.store.url) as store:
        web = find_instance(store, "default", "web")
    assert web is not None
    assert (web.source, web.key, web.init) == ("lxc", observed.key, observed.init)
    assert web.config == {"user.by": "template"}


def test_empty_store_is_made(settings: Settings, ledger: StoreLedger, tmp_path: Path) -> None:
    """Reading the known containers also creates the store."""
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
    """`known` returns the containers of this source, running or not, and the refused ones; none of another source."""
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


def test_template_is_taken_over_once(settings: Settings, ledger: StoreLedger) -> None:
    """The profile ``default`` gets hooks.template when a follower first starts; then only the operator changes it."""
    ledger.known()
    with Writer(settings).change() as change:
        default = profiles.get_profile(change, "default", "default")
        assert default.config == {"user.by": "template"}
        profiles.edit(change, default, config={})
    StoreLedger(settings, "podman", Path("/run/podman.sock")).known()
    with view(settings.store.url) as store:
        assert profiles.get_profile(store, "default", "default").config == {}


def test_template_that_cannot_be_taken(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """An invalid key of hooks.template is left out and named in the log; the rest is used."""
    hooks = HookSettings(template={"a\nb": "1", "user.large": "x" * (17 << 20), "user.by": "template"})
    ledger = StoreLedger(msgspec.structs.replace(settings, hooks=hooks), "lxc", Path("/run/lxc.sock"))
    assert ledger.known() == {}
    with view(settings.store.url) as store:
        assert profiles.get_profile(store, "default", "default").config == {"user.by": "template"}
    assert len(caplog.messages) == 2
    assert all(message.startswith("hooks.template: ") for message in caplog.messages)


def test_template_after_an_upgrade(settings: Settings) -> None:
    """An upgrade changes no instance and gives no event, nor does the next observation of the containers."""
    restore(settings, 3)
    before = {one.id: one.config for one in known(settings)}
    hooks = HookSettings(template={"user.by": "template", "user.role": "none"})
    ledger = StoreLedger(msgspec.structs.replace(settings, hooks=hooks), "lxc", Path("/run/lxc.sock"))
    ledger.known()
    entries = len(log_entries(settings))
    inits = {one.name: one.init for one in known(settings) if one.source == "lxc"}
    observed = [Observed(f"/var/lib/lxc {name}", "default", name, init=one) for name, one in inits.items()]
    assert ledger.write(observed, (), ()) == []
    assert {one.id: one.config for one in known(settings)} == before
    assert [entry for entry in log_entries(settings)[entries:] if entry[0] != "lifecycle" or entry[2]] == []
    with view(settings.store.url) as store:
        layers = {one.name: get_layers(store, one) for one in list_instances(store, source="lxc")}
    assert layers["web"].origin("user.by") == layers["db"].origin("user.by") == "profile default"
    assert layers["web"].source.config == {}
