"""`guestapi apply` and `guestapi export`: several instances in one transaction."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from guestapi.model import Init
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import permissions, steps
from guestapi.store.attributes import AttributeReport, list_attributes
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.cli.command import Guestapi
from tests.cli.test_habits import on_terminal
from tests.harness.containers import Container
from tests.store.processes import log_entries

TWO = """\
name: web
config:
  user.role: front
---
name: db
project: shop
devices:
  eth0:
    type: nic
"""


@pytest.fixture
def two(guestapi: Guestapi, tmp_path: Path) -> Path:
    """A file with two definitions that have been applied."""
    file = tmp_path / "two.yaml"
    file.write_text(TWO)
    assert guestapi.good("apply", "-f", str(file)).splitlines() == [
        "added web",
        "added db in project shop",
        "2 added, 0 changed, 0 removed, 0 unchanged",
    ]
    return file


def test_again(guestapi: Guestapi, two: Path) -> None:
    """Applying the same definition changes nothing; a difference is a change with its event."""
    log = len(log_entries(guestapi.settings))
    assert guestapi.good("apply", "-f", str(two)) == "0 added, 0 changed, 0 removed, 2 unchanged\n"
    assert len(log_entries(guestapi.settings)) == log
    two.write_text(TWO.replace("front", "back"))
    assert guestapi.good("apply", "-f", str(two)).splitlines()[0] == "changed web"
    assert guestapi.shown("web")["config"] == {"user.role": "back"}


def test_export_can_be_applied(guestapi: Guestapi, two: Path) -> None:
    """An exported definition that is applied to an empty store is exported again with the same bytes."""
    before = guestapi.good("export", "--all")
    assert before == guestapi.good("export", "web").replace("name", "---\nname", 1) + "---\n" + guestapi.good(
        "export", "--project", "shop", "db"
    )
    guestapi.good("rm", "web")
    guestapi.good("rm", "db", "--project", "shop")
    guestapi.good("apply", "-f", "-", stdin=before)
    assert guestapi.good("export", "--all") == before
    assert guestapi.good("export", "--all", "--project", "shop").startswith("name: db\n")


def test_directory(guestapi: Guestapi, tmp_path: Path) -> None:
    """In a directory, the files with a suffix of definitions are read, in the order of their names."""
    directory = tmp_path / "definitions"
    directory.mkdir()
    assert "has no definitions" in guestapi.fails("apply", "-f", str(directory))
    (directory / "b.yml").write_text("name: b")
    (directory / "a.json").write_text('{"name": "a", "config": {"user.a": "1"}}')
    (directory / "c.txt").write_text("name: c")
    assert guestapi.good("apply", "-f", str(directory), "--project", "p").splitlines()[:2] == [
        "added a in project p",
        "added b in project p",
    ]


def test_all_or_nothing(guestapi: Guestapi, two: Path) -> None:
    """If one definition is invalid, nothing is changed, and the error names the instance."""
    before = guestapi.state()
    for wrong in ("name: a/b", "name: x\nprofiles: [none]", "name: web\ntype: virtual-machine", "name: x\nuuid: 1"):
        two.write_text(f"name: new\n---\n{wrong}")
        assert guestapi.fails("apply", "-f", str(two))
        assert guestapi.state() == before
    two.write_text("name: web\n---\nname: web")
    assert "defined already" in guestapi.fails("apply", "-f", str(two))
    assert "defined already" in guestapi.fails("apply", "-f", str(two), "-f", str(two))


def test_dry_run(guestapi: Guestapi, two: Path) -> None:
    """A dry run prints the lines that differ, and changes nothing."""
    two.write_text("name: web\nconfig:\n  user.role: back\n---\nname: new\n")
    guestapi.good("instance", "add", "old")
    before, log = guestapi.state(), log_entries(guestapi.settings)
    lines = guestapi.good("apply", "-f", str(two), "--dry-run", "--prune").splitlines()
    assert lines[0] == "changed web"
    assert "  -  user.role: front" in lines
    assert "  +  user.role: back" in lines
    assert (
        lines.index("added new")
        < lines.index("  +name: new")
        < lines.index("removed old")
        < lines.index("  -name: old")
    )
    assert lines[-1] == "would be 1 added, 1 changed, 1 removed, 0 unchanged"
    assert (guestapi.state(), log_entries(guestapi.settings)) == (before, log)


def test_prune(guestapi: Guestapi, two: Path) -> None:
    """--prune removes undefined instances in the defined projects; a source's instances only with --prune-source."""
    with Writer(guestapi.settings).change() as change:
        assert reconcile(change, "lxc", [Observed("k", "default", "box")]) == []
    for name, project in (("old", "default"), ("old", "shop"), ("old", "elsewhere")):
        guestapi.good("instance", "add", name, "--project", project)
    lines = guestapi.good("apply", "-f", str(two), "--prune").splitlines()
    assert lines == ["removed old", "removed old in project shop", "0 added, 0 changed, 2 removed, 2 unchanged"]
    assert [(one["project"], one["name"]) for one in guestapi.state()] == [
        ("default", "box"),
        ("default", "web"),
        ("elsewhere", "old"),
        ("shop", "db"),
    ]
    assert guestapi.good("apply", "-f", str(two), "--prune", "--prune-source", "lxc").splitlines()[0] == "removed box"
    two.write_text("")
    assert "would remove everything" in guestapi.fails("apply", "-f", str(two), "--prune")


@pytest.mark.root
def test_prune_running_instances(guestapi: Guestapi, two: Path) -> None:
    """A running instance is pruned only with --force."""
    guestapi.good("instance", "add", "old")
    with Container() as container:
        guestapi.good("instance", "register", "old", "--pid", str(container.pid))
        assert "old is not defined, but runs" in guestapi.fails("apply", "-f", str(two), "--prune")
        guestapi.good("apply", "-f", str(two), "--prune", "--force")
    assert "old" not in [one["name"] for one in guestapi.state()]


def test_sources_are_exported_if_asked(guestapi: Guestapi, two: Path) -> None:
    """Instances of sources are exported only with --sources, because their source registers them."""
    with Writer(guestapi.settings).change() as change:
        assert reconcile(change, "lxc", [Observed("k", "default", "box", config={"user.a": "1"})]) == []
    done = guestapi("export", "--all")
    assert "box" not in done.out
    assert done.err.startswith("1 instances of sources are left out")
    found = list(yaml.safe_load_all(guestapi.good("export", "--all", "--sources")))
    assert {one["name"]: one["config"] for one in found}["box"] == {}
    before = guestapi.state()
    guestapi.good("apply", "-f", "-", stdin=guestapi.good("export", "--all", "--sources"))
    assert guestapi.state() == before


def test_warnings(guestapi: Guestapi) -> None:
    """A definition with a probable typing error is applied with a warning."""
    done = guestapi("apply", "-f", "-", stdin="name: a\nconfig: {limits.memroy: 1}\ndevices: {e: {type: disc}}")
    assert done.code == 0
    assert "'limits.memory' is one" in done.err
    assert "'disk' is one" in done.err


def test_progress_on_a_terminal(guestapi: Guestapi, two: Path) -> None:
    """On a terminal, a bar shows the progress."""
    assert "2/2" in on_terminal(guestapi, "apply", "-f", str(two))


def test_attributes_are_shown_and_not_taken(c1: Guestapi) -> None:
    """Exported with --attributes, they are facts: another instance that is made of the definition has none."""
    writer = Writer(c1.settings)
    with writer.change() as change:
        steps.start(change, get_instance(change, "default", "c1"), Init(100, 5, "boot", 7))
        permissions.allow(change, "default", None, "attributes")
        one = get_instance(change, "default", "c1")
    said = {"app/motd": b"a\x1b[2J\n\xff", "app/version": b"2.14"}
    writer.record_all([AttributeReport(one, path, value) for path, value in said.items()])
    assert "attributes" not in c1.good("export", "c1")
    text = c1.good("export", "c1", "--attributes")
    assert "\x1b" not in text
    assert yaml.safe_load(text)["attributes"] == {"app/motd": "a\x1b[2J\n\\xff", "app/version": "2.14"}
    assert c1.good("apply", "-f", "-", stdin=text) == "0 added, 0 changed, 0 removed, 1 unchanged\n"
    copy = "\n".join(line for line in text.replace("name: c1", "name: c2").splitlines() if "uuid" not in line)
    c1.good("apply", "-f", "-", stdin=copy)
    with view(c1.settings.store.url) as store:
        assert len(list_attributes(store, get_instance(store, "default", "c1"))) == 2
        assert list_attributes(store, get_instance(store, "default", "c2")) == []
