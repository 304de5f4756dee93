"""Looking at processes, and what the operator is told of one that cannot be an instance's init."""

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

import pytest

from guestapi.callers import namespaces
from guestapi.callers.namespaces import NotAnInitError
from tests.harness.bare_init import BareInit
from tests.harness.containers import BASE, Container


def ended() -> int:
    """The PID of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_start_time_tells_processes_apart() -> None:
    """It is the same on each look, and that of a process that has ended is an error, before and after it is reaped."""
    assert namespaces.start_time(os.getpid()) == namespaces.start_time(os.getpid())
    with pytest.raises(ProcessLookupError):
        namespaces.start_time(ended())
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        namespaces.start_time(zombie.pid)
    zombie.wait()


def test_start_time_of_an_odd_name() -> None:
    """A process may be called anything, parentheses and numbers too."""
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
    """By ioctl, by /proc guarded by a pidfd (Linux 6.5 to 6.10), by /proc alone: one answer."""
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
    """The inode number of the user namespace that a process is in."""
    return os.stat(f"/proc/{pid}/ns/user").st_ino


@pytest.mark.root
def test_root_uid() -> None:
    """Which user is root in a user namespace comes from the ID map of a process that is in it; on the host it is root.

    A process that is in another user namespace tells nothing.
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
    """In a user namespace without a root user, nobody is root."""
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


#: What PID 1 may do to itself, as often as it likes.
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
def test_init_that_changed_itself_is_examined_as_before(base: int | None, change: str) -> None:
    """User and PID namespaces that PID 1 has entered before its registration change nothing that is recorded."""
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
def test_root_is_as_stated_where_it_cannot_be_told(stated: int | None) -> None:
    """Without CAP_SYS_ADMIN nobody enters another user namespace: then whoever made the container says who is root."""
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
        told = subprocess.run(command, capture_output=True, check=True, text=True)
        assert told.stdout.split() == [str(BASE), str(owner)], "init itself shows the map"
        container.change_init("uid:1000", "userns")
        told = subprocess.run(command, capture_output=True, check=True, text=True)
        assert told.stdout.split() == [str(stated), str(owner)]


@pytest.mark.root
def test_nobody_enters_unless_asked() -> None:
    """Where no process shows the map, it is not known, unless a process of ours may enter."""
    with Container() as container:
        owner = user_namespace(container.pid)
        container.change_init("uid:1000", "userns")
        namespace = os.open(f"/proc/{container.pid}/ns/pid", os.O_RDONLY)
        assert namespaces.find_root(namespace, [container.pid]) == (None, owner)
        assert namespaces.find_root(namespace, [container.pid, ended()]) == (None, owner)
        assert namespaces.find_root(namespace, [ended(), container.pid], enter=True) == (BASE, owner)
        os.close(namespace)


@pytest.mark.root
def test_looking_leaves_nothing_open() -> None:
    """Neither descriptors nor processes are left of an examination, whatever comes of it."""
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
    """What was in /proc a moment ago is not there: the process has ended, and no file is missing."""
    stat = os.stat

    def gone(path: str, *, dir_fd: int | None = None) -> os.stat_result:
        if path == "ns/user":
            raise FileNotFoundError
        return stat(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "stat", gone)
    with pytest.raises(ProcessLookupError):
        namespaces.root_uid(os.getpid(), user_namespace("self"))


@pytest.mark.root
def test_init_that_may_not_be_looked_at() -> None:
    """Who has not the right to look at a process is told what to do."""
    code = "import sys; from guestapi.callers.namespaces import examine; examine(int(sys.argv[1]))"
    privileges = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    with Container() as container:
        command = [*privileges, sys.executable, "-c", code, str(container.pid)]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert f"process {container.pid} may not be looked at" in done.stderr
    assert done.returncode == 1


@pytest.mark.root
def test_owner_around_our_own_user_namespace() -> None:
    """From inside a user namespace, the one around it cannot be seen, so neither who is root there."""
    code = """if True:
        import os
        from guestapi.callers import namespaces
        from tests.harness.agent import CLONE_NEWUSER, unshare
        namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
        print(namespaces.find_root(namespace, [os.getpid()], enter=True)[0])
        unshare(CLONE_NEWUSER)
        print(namespaces.find_root(namespace, [os.getpid()], enter=True))
        """
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert told.stdout.splitlines() == ["0", "(None, None)"]


@pytest.mark.root
def test_kernels_without_the_ioctl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pidfd tells no namespace (before Linux 6.11), /proc is asked; another failure is not hidden."""
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
def test_pidfd_is_asked_where_it_can_be() -> None:
    """Where a pidfd tells the namespace, nothing is asked by PID: that could mean another process by now."""
    kernel = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    with Container() as container:
        pidfd = os.pidfd_open(container.pid)
        found = namespaces.open_namespace(os.getpid(), pidfd)
        asked = container.pid if kernel >= (6, 11) else os.getpid()
        assert namespaces.inode(found) == os.stat(f"/proc/{asked}/ns/pid").st_ino
        os.close(found)
        os.close(pidfd)


def test_pid_that_was_given_to_another_process() -> None:
    """The process of the pidfd has ended, and somebody else has its PID by now: no namespace, and nothing left open."""
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    pidfd = os.pidfd_open(process.pid)
    process.wait()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessLookupError):
        namespaces.open_namespace(os.getpid(), pidfd, by_ioctl=False)
    assert os.listdir("/proc/self/fd") == before
    os.close(pidfd)


def test_pid_that_is_given_to_another_process_during_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """By /proc alone, another start time after the look than before it says that it was at two processes."""
    times = iter([1, 2])
    monkeypatch.setattr(namespaces, "start_time", lambda _pid: next(times))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessLookupError):
        namespaces.open_namespace(os.getpid(), None)
    assert os.listdir("/proc/self/fd") == before


def test_namespace_without_pidfd_and_ioctl_of_a_living_process() -> None:
    """A pidfd without the ioctl, and no pidfd: a living process has its namespace told by /proc."""
    pidfd = os.pidfd_open(os.getpid())
    for descriptor in (pidfd, None):
        found = namespaces.open_namespace(os.getpid(), descriptor, by_ioctl=False)
        assert namespaces.inode(found) == namespaces.own_namespace()
        assert not os.get_inheritable(found)
        os.close(found)
    os.close(pidfd)


def test_process_without_proc_entry() -> None:
    """A PID that nobody has is said to be nobody's, not to lack a file."""
    with pytest.raises(ProcessLookupError):
        namespaces.open_namespace(ended(), os.pidfd_open(os.getpid()), by_ioctl=False)


def test_no_namespace_around_the_topmost() -> None:
    """At the top of what can be seen there is nothing around."""
    namespace = os.open("/proc/self/ns/pid", os.O_RDONLY)
    if namespaces.inode(namespace) == 0xEFFFFFFC:  # include/linux/proc_ns.h, PROC_PID_INIT_INO
        assert namespaces.open_parent(namespace) is None
    os.close(namespace)


@pytest.mark.root
def test_init_that_ends_during_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read may be of a process that got the PID of an init that ended: nothing is said of either."""
    with Container() as container:
        find_root = namespaces.find_root

        def end(namespace: int, pids: list[int], *, enter: bool) -> tuple[int | None, int | None]:
            found = find_root(namespace, pids, enter=enter)
            os.kill(container.pid, signal.SIGKILL)
            # Not reaped by its parent, so that all that is read of it afterwards is still there.
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


@pytest.mark.root
def test_init_with_a_long_pid() -> None:
    """PIDs have up to seven digits (PID_MAX_LIMIT, 2²²)."""
    highest = int(Path("/proc/sys/kernel/pid_max").read_text()) - 100
    for pid in range(highest, highest - 50, -1):
        init = BareInit(Path("/nowhere"), pid)
        try:
            found = namespaces.examine(init.pid)
        finally:
            init.end()
        if init.pid == pid:
            break
    assert found.pid == pid
    assert not namespaces.is_alive(found)


@pytest.mark.root
def test_init_of_a_container_is_examined() -> None:
    """What identifies a container's init is its PID, start time, boot and namespace, and it is alive until it ends."""
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
    """A PID that nobody has cannot be an init; the error says which to give."""
    with pytest.raises(NotAnInitError, match=r"no process \d+; give the PID of the container's init"):
        namespaces.examine(ended())
    with pytest.raises(NotAnInitError):
        namespaces.examine(2**40)


def test_process_of_the_host_is_refused() -> None:
    """A process in the host's own PID namespace is no container's init."""
    with pytest.raises(NotAnInitError, match="in the host's PID namespace"):
        namespaces.examine(os.getpid())


@pytest.mark.root
def test_other_process_of_a_container_is_refused() -> None:
    """Only PID 1 of a namespace can stand for it: the others may end before it does."""
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
