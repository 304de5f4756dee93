"""Examination of processes, and the errors for a process that cannot be an instance's init."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from guestapi.callers import namespaces
from guestapi.callers.namespaces import NotAnInitError
from tests.harness.containers import BASE, Container


def ended() -> int:
    """Return the PID of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_start_time() -> None:
    """The start time of a process is constant, and that of an ended one is an error, before and after it is reaped."""
    assert namespaces.start_time(os.getpid()) == namespaces.start_time(os.getpid())
    with pytest.raises(ProcessLookupError):
        namespaces.start_time(ended())
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        namespaces.start_time(zombie.pid)
    zombie.wait()


def test_start_time_with_any_process_name() -> None:
    """The start time is found whatever the process's name, also with parentheses and numbers in it."""
    code = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b') R 1 2 (3'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert abs(namespaces.start_time(process.pid) - namespaces.start_time(os.getpid())) < 100 * 3600
        assert namespaces.start_time(process.pid) >= namespaces.start_time(os.getpid())
        process.communicate()


@pytest.mark.root
@pytest.mark.parametrize("by_ioctl", [True, False])
@pytest.mark.parametrize("with_pidfd", [True, False])
def test_all_ways_find_the_same_namespace(by_ioctl: bool, with_pidfd: bool) -> None:
    """ioctl, /proc guarded by a pidfd (Linux 6.5 to 6.10) and /proc alone find the same namespace."""
    with Container() as container:
        pidfd = os.pidfd_open(container.pid) if with_pidfd else None
        found = namespaces.open_namespace(container.pid, pidfd, by_ioctl=by_ioctl)
        assert namespaces.inode(found) == os.stat(f"/proc/{container.pid}/ns/pid").st_ino
        around = namespaces.open_parent(found)
        assert around is not None
        assert namespaces.inode(around) == namespaces.own_namespace()
        for descriptor in (found, around):
            os.close(descriptor)
        if pidfd is not None:
            container.kill()
            with pytest.raises(ProcessLookupError):
                namespaces.open_namespace(container.pid, pidfd, by_ioctl=by_ioctl)
            os.close(pidfd)


def user_namespace(pid: int | str) -> int:
    """Return the inode number of the user namespace of a process."""
    return os.stat(f"/proc/{pid}/ns/user").st_ino


@pytest.mark.root
def test_root_uid() -> None:
    """The root UID comes from the ID map of a process in that user namespace; on the host it is 0.

    A process in another user namespace gives no root UID.
    """
    host = user_namespace("self")
    assert namespaces.root_uid(os.getpid(), host) == 0
    with pytest.raises(ProcessLookupError):
        namespaces.root_uid(ended(), host)
    with Container() as container:
        assert namespaces.root_uid(container.pid, user_namespace(container.pid)) == BASE
        assert namespaces.root_uid(container.pid, host) is None


@pytest.mark.root
def test_root_uid_before_the_map_is_written() -> None:
    """A user namespace without an ID map, or without a mapped root, has no root UID."""
    code = (
        "import sys; from tests.harness.agent import unshare; unshare(0x10000000); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        inside = user_namespace(process.pid)
        assert inside != user_namespace("self")
        assert namespaces.root_uid(process.pid, inside) is None
        with open(f"/proc/{process.pid}/uid_map", "w") as file:
            file.write("5 7 10")
        assert namespaces.root_uid(process.pid, inside) is None
        process.communicate()


#: Sequences of users and namespaces that PID 1 may enter.
CHANGES = {
    "nothing": [],
    "userns": ["userns"],
    "userns of uid 1000": ["uid:1000", "userns"],
    "pidns": ["pidns"],
    "pidns and userns of uid 1000": ["pidns", "uid:1000", "userns"],
}


@pytest.mark.root
@pytest.mark.parametrize("base", [BASE, None], ids=["unprivileged", "privileged"])
@pytest.mark.parametrize("change", CHANGES)
def test_examination_of_an_init_that_entered_namespaces(base: int | None, change: str) -> None:
    """User and PID namespaces that PID 1 has entered before its registration do not change the recorded init."""
    with Container(base=base) as container:
        before = namespaces.examine(container.pid)
        owner = user_namespace(container.pid)
        assert before.namespace == os.stat(f"/proc/{container.pid}/ns/pid").st_ino
        assert (before.root_uid, before.user_namespace) == (base or 0, owner)
        container.change_init(*CHANGES[change])
        if "userns" in change:
            assert user_namespace(container.pid) != owner
        if "pidns" in change:
            assert os.stat(f"/proc/{container.pid}/ns/pid_for_children").st_ino != before.namespace
        after = namespaces.examine(container.pid, stated_root_uid=4711)
        assert after == before
        assert (after.root_uid, after.user_namespace) == (base or 0, owner)


@pytest.mark.root
@pytest.mark.parametrize("stated", [None, 4711])
def test_stated_root_uid_is_used_if_unknown(stated: int | None) -> None:
    """Without CAP_SYS_ADMIN, and if PID 1 has changed its user namespace, the stated root UID is recorded."""
    code = f"""if True:
        import sys
        from guestapi.callers.namespaces import examine
        init = examine(int(sys.argv[1]), stated_root_uid={stated})
        print(init.root_uid, init.user_namespace)
        """
    privileges = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all,+sys_ptrace"]
    privileges += ["--inh-caps=+sys_ptrace", "--ambient-caps=+sys_ptrace"]
    with Container() as container:
        owner = user_namespace(container.pid)
        command = [*privileges, sys.executable, "-c", code, str(container.pid)]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        assert done.stdout.split() == [str(BASE), str(owner)], "init itself shows the map"
        container.change_init("uid:1000", "userns")
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        assert done.stdout.split() == [str(stated), str(owner)]


@pytest.mark.root
def test_user_namespace_is_entered_only_on_request() -> None:
    """If no process shows the ID map, the root UID is unknown, unless a child may enter the user namespace."""
    with Container() as container:
        owner = user_namespace(container.pid)
        container.change_init("uid:1000", "userns")
        namespace = os.open(f"/proc/{container.pid}/ns/pid", os.O_RDONLY)
        assert namespaces.find_root(namespace, [container.pid]) == (None, owner)
        assert namespaces.find_root(namespace, [container.pid, ended()]) == (None, owner)
        assert namespaces.find_root(namespace, [ended(), container.pid], enter=True) == (BASE, owner)
        os.close(namespace)


@pytest.mark.root
def test_examination_leaves_nothing_open() -> None:
    """An examination leaves neither descriptors nor processes behind, whatever its result."""
    with Container() as container, Container() as changed:
        changed.change_init("uid:1000", "userns")
        child = subprocess.Popen(["nsenter", "-t", str(container.pid), "-p", "sleep", "60"])
        (second,) = _children(child.pid)
        before = os.listdir("/proc/self/fd")
        children = _children(os.getpid())
        namespaces.examine(container.pid)
        namespaces.examine(changed.pid)
        for pid in (os.getpid(), second, ended()):
            with pytest.raises(NotAnInitError):
                namespaces.examine(pid)
        assert os.listdir("/proc/self/fd") == before
        assert _children(os.getpid()) == children
        container.kill()
        child.wait()


def test_process_that_ends_while_its_map_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that vanishes from /proc during the examination means that the process has ended."""
    stat = os.stat

    def gone(path: str, *, dir_fd: int | None = None) -> os.stat_result:
        if path == "ns/user":
            raise FileNotFoundError
        return stat(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "stat", gone)
    with pytest.raises(ProcessLookupError):
        namespaces.root_uid(os.getpid(), user_namespace("self"))


@pytest.mark.root
def test_examination_without_privileges() -> None:
    """Without the right to examine a process, the error states what to do."""
    code = "import sys; from guestapi.callers.namespaces import examine; examine(int(sys.argv[1]))"
    privileges = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    with Container() as container:
        command = [*privileges, sys.executable, "-c", code, str(container.pid)]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert f"process {container.pid} may not be looked at" in done.stderr
    assert done.returncode == 1


@pytest.mark.root
def test_root_uid_outside_of_our_user_namespace() -> None:
    """From inside a user namespace the one around it cannot be examined, so its root UID is unknown."""
    code = """if True:
        import os
        from guestapi.callers import namespaces
        from tests.harness.agent import CLONE_NEWUSER, unshare
        namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        print(namespaces.find_root(namespace, [os.getpid()], enter=True)[0])
        unshare(CLONE_NEWUSER)
        print(namespaces.find_root(namespace, [os.getpid()], enter=True))
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.splitlines() == ["0", "(None, None)"]


@pytest.mark.root
def test_kernels_without_the_ioctl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.11, when the ioctl fails as unsupported, /proc is read; any other failure is raised."""
    with Container() as container:
        pidfd = os.pidfd_open(container.pid)
        refusal = errno.ENOTTY

        def refuse(*_arguments: object) -> int:
            raise OSError(refusal, os.strerror(refusal))

        monkeypatch.setattr(fcntl, "ioctl", refuse)
        for number in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
            refusal = number
            found = namespaces.open_namespace(container.pid, pidfd)
            assert namespaces.inode(found) == os.stat(f"/proc/{container.pid}/ns/pid").st_ino
            os.close(found)
        refusal = errno.EMFILE
        with pytest.raises(OSError, match="Too many open files"):
            namespaces.open_namespace(container.pid, pidfd)
        os.close(pidfd)


@pytest.mark.root
def test_pidfd_takes_precedence_over_pid() -> None:
    """If a pidfd gives the namespace, nothing is looked up by PID, which may belong to another process by now."""
    kernel = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    with Container() as container:
        pidfd = os.pidfd_open(container.pid)
        found = namespaces.open_namespace(os.getpid(), pidfd)
        asked = container.pid if kernel >= (6, 11) else os.getpid()
        assert namespaces.inode(found) == os.stat(f"/proc/{asked}/ns/pid").st_ino
        os.close(found)
        os.close(pidfd)


def test_pid_reused_before_the_examination() -> None:
    """If the pidfd's process has ended and its PID is in use again, the examination fails and closes everything."""
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessLookupError):
        namespaces.open_namespace(os.getpid(), pidfd, by_ioctl=False)
    assert os.listdir("/proc/self/fd") == before
    os.close(pidfd)


def test_pid_reused_during_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    """By /proc alone, a start time that changes during the examination means that the PID was reused."""
    times = iter([1, 2])
    monkeypatch.setattr(namespaces, "start_time", lambda _pid: next(times))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessLookupError):
        namespaces.open_namespace(os.getpid(), None)
    assert os.listdir("/proc/self/fd") == before


def test_namespace_without_pidfd_and_ioctl_of_a_living_process() -> None:
    """/proc gives the namespace of a living process, with a pidfd or without one."""
    pidfd = os.pidfd_open(os.getpid())
    for descriptor in (pidfd, None):
        found = namespaces.open_namespace(os.getpid(), descriptor, by_ioctl=False)
        assert namespaces.inode(found) == namespaces.own_namespace()
        assert not os.get_inheritable(found)
        os.close(found)
    os.close(pidfd)


def test_process_without_proc_entry() -> None:
    """An unused PID is reported as a process that does not exist, not as a missing file."""
    with pytest.raises(ProcessLookupError):
        namespaces.open_namespace(ended(), os.pidfd_open(os.getpid()), by_ioctl=False)


@pytest.mark.root
def test_outermost_namespace_has_no_parent() -> None:
    """From inside a PID namespace, the one around it cannot be opened: it is the outermost that is visible."""
    code = """if True:
        import os
        from guestapi.callers import namespaces
        print(namespaces.open_parent(os.open("/proc/self/ns/pid", os.O_RDONLY)))
        """
    own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    for before in ([], own):
        done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "None\n"


@pytest.mark.root
def test_init_that_ends_during_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the init ends during the examination, the error says so: what was read may belong to another process."""
    with Container() as container:
        find_root = namespaces.find_root

        def end(namespace: int, pids: list[int], *, enter: bool) -> tuple[int | None, int | None]:
            found = find_root(namespace, pids, enter=enter)
            os.kill(container.pid, signal.SIGKILL)
            # Its parent does not reap it, so its files in /proc can still be read.
            poll = select.poll()
            poll.register(os.pidfd_open(container.pid), select.POLLIN)
            poll.poll()
            return found

        monkeypatch.setattr(namespaces, "find_root", end)
        monkeypatch.setattr(
            namespaces, "_read", lambda pid, file: b"NSpid:\t7\t1\n" if file == "status" else read(pid, file)
        )
        with pytest.raises(NotAnInitError, match="has just ended"):
            namespaces.examine(container.pid)


read = namespaces._read


#: Examines an init with the largest PID that Linux gives (include/linux/threads.h, PID_MAX_LIMIT), in a PID namespace
#: in which no other process takes it. Before Linux 6.14 all PID namespaces have one limit, so it is put back.
LONG_PID = """
from pathlib import Path
from guestapi.callers import namespaces
from tests.harness.bare_init import BareInit
limit = Path("/proc/sys/kernel/pid_max")
before = limit.read_text()
limit.write_text(str(1 << 22))
try:
    init = BareInit(Path("/nowhere"), (1 << 22) - 1)
finally:
    limit.write_text(before)
found = namespaces.examine(init.pid)
print(init.pid, found.pid, namespaces.is_alive(found))
init.end()
print(namespaces.is_alive(found))
"""


@pytest.mark.root
def test_init_with_a_long_pid() -> None:
    """An init with a PID of seven digits can be examined, and is alive until it ends."""
    own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run([*own, sys.executable, "-c", LONG_PID], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4194303", "4194303", "True", "False"]


@pytest.mark.root
def test_init_of_a_container_is_examined() -> None:
    """A container's init is identified by PID, start time, boot and namespace, and is alive until it ends."""
    with Container() as container:
        init = namespaces.examine(container.pid)
        assert (init.pid, init.boot_id) == (container.pid, namespaces.boot_id())
        assert init.namespace == os.stat(f"/proc/{container.pid}/ns/pid").st_ino
        assert namespaces.is_alive(init)
        assert not namespaces.is_alive(replace(init, boot_id="0" * 36)), "of another boot"
        assert not namespaces.is_alive(replace(init, start_time=init.start_time + 1)), "another process of that PID"
        container.kill()
        assert not namespaces.is_alive(init)


def test_no_such_process_is_refused() -> None:
    """An unused PID is refused; the error states which PID to give."""
    with pytest.raises(NotAnInitError, match=r"no process \d+; give the PID of the container's init"):
        namespaces.examine(ended())
    with pytest.raises(NotAnInitError):
        namespaces.examine(2**40)


def test_process_of_the_host_is_refused() -> None:
    """A process in the host's PID namespace is refused."""
    with pytest.raises(NotAnInitError, match="in the host's PID namespace"):
        namespaces.examine(os.getpid())


@pytest.mark.root
def test_other_process_of_a_container_is_refused() -> None:
    """Another process than PID 1 of a namespace is refused, because it may end before the namespace does."""
    with Container() as container:
        child = subprocess.Popen(["nsenter", "-t", str(container.pid), "-p", "sleep", "60"])
        (inside,) = _children(child.pid)
        with pytest.raises(NotAnInitError, match=r"is number \d+ in its PID namespace; give the container's init"):
            namespaces.examine(inside)
        container.kill()
        child.wait()


def _children(pid: int) -> list[int]:
    while True:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            if found := [int(child) for child in file.read().split()]:
                return found


def test_boot_is_the_kernels() -> None:
    """The boot is identified by the kernel's UUID of it, without the line break."""
    boot = namespaces.boot_id()
    assert f"{boot}\n" == Path("/proc/sys/kernel/random/boot_id").read_text()
    assert str(UUID(boot)) == boot
