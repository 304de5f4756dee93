"""Opening the store: creation, ownership, upgrades, and refusals."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from guestapi.model import SourceStatus
from guestapi.settings import Settings, StoreSettings
from guestapi.store import profiles, steps
from guestapi.store.engine import database_file
from guestapi.store.errors import ConflictError, StoreError
from guestapi.store.lookup import get_instance, get_layers, list_images, list_instances, list_sources, read_entries
from guestapi.store.migrations import was_written_by_hook
from guestapi.store.profiles import list_profiles
from guestapi.store.reading import Reader
from guestapi.store.statuses import list_unacknowledged
from guestapi.store.tables import BEGINNING_BYTES
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.harness.service import USER
from tests.store.processes import add, config_of, database, known, other_process, restore

CHANGE = """
with Writer(settings).change() as change:
    steps.configure(change, get_instance(change, "default", "c1"), {"user.by": "user"})
"""


def refusals(settings: Settings) -> list[str]:
    """Return the errors of every way to open the store, which must be one line each."""
    sentences = []
    for opened in (
        lambda: Writer(settings),
        lambda: Writer(settings, create=True),
        lambda: Reader(settings.store.url).latest(),
        lambda: view(settings.store.url).__enter__(),
    ):
        with pytest.raises(StoreError) as raised:
            opened()
        sentences.append(str(raised.value))
    assert not any("\n" in sentence for sentence in sentences)
    return sentences


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("", "no URL"),
        ("/var/lib/store.db", "no URL"),
        ("postgresql://localhost/x", "postgresql"),
        ("sqlite://", "absolute"),
        ("sqlite:///store.db", "absolute"),
        ("sqlite:///:memory:", "absolute"),
    ],
)
def test_url_must_name_a_file(url: str, word: str) -> None:
    """A URL that is no SQLite file with an absolute path is refused, with the key and the reason."""
    with pytest.raises(StoreError, match=rf"^store\.url: .*{word}"):
        database_file(url)
    assert all(sentence.startswith("store.url: ") for sentence in refusals(Settings(store=StoreSettings(url=url))))


@pytest.mark.parametrize("name", ["a b.db", "é#1.db", "a&mode=ro.db"])
def test_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    """Characters with a meaning in a URL may be in the file's name."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/{name}"))
    add(Writer(settings, create=True), a="1")
    assert config_of(settings) == {"a": "1"}
    assert (tmp_path / name).exists()


def test_store_is_created_only_on_request(settings: Settings) -> None:
    """A store is created only on request; otherwise the error states how to create it, and no empty file is left."""
    for opened in (lambda: Writer(settings), lambda: Reader(settings.store.url).latest()):
        with pytest.raises(StoreError, match="guestapi instance add"):
            opened()
    assert not database(settings).exists()
    Writer(settings, create=True)
    Reader(settings.store.url).latest()


def test_missing_directory(tmp_path: Path) -> None:
    """A missing directory is not created, and the error names it."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/none/store.db"))
    assert all(str(database(settings)) in sentence for sentence in refusals(settings))


def test_creating_an_existing_store(settings: Settings, writer: Writer) -> None:
    """Creating an existing store opens it."""
    add(writer)
    assert [one.name for one in known(settings) if Writer(settings, create=True)] == ["c1"]


def test_many_processes_create_at_once(settings: Settings) -> None:
    """When several processes create the store at once, there is one store with the instances of all."""
    code = """
while round := receive():
    settings = Settings(store=StoreSettings(url=f"{sys.argv[1]}-{round}", lock_seconds=20.0))
    try:
        with Writer(settings, create=True).change() as change:
            steps.add(change, "default", f"c{len(list_instances(change))}")
        send("added")
    except StoreError as error:
        send(error)
"""
    with ExitStack() as stack:
        others = [stack.enter_context(other_process(settings, code)) for _ in range(4)]
        for attempt in range(1, 16):
            for other in others:
                other.write_line(str(attempt))
            assert [other.read_line() for other in others] == ["added"] * 4
            made = Settings(store=StoreSettings(url=f"{settings.store.url}-{attempt}"))
            assert [one.name for one in known(made)] == ["c0", "c1", "c2", "c3"]


def test_half_made_store_is_completed(settings: Settings) -> None:
    """A file without tables, which a killed process may leave, is completed by the next creation."""
    database(settings).touch(0o600)
    with pytest.raises(StoreError, match="has no tables"):
        Reader(settings.store.url).latest()
    add(Writer(settings, create=True))
    assert [one.name for one in known(settings)] == ["c1"]


@pytest.mark.parametrize("first", ["reader", "view", "writer"])
def test_older_store_is_upgraded(settings: Settings, first: str) -> None:
    """A store of version 1 is upgraded by the first process that opens it; its data stays, and it accepts changes."""
    restore(settings, 1)
    if first == "reader":
        Reader(settings.store.url).close()
    elif first == "writer":
        Writer(settings)
    with view(settings.store.url) as store:
        (instance,), (image,) = list_instances(store), list_images(store)
        assert list_sources(store) == []
    assert (instance.name, instance.source, instance.config) == ("c1", None, {"user.foo": "bar"})
    assert instance.init is not None
    assert (image.aliases, image.source) == (("web",), None)
    with Writer(settings).change() as change:
        added = steps.add(change, "default", "c2", source="incus")
    assert [(one.name, one.source) for one in known(settings)] == [("c1", None), ("c2", "incus")]
    assert added.id > instance.id


def test_store_of_version_2_is_upgraded(settings: Settings) -> None:
    """The upgrade of a version 2 store keeps what guests read, and assigns each part to a layer."""
    restore(settings, 2)
    with view(settings.store.url) as store:
        found = {one.name: one for one in list_instances(store)}
        layers = {name: get_layers(store, one) for name, one in found.items()}
        statuses = list_sources(store)
    assert {name: (one.source, one.key, one.kept, one.running) for name, one in found.items()} == {
        "hand": (None, None, True, False),
        "web": (None, None, True, True),
        "db": (None, None, True, True),
        # A container without a name of the operator's: its instance is removed with it.
        "9f86d081884c": (None, None, False, True),
        "m1": ("incus", found["m1"].uuid, False, True),
    }
    assert found["web"].config == {"user.role": "frontend", "user.template": "x"}
    assert found["web"].devices.keys() == {"data", "eth0", "gpu", "root"}
    assert found["m1"].config == {"security.guestapi": "true", "user.m": "1"}
    # Devices that the hook of LXC had found become the source's; everything else becomes the operator's.
    assert layers["web"].source.devices.keys() == {"data", "eth0", "root"}
    assert layers["web"].operator.devices == {"gpu": {"type": "gpu"}}
    assert layers["web"].operator.config == found["web"].config
    assert layers["db"].operator.config == {"user.from-annotation": "yes"}
    assert layers["hand"].operator.devices == {"gpu": {"type": "gpu", "pci": "0000:01:00.0"}}
    assert not layers["m1"].operator
    assert statuses == [SourceStatus("incus", "/var/lib/incus/unix.socket", True, 1764000000.5, 0.25, "why")]
    with Writer(settings).change() as change:
        assert list_unacknowledged(change, "incus") == []


def test_store_of_version_3_is_upgraded(settings: Settings) -> None:
    """Instances of followers get the profile ``default`` of their project, empty; nothing that counts changes."""
    restore(settings, 3)
    with view(settings.store.url) as store:
        found = {(one.project, one.name): one for one in list_instances(store)}
        assert [(one.project, one.name, one.config, users) for one, users in list_profiles(store)] == [
            ("default", "default", {}, 2),
            ("shop", "default", {}, 1),
        ]
    assert {name: (one.config, one.profiles) for (_project, name), one in found.items() if name != "web"} == {
        "hand": ({"user.a": "1"}, ()),
        "db": ({"user.by": "template", "user.role": "db"}, ("default",)),
        "m1": ({"user.m": "1"}, ()),
    }
    assert found["default", "web"].config == {"user.by": "template", "user.role": "none"}
    assert found["shop", "web"].config == {"user.by": "template", "user.role": "frontend"}


def test_store_of_version_8_is_upgraded(settings: Settings) -> None:
    """Profiles stay, with the instances that have them; the number of one that is gone is not given again."""
    restore(settings, 8)
    with view(settings.store.url) as store:
        (instance,) = list_instances(store)
        assert [(one.id, one.name, one.uuid, users) for one, users in list_profiles(store)] == [
            (1, "default", None, 1),
            (2, "web", None, 1),
        ]
        assert store.connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert instance.config == {"user.foo": "bar", "user.role": "front"}
    assert (instance.profiles, instance.devices) == (("default", "web"), {"eth0": {"type": "nic"}})
    with Writer(settings).change() as change:
        assert profiles.create(change, "default", "new").id == 4
        with pytest.raises(ConflictError):
            profiles.remove(change, profiles.get_profile(change, "default", "web"))


@pytest.mark.parametrize(
    ("name", "definition", "hooks"),
    [
        ("eth0", {"type": "nic", "name": "eth0", "nictype": "bridged", "parent": "br0", "mtu": "1400"}, True),
        ("eth0", {"type": "nic", "name": "eth0", "nictype": "macvlan"}, True),
        ("eth0", {"type": "nic", "name": "eth0"}, False),
        ("eth0", {"type": "nic", "name": "eth1", "nictype": "bridged"}, False),
        ("eth0", {"type": "nic", "name": "eth0", "nictype": "bridged", "limits.max": "1Mbit"}, False),
        ("root", {"type": "disk", "path": "/"}, True),
        ("main", {"type": "disk", "path": "/"}, False),
        ("srv-data", {"type": "disk", "path": "/srv/data", "source": "/data", "readonly": "true"}, True),
        ("data", {"type": "disk", "path": "/srv/data", "source": "/data"}, False),
        ("srv", {"type": "disk", "path": "srv", "source": "/data"}, False),
        ("srv", {"type": "disk", "path": "/srv", "source": "/data", "size": "1GiB"}, False),
        ("gpu", {"type": "gpu"}, False),
        ("x", {}, False),
    ],
)
def test_devices_in_the_form_of_the_hook(name: str, definition: dict[str, str], hooks: bool) -> None:
    """Only a device in exactly the form that the hook of LXC wrote is taken for the hook's."""
    assert was_written_by_hook(name, definition) == hooks


@pytest.mark.parametrize("version", [1, 2, 3, 8])
def test_upgraded_store_equals_a_new_one(settings: Settings, tmp_path: Path, version: int) -> None:
    """An upgraded store has the same tables, columns and indexes as a new one."""
    new = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/new.db"))
    restore(settings, version)
    Writer(settings)
    Writer(new, create=True)
    assert columns(database(settings)) == columns(database(new))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_upgraded_large_entry(settings: Settings, version: int) -> None:
    """A large entry of an older store is read in parts after the upgrade, and has lost nothing."""
    restore(settings, version)
    metadata = json.dumps({"key": "user.a", "old_value": "", "value": "é" * 100_000}, ensure_ascii=False)
    with closing(sqlite3.connect(database(settings))) as connection, connection:
        connection.execute("UPDATE notifications SET metadata = ? WHERE id = 2", (metadata,))
    Writer(settings)
    entry = Reader(settings.store.url).entries(1, 1).found[0]
    assert entry.left_out == len(metadata.encode())
    assert metadata.startswith(entry.metadata)
    assert len(entry.metadata.encode()) <= BEGINNING_BYTES
    with view(settings.store.url) as store:
        assert read_entries(store, 1, 1).found[0].metadata == metadata


@pytest.mark.parametrize("version", [1, 2, 3, 8])
def test_killed_upgrade(settings: Settings, version: int) -> None:
    """An upgrade is one transaction: a process that is killed during it leaves the complete older store."""
    restore(settings, version)
    with other_process(settings, CUT_OFF) as other:
        assert other.end() == -signal.SIGKILL
    with closing(sqlite3.connect(database(settings))) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (version,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    Writer(settings)
    assert {"c1"} <= {one.name for one in known(settings)} or {"web", "m1"} <= {one.name for one in known(settings)}


#: Kills the process just before the commit of the upgrade.
CUT_OFF = """
import os, signal, sqlite3
from guestapi.store import engine

class Connection(sqlite3.Connection):
    def execute(self, statement, *parameters):
        if statement == "COMMIT":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(statement, *parameters)

engine._connect = lambda file, seconds: sqlite3.connect(file, factory=Connection)
Writer(settings)
"""


def columns(file: Path) -> set[tuple[str, str, str, int]]:
    """Return table, name, type and NOT NULL of each column, and the same of each index with its uniqueness."""
    with closing(sqlite3.connect(file)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [(table, row) for table in tables for row in connection.execute(f"PRAGMA table_info({table})")]
        indexes = {
            (table, str(index[1]), str(index[3]), index[2])
            for table in tables
            for index in connection.execute(f"PRAGMA index_list({table})")
        }
    return {(table, row[1], row[2], row[3]) for table, row in rows} | indexes


def test_newer_store_is_refused(settings: Settings, writer: Writer) -> None:
    """A store of a newer version is refused and left unchanged; the error names both versions."""
    with closing(sqlite3.connect(database(settings))) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version + 1}")
    before = database(settings).read_bytes()
    assert all(f"version {version + 1}" in one and f"version {version}" in one for one in refusals(settings))
    assert database(settings).read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all", os.urandom(8192), b"SQLite format 3\0" + b"\xff" * 4080])
def test_garbage_is_refused(settings: Settings, content: bytes) -> None:
    """A file that is not a database is refused and left unchanged; the error names it."""
    database(settings).write_bytes(content)
    assert all(sentence.startswith(f"{database(settings)}: ") for sentence in refusals(settings))
    assert database(settings).read_bytes() == content


def test_directory_is_refused(settings: Settings) -> None:
    """A directory in the store's place is refused; the error names it."""
    database(settings).mkdir()
    assert all(sentence.startswith(f"{database(settings)}: ") for sentence in refusals(settings))


def test_files_are_private(settings: Settings, writer: Writer, reader: Reader) -> None:
    """The store and SQLite's files beside it are accessible only to owner and group, whatever the umask."""
    before = os.umask(0)
    try:
        add(writer, **{"user.user-data": "password"})
        reader.instance(1)
        with writer.change() as change:
            steps.configure(change, get_instance(change, "default", "c1"), {"user.a": "1"})
            beside = sorted(path.name for path in database(settings).parent.glob("store.db*"))
            modes = {path.name: path.stat().st_mode & 0o777 for path in database(settings).parent.glob("store.db*")}
    finally:
        os.umask(before)
    assert {"store.db", "store.db-shm", "store.db-wal"} <= set(beside)
    assert set(modes.values()) == {0o660}


@pytest.mark.root
def test_root_and_service_share_the_store(users_directory: Path) -> None:
    """A store that root creates in another user's directory can be written by that user, and again by root."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{users_directory}/store.db"))
    writer = Writer(settings, create=True)
    add(writer)
    reader = Reader(settings.store.url)
    for turn in ("first", "second"):
        with writer.change() as change:
            steps.configure(change, get_instance(change, "default", "c1"), {"user.turn": turn, "user.by": "root"})
        # With and without files that root has created and holds open.
        with other_process(settings, CHANGE, USER) as other:
            other.done()
        found = reader.instance(1)
        assert found is not None
        assert found.config == {"user.turn": turn, "user.by": "user"}
        owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in users_directory.iterdir()}
        assert set(owners.values()) == {(USER, USER)}, owners
        reader.close()


@pytest.mark.root
def test_service_goes_on_while_root_writes(users_directory: Path) -> None:
    """A service with an open store sees root's changes, and writes, without opening it again."""
    code = """
reader, writer = Reader(settings.store.url), Writer(settings)
reader.instance(1)
send("open")
while receive():
    with writer.change() as change:
        one = get_instance(change, "default", "c1")
        assert reader.instance(one.id) == one
        steps.configure(change, one, {"user.user": one.config["user.root"]})
    send("done")
"""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{users_directory}/store.db"))
    writer = Writer(settings, create=True)
    add(writer)
    with other_process(settings, code, USER) as other:
        assert other.read_line() == "open"
        for number in range(5):
            with writer.change() as change:
                steps.configure(change, get_instance(change, "default", "c1"), {"user.root": str(number)})
            other.write_line("go")
            assert other.read_line() == "done"
            assert config_of(settings) == {"user.root": str(number), "user.user": str(number)}


@pytest.mark.root
def test_user_without_access(users_directory: Path) -> None:
    """A user without access to the store gets an error of one sentence."""
    settings = Settings(store=StoreSettings(url=f"sqlite:///{users_directory}/store.db"))
    add(Writer(settings, create=True))
    os.chmod(users_directory, 0o755)
    code = """
reader = Reader(settings.store.url)
for opened in (lambda: Writer(settings), lambda: Writer(settings, create=True), reader.latest):
    try:
        opened()
    except StoreError as error:
        send(error)
"""
    with other_process(settings, code, USER + 1) as other:
        sentences = other.done().splitlines()
    assert len(sentences) == 3
    assert all(sentence.startswith(f"{database(settings)}: ") for sentence in sentences)


def test_log_that_is_not_the_owners_yet(
    settings: Settings, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root makes the write-ahead log, and only then gives it to the owner: who opens the store meanwhile waits."""
    add(writer)
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(database_file(settings.store.url))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    copy.write_bytes(database_file(settings.store.url).read_bytes())
    log = Path(f"{copy}-wal")
    # Like another user's file: it is there, and cannot be opened.
    log.mkdir()
    monkeypatch.setattr("guestapi.store.engine.time.sleep", lambda _seconds: log.rmdir())
    with view(f"sqlite:///{copy}") as store:
        assert [one.name for one in list_instances(store)] == ["c1"]
