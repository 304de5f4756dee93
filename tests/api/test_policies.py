"""Key policies at every endpoint: what is hidden, who may read, and what is given once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from guestapi.callers.namespaces import IdMap
from guestapi.model import Instance, KeyPolicy
from tests.api.fakes import ROOT, Client, Mapped, MemoryStore, StandIn, caller, instance
from tests.api.test_app import ALL, assert_error

TREE = "/1.0/guestapi/tree"
KEYS = ("/1.0/config/user.token", f"{TREE}/config/user.token")
CONFIG = {"cloud-init.user-data": "data", "user.meta-data": "meta", "user.plain": "plain", "user.token": "hush"}


def having(*policies: KeyPolicy, **changes: str) -> Instance:
    """An instance with policies."""
    return replace(instance({**CONFIG, **changes}), policies=policies)


def as_user(uid: int, store: MemoryStore) -> Client:
    """A client that is this user inside."""
    who = caller(uid=ROOT + uid)
    return Client(store, who=who._replace(init=Mapped()))


@pytest.mark.parametrize("dialect", ALL)
def test_hidden(dialect: str) -> None:
    """A hidden key is in no list and no tree, and 404 like one that is not set; meta-data and merged data lack it."""
    policies = (KeyPolicy("user.token", hidden=True), KeyPolicy("user.meta*", hidden=True))
    client = Client(MemoryStore(having(*policies)), dialect)
    for path in (*KEYS, "/1.0/config/user.meta-data"):
        hidden, absent = client.ask(path), client.ask(path.replace("user.", "user.x-"))
        assert hidden == absent
        assert hidden.status == 404
        assert client.ask(path, "HEAD").status == 404
    for path in ("/1.0/config", TREE, "/1.0/meta-data"):
        body = client.ask(path).body
        assert not any(word in body for word in (b"token", b"hush", b"user.meta", b"meta\n"))
    assert client.ask("/1.0/config/user.plain").body == b"plain"


def test_hidden_switch_counts() -> None:
    """A pattern that matches everything hides no switch from the gate."""
    store = MemoryStore(having(KeyPolicy("*", hidden=True), **{"security.guestapi": "false"}))
    assert_error(Client(store).ask(TREE), 403, "not authorized")


def test_secret_is_readable() -> None:
    """A secret key is read as ever."""
    client = Client(MemoryStore(having(KeyPolicy("user.token", secret=True))))
    assert [client.ask(path).body for path in KEYS] == [b"hush"] * 2
    assert json.loads(client.ask(TREE).body)["config"]["user.token"] == "hush"


def test_uids_open_two_paths() -> None:
    """A user that a policy names reads the key by both paths, and nothing else; any other user reads nothing."""
    store = MemoryStore(having(KeyPolicy("user.t*", uids=frozenset({1000}))))
    for path in KEYS:
        for method in ("GET", "HEAD"):
            assert as_user(1000, store).ask(path, method).status == 200
        assert as_user(1000, store).ask(path, "PATCH").status == 401
        assert as_user(1001, store).ask(path).status == 401
        assert as_user(1000, store).ask(path.replace("token", "tok")).status == 404
        assert as_user(1000, store).ask(path.replace("token", "plain")).status == 401
        assert as_user(1000, store).ask(path.replace("user.token", "security.x")).status == 401
    for path in ("/", "/1.0", "/1.0/config", "/1.0/devices", "/1.0/meta-data", "/1.0/events", TREE, "/1.0/guestapi"):
        assert_error(as_user(1000, store).ask(path), 401, "Access denied for non-root user")
    assert Client(store).ask(KEYS[0]).body == b"hush"


class Irregular(StandIn):
    """An init whose container has user 1000 of the host as its own user 1000."""

    __slots__ = ()

    def users(self, caller: int) -> IdMap:
        """Return its map."""
        return ((0, ROOT, 1000), (1000, 1000, 1), (1001, ROOT + 1001, 64535))


def test_uids_go_by_the_map() -> None:
    """The user inside is found by the ID map, however irregular it is."""
    store = MemoryStore(having(KeyPolicy("user.token", uids=frozenset({1000}))))
    for uid, status in ((1000, 200), (ROOT + 1000, 401), (ROOT + 999, 401), (ROOT + 1001, 401), (0, 401)):
        who = caller(uid=uid)._replace(init=Irregular())
        assert Client(store, who=who).ask(KEYS[0]).status == status, uid


def test_uid_that_cannot_be_told() -> None:
    """A user of whom it is not known who is that inside gets 401, whatever a policy says."""
    store = MemoryStore(having(KeyPolicy("*", uids=frozenset(range(2000)))))
    who = caller(uid=ROOT + 1000)
    assert Client(store, who=who).ask(KEYS[0]).status == 401


def test_other_rules_stay_for_uids() -> None:
    """The gate's other rules hold for such a user: the switch, the run, and hidden."""
    policy = KeyPolicy("user.t*", uids=frozenset({1000}))
    off = MemoryStore(having(policy, **{"security.guestapi": "false"}))
    assert as_user(1000, off).ask(KEYS[0]).status == 403
    hidden = MemoryStore(having(policy, KeyPolicy("user.token", hidden=True)))
    assert as_user(1000, hidden).ask(KEYS[0]).status == 404


@pytest.mark.parametrize("first", KEYS)
def test_once(first: str) -> None:
    """The first GET gets the value, by either path, with no-store; all later ones 404. HEAD and 401 spend nothing."""
    store = MemoryStore(having(KeyPolicy("user.token", once=True)))
    client = Client(store)
    for path in KEYS:
        head = client.ask(path, "HEAD")
        assert (head.status, head.headers["cache-control"]) == (200, "no-store")
        assert as_user(1000, store).ask(path).status == 401
    assert client.ask(KEYS[1], fields={"If-None-Match": "*"}).status == 304
    assert b"token" not in client.ask("/1.0/config").body
    assert b"token" not in client.ask(TREE).body
    answer = client.ask(first)
    assert (answer.status, answer.body, answer.headers["cache-control"]) == (200, b"hush", "no-store")
    for path in KEYS:
        assert client.ask(path).status == 404
        assert client.ask(path, "HEAD").status == 404
    assert client.ask("/1.0/config/user.plain").body == b"plain"


def test_etag_of_what_is_given_once_tells_nothing() -> None:
    """The ETag of such a key is another one each time, so that it confirms no guess of the value."""
    client = Client(MemoryStore(having(KeyPolicy("user.token", once=True))))
    tags = {client.ask(KEYS[1], "HEAD").headers["etag"] for _time in range(10)}
    assert len(tags) == 10


def test_without_policies_nothing_differs() -> None:
    """A policy that matches no key of the instance changes no byte of any answer."""
    plain, other = MemoryStore(instance(CONFIG)), MemoryStore(having(KeyPolicy("user.nothing", hidden=True, once=True)))
    for path in ("/", "/1.0", "/1.0/config", *KEYS, "/1.0/devices", "/1.0/meta-data", TREE):
        assert Client(plain).ask(path) == Client(other).ask(path)
