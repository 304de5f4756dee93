"""In a real cluster: each guestapi has the instances of its own member alone, whatever is done where, and who hangs."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.cluster.side import Side, wait
from tests.harness.mirroring import OURS

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]


def owners(sides: list[Side], name: str, project: str = "default") -> list[str]:
    """Return the members whose guestapi has an instance."""
    return [side.member.name for side in sides if name in side.known(project)]


def give_sockets(sides: list[Side], asked: Side, name: str) -> None:
    """Give an instance the sockets of all guestapis: the members of the tests share /run."""
    for side in sides:
        asked.member.client("config", "device", "add", name, f"guestapi-{side.member.name}", "disk", *side.device)


def answers(sides: list[Side], at: Side, name: str, path: str) -> dict[str, tuple[int, str]]:
    """Ask all guestapis at once from an instance on a member; return status and body, by the guestapi's member."""

    def ask(side: Side) -> tuple[int, str]:
        answer = at.member.ask(name, path, side.socket)
        return answer.status, answer.text.strip()

    with ThreadPoolExecutor() as threads:
        return dict(zip((side.member.name for side in sides), threads.map(ask, sides), strict=True))


#: Seconds in which the others go on while a member hangs. A mirror gives a question that waits for that member up after
#: five; the daemon itself would wait for thirty and more.
HANG_SECONDS = 20.0

#: What a guestapi answers to an instance of another member.
STRANGER = (500, "pid not in container?")


def leading(sides: list[Side]) -> Side:
    """Return the member that leads the database."""
    members = sides[0].member.query("/1.0/cluster/members?recursion=1")
    (leader,) = (one["server_name"] for one in members if "database-leader" in one["roles"])
    return next(side for side in sides if side.member.name == leader)


def is_ready(side: Side, name: str) -> str | None:
    """Return the readiness of an instance as the daemon of a member has it."""
    ready: str | None = side.member.query(f"/1.0/instances/{name}")["config"].get("volatile.last_state.ready")
    return ready


def test_nobody_answers_for_anothers_instance(sides: list[Side]) -> None:
    """Each instance is answered with its own data by its member's guestapi, and by no other one, also after a move."""
    first, second, third = sides
    with ExitStack() as stack:
        for side in sides:
            name = f"own-{side.member.name}"
            stack.enter_context(side.launched(name, "-c", f"user.secret={name}"))
            give_sockets(sides, side, name)
        for side in sides:
            name = f"own-{side.member.name}"
            wait(lambda name=name, side=side: owners(sides, name) == [side.member.name])  # type: ignore[misc]  # at once
            expected = {one.member.name: (200, name) if one is side else STRANGER for one in sides}
            assert answers(sides, side, name, "/1.0/config/user.secret") == expected
        second.member.client("stop", "--force", "own-n2")
        first.member.client("move", "own-n2", "--target", "n3")
        first.member.client("start", "own-n2")
        wait(lambda: owners(sides, "own-n2") == ["n3"] and third.known()["own-n2"]["pid"])
        expected = {"n1": STRANGER, "n2": STRANGER, "n3": (200, "own-n2")}
        assert answers(sides, third, "own-n2", "/1.0/config/user.secret") == expected


def test_images(sides: list[Side]) -> None:
    """An image that one member is told to publish is exported by each guestapi, byte for byte, until it is not."""
    first = sides[0]
    fingerprint = first.member.query("/1.0/images/aliases/busybox")["target"]
    path = f"/1.0/images/{fingerprint}/export"
    get = "curl -s -w '%{{http_code}}\\n' -o /tmp/image --unix-socket {} http://x{}; sha256sum </tmp/image"

    def exported(side: Side) -> list[str]:
        return side.member.run(f"image-{side.member.name}", "sh", "-c", get.format(side.socket, path)).split()[:2]

    with ExitStack() as stack:
        for side in sides:
            name = f"image-{side.member.name}"
            stack.enter_context(side.launched(name, "-c", "security.guestapi.images=true"))
            give_sockets([side], side, name)
            wait(lambda side=side: exported(side)[0] == "404")  # type: ignore[misc]  # at once
        first.member.query(f"/1.0/images/{fingerprint}", "PATCH", {"public": True})
        for side in sides:
            wait(lambda side=side: exported(side) == ["200", fingerprint])  # type: ignore[misc]  # at once
        first.member.query(f"/1.0/images/{fingerprint}", "PATCH", {"public": False})
        for side in sides:
            wait(lambda side=side: exported(side)[0] == "404")  # type: ignore[misc]  # at once


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
    """While a member hangs, the others mirror changes and new instances, and find nothing wrong; it says so itself.

    What their instances report reaches their daemons. The others' journals say nothing about its instances, and its own
    has one sentence.
    """
    first, second, third = sides
    with first.launched("here", "-c", "user.foo=1"), third.launched("far-off"):
        wait(lambda: owners(sides, "here") == ["n1"] and owners(sides, "far-off") == ["n3"])
        first.member.client("config", "set", "far-off", "user.foo=1")
        wait(lambda: third.value("far-off", "user.foo") == "1")
        give_sockets([first], first, "here")
        wait(lambda: first.known()["here"]["pid"])
        logged = [len(side.service.log.read_text()) for side in sides]
        third.member.send(signal.SIGSTOP)
        try:
            first.member.client("config", "set", "here", "user.foo=2")
            wait(lambda: first.value("here", "user.foo") == "2", HANG_SECONDS)
            with second.launched("new"):
                wait(lambda: second.known().get("new", {}).get("pid"), HANG_SECONDS)
            for state, ready in (("Ready", "true"), ("Started", "false")):
                answer = first.member.ask("here", "/1.0", first.socket, method="PATCH", body=f'{{"state":"{state}"}}')
                assert answer.status == 200, answer
                wait(lambda ready=ready: is_ready(first, "here") == ready, HANG_SECONDS)  # type: ignore[misc]  # at once
            wait(third.fault)
            assert (first.fault(), second.fault()) == ("", "")
        finally:
            third.member.send(signal.SIGCONT)
        wait(lambda: not third.fault())
        third.member.client("config", "set", "far-off", "user.foo=3")
        wait(lambda: third.value("far-off", "user.foo") == "3")
        said = [side.service.log.read_text()[length:] for side, length in zip(sides, logged, strict=True)]
        losses = [[line for line in text.splitlines() if "last known answers" in line] for text in said]
        assert [len(lines) for lines in losses] == [0, 0, 1], losses
        assert [text.count("far-off") for text in said] == [0, 0, 0]


def test_a_cable_that_is_pulled(sides: list[Side]) -> None:
    """Members that lose one of them go on; when it is back, it has what was changed meanwhile."""
    first, second, third = sides
    with first.launched("here", "-c", "user.foo=1"):
        wait(lambda: owners(sides, "here") == ["n1"])
        third.member.plug(connected=False)
        try:
            second.member.client("config", "set", "here", "user.foo=2")
            wait(lambda: first.value("here", "user.foo") == "2", HANG_SECONDS)
            assert first.fault() == ""
        finally:
            third.member.plug(connected=True)
        wait(lambda: not third.fault())


def test_readiness_on_each(sides: list[Side]) -> None:
    """What an instance reports to the guestapi of its member is written to the daemon, on each member."""
    for side in sides:
        name = f"ready-{side.member.name}"
        with side.launched(name):
            device = [f"source={side.service.sockets['incus'].parent}", "path=/dev/guestapi"]
            side.member.client("config", "device", "add", name, "guestapi", "disk", *device)
            wait(lambda side=side, name=name: side.known().get(name, {}).get("pid"))  # type: ignore[misc]  # bound at once
            answer = side.member.ask(name, "/1.0", OURS, method="PATCH", body='{"state":"Ready"}')
            assert answer.status == 200, answer
            wait(lambda side=side, name=name: is_ready(side, name) == "true")  # type: ignore[misc]  # bound at once


def test_evacuation(sides: list[Side]) -> None:
    """Instances of a member that is evacuated are answered elsewhere, and by the member again when it is restored."""
    first, _second, third = sides
    with third.launched("guest", "-c", "user.foo=bar"):
        wait(lambda: owners(sides, "guest") == ["n3"])
        first.member.client("cluster", "evacuate", "n3", "--force", "--action", "migrate")
        try:
            wait(lambda: len(found := owners(sides, "guest")) == 1 and found != ["n3"])
        finally:
            first.member.client("cluster", "restore", "n3", "--force")
        wait(lambda: owners(sides, "guest") == ["n3"])


def test_evacuation_of_instances_with_the_device(sides: list[Side]) -> None:
    """As docs/incus.md says: instances with the device are stopped, and with the remedy they go on elsewhere."""
    first, _second, third = sides
    first.member.client("profile", "create", "with-device")
    try:
        first.member.client("profile", "device", "add", "with-device", "guestapi", "disk", *third.device)
        with third.launched("guest", "--profile", "default", "--profile", "with-device"):
            wait(lambda: owners(sides, "guest") == ["n3"])
            for remedy, status in ((False, "Stopped"), (True, "Running")):
                if remedy:
                    first.member.client("profile", "set", "with-device", "cluster.evacuate=migrate")
                first.member.client("cluster", "evacuate", "n3", "--force")
                try:
                    found = first.member.query("/1.0/instances/guest")
                    assert (found["status"], found["location"] == "n3") == (status, not remedy)
                    wait(lambda found=found: owners(sides, "guest") == [found["location"]])  # type: ignore[misc]  # at once
                finally:
                    first.member.client("cluster", "restore", "n3", "--force")
                wait(lambda: owners(sides, "guest") == ["n3"] and third.known()["guest"]["pid"])
    finally:
        first.member.client("profile", "delete", "with-device")


@pytest.mark.parametrize(
    ("leads", "ending"),
    [(False, signal.SIGTERM), (False, signal.SIGKILL), (True, signal.SIGKILL)],
    ids=["stopped", "killed", "leader-killed"],
)
def test_a_member_that_ends(sides: list[Side], leads: bool, ending: signal.Signals) -> None:
    """The others go on without a member, also without the database's leader; when it is back, it catches up."""
    leader = leading(sides)
    lost = leader if leads else next(side for side in reversed(sides) if side is not leader)
    other = next(side for side in sides if side is not lost)
    with lost.launched("there", "-c", "user.foo=1"), other.launched("here", "-c", "user.foo=1"):
        wait(lambda: owners(sides, "here") == [other.member.name] and owners(sides, "there") == [lost.member.name])
        lost.member.kill(ending)
        try:
            wait(lost.fault)
            other.member.client("config", "set", "here", "user.foo=2")
            wait(lambda: other.value("here", "user.foo") == "2")
            assert other.fault() == ""
            # What it knew last stays answered.
            assert lost.value("there", "user.foo") == "1"
        finally:
            lost.member.start()
        wait(lambda: not lost.fault())
        lost.member.client("config", "set", "there", "user.foo=3")
        wait(lambda: lost.value("there", "user.foo") == "3")
