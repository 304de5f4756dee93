"""`guestapi instance`: the interface for hooks and scripts."""

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
from tests.store.processes import log_entries

IDENTITY = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"


def test_add_with_all_options(guestapi: Guestapi, tmp_path: Path) -> None:
    """show has everything that was given to add: all options, values with = and line ends, and values from files."""
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
    """A name suffices: a container of the default project with a UUID of its own."""
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
    """A refusal is one sentence that names its subject, with exit code 1, and adds nothing."""
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
    """Wrong usage exits with 2, names the fault, and adds nothing."""
    before = c1.state()
    assert named in c1.misuse("instance", "add", *words)
    assert c1.state() == before


def test_empty_uuid_is_refused(c1: Guestapi) -> None:
    """An empty --uuid, as from an unset variable of a script, is refused, not replaced by a new UUID."""
    assert "uuid" in c1.fails("instance", "add", "c2", "--uuid", "")
    assert len(c1.state()) == 1


def test_same_name_in_two_projects(guestapi: Guestapi) -> None:
    """Two projects may have instances of the same name; each command applies to its project."""
    guestapi.good("instance", "add", "c1")
    guestapi.good("instance", "add", "c1", "--project", "p")
    guestapi.good("config", "set", "c1", "user.a=1", "--project", "p")
    guestapi.good("device", "add", "c1", "eth0", "nic", "--project", "p")
    assert guestapi.shown("c1")["config"] == guestapi.shown("c1")["devices"] == {}
    assert guestapi.good("config", "get", "c1", "user.a", "--project", "p") == "1\n"
    guestapi.good("instance", "remove", "c1")
    assert [(one["project"], one["name"]) for one in guestapi.state()] == [("p", "c1")]


def test_list(guestapi: Guestapi) -> None:
    """Instances are listed by project and name, as a table or JSON; --project limits them to one."""
    for project, name in (("q", "c1"), ("p", "c2"), ("p", "c1")):
        guestapi.good("instance", "add", name, "--project", project)
    assert [(one["project"], one["name"]) for one in guestapi.state()] == [("p", "c1"), ("p", "c2"), ("q", "c1")]
    assert [one["name"] for one in guestapi("instance", "list", "--project", "q", "--format", "json").json] == ["c1"]
    rows = [line.split() for line in guestapi.good("instance", "list").splitlines() if "stopped" in line]
    assert [(row[0], row[1]) for row in rows] == [("p", "c1"), ("p", "c2"), ("q", "c1")]
    assert "guestapi project list" in guestapi.fails("instance", "list", "--project", "none", "--format", "json")


@pytest.mark.parametrize("words", [["info", "c1"], ["show", "c1", "--format", "table"]])
def test_show_as_text(c1: Guestapi, words: list[str]) -> None:
    """info prints properties, configuration and devices as text."""
    out = c1.good("instance", *words)
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
    """Every command on an unknown instance names it, and the command that lists instances."""
    if "PID" in words:
        words = [*words[:-1], str(request.getfixturevalue("container").pid)]
    sentence = c1.fails(*words)
    assert "guestapi instance list" in sentence
    assert words[2] in sentence
    assert [one["name"] for one in c1.state()] == ["c1"]


def test_stop_and_remove(c1: Guestapi) -> None:
    """Stopping a stopped instance is no error; removing a removed one is."""
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
def test_start_with_another_living_init(c1: Guestapi) -> None:
    """A running instance is not started with another container's init without --replace; one that has ended is."""
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
    """list and show have an instance's source and key; without a source it was added by hand."""
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
def test_mirrored_instance_cannot_be_changed(c1: Guestapi, words: list[str]) -> None:
    """The configuration of a daemon's instance cannot be changed here; the error names the daemon."""
    devices = {"eth0": {"type": "nic"}}
    observe(c1, "incus", Observed("1", "default", "m1", config={"user.a": "1"}, devices=devices))
    before = c1.state()
    assert c1.fails(*words) == "instance 'm1' is mirrored from incus; change it there"
    assert c1.state() == before


def observe(guestapi: Guestapi, source: str, *observations: Observed) -> None:
    """Write observations of a source."""
    with Writer(guestapi.settings, create=True).change() as change:
        assert reconcile(change, source, observations) == []


@pytest.mark.root
def test_start_and_stop(c1: Guestapi) -> None:
    """A started instance is running with its PID; if its init ends without a stop, it is dead."""
    with Container() as container:
        c1.good("instance", "start", "c1", "--pid", str(container.pid))
        assert (c1.shown("c1")["status"], c1.shown("c1")["pid"]) == ("running", container.pid)
        log = log_entries(c1.settings)
        c1.good("instance", "start", "c1", "--pid", str(container.pid))
        assert log_entries(c1.settings) == log
    assert c1.shown("c1")["status"] == "dead"
    assert "dead" in c1.good("instance", "list")
    c1.good("instance", "stop", "c1")
    assert (c1.shown("c1")["status"], c1.shown("c1")["pid"]) == ("stopped", None)


@pytest.mark.root
def test_process_of_another_instance(c1: Guestapi, container: Container) -> None:
    """A container cannot be two instances; the error names the other one."""
    c1.good("instance", "start", "c1", "--pid", str(container.pid))
    c1.good("instance", "add", "c2")
    assert "'c1'" in c1.fails("instance", "start", "c2", "--pid", str(container.pid))
    assert c1.shown("c2")["status"] == "stopped"


def refused(guestapi: Guestapi, pid: int) -> str:
    """Return the error of a start with this PID; the instance must not run afterwards."""
    sentence = guestapi.fails("instance", "start", "c1", "--pid", str(pid))
    assert str(pid) in sentence
    assert guestapi.shown("c1")["status"] == "stopped"
    return sentence


def test_start_refuses_the_dead(c1: Guestapi) -> None:
    """A process that has ended, a zombie, and an impossible PID are refused."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert "ended" in refused(c1, process.pid)
    process.wait()
    assert "no process" in refused(c1, process.pid)
    assert "no process" in refused(c1, 2**22 + 1)
    assert "no process" in refused(c1, 2**70)


def test_start_refuses_the_host(c1: Guestapi) -> None:
    """A process in the host's PID namespace is refused: the instance would be the whole host."""
    for process in (os.getpid(), os.getppid()):
        assert "host's PID namespace" in refused(c1, process)


@pytest.mark.root
def test_start_refuses_other_processes(c1: Guestapi, container: Container) -> None:
    """A container's process other than its init is refused, because it may end earlier."""
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
    """--pid is required, and must be a positive number."""
    assert "--pid" in c1.misuse("instance", "start", "c1", *pid)
