"""Image export by the application, called directly: permissions, content, ranges, conditions and refusals."""

from __future__ import annotations

import email
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.model import Image, ImageFile
from guestapi.wsgi import ChangedFileError, Content, FilePart
from tests.api.fakes import Answered, Client, MemoryStore, caller, instance

FP, SPLIT, PRIVATE = "a" * 64, "b" * 64, "c" * 64
BODY = bytes(range(256)) * 4
DIALECTS = [
    ("incus", "security.guestapi.images"),
    ("lxd", "security.devlxd.images"),
    ("lxd-legacy", "security.devlxd.images"),
]


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """Check that a response leaves no file open."""
    # Garbage of earlier tests must not be collected during this one.
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def add(store: MemoryStore, fingerprint: str, *files: tuple[str, bytes], **options: bool) -> None:
    """Add an image to the store."""
    held = []
    for name, (extension, content) in zip((fingerprint, f"{fingerprint}.rootfs"), files, strict=False):
        (store.where / name).write_bytes(content)
        os.utime(store.where / name, ns=(0, 784_111_777_500_000_000))
        held.append(ImageFile(extension, len(content), 784_111_777_500_000_000))
    kind = "virtual-machine" if options.pop("vm", False) else "container"
    public, cached = options.get("public", False), options.get("cached", False)
    image = Image(fingerprint, kind, public, cached, 0.0, tuple(held), ())  # type: ignore[arg-type]  # one of two literals
    store.images[fingerprint] = image


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    """A store with a public, a cached split, and a private image; its instance may export images in every dialect."""
    made = MemoryStore(instance({key: "true" for _dialect, key in DIALECTS}), where=tmp_path)
    add(made, FP, (".tar.gz", BODY), public=True)
    add(made, SPLIT, (".tar.xz", b"meta"), (".squashfs", BODY), cached=True)
    add(made, PRIVATE, (".tar.gz", BODY))
    return made


def export(store: MemoryStore, name: str = FP, dialect: str = "incus", method: str = "GET", **fields: str) -> Answered:
    """Request an image with these header fields (``if_range`` for If-Range)."""
    return Client(store, dialect).ask(f"/1.0/images/{name}/export", method, fields=fields)


def not_found(name: str) -> bytes:
    """Return the body of the one 404 of images."""
    head = b'{"type":"error","status":"","status_code":0,"operation":"","error_code":404,"error":'
    return head + json.dumps(f'Image "{name}" not found', ensure_ascii=False).encode() + b',"metadata":null}\n'


@pytest.mark.parametrize(("dialect", "key"), DIALECTS)
def test_key_that_permits_images(store: MemoryStore, dialect: str, key: str) -> None:
    """Only a true value of the dialect's own key permits images; without it, every image gets the same 403."""
    for config, status in ({key: "true"}, 200), ({key: "1"}, 200), ({key: "false"}, 403), ({}, 403), ({key: ""}, 403):
        store.held = instance(config)
        answer = export(store, dialect=dialect)
        assert answer.status == status
        if status == 403:
            others = [export(store, name, dialect) for name in (SPLIT, PRIVATE, "f" * 64, "x")]
            assert {(one.status, one.body) for one in [answer, *others]} == {(403, b"not authorized\n")}


def test_unified_image(store: MemoryStore) -> None:
    """A unified image is sent unchanged, with its name, length and time in the head."""
    answer = export(store)
    assert (answer.status, answer.body) == (200, BODY)
    assert answer.headers == {
        "accept-ranges": "bytes",
        "content-disposition": f"inline;filename={FP}.tar.gz",
        "content-length": str(len(BODY)),
        "content-type": "application/octet-stream",
        "etag": f'"{FP}"',
        "last-modified": "Sun, 06 Nov 1994 08:49:37 GMT",
        "x-incus-type": "incus",
    }
    assert "x-incus-type" not in export(store, dialect="lxd").headers


@pytest.mark.parametrize(("vm", "part"), [(False, "rootfs"), (True, "rootfs.img")])
def test_split_image(store: MemoryStore, vm: bool, part: str) -> None:
    """A split image is a form of two files with Incus's names; its length is known, and it is the same each time."""
    add(store, SPLIT, (".tar.xz", b"meta"), (".squashfs", BODY), cached=True, vm=vm)
    answer = export(store, SPLIT)
    assert answer.headers["content-length"] == str(len(answer.body))
    form = email.message_from_bytes(f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode() + answer.body)
    assert form.get_content_type() == "multipart/form-data"
    parts = form.get_payload()
    assert isinstance(parts, list)
    described = [
        (one.get_param("name", header="content-disposition"), one.get_filename(), one.get_content_type())
        for one in parts
        if isinstance(one, email.message.Message)
    ]
    assert described == [
        ("metadata", f"meta-{SPLIT}.tar.xz", "application/octet-stream"),
        (part, f"{SPLIT}.squashfs", "application/octet-stream"),
    ]
    boundary = answer.headers["content-type"].partition("boundary=")[2].encode()
    assert answer.body.split(b"\r\n\r\n", 1)[1].startswith(b"meta\r\n--" + boundary)
    assert answer.body.endswith(BODY + b"\r\n--" + boundary + b"--\r\n")
    assert export(store, SPLIT).body == answer.body
    assert export(store, SPLIT, range="bytes=0-1").status == 200


@pytest.mark.parametrize(
    "name",
    [PRIVATE, "f" * 64, FP[:12], FP.upper(), "a", "alias", "%25", "%2e%2e", "'", "%E2%98%83", "x" * 5000, f"{FP}%2Fa"],
)
def test_not_found(store: MemoryStore, name: str) -> None:
    """A private or unknown fingerprint, an abbreviation, an alias and nonsense get the same 404 as in the main API."""
    answer = export(store, name)
    decoded = name.replace("%25", "%").replace("%2e", ".").replace("%E2%98%83", "☃").replace("%2F", "/")
    assert (answer.status, answer.body) == (404, not_found(decoded))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_names_are_escaped(store: MemoryStore) -> None:
    """A name in the error is escaped for JSON and HTML."""
    answer = export(store, "%22%3Cb%3E%26%5C")
    assert b'"error":"Image \\"\\\\\\"\\u003cb\\u003e\\u0026\\\\\\\\\\" not found"' in answer.body
    assert json.loads(answer.body)["error"] == 'Image "\\"<b>&\\\\" not found'


@pytest.mark.parametrize("spoil", ["missing", "cut", "changed", "link"])
def test_image_with_a_changed_file(store: MemoryStore, spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    """A file that differs from the import is not sent: the guest gets 404, and the log names the file."""
    path = store.where / FP
    if spoil == "missing":
        path.unlink()
    elif spoil == "cut":
        os.truncate(path, 10)
    elif spoil == "changed":
        path.write_bytes(BODY)
    else:
        path.rename(store.where / "elsewhere")
        path.symlink_to(store.where / "elsewhere")
    for method in ("GET", "HEAD"):
        answer = export(store, method=method)
        assert (answer.status, answer.body) == (404, not_found(FP) if method == "GET" else b"")
        assert str(path) in caplog.text
        assert str(path).encode() not in answer.body


def test_half_a_split_image(store: MemoryStore) -> None:
    """A split image without its second file is not found."""
    (store.where / f"{SPLIT}.rootfs").unlink()
    assert export(store, SPLIT).status == 404


def test_head(store: MemoryStore) -> None:
    """HEAD has GET's header fields and no body; a range applies only to GET."""
    for name in (FP, SPLIT):
        got, head = export(store, name), export(store, name, method="HEAD")
        assert (head.status, head.headers, head.body) == (200, got.headers, b"")
    assert export(store, method="HEAD", range="bytes=0-1").status == 200


def test_range(store: MemoryStore) -> None:
    """A single range is sent as the body."""
    answer = export(store, range="bytes=10-19")
    assert (answer.status, answer.body) == (206, BODY[10:20])
    assert answer.headers["content-range"] == f"bytes 10-19/{len(BODY)}"
    assert answer.headers["content-length"] == "10"
    assert answer.headers["etag"] == f'"{FP}"'


def test_ranges(store: MemoryStore) -> None:
    """Several ranges are sent as one multipart body, in the order of the request."""
    answer = export(store, range="bytes=-2, 0-3")
    assert answer.status == 206
    boundary = answer.headers["content-type"].removeprefix("multipart/byteranges; boundary=")
    parts = [(f"bytes 1022-1023/{len(BODY)}", BODY[-2:]), (f"bytes 0-3/{len(BODY)}", BODY[:4])]
    expected = b"\r\n".join(
        f"--{boundary}\r\nContent-Range: {where}\r\nContent-Type: application/octet-stream\r\n\r\n".encode() + content
        for where, content in parts
    )
    assert answer.body == expected + f"\r\n--{boundary}--\r\n".encode()
    assert answer.headers["content-length"] == str(len(answer.body))


def test_range_beyond_the_end(store: MemoryStore) -> None:
    """416 has the length of the image."""
    answer = export(store, range="bytes=99999-")
    assert (answer.status, answer.body) == (416, b"invalid range: failed to overlap\n")
    assert answer.headers["content-range"] == f"bytes */{len(BODY)}"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_not_modified(store: MemoryStore) -> None:
    """304 has no body, and the ETag."""
    for name, fields in (
        (FP, {"if_none_match": f'"{FP}"'}),
        (SPLIT, {"if_none_match": f'"{SPLIT}"'}),
        (FP, {"if_modified_since": "Sun, 06 Nov 1994 08:49:37 GMT", "range": "bytes=0-1"}),
    ):
        answer = export(store, name, **fields)
        assert (answer.status, answer.body) == (304, b"")
        assert answer.headers["etag"] == f'"{name}"'
        assert not {"content-length", "content-type"} & answer.headers.keys()


def test_failed_condition(store: MemoryStore) -> None:
    """If-Match with another image gets 412."""
    answer = export(store, if_match='"other"')
    assert (answer.status, answer.body) == (412, b"precondition failed\n")


@pytest.mark.parametrize("method", ["PUT", "POST", "PATCH", "DELETE", "OPTIONS", "FOO"])
def test_other_methods(store: MemoryStore, method: str) -> None:
    """Only reads are offered."""
    answer = export(store, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_gate_comes_first(store: MemoryStore) -> None:
    """As for any other path, only root of a known instance that is switched on may export images."""
    application = Client(store, who=caller(uid=1234))
    assert application.ask(f"/1.0/images/{FP}/export").status == 401
    assert Client(store, who=caller(instance_id=None)).ask(f"/1.0/images/{FP}/export").status == 500
    store.held = instance({"security.guestapi": "false", "security.guestapi.images": "true"})
    assert export(store).status == 403


def test_file_changed_while_it_is_sent(store: MemoryStore) -> None:
    """A body whose file changes while it is sent ends with an error, so that the server does not complete it."""
    add(store, FP, (".tar.gz", os.urandom(1 << 20)), public=True)
    descriptors = store.open_image(store.images[FP])
    file = store.images[FP].files[0]
    content = Content([FilePart(descriptors[0], 0, file.size, file.size, file.mtime_ns)], descriptors)
    sending = iter(content)
    next(sending)
    os.truncate(store.where / FP, 100_000)
    with pytest.raises(ChangedFileError, match=FP):
        list(sending)
    content.close()
