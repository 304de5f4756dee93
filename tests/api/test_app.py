"""The WSGI application, called directly: endpoints of each dialect, responses and refusals."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import pytest

from guestapi.store.errors import StoreError
from tests.api.fakes import CLOUD_INIT_ID, Answered, Client, MemoryStore, caller, instance

CONFIG = {
    "cloud-init.user-data": "#cloud-config\n",
    "security.nesting": "true",
    "user.a/b": "slash",
    "user.foo": "%s<&>\r\n☃ no final newline",
    "user.meta-data": "a: <b>\n\n# c",
    "volatile.eth0.hwaddr": "10:66:6a:00:00:01",
    "volatile.eth1.hwaddr": "10:66:6a:00:00:02",
    "volatile.root.hwaddr": "10:66:6a:00:00:03",
}
DEVICES = {
    "eth0": {"type": "nic", "nictype": "ipvlan", "parent": "p0"},
    "eth1": {"type": "nic", "nictype": "ipvlan", "hwaddr": "00:16:3e:00:00:01"},
    "eth2": {"type": "nic", "nictype": "bridged", "network": "n0"},
    "root": {"type": "disk", "path": "/", "pool": "default"},
}
ALL = ["incus", "lxd", "lxd-legacy"]
NEWER = ["incus", "lxd"]
PLAIN_ERROR = {"content-type": "text/plain; charset=utf-8", "x-content-type-options": "nosniff"}


def client(dialect: str = "incus") -> Client:
    """Return a client in an instance with configuration and devices of all kinds."""
    return Client(MemoryStore(instance(CONFIG, DEVICES)), dialect)


def assert_error(answer: Answered, status: int, text: str) -> None:
    """Check that the response is this refusal, in the common form."""
    assert (answer.status, answer.body.decode()) == (status, f"{text}\n")
    assert PLAIN_ERROR.items() <= answer.headers.items()
    assert answer.headers["content-length"] == str(len(answer.body))


def test_endpoints_of_each_dialect() -> None:
    """Each dialect has its endpoints and methods, and no others."""
    paths = ["/", "/1.0", "/1.0/config", "/1.0/config/user.foo", "/1.0/meta-data", "/1.0/events", "/1.0/devices"]
    paths += [f"/1.0/images/{'0' * 64}/export", "/1.0/device/eth0", "/2.0", "/1.0/config/", "/1.0/images"]
    offered = {
        dialect: {
            path: set(answer.headers.get("allow", "").split(", "))
            for path in paths
            if (answer := client(dialect).ask(path, "PUT")).status != 404
        }
        for dialect in ALL
    }
    reads = {"GET", "HEAD"}
    newer = {path: set(reads) for path in paths[:8]}
    newer["/1.0"] = {"GET", "HEAD", "PATCH"}
    assert offered == {"incus": newer, "lxd": newer, "lxd-legacy": dict.fromkeys(paths[:9], reads)}


@pytest.mark.parametrize("dialect", ALL)
def test_root(dialect: str) -> None:
    """`/` lists the only API version."""
    answer = client(dialect).ask("/")
    assert (answer.status, answer.body) == (200, b'["/1.0"]\n')
    assert answer.headers == {"content-type": "application/json", "content-length": "9"}


@pytest.mark.parametrize("dialect", NEWER)
def test_description(dialect: str) -> None:
    """`GET /1.0` has state, version, type and location in this order; the default location is the host or "none"."""
    store = MemoryStore(instance(ready=False))
    host = b'"none"' if dialect == "lxd" else json.dumps(platform.node()).encode()
    expected = b'{"state":"Started","api_version":"1.0","instance_type":"container","location":' + host + b"}\n"
    assert Client(store, dialect).ask("/1.0").body == expected
    store.held = instance(ready=True, location="member-2")
    answer = Client(store, dialect).ask("/1.0")
    assert answer.body == (b'{"state":"Ready","api_version":"1.0","instance_type":"container","location":"member-2"}\n')
    assert answer.headers["content-type"] == "application/json"


def test_description_in_lxd_legacy() -> None:
    """In lxd-legacy, `/1.0` has only the version."""
    assert client("lxd-legacy").ask("/1.0").body == b'{"api_version":"1.0"}\n'


def test_state_is_recorded() -> None:
    """PATCH records the state for this instance in this run, and has an empty body of unknown type."""
    store = MemoryStore(instance())
    asking = Client(store)
    answer = asking.ask("/1.0", "PATCH", b'{"state":"Ready"}')
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers == {"content-type": "application/octet-stream", "content-length": "0"}
    assert asking.ask("/1.0", "PATCH", b'{"state":"Started"}').status == 200
    assert store.reported == [(7, 1, True), (7, 1, False)]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"state":"ready"}', 'Invalid state "ready"'),
        (b"{}", 'Invalid state ""'),
        (b'{"state":"a\\u0000\\"\\n"}', r'Invalid state "a\x00\"\n"'),
        ('{"state":"☃"}'.encode(), 'Invalid state "☃"'),
    ],
)
def test_invalid_state(body: bytes, text: str) -> None:
    """Any other state is refused with its name on one line, and nothing is recorded."""
    store = MemoryStore(instance())
    assert_error(Client(store).ask("/1.0", "PATCH", body), 400, text)
    assert store.reported == []


def test_state_of_a_run_that_is_over() -> None:
    """A state for a run that has just ended is refused like an unknown caller's."""
    answer = Client(MemoryStore(instance(), over=True)).ask("/1.0", "PATCH", b'{"state":"Ready"}')
    assert_error(answer, 500, "pid not in container?")


def test_state_in_lxd_legacy() -> None:
    """lxd-legacy has no PATCH: 405, and nothing is recorded."""
    store = MemoryStore(instance())
    answer = Client(store, "lxd-legacy").ask("/1.0", "PATCH", b'{"state":"Ready"}')
    assert_error(answer, 405, 'method "PATCH" not allowed')
    assert answer.headers["allow"] == "GET, HEAD"
    assert store.reported == []


@pytest.mark.parametrize(
    ("dialect", "keys"),
    [
        ("incus", ["cloud-init.user-data", "user.a/b", "user.foo", "user.meta-data"]),
        ("lxd", ["cloud-init.user-data", "user.a/b", "user.foo", "user.meta-data"]),
        ("lxd-legacy", ["user.a/b", "user.foo", "user.meta-data"]),
    ],
)
def test_keys(dialect: str, keys: list[str]) -> None:
    """The list has the readable keys, sorted and not encoded; a listed key without a slash can be read by its URL."""
    answer = client(dialect).ask("/1.0/config")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body) == [f"/1.0/config/{key}" for key in keys]
    assert all(client(dialect).ask(f"/1.0/config/{key}").status == 200 for key in keys if key.count("/") == 0)


@pytest.mark.parametrize("dialect", ALL)
def test_no_keys(dialect: str) -> None:
    """Without readable keys the list is empty, not null."""
    assert Client(MemoryStore(instance({"security.x": "1"})), dialect).ask("/1.0/config").body == b"[]\n"


def test_value_is_unchanged() -> None:
    """A value is sent byte for byte, as octets, without an additional newline."""
    answer = client().ask("/1.0/config/user.foo", query="x=y")
    assert (answer.status, answer.body) == (200, CONFIG["user.foo"].encode())
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(len(answer.body))


def test_key_with_a_slash() -> None:
    """`%2F` in a key stands for a slash; a plain slash does not belong to the key."""
    assert client().ask("/1.0/config/user.a%2Fb").body == b"slash"
    assert_error(client().ask("/1.0/config/user.a/b"), 404, "404 page not found")


@pytest.mark.parametrize(
    "key",
    ["security.nesting", "security.unset", "User.foo", "user", "cloud-init", "volatile.eth0.hwaddr", "%2Fuser.foo"],
)
def test_key_outside_the_prefixes(key: str) -> None:
    """An unreadable key is refused whether it is set or not, so that a guest cannot find out which."""
    assert_error(client().ask(f"/1.0/config/{key}"), 403, "not authorized")


def test_keys_that_are_not_set() -> None:
    """A readable key that is not set is not found; in lxd-legacy cloud-init's keys are unreadable."""
    for key in ("user.bar", "user.", "cloud-init.x", "user.%ff"):
        assert_error(client().ask(f"/1.0/config/{key}"), 404, "not found")
    assert_error(client("lxd-legacy").ask("/1.0/config/cloud-init.user-data"), 403, "not authorized")


@pytest.mark.parametrize("dialect", NEWER)
def test_devices(dialect: str) -> None:
    """Devices have sorted options; a NIC without hwaddr gets the volatile one, and a disk gets none."""
    answer = client(dialect).ask("/1.0/devices")
    assert answer.headers["content-type"] == "application/json"
    assert answer.body == (
        b'{"eth0":{"hwaddr":"10:66:6a:00:00:01","nictype":"ipvlan","parent":"p0","type":"nic"},'
        b'"eth1":{"hwaddr":"00:16:3e:00:00:01","nictype":"ipvlan","type":"nic"},'
        b'"eth2":{"network":"n0","nictype":"bridged","type":"nic"},'
        b'"root":{"path":"/","pool":"default","type":"disk"}}\n'
    )


@pytest.mark.parametrize(("dialect", "body"), [("incus", b"{}\n"), ("lxd", b"{}\n"), ("lxd-legacy", b"[]\n")])
def test_no_devices(dialect: str, body: bytes) -> None:
    """Without devices the document is empty, not null."""
    assert Client(MemoryStore(instance()), dialect).ask("/1.0/devices").body == body


def test_devices_in_lxd_legacy() -> None:
    """lxd-legacy lists the URLs of ipvlan NICs, each of which can be read; no other device can."""
    asking = client("lxd-legacy")
    assert json.loads(asking.ask("/1.0/devices").body) == ["/1.0/device/eth0", "/1.0/device/eth1"]
    answer = asking.ask("/1.0/device/eth0")
    assert answer.body == b'{"hwaddr":"10:66:6a:00:00:01","nictype":"ipvlan","parent":"p0","type":"nic"}\n'
    assert answer.headers["content-type"] == "application/json"
    for name in ("eth2", "root", "eth9"):
        assert_error(asking.ask(f"/1.0/device/{name}"), 404, "not found")


@pytest.mark.parametrize(
    ("dialect", "identity"), [("incus", CLOUD_INIT_ID), ("lxd", CLOUD_INIT_ID), ("lxd-legacy", "c1")]
)
def test_meta_data(dialect: str, identity: str) -> None:
    """Meta-data has the cloud-init UUID, or in lxd-legacy the instance's name, and then `user.meta-data` unchanged."""
    answer = client(dialect).ask("/1.0/meta-data")
    assert answer.body.decode() == f"#cloud-config\ninstance-id: {identity}\nlocal-hostname: c1\na: <b>\n\n# c"
    assert answer.headers["content-type"] == "application/octet-stream"
    plain = Client(MemoryStore(instance()), dialect).ask("/1.0/meta-data")
    assert plain.body.decode() == f"#cloud-config\ninstance-id: {identity}\nlocal-hostname: c1\n"


@pytest.mark.parametrize("dialect", ALL)
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/1.0",
        "/1.0/config",
        "/1.0/config/user.foo",
        "/1.0/config/user.bar",
        "/1.0/devices",
        "/1.0/meta-data",
        "/nowhere",
        "/1.0//x",
    ],
)
def test_head_is_get_without_body(dialect: str, path: str) -> None:
    """HEAD has GET's status and header fields, also for refusals, and no body."""
    got, headed = (client(dialect).ask(path, method) for method in ("GET", "HEAD"))
    assert (headed.status, headed.headers, headed.body) == (got.status, got.headers, b"")
    assert headed.headers["content-length"] == str(len(got.body))


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE", "OPTIONS", "TRACE", "FOO", "get", "CONNECT"])
def test_method_not_offered(method: str) -> None:
    """Any other method, known to HTTP or not, is refused with 405 and Allow."""
    answer = client().ask("/1.0", method)
    assert_error(answer, 405, f'method "{method}" not allowed')
    assert answer.headers["allow"] == "GET, HEAD, PATCH"


@pytest.mark.parametrize(
    ("path", "query", "location"),
    [
        ("//1.0", "", "/1.0"),
        ("/1.0/../1.0/config", "a=b&c", "/1.0/config?a=b&c"),
        ("/1.0/config//", "", "/1.0/config/"),
        ("/1.0/./config/user.a%2Fb", "", "/1.0/config/user.a%2Fb"),
        ("//evil.example/x", "", "/evil.example/x"),
        ('/./"><script>', "", "/%22%3E%3Cscript%3E"),
        ("", "", "/"),
    ],
)
def test_unclean_path_is_redirected(path: str, query: str, location: str) -> None:
    """An unclean path is redirected to the clean one, encoded and with its query, for any caller; HTML is escaped."""
    asking = Client(MemoryStore(None), who=caller(instance_id=None))
    answer = asking.ask(path, query=query)
    assert (answer.status, answer.headers["location"]) == (307, location)
    assert answer.headers["content-length"] == str(len(answer.body))
    assert b"<script>" not in answer.body
    assert asking.ask(path, "PATCH", query=query).headers["location"] == location


def test_unknown_path_comes_first() -> None:
    """An unknown path is 404 for unknown callers, users other than root, and when the API is switched off."""
    for who, held in (
        (caller(instance_id=None), None),
        (caller(uid=0), instance()),
        (caller(), instance({"security.guestapi": "false"})),
    ):
        answer = Client(MemoryStore(held), who=who).ask("/1.0/nowhere")
        assert_error(answer, 404, "404 page not found")


def test_refusals_of_the_gate() -> None:
    """Unknown callers get 500, users other than root 401, and instances that are switched off 403."""
    held = instance(CONFIG)
    assert_error(Client(MemoryStore(held), who=caller(living=False)).ask("/"), 500, "pid not in container?")
    assert_error(Client(MemoryStore(held), who=caller(uid=0)).ask("/"), 401, "Access denied for non-root user")
    off = MemoryStore(instance({"security.guestapi": "false"}))
    assert Client(off).ask("/").status == 200
    assert_error(Client(off).ask("/1.0/config/user.foo"), 403, "not authorized")
    assert_error(Client(off).ask("/1.0", "PATCH", b'{"state":"Ready"}'), 403, "not authorized")
    assert off.reported == []


@pytest.mark.parametrize("dialect", ALL)
def test_store_fault(dialect: str, caplog: pytest.LogCaptureFixture) -> None:
    """A store that cannot be read gives a temporary 500, never 503; only the log has the reason."""
    store = MemoryStore(instance(), fault=StoreError("/var/lib/guestapi/store.db: disk I/O error"))
    with caplog.at_level("ERROR"):
        answer = Client(store, dialect).ask("/1.0/config")
    assert_error(answer, 500, "temporarily unavailable, try again")
    assert "disk I/O error" in caplog.text


@pytest.mark.parametrize("dialect", ALL)
@pytest.mark.parametrize("fault", [ValueError("SELECT secret"), KeyError("secret"), RuntimeError(), RecursionError()])
def test_unexpected_exception(dialect: str, fault: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception gives `internal error` to the guest and a traceback to the log."""
    with caplog.at_level("ERROR"):
        answer = Client(MemoryStore(instance(), fault=fault), dialect).ask("/1.0/config")
    assert_error(answer, 500, "internal error")
    assert "Traceback" in caplog.text


def test_large_values_are_read_one_by_one() -> None:
    """A key with a large value is listed as usual; its value is read from the store only on request."""
    held = replace(
        instance({"user.a": "1", "user.z": "2"}), large=frozenset({"user.large", "user.meta-data", "limits.x"})
    )
    store = MemoryStore(held, large_values={"user.large": "x" * 70_000, "user.meta-data": "y: 1\n"})
    client = Client(store)
    listed = json.loads(client.ask("/1.0/config").body)
    assert listed == [f"/1.0/config/{key}" for key in ("user.a", "user.large", "user.meta-data", "user.z")]
    assert client.ask("/1.0/config/user.a").body == b"1"
    assert store.read == []
    assert client.ask("/1.0/config/user.large").body == b"x" * 70_000
    assert client.ask("/1.0/config/limits.x").status == 403
    assert client.ask("/1.0/meta-data").body.endswith(b"\ny: 1\n")
    assert store.read == ["user.large", "user.meta-data"]


def test_large_value_that_is_unset() -> None:
    """A large value that is unset after the instance was read is not found."""
    held = replace(instance(), large=frozenset({"user.large"}))
    assert Client(MemoryStore(held)).ask("/1.0/config/user.large").status == 404
