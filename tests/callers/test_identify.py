"""Who is calling, with real processes: by pidfd as this kernel has it, and by /proc alone as older kernels need it."""

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

from guestapi.callers import namespaces
from guestapi.callers.credentials import Credentials, credentials
from guestapi.callers.identify import Caller, Identifier, LiveInit, LiveInits
from guestapi.model import Init
from tests.harness.bare_init import BareInit
from tests.harness.containers import BASE, Container, from_host, receive, send

pytestmark = pytest.mark.root

RUN = 7


class Registered:
    """What the store would say: instances by id."""

    def __init__(self, **inits: Init) -> None:
        self.inits = inits

    def running_in(self, namespace: int) -> list[tuple[int, int, Init]]:
        """As `Reader.running_in`."""
        return [
            (number, RUN, init) for number, init in enumerate(self.inits.values(), 1) if init.namespace == namespace
        ]


class Door:
    """A listening socket that identifies whoever comes, then answers one byte, as an HTTP response."""

    def __init__(self, identifier: Identifier) -> None:
        self.identifier = identifier
        self.directory = Path(tempfile.mkdtemp(prefix="guestapi-door-", dir="/run"))
        self.directory.chmod(0o755)
        self.path = self.directory / "sock"
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self.path.chmod(0o666)
        self._listening.listen()

    @contextmanager
    def caller(self, knock: Callable[[], Any], *, confirm: bool = False) -> Iterator[Caller]:
        """Who `knock` comes as; with `confirm`, as a first request confirms it, which comes before the look."""
        thread = threading.Thread(target=knock)
        thread.start()
        connection, _address = self._listening.accept()
        with connection:
            if confirm:
                # The first bytes of a request are there, so whatever was to happen before them has happened.
                connection.recv(1)
            caller = self.identifier.identify(connection, credentials(connection))
            yield self.identifier.confirm(connection, caller) if confirm else caller
            if not confirm:
                connection.recv(1)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        thread.join()

    @contextmanager
    def leaving(self, knock: Callable[[], Any]) -> Iterator[tuple[Caller, Caller]]:
        """Who `knock` comes as: while the process that connected is there, and as a request after its end confirms."""
        thread = threading.Thread(target=knock)
        thread.start()
        connection, _address = self._listening.accept()
        with connection:
            recognised = self.identifier.identify(connection, credentials(connection))
            # The process waits for this to end; then the one that has inherited its socket sends something.
            connection.sendall(b"!")
            connection.recv(1)
            yield recognised, self.identifier.confirm(connection, recognised)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        thread.join()

    def close(self) -> None:
        """Away with it."""
        self._listening.close()
        self.path.unlink()
        self.directory.rmdir()


KNOCK = [send(b"x"), receive(1, "HEAD")]


@pytest.fixture(params=[True, False], ids=["pidfd", "proc"])
def door(request: pytest.FixtureRequest) -> Iterator[Door]:
    """A door with both ways to recognise callers."""
    opened = Door(Identifier(Registered(), pidfd=request.param))
    yield opened
    opened.close()


@pytest.fixture
def inside(door: Door) -> Iterator[Container]:
    """A container that runs as instance 1."""
    with Container([(door.directory, "/dev/incus")]) as container:
        register(door, namespaces.examine(container.pid))
        yield container


def register(door: Door, *inits: Init) -> None:
    """Make these the known instances, 1, 2 and so on, for an identifier that has seen nothing yet."""
    known = Registered(**{f"i{number}": init for number, init in enumerate(inits)})
    door.identifier = Identifier(known, pidfd=door.identifier._pidfd)


def knocks(container: Container, **how: Any) -> Callable[[], Any]:
    """A knock from inside."""
    return lambda: container.exchange(*KNOCK, **how)


def test_root_in_a_container(door: Door, inside: Container) -> None:
    """A process of a registered container is recognised, as its root, by host credentials."""
    with door.caller(knocks(inside)) as caller:
        assert (caller.instance_id, caller.run) == (1, RUN)
        assert caller.is_root
        assert caller.credentials.uid == BASE
        assert caller.init
        assert caller.init.alive()


def test_user_in_a_container(door: Door, inside: Container) -> None:
    """Another user of the container is recognised too, and is not root."""
    with door.caller(knocks(inside, become=["uid:1000"])) as caller:
        assert caller.instance_id == 1
        assert not caller.is_root


def test_root_of_a_user_namespace_inside(door: Door, inside: Container) -> None:
    """Root of a user namespace that an ordinary user made is not the instance's root."""
    with door.caller(knocks(inside, become=["uid:1000", "userns"])) as caller:
        assert caller.instance_id == 1
        assert not caller.is_root


def who_is_root(door: Door, container: Container) -> dict[str, bool]:
    """Whether root, another user, and root of a user namespace of that user's are taken for instance 1's root."""
    found = {}
    for name, become in (("stranger", ["uid:1000", "userns"]), ("user", ["uid:1000"]), ("root", [])):
        with door.caller(knocks(container, become=become)) as caller:
            assert caller.instance_id == 1
            found[name] = caller.is_root
    return found


ROOT_ALONE = {"root": True, "user": False, "stranger": False}

#: What PID 1 does to itself, and which host UID is root in its container.
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
def test_init_that_changes_itself(door: Door, base: int | None, change: list[str], when: str) -> None:
    """PID 1 that enters other user or PID namespaces changes nothing for anybody in its container."""
    with Container([(door.directory, "/dev/incus")], base=base) as container:
        if when == "before it is registered":
            container.change_init(*change)
        register(door, namespaces.examine(container.pid))
        if when == "after it was recognised":
            assert who_is_root(door, container) == ROOT_ALONE
        if when != "before it is registered":
            container.change_init(*change)
        assert who_is_root(door, container) == ROOT_ALONE


@changes
def test_init_without_a_recorded_root(door: Door, base: int | None, change: list[str]) -> None:
    """Of an init whose root was not recorded, only who is root in the owner of its PID namespace is taken for root.

    That is what the store has of an instance that an earlier version registered.
    """
    with Container([(door.directory, "/dev/incus")], base=base) as container:
        old = replace(namespaces.examine(container.pid), root_uid=None, user_namespace=None)
        register(door, old)
        assert who_is_root(door, container) == ROOT_ALONE
        container.change_init(*change)
        register(door, old)
        assert who_is_root(door, container) == ROOT_ALONE


def test_recorded_root_of_another_user_namespace(door: Door, inside: Container) -> None:
    """A recorded root counts for the user namespace that it was recorded of, and for no other."""
    init = namespaces.examine(inside.pid)
    assert init.user_namespace is not None
    register(door, replace(init, root_uid=BASE + 1000))
    with door.caller(knocks(inside, become=["uid:1000"])) as caller:
        assert caller.is_root, "as recorded"
    register(door, replace(init, root_uid=BASE + 1000, user_namespace=init.user_namespace + 1))
    assert who_is_root(door, inside) == ROOT_ALONE


def test_user_of_the_host_who_enters_a_container(door: Door, inside: Container) -> None:
    """Root of the host that is in the container's PID namespace alone is not root of the container's."""
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(door.path)!r}); s.send(b'x'); s.recv(100)"
    command = ["nsenter", "-t", str(inside.pid), "-p", "/usr/bin/python3", "-I", "-S", "-c", code]
    with door.caller(lambda: subprocess.run(command, check=True)) as caller:
        assert caller.instance_id == 1
        assert not caller.is_root


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_nested_namespaces(door: Door, inside: Container, levels: int) -> None:
    """PID namespaces inside the container belong to its instance."""
    with door.caller(knocks(inside, become=["pidns"] * levels)) as caller:
        assert caller.instance_id == 1
        assert caller.is_root


def test_innermost_instance_wins(door: Door, inside: Container) -> None:
    """A container inside a container that is an instance of its own is that instance, not the one around it."""
    namespace = nested_namespace(inside)
    outer = namespaces.examine(inside.pid)
    inner = namespaces.examine(namespace)
    register(door, outer, inner)
    with door.caller(lambda: entered(namespace, door.path)) as caller:
        assert caller.instance_id == 2
    os.kill(namespace, signal.SIGKILL)


def nested_namespace(container: Container) -> int:
    """Start a process that is PID 1 of a namespace inside the container; its PID on the host."""
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
    """Knock from a process that `nsenter` puts into all namespaces of `pid`; connect by the host's path."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('/dev/incus/sock'); s.send(b'x'); s.recv(100)"
    )
    command = ["nsenter", "-t", str(pid), "-a", "--setuid", "0", "--setgid", "0", "/usr/bin/python3", "-I", "-S", "-c"]
    subprocess.run([*command, code], check=True)


def test_process_entered_by_nsenter(door: Door, inside: Container) -> None:
    """A process that the host's operator starts inside by nsenter is one of the instance."""
    with door.caller(lambda: entered(inside.pid, door.path)) as caller:
        assert caller.instance_id == 1
        assert caller.is_root


@pytest.mark.parametrize("become", [[], ["uid:1000"], [f"uid:{BASE}"]], ids=["root", "user", "mapped"])
def test_host_process(door: Door, inside: Container, become: list[str]) -> None:
    """A process on the host is in no instance, whatever its user."""
    with door.caller(lambda: from_host(door.path, *KNOCK, become=become)) as caller:
        assert caller.instance_id is None
        assert caller.container is None
        assert not caller.is_root


@pytest.mark.parametrize("levels", [0, 2])
def test_unregistered_container(door: Door, inside: Container, levels: int) -> None:
    """A container that nobody registered is no instance, though another one is; what it nests is of that container."""
    with (
        Container([(door.directory, "/dev/incus")]) as other,
        door.caller(knocks(other, become=["pidns"] * levels)) as caller,
    ):
        assert caller.instance_id is None
        assert caller.container == os.stat(f"/proc/{other.pid}/ns/pid").st_ino


@pytest.mark.parametrize("levels", [0, 3])
def test_container_is_found_without_the_store(door: Door, inside: Container, levels: int) -> None:
    """The first look finds the outermost namespace, from however deep, asks nobody who is registered, keeps nothing."""
    door.identifier = Identifier(Unasked(), pidfd=door.identifier._pidfd)
    looking = door.identifier
    found: list[int] = []
    before = len(os.listdir("/proc/self/fd"))

    class Looking:
        """Looks where it would identify."""

        def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
            """The first look alone."""
            found.append(looking.find_container(connection, who))
            return Caller(who)

    door.identifier = Looking()  # type: ignore[assignment]  # as much of one as the door asks for
    with door.caller(knocks(inside, become=["pidns"] * levels)):
        pass
    with door.caller(lambda: from_host(door.path, *KNOCK)):
        pass
    assert found == [os.stat(f"/proc/{inside.pid}/ns/pid").st_ino, 0]
    assert len(os.listdir("/proc/self/fd")) == before


class Unasked:
    """A store that nobody may ask."""

    def running_in(self, _namespace: int) -> list[tuple[int, int, Init]]:
        """Fail."""
        raise AssertionError("the store is asked")


def test_two_containers(door: Door, inside: Container) -> None:
    """Two containers with the same ID map are told apart."""
    with Container([(door.directory, "/dev/incus")]) as other:
        register(door, namespaces.examine(inside.pid), namespaces.examine(other.pid))
        with door.caller(knocks(other)) as caller:
            assert caller.instance_id == 2
        with door.caller(knocks(inside)) as caller:
            assert caller.instance_id == 1


def test_caller_that_exits(door: Door, inside: Container) -> None:
    """A process that connects and exits is not answered for, though its socket lives on in another."""
    with door.caller(knocks(inside, how="exited"), confirm=True) as caller:
        assert caller.instance_id is None


def test_caller_that_exits_after_being_recognised(door: Door, inside: Container) -> None:
    """Recognised at accept, gone before the first request: not answered for either, though it was recognised."""
    with door.leaving(knocks(inside, how="leaving")) as (recognised, confirmed):
        assert recognised.instance_id == 1
        assert confirmed == Caller(recognised.credentials)


def test_child_with_an_inherited_socket(door: Door, inside: Container) -> None:
    """A child that inherited the socket is answered as the process that connected, which is still there."""
    with door.caller(knocks(inside, how="parent"), confirm=True) as caller:
        assert caller.instance_id == 1
        assert caller.is_root


def test_another_start_time(door: Door, inside: Container) -> None:
    """The registered PID and namespace number match, but the process is not the one that was registered."""
    init = namespaces.examine(inside.pid)
    register(door, replace(init, start_time=init.start_time - 1))
    with door.caller(knocks(inside)) as caller:
        assert caller.instance_id is None


def test_another_boot(door: Door, inside: Container) -> None:
    """What was registered before the host was booted is not taken for anything that runs now."""
    register(door, replace(namespaces.examine(inside.pid), boot_id="0" * 36))
    with door.caller(knocks(inside)) as caller:
        assert caller.instance_id is None


def test_init_in_another_namespace(door: Door, inside: Container) -> None:
    """A registered process that is alive, but in another namespace than registered, proves nothing."""
    with Container() as other:
        forged = replace(namespaces.examine(other.pid), namespace=namespaces.examine(inside.pid).namespace)
        register(door, forged)
        with door.caller(knocks(inside)) as caller:
            assert caller.instance_id is None


def test_reused_pid_and_namespace(door: Door) -> None:
    """A container died unnoticed; the next one got its very PID and namespace number, and is not taken for it."""
    # Others on this machine make namespaces too. If one of those has got the number, it is not to be had again.
    for number in range(200):
        if number % 5 == 0:
            first = BareInit(door.path)
            registered = namespaces.examine(first.pid)
            first.end()
        second = BareInit(door.path, registered.pid)
        found = namespaces.examine(second.pid)
        if (found.pid, found.namespace) == (registered.pid, registered.namespace):
            break
        second.end()
    else:
        pytest.fail("the kernel did not hand out the same numbers again")
    # Time is counted in ticks of 10 ms; that it differs is what tells the two apart.
    assert found.start_time != registered.start_time
    register(door, registered)
    with door.caller(second.knock) as caller:
        assert caller.instance_id is None
    second.end()


def test_end_is_noticed(door: Door) -> None:
    """What was recognised knows at once when the instance's init has ended."""
    with Container([(door.directory, "/dev/incus")]) as container:
        register(door, namespaces.examine(container.pid))
        with door.caller(knocks(container)) as caller:
            assert caller.init
            assert caller.init.alive()
        container.kill()
        assert not caller.init.alive()


def test_many_inits_are_let_go(door: Door) -> None:
    """An identifier that has seen many instances come and go holds descriptors of the living alone."""
    before = len(os.listdir("/proc/self/fd"))
    for _round in range(140):
        init = BareInit(door.path)
        identifier = door.identifier
        identifier._registrations = Registered(i=namespaces.examine(init.pid))
        with door.caller(init.knock) as caller:
            assert caller.instance_id == 1
        del caller
        init.end()
    assert len(os.listdir("/proc/self/fd")) - before < 80


class Ending(LiveInit):
    """An init that lives as long as is said."""

    __slots__ = ("living",)

    def __init__(self, number: int) -> None:
        self.init = Init(number, 1, "boot", number)
        self.living = True

    def __del__(self) -> None:
        """There is nothing to close."""

    def alive(self) -> bool:
        """As was said."""
        return self.living


def test_known_inits_grow_with_the_living() -> None:
    """Those that have ended are let go when there are 64, and then whenever there are twice as many as lived then."""
    known = LiveInits()
    inits = [Ending(number) for number in range(300)]
    for one in inits[:64]:
        known.add(one)
    assert len(known) == 64
    for one in inits[4:64]:
        one.living = False
    known.add(inits[64])
    assert len(known) == 5
    # Few lived, so again it is 64; all of these live, so next it is twice that.
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


def test_pidfds_are_used_where_there_are_any(door: Door, inside: Container) -> None:
    """Unless it is told not to, an identifier asks for the pidfd of who connects, and then needs no start time."""
    kernel = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    by_pidfd = door.identifier._pidfd and kernel >= (6, 5)
    if by_pidfd:
        door.identifier = Identifier(door.identifier._registrations)
    with door.caller(knocks(inside)) as caller:
        assert caller.instance_id == 1
        assert caller.started == (None if by_pidfd else namespaces.start_time(caller.credentials.pid))


@pytest.mark.parametrize(
    ("pid", "pidfd", "seen"), [(0, True, False), (0, False, False), (-1, True, False), (1, True, True)]
)
def test_process_that_cannot_be_seen(monkeypatch: pytest.MonkeyPatch, pid: int, pidfd: bool, seen: bool) -> None:
    """A caller from outside of what can be seen from here has PID 0: it is nobody, whatever its pidfd says."""
    # So that the namespace that we are in counts as a container.
    monkeypatch.setattr(namespaces, "own_namespace", lambda: 1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        caller = Identifier(Registered(), pidfd=pidfd).identify(ours, Credentials(pid, 0, 0))
        assert (caller.instance_id, caller.container is not None) == (None, seen)


def test_descriptors_are_closed(door: Door, inside: Container) -> None:
    """Whoever comes, known or not, from however deep, and is confirmed or not: nothing is left open but known inits."""
    unknown = Registered()
    registered = Registered(i=namespaces.examine(inside.pid))
    old = Registered(i=replace(namespaces.examine(inside.pid), root_uid=None, user_namespace=None))
    forged = Registered(i=replace(namespaces.examine(inside.pid), start_time=1))
    ended = Registered(i=replace(namespaces.examine(inside.pid), pid=2**22))
    before = len(os.listdir("/proc/self/fd"))
    for registrations in (unknown, registered, old, forged, ended):
        for become in ([], ["pidns"]):
            identifiers = [Identifier(registrations, pidfd=door.identifier._pidfd) for _number in range(5)]
            for door.identifier in identifiers:
                with door.caller(knocks(inside, become=become), confirm=True):
                    pass
            door.identifier = Identifier(unknown)
            del identifiers
            assert len(os.listdir("/proc/self/fd")) == before


def test_init_is_looked_at_once(door: Door, inside: Container) -> None:
    """The callers of an instance share the init that was seen alive."""
    with door.caller(knocks(inside)) as first:
        assert first.init is not None
    with door.caller(knocks(inside, become=["uid:1000"])) as second:
        assert first.init is second.init


def test_process_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without CAP_SYS_PTRACE nobody is recognised, and the operator is told why."""

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
