"""A member of a cluster beside members that hang: its own instances are mirrored, others are not asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from guestapi.mirror import report
from guestapi.mirror.cluster import Members
from guestapi.mirror.daemon import DaemonClient
from guestapi.mirror.daemon_model import DaemonEvent, Environment, Server, SlowError
from guestapi.mirror.report import Report
from guestapi.store.lookup import list_instances, list_sources
from guestapi.store.view import Views, view
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.waiting import until
from tests.mirror.stub import TRUSTED, Stub

CLUSTER = Server(environment=Environment(server_name="n1", server_clustered=True))
#: The command, with less time for questions about one instance.
HASTY = """
from guestapi.mirror import daemon
daemon.ONE_SECONDS = 0.3
from guestapi.entry import main
main()
"""


def instance(name: str, location: str, **config: str) -> dict[str, Any]:
    """Return a stopped instance as the daemon describes it; ``user_a`` means ``user.a``."""
    expanded = {key.replace("_", "."): value for key, value in config.items()}
    named = {"name": name, "type": "container", "status": "Stopped"}
    return {**named, "location": location, "expanded_config": expanded}


def member(hang: Callable[[], object], *instances: dict[str, Any], hung: tuple[str, ...] = ()) -> dict[str, object]:
    """Return the answers of member n1: names at once, instances that it has, and nothing of members that hang."""
    names = [*(one["name"] for one in instances), *hung]
    clustered = {**TRUSTED, "environment": {"server": "stub", "server_name": "n1", "server_clustered": True}}
    return {
        "/1.0": clustered,
        "/1.0/instances?all-projects=true": [f"/1.0/instances/{name}" for name in names],
        # Any list that needs the other members.
        "/1.0/instances": hang,
        "/1.0/operations": hang,
        **{f"/1.0/instances/{one['name']}": one for one in instances},
        **{f"/1.0/instances/{name}": hang for name in hung},
    }


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    """A daemon."""
    with Stub(tmp_path / "daemon", {}) as running:
        yield running


@pytest.fixture
def client(stub: Stub, tmp_path: Path) -> Iterator[DaemonClient]:
    """A client of it, with little time for questions about one instance."""
    with patch("guestapi.mirror.daemon.ONE_SECONDS", 0.2):
        yield DaemonClient(str(tmp_path / "daemon"))


def find(members: Members, *known: str) -> tuple[list[str], set[str], set[str]]:
    """Return the names of what was found, of what cannot be read, and of what was not told."""
    found = members.find(CLUSTER, {("default", name) for name in known}, lambda: None)
    assert all(isinstance(error, SlowError) for error in found.untold.values())
    return (
        sorted(one.name for one in found.instances),
        {name for _project, name in found.unreadable},
        {name for _project, name in found.untold},
    )


def of(stub: Stub, name: str) -> int:
    """Return how often an instance was asked for."""
    return sum(path.startswith(f"/1.0/instances/{name}?") for path in stub.asked)


def test_own_instances_are_found(stub: Stub, client: DaemonClient) -> None:
    """Of all names, those that are not known to be elsewhere are asked for; those that are elsewhere, once."""
    stub.answers |= member(stub.over.wait, instance("own", "n1"), instance("theirs", "n2"), hung=("lost",))
    members = Members(client)
    assert find(members) == (["own"], set(), set())
    assert find(members) == (["own"], set(), set())
    assert [of(stub, name) for name in ("own", "theirs", "lost")] == [2, 1, 1]


def test_an_own_instance_that_hangs_is_named(stub: Stub, client: DaemonClient) -> None:
    """An instance that the store has, and of which nothing is told, is reported and not taken to be gone."""
    stub.answers |= member(stub.over.wait, instance("own", "n1"), hung=("known",))
    assert find(Members(client), "known") == (["own"], set(), {"known"})


def test_malformed_descriptions(stub: Stub, client: DaemonClient) -> None:
    """A description that cannot be read concerns this member only if the instance is known."""
    stub.answers |= member(
        stub.over.wait, instance("own", "n1"), {"name": "odd", "type": 7}, {"name": "far", "type": 7}
    )
    assert find(Members(client), "odd") == (["own"], {"odd"}, set())


def test_an_instance_that_moves_here_is_found(stub: Stub, client: DaemonClient) -> None:
    """An event of this member makes an instance asked for that was elsewhere."""
    stub.answers |= member(stub.over.wait, instance("moving", "n2"))
    members = Members(client)
    assert find(members) == ([], set(), set())
    stub.answers["/1.0/instances/moving"] = instance("moving", "n1")
    assert members.concerns(event("instance-started", "moving", "n1"), CLUSTER, ())
    assert find(members) == (["moving"], set(), set())


def event(action: str, name: str, location: str, kind: str = "instances") -> DaemonEvent:
    """Return a lifecycle event of a member."""
    text = json.dumps({"type": "lifecycle", "location": location, "metadata": {}})
    found = DaemonEvent("lifecycle", location=json.loads(text)["location"])
    metadata = json.dumps({"action": action, "source": f"/1.0/{kind}/{name}", "context": {"old_name": "before"}})
    found.metadata = type(found.metadata)(metadata.encode())
    return found


@pytest.mark.parametrize(
    ("one", "known", "expected"),
    [
        (event("instance-updated", "c1", "n1"), (), True),
        (event("instance-updated", "c1", "none"), (), True),
        (event("instance-updated", "c1", ""), (), True),
        (event("instance-updated", "c1", "n2"), (), False),
        (event("instance-updated", "c1", "n2"), (("default", "c1"),), True),
        (event("instance-renamed", "c1", "n2"), (("default", "before"),), True),
        (event("profile-updated", "p", "n2", "profiles"), (), True),
        (event("cluster-member-updated", "n3", "n2", "cluster"), (), True),
        (DaemonEvent("lifecycle", location="n2"), (), True),
    ],
)
def test_events_of_other_members(
    client: DaemonClient, one: DaemonEvent, known: tuple[tuple[str, str], ...], expected: bool
) -> None:
    """Another member's event concerns this one if it is about an instance that was here, or about many."""
    assert Members(client).concerns(one, CLUSTER, known) is expected
    assert Members(client).concerns(one, Server(), known), "not a cluster"


@contextmanager
def mirrored(guestapi: Guestapi, answers: Callable[[Callable[[], object]], Mapping[str, object]]) -> Iterator[Stub]:
    """Run a mirror of a daemon with these answers."""
    path = guestapi.directory / "daemon"
    with Stub(path, {}) as stub:
        stub.answers |= answers(stub.over.wait)
        words = [
            sys.executable,
            "-c",
            HASTY,
            "--config",
            str(guestapi.config),
            "mirror",
            "incus",
            "--socket",
            str(path),
        ]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                yield stub
            finally:
                process.kill()
                assert process.stderr is not None
                said = process.stderr.read().decode()
    # Nothing is wrong with what is this member's.
    assert "ERROR" not in said
    assert "lost" not in said


def names(guestapi: Guestapi) -> dict[str, dict[str, str]]:
    """Return the configurations of the store's instances, by name."""
    with view(guestapi.settings.store.url) as store:
        return {one.name: dict(one.config) for one in list_instances(store)}


def wait(what: Callable[[], object]) -> None:
    """Poll until a condition holds."""
    until(what, "the expected state")


def test_a_mirror_beside_members_that_hang(tmp_path: Path) -> None:
    """Own instances are mirrored, changed, added and removed while other members hang; check finds nothing wrong."""
    guestapi = Guestapi(tmp_path)
    Writer(guestapi.settings, create=True)

    def answers(hang: Callable[[], object]) -> dict[str, object]:
        return member(hang, instance("own", "n1", user_a="1"), hung=("far", "lost"))

    with mirrored(guestapi, answers) as stub:
        wait(lambda: names(guestapi) == {"own": {"user.a": "1"}})
        asked = of(stub, "far")
        stub.announce("instance-updated", "/1.0/instances/far", "n3")
        stub.answers["/1.0/instances/own"] = instance("own", "n1", user_a="2")
        stub.announce("instance-updated", "/1.0/instances/own", "n1")
        wait(lambda: names(guestapi) == {"own": {"user.a": "2"}})
        stub.answers["/1.0/instances/new"] = instance("new", "n1")
        stub.announce("instance-created", "/1.0/instances/new", "n1")
        wait(lambda: names(guestapi).keys() == {"own", "new"})
        # One moves away, as its new member tells.
        stub.answers["/1.0/instances/own"] = instance("own", "n2")
        stub.announce("instance-started", "/1.0/instances/own", "n2")
        wait(lambda: names(guestapi).keys() == {"new"})
        assert of(stub, "far") == asked
        (found,) = (
            one for one in json.loads(guestapi("check", "--format", "json").out) if one["check"] == "mirror incus"
        )
        assert found["ok"], found


def test_a_look_that_stalls_is_written_down(tmp_path: Path) -> None:
    """While the daemon does not answer, the store says so, until it has answered."""
    guestapi = Guestapi(tmp_path)
    writer = Writer(guestapi.settings, create=True)

    def fault() -> str:
        with view(guestapi.settings.store.url) as store:
            return "".join(one.fault for one in list_sources(store))

    class WatchEndedError(Exception):
        """Ends the watch."""

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 2:
            raise WatchEndedError

    reporting = Report(writer, Views(guestapi.settings.store.url), "incus", "/socket", lambda _text: None, list)
    with patch.object(report, "_STALLED_SECONDS", -1.0), patch("guestapi.mirror.report.time.sleep", sleep):
        reporting.progress.renew()
        with pytest.raises(WatchEndedError):
            reporting.watch()
    assert fault() == "the daemon does not answer, so changes are not known"
    # A question is given up after that and the next look at the watch: within ten seconds in all.
    assert report._STALLED_SECONDS + report._WATCH_SECONDS < 10
    reporting.note()
    assert fault() == ""


def test_a_hang_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is lost right after an answer belongs to the hang before it; what is lost later is logged anew."""
    guestapi = Guestapi(tmp_path)
    writer = Writer(guestapi.settings, create=True)
    reporting = Report(writer, Views(guestapi.settings.store.url), "incus", "/socket", lambda _text: None, list)

    def lose(why: str) -> list[str]:
        reporting.warn(why)
        reporting.note(lost=why)
        return [record.getMessage().partition(";")[0] for record in caplog.records]

    assert lose("it hangs") == ["it hangs"]
    assert lose("it still hangs") == ["it hangs"]
    with patch.object(report, "_SETTLED_SECONDS", 3600.0):
        reporting.note()
        assert lose("its stream has ended") == ["it hangs"]
        reporting.note()
    with patch.object(report, "_SETTLED_SECONDS", -1.0):
        assert lose("it hangs again") == ["it hangs", "it hangs again"]
