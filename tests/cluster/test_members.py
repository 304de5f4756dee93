"""In a real cluster: each guestapi has the instances of its own member alone, whatever is done where, and who hangs."""

from __future__ import annotations

import signal

import pytest

from tests.cluster.side import Side, wait

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]


def owners(sides: list[Side], name: str, project: str = "default") -> list[str]:
    """Return the members whose guestapi has an instance."""
    return [side.member.name for side in sides if name in side.known(project)]


def test_changes_through_another_member(sides: list[Side]) -> None:
    """Configuration, a new name and removal reach the owner's guestapi alone, whichever member is asked."""
    first, second, _third = sides
    with second.launched("web", "-c", "user.foo=bar"):
        wait(lambda: owners(sides, "web") == ["n2"])
        first.member.client("config", "set", "web", "user.foo=baz")
        wait(lambda: second.value("web", "user.foo") == "baz")
        first.member.client("stop", "--force", "web")
        first.member.client("rename", "web", "shop")
        wait(lambda: owners(sides, "shop") == ["n2"] and owners(sides, "web") == [])
        first.member.client("delete", "shop")
        wait(lambda: owners(sides, "shop") == [])


def test_two_projects(sides: list[Side]) -> None:
    """Instances of one name in two projects, on two members, are two instances."""
    first, second, _third = sides
    first.member.client("project", "create", "other", "-c", "features.images=false", "-c", "features.profiles=false")
    try:
        with first.launched("same", "-c", "user.in=default"):
            second.member.client(
                "--project", "other", "launch", "busybox", "same", "--target", "n2", "-c", "user.in=other"
            )
            wait(lambda: owners(sides, "same") == ["n1"] and owners(sides, "same", "other") == ["n2"])
            assert first.value("same", "user.in") == "default"
            assert second.value("same", "user.in", "other") == "other"
            second.member.client("--project", "other", "delete", "--force", "same")
            wait(lambda: owners(sides, "same", "other") == [])
    finally:
        first.member.client("project", "delete", "other")


def test_an_instance_that_moves(sides: list[Side]) -> None:
    """An instance that moves is answered by one guestapi: that of the member on which it runs."""
    first, second, third = sides
    with second.launched("moving", "-c", "user.foo=bar"):
        wait(lambda: owners(sides, "moving") == ["n2"])
        first.member.client("stop", "--force", "moving")
        first.member.client("move", "moving", "--target", "n3")
        first.member.client("start", "moving")
        wait(lambda: owners(sides, "moving") == ["n3"] and third.known()["moving"]["pid"])


def test_a_member_that_hangs(sides: list[Side]) -> None:
    """While a member hangs, the others mirror changes and new instances, and find nothing wrong; it says so itself."""
    first, second, third = sides
    with first.launched("here", "-c", "user.foo=1"), third.launched("there"):
        wait(lambda: owners(sides, "here") == ["n1"] and owners(sides, "there") == ["n3"])
        first.member.client("config", "set", "there", "user.foo=1")
        third.member.send(signal.SIGSTOP)
        try:
            first.member.client("config", "set", "here", "user.foo=2")
            wait(lambda: first.value("here", "user.foo") == "2")
            with second.launched("new"):
                wait(lambda: second.known().get("new", {}).get("pid"))
            wait(third.fault)
            assert (first.fault(), second.fault()) == ("", "")
        finally:
            third.member.send(signal.SIGCONT)
        wait(lambda: not third.fault())
        third.member.client("config", "set", "there", "user.foo=3")
        wait(lambda: third.value("there", "user.foo") == "3")


def test_a_cable_that_is_pulled(sides: list[Side]) -> None:
    """Members that lose one of them go on; when it is back, it has what was changed meanwhile."""
    first, second, third = sides
    with first.launched("here", "-c", "user.foo=1"):
        wait(lambda: owners(sides, "here") == ["n1"])
        third.member.plug(connected=False)
        try:
            second.member.client("config", "set", "here", "user.foo=2")
            wait(lambda: first.value("here", "user.foo") == "2")
            assert first.fault() == ""
        finally:
            third.member.plug(connected=True)
        wait(lambda: not third.fault())
