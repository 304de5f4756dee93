"""Attributes as guests write and read them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from guestapi.api.conditional import etag
from guestapi.settings import LimitSettings
from guestapi.store.attributes import VALUE_BYTES, Outcome
from tests.api.fakes import ROOT, Answered, Client, MemoryStore, caller, instance
from tests.api.test_app import ALL, assert_error

ATTRIBUTES = "/1.0/guestapi/attributes"
KEY = f"{ATTRIBUTES}/hostkeys/ed25519"


def allowed(**said: bytes) -> MemoryStore:
    """Return the store of an instance that may have attributes; a path's slash is written as two underscores."""
    held = replace(instance(), allowed=frozenset({"attributes"}))
    return MemoryStore(held, said={path.replace("__", "/"): value for path, value in said.items()})


@pytest.mark.parametrize("dialect", ALL)
def test_write_and_read(dialect: str) -> None:
    """A new one is 201, then 204; it is read byte for byte, listed by its URL, and removed with 204 each time."""
    client = Client(allowed(), dialect)
    value = bytes(range(256))
    first = client.ask(KEY, "PUT", value)
    assert (first.status, first.body, first.headers["etag"]) == (201, b"", etag(value))
    assert client.ask(KEY, "PUT", value + b"\n").status == 204
    read = client.ask(KEY)
    assert (read.status, read.body, read.headers["etag"]) == (200, value + b"\n", etag(value + b"\n"))
    assert read.headers["content-type"] == "application/octet-stream"
    assert client.ask(f"{ATTRIBUTES}/a/b", "PUT").status == 201
    assert client.ask(f"{ATTRIBUTES}/a/b").body == b""
    listed = client.ask(ATTRIBUTES)
    assert (listed.headers["content-type"], json.loads(listed.body)) == (
        "application/json",
        [f"{ATTRIBUTES}/a/b", KEY],
    )
    head = client.ask(KEY, "HEAD")
    assert (head.status, head.headers["content-length"], head.body) == (200, "257", b"")
    for _ in range(2):
        assert client.ask(KEY, "DELETE").status == 204
        assert_error(client.ask(KEY), 404, "not found" if dialect != "lxd-6" else "Not Found")


def every(client: Client) -> list[Answered]:
    """Return the answers to each kind of request."""
    asked = ((ATTRIBUTES, "GET"), (KEY, "GET"), (KEY, "HEAD"), (KEY, "PUT"), (KEY, "DELETE"), (f"{KEY}%00", "PUT"))
    return [client.ask(path, method, b"x" if method == "PUT" else b"") for path, method in asked]


def test_off() -> None:
    """Without permission every path is 403, and `features` does not have it; nothing is written or read."""
    store = MemoryStore(instance(), said={"hostkeys/ed25519": b"x"})
    answers = every(Client(store))
    assert [one.status for one in answers] == [403] * len(answers)
    assert_error(answers[0], 403, "not authorized")
    assert store.said == {"hostkeys/ed25519": b"x"}
    assert json.loads(Client(store).ask("/1.0/guestapi").body) == {"features": ["tree", "notices"]}
    assert json.loads(Client(allowed()).ask("/1.0/guestapi").body) == {"features": ["tree", "notices", "attributes"]}


def test_gate() -> None:
    """Other users get 401, switched off instances 403, and those whose run is over are not known any more."""
    store = allowed()
    assert {one.status for one in every(Client(store, who=caller(uid=ROOT + 5)))} == {401}
    off = allowed()
    assert off.held is not None
    off.held = replace(off.held, config={"security.guestapi": "false"})
    assert {one.status for one in every(Client(off))} == {403}
    assert {one.status for one in every(Client(store, who=caller(run=2)))} == {500}
    assert (store.said, off.said) == ({}, {})


@pytest.mark.parametrize(
    "path",
    [
        *("a%2Fb/c", "a/b%2Fc", "a/b%20c", "a/%00", "a/b%0A", "a/%C3%A4", "a/b%7F", "%2E/a", "a/%2E%2E", "a/b;c"),
        *(f"a/{'b' * 65}", f"{'a' * 65}/b", f"a/{'b' * 4000}", "a%5Cb/c", "a/b*"),
    ],
)
def test_names(path: str) -> None:
    """Names have 1 to 64 characters of a small set, and are not what a path takes for a step."""
    client = Client(allowed())
    for method in ("PUT", "GET", "DELETE"):
        answer = client.ask(f"{ATTRIBUTES}/{path}", method, b"x" if method == "PUT" else b"")
        assert_error(answer, 400, "namespace and key have 1 to 64 letters, digits, dots, dashes and underscores each")
    assert client.store.said == {}


@pytest.mark.parametrize("path", ["Az09._-/...", f"{'a' * 64}/{'b' * 64}", "%61/b", ".a/a.", "-/_"])
def test_good_names(path: str) -> None:
    """All of these are names; an encoded letter is that letter."""
    client = Client(allowed())
    assert client.ask(f"{ATTRIBUTES}/{path}", "PUT", b"x").status == 201
    assert list(client.store.said) == [path.replace("%61", "a")]


@pytest.mark.parametrize("path", ["a", "a/", "a/b/c", "a/b/"])
def test_other_paths(path: str) -> None:
    """Paths with another number of names are unknown."""
    assert Client(allowed()).ask(f"{ATTRIBUTES}/{path}", "PUT", b"x").status == 404


def test_methods() -> None:
    """Other methods are refused, and say which there are."""
    client = Client(allowed())
    assert client.ask(KEY, "PATCH", b"x").headers["allow"] == "DELETE, GET, HEAD, PUT"
    assert client.ask(ATTRIBUTES, "PUT", b"x").headers["allow"] == "GET, HEAD"


def test_size() -> None:
    """A value may have `VALUE_BYTES` bytes and not one more; by its length, it is refused without being read."""
    client = Client(allowed())
    assert client.ask(KEY, "PUT", b"x" * VALUE_BYTES).status == 201
    text = f"the value of an attribute has at most {VALUE_BYTES} bytes"
    assert_error(client.ask(KEY, "PUT", b"x" * (VALUE_BYTES + 1)), 413, text)
    # As an environ has it.
    long = client.ask(KEY, "PUT", b"short", length=VALUE_BYTES + 1)
    assert_error(long, 413, text)
    assert client.environ["wsgi.input"].tell() == 0
    assert client.store.said == {"hostkeys/ed25519": b"x" * VALUE_BYTES}


TAG = etag(b"old")


@pytest.mark.parametrize(
    ("present", "field", "holds"),
    [
        (b"old", {"If-Match": TAG}, True),
        (b"old", {"If-Match": f'"x", {TAG}'}, True),
        (b"old", {"If-Match": "*"}, True),
        (b"old", {"If-Match": '"x"'}, False),
        (b"old", {"If-Match": f"W/{TAG}"}, False),
        (None, {"If-Match": TAG}, False),
        (None, {"If-Match": "*"}, False),
        (None, {"If-None-Match": "*"}, True),
        (b"old", {"If-None-Match": "*"}, False),
        (b"old", {"If-None-Match": TAG}, False),
        (b"old", {"If-None-Match": '"x"'}, True),
        (b"old", {"If-Match": TAG, "If-None-Match": TAG}, False),
        (None, {}, True),
        (b"old", {}, True),
    ],
)
def test_conditions(present: bytes | None, field: dict[str, str], holds: bool) -> None:
    """A write whose conditions do not hold is 412 and changes nothing (RFC 9110, section 13)."""
    for method, value in (("PUT", b"new"), ("DELETE", None)):
        store = allowed() if present is None else allowed(hostkeys__ed25519=present)
        answer = Client(store).ask(KEY, method, value or b"", fields=field)
        if holds:
            assert answer.status == (201 if value and present is None else 204)
        else:
            assert_error(answer, 412, "precondition failed")
        assert store.said.get("hostkeys/ed25519") == (value if holds else present)


def test_conditional_read() -> None:
    """If-None-Match with the tag is 304, If-Match with another one 412; a list of neither is 400, also for a write."""
    client = Client(allowed(hostkeys__ed25519=b"old"))
    known = client.ask(KEY, fields={"If-None-Match": TAG})
    assert (known.status, known.body, known.headers["etag"]) == (304, b"", TAG)
    assert client.ask(KEY, fields={"If-None-Match": '"x"'}).body == b"old"
    assert_error(client.ask(KEY, fields={"If-Match": '"x"'}), 412, "precondition failed")
    assert client.ask(KEY, fields={"If-Match": TAG}).body == b"old"
    for name in ("If-Match", "If-None-Match"):
        for method in ("GET", "PUT", "DELETE"):
            answer = client.ask(KEY, method, b"", fields={name: "old"})
            assert_error(answer, 400, f'{name} is not a list of tags; send them with their quotes, like "5d41", or *')
    assert client.store.said == {"hostkeys/ed25519": b"old"}


@pytest.mark.parametrize(
    ("outcome", "status", "text"),
    [
        (Outcome.TOO_MANY, 507, "an instance has at most 128 attributes"),
        (Outcome.TOO_LARGE, 507, "the attributes of an instance have at most 262144 bytes together"),
        (Outcome.NOT_ALLOWED, 403, "not authorized"),
        (Outcome.GONE, 500, "pid not in container?"),
    ],
)
def test_refused_by_the_store(outcome: Outcome, status: int, text: str) -> None:
    """What the store refuses is told with its status."""
    store = allowed()
    store.outcome = outcome
    assert_error(Client(store).ask(KEY, "PUT", b"x"), status, text)


def test_rate() -> None:
    """Writes take from the same bucket as changes of state; reads take nothing; what is over it is not written."""
    client = Client(allowed())
    burst = LimitSettings().writes_burst
    assert client.ask("/1.0", "PATCH", b'{"state":"Ready"}').status == 200
    answers = [client.ask(f"{ATTRIBUTES}/a/{number}", "PUT", b"x") for number in range(burst)]
    assert [one.status for one in answers] == [201] * (burst - 1) + [429]
    assert_error(answers[-1], 429, "too many writes of attributes")
    assert answers[-1].headers["retry-after"] == "1"
    assert client.ask(f"{ATTRIBUTES}/a/0", "DELETE").status == 429
    assert client.ask(f"{ATTRIBUTES}/a/0").status == 200
    assert len(client.store.said) == burst - 1
