"""Images from the real service to real containers: whole, in ranges, in parallel, and refused when files changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestapi.model import Image
from guestapi.store.image_steps import add_image
from guestapi.store.images import directory, import_image, paths, remove_image
from tests.harness.containers import Container
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import until
from tests.server.inside import Talk, asking, talk, talks

MIB = 1 << 20
#: The first bytes of a file of gzip, and enough of them (RFC 1952).
GZIP = b"\x1f\x8b" + bytes(20)
#: Seconds after which the service of these tests disconnects a client that reads nothing.
SEND_SECONDS = 3.0
#: curl's option for the socket.
SOCKET = ["--unix-socket", "/dev/incus/sock"]


@pytest.fixture(scope="module")
def alone() -> Iterator[Service]:
    """A service of one worker, which sends all images of these tests."""
    toml = f"[limits]\nsend_seconds = {SEND_SECONDS}\n"
    with Service(workers=1, toml=toml, dialects=["incus", "lxd"]) as running:
        yield running


@pytest.fixture(scope="module")
def guest(alone: Service) -> Iterator[Container]:
    """A container that may export images."""
    keys = {"user.foo": "bar", "security.guestapi.images": "true", "security.devlxd.images": "true"}
    with alone.container("c1", keys) as container:
        yield container


@pytest.fixture
def take_in(alone: Service, tmp_path: Path) -> Iterator[Callable[..., Image]]:
    """Return a function that imports a public image of files with these contents, or of these sizes."""
    taken: list[Image] = []

    def take(*contents: bytes | int) -> Image:
        files = []
        for number, content in enumerate(contents):
            files.append(tmp_path / f"{number}.tar.gz")
            if isinstance(content, bytes):
                files[-1].write_bytes(content)
            else:
                with files[-1].open("wb") as file:
                    file.truncate(content - 16)
                    file.seek(0, os.SEEK_END)
                    file.write(os.urandom(16))
        taken.append(import_image(alone.writer, directory(alone.settings), files, public=True))
        return taken[-1]

    yield take
    for image in taken:
        remove_image(alone.writer, directory(alone.settings), image.fingerprint)


def path_of(service: Service, image: Image) -> Path:
    """Return the path of the image's first file."""
    return paths(directory(service.settings), image)[0]


def url(image: Image) -> str:
    """Return the request path of an image."""
    return f"/1.0/images/{image.fingerprint}/export"


def resident(pid: int) -> int:
    """Return the bytes of a process's anonymous memory (proc_pid_status(5), RssAnon)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def descriptors(pid: int) -> set[str]:
    """Return the image files that a process has open."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if "/images/" in target:
            found.add(target)
    return found


def drop_from_memory(path: Path) -> None:
    """Drop a file's pages from the page cache, so that reads go to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("size", [1, 65_535, 300_000, 3 * MIB + 1])
@pytest.mark.parametrize("dialect", ["incus", "lxd"])
def test_curl_downloads_an_image(guest: Container, take_in: Callable[..., Image], size: int, dialect: str) -> None:
    """curl downloads content with the requested SHA-256, of any size, whole or resumed, in each dialect."""
    content = os.urandom(size)
    image = take_in(content)
    socket = ["--unix-socket", f"/dev/{dialect}/sock"]
    done = guest.run("sh", "-c", f"curl -sfS {' '.join(socket)} http://x{url(image)} | sha256sum")
    assert (done.out.split()[0], done.err) == (image.fingerprint, "")
    resumed = (
        f"head -c {size // 2} /dev/zero >/tmp/part; curl -sfS {' '.join(socket)} -C - -o /tmp/part http://x{url(image)}"
    )
    done = guest.run("sh", "-c", f"{resumed} && tail -c +{size // 2 + 1} /tmp/part | sha256sum; rm -f /tmp/part")
    assert done.out.split()[0] == hashlib.sha256(content[size // 2 :]).hexdigest()


def test_split_image(guest: Container, take_in: Callable[..., Image]) -> None:
    """Both files of a split image come in one multipart response, after which the connection can be used again."""
    meta, root = os.urandom(1000), os.urandom(2 * MIB)
    image = take_in(meta, root)
    with talk(guest) as client:
        answer = client.ask(url(image))
        assert answer.headers["content-type"].startswith("multipart/form-data; boundary=")
        assert meta in answer.body
        assert root in answer.body
        assert client.ask("/1.0/config/user.foo").text == "bar"


def test_pipelined_requests(guest: Container, take_in: Callable[..., Image]) -> None:
    """Requests that are pipelined after one for an image, with ranges and 304, are answered in order."""
    content = os.urandom(2 * MIB)
    image = take_in(content)
    with talk(guest) as client:
        client.send(
            asking(url(image))
            + asking("/1.0/config/user.foo")
            + asking(url(image), "Range: bytes=1000000-1499999")
            + asking(url(image), f'If-None-Match: "{image.fingerprint}"')
        )
        whole, value, part = client.receive(3)
        assert (whole.status, whole.body == content) == (200, True)
        assert value.text == "bar"
        assert (part.status, part.body == content[1_000_000:1_500_000]) == (206, True)
        (same,) = client.receive(1, "HEAD")
        assert (same.status, same.headers["etag"]) == (304, f'"{image.fingerprint}"')
        head = client.ask(url(image), method="HEAD")
        assert head.headers["content-length"] == str(2 * MIB)
        assert client.ask("/").status == 200


def test_names_of_header_fields(guest: Container, take_in: Callable[..., Image]) -> None:
    """Names of header fields are capitalized."""
    image = take_in(b"x")
    with talk(guest) as client:
        client.send(asking(url(image), "Connection: close"))
        head = client.end().decode("latin-1")
    for name in ("Accept-Ranges", "Content-Disposition", "Content-Length", "ETag", "Last-Modified", "X-Incus-Type"):
        assert f"\r\n{name}: " in head


def test_parallel_downloads(alone: Service, guest: Container, take_in: Callable[..., Image]) -> None:
    """While eight guests download, another one gets its answers soon, and the worker's memory does not grow."""
    size = 256 * MIB
    image = take_in(size)
    drop_from_memory(path_of(alone, image))
    (worker,) = alone.workers
    before = highest = resident(worker)
    digests: list[str] = []
    waits: list[float] = []

    def download(client: Talk) -> None:
        client.send(asking(url(image), "Connection: close"))
        received = b""
        while b"\r\n\r\n" not in received:
            received += client.socket.recv(MIB)
        digest = hashlib.sha256(received.partition(b"\r\n\r\n")[2])
        while more := client.socket.recv(MIB):
            digest.update(more)
        digests.append(digest.hexdigest())

    with talks(guest, 9) as (other, *clients):
        threads = [threading.Thread(target=download, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            assert other.ask("/1.0/config/user.foo").text == "bar"
            waits.append(time.monotonic() - began)
            highest = max(highest, resident(worker))
        for thread in threads:
            thread.join()
    assert digests == [image.fingerprint] * 8
    assert len(waits) > 20
    # This process hashes eight downloads in threads, which dominates the measured time. A blocked event loop would take
    # longer.
    assert sorted(waits)[len(waits) // 2] < 0.5
    assert highest - before < 3 * MIB
    assert descriptors(worker) == set()


def test_slow_clients_cost_nothing(alone: Service, guest: Container, take_in: Callable[..., Image]) -> None:
    """A slow client gets the whole image; a client that accepts nothing is disconnected and its file closed."""
    image = take_in(64 * MIB)
    (worker,) = alone.workers
    with talks(guest, 2) as (slow, stuck):
        stuck.send(asking(url(image)))
        slow.send(asking(url(image)))
        end = time.monotonic() + SEND_SECONDS * 2.5
        taken = 0
        while time.monotonic() < end:
            taken += len(slow.socket.recv(65536))
            # This client reads slowly on purpose.
            time.sleep(SEND_SECONDS / 10)
        assert 0 < len(stuck.end()) < 8 * MIB
        while more := slow.socket.recv(MIB):
            taken += len(more)
            if taken > 64 * MIB:
                break
        assert taken > 64 * MIB
    until(lambda: descriptors(worker) == set(), "the expected state")


def test_disconnect_closes_the_file(alone: Service, guest: Container, take_in: Callable[..., Image]) -> None:
    """When a client disconnects during a download, its file is closed at once."""
    image = take_in(64 * MIB)
    with talk(guest) as client:
        client.send(asking(url(image)))
        client.socket.recv(1000)
        assert descriptors(alone.workers[0])
    until(lambda: descriptors(alone.workers[0]) == set(), "the expected state")


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_file_changed_during_a_download(
    alone: Service, guest: Container, take_in: Callable[..., Image], how: str
) -> None:
    """A download whose file is cut or changed ends early, and the log names the file."""
    image = take_in(32 * MIB)
    path = path_of(alone, image)
    with talk(guest) as client:
        client.send(asking(url(image)))
        received = len(client.socket.recv(1000))
        if how == "cut":
            os.truncate(path, 16 * MIB)
        else:
            with path.open("r+b") as file:
                file.write(b"other")
        received += len(client.end())
    assert received < 32 * MIB
    until(lambda: f"{path}: was c" in alone.log.read_text(), "the expected state")


@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_file_changed_before_a_download(
    alone: Service, guest: Container, take_in: Callable[..., Image], how: str
) -> None:
    """A missing, cut or changed file is answered with 404, and the log names the file and the reason."""
    image = take_in(os.urandom(1000))
    path = path_of(alone, image)
    if how == "missing":
        path.unlink()
    elif how == "cut":
        os.truncate(path, 999)
    else:
        path.write_bytes(os.urandom(1000))
    for _time in range(2):
        answer = guest.ask(url(image))
        assert (answer.status, answer.headers["content-type"]) == (404, "application/json")
        assert str(path).encode() not in answer.body
    assert str(path) in alone.log.read_text()


def test_image_removed_during_a_download(alone: Service, guest: Container, take_in: Callable[..., Image]) -> None:
    """An image that is removed during a download is still sent completely; the next request gets 404."""
    image = take_in(16 * MIB)
    with talk(guest) as client:
        client.send(asking(url(image)))
        until(lambda: bool(descriptors(alone.workers[0])), "the expected state")
        # Not with the operator's command: it would take as long to start as the service waits for this client.
        remove_image(alone.writer, directory(alone.settings), image.fingerprint)
        assert guest.ask(url(image)).status == 404
        (answer,) = client.receive()
        assert hashlib.sha256(answer.body).hexdigest() == image.fingerprint
    assert not path_of(alone, image).exists()
    with alone.writer.change() as change:
        add_image(change, image)  # The fixture removes it.


def test_operators_command(alone: Service, guest: Container, tmp_path: Path) -> None:
    """An image that the command imports, opens to guests or removes is served, or not, from the next request on."""
    (tmp_path / "a.tar.gz").write_bytes(GZIP + b"content")
    fingerprint = alone.command("image", "import", str(tmp_path / "a.tar.gz"), "--alias", "a").stdout.strip()
    path = f"/1.0/images/{fingerprint}/export"
    assert guest.ask(path).status == 404
    for words, status in ((["set", "a", "--cached"], 200), (["set", "a", "--no-cached"], 404)):
        alone.command("image", *words)
        assert guest.ask(path).status == status
    alone.command("image", "set", "a", "--public")
    assert guest.ask(path).body == GZIP + b"content"
    assert guest.ask("/1.0/images/a/export").status == 404
    alone.command("image", "remove", "a")
    assert guest.ask(path).status == 404


def test_killed_import(alone: Service, guest: Container, tmp_path: Path) -> None:
    """A guest gets the complete image or 404, whenever the importing command is killed."""
    content = GZIP + os.urandom(24 * MIB)
    (tmp_path / "big.tar.gz").write_bytes(content)
    fingerprint = hashlib.sha256(content).hexdigest()
    where = directory(alone.settings)
    for half in range(0, 24 * MIB, 4 * MIB):
        command = [str(COMMAND), "--config", str(alone.config), "image", "import", f"{tmp_path}/big.tar.gz", "--public"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            # Bound by defaults because of the loop; mypy cannot infer the type of such a lambda.
            until(lambda half=half, run=run: run.poll() is not None or draft_size(where) >= half, "the expected state")  # type: ignore[misc]
            run.kill()
        answer = guest.run(
            "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code} %{size_download}", *SOCKET, full(fingerprint)
        )
        status, size = map(int, answer.out.split())
        known = fingerprint in alone.command("image", "list", "--format", "json").stdout
        assert (status, size if known else 0) == ((200, len(content)) if known else (404, 0))
        if known:
            alone.command("image", "verify", fingerprint)
            alone.command("image", "remove", fingerprint)
    alone.command("image", "import", str(tmp_path / "big.tar.gz"))
    alone.command("image", "verify", fingerprint)
    alone.command("image", "remove", fingerprint)
    assert list(where.glob(".import-*")) == []


def draft_size(where: Path) -> int:
    """Return the size of the files that are being imported."""
    try:
        return max((path.stat().st_size for path in where.glob(".import-*")), default=0)
    except FileNotFoundError:
        return 0


def full(fingerprint: str) -> str:
    """Return an image's URL for curl."""
    return f"http://x/1.0/images/{fingerprint}/export"
