"""`guestapi profile`: profiles are created, assigned to instances, changed and deleted."""

from __future__ import annotations

import json

import pytest

from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.store.processes import log_entries


def test_life_of_a_profile(c1: Guestapi) -> None:
    """An instance has the keys and devices of its profiles as long as they are assigned."""
    c1.good("profile", "create", "web", "user.role=web", "user.a=profile", "--description", "Front ends")
    c1.good("profile", "device", "add", "web", "gpu", "gpu", "pci=0000:01:00.0")
    c1.good("profile", "add", "c1", "web")
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2", "user.role": "web"}
    assert c1.shown("c1")["devices"].keys() == {"eth0", "gpu"}
    assert c1.shown("c1")["profiles"] == ["web"]
    c1.good("profile", "set", "web", "user.role=db", "user.c=3")
    assert c1.good("profile", "get", "web", "user.c") == "3\n"
    c1.good("profile", "unset", "web", "user.c")
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2", "user.role": "db"}
    (listed,) = c1("profile", "list", "--format", "json").json
    assert (listed["name"], listed["description"], listed["users"]) == ("web", "Front ends", 1)
    assert c1("profile", "show", "web", "--format", "json").json["used_by"] == [{"project": "default", "name": "c1"}]
    assert "instance 'c1' has it" in c1.fails("profile", "delete", "web")
    c1.good("profile", "rename", "web", "front")
    assert c1.shown("c1")["profiles"] == ["front"]
    c1.good("profile", "remove", "c1", "front")
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2"}
    c1.good("profile", "delete", "front")
    assert c1("profile", "list", "--format", "json").json == []


def test_devices_of_a_profile(c1: Guestapi) -> None:
    """Devices of a profile are added, changed, listed and removed; a missing one is an error that names it."""
    c1.good("profile", "create", "p")
    c1.good("profile", "assign", "c1", "p")
    c1.good("profile", "device", "add", "p", "d", "disk", "path=/srv", "source=/data", "size=")
    c1.good("profile", "device", "set", "p", "d", "path=/x", "readonly=true")
    c1.good("profile", "device", "unset", "p", "d", "source")
    assert c1("profile", "device", "list", "p", "--format", "json").json == {
        "d": {"type": "disk", "path": "/x", "readonly": "true"}
    }
    assert c1.good("profile", "device", "get", "p", "d", "path") == "/x\n"
    assert c1.shown("c1")["devices"]["d"]["path"] == "/x"
    c1.good("device", "set", "c1", "d", "path=/mine")
    assert c1.shown("c1")["devices"]["d"] == {"type": "disk", "path": "/mine", "readonly": "true"}
    c1.good("device", "remove", "c1", "d")
    assert "comes from profile p" in c1.fails("device", "remove", "c1", "d")
    assert "has no device 'x'" in c1.fails("profile", "device", "remove", "p", "x")
    assert "has a device 'd' already" in c1.fails("profile", "device", "add", "p", "d", "disk")
    c1.good("profile", "device", "remove", "p", "d")
    assert c1.shown("c1")["devices"].keys() == {"eth0"}


def test_assign_replaces_all(c1: Guestapi) -> None:
    """assign sets exactly the named profiles, the last of which takes precedence; without a name, none."""
    for name in ("p", "q"):
        c1.good("profile", "create", name, f"user.by={name}")
    c1.good("profile", "assign", "c1", "p,q")
    assert c1.shown("c1")["config"]["user.by"] == "q"
    c1.good("profile", "assign", "c1", "q,p")
    assert c1.shown("c1")["config"]["user.by"] == "p"
    assert "twice" in c1.fails("profile", "add", "c1", "q")
    assert "no profile 'none'" in c1.fails("profile", "assign", "c1", "p,none")
    c1.good("profile", "assign", "c1")
    assert c1.shown("c1")["profiles"] == []
    assert "does not have profile p" in c1.fails("profile", "remove", "c1", "p")


def test_default_profile_always_exists(c1: Guestapi) -> None:
    """The profile ``default`` can be shown, changed and assigned at any time, and never deleted."""
    assert c1("profile", "show", "default", "--format", "json").json["config"] == {}
    c1.good("profile", "assign", "c1", "default")
    c1.good("profile", "set", "default", "user.by=default")
    assert c1.shown("c1")["config"]["user.by"] == "default"
    assert "cannot be removed" in c1.fails("profile", "delete", "default")
    # Another project has its own profile of that name.
    c1.good("profile", "set", "default", "user.by=shop", "--project", "shop")
    assert c1.shown("c1")["config"]["user.by"] == "default"
    assert "no profile 'x' in project 'shop'" in c1.fails("profile", "show", "x", "--project", "shop")


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_edit_accepts_the_output_of_show(c1: Guestapi, form: str) -> None:
    """edit accepts the output of show unchanged; a changed definition is one change with its events."""
    c1.good(
        "profile",
        "create",
        "p",
        "user.a=1",
        "user.text=first\nsecond",
        "user.odd=\x00\x1b\u2028 ",
        "--description",
        "What é is",
    )
    c1.good("profile", "assign", "c1", "p")
    shown = c1.good("profile", "show", "p", "--format", form)
    before = len(log_entries(c1.settings))
    c1.good("profile", "edit", "p", stdin=shown)
    assert len(log_entries(c1.settings)) == before
    assert c1.good("profile", "show", "p", "--format", form) == shown
    document = c1("profile", "show", "p", "--format", "json").json
    document["config"] = {"user.new": "1"}
    document["devices"] = {"gpu": {"type": "gpu"}}
    c1.good("profile", "edit", "p", stdin=json.dumps(document))
    kinds = [kind for kind, _metadata, _guest in log_entries(c1.settings)[before:]]
    # user.a stays, as the instance's own key.
    assert kinds == ["config", "config", "config", "device"]
    assert c1("profile", "show", "p", "--format", "json").json["config"] == {"user.new": "1"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is empty"),
        ("[", "did not find expected"),
        ("[]", "a list"),
        ("word", "text"),
        ("config: {}\n---\nconfig: {}\n", "there are 2, not one"),
        ("unknown: {}", "'unknown' is nothing that a profile has"),
        ("config: [a]", "config is a mapping, not a list"),
        ("config: {a: {}}", "'a' is text, not a mapping"),
        ("devices: {d: a}", "device d is a mapping, not text"),
        ("description: {}", "description is text, not a mapping"),
        ("devices: {d: {path: /}}", "a type is needed"),
        ("config: {a: 1, a: 2}", "twice"),
        ("[" * 100_000, "deep"),
        ('{"config": {"a": "1", "a": "2"}}', "twice"),
        ('{"config": {"a": {}}}', "'a' is text, not a mapping"),
    ],
)
def test_edit_refuses_what_it_cannot_use(c1: Guestapi, text: str, sentence: str) -> None:
    """What is not a definition of a profile is refused with a sentence, and changes nothing."""
    c1.good("profile", "create", "p", "user.a=1")
    assert sentence in c1.fails("profile", "edit", "p", stdin=text)
    assert c1("profile", "show", "p", "--format", "json").json["config"] == {"user.a": "1"}


def test_add_with_profiles(c1: Guestapi) -> None:
    """add gives a new instance profiles, the last one the strongest; they replace those of a definition."""
    for name in ("p", "q"):
        c1.good("profile", "create", name, f"user.by={name}")
    c1.good("instance", "add", "both", "-p", "p", "--profile", "q")
    assert c1.shown("both")["profiles"] == ["p", "q"]
    assert c1.shown("both")["config"] == {"user.by": "q"}
    c1.good("instance", "add", "other", "--profile", "p", stdin=c1.good("instance", "show", "both"))
    assert c1.shown("other")["profiles"] == ["p"]
    c1.good("instance", "add", "copy", stdin=c1.good("instance", "show", "both"))
    assert c1.shown("copy")["profiles"] == ["p", "q"]
    assert "twice" in c1.fails("instance", "add", "no", "-p", "p", "-p", "p")


def test_list_of_an_unknown_project(c1: Guestapi) -> None:
    """A project without instances and profiles is unknown; one with a profile alone is not."""
    assert "no project 'shop'" in c1.fails("profile", "list", "--project", "shop")
    c1.good("profile", "create", "p", "--project", "shop")
    assert "shop" in c1.good("profile", "list", "--project", "shop")


def test_origin_names_the_profile(c1: Guestapi) -> None:
    """--origin shows the profile of a key and a device; unset names it, too."""
    c1.good("profile", "create", "p", "user.p=1", "user.a=p")
    c1.good("profile", "device", "add", "p", "gpu", "gpu")
    c1.good("profile", "add", "c1", "p")
    shown = c1("config", "show", "c1", "--origin", "--format", "json").json
    assert {key: one["origin"] for key, one in shown.items()} == {
        "user.a": "operator",
        "user.b": "operator",
        "user.p": "profile p",
    }
    devices = c1("device", "list", "c1", "--origin", "--format", "json").json
    assert {name: one["origin"] for name, one in devices.items()} == {"eth0": "operator", "gpu": "profile p"}
    done = c1("config", "unset", "c1", "user.a")
    assert (done.code, done.err) == (0, "c1 still has user.a from profile p\n")


def test_mirrored_instance_can_have_profiles(guestapi: Guestapi) -> None:
    """A daemon's instance, which is configured at the daemon, can have profiles of guestapi."""
    with Writer(guestapi.settings, create=True).change() as change:
        observed = Observed("1", "default", "m1", config={"user.a": "daemon"}, devices={})
        assert reconcile(change, "incus", [observed]) == []
    guestapi.good("profile", "create", "p", "user.a=p", "user.b=p")
    assert "change it there" in guestapi.fails("config", "set", "m1", "user.b=1")
    guestapi.good("profile", "assign", "m1", "p")
    assert guestapi.shown("m1")["config"] == {"user.a": "daemon", "user.b": "p"}


def test_check_reports_hooks_template(c1: Guestapi) -> None:
    """check reports that hooks.template has become a profile."""
    with c1.config.open("a") as file:
        file.write('[hooks.template]\n"user.a" = "1"\n')
    out = c1("check", "--settings").out
    assert "ok   hooks.template: is not read any more once a follower has taken it over" in out
