"""`guestapi policy`: add, remove, list, and to whom values were given."""

from __future__ import annotations

from typing import Any

from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi


def listed(guestapi: Guestapi) -> list[dict[str, Any]]:
    """All policies, with what they say alone."""
    return [
        {key: value for key, value in one.items() if value}
        for one in guestapi("policy", "list", "--format", "json").json
    ]


def test_add_list_remove(c1: Guestapi) -> None:
    """What is added is listed with its scope; the same pattern again takes its place; what is removed is gone."""
    c1.good("policy", "add", "user.*", "--hidden")
    c1.good("policy", "add", "user.*", "--instance", "c1", "--uid", "5", "--uid", "3", "--secret", "--once")
    whole = {"project": "default", "pattern": "user.*", "hidden": True}
    single = {"project": "default", "instance": "c1", "pattern": "user.*", "uids": [3, 5], "secret": True, "once": True}
    assert listed(c1) == [whole, single]
    assert "secret, once, uid 3, uid 5" in c1.good("policy", "list")
    c1.good("policy", "add", "user.*", "--secret")
    assert listed(c1)[0] == {"project": "default", "pattern": "user.*", "secret": True}
    c1.good("policy", "remove", "user.*")
    c1.good("policy", "remove", "user.*", "--instance", "c1")
    assert listed(c1) == []


def test_misuse(c1: Guestapi) -> None:
    """A policy that says nothing, one of an unknown instance, and one that is not there are refused."""
    assert "at least one of" in c1.misuse("policy", "add", "user.*")
    assert "no instance 'c2'" in c1.fails("policy", "add", "user.*", "--instance", "c2", "--hidden")
    assert "no policy has the pattern 'user.*'" in c1.fails("policy", "remove", "user.*")
    c1.misuse("policy", "add", "user.*", "--uid", "-1")


def test_instance_that_is_removed_takes_its_policies_along(c1: Guestapi) -> None:
    """Policies of an instance end with it; those of its project stay."""
    c1.good("policy", "add", "a", "--hidden")
    c1.good("policy", "add", "b", "--instance", "c1", "--hidden")
    c1.good("instance", "remove", "c1")
    assert [one["pattern"] for one in listed(c1)] == ["a"]


def test_secret_is_not_shown(c1: Guestapi) -> None:
    """`config show` and `instance info` have the empty string for it, unless they are to reveal it."""
    c1.good("policy", "add", "user.a", "--secret")
    assert c1.shown("c1")["config"] == {"user.a": "", "user.b": "2"}
    assert c1("config", "show", "c1", "--format", "json").json == {"user.a": "", "user.b": "2"}
    assert c1("config", "show", "c1", "--reveal", "--format", "json").json == {"user.a": "1", "user.b": "2"}
    assert c1("instance", "info", "c1", "--reveal", "--format", "json").json["config"]["user.a"] == "1"
    assert c1.good("config", "get", "c1", "user.a") == "1\n"


def test_spent(c1: Guestapi) -> None:
    """It is shown to whom a value was given, and whether it was set anew since."""
    c1.good("policy", "add", "user.a", "--once")
    assert c1("policy", "spent", "--format", "json").json == []
    with view(c1.settings.store.url) as store:
        found = get_instance(store, "default", "c1")
    assert Writer(c1.settings).spend(found, "user.a", 4242, 1000) == "1"
    (spent,) = c1("policy", "spent", "--format", "json").json
    expected = {"project": "default", "instance": "c1", "key": "user.a", "pid": 4242, "uid": 1000, "set_anew": False}
    assert {key: value for key, value in spent.items() if key != "time"} == expected
    assert "4242" in c1.good("policy", "spent")
    assert "is not set" in c1.fails("config", "get", "c1", "user.a")
    c1.good("config", "set", "c1", "user.a=1")
    assert c1("policy", "spent", "--format", "json").json[0]["set_anew"] is True


def test_allow_and_disallow(c1: Guestapi) -> None:
    """What is allowed is listed behind the policies with its scope; twice is once; what was not allowed is an error."""
    c1.good("policy", "add", "user.*", "--hidden")
    for _ in range(2):
        c1.good("policy", "allow", "attributes")
    c1.good("policy", "allow", "attributes", "--instance", "c1")
    assert listed(c1)[1:] == [
        {"project": "default", "allow": "attributes"},
        {"project": "default", "instance": "c1", "allow": "attributes"},
    ]
    assert "allow attributes" in c1.good("policy", "list")
    c1.good("policy", "disallow", "attributes")
    assert "not allowed to project 'default'" in c1.fails("policy", "disallow", "attributes")
    c1.good("policy", "disallow", "attributes", "--instance", "c1")
    assert "not allowed to instance 'c1'" in c1.fails("policy", "disallow", "attributes", "--instance", "c1")
    assert [one["pattern"] for one in listed(c1)] == ["user.*"]
    assert "no instance 'c2'" in c1.fails("policy", "allow", "attributes", "--instance", "c2")
    assert "'attributes'" in c1.misuse("policy", "allow", "all")
