"""What the mirror of a daemon writes: instances as the daemon has them, told as one change, and readiness both ways."""

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
from tests.store.processes import add, init, known, told

FIRST, SECOND = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"
NIC = {"type": "nic", "name": "eth0"}
DISK = {"type": "disk", "path": "/", "pool": "p"}


def wanted(name: str = "c1", identity: str = FIRST, **changed: Any) -> Observed:
    """An instance as a daemon has it; `changed`: what is not as usual."""
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
    """Writes in a transaction of its own, as the mirror ``incus`` does."""

    def write(observed: Observed) -> Instance:
        with writer.change() as change:
            assert reconcile(change, "incus", [observed]) == []
            found = find_instance(change, observed.project, observed.name)
        assert found is not None
        return found

    return write


def refusal(writer: Writer, observed: Observed, source: str = "incus") -> Problem:
    """Why an observation is refused."""
    with writer.change() as change:
        (problem,) = reconcile(change, source, [observed])
    assert problem.refused
    return problem


def unacknowledged(settings: Settings) -> list[tuple[str, bool]]:
    """What there is to tell the daemon."""
    with view(settings.store.url) as store:
        return [(one.name, one.ready) for one in list_unacknowledged(store, "incus")]


def test_instance_is_as_the_daemon_has_it(settings: Settings, write: Write) -> None:
    """All that the daemon says is in the store; what is the same already changes nothing, not even the revision."""
    instance = wanted(cloud_init_id=str(uuid.uuid4()), location="n1", init=init(100))
    first = write(instance)
    assert is_current(first, "incus", instance)
    assert first.source == "incus"
    entries = told(settings)
    assert write(instance) == first
    assert told(settings) == entries


def test_one_look_is_one_change(settings: Settings, write: Write) -> None:
    """Configuration and devices that changed between two looks are told together: keys first, then devices."""
    before = wanted(init=init(100), config={"user.a": "1", "user.b": "1"}, devices={"eth0": NIC, "old": DISK})
    write(before)
    seen = len(told(settings))
    write(
        replace(
            before,
            config={"user.b": "2", "user.c": "3", "security.guestapi": "true"},
            devices={"eth0": {**NIC, "limits.max": "1Mbit"}, "new": DISK},
        )
    )
    news = [metadata for _type, metadata, for_guest in told(settings)[seen:] if for_guest]
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
    """What a daemon can change on a running device is an update; for anything else it takes it away and adds it."""
    write(wanted(init=init(100), devices={"d": {"type": kind, option: "1"}}))
    seen = len(told(settings))
    write(wanted(init=init(100), devices={"d": {"type": kind, option: "2"}}))
    assert [json.loads(metadata)["action"] for _type, metadata, _for_guest in told(settings)[seen:]] == actions


def test_cloud_init_id_is_the_daemons(settings: Settings, write: Write) -> None:
    """What makes cloud-init run again is the daemon's decision: the id changes when it says so, and only then."""
    first = write(wanted())
    changed = write(wanted(config={"user.user-data": "#cloud-config"}))
    assert changed.cloud_init_id == first.cloud_init_id
    assert write(wanted(cloud_init_id=SECOND)).cloud_init_id == SECOND


def test_restart_between_two_looks_is_another_run(settings: Settings, write: Write) -> None:
    """Another init is another run: nobody who was identified in the first is taken for one of the second."""
    first = write(wanted(init=init(100)))
    seen = len(told(settings))
    second = write(wanted(init=init(200), config={"user.a": "2"}))
    assert second.run > first.run
    assert [for_guest for _type, _metadata, for_guest in told(settings)[seen:]] == [False] * 3
    assert write(wanted()).init is None


def test_new_name_keeps_the_instance(settings: Settings, write: Write) -> None:
    """A renamed instance is the same one, and its old name is free for another."""
    first = write(wanted("c1"))
    assert write(wanted("c2")).id == first.id
    assert write(wanted("c2", project="p")).id == first.id
    assert write(wanted("c1", SECOND)).id != first.id
    assert [(one.project, one.name) for one in known(settings)] == [("default", "c1"), ("p", "c2")]


def test_new_instance_of_an_old_name_is_another(settings: Settings, writer: Writer, write: Write) -> None:
    """Deleted and made again between two looks: nothing of the old one is left."""
    first = write(wanted(init=init(100)))
    with writer.change() as change:
        assert reconcile(change, "incus", [wanted("c1", SECOND, config={})], complete=True) == []
    (second,) = known(settings)
    assert second.id != first.id
    assert (second.uuid, second.init, second.config) == (SECOND, None, {})


def test_new_instance_of_a_name_whose_old_one_may_be_there(settings: Settings, writer: Writer, write: Write) -> None:
    """A single look does not tell whether the old one is gone: it is refused until that is known, and says whose."""
    first = write(wanted())
    assert refusal(writer, wanted("c1", SECOND)).holder == FIRST
    assert known(settings) == [first]
    with writer.change() as change:
        assert reconcile(change, "incus", [wanted("c1", SECOND)], gone=[FIRST]) == []
    assert [one.uuid for one in known(settings)] == [SECOND]


def test_instances_of_others_are_left_alone(settings: Settings, writer: Writer, write: Write) -> None:
    """A name that the operator, or another source, has given is refused, and theirs stays as it is."""
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


def test_what_the_guest_says_reaches_the_daemon_once(settings: Settings, writer: Writer, write: Write) -> None:
    """Ready, and Started after it, are there to be told until the daemon knows, and not again."""
    instance = write(wanted(init=init(100)))
    assert unacknowledged(settings) == []
    for state in (True, False):
        writer.set_ready(instance.id, instance.run, state)
        assert unacknowledged(settings) == [("c1", state)]
        # A look in between, at a daemon that does not know yet, changes nothing.
        write(wanted(init=init(100), ready=not state))
        assert unacknowledged(settings) == [("c1", state)]
        with writer.change() as change:
            (said,) = list_unacknowledged(change, "incus")
            acknowledge(change, said)
        assert unacknowledged(settings) == []
        assert write(wanted(init=init(100), ready=state)).ready == state


def test_what_was_said_in_another_run_is_not_told(settings: Settings, writer: Writer, write: Write) -> None:
    """Ready is forgotten with the run, and what was about to be told of that run is not noted for the next."""
    instance = write(wanted(init=init(100)))
    writer.set_ready(instance.id, instance.run, True)
    with view(settings.store.url) as store:
        (said,) = list_unacknowledged(store, "incus")
    assert write(wanted(init=init(200))).ready is False
    with writer.change() as change:
        acknowledge(change, said)
    assert unacknowledged(settings) == []


@pytest.mark.parametrize(("said", "told_before", "held"), list(product([True, False], repeat=3)))
def test_newer_readiness_wins(
    settings: Settings, writer: Writer, write: Write, said: bool, told_before: bool, held: bool
) -> None:
    """Of what the guest said and what the daemon holds, the one that has changed counts; the guest's, if both have."""
    instance = write(wanted(init=init(100), ready=told_before))
    assert instance.ready == told_before
    writer.set_ready(instance.id, instance.run, said)
    now = write(wanted(init=init(100), ready=held))
    assert now.ready == (said if said != told_before else held)
    assert unacknowledged(settings) == ([("c1", said)] if now.ready != held else [])


def test_state_of_a_mirror_is_read_back(settings: Settings, writer: Writer) -> None:
    """Each mirror has one row, which holds what it said last."""
    for contact in (1.5, 2.5):
        with writer.change() as change:
            for name in ("lxd", "incus"):
                record_status(change, SourceStatus(name, "/s", contact > 2, contact, 0.25, "why"))
    with view(settings.store.url) as store:
        assert list_sources(store) == [SourceStatus(name, "/s", True, 2.5, 0.25, "why") for name in ("incus", "lxd")]


def test_init_of_another_instance_is_refused(settings: Settings, writer: Writer, write: Write) -> None:
    """What another instance holds by mistake is refused whole: no half of it stays."""
    write(wanted("c1", init=init(100)))
    problem = refusal(writer, wanted("c2", SECOND, init=Init(100, 1, "boot", init(100).namespace)))
    assert "is the init of instance 'c1'" in problem.reason
    assert [one.name for one in known(settings)] == ["c1"]
