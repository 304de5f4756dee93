"""The loop of every follower: rings, ends and changes are written once, in batches, and none is lost."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event, Lock

import pytest

from guestapi.errors import SourceError
from guestapi.model import Init
from guestapi.sources import follower
from guestapi.sources.follower import Follower
from guestapi.sources.hook import LIMIT_SECONDS
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.recorder import Status
from guestapi.sources.source import Unclear
from guestapi.store.errors import StoreBusyError
from tests.harness.following import HOOK, Inits, PlayedSource, following
from tests.harness.waiting import until

pytestmark = pytest.mark.root


#: The hook's message when the follower has not answered in time.
LATE = "lxc hook: not registered within 2 s; the follower registers it later; the container goes on without\n"


class MemoryLedger:
    """A ledger in memory, which the test can lock."""

    def __init__(self) -> None:
        self.entries: dict[str, Observed] = {}
        self.refused: dict[str, Problem] = {}
        self.statuses: list[Status] = []
        self.transactions = 0
        self.locked = False
        self.broken = ""
        self._lock = Lock()

    def known(self) -> Mapping[str, Init | None]:
        """As `Ledger.known`."""
        self._check()
        return {key: one.init for key, one in self.entries.items()}

    def write(
        self, observed: Sequence[Observed], gone: Collection[str], refused: Sequence[Problem]
    ) -> Sequence[Problem]:
        """As `Ledger.write`."""
        self._check()
        if any(one.name == self.broken for one in observed):
            raise ZeroDivisionError
        with self._lock:
            self.transactions += 1
            for one in observed:
                self.entries[one.key] = one
            for key in gone:
                self.entries.pop(key, None)
            self.refused.update({one.key: one for one in refused})
        taken = [one for one in observed if one.name == "taken"]
        return [Problem("lxc", one.key, "default", one.name, "the name is taken", refused=True) for one in taken]

    def note(self, status: Status) -> None:
        """As `Ledger.note`."""
        self._check()
        self.statuses.append(status)

    def _check(self) -> None:
        if self.locked:
            raise StoreBusyError("the store is locked")

    def init(self, name: str) -> Init | None:
        """Return the written init of a container."""
        one = self.entries.get(f"key of {name}")
        return one.init if one is not None else None

    def pid(self, name: str) -> int | None:
        """Return the PID of that init."""
        init = self.init(name)
        return init.pid if init is not None else None


@pytest.fixture
def inits() -> Iterator[Inits]:
    """Inits that end with the test."""
    with Inits() as some:
        yield some


def start_ring(doorbells: Path, name: str, pid: int) -> subprocess.Popen[str]:
    """Start a hook that rings."""
    config = doorbells / "guestapi.toml"
    if not config.exists():
        config.write_text(f'[sources]\ndoorbells = "{doorbells}"\n')
    return subprocess.Popen([*HOOK, "--config", config, "lxc", name, str(pid)], stderr=subprocess.PIPE, text=True)


def ring(doorbells: Path, name: str, pid: int) -> str:
    """Ring, and wait for the hook; return its messages."""
    process = start_ring(doorbells, name, pid)
    _none, error = process.communicate()
    assert process.returncode == 0
    return error


def test_written_when_the_hook_returns(tmp_path: Path, inits: Inits) -> None:
    """A hook without a message has registered its container; the end of the init is noticed at once."""
    ledger = MemoryLedger()
    (pid,) = inits.start()
    with following(PlayedSource(), ledger, tmp_path):
        assert ring(tmp_path, "web", pid) == ""
        assert ledger.pid("web") == pid
        inits.end(pid)
        until(lambda: ledger.pid("web") is None, "the end")
        assert "key of web" in ledger.entries


def test_restart(tmp_path: Path, inits: Inits) -> None:
    """The end of an earlier init does not stop the new run; a container that is gone is removed."""
    ledger, source = MemoryLedger(), PlayedSource()
    first, second = inits.start(2)
    with following(source, ledger, tmp_path):
        ring(tmp_path, "web", first)
        source.run("web", second)
        ring(tmp_path, "web", second)
        inits.end(first)
        looks = source.looks
        source.announce("")
        until(lambda: source.looks > looks, "another observation")
        assert ledger.pid("web") == second
        source.there.clear()
        inits.end(second)
        until(lambda: ledger.entries == {}, "its removal")


def test_changes_while_no_follower_runs(tmp_path: Path, inits: Inits) -> None:
    """A new follower writes the starts, ends and removals that happened without one."""
    ledger, source = MemoryLedger(), PlayedSource()
    old, new = inits.start(2)
    source.run("old", old)
    source.run("gone", None)
    with following(source, ledger, tmp_path):
        until(lambda: ledger.pid("old") == old and "key of gone" in ledger.entries, "the first observation")
    inits.end(old)
    source.there.clear()
    source.run("old", None)
    source.run("new", new)
    with following(source, ledger, tmp_path):
        until(lambda: ledger.pid("new") == new and "key of gone" not in ledger.entries, "the second observation")
        assert ledger.pid("old") is None
        assert "key of old" in ledger.entries


def test_changes(tmp_path: Path, inits: Inits) -> None:
    """A change causes an observation of its container; the end of the stream, one of all, and it is reopened."""
    ledger, source = MemoryLedger(), PlayedSource()
    (pid,) = inits.start()
    with following(source, ledger, tmp_path):
        until(lambda: source.looks, "the first observation")
        source.run("web", pid)
        source.announce("key of web")
        until(lambda: ledger.pid("web") == pid, "one change")
        source.run("db", None)
        source.hang_up()
        until(lambda: "key of db" in ledger.entries, "a look after the stream ended")
        source.run("cache", None)
        source.announce("key of cache")
        until(lambda: "key of cache" in ledger.entries, "the new stream")


def test_ring_during_an_observation(tmp_path: Path, inits: Inits) -> None:
    """A container that rings during an observation is not removed because that observation lacks it."""
    ledger, source = MemoryLedger(), PlayedSource()
    (pid,) = inits.start()
    with following(source, ledger, tmp_path):
        until(lambda: source.looks, "the first observation")
        observe = source.observe

        def slowly(known: Mapping[str, Init | None]) -> object:
            found = observe(known)
            ring(tmp_path, "web", pid)
            return found

        source.observe = slowly  # type: ignore[method-assign, assignment]  # replaced for this test
        looks = source.looks
        source.announce("")
        until(lambda: source.looks > looks, "another observation")
        source.observe = observe  # type: ignore[method-assign]  # restored
        source.announce("key of another")
        until(lambda: ledger.pid("web") == pid, "the ring")
        time.sleep(0.1)
        assert ledger.pid("web") == pid


def test_first_look_that_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that has just started has no fault; one whose first look does not end has one, until it ends."""
    ledger, source, ends = MemoryLedger(), PlayedSource(), Event()
    observe = source.observe

    def slowly(known: Mapping[str, Init | None]) -> object:
        ends.wait()
        return observe(known)

    source.observe = slowly  # type: ignore[method-assign, assignment]  # replaced for this test
    with following(source, ledger, tmp_path):
        until(lambda: ledger.statuses, "the first status")
        assert ledger.statuses[-1].contact > 0
        assert ledger.statuses[-1].fault == ""
        monkeypatch.setattr(follower, "_FIRST_LOOK", 0.0)
        until(lambda: ledger.statuses[-1].fault.startswith("it has not yet looked"), "the fault")
        ends.set()
        until(lambda: ledger.statuses[-1].fault == "", "the end of the fault")


def test_unclear_container_keeps_its_entry(tmp_path: Path, inits: Inits) -> None:
    """A container that cannot be examined keeps its entry, and is examined again soon."""
    ledger, source = MemoryLedger(), PlayedSource()
    (pid,) = inits.start()
    source.run("web", pid)
    with following(source, ledger, tmp_path):
        until(lambda: ledger.pid("web") == pid, "the first observation")
        source.there["key of web"] = Unclear("key of web", "its monitor is busy")
        source.run("db", None)
        source.announce("")
        until(lambda: "key of db" in ledger.entries, "another observation")
        assert ledger.pid("web") == pid
        source.run("web", pid, mood="fine")
        until(lambda: ledger.entries["key of web"].config == {"mood": "fine"}, "another look")


def test_runtime_that_fails(tmp_path: Path) -> None:
    """A runtime's failure is reported as a fault and changes no container; the fault ends with it."""
    ledger, source = MemoryLedger(), PlayedSource()
    source.run("web", None)
    with following(source, ledger, tmp_path) as notified:
        until(lambda: any(one.contact for one in ledger.statuses), "the first note")
        source.fault = "the runtime is away"
        source.announce("")
        until(lambda: ledger.statuses[-1].fault == "the runtime is away", "a fault")
        assert "key of web" in ledger.entries
        until(lambda: any("the runtime is away" in one for one in notified), "the message to systemd")
        source.fault = None
        until(lambda: ledger.statuses[-1].fault == "", "the end of the fault")


def test_locked_store(tmp_path: Path, inits: Inits) -> None:
    """While the store is locked the hook gives up and the container starts; the follower registers it later."""
    ledger = MemoryLedger()
    (pid,) = inits.start()
    with following(PlayedSource(), ledger, tmp_path) as notified:
        ledger.locked = True
        began = time.monotonic()
        assert "not registered within 2 s" in ring(tmp_path, "web", pid)
        assert time.monotonic() - began < 10
        assert ledger.pid("web") is None
        until(lambda: any("the store is locked" in one for one in notified), "the message to systemd")
        ledger.locked = False
        until(lambda: ledger.pid("web") == pid, "what was observed")
        # As observed before the init ran.
        assert ledger.entries["key of web"].devices == {}


def test_a_hook_that_is_late_rings(tmp_path: Path, inits: Inits) -> None:
    """A hook that takes longer until it rings than it would wait, on a busy host, has its container registered."""
    ledger = MemoryLedger()
    (pid,) = inits.start()
    config = tmp_path / "guestapi.toml"
    config.write_text(f'[sources]\ndoorbells = "{tmp_path}"\n')
    delay = ("-e", "trace=openat", "-P", str(config), "-e", f"inject=openat:delay_enter={LIMIT_SECONDS + 0.5:g}s")
    words = ["strace", "-o", "/dev/null", *delay, *HOOK, "--config", str(config), "lxc", "web", str(pid)]
    with following(PlayedSource(), ledger, tmp_path):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert ledger.pid("web") == pid


def test_store_that_is_created_later(tmp_path: Path, inits: Inits) -> None:
    """Without a store no ring is lost: it is written, and everything else observed, once there is a store."""
    ledger, source = MemoryLedger(), PlayedSource()
    ledger.locked = True
    one, other = inits.start(2)
    source.run("other", other)
    with following(source, ledger, tmp_path):
        waiting = start_ring(tmp_path, "one", one)
        ledger.locked = False
        assert waiting.communicate()[1] == ""
        assert ledger.pid("one") == one
        until(lambda: ledger.pid("other") == other, "the first observation")


def test_messages_of_the_hook(tmp_path: Path, inits: Inits) -> None:
    """The hook's message states why its container is not registered; one bad container affects no other one."""
    ledger = MemoryLedger()
    (pid,) = inits.start()
    with following(PlayedSource(), ledger, tmp_path):
        assert "the name is taken; the container goes on without" in ring(tmp_path, "taken", pid)
        assert "this one is wrong; make it right; the container goes on" in ring(tmp_path, "wrong", pid)
        assert "see the journal" in ring(tmp_path, "broken", pid)
        assert ring(tmp_path, "of another", pid) == ""
        ledger.broken, ledger.locked = "odd", True
        waiting = [start_ring(tmp_path, name, pid) for name in ("odd", "web")]
        ledger.locked = False
        odd, web = (one.communicate()[1] for one in waiting)
        assert web == ""
        assert "see the journal" in odd
        assert ledger.pid("web") == pid


def test_refused_by_the_source(tmp_path: Path) -> None:
    """A running container that can be no instance is recorded as a problem."""
    ledger, source = MemoryLedger(), PlayedSource()
    problem = Problem("lxc", "key of web", "default", "web", "it shares another's PID namespace", refused=True)
    source.there["key of web"] = problem
    with following(source, ledger, tmp_path):
        until(lambda: ledger.refused == {"key of web": problem}, "the problem")
        assert ledger.entries == {}


def test_restored_store(tmp_path: Path, inits: Inits) -> None:
    """Entries that were removed from the store, or restored into it, are corrected by the next look."""
    ledger, source = MemoryLedger(), PlayedSource()
    (pid,) = inits.start()
    source.run("web", pid)
    with following(source, ledger, tmp_path):
        until(lambda: ledger.pid("web") == pid, "the first observation")
        looks = source.looks
        old = source.observed("old", None)
        ledger.entries = {old.key: old}
        source.announce("")
        until(lambda: ledger.pid("web") == pid, "the running container")
        until(lambda: "key of old" not in ledger.entries, "the removal of the other")
        # One look was requested, and one made the correction; there must be no more.
        time.sleep(1)
        assert source.looks <= looks + 2


def test_starts_are_written_in_batches(tmp_path: Path, inits: Inits) -> None:
    """Thirty containers that start while the store is locked are written in one transaction, and so are their ends."""
    ledger = MemoryLedger()
    pids = inits.start(30)
    with following(PlayedSource(), ledger, tmp_path):
        until(lambda: ledger.statuses, "the first note")
        ledger.locked = True
        assert {one.communicate()[1] for one in [start_ring(tmp_path, f"c{pid}", pid) for pid in pids]} == {LATE}
        before = ledger.transactions
        ledger.locked = False
        until(lambda: all(ledger.pid(f"c{pid}") == pid for pid in pids), "all of them")
        assert ledger.transactions == before + 1
        ledger.locked = True
        for pid in pids:
            inits.end(pid)
        time.sleep(0.2)
        ledger.locked = False
        until(lambda: not any(one.init for one in ledger.entries.values()), "all ends")
        # Ends that are noticed while earlier ones are written need another transaction, on a busy machine several.
        assert ledger.transactions < before + len(pids) // 2


def test_runtime_that_hangs(tmp_path: Path, inits: Inits, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a runtime hangs, hooks still register containers; after a time the watchdog gets no more notifications."""
    monkeypatch.setattr(follower, "_HUNG", 1.0)
    ledger, source = MemoryLedger(), PlayedSource()
    (pid,) = inits.start()
    answered = Event()
    with following(source, ledger, tmp_path) as notified:
        until(lambda: source.looks, "the first observation")
        source.observe = lambda known: (answered.wait(60), [])[1]  # type: ignore[method-assign]  # it hangs
        source.announce("")
        assert ring(tmp_path, "web", pid) == ""
        assert ledger.pid("web") == pid

        def is_fed() -> bool:
            fed = notified.count("WATCHDOG=1")
            time.sleep(1.2)
            return notified.count("WATCHDOG=1") > fed

        until(lambda: not is_fed(), "missing watchdog messages")
        answered.set()
        until(is_fed, "the next watchdog message")


def test_two_hundred_at_once(tmp_path: Path, inits: Inits) -> None:
    """Two hundred containers that start at once are all written, and so are their ends."""
    ledger = MemoryLedger()
    pids = inits.start(200)
    with following(PlayedSource(), ledger, tmp_path):
        hooks = [start_ring(tmp_path, f"c{pid}", pid) for pid in pids]
        for process in hooks:
            assert process.communicate()[1] in ("", LATE)
        # On a busy machine a hook may give up; its ring is written all the same.
        until(lambda: all(ledger.pid(f"c{pid}") == pid for pid in pids), "all of them")
        for pid in pids:
            inits.end(pid)
        until(lambda: not any(one.init for one in ledger.entries.values()), "all ends")


def test_one_follower_of_a_source(tmp_path: Path) -> None:
    """A second follower of the same source does not take the doorbell from the first."""
    ledger = MemoryLedger()
    with following(PlayedSource(), ledger, tmp_path), pytest.raises(SourceError, match="another follower"):
        Follower(PlayedSource(), MemoryLedger(), tmp_path / "lxc.sock", lambda *_: None).run()
    assert not (tmp_path / "lxc.sock").exists()
