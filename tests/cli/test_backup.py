"""guestapi backup and guestapi restore, while others write."""

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
from tests.store.processes import restore as restore_version
from tests.store.processes import told

INIT = Init(1, 2, "no boot", 3)


@pytest.fixture
def saved(guestapi: Guestapi, tmp_path: Path) -> Path:
    """A backup of a store with three instances: two by hand, one of a source with a key of the operator's."""
    guestapi.good("instance", "add", "web", "--config", "user.role=front", "--device", "eth0,type=nic,nictype=bridged")
    guestapi.good("instance", "add", "db", "--project", "shop", "--config", "user.role=back")
    with Writer(guestapi.settings).change() as change:
        observed = Observed(key="k1", project="default", name="box", config={"user.seen": "then"})
        reconcile(change, "lxc", [observed])
        steps.configure(change, get_instance(change, "default", "box"), {"user.mine": "1"})
    file = tmp_path / "saved.db"
    assert guestapi.good("backup", str(file)).startswith(f"{file}: 3 instances, 0 images, ")
    return file


def test_backup_is_one_file_of_roots(saved: Path) -> None:
    """Nobody but its owner can read it, and nothing is left beside it."""
    assert saved.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in saved.parent.iterdir() if one.name.startswith((saved.name, f".{saved.name}"))] == [
        saved.name
    ]


def test_backup_replaces_nothing_unasked(guestapi: Guestapi, saved: Path) -> None:
    """A file that is there stays unless --force is given; a directory always."""
    before = saved.read_bytes()
    assert guestapi.fails("backup", str(saved)) == f"{saved}: is there already; --force replaces it"
    assert saved.read_bytes() == before
    guestapi.good("instance", "add", "more")
    assert "4 instances" in guestapi.good("backup", "--force", str(saved))
    assert "is a directory" in guestapi.fails("backup", str(saved.parent))
    assert "No such file" in guestapi.fails("backup", str(saved.parent / "no" / "file"))


def test_everything_comes_back(guestapi: Guestapi, saved: Path) -> None:
    """Changed, renamed, removed and added since: afterwards everything of the operator's is as it was."""
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


def test_ids_and_log_only_grow(guestapi: Guestapi, saved: Path) -> None:
    """What a worker or a listener holds of an instance never means another state: ids stay, revisions and log grow."""
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


def test_facts_of_now_stay(guestapi: Guestapi, saved: Path) -> None:
    """Who runs goes on running, and what a source provides is as it sees it now, not as it was."""
    with Writer(guestapi.settings).change() as change:
        steps.start(change, get_instance(change, "default", "web"), INIT)
        reconcile(change, "lxc", [Observed(key="k1", project="default", name="box", config={"user.seen": "now"})])
    guestapi.good("restore", str(saved))
    with view(guestapi.settings.store.url) as store:
        assert get_instance(store, "default", "web").init == INIT
        layers = get_layers(store, get_instance(store, "default", "box"))
    assert (layers.source.config, layers.operator.config) == ({"user.seen": "now"}, {"user.mine": "1"})


def test_a_lost_store_finds_its_identities_again(guestapi: Guestapi, saved: Path) -> None:
    """A container that was registered anew after the store was lost gets its UUID and its keys back."""
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


def test_names_that_were_exchanged(guestapi: Guestapi, saved: Path) -> None:
    """Two instances that have each other's names since get their own ones back."""
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
    """A name that a source has given to another one since: nothing is restored, and the sentence says why."""
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
        (lambda file: file.write_bytes(b"x" * 5000), "is no backup of guestapi, or is damaged: file is not a database"),
        (lambda file: file.write_bytes(file.read_bytes()[:9000]), "is no backup of guestapi, or is damaged: "),
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
        (lambda file: [file.unlink(), file.mkdir()], "cannot be read: Is a directory"),
        (lambda file: _execute(file, "PRAGMA user_version = 99"), "has tables of version 99"),
        (lambda file: [file.unlink(), _execute(file, "CREATE TABLE t (x)")], "is the database of another program"),
    ],
    ids=["text", "cut", "missing", "directory", "newer", "other"],
)
def test_what_is_no_backup(guestapi: Guestapi, saved: Path, damage: object, sentence: str) -> None:
    """It is refused in one sentence, and the store stays as it is."""
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
    """What 0.1 has kept can be restored; the file itself is not changed."""
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


def test_a_plain_copy_is_restored_too(guestapi: Guestapi, saved: Path) -> None:
    """A store that was copied with what SQLite keeps beside it."""
    with Writer(guestapi.settings).change() as change:
        steps.configure(change, get_instance(change, "default", "web"), {"user.last": "1"})
        for path in guestapi.directory.glob("store.db*"):
            shutil.copy(path, saved.parent / path.name.replace("store.db", "copied.db"))
    guestapi.good("restore", str(saved.parent / "copied.db"))
    assert guestapi.shown("web")["config"]["user.role"] == "front"


def test_the_store_itself(guestapi: Guestapi, saved: Path) -> None:
    """Is no backup of itself, under whatever name."""
    (saved.parent / "link.db").symlink_to(guestapi.directory / "store.db")
    assert "is the store itself" in guestapi.fails("restore", str(saved.parent / "link.db"))


@pytest.mark.parametrize("damage", [b"x" * 20_000, b"SQLite format 3\0" + b"\xff" * 20_000], ids=["text", "pages"])
def test_a_damaged_store(guestapi: Guestapi, saved: Path, damage: bytes) -> None:
    """It is kept under another name, with all that lies beside it, and a new one takes its place."""
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


def test_others_write_meanwhile(guestapi: Guestapi, saved: Path) -> None:
    """Backups and restores while two writers change instances: nobody fails, and the store is whole afterwards."""
    # Whoever waits for another's transaction waits as long as a loaded machine takes for it.
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
        # As often as it takes until both have written in between.
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
    """Profiles become those of the backup, and each instance has those that it had; each hears of it once."""
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
        # Registered since: its profile is changed back, and it hears of that.
        found = Observed("k", "default", "box", init=INIT)
        reconcile(change, "lxc", [found])
    c1.good("profile", "assign", "box", "late,p")
    before = len(told(c1.settings))
    c1.good("restore", str(file))
    assert c1.shown("c1")["config"] == {"user.a": "1", "user.b": "2", "user.gone": "1", "user.p": "old", "user.q": "1"}
    assert c1.shown("c1")["profiles"] == ["p", "q"]
    assert c1.shown("box")["config"] == {"user.gone": "1", "user.late": "1", "user.p": "old"}
    assert {one["name"] for one in c1("profile", "list", "--format", "json").json} == {"late", "p", "q"}
    entries = [json.loads(metadata) for kind, metadata, _guest in told(c1.settings)[before:] if kind == "config"]
    assert sorted((one["key"], one["old_value"], one["value"]) for one in entries) == [
        ("user.gone", "", "1"),
        ("user.gone", "", "1"),
        ("user.late", "1", ""),
        ("user.p", "new", "old"),
        ("user.p", "new", "old"),
        ("user.q", "", "1"),
    ]


def test_backup_of_a_version_without_profiles(c1: Guestapi, tmp_path: Path) -> None:
    """A backup that knows no profiles leaves those that there are, and who has them."""
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
