"""After a boot all units run, and containers that start with the machine get an answer to their first request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.machine import guests
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

ROOTS = {"web1": "/var/lib/lxc/web1/rootfs", "web2": "/var/lib/lxc/web2/rootfs", "shop": "/var/lib/machines/shop"}
TWELVE = [f"together{number}" for number in range(1, 13)]


@pytest.fixture(scope="module")
def booted(vm: VirtualMachine) -> VirtualMachine:
    """The machine after a reboot, unchanged since."""
    vm.script('rm -f "$@"', *(f"{root}/asked" for root in ROOTS.values()))
    vm.reboot()
    return vm


@pytest.mark.parametrize("name", ROOTS)
def test_first_act_is_answered(booted: VirtualMachine, name: str) -> None:
    """A container that starts at boot gets its own configuration at its first request."""
    first = guests.first_act(booted, ROOTS[name])
    assert (first.status, first.answer) == (200, f"role of {name}"), first


def test_all_units_run(booted: VirtualMachine) -> None:
    """After the boot no unit has failed, and every container is shown as running."""
    assert booted.run("systemctl", "is-system-running", "--wait", check=False).stdout == "running\n", booted.run(
        "sh", "-c", "systemctl --failed; journalctl -b -p warning -n 40 --no-pager"
    ).stdout
    assert {name: guests.statuses(booted).get(name) for name in ROOTS} == dict.fromkeys(ROOTS, "running")


def test_check_after_a_boot(booted: VirtualMachine) -> None:
    """`guestapi check` exits with 0 on a machine that has just booted."""
    done = booted.run("guestapi", "check", check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def twelve(booted: VirtualMachine) -> Iterator[None]:
    """Twelve containers that were started at the same moment."""
    guests.make(booted, "lxc", TWELVE)
    try:
        booted.script('for name; do lxc-start -n "$name" & done; wait', *TWELVE)
        yield
    finally:
        booted.script('for name; do lxc-stop -k -n "$name"; rm -rf "/var/lib/lxc/$name"; done', *TWELVE)


@pytest.mark.usefixtures("twelve")
def test_twelve_at_once(booted: VirtualMachine) -> None:
    """Each of twelve containers that start at once gets its own configuration at its first request."""
    acts = {name: guests.first_act(booted, f"/var/lib/lxc/{name}/rootfs") for name in TWELVE}
    wrong = {name: act for name, act in acts.items() if (act.status, act.answer) != (200, f"role of {name}")}
    assert wrong == {}, f"{wrong}\n{booted.run('journalctl', '-b', '-n', '80', '--no-pager').stdout}"
    known = guests.statuses(booted)
    assert {name: known.get(name) for name in TWELVE} == dict.fromkeys(TWELVE, "running")
