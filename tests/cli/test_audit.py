"""What the journal has of changes: who made them and what was changed, never to which value."""

from __future__ import annotations

import ast
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import guestapi as package
from guestapi import audit_log
from guestapi.audit import ACTIONS, FIELDS, MOST_NAMES, MOST_RECORDS, AuditRecord
from guestapi.model import KeyPolicy
from guestapi.sources.ledger import StoreLedger
from guestapi.sources.observed import Observed
from guestapi.store import policies, steps
from guestapi.store.lookup import get_instance
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.store.processes import init

Entry = dict[str, list[str]]


class Journal:
    """Takes entries in the place of the journal."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(path))

    def read(self) -> list[Entry]:
        """The entries that came since the last call."""
        found = []
        while True:
            try:
                found.append(parse(self._socket.recv(1 << 20)))
            except BlockingIOError:
                return found

    def close(self) -> None:
        """Take no more."""
        self._socket.close()


def parse(data: bytes) -> Entry:
    """The fields of an entry (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    entry: Entry = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + size], data[9 + size :]
        entry.setdefault(name.decode(), []).append(value.decode())
    return entry


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """A journal of the test's own."""
    path = tmp_path / "journal"
    monkeypatch.setattr(audit_log, "JOURNAL", str(path))
    taken = Journal(path)
    yield taken
    taken.close()


def done(entries: list[Entry]) -> list[tuple[str, str]]:
    """Actions and instances of entries."""
    return [(one["AUDIT_ACTION"][0], one.get("INSTANCE", [""])[0]) for one in entries]


def test_operator(guestapi: Guestapi, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of a command is recorded with its user and its words, with keys and without a value."""
    monkeypatch.setenv("SUDO_USER", "alice")
    guestapi.good("instance", "add", "web", "--config", "user.password=hunter2", "--device", "eth0,type=nic,mtu=1499")
    guestapi.good("config", "set", "web", "user.token=hunter2", "user.b=hunter2")
    guestapi.good("config", "unset", "web", "user.b", "user.none")
    guestapi.good("profile", "create", "p", "user.shared=hunter2")
    guestapi.good("profile", "assign", "web", "p")
    guestapi.good("profile", "set", "p", "user.shared=hunter3")
    guestapi.good("instance", "rename", "web", "db")
    guestapi.good("config", "show", "db")
    guestapi.good("instance", "remove", "db")
    entries = journal.read()
    assert done(entries) == [
        ("instance.add", "web"),
        ("instance.configure", "web"),
        ("instance.configure", "web"),
        ("profile.create", ""),
        ("instance.configure", "web"),
        ("profile.edit", ""),
        ("instance.rename", "db"),
        ("instance.remove", "db"),
    ]
    assert [one.get("AUDIT_KEY", []) for one in entries[:4]] == [
        ["user.password"],
        ["user.b", "user.token"],
        ["user.b"],
        ["user.shared"],
    ]
    assert entries[0]["AUDIT_DEVICE"] == ["eth0"]
    assert entries[4]["AUDIT_PROFILE"] == ["p"]
    assert entries[5]["AUDIT_COUNT"] == ["1"]
    assert entries[6]["AUDIT_BEFORE"] == ["default/web"]
    assert entries[1]["AUDIT_COMMAND"] == ["guestapi config set"]
    for entry in entries:
        assert (entry["AUDIT_BY"], entry["AUDIT_SUDO_USER"]) == (["operator"], ["alice"])
        assert entry["AUDIT_USER"]
        text = repr(entry)
        assert "hunter" not in text
        assert "1499" not in text
        known = {*FIELDS, "MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER", "LOGGER", "INSTANCE", "PROJECT"}
        assert entry.keys() <= known


def test_what_changes_nothing_is_not_recorded(guestapi: Guestapi, journal: Journal) -> None:
    """A command that fails, or finds everything as it is to be, leaves no entry."""
    guestapi.good("instance", "add", "web", "--config", "user.a=1")
    guestapi.good("profile", "create", "p", "user.a=1")
    journal.read()
    guestapi.good("config", "set", "web", "user.a=1")
    guestapi.good("profile", "set", "p", "user.a=1")
    guestapi.fails("instance", "add", "web")
    guestapi.fails("config", "set", "none", "user.a=1")
    assert journal.read() == []


def test_source(guestapi: Guestapi, journal: Journal) -> None:
    """What a source was observed to have done is recorded as the source's."""
    ledger = StoreLedger(guestapi.settings, "lxc", Path("/run/lxc.sock"))
    observed = Observed("k", "default", "web", init=init(100), config={"user.a": "secret"})
    ledger.write([observed], (), ())
    ledger.write([observed], (), ())
    ledger.write([replace(observed, config={"user.b": "secret"})], (), ())
    ledger.write((), {"k"}, ())
    entries = journal.read()
    actions = ["instance.add", "instance.start", "instance.configure", "instance.remove"]
    assert done(entries) == [(action, "web") for action in actions]
    assert entries[2]["AUDIT_KEY"] == ["user.a", "user.b"]
    assert {(one["AUDIT_BY"][0], one["AUDIT_SOURCE"][0]) for one in entries} == {("source", "lxc")}
    assert "secret" not in repr(entries)


def test_guest_cannot_flood_it(guestapi: Guestapi, journal: Journal) -> None:
    """What a guest changes is recorded some times; then it is counted, and the count is in the next entry."""
    guestapi.good("instance", "add", "web")
    guestapi.good("instance", "add", "quiet")
    writer = Writer(guestapi.settings, audit=audit_log.by_guest())
    with Writer(guestapi.settings).change() as change:
        web = steps.start(change, get_instance(change, "default", "web"), init(1))
        quiet = steps.start(change, get_instance(change, "default", "quiet"), init(2))
    journal.read()
    for number in range(200):
        assert writer.set_ready(web.id, web.run, number % 2 == 0)
    flood = len(journal.read())
    assert 50 <= flood <= 100
    # Another instance's entries are not left out.
    assert writer.set_ready(quiet.id, quiet.run, True)
    (entry,) = journal.read()
    assert (entry["AUDIT_BY"], entry["INSTANCE"]) == (["guest"], ["quiet"])


def test_large_changes_are_counted(guestapi: Guestapi, journal: Journal) -> None:
    """Of a change of very much, some things are recorded one by one, and the others counted."""
    found: list[AuditRecord] = []
    writer = Writer(guestapi.settings, create=True, audit=found.extend)
    with writer.change() as change:
        for number in range(MOST_RECORDS + 7):
            steps.add(change, "default", f"c{number}")
    assert len(found) == MOST_RECORDS + 1
    assert found[-1] == AuditRecord("more", noticed=7)
    keys = tuple(f"user.{number}" for number in range(MOST_NAMES + 3))
    audit_log.by_operator("guestapi config set")([AuditRecord("instance.configure", "default", "c\n1", keys)])
    (entry,) = journal.read()
    assert entry["AUDIT_KEY"] == list(keys[:MOST_NAMES])
    assert entry["INSTANCE"] == ["c\n1"]
    assert "and 3 more" in entry["MESSAGE"][0]
    assert "\n" not in entry["MESSAGE"][0]


def test_without_a_journal(guestapi: Guestapi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no journal is, changes are made all the same, without a word."""
    monkeypatch.setattr(audit_log, "JOURNAL", str(tmp_path / "none"))
    guestapi.good("instance", "add", "web")


def test_policies(guestapi: Guestapi) -> None:
    """Policies, and values that are given once, are recorded by key and pattern."""
    found: list[AuditRecord] = []
    writer = Writer(guestapi.settings, create=True, audit=found.extend)
    with writer.change() as change:
        steps.add(change, "default", "web", config={"user.once": "secret"})
        steps.start(change, get_instance(change, "default", "web"), init(1))
        policies.put(change, "default", None, KeyPolicy("user.once", once=True))
    with writer.change() as change:
        web = get_instance(change, "default", "web")
        assert policies.spend(change, web, "user.once", 1, 0) == "secret"
    assert [one.action for one in found] == ["instance.add", "instance.start", "policy.put", "key.spend"]
    assert found[-1].keys == ("user.once",)
    assert "secret" not in repr(found)


def test_catalogue_is_complete() -> None:
    """Every action that the code records is in the catalogue, and none that it does not record."""
    recorded = set()
    for file in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("AuditRecord", "_record"):
                recorded |= {one.value for one in node.args[:2] if isinstance(one, ast.Constant) and one.value}
    assert recorded == ACTIONS.keys()


def test_catalogue_is_documented() -> None:
    """docs/audit.md has each action and each field with its meaning, and no other."""
    text = (Path(__file__).resolve().parents[2] / "docs/audit.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+?) \|$", text, re.MULTILINE))
    assert rows == {**ACTIONS, **FIELDS}
    assert audit_log.MESSAGE_ID in text
