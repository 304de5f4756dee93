"""The gate: which callers are admitted, in which order refusals are decided, and what remains when switched off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import falcon
import pytest

from guestapi.api.errors import NotAuthorized, NotRoot, Refusal, UnknownCaller
from guestapi.api.gate import Gate, admit
from guestapi.callers.identify import Caller
from guestapi.dialects import DIALECTS
from guestapi.model import Instance, KeyPolicy
from guestapi.store.errors import StoreError
from guestapi.wsgi import CACHEABLE, CALLER, INSTANCE, JUST_IDENTIFIED
from tests.api.fakes import INIT, ROOT, Mapped, caller, instance

INCUS = DIALECTS["incus"]
OFF = {"security.guestapi": "false", "security.devlxd": "false"}


def holding(held: Instance | None) -> Callable[[int], Instance | None]:
    """Return a function that finds `held` under its own id."""
    return lambda instance_id: held if held is not None and held.id == instance_id else None


def refused(who: Caller, held: Instance | None, method: str = "GET", template: str = "/1.0/config") -> type[Refusal]:
    """Return the refusal of a request, which must be refused."""
    with pytest.raises(Refusal) as refusal:
        admit(who, holding(held), INCUS, method, template)
    return type(refusal.value)


def test_root_of_a_known_instance_is_admitted() -> None:
    """Root of an instance that is in the run of its identification is admitted with that instance."""
    held = instance()
    assert admit(caller(), holding(held), INCUS, "GET", "/1.0/config") is held


def test_unknown_callers() -> None:
    """No instance, a removed one, one in another run, and one whose init has ended are all unknown."""
    assert refused(caller(instance_id=None), instance()) is UnknownCaller
    assert refused(caller(), None) is UnknownCaller
    assert refused(caller(run=1), instance(run=2)) is UnknownCaller
    assert refused(caller(run=2), instance(run=1)) is UnknownCaller
    assert refused(caller(living=False), instance()) is UnknownCaller


def test_caller_that_was_just_identified() -> None:
    """What was seen at the identification an instant ago is not looked at again; all else is decided as ever."""

    def look(_instance_id: int) -> Instance | None:
        pytest.fail("looked")

    held = instance()
    # Its init is not asked again either.
    assert admit(caller(living=False), look, INCUS, "GET", "/1.0/config", seen=held) is held
    wrong: list[tuple[Caller, Instance, type[Refusal]]] = [
        (caller(run=1), instance(run=2), UnknownCaller),
        (caller(), replace(held, init=replace(INIT, pid=1)), UnknownCaller),
        (caller(), replace(held, init=None), UnknownCaller),
        (caller(uid=ROOT + 1), held, NotRoot),
        (caller(), instance(OFF), NotAuthorized),
    ]
    for who, seen, why in wrong:
        with pytest.raises(why):
            admit(who, look, INCUS, "GET", "/1.0/config", seen=seen)


@pytest.mark.parametrize("just_identified", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_who_counts_as_just_identified(just_identified: bool, known: bool) -> None:
    """Only if the server says so, and the instance is known as it was then, the look at the caller is enough."""
    held = instance()
    asked: list[int] = []

    def look(instance_id: int) -> Instance | None:
        asked.append(instance_id)
        return held

    gate = Gate(look, INCUS, lambda _instance_id: held if known else None)
    environ: Any = {CALLER: caller()} | ({JUST_IDENTIFIED: True} if just_identified else {})
    assert gate.admit_first(environ, "/1.0/config") is held
    assert asked == ([] if just_identified and known else [7])
    with pytest.raises(UnknownCaller):
        gate.admit_first(environ | {CALLER: caller(instance_id=None)}, "/1.0/config")


@pytest.mark.parametrize("other", [{"pid": 1}, {"start_time": 2}, {"boot_id": "1"}, {"namespace": 1}])
def test_same_id_and_run_with_another_init(other: dict[str, Any]) -> None:
    """In a replaced store, an instance with the same id and run but another init is unknown."""
    assert refused(caller(), replace(instance(), init=replace(INIT, **other))) is UnknownCaller
    assert refused(caller(), replace(instance(), init=None)) is UnknownCaller


def test_store_is_not_read_for_unknown_callers() -> None:
    """For a caller without an instance the store is not read."""

    def look(_instance_id: int) -> Instance | None:
        pytest.fail("looked")

    with pytest.raises(UnknownCaller):
        admit(caller(instance_id=None), look, INCUS, "GET", "/")


@pytest.mark.parametrize("uid", [0, ROOT + 1, ROOT + 1000])
def test_only_the_instances_own_root(uid: int) -> None:
    """Any other user is refused, also the host's root (UID 0, by nsenter without the user namespace)."""
    assert refused(caller(uid=uid), instance()) is NotRoot


@pytest.mark.parametrize(
    ("method", "template", "key", "admitted"),
    [
        ("GET", "/1.0/config/{key}", "user.token", True),
        ("HEAD", "/1.0/config/{key}", "user.token", True),
        ("GET", "/1.0/guestapi/tree/config/{key}", "user.token", True),
        ("GET", "/1.0/config/{key}", "user.other", False),
        ("GET", "/1.0/config/{key}", None, False),
        ("PATCH", "/1.0/config/{key}", "user.token", False),
        ("GET", "/1.0/config", "user.token", False),
        ("GET", "/1.0/config", None, False),
    ],
)
def test_users_that_a_policy_names(method: str, template: str, key: str | None, admitted: bool) -> None:
    """A user that a policy names may read the key, by the routes of keys alone; any other user may not."""
    policies = (KeyPolicy("user.token", uids=frozenset({1000})), KeyPolicy("*", hidden=True))
    held = replace(instance(), policies=policies)
    for uid in (1000, 1001):
        who = caller(uid=ROOT + uid)._replace(init=Mapped())
        if admitted and uid == 1000:
            assert admit(who, holding(held), INCUS, method, template, key) is held
        else:
            with pytest.raises(NotRoot):
                admit(who, holding(held), INCUS, method, template, key)


def test_order_of_refusals() -> None:
    """Unknown is decided before not root, and not root before switched off, so that no caller learns too much."""
    off = instance(OFF)
    assert refused(caller(uid=0, living=False), off) is UnknownCaller
    assert refused(caller(uid=0, run=2), off) is UnknownCaller
    assert refused(caller(uid=0), off) is NotRoot
    assert refused(caller(uid=0), off, "GET", "/1.0") is NotRoot
    assert refused(caller(), off) is NotAuthorized


@pytest.mark.parametrize(
    ("dialect", "still_open"),
    [
        ("incus", {"GET /", "HEAD /", "GET /1.0", "HEAD /1.0"}),
        ("lxd", {"GET /", "HEAD /"}),
        ("lxd-legacy", {"GET /", "HEAD /", "GET /1.0", "HEAD /1.0"}),
    ],
)
def test_open_when_off(dialect: str, still_open: set[str]) -> None:
    """When switched off, `/` and `GET /1.0` are answered, in lxd only `/`; HEAD is answered like GET."""
    held = instance(OFF)
    answered = set()
    for template in (
        "/",
        "/1.0",
        "/1.0/config",
        "/1.0/config/{key}",
        "/1.0/devices",
        "/1.0/meta-data",
        "/1.0/device/{name}",
    ):
        for method in ("GET", "HEAD", "PATCH"):
            try:
                admit(caller(), holding(held), DIALECTS[dialect], method, template)
            except NotAuthorized:
                continue
            answered.add(f"{method} {template}")
    assert answered == still_open


@pytest.mark.parametrize(
    ("dialect", "key", "other"),
    [
        ("incus", "security.guestapi", "security.devlxd"),
        ("lxd", "security.devlxd", "security.guestapi"),
        ("lxd-legacy", "security.devlxd", "security.guestapi"),
    ],
)
def test_each_dialect_has_its_switch(dialect: str, key: str, other: str) -> None:
    """Only the dialect's own key with a false value switches it off; the default is on."""
    spoken = DIALECTS[dialect]
    for config in ({}, {key: "true"}, {key: "1"}, {key: ""}, {other: "false"}):
        admit(caller(), holding(instance(config)), spoken, "GET", "/1.0/config")
    for value in ("false", "False", "0", "no", "off", "OFF"):
        with pytest.raises(NotAuthorized):
            admit(caller(), holding(instance({key: value})), spoken, "GET", "/1.0/config")


def test_store_faults_pass() -> None:
    """An error of the store is raised, and does not make a caller unknown."""

    def look(_instance_id: int) -> Instance | None:
        raise StoreError("disk on fire")

    with pytest.raises(StoreError):
        admit(caller(), look, INCUS, "GET", "/")


class Resource:
    """A resource whose responses depend only on request and instance."""

    cacheable = True


def pass_gate(held: Instance | None, who: Caller, method: str = "GET", resource: object = None) -> dict[str, Any]:
    """Return the environ after a request has passed the gate; `refused` in it is the refusal."""
    environ: dict[str, Any] = {CALLER: who, "REQUEST_METHOD": method}
    request = SimpleNamespace(env=environ, uri_template="/1.0/config", context=SimpleNamespace())
    try:
        Gate(holding(held), INCUS).process_resource(
            cast("falcon.Request", request), cast("falcon.Response", None), resource, {}
        )
        assert request.context.instance is environ[INSTANCE]
    except Refusal as refusal:
        environ["refused"] = type(refusal)
    return environ


def test_refusals_have_their_instance() -> None:
    """A refusal has the caller's instance for the log; an unknown caller has none."""
    off = instance(OFF)
    for who, refusal in ((caller(), NotAuthorized), (caller(uid=0), NotRoot), (caller(run=2), UnknownCaller)):
        environ = pass_gate(off, who)
        assert environ["refused"] is refusal
        assert environ[INSTANCE] is off
        assert CACHEABLE not in environ
    assert pass_gate(None, caller())[INSTANCE] is None
    stranger = pass_gate(off, caller(instance_id=None))
    assert stranger["refused"] is UnknownCaller
    assert INSTANCE not in stranger


@pytest.mark.parametrize(
    ("method", "resource", "cacheable"),
    [
        ("GET", Resource(), True),
        ("HEAD", Resource(), True),
        ("PATCH", Resource(), False),
        ("OPTIONS", Resource(), False),
        ("GET", object(), False),
        ("GET", SimpleNamespace(cacheable=False), False),
    ],
)
def test_cacheable_responses(method: str, resource: object, cacheable: bool) -> None:
    """A response is cacheable if its resource declares it and the method is a read."""
    held = instance()
    environ = pass_gate(held, caller(), method, resource)
    assert environ[INSTANCE] is held
    assert environ[CACHEABLE] is cacheable


def test_request_that_was_admitted_already() -> None:
    """A request whose instance was read again is decided again if the instance changed, and not if it did not."""
    held, who = instance(), caller()
    environ: dict[str, Any] = {CALLER: who, "REQUEST_METHOD": "GET"}
    told = SimpleNamespace(env=environ, uri_template="/1.0/config", context=SimpleNamespace())
    request, gate = cast("falcon.Request", told), Gate(holding(held), INCUS)
    gate.process_resource(request, cast("falcon.Response", None), None, {})
    shown = told.context.instance
    who.init.living = False  # type: ignore[union-attr]  # a StandIn
    assert gate.readmit(request, held) is shown, "the same object: nothing is decided"
    with pytest.raises(UnknownCaller):
        gate.readmit(request, replace(held, revision=2))
    with pytest.raises(UnknownCaller):
        gate.readmit(request, None)
    who.init.living = True  # type: ignore[union-attr]  # a StandIn
    with pytest.raises(NotAuthorized):
        gate.readmit(request, replace(held, config=OFF))
    assert environ[INSTANCE] is held
    changed = replace(held, revision=2)
    assert gate.readmit(request, changed).revision == 2
    assert environ[INSTANCE] is changed
    assert told.context.instance.revision == 2
