"""What `make install` and `make uninstall` do with configuration: what the operator has edited is the operator's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


class System:
    """A directory that stands for a system, and the checkout that is installed on it, which can change."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.checkout = directory / "checkout"
        for part in ("conf", "guestapi", "systemd", "tools"):
            shutil.copytree(CHECKOUT / part, self.checkout / part)
        self.toml = self.root / "etc/guestapi/guestapi.toml"
        self.new = self.toml.with_name("guestapi.toml.new")

    def __call__(self, verb: str) -> str:
        """Run `tools/installation.py`; what it says."""
        words = [sys.executable, str(self.checkout / "tools/installation.py"), verb, "--destdir", str(self.root)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        return done.stdout

    def files(self) -> list[str]:
        """What is there, without what belongs to the environment."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if not path.is_dir() or path.is_symlink())
        return sorted(str(path) for path in found if not str(path).startswith("opt/"))

    def release(self) -> None:
        """Let the checkout be another version, with another configuration."""
        with (self.checkout / "conf/guestapi.toml").open("a") as file:
            file.write("# A later version.\n")


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A system on which guestapi is installed."""
    system = System(tmp_path)
    system("install")
    return system


def test_again_changes_nothing(system: System) -> None:
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
    """What nobody has edited becomes that of the new version."""
    system.release()
    system("install")
    assert system.toml.read_text().endswith("# A later version.\n")
    assert not system.new.exists()


def test_edited_configuration_stays(system: System) -> None:
    """What was edited stays; the new version's lies beside it once, until somebody takes it away."""
    system.toml.write_text("# mine\n")
    system.release()
    assert "guestapi.toml.new" in system("install")
    assert system.toml.read_text() == "# mine\n"
    assert system.new.read_text().endswith("# A later version.\n")
    system.new.unlink()
    assert "guestapi.toml.new" not in system("install")
    assert not system.new.exists()


def test_new_goes_when_it_is_taken_over(system: System) -> None:
    """An operator who takes the new file over is left with one file."""
    system.toml.write_text("# mine\n")
    system.release()
    system("install")
    system.toml.write_text(system.new.read_text())
    system("install")
    assert not system.new.exists()


def test_uninstall(system: System) -> None:
    """Everything goes but what containers include."""
    told = system("uninstall")
    assert system.files() == ["etc/guestapi/lxc-guestapi.conf"]
    assert "/etc/guestapi/lxc-guestapi.conf" in told
    assert not (system.root / "opt/guestapi").exists()
    assert (system.root / "var/lib/guestapi").is_dir()


def test_uninstall_keeps_what_was_edited(system: System) -> None:
    """An edited guestapi.toml survives, also of an older version than the checkout's, and is said to."""
    system.toml.write_text("# mine\n")
    system.release()
    system("install")
    assert "/etc/guestapi/guestapi.toml, which was edited" in system("uninstall")
    assert system.files() == ["etc/guestapi/guestapi.toml", "etc/guestapi/lxc-guestapi.conf"]
    assert system.toml.read_text() == "# mine\n"


def test_uninstall_of_another_version(system: System) -> None:
    """A checkout that has changed since does not take what nobody has edited for edited."""
    system.release()
    system("uninstall")
    assert not system.toml.exists()


def test_containers_start_without_the_command(system: System) -> None:
    """The hooks that containers' configuration includes end well when the command is gone."""
    system("uninstall")
    lines = (system.root / "etc/guestapi/lxc-guestapi.conf").read_text().splitlines()
    hooks = [line.partition(" = ")[2] for line in lines if line.startswith("lxc.hook.")]
    assert hooks
    for hook in hooks:
        # As LXC does it, with three more words.
        absent = hook.replace("/opt/guestapi", str(system.root / "opt/guestapi"))
        subprocess.run(["sh", "-c", f"exec {absent} web lxc start-host"], check=True)


def test_beside_a_package(system: System) -> None:
    """Where the Debian package is installed, `make install` does not begin; its units would hide the package's."""
    system("may-install")
    command = system.root / "usr/bin/guestapi"
    command.parent.mkdir(parents=True)
    command.symlink_to("../lib/guestapi/bin/guestapi")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        system("may-install")
    assert "apt-get remove guestapi" in refused.value.stdout
