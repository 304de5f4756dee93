"""Patterns of key policies, and what holds where several match."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.key_policy import NO_RULE, blanked, matches, rule_of, visible
from guestapi.model import Instance, KeyPolicy
from tests.api.fakes import instance

NAMES = st.text("ab.*", max_size=12)


@given(NAMES, NAMES)
def test_pattern_is_a_glob(pattern: str, key: str) -> None:
    """A pattern matches what a regular expression with `.*` in the place of each `*` matches."""
    expected = re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), key, re.DOTALL)
    assert matches(pattern, key) == bool(expected)


@pytest.mark.parametrize(
    ("pattern", "key", "expected"),
    [
        ("user.token", "user.token", True),
        ("user.token", "user.token2", False),
        ("user.*", "user.", True),
        ("*", "user.x", True),
        ("user.*.key", "user.key", False),
        ("a*a", "a", False),
        ("a*b*b*c", "abc", False),
        ("a*b*b*c", "abbc", True),
        ("user.[ab]", "user.a", False),
        ("user.?", "user.a", False),
    ],
)
def test_examples(pattern: str, key: str, expected: bool) -> None:
    """Only `*` is special, and it overlaps with nothing."""
    assert matches(pattern, key) is expected


def test_hostile_pair_takes_few_steps() -> None:
    """A pattern with many stars and a long key that almost matches end at once."""
    assert not matches("*a" * 400 + "*b", "a" * 1024)
    assert not matches("*", "a" * 1025)


def test_all_that_match_hold() -> None:
    """Of several policies that match a key, each one holds."""
    policies = (
        KeyPolicy("user.*", uids=frozenset({1})),
        KeyPolicy("user.t*", secret=True, uids=frozenset({2})),
        KeyPolicy("other", hidden=True),
    )
    assert rule_of(policies, "user.token") == (False, True, False, frozenset({1, 2}))
    assert rule_of(policies, "cloud-init.x") == NO_RULE


def test_what_is_hidden_is_a_guests_key() -> None:
    """`*` hides all that a guest reads, and none of the host's own keys, which decide about it."""
    found = instance({"user.a": "1", "cloud-init.b": "2", "security.guestapi": "true", "volatile.eth0.hwaddr": "x"})
    hidden = _with(found, KeyPolicy("*", hidden=True))
    assert set(visible(hidden).config) == {"security.guestapi", "volatile.eth0.hwaddr"}
    assert visible(found) is found
    assert blanked(_with(found, KeyPolicy("user.*", secret=True)), found.config)["user.a"] == ""


def _with(found: Instance, *policies: KeyPolicy) -> Instance:
    return replace(found, policies=policies)
