"""The sockets' units on a real machine: opened and restarted at any time, also while the service runs."""

from __future__ import annotations

import pytest

from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

#: Each prints the answer's status; a request of the host's own root is answered with 403 or 500, but answered.
_ASK = "curl -sS --max-time 300 -o /dev/null -w '%{http_code}\\n' --unix-socket "
INCUS, LXD = "/var/lib/incus/guestapi/sock", "/var/lib/lxd/devlxd/sock"

#: systemctl's words, and the sockets that answer afterwards.
COMMANDS = [
    ("enable --now guestapi-lxd.socket", [INCUS, LXD]),
    ("restart guestapi-lxd.socket guestapi.service", [INCUS, LXD]),
    ("restart guestapi.socket", [INCUS, LXD]),
    ("restart guestapi.socket guestapi-lxd.socket", [INCUS, LXD]),
    ("disable --now guestapi-lxd.socket", [INCUS]),
]


def ask(vm: VirtualMachine, path: str) -> int:
    """Ask on one of the sockets.

    Returns:
        the status of the answer.
    """
    return int(vm.run("sh", "-c", f"{_ASK} {path} http://x/1.0").stdout)


@pytest.mark.parametrize("time", [1, 2])
def test_at_any_time(vm: VirtualMachine, time: int) -> None:
    """While the service runs each of these commands succeeds, and then every open socket answers; again and again."""
    ask(vm, INCUS)
    for words, answering in COMMANDS:
        done = vm.run("systemctl", *words.split(), check=False)
        assert done.returncode == 0, (words, done.stderr, vm.run("journalctl", "-n", "30", "--no-pager").stdout)
        for path in answering:
            assert ask(vm, path) >= 200, words
    assert vm.run("systemctl", "list-units", "--failed", "--no-legend", "guestapi*").stdout == ""


def test_restart_of_a_socket_that_was_used_by_nobody(vm: VirtualMachine) -> None:
    """A socket is restarted while the service is stopped: the next request starts the service."""
    vm.run("systemctl", "stop", "guestapi.service")
    vm.run("systemctl", "restart", "guestapi.socket")
    assert ask(vm, INCUS) >= 200
