"""What a worker can do that somebody has taken over: a true worker of the true unit tries."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import probing
from tests.harness.machine import Installed
from tests.harness.service import Service
from tests.server.test_worker import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(200), pytest.mark.xdist_group("machines")]

#: What it needs. The namespace is what CAP_SYS_PTRACE is for.
DONE = {"socket UNIX", "write /var/lib/guestapi", "write /tmp", "namespace"}
NO_FAMILY, READ_ONLY, REFUSED = {"EAFNOSUPPORT"}, {"EROFS"}, {"EPERM", "EACCES"}
EXPECTED = {
    **dict.fromkeys(("socket INET", "socket INET6", "socket NETLINK", "socket PACKET"), NO_FAMILY),
    **dict.fromkeys(("write /etc", "write /usr", "write /var", "write /var/lib", "write /dev"), READ_ONLY),
    # Not writable by its user anyway.
    "write /run": READ_ONLY | REFUSED,
    "write /dev/shm": REFUSED,
    **dict.fromkeys(("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"), REFUSED),
    **dict.fromkeys(("read memory", "write memory", "list descriptors", "become root"), REFUSED),
    **dict.fromkeys(("io_uring", "userfaultfd", "add_key"), REFUSED),
}


def configuration(pid: int, file: str) -> str:
    """A gunicorn.conf.py with which workers try it on that process, and tell that file."""
    return Path(probing.__file__).read_text() + f"\n_WHOM_AND_WHERE = ({pid}, {file!r})\n"


@contextmanager
def somebody(*enter: str) -> Iterator[int]:
    """Another process, root's; its PID where `enter` leads."""
    sleep = [*enter, "sh", "-c", "echo $$; exec sleep 300"]
    with subprocess.Popen(sleep, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def test_sandbox_refuses(machine: Installed) -> None:
    """Inside the unit's sandbox a worker cannot open a network socket, write but to the store, or touch a process."""
    with somebody(*machine.enter) as pid:
        machine.write("/etc/guestapi/gunicorn.conf.py", configuration(pid, "/var/lib/guestapi/probed"))
        try:
            machine.run("systemctl", "restart", "guestapi.service")
            machine.ask()
        finally:
            machine.set_workers(2)
    outcomes = json.loads(machine.run("cat", "/var/lib/guestapi/probed").stdout)
    assert {name for name, outcome in outcomes.items() if outcome == "done"} == DONE
    unexpected = {name: outcomes[name] for name, expected in EXPECTED.items() if outcomes[name] not in expected}
    assert unexpected == {}
    assert outcomes.keys() == DONE | EXPECTED.keys()


def test_it_is_the_sandbox_that_refuses() -> None:
    """The same attempts succeed in a worker of the same user and capability without the unit: the probe can tell."""
    with somebody() as pid, Service(workers=1, dialects=["incus"]) as service:
        service.stop()
        probed = service.state / "probed"
        (service.root / "gunicorn.conf.py").write_text(configuration(pid, str(probed)))
        service.start()
        until(probed.exists, "what was tried")
        outcomes = json.loads(probed.read_text())
    wanted = {"socket INET", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "write /dev/shm"}
    assert {name for name in wanted if outcomes[name] != "done"} == set()
