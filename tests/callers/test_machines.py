"""Virtual machines: which process holds a CID, and when it does not any more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guestapi.callers import identify, machines, namespaces
from guestapi.callers.credentials import machine_credentials
from guestapi.callers.identify import Caller, Identifier, LiveMachine
from guestapi.callers.machines import NotAMachineError, examine_hybrid, examine_machine
from guestapi.model import Init, cid_at, hybrid_number, vsock_place
from tests.harness.vmm import Vmm

pytestmark = pytest.mark.root


class RegisteredMachines:
    """A stand-in for the store: the running instances, with ids from 1."""

    def __init__(self, *inits: Init) -> None:
        self.inits = list(inits)

    def running_in(self, namespace: int) -> list[tuple[int, int, Init]]:
        """As `Reader.running_in`."""
        return [(number, 7, init) for number, init in enumerate(self.inits, 1) if init.namespace == namespace]


@pytest.fixture
def vmm() -> Iterator[Vmm]:
    """A VMM that holds a CID."""
    with Vmm() as running:
        yield running


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """A connected socket; whose it is does not matter."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def test_a_machine_is_recognised_by_its_cid(vmm: Vmm, connection: socket.socket) -> None:
    """The instance is the one that is registered with the CID; another CID is nobody's."""
    identifier = Identifier(RegisteredMachines(examine_machine(vmm.pid, 42)))
    caller = identifier.identify(connection, machine_credentials(42))
    assert (caller.instance_id, caller.run, caller.credentials.pid) == (1, 7, vmm.pid)
    assert caller.is_root
    assert caller.uid_inside == 0
    assert identifier.confirm(connection, caller) is caller
    other = identifier.identify(connection, machine_credentials(43))
    assert other.instance_id is None
    assert other.container == vsock_place(43)
    assert identifier.find_container(connection, machine_credentials(43)) == vsock_place(43)


def test_a_closed_device_ends_the_identity(vmm: Vmm, connection: socket.socket) -> None:
    """As soon as the device is closed, the CID may be another's: the process that goes on proves nothing."""
    identifier = Identifier(RegisteredMachines(examine_machine(vmm.pid, 42)))
    caller = identifier.identify(connection, machine_credentials(42))
    vmm.close_device()
    assert caller.init is not None
    assert not caller.init.alive()
    assert identifier.confirm(connection, caller).instance_id is None
    assert identifier.identify(connection, machine_credentials(42)).instance_id is None


def test_a_cid_that_is_given_to_another(vmm: Vmm, connection: socket.socket) -> None:
    """A CID that another VMM has now is the other's, although the one before is still registered, or still ends."""
    with Vmm() as other:
        identifier = Identifier(RegisteredMachines(examine_machine(vmm.pid, 42), examine_machine(other.pid, 42)))
        vmm.close_device()
        assert identifier.identify(connection, machine_credentials(42)).instance_id == 2
        other.kill()
        assert identifier.identify(connection, machine_credentials(42)).instance_id is None


def test_another_process_of_the_same_pid(vmm: Vmm, connection: socket.socket) -> None:
    """A VMM is this very process of this boot."""
    init = examine_machine(vmm.pid, 42)
    for wrong in (replace(init, start_time=init.start_time - 1), replace(init, boot_id="another")):
        assert not machines.is_alive(wrong)
        assert Identifier(RegisteredMachines(wrong)).identify(connection, machine_credentials(42)).instance_id is None
    assert machines.is_alive(init)
    vmm.close_device()
    assert not machines.is_alive(init)


@pytest.mark.parametrize("cid", [0, 1, 2])
def test_cids_of_the_host_belong_to_nobody(vmm: Vmm, connection: socket.socket, cid: int) -> None:
    """The hypervisor, the loopback and the host are no instances, even if the store says so."""
    with pytest.raises(NotAMachineError, match="belongs to no virtual machine"):
        examine_machine(vmm.pid, cid)
    registered = RegisteredMachines(replace(examine_machine(vmm.pid, 42), namespace=vsock_place(cid)))
    caller = Identifier(registered).identify(connection, machine_credentials(cid))
    assert caller.instance_id is None


def test_processes_that_are_no_vmm() -> None:
    """A process without the device, or with another CID on its command line, is refused with a sentence."""
    with Vmm(held=False) as plain, pytest.raises(NotAMachineError, match="has no vsock device"):
        examine_machine(plain.pid, 42)
    for words in (("-device", "vhost-vsock-pci,guest-cid=43"), ("-device", '{"driver":"x","guest-cid":43,"id":"v"}')):
        with Vmm(*words) as qemu:
            with pytest.raises(NotAMachineError, match="has CID 43, not 42"):
                examine_machine(qemu.pid, 42)
            assert examine_machine(qemu.pid, 43).cid == 43
    with pytest.raises(NotAMachineError, match="no process"):
        examine_machine(2**22 + 1, 42)


def test_vmm_that_ends_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ended during the look is no VMM: what was read may be another's that got its PID."""
    with Vmm() as running:

        def end(_pid: int) -> None:
            running.kill()

        monkeypatch.setattr(machines, "command_line_cid", end)
        with pytest.raises(NotAMachineError, match="has just ended"):
            examine_machine(running.pid, 42)


def test_command_line_of_no_process() -> None:
    """Whoever asks for the command line of a process that is not there is told so."""
    with pytest.raises(ProcessLookupError):
        machines.command_line_cid(2**22 + 1)


def test_places_are_no_namespaces() -> None:
    """What stands for a CID is the number of no PID namespace."""
    assert cid_at(os.stat("/proc/self/ns/pid").st_ino) is None
    assert cid_at((1 << 32) - 1) is None
    assert cid_at(vsock_place(3)) == 3


def own_hybrid() -> Init:
    """Return this process, registered as a VMM that connects to a Unix socket of the host."""
    return examine_hybrid(os.getpid())


def test_hybrid_machine_is_known_by_its_process(connection: socket.socket) -> None:
    """A VMM that connects to a Unix socket is the instance that is registered with its process; another one is not."""
    identifier = Identifier(RegisteredMachines(own_hybrid()))
    number = hybrid_number(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    first, second = (identifier.identify(connection, machine_credentials(number)) for _time in "ab")
    assert (first.instance_id, first.run, first.credentials.pid) == (1, 7, os.getpid())
    assert first.init is second.init, "looked at once"
    assert identifier.confirm(connection, first) is first
    # That of the VMM, for as long as it is known.
    assert len(os.listdir("/proc/self/fd")) == before + 1
    other = identifier.identify(connection, machine_credentials(number + 1))
    assert (other.instance_id, other.run, other.container) == (None, 0, vsock_place(number + 1))


def test_hybrid_machine_whose_vmm_has_ended(connection: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the process that connected has ended, its PID may be that of a registered VMM, which it does not become."""
    monkeypatch.setattr(namespaces, "is_gone", lambda _pidfd: True)
    # An older kernel gives none.
    monkeypatch.setattr("guestapi.callers.identify.peer_pidfd", lambda _connection: os.pidfd_open(os.getpid()))
    before = len(os.listdir("/proc/self/fd"))
    number = hybrid_number(os.getpid())
    caller = Identifier(RegisteredMachines(own_hybrid())).identify(connection, machine_credentials(number))
    assert caller == Caller(machine_credentials(number))
    assert len(os.listdir("/proc/self/fd")) == before


def test_hybrid_machine_on_an_older_kernel(connection: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no pidfd of the peer, the VMM's process is recognised all the same."""
    monkeypatch.setattr(identify, "peer_pidfd", lambda _connection: None)
    number = hybrid_number(os.getpid())
    assert (
        Identifier(RegisteredMachines(own_hybrid())).identify(connection, machine_credentials(number)).instance_id == 1
    )


def test_machine_is_checked_before_bytes_are_sent(vmm: Vmm, connection: socket.socket) -> None:
    """What is sent to a CID is refused as soon as the device is closed, since another machine may have it."""
    caller = Identifier(RegisteredMachines(examine_machine(vmm.pid, 42))).identify(connection, machine_credentials(42))
    assert isinstance(caller.init, LiveMachine)
    caller.init.check()
    vmm.close_device()
    with pytest.raises(ConnectionResetError):
        caller.init.check()


def test_hybrid_machine_that_ends(connection: socket.socket) -> None:
    """A VMM without a CID is alive until its process ends, whatever it has open."""
    with Vmm(held=False) as running:
        number = hybrid_number(running.pid)
        identifier = Identifier(RegisteredMachines(examine_hybrid(running.pid)))
        caller = identifier.identify(connection, machine_credentials(number))
        assert caller.instance_id == 1
        assert caller.init is not None
        running.close_device()
        assert caller.init.alive()
        running.kill()
        assert not caller.init.alive()
        assert identifier.confirm(connection, caller).instance_id is None
        assert identifier.identify(connection, machine_credentials(number)).instance_id is None


def test_machine_whose_device_was_not_recorded(vmm: Vmm, connection: socket.socket) -> None:
    """A registration with a CID proves nothing without the open device that holds it."""
    registered = RegisteredMachines(replace(examine_machine(vmm.pid, 42), user_namespace=None))
    assert Identifier(registered).identify(connection, machine_credentials(42)).instance_id is None


def test_least_cid_of_a_machine(vmm: Vmm, connection: socket.socket) -> None:
    """A virtual machine may have any CID from 3 to the one before the greatest number of 32 bits."""
    for cid in (3, (1 << 32) - 2):
        registered = RegisteredMachines(examine_machine(vmm.pid, cid))
        assert Identifier(registered).identify(connection, machine_credentials(cid)).instance_id == 1
    beyond = (1 << 32) - 1
    with pytest.raises(NotAMachineError):
        examine_machine(vmm.pid, beyond)
    registered = RegisteredMachines(replace(examine_machine(vmm.pid, 42), namespace=vsock_place(beyond)))
    assert Identifier(registered).identify(connection, machine_credentials(beyond)).instance_id is None


def test_machine_whose_vmm_is_not_reaped(connection: socket.socket) -> None:
    """A VMM that has ended, and for which its parent has not waited yet, is no machine's."""
    with subprocess.Popen(["sleep", "60"]) as process:
        registered = RegisteredMachines(examine_hybrid(process.pid))
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        number = hybrid_number(process.pid)
        assert Identifier(registered).identify(connection, machine_credentials(number)).instance_id is None


#: Prints what the VMM of the first argument is, as a service sees it that has root's user and CAP_SYS_PTRACE alone.
_CONFINED = """
import sys
from guestapi.callers import machines
machines.HOST_NODE = sys.argv[2]
try:
    print(machines.examine_machine(int(sys.argv[1]), 42).user_namespace)
except machines.NotAMachineError as error:
    print(error)
"""
_RIGHTS = ("setpriv", "--clear-groups", "--no-new-privs", "--bounding-set=-all,+sys_ptrace", "--inh-caps=-all")


def _seen_confined(pid: int, node: Path) -> str:
    command = [*_RIGHTS, sys.executable, "-c", _CONFINED, str(pid), str(node)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.rstrip("\n")


def test_found_without_the_right_to_list_files(vmm: Vmm) -> None:
    """A service that may look at processes, and not list what they have open, finds the same open device as root."""
    assert _seen_confined(vmm.pid, vmm.node) == str(machines.find_vsock(vmm.pid))
    vmm.close_device()
    assert _seen_confined(vmm.pid, vmm.node).startswith(f"process {vmm.pid} has no vsock device")


def test_another_inode_is_no_device(vmm: Vmm, tmp_path: Path) -> None:
    """Without a vsock device on the host, or with another's inode, no open file is taken for it."""
    with Vmm() as other:
        assert machines.find_vsock_by_inode(vmm.pid, str(other.node)) is None
    with Vmm(held=False) as other:
        # The file is open, but its node is no vsock device.
        assert machines.find_vsock_by_inode(other.pid, str(other.node)) is None
    assert machines.find_vsock_by_inode(vmm.pid, str(tmp_path / "missing")) is None


@pytest.mark.parametrize("form", ["guest-cid=42,vhostfd={}", '{{"guest-cid":42,"vhostfd":"{}"}}'])
def test_the_command_line_names_the_descriptor(form: str) -> None:
    """If the command line names the descriptor of the device, no other one of that inode's number counts."""
    with Vmm(form.format(3)) as vmm:
        assert machines.find_vsock_by_inode(vmm.pid, str(vmm.node)) == machines.find_vsock(vmm.pid)
    with Vmm(form.format(4)) as vmm:
        assert machines.find_vsock_by_inode(vmm.pid, str(vmm.node)) is None
