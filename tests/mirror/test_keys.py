"""The choice of keys for a daemon's instances that share a UUID."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.mirror.keys import Place, choose_key, choose_keys, own_key, with_key
from guestapi.sources.observed import Observed

U1, U2 = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"
A, B, C = ("default", "a"), ("default", "b"), ("p", "a")
OWN_A, OWN_B = own_key(A, U1), own_key(B, U1)


def test_derived_keys() -> None:
    """A key that is derived from a UUID and a place differs for each place, and is the same each time."""
    assert len({U1, OWN_A, OWN_B, own_key(C, U1), own_key(A, U2)}) == 5
    assert own_key(A, U1) == OWN_A


@pytest.mark.parametrize(
    ("wanted", "known", "chosen"),
    [
        ([(A, U1), (B, U2)], {}, {A: U1, B: U2}),
        # No instance has the key yet: the first one gets it.
        ([(B, U1), (A, U1)], {}, {A: U1, B: OWN_B}),
        # An instance that has the key keeps it.
        ([(A, U1), (B, U1)], {U1: B}, {A: OWN_A, B: U1}),
        ([(A, U1), (B, U1)], {U1: B, OWN_A: A}, {A: OWN_A, B: U1}),
        # An instance with a derived key keeps it, even if the other instance is gone.
        ([(A, U1)], {OWN_A: A}, {A: OWN_A}),
        ([(A, U1)], {OWN_A: A, U1: B}, {A: OWN_A}),
        # The instance with the key was renamed.
        ([(A, U1)], {U1: B}, {A: U1}),
        ([(A, U1), (C, U1)], {U1: B}, {A: U1, C: own_key(C, U1)}),
    ],
)
def test_all_instances(wanted: list[tuple[Place, str]], known: dict[str, Place], chosen: dict[Place, str]) -> None:
    """Every instance has a key of its own, and keeps it as long as it exists."""
    assert choose_keys(wanted, known) == chosen


@pytest.mark.parametrize(
    ("known", "there", "chosen"),
    [
        ({}, [], U1),
        ({U1: A}, [], U1),
        # The key belongs to another instance, which still exists, or to this one under its old name.
        ({U1: B}, [B], OWN_A),
        ({U1: B}, [], U1),
        ({U1: B, OWN_A: A}, [], OWN_A),
    ],
)
def test_one_instance(known: dict[str, Place], there: list[Place], chosen: str) -> None:
    """For a single instance, the daemon is asked whether the other one with its UUID still exists."""
    assert choose_key(A, U1, known, lambda place, identity: identity == U1 and place in there) == chosen


@given(st.dictionaries(st.sampled_from([A, B, C]), st.sampled_from([U1, U2]), min_size=1))
def test_keys_never_collide(wanted: dict[Place, str]) -> None:
    """However UUIDs are shared, all keys differ, and a second choice gives the same keys."""
    first = choose_keys(wanted.items(), {})
    assert len(set(first.values())) == len(wanted)
    assert choose_keys(wanted.items(), {key: place for place, key in first.items()}) == first


def test_observation_with_another_key() -> None:
    """The key is also the instance's UUID; its cloud-init id remains the daemon's."""
    observed = Observed(U1, *A, uuid=U1, cloud_init_id=U1)
    assert with_key(observed, U1) is observed
    changed = with_key(observed, OWN_A)
    assert (changed.key, changed.uuid, changed.cloud_init_id) == (OWN_A, OWN_A, U1)
