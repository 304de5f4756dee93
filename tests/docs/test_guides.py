"""The commands of the documents, run on a machine: their output is as the documents show it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.docs.documents import CHECKOUT
from tests.harness.containers import Container
from tests.harness.daemon_units import CLIENTS, install_daemon
from tests.harness.machine import Machine, building
from tests.harness.waiting import TIMEOUT, until

pytestmark = pytest.mark.root

#: The beginning of a finding about a runtime whose follower is switched off.
FOLLOWER = "ok   follower "

#: Patterns that vary from machine to machine, and their replacements.
VARYING = (
    (r"Linux \S+", "Linux VERSION"),
    (r'"location":"[^"]*"', '"location":"HOST"'),
    (r"\d+", "N"),
    (r" {2,}", "  "),
)


@pytest.fixture(scope="module")
def machine(staged: Path) -> Iterator[Machine]:
    """A machine with nothing of guestapi but the environment of an earlier installation.

    ``make install`` has made it for this run (`staged`), from nothing. pip takes as long again for a second one.
    """
    with Machine() as booted:
        booted.unpack(staged, "opt/guestapi")
        yield booted


def block(document: str, beginning: str) -> list[tuple[str, list[str]]]:
    """Return the commands of the code block that begins with this command, each with its shown output."""
    for text in re.findall(r"```console\n(.*?)```", (CHECKOUT / document).read_text(), re.DOTALL):
        if text.startswith(f"# {beginning}"):
            joined = re.sub(r"\\\n\s*", "", text)
            found: list[tuple[str, list[str]]] = []
            for line in joined.splitlines():
                if line.startswith("# "):
                    found.append((line[2:], []))
                else:
                    found[-1][1].append(line)
            return found
    raise AssertionError(f"{document}: no block begins with {beginning!r}")


def normalised(lines: list[str]) -> list[str]:
    """Return the lines with varying parts replaced."""
    found = []
    for line in lines:
        for pattern, replacement in VARYING:
            line = re.sub(pattern, replacement, line)
        found.append(line)
    return found


def matches(printed: list[str], shown: list[str]) -> bool:
    """Return whether the output equals the shown one. Nothing shown matches everything; `...` matches any lines."""
    if not shown:
        return True
    pattern = "".join(r"(?:.*\n)*" if line == "..." else f"{re.escape(line)}\n" for line in normalised(shown))
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in normalised(printed))) is not None


def play(machine: Machine, document: str, beginning: str, instead: Mapping[str, str] | None = None) -> None:
    """Run the commands of a block. Each must succeed, and print what is shown, at once or after a while.

    Args:
        machine: the machine on which they run.
        document: the path of the document in the checkout.
        beginning: the beginning of the block's first command.
        instead: texts to replace in the commands, such as a PID.
    """
    for command, shown in block(document, beginning):
        for old, new in (instead or {}).items():
            command = command.replace(old, new)
        end = time.monotonic() + TIMEOUT
        while True:
            with building() if "make " in command else nullcontext():
                done = machine.run("sh", "-c", f"cd {CHECKOUT} && {command}", check=False)
            # The installed runtimes differ between hosts.
            lines = [line for line in done.stdout.splitlines() if not line.startswith(FOLLOWER) or line in shown]
            good = done.returncode == 0 and matches(lines, shown)
            # A query may need some time to show the expected output; a change is made only once.
            if good or time.monotonic() > end or not shown:
                break
            time.sleep(0.1)
        assert done.returncode == 0, f"{document}: {command}: {done.stdout}{done.stderr}"
        assert good, f"{document}: {command} prints:\n{done.stdout}\nand not:\n" + "\n".join(shown)


def test_comparison_of_output() -> None:
    """Numbers may differ, and `...` matches any lines; any other difference is found."""
    assert matches(["ok   a: 12 known", "x", "y", "z"], ["ok   a: 3 known", "...", "z"])
    assert not matches(["FAIL a: 12 known"], ["ok   a: 12 known"])
    assert not matches(["a", "b"], ["a"])


def test_readme(machine: Machine) -> None:
    """The README's steps install a service without failures in `guestapi check`, and register a container by hand."""
    play(machine, "README.md", "make install")
    with Container([(Path("/var/lib/incus/guestapi"), "/dev/incus")], enter=machine.enter) as web:
        play(machine, "README.md", "guestapi instance add web", {"4711": str(web.pid)})
        assert web.ask("/1.0/config/user.role").text == "frontend"
        machine.run("guestapi", "instance", "remove", "web", "--force")
        play(machine, "docs/operations.md", "guestapi instance add web", {"4711": str(web.pid)})
        machine.run("guestapi", "instance", "remove", "web")


def test_operations(machine: Machine) -> None:
    """The steps of operations.md and configuration.md work: install again, enable the second socket, check."""
    # Like test_readme, which has just run it: what pip has installed is there.
    play(machine, "docs/operations.md", "make install", {"make install": "tools/installation.py install"})
    play(machine, "docs/operations.md", "systemctl enable --now guestapi-lxd.socket")
    machine.run("systemctl", "enable", "--now", "guestapi.socket", "guestapi.service")
    play(machine, "docs/configuration.md", "guestapi check --settings")
    machine.run("guestapi", "check")
    machine.run("systemctl", "disable", "--now", "guestapi-lxd.socket")
    machine.run("systemctl", "disable", "guestapi.service")


def test_operations_look_after(machine: Machine) -> None:
    """The lines of operations.md that look after the service show its workers, refusals, users and exceeded limits."""
    machine.run("systemctl", "start", "guestapi.socket", "guestapi.service")
    with Container([(Path("/var/lib/incus/guestapi"), "/dev/incus")], enter=machine.enter) as web:
        machine.run("guestapi", "instance", "add", "web")
        try:
            machine.run("guestapi", "instance", "register", "web", "--pid", str(web.pid))
            assert web.ask("/1.0", become=["uid:1000"]).status == 401
            commands = dict.fromkeys(command for command, _shown in block("docs/operations.md", "systemctl status"))
            status, *journal = commands
            until(lambda: "2 of 2 workers answer" in machine.run("sh", "-c", status).stdout, "the workers' status")
            printed = [machine.run("sh", "-c", command, check=False) for command in journal]
            assert [done.stderr for done in printed] == [""] * 3
            assert "default/web: GET /1.0 -> 401" in printed[0].stdout
            assert printed[1].stdout == f'"{100000 + 1000}"\n'
            assert "No entries" in printed[2].stdout
        finally:
            machine.run("guestapi", "instance", "remove", "web", "--force")


def test_operations_edit_of_the_unit(machine: Machine) -> None:
    """`systemctl edit` changes what the document says of the service's resources, and the service starts with it."""
    ((command, _shown),) = block("docs/operations.md", "systemctl edit guestapi")
    editor = "#!/bin/sh\nprintf '[Service]\\nCPUWeight=500\\nMemoryHigh=2G\\n' >\"$1\"\n"
    machine.run("sh", "-c", 'printf %s "$1" >/tmp/editor; chmod +x /tmp/editor', "write", editor)
    # An editor needs a terminal.
    machine.run("env", "SYSTEMD_EDITOR=/tmp/editor", "script", "-qec", command, "/dev/null")
    try:
        machine.run("systemctl", "restart", "guestapi.service")
        shown = machine.run("systemctl", "show", "-p", "CPUWeight", "-p", "MemoryHigh", "-p", "ActiveState", "guestapi")
        assert set(shown.stdout.split()) == {"CPUWeight=500", f"MemoryHigh={2 << 30}", "ActiveState=active"}
    finally:
        machine.run("systemctl", "revert", "guestapi.service")
    machine.run("systemctl", "restart", "guestapi.service")
    assert "CPUWeight=1000" in machine.run("systemctl", "show", "-p", "CPUWeight", "guestapi").stdout


def test_monitoring(machine: Machine) -> None:
    """The units of the metrics start and answer: on the host's socket to root, and on the loopback port to anybody."""
    machine.run("systemctl", "start", "guestapi.socket", "guestapi.service")
    try:
        play(machine, "docs/monitoring.md", "systemctl enable --now guestapi-metrics.socket")
        text = machine.run("curl", "-sS", "--unix-socket", "/run/guestapi/metrics.sock", "http://x/metrics").stdout
        assert "guestapi_workers 2.0\n" in text
        refused = machine.run(
            *(
                "setpriv",
                "--reuid=65534",
                "--clear-groups",
                "curl",
                "-sS",
                "--unix-socket",
                "/run/guestapi/metrics.sock",
            ),
            "http://x/metrics",
            check=False,
        )
        assert refused.returncode == 7, "another user is refused"
        play(machine, "docs/monitoring.md", "systemctl enable --now guestapi-metrics-port.socket")
        asked = machine.run(
            "setpriv", "--reuid=65534", "--clear-groups", "curl", "-sS", "http://127.0.0.1:9469/metrics"
        )
        assert "guestapi_workers 2.0\n" in asked.stdout
        # Both go on while the service restarts, and after its end say so.
        machine.run("systemctl", "stop", "guestapi.socket", "guestapi.service")
        healthy = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:9469/healthz")
        until(lambda: machine.run(*healthy).stdout == "503", "the service is found to be down")
        machine.run("systemctl", "start", "guestapi.socket", "guestapi.service")
        until(lambda: machine.run(*healthy).stdout == "200", "the service is found to be up")
    finally:
        machine.run("systemctl", "disable", "--now", "guestapi-metrics.socket", "guestapi-metrics-port.socket")
        machine.run("systemctl", "stop", "guestapi-metrics.service", "guestapi-metrics-port.service")


#: A container whose root file system has curl; like Debian's template, but without a network.
LXC = """
lxc.uts.name = web
lxc.rootfs.path = dir:/var/lib/lxc/web/rootfs
lxc.net.0.type = empty
lxc.mount.auto = proc:rw
"""


def test_lxc(machine: Machine) -> None:
    """A container that includes the file is registered at its start, and reads its own configuration."""
    machine.run("/usr/bin/python3", "-I", "-S", str(CHECKOUT / "tests/harness/rootfs.py"), "/var/lib/lxc/web/rootfs")
    machine.run("sh", "-c", 'printf %s "$1" >/var/lib/lxc/web/config', "write", LXC)
    try:
        # Like test_operations, which has just run it.
        play(machine, "docs/lxc.md", "make install", {"make install": "guestapi --version"})
        play(machine, "docs/lxc.md", "guestapi config set web user.role=frontend")
        play(machine, "docs/lxc.md", "systemctl restart guestapi-lxc.service")
        assert "running" in machine.run("guestapi", "instance", "list").stdout
    finally:
        machine.run("lxc-stop", "-k", "web", check=False)
        machine.run("guestapi", "instance", "remove", "web", check=False)
        machine.run("lxc-destroy", "web", check=False)
        machine.run("systemctl", "disable", "--now", "guestapi-lxc.service")


@pytest.mark.parametrize("kind", ["incus"])
def test_beside_a_daemon(machine: Machine, kind: str) -> None:
    """The steps of incus.md work: takeover while guestapi runs, back, a device instead, and removal of the mirror."""
    install_daemon(machine, kind)
    machine.run(CLIENTS[kind], "launch", "busybox", "web")
    play(machine, "docs/incus.md", "install -D -m 0644 /etc/guestapi/incus-takeover.conf")
    play(machine, "docs/incus.md", "systemctl disable --now guestapi-takeover@incus.service\n")
    play(machine, "docs/incus.md", "install -D -m 0644 /etc/guestapi/incus-device.conf")
    until(
        lambda: "device: 1 of 1 running instances" in machine.run("guestapi", "check", check=False).stdout,
        "the container has the device",
    )
    play(machine, "docs/incus.md", "incus profile device remove default guestapi")
    play(machine, "docs/incus.md", "systemctl disable --now guestapi-takeover@incus.service guestapi-mirror.service")
    machine.run(CLIENTS[kind], "delete", "--force", "web")
    machine.run("systemctl", "disable", "--now", f"{kind}.service", f"{kind}.socket", check=False)
