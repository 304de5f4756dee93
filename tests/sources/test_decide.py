"""Which instance an observation is about, and whether it may be: every case, without a store."""

from __future__ import annotations

from dataclasses import replace

import pytest

from guestapi.model import Device, Init, Instance
from guestapi.sources.decide import Candidates, choose_devices, choose_init, decide
from guestapi.sources.observed import Observed

ALIVE, DEAD, OTHER = Init(1, 1, "b", 1), Init(2, 2, "b", 2), Init(3, 3, "b", 3)
OBSERVED = Observed("key", "default", "web", init=ALIVE)


def instance(number: int, **fields: object) -> Instance:
    """An instance of the store; by default, one that was added by hand and does not run."""
    plain = Instance(number, 1, 0, "default", "web", "container", "u", "u", None, False, None, {}, {})
    return replace(plain, **fields)  # type: ignore[arg-type]  # by name, whatever they are


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
        # It is new; or known, under this name or another.
        (None, None, None, set(), None, None),
        (OWN, None, None, set(), OWN, None),
        (OWN_NAMED, OWN_NAMED, None, set(), OWN_NAMED, None),
        (OWN_NAMED, OWN_NAMED, OWN_NAMED, set(), OWN_NAMED, None),
        # Added by hand, and does not run, or with this very init: it has found its container.
        (None, BY_HAND, None, set(), BY_HAND, None),
        (None, BY_HAND_DEAD, None, set(), BY_HAND_DEAD, None),
        (None, BY_HAND_SAME, BY_HAND_SAME, set(), BY_HAND_SAME, None),
        (None, None, ELSEWHERE, set(), ELSEWHERE, None),
        # Its container went, this is the next one.
        (None, RELEASED, None, set(), RELEASED, None),
        # Both are there: nothing that would be missed gives way to the other.
        (OWN, RELEASED, None, {1}, RELEASED, OWN),
        (OWN, RELEASED, None, {3}, OWN, RELEASED),
        (OWN, RELEASED, None, {1, 3}, OWN, RELEASED),
        (OWN, BY_HAND, None, {1}, BY_HAND, OWN),
    ],
)
def test_observations_that_are_taken(
    by_key: Instance | None,
    by_name: Instance | None,
    by_init: Instance | None,
    empty: set[int],
    expected: Instance | None,
    replaced: Instance | None,
) -> None:
    """A key names its instance; one without an owner, or without a container, is the first one's of its name."""
    decision = decide(
        "lxc",
        OBSERVED,
        Candidates(by_key, by_name, by_init),
        is_alive=lambda init: init in (ALIVE, OTHER),
        is_empty=lambda one: one.id in empty,
    )
    assert decision.refusal is None, decision.refusal
    assert (decision.instance, decision.replaced) == (expected, replaced)


@pytest.mark.parametrize(
    ("source", "by_key", "by_name", "by_init", "words", "holder"),
    [
        # The name is another owner's, whatever that one does.
        ("lxc", None, FOREIGN, None, "of podman", None),
        ("lxc", OWN, FOREIGN, None, "of podman", None),
        ("lxc", None, replace(FOREIGN, init=DEAD), None, "of podman", None),
        ("lxc", None, FOREIGN_RELEASED, None, "left by podman", None),
        ("lxc", None, SIBLING, None, "another container of lxc", "another"),
        ("lxc", OWN, SIBLING, None, "another container of lxc", "another"),
        ("lxc", None, BY_HAND_RUNS, None, "which runs with process 3", None),
        # Both have settings of the operator's.
        ("lxc", OWN, RELEASED, None, "both have settings", None),
        # The init is another owner's.
        ("lxc", None, None, FOREIGN_ELSEWHERE, "process 1, is the init of instance 'else'", None),
        ("lxc", OWN, None, FOREIGN_ELSEWHERE, "of podman", None),
        # A daemon's configuration would be mixed with somebody else's.
        ("incus", None, BY_HAND, None, "added by hand", None),
        ("incus", None, BY_HAND_SAME, BY_HAND_SAME, "added by hand", None),
    ],
)
def test_observations_that_are_refused(
    source: str,
    by_key: Instance | None,
    by_name: Instance | None,
    by_init: Instance | None,
    words: str,
    holder: str | None,
) -> None:
    """A refusal names the owner, and says what to do."""
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
        # A look that is older than what is known.
        ("lxc", None, ALIVE, ALIVE),
        ("lxc", DEAD, ALIVE, ALIVE),
        # Of two that are alive, the one that was seen later counts.
        ("lxc", OTHER, ALIVE, OTHER),
        # A mirror asks its daemon in order.
        ("incus", None, ALIVE, None),
        ("incus", DEAD, ALIVE, DEAD),
    ],
)
def test_init_after_an_observation(
    source: str, observed: Init | None, known: Init | None, expected: Init | None
) -> None:
    """A process that is alive gives way to another live one alone."""
    wanted = replace(OBSERVED, init=observed)
    assert choose_init(source, wanted, known, lambda init: init in (ALIVE, OTHER)) == expected


SEEN: dict[str, Device] = {"eth0": {"type": "nic"}}


@pytest.mark.parametrize(
    ("source", "devices", "known", "init", "expected"),
    [
        # Seen before the init ran: taken, once.
        ("lxc", SEEN, None, ALIVE, SEEN),
        ("lxc", SEEN, OWN, ALIVE, SEEN),
        ("lxc", SEEN, replace(OWN, init=ALIVE), ALIVE, None),
        ("lxc", SEEN, replace(OWN, init=DEAD), ALIVE, SEEN),
        # Not seen before it ran: what the last run had is not this one's.
        ("lxc", None, OWN, ALIVE, {}),
        ("lxc", None, replace(OWN, init=DEAD), ALIVE, {}),
        ("lxc", None, replace(OWN, init=ALIVE), ALIVE, None),
        # An earlier version has registered this very init; its source tells more of it than that did.
        ("lxc", None, BY_HAND_SAME, ALIVE, None),
        ("lxc", SEEN, BY_HAND_SAME, ALIVE, SEEN),
        # It does not run: what it had stays.
        ("lxc", {}, OWN, None, None),
        ("lxc", SEEN, OWN, None, None),
        ("lxc", SEEN, replace(OWN, init=DEAD), None, None),
        ("lxc", SEEN, None, None, None),
        ("podman", SEEN, None, None, None),
        # A daemon tells the devices at any time.
        ("incus", SEEN, replace(OWN, init=ALIVE), ALIVE, SEEN),
        ("incus", {}, OWN, None, {}),
    ],
)
def test_devices_after_an_observation(
    source: str, devices: dict[str, Device] | None, known: Instance | None, init: Init | None, expected: object
) -> None:
    """What a container is told of its devices was seen once for each init, before a hostile root could choose it."""
    assert choose_devices(source, OBSERVED, devices, known, init) == expected
