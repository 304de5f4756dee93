"""The sockets' units on a real machine: enabled and restarted at any time, also while the service runs."""

from __future__ import annotations

import pytest

from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

#: Each prints the status of a response; a request of the host's own root gets 403 or 500, which suffices here.
_ASK = "curl -sS --max-time 300 -o /dev/null -w '%{http_code}\\n' --unix-socket "
INCUS, LXD = "/var/lib/incus/guestapi/sock", "/var/lib/lxd/devlxd/sock"

#: The arguments of systemctl, and the sockets that must answer afterwards.
COMMANDS = [
    ("enable --now guestapi-lxd.socket", [INCUS, LXD]),
    ("restart guestapi-lxd.socket guestapi.service", [INCUS, LXD]),
    ("restart guestapi.socket", [INCUS, LXD]),
    ("restart guestapi.socket guestapi-lxd.socket", [INCUS, LXD]),
    ("disable --now guestapi-lxd.socket", [INCUS]),
]


def ask(vm: VirtualMachine, path: str) -> int:
    """Send a request to one of the sockets.

    Returns:
        the status of the response.
    """
    return int(vm.run("sh", "-c", f"{_ASK} {path} http://x/1.0").stdout)


@pytest.mark.parametrize("time", [1, 2])
def test_at_any_time(vm: VirtualMachine, time: int) -> None:
    """While the service runs, each of these commands succeeds, and then every open socket answers; repeatedly."""
    ask(vm, INCUS)
    for words, answering in COMMANDS:
        done = vm.run("systemctl", *words.split(), check=False)
        assert done.returncode == 0, (words, done.stderr, vm.run("journalctl", "-n", "30", "--no-pager").stdout)
        for path in answering:
            assert ask(vm, path) >= 200, words
    assert vm.run("systemctl", "list-units", "--failed", "--no-legend", "guestapi*").stdout == ""


def test_restart_of_a_socket_without_the_service(vm: VirtualMachine) -> None:
    """A socket that is restarted while the service is stopped starts it at the next request."""
    vm.run("systemctl", "stop", "guestapi.service")
    vm.run("systemctl", "restart", "guestapi.socket")
    assert ask(vm, INCUS) >= 200
