"""Observations of a daemon's mirror: instances as the daemon has them, one change each, and readiness both ways."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from guestapi.model import Init, Instance, Problem, SourceStatus
from guestapi.settings import Settings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import is_current, reconcile
from guestapi.store.lookup import find_instance, list_problems, list_sources
from guestapi.store.statuses import acknowledge, list_unacknowledged, record_status
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.store.processes import add, init, known, log_entries

FIRST, SECOND = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"
NIC = {"type": "nic", "name": "eth0"}
DISK = {"type": "disk", "path": "/", "pool": "p"}


def wanted(name: str = "c1", identity: str = FIRST, **changed: Any) -> Observed:
    """Return a daemon's observation of an instance, with some fields changed."""
    usual = Observed(
        key=identity,
        project="default",
        name=name,
        uuid=identity,
        cloud_init_id=identity,
        ready=False,
        config={"user.a": "1"},
        devices={"eth0": NIC},
    )
    return replace(usual, **changed)


Write = Callable[[Observed], Instance]


@pytest.fixture
def write(writer: Writer) -> Write:
    """Return a function that writes an observation as the mirror ``incus`` does, in a transaction of its own."""

    def write(observed: Observed) -> Instance:
        with writer.change() as change:
            assert reconcile(change, "incus", [observed]) == []
            found = find_instance(change, observed.project, observed.name)
        assert found is not None
        return found

    return write


def refusal(writer: Writer, observed: Observed, source: str = "incus") -> Problem:
    """Return the problem of a refused observation."""
    with writer.change() as change:
        (problem,) = reconcile(change, source, [observed])
    assert problem.refused
    return problem


def unacknowledged(settings: Settings) -> list[tuple[str, bool]]:
    """Return the readiness that is not yet sent to the daemon."""
    with view(settings.store.url) as store:
        return [(one.name, one.ready) for one in list_unacknowledged(store, "incus")]


def test_instance_equals_the_daemons(settings: Settings, write: Write) -> None:
    """The store has everything that was observed; the same observation again changes nothing, not even the revision."""
    instance = wanted(cloud_init_id=str(uuid.uuid4()), location="n1", init=init(100))
    first = write(instance)
    assert is_current(first, "incus", instance)
    assert first.source == "incus"
    entries = log_entries(settings)
    assert write(instance) == first
    assert log_entries(settings) == entries


def test_one_observation_is_one_change(settings: Settings, write: Write) -> None:
    """Changes between two observations are one change: events of keys first, then of devices."""
    before = wanted(init=init(100), config={"user.a": "1", "user.b": "1"}, devices={"eth0": NIC, "old": DISK})
    write(before)
    seen = len(log_entries(settings))
    write(
        replace(
            before,
            config={"user.b": "2", "user.c": "3", "security.guestapi": "true"},
            devices={"eth0": {**NIC, "limits.max": "1Mbit"}, "new": DISK},
        )
    )
    news = [metadata for _type, metadata, for_guest in log_entries(settings)[seen:] if for_guest]
    assert news == [
        '{"key":"user.a","old_value":"1","value":""}',
        '{"key":"user.b","old_value":"1","value":"2"}',
        '{"key":"user.c","old_value":"","value":"3"}',
        '{"action":"removed","config":{"path":"/","pool":"p","type":"disk"},"name":"old"}',
        '{"action":"updated","config":{"limits.max":"1Mbit","name":"eth0","type":"nic"},"name":"eth0"}',
        '{"action":"added","config":{"path":"/","pool":"p","type":"disk"},"name":"new"}',
    ]


@pytest.mark.parametrize(
    ("kind", "option", "actions"),
    [
        *[("nic", option, ["updated"]) for option in ("limits.ingress", "ipv4.routes", "security.mac_filtering")],
        *[("disk", option, ["updated"]) for option in ("size", "limits.read")],
        *[("nic", option, ["removed", "added"]) for option in ("mtu", "name", "queue.tx.length")],
        *[("disk", option, ["removed", "added"]) for option in ("path", "source", "readonly")],
        ("gpu", "pci", ["removed", "added"]),
    ],
)
def test_devices_are_updated_or_replaced_as_the_daemon_does(
    settings: Settings, write: Write, kind: str, option: str, actions: list[str]
) -> None:
    """A device option that a daemon can change while it runs is an update; another one, a removal and an addition."""
    write(wanted(init=init(100), devices={"d": {"type": kind, option: "1"}}))
    seen = len(log_entries(settings))
    write(wanted(init=init(100), devices={"d": {"type": kind, option: "2"}}))
    assert [json.loads(metadata)["action"] for _type, metadata, _for_guest in log_entries(settings)[seen:]] == actions


def test_cloud_init_id_of_the_daemon(settings: Settings, write: Write) -> None:
    """The cloud-init id changes only when the daemon changes it."""
    first = write(wanted())
    changed = write(wanted(config={"user.user-data": "#cloud-config"}))
    assert changed.cloud_init_id == first.cloud_init_id
    assert write(wanted(cloud_init_id=SECOND)).cloud_init_id == SECOND


def test_another_init_is_another_run(settings: Settings, write: Write) -> None:
    """Another init is another run, so no caller of the earlier run is identified as one of the new run."""
    first = write(wanted(init=init(100)))
    seen = len(log_entries(settings))
    second = write(wanted(init=init(200), config={"user.a": "2"}))
    assert second.run > first.run
    assert [for_guest for _type, _metadata, for_guest in log_entries(settings)[seen:]] == [False] * 3
    assert write(wanted()).init is None


def test_rename_keeps_the_instance(settings: Settings, write: Write) -> None:
    """A renamed instance keeps its id, and its old name is free for another one."""
    first = write(wanted("c1"))
    assert write(wanted("c2")).id == first.id
    assert write(wanted("c2", project="p")).id == first.id
    assert write(wanted("c1", SECOND)).id != first.id
    assert [(one.project, one.name) for one in known(settings)] == [("default", "c1"), ("p", "c2")]


def test_recreated_instance(settings: Settings, writer: Writer, write: Write) -> None:
    """An instance that was deleted and created again between two observations keeps nothing of the old one."""
    first = write(wanted(init=init(100)))
    with writer.change() as change:
        assert reconcile(change, "incus", [wanted("c1", SECOND, config={})], complete=True) == []
    (second,) = known(settings)
    assert second.id != first.id
    assert (second.uuid, second.init, second.config) == (SECOND, None, {})


def test_name_of_an_instance_that_may_exist(settings: Settings, writer: Writer, write: Write) -> None:
    """While the old instance of a name may exist, the new one is refused with the holder's key; later it is written."""
    first = write(wanted())
    assert refusal(writer, wanted("c1", SECOND)).holder == FIRST
    assert known(settings) == [first]
    with writer.change() as change:
        assert reconcile(change, "incus", [wanted("c1", SECOND)], gone=[FIRST]) == []
    assert [one.uuid for one in known(settings)] == [SECOND]


def test_names_of_other_owners(settings: Settings, writer: Writer, write: Write) -> None:
    """An instance with a name of the operator's or of another source is refused, and theirs stays unchanged."""
    add(writer, "c1")
    with writer.change() as change:
        reconcile(change, "lxd", [wanted("c2", SECOND)])
    before = known(settings)
    assert "added by hand" in refusal(writer, wanted()).reason
    assert "of lxd" in refusal(writer, wanted("c2")).reason
    assert known(settings) == before
    assert [(one.name, one.source) for one in before] == [("c1", None), ("c2", "lxd")]
    with view(settings.store.url) as store:
        assert [(one.source, one.key, one.name, one.refused) for one in list_problems(store)] == [
            ("incus", FIRST, "c2", True)
        ]


def test_readiness_is_acknowledged_once(settings: Settings, writer: Writer, write: Write) -> None:
    """Ready, and Started after it, are to be sent until the daemon has acknowledged them."""
    instance = write(wanted(init=init(100)))
    assert unacknowledged(settings) == []
    for state in (True, False):
        writer.set_ready(instance.id, instance.run, state)
        assert unacknowledged(settings) == [("c1", state)]
        # An observation before the daemon has the readiness changes nothing.
        write(wanted(init=init(100), ready=not state))
        assert unacknowledged(settings) == [("c1", state)]
        with writer.change() as change:
            (said,) = list_unacknowledged(change, "incus")
            acknowledge(change, said)
        assert unacknowledged(settings) == []
        assert write(wanted(init=init(100), ready=state)).ready == state


def test_readiness_of_an_earlier_run(settings: Settings, writer: Writer, write: Write) -> None:
    """Readiness ends with the run, and its acknowledgement does not apply to the next run."""
    instance = write(wanted(init=init(100)))
    writer.set_ready(instance.id, instance.run, True)
    with view(settings.store.url) as store:
        (said,) = list_unacknowledged(store, "incus")
    assert write(wanted(init=init(200))).ready is False
    with writer.change() as change:
        acknowledge(change, said)
    assert unacknowledged(settings) == []


@pytest.mark.parametrize(("said", "told_before", "held"), list(product([True, False], repeat=3)))
def test_changed_readiness_counts(
    settings: Settings, writer: Writer, write: Write, said: bool, told_before: bool, held: bool
) -> None:
    """Of the guest's and the daemon's readiness, the one that changed counts; if both did, the guest's."""
    instance = write(wanted(init=init(100), ready=told_before))
    assert instance.ready == told_before
    writer.set_ready(instance.id, instance.run, said)
    now = write(wanted(init=init(100), ready=held))
    assert now.ready == (said if said != told_before else held)
    assert unacknowledged(settings) == ([("c1", said)] if now.ready != held else [])


def test_status_of_a_source(settings: Settings, writer: Writer) -> None:
    """A source has one status, the last recorded one."""
    for contact in (1.5, 2.5):
        with writer.change() as change:
            for name in ("lxd", "incus"):
                record_status(change, SourceStatus(name, "/s", contact > 2, contact, 0.25, "why"))
    with view(settings.store.url) as store:
        assert list_sources(store) == [SourceStatus(name, "/s", True, 2.5, 0.25, "why") for name in ("incus", "lxd")]


def test_init_of_another_instance_is_refused(settings: Settings, writer: Writer, write: Write) -> None:
    """An instance with the init of another one is refused, and nothing of it is written."""
    write(wanted("c1", init=init(100)))
    problem = refusal(writer, wanted("c2", SECOND, init=Init(100, 1, "boot", init(100).namespace)))
    assert "is the init of instance 'c1'" in problem.reason
    assert [one.name for one in known(settings)] == ["c1"]
