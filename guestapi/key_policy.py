"""What key policies say of a configuration key. Pure.

A pattern is the name of a key, in which each ``*`` stands for any characters. Of several policies that match a key, all
hold: a key is hidden, secret or given once if one of them says so, and readable by the users of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from guestapi.model import Instance, KeyPolicy

#: The longest key that a pattern is compared with, in characters: none that is set is longer.
_LONGEST = 1024
#: What the keys begin with that policies hide from a guest: no switch of the host's is one of them.
_GUEST_PREFIXES = ("cloud-init.", "user.")


class KeyRule(NamedTuple):
    """What holds for one key; attributes as of `KeyPolicy`."""

    hidden: bool = False
    secret: bool = False
    once: bool = False
    uids: frozenset[int] = frozenset()

    @property
    def blank(self) -> bool:
        """Whether its values are left out of events, the change log and what the operator is shown."""
        return self.secret or self.once


NO_RULE = KeyRule()


def rule_of(policies: Iterable[KeyPolicy], key: str) -> KeyRule:
    """Return what holds for a key."""
    found = [one for one in policies if matches(one.pattern, key)]
    if not found:
        return NO_RULE
    return KeyRule(
        any(one.hidden for one in found),
        any(one.secret for one in found),
        any(one.once for one in found),
        frozenset().union(*(one.uids for one in found)),
    )


def matches(pattern: str, key: str) -> bool:
    """Tell whether a pattern matches a key, in a number of steps that grows with the length of both alone."""
    if len(key) > _LONGEST:
        return False
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == key
    *middle, last = rest
    if not key.startswith(first) or not key.endswith(last):
        return False
    position, end = len(first), len(key) - len(last)
    for piece in middle:
        position = key.find(piece, position, end)
        if position < 0:
            return False
        position += len(piece)
    return position <= end


def visible(instance: Instance) -> Instance:
    """Return an instance without the keys that are in none of its guest's lists: hidden ones, and those given once."""
    if not instance.policies:
        return instance
    hidden = {
        key
        for key in (*instance.config, *instance.large)
        if key.startswith(_GUEST_PREFIXES) and _is_unlisted(instance, key)
    }
    if not hidden:
        return instance
    config = {key: value for key, value in instance.config.items() if key not in hidden}
    return replace(instance, config=config, large=instance.large - hidden)


def blanked(instance: Instance, config: Mapping[str, str]) -> dict[str, str]:
    """Return configuration with the empty string in the place of each value that is not shown."""
    return {key: "" if rule_of(instance.policies, key).blank else value for key, value in config.items()}


def _is_unlisted(instance: Instance, key: str) -> bool:
    rule = rule_of(instance.policies, key)
    return rule.hidden or rule.once
