"""The proof of isolation for virtual machines: CIDs and VMMs come, go and change hands, and no answer is another's.

A random walk over a few CIDs, each of which is given to one VMM after another, beside containers. After each step every
CID asks on new connections, and again on the connections that it opened before. An answer may have the secret of the
machine that holds the CID now, if it is registered with it; otherwise it has none, or there is no answer. A machine
also has streams of events, requests that wait, and answers that it has not read when it loses its CID: what changes
from then on is not told on any of these.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from guestapi.callers.machines import examine_machine
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from tests.harness.agent import complete
from tests.harness.machine import CHECKOUT
from tests.harness.scratch import SCRATCH
from tests.harness.service import USER, Service
from tests.harness.vmm import FakeVsock, Vmm, relaying
from tests.harness.waiting import TIMEOUT
from tests.proof.world import SECRET
from tests.server.inside import asking
from tools.mutate import cover

pytestmark = pytest.mark.root

CIDS = (3, 42, 43, (1 << 32) - 2)
#: The loopback and the host; and one that nobody has.
NOBODY = (0, 1, 2, 77)
STEPS, SEED = 250, secrets.randbits(32)
#: More than the buffers of a socket take.
LARGE = 1 << 20
PATHS = ("/1.0/config/user.token", "/1.0/guestapi/tree", "/1.0/meta-data")


@dataclass(eq=False)
class CidMachine:
    """A virtual machine that holds its CID, or does not any more.

    Attributes:
        token: its instance's secret.
        registered: whether the store has it with this CID.
        open: its connections, which stay open when it has lost its CID.
        streams: its streams of events, and its requests that wait.
        known: all secrets that it has had while it held its CID and was registered.
    """

    name: str
    cid: int
    vmm: Vmm
    token: str
    registered: bool = False
    holds: bool = True
    open: list[socket.socket] = field(default_factory=list)
    streams: list[socket.socket] = field(default_factory=list)
    known: set[bytes] = field(default_factory=set)

    def give(self, token: str) -> None:
        """Let it have another secret."""
        self.token = token
        self.known.add(token.encode())


def new_secret() -> str:
    """Return a secret that nobody has."""
    return f"tok{secrets.token_hex(16)}"


class MachineWalk:
    """The machines, the service, and what each CID may be told."""

    def __init__(self, service: Service, vsock: FakeVsock, choose: random.Random, stack: ExitStack) -> None:
        self.service, self.vsock, self.choose, self.stack = service, vsock, choose, stack
        self.holders: dict[int, CidMachine] = {}
        self.gone: list[CidMachine] = []
        self.count = self.answers = self.told = self.ended = self.stalled = 0

    def step(self) -> None:
        """Let one thing happen."""
        cid = self.choose.choice(CIDS)
        machine = self.holders.get(cid)
        if machine is None:
            self._start(cid)
        elif not machine.registered and self.choose.random() < 0.6:
            self._register(machine)
        else:
            steps = [self._lose, self._lose, self._end, self._unregister, self._rename]
            if machine.registered:
                steps += [self._listen, self._wait, self._stall]
            self.choose.choice(steps)(machine)

    def _start(self, cid: int) -> None:
        self.count += 1
        name, token = f"vm{self.count}", new_secret()
        with self.service.writer.change() as change:
            config = {"user.token": token}
            steps.add(change, "default", name, type="virtual-machine", config=config)
        machine = CidMachine(name, cid, self.stack.enter_context(Vmm(f"guest-cid={cid}")), token)
        machine.give(token)
        self.holders[cid] = machine

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
        self._change_and_end(machine)

    def _configure(self, machine: CidMachine, config: dict[str, str]) -> None:
        with self.service.writer.change() as change:
            steps.configure(change, get_instance(change, "default", machine.name), config)

    def _ask_and_keep(self, machine: CidMachine, path: str) -> socket.socket:
        sock = self.stack.enter_context(self.vsock.connect(machine.cid))
        sock.settimeout(TIMEOUT)
        sock.sendall(asking(path))
        return sock

    def _listen(self, machine: CidMachine) -> None:
        """The machine begins to receive events."""
        sock = self._ask_and_keep(machine, "/1.0/events")
        head = b""
        while b"\r\n\r\n" not in head:
            more = sock.recv(1)
            assert more, head
            head += more
        assert b" 200 " in head, head
        machine.streams.append(sock)

    def _wait(self, machine: CidMachine) -> None:
        """The machine asks for what is not there yet."""
        machine.streams.append(self._ask_and_keep(machine, "/1.0/guestapi/tree/config/user.next?wait=600"))

    def _stall(self, machine: CidMachine) -> None:
        """The machine loses its CID before it has read an answer, whose end has its secret."""
        last = new_secret()
        self._configure(machine, {"user.token": machine.token, "user.large": "x" * LARGE + last})
        sock = self._ask_and_keep(machine, "/1.0/config/user.large")
        # Not read, so that the end of a whole answer is found.
        assert sock.recv(1, socket.MSG_PEEK)
        machine.vmm.close_device()
        assert last.encode() not in self._to_the_end(sock), f"told what was sent after the CID was lost; seed {SEED}"
        self.stalled += 1
        self._retire(machine)

    def _change_and_end(self, machine: CidMachine) -> None:
        """A machine that is not registered or has lost its CID: a change ends its streams, and is not told."""
        token = new_secret()
        self._configure(machine, {"user.token": token, "user.next": token})
        for sock in machine.streams:
            found = set(SECRET.findall(self._to_the_end(sock)))
            assert found <= machine.known, f"told what has changed since; seed {SEED}"
            self.ended += 1
        machine.streams.clear()
        self._configure(machine, {"user.next": ""})
        machine.give(token)

    @staticmethod
    def _to_the_end(sock: socket.socket) -> bytes:
        data = b""
        with sock:
            try:
                while not (data.startswith(b"HTTP") and complete(data, 1, "GET")) and (more := sock.recv(1 << 20)):
                    data += more
            except ConnectionResetError:
                pass
        return data

    def _unregister(self, machine: CidMachine) -> None:
        with self.service.writer.change() as change:
            steps.stop(change, get_instance(change, "default", machine.name))
        machine.registered = False
        self._change_and_end(machine)

    def _rename(self, machine: CidMachine) -> None:
        """Two machines exchange their secrets."""
        other = self.choose.choice(list(self.holders.values()))
        mine, others = machine.token, other.token
        machine.give(others)
        other.give(mine)
        with self.service.writer.change() as change:
            for one in {machine, other}:
                instance = get_instance(change, "default", one.name)
                steps.configure(change, instance, {"user.token": one.token})

    def look(self) -> None:
        """Let every CID ask, and every connection that is open."""
        for cid in (*CIDS, *NOBODY):
            machine = self.holders.get(cid)
            sock = self.stack.enter_context(self.vsock.connect(cid))
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
        allowed = {machine.token.encode()} if machine is not None else set()
        assert found <= allowed, f"told another's secret; seed {SEED}, {machine}"
        self.answers += 1
        self.told += bool(found)


@contextmanager
def serving(before: Sequence[str] = ()) -> Iterator[Service]:
    """A service with a handover socket; `before` is a prefix of its command."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-handover-", dir=SCRATCH))
    directory.chmod(0o755)
    os.chown(directory, USER, USER)
    more = f'[[listener]]\npath = "{directory}/sock"\ndialect = "handover"\n'
    try:
        with Service(toml=more, dialects=["incus"], before=before) as running:
            yield running
    finally:
        shutil.rmtree(directory)


def walk_machines(service: Service) -> MachineWalk:
    """Walk through all steps."""
    with relaying(Path(service.settings.handover)) as vsock, ExitStack() as stack:
        walk = MachineWalk(service, vsock, random.Random(SEED), stack)
        for _step in range(STEPS):
            walk.step()
            walk.look()
    return walk


def test_no_machine_is_told_another_secret() -> None:
    """In no step of the walk is a secret told to another machine than the one that holds the CID."""
    with serving() as service:
        walk = walk_machines(service)
    assert walk.told > walk.answers / 20, (SEED, walk.told, walk.answers)
    assert walk.ended, SEED
    assert walk.stalled, SEED


#: Guards: the file, the code that is removed, and its replacement.
GUARDS = {
    "a VMM that holds the CID": (
        "guestapi/callers/identify.py",
        "holds = self._open_file is None or machines.holds_vsock(self.init.pid, self._open_file)",
        "holds = True",
    ),
    "a look before each part of an answer": (
        "guestapi/server/connection.py",
        "transport.guard = caller.init.check",
        "transport.guard = None",
    ),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_walk_notices_a_missing_guard(tmp_path: Path, guard: str) -> None:
    """Without any one of these guards a machine is told what it may not be told, and the walk detects it."""
    file, there, instead = GUARDS[guard]
    source = (CHECKOUT / file).read_text()
    assert source.count(there) == 1
    before = cover(CHECKOUT / file, source.replace(there, instead).encode(), tmp_path)
    with serving(before) as service, pytest.raises(AssertionError, match=r"told what|told another's"):
        walk_machines(service)
