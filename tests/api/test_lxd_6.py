"""The lxd-6 dialect: descriptions, texts, methods, SSH keys in cloud-init's documents, Ubuntu Pro."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from guestapi.api.app import create
from guestapi.api.cloud_config import merge
from guestapi.api.resources.ubuntu_pro import GuestAttach, GuestToken
from guestapi.model import Instance
from guestapi.notifications.broker import Broker
from tests.api.fakes import CLOUD_INIT_ID, Answered, Client, EmptyLog, MemoryStore, caller, instance

KEY, OTHER = "ssh-ed25519 AAAA1 bob@home", "ssh-ed25519 AAAA2"
PLAIN = "#cloud-config\npackages: [curl]\n"
WITH_USERS = "#cloud-config\nusers:\n- default\n- {name: amy, sudo: null}\n"
#: The two requests of the Ubuntu Pro client (uaclient.clouds.lxd).
PRO_REQUESTS = [("GET", "/1.0/ubuntu-pro"), ("POST", "/1.0/ubuntu-pro/token")]


def ask(path: str, method: str = "GET", body: bytes = b"", config: dict[str, str] | None = None) -> Answered:
    """Send one request to the lxd-6 socket."""
    return Client(MemoryStore(instance(dict(sorted((config or {}).items())))), "lxd-6").ask(path, method, body)


def test_description() -> None:
    """`GET /1.0` has in addition that the guest is not trusted, and that there is no storage."""
    assert ask("/1.0").body == (
        b'{"state":"Started","api_version":"1.0","instance_type":"container","location":"none",'
        b'"auth":"untrusted","supported_storage_drivers":[]}\n'
    )


def test_state() -> None:
    """PATCH stores a state, and its response has no body."""
    store = MemoryStore(instance())
    answer = Client(store, "lxd-6").ask("/1.0", "PATCH", b'{"state":"Ready"}')
    assert (answer.status, answer.body, store.reported) == (200, b"", [(7, 1, True)])


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[]", b'{"state":1}'])
def test_invalid_body(body: bytes) -> None:
    """A body that is not a JSON object with a state is refused: "Invalid request body" and why."""
    answer = ask("/1.0", "PATCH", body)
    assert answer.status == 400
    assert answer.body.startswith(b"Invalid request body: ")
    assert answer.body.count(b"\n") == 1


def test_invalid_state() -> None:
    """Another state is refused with the same text as in every dialect."""
    answer = ask("/1.0", "PATCH", b'{"state":"x"}')
    assert (answer.status, answer.body) == (400, b'Invalid state "x"\n')


def test_meta_data() -> None:
    """The meta-data has no first line `#cloud-config`."""
    assert ask("/1.0/meta-data").body == f"instance-id: {CLOUD_INIT_ID}\nlocal-hostname: c1\n".encode()


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/1.0/config/limits.memory", 403, "Forbidden"),
        ("/1.0/config/user.none", 404, "Not Found"),
        (f"/1.0/images/{'0' * 64}/export", 403, "Forbidden"),
    ],
)
def test_refusals(path: str, status: int, text: str) -> None:
    """Refusals have LXD's texts."""
    answer = ask(path)
    assert (answer.status, answer.body.decode()) == (status, f"{text}\n")


#: What guests of LXD 6 can reach of their host besides, with a token: volumes, instances and operations.
WITHHELD = [
    *("/1.0/storage", "/1.0/storage-pools", "/1.0/storage-pools/default", "/1.0/storage-pools/default/volumes"),
    *("/1.0/storage-pools/default/volumes/custom", "/1.0/storage-pools/default/volumes/custom/v"),
    *("/1.0/storage-pools/default/volumes/custom/v/snapshots", "/1.0/storage-volumes"),
    *("/1.0/instances", "/1.0/instances/c1", "/1.0/instances/c1/state", "/1.0/instances?all-projects=true"),
    *("/1.0/operations", "/1.0/operations/1", "/1.0/operations/1/wait", "/1.0/operations/1/websocket"),
]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", WITHHELD)
def test_the_host_is_out_of_reach(path: str, method: str) -> None:
    """Storage, instances and operations are not found by any method, as if LXD 6 did not have them."""
    answer = ask(path, method, b"{}")
    assert (answer.status, answer.body) == (404, b"404 page not found\n")


def test_unknown_caller() -> None:
    """A caller that belongs to no instance is refused with LXD's text."""
    answer = Client(MemoryStore(None), "lxd-6", caller(instance_id=None)).ask("/1.0")
    assert (answer.status, answer.body) == (500, b"Process ID not found in container\n")


@pytest.mark.parametrize(
    ("path", "method", "status", "text"),
    [
        ("/1.0", "PUT", 501, "Not Implemented"),
        ("/1.0", "POST", 501, "Not Implemented"),
        ("/1.0/config", "PATCH", 501, "Not Implemented"),
        ("/1.0/ubuntu-pro", "DELETE", 501, "Not Implemented"),
        ("/1.0/ubuntu-pro/token", "GET", 501, "Not Implemented"),
        ("/1.0", "FOO", 404, "Not Found"),
        ("/1.0", "OPTIONS", 404, "Not Found"),
        ("/1.0/config", "get", 404, "Not Found"),
        ("/nowhere", "PUT", 404, "404 page not found"),
    ],
)
def test_methods(path: str, method: str, status: int, text: str) -> None:
    """A method of another endpoint is refused with 501, any other method with 404."""
    answer = ask(path, method)
    assert (answer.status, answer.body.decode()) == (status, f"{text}\n")


def listed(config: dict[str, str]) -> list[str]:
    """Return the listed keys."""
    found: list[str] = json.loads(ask("/1.0/config", config=config).body)
    return [path.removeprefix("/1.0/config/") for path in found]


def document(key: str, config: dict[str, str]) -> str | None:
    """Return a key's value; None if it is not found."""
    answer = ask(f"/1.0/config/{key}", config=config)
    assert answer.status in (200, 404)
    return answer.body.decode() if answer.status == 200 else None


def users(text: str | None) -> object:
    """Return the users of a cloud-config."""
    assert text is not None
    head, _, rest = text.partition("\n")
    assert head == "#cloud-config"
    return yaml.safe_load(rest).get("users")


BOB = {"name": "bob", "ssh_authorized_keys": [KEY]}


def test_keys_without_documents() -> None:
    """With SSH keys alone, both documents are listed in both forms, with the keys in them; the keys are not listed."""
    config = {"cloud-init.ssh-keys.a": f"bob:{KEY}", "user.foo": "bar"}
    forms = ["cloud-init.user-data", "cloud-init.vendor-data", "user.user-data", "user.vendor-data"]
    assert listed(config) == sorted([*forms, "user.foo"])
    assert all(users(document(form, config)) == ["default", BOB] for form in forms)


def test_keys_are_added_to_documents() -> None:
    """The rest of a document is unchanged; if it is set in one form, the other form is not found."""
    config = {"cloud-init.ssh-keys.a": f"bob:{KEY}", "user.user-data": PLAIN}
    assert listed(config) == ["cloud-init.vendor-data", "user.user-data", "user.vendor-data"]
    text = document("user.user-data", config)
    assert text is not None
    assert users(text) == ["default", BOB]
    assert yaml.safe_load(text)["packages"] == ["curl"]
    assert document("cloud-init.user-data", config) is None


def test_vendor_users_stay() -> None:
    """If only vendor-data defines users, keys are added only to it, because users in user-data would replace them."""
    config = {"cloud-init.ssh-keys.a": f"amy:{KEY}", "cloud-init.vendor-data": WITH_USERS}
    amy = {"name": "amy", "sudo": None, "ssh_authorized_keys": [KEY]}
    assert users(document("cloud-init.vendor-data", config)) == ["default", amy]
    assert listed(config) == ["cloud-init.vendor-data"]
    assert document("cloud-init.user-data", config) is None
    with_user_data = {**config, "cloud-init.user-data": PLAIN}
    assert document("cloud-init.user-data", with_user_data) == PLAIN
    with_users = {**config, "cloud-init.user-data": WITH_USERS}
    assert users(document("cloud-init.user-data", with_users)) == ["default", amy]


@pytest.mark.parametrize(
    "text",
    [
        "#!/bin/sh\necho hello\n",
        "## template: jinja\n#cloud-config\npackages: [{{ v1.local_hostname }}]\n",
        'Content-Type: multipart/mixed; boundary="x"\n\n--x\n',
        "#cloud-config-archive\n- packages\n",
        "#include\nhttp://example.com\n",
        "\n#cloud-config\n{}\n",
        "#cloud-config\n- a list\n",
        "#cloud-config\n{ not: [YAML\n",
        "#cloud-config\nusers: 7\n",
        "#cloud-config\nusers: [[a]]\n",
        "#cloud-config\na: &a {b: 1}\nc: {<<: *a}\n",
        "H4sIAAAAAAAAA",
        "\x1f\u008b\b",
        "#cloud-config\n" + "a: b\n" * 4000,
        "#cloud-config\na: " + "[" * 500 + "]" * 500 + "\n",
        "#cloud-config\na: " + "[" * 8000 + "]" * 8000 + "\n",
    ],
)
def test_other_documents_are_unchanged(text: str) -> None:
    """A document that is not one plain cloud-config is not changed."""
    config = {"cloud-init.ssh-keys.a": f"bob:{KEY}", "cloud-init.user-data": text}
    assert document("cloud-init.user-data", config) == text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("users: bob, amy", [BOB, "amy"]),
        ("users: [bob]", [BOB]),
        ("users: {bob: {shell: /bin/sh}}", [{"name": "bob", "shell": "/bin/sh", "ssh_authorized_keys": [KEY]}]),
        (f"users: [{{name: bob, ssh_authorized_keys: ['{KEY}']}}]", [BOB]),
        (
            f"users: [{{name: bob, ssh-authorized-keys: '{OTHER}'}}]",
            [{"name": "bob", "ssh-authorized-keys": [OTHER, KEY]}],
        ),
        ("users: []", [BOB]),
        ("users:", ["default", BOB]),
        ("runcmd: ['cat <<EOF', '*']", ["default", BOB]),
    ],
)
def test_forms_of_users(given: str, expected: list[object]) -> None:
    """Every form of users that cloud-init accepts gets the key, once."""
    config = {"cloud-init.ssh-keys.a": f"bob:{KEY}", "cloud-init.user-data": f"#cloud-config\n{given}\n"}
    assert users(document("cloud-init.user-data", config)) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda one: st.lists(one) | st.dictionaries(st.text(), one),
    max_leaves=10,
)


@given(parsed=st.dictionaries(st.text() | st.just("users"), JSON), rest=st.text())
def test_any_document(parsed: dict[str, object], rest: str) -> None:
    """Of any document, all but the users stays as cloud-init reads it; whatever is set is answered."""
    written = "#cloud-config\n" + yaml.safe_dump(parsed)
    for text in (written, "#cloud-config\n" + rest):
        config = {"cloud-init.ssh-keys.a": f"bob:{KEY}", "cloud-init.user-data": text}
        found = merge(config, frozenset(), "cloud-init.user-data", text)
        assert found is not None
        if text == written:
            before, after = yaml.safe_load(text), yaml.safe_load(found)
            assert {**before, "users": None} == {**after, "users": None} if "users" in after else before == after


def test_many_keys() -> None:
    """Keys are added in the order of their names, those for ssh-import-id as such; malformed ones are left out."""
    config = {
        "cloud-init.ssh-keys.b": f"bob:{OTHER}",
        "cloud-init.ssh-keys.a": f"bob:{KEY}",
        "cloud-init.ssh-keys.c": "root:gh:someone",
        "cloud-init.ssh-keys.d": "none",
        "cloud-init.ssh-keys.e": f"b\n: {KEY}",
        "cloud-init.ssh-keys.f": f":{KEY}",
    }
    assert users(document("user.vendor-data", config)) == [
        "default",
        {"name": "bob", "ssh_authorized_keys": [KEY, OTHER]},
        {"name": "root", "ssh_import_id": ["gh:someone"]},
    ]


def test_documents_without_keys() -> None:
    """Without valid SSH keys, documents and the list are unchanged."""
    config = {"cloud-init.user-data": PLAIN, "cloud-init.ssh-keys.a": "malformed"}
    assert document("cloud-init.user-data", config) == PLAIN
    assert document("cloud-init.vendor-data", config) is None
    assert listed(config) == ["cloud-init.user-data"]


@pytest.mark.parametrize("dialect", ["incus", "lxd", "lxd-legacy"])
def test_other_dialects_add_no_keys(dialect: str) -> None:
    """In the other dialects, SSH keys are not added to documents."""
    config = {"cloud-init.ssh-keys.a": f"bob:{KEY}", "user.user-data": PLAIN}
    asking = Client(MemoryStore(instance(config)), dialect)
    assert asking.ask("/1.0/config/user.user-data").body.decode() == PLAIN
    assert (b"ssh-keys" in asking.ask("/1.0/config").body) == (dialect != "lxd-legacy")
    assert asking.ask("/1.0/ubuntu-pro").status == 404


def test_pro_is_off() -> None:
    """By default, the Ubuntu Pro client may not attach itself and gets no token."""
    answers = [ask(path, method) for method, path in PRO_REQUESTS]
    assert [(answer.status, answer.body) for answer in answers] == [
        (200, b'{"guest_attach":"off"}\n'),
        (403, b"Forbidden\n"),
    ]


class Tokens:
    """A provider with tokens for instances that have `user.pro`."""

    def guest_attach(self, instance: Instance) -> GuestAttach:
        """Return "on" for such an instance."""
        return "on" if "user.pro" in instance.config else "off"

    def issue(self, instance: Instance) -> GuestToken | None:
        """Return a token, except for `user.pro=late`."""
        return None if instance.config["user.pro"] == "late" else GuestToken("t", "2026-12-01T00:00:00Z", instance.name)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"user.pro": "1"}, [200, 200]),
        ({"user.pro": "late"}, [200, 403]),
        ({}, [200, 403]),
        ({"user.pro": "1", "security.devlxd": "false"}, [403, 403]),
    ],
)
def test_pro_with_a_provider(config: dict[str, str], expected: list[int]) -> None:
    """The provider decides whether an instance may attach itself and gets a token, but only after the gate."""
    asking = Client(MemoryStore(instance(config)), "lxd-6")
    asking.application = create(
        asking.store, Broker(EmptyLog(), queue_limit=10, subscriptions_per_instance=1), tokens=Tokens()
    )
    answers = [asking.ask(path, method) for method, path in PRO_REQUESTS]
    assert [answer.status for answer in answers] == expected
    if expected == [200, 200]:
        assert answers[0].body == b'{"guest_attach":"on"}\n'
        assert json.loads(answers[1].body) == {"expires": "2026-12-01T00:00:00Z", "guest_token": "t", "id": "c1"}
        assert answers[1].headers["cache-control"] == "no-store"
