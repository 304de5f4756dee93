"""docs/fleet.md says what happens when each part breaks, and each row of that table is a test."""

from __future__ import annotations

import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
#: What breaks, by the first words of its row; the module below tests/ that shows it, and the test.
TESTS = {
    "the database cannot be reached": "fleet/test_follower.py::test_check",
    "the process of a server is stopped": "fleet_faults/test_faults.py::test_the_primary_is_stopped_and_continued",
    "the database is busy": "fleet/test_follower.py::test_a_database_that_is_busy",
    "a command's server is stopped": "fleet/test_stopped_server.py::test_a_question_ends",
    "the server is lost while it commits": "fleet/test_operating.py::test_a_commit_whose_answer_was_lost",
    "no standby confirms a change": "fleet/test_operating.py::test_without_a_standby",
    "the primary is lost": "fleet_faults/test_faults.py::test_the_primary_is_killed",
    "a standby loses its disk": "fleet_faults/test_faults.py::test_a_standby_loses_its_disk",
    "all standbys are away": "fleet_faults/test_faults.py::test_both_standbys_are_away",
    "a primary that was replaced wakes up": "fleet/test_follower.py::test_older_timeline",
    "another database answers": "fleet/test_follower.py::test_older_timeline",
    "the network is slow, or loses connections": "fleet_faults/test_faults.py::test_the_network_drops_and_delays",
    "a clock is set": "fleet_faults/test_faults.py::test_clocks_are_set_back",
    "a host was away for a while": "fleet/test_follower.py::test_a_lost_session",
    "a host was away for long": "fleet_faults/test_faults.py::test_the_log_is_trimmed_while_a_host_is_away",
    "the store of a host is lost or replaced": "fleet_faults/test_faults.py::test_stores_are_lost_and_put_back",
    "the follower is killed": "fleet_faults/test_faults.py::test_followers_are_killed_at_every_commit",
    "a host is cut off while an instance is to go from it": (
        "fleet_faults/test_faults.py::test_a_host_is_cut_off_before_it_hears_of_a_move"
    ),
    "a host is cut off or killed at a later step": (
        "fleet_faults/test_faults.py::test_a_host_is_cut_off_at_a_step_of_a_move"
    ),
    "a host is fenced": "fleet/test_follower.py::test_fenced",
    "guestapi on a host is too old": "fleet/test_follower.py::test_version",
    "a value that a store cannot take": "fleet/test_follower.py::test_what_cannot_be_taken",
    "a profile cannot be taken": "fleet/test_profiles.py::test_an_instance_that_is_too_large_on_its_host",
}


def test_each_row_is_a_test() -> None:
    """Rows and tests belong together, and these tests exist."""
    text = (CHECKOUT / "docs/fleet.md").read_text().partition("## When a part breaks")[2]
    rows = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)[1:]
    rows = [row for row in rows if not row.startswith("---")]
    assert rows
    for row in rows:
        assert len([begin for begin in TESTS if row.startswith(begin)]) == 1, row
    assert len(rows) == len(TESTS)
    for place in TESTS.values():
        module, _, name = place.partition("::")
        assert f"\ndef {name}(" in (CHECKOUT / "tests" / module).read_text(), place
