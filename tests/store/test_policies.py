"""Key policies in the store: from when they hold, what of the change log they leave, and what is given once."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from guestapi.model import Instance, KeyPolicy
from guestapi.settings import Settings, StoreSettings
from guestapi.store import policies, profiles, steps
from guestapi.store.backup import back_up, restore
from guestapi.store.engine import database_file
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import get_instance, read_entries
from guestapi.store.reading import Reader
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.api.fakes import INIT

HUSH = "hush-hush"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A store with a running instance c1."""
    made = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/store.db"))
    with Writer(made, create=True).change() as change:
        steps.add(change, "default", "c1", init=INIT)
    return made


def configure(settings: Settings, **config: str) -> None:
    """Set keys of ``user.``."""
    with Writer(settings).change() as change:
        found = get_instance(change, "default", "c1")
        steps.configure(change, found, {f"user.{key}": value for key, value in config.items()})


def put(
    settings: Settings,
    pattern: str,
    *,
    instance: bool = True,
    hidden: bool = False,
    secret: bool = False,
    once: bool = False,
) -> None:
    """Have a policy hold."""
    with Writer(settings).change() as change:
        found = get_instance(change, "default", "c1") if instance else None
        policies.put(change, "default", found, KeyPolicy(pattern, hidden, secret, once))


def c1(settings: Settings) -> Instance:
    """The instance as it is."""
    with view(settings.store.url) as store:
        return get_instance(store, "default", "c1")


def told(settings: Settings) -> list[tuple[dict[str, str], bool]]:
    """What the change log has of keys: the metadata, and whether the guest hears of it."""
    with view(settings.store.url) as store:
        found = read_entries(store, 0, 10_000).found
    return [(json.loads(entry.metadata), entry.for_guest) for entry in found if entry.type == "config"]


def spend(settings: Settings, key: str = "user.token") -> str | None:
    """Ask for a key that is given once."""
    return Writer(settings).spend(c1(settings), key, 4242, 100_000)


def in_files(settings: Settings, text: str) -> bool:
    """Whether a text is anywhere in the change log, as SQLite has it."""
    with closing(sqlite3.connect(database_file(settings.store.url))) as connection:
        rows = connection.execute("SELECT metadata FROM notifications").fetchall()
    return any(text in row[0] for row in rows)


@pytest.mark.parametrize("instance", [True, False])
@pytest.mark.parametrize("what", ["secret", "once"])
def test_values_leave_the_change_log(settings: Settings, what: str, instance: bool) -> None:
    """What was told before the policy came, and what is told after it, has no value of the key; others have theirs."""
    configure(settings, token=HUSH, plain="plain")
    assert in_files(settings, HUSH)
    put(settings, "user.tok*", instance=instance, **{what: True})
    assert not in_files(settings, HUSH)
    configure(settings, token=f"{HUSH}-2", plain="plainer")
    configure(settings, token="")
    assert not in_files(settings, HUSH)
    seen = [metadata for metadata, for_guest in told(settings) if metadata["key"] == "user.token" and for_guest]
    assert seen == [{"key": "user.token", "old_value": "", "value": ""}] * 3
    assert in_files(settings, "plainer")


def test_hidden_is_told_to_the_operator_alone(settings: Settings) -> None:
    """Of a hidden key no entry is for the guest, of what was told before neither; the operator reads them all."""
    configure(settings, token="1")
    put(settings, "user.token", hidden=True)
    configure(settings, token="2")
    assert [(metadata["value"], for_guest) for metadata, for_guest in told(settings)] == [("1", False), ("2", False)]


def test_profile_and_rename(settings: Settings) -> None:
    """Policies hold for keys of profiles, and for an instance that comes into the project."""
    with Writer(settings).change() as change:
        policies.put(change, "closed", None, KeyPolicy("user.*", secret=True))
        profile = profiles.create(change, "default", "p")
        steps.assign(change, get_instance(change, "default", "c1"), (profile,))
        profiles.edit(change, profile, config={"user.token": HUSH})
    assert in_files(settings, HUSH)
    with Writer(settings).change() as change:
        steps.rename(change, get_instance(change, "default", "c1"), "closed", "c1")
    assert not in_files(settings, HUSH)
    with Writer(settings).change() as change:
        profiles.edit(change, profiles.get_profile(change, "default", "p"), config={"user.token": f"{HUSH}!"})
    assert not in_files(settings, HUSH)


def test_workers_notice(settings: Settings) -> None:
    """A policy, also one of the whole project, is seen by a worker's next look; so is its end."""
    reader = Reader(settings.store.url)
    number = c1(settings).id

    def seen() -> tuple[KeyPolicy, ...]:
        found = reader.instance(number)
        assert found is not None
        return found.policies

    assert seen() == ()
    put(settings, "a", instance=False, hidden=True)
    put(settings, "b", once=True)
    assert [policy.pattern for policy in seen()] == ["a", "b"]
    put(settings, "b", secret=True)
    assert seen()[1] == KeyPolicy("b", secret=True)
    with Writer(settings).change() as change:
        policies.remove(change, "default", None, "a")
        policies.remove(change, "default", get_instance(change, "default", "c1"), "b")
    assert seen() == ()
    with pytest.raises(ConflictError), Writer(settings).change() as change:
        policies.remove(change, "default", None, "a")


def test_impossible_policies(settings: Settings) -> None:
    """A policy says something, of users that can be."""
    for policy in (KeyPolicy("a"), KeyPolicy("a", uids=frozenset({-1})), KeyPolicy("a", uids=frozenset({1 << 32}))):
        with pytest.raises(ConflictError), Writer(settings).change() as change:
            policies.put(change, "default", None, policy)


def test_once(settings: Settings) -> None:
    """A value is given once; it counts as unset then, and the store knows to whom it was given."""
    configure(settings, token=HUSH)
    assert spend(settings) is None, "no policy says so"
    put(settings, "user.token", once=True)
    assert spend(settings) == HUSH
    assert spend(settings) is None
    assert "user.token" not in c1(settings).config
    with view(settings.store.url) as store:
        (found,) = policies.list_spends(store)
    assert (found.instance, found.key, found.pid, found.uid, found.spent) == ("c1", "user.token", 4242, 100_000, True)
    assert not in_files(settings, HUSH)


def test_other_changes_do_not_set_it_anew(settings: Settings) -> None:
    """A key that was given stays so whatever else is changed; nothing is told of it then."""
    configure(settings, token=HUSH)
    put(settings, "user.token", once=True)
    spend(settings)
    before = len(told(settings))
    configure(settings, other="1")
    with Writer(settings).change() as change:
        steps.stop(change, get_instance(change, "default", "c1"))
    assert "user.token" not in c1(settings).config
    assert len(told(settings)) == before + 1


@pytest.mark.parametrize("value", [HUSH, "another"])
def test_set_anew(settings: Settings, value: str) -> None:
    """Set once more, to the same value or another one, it is given once more, and the instance is told so."""
    configure(settings, token=HUSH)
    put(settings, "user.token", once=True)
    spend(settings)
    before = len(told(settings))
    configure(settings, token=value)
    assert len(told(settings)) == before + 1
    assert c1(settings).config["user.token"] == value
    assert (spend(settings), spend(settings)) == (value, None)
    assert not in_files(settings, HUSH)


def test_policy_that_ends_gives_nothing_back(settings: Settings) -> None:
    """When the policy is removed, what was given stays unset, and a later change does not tell the old value."""
    configure(settings, token=HUSH)
    put(settings, "user.token", once=True)
    spend(settings)
    with Writer(settings).change() as change:
        policies.remove(change, "default", get_instance(change, "default", "c1"), "user.token")
    assert "user.token" not in c1(settings).config
    configure(settings, token="new")
    assert c1(settings).config["user.token"] == "new"
    assert not in_files(settings, HUSH)


def test_run_that_is_over_gets_nothing(settings: Settings) -> None:
    """Who was recognised in an earlier run, or as another instance, spends nothing."""
    configure(settings, token=HUSH)
    put(settings, "user.token", once=True)
    then = c1(settings)
    with Writer(settings).change() as change:
        steps.stop(change, get_instance(change, "default", "c1"))
    assert Writer(settings).spend(then, "user.token", 1, 1) is None
    assert spend(settings) == HUSH


def test_backup_and_restore(settings: Settings, tmp_path: Path) -> None:
    """A restore brings policies back and takes none away; what was given by then stays given."""
    configure(settings, token=HUSH, later=HUSH)
    put(settings, "user.token", once=True)
    put(settings, "user.old", hidden=True)
    back_up(settings.store.url, tmp_path / "before")
    spend(settings)
    back_up(settings.store.url, tmp_path / "after")
    put(settings, "user.new", instance=False, hidden=True)
    with Writer(settings).change() as change:
        policies.remove(change, "default", get_instance(change, "default", "c1"), "user.old")
    restore(settings, tmp_path / "before")
    assert "user.token" not in c1(settings).config
    assert {policy.pattern for policy in c1(settings).policies} == {"user.token", "user.old", "user.new"}
    with Writer(settings).change() as change:
        steps.remove(change, get_instance(change, "default", "c1"))
    restore(settings, tmp_path / "after")
    assert {policy.pattern for policy in c1(settings).policies} == {"user.token", "user.old", "user.new"}
    assert "user.token" not in c1(settings).config
    assert c1(settings).config["user.later"] == HUSH
    assert spend(settings) is None


def test_value_too_large_to_be_kept(settings: Settings) -> None:
    """A value that workers do not keep in memory is hidden and given once as any other."""
    configure(settings, token="x" * 100_000)
    put(settings, "user.token", once=True)
    reader = Reader(settings.store.url)
    found = reader.instance(c1(settings).id)
    assert found is not None
    assert "user.token" in found.large
    assert Writer(settings).spend(found, "user.token", 1, 1) == "x" * 100_000
    found = reader.instance(found.id)
    assert found is not None
    assert "user.token" not in found.large


@pytest.mark.parametrize("what", ["secret", "once", "hidden"])
def test_large_values_in_the_change_log(settings: Settings, what: str) -> None:
    """Policies hold for entries whose metadata is in parts, for those that were written before and after."""
    large = HUSH * 8_000
    configure(settings, token=large, plain="plain" * 14_000)
    reader = Reader(settings.store.url)
    (entry,) = (one for one in reader.entries(0, 100).found if one.left_out and HUSH in one.metadata)
    assert reader.entry_part(entry, 0) is not None
    put(settings, "user.token", **{what: True})
    # Who has begun to send it to the guest gets no more of it.
    assert reader.entry_part(entry, 0) is None
    configure(settings, token=f"{large}-2", plain="")
    values = [(metadata["value"], for_guest) for metadata, for_guest in told(settings) if "token" in metadata["key"]]
    assert values == ([(large, False), (f"{large}-2", False)] if what == "hidden" else [("", True), ("", True)])
    with closing(sqlite3.connect(database_file(settings.store.url))) as connection:
        parts = connection.execute("SELECT part FROM notification_parts").fetchall()
    assert parts
    assert any(HUSH.encode() in part for (part,) in parts) is (what == "hidden")
    assert in_files(settings, HUSH) is (what == "hidden")


def test_policy_of_a_project_is_told_of_no_instance(settings: Settings) -> None:
    """A policy of a whole project is an entry about no instance, and one of an instance about that one."""
    for instance in (False, True):
        put(settings, "user.a", instance=instance, hidden=True)
        entry = Reader(settings.store.url).entries(0, 100).found[-1]
        assert json.loads(entry.metadata)["action"] == "policy-changed"
        assert entry.instance_id == (c1(settings).id if instance else 0)
