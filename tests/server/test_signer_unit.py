"""The signer's units with a systemd as PID 1: who reaches its socket, its key and its memory, and how it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT, Installed, building
from tests.harness.waiting import until
from tests.server.test_sandbox import REFUSED, configuration

pytestmark = pytest.mark.root

AUDIENCE = "https://vault.example.org"
PATH = f"/1.0/guestapi/identity?audience={AUDIENCE}"
KEYS, SOCKET = "/var/lib/guestapi-signer", "/run/guestapi/signer.sock"
TOML = f'trust_domain = "example.org"\naudiences = ["{AUDIENCE}"]\n'
#: Connects as another user, and says how that ended.
CONNECT = f"""
import socket
try:
    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect("{SOCKET}")
except OSError as error:
    print(error.strerror)
else:
    print("connected")
"""


@pytest.fixture(scope="module")
def container(machine: Installed) -> Iterator[Container]:
    """A container on that machine, set up with signed identity as docs/identity.md says."""
    before = machine.run("cat", "/etc/guestapi/guestapi.toml").stdout
    with building():
        locked = str(CHECKOUT / "requirements/identity.txt")
        machine.run("/opt/guestapi/bin/python", "-m", "pip", "install", "--quiet", "--require-hashes", "-r", locked)
    machine.write("/etc/guestapi/guestapi.toml", before.replace("audiences = []\n", TOML))
    machine.run("guestapi", "identity", "keys", "rotate")
    machine.run("systemctl", "enable", "--now", "guestapi-signer.socket")
    machine.run("systemctl", "restart", "guestapi.service")
    machine.run("guestapi", "instance", "add", "signed")
    with Container([(Path("/var/lib/incus/guestapi"), "/dev/incus")], enter=machine.enter) as running:
        machine.run("guestapi", "instance", "start", "signed", "--pid", str(running.pid))
        yield running
    machine.run("guestapi", "instance", "remove", "signed")
    machine.run("systemctl", "disable", "--now", "guestapi-signer.socket", "guestapi-signer.service")
    machine.write("/etc/guestapi/guestapi.toml", before)
    machine.run("systemctl", "restart", "guestapi.service")


def of_signer(machine: Installed, name: str) -> str:
    """A property of the signer's unit."""
    return machine.run("systemctl", "show", "--value", "-p", name, "guestapi-signer.service").stdout.strip()


def test_token(machine: Installed, container: Container) -> None:
    """The first request for a token starts the signer; ``guestapi check`` has nothing against it."""
    machine.run("systemctl", "stop", "guestapi-signer.service")
    answer = container.ask(PATH)
    assert (answer.status, answer.text.count(".")) == (200, 2), answer.text
    assert of_signer(machine, "ActiveState") == "active"
    checked = machine.run("guestapi", "check").stdout
    assert re.search(r"^ok +identity: example\.org, key \S+ signs since", checked, re.MULTILINE), checked
    until(lambda: container.ask(PATH).status == 200, "a token after the check")


def test_who_reaches_it(machine: Installed, container: Container) -> None:
    """The user of workers connects, and no other but root; the directory of the keys is the signer's alone."""
    for user, outcome in (
        ("guestapi", "connected"),
        ("nobody", "Permission denied"),
        ("guestapi-mirror", "Permission denied"),
    ):
        setpriv = ["setpriv", f"--reuid={user}", "--clear-groups", "/usr/bin/python3", "-c", CONNECT]
        assert machine.run(*setpriv).stdout.strip() == outcome, user
    assert machine.run("stat", "-c", "%U %G %a", KEYS).stdout == "guestapi-signer guestapi-signer 700\n"
    assert machine.run("stat", "-c", "%U %G %a", f"{KEYS}/keys.json").stdout == "guestapi-signer guestapi-signer 600\n"
    assert machine.run("stat", "-c", "%U %a", SOCKET).stdout == "guestapi 600\n"


def test_workers_reach_no_key(machine: Installed, container: Container) -> None:
    """A worker that was taken over reads neither the signer's memory nor its descriptors."""
    assert container.ask(PATH).status == 200
    pid = int(of_signer(machine, "MainPID"))
    found = "/var/lib/guestapi/probed-signer"
    machine.write("/etc/guestapi/gunicorn.conf.py", configuration(pid, found))
    try:
        # New workers; a restart would end this signer, too.
        machine.run("systemctl", "reload", "guestapi.service")
        until(lambda: machine.run("test", "-s", found, check=False).returncode == 0, "the attempts of a worker")
    finally:
        machine.set_workers(2)
    outcomes = json.loads(machine.run("cat", found).stdout)
    assert int(of_signer(machine, "MainPID")) == pid
    closed = ("ptrace", "process_vm_readv", "read memory", "write memory", "list descriptors", "pidfd_getfd", "kcmp")
    assert {name: outcomes[name] for name in closed if outcomes[name] not in REFUSED} == {}
    machine.run("systemctl", "restart", "guestapi.service")


def test_hardening(machine: Installed, container: Container) -> None:
    """`systemd-analyze security` rates the unit below 1; it has no capability, and writes no core dump."""
    report = machine.run("systemd-analyze", "security", "--no-pager", "guestapi-signer.service").stdout
    rating = re.search(r"Overall exposure level for guestapi-signer.service: ([0-9.]+)", report)
    assert rating
    assert float(rating[1]) < 1.0
    until(lambda: container.ask(PATH).status == 200, "a token")
    pid = of_signer(machine, "MainPID")
    status = machine.run("cat", f"/proc/{pid}/status").stdout
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    # Not dumpable: it leaves no core dump, and its memory is root's alone (proc_pid(5)).
    assert machine.run("stat", "-c", "%U", f"/proc/{pid}/mem", f"/proc/{pid}/environ").stdout == "root\nroot\n"
    machine.run("kill", "-SEGV", pid)
    until(lambda: of_signer(machine, "MainPID") not in (pid, "0"), "the next signer")
    assert container.ask(PATH).status == 200


def test_reload(machine: Installed, container: Container) -> None:
    """One reload has both processes read the list of audiences; a restart of the service restarts the signer."""
    assert container.ask(PATH).status == 200
    toml = machine.run("cat", "/etc/guestapi/guestapi.toml").stdout
    machine.write("/etc/guestapi/guestapi.toml", toml.replace(f'"{AUDIENCE}"', f'"{AUDIENCE}", "added"'))
    machine.run("systemctl", "reload", "guestapi.service")
    until(lambda: container.ask(PATH.replace(AUDIENCE, "added")).status == 200, "a token for the new audience")
    pid = of_signer(machine, "MainPID")
    machine.run("systemctl", "restart", "guestapi.service")
    until(lambda: container.ask(PATH).status == 200, "a token")
    assert of_signer(machine, "MainPID") != pid
