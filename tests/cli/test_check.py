"""`guestapi check`: each finding, and its hint what to do."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from guestapi.model import SourceStatus
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store.statuses import record_status
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.harness.containers import Container
from tests.harness.service import Service
from tests.harness.waiting import TIMEOUT
from tests.store.processes import database


def findings(guestapi: Guestapi, *words: str) -> dict[str, dict[str, Any]]:
    """Return the findings by name; exit code and lines must agree with the JSON."""
    done = guestapi("check", "--format", "json", *words)
    found = {one["check"]: one for one in json.loads(done.out)}
    assert done.code == (0 if all(one["ok"] for one in found.values()) else 1)
    lines = guestapi("check", *words).out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{'ok  ' if one['ok'] else 'FAIL'} {name}" for name, one in found.items()
    ]
    return found


def listening(guestapi: Guestapi, path: Path) -> None:
    """Write a configuration with this one listener."""
    with guestapi.config.open("a") as file:
        file.write(f'[[listener]]\npath = "{path}"\n')


@contextmanager
def answering(path: Path, answer: bytes, first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """A listener that sends this answer on every connection, and calls `first` before each one."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                first()
                connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT)


def test_service_that_runs(service: Service) -> None:
    """With a running service there is no failure, and a line for each listener, the store and the kernel."""
    done = service.command("check", "--format", "json")
    found = {one["check"] for one in json.loads(done.stdout)}
    assert found == {"configuration", "gunicorn", "store.url", "kernel", "store", "instances", "images"} | {
        f"socket {dialect}" for dialect in service.sockets
    }


def test_check_of_the_settings_only(guestapi: Guestapi) -> None:
    """--settings reads the two files, and examines nothing that runs."""
    assert {name: one["ok"] for name, one in findings(guestapi, "--settings").items()} == {
        "configuration": True,
        "gunicorn": True,
        "store.url": True,
    }
    assert not database(guestapi.settings).exists()


def test_wrong_configuration(guestapi: Guestapi) -> None:
    """An invalid configuration is the only finding, because the others would be about another one."""
    guestapi.config.write_text("[limits]\nbodi = 1\n")
    (found,) = findings(guestapi).values()
    assert (found["check"], found["ok"]) == ("configuration", False)
    assert "limits.bodi" in found["text"]


def test_wrong_gunicorn_file(guestapi: Guestapi) -> None:
    """A wrong setting in gunicorn's file is found before a reload."""
    (guestapi.directory / "gunicorn.conf.py").write_text("wrokers = 3\n")
    found = findings(guestapi, "--settings")
    assert found["configuration"]["ok"]
    assert not found["gunicorn"]["ok"]
    assert "wrokers" in found["gunicorn"]["text"]


def test_before_the_first_start(guestapi: Guestapi, tmp_path: Path) -> None:
    """Before the first start the missing socket is the failure, not the missing store, and check creates no store."""
    listening(guestapi, tmp_path / "sock")
    found = findings(guestapi)
    assert found["store"]["ok"]
    assert "the service makes it when it starts" in found["store"]["text"]
    assert "instances" not in found
    assert not found["socket incus"]["ok"]
    assert "systemctl restart guestapi.socket" in found["socket incus"]["text"]
    assert not database(guestapi.settings).exists()


def test_store_lost_while_the_service_runs(guestapi: Guestapi, tmp_path: Path) -> None:
    """If the service answers, a missing store is a failure with a hint what to do."""
    listening(guestapi, tmp_path / "sock")
    with answering(tmp_path / "sock", b"HTTP/1.0 200 OK\r\n\r\n"):
        found = findings(guestapi)
    assert not found["store"]["ok"]
    assert "guestapi instance add" in found["store"]["text"]


def test_store_that_is_made_by_the_first_connection(guestapi: Guestapi, tmp_path: Path) -> None:
    """Right after installation, check's connection starts the service, which creates the store: no failure."""
    listening(guestapi, tmp_path / "sock")

    def make_store() -> None:
        Writer(guestapi.settings, create=True)

    with answering(tmp_path / "sock", b"HTTP/1.0 200 OK\r\n\r\n", first=make_store):
        found = findings(guestapi)
    assert all(one["ok"] for one in found.values())
    assert found["instances"]["text"] == "0 known, 0 running"


@pytest.mark.parametrize(
    ("off", "answers", "ok"),
    [
        ("guestapi-lxd.socket", ["incus"], {"incus": True, "lxd": True}),
        ("guestapi-lxd.socket", [], {"incus": False, "lxd": True}),
        ("guestapi.socket", [], {"incus": True, "lxd": False}),
        ("guestapi.socket guestapi-lxd.socket", [], {"incus": False, "lxd": False}),
        ("", ["lxd"], {"incus": False, "lxd": True}),
    ],
)
def test_which_socket_does_not_answer(
    guestapi: Guestapi,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    off: str,
    answers: list[str],
    ok: dict[str, bool],
) -> None:
    """A socket that should answer and does not is a failure; one whose unit is switched off is none."""
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(f"""#!/bin/sh
case "$1  {off} " in "is-enabled "*" $2 "*) echo disabled;; "is-enabled "*) echo enabled;; *) echo inactive;; esac
""")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}:{os.environ['PATH']}")
    with ExitStack() as stack:
        for dialect in ok:
            with guestapi.config.open("a") as file:
                file.write(f'[[listener]]\npath = "{tmp_path / dialect}"\ndialect = "{dialect}"\n')
            if dialect in answers:
                stack.enter_context(answering(tmp_path / dialect, b"HTTP/1.0 200 OK\r\n\r\n"))
        found = findings(guestapi)
    assert {dialect: found[f"socket {dialect}"]["ok"] for dialect in ok} == ok


def test_damaged_store_is_found(c1: Guestapi) -> None:
    """A store with a damaged page is a failure, although it can be opened and locked."""
    with closing(sqlite3.connect(database(c1.settings))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'config'").fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with database(c1.settings).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xa5" * size)
    found = findings(c1)
    assert not found["store"]["ok"]
    assert str(database(c1.settings)) in found["store"]["text"]


def test_store_that_cannot_be_written(c1: Guestapi) -> None:
    """A store that its owner may not write is a failure, also for root, who may."""
    database(c1.settings).chmod(0o400)
    found = findings(c1)
    assert not found["store"]["ok"]
    # SQLite creates the files beside it with its mode.
    for file in database(c1.settings).parent.glob(f"{database(c1.settings).name}*"):
        file.chmod(0o600)
    assert findings(c1)["store"]["ok"]


@pytest.mark.root
def test_store_of_another_owner(c1: Guestapi) -> None:
    """A store that does not belong to its directory's owner, so that the service cannot write it, is a failure."""
    os.chown(database(c1.settings), 12345, 12345)
    found = findings(c1)
    assert not found["store"]["ok"]
    assert "chown" in found["store"]["text"]


@pytest.mark.root
def test_instances_that_ended(c1: Guestapi) -> None:
    """An instance whose init has ended is named, without a failure."""
    with Container() as container:
        c1.good("instance", "start", "c1", "--pid", str(container.pid))
        assert findings(c1)["instances"]["text"] == "1 known, 1 running"
    found = findings(c1)["instances"]
    assert found["ok"]
    assert "c1" in found["text"]


@pytest.mark.parametrize(
    ("answer", "mode", "ok"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\n", 0o666, True),
        (b"HTTP/1.0 200 OK\r\n\r\n", 0o660, False),
        (b"SSH-2.0-x\r\n", 0o666, False),
        (b"", 0o666, False),
    ],
)
def test_answer_and_mode_of_a_socket(guestapi: Guestapi, tmp_path: Path, answer: bytes, mode: int, ok: bool) -> None:
    """A socket is good if the service answers there and guests may connect."""
    listening(guestapi, tmp_path / "sock")
    with answering(tmp_path / "sock", answer):
        (tmp_path / "sock").chmod(mode)
        found = findings(guestapi)["socket incus"]
    assert found["ok"] is ok
    assert str(tmp_path / "sock") in found["text"]


@pytest.mark.parametrize(
    ("seconds_ago", "connected", "fault", "ok", "text"),
    [
        (3, True, "", True, "last contact "),
        (3, False, "/s: gone", False, "as last known"),
        (3, True, "c1 is not mirrored", False, "c1 is not mirrored"),
        (31, True, "", False, "the mirror itself does not run"),
        # Written before the clock was set back.
        (-3600, True, "", False, "the mirror itself does not run"),
    ],
)
def test_mirrors(guestapi: Guestapi, seconds_ago: float, connected: bool, fault: str, ok: bool, text: str) -> None:
    """A mirror that has lost its daemon, has a fault, or writes no status any more is a failure with the reason."""
    with Writer(guestapi.settings, create=True).change() as change:
        record_status(change, SourceStatus("incus", "/s", connected, time.time() - seconds_ago, 0.01, fault))
    found = findings(guestapi)["mirror incus"]
    assert found["ok"] is ok
    assert text in found["text"]


@pytest.mark.parametrize(
    ("path", "ok", "text"),
    [(None, False, "the daemon answers its instances itself"), ("/run/guestapi/incus/sock", True, "device: 0 of 0")],
)
def test_guest_socket_before_the_first_instance_runs(guestapi: Guestapi, path: str | None, ok: bool, text: str) -> None:
    """Without a socket for devices no instance can reach guestapi, a failure; with one, there is no finding yet."""
    if path is not None:
        listening(guestapi, Path(path))
    with Writer(guestapi.settings, create=True).change() as change:
        record_status(change, SourceStatus("incus", "/s", True, time.time(), 0.01, ""))
    found = findings(guestapi)["guest socket incus"]
    assert found["ok"] is ok
    assert text in found["text"]


@pytest.mark.parametrize(
    ("seconds_ago", "connected", "fault", "ok", "text"),
    [
        (3, True, "", True, "follows lxc, 1 instances, 0 running; last contact "),
        (3, True, "the monitors cannot be asked", False, "the monitors cannot be asked"),
        (31, True, "", False, "the follower itself does not run; containers that start meanwhile are not registered"),
        (31, True, "", False, "systemctl status guestapi-lxc"),
        (0, False, "gone", False, "gone"),
    ],
)
def test_followers(guestapi: Guestapi, seconds_ago: float, connected: bool, fault: str, ok: bool, text: str) -> None:
    """A follower that writes no status any more is a failure, which states the effect on containers."""
    with Writer(guestapi.settings, create=True).change() as change:
        record_status(change, SourceStatus("lxc", "", connected, time.time() - seconds_ago, 0.01, fault))
        reconcile(change, "lxc", [Observed("/var/lib/lxc web", "default", "web")])
    found = findings(guestapi)["follower lxc"]
    assert found["ok"] is ok
    assert text in found["text"]


def test_containers_that_are_not_registered(guestapi: Guestapi) -> None:
    """Each container that is not registered is named with reason and hint, and each part that is left out."""
    with Writer(guestapi.settings, create=True).change() as change:
        for source in ("lxc", "podman"):
            record_status(change, SourceStatus(source, "", True, time.time(), 0.01, ""))
        reconcile(
            change,
            "lxc",
            [Observed("/var/lib/lxc web", "default", "web", problems=("guests do not see its NIC \x1b",))],
        )
        reconcile(change, "podman", [Observed("f" * 64, "default", "web"), Observed("e" * 64, "default", "db")])
    found = json.loads(guestapi("check", "--format", "json").out)
    texts = {one["check"]: (one["ok"], one["text"]) for one in found if one["check"].startswith("source ")}
    assert texts.keys() == {"source lxc", "source podman"}
    assert texts["source lxc"] == (True, "web in project default: guests do not see its NIC \x1b")
    ok, text = texts["source podman"]
    assert not ok
    assert "web in project default: it is not registered: the name belongs to instance 'web'" in text
    assert "guestapi instance remove web" in text
    out = guestapi("check").out
    assert "guests do not see its NIC \\x1b" in out


def test_many_problems_are_counted(guestapi: Guestapi) -> None:
    """The number of listed problems is limited, and the last line counts the rest."""
    with Writer(guestapi.settings, create=True).change() as change:
        record_status(change, SourceStatus("lxc", "", True, time.time(), 0.01, ""))
        reconcile(change, "lxc", [Observed(f"/lxc {number}", "default", "a/b") for number in range(100)])
    found = json.loads(guestapi("check", "--format", "json").out)
    texts = [one["text"] for one in found if one["check"] == "source lxc"]
    assert len(texts) == 51
    assert texts[-1] == "and 50 more, see the journal"


def test_runtime_without_follower(guestapi: Guestapi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed runtime whose follower is switched off is named; one with an old status is a failure."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("lxc-start", ""), ("podman", ""), ("systemctl", "case $1 in is-enabled) echo disabled;; esac")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/nowhere")
    with Writer(guestapi.settings, create=True).change() as change:
        record_status(change, SourceStatus("podman", "", True, time.time() - 100, 0.01, ""))
        reconcile(change, "podman", [Observed("1", "default", "web")])
    found = findings(guestapi)
    assert found["follower lxc"]["ok"]
    assert "systemctl enable --now guestapi-lxc.service" in found["follower lxc"]["text"]
    assert not found["follower podman"]["ok"]
    assert "guestapi follow podman --forget" in found["follower podman"]["text"]
    assert "follower docker" not in found
    assert guestapi.good("follow", "podman", "--forget") == "forgotten: the follower podman and its 1 instances\n"
    assert "systemctl enable --now guestapi-podman.service" in findings(guestapi)["follower podman"]["text"]
    assert guestapi.state() == []
