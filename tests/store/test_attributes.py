"""Attributes in the store: whose they are, what bounds them, what becomes of them, and who is allowed them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from guestapi.audit import AuditRecord
from guestapi.model import Init, Instance
from guestapi.settings import Settings, StoreSettings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import attributes, permissions, steps
from guestapi.store.attributes import MOST_ATTRIBUTES, MOST_BYTES, VALUE_BYTES, AttributeReport, Outcome, is_path
from guestapi.store.backup import back_up, restore
from guestapi.store.engine import database_file
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import get_instance
from guestapi.store.permissions import Permission
from guestapi.store.reading import Reader
from guestapi.store.transaction import KEEP_OWN_ENTRIES
from guestapi.store.view import view
from guestapi.store.writing import ReadyReport, WorkloadReport, Writer
from tests.store.processes import log_entries, other_process

INIT = Init(100, 5, "boot", 7)


@pytest.fixture
def web(writer: Writer) -> Instance:
    """A running instance that may have attributes; another one, db, runs beside it."""
    with writer.change() as change:
        for number, name in enumerate(("db", "web")):
            steps.start(change, steps.add(change, "default", name), replace(INIT, pid=100 + number, namespace=number))
        permissions.allow(change, "default", None, "attributes")
        return get_instance(change, "default", "web")


def put(writer: Writer, owner: Instance, path: str, value: bytes | None = b"x") -> Outcome:
    """Write an attribute."""
    return writer.record_all([AttributeReport(owner, path, value)])[0]


def named(settings: Settings, name: str = "web") -> Instance:
    """The instance as it is now."""
    with view(settings.store.url) as store:
        return get_instance(store, "default", name)


def said(settings: Settings, name: str = "web") -> dict[str, bytes]:
    """What an instance says of itself."""
    with view(settings.store.url) as store:
        found = attributes.list_attributes(store, get_instance(store, "default", name))
    return {one.path: one.value for one in found}


def told(settings: Settings) -> list[tuple[str, str, bool]]:
    """The entries of the change log about attributes: action, path and whether guests hear of it."""
    entries = [(json.loads(text), guest) for kind, text, guest in log_entries(settings) if kind == "attribute"]
    return [(one["action"], one["path"], guest) for one, guest in entries]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("a/b", True),
        ("A-z_0.9/...", True),
        (f"{'n' * 64}/{'k' * 64}", True),
        (f"{'n' * 65}/k", False),
        (f"n/{'k' * 65}", False),
        ("a", False),
        ("/b", False),
        ("a/", False),
        ("a/b/c", False),
        ("./b", False),
        ("a/..", False),
        ("a/b\n", False),
        ("a/é", False),
        ("a b/c", False),
    ],
)
def test_path(text: str, good: bool) -> None:
    """A path is two names of up to 64 letters, digits, dots, hyphens and underscores; neither is "." nor ".."."""
    assert is_path(text) is good


def test_write(writer: Writer, reader: Reader, web: Instance, settings: Settings) -> None:
    """What is written is read at once and told once, without its value; said again, it is no news."""
    assert put(writer, web, "b/c", b"\0\xff") is Outcome.CREATED
    assert put(writer, web, "a/b", b"") is Outcome.CREATED
    for value in (b"x", b"x"):
        assert put(writer, web, "a/b", value) is Outcome.DONE
    assert reader.attributes(web) == ["a/b", "b/c"]
    assert (reader.attribute(web, "a/b"), reader.attribute(web, "b/c"), reader.attribute(web, "x/y")) == (
        b"x",
        b"\0\xff",
        None,
    )
    for _ in range(2):
        assert put(writer, web, "b/c", None) is Outcome.DONE
    assert reader.attribute(web, "b/c") is None
    assert told(settings) == [
        ("set", "b/c", True),
        ("set", "a/b", True),
        ("set", "a/b", True),
        ("removed", "b/c", True),
    ]


def test_same_name_as_another_s(writer: Writer, reader: Reader, web: Instance, settings: Settings) -> None:
    """Two instances with the same attribute have two; an instance whose id is another's by now has none."""
    db = named(settings, "db")
    put(writer, web, "a/b", b"web")
    put(writer, db, "a/b", b"db")
    assert (reader.attribute(web, "a/b"), reader.attribute(db, "a/b")) == (b"web", b"db")
    other = replace(web, uuid=db.uuid)
    assert (reader.attributes(other), reader.attribute(other, "a/b")) == ([], None)
    for stale in (replace(web, run=web.run + 1), replace(web, init=INIT), replace(web, init=None), other):
        assert put(writer, stale, "a/b", b"stale") is Outcome.GONE
        assert put(writer, stale, "a/b", None) is Outcome.GONE
    assert said(settings) == {"a/b": b"web"}


def test_number(writer: Writer, web: Instance, settings: Settings) -> None:
    """An instance has `MOST_ATTRIBUTES`, whatever another one has; it can change them, and remove some for others."""
    for number in range(MOST_ATTRIBUTES):
        assert put(writer, web, f"a/{number}") is Outcome.CREATED
    assert put(writer, web, "b/0") is Outcome.TOO_MANY
    assert put(writer, named(settings, "db"), "b/0") is Outcome.CREATED
    assert put(writer, web, "a/5", b"y") is Outcome.DONE
    assert put(writer, web, "a/5", None) is Outcome.DONE
    assert put(writer, web, "b/0") is Outcome.CREATED
    assert put(writer, web, "b/1") is Outcome.TOO_MANY
    assert len(said(settings)) == MOST_ATTRIBUTES


def test_bytes(writer: Writer, web: Instance, settings: Settings) -> None:
    """All values together have `MOST_BYTES`, to the byte, when one grows and when one is added."""
    for number in range(MOST_BYTES // VALUE_BYTES):
        assert put(writer, web, f"a/{number}", b"x" * VALUE_BYTES) is Outcome.CREATED
    assert put(writer, web, "b/0") is Outcome.TOO_LARGE
    assert put(writer, web, "b/0", b"") is Outcome.CREATED
    assert put(writer, web, "a/0", b"x" * (VALUE_BYTES - 2)) is Outcome.DONE
    assert put(writer, web, "b/0", b"123") is Outcome.TOO_LARGE
    assert put(writer, web, "b/0", b"12") is Outcome.DONE
    assert put(writer, web, "b/0", b"21") is Outcome.DONE
    assert sum(map(len, said(settings).values())) == MOST_BYTES


def test_condition(writer: Writer, web: Instance, settings: Settings) -> None:
    """The condition is asked about the value that is there in this transaction; where it fails, nothing changes."""
    seen: list[bytes | None] = []

    def holds(present: bytes | None) -> bool:
        seen.append(present)
        return len(seen) != 2

    reports = [AttributeReport(web, "a/b", value, holds) for value in (b"1", b"2", b"3")]
    assert writer.record_all(reports) == [Outcome.CREATED, Outcome.CONDITION, Outcome.DONE]
    assert seen == [None, b"1", b"1"]
    assert said(settings) == {"a/b": b"3"}


def test_together_with_readiness(writer: Writer, web: Instance, settings: Settings) -> None:
    """In one transaction with others, each gets what became of its own; one that is refused spoils no other's."""
    reports: list[WorkloadReport[object]] = [
        AttributeReport(web, "a/b", b"x"),
        ReadyReport(web.id, web.run, True, web.init),
        AttributeReport(replace(web, run=99), "a/b", b"y"),
    ]
    assert writer.record_all(reports) == [Outcome.CREATED, True, Outcome.GONE]
    assert named(settings).ready


def test_permission(writer: Writer, reader: Reader, web: Instance, settings: Settings) -> None:
    """Without permission nothing is written; one of the project or of the instance is enough; what was said stays."""
    put(writer, web, "a/b")
    before = reader.instance(web.id)
    with writer.change() as change:
        permissions.disallow(change, "default", None, "attributes")
    after = reader.instance(web.id)
    assert before is not None
    assert after is not None
    assert before.allowed == {"attributes"}
    assert not after.allowed
    assert put(writer, web, "a/b", b"y") is put(writer, web, "a/b", None) is Outcome.NOT_ALLOWED
    assert said(settings) == {"a/b": b"x"}
    with writer.change() as change:
        for _ in range(2):
            permissions.allow(change, "default", get_instance(change, "default", "web"), "attributes")
        with pytest.raises(ConflictError, match="not allowed to project 'default'"):
            permissions.disallow(change, "default", None, "attributes")
        assert permissions.list_permissions(change) == [Permission("default", "web", "attributes")]
    assert put(writer, web, "a/b", b"y") is Outcome.DONE
    assert put(writer, named(settings, "db"), "a/b", b"y") is Outcome.NOT_ALLOWED
    assert [one for one in log_entries(settings) if "policy-changed" in one[1]] != []


def test_restart_rename_and_removal(writer: Writer, web: Instance, settings: Settings) -> None:
    """A restart and a new name keep attributes; the removal takes them, and a later instance of that name has none."""
    put(writer, web, "a/b")
    with writer.change() as change:
        steps.stop(change, get_instance(change, "default", "web"))
        steps.start(change, get_instance(change, "default", "web"), replace(INIT, pid=300, namespace=30))
        steps.rename(change, get_instance(change, "default", "web"), "default", "shop")
    assert put(writer, web, "a/c") is Outcome.GONE
    assert said(settings, "shop") == {"a/b": b"x"}
    with writer.change() as change:
        permissions.allow(change, "default", get_instance(change, "default", "shop"), "attributes")
        steps.remove(change, get_instance(change, "default", "shop"))
        steps.add(change, "default", "shop")
        assert permissions.list_permissions(change) == [Permission("default", None, "attributes")]
    assert said(settings, "shop") == {}
    with closing(sqlite3.connect(database_file(settings.store.url))) as connection:
        assert connection.execute("SELECT count(*) FROM attributes").fetchone() == (0,)


def test_another_container(writer: Writer, settings: Settings) -> None:
    """What a container has said is gone with it, although the instance stays for the next one of its name."""
    with writer.change() as change:
        permissions.allow(change, "default", None, "attributes")
        steps.add(change, "default", "web", source="lxc", key="1", config={"user.a": "1"}, init=INIT)
        steps.configure(change, get_instance(change, "default", "web"), {"user.mine": "1"})
    put(writer, named(settings), "a/b")
    with writer.change() as change:
        reconcile(change, "lxc", [Observed("1", "default", "web", init=None)])
    assert said(settings) == {"a/b": b"x"}
    with writer.change() as change:
        reconcile(change, "lxc", [], gone=["1"])
        assert get_instance(change, "default", "web").key is None
    assert said(settings) == {}


def test_recorded(settings: Settings) -> None:
    """Each change is recorded with the attribute's path, and nowhere with its value."""
    records: list[AuditRecord] = []
    writer = Writer(settings, create=True, audit=records.extend)
    with writer.change() as change:
        web = steps.start(change, steps.add(change, "default", "web"), INIT)
        permissions.allow(change, "default", web, "attributes")
    web = named(settings)
    for value in (b"secret", b"secret", None):
        put(writer, web, "a/b", value)
    with writer.change() as change:
        permissions.disallow(change, "default", web, "attributes")
    assert [(one.action, one.instance, one.keys, one.pattern) for one in records[2:]] == [
        ("permission.add", "web", (), "attributes"),
        ("attribute.set", "web", ("a/b",), ""),
        ("attribute.remove", "web", ("a/b",), ""),
        ("permission.remove", "web", (), "attributes"),
    ]
    assert "secret" not in repr(records) + repr(log_entries(settings))


def test_log_is_bounded(writer: Writer, web: Instance, settings: Settings) -> None:
    """An instance that writes all the time keeps few entries of the change log, and none of another's goes for them."""
    before = [one for one in log_entries(settings) if one[0] != "attribute"]
    for number in range(3 * KEEP_OWN_ENTRIES):
        put(writer, web, "a/b", str(number).encode())
    entries = log_entries(settings)
    assert len(told(settings)) == KEEP_OWN_ENTRIES
    assert [one for one in entries if one[0] != "attribute"] == before


def test_exact_with_two_processes(writer: Writer, web: Instance, settings: Settings) -> None:
    """Two processes that write at the same time get no attribute and no byte more than one would."""
    code = """
from guestapi.store.attributes import AttributeReport, Outcome
writer = Writer(settings)
with view(settings.store.url) as store:
    web = get_instance(store, "default", "web")
receive()
done = [writer.record_all([AttributeReport(web, f"MARK/{n}", b"x" * SIZE)])[0] for n in range(COUNT)]
send(sum(one is Outcome.CREATED for one in done))
"""
    for size, count, most in ((1, 100, MOST_ATTRIBUTES), (VALUE_BYTES, 12, MOST_BYTES // VALUE_BYTES)):
        with ExitStack() as stack:
            others = [
                stack.enter_context(
                    other_process(
                        settings,
                        code.replace("MARK", mark).replace("SIZE", str(size)).replace("COUNT", str(count)),
                    )
                )
                for mark in "ab"
            ]
            for one in others:
                one.write_line("go")
            created = [int(one.done()) for one in others]
        assert sum(created) == most == len(said(settings))
        for path in said(settings):
            assert put(writer, web, path, None) is Outcome.DONE


def test_killed(writer: Writer, web: Instance, settings: Settings) -> None:
    """Whatever was answered is there after the writer was killed; nothing of another write is."""
    code = """
from guestapi.store.attributes import AttributeReport
writer = Writer(settings)
with view(settings.store.url) as store:
    web = get_instance(store, "default", "web")
for number in range(1, 100_000):
    text = str(number).encode()
    writer.record_all([AttributeReport(web, "a/b", text), AttributeReport(web, "a/c", text * 1000)])
    send(number)
"""
    with other_process(settings, code) as other:
        heard = [int(other.read_line()) for _ in range(7)]
        other.kill()
    found = said(settings)
    assert found["a/c"] == found["a/b"] * 1000
    assert int(found["a/b"]) >= heard[-1]


def test_backup(writer: Writer, web: Instance, settings: Settings, tmp_path: Path) -> None:
    """A lost instance says again what it said, which is told; one that says something now goes on saying that."""
    put(writer, web, "a/b", b"\0\xff")
    put(writer, named(settings, "db"), "a/b", b"db")
    back_up(settings.store.url, tmp_path / "backup")
    with writer.change() as change:
        steps.remove(change, get_instance(change, "default", "web"))
    put(writer, named(settings, "db"), "a/b", None)
    put(writer, named(settings, "db"), "c/d", b"newer")
    restore(settings, tmp_path / "backup")
    assert said(settings) == {"a/b": b"\0\xff"}
    assert said(settings, "db") == {"c/d": b"newer"}
    put(writer, named(settings, "db"), "c/d", None)
    before = told(settings)
    restore(settings, tmp_path / "backup")
    assert said(settings, "db") == {"a/b": b"db"}
    assert told(settings) == [*before, ("set", "a/b", True)]
    elsewhere = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/new.db"))
    restore(elsewhere, tmp_path / "backup")
    assert said(elsewhere) == {"a/b": b"\0\xff"}


def test_backup_of_permissions(writer: Writer, web: Instance, settings: Settings, tmp_path: Path) -> None:
    """A restore allows what was allowed then, and no more; an instance that the backup does not know keeps its own."""
    with writer.change() as change:
        permissions.allow(change, "default", get_instance(change, "default", "web"), "attributes")
    back_up(settings.store.url, tmp_path / "backup")
    with writer.change() as change:
        permissions.disallow(change, "default", None, "attributes")
        permissions.disallow(change, "default", get_instance(change, "default", "web"), "attributes")
        permissions.allow(change, "default", get_instance(change, "default", "db"), "attributes")
        permissions.allow(change, "other", None, "attributes")
        steps.rename(change, get_instance(change, "default", "web"), "default", "shop")
        later = steps.add(change, "default", "later", source="lxc", key="later")
        permissions.allow(change, "default", later, "attributes")
    restore(settings, tmp_path / "backup")
    with view(settings.store.url) as store:
        assert permissions.list_permissions(store) == [
            Permission("default", None, "attributes"),
            Permission("default", "later", "attributes"),
            Permission("default", "web", "attributes"),
        ]


def test_backup_of_an_older_version(writer: Writer, web: Instance, settings: Settings, tmp_path: Path) -> None:
    """A backup from before there were permissions takes none away."""
    back_up(settings.store.url, tmp_path / "backup")
    with closing(sqlite3.connect(tmp_path / "backup", isolation_level=None)) as connection:
        connection.execute("DROP TABLE permissions")
        connection.execute("DROP TABLE attributes")
        connection.execute("PRAGMA user_version = 7")
    put(writer, web, "a/b")
    restore(settings, tmp_path / "backup")
    assert named(settings).allowed == {"attributes"}
    assert said(settings) == {"a/b": b"x"}
