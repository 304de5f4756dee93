"""Two hosts of a fleet: an instance moves, and never do LXC containers of both hosts have its data.

The machine is the first host and has PostgreSQL; systemd-nspawn has the second one, with its own systemd, network,
guestapi and LXC.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.certificates import Authority
from tests.harness.fleet_host import join, make_container, reached_at
from tests.harness.postgresql import documented
from tests.harness.witness import WitnessedAnswer, check_order, read_record, those_with
from tests.machine.image import CHECKOUT
from tests.machine.product import KIND
from tests.machine.system_container import MACHINE_ADDRESS, ROOT, SystemContainer, second_host
from tests.machine.virtual import VirtualMachine

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(KIND != "deb", reason="the second host has the files of the Debian package"),
]

#: How often an operator tries to connect, for which a command has five seconds.
_TRIES = 20
#: What the instance is told: its role.
ROLE = "frontend"
#: Lines of the containers' records that have it.
_DATA = f" 200 {ROLE}$"

#: As docs/fleet.md says, with Debian's cluster. $1: where its certificates are.
_DATABASE = r"""
version=$(ls /etc/postgresql)
etc=/etc/postgresql/$version/main
install -m 0600 -o postgres -g postgres "$1/ca.crt" "$1/server.crt" "$1/server.key" "$etc"
cat >"$etc/conf.d/fleet.conf" <<END
listen_addresses = '*'
ssl_ca_file = '$etc/ca.crt'
ssl_cert_file = '$etc/server.crt'
ssl_key_file = '$etc/server.key'
END
cat "$1/pg_hba.conf" "$etc/pg_hba.conf" >"$etc/pg_hba.new"
cat "$etc/pg_hba.new" >"$etc/pg_hba.conf"
cat "$1/pg_ident.conf" >>"$etc/pg_ident.conf"
pg_ctlcluster "$version" main start
as() { runuser -u postgres -- "$@"; }
as createdb -E UTF8 -T template0 guestapi
printf '[fleet]\nurl = "postgresql:///guestapi"\n' >/srv/fleet.toml
as guestapi --config /srv/fleet.toml fleet init
as guestapi --config /srv/fleet.toml fleet host add h1
as guestapi --config /srv/fleet.toml fleet host add h2
as psql -q guestapi -c 'CREATE ROLE anna LOGIN IN ROLE guestapi_operator'
"""

#: For the tests of other modules.
_UNDO = """
systemctl stop lxc@web.service
rm -rf /var/lib/lxc/web /etc/ssl/guestapi
systemctl disable --quiet --now guestapi-fleet.service
cp /root/guestapi.toml.before /etc/guestapi/guestapi.toml
guestapi fleet leave --forget
guestapi instance remove web
pg_ctlcluster $(ls /etc/postgresql) main stop -m immediate
rm -r /usr/lib/guestapi/lib/python3.*/site-packages/psycopg* /root/fleet /root/anna
"""


class MovingHost:
    """A host with a container "web", which records what it is told."""

    def __init__(self, vm: VirtualMachine, machine: VirtualMachine | SystemContainer, name: str, root: str) -> None:
        """Describe it.

        Args:
            vm: the machine.
            machine: itself, or the second host.
            name: in the fleet.
            root: its root directory, as the machine sees it.
        """
        self.vm, self.machine, self.name = vm, machine, name
        self._record = f"{root}/var/lib/lxc/web/rootfs/record"

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program on it."""
        return self.machine.run(*argv, check=check)

    def write(self, path: str, content: str) -> None:
        """Write a file."""
        self.machine.run("sh", "-c", 'cat >"$1"', "write", path, given=content.encode())

    def follow(self, authority: Authority, url: str) -> None:
        """Join the fleet, and start the container."""
        join(self, self.name, authority, url, "/var/lib/lxc")
        make_container(self, "/var/lib/lxc", "web")
        self.run("systemctl", "start", "lxc@web.service")

    def answers(self, since: float = 0.0) -> list[WitnessedAnswer]:
        """What the container was told of what it asked after a moment."""
        return [one for one in read_record(self.vm.run("cat", self._record).stdout) if one.began > since]

    def now(self) -> float:
        """When its last answer was there."""
        return max(one.ended for one in self.answers())

    def wait_for(self, since: float, pattern: str = ".") -> None:
        """Wait for requests on both kinds of connections that were made after a moment and have such an answer."""
        both = " && ".join(
            f"awk '$1 == \"{how}\" && $2 > {since} && /{pattern}/ {{ found = 1 }} END {{ exit !found }}' {self._record}"
            for how in ("kept", "new")
        )
        self.vm.wait_until(both, 600, f"tail -n 5 {self._record}; journalctl -b -n 60 --no-pager")


class TwoHosts:
    """The fleet.

    Attributes:
        hosts: the one that has the instance, and the other one.
    """

    def __init__(self, vm: VirtualMachine, second: SystemContainer, authority: Authority) -> None:
        self.cut_off = second.cut_off
        self.hosts = MovingHost(vm, vm, "h1", ""), MovingHost(vm, second, "h2", ROOT)
        self._vm = vm
        for suffix in ("crt", "key"):
            vm.put(Path(f"{authority.directory}/anna.{suffix}"), f"/root/anna/anna.{suffix}", "0600")
        vm.put(authority.own, "/root/anna/ca.crt")

    def operate(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Have an operator run `guestapi --fleet` on the first host, again while a busy server keeps it waiting.

        All that is run here can be run twice.
        """
        files = ("PGSSLCERT=/root/anna/anna.crt", "PGSSLKEY=/root/anna/anna.key", "PGSSLROOTCERT=/root/anna/ca.crt")
        command = ("env", "PGUSER=anna", "PGSSLMODE=verify-full", *files, "guestapi", "--fleet", *words)
        for _ in range(_TRIES):
            done = self._vm.run(*command, check=False)
            if "cannot be reached" not in done.stderr:
                break
        return done


@pytest.fixture(scope="module")
def fleet(vm: VirtualMachine) -> Iterator[TwoHosts]:
    """A fleet of two hosts with a container "web" each; the instance of that name is placed on the first one."""
    with ExitStack() as stack, ThreadPoolExecutor() as at_once:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        authority = Authority(directory)
        authority.make()
        for name, path in (("localhost", "server"), ("anna", "anna")):
            authority.certificate(name, directory / path)
        for language in ("pg_hba", "pg_ident"):
            (directory / f"{language}.conf").write_text(documented(language))
        _install_psycopg(vm, directory / "psycopg")
        vm.run("cp", "/etc/guestapi/guestapi.toml", "/root/guestapi.toml.before")
        stack.callback(vm.script, f"set +e; {_UNDO}")
        booting = at_once.submit(lambda: stack.enter_context(second_host(vm)))
        for name in ("ca.crt", "server.crt", "server.key", "pg_hba.conf", "pg_ident.conf"):
            vm.put(directory / name, f"/root/fleet/{name}")
        vm.script(_DATABASE, "/root/fleet", timeout=1800)
        two = TwoHosts(vm, booting.result(), authority)
        vm.script('for root; do mkdir -p "$root"; cp -a /root/rootfs "$root"; done', *_webs())
        url = reached_at(MACHINE_ADDRESS, 5432, "guestapi")
        list(at_once.map(lambda host: host.follow(authority, url), two.hosts))
        added = two.operate("instance", "add", "web", "--host", "h1", "--config", f"user.role={ROLE}")
        assert added.returncode == 0, added.stderr
        two.hosts[0].wait_for(0, _DATA)
        two.hosts[1].wait_for(0)
        yield two


def _webs() -> Sequence[str]:
    return "/var/lib/lxc/web", f"{ROOT}/var/lib/lxc/web"


def _install_psycopg(vm: VirtualMachine, directory: Path) -> None:
    """Have pip install what docs/fleet.md says, for the machine, which has no pip and is slow."""
    requirements = str(CHECKOUT / "requirements/fleet.txt")
    words = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--target")
    subprocess.run([sys.executable, *words, directory, "--require-hashes", "-r", requirements], check=True)
    packed = subprocess.check_output(["tar", "-C", directory, "-c", "."])
    vm.run("sh", "-c", "tar -C /usr/lib/guestapi/lib/python3.*/site-packages -x", given=packed)


def test_a_registration_moves(fleet: TwoHosts) -> None:
    """The last answer of the old host comes before the first one of the new host."""
    _move(fleet)


def test_the_old_host_is_cut_off(fleet: TwoHosts) -> None:
    """A move from a host that cannot be reached waits, and says so; that host goes on answering."""
    if fleet.hosts[0].name != "h2":
        _move(fleet)
    old, new = fleet.hosts
    since = new.now()
    old.wait_for(since, _DATA)
    # A container whose instance has left is registered as another one when it starts, or a minute later.
    new.run("systemctl", "restart", "lxc@web.service")
    with fleet.cut_off():
        words = ("instance", "move", "web", "--to", new.name, "--wait", "--timeout", "1")
        done = fleet.operate(*words)
        assert done.returncode == 1
        waits = f"web goes to {new.name} as soon as {old.name} releases it; {old.name} is active and was in contact "
        assert f"not within 1 s: {waits}" in done.stderr
        old.wait_for(old.now(), _DATA)
        assert those_with(ROLE, new.answers(since)) == []
    _check_move(old, new, since)
    fleet.hosts = new, old


def _move(fleet: TwoHosts) -> None:
    old, new = fleet.hosts
    since = new.now()
    old.wait_for(since, _DATA)
    done = fleet.operate("instance", "move", "web", "--to", new.name, "--wait")
    assert done.stdout == f"web is on {new.name}\n", done.stderr
    _check_move(old, new, since)
    fleet.hosts = new, old


def _check_move(old: MovingHost, new: MovingHost, since: float) -> None:
    """Wait until the new host has an instance, and check what both were told after a moment."""
    new.wait_for(since, _DATA)
    old.wait_for(new.now())
    check_order(ROLE, old.answers(since), new.answers(since))
