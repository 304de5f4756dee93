"""`guestapi instance`: the contract that hooks and scripts use."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.containers import Container
from tests.store.processes import told

IDENTITY = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"


def test_add_all_that_can_be_said(guestapi: Guestapi, tmp_path: Path) -> None:
    """What add is told, show shows: every option, values with = , and line ends, values from files."""
    (tmp_path / "data").write_bytes("#cloud-config\r\né, =\n".encode())
    out = guestapi.good(
        *("instance", "add", "c1", "--project", "p", "--type", "virtual-machine", "--uuid", IDENTITY.upper()),
        *("--location", "n1", "--config", "user.a=b=c,d", "--config", f"user.user-data=@{tmp_path}/data"),
        *("--device", "eth0,type=nic,name=eth0,parent=br=0", "--device", "root,type=disk,path=/"),
    )
    assert out == ""
    assert guestapi.shown("c1", "p") == {
        "name": "c1",
        "project": "p",
        "type": "virtual-machine",
        "status": "stopped",
        "state": "Started",
        "pid": None,
        "uuid": IDENTITY,
        "cloud_init_id": IDENTITY,
        "location": "n1",
        "source": None,
        "key": None,
        "hostname": "c1",
        "config": {"user.a": "b=c,d", "user.user-data": "#cloud-config\r\né, =\n"},
        "devices": {
            "eth0": {"type": "nic", "name": "eth0", "parent": "br=0"},
            "root": {"type": "disk", "path": "/"},
        },
        "profiles": [],
    }


def test_add_with_defaults(guestapi: Guestapi) -> None:
    """A name is enough: a container of the default project with a UUID of its own."""
    guestapi.good("instance", "add", "c1")
    shown = guestapi.shown("c1")
    assert (shown["project"], shown["type"], shown["location"]) == ("default", "container", None)
    assert str(uuid.UUID(shown["uuid"])) == shown["uuid"]
    assert (shown["config"], shown["devices"]) == ({}, {})


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["c/2"], "c/2"),
        (["c2", "--project", "a b"], "a b"),
        (["c2", "--uuid", "7"], "'7'"),
        (["c2", "--location", ""], "location"),
        (["c2", "--config", f"{'k' * 1025}=x"], "kkk"),
        (["c2", "--config", "user.\n=x"], "user."),
        (["c2", "--config", "user.a=@/nowhere/file"], "/nowhere/file"),
        (["c2", "--config", "user.a=@/"], "/"),
        (["c2", "--device", "eth0,type="], "eth0"),
        (["c2", "--device", ",type=nic"], "device"),
        (["c1"], "c1"),
    ],
)
def test_add_refuses(c1: Guestapi, words: list[str], named: str) -> None:
    """What cannot be taken is one sentence that names it, exit 1, and adds nothing."""
    before = c1.state()
    assert named in c1.fails("instance", "add", *words)
    assert c1.state() == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "NAME"),
        (["c2", "c3"], "c3"),
        (["c2", "--type", "vm"], "vm"),
        (["c2", "--config", "user.a"], "user.a"),
        (["c2", "--config", "=x"], "=x"),
        (["c2", "--config", "user.a=1", "--config", "user.a=2"], "user.a"),
        (["c2", "--device", "eth0"], "type"),
        (["c2", "--device", "eth0,name=eth0"], "type"),
        (["c2", "--device", "eth0,type=nic,name"], "name"),
        (["c2", "--device", "eth0,type=nic,type=disk"], "type"),
        (["c2", "--device", "eth0,type=nic", "--device", "eth0,type=disk"], "eth0"),
        (["c2", "--colour", "red"], "--colour"),
    ],
)
def test_add_called_wrongly(c1: Guestapi, words: list[str], named: str) -> None:
    """Misuse is exit 2 with a hint of what was wrong, and adds nothing."""
    before = c1.state()
    assert named in c1.misuse("instance", "add", *words)
    assert c1.state() == before


def test_uuid_given_empty_is_no_uuid(c1: Guestapi) -> None:
    """A script whose variable is empty is told so; it does not get an instance with some other UUID."""
    assert "uuid" in c1.fails("instance", "add", "c2", "--uuid", "")
    assert len(c1.state()) == 1


def test_same_name_in_two_projects(guestapi: Guestapi) -> None:
    """Two projects may have an instance of the same name; each command is about the one of its project."""
    guestapi.good("instance", "add", "c1")
    guestapi.good("instance", "add", "c1", "--project", "p")
    guestapi.good("config", "set", "c1", "user.a=1", "--project", "p")
    guestapi.good("device", "add", "c1", "eth0", "nic", "--project", "p")
    assert guestapi.shown("c1")["config"] == guestapi.shown("c1")["devices"] == {}
    assert guestapi.good("config", "get", "c1", "user.a", "--project", "p") == "1\n"
    guestapi.good("instance", "remove", "c1")
    assert [(one["project"], one["name"]) for one in guestapi.state()] == [("p", "c1")]


def test_list(guestapi: Guestapi) -> None:
    """All instances by project and name, as a table or JSON; --project shows those of one alone."""
    for project, name in (("q", "c1"), ("p", "c2"), ("p", "c1")):
        guestapi.good("instance", "add", name, "--project", project)
    assert [(one["project"], one["name"]) for one in guestapi.state()] == [("p", "c1"), ("p", "c2"), ("q", "c1")]
    assert [one["name"] for one in guestapi("instance", "list", "--project", "q", "--format", "json").json] == ["c1"]
    rows = [line.split() for line in guestapi.good("instance", "list").splitlines() if "stopped" in line]
    assert [(row[1], row[3]) for row in rows] == [("p", "c1"), ("p", "c2"), ("q", "c1")]
    assert guestapi("instance", "list", "--project", "none", "--format", "json").json == []


def test_show_as_text(c1: Guestapi) -> None:
    """show prints properties, configuration and devices for people to read."""
    out = c1.good("instance", "show", "c1")
    for word in ("c1", "default", "stopped", "user.a", "eth0", "nic", "name=eth0"):
        assert word in out


@pytest.mark.parametrize(
    "words",
    [
        ["instance", "start", "c2", "--pid", "PID"],
        ["instance", "stop", "c2"],
        ["instance", "remove", "c2"],
        ["instance", "show", "c2"],
        ["instance", "remove", "c1", "--project", "p"],
        ["config", "set", "c2", "user.a=1"],
        ["config", "unset", "c2", "user.a"],
        ["config", "get", "c2", "user.a"],
        ["config", "show", "c2"],
        ["device", "add", "c2", "eth0", "nic"],
        ["device", "set", "c2", "eth0", "a=1"],
        ["device", "remove", "c2", "eth0"],
        ["device", "list", "c2"],
    ],
)
@pytest.mark.root
def test_unknown_instance(c1: Guestapi, words: list[str], request: pytest.FixtureRequest) -> None:
    """Every command about an instance that is not there says so, and what shows those that are."""
    if "PID" in words:
        words = [*words[:-1], str(request.getfixturevalue("container").pid)]
    sentence = c1.fails(*words)
    assert "guestapi instance list" in sentence
    assert words[2] in sentence
    assert [one["name"] for one in c1.state()] == ["c1"]


def test_stop_and_remove(c1: Guestapi) -> None:
    """Stopping what does not run is no error, removing what was removed is."""
    c1.good("instance", "stop", "c1")
    c1.good("instance", "remove", "c1")
    assert c1.state() == []
    assert "c1" in c1.fails("instance", "remove", "c1")


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    """A container that runs until the module's end."""
    with Container() as running:
        yield running


@pytest.mark.root
def test_start_over_a_living_init(c1: Guestapi) -> None:
    """An instance that runs is not taken for another container, unless that is said; one that ended is."""
    with Container() as second:
        with Container() as first:
            c1.good("instance", "start", "c1", "--pid", str(first.pid))
            before = c1.state()
            sentence = c1.fails("instance", "start", "c1", "--pid", str(second.pid))
            assert f"process {first.pid} is its init" in sentence
            assert "--replace" in sentence
            assert c1.state() == before
            c1.good("instance", "start", "c1", "--pid", str(second.pid), "--replace")
            assert c1.shown("c1")["pid"] == second.pid
            c1.good("instance", "start", "c1", "--pid", str(first.pid), "--replace")
        c1.good("instance", "start", "c1", "--pid", str(second.pid))
        assert c1.shown("c1")["pid"] == second.pid


def test_source_is_shown(c1: Guestapi) -> None:
    """list and show say which source an instance belongs to, and under which key; none: it was added by hand."""
    observe(c1, "lxc", Observed("/var/lib/lxc web", "default", "web", hostname="web.example.org"))
    columns, *rows = [line.split() for line in c1.good("instance", "list").splitlines() if " " in line.strip("┃│ ")]
    assert "SOURCE" in columns
    assert [row.count("lxc") for row in rows if "web" in row or "c1" in row] == [0, 1]
    assert [(one["name"], one["source"], one["key"], one["hostname"]) for one in c1.state()] == [
        ("c1", None, None, "c1"),
        ("web", "lxc", "/var/lib/lxc web", "web.example.org"),
    ]
    assert "/var/lib/lxc web" in c1.good("instance", "show", "web")


@pytest.mark.parametrize(
    "words",
    [
        ["config", "set", "m1", "user.a=2"],
        ["config", "unset", "m1", "user.a"],
        ["device", "add", "m1", "eth1", "nic"],
        ["device", "set", "m1", "eth0", "mtu=1"],
        ["device", "remove", "m1", "eth0"],
    ],
)
def test_instances_of_daemons_are_changed_there(c1: Guestapi, words: list[str]) -> None:
    """What a daemon configures is refused here, and the sentence says where to change it."""
    devices = {"eth0": {"type": "nic"}}
    observe(c1, "incus", Observed("1", "default", "m1", config={"user.a": "1"}, devices=devices))
    before = c1.state()
    assert c1.fails(*words) == "instance 'm1' is mirrored from incus; change it there"
    assert c1.state() == before


def observe(guestapi: Guestapi, source: str, *observations: Observed) -> None:
    """A source sees these."""
    with Writer(guestapi.settings, create=True).change() as change:
        assert reconcile(change, source, observations) == []


@pytest.mark.root
def test_start_and_stop(c1: Guestapi) -> None:
    """From start to stop an instance is running, and its PID is shown; one that ended without notice is dead."""
    with Container() as container:
        c1.good("instance", "start", "c1", "--pid", str(container.pid))
        assert (c1.shown("c1")["status"], c1.shown("c1")["pid"]) == ("running", container.pid)
        log = told(c1.settings)
        c1.good("instance", "start", "c1", "--pid", str(container.pid))
        assert told(c1.settings) == log
    assert c1.shown("c1")["status"] == "dead"
    assert "dead" in c1.good("instance", "list")
    c1.good("instance", "stop", "c1")
    assert (c1.shown("c1")["status"], c1.shown("c1")["pid"]) == ("stopped", None)


@pytest.mark.root
def test_process_of_another_instance(c1: Guestapi, container: Container) -> None:
    """A container cannot be two instances at once; the sentence names the other."""
    c1.good("instance", "start", "c1", "--pid", str(container.pid))
    c1.good("instance", "add", "c2")
    assert "'c1'" in c1.fails("instance", "start", "c2", "--pid", str(container.pid))
    assert c1.shown("c2")["status"] == "stopped"


def refused(guestapi: Guestapi, pid: int) -> str:
    """What start says of a PID; the instance does not run afterwards."""
    sentence = guestapi.fails("instance", "start", "c1", "--pid", str(pid))
    assert str(pid) in sentence
    assert guestapi.shown("c1")["status"] == "stopped"
    return sentence


def test_start_refuses_the_dead(c1: Guestapi) -> None:
    """A process that is gone, a zombie, and a number that no process can have are no instance's init."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert "ended" in refused(c1, process.pid)
    process.wait()
    assert "no process" in refused(c1, process.pid)
    assert "no process" in refused(c1, 2**22 + 1)
    assert "no process" in refused(c1, 2**70)


def test_start_refuses_the_host(c1: Guestapi) -> None:
    """A process in the host's PID namespace cannot be an instance: the whole host would be it."""
    for process in (os.getpid(), os.getppid()):
        assert "host's PID namespace" in refused(c1, process)


@pytest.mark.root
def test_start_refuses_who_is_not_init(c1: Guestapi, container: Container) -> None:
    """A process inside a container that is not its init would end before it does: refused."""
    enter = ["nsenter", "-t", str(container.pid), "-p", "-U", "--preserve-credentials"]
    with subprocess.Popen([*enter, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"up\n")
        process.stdin.flush()
        process.stdout.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert "number 1" in refused(c1, int(children[0]))


@pytest.mark.parametrize(
    "pid", [[], ["--pid", "0"], ["--pid", "-5"], ["--pid", "self"], ["--pid", ""], ["--pid", "1.5"]]
)
def test_start_without_a_pid(c1: Guestapi, pid: list[str]) -> None:
    """--pid is needed, and is a positive number."""
    assert "--pid" in c1.misuse("instance", "start", "c1", *pid)
