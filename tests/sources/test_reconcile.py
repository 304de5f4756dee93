"""From observations to the store: appeared, changed, restarted, renamed, gone, refused, whatever comes together."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import count, permutations
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guestapi.model import Device, Init, Instance, Problem
from guestapi.settings import Settings, StoreSettings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import steps
from guestapi.store.layers import Layers
from guestapi.store.lookup import find_instance, get_layers, list_instances, list_problems
from guestapi.store.reading import Reader
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.store.processes import add, init, known, told

NIC: Device = {"type": "nic", "name": "eth0"}
DISK: Device = {"type": "disk", "path": "/srv", "source": "/data"}


class Host:
    """A host whose container runtimes are observed; which processes are alive is said by tests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.writer = Writer(settings, create=True)
        self.alive: set[Init] = set()
        self._pids = count(100)

    def runs(self) -> Init:
        """A new process."""
        new = init(next(self._pids))
        self.alive.add(new)
        return new

    def ends(self, *inits: Init | None) -> None:
        """These processes are no more."""
        self.alive -= set(inits)

    def sees(self, *observations: Observed, source: str = "lxc", **how: Any) -> list[Problem]:
        """What a source observes is written."""
        with self.writer.change() as change:
            return reconcile(change, source, observations, is_alive=self.alive.__contains__, **how)

    def instances(self) -> dict[str, Instance]:
        """What the store has, by name."""
        return {one.name: one for one in known(self.settings)}

    def layers(self, name: str) -> Layers:
        """Whose the configuration and devices of an instance are."""
        with view(self.settings.store.url) as store:
            found = find_instance(store, "default", name)
            assert found is not None
            return get_layers(store, found)

    def problems(self) -> list[Problem]:
        """What is recorded."""
        with view(self.settings.store.url) as store:
            return list_problems(store)

    def configure(self, name: str, **config: str) -> None:
        """The operator sets keys; ``user_a`` means ``user.a``."""
        with self.writer.change() as change:
            instance = steps.get_editable(change, "default", name)
            steps.configure(change, instance, {key.replace("_", "."): value for key, value in config.items()})


@pytest.fixture
def host(settings: Settings) -> Host:
    """A host on which nothing is yet."""
    return Host(settings)


def seen(name: str, running: Init | None = None, key: str = "", **more: Any) -> Observed:
    """A container, whose key is made of its name unless it is given."""
    return Observed(key or f"/var/lib/lxc {name}", "default", name, init=running, **more)


def test_container_appears_changes_restarts_and_goes(host: Host, settings: Settings) -> None:
    """The whole life of a container: one instance, each run another, told once, and gone with it."""
    first = host.runs()
    assert host.sees(seen("web", first, devices={"eth0": NIC})) == []
    web = host.instances()["web"]
    assert (web.init, web.source, web.key, web.devices) == (first, "lxc", "/var/lib/lxc web", {"eth0": NIC})
    log = told(settings)
    assert host.sees(seen("web", first, devices={"eth0": NIC})) == []
    assert (host.instances()["web"], told(settings)) == (web, log)
    host.ends(first)
    second = host.runs()
    host.sees(seen("web", second, devices={"lan0": NIC}))
    again = host.instances()["web"]
    assert (again.id, again.uuid, again.init, again.devices) == (web.id, web.uuid, second, {"lan0": NIC})
    assert again.run > web.run
    # Its NICs have other names, so cloud-init runs again.
    assert again.cloud_init_id != web.cloud_init_id
    host.ends(second)
    host.sees(seen("web"))
    assert host.instances()["web"].init is None
    host.sees(complete=True)
    assert host.instances() == {}


def test_what_a_running_container_does_to_itself_is_not_told(host: Host) -> None:
    """Devices are those that were seen first for an init, whatever its root does to them afterwards."""
    running = host.runs()
    host.sees(seen("web", running, devices={"eth0": NIC}))
    for devices in ({"evil": NIC}, {}, None):
        host.sees(seen("web", running, devices=devices))
        assert host.instances()["web"].devices == {"eth0": NIC}


def test_what_a_follower_that_started_anew_does_not_know(host: Host) -> None:
    """Host name, devices and problems of an init stay if nothing new is seen of it; its restart forgets them."""
    running = host.runs()
    host.sees(seen("web", running, devices={"eth0": NIC}, hostname="inside", problems=("a mount is missing",)))
    before = host.instances()["web"], host.problems()
    host.sees(seen("web", running, devices=None))
    assert (host.instances()["web"], host.problems()) == before
    host.sees(seen("web", running, devices=None, hostname="asked-later", problems=("another",)))
    assert host.instances()["web"].hostname == "asked-later"
    assert [one.reason for one in host.problems()] == ["another"]
    host.ends(running)
    host.sees(seen("web", host.runs(), devices=None))
    assert host.instances()["web"].hostname is None
    assert host.problems() == []


def test_operators_layer_wins_and_stays(host: Host) -> None:
    """What the operator has set outlives restarts and what the source says; what the source has is as it is now."""
    running = host.runs()
    host.sees(seen("web", running, config={"user.a": "source", "user.b": "source"}, devices={"eth0": NIC}))
    host.configure("web", user_a="operator")
    with host.writer.change() as change:
        web = steps.get_editable(change, "default", "web")
        steps.replace_devices(change, web, {"gpu": {"type": "gpu"}, "eth0": {"limits.max": "1Mbit"}})
    host.ends(running)
    devices = {"eth0": {**NIC, "mtu": "9000"}, "d": DISK}
    host.sees(seen("web", host.runs(), config={"user.c": "source"}, devices=devices))
    web = host.instances()["web"]
    assert web.config == {"user.a": "operator", "user.c": "source"}
    assert web.devices == {"eth0": {**NIC, "mtu": "9000", "limits.max": "1Mbit"}, "d": DISK, "gpu": {"type": "gpu"}}
    layers = host.layers("web")
    assert {key: layers.origin(key) for key in web.config} == {"user.a": "operator", "user.c": "source"}
    assert {name: layers.device_origin(name) for name in web.devices} == {
        "d": "source",
        "eth0": "operator",
        "gpu": "operator",
    }
    host.configure("web", user_a="")
    assert host.instances()["web"].config == {"user.c": "source"}


def test_template_is_below_what_the_source_says(host: Host) -> None:
    """Every instance of a source has the template's keys, as they are now."""
    host.sees(seen("web", config={"user.a": "source"}), template={"user.a": "template", "user.b": "1"})
    assert host.instances()["web"].config == {"user.a": "source", "user.b": "1"}
    host.sees(seen("web"), template={"security.guestapi": "false"})
    assert host.instances()["web"].config == {"security.guestapi": "false"}


def test_name_of_another_owner_is_refused(host: Host) -> None:
    """Whoever has a name notices nothing when another source's container wants it; that one is not registered."""
    running = host.runs()
    host.sees(seen("web", running, config={"user.secret": "of lxc"}))
    before = host.instances()
    for observed in (seen("web", host.runs(), key="f" * 64), seen("web", key="f" * 64)):
        (problem,) = host.sees(observed, source="podman")
        assert problem.refused
        assert "of lxc" in problem.reason
        assert problem.hint is not None
        assert "guestapi instance remove web" in problem.hint
        assert host.problems() == [problem]
        assert host.instances() == before
    # It is gone: nothing is wrong any more.
    host.sees(source="podman", complete=True)
    assert host.problems() == []


def test_instance_that_may_not_have_its_new_name_is_served_no_more(host: Host) -> None:
    """A registered container that takes another owner's name keeps its instance, which counts as not running."""
    running = host.runs()
    host.sees(seen("web", host.runs()))
    host.sees(seen("db", running, key="id", config={"user.a": "1"}), source="podman")
    number = host.instances()["db"].id
    host.sees(seen("web", running, key="id", config={"user.a": "2"}), source="podman")
    assert host.instances()["db"].init is None
    assert [problem.refused for problem in host.problems()] == [True]
    host.sees(seen("db2", running, key="id", config={"user.a": "2"}), source="podman")
    db = host.instances()["db2"]
    assert (db.id, db.init, db.config) == (number, running, {"user.a": "2"})
    assert host.problems() == []


def test_container_that_is_made_anew_takes_over_what_the_operator_set(host: Host) -> None:
    """podman compose makes a container of another id for each change: what the operator set of the name stays."""
    first = host.runs()
    host.sees(seen("web", first, key="1"), seen("db", host.runs(), key="2"), source="podman")
    host.configure("web", user_a="operator")
    number = host.instances()["web"].id
    host.ends(first, host.instances()["db"].init)
    host.sees(source="podman", gone=["1", "2"])
    assert {name: (one.key, one.init, one.source) for name, one in host.instances().items()} == {
        "web": (None, None, "podman")
    }
    # Nobody else gets it.
    assert host.sees(seen("web", host.runs()))[0].refused
    host.sees(seen("web", host.runs(), key="3"), source="podman")
    web = host.instances()["web"]
    assert (web.id, web.key, web.config, web.running) == (number, "3", {"user.a": "operator"}, True)


def test_container_that_is_renamed_to_a_name_that_was_left(host: Host) -> None:
    """compose makes the next container under another name, then renames it: it takes over what was left."""
    host.sees(seen("web", key="1"), source="podman")
    host.configure("web", user_a="operator")
    number = host.instances()["web"].id
    host.sees(seen("1_web", key="2"), source="podman")
    host.sees(seen("web", host.runs(), key="2"), source="podman", gone=["1"])
    assert {name: (one.id, one.key) for name, one in host.instances().items()} == {"web": (number, "2")}
    assert host.instances()["web"].config == {"user.a": "operator"}


def test_instance_that_was_added_by_hand_finds_its_container(host: Host) -> None:
    """`guestapi instance add` before the container is made; what was set stays, also when the container goes."""
    number = add(host.writer, "web", **{"user.a": "hand"}).id
    running = host.runs()
    host.sees(seen("web", running, config={"user.b": "source"}))
    web = host.instances()["web"]
    assert (web.id, web.source, web.config) == (number, "lxc", {"user.a": "hand", "user.b": "source"})
    host.ends(running)
    host.sees(complete=True)
    assert (host.instances()["web"].key, host.instances()["web"].init) == (None, None)


def test_instance_that_was_started_by_hand_is_not_taken(host: Host) -> None:
    """An instance that runs, as somebody who can tell has said, is no other container's."""
    with host.writer.change() as change:
        steps.start(change, steps.add(change, "default", "web"), host.runs())
    before = host.instances()
    (problem,) = host.sees(seen("web", host.runs()))
    assert "which runs with process 100" in problem.reason
    assert host.instances() == before


def test_container_of_an_earlier_version_is_found_again(host: Host) -> None:
    """An instance that a hook had registered, under the first digits of the id, is the container with that init."""
    running = host.runs()
    with host.writer.change() as change:
        old = steps.start(change, steps.add(change, "default", "9f86d081884c", config={"user.a": "1"}), running)
    host.sees(seen("web", running, key="9f86d081884c7d659a", devices=None), source="podman")
    web = host.instances()["web"]
    assert (web.id, web.key, web.init, web.config) == (old.id, "9f86d081884c7d659a", running, {"user.a": "1"})
    assert web.run == old.run, "the container runs on, so what was learned of it holds"


def test_look_that_is_older_than_what_is_known(host: Host) -> None:
    """A list that was made before a container started, and comes after its hook, stops and removes nothing."""
    first = host.runs()
    host.sees(seen("web", first))
    host.ends(first)
    second = host.runs()
    host.sees(seen("web", second))
    web = host.instances()["web"]
    for late in ([seen("web")], [seen("web", first)]):
        assert host.sees(*late, complete=True) == []
        assert host.instances()["web"] == web
    (problem,) = host.sees(complete=True)
    assert "does not list it, although its init, process 101, runs" in problem.reason
    assert host.instances()["web"] == web
    host.ends(second)
    host.sees(complete=True)
    assert host.instances() == {}
    assert host.problems() == []


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_names_that_change_hands_at_once(host: Host, order: tuple[int, ...]) -> None:
    """A chain of renames, and circles, in any order: everybody keeps the instance, and no name in between is told."""
    inits = [host.runs() for _number in range(3)]
    host.sees(*[seen(f"c{number}", inits[number], key=str(number)) for number in range(3)])
    before = {one.key: one.id for one in host.instances().values()}
    for names in (["c1", "c2", "c3"], ["c2", "c3", "c1"], ["c1", "c0", "c2"]):
        log = len(told(host.settings))
        wanted = [seen(names[number], inits[number], key=str(number)) for number in order]
        assert host.sees(*wanted) == []
        assert {name: one.key for name, one in host.instances().items()} == {
            name: str(number) for number, name in enumerate(names)
        }
        assert {one.key: one.id for one in host.instances().values()} == before
        assert all("instance-renamed" in metadata for _type, metadata, _guest in told(host.settings)[log:])
        assert len(told(host.settings)) - log == 3


def test_two_of_one_name_or_key(host: Host) -> None:
    """Of two that want one name the first keeps it; a source that gives one key twice is believed once."""
    problems = host.sees(seen("web", key="1"), seen("web", key="2"), seen("db", key="1"))
    assert [(one.key, one.name, one.refused, one.holder) for one in problems] == [
        ("2", "web", True, "1"),
        ("1", "db", False, None),
    ]
    assert {name: one.key for name, one in host.instances().items()} == {"web": "1"}


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "a/b"},
        {"name": ""},
        {"name": "x" * 300},
        {"name": "\ud800"},
        {"project": "a b"},
        {"project": "\ud800"},
        {"type": None},
        {"init": Init(1 << 70, 1, "b", 1)},
        {"key": "\ud800"},
        {"uuid": "web"},
        {"cloud_init_id": "\ud800"},
    ],
)
def test_one_bad_container_costs_the_others_nothing(host: Host, bad: dict[str, Any]) -> None:
    """Of ten containers, one of which cannot be taken, nine are registered, and it is said which is not, and why."""
    observations = [seen(f"c{number}", host.runs()) for number in range(10)]
    observations[4] = replace(observations[4], **bad)
    (problem,) = host.sees(*observations)
    assert problem.key == observations[4].key
    assert "not registered" in problem.reason
    assert host.instances().keys() == {f"c{number}" for number in range(10)} - {"c4"}


def test_what_cannot_be_taken_of_a_container_is_left_out(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The rest is registered and kept current; what is missing is recorded, logged once, and forgotten when right."""
    running = host.runs()
    observed = seen("web", running, config={"user.a": "1", "k" * 2000: "1"}, problems=("its mount /x is not told",))
    with caplog.at_level(logging.WARNING):
        for _time in range(3):
            problems = host.sees(observed)
            assert [one.refused for one in problems] == [False, False]
            assert host.problems() == problems
    assert [record.message.count("web in project default") for record in caplog.records] == [1, 1]
    assert host.instances()["web"].config == {"user.a": "1"}
    host.sees(replace(observed, config={"user.a": "2"}, problems=()))
    assert host.problems() == []
    assert host.instances()["web"].config == {"user.a": "2"}


def test_switch_is_obeyed_whatever_else_is_wrong(host: Host) -> None:
    """A daemon's instance that is switched off is off, also when nothing else of it can be taken."""
    host.sees(seen("web", key="1", config={"user.secret": "1"}), source="incus")
    config = {"security.guestapi": "false", "user." + "x" * 2000: "1", "user.secret": "2", "user.\ud800": "1"}
    host.sees(seen("web", key="1", config=config), source="incus")
    assert host.instances()["web"].config == {"security.guestapi": "false", "user.secret": "2"}


def test_configuration_beyond_the_bound(host: Host) -> None:
    """What an instance has beyond the bound is left out, the operator's counted first; what is left out is not old."""
    host.sees(seen("web", config={"user.a": "old"}))
    host.configure("web", user_mine="x" * (8 << 20))
    host.sees(seen("web", config={"user.a": "x" * (9 << 20), "user.b": "1"}))
    assert host.instances()["web"].config.keys() == {"user.b", "user.mine"}
    assert "too much" in host.problems()[0].reason


def test_refusals_of_the_source(host: Host) -> None:
    """What a source says can be no instance is recorded; one that was registered is served no more."""
    host.sees(seen("web", host.runs()), seen("db", host.runs()))
    why = "it shares its PID namespace"
    refused = [Problem("", f"/var/lib/lxc {name}", "default", name, why) for name in ("web", "x")]
    problems = host.sees(refused=refused)
    assert [(one.name, one.refused) for one in problems] == [("web", True), ("x", True)]
    assert {name: one.running for name, one in host.instances().items()} == {"web": False, "db": True}
    assert host.problems() == problems
    host.sees(seen("db"), complete=True, refused=refused[1:])
    assert [one.name for one in host.problems()] == ["x"]


def test_root_that_is_recorded_later(host: Host) -> None:
    """What was not known of a running init's root when it was registered is taken over without a new run."""
    running = host.runs()
    host.sees(seen("web", running))
    web = host.instances()["web"]
    host.sees(seen("web", replace(running, root_uid=100000, user_namespace=7)))
    again = host.instances()["web"]
    assert again.init is not None
    assert (again.run, again.init.root_uid, again.init.user_namespace) == (web.run, 100000, 7)
    host.sees(seen("web", running))
    assert host.instances()["web"] == again


def test_uuid_of_another_instance(host: Host) -> None:
    """A daemon's UUID that another instance has already is made into another one, the same at every look."""
    identity = "11111111-2222-3333-4444-555555555555"
    with host.writer.change() as change:
        steps.add(change, "default", "other", instance_uuid=identity)
    host.sees(seen("web", key=identity, uuid=identity), source="incus")
    first = host.instances()["web"]
    assert first.uuid != identity
    host.sees(seen("web", key=identity, uuid=identity), source="incus")
    assert host.instances()["web"] == first


SOURCES = ("lxc", "podman", "incus")
NAMES = ("a", "b", "c")
CONTAINERS = st.dictionaries(st.sampled_from("1234"), st.tuples(st.sampled_from(NAMES), st.booleans()))
STATES = st.fixed_dictionaries(dict.fromkeys(SOURCES, CONTAINERS))


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STATES, min_size=1, max_size=5))
def test_whatever_sources_see(tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, Any]]) -> None:
    """Through any sequence of what sources see, an instance has one owner, and is as that one saw it last."""
    host = Host(Settings(store=_store(tmp_path_factory)))
    owners: dict[int, tuple[str | None, str | None]] = {}
    for state in states:
        for source in SOURCES:
            host.alive.clear()
            observations = [
                seen(name, host.runs() if running else None, key=key, config={"user.me": f"{source} {key}"})
                for key, (name, running) in state[source].items()
            ]
            problems = host.sees(*observations, source=source, complete=True)
            with view(host.settings.store.url) as store:
                found = list_instances(store)
            assert len({(one.project, one.name) for one in found}) == len(found)
            refused = {one.key for one in problems if one.refused}
            mine = {one.key: one for one in found if one.source == source}
            for observed in observations:
                if observed.key in refused:
                    assert observed.key not in mine or mine[observed.key].init is None
                    continue
                one = mine[observed.key]
                assert (one.name, one.init, one.config) == (observed.name, observed.init, dict(observed.config))
            for one in found:
                assert owners.setdefault(one.id, (one.source, one.key)) == (one.source, one.key)
                assert one.config == {"user.me": f"{one.source} {one.key}"}


def _store(tmp_path_factory: pytest.TempPathFactory) -> StoreSettings:
    return StoreSettings(url=f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db")


def test_batch_is_one_commit(host: Host) -> None:
    """A hundred containers that start at once are registered by one commit, and are told as started, each."""
    reader = Reader(host.settings.store.url)
    observations = [seen(f"c{number}", host.runs()) for number in range(100)]
    before = reader.version()
    with host.writer.change() as change:
        reconcile(change, "lxc", observations, is_alive=host.alive.__contains__)
        assert reader.version() == before
    assert len(host.instances()) == 100
    assert sum("instance-started" in metadata for _type, metadata, _guest in told(host.settings)) == 100
    reader.close()
