"""Identification of callers with real processes: by pidfd if the kernel has it, and by /proc alone as on older ones."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guestapi.callers import identify, namespaces
from guestapi.callers.credentials import Credentials, credentials, peer_pidfd
from guestapi.callers.identify import Caller, Identifier, LiveInit, LiveInits
from guestapi.model import Init
from tests.harness.bare_init import BareInit
from tests.harness.containers import BASE, Container, from_host, receive, send
from tests.harness.scratch import SCRATCH

pytestmark = pytest.mark.root

RUN = 7


class Registered:
    """A stand-in for the store: the running instances, with ids from 1."""

    def __init__(self, **inits: Init) -> None:
        self.inits = inits

    def running_in(self, namespace: int) -> list[tuple[int, int, Init]]:
        """As `Reader.running_in`."""
        return [
            (number, RUN, init) for number, init in enumerate(self.inits.values(), 1) if init.namespace == namespace
        ]


class IdentifyingListener:
    """A listening socket that identifies each caller, and then sends the head of an HTTP response."""

    def __init__(self, identifier: Identifier) -> None:
        self.identifier = identifier
        self.directory = Path(tempfile.mkdtemp(prefix="guestapi-listener-", dir=SCRATCH))
        self.directory.chmod(0o755)
        self.path = self.directory / "sock"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self.path.chmod(0o666)
        self._listening.listen()

    @contextmanager
    def caller(self, connect: Callable[[], Any], *, confirm: bool = False) -> Iterator[Caller]:
        """Yield the caller that `connect` is identified as; with `confirm`, as a first request confirms it."""
        thread = threading.Thread(target=connect)
        thread.start()
        connection, _address = self._listening.accept()
        with connection:
            if confirm:
                # The first bytes of the request have arrived, so the client's steps before it are done.
                connection.recv(1)
            caller = self.identifier.identify(connection, credentials(connection))
            yield self.identifier.confirm(connection, caller) if confirm else caller
            if not confirm:
                connection.recv(1)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        thread.join()

    @contextmanager
    def leaving(self, connect: Callable[[], Any]) -> Iterator[tuple[Caller, Caller]]:
        """Yield the caller as identified before the process that connected ends, and as confirmed after its end."""
        thread = threading.Thread(target=connect)
        thread.start()
        connection, _address = self._listening.accept()
        with connection:
            recognised = self.identifier.identify(connection, credentials(connection))
            # The process ends when it receives this; then the one that inherited its socket sends a byte.
            connection.sendall(b"!")
            connection.recv(1)
            yield recognised, self.identifier.confirm(connection, recognised)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        thread.join()

    def close(self) -> None:
        """Close the socket and remove its directory."""
        self._listening.close()
        self.path.unlink()
        self.directory.rmdir()


STEPS = [send(b"x"), receive(1, "HEAD")]


@pytest.fixture(scope="module")
def opened() -> Iterator[IdentifyingListener]:
    """A listener, with another identifier for each test."""
    made = IdentifyingListener(Identifier(Registered()))
    yield made
    made.close()


@pytest.fixture(scope="module")
def container(opened: IdentifyingListener) -> Iterator[Container]:
    """A container from which tests connect; those that change its init have one of their own."""
    with Container([(opened.directory, "/dev/incus")]) as running:
        yield running


@pytest.fixture(params=[True, False], ids=["pidfd", "proc"])
def listener(opened: IdentifyingListener, request: pytest.FixtureRequest) -> IdentifyingListener:
    """A listener for both ways of identification, which knows no instance."""
    opened.identifier = Identifier(Registered(), pidfd=request.param)
    return opened


@pytest.fixture
def inside(listener: IdentifyingListener, container: Container) -> Container:
    """A container that runs as instance 1."""
    register(listener, namespaces.examine(container.pid))
    return container


def register(listener: IdentifyingListener, *inits: Init) -> None:
    """Make these inits the running instances, 1, 2 and so on, for a new identifier."""
    known = Registered(**{f"i{number}": init for number, init in enumerate(inits)})
    listener.identifier = Identifier(known, pidfd=listener.identifier._pidfd)


def connecting(container: Container, **how: Any) -> Callable[[], Any]:
    """Return a function that connects from inside a container."""
    return lambda: container.exchange(*STEPS, **how)


def test_root_in_a_container(listener: IdentifyingListener, inside: Container) -> None:
    """A process of a registered container is identified as its root, with the host's credentials."""
    with listener.caller(connecting(inside)) as caller:
        assert (caller.instance_id, caller.run) == (1, RUN)
        assert caller.is_root
        assert caller.credentials.uid == BASE
        assert caller.init
        assert caller.init.alive()


def test_user_in_a_container(listener: IdentifyingListener, inside: Container) -> None:
    """Another user of the container is identified too, and is not root."""
    with listener.caller(connecting(inside, become=["uid:1000"])) as caller:
        assert caller.instance_id == 1
        assert not caller.is_root


@pytest.mark.parametrize(("become", "uid"), [([], 0), (["uid:1000"], 1000), (["uid:1000", "userns"], 1000)])
def test_users_inside(listener: IdentifyingListener, become: list[str], uid: int) -> None:
    """A caller's user is known as the instance numbers it, also if the init or the caller is elsewhere."""
    with Container([(listener.directory, "/dev/incus")]) as changed:
        register(listener, namespaces.examine(changed.pid))
        for _time in range(2):
            with listener.caller(connecting(changed, become=become)) as caller:
                assert caller.uid_inside == uid
        changed.change_init("uid:5", "userns")
        register(listener, namespaces.examine(changed.pid))
        with listener.caller(connecting(changed, become=become)) as caller:
            assert caller.uid_inside == (None if "userns" in become else uid)


def test_users_of_the_id_map() -> None:
    """A user inside is one of the map's ranges, from the first to the last of each; any other is none."""

    class MappedInit(Ending):
        """An init with a map of two ranges."""

        __slots__ = ()

        def users(self, caller: int) -> namespaces.IdMap:
            """Return the map, of the caller's own instance."""
            assert caller == 7
            return ((0, 100_000, 10), (50, 200_000, 1))

    init = MappedInit(1)
    found = {
        uid: Caller(Credentials(7, uid, uid), 1, 1, init).uid_inside
        for uid in (0, 99_999, 100_000, 100_009, 100_010, 199_999, 200_000, 200_001)
    }
    assert {uid: inside for uid, inside in found.items() if inside is not None} == {
        100_000: 0,
        100_009: 9,
        200_000: 50,
    }
    assert Caller(Credentials(7, 100_000, 100_000)).uid_inside is None


def test_users_of_an_init_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the init has ended, its user namespace's number may be another's, so a map found by it is not used."""
    monkeypatch.setattr(namespaces, "id_map", lambda _pid, _number: ((0, 100_000, 10),))
    for ended in (False, True):
        with subprocess.Popen(["sleep", "60"]) as process:
            init = LiveInit(Init(process.pid, 1, "boot", 1, user_namespace=7), os.pidfd_open(process.pid), 100_000)
            if ended:
                process.kill()
                process.wait()
            assert init.users(process.pid) == (() if ended else ((0, 100_000, 10),))
            process.kill()


def test_root_of_a_user_namespace_inside(listener: IdentifyingListener, inside: Container) -> None:
    """Root of a user namespace that an ordinary user created is not the instance's root."""
    with listener.caller(connecting(inside, become=["uid:1000", "userns"])) as caller:
        assert caller.instance_id == 1
        assert not caller.is_root


def find_roots(listener: IdentifyingListener, container: Container) -> dict[str, bool]:
    """Return whether root, another user, and root of that user's user namespace are identified as instance 1's root."""
    found = {}
    for name, become in (("stranger", ["uid:1000", "userns"]), ("user", ["uid:1000"]), ("root", [])):
        with listener.caller(connecting(container, become=become)) as caller:
            assert caller.instance_id == 1
            found[name] = caller.is_root
    return found


ROOT_ALONE = {"root": True, "user": False, "stranger": False}

#: The namespaces and users that PID 1 enters, and the host UID of root in its container.
changes = pytest.mark.parametrize(
    ("change", "base"),
    [
        (["uid:1000", "userns"], BASE),
        (["uid:1000", "userns"], None),
        (["pidns"], BASE),
        (["pidns", "uid:1000", "userns"], BASE),
    ],
    ids=["userns", "userns, privileged", "pidns", "both"],
)


@changes
@pytest.mark.parametrize("when", ["before it is registered", "after it is registered", "after it was recognised"])
def test_init_that_enters_namespaces(
    listener: IdentifyingListener, base: int | None, change: list[str], when: str
) -> None:
    """When PID 1 enters other user or PID namespaces, the identification of callers in its container stays the same."""
    with Container([(listener.directory, "/dev/incus")], base=base) as container:
        if when == "before it is registered":
            container.change_init(*change)
        register(listener, namespaces.examine(container.pid))
        if when == "after it was recognised":
            assert find_roots(listener, container) == ROOT_ALONE
        if when != "before it is registered":
            container.change_init(*change)
        assert find_roots(listener, container) == ROOT_ALONE


@changes
def test_init_without_a_recorded_root(listener: IdentifyingListener, base: int | None, change: list[str]) -> None:
    """Without a recorded root, root is the user that is root in the user namespace that owns the PID namespace.

    A store has such instances if an earlier version registered them.
    """
    with Container([(listener.directory, "/dev/incus")], base=base) as container:
        old = replace(namespaces.examine(container.pid), root_uid=None, user_namespace=None)
        register(listener, old)
        assert find_roots(listener, container) == ROOT_ALONE
        container.change_init(*change)
        register(listener, old)
        assert find_roots(listener, container) == ROOT_ALONE


def test_recorded_root_of_another_user_namespace(listener: IdentifyingListener, inside: Container) -> None:
    """A recorded root applies only to the user namespace that was recorded with it."""
    init = namespaces.examine(inside.pid)
    assert init.user_namespace is not None
    register(listener, replace(init, root_uid=BASE + 1000))
    with listener.caller(connecting(inside, become=["uid:1000"])) as caller:
        assert caller.is_root, "as recorded"
    register(listener, replace(init, root_uid=BASE + 1000, user_namespace=init.user_namespace + 1))
    assert find_roots(listener, inside) == ROOT_ALONE


def test_user_of_the_host_who_enters_a_container(listener: IdentifyingListener, inside: Container) -> None:
    """The host's root in a container's PID namespace, but not in its user namespace, is not the container's root."""
    path = str(listener.path)
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r}); s.send(b'x'); s.recv(100)"
    command = ["nsenter", "-t", str(inside.pid), "-p", "/usr/bin/python3", "-I", "-S", "-c", code]
    with listener.caller(lambda: subprocess.run(command, check=True)) as caller:
        assert caller.instance_id == 1
        assert not caller.is_root


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_nested_namespaces(listener: IdentifyingListener, inside: Container, levels: int) -> None:
    """PID namespaces inside the container belong to its instance."""
    with listener.caller(connecting(inside, become=["pidns"] * levels)) as caller:
        assert caller.instance_id == 1
        assert caller.is_root


def test_nested_instance_is_identified(listener: IdentifyingListener, inside: Container) -> None:
    """A nested container that is registered is its own instance, not the one around it."""
    namespace = nested_namespace(inside)
    outer = namespaces.examine(inside.pid)
    inner = namespaces.examine(namespace)
    register(listener, outer, inner)
    with listener.caller(lambda: entered(namespace, listener.path)) as caller:
        assert caller.instance_id == 2
    os.kill(namespace, signal.SIGKILL)


def nested_namespace(container: Container) -> int:
    """Start a process that is PID 1 of a namespace inside the container; return its PID on the host."""
    ran = container.run("sh", "-c", "unshare --pid --fork sleep 60 >/dev/null 2>&1 & echo started")
    assert ran.out == "started\n"
    for _try in range(200):
        for path in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
            except OSError:
                continue
            own = fields["NSpid"].split()
            if fields["Name"].strip() == "sleep" and len(own) == 3 and own[2] == "1":
                return int(own[0])
        threading.Event().wait(0.02)
    raise AssertionError("no nested namespace")


def entered(pid: int, path: Path) -> None:
    """Connect from a process that `nsenter` puts into all namespaces of `pid`."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/dev/incus/sock'); s.send(b'x'); s.recv(100)"
    )
    command = ["nsenter", "-t", str(pid), "-a", "--setuid", "0", "--setgid", "0", "/usr/bin/python3", "-I", "-S", "-c"]
    subprocess.run([*command, code], check=True)


def test_process_entered_by_nsenter(listener: IdentifyingListener, inside: Container) -> None:
    """A process that the host's operator starts in a container with nsenter belongs to the instance."""
    with listener.caller(lambda: entered(inside.pid, listener.path)) as caller:
        assert caller.instance_id == 1
        assert caller.is_root


@pytest.mark.parametrize("become", [[], ["uid:1000"], [f"uid:{BASE}"]], ids=["root", "user", "mapped"])
def test_host_process(listener: IdentifyingListener, inside: Container, become: list[str]) -> None:
    """A process of the host belongs to no instance, whatever its user."""
    with listener.caller(lambda: from_host(listener.path, *STEPS, become=become)) as caller:
        assert caller.instance_id is None
        assert caller.container is None
        assert not caller.is_root


@pytest.mark.parametrize("levels", [0, 2])
def test_unregistered_container(listener: IdentifyingListener, inside: Container, levels: int) -> None:
    """A process of an unregistered container has no instance; its container is the outermost one."""
    with (
        Container([(listener.directory, "/dev/incus")]) as other,
        listener.caller(connecting(other, become=["pidns"] * levels)) as caller,
    ):
        assert (caller.instance_id, caller.run) == (None, 0)
        assert caller.container == os.stat(f"/proc/{other.pid}/ns/pid").st_ino


@pytest.mark.parametrize("levels", [0, 3])
def test_container_is_found_without_the_store(listener: IdentifyingListener, inside: Container, levels: int) -> None:
    """`find_container` finds the outermost namespace at any depth, without the store, and leaves no descriptor open."""
    listener.identifier = Identifier(Unasked(), pidfd=listener.identifier._pidfd)
    looking = listener.identifier
    found: list[int] = []
    before = len(os.listdir("/proc/self/fd"))

    class Looking:
        """An identifier that only finds the container."""

        def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
            """Find the container."""
            found.append(looking.find_container(connection, who))
            return Caller(who)

    listener.identifier = Looking()  # type: ignore[assignment]  # it has the one method that the listener calls
    with listener.caller(connecting(inside, become=["pidns"] * levels)):
        pass
    with listener.caller(lambda: from_host(listener.path, *STEPS)):
        pass
    assert found == [os.stat(f"/proc/{inside.pid}/ns/pid").st_ino, 0]
    assert len(os.listdir("/proc/self/fd")) == before


class Unasked:
    """A store that must not be read."""

    def running_in(self, _namespace: int) -> list[tuple[int, int, Init]]:
        """Fail the test."""
        raise AssertionError("the store is asked")


def test_two_containers(listener: IdentifyingListener, inside: Container) -> None:
    """Two containers with the same ID map are different instances."""
    with Container([(listener.directory, "/dev/incus")]) as other:
        register(listener, namespaces.examine(inside.pid), namespaces.examine(other.pid))
        with listener.caller(connecting(other)) as caller:
            assert caller.instance_id == 2
        with listener.caller(connecting(inside)) as caller:
            assert caller.instance_id == 1


def test_caller_that_exits(listener: IdentifyingListener, inside: Container) -> None:
    """A process that connects and exits is not identified, although another process still holds its socket."""
    with listener.caller(connecting(inside, how="exited"), confirm=True) as caller:
        assert caller.instance_id is None


def test_caller_that_exits_after_identification(listener: IdentifyingListener, inside: Container) -> None:
    """A process that exits after its identification, but before its first request, is not confirmed."""
    with listener.leaving(connecting(inside, how="leaving")) as (recognised, confirmed):
        assert recognised.instance_id == 1
        assert confirmed == Caller(recognised.credentials)


def test_child_with_an_inherited_socket(listener: IdentifyingListener, inside: Container) -> None:
    """A request through an inherited socket counts as one of the process that connected, while that is alive."""
    with listener.caller(connecting(inside, how="parent"), confirm=True) as caller:
        assert caller.instance_id == 1
        assert caller.is_root


def test_another_start_time(listener: IdentifyingListener, inside: Container) -> None:
    """An init with the registered PID and namespace, but another start time, is not the registered one."""
    init = namespaces.examine(inside.pid)
    register(listener, replace(init, start_time=init.start_time - 1))
    with listener.caller(connecting(inside)) as caller:
        assert caller.instance_id is None


def test_another_boot(listener: IdentifyingListener, inside: Container) -> None:
    """A registration from an earlier boot matches no process."""
    register(listener, replace(namespaces.examine(inside.pid), boot_id="0" * 36))
    with listener.caller(connecting(inside)) as caller:
        assert caller.instance_id is None


def test_init_in_another_namespace(listener: IdentifyingListener, inside: Container) -> None:
    """A registered init that is alive in another namespace than the registered one does not count."""
    with Container() as other:
        forged = replace(namespaces.examine(other.pid), namespace=namespaces.examine(inside.pid).namespace)
        register(listener, forged)
        with listener.caller(connecting(inside)) as caller:
            assert caller.instance_id is None


def test_reused_pid_and_namespace(listener: IdentifyingListener) -> None:
    """A container with the PID and the namespace number of a registered one that has ended is not identified as it."""
    # Other processes of this machine create namespaces, too. If one of them has got the number, start anew.
    for number in range(200):
        if number % 5 == 0:
            first = BareInit(listener.path)
            registered = namespaces.examine(first.pid)
            first.end()
        second = BareInit(listener.path, registered.pid)
        found = namespaces.examine(second.pid)
        if (found.pid, found.namespace) == (registered.pid, registered.namespace):
            break
        second.end()
    else:
        pytest.fail("the kernel did not hand out the same numbers again")
    # Start times are in ticks of 10 ms; only the difference in start time distinguishes the two inits.
    assert found.start_time != registered.start_time
    register(listener, registered)
    with listener.caller(second.connect) as caller:
        assert caller.instance_id is None
    second.end()


def test_ended_init_is_not_alive(listener: IdentifyingListener) -> None:
    """An identified caller's init is not alive any more as soon as the process has ended."""
    with Container([(listener.directory, "/dev/incus")]) as container:
        register(listener, namespaces.examine(container.pid))
        with listener.caller(connecting(container)) as caller:
            assert caller.init
            assert caller.init.alive()
        container.kill()
        assert not caller.init.alive()


def test_descriptors_of_ended_inits_are_closed(listener: IdentifyingListener) -> None:
    """An identifier keeps descriptors only of living inits, however many instances have ended."""
    before = len(os.listdir("/proc/self/fd"))
    for _round in range(100):
        init = BareInit(listener.path)
        identifier = listener.identifier
        identifier._registrations = Registered(i=namespaces.examine(init.pid))
        with listener.caller(init.connect) as caller:
            assert caller.instance_id == 1
        del caller
        init.end()
    assert len(os.listdir("/proc/self/fd")) - before < 80


class Ending(LiveInit):
    """An init whose life the test sets."""

    __slots__ = ("living",)

    def __init__(self, number: int) -> None:
        self.init = Init(number, 1, "boot", number)
        self.living = True

    def __del__(self) -> None:
        """Close nothing."""

    def alive(self) -> bool:
        """Return what the test has set."""
        return self.living


def test_number_of_live_inits_is_bounded() -> None:
    """Ended inits are dropped at 64 entries, then at twice the number of the inits that were alive at that time."""
    known = LiveInits()
    inits = [Ending(number) for number in range(300)]
    for one in inits[:64]:
        known.add(one)
    assert len(known) == 64
    for one in inits[4:64]:
        one.living = False
    known.add(inits[64])
    assert len(known) == 5
    # Few were alive, so the next limit is 64; all of these are alive, so the one after it is 128.
    for one in inits[65:124]:
        known.add(one)
    assert len(known) == 64
    for number in range(124, 188):
        known.add(inits[number])
    assert len(known) == 128
    inits[0].living = False
    assert len(known) == 128
    known.add(inits[188])
    assert len(known) == 128
    assert known.get(inits[0].init) is None
    assert known.get(inits[1].init) is inits[1]
    inits[1].living = False
    assert known.get(inits[1].init) is None
    assert known.get(replace(inits[2].init, start_time=2)) is None
    assert known.get(replace(inits[2].init, namespace=1)) is None


def test_live_inits_are_checked_rarely() -> None:
    """The more inits are alive, the rarer all are checked: at 64, 128 and 256 of them, not with each new one."""
    checked: list[int] = []

    class Counted(Ending):
        """Notes each check."""

        def alive(self) -> bool:
            checked.append(self.init.pid)
            return super().alive()

    known = LiveInits()
    for number in range(300):
        known.add(Counted(number))
    assert len(checked) == 64 + 128 + 256


def test_pidfds_are_used_by_default(listener: IdentifyingListener, inside: Container) -> None:
    """By default an identifier asks for the peer's pidfd, and with one it needs no start time."""
    kernel = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    by_pidfd = listener.identifier._pidfd and kernel >= (6, 5)
    if by_pidfd:
        listener.identifier = Identifier(listener.identifier._registrations)
    with listener.caller(connecting(inside)) as caller:
        assert caller.instance_id == 1
        assert caller.started == (None if by_pidfd else namespaces.start_time(caller.credentials.pid))


def test_container_of_a_process_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has ended is in no container."""

    def gone(*_arguments: object, **_options: object) -> int:
        raise ProcessLookupError

    monkeypatch.setattr(namespaces, "open_namespace", gone)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Identifier(Unasked()).find_container(ours, credentials(ours)) == 0


@pytest.mark.parametrize("pidfd", [True, False])
def test_container_is_found_by_pidfd(monkeypatch: pytest.MonkeyPatch, pidfd: bool) -> None:
    """The container of a process is looked for by the peer's pidfd, where that is used: a PID may change hands."""
    asked: list[socket.SocketType] = []

    def ask(connection: socket.SocketType) -> int | None:
        asked.append(connection)
        return peer_pidfd(connection)

    monkeypatch.setattr(identify, "peer_pidfd", ask)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Identifier(Unasked(), pidfd=pidfd).find_container(ours, credentials(ours)) == 0
    assert asked == ([ours] if pidfd else [])


@pytest.mark.parametrize(
    ("pid", "pidfd", "seen"), [(0, True, False), (0, False, False), (-1, True, False), (1, True, True)]
)
def test_process_outside_of_the_pid_namespace(
    monkeypatch: pytest.MonkeyPatch, pid: int, pidfd: bool, seen: bool
) -> None:
    """A caller with PID 0 is outside of the visible PID namespaces: it has no instance, whatever its pidfd."""
    # Makes the test's own PID namespace count as a container.
    monkeypatch.setattr(namespaces, "own_namespace", lambda: 1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        caller = Identifier(Registered(), pidfd=pidfd).identify(ours, Credentials(pid, 0, 0))
        assert (caller.instance_id, caller.container is not None) == (None, seen)


def test_descriptors_are_closed(listener: IdentifyingListener, inside: Container) -> None:
    """Identifying a caller, registered or not, nested or not, leaves no descriptor open except those of live inits."""
    unknown = Registered()
    registered = Registered(i=namespaces.examine(inside.pid))
    old = Registered(i=replace(namespaces.examine(inside.pid), root_uid=None, user_namespace=None))
    forged = Registered(i=replace(namespaces.examine(inside.pid), start_time=1))
    ended = Registered(i=replace(namespaces.examine(inside.pid), pid=2**22))
    # This process, which is in another PID namespace than was registered.
    elsewhere = Registered(i=replace(namespaces.examine(inside.pid), pid=os.getpid()))
    before = len(os.listdir("/proc/self/fd"))
    for registrations in (unknown, registered, old, forged, ended, elsewhere):
        for become in ([], ["pidns"]):
            identifiers = [Identifier(registrations, pidfd=listener.identifier._pidfd) for _number in range(5)]
            for listener.identifier in identifiers:
                with listener.caller(connecting(inside, become=become), confirm=True):
                    pass
            listener.identifier = Identifier(unknown)
            del identifiers
            assert len(os.listdir("/proc/self/fd")) == before


def test_callers_share_a_live_init(listener: IdentifyingListener, inside: Container) -> None:
    """The callers of an instance share one `LiveInit`."""
    with listener.caller(connecting(inside)) as first:
        assert first.init is not None
    with listener.caller(connecting(inside, become=["uid:1000"])) as second:
        assert first.init is second.init


def test_identification_without_the_capability(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without CAP_SYS_PTRACE no caller is identified, and the log states why."""

    def refuse(*_arguments: object, **_options: object) -> int:
        raise PermissionError

    monkeypatch.setattr(namespaces, "open_namespace", refuse)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        who = credentials(ours)
        assert Identifier(Registered()).identify(ours, who) == Caller(who)
    assert [record.message for record in caplog.records] == [
        f"process {os.getpid()} cannot be looked at: the service needs CAP_SYS_PTRACE"
    ]


def test_init_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """If only the init of its instance may not be looked at, a caller is unknown, too, and nothing stays open."""
    real = namespaces.open_namespace
    # Makes the test's own PID namespace count as a container.
    monkeypatch.setattr(namespaces, "own_namespace", lambda: 1)
    ours, theirs = socket.socketpair()
    with ours, theirs, subprocess.Popen(["sleep", "60"]) as child:
        namespace = os.stat("/proc/self/ns/pid").st_ino
        init = Init(child.pid, namespaces.start_time(child.pid), namespaces.boot_id(), namespace)

        def refuse(pid: int, pidfd: int | None, *, by_ioctl: bool = True) -> int:
            if pid == child.pid:
                raise PermissionError
            return real(pid, pidfd, by_ioctl=by_ioctl)

        monkeypatch.setattr(namespaces, "open_namespace", refuse)
        who = credentials(ours)
        before = os.listdir("/proc/self/fd")
        try:
            assert Identifier(Registered(init=init)).identify(ours, who) == Caller(who)
            assert os.listdir("/proc/self/fd") == before
        finally:
            child.kill()
    assert [record.message for record in caplog.records] == [
        f"process {os.getpid()} cannot be looked at: the service needs CAP_SYS_PTRACE"
    ]
