"""The Debian package on a machine with systemd: install, upgrade under load, remove, reinstall, purge; no downgrade."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import guestapi
from guestapi.cli.main import main
from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT, Machine
from tests.package.test_manual import commands

pytestmark = pytest.mark.root

LOOPING = (CHECKOUT / "tests/harness/looping.py").read_text()
#: Limits of the package's size on a disk in KiB: unpacked, and with the bytecode that its installation compiles.
UNPACKED, COMPILED = 20_000, 36_000
LATER = "99.0.0"

#: Run by the package's own interpreter: makes every import of guestapi's code, also those in functions, and prints the
#: help of each given command. psycopg is installed by those who have a fleet (docs/fleet.md),
#: PyJWT and cryptography by those who have signed identity (docs/identity.md).
EVERYTHING = """
import ast, importlib, pathlib, sys
import guestapi
from guestapi.cli.main import main

optional = {"cryptography", "jwt", "psycopg"}

def load(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in optional:
            raise

for path in sorted(pathlib.Path(guestapi.__path__[0]).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                load(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            module = load(node.module)
            for alias in node.names:
                if module is not None and not hasattr(module, alias.name):
                    load(f"{node.module}.{alias.name}")
for command in sys.argv[1:]:
    try:
        main([*command.split()[1:], "--help"], prog_name="guestapi")
    except SystemExit as end:
        assert end.code == 0, command
"""


class Packages:
    """The package of this checkout, and the same with a later version."""

    def __init__(self, directory: Path, environment: Path) -> None:
        self.directory = directory
        build: list[str | Path] = [CHECKOUT / "tools/build_deb.py", directory, "--environment", environment]
        subprocess.run([*build, "--compression", "none"], check=True, stdout=subprocess.DEVNULL)
        (self.this,) = directory.glob("*.deb")
        self.later = directory / "later.deb"
        unpacked = directory / "later"
        subprocess.run(["dpkg-deb", "--raw-extract", self.this, unpacked], check=True)
        for name in ("control", "preinst"):
            file = unpacked / "DEBIAN" / name
            file.write_text(file.read_text().replace(guestapi.__version__, LATER))
        subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", unpacked, self.later], check=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory, staged: Path) -> Packages:
    """The packages for this release of Debian, with the environment that ``make install`` has made.

    One of its own, as `make deb` makes it, is in the package that tests/machine installs.
    """
    return Packages(tmp_path_factory.mktemp("packages"), staged / "opt/guestapi")


@pytest.fixture(scope="module")
def machine(packages: Packages) -> Iterator[Machine]:
    """A machine with the installed package and its socket enabled."""
    with Machine() as booted:
        # man-db would make its database of all manual pages anew after each of dpkg's runs, for as long as they take.
        booted.run("rm", "-f", "/var/lib/man-db/auto-update")
        put(booted, packages.this)
        put(booted, packages.later)
        booted.run("dpkg", "-i", f"/root/{packages.this.name}")
        booted.run("systemctl", "enable", "--now", "guestapi.socket")
        yield booted


def put(machine: Machine, file: Path) -> None:
    """Copy a file into the machine's /root."""
    with file.open("rb") as content:
        subprocess.run([*machine.enter, "sh", "-c", f"cat >/root/{file.name}"], stdin=content, check=True)


@pytest.fixture(scope="module")
def container(machine: Machine) -> Iterator[Container]:
    """A container on that machine, registered by the operator's command."""
    machine.run("guestapi", "instance", "add", "c1", "--config", "user.foo=bar")
    with Container([(Path("/var/lib/incus/guestapi"), "/dev/incus")], enter=machine.enter) as running:
        machine.run("guestapi", "instance", "start", "c1", "--pid", str(running.pid))
        yield running


def state(machine: Machine) -> str:
    """Return wanted and actual state and the version of the package according to dpkg."""
    words = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Version}", "guestapi"]
    return machine.run(*words, check=False).stdout


def found(machine: Machine) -> list[str]:
    """Return everything on the machine with guestapi in its name, except dpkg's records and logs."""
    prune = "-path /var/lib/dpkg -o -path /var/log -o -path /var/tmp"
    script = f"find /etc /opt /run /usr /var -xdev \\( {prune} \\) -prune -o -name '*guestapi*' -print"
    return machine.run("sh", "-c", script).stdout.split()


def ask(machine: Machine, container: Container, seconds: float) -> list[subprocess.Popen[bytes]]:
    """Start clients in the container that send requests for a time, on one connection and on new ones."""
    enter = [*machine.enter, "nsenter", "-t", str(container.pid), "-U", "-m", "-p", "--setuid", "0", "--setgid", "0"]
    enter += ["/usr/bin/python3", "-I", "-S", "-c", LOOPING, str(seconds)]
    return [subprocess.Popen([*enter, kind], stdout=subprocess.PIPE) for kind in ("connect", "keep")]


def test_size(packages: Packages) -> None:
    """The package is below its size limit, also according to its control file."""
    done = subprocess.run(
        ["dpkg-deb", "-f", packages.this, "Installed-Size"], check=True, capture_output=True, text=True
    )
    assert 10_000 < int(done.stdout) < UNPACKED


def test_content(packages: Packages) -> None:
    """The package has all necessary files, and none that only builds and tests need."""
    listed = subprocess.run(["dpkg-deb", "-c", packages.this], check=True, capture_output=True, text=True).stdout
    names = re.findall(r" \./(\S*)", listed)
    for wanted in (
        "usr/bin/guestapi",
        "usr/lib/guestapi/bin/guestapi-hook",
        "usr/lib/systemd/system/guestapi.service",
        "usr/lib/systemd/system/guestapi.socket",
        "usr/lib/sysusers.d/guestapi.conf",
        "usr/lib/tmpfiles.d/guestapi.conf",
        "etc/guestapi/guestapi.toml",
        "usr/share/guestapi/guestctl",
        "usr/share/guestapi/guestapi-agent",
        "usr/share/guestapi/guestapi-agent.service",
        "usr/share/guestapi/guestapi-agent.socket",
        "usr/lib/systemd/system/guestapi-vsock.service",
        "usr/share/man/man1/guestapi.1.gz",
        "usr/share/man/man1/guestctl.1.gz",
        "usr/share/man/man5/guestapi.toml.5.gz",
        "usr/share/man/man7/guestapi.7.gz",
        "usr/share/bash-completion/completions/guestapi",
        "usr/share/zsh/vendor-completions/_guestapi",
        "usr/share/fish/vendor_completions.d/guestapi.fish",
        "usr/share/doc/guestapi/copyright",
        "usr/share/guestapi/guestctl",
        "usr/share/man/man1/guestctl.1.gz",
        "usr/share/bash-completion/completions/guestctl",
    ):
        assert wanted in names, wanted
    programs = re.findall(r"^-rwxr-xr-x .* \./(\S*)", listed, re.MULTILINE)
    assert programs == [
        "usr/lib/guestapi/bin/guestapi",
        "usr/lib/guestapi/bin/guestapi-hook",
        "usr/share/guestapi/guestapi-agent",
        "usr/share/guestapi/guestctl",
    ]
    unwanted = [name for name in names if re.search(r"/(pip|tests|__pycache__)/|\.(c|h|pyx|pyc)$", name)]
    assert unwanted == []
    said = subprocess.run(
        ["dpkg-deb", "-f", packages.this, "Depends"], check=True, capture_output=True, text=True
    ).stdout
    assert re.match(r"python3 \(>= 3\.(\d+)~\), python3 \(<< 3\.(\d+)\), ", said)


def test_installed(machine: Machine, container: Container) -> None:
    """The socket starts the service, which answers a guest; check reports no failure, and the size is in its limit."""
    assert container.ask("/1.0/config/user.foo").text == "bar"
    assert "FAIL" not in machine.run("guestapi", "check").stdout
    assert int(machine.run("du", "-sk", "/usr/lib/guestapi").stdout.split()[0]) < COMPILED
    assert machine.run("dpkg", "--verify", "guestapi").stdout == ""


def test_trimmed_environment_is_complete(machine: Machine, container: Container) -> None:
    """Nothing that the code imports was trimmed; each command has its help; a terminal gets tables and bars."""
    names = [path for path, _command in commands(main, "guestapi")]
    said = machine.run("/usr/lib/guestapi/bin/python", "-c", EVERYTHING, *names).stdout
    for name in names:
        assert f"Usage: {name} " in said, name
    terminal = ["script", "--quiet", "--return", "--command"]
    assert "│ c1 " in machine.run(*terminal, "guestapi instance list", "/dev/null").stdout
    machine.run(
        "sh",
        "-c",
        "cd /root && echo a >metadata.yaml && tar -cf image.tar metadata.yaml; printf hsqs >disk; truncate -s 1M disk",
    )
    shown = machine.run(*terminal, "guestapi image import /root/image.tar /root/disk", "/dev/null").stdout
    assert "\x1b[" in shown, shown


def test_upgrade_loses_no_request(machine: Machine, container: Container, packages: Packages) -> None:
    """While clients send requests, a later version is installed and started; every request is answered."""
    # test_edited_configuration looks for it.
    machine.run("sh", "-c", "echo '# mine' >>/etc/guestapi/guestapi.toml")
    before = machine.run("systemctl", "show", "--value", "-p", "MainPID", "guestapi.service").stdout
    clients = ask(machine, container, 60)
    with ThreadPoolExecutor() as pool:
        outputs = pool.map(lambda client: client.communicate()[0], clients)
        machine.run("dpkg", "-i", f"/root/{packages.later.name}")
        machine.run("guestapi", "config", "set", "c1", "user.foo=enough")
        seen = [json.loads(output) for output in outputs]
    machine.run("guestapi", "config", "set", "c1", "user.foo=bar")
    for client in seen:
        assert client["failed"] == []
        assert client["good"] > 50
    assert state(machine).startswith(f"ii {LATER}+deb")
    assert machine.run("systemctl", "show", "--value", "-p", "MainPID", "guestapi.service").stdout != before


def test_edited_configuration(machine: Machine) -> None:
    """The upgrade kept a configuration file that was edited, without a question."""
    assert machine.run("tail", "-n", "1", "/etc/guestapi/guestapi.toml").stdout == "# mine\n"
    assert machine.run("sh", "-c", "ls /etc/guestapi/*.dpkg-*", check=False).stdout == ""


def test_downgrade_is_refused(machine: Machine, container: Container, packages: Packages) -> None:
    """An earlier version is refused with a reason and a hint; the later one goes on."""
    refused = machine.run("dpkg", "-i", f"/root/{packages.this.name}", check=False)
    assert refused.returncode != 0
    assert f"guestapi {guestapi.__version__} cannot replace the later version {LATER}" in refused.stderr
    assert state(machine).startswith(f"ii {LATER}+deb")
    assert container.ask("/1.0/config/user.foo").text == "bar"


def test_remove_and_reinstall(machine: Machine, container: Container, packages: Packages) -> None:
    """After its removal there is no service, but configuration and store stay; installed again, it works as before."""
    machine.run("dpkg", "-r", "guestapi")
    assert state(machine).startswith("rc ")
    left = found(machine)
    assert not any(path.startswith(("/usr/", "/run/")) for path in left), left
    included = machine.run("cat", "/etc/guestapi/lxc-guestapi.conf").stdout
    hook = re.search(r"^lxc.hook.start-host = (.*)$", included, re.MULTILINE)
    assert hook
    machine.run("sh", "-c", f"exec {hook[1]} web lxc start-host")
    machine.run("dpkg", "-i", f"/root/{packages.later.name}")
    assert machine.run("tail", "-n", "1", "/etc/guestapi/guestapi.toml").stdout == "# mine\n"
    assert container.ask("/1.0/config/user.foo").text == "bar"


def test_purge(machine: Machine) -> None:
    """After a purge only a file without settings is left, which containers include."""
    machine.run(
        "sh",
        "-c",
        "mkdir -p /var/lib/lxc/w; echo 'lxc.include = /etc/guestapi/lxc-guestapi.conf' >/var/lib/lxc/w/config",
    )
    machine.run("dpkg", "-P", "guestapi")
    assert found(machine) == ["/etc/guestapi", "/etc/guestapi/lxc-guestapi.conf"]
    lines = machine.run("cat", "/etc/guestapi/lxc-guestapi.conf").stdout.splitlines()
    assert all(line.startswith("#") for line in lines)
    assert (
        machine.run("systemctl", "list-unit-files", "guestapi*", check=False).stdout.splitlines()[-1]
        == "0 unit files listed."
    )


def test_beside_make_install(machine: Machine, packages: Packages) -> None:
    """After `make install` the package is refused, because its units would be hidden."""
    machine.run(
        "sh",
        "-c",
        "mkdir -p /opt/guestapi/bin && touch /opt/guestapi/bin/guestapi /etc/systemd/system/guestapi.service",
    )
    refused = machine.run("dpkg", "-i", f"/root/{packages.later.name}", check=False)
    assert refused.returncode != 0
    assert "run 'make uninstall' first" in refused.stderr
    assert not state(machine).startswith("ii ")
