"""systemd's rating of the exposure of each guestapi service."""

from __future__ import annotations

import json

import pytest

from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

#: The highest permitted exposure in `systemd-analyze security`, of 10; its rating "OK" ends at 4.
HIGHEST = 2.5


def test_no_unit_is_exposed(vm: VirtualMachine) -> None:
    """Every installed service has an exposure far below systemd's rating "medium"."""
    listed = json.loads(vm.run("systemctl", "list-unit-files", "--output=json", "guestapi*.service").stdout)
    files = {one["unit_file"] for one in listed}
    units = [file.replace("@.", "@incus.") for file in sorted(files)]
    assert "guestapi.service" in units
    rated = {}
    for unit in units:
        text = vm.run("systemd-analyze", "security", "--no-pager", unit, check=False).stdout
        (verdict,) = (line for line in text.splitlines() if "Overall exposure level" in line)
        rated[unit] = float(verdict.split(":")[1].split()[0])
    assert {unit: level for unit, level in rated.items() if level > HIGHEST} == {}
