"""A store that is locked, full, missing, damaged or read-only: responses, reports, and the return to normal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from guestapi.cli.main import main
from guestapi.store.writing import Writer
from tests.harness.containers import Container, Response
from tests.harness.service import USER, Service
from tests.harness.waiting import until
from tests.server.inside import talk
from tests.server.test_events import websocket

pytestmark = pytest.mark.root

READY = b'{"state":"Ready"}'


@pytest.fixture(scope="module")
def own() -> Iterator[Service]:
    """A service with a short lock time; its store is damaged several times without a restart."""
    with Service(workers=1, toml="lock_seconds = 1.0\n", dialects=["incus"]) as running:
        yield running


@pytest.fixture
def c1(own: Service) -> Iterator[Container]:
    """An instance of that service."""
    with own.container("c1", {"user.foo": "bar"}) as container:
        yield container


def put_back(own: Service, copy: Path) -> None:
    """Restore a backup as in docs/operations.md."""
    own.program("restore", str(copy))


def copy_of(own: Service) -> Path:
    """Make a backup of the store in use."""
    copy = own.root / "copy.db"
    own.command("backup", "--force", str(copy))
    return copy


def failed(own: Service) -> dict[str, str]:
    """Return the failures that `guestapi check` reports."""
    done = CliRunner().invoke(main, ["--config", str(own.config), "check", "--format", "json"])
    found = json.loads(done.stdout)
    return {one["check"]: one["text"] for one in found if not one["ok"]}


def assert_try_again(response: Response) -> None:
    """Check that a guest is told to try again, in plain text without host detail."""
    assert response.status == 500
    assert response.text == "temporarily unavailable, try again\n"
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


def another_worker(own: Service) -> None:
    """Kill the worker, and wait for another one, which has nothing in memory."""
    (worker,) = own.workers
    os.kill(worker, signal.SIGKILL)
    until(lambda: own.workers not in ([], [worker]), "another worker")


def told_operator(own: Service) -> list[str]:
    """Return the errors in the log."""
    lines = own.log.read_text().splitlines()
    assert not any("Traceback" in line for line in lines), own.log.read_text()
    return [line for line in lines if " ERROR " in line]


def test_locked(own: Service, c1: Container) -> None:
    """While the store is locked reads and events continue; a write gets "try again" after the lock time."""
    with ThreadPoolExecutor() as pool, talk(c1) as guest:
        with closing(sqlite3.connect(own.state / "store.db", isolation_level=None, timeout=0)) as other:
            other.execute("BEGIN EXCLUSIVE")
            writing = pool.submit(c1.ask, "/1.0", "PATCH", READY)
            asked = 0
            while not writing.done():
                assert guest.ask("/1.0/config/user.foo").text == "bar"
                asked += 1
            assert asked > 5, "a reader waited for the writer"
            assert_try_again(writing.result())
            assert "try again" in failed(own)["store"]
        assert c1.ask("/1.0", "PATCH", READY).status == 200
        assert failed(own) == {}
    assert any("another writer holds the store" in line for line in told_operator(own))


def test_readers_cannot_be_locked_out(own: Service, c1: Container) -> None:
    """While a worker has the store open, no process can get the exclusive lock that would keep readers out."""
    assert c1.ask("/1.0/config/user.foo").text == "bar"
    locking = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).executescript(sys.argv[2])"
    script = "PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE"
    # In a process of its own, because locks belong to a process.
    done = subprocess.run(
        [sys.executable, "-c", locking, own.state / "store.db", script], capture_output=True, text=True, check=False
    )
    assert "database is locked" in done.stderr
    assert c1.ask("/1.0/config/user.foo").text == "bar"


@pytest.fixture
def narrow() -> Iterator[Service]:
    """A service whose store is on a small disk of its own."""
    service = Service(workers=1, dialects=["incus"])
    size = f"size=20m,mode=0750,uid={USER},gid={USER}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(service.state)], check=True)
    try:
        service.writer = Writer(service.settings, create=True)
        yield service.start()
    finally:
        # Before the directory is removed.
        subprocess.run(["umount", "--lazy", str(service.state)], check=True)
        service.__exit__(None, None, None)


def test_disk_full(narrow: Service) -> None:
    """On a full disk reads continue, and changes of guests and operator fail completely; with space they work again."""
    with narrow.container("c1", {"user.foo": "bar"}) as c1:
        assert c1.ask("/1.0/config/user.foo").text == "bar"
        filling = narrow.state / "filling"
        fill = ["dd", "if=/dev/zero", f"of={filling}", "bs=4096", "status=none"]
        assert "No space" in subprocess.run(fill, capture_output=True, text=True, check=False).stderr
        before = narrow.instance("c1")
        done = narrow.program("config", "set", "c1", f"user.large={'x' * 100_000}", "user.foo=new", check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "full" in done.stderr
        assert narrow.instance("c1") == before
        assert c1.ask("/1.0/config/user.foo").text == "bar"
        assert "0 MiB" in failed(narrow)["store"]
        # The write-ahead log may have space for another page; then the state is stored.
        answer = c1.ask("/1.0", "PATCH", READY)
        assert narrow.instance("c1").ready == (answer.status == 200)
        filling.unlink()
        assert failed(narrow) == {}
        assert c1.ask("/1.0", "PATCH", READY).status == 200
        narrow.configure("c1", user_foo="new")
        assert c1.ask("/1.0/config/user.foo").text == "new"


def delete(store: Path) -> None:
    """Delete the store, as a wrong cleanup does."""
    for suffix in ("", "-wal", "-shm"):
        store.with_name(store.name + suffix).unlink(missing_ok=True)


def truncate(store: Path) -> None:
    """Truncate the store, as a wrong redirection does."""
    with store.open("wb"):
        pass


def halve(store: Path) -> None:
    """Cut the store in half, as a crash of the file system may."""
    os.truncate(store, store.stat().st_size // 2)


def overwrite(store: Path) -> None:
    """Overwrite the open file."""
    with store.open("r+b") as file:
        file.write(b"garbage!" * (store.stat().st_size // 8))


def replace(store: Path) -> None:
    """Replace the store by another file."""
    delete(store)
    store.write_bytes(b"garbage!" * 1000)
    shutil.chown(store, USER, USER)


@pytest.mark.parametrize("harm", [delete, truncate, halve, overwrite, replace])
def test_damaged_store_during_operation(own: Service, c1: Container, harm: Callable[[Path], None]) -> None:
    """With a damaged store guests get cached data or 500, also from a new worker; after a restore, all works again."""
    store = own.state / "store.db"
    copy = copy_of(own)
    with closing(sqlite3.connect(store)) as connection:
        # Move everything from the log into the file that is damaged.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert c1.ask("/1.0/config/user.foo").text == "bar"
    harm(store)
    assert c1.ask("/1.0/config/user.foo").text in ("bar", "temporarily unavailable, try again\n")
    another_worker(own)
    assert_try_again(c1.ask("/1.0/config/user.foo"))
    assert_try_again(c1.ask("/1.0", "PATCH", READY))
    assert set(failed(own)) == {"store"}
    assert any(str(store) in line for line in told_operator(own))
    put_back(own, copy)
    assert c1.ask("/1.0/config/user.foo").text == "bar"
    assert c1.ask("/1.0", "PATCH", READY).status == 200
    assert failed(own) == {}
    with c1.listening("raw", json.dumps([[websocket().decode(), "user.told"]])) as client:
        assert client.read_document() == "ready"
        own.configure("c1", user_told="1")
        assert "user.told" in client.read_document()[0]


def test_read_only(own: Service, c1: Container) -> None:
    """With a read-only store reads continue; changes fail until it is writable again."""
    assert c1.ask("/1.0/config/user.foo").text == "bar"
    (own.state / "store.db").chmod(0o400)
    # A worker that has written before could continue, with its open file.
    another_worker(own)
    assert c1.ask("/1.0/config/user.foo").text == "bar"
    assert_try_again(c1.ask("/1.0", "PATCH", READY))
    assert not own.instance("c1").ready
    assert "mode 0400" in failed(own)["store"]
    (own.state / "store.db").chmod(0o600)
    assert c1.ask("/1.0", "PATCH", READY).status == 200
    assert failed(own) == {}
    assert any("readonly" in line for line in told_operator(own))


def test_service_does_not_start_on_a_damaged_store(own: Service) -> None:
    """A service that is started on a damaged store reports it, and leaves the store unchanged."""
    own.stop()
    replace(own.state / "store.db")
    done = own.program("serve", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {own.state}/store.db: ")
    assert done.stderr.count("\n") == 1
    assert (own.state / "store.db").read_bytes() == b"garbage!" * 1000
