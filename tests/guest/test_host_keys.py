"""An instance publishes its SSH host keys, and ssh connects to it without a question: a real sshd in a container."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.test_snippets import descendants, snippets
from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT
from tests.harness.service import COMMAND, Service
from tests.harness.waiting import until

pytestmark = pytest.mark.root

#: The directory into which `make test` unpacks Debian's packages.
UNPACKED = COMMAND.parents[1] / "openssh"

#: Makes the container a host with keys of its own; nothing of it is seen outside of its mount namespace. A later sshd
#: than Debian 12's calls programs beside it.
PREPARE = """
set -e
mount -t tmpfs -o mode=0755 tmpfs /run
mkdir /run/sshd /run/etc
grep -v ^sshd: /etc/passwd >/run/etc/passwd
echo sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin >>/run/etc/passwd
mount --bind /run/etc/passwd /etc/passwd
mount -t tmpfs -o mode=0755 tmpfs /etc/ssh
! [ -d /usr/lib/openssh ] || mount --bind "$1/usr/lib/openssh" /usr/lib/openssh
ssh-keygen -q -A
"""
CONFIGURATION = """
ListenAddress 127.0.0.1
Port {port}
AuthorizedKeysFile {directory}/client.pub
PidFile none
StrictModes no
UsePAM no
"""


@pytest.fixture(scope="module", autouse=True)
def unpacked() -> None:
    """Check that `make test` has unpacked the packages."""
    assert UNPACKED.is_dir(), "run the tests by 'make test', which unpacks Debian's sshd"


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that is visible in the instance, which has its own /dev and /tmp."""
    with tempfile.TemporaryDirectory(prefix="guestapi-", dir="/var/tmp") as path:
        yield Path(path)


@pytest.fixture
def web(service: Service, directory: Path) -> Iterator[Container]:
    """A privileged container with host keys and guestctl, which may have attributes."""
    shutil.copy(CHECKOUT / "guestapi/guest/guestctl.py", directory / "guestctl")
    (directory / "guestctl").chmod(0o755)
    with service.container("ssh-web", base=None) as container:
        ran = container.run("sh", "-c", PREPARE, "sh", str(UNPACKED))
        assert ran.code == 0, ran.err
        service.command("policy", "allow", "attributes", "--instance", "ssh-web")
        yield container


@contextmanager
def listening(container: Container, directory: Path) -> Iterator[int]:
    """Run sshd in the container; yield the port of the loopback address at which it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    (directory / "sshd_config").write_text(CONFIGURATION.format(port=port, directory=directory))
    libraries = [str(path.parent) for path in UNPACKED.rglob("libwrap.so.0")]
    command = [str(UNPACKED / "usr/sbin/sshd"), "-D", "-e", "-f", str(directory / "sshd_config")]
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen(
            ["nsenter", "-t", str(container.pid), "-a", "env", f"LD_LIBRARY_PATH={':'.join(libraries)}", *command],
            stderr=log,
        ) as process,
    ):

        def listens() -> bool:
            assert process.poll() is None, (directory / "log").read_text()
            return "Server listening" in (directory / "log").read_text()

        try:
            until(listens, "sshd")
            yield port
        finally:
            for pid in [*reversed(descendants(process.pid)), process.pid]:
                os.kill(pid, signal.SIGKILL)


def connect(directory: Path, port: int, known: str) -> subprocess.CompletedProcess[str]:
    """Ask a host for its name by ssh, which asks nobody anything, and knows these hosts alone."""
    (directory / "known_hosts").write_text(known)
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": directory / "known_hosts",
        "GlobalKnownHostsFile": "/dev/null",
        "UpdateHostKeys": "no",
        "IdentitiesOnly": "yes",
        "Port": port,
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return subprocess.run(
        ["ssh", "-F", "none", "-i", directory / "client", *words, "root@127.0.0.1", "hostname"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_ssh_connects_without_a_question(service: Service, web: Container, directory: Path) -> None:
    """With the lines that the command prints, ssh connects; without them, or with other keys, it does not."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "client"], check=True)
    (script,) = snippets("Publish SSH host keys")
    published = web.run("env", f"PATH={directory}:/usr/bin:/bin", "sh", "-ec", script)
    assert published.code == 0, published.err
    with listening(web, directory) as port:
        words = ("attributes", "known-hosts", "ssh-web", "--host", f"[127.0.0.1]:{port}")
        known = service.command(*words).stdout
        kinds = {line.split()[1] for line in known.splitlines()}
        assert kinds == {"ssh-rsa", "ecdsa-sha2-nistp256", "ssh-ed25519"}
        done = connect(directory, port, known)
        assert (done.returncode, done.stdout) == (0, "ssh-web\n"), done.stderr
        assert "Host key verification failed" in connect(directory, port, "").stderr
        # sshd reads its keys for each connection.
        web.run("sh", "-c", "rm /etc/ssh/ssh_host_*; ssh-keygen -q -A")
        assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in connect(directory, port, known).stderr
        changed = web.run("env", f"PATH={directory}:/usr/bin:/bin", "sh", "-ec", script)
        assert changed.code == 0, changed.err
        done = connect(directory, port, service.command(*words).stdout)
        assert (done.returncode, done.stdout) == (0, "ssh-web\n"), done.stderr
