"""guestctl in instances with the Pythons of other systems: in roots of Debian 12, 13 and testing, PyPy included."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.containers import Container, Ran
from tests.harness.machine import CHECKOUT
from tests.harness.service import Service
from tools import debian_root

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

#: The packages of each root besides python3.
SUITES = {"bookworm": ["pypy3"], "trixie": [], "testing": ["pypy3"]}
INTERPRETERS = [(suite, python) for suite, more in SUITES.items() for python in ("python3", *more)]
#: Run in an instance: $1 becomes the root file system of a program of it, with the socket, and directory $2 at /mnt.
#: The rest are the program's words.
_ENTER = """
set -e
for each in dev proc; do mount --rbind "/$each" "$1/$each"; done
mount --bind "$2" "$1/mnt"
root=$1; shift 2
exec chroot "$root" "$@"
"""


@dataclass(frozen=True)
class RootedGuest:
    """An instance with a root file system of Debian, and one of its interpreters."""

    container: Container
    root: Path
    python: str

    def __call__(self, *words: str, stdin: bytes = b"") -> Ran:
        """Run guestctl with these arguments."""
        enter = ["unshare", "--mount", "sh", "-c", _ENTER, "enter", str(self.root), str(CHECKOUT / "guestapi/guest")]
        return self.container.run(*enter, self.python, "-I", "/mnt/guestctl.py", *words, stdin=stdin, timeout=120)


@pytest.fixture(scope="module")
def instance(service: Service) -> Iterator[Container]:
    """A privileged container, whose root can enter the roots."""
    devices = {"root": {"type": "disk", "path": "/"}}
    with service.container("rooted", {"user.key": "värde\n"}, devices, base=None) as container:
        service.command("policy", "allow", "attributes", "--instance", "rooted")
        yield container


@pytest.fixture(params=INTERPRETERS, ids=["-".join(one) for one in INTERPRETERS])
def guest(request: pytest.FixtureRequest, instance: Container) -> RootedGuest:
    """guestctl, run with each interpreter of each root."""
    suite, python = request.param
    return RootedGuest(instance, debian_root.build_root(suite, SUITES[suite]), python)


def test_every_command(guest: RootedGuest, service: Service) -> None:
    """Reading, waiting, events, readiness and attributes work, with the statuses and texts of the manual."""
    assert guest("get", "user.key") == Ran(0, "värde\n", "")
    assert guest("get", "user.no") == Ran(1, "", "guestctl: not found\n")
    assert guest("list") == Ran(0, "user.key\n", "")
    assert json.loads(guest("devices").out) == {"root": {"type": "disk", "path": "/"}}
    assert guest("metadata").out.startswith("#cloud-config\ninstance-id: ")
    assert guest("get").code == 3
    assert guest("--socket", "/none", "--timeout", "0.1", "list").code == 2
    for words, ready in ((["ready"], True), (["ready", "--not"], False)):
        assert guest(*words) == Ran(0, "", "")
        assert service.instance("rooted").ready is ready
    setting = threading.Timer(0.5, lambda: service.configure("rooted", user_late="now"))
    setting.start()
    assert guest("get", "user.late", "--wait", "60") == Ran(0, "now", "")
    setting.join()
    service.configure("rooted", user_late="")
    assert guest("put", "said/a", stdin=b"\xffvalue").code == 0
    assert guest("delete", "said/a") == Ran(0, "", "")
    assert guest("notices").code == 0
