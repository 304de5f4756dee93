"""`Shares` and `Door`: who may have how many connections, and at whose cost room is made. All without a socket."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from guestapi.server.door import Door
from guestapi.server.shares import TOO_MANY, Shares
from tests.api.fakes import caller


@dataclass(eq=False)
class Holding:
    """A connection that says what it is doing, and notes that it was ended."""

    idle: bool = False
    ended: bool = False

    def abort(self) -> None:
        """Note it."""
        self.ended = True


def shares(each: int = 4, most: int = 10) -> tuple[Shares, list[int | None]]:
    """Shares, and whose connections were ended for others."""
    ended: list[int | None] = []
    return Shares(each, most, ended.append), ended


def enter(held: Shares, instance_id: int | None, count: int = 1, *, idle: bool = False) -> list[Holding]:
    """So many connections of an instance that are let in."""
    made = [Holding(idle) for _number in range(count)]
    assert [held.enter(instance_id, one) for one in made] == [None] * count
    return made


def test_each_has_so_many() -> None:
    """An instance has as many as it may and no more, another one has its own, and one that ends makes place."""
    held, _ended = shares()
    first, *_others = enter(held, 1, 4)
    assert held.enter(1, Holding()) == TOO_MANY
    assert held.excess(1) == TOO_MANY
    enter(held, 2, 4)
    held.leave(1, first)
    held.leave(1, first)
    enter(held, 1)
    assert held.enter(1, Holding()) == TOO_MANY


def test_unknown_callers_share() -> None:
    """All callers in no known instance have one share, and over it hear what they would hear in any case: 500."""
    held, _ended = shares()
    enter(held, None, 4)
    excess = held.enter(None, Holding())
    assert excess
    assert (excess.status, excess.text) == (500, "pid not in container?")


def test_room_is_made_at_the_cost_of_the_greediest() -> None:
    """With no place left, whoever has fewest gets one of whoever has most: an idle one if there is, else the oldest."""
    held, ended = shares()
    greedy = enter(held, 1, 3)
    idle = enter(held, 1, idle=True)
    enter(held, 2, 3)
    enter(held, 3, 3)
    enter(held, 4)
    assert ended == [1]
    assert [one.ended for one in (*greedy, *idle)] == [False, False, False, True]
    # Now 1, 2 and 3 have three each; 4 has one and may have a second, so that it has fewer than others still.
    enter(held, 4)
    assert len(ended) == 2
    # Nobody has two more than 2, 3 or 4 have: who takes whose would go on for ever.
    excess = held.enter(4, Holding())
    assert excess
    assert (excess.status, excess.limit) == (500, "worker_connections")
    assert len(ended) == 2


def test_full_before_the_most() -> None:
    """When descriptors are short, that is full too, whatever the number."""
    held, ended = shares(most=1000)
    enter(held, 1, 3)
    assert held.enter(2, Holding(), full=True) is None
    assert ended == [1]
    excess = held.enter(3, Holding(), full=True)
    assert excess is None
    assert held.enter(4, Holding(), full=True) is not None


def test_lingering_is_bounded() -> None:
    """Of an instance's refused connections only some are kept until their clients have seen why."""
    held, _ended = shares()
    count = 0
    while held.linger(1):
        count += 1
        assert count < 100
    assert held.linger(2)
    held.lingered(1)
    assert held.linger(1)
    assert not held.linger(1)


@given(st.lists(st.tuples(st.sampled_from([None, 1, 2, 3, 4, 5]), st.booleans(), st.booleans()), max_size=80))
def test_never_more_than_there_is(steps: list[tuple[int | None, bool, bool]]) -> None:
    """Whoever comes and goes in whatever order: nobody has more than its share, and all together not more than all."""
    held, _ended = shares(each=4, most=9)
    living: list[tuple[int | None, Holding]] = []
    for instance_id, comes, idle in steps:
        if comes:
            one = Holding(idle)
            if held.enter(instance_id, one) is None:
                living.append((instance_id, one))
        else:
            for pair in [pair for pair in living if pair[0] == instance_id][:1]:
                held.leave(*pair)
                living.remove(pair)
        living = [pair for pair in living if not pair[1].ended]
        assert len(living) <= 9
        counts = [sum(whose == other for whose, _one in living) for other in (None, 1, 2, 3, 4, 5)]
        assert max(counts) <= 4
        if len(living) == 9:
            # Whoever has none gets one, or all have one at the most.
            poor = next((other for other in (1, 2, 3, 4, 5) if counts[(None, 1, 2, 3, 4, 5).index(other)] == 0), None)
            if poor is not None and max(counts) > 1:
                fresh = Holding()
                assert held.enter(poor, fresh) is None
                held.leave(poor, fresh)
                living = [pair for pair in living if not pair[1].ended]


def test_door_keeps_count_by_process() -> None:
    """Of one process no more may wait than an instance may have; another one's are let in."""
    door = Door(3)
    assert [door.come(7) for _time in range(4)] == [True, True, True, False]
    assert door.come(8)
    assert door.why_not(7) == (None, TOO_MANY)
    door.go(7, caller(instance_id=42))
    assert door.come(7)
    assert not door.come(7)
    assert door.why_not(7) == (42, TOO_MANY)
    for _time in range(3):
        door.go(7, caller(instance_id=42))
    assert door.of_one()
    assert [door.come(7) for _time in range(4)] == [True, True, True, False]


def test_door_tells_strangers_what_they_hear_anyway() -> None:
    """A process of which is known that it is in no known instance is told so; one that was not looked at is not."""
    door = Door(2)
    for _time in range(3):
        door.come(7)
    door.go(7, None)
    door.come(7)
    assert not door.come(7)
    assert door.why_not(7) == (None, TOO_MANY)
    door.go(7, caller(instance_id=None))
    door.come(7)
    assert not door.come(7)
    assert door.why_not(7)[1].status == 500


def test_full_door_is_open_for_who_has_none() -> None:
    """However many wait of however many processes, one of which none waits is let in."""
    door = Door(300)
    for pid in range(1, 5):
        for _time in range(256):
            door.come(pid)
    assert not door.come(1)
    assert door.come(5)
    assert not door.come(5)
