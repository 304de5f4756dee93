"""The loop of every source: what rings, ends, comes and goes is written once, in batches, and is never lost."""

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
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.recorder import Status
from guestapi.sources.source import Unclear
from guestapi.store.errors import StoreBusyError
from tests.harness.following import HOOK, Inits, PlayedSource, following, until

pytestmark = pytest.mark.root


#: What a hook says that has waited for too long.
LATE = "lxc hook: not registered within 2 s; the follower registers it later; the container goes on without\n"


class Book:
    """A ledger in memory, which can be locked."""

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
        """The init that is written of a container."""
        one = self.entries.get(f"key of {name}")
        return one.init if one is not None else None

    def pid(self, name: str) -> int | None:
        """Its PID."""
        init = self.init(name)
        return init.pid if init is not None else None


@pytest.fixture
def inits() -> Iterator[Inits]:
    """Inits, until the end of a test."""
    with Inits() as some:
        yield some


def start_ring(doorbells: Path, name: str, pid: int) -> subprocess.Popen[str]:
    """A hook that rings."""
    config = doorbells / "guestapi.toml"
    if not config.exists():
        config.write_text(f'[sources]\ndoorbells = "{doorbells}"\n')
    return subprocess.Popen([*HOOK, "--config", config, "lxc", name, str(pid)], stderr=subprocess.PIPE, text=True)


def ring(doorbells: Path, name: str, pid: int) -> str:
    """Ring, and wait; what the hook complains of."""
    process = start_ring(doorbells, name, pid)
    _none, error = process.communicate()
    assert process.returncode == 0
    return error


def test_written_when_the_hook_returns(tmp_path: Path, inits: Inits) -> None:
    """A hook that has returned without complaint means that the container is written; its end is seen at once."""
    book = Book()
    (pid,) = inits.start()
    with following(PlayedSource(), book, tmp_path):
        assert ring(tmp_path, "web", pid) == ""
        assert book.pid("web") == pid
        inits.end(pid)
        until(lambda: book.pid("web") is None, "the end")
        assert "key of web" in book.entries


def test_restart(tmp_path: Path, inits: Inits) -> None:
    """The end of an earlier init, seen late, does not stop the container that runs anew; what is gone is forgotten."""
    book, source = Book(), PlayedSource()
    first, second = inits.start(2)
    with following(source, book, tmp_path):
        ring(tmp_path, "web", first)
        source.run("web", second)
        ring(tmp_path, "web", second)
        inits.end(first)
        looks = source.looks
        source.say("")
        until(lambda: source.looks > looks, "a look")
        assert book.pid("web") == second
        source.there.clear()
        inits.end(second)
        until(lambda: book.entries == {}, "its removal")


def test_what_happened_meanwhile(tmp_path: Path, inits: Inits) -> None:
    """What came and went without a follower is seen when there is one again."""
    book, source = Book(), PlayedSource()
    old, new = inits.start(2)
    source.run("old", old)
    source.run("gone", None)
    with following(source, book, tmp_path):
        until(lambda: book.pid("old") == old and "key of gone" in book.entries, "the first look")
    inits.end(old)
    source.there.clear()
    source.run("old", None)
    source.run("new", new)
    with following(source, book, tmp_path):
        until(lambda: book.pid("new") == new and "key of gone" not in book.entries, "the second look")
        assert book.pid("old") is None
        assert "key of old" in book.entries


def test_changes(tmp_path: Path, inits: Inits) -> None:
    """A change is a place to look at, whatever it says; a stream that ends is opened anew, and all is looked at."""
    book, source = Book(), PlayedSource()
    (pid,) = inits.start()
    with following(source, book, tmp_path):
        until(lambda: source.looks, "the first look")
        source.run("web", pid)
        source.say("key of web")
        until(lambda: book.pid("web") == pid, "one change")
        source.run("db", None)
        source.hang_up()
        until(lambda: "key of db" in book.entries, "a look after the stream ended")
        source.run("cache", None)
        source.say("key of cache")
        until(lambda: "key of cache" in book.entries, "the new stream")


def test_look_that_is_out_of_date(tmp_path: Path, inits: Inits) -> None:
    """What rings while the runtime is being asked is not gone because that answer does not have it yet."""
    book, source = Book(), PlayedSource()
    (pid,) = inits.start()
    with following(source, book, tmp_path):
        until(lambda: source.looks, "the first look")
        observe = source.observe

        def slowly(known: Mapping[str, Init | None]) -> object:
            found = observe(known)
            ring(tmp_path, "web", pid)
            return found

        source.observe = slowly  # type: ignore[method-assign, assignment]  # for this test
        looks = source.looks
        source.say("")
        until(lambda: source.looks > looks, "a look")
        source.observe = observe  # type: ignore[method-assign]  # as it was
        source.say("key of another")
        until(lambda: book.pid("web") == pid, "the ring")
        time.sleep(0.1)
        assert book.pid("web") == pid


def test_one_that_cannot_be_looked_at_now(tmp_path: Path, inits: Inits) -> None:
    """A container that is there but does not answer keeps what is known of it, and is asked again soon."""
    book, source = Book(), PlayedSource()
    (pid,) = inits.start()
    source.run("web", pid)
    with following(source, book, tmp_path):
        until(lambda: book.pid("web") == pid, "the first look")
        source.there["key of web"] = Unclear("key of web", "its monitor is busy")
        source.run("db", None)
        source.say("")
        until(lambda: "key of db" in book.entries, "a look")
        assert book.pid("web") == pid
        source.run("web", pid, mood="fine")
        until(lambda: book.entries["key of web"].config == {"mood": "fine"}, "another look")


def test_runtime_that_is_away(tmp_path: Path) -> None:
    """A runtime that cannot be asked is a fault that is told, and changes nothing else; then all is well again."""
    book, source = Book(), PlayedSource()
    source.run("web", None)
    with following(source, book, tmp_path) as told:
        until(lambda: any(one.contact for one in book.statuses), "the first note")
        source.fault = "the runtime is away"
        source.say("")
        until(lambda: book.statuses[-1].fault == "the runtime is away", "a fault")
        assert "key of web" in book.entries
        until(lambda: any("the runtime is away" in one for one in told), "what systemd is told")
        source.fault = None
        until(lambda: book.statuses[-1].fault == "", "the end of the fault")


def test_locked_store(tmp_path: Path, inits: Inits) -> None:
    """While the store is locked the hook gives up and the container starts; the follower writes it down afterwards."""
    book = Book()
    (pid,) = inits.start()
    with following(PlayedSource(), book, tmp_path) as told:
        book.locked = True
        began = time.monotonic()
        assert "not registered within 2 s" in ring(tmp_path, "web", pid)
        assert time.monotonic() - began < 10
        assert book.pid("web") is None
        until(lambda: any("the store is locked" in one for one in told), "what systemd is told")
        book.locked = False
        until(lambda: book.pid("web") == pid, "what was observed")
        # What was seen before the init ran.
        assert book.entries["key of web"].devices == {}


def test_store_that_comes_late(tmp_path: Path, inits: Inits) -> None:
    """Without a store nothing is lost: what rings is looked at, and everything else once there is a store."""
    book, source = Book(), PlayedSource()
    book.locked = True
    one, other = inits.start(2)
    source.run("other", other)
    with following(source, book, tmp_path):
        waiting = start_ring(tmp_path, "one", one)
        book.locked = False
        assert waiting.communicate()[1] == ""
        assert book.pid("one") == one
        until(lambda: book.pid("other") == other, "the first look")


def test_answers(tmp_path: Path, inits: Inits) -> None:
    """A hook is told why its container is not registered; one bad container is its own misfortune alone."""
    book = Book()
    (pid,) = inits.start()
    with following(PlayedSource(), book, tmp_path):
        assert "the name is taken; the container goes on without" in ring(tmp_path, "taken", pid)
        assert "this one is wrong; make it right; the container goes on" in ring(tmp_path, "wrong", pid)
        assert "see the journal" in ring(tmp_path, "broken", pid)
        assert ring(tmp_path, "of another", pid) == ""
        book.broken, book.locked = "odd", True
        waiting = [start_ring(tmp_path, name, pid) for name in ("odd", "web")]
        book.locked = False
        odd, web = (one.communicate()[1] for one in waiting)
        assert web == ""
        assert "see the journal" in odd
        assert book.pid("web") == pid


def test_refused_by_the_source(tmp_path: Path) -> None:
    """What runs and can be no instance is a problem, and no instance."""
    book, source = Book(), PlayedSource()
    problem = Problem("lxc", "key of web", "default", "web", "it shares another's PID namespace", refused=True)
    source.there["key of web"] = problem
    with following(source, book, tmp_path):
        until(lambda: book.refused == {"key of web": problem}, "the problem")
        assert book.entries == {}


def test_store_that_was_put_back(tmp_path: Path, inits: Inits) -> None:
    """What somebody else has taken out of the store, or put back into it, is set right by the next look."""
    book, source = Book(), PlayedSource()
    (pid,) = inits.start()
    source.run("web", pid)
    with following(source, book, tmp_path):
        until(lambda: book.pid("web") == pid, "the first look")
        looks = source.looks
        old = source.observed("old", None)
        book.entries = {old.key: old}
        source.say("")
        until(lambda: book.pid("web") == pid, "what is there")
        until(lambda: "key of old" not in book.entries, "what is not")
        # One look that was asked for, one that has set it right; and no more.
        time.sleep(1)
        assert source.looks <= looks + 2


def test_what_came_together_is_written_together(tmp_path: Path, inits: Inits) -> None:
    """Thirty containers that start while the store is locked are one transaction, and so are their ends."""
    book = Book()
    pids = inits.start(30)
    with following(PlayedSource(), book, tmp_path):
        until(lambda: book.statuses, "the first note")
        book.locked = True
        assert {one.communicate()[1] for one in [start_ring(tmp_path, f"c{pid}", pid) for pid in pids]} == {LATE}
        before = book.transactions
        book.locked = False
        until(lambda: all(book.pid(f"c{pid}") == pid for pid in pids), "all of them")
        assert book.transactions == before + 1
        book.locked = True
        for pid in pids:
            inits.end(pid)
        time.sleep(0.2)
        book.locked = False
        until(lambda: not any(one.init for one in book.entries.values()), "all ends")
        # Those that are seen while the first of them are being written are another one.
        assert book.transactions <= before + 3


def test_runtime_that_hangs(tmp_path: Path, inits: Inits, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a runtime does not answer, containers are registered by their hooks; in the end systemd is not fed."""
    monkeypatch.setattr(follower, "_HUNG", 1.0)
    book, source = Book(), PlayedSource()
    (pid,) = inits.start()
    answered = Event()
    with following(source, book, tmp_path) as told:
        until(lambda: source.looks, "the first look")
        source.observe = lambda known: (answered.wait(60), [])[1]  # type: ignore[method-assign]  # it hangs
        source.say("")
        assert ring(tmp_path, "web", pid) == ""
        assert book.pid("web") == pid

        def is_fed() -> bool:
            fed = told.count("WATCHDOG=1")
            time.sleep(1.2)
            return told.count("WATCHDOG=1") > fed

        until(lambda: not is_fed(), "the watchdog's hunger")
        answered.set()
        until(is_fed, "the next feeding")


def test_two_hundred_at_once(tmp_path: Path, inits: Inits) -> None:
    """Two hundred containers that start at once are all written, and their ends too."""
    book = Book()
    pids = inits.start(200)
    with following(PlayedSource(), book, tmp_path):
        hooks = [start_ring(tmp_path, f"c{pid}", pid) for pid in pids]
        for process in hooks:
            assert process.communicate()[1] in ("", LATE)
        # On a machine that is busy a hook may have been too slow to wait for; what it has rung for is written.
        until(lambda: all(book.pid(f"c{pid}") == pid for pid in pids), "all of them")
        for pid in pids:
            inits.end(pid)
        until(lambda: not any(one.init for one in book.entries.values()), "all ends")


def test_one_follower_of_a_source(tmp_path: Path) -> None:
    """A second follower of the same source does not take the doorbell from the first."""
    book = Book()
    with following(PlayedSource(), book, tmp_path), pytest.raises(SourceError, match="another follower"):
        Follower(PlayedSource(), Book(), tmp_path / "lxc.sock", lambda *_: None).run()
    assert not (tmp_path / "lxc.sock").exists()
