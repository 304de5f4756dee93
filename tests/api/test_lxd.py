"""Responses of the lxd dialect that are as LXD's own: redirects, routes, handshakes, images, state."""

from __future__ import annotations

import base64
import hashlib

import pytest

from guestapi.wsgi import HANDOVER
from tests.api.fakes import Client, MemoryStore, instance

CONFIG = {"user.foo": "bar", "security.devlxd.images": "true"}
UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}


def client(ready: bool = False) -> Client:
    """Return a client at the lxd socket."""
    return Client(MemoryStore(instance(CONFIG, ready=ready)), "lxd")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "CONNECT"])
@pytest.mark.parametrize(
    ("path", "query", "location"),
    [
        ("//1.0", "", "/1.0"),
        ("/1.0/../1.0/config", "a=b&c", "/1.0/config?a=b&c"),
        ("/1.0/config//", "", "/1.0/config/"),
        ("/1.0//a!b", "", "/1.0/a%21b"),
        ("*", "", "/%2A"),
    ],
)
def test_redirect(method: str, path: str, query: str, location: str) -> None:
    """With any method, an unclean path and `*` are redirected by 301 without a body or a Content-Type."""
    answer = client().ask(path, method, query=query)
    assert (answer.status, answer.body) == (301, b"")
    assert answer.headers == {"location": location, "content-length": "0"}


@pytest.mark.parametrize(
    ("target", "location"), [("http://guest", "http://guest/"), ("https://u@x:1//1.0", "https://u@x:1/1.0")]
)
def test_redirect_of_an_absolute_target(target: str, location: str) -> None:
    """The Location of a target in absolute form has its scheme and host."""
    path = target.split("//", 1)[1]
    path = path[path.index("/") :] if "/" in path else ""
    answer = client().ask(path, target=target)
    assert (answer.status, answer.headers["location"]) == (301, location)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/1%2e0", 404),
        ("/%31.0", 404),
        ("/1.0/%63onfig", 404),
        ("/1.0/%63onfig/user.foo", 404),
        ("/1.0%2Fconfig", 404),
        ("/1.0/config/", 404),
        ("/1.0/config/%75ser%2efoo", 200),
        ("/1.0/config/%2F", 403),
        ("/1.0/config/%2e%2e", 403),
    ],
)
def test_fixed_segments_must_not_be_percent_encoded(path: str, status: int) -> None:
    """Only a key and a fingerprint may be percent-encoded, also with an encoded slash."""
    assert client().ask(path).status == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://x"])
def test_any_origin_may_upgrade(origin: str) -> None:
    """The Origin is ignored, as in LXD."""
    assert upgraded({"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Origin": origin})


@pytest.mark.parametrize("key", ["abc", "%", "dGhlIHNhbXBsZSBub25jZQ==", "\xe9"])
def test_any_key_is_accepted(key: str) -> None:
    """A key of any length is accepted, and answered with its hash."""
    wanted = hashlib.sha1(key.encode("latin-1") + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
    assert upgraded({"Sec-WebSocket-Key": key}) == base64.b64encode(wanted).decode()


@pytest.mark.parametrize("fields", [{}, {"Sec-WebSocket-Key": ""}])
def test_key_is_needed(fields: dict[str, str]) -> None:
    """Without a key the upgrade is refused."""
    answer = client().ask("/1.0/events", fields={**UPGRADE, **fields})
    assert (answer.status, answer.headers["sec-websocket-version"]) == (400, "13")


def upgraded(fields: dict[str, str]) -> str:
    """Return the Sec-WebSocket-Accept of an upgrade with these fields."""
    asking = client()
    asking.ask("/1.0/events", fields={**UPGRADE, **fields})
    handover = asking.environ[HANDOVER]
    assert handover.status == "101 Switching Protocols"
    return str(dict(handover.headers)["Sec-WebSocket-Accept"])


@pytest.mark.parametrize("name", ["f" * 64, "f" * 12, "f", "%25", "tinypub", "a%22b"])
def test_missing_image(name: str) -> None:
    """A missing image gets the error of LXD's main API, without the name, and with two line feeds at the end."""
    answer = client().ask(f"/1.0/images/{name}/export")
    assert answer.status == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.body.endswith(b'"error_code":404,"error":"Image not found","metadata":null}\n\n')


@pytest.mark.parametrize(
    ("body", "reported", "state"),
    [
        (b'{"state":"Ready"}', [(7, 1, True)], "Ready"),
        (b'{"STATE":"Ready"} and more', [(7, 1, True)], "Ready"),
        (b'{"state":"Started"}', [(7, 1, False)], "Started"),
        (b'{"state":"Bogus"}', [], "Ready"),
        (b"no JSON", [], "Ready"),
        (b"", [], "Ready"),
        (b"[" * 5000, [], "Ready"),
    ],
)
def test_patch_is_answered_as_get(body: bytes, reported: list[tuple[int, int, bool]], state: str) -> None:
    """PATCH is answered as GET, whatever its body; a valid state in the body is stored."""
    store = MemoryStore(instance(CONFIG, ready=True))
    answer = Client(store, "lxd").ask("/1.0", "PATCH", body)
    description = f'{{"state":"{state}","api_version":"1.0","instance_type":"container","location":"none"}}\n'
    assert (answer.status, answer.body.decode()) == (200, description)
    assert store.reported == reported


def test_too_many_changes_are_refused() -> None:
    """Changes of the state are limited to the rate of every dialect; a PATCH without a state is not counted."""
    asking = client()
    answers = [asking.ask("/1.0", "PATCH", b'{"state":"Ready"}').status for _time in range(30)]
    assert answers[0] == 200
    assert answers[-1] == 429
    assert asking.ask("/1.0", "PATCH", b"none").status == 200
