"""Virtual machines at the real service: what the relay hands over is answered like a container's connection."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from guestapi.relay import handover
from tests.harness.containers import Container
from tests.harness.scratch import SCRATCH
from tests.harness.service import UNPRIVILEGED, USER, Service
from tests.harness.vmm import FakeVsock, Vmm, relaying
from tests.harness.waiting import TIMEOUT, until
from tests.server.inside import Talk, asking

pytestmark = pytest.mark.root

CID = 42


@pytest.fixture(scope="module")
def path() -> Iterator[Path]:
    """Of the handover socket."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-handover-", dir=SCRATCH))
    directory.chmod(0o755)
    os.chown(directory, USER, USER)
    yield directory / "sock"
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def service(path: Path) -> Iterator[Service]:
    """A service with a handover socket."""
    more = f'[limits]\nconnections_per_instance = 8\n[[listener]]\npath = "{path}"\ndialect = "handover"\n'
    with Service(workers=2, toml=more, dialects=["incus"]) as running:
        yield running


@pytest.fixture
def vsock(service: Service, path: Path) -> Iterator[FakeVsock]:
    """A relay that hands over to that service."""
    with relaying(path) as listener:
        yield listener


@pytest.fixture
def machine(service: Service) -> Iterator[Callable[..., Vmm]]:
    """Make virtual machines: instances with a VMM."""
    made: list[tuple[str, Vmm]] = []

    def make(name: str, cid: int = CID, *config: str) -> Vmm:
        words = [word for pair in config for word in ("--config", pair)]
        service.command("instance", "add", name, "--type", "virtual-machine", *words)
        vmm = Vmm(f"guest-cid={cid}")
        made.append((name, vmm))
        service.command("instance", "register", name, "--cid", str(cid), "--pid", str(vmm.pid))
        return vmm

    yield make
    for name, vmm in made:
        vmm.__exit__(None, None, None)
        service.command("instance", "remove", "--force", name)


def test_endpoints(vsock: FakeVsock, machine: Callable[..., Vmm], service: Service) -> None:
    """A virtual machine reads its own configuration, as type virtual-machine, and reports that it is ready."""
    machine("vm1", CID, "user.foo=bar")
    guest = Talk(vsock.connect(CID))
    with guest.socket:
        assert json.loads(guest.ask("/1.0").text)["instance_type"] == "virtual-machine"
        assert guest.ask("/1.0/config/user.foo").text == "bar"
        assert "local-hostname: vm1" in guest.ask("/1.0/meta-data").text
        assert guest.ask("/1.0", method="PATCH", body=b'{"state":"Ready"}').status == 200
    assert service.instance("vm1").ready
    (listed,) = [one for one in service.listed() if one["name"] == "vm1"]
    assert (listed["type"], listed["status"], listed["cid"]) == ("virtual-machine", "running", CID)


def test_extensions(vsock: FakeVsock, machine: Callable[..., Vmm], service: Service) -> None:
    """The tree, waits for news, notices and attributes are there for a machine as for a container."""
    machine("vm1", CID, "user.foo=bar")
    guest = Talk(vsock.connect(CID))
    with guest.socket:
        found = guest.ask("/1.0/guestapi/tree")
        tree = json.loads(found.text)
        assert (tree["name"], tree["instance_type"], tree["config"]["user.foo"]) == ("vm1", "virtual-machine", "bar")
        unchanged = f"If-None-Match: {found.headers['etag']}"
        assert guest.ask("/1.0/guestapi/tree", unchanged).status == 304
        guest.send(asking("/1.0/guestapi/tree/config/user.go?wait=60"))
        service.command("config", "set", "vm1", "user.go=now")
        assert guest.receive()[0].text == "now"
        assert guest.ask("/1.0/guestapi/attributes/app/version", method="PUT", body=b"1").status == 403
        service.command("policy", "allow", "attributes", "--instance", "vm1")
        assert guest.ask("/1.0/guestapi/attributes/app/version", method="PUT", body=b"1").status == 201
        assert guest.ask("/1.0/guestapi/attributes/app/version").text == "1"
        service.command("notice", "vm1", "stop", "--in", "1h")
        (notice,) = json.loads(guest.ask("/1.0/guestapi/notices").text)
        assert guest.ask(f"/1.0/guestapi/notices/{notice['id']}/ack", method="POST").status == 204


def test_root_of_a_machine_is_root_of_an_instance(
    vsock: FakeVsock, machine: Callable[..., Vmm], service: Service
) -> None:
    """Whoever says that it is root in a machine may do what root of a container may, and no more."""
    machine("vm1", CID, "user.internal=hidden", "user.once=given", "limits.memory=1GiB")
    service.command("policy", "add", "user.internal", "--instance", "vm1", "--hidden")
    service.command("policy", "add", "user.once", "--instance", "vm1", "--once")
    guest, other = Talk(vsock.connect(CID)), Talk(vsock.connect(CID))
    with guest.socket, other.socket:
        claims = ("X-Uid: 0", "Authorization: root", "X-Cid: 2")
        assert guest.ask("/1.0/config/user.internal", *claims).status == 404
        assert guest.ask("/1.0/config/limits.memory", *claims).status == 403
        assert guest.ask("/1.0/config/user.once", *claims).text == "given"
        assert other.ask("/1.0/config/user.once", *claims).status == 404
        service.command("config", "set", "vm1", "security.guestapi=false")
        assert guest.ask("/1.0/config", *claims).status == 403


def test_cids_without_an_instance(vsock: FakeVsock, machine: Callable[..., Vmm]) -> None:
    """A CID that is not registered is refused as an unknown container is, and so are loopback and host."""
    machine("vm1")
    for cid in (1, 2, CID + 1):
        guest = Talk(vsock.connect(cid))
        with guest.socket:
            response = guest.ask("/1.0/config")
            assert (response.status, response.text) == (500, "pid not in container?\n")


def test_a_cid_is_given_to_another(vsock: FakeVsock, machine: Callable[..., Vmm], service: Service) -> None:
    """From the moment in which the VMM does not hold the CID any more, its connections are answered with nothing."""
    vmm = machine("old", CID, "user.secret=of-old")
    open_one = Talk(vsock.connect(CID))
    with open_one.socket:
        assert open_one.ask("/1.0/config/user.secret").text == "of-old"
        vmm.close_device()
        # Not even a refusal: it might reach another one.
        open_one.send(asking("/1.0/config/user.secret"))
        assert open_one.end() == b""
    before = Talk(vsock.connect(CID))
    with before.socket:
        assert before.ask("/1.0/config/user.secret").status == 500
    machine("new", CID, "user.secret=of-new")
    after = Talk(vsock.connect(CID))
    with after.socket:
        assert after.ask("/1.0/config/user.secret").text == "of-new"
    assert [one["status"] for one in service.listed() if one["name"] == "old"] == ["dead"]


def test_a_stream_ends_with_its_machine(vsock: FakeVsock, machine: Callable[..., Vmm], service: Service) -> None:
    """An event is not sent on the connection of a machine that has lost its CID."""
    vmm = machine("vm1")
    guest = Talk(vsock.connect(CID))
    with guest.socket:
        guest.send(asking("/1.0/events"))
        assert b"200 OK" in guest.socket.recv(4096)
        service.command("config", "set", "vm1", "user.a=1")
        assert b'"user.a"' in guest.socket.recv(4096)
        vmm.close_device()
        service.command("config", "set", "vm1", "user.b=2")
        assert b"user.b" not in guest.end()


def test_machines_and_containers_at_once(vsock: FakeVsock, machine: Callable[..., Vmm], service: Service) -> None:
    """Each gets its own configuration."""
    machine("vm1", CID, "user.who=vm1")
    machine("vm2", CID + 1, "user.who=vm2")
    with service.container("c1", {"user.who": "c1"}) as container:
        for cid, name in ((CID, "vm1"), (CID + 1, "vm2"), (CID, "vm1")):
            guest = Talk(vsock.connect(cid))
            with guest.socket:
                assert guest.ask("/1.0/config/user.who").text == name
        assert container.ask("/1.0/config/user.who").text == "c1"


def test_a_machine_that_floods(vsock: FakeVsock, machine: Callable[..., Vmm]) -> None:
    """A machine that dials and stalls gets its own limits only; another is answered meanwhile."""
    machine("vm1")
    machine("vm2", CID + 1, "user.foo=bar")
    stalled = [vsock.connect(CID) for _ in range(100)]
    try:
        for one in stalled[:50]:
            # Some may be refused already.
            with suppress(BrokenPipeError):
                one.sendall(b"GET /1.0 HT")
        began = time.monotonic()
        guest = Talk(vsock.connect(CID + 1))
        with guest.socket:
            assert guest.ask("/1.0/config/user.foo").text == "bar"
        assert time.monotonic() - began < TIMEOUT

        def has_refused() -> bool:
            refused = 0
            for one in stalled:
                one.setblocking(False)
                try:
                    refused += one.recv(4096, socket.MSG_PEEK).startswith(b"HTTP/1.1 429")
                except (BlockingIOError, ConnectionResetError):
                    pass
            # Two workers, eight each.
            return refused >= 100 - 2 * 8 - 50

        until(has_refused, "refusals of what is more than an instance may have")
    finally:
        for one in stalled:
            one.close()


def test_nobody_but_root_hands_over(service: Service, path: Path, machine: Callable[..., Vmm]) -> None:
    """A user of the host, be it the service's own, cannot say that a connection is a machine's."""
    machine("vm1", CID, "user.foo=bar")
    code = (
        "import socket, sys; sys.path.insert(0, sys.argv[2])\n"
        "from guestapi.relay import handover\n"
        "worker = socket.socket(socket.AF_UNIX); worker.connect(sys.argv[1])\n"
        "ours, theirs = socket.socketpair()\n"
        "ours.sendall(b'GET /1.0/config/user.foo HTTP/1.0\\r\\n\\r\\n')\n"
        "try: handover.send(worker, theirs.fileno(), 42, 'incus')\n"
        "except OSError: pass\n"
        "theirs.close(); ours.settimeout(10)\n"
        "try: print(ours.recv(4096))\n"
        "except ConnectionResetError: print(b'')\n"
    )
    done = subprocess.run(
        [*UNPRIVILEGED, sys.executable, "-c", code, path, str(Path(handover.__file__).parents[2])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "b''\n", done.stderr
    assert f"user {USER} may not hand over connections" in service.log.read_text()


def test_a_worker_is_killed(vsock: FakeVsock, machine: Callable[..., Vmm], service: Service) -> None:
    """Connections that come while workers are killed are answered by others, if no worker had them yet."""
    machine("vm1", CID, "user.foo=bar")
    for _round in range(3):
        for worker in service.workers:
            os.kill(worker, signal.SIGSTOP)
        guest = Talk(vsock.connect(CID))
        with guest.socket:
            guest.send(asking("/1.0/config/user.foo"))
            for worker in service.workers:
                os.kill(worker, signal.SIGKILL)
            assert guest.receive()[0].text == "bar"
        until(lambda: len(service.workers) == 2, "workers")


def test_register_says_what_is_wrong(service: Service, machine: Callable[..., Vmm]) -> None:
    """A wrong CID, another's CID, and the wrong type are refused with a sentence."""
    vmm = machine("vm1")

    def refused(*words: str) -> str:
        done = service.command("instance", "register", *words, check=False)
        assert done.returncode == 1, done
        return done.stderr

    service.command("instance", "add", "vm2", "--type", "virtual-machine")
    service.command("instance", "add", "box")
    try:
        with Vmm() as other:
            assert f"CID {CID} is that of instance 'vm1'" in refused("vm2", "--cid", str(CID), "--pid", str(other.pid))
            assert "box is a container" in refused("box", "--cid", "50", "--pid", str(other.pid))
        assert f"has CID {CID}, not 43" in refused("vm2", "--cid", "43", "--pid", str(vmm.pid))
        assert "CID 2 belongs to no virtual machine" in refused("vm2", "--cid", "2", "--pid", str(vmm.pid))
        with Container() as container:
            assert "register it with --cid" in refused("vm2", "--pid", str(container.pid))
    finally:
        service.command("instance", "remove", "vm2", "box")
