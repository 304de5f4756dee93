"""`decide`: which instance an observation belongs to, and whether it may be written; every case, without a store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from guestapi.model import Device, Init, Instance
from guestapi.sources.decide import Candidates, Decision, choose_devices, choose_init, decide
from guestapi.sources.observed import Observed

ALIVE, DEAD, OTHER = Init(1, 1, "b", 1), Init(2, 2, "b", 2), Init(3, 3, "b", 3)
OBSERVED = Observed("key", "default", "web", init=ALIVE)


def instance(number: int, **fields: object) -> Instance:
    """Return an instance of the store; by default one that was added by hand and does not run."""
    plain = Instance(number, 1, 0, "default", "web", "container", "u", "u", None, False, None, {}, {})
    return replace(plain, **fields)  # type: ignore[arg-type]  # the fields have many types


OWN = instance(1, name="old", source="lxc", key="key")
OWN_NAMED = instance(1, source="lxc", key="key")
BY_HAND = instance(2)
BY_HAND_RUNS = instance(2, init=OTHER)
BY_HAND_DEAD = instance(2, init=DEAD)
BY_HAND_SAME = instance(2, init=ALIVE)
RELEASED = instance(3, source="lxc")
SIBLING = instance(4, source="lxc", key="another")
FOREIGN = instance(5, source="podman", key="key")
FOREIGN_RELEASED = instance(5, source="podman")
ELSEWHERE = instance(6, name="else", init=ALIVE)
FOREIGN_ELSEWHERE = instance(6, name="else", source="podman", key="key", init=ALIVE)


@pytest.mark.parametrize(
    ("by_key", "by_name", "by_init", "empty", "expected", "replaced"),
    [
        # A new container, or a registered one, with the same name or another one.
        (None, None, None, set(), None, None),
        (OWN, None, None, set(), OWN, None),
        (OWN_NAMED, OWN_NAMED, None, set(), OWN_NAMED, None),
        (OWN_NAMED, OWN_NAMED, OWN_NAMED, set(), OWN_NAMED, None),
        # A registered container stays its instance, whichever other one has its init.
        (OWN, None, ELSEWHERE, set(), OWN, None),
        (OWN_NAMED, OWN_NAMED, ELSEWHERE, set(), OWN_NAMED, None),
        # An instance that was added by hand and does not run, or runs with this init, gets the container.
        (None, BY_HAND, None, set(), BY_HAND, None),
        (None, BY_HAND_DEAD, None, set(), BY_HAND_DEAD, None),
        (None, BY_HAND_SAME, BY_HAND_SAME, set(), BY_HAND_SAME, None),
        (None, None, ELSEWHERE, set(), ELSEWHERE, None),
        # The instance of a container that is gone gets the next container of that name.
        (None, RELEASED, None, set(), RELEASED, None),
        # Both instances exist: the one without settings of the operator's gives way.
        (OWN, RELEASED, None, {1}, RELEASED, OWN),
        (OWN, RELEASED, None, {3}, OWN, RELEASED),
        (OWN, RELEASED, None, {1, 3}, OWN, RELEASED),
        (OWN, BY_HAND, None, {1}, BY_HAND, OWN),
    ],
)
def test_accepted_observations(
    by_key: Instance | None,
    by_name: Instance | None,
    by_init: Instance | None,
    empty: set[int],
    expected: Instance | None,
    replaced: Instance | None,
) -> None:
    """An observation goes to the instance with its key, or to one with its name that has no owner or no container."""
    decision = decide(
        "lxc",
        OBSERVED,
        Candidates(by_key, by_name, by_init),
        is_alive=lambda init: init in (ALIVE, OTHER),
        is_empty=lambda one: one.id in empty,
    )
    assert decision.refusal is None, decision.refusal
    assert (decision.instance, decision.replaced) == (expected, replaced)


def test_daemons_get_no_instance_by_its_init() -> None:
    """What was added by hand under another name does not become a daemon's, although it has the same init."""
    decision = decide(
        "incus",
        OBSERVED,
        Candidates(None, None, ELSEWHERE),
        is_alive=lambda _init: True,
        is_empty=lambda _one: True,
    )
    assert decision == Decision()


@pytest.mark.parametrize(
    ("source", "by_key", "by_name", "by_init", "words", "holder"),
    [
        # Another owner has the name, whether its container runs or not.
        ("lxc", None, FOREIGN, None, "of podman", None),
        ("lxc", OWN, FOREIGN, None, "of podman", None),
        ("lxc", None, replace(FOREIGN, init=DEAD), None, "of podman", None),
        ("lxc", None, FOREIGN_RELEASED, None, "left by podman", None),
        ("lxc", None, SIBLING, None, "another container of lxc", "another"),
        ("lxc", OWN, SIBLING, None, "another container of lxc", "another"),
        ("lxc", None, BY_HAND_RUNS, None, "which runs with process 3", None),
        # Both instances have settings of the operator's.
        ("lxc", OWN, RELEASED, None, "both have settings", None),
        # Another owner has the init.
        ("lxc", None, None, FOREIGN_ELSEWHERE, "process 1, is the init of instance 'else'", None),
        ("lxc", OWN, None, FOREIGN_ELSEWHERE, "of podman", None),
        # A daemon's configuration must not be mixed with that of an instance that was added by hand.
        ("incus", None, BY_HAND, None, "added by hand", None),
        ("incus", None, BY_HAND_SAME, BY_HAND_SAME, "added by hand", None),
    ],
)
def test_refused_observations(
    source: str,
    by_key: Instance | None,
    by_name: Instance | None,
    by_init: Instance | None,
    words: str,
    holder: str | None,
) -> None:
    """A refusal names the owner, and its hint states what to do."""
    decision = decide(
        source,
        OBSERVED,
        Candidates(by_key, by_name, by_init),
        is_alive=lambda init: init in (ALIVE, OTHER),
        is_empty=lambda _one: False,
    )
    assert decision.refusal is not None
    assert words in decision.refusal
    assert decision.hint
    assert decision.holder == holder


@pytest.mark.parametrize(
    ("source", "observed", "known", "expected"),
    [
        ("lxc", ALIVE, None, ALIVE),
        ("lxc", None, None, None),
        ("lxc", None, DEAD, None),
        ("lxc", ALIVE, DEAD, ALIVE),
        ("lxc", DEAD, None, DEAD),
        # The observation is older than the registration.
        ("lxc", None, ALIVE, ALIVE),
        ("lxc", DEAD, ALIVE, ALIVE),
        # Of two living inits, the one that was observed last counts.
        ("lxc", OTHER, ALIVE, OTHER),
        # A mirror asks its daemon in order, so its observations are never older.
        ("incus", None, ALIVE, None),
        ("incus", DEAD, ALIVE, DEAD),
    ],
)
def test_init_after_an_observation(
    source: str, observed: Init | None, known: Init | None, expected: Init | None
) -> None:
    """The registered init stays while it is alive, unless another living one is observed."""
    wanted = replace(OBSERVED, init=observed)
    # Only of a process can it be asked whether it runs.
    living = {ALIVE.pid: True, OTHER.pid: True, DEAD.pid: False}
    assert choose_init(source, wanted, known, lambda init: living[init.pid]) == expected


SEEN: dict[str, Device] = {"eth0": {"type": "nic"}}


@pytest.mark.parametrize(
    ("source", "devices", "known", "init", "expected"),
    [
        # Observed before the init runs: the devices are taken, once.
        ("lxc", SEEN, None, ALIVE, SEEN),
        ("lxc", SEEN, OWN, ALIVE, SEEN),
        ("lxc", SEEN, replace(OWN, init=ALIVE), ALIVE, None),
        ("lxc", SEEN, replace(OWN, init=DEAD), ALIVE, SEEN),
        # Not observed before the init runs: the devices of an earlier run do not apply.
        ("lxc", None, OWN, ALIVE, {}),
        ("lxc", None, replace(OWN, init=DEAD), ALIVE, {}),
        ("lxc", None, replace(OWN, init=ALIVE), ALIVE, None),
        # An earlier version registered this init; the source has more than it recorded.
        ("lxc", None, BY_HAND_SAME, ALIVE, None),
        ("lxc", SEEN, BY_HAND_SAME, ALIVE, SEEN),
        # It does not run: the devices stay.
        ("lxc", {}, OWN, None, None),
        ("lxc", SEEN, OWN, None, None),
        ("lxc", SEEN, replace(OWN, init=DEAD), None, None),
        ("lxc", SEEN, None, None, None),
        ("podman", SEEN, None, None, None),
        # A daemon reports devices at any time.
        ("incus", SEEN, replace(OWN, init=ALIVE), ALIVE, SEEN),
        ("incus", {}, OWN, None, {}),
    ],
)
def test_devices_after_an_observation(
    source: str, devices: dict[str, Device] | None, known: Instance | None, init: Init | None, expected: object
) -> None:
    """Devices are observed once for each init, before the container's root, which may be hostile, can change them."""
    assert choose_devices(source, OBSERVED, devices, known, init) == expected
