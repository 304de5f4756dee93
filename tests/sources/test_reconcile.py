"""From observations to the store: new, changed, restarted, renamed, gone and refused containers, and combinations."""

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
from guestapi.sources.reconcile import is_current, reconcile
from guestapi.store import profiles, steps
from guestapi.store.layers import Layers
from guestapi.store.lookup import find_instance, get_layers, list_instances, list_problems
from guestapi.store.reading import Reader
from guestapi.store.statuses import list_unacknowledged
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.store.processes import add, init, known, log_entries

NIC: Device = {"type": "nic", "name": "eth0"}
DISK: Device = {"type": "disk", "path": "/srv", "source": "/data"}


class ObservedHost:
    """A host whose runtimes are observed; the test sets which processes are alive."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.writer = Writer(settings, create=True)
        self.alive: set[Init] = set()
        self._pids = count(100)

    def start_process(self) -> Init:
        """Return the init of a new process."""
        new = init(next(self._pids))
        self.alive.add(new)
        return new

    def end_processes(self, *inits: Init | None) -> None:
        """End these processes."""
        self.alive -= set(inits)

    def observe(self, *observations: Observed, source: str = "lxc", **how: Any) -> list[Problem]:
        """Write a source's observations."""
        with self.writer.change() as change:
            return reconcile(change, source, observations, is_alive=self.alive.__contains__, **how)

    def set_default(self, config: dict[str, str]) -> None:
        """Give the profile ``default`` exactly this configuration."""
        with self.writer.change() as change:
            profiles.edit(change, profiles.ensure_default(change, "default"), config=config)

    def instances(self) -> dict[str, Instance]:
        """Return the instances of the store, by name."""
        return {one.name: one for one in known(self.settings)}

    def layers(self, name: str) -> Layers:
        """Return the layers of an instance's configuration and devices."""
        with view(self.settings.store.url) as store:
            found = find_instance(store, "default", name)
            assert found is not None
            return get_layers(store, found)

    def problems(self) -> list[Problem]:
        """Return the recorded problems."""
        with view(self.settings.store.url) as store:
            return list_problems(store)

    def configure(self, name: str, **config: str) -> None:
        """Set keys as the operator; ``user_a`` means ``user.a``."""
        with self.writer.change() as change:
            instance = steps.get_editable(change, "default", name)
            steps.configure(change, instance, {key.replace("_", "."): value for key, value in config.items()})


@pytest.fixture
def host(settings: Settings) -> ObservedHost:
    """A host with an empty store."""
    return ObservedHost(settings)


def seen(name: str, running: Init | None = None, key: str = "", **more: Any) -> Observed:
    """Return an observation of a container, with a key made of its name by default."""
    return Observed(key or f"/var/lib/lxc {name}", "default", name, init=running, **more)


def test_life_of_a_container(host: ObservedHost, settings: Settings) -> None:
    """A container is one instance for its life; each start is another run and one event; it is removed with it."""
    first = host.start_process()
    assert host.observe(seen("web", first, devices={"eth0": NIC})) == []
    web = host.instances()["web"]
    assert (web.init, web.source, web.key, web.devices) == (first, "lxc", "/var/lib/lxc web", {"eth0": NIC})
    log = log_entries(settings)
    assert host.observe(seen("web", first, devices={"eth0": NIC})) == []
    assert (host.instances()["web"], log_entries(settings)) == (web, log)
    host.end_processes(first)
    second = host.start_process()
    host.observe(seen("web", second, devices={"lan0": NIC}))
    again = host.instances()["web"]
    assert (again.id, again.uuid, again.init, again.devices) == (web.id, web.uuid, second, {"lan0": NIC})
    assert again.run > web.run
    # The names of its NICs have changed, so cloud-init must run again.
    assert again.cloud_init_id != web.cloud_init_id
    host.end_processes(second)
    host.observe(seen("web"))
    assert host.instances()["web"].init is None
    host.observe(complete=True)
    assert host.instances() == {}


def test_devices_are_those_of_the_start(host: ObservedHost) -> None:
    """The devices are those of the first observation of an init; its root cannot change them later."""
    running = host.start_process()
    host.observe(seen("web", running, devices={"eth0": NIC}))
    for devices in ({"evil": NIC}, {}, None):
        host.observe(seen("web", running, devices=devices))
        assert host.instances()["web"].devices == {"eth0": NIC}


def test_incomplete_observations_change_nothing(host: ObservedHost) -> None:
    """Host name, devices and problems of an init stay if later observations lack them; a restart clears them."""
    running = host.start_process()
    host.observe(seen("web", running, devices={"eth0": NIC}, hostname="inside", problems=("a mount is missing",)))
    before = host.instances()["web"], host.problems()
    host.observe(seen("web", running, devices=None))
    assert (host.instances()["web"], host.problems()) == before
    host.observe(seen("web", running, devices=None, hostname="asked-later", problems=("another",)))
    assert host.instances()["web"].hostname == "asked-later"
    assert [one.reason for one in host.problems()] == ["another"]
    host.end_processes(running)
    host.observe(seen("web", host.start_process(), devices=None))
    assert host.instances()["web"].hostname is None
    assert host.problems() == []


def test_layer_of_the_operator_takes_precedence(host: ObservedHost) -> None:
    """The operator's settings survive restarts and take precedence; the source's are replaced by each observation."""
    running = host.start_process()
    host.observe(seen("web", running, config={"user.a": "source", "user.b": "source"}, devices={"eth0": NIC}))
    host.configure("web", user_a="operator")
    with host.writer.change() as change:
        web = steps.get_editable(change, "default", "web")
        steps.replace_devices(change, web, {"gpu": {"type": "gpu"}, "eth0": {"limits.max": "1Mbit"}})
    host.end_processes(running)
    devices = {"eth0": {**NIC, "mtu": "9000"}, "d": DISK}
    host.observe(seen("web", host.start_process(), config={"user.c": "source"}, devices=devices))
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


def test_source_takes_precedence_over_profile_default(host: ObservedHost) -> None:
    """Every instance of a source has the current keys of the profile ``default`` of its project."""
    host.set_default({"user.a": "profile", "user.b": "1"})
    host.observe(seen("web", config={"user.a": "source"}))
    assert host.instances()["web"].config == {"user.a": "source", "user.b": "1"}
    assert host.instances()["web"].profiles == ("default",)
    host.set_default({"security.guestapi": "false"})
    host.observe(seen("web"))
    assert host.instances()["web"].config == {"security.guestapi": "false"}


def test_profile_default_is_assigned_once(host: ObservedHost) -> None:
    """An instance gets the profile once, when it gets a container; after that only the operator assigns profiles."""
    host.set_default({"user.by": "default"})
    add(host.writer, "hand")
    assert host.instances()["hand"].config == {}
    host.observe(seen("hand", host.start_process()))
    assert host.instances()["hand"].config == {"user.by": "default"}
    with host.writer.change() as change:
        steps.assign(change, host.instances()["hand"], ())
    host.observe(seen("hand", host.start_process()))
    assert host.instances()["hand"].profiles == ()
    host.observe(seen("m1", host.start_process(), key="1"), source="incus")
    assert host.instances()["m1"].profiles == ()


def test_instance_with_other_profiles_is_kept(host: ObservedHost) -> None:
    """An instance to which the operator has assigned profiles is kept when its container is gone."""
    host.observe(seen("web", host.start_process()), seen("db", host.start_process(), key="db"))
    with host.writer.change() as change:
        extra = profiles.create(change, "default", "extra")
        web = host.instances()["web"]
        steps.assign(change, web, (*profiles.get_profiles(change, web), extra))
    host.end_processes(*(one.init for one in host.instances().values()))
    host.observe(complete=True)
    assert list(host.instances()) == ["web"]


def test_mirrored_instance_with_a_profile(host: ObservedHost) -> None:
    """A daemon's values take precedence over a profile's; the assigned profile stays when the mirror writes."""
    host.set_default({"user.a": "profile", "user.b": "profile"})
    first = seen(
        "m1", host.start_process(), key="1", config={"user.a": "daemon"}, devices={}, cloud_init_id="of the daemon"
    )
    host.observe(first, source="incus")
    with host.writer.change() as change:
        default = profiles.get_profile(change, "default", "default")
        steps.assign(change, host.instances()["m1"], (default,))
    for config in ({"user.a": "daemon"}, {"user.a": "new"}):
        host.observe(replace(first, config=config), source="incus")
        found = host.instances()["m1"]
        assert found.config == {**config, "user.b": "profile"}
        assert found.cloud_init_id == "of the daemon"


def test_profile_leaves_too_little_for_the_source(host: ObservedHost) -> None:
    """If profiles leave too little of the limit for a key of the source, only that key is left out."""
    host.set_default({"user.large": "x" * ((16 << 20) - 50_000)})
    (problem,) = host.observe(seen("web", host.start_process(), config={"user.own": "x" * 100_000, "user.small": "1"}))
    assert not problem.refused
    assert "'user.own' is left out" in problem.reason
    assert host.instances()["web"].config.keys() == {"user.large", "user.small"}


def test_name_of_another_owner_is_refused(host: ObservedHost) -> None:
    """A container with the name of another source's instance is refused; that instance is unaffected."""
    running = host.start_process()
    host.observe(seen("web", running, config={"user.secret": "of lxc"}))
    before = host.instances()
    for observed in (seen("web", host.start_process(), key="f" * 64), seen("web", key="f" * 64)):
        (problem,) = host.observe(observed, source="podman")
        assert problem.refused
        assert "of lxc" in problem.reason
        assert problem.hint is not None
        assert "guestapi instance remove web" in problem.hint
        assert host.problems() == [problem]
        assert host.instances() == before
    # Without the container, the problem is gone.
    host.observe(source="podman", complete=True)
    assert host.problems() == []


def test_rename_to_a_name_of_another_owner(host: ObservedHost) -> None:
    """A registered container that takes another owner's name keeps its instance, but counts as not running."""
    running = host.start_process()
    host.observe(seen("web", host.start_process()))
    host.observe(seen("db", running, key="id", config={"user.a": "1"}), source="podman")
    number = host.instances()["db"].id
    host.observe(seen("web", running, key="id", config={"user.a": "2"}), source="podman")
    assert host.instances()["db"].init is None
    assert [problem.refused for problem in host.problems()] == [True]
    host.observe(seen("db2", running, key="id", config={"user.a": "2"}), source="podman")
    db = host.instances()["db2"]
    assert (db.id, db.init, db.config) == (number, running, {"user.a": "2"})
    assert host.problems() == []


def test_recreated_container_keeps_settings(host: ObservedHost) -> None:
    """A container that is recreated with another id gets the instance of its name, with the operator's settings."""
    first = host.start_process()
    host.observe(seen("web", first, key="1"), seen("db", host.start_process(), key="2"), source="podman")
    host.configure("web", user_a="operator")
    number = host.instances()["web"].id
    host.end_processes(first, host.instances()["db"].init)
    host.observe(source="podman", gone=["1", "2"])
    assert {name: (one.key, one.init, one.source) for name, one in host.instances().items()} == {
        "web": (None, None, "podman")
    }
    # A container of another source does not get it.
    assert host.observe(seen("web", host.start_process()))[0].refused
    host.observe(seen("web", host.start_process(), key="3"), source="podman")
    web = host.instances()["web"]
    assert (web.id, web.key, web.config, web.running) == (number, "3", {"user.a": "operator"}, True)


def test_rename_to_a_released_name(host: ObservedHost) -> None:
    """A container that is created under another name, and then renamed, gets the instance of that name."""
    host.observe(seen("web", key="1"), source="podman")
    host.configure("web", user_a="operator")
    number = host.instances()["web"].id
    host.observe(seen("1_web", key="2"), source="podman")
    host.observe(seen("web", host.start_process(), key="2"), source="podman", gone=["1"])
    assert {name: (one.id, one.key) for name, one in host.instances().items()} == {"web": (number, "2")}
    assert host.instances()["web"].config == {"user.a": "operator"}


def test_instance_added_by_hand_gets_its_container(host: ObservedHost) -> None:
    """An instance that was added by hand gets its container later, and keeps its settings when that is gone."""
    number = add(host.writer, "web", **{"user.a": "hand"}).id
    running = host.start_process()
    host.observe(seen("web", running, config={"user.b": "source"}))
    web = host.instances()["web"]
    assert (web.id, web.source, web.config) == (number, "lxc", {"user.a": "hand", "user.b": "source"})
    host.end_processes(running)
    host.observe(complete=True)
    assert (host.instances()["web"].key, host.instances()["web"].init) == (None, None)


def test_instance_started_by_hand_is_not_adopted(host: ObservedHost) -> None:
    """An instance that the operator started is not given to another container."""
    with host.writer.change() as change:
        steps.start(change, steps.add(change, "default", "web"), host.start_process())
    before = host.instances()
    (problem,) = host.observe(seen("web", host.start_process()))
    assert "which runs with process 100" in problem.reason
    assert host.instances() == before


def test_container_of_an_earlier_version_is_adopted(host: ObservedHost) -> None:
    """A container of an earlier version, registered under the first digits of its id, is recognised by its init."""
    running = host.start_process()
    with host.writer.change() as change:
        old = steps.start(change, steps.add(change, "default", "9f86d081884c", config={"user.a": "1"}), running)
    host.observe(seen("web", running, key="9f86d081884c7d659a", devices=None), source="podman")
    web = host.instances()["web"]
    assert (web.id, web.key, web.init, web.config) == (old.id, "9f86d081884c7d659a", running, {"user.a": "1"})
    assert web.run == old.run, "the container still runs, so its run has not changed"


def test_outdated_observation(host: ObservedHost) -> None:
    """An observation from before a start that is written after it neither stops nor removes the instance."""
    first = host.start_process()
    host.observe(seen("web", first))
    host.end_processes(first)
    second = host.start_process()
    host.observe(seen("web", second))
    web = host.instances()["web"]
    for late in ([seen("web")], [seen("web", first)]):
        assert host.observe(*late, complete=True) == []
        assert host.instances()["web"] == web
    (problem,) = host.observe(complete=True)
    assert "does not list it, although its init, process 101, runs" in problem.reason
    assert host.instances()["web"] == web
    host.end_processes(second)
    host.observe(complete=True)
    assert host.instances() == {}
    assert host.problems() == []


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_simultaneous_renames(host: ObservedHost, order: tuple[int, ...]) -> None:
    """Chains and circles of renames, in any order, keep every instance, and send one event each."""
    inits = [host.start_process() for _number in range(3)]
    host.observe(*[seen(f"c{number}", inits[number], key=str(number)) for number in range(3)])
    before = {one.key: one.id for one in host.instances().values()}
    for names in (["c1", "c2", "c3"], ["c2", "c3", "c1"], ["c1", "c0", "c2"]):
        log = len(log_entries(host.settings))
        wanted = [seen(names[number], inits[number], key=str(number)) for number in order]
        assert host.observe(*wanted) == []
        assert {name: one.key for name, one in host.instances().items()} == {
            name: str(number) for number, name in enumerate(names)
        }
        assert {one.key: one.id for one in host.instances().values()} == before
        assert all("instance-renamed" in metadata for _type, metadata, _guest in log_entries(host.settings)[log:])
        assert len(log_entries(host.settings)) - log == 3


def test_duplicate_names_and_keys(host: ObservedHost) -> None:
    """Of two containers with one name the first gets it; of one key only the first observation counts."""
    problems = host.observe(seen("web", key="1"), seen("web", key="2"), seen("db", key="1"))
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
        {"type": "\ud800"},
        {"init": Init(1 << 70, 1, "b", 1)},
        {"key": "\ud800"},
        {"uuid": "web"},
        {"cloud_init_id": "\ud800"},
    ],
)
def test_invalid_container_among_others(host: ObservedHost, bad: dict[str, Any]) -> None:
    """One of ten containers that cannot be written is a problem; the other nine are registered."""
    observations = [seen(f"c{number}", host.start_process()) for number in range(10)]
    observations[4] = replace(observations[4], **bad)
    (problem,) = host.observe(*observations)
    assert problem.key == observations[4].key
    assert "not registered" in problem.reason
    assert host.instances().keys() == {f"c{number}" for number in range(10)} - {"c4"}


def test_invalid_parts_are_left_out(host: ObservedHost, caplog: pytest.LogCaptureFixture) -> None:
    """A part that cannot be written is left out, recorded, logged once, and forgotten when it is corrected."""
    running = host.start_process()
    observed = seen(
        "web", running, config={"user.a": "1", "k" * 2000: "1"}, problems=("guests do not see its mount /x",)
    )
    with caplog.at_level(logging.WARNING):
        for _time in range(3):
            problems = host.observe(observed)
            assert [one.refused for one in problems] == [False, False]
            assert host.problems() == problems
    assert [record.message.count("web in project default") for record in caplog.records] == [1, 1]
    assert host.instances()["web"].config == {"user.a": "1"}
    host.observe(replace(observed, config={"user.a": "2"}, problems=()))
    assert host.problems() == []
    assert host.instances()["web"].config == {"user.a": "2"}


def test_switch_applies_despite_invalid_keys(host: ObservedHost) -> None:
    """A switch that is set to false applies, also when other parts of the instance cannot be written."""
    host.observe(seen("web", key="1", config={"user.secret": "1"}), source="incus")
    config = {"security.guestapi": "false", "user." + "x" * 2000: "1", "user.secret": "2", "user.\ud800": "1"}
    host.observe(seen("web", key="1", config=config), source="incus")
    assert host.instances()["web"].config == {"security.guestapi": "false", "user.secret": "2"}


def test_configuration_beyond_the_bound(host: ObservedHost) -> None:
    """Beyond the size limit the source's largest keys are left out, not the operator's, and old values are removed."""
    host.observe(seen("web", config={"user.a": "old"}))
    host.configure("web", user_mine="x" * (8 << 20))
    host.observe(seen("web", config={"user.a": "x" * (9 << 20), "user.b": "1"}))
    assert host.instances()["web"].config.keys() == {"user.b", "user.mine"}
    assert "too much" in host.problems()[0].reason


def test_refusals_of_the_source(host: ObservedHost) -> None:
    """A container that a source refuses is recorded as a problem; if it was registered, it counts as not running."""
    host.observe(seen("web", host.start_process()), seen("db", host.start_process()))
    why = "it shares its PID namespace"
    refused = [Problem("", f"/var/lib/lxc {name}", "default", name, why) for name in ("web", "x")]
    problems = host.observe(refused=refused)
    assert [(one.name, one.refused) for one in problems] == [("web", True), ("x", True)]
    assert {name: one.running for name, one in host.instances().items()} == {"web": False, "db": True}
    assert host.problems() == problems
    host.observe(seen("db"), complete=True, refused=refused[1:])
    assert [one.name for one in host.problems()] == ["x"]


def test_root_that_is_recorded_later(host: ObservedHost) -> None:
    """A root UID that is found later for a running init is recorded without a new run."""
    running = host.start_process()
    host.observe(seen("web", running))
    web = host.instances()["web"]
    host.observe(seen("web", replace(running, root_uid=100000, user_namespace=7)))
    again = host.instances()["web"]
    assert again.init is not None
    assert (again.run, again.init.root_uid, again.init.user_namespace) == (web.run, 100000, 7)
    host.observe(seen("web", running))
    assert host.instances()["web"] == again


def test_uuid_of_another_instance(host: ObservedHost) -> None:
    """A daemon's UUID that another instance has is replaced by another one, the same at each observation."""
    identity = "11111111-2222-3333-4444-555555555555"
    with host.writer.change() as change:
        steps.add(change, "default", "other", instance_uuid=identity)
    host.observe(seen("web", key=identity, uuid=identity), source="incus")
    first = host.instances()["web"]
    assert first.uuid != identity
    host.observe(seen("web", key=identity, uuid=identity), source="incus")
    assert host.instances()["web"] == first


SOURCES = ("lxc", "podman", "incus")
NAMES = ("a", "b", "c")
CONTAINERS = st.dictionaries(st.sampled_from("1234"), st.tuples(st.sampled_from(NAMES), st.booleans()))
STATES = st.fixed_dictionaries(dict.fromkeys(SOURCES, CONTAINERS))


@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(STATES, min_size=1, max_size=5))
def test_any_sequence_of_observations(tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, Any]]) -> None:
    """After any sequence of observations, an instance has one owner, and its owner's last observation."""
    host = ObservedHost(Settings(store=_store(tmp_path_factory)))
    owners: dict[int, tuple[str | None, str | None]] = {}
    for state in states:
        for source in SOURCES:
            host.alive.clear()
            observations = [
                seen(name, host.start_process() if running else None, key=key, config={"user.me": f"{source} {key}"})
                for key, (name, running) in state[source].items()
            ]
            problems = host.observe(*observations, source=source, complete=True)
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


def test_batch_is_one_commit(host: ObservedHost) -> None:
    """A hundred containers that start at once are registered in one commit, with an event each."""
    reader = Reader(host.settings.store.url)
    observations = [seen(f"c{number}", host.start_process()) for number in range(100)]
    before = reader.version()
    with host.writer.change() as change:
        reconcile(change, "lxc", observations, is_alive=host.alive.__contains__)
        assert reader.version() == before
    assert len(host.instances()) == 100
    assert sum("instance-started" in metadata for _type, metadata, _guest in log_entries(host.settings)) == 100
    reader.close()


def test_current_without_an_id_for_cloud_init(host: ObservedHost) -> None:
    """What a daemon reports is current, whatever cloud-init's id is, if the daemon says nothing of it."""
    running = host.start_process()
    observed = seen("web", running, key="1", location="n1", devices={})
    host.observe(observed, source="incus")
    web = host.instances()["web"]
    assert is_current(web, "incus", observed)
    assert is_current(web, "incus", replace(observed, cloud_init_id=web.cloud_init_id))
    assert not is_current(web, "incus", replace(observed, cloud_init_id="another"))
    assert not is_current(web, "incus", replace(observed, location="n2"))
    assert not is_current(web, "lxd", observed)


def test_location_follows_the_daemon(host: ObservedHost) -> None:
    """An instance of a cluster that has moved has its new location; one of a follower has none."""
    host.observe(seen("web", key="1", location="n1"), source="incus")
    assert host.instances()["web"].location == "n1"
    host.observe(seen("web", key="1", location="n2"), source="incus")
    assert host.instances()["web"].location == "n2"


@pytest.mark.parametrize("length", [499, 500, 501])
def test_long_reason_is_cut(host: ObservedHost, length: int) -> None:
    """Of the reason of a problem 500 characters are recorded, so that a name at the source cannot fill the store."""
    (problem,) = host.observe(refused=[Problem("", "key", "default", "web", "x" * length)])
    assert problem.reason == "x" * min(length, 500)
    assert host.problems() == [problem]


def test_readiness_is_of_running_instances(host: ObservedHost) -> None:
    """What a daemon says of readiness counts while the instance runs; where it says nothing, nothing changes."""
    running = host.start_process()
    for ready in (True, None):
        host.observe(seen("web", running, key="1", ready=ready), source="incus")
        assert host.instances()["web"].ready
    host.observe(seen("web", key="1", ready=True), source="incus")
    assert not host.instances()["web"].ready
    with view(host.settings.store.url) as store:
        assert list_unacknowledged(store, "incus") == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("bad", [0, 1])
def test_refused_in_a_circle_of_renames(host: ObservedHost, order: tuple[int, ...], bad: int) -> None:
    """Of two containers that exchange their names one is refused: both keep their instances, under valid names."""
    host.observe(seen("a", host.start_process(), key="1"), seen("b", host.start_process(), key="2"))
    before = {one.key: one.id for one in host.instances().values()}
    wanted = [seen("b", host.start_process(), key="1"), seen("a", host.start_process(), key="2")]
    wanted[bad] = replace(wanted[bad], cloud_init_id="\ud800")  # what no store takes
    refused = {problem.key for problem in host.observe(*(wanted[number] for number in order)) if problem.refused}
    # The other one may be refused because its name is not free.
    assert wanted[bad].key in refused
    after = host.instances()
    assert {one.key: one.id for one in after.values()} == before
    assert all(name.isprintable() for name in after)
    for observed in wanted:
        (one,) = (one for one in after.values() if one.key == observed.key)
        assert one.running == (observed.key not in refused)
        assert one.name == observed.name or not one.running


def test_new_instance_has_what_daemons_take(host: ObservedHost) -> None:
    """An instance whose configuration the daemon takes, such as a key with a control character, is registered so."""
    config = {"user.\n": "1", "user.a": "2"}
    assert host.observe(seen("web", key="1", config=config), source="incus") == []
    assert host.instances()["web"].config == config


def test_type_that_the_source_does_not_know(host: ObservedHost) -> None:
    """An instance whose type its source does not know stays what it was; a new one is a container."""
    running = host.start_process()
    host.observe(seen("vm", running, type="virtual-machine"))
    host.end_processes(running)
    assert host.observe(seen("vm", type=None), seen("new", type=None)) == []
    assert {name: one.type for name, one in host.instances().items()} == {"vm": "virtual-machine", "new": "container"}
