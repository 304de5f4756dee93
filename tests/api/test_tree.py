"""The tree: one response with all that a guest may read, its ETags, and its conditional requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.api.conditional import etag, matches, tags_of, wait_of
from guestapi.api.errors import BadRequest
from guestapi.model import Instance
from tests.api.fakes import CLOUD_INIT_ID, INIT, ROOT, Client, MemoryStore, caller, instance
from tests.api.test_app import ALL, CONFIG, DEVICES, assert_error

TREE = "/1.0/guestapi/tree"
FOO = f"{TREE}/config/user.foo"

T = TypeVar("T")


def store_of_all() -> MemoryStore:
    """Return the store of an instance that has configuration, devices and an event id."""
    return MemoryStore(instance(CONFIG, DEVICES), event_id=41)


def test_features() -> None:
    """`/1.0/guestapi` lists the features below it, in each dialect."""
    for dialect in ALL:
        answer = Client(store_of_all(), dialect).ask("/1.0/guestapi")
        assert (answer.status, answer.body) == (200, b'{"features":["tree","notices"]}\n')
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("dialect", ALL)
def test_tree_equals_the_other_endpoints(dialect: str) -> None:
    """The tree has exactly the values of the other endpoints, byte for byte, and is sorted."""
    client = Client(store_of_all(), dialect)
    answer = client.ask(TREE)
    tree = json.loads(answer.body)
    assert answer.body == json.dumps(tree, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode() + b"\n"
    keys = [path.removeprefix("/1.0/config/") for path in json.loads(client.ask("/1.0/config").body)]
    assert list(tree["config"]) == keys
    for key in keys:
        assert tree["config"][key].encode() == client.ask(f"/1.0/config/{key.replace('/', '%2F')}").body
    assert tree["meta_data"].encode() == client.ask("/1.0/meta-data").body
    state = json.loads(client.ask("/1.0").body)
    shared = state.keys() & {"api_version", "instance_type", "location", "state"}
    assert {name: tree[name] for name in shared} == {name: state[name] for name in shared}
    assert (tree["name"], tree["project"], tree["uuid"]) == ("c1", "default", CLOUD_INIT_ID)
    seen = json.loads(client.ask("/1.0/devices").body)
    assert list(tree["devices"]) == [name.removeprefix("/1.0/device/") for name in seen]
    assert len(tree) == 10


def test_devices_have_generated_addresses() -> None:
    """A NIC in the tree has the same generated address as in `/1.0/devices`."""
    client = Client(store_of_all())
    assert json.loads(client.ask(TREE).body)["devices"] == json.loads(client.ask("/1.0/devices").body)


def test_large_values_are_in_the_tree() -> None:
    """A value that is too large for a worker's memory is in the tree like any other."""
    store = MemoryStore(replace(instance({"user.a": "1"}), large=frozenset({"user.big"})), event_id=3)
    store.large_values["user.big"] = "b" * 100_000
    answer = Client(store).ask(TREE)
    assert json.loads(answer.body)["config"] == {"user.a": "1", "user.big": "b" * 100_000}
    assert answer.headers["guestapi-event-id"] == "3"
    assert Client(store).ask(f"{TREE}/config/user.big").body == b"b" * 100_000


def test_large_values_are_read_once_for_each_state() -> None:
    """A client that knows the tree is told so without its large values, until the instance changes."""

    class CountingStore(MemoryStore):
        reads = 0

        def read_whole(self, instance: Instance, build: Callable[[Instance], T]) -> tuple[Instance, int, T] | None:
            CountingStore.reads += 1
            return super().read_whole(instance, build)

    store = CountingStore(replace(instance({"user.foo": "x"}), large=frozenset({"user.large"})))
    store.large_values["user.large"] = "y" * 100_000
    client = Client(store)
    first = client.ask(TREE)
    tag = first.headers["etag"]
    for _time in range(3):
        again = client.ask(TREE, fields={"If-None-Match": tag})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
    assert CountingStore.reads == 1
    assert client.ask(TREE).body == first.body
    assert client.ask(TREE, fields={"If-None-Match": '"other"'}).body == first.body
    assert CountingStore.reads == 3
    assert store.held is not None
    # Another object: the store has read it anew, so anything may have changed.
    store.held = replace(store.held)
    store.large_values["user.large"] = "z"
    changed = client.ask(TREE, fields={"If-None-Match": tag})
    assert (changed.status, CountingStore.reads) == (200, 4)
    assert changed.headers["etag"] != tag


def test_tag_of_a_newer_state_is_not_remembered() -> None:
    """If the instance changes between two looks, the ETag of the later state does not count for the earlier one."""

    class ChangingStore(MemoryStore):
        is_changing = True

        def read_whole(self, instance: Instance, build: Callable[[Instance], T]) -> tuple[Instance, int, T] | None:
            if not self.is_changing:
                return super().read_whole(instance, build)
            assert self.held is not None
            newer = replace(self.held, config={"user.foo": "new"}, revision=self.held.revision + 1)
            return newer, self.event_id, build(newer)

    store = ChangingStore(replace(instance({"user.foo": "x"}), large=frozenset({"user.large"})))
    client = Client(store)
    tag = client.ask(TREE).headers["etag"]
    store.is_changing = False
    store.large_values["user.large"] = "y"
    assert client.ask(TREE, fields={"If-None-Match": tag}).status == 200


def test_keys_of_the_tree_equal_those_below_config() -> None:
    """A key below the tree has the same responses, also refusals, as below `/1.0/config`."""
    client = Client(store_of_all())
    for key in ("user.foo", "user.a%2Fb", "user.absent", "security.nesting", "cloud-init.user-data"):
        one, other = client.ask(f"/1.0/config/{key}"), client.ask(f"{TREE}/config/{key}")
        assert (one.status, one.body) == (other.status, other.body)
        assert one.headers.items() <= other.headers.items()


def test_old_paths_have_no_etag() -> None:
    """Only the tree's paths have ETag and event id; the others ignore If-None-Match and wait."""
    client = Client(store_of_all())
    for path in ("/", "/1.0", "/1.0/config", "/1.0/config/user.foo", "/1.0/devices", "/1.0/meta-data"):
        plain = client.ask(path)
        asked = client.ask(path, query="wait=x", fields={"If-None-Match": "*"})
        assert (plain.status, plain.headers, plain.body) == (asked.status, asked.headers, asked.body)
        assert "etag" not in plain.headers
        assert "guestapi-event-id" not in plain.headers


def test_gate_holds() -> None:
    """Another user gets 401, an instance that is switched off 403, and a caller of an earlier run 500."""
    for path in ("/1.0/guestapi", TREE, FOO):
        assert_error(Client(store_of_all(), who=caller(uid=ROOT + 1)).ask(path), 401, "Access denied for non-root user")
        off = MemoryStore(instance({"security.guestapi": "false", "user.foo": "x"}))
        assert_error(Client(off).ask(path), 403, "not authorized")
        assert_error(Client(store_of_all(), who=caller(run=2)).ask(path), 500, "pid not in container?")


def test_gate_checks_the_state_of_the_response() -> None:
    """The gate also checks the state that is read for the response, which may be newer than the admission."""

    class NewerStore(MemoryStore):
        def snapshot_of(self, instance_id: int) -> tuple[None, int] | tuple[object, int]:  # type: ignore[override]  # as the store's
            return replace(instance({"user.foo": "other"}), init=replace(INIT, pid=1)), 5

    for path in (TREE, FOO):
        answer = Client(NewerStore(instance({"user.foo": "x"}))).ask(path)
        assert_error(answer, 500, "pid not in container?")


@pytest.mark.parametrize("path", [TREE, FOO])
def test_not_modified(path: str) -> None:
    """A client that sends the ETag (alone, in a list, weak, or `*`) gets 304 without a body; any other gets 200."""
    client = Client(store_of_all())
    first = client.ask(path)
    tag = first.headers["etag"]
    assert (first.status, first.headers["guestapi-event-id"]) == (200, "41")
    for field in (tag, f"W/{tag}", f'"x", {tag}', f'{tag},"x"', f' , {tag} ,, W/"y"', "*", " * "):
        again = client.ask(path, fields={"If-None-Match": field})
        assert (again.status, again.body) == (304, b""), field
        assert (again.headers["etag"], again.headers["guestapi-event-id"]) == (tag, "41")
    for field in ('"x"', f'"{tag[1:-2]}"', '""'):
        again = client.ask(path, fields={"If-None-Match": field})
        assert (again.status, again.body) == (200, first.body)
    head = client.ask(path, "HEAD")
    assert (head.status, head.body, head.headers) == (200, b"", first.headers)


@pytest.mark.parametrize("field", ["x", "5d41", '"', '"a', 'a"', '"a" "b"', '"a"b', "W/", "w/x", ",", "", "*,*", "'a'"])
def test_malformed_tags(field: str) -> None:
    """Anything but a list of quoted tags is refused, and the text states what is accepted."""
    client = Client(store_of_all())
    for path in (TREE, FOO):
        answer = client.ask(path, fields={"If-None-Match": field})
        assert_error(answer, 400, 'If-None-Match is not a list of tags; send them with their quotes, like "5d41", or *')


TAGS = st.text(st.characters(codec="latin-1", exclude_characters='"', min_codepoint=0x21).filter(lambda c: c != "\x7f"))


@given(st.lists(TAGS, min_size=1), st.text(" ,\t", max_size=3), st.booleans())
def test_any_list_of_tags(tags: list[str], between: str, weak: bool) -> None:
    """Tags with any characters that RFC 9110 permits, also commas, are found in a list."""
    quoted = [f'"{tag}"' for tag in tags if all(ord(c) < 0x7F or ord(c) >= 0x80 for c in tag)]
    field = f",{between}".join(("W/" if weak else "") + one for one in quoted)
    assert tags_of({"HTTP_IF_NONE_MATCH": field}) == frozenset(quoted)


@given(st.text(st.characters(codec="latin-1"), max_size=200))
def test_any_field(field: str) -> None:
    """Any header field is a list of tags or is refused."""
    try:
        found = tags_of({"HTTP_IF_NONE_MATCH": field})
    except BadRequest:
        return
    assert found
    assert all(matches(found, tag) for tag in found)


@given(st.binary(), st.binary())
def test_etag_names_one_content(one: bytes, other: bytes) -> None:
    """Equal contents have the same ETag, and different contents different ones, whatever the store and the worker."""
    assert (etag(one) == etag(other)) == (one == other)


def test_etag_of_a_key_changes_with_that_key_alone() -> None:
    """A key's ETag depends only on that key, the tree's on all; with an earlier content the earlier ETag returns."""
    store = MemoryStore(instance({"user.a": "1", "user.b": "1"}))
    client = Client(store)
    key, tree = client.ask(f"{TREE}/config/user.a").headers["etag"], client.ask(TREE).headers["etag"]
    store.held = instance({"user.a": "1", "user.b": "2"})
    assert client.ask(f"{TREE}/config/user.a").headers["etag"] == key
    assert client.ask(TREE).headers["etag"] != tree
    store.held = instance({"user.a": "2", "user.b": "2"})
    assert client.ask(f"{TREE}/config/user.a").headers["etag"] != key
    store.held = instance({"user.a": "1", "user.b": "1"})
    assert (client.ask(f"{TREE}/config/user.a").headers["etag"], client.ask(TREE).headers["etag"]) == (key, tree)


@pytest.mark.parametrize(
    ("query", "seconds"),
    [("", 0), ("a=1", 0), ("wait=1", 1), ("wait=60", 60), ("x&%77ait=5", 5), ("wait=%31&y=wait", 1), ("await=3", 0)],
)
def test_wait(query: str, seconds: int) -> None:
    """`wait` is a number of seconds among other parameters, and may be percent-encoded."""
    assert wait_of(query) == seconds


@pytest.mark.parametrize(
    "value", ["0", "-1", "61", "1e9", "", "x", "1.5", "+5", " 5", "05", "9" * 5000, "%", "%00", "5;", "\xb2"]
)
def test_wait_must_be_a_number(value: str) -> None:
    """Any other value is refused, and the text states what is accepted."""
    with pytest.raises(BadRequest) as caught:
        wait_of(f"wait={value}")
    assert caught.value.text == "wait is not a whole number of seconds from 1 to 60"


def test_second_wait_is_refused() -> None:
    """A second `wait` is refused, also with the same value."""
    for query in ("wait=5&wait=5", "wait=5&%77%61%69%74=5"):
        with pytest.raises(BadRequest) as caught:
            wait_of(query)
        assert caught.value.text == "wait is there twice; send it once"
