"""Large events: who takes them, who does not, and who has nothing to do with them."""

from __future__ import annotations

import json

import pytest

from guestapi.settings import LimitSettings
from tests.harness.containers import Container
from tests.hostile.arena import Arena, forget_peak, memory
from tests.hostile.test_attacks import MIB, assert_harmless

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("hostile")]

#: JSON writes a control character as six bytes, so that an event with both has 24 MiB.
CONTROLS = ["\x01" * (1 << 21), "\x02" * (1 << 21)]
LISTEN = "GET /1.0/events HTTP/1.1\r\nHost: x\r\n\r\n"


def test_streams_that_resume_over_large_entries(arena: Arena, mallory: Container) -> None:
    """128 streams that do not take entries of 4 MiB make a worker hold what it holds of as many connections."""
    report = arena.attack("resuming", mallory, seconds=3)
    report.name = "resuming, large"
    assert_harmless(arena, report)
    limits = LimitSettings()
    each = limits.head + 2 * limits.body
    # Besides, the allocator keeps something of what was used for a moment.
    assert report.grown < limits.streams_per_instance * each + 16 * MIB


def test_largest_events_reach_who_listens(arena: Arena) -> None:
    """Three events of 24 MiB at once: four listeners get them whole, one takes nothing, another instance hears on."""
    service = arena.service
    with service.container("large", dict.fromkeys(("user.a", "user.b", "user.c"), CONTROLS[0])) as container:
        workers = service.workers
        for pid in workers:
            forget_peak(pid)
        before = {pid: memory(pid) for pid in workers}
        with (
            container.listening("many", "5 3 1") as listeners,
            arena.victim.listening("raw", json.dumps([[LISTEN, '"value":"heard"']])) as other,
        ):
            assert (listeners.read_document(), other.read_document()) == ("ready", "ready")
            service.configure("large", **dict.fromkeys(("user_a", "user_b", "user_c"), CONTROLS[1]))
            service.configure("victim", user_other="heard")
            assert '"value":"heard"' in other.read_document()[0]
            assert listeners.read_document() == [["user.a", "user.b", "user.c"]] * 4
        assert service.workers == workers
        assert max(memory(pid, "VmHWM") - before[pid] for pid in workers) < 16 * MIB
        service.configure("victim", user_other="")
