"""What the sandbox denies a compromised worker: a real worker of the real unit makes the attempts."""

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
from tests.harness.waiting import until

pytestmark = pytest.mark.root

#: What a worker needs, and so may do. The namespace needs CAP_SYS_PTRACE.
DONE = {"socket UNIX", "write /var/lib/guestapi", "write /tmp", "namespace"}
NO_FAMILY, READ_ONLY, REFUSED = {"EAFNOSUPPORT"}, {"EROFS"}, {"EPERM", "EACCES"}
EXPECTED = {
    **dict.fromkeys(("socket INET", "socket INET6", "socket NETLINK", "socket PACKET"), NO_FAMILY),
    **dict.fromkeys(("write /etc", "write /usr", "write /var", "write /var/lib", "write /dev"), READ_ONLY),
    # Its user could not write there in any case.
    "write /run": READ_ONLY | REFUSED,
    "write /dev/shm": REFUSED,
    **dict.fromkeys(("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"), REFUSED),
    **dict.fromkeys(("read memory", "write memory", "list descriptors", "become root"), REFUSED),
    **dict.fromkeys(("io_uring", "userfaultfd", "add_key"), REFUSED),
}


def configuration(pid: int, file: str) -> str:
    """Return a gunicorn.conf.py whose workers make the attempts on that process and write the outcomes to that file."""
    return Path(probing.__file__).read_text() + f"\n_WHOM_AND_WHERE = ({pid}, {file!r})\n"


@contextmanager
def other_process(*enter: str) -> Iterator[int]:
    """Another process, root's; yields its PID as seen by the worker."""
    sleep = [*enter, "sh", "-c", "echo $$; exec sleep 300"]
    with subprocess.Popen(sleep, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def test_sandbox_refuses(machine: Installed) -> None:
    """In the unit's sandbox a worker opens no network socket, writes only to its state, and accesses no process."""
    with other_process(*machine.enter) as pid:
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


def test_attempts_succeed_without_the_sandbox() -> None:
    """Without the unit's sandbox, the same attempts of the same user with the same capability succeed."""
    with other_process() as pid, Service(workers=1, dialects=["incus"]) as service:
        service.stop()
        probed = service.state / "probed"
        (service.root / "gunicorn.conf.py").write_text(configuration(pid, str(probed)))
        service.start()
        until(probed.exists, "the results of the attempts")
        outcomes = json.loads(probed.read_text())
    wanted = {"socket INET", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "write /dev/shm"}
    assert {name for name in wanted if outcomes[name] != "done"} == set()
