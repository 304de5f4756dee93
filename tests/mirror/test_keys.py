"""Which key an instance of a daemon has when another one has the same UUID."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.mirror.keys import Place, choose_key, choose_keys, own_key, with_key
from guestapi.sources.observed import Observed

U1, U2 = "11111111-2222-3333-4444-555555555555", "66666666-2222-3333-4444-555555555555"
A, B, C = ("default", "a"), ("default", "b"), ("p", "a")
OWN_A, OWN_B = own_key(A, U1), own_key(B, U1)


def test_keys_are_uuids_of_their_own() -> None:
    """A key that is made of a UUID and a place is another one for each place, and the same at every look."""
    assert len({U1, OWN_A, OWN_B, own_key(C, U1), own_key(A, U2)}) == 5
    assert own_key(A, U1) == OWN_A


@pytest.mark.parametrize(
    ("wanted", "known", "chosen"),
    [
        ([(A, U1), (B, U2)], {}, {A: U1, B: U2}),
        # Nobody has the key yet: the first of them gets it.
        ([(B, U1), (A, U1)], {}, {A: U1, B: OWN_B}),
        # One has it, and keeps it.
        ([(A, U1), (B, U1)], {U1: B}, {A: OWN_A, B: U1}),
        ([(A, U1), (B, U1)], {U1: B, OWN_A: A}, {A: OWN_A, B: U1}),
        # One that has a key of its own keeps that, though the other is gone.
        ([(A, U1)], {OWN_A: A}, {A: OWN_A}),
        ([(A, U1)], {OWN_A: A, U1: B}, {A: OWN_A}),
        # It has another name now.
        ([(A, U1)], {U1: B}, {A: U1}),
        ([(A, U1), (C, U1)], {U1: B}, {A: U1, C: own_key(C, U1)}),
    ],
)
def test_all_instances(wanted: list[tuple[Place, str]], known: dict[str, Place], chosen: dict[Place, str]) -> None:
    """Every instance has a key of its own, and keeps it as long as it is there."""
    assert choose_keys(wanted, known) == chosen


@pytest.mark.parametrize(
    ("known", "there", "chosen"),
    [
        ({}, [], U1),
        ({U1: A}, [], U1),
        # Another one has the key, and is still there; or it is this one, under its old name.
        ({U1: B}, [B], OWN_A),
        ({U1: B}, [], U1),
        ({U1: B, OWN_A: A}, [], OWN_A),
    ],
)
def test_one_instance(known: dict[str, Place], there: list[Place], chosen: str) -> None:
    """Of a single instance, the daemon is asked whether the other one with its UUID is there."""
    assert choose_key(A, U1, known, lambda place, identity: identity == U1 and place in there) == chosen


@given(st.dictionaries(st.sampled_from([A, B, C]), st.sampled_from([U1, U2]), min_size=1))
def test_keys_never_collide(wanted: dict[Place, str]) -> None:
    """However UUIDs are shared, no two instances have one key, and what was chosen once is chosen again."""
    first = choose_keys(wanted.items(), {})
    assert len(set(first.values())) == len(wanted)
    assert choose_keys(wanted.items(), {key: place for place, key in first.items()}) == first


def test_observation_with_another_key() -> None:
    """The key is the instance's UUID too; its cloud-init id is the daemon's."""
    observed = Observed(U1, *A, uuid=U1, cloud_init_id=U1)
    assert with_key(observed, U1) is observed
    changed = with_key(observed, OWN_A)
    assert (changed.key, changed.uuid, changed.cloud_init_id) == (OWN_A, OWN_A, U1)
