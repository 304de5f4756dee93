"""The bounds in docs/security.md agree with the limits, and the unit's memory limit leaves room for them."""

from __future__ import annotations

import re
from pathlib import Path

from guestapi.notifications.subscription import MISSED_BYTES, QUEUE_BYTES
from guestapi.server.admission import Admission, ConnectionQuota
from guestapi.settings import LimitSettings
from guestapi.store.tables import PART_BYTES
from tests.hostile.arena import HOLDING, most_held

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def test_memory_of_one_instance() -> None:
    """The memory of one instance in docs/security.md follows from the default limits."""
    limits = LimitSettings()
    text = " ".join((ROOT / "docs/security.md").read_text().split())
    found = re.search(
        r"(\d+) × \((\d+) KiB head \+ (\d+) KiB body\) \+ (\d+) MiB of unread responses \+ 2 MiB: (\d+) MiB", text
    )
    assert found is not None
    stated = [int(number) for number in found.groups()]
    unread = limits.unsent_per_instance // MIB
    assert stated == [
        limits.connections_per_instance,
        limits.head // 1024,
        2 * limits.body // 1024,
        unread,
        most_held() // MIB,
    ]
    assert f"smaller events wait: {QUEUE_BYTES // MIB} MiB, kept" in text
    assert f"tests allow {HOLDING // MIB} MiB" in text


def test_memory_of_a_stream() -> None:
    """A stream holds what the document says, which is no more than what any other connection may hold."""
    limits = LimitSettings()
    text = " ".join((ROOT / "docs/security.md").read_text().split())
    found = re.search(
        r"about (\d+) KiB of entries at a time, and of an event of more than (\d+) KiB .* a part of (\d+) KiB", text
    )
    assert found is not None
    assert [int(number) * 1024 for number in found.groups()] == [MISSED_BYTES, PART_BYTES, PART_BYTES]
    # Entries as they were read, and as they are sent. The last of them may be as large as a part.
    assert limits.head + 2 * limits.body >= 2 * (MISSED_BYTES + PART_BYTES)


def test_connections_that_wait_to_be_identified() -> None:
    """As many connections of a container wait in a worker as the document says, with the descriptors of the unit."""
    unit = (ROOT / "systemd/guestapi.service").read_text()
    text = " ".join((ROOT / "docs/security.md").read_text().split())
    descriptors = re.search(r"(?m)^LimitNOFILE=(\d+)$", unit)
    stated = re.search(r"Up to (\d+),(\d+) connections of a container wait so", text)
    assert descriptors is not None
    assert stated is not None
    limits = LimitSettings()
    quota = ConnectionQuota(limits.connections_per_instance, 10_000, lambda _instance_id: None)
    pending = Admission(limits, quota, descriptors=int(descriptors[1])).pending
    waiting = sum(pending.add(pid, lambda: 1) for pid in range(1, 20_000))
    assert waiting == int(stated[1] + stated[2])


def test_unit_has_room_for_hostile_instances() -> None:
    """MemoryHigh= of the unit suffices for two workers and some hostile instances at the same time."""
    unit = (ROOT / "systemd/guestapi.service").read_text()
    high = re.search(r"(?m)^MemoryHigh=(\d+)G$", unit)
    stated = re.search(
        r"a worker has about (\d+) MiB, and one hostile instance makes it hold about (\d+) MiB",
        " ".join((ROOT / "docs/operations.md").read_text().split()),
    )
    assert high is not None
    assert stated is not None
    worker, hostile = int(stated[1]), int(stated[2])
    assert 2 * (worker + 6 * hostile) <= int(high[1]) * 1024


def test_every_step_has_a_bound_and_tests() -> None:
    """In the table of what steps cost, each step has who pays, a bound, and tests that exist."""
    text = (ROOT / "docs/decisions/0130-what-a-step-costs-and-who-pays.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert rows[0][-3:] == ["who pays", "bound", "tests"]
    assert len(rows) > 20
    for row in rows[1:]:
        step, *_cost, payer, bound, tests = row
        assert len(row) == len(rows[0]), step
        assert payer, step
        assert bound, step
        for name in tests.split(", "):
            assert (ROOT / name).is_file(), f"{step}: {name}"


def test_every_endpoint_is_in_the_table_of_steps() -> None:
    """Each module of api/resources is named beside the table, so that nobody adds one without asking who pays."""
    text = (ROOT / "docs/decisions/0130-what-a-step-costs-and-who-pays.md").read_text()
    for path in (ROOT / "guestapi/api/resources").glob("[a-z]*.py"):
        assert f"`{path.stem}`" in text, path.name
