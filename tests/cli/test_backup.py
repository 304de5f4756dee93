"""guestapi backup and guestapi restore, also with other writers."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest

from guestapi.model import Init
from guestapi.settings import Settings, StoreSettings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import backup, steps
from guestapi.store.lookup import (
    find_instance,
    get_instance,
    get_latest_entry,
    get_layers,
    list_instances,
    read_entries,
)
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.store.processes import log_entries
from tests.store.processes import restore as restore_version

INIT = Init(1, 2, "no boot", 3)


@pytest.fixture
def saved(guestapi: Guestapi, tmp_path: Path) -> Path:
    """A backup of a store with three instances: two added by hand, one of a source with a key of the operator's."""
    guestapi.good("instance", "add", "web", "--config", "user.role=front", "--device", "eth0,type=nic,nictype=bridged")
    guestapi.good("instance", "add", "db", "--project", "shop", "--config", "user.role=back")
    with Writer(guestapi.settings).change() as change:
        observed = Observed(key="k1", project="default", name="box", config={"user.seen": "then"})
        reconcile(change, "lxc", [observed])
        steps.configure(change, get_instance(change, "default", "box"), {"user.mine": "1"})
    file = tmp_path / "saved.db"
    assert guestapi.good("backup", str(file)).startswith(f"{file}: 3 instances, 0 images, ")
    return file


def test_backup_is_one_private_file(saved: Path) -> None:
    """The file is readable only by its owner, and no other file is left beside it."""
    assert saved.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in saved.parent.iterdir() if one.name.startswith((saved.name, f".{saved.name}"))] == [
        saved.name
    ]


def test_existing_file_is_replaced_only_with_force(guestapi: Guestapi, saved: Path) -> None:
    """An existing file is replaced only with --force, a directory never."""
    before = saved.read_bytes()
    assert guestapi.fails("backup", str(saved)) == f"{saved}: is there already; --force replaces it"
    assert saved.read_bytes() == before
    guestapi.good("instance", "add", "more")
    assert "4 instances" in guestapi.good("backup", "--force", str(saved))
    assert "is a directory" in guestapi.fails("backup", str(saved.parent))
    assert "No such file" in guestapi.fails("backup", str(saved.parent / "no" / "file"))


def test_restore_after_changes(guestapi: Guestapi, saved: Path) -> None:
    """After changes, renames, removals and additions, a restore brings back everything that the operator had set."""
    before = {one["name"]: one for one in guestapi.state()}
    guestapi.good("config", "set", "web", "user.role=other", "user.new=1")
    guestapi.good("device", "remove", "web", "eth0")
    guestapi.good("instance", "remove", "db", "--project", "shop")
    guestapi.good("instance", "add", "late")
    guestapi.good("config", "set", "box", "user.mine=2")
    out = guestapi.good("restore", str(saved))
    assert out.splitlines() == [
        f"restored from {saved}: 1 added, 2 changed, 1 removed",
        "added db in project shop",
        "changed box",
        "changed web",
        "removed late",
    ]
    assert {one["name"]: one for one in guestapi.state()} == before
    assert guestapi.good("restore", str(saved)).startswith(f"restored from {saved}: 0 added, 0 changed, 0 removed")


def test_ids_stay_and_the_log_grows(guestapi: Guestapi, saved: Path) -> None:
    """A restore keeps ids and increases revisions and the log, so that no worker or listener has wrong state."""
    guestapi.good("config", "set", "web", "user.role=other")
    with view(guestapi.settings.store.url) as store:
        old, last = get_instance(store, "default", "web"), get_latest_entry(store)
    guestapi.good("restore", str(saved))
    with view(guestapi.settings.store.url) as store:
        new = get_instance(store, "default", "web")
        told = read_entries(store, last, 100).found
    assert (new.id, new.uuid, new.run) == (old.id, old.uuid, old.run)
    assert new.revision > old.revision
    assert [(entry.id, entry.type) for entry in told if entry.instance_id == new.id] == [(last + 1, "config")]
    assert '"value":"front"' in told[0].metadata


def test_inits_and_sources_are_not_restored(guestapi: Guestapi, saved: Path) -> None:
    """A restore does not change inits and what sources provide."""
    with Writer(guestapi.settings).change() as change:
        steps.start(change, get_instance(change, "default", "web"), INIT)
        reconcile(change, "lxc", [Observed(key="k1", project="default", name="box", config={"user.seen": "now"})])
    guestapi.good("restore", str(saved))
    with view(guestapi.settings.store.url) as store:
        assert get_instance(store, "default", "web").init == INIT
        layers = get_layers(store, get_instance(store, "default", "box"))
    assert (layers.source.config, layers.operator.config) == ({"user.seen": "now"}, {"user.mine": "1"})


def test_restore_after_the_loss_of_the_store(guestapi: Guestapi, saved: Path) -> None:
    """A container that was registered again after the loss of the store gets its UUID and its keys back."""
    with view(guestapi.settings.store.url) as store:
        before = get_instance(store, "default", "box")
    for path in guestapi.directory.glob("store.db*"):
        path.unlink()
    with Writer(guestapi.settings, create=True).change() as change:
        reconcile(change, "lxc", [Observed(key="k1", project="default", name="box", init=INIT)])
    guestapi.good("restore", str(saved))
    with view(guestapi.settings.store.url) as store:
        after = get_instance(store, "default", "box")
    assert (after.uuid, after.cloud_init_id, after.init) == (before.uuid, before.cloud_init_id, INIT)
    assert after.config == {"user.mine": "1"}


def test_exchanged_names(guestapi: Guestapi, saved: Path) -> None:
    """Two instances that have exchanged their names get their own ones back."""
    with Writer(guestapi.settings).change() as change:
        web, box = (get_instance(change, "default", name) for name in ("web", "box"))
        steps.rename(change, web, "default", "other")
        steps.rename(change, box, "default", "web")
        steps.rename(change, get_instance(change, "default", "other"), "default", "box")
    guestapi.good("restore", str(saved))
    with view(guestapi.settings.store.url) as store:
        assert (get_instance(store, "default", "web").uuid, get_instance(store, "default", "box").uuid) == (
            web.uuid,
            box.uuid,
        )
        assert not any(one.name.startswith("\0") for one in list_instances(store))


def test_all_or_nothing(guestapi: Guestapi, saved: Path) -> None:
    """If a source has given a name to another instance, nothing is restored, and the error states the reason."""
    guestapi.good("config", "set", "box", "user.mine=2")
    guestapi.good("instance", "remove", "web")
    with Writer(guestapi.settings).change() as change:
        reconcile(change, "podman", [Observed(key="p", project="default", name="web", init=INIT)])
    before = guestapi.state()
    assert guestapi.fails("restore", str(saved)) == (
        "web: another instance has its name now, of podman; rename or remove that one in podman and restore again"
    )
    assert guestapi.state() == before


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda file: file.write_bytes(b"x" * 5000),
            "is not a backup of guestapi, or is damaged: file is not a database",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:9000]), "is not a backup of guestapi, or is damaged: "),
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
        (lambda file: [file.unlink(), file.mkdir()], "cannot be read: Is a directory"),
        (lambda file: _execute(file, "PRAGMA user_version = 99"), "has tables of version 99"),
        (lambda file: [file.unlink(), _execute(file, "CREATE TABLE t (x)")], "is the database of another program"),
    ],
    ids=["text", "cut", "missing", "directory", "newer", "other"],
)
def test_invalid_backup(guestapi: Guestapi, saved: Path, damage: object, sentence: str) -> None:
    """A file that is no backup is refused in one sentence, and the store stays unchanged."""
    damage(saved)  # type: ignore[operator]  # One of the functions above.
    before = guestapi.state()
    assert sentence in guestapi.fails("restore", str(saved))
    assert guestapi.state() == before


def _execute(file: Path, statement: str) -> int:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(statement)
        connection.commit()
        return connection.total_changes


def test_backup_of_an_older_version(guestapi: Guestapi) -> None:
    """A backup of version 0.1 can be restored, and its file stays unchanged."""
    old = guestapi.directory / "old.db"
    with closing(sqlite3.connect(old)) as connection:
        connection.executescript(Path(__file__).parents[1].joinpath("store", "version-1.sql").read_text())
    before = old.read_bytes()
    done = guestapi("restore", str(old))
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if not line.startswith("image ")] == []
    assert old.read_bytes() == before
    with closing(sqlite3.connect(old)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM instances")}
    assert {one["name"] for one in guestapi.state()} == names != set()


def test_copy_of_the_store(guestapi: Guestapi, saved: Path) -> None:
    """A copy of the store with SQLite's files beside it can be restored."""
    with Writer(guestapi.settings).change() as change:
        steps.configure(change, get_instance(change, "default", "web"), {"user.last": "1"})
        for path in guestapi.directory.glob("store.db*"):
            shutil.copy(path, saved.parent / path.name.replace("store.db", "copied.db"))
    guestapi.good("restore", str(saved.parent / "copied.db"))
    assert guestapi.shown("web")["config"]["user.role"] == "front"


def test_store_is_no_backup_of_itself(guestapi: Guestapi, saved: Path) -> None:
    """The store is refused as a backup of itself, also by another path."""
    (saved.parent / "link.db").symlink_to(guestapi.directory / "store.db")
    assert "is the store itself" in guestapi.fails("restore", str(saved.parent / "link.db"))


@pytest.mark.parametrize("damage", [b"x" * 20_000, b"SQLite format 3\0" + b"\xff" * 20_000], ids=["text", "pages"])
def test_damaged_store(guestapi: Guestapi, saved: Path, damage: bytes) -> None:
    """A damaged store is kept under another name with its files, and a new one is created."""
    before = guestapi.state()
    store = guestapi.directory / "store.db"
    for path in guestapi.directory.glob("store.db-*"):
        path.unlink()
    store.write_bytes(damage)
    done = guestapi("restore", str(saved))
    assert done.code == 0
    (kept,) = guestapi.directory.glob("store.db.damaged-*")
    assert done.err == f"the damaged store is kept as {kept}\n"
    assert kept.read_bytes() == damage
    wanted = {one["name"]: one["config"] for one in before}
    assert {one["name"]: one["config"] for one in guestapi.state()} == wanted


def test_backup_and_restore_with_other_writers(guestapi: Guestapi, saved: Path) -> None:
    """While two writers change instances, backups and restores work, no writer fails, and the store stays intact."""
    # A long wait for locks, for loaded machines.
    settings = Settings(store=StoreSettings(url=guestapi.settings.store.url, lock_seconds=60))
    stop = threading.Event()
    failures: list[Exception] = []
    written = [0, 0]

    def work(number: int) -> None:
        writer = Writer(settings)
        while not stop.is_set():
            try:
                with writer.change() as change:
                    name = f"w{number}"
                    found = find_instance(change, "work", name)
                    if found is None:
                        steps.add(change, "work", name)
                    else:
                        steps.configure(change, found, {"user.n": str(written[number])})
                written[number] += 1
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        # Until both writers have written in between.
        for number in count():
            if number >= 5 and (min(written) > 5 or failures):
                break
            other = saved.parent / f"{number}.db"
            backup.back_up(settings.store.url, other)
            with view(f"sqlite:///{other}") as store:
                assert find_instance(store, "default", "web") is not None
            backup.restore(settings, saved)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(written) > 5
    with closing(sqlite3.connect(guestapi.directory / "store.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_profiles_are_restored(c1: Guestapi, tmp_path: Path) -> None:
    """A restore brings back profiles and their assignment to instances, with one event for each changed key."""
    c1.good("profile", "create", "p", "user.p=old", "user.gone=1")
    c1.good("profile", "create", "q", "user.q=1")
    c1.good("profile", "assign", "c1", "p,q")
    file = tmp_path / "backup"
    c1.good("backup", str(file))
    c1.good("profile", "set", "p", "user.p=new", "user.gone=")
    c1.good("profile", "create", "late", "user.late=1")
    c1.good("profile", "create", "unused")
    c1.good("profile", "assign", "c1", "late,p")
    c1.good("profile", "delete", "q")
    with Writer(c1.settings).change() as change:
        # Registered after the backup: the change of its profile is undone, with an event.
        found = Observed("k", "default", "box", init=INIT)
        reconcile(change, "lxc", [found])
    c1.good("profile", "assign", "box", "late,p")
    before = len(log_entries(c1.settings))
    c1.good("restore", str(file))
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2", "user.gone": "1", "user.p": "old", "user.q": "1"}
    assert c1.shown("c1")["profiles"] == ["p", "q"]
    assert c1.shown("box")["config"] == {"user.gone": "1", "user.late": "1", "user.p": "old"}
    assert {one["name"] for one in c1("profile", "list", "--format", "json").json} == {"late", "p", "q"}
    entries = [json.loads(metadata) for kind, metadata, _guest in log_entries(c1.settings)[before:] if kind == "config"]
    assert sorted((one["key"], one["old_value"], one["value"]) for one in entries) == [
        ("user.gone", "", "1"),
        ("user.gone", "", "1"),
        ("user.late", "1", ""),
        ("user.p", "new", "old"),
        ("user.p", "new", "old"),
        ("user.q", "", "1"),
    ]


def test_backup_of_a_version_without_profiles(c1: Guestapi, tmp_path: Path) -> None:
    """A backup from a version without profiles leaves the present profiles and their assignment."""
    other = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/old.db"))
    restore_version(other, 3)
    c1.good("profile", "set", "default", "user.by=today")
    with Writer(c1.settings).change() as change:
        reconcile(change, "lxc", [Observed("/var/lib/lxc web", "default", "web", init=INIT)])
    c1.good("restore", str(tmp_path / "old.db"))
    assert c1("profile", "get", "default", "user.by").out == "today\n"
    assert c1.shown("web")["config"] == {"user.by": "today"}
    assert c1.shown("web")["profiles"] == ["default"]
    assert c1.shown("db")["config"] == {"user.by": "template", "user.role": "db"}
