"""The expected effect of key policies in the isolation proof, written independently of the code."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from guestapi.model import KeyPolicy

TOKEN_KEY = "user.token"
#: The user inside whom policies let read the token.
READER = 1000
#: What a policy can say in the walk.
KINDS = {
    "hidden": KeyPolicy("", hidden=True),
    "secret": KeyPolicy("", secret=True),
    "once": KeyPolicy("", once=True),
    "uids": KeyPolicy("", uids=frozenset({READER})),
}
PATTERNS = ["user.token", "user.*"]


@dataclass(frozen=True)
class Rule:
    """What holds for a key."""

    hidden: bool
    blank: bool
    once: bool
    readers: frozenset[int]


def rule_for(key: str, *policies: dict[str, KeyPolicy]) -> Rule:
    """Return what holds for a key, by policies of a project and of an instance, each by pattern."""
    held = [
        policy
        for each in policies
        for pattern, policy in each.items()
        if pattern == key or (pattern == "user.*" and key.startswith("user."))
    ]
    return Rule(
        hidden=any(one.hidden for one in held),
        blank=any(one.secret or one.once for one in held),
        once=any(one.once for one in held),
        readers=frozenset(uid for one in held for uid in one.uids),
    )


@dataclass
class Token:
    """The values that one instance's token has had, and who may be told of which.

    Attributes:
        value: the value now.
        all: all values.
        untold: values that no event may have.
        unlogged: values that no event of a client that resumes from now on may have.
        given: values that were given while they were to be given once.
        fresh: values that were set while they were to be given once.
        perhaps_spent: somebody may have got the value since it was set, while it was to be given once.
    """

    value: bytes = b""
    all: set[bytes] = field(default_factory=set)
    untold: set[bytes] = field(default_factory=set)
    unlogged: set[bytes] = field(default_factory=set)
    given: set[bytes] = field(default_factory=set)
    fresh: set[bytes] = field(default_factory=set)
    perhaps_spent: bool = False

    def set(self, value: str, rule: Rule) -> None:
        """Note a value that was set while this rule held."""
        if value.encode() == self.value:
            return
        self.value = value.encode()
        self.all.add(self.value)
        self.perhaps_spent = False
        if rule.blank or rule.hidden:
            self.untold.add(self.value)
        if rule.once:
            self.fresh.add(self.value)

    def conceal(self, rule: Rule) -> None:
        """Note that a policy has come, after which this rule holds."""
        if rule.blank:
            self.unlogged |= self.all

    def reveal(self, rule: Rule) -> None:
        """Note that a policy has gone, after which this rule holds."""
        if not (rule.blank or rule.hidden):
            # It can be read, and is the old value of the next event.
            self.untold.discard(self.value)
        if not rule.once:
            self.fresh.clear()

    def forbidden(self, rule: Rule) -> AbstractSet[bytes]:
        """Return the values that a client that resumes now may not hear of."""
        return self.unlogged | self.untold | (self.all if rule.hidden else set())

    def give(self, value: bytes) -> bool:
        """Note that somebody got a value; return whether it was one to be given once."""
        if value not in self.fresh:
            return False
        assert value not in self.given, "a value was given twice"
        self.given.add(value)
        return True
