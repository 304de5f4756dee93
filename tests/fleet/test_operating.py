"""`guestapi --fleet`: commands that change and show instances of the fleet, from any host."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from typing import Any
from uuid import uuid4

import pytest

from guestapi.fleet import checks, engine, plan, statements
from tests.cli.test_common import STYLE, on_terminal
from tests.fleet.conftest import Fleet
from tests.fleet.host import FollowingHost, observe
from tests.fleet.operator import FleetOperator

pytestmark = pytest.mark.root


@pytest.fixture
def operator(fleet: Fleet) -> FleetOperator:
    """An operator of a fleet with hosts h1 and h2, whose instances are web1 and web2."""
    return FleetOperator(fleet)


def test_an_instance(operator: FleetOperator) -> None:
    """An instance is added, configured, shown, renamed and removed, as one of this host would be."""
    operator.good("instance", "add", "web", "--host", "h1", "-c", "user.role=front\0end".replace("\0", "-"))
    before = operator.info("web")
    assert (before["host"], before["epoch"], before["status"]) == ("h1", 1, "unknown")
    assert before["config"] == {"user.role": "front-end"}
    operator.good("config", "set", "web", "user.role=x", "user.a=1")
    operator.good("config", "unset", "web", "user.a")
    operator.good("device", "add", "web", "eth0", "nic", "name=eth0")
    operator.good("device", "set", "web", "eth0", "mtu=9000")
    after = operator.info("web")
    assert after["config"] == {"user.role": "x"}
    assert after["devices"] == {"eth0": {"type": "nic", "name": "eth0", "mtu": "9000"}}
    assert after["uuid"] == before["uuid"]
    assert after["cloud_init_id"] != before["cloud_init_id"], "another NIC"
    assert operator.good("config", "get", "web", "user.role") == "x\n"
    assert json.loads(operator.good("config", "show", "web", "--format", "json")) == {"user.role": "x"}
    assert "mtu" in operator.good("device", "list", "web")
    operator.good("device", "remove", "web", "eth0")
    operator.good("rename", "web", "db")
    assert operator.info("db")["uuid"] == before["uuid"]
    operator.good("instance", "remove", "db")
    assert operator.fails("instance", "info", "db").startswith("no instance 'db'")


def test_many_instances(operator: FleetOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of many instances is written in parts, in one transaction, and raises a host's revision once."""
    monkeypatch.setattr(plan, "_PART", 3)
    monkeypatch.setattr(statements, "_BATCH_SIZE", 100)
    before = operator.revisions()

    def apply(config: dict[str, str], devices: dict[str, Any]) -> None:
        documents = [
            {"name": f"i{number}", "location": f"h{number % 2 + 1}", "config": config, "devices": devices}
            for number in range(7)
        ]
        operator.good("apply", "-f", "-", stdin=json.dumps(documents))
        for number in range(7):
            shown = operator.info(f"i{number}")
            assert (shown["host"], shown["config"], shown["devices"]) == (f"h{number % 2 + 1}", config, devices)

    apply({"user.a": "1", "user.b": "\0x"}, {"eth0": {"type": "nic"}, "eth1": {"type": "nic", "mtu": "9000"}})
    apply({"user.b": "2", "user.c": "3"}, {"eth1": {"type": "nic"}, "eth2": {"type": "nic"}})
    assert operator.revisions() == {host: number + 2 for host, number in before.items()}


def test_a_long_change_keeps_no_host_waiting(operator: FleetOperator) -> None:
    """While an operator's change has locked a host, that host goes on reporting, also of what is new."""
    host = FollowingHost(operator.fleet, "h1")
    operator.fleet.place("h1", "web")
    host.follow()
    observe(host, "web", "lxc:web")
    with operator.fleet.admin() as connection, connection.transaction():
        plan.lock_hosts(connection, ["h1", "h2"])
        host.follow()
        with operator.fleet.admin() as other:
            assert other.execute("SELECT host, running FROM guestapi.said").fetchall() == [("h1", True)]


def test_progress_of_apply(operator: FleetOperator) -> None:
    """On a terminal, a large apply shows how far reading, applying and writing have got."""
    text = "".join(f"---\nname: i{number}\nlocation: h1\n" for number in range(20))
    file = operator.local.directory / "definitions.yaml"
    file.write_text(text)
    shown = on_terminal(operator.local, [["--fleet", "apply", "-f", str(file)]])
    for part, count in (("reading", "1/1"), ("applying", "20/20"), ("writing", "20/20")):
        assert re.search(rf"{part} .*{count}", STYLE.sub("", shown)), shown


def test_mistakes(operator: FleetOperator) -> None:
    """What cannot be is refused with the sentences of this host's commands, and nothing is changed."""
    before = operator.revisions()
    assert operator.fails("config", "set", "web9", "user.a=1").startswith("no instance 'web9'")
    assert operator.fails("config", "set", "web1", "user.\x01=1").startswith("configuration key")
    assert operator.fails("instance", "add", "web1", "--host", "h1").endswith(
        "exists already in project 'default'; 'guestapi --fleet apply' changes one that exists"
    )
    assert operator.fails("instance", "add", "new") == "it is not said on which host 'new' is to be; --host says it"
    assert operator.fails("instance", "add", "new", "--host", "h9").startswith("there is no host 'h9'")
    assert operator.fails("instance", "add", "n", "--host", "h1", "-p", "none").startswith("no profile 'none'")
    assert operator.fails("instance", "add", "web", "--host", "h1", "--uuid", operator.info("web1")["uuid"]).startswith(
        "another instance has that name or UUID already"
    )
    operator.local.good("fleet", "host", "list")
    for words in (("instance", "unregister", "web1"), ("image", "list"), ("policy", "list")):
        assert operator.fails(*words) == "this command is not about instances of a fleet; leave --fleet out"
    assert operator.local.misuse("config", "set", "web1", "user.a=1", "--wait").startswith("--wait is for a fleet")
    misuse = operator.local.misuse("--fleet", "config", "set", "web1", "user.a=1", "--timeout", "1")
    assert misuse == "--timeout says nothing without --wait"
    assert "knows no pid" in operator.local.misuse("--fleet", "list", "-c", "np")
    assert operator.revisions() == before


def test_fenced_hosts_get_nothing(operator: FleetOperator) -> None:
    """Nothing is placed on a host that is fenced; what it has can be changed."""
    with operator.fleet.admin() as connection:
        connection.execute("UPDATE guestapi.hosts SET state = 'fenced' WHERE name = 'h1'")
    assert operator.fails("instance", "add", "new", "--host", "h1").startswith("host 'h1' is fenced")
    operator.good("config", "set", "web1", "user.a=1")


def test_lists(operator: FleetOperator) -> None:
    """Instances are listed of all hosts or one, with what their hosts say of them, and by filters."""
    with operator.fleet.host("h1") as connection:
        uuid = operator.info("web1")["uuid"]
        connection.execute("SELECT guestapi.report(%s, 1, 1, 1, true, true)", (uuid,))
    rows = [line.split() for line in operator.good("list").splitlines()]
    assert rows[0] == ["PROJECT", "NAME", "TYPE", "STATUS", "READY", "LOCATION"]
    assert [row[1] for row in rows[1:]] == ["web1", "web2"]
    assert [row[3] for row in rows[1:]] == ["running", "unknown"]
    assert operator.good("list", "--host", "h2", "-f", "csv", "-c", "n") == "NAME\nweb2\n"
    assert operator.good("list", "user.password=secret", "status=running", "-f", "csv", "-c", "n") == "NAME\nweb1\n"
    assert operator.good("list", "--project", "default", "--host", "h2", "-f", "csv", "-c", "n") == "NAME\nweb2\n"
    assert operator.fails("list", "--host", "h9") == "there is no host 'h9'; 'guestapi fleet host list' shows all"
    error = operator.fails("list", "--project", "none")
    assert error == "no project 'none'; 'guestapi --fleet project list' shows all"
    assert operator.info("web1")["state"] == "Ready"
    assert operator.fails("instance", "remove", "web1").startswith("instance 'web1' runs on its host; --force")
    operator.good("instance", "remove", "web1", "--force")


def test_projects(operator: FleetOperator) -> None:
    """The projects of the fleet are listed, with the number of instances on all hosts."""
    for name, host in (("a", "h1"), ("b", "h2")):
        operator.good("instance", "add", name, "--project", "p", "--host", host)
    assert json.loads(operator.good("project", "list", "--format", "json")) == [
        {"name": "default", "instances": 2},
        {"name": "p", "instances": 2},
    ]
    assert operator.good("list", "--project", "p", "-f", "csv", "-c", "n") == "NAME\na\nb\n"


def test_waiting_for_instances(operator: FleetOperator) -> None:
    """It is waited until hosts say that instances run, are ready or are stopped; what was not said is not known."""
    uuid = operator.info("web1")["uuid"]
    with operator.fleet.host("h1") as connection:
        for number, running, ready, met in (
            (1, True, False, ["running"]),
            (2, True, True, ["running", "ready"]),
            (3, False, False, ["stopped"]),
        ):
            connection.execute("SELECT guestapi.report(%s, 1, %s, 1, %s, %s)", (uuid, number, running, ready))
            for state in ("running", "ready", "stopped"):
                words = ("instance", "wait", "web1", f"--{state}", "--timeout", "0")
                if state in met:
                    operator.good(*words)
                else:
                    error = operator.fails(*words)
                    assert error == f"web1: not {state} within 0 s; 'guestapi --fleet instance list' shows what is"
        assert operator.fails("instance", "wait", "web1", "web2", "--stopped", "--timeout", "0").startswith("web2: not")
        assert operator.fails("instance", "wait", "web9", "--running").startswith("no instance 'web9'")
        waiting = subprocess.Popen(operator.program("instance", "wait", "web1", "--running"))
        connection.execute("SELECT guestapi.report(%s, 1, 4, 1, true, false)", (uuid,))
        assert waiting.wait(20) == 0


def test_revisions(operator: FleetOperator) -> None:
    """A change raises the revision of its host by one, and that of no other; --if-revision compares."""
    before = operator.revisions()
    operator.good("config", "set", "web1", "user.a=1", "user.b=2")
    assert operator.revisions() == {"h1": before["h1"] + 1, "h2": before["h2"]}
    revision = operator.info("web1")["revision"]
    assert revision == before["h1"] + 1
    operator.good("config", "set", "web1", "user.a=2", "--if-revision", str(revision))
    error = operator.fails("config", "set", "web1", "user.a=3", "--if-revision", str(revision))
    assert error.startswith(f"instance 'web1' has revision {revision + 1}, not {revision}; nothing was changed")
    assert operator.info("web1")["config"]["user.a"] == "2"
    operator.good("config", "set", "web1", "user.a=2")
    assert operator.info("web1")["revision"] == revision + 1, "nothing was to be changed"


def test_an_operation_twice(operator: FleetOperator) -> None:
    """A command that is asked again with the same operation changes nothing."""
    number = str(uuid4())
    operator.good("config", "set", "web1", "user.a=1", "--operation", number)
    operator.good("config", "set", "web1", "user.a=2")
    done = operator.local("--fleet", "config", "set", "web1", "user.a=1", "--operation", number)
    assert done.code == 0
    assert done.err == "this operation was carried out before; nothing was changed now\n"
    assert operator.info("web1")["config"]["user.a"] == "2"


def test_wait(operator: FleetOperator) -> None:
    """--wait ends when the host has applied the change; with a timeout it says who has not, and that it stays."""
    error = operator.fails("config", "set", "web1", "user.a=1", "--wait", "--timeout", "0.2")
    assert error.startswith("the change is made and stays, but h1 (last contact never) has not applied it within 0.2 s")
    assert operator.info("web1")["config"]["user.a"] == "1"
    with operator.fleet.host("h1") as connection:
        connection.execute("SELECT guestapi.contact(1000, '1', '')")
    operator.good("config", "set", "web1", "user.a=2", "--wait")


def test_apply_and_export(operator: FleetOperator) -> None:
    """Definitions say the host by their location; what was exported is applied again and changes nothing."""
    exported = operator.good("export", "--all")
    assert "location: h1" in exported
    of_host = operator.good("export", "--all", "--host", "h2")
    assert "name: web2" in of_host
    assert "web1" not in of_host
    assert operator.local.misuse("--fleet", "export", "web1", "--host", "h1") == "--host says nothing without --all"
    assert operator.local.misuse("export", "--all", "--host", "h1").startswith("--host is for a fleet")
    summary = "0 added, 0 changed, 0 removed, 2 unchanged\n"
    before = operator.revisions()
    assert operator.good("apply", "-f", "-", stdin=exported) == summary
    assert operator.revisions() == before
    texts = [f"name: a{number}\nlocation: h{1 + number % 2}\nconfig:\n  user.n: '{number}'\n" for number in range(20)]
    text = "---\n".join(texts)
    assert operator.good("apply", "-f", "-", stdin=text).endswith("20 added, 0 changed, 0 removed, 0 unchanged\n")
    assert operator.revisions() == {host: revision + 1 for host, revision in before.items()}
    assert operator.info("a7")["host"] == "h2"
    moved = "name: a7\nlocation: h1\nconfig: {}\n"
    assert "is on host h2, not h1" in operator.fails("apply", "-f", "-", stdin=moved)
    assert operator.good("apply", "-f", "-", "--prune", "--dry-run", stdin=text).endswith(
        "would be 0 added, 0 changed, 2 removed, 20 unchanged\n"
    )
    assert operator.good("apply", "-f", "-", "--prune", stdin=text).endswith("2 removed, 20 unchanged\n")
    assert operator.good("list", "-f", "csv", "-c", "n").count("\n") == 21


def test_apply_says_nothing_of_the_host(operator: FleetOperator) -> None:
    """A definition without a location changes no instance for that; --host is a wish, and no command but move moves."""
    text = "name: q1\nconfig:\n  user.a: '1'\n"
    apply = ("apply", "-f", "-")
    missing = "it is not said on which host 'q1' is to be; --host says it"
    for dry in ((), ("--dry-run",)):
        assert operator.fails(*apply, *dry, stdin=text) == missing
    assert operator.good(*apply, "--host", "h1", stdin=text).startswith("added q1\n")
    for words in ((), ("--host", "h1"), ("--dry-run",)):
        out = operator.good(*apply, *words, stdin=text)
        assert out.removeprefix("would be ") == "0 added, 0 changed, 0 removed, 1 unchanged\n"
    changed = text.replace("'1'", "'2'")
    assert "-location" not in operator.good(*apply, "--dry-run", stdin=changed)
    for dry in ((), ("--dry-run",)):
        for wanted in (text, changed, f"{changed}location: h2\n"):
            assert operator.fails(*apply, "--host", "h2", *dry, stdin=wanted) == (
                "instance 'q1' is on host h1, not h2; 'guestapi --fleet instance move q1 --to h2' moves it"
            )
    revision = operator.info("q1")["revision"]
    operator.good("config", "edit", "q1", stdin=text)
    assert (operator.info("q1")["revision"], operator.info("q1")["config"]) == (revision, {"user.a": "1"})
    assert operator.good(*apply, stdin=changed) == "changed q1\n0 added, 1 changed, 0 removed, 0 unchanged\n"
    assert operator.info("q1")["host"] == "h1"


def test_prune_of_a_host(operator: FleetOperator) -> None:
    """With --host, what is not defined is removed of that host alone; a project that is not there yet has nothing."""
    text = "name: q1\n---\nname: q2\nproject: new\n"
    out = operator.good("apply", "-f", "-", "--prune", "--host", "h1", stdin=text)
    assert out.splitlines()[-2:] == ["removed web1", "2 added, 0 changed, 1 removed, 0 unchanged"]
    assert operator.info("web2")["host"] == "h2"


def test_two_at_once(operator: FleetOperator) -> None:
    """Commands at the same time, of instances of two hosts in any order, are all done; no key is lost."""
    running = [
        subprocess.Popen(operator.program("config", "set", f"web{1 + number % 2}", f"user.n{number}=1"))
        for number in range(8)
    ]
    assert [one.wait() for one in running] == [0] * 8
    found = {*operator.info("web1")["config"], *operator.info("web2")["config"]}
    assert {f"user.n{number}" for number in range(8)} <= found


def test_a_commit_whose_answer_was_lost(operator: FleetOperator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command whose server is lost in its commit finds out what became of the change: it is made once."""
    real = engine.commit
    for made in (True, False):
        lost: list[bool] = []

        def lose(connection: Any, made: bool = made, lost: list[bool] = lost) -> None:
            if lost:
                real(connection)
                return
            lost.append(True)
            if made:
                real(connection)
            connection.close()
            raise engine.UncertainError("not certain", lost=True)

        monkeypatch.setattr("guestapi.fleet.operating.commit", lose)
        before = operator.revisions()["h1"]
        operator.good("config", "set", "web1", f"user.made={made}")
        assert lost
        assert operator.info("web1")["config"]["user.made"] == str(made)
        assert operator.revisions()["h1"] == before + 1


def test_without_a_standby(operator: FleetOperator) -> None:
    """A change that no standby confirms is not certain, and Ctrl-C says so; one more does not say it is."""
    fleet = operator.fleet
    with fleet.admin() as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        connection.execute("SELECT pg_reload_conf()")
        assert any(not one.ok for one in checks.check(connection))
    program = operator.program("config", "set", "web1", "user.a=1")
    try:
        for cancelled in (False, True):
            process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
            pid = waiting(fleet)
            if cancelled:
                with fleet.admin() as connection:
                    connection.execute("SET synchronous_commit = local")
                    connection.execute("SELECT pg_cancel_backend(%s)", (pid,))
            else:
                process.send_signal(signal.SIGINT)
                assert process.stderr is not None
                assert process.stderr.readline().startswith("waiting for the database to confirm the change")
                process.send_signal(signal.SIGINT)
            _out, error = process.communicate(timeout=20)
            assert process.returncode == 1
            assert "Error: not certain: " in error
            assert "Traceback" not in error
            with fleet.admin() as connection:
                connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
    finally:
        with fleet.admin() as connection:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")


def waiting(fleet: Fleet) -> int:
    """The process of the server that waits for a standby."""
    until = time.monotonic() + 20
    with fleet.admin() as connection:
        while True:
            row = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()"
            ).fetchone()
            if row is not None:
                return int(row[0])
            assert time.monotonic() < until
            time.sleep(0.02)


def test_ctrl_c_before_the_commit(operator: FleetOperator) -> None:
    """Ctrl-C while a command waits for another one's lock changes nothing, and says so."""
    before = operator.revisions()
    with operator.fleet.admin() as connection, connection.transaction():
        connection.execute("SELECT 1 FROM guestapi.hosts FOR UPDATE")
        program = operator.program("config", "set", "web1", "user.a=1")
        process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 20
        while not connection.execute(
            "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        ).fetchone():
            assert time.monotonic() < until
            time.sleep(0.02)
            connection.execute("SELECT pg_stat_clear_snapshot()")
        os.kill(process.pid, signal.SIGINT)
        _out, error = process.communicate(timeout=20)
    assert process.returncode == 1
    assert error == "Error: ended by Ctrl-C; nothing was changed\n"
    assert operator.revisions() == before
