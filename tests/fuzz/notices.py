"""Notices: an operator and guests over a real store, in any order, beside a model of what each must be answered."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from guestapi.api.app import create
from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller
from guestapi.callers.namespaces import boot_id
from guestapi.model import Init, Instance
from guestapi.notifications.broker import Broker
from guestapi.settings import LimitSettings, Settings, StoreSettings
from guestapi.store import notices, steps
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import find_instance, get_instance
from guestapi.store.notices import Notice
from guestapi.store.reading import Reader
from guestapi.store.writing import Writer
from tests.api.fakes import ROOT, Answered, Client, EmptyLog, MemoryStore, StandIn

_URL = "/1.0/guestapi/notices"
_NAMES = ("c1", "c2")
#: How many steps of an input are taken.
_MOST = 40
#: The most seconds by which a step sets a clock or lets time pass.
_SECONDS = 10**7
#: The clocks at the beginning of an input: seconds of Unix time, and since boot.
_WALL, _BOOT = 1_800_000_000.0, 5000.0
_KINDS = {"stop", "restart", "migrate", "freeze"}
_UNKNOWN = (500, b"pid not in container?\n")


class RealNotices(MemoryStore):
    """A store of which instances and notices are in a real database."""

    def __init__(self) -> None:
        super().__init__(None)
        directory = Path(tempfile.mkdtemp(prefix="guestapi-fuzz-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        settings = Settings(store=StoreSettings(url=f"sqlite:///{directory}/store.db"))
        self.writer = Writer(settings, create=True)
        self.reader = Reader(settings.store.url)

    def instance(self, instance_id: int) -> Instance | None:
        """As the real store."""
        return self.reader.instance(instance_id)

    def notices(self, instance_id: int) -> list[Notice]:
        """As the real store."""
        return self.reader.notices(instance_id)

    def acknowledge(self, instance: Instance, notice_id: str) -> bool:
        """As the real store."""
        return self.writer.acknowledge(instance, notice_id)


@dataclass(eq=False)
class Process:
    """The init of an instance, and all that was identified by it.

    Attributes:
        name: of the instance.
        caller: as the service knows it.
        instance: as a worker has it that has admitted a request of this run.
        present: the instance runs, and this is the run.
    """

    name: str
    caller: Caller
    instance: Instance
    present: bool = True
    living: bool = True


@dataclass(eq=False)
class Announced:
    """A notice, as the model has it.

    Attributes:
        id: of the notice.
        process: for whose run it is.
        kind: its type.
        text: its text.
        due: in seconds since boot.
        told: the statuses that the change log must have, in order.
        over: it was cancelled.
    """

    id: str
    process: Process
    kind: str
    text: str
    due: float
    told: list[str] = field(default_factory=lambda: ["pending"])
    over: bool = False


class NoticeModel:
    """Two instances, their guests, the operator and the clocks; and what the model knows of them."""

    def __init__(self, store: RealNotices, client: Client) -> None:
        self.store = store
        self.client = client
        self.wall, self.boot = _WALL, _BOOT
        #: Every process that was an init, in order.
        self.processes: list[Process] = []
        #: Every notice, in order.
        self.announced: list[Announced] = []
        self._inits = 0
        for name in _NAMES:
            self.add(name)
            self.start(name)

    def add(self, name: str) -> None:
        """Add an instance, in the place of one of that name."""
        with self.store.writer.change() as change:
            if (found := find_instance(change, "default", name)) is not None:
                steps.remove(change, found)
            steps.add(change, "default", name)
        # The removal takes its notices without a word.
        self._end(name)

    def start(self, name: str) -> None:
        """Start an instance, which may run, with another init."""
        self._inits += 1
        self._start(name, Init(self._inits, self._inits, boot_id(), self._inits))

    def again(self, name: str) -> None:
        """Stop and start an instance with the same init, if it runs."""
        if (process := self.present(name)) is not None:
            init = process.instance.init
            assert init is not None
            self.stop(name)
            self._start(name, init)

    def _start(self, name: str, init: Init) -> None:
        with self.store.writer.change() as change:
            started = steps.start(change, get_instance(change, "default", name), init)
        self._end(name)
        stand_in = StandIn()
        stand_in.init = init
        who = Caller(Credentials(1, ROOT, ROOT), started.id, started.run, stand_in)
        self.processes.append(Process(name, who, started))

    def stop(self, name: str) -> None:
        """Stop an instance, which may be stopped."""
        with self.store.writer.change() as change:
            steps.stop(change, get_instance(change, "default", name))
        self._end(name)

    def present(self, name: str) -> Process | None:
        """The init of an instance now."""
        return next((one for one in self.processes if one.name == name and one.present), None)

    def kill(self, name: str) -> None:
        """End the init of an instance, which the store does not know yet."""
        if (process := self.present(name)) is not None:
            process.living = False
            assert isinstance(process.caller.init, StandIn)
            process.caller.init.living = False

    def _end(self, name: str) -> None:
        if (process := self.present(name)) is not None:
            process.present = False

    def current(self, process: Process) -> list[Announced]:
        """What is announced to a process and is not past, the next first."""
        found = [one for one in self.announced if one.process is process and not one.over and one.due > self.boot]
        return sorted(found, key=lambda one: (one.due, one.id))

    def send(self, name: str, seconds: int, what: str) -> None:
        """Announce something, if that can be."""
        process = self.present(name)
        right = 0 < len(what.encode(errors="replace")) <= 1024 and bool(what.strip()) and _is_unicode(what)
        expected = process is not None and right and len(self.current(process)) < 16
        try:
            with self.store.writer.change() as change:
                sent = notices.send(change, get_instance(change, "default", name), what, seconds)
        except ConflictError:
            assert not expected, "a right notice is refused"
            return
        assert expected
        assert process is not None
        kind, text = (what, "") if what in _KINDS else ("text", what)
        assert all(sent.id != one.id for one in self.announced)
        self.announced.append(Announced(sent.id, process, kind, text, self.boot + seconds))

    def cancel(self, name: str, which: Announced | None) -> None:
        """Take a notice of an instance back, or all."""
        process = self.present(name)
        current = [] if process is None else self.current(process)
        chosen = current if which is None else [one for one in current if one is which]
        try:
            with self.store.writer.change() as change:
                found = notices.cancel(
                    change, get_instance(change, "default", name), None if which is None else which.id
                )
        except ConflictError:
            assert which is not None
            assert not chosen
            return
        assert [one.id for one in found] == [one.id for one in chosen]
        for one in chosen:
            one.over = True
            one.told.append("cancelled")

    def acknowledge(self, process: Process, written: str) -> None:
        """Have a guest acknowledge a notice, by an id as it is written in the URL; check the answer."""
        expected: tuple[int, bytes] = (404, b"not found\n")
        found = next((one for one in self.current(process) if one.id == written), None)
        if not (process.present and process.living):
            expected = _UNKNOWN
        elif found is not None:
            expected = (204, b"")
        answer = self._ask(process, f"{_URL}/{written}/ack", "POST")
        if answer.status in (307, 405) and (not written or "/" in written or set(written) <= {"."}):
            return  # An unclean path, or one that has no such resource.
        assert (answer.status, answer.body) == expected, (written, answer)
        if answer.status == 204:
            assert found is not None
            if "acknowledged" not in found.told:
                found.told.append("acknowledged")

    def acknowledge_late(self, process: Process, chosen: Announced) -> None:
        """Have a worker record what a guest said whose request it has admitted before; check what it is told."""
        expected = process.present and chosen in self.current(process)
        assert self.store.acknowledge(process.instance, chosen.id) == expected
        if expected and "acknowledged" not in chosen.told:
            chosen.told.append("acknowledged")

    def check_list(self, process: Process) -> None:
        """Have a guest list its notices; check the answer."""
        answer = self._ask(process, _URL, "GET")
        if not (process.present and process.living):
            assert (answer.status, answer.body) == _UNKNOWN, answer
            return
        assert answer.status == 200, answer
        assert answer.headers["cache-control"] == "no-store"
        expected = [
            {
                "id": one.id,
                "type": one.kind,
                "text": one.text,
                "not_before": datetime.fromtimestamp(self.wall + one.due - self.boot, UTC),
                "status": "acknowledged" if "acknowledged" in one.told else "pending",
            }
            for one in self.current(process)
        ]
        found = json.loads(answer.body)
        assert [{**one, "not_before": datetime.fromisoformat(one["not_before"])} for one in found] == expected

    def _ask(self, process: Process, path: str, method: str) -> Answered:
        self.client.who = process.caller
        return self.client.ask(path, method)

    @contextmanager
    def clocks(self) -> Iterator[None]:
        """Have notices see the clocks of this field."""
        clock = SimpleNamespace(time=lambda: self.wall, clock_gettime=lambda _clock: self.boot, CLOCK_BOOTTIME=None)
        with patch.object(notices, "time", clock):
            yield


@cache
def _parts() -> tuple[RealNotices, Client]:
    store = RealNotices()
    client = Client(store)
    # How often an instance may write is another test's.
    limits = LimitSettings(writes_per_second=1e6, writes_burst=10**6)
    client.application = create(store, Broker(EmptyLog(), queue_limit=10, subscriptions_per_instance=1), limits)
    return store, client


def check_notices(data: bytes) -> None:
    """Take the steps in `data`, which NUL separates, and compare each answer with a model.

    A step is a verb, the number of an instance or of a process, and what the verb needs; see `_step`.

    Raises:
        AssertionError: an answer, or what is told in the end, differs from the model's.
    """
    store, client = _parts()
    began = store.reader.latest()
    field_ = NoticeModel(store, client)
    with field_.clocks():
        for part in data.split(b"\0")[:_MOST]:
            _step(field_, part.decode("utf-8", "surrogateescape"))
        for process in field_.processes:
            field_.check_list(process)
    told: dict[str, list[tuple[int, str]]] = {}
    after, more = began, True
    while more:
        entries = store.reader.entries(after, 100)
        more = entries.more
        for entry in entries.found:
            after = entry.id
            if entry.type == "notice":
                document = json.loads(entry.metadata)
                told.setdefault(document["id"], []).append((entry.instance_id, document["status"]))
    assert told == {
        one.id: [(one.process.caller.instance_id, status) for status in one.told] for one in field_.announced
    }


def _step(field_: NoticeModel, line: str) -> None:
    """Take a step: a line that is none does nothing."""
    verb, number, words = [*line.split(" ", 2), "", ""][:3]
    if not (number.isascii() and number.isdigit() and len(number) < 8):
        return
    name, process = _NAMES[int(number) % len(_NAMES)], field_.processes[int(number) % len(field_.processes)]
    chosen = field_.announced[int(words) % len(field_.announced)] if field_.announced and _is_number(words) else None
    seconds, _space, what = words.partition(" ")
    simple: dict[str, Callable[[str], None]] = {
        "start": field_.start,
        "again": field_.again,
        "stop": field_.stop,
        "add": field_.add,
        "kill": field_.kill,
    }
    if verb in simple:
        simple[verb](name)
    elif verb == "rename":
        with field_.store.writer.change() as change:
            instance = get_instance(change, "default", name)
            renamed = steps.rename(change, instance, "default", f"{name}-b")
            steps.rename(change, renamed, "default", name)
    elif verb == "send" and _is_number(seconds):
        field_.send(name, 1 + int(seconds) % _SECONDS, what)
    elif verb == "cancel":
        field_.cancel(name, chosen)
    elif verb == "list":
        field_.check_list(process)
    elif verb == "ack" and chosen is not None:
        field_.acknowledge(process, chosen.id)
    elif verb == "late" and chosen is not None:
        field_.acknowledge_late(process, chosen)
    elif verb == "own" and (running := field_.present(name)) is not None and (own := field_.current(running)):
        # A right one, twice.
        for _time in range(2):
            field_.acknowledge(running, own[int(number) % len(own)].id)
    elif verb == "raw" and words.isascii() and words.isprintable() and not set(words) & set(" ?#%"):
        field_.acknowledge(process, words)
    elif verb == "like" and field_.announced:
        right = field_.announced[int(number) % len(field_.announced)].id
        for other in (right[:-1], f"{right}0", right.upper(), f"0{right}"):
            if other != right:
                field_.acknowledge(process, other)
    elif verb == "pass":
        field_.boot += int(number) % _SECONDS
        field_.wall += int(number) % _SECONDS
    elif verb in ("on", "back"):
        field_.wall += int(number) % _SECONDS * (1 if verb == "on" else -1)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 8


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
