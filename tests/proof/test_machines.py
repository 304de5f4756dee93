"""The proof of isolation for virtual machines: CIDs and VMMs come, go and change hands, and no answer is another's.

A random walk over a few CIDs, each of which is given to one VMM after another, beside containers. After each step every
CID asks on new connections, and again on the connections that it opened before. An answer may have the secret of the
machine that holds the CID now, if it is registered with it; otherwise it has none, or there is no answer.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from guestapi.callers.machines import examine_machine
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from tests.harness.agent import complete
from tests.harness.scratch import SCRATCH
from tests.harness.service import USER, Service
from tests.harness.vmm import FakeVsock, Vmm, relaying
from tests.harness.waiting import TIMEOUT
from tests.proof.world import SECRET
from tests.server.inside import asking

pytestmark = pytest.mark.root

CIDS = (3, 42, 43, (1 << 32) - 2)
#: The loopback and the host; and one that nobody has.
NOBODY = (0, 1, 2, 77)
STEPS, SEED = 250, secrets.randbits(32)
PATHS = ("/1.0/config/user.token", "/1.0/guestapi/tree", "/1.0/meta-data")


@dataclass(eq=False)
class CidMachine:
    """A virtual machine that holds its CID, or does not any more.

    Attributes:
        token: its instance's secret.
        registered: whether the store has it with this CID.
        open: its connections, which stay open when it has lost its CID.
    """

    name: str
    cid: int
    vmm: Vmm
    token: str
    registered: bool = False
    holds: bool = True
    open: list[socket.socket] = field(default_factory=list)


class MachineWalk:
    """The machines, the service, and what each CID may be told."""

    def __init__(self, service: Service, vsock: FakeVsock, choose: random.Random, stack: ExitStack) -> None:
        self.service, self.vsock, self.choose, self.stack = service, vsock, choose, stack
        self.holders: dict[int, CidMachine] = {}
        self.gone: list[CidMachine] = []
        self.count = self.answers = self.told = 0

    def step(self) -> None:
        """Let one thing happen."""
        cid = self.choose.choice(CIDS)
        machine = self.holders.get(cid)
        if machine is None:
            self._start(cid)
        elif not machine.registered and self.choose.random() < 0.6:
            self._register(machine)
        else:
            what = self.choose.choice([self._lose, self._end, self._unregister, self._rename, self._lose])
            what(machine)

    def _start(self, cid: int) -> None:
        self.count += 1
        name, token = f"vm{self.count}", f"tok{secrets.token_hex(16)}"
        with self.service.writer.change() as change:
            config = {"user.token": token}
            steps.add(change, "default", name, type="virtual-machine", config=config)
        self.holders[cid] = CidMachine(name, cid, self.stack.enter_context(Vmm(f"guest-cid={cid}")), token)

    def _register(self, machine: CidMachine) -> None:
        init = examine_machine(machine.vmm.pid, machine.cid)
        with self.service.writer.change() as change:
            steps.start(change, get_instance(change, "default", machine.name), init)
        machine.registered = True

    def _lose(self, machine: CidMachine) -> None:
        """The VMM goes on, but has closed its device: the CID is free."""
        machine.vmm.close_device()
        self._retire(machine)

    def _end(self, machine: CidMachine) -> None:
        machine.vmm.kill()
        self._retire(machine)

    def _retire(self, machine: CidMachine) -> None:
        machine.holds = False
        del self.holders[machine.cid]
        self.gone.append(machine)

    def _unregister(self, machine: CidMachine) -> None:
        with self.service.writer.change() as change:
            steps.stop(change, get_instance(change, "default", machine.name))
        machine.registered = False

    def _rename(self, machine: CidMachine) -> None:
        """Two machines exchange their secrets."""
        other = self.choose.choice(list(self.holders.values()))
        machine.token, other.token = other.token, machine.token
        with self.service.writer.change() as change:
            for one in {machine, other}:
                instance = get_instance(change, "default", one.name)
                steps.configure(change, instance, {"user.token": one.token})

    def look(self) -> None:
        """Let every CID ask, and every connection that is open."""
        for cid in (*CIDS, *NOBODY):
            machine = self.holders.get(cid)
            sock = self.vsock.connect(cid)
            self._ask(sock, machine if machine is not None and machine.registered else None)
            if machine is None:
                sock.close()
            else:
                machine.open.append(sock)
        for machine in (*self.holders.values(), *self.gone):
            for sock in machine.open[:-1] if machine.holds else machine.open:
                self._ask(sock, machine if machine.holds and machine.registered else None)
            kept = machine.open[-3:] if machine.holds else []
            for sock in machine.open[: len(machine.open) - len(kept)]:
                sock.close()
            machine.open = kept
        self.gone.clear()

    def _ask(self, sock: socket.socket, machine: CidMachine | None) -> None:
        sock.settimeout(TIMEOUT)
        data = b""
        try:
            sock.sendall(asking(self.choose.choice(PATHS)))
            while not complete(data, 1, "GET") and (more := sock.recv(65536)):
                data += more
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = set(SECRET.findall(data))
        assert found <= ({machine.token.encode()} if machine is not None else set()), (SEED, machine, data)
        self.answers += 1
        self.told += bool(found)


@pytest.fixture
def service() -> Iterator[Service]:
    """A service with a handover socket."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-handover-", dir=SCRATCH))
    directory.chmod(0o755)
    os.chown(directory, USER, USER)
    more = f'[[listener]]\npath = "{directory}/sock"\ndialect = "handover"\n'
    with Service(toml=more, dialects=["incus"]) as running:
        yield running
    shutil.rmtree(directory)


def test_no_machine_is_told_another_secret(service: Service) -> None:
    """In no step of the walk has an answer a secret of another machine than the one that holds the CID."""
    with relaying(Path(service.settings.handover)) as vsock, ExitStack() as stack:
        walk = MachineWalk(service, vsock, random.Random(SEED), stack)
        for _step in range(STEPS):
            walk.step()
            walk.look()
    assert walk.told > walk.answers / 20, (SEED, walk.told, walk.answers)
