"""`make install` and `make uninstall` with configuration: files that the operator has edited stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


class System:
    """A directory that stands for a system, and a checkout to install, which the test can change."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.checkout = directory / "checkout"
        for part in ("conf", "guestapi", "systemd", "tools"):
            shutil.copytree(CHECKOUT / part, self.checkout / part)
        self.toml = self.root / "etc/guestapi/guestapi.toml"
        self.new = self.toml.with_name("guestapi.toml.new")

    def __call__(self, verb: str) -> str:
        """Run `tools/installation.py`; return its output."""
        words = [sys.executable, str(self.checkout / "tools/installation.py"), verb, "--destdir", str(self.root)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        return done.stdout

    def files(self) -> list[str]:
        """Return the files of the system, except those of the environment."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if not path.is_dir() or path.is_symlink())
        return sorted(str(path) for path in found if not str(path).startswith("opt/"))

    def release(self) -> None:
        """Make the checkout another version, with another configuration."""
        with (self.checkout / "conf/guestapi.toml").open("a") as file:
            file.write("# A later version.\n")


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A system with guestapi installed."""
    system = System(tmp_path)
    system("install")
    return system


def test_second_installation_changes_nothing(system: System) -> None:
    """Installing again writes no .new and touches no file, edited or not."""
    (system.root / "etc/guestapi/gunicorn.conf.py").write_text("workers = 4\n")
    before = {
        path: (system.root / path).lstat().st_mtime_ns for path in system.files() if path != "usr/local/bin/guestapi"
    }
    names = system.files()
    system("install")
    system("install")
    assert system.files() == names
    assert {path: (system.root / path).lstat().st_mtime_ns for path in before} == before
    assert (system.root / "etc/guestapi/gunicorn.conf.py").read_text() == "workers = 4\n"


def test_untouched_configuration_is_renewed(system: System) -> None:
    """An unedited file is replaced by that of the new version."""
    system.release()
    system("install")
    assert system.toml.read_text().endswith("# A later version.\n")
    assert not system.new.exists()


def test_edited_configuration_stays(system: System) -> None:
    """An edited file stays; that of the new version is written beside it once, and not again after it is deleted."""
    system.toml.write_text("# mine\n")
    system.release()
    assert "guestapi.toml.new" in system("install")
    assert system.toml.read_text() == "# mine\n"
    assert system.new.read_text().endswith("# A later version.\n")
    system.new.unlink()
    assert "guestapi.toml.new" not in system("install")
    assert not system.new.exists()


def test_new_file_is_removed_after_its_takeover(system: System) -> None:
    """After an operator has taken over the new file, only one file is left."""
    system.toml.write_text("# mine\n")
    system.release()
    system("install")
    system.toml.write_text(system.new.read_text())
    system("install")
    assert not system.new.exists()


def test_uninstall(system: System) -> None:
    """Everything is removed except the file that containers include."""
    output = system("uninstall")
    assert system.files() == ["etc/guestapi/lxc-guestapi.conf"]
    assert "/etc/guestapi/lxc-guestapi.conf" in output
    assert not (system.root / "opt/guestapi").exists()
    assert (system.root / "var/lib/guestapi").is_dir()


def test_uninstall_keeps_what_was_edited(system: System) -> None:
    """An edited guestapi.toml stays, also of an earlier version, and the output names it."""
    system.toml.write_text("# mine\n")
    system.release()
    system("install")
    assert "/etc/guestapi/guestapi.toml, which was edited" in system("uninstall")
    assert system.files() == ["etc/guestapi/guestapi.toml", "etc/guestapi/lxc-guestapi.conf"]
    assert system.toml.read_text() == "# mine\n"


def test_uninstall_of_another_version(system: System) -> None:
    """An unedited file of another version than the checkout's is removed."""
    system.release()
    system("uninstall")
    assert not system.toml.exists()


def test_containers_start_without_the_command(system: System) -> None:
    """The hooks in containers' configurations succeed without the command."""
    system("uninstall")
    lines = (system.root / "etc/guestapi/lxc-guestapi.conf").read_text().splitlines()
    hooks = [line.partition(" = ")[2] for line in lines if line.startswith("lxc.hook.")]
    assert hooks
    for hook in hooks:
        # As LXC calls it, with three more arguments.
        absent = hook.replace("/opt/guestapi", str(system.root / "opt/guestapi"))
        subprocess.run(["sh", "-c", f"exec {absent} web lxc start-host"], check=True)


def test_beside_a_package(system: System) -> None:
    """If the Debian package is installed, `make install` refuses, because its units would hide the package's."""
    system("may-install")
    command = system.root / "usr/bin/guestapi"
    command.parent.mkdir(parents=True)
    command.symlink_to("../lib/guestapi/bin/guestapi")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        system("may-install")
    assert "apt-get remove guestapi" in refused.value.stdout
