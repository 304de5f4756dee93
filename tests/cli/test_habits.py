"""Commands as operators of Incus and of containers type them: aliases, columns, filters, plain output."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.containers import Container
from tests.harness.service import COMMAND


@pytest.fixture
def fleet(guestapi: Guestapi) -> Guestapi:
    """The command with some instances in two projects."""
    for name, role in (("web1", "web"), ("web2", "web"), ("db", "db")):
        guestapi.good("instance", "add", name, "--config", f"user.role={role}")
    guestapi.good("instance", "add", "web1", "--project", "shop", "--type", "virtual-machine")
    return guestapi


def names(guestapi: Guestapi, *words: str) -> list[str]:
    """Return the names that `list` prints."""
    return guestapi.good("list", "-c", "n", "-f", "csv", *words).splitlines()[1:]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("list", "instance list"),
        ("ls", "instance list"),
        ("instance ls", "instance list"),
        ("info web1", "instance info web1"),
        ("config info web1", "config show web1"),
        ("device ls web1", "device list web1"),
        ("device info web1", "device show web1"),
        ("image ls", "image list"),
        ("profile ls", "profile list"),
        ("project ls", "project list"),
        ("list --project shop", "instance list --project shop"),
        ("--project shop list", "instance list --project shop"),
        ("instance --project shop list", "instance list --project shop"),
        ("--project shop instance show web1", "instance show web1 --project shop"),
        ("instance --project shop show web1", "instance show --project shop web1"),
        ("--project shop instance --project default show web1", "instance show web1"),
        ("-h", "--help"),
    ],
)
def test_aliases(fleet: Guestapi, short: str, long: str) -> None:
    """A command has aliases, and --project may stand anywhere; the last one counts."""
    assert fleet.good(*short.split()) == fleet.good(*long.split())


@pytest.mark.parametrize("words", ["rm db web2", "delete db web2", "instance rm db web2", "instance delete db web2"])
def test_remove_several(fleet: Guestapi, words: str) -> None:
    """Several instances are removed in one transaction; if one cannot be removed, none is."""
    assert "'none'" in fleet.fails(*words.split(), "none")
    assert names(fleet) == ["db", "web1", "web2", "web1"]
    assert fleet.good(*words.split(), "db") == ""
    assert names(fleet) == ["web1", "web1"]


@pytest.mark.root
def test_remove_running_instances(fleet: Guestapi) -> None:
    """A running instance is removed only with --force; `start` and `stop` are aliases of register and unregister."""
    with Container() as container:
        fleet.good("instance", "register", "db", "--pid", str(container.pid))
        sentence = fleet.fails("instance", "remove", "web1", "db")
        assert f"process {container.pid} is its init" in sentence
        assert "--force" in sentence
        fleet.good("instance", "unregister", "db")
        fleet.good("instance", "start", "db", "--pid", str(container.pid))
        fleet.good("instance", "remove", "db", "--force")
    assert names(fleet) == ["web1", "web2", "web1"]
    fleet.good("instance", "stop", "web1")


def test_rename(fleet: Guestapi) -> None:
    """A rename changes only the name; a container of a source must be renamed at the source."""
    before = fleet.shown("db")
    fleet.good("instance", "rename", "db", "sql")
    assert fleet.shown("sql") == {**before, "name": "sql", "hostname": "sql"}
    assert "exists already" in fleet.fails("rename", "sql", "web1")
    with Writer(fleet.settings).change() as change:
        assert reconcile(change, "lxc", [Observed("k", "default", "box")]) == []
    assert "rename the container there" in fleet.fails("instance", "rename", "box", "other")


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (["web"], ["web1", "web2", "web1"]),
        (["web", "user.role=web"], ["web1", "web2"]),
        (["*2"], ["web2"]),
        (["user.role=db"], ["db"]),
        (["user.role=*"], ["db", "web1", "web2", "web1"]),
        (["status=stopped", "type=virtual-machine"], ["web1"]),
        (["STATUS=STOPPED".lower(), "project=shop"], ["web1"]),
        (["name=web?", "project=default"], ["web1", "web2"]),
        (["status=running"], []),
        (["user.none=x"], []),
    ],
)
def test_filters(fleet: Guestapi, filters: list[str], found: list[str]) -> None:
    """An instance must match all filters: prefixes and patterns of names, properties, and keys of the configuration."""
    assert names(fleet, *filters) == found


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["status=runing"], "running"),
        (["statsu=running"], "status"),
        (["type=vm"], "virtual-machine"),
        (["-c", "nx"], "n (name)"),
        (["-c", ","], "ent"),
        (["-c", "name,statsu"], "status"),
        (["-f", "xml"], "yaml"),
    ],
)
def test_invalid_arguments_of_list(fleet: Guestapi, words: list[str], named: str) -> None:
    """An unknown filter, column or format is refused, and the error names the valid ones."""
    assert named in fleet.misuse("list", *words)


def test_formats(fleet: Guestapi) -> None:
    """Each format has the same rows, with the requested columns."""
    columns = "name,status,user.role"
    rows = [["db", "stopped", "db"], ["web1", "stopped", "web"], ["web2", "stopped", "web"]]
    printed = fleet.good("list", "--project", "default", "-c", columns, "-f", "csv")
    assert list(csv.reader(io.StringIO(printed))) == [["NAME", "STATUS", "user.role"], *rows]
    for form in ("table", "compact"):
        printed = fleet.good("list", "--project", "default", "-c", columns, "-f", form)
        assert [line.split() for line in printed.splitlines()[1:]] == rows
    found = json.loads(fleet.good("list", "-f", "json"))
    as_yaml = yaml.safe_load(fleet.good("list", "-f", "yaml"))
    assert as_yaml == found
    assert {one["name"] for one in found} == {"db", "web1", "web2"}
    assert fleet.good("list", "-c", "nst", "db").splitlines() == ["NAME  STATUS   TYPE", "db    stopped  container"]


def on_terminal(guestapi: Guestapi, *words: str, **environment: str) -> str:
    """Return the output of the installed program on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    base = {"TERM": "xterm", "COLUMNS": "80", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(
        [COMMAND, "--config", guestapi.config, *words],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**base, **environment},
    ) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:
            pass  # EIO: the other side is closed.
        os.close(ours)
        assert process.wait(20) == 0
    return written.decode().replace("\r\n", "\n")


LIST_IN_80_COLUMNS = """\
┏━━━━━━━━━┳━━━━━━┳━━━━━━━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━┳━━━━━┳━━━━━━━━┓
┃ PROJECT ┃ NAME ┃ TYPE            ┃ STATUS  ┃ READY ┃ PID ┃ SOURCE ┃
┡━━━━━━━━━╇━━━━━━╇━━━━━━━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━╇━━━━━╇━━━━━━━━┩
│ default │ db   │ container       │ stopped │       │     │        │
│ default │ web1 │ container       │ stopped │       │     │        │
│ default │ web2 │ container       │ stopped │       │     │        │
│ shop    │ web1 │ virtual-machine │ stopped │       │     │        │
└─────────┴──────┴─────────────────┴─────────┴───────┴─────┴────────┘
"""


def test_list_in_80_columns(fleet: Guestapi) -> None:
    """On a terminal, a table has lines; with NO_COLOR it has no escape sequence."""
    assert on_terminal(fleet, "list", NO_COLOR="1") == LIST_IN_80_COLUMNS


def test_long_values_are_wrapped_on_a_terminal(fleet: Guestapi) -> None:
    """A value that is wider than the terminal is wrapped; --truncate shortens it."""
    value = "".join(chr(ord("a") + number % 26) for number in range(150))
    fleet.good("config", "set", "db", f"user.long={value}")
    written = on_terminal(fleet, "config", "show", "db", NO_COLOR="1")
    cells = [line.split("│")[2].strip() for line in written.splitlines() if "│" in line]
    assert "".join(cells[: cells.index("db")]) == value
    short = on_terminal(fleet, "config", "show", "db", "--truncate", NO_COLOR="1")
    assert value[:60] in short.replace("│", "").replace("\n", "")
    assert "(150 bytes)" in fleet.good("config", "show", "db", "--truncate")
    assert value in fleet.good("config", "show", "db")


def test_values_in_pipes(c1: Guestapi) -> None:
    """`config get` writes the value unchanged, including escape sequences."""
    value = "\x1b[31mred\x1b[0m\r\n\t\x7f\u0085 é\U0001f600 "
    with Writer(c1.settings).change() as change:
        steps.configure(change, get_instance(change, "default", "c1"), {"user.x": value})
    done = subprocess.run([COMMAND, "--config", c1.config, "config", "get", "c1", "user.x"], capture_output=True)
    assert done.stdout == value.encode() + b"\n"


def test_device_verbs(c1: Guestapi) -> None:
    """get, show and unset of devices, and `set KEY VALUE`."""
    c1.good("device", "set", "c1", "eth0", "mtu", "1400")
    assert c1.good("device", "get", "c1", "eth0", "mtu") == "1400\n"
    assert yaml.safe_load(c1.good("device", "show", "c1", "eth0")) == {"mtu": "1400", "name": "eth0", "type": "nic"}
    assert yaml.safe_load(c1.good("device", "show", "c1"))["eth0"]["type"] == "nic"
    assert c1("device", "show", "c1", "eth0", "-f", "json").json["mtu"] == "1400"
    c1.good("device", "unset", "c1", "eth0", "mtu", "hwaddr")
    assert "is not set" in c1.fails("device", "get", "c1", "eth0", "mtu")
    assert "no device 'eth1'" in c1.fails("device", "get", "c1", "eth1", "mtu")
    assert "no device 'eth1'" in c1.fails("device", "show", "c1", "eth1")


def test_projects(fleet: Guestapi) -> None:
    """Projects are listed with the number of their instances; `default` always exists."""
    assert fleet.good("project", "list").splitlines() == ["PROJECT  INSTANCES", "default  3", "shop     1"]
    assert fleet("project", "list", "-f", "json").json == [
        {"name": "default", "instances": 3},
        {"name": "shop", "instances": 1},
    ]


@pytest.mark.root
def test_wait(fleet: Guestapi) -> None:
    """wait returns when all instances have the requested state, and fails after the timeout."""
    assert fleet.fails("instance", "wait", "db", "web1", "--running", "--timeout", "0").startswith(
        "db, web1: not running"
    )
    fleet.good("instance", "wait", "db", "web1", "--stopped")
    with Container() as container:
        starting = threading.Timer(0, fleet.program, ("instance", "register", "db", "--pid", str(container.pid)))
        starting.start()
        fleet.good("instance", "wait", "db", "--running")
        starting.join()
        assert "not ready within 0 s" in fleet.fails("instance", "wait", "db", "--ready", "--timeout", "0")
        with Writer(fleet.settings).change() as change:
            found = get_instance(change, "default", "db")
            assert steps.set_ready(change, found.id, found.run, True)
        fleet.good("instance", "wait", "db", "--ready")
    # Its init has ended without notice.
    fleet.good("instance", "wait", "db", "--stopped")


def test_loops_keep_their_input(fleet: Guestapi, tmp_path: Path) -> None:
    """No command in a `while read` loop consumes the loop's input, from a file or a pipe."""
    commands = {
        "config get": '{0} config get "$n" user.role',
        "config set": '{0} config set "$n" user.x 1',
        "instance show": '{0} instance show "$n" >/dev/null',
        "instance add": '{0} instance add "new$n"',
        "device add": '{0} device add "$n" eth1 nic',
    }
    (tmp_path / "names").write_text("db\nweb1\nweb2\n")
    for command in commands.values():
        for script in (
            "while read n; do {} || exit; echo; done <{}/names",
            "cat {1}/names | while read n; do {0} || exit; echo; done",
        ):
            called = command.format(f"{COMMAND} --config {fleet.config}")
            done = subprocess.run(["sh", "-c", script.format(called, tmp_path)], capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), called
            assert done.stdout.count("\n\n") + done.stdout.startswith("\n") >= 3 or done.stdout.count("\n") == 3
            for name in ("db", "web1", "web2"):
                fleet("instance", "remove", f"new{name}")
                fleet("device", "remove", name, "eth1")
