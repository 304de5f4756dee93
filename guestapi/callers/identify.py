"""A connected socket -> the instance that it was connected from.

The kernel reuses PIDs and inode numbers of namespaces, so the store's record is only a hint. An instance is recognised
when its init, the very process that was registered (PID, start time, boot), is alive *now* in the PID namespace of the
caller or in one around it. The namespace is held open meanwhile, so that its number cannot be reused during the check.

Root inside is the user that was recorded when the init was registered, with the user namespace that owns the init's PID
namespace. The init's own ID map proves nothing: a hostile init can enter another user namespace, which has another map.

A virtual machine is recognised by its CID, which the kernel names, while the VMM that was registered with that CID is
alive and has its vsock device open (`callers.machines`).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from typing import NamedTuple, Protocol

from guestapi.callers import machines, namespaces
from guestapi.callers.credentials import Credentials, peer_pidfd
from guestapi.callers.processes import KnownProcesses
from guestapi.model import Init, is_hybrid, vsock_place

log = logging.getLogger(__name__)

#: When more inits than this are remembered, those that have ended are removed.
_FEW_INITS = 64


class Registrations(Protocol):
    """Look-up of registered inits; `store.reading.Reader` implements it."""

    def running_in(self, namespace: int) -> list[tuple[int, int, Init]]:
        """Return id, run and init of the instances that are registered with this PID namespace's inode number."""
        ...


class LiveInit:
    """The init of an instance, with a pidfd that shows when it ends."""

    __slots__ = ("__weakref__", "_pidfd", "_poll", "_users", "init", "root_uid")

    def __init__(self, init: Init, pidfd: int, root_uid: int | None) -> None:
        self._pidfd = pidfd
        # PERF: one poll object for all requests (0.4 µs instead of 0.9).
        self._poll = select.poll()
        self._poll.register(pidfd, select.POLLIN)
        self._users: namespaces.IdMap | None = None
        self.init = init
        self.root_uid = root_uid

    def users(self, caller: int) -> namespaces.IdMap:
        """Which users of ours the users inside are; nobody as long as that cannot be told.

        Args:
            caller: PID of a process that may be in the user namespace of the instance.
        """
        if self._users is None:
            owner = self.init.user_namespace
            for pid in (self.init.pid, caller):
                try:
                    found = None if owner is None else namespaces.id_map(pid, owner)
                except OSError:
                    continue
                if found and self.alive():
                    # As long as the init is alive, nobody else has the number of its user namespace, and a map is
                    # written once (user_namespaces(7)).
                    self._users = found
                    break
        return self._users or ()

    def __del__(self) -> None:
        os.close(self._pidfd)

    def alive(self) -> bool:
        """Whether it still runs, as the kernel says now: the pidfd of an ended process is readable (pidfd_open(2))."""
        return not self._poll.poll(0)


class LiveMachine(LiveInit):
    """The VMM of a virtual machine. One with a CID is alive as long as it holds that: see `callers.machines`."""

    __slots__ = ("_open_file",)

    def __init__(self, init: Init, pidfd: int, open_file: int | None) -> None:
        super().__init__(init, pidfd, 0)
        self._open_file = open_file

    def users(self, caller: int) -> namespaces.IdMap:
        """As `LiveInit.users`. Nobody but its root is known of a virtual machine."""
        return ((0, 0, 1),)

    def alive(self) -> bool:
        """Whether it still runs and, if it has a CID, holds it."""
        # In this order: what was seen is of this very process if it is still alive afterwards.
        holds = self._open_file is None or machines.holds_vsock(self.init.pid, self._open_file)
        return holds and super().alive()

    def check(self) -> None:
        """Make sure that what is sent to its CID reaches this virtual machine.

        Raises:
            ConnectionResetError: another one may have the CID.
        """
        if not self.alive():
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class Caller(NamedTuple):
    """The process at the other end of a connection, for as long as the connection lasts.

    Attributes:
        credentials: those that the kernel recorded at connect(2).
        instance_id, run: the instance, in the run in which it was recognised. None, 0: no known instance.
        init: the init that proves it; None if there is no instance.
        started: the calling process's start time, on kernels where only /proc shows that a PID was reused.
        container: inode number of the outermost PID namespace around it that is not the service's own. It stands for
            the container, registered or not; `model.vsock_place` of its CID stands for a virtual machine. None: a
            process of the host, or a process that cannot be examined.
    """

    credentials: Credentials
    instance_id: int | None = None
    run: int = 0
    init: LiveInit | None = None
    started: int | None = None
    container: int | None = None

    @property
    def is_root(self) -> bool:
        """Whether the caller was the instance's root when it connected."""
        return self.init is not None and self.init.root_uid == self.credentials.uid

    @property
    def uid_inside(self) -> int | None:
        """The caller's user as the instance numbers it; None if that cannot be told."""
        if self.init is None:
            return None
        uid = self.credentials.uid
        for inside, outside, count in self.init.users(self.credentials.pid):
            if outside <= uid < outside + count:
                return inside + uid - outside
        return None


class Identifier:
    """Identifies callers for one worker."""

    def __init__(self, registrations: Registrations, *, pidfd: bool = True) -> None:
        """Identify nobody yet.

        Args:
            registrations: where instances are looked up.
            pidfd: whether to use SO_PEERPIDFD and the pidfd ioctl where the kernel has them, or /proc alone.
        """
        self._registrations = registrations
        self._pidfd = pidfd
        self._inits = LiveInits()
        self._processes = KnownProcesses()

    def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
        """Identify the process that connected. Call it once, right after accept.

        Args:
            connection: the accepted socket.
            who: its `credentials`.

        Raises:
            StoreError: the instances cannot be looked up now.
        """
        try:
            if who.cid is not None:
                return self._recognise_machine(connection, who, who.cid)
            pidfd = peer_pidfd(connection) if self._pidfd else None
            try:
                return self._recognise(who, pidfd)
            finally:
                if pidfd is not None:
                    os.close(pidfd)
        except ProcessLookupError:
            return Caller(who)
        except PermissionError:
            log.error("process %d cannot be looked at: the service needs CAP_SYS_PTRACE", who.pid)
            return Caller(who)

    def find_container(self, connection: socket.SocketType, who: Credentials) -> int:
        """Find the container that a connection is from. This is cheaper than `identify`, and proves nothing.

        Args:
            connection: the accepted socket.
            who: its `credentials`.

        Returns:
            The inode number, as in `Caller.container`; 0 for a process of the host, and for a process that has ended or
            cannot be examined.
        """
        if who.cid is not None:
            return vsock_place(who.cid)
        try:
            pidfd = peer_pidfd(connection) if self._pidfd else None
            try:
                if pidfd is not None and (known := self._processes.get(pidfd)):
                    return known
                namespace = namespaces.open_namespace(who.pid, pidfd, by_ioctl=self._pidfd)
            finally:
                if pidfd is not None:
                    os.close(pidfd)
        except OSError:
            return 0
        container = 0
        try:
            while (number := namespaces.inode(namespace)) != namespaces.own_namespace():
                container = number
                around = namespaces.open_parent(namespace)
                if around is None:
                    break
                os.close(namespace)
                namespace = around
        except OSError:
            pass
        finally:
            os.close(namespace)
        return container

    def confirm(self, connection: socket.SocketType, caller: Caller) -> Caller:
        """Return the caller for the first request: the same if the process that connected still runs, else unknown.

        When that process has ended, any other process may hold its socket. Incus, too, gives no answer then.
        """
        if caller.instance_id is None:
            return caller
        if isinstance(caller.init, LiveMachine):
            return caller if caller.init.alive() else Caller(caller.credentials)
        try:
            if caller.started is not None:
                if namespaces.start_time(caller.credentials.pid) == caller.started:
                    return caller
            elif pidfd := peer_pidfd(connection):
                try:
                    if not namespaces.is_gone(pidfd):
                        return caller
                finally:
                    os.close(pidfd)
        except ProcessLookupError:
            pass
        return Caller(caller.credentials)

    def _recognise(self, who: Credentials, pidfd: int | None) -> Caller:
        if who.pid <= 0:
            return Caller(who)
        if pidfd is not None and (again := self._recognise_again(who, pidfd)):
            return again
        started = namespaces.start_time(who.pid) if pidfd is None else None
        namespace = namespaces.open_namespace(who.pid, pidfd, by_ioctl=self._pidfd)
        try:
            container: int | None = None
            # The kernel nests no more than 32 of them (include/linux/pid_namespace.h, MAX_PID_NS_LEVEL).
            while (number := namespaces.inode(namespace)) != namespaces.own_namespace():
                innermost, container = container is None, number
                for instance_id, run, init in self._registrations.running_in(number):
                    if live := self._live(init, namespace, who.pid):
                        if innermost and pidfd is not None:
                            self._processes.add(pidfd, number)
                        return Caller(who, instance_id, run, live, started, container)
                around = namespaces.open_parent(namespace)
                if around is None:
                    break
                os.close(namespace)
                namespace = around
        finally:
            os.close(namespace)
        return Caller(who, container=container)

    def _recognise_again(self, who: Credentials, pidfd: int) -> Caller | None:
        """Recognise a process that was recognised before, with half of the system calls; None if that is not enough."""
        namespace = self._processes.get(pidfd)
        if namespace is None:
            return None
        for instance_id, run, init in self._registrations.running_in(namespace):
            live = self._inits.get(init)
            # The caller is looked at last: if it is alive, the number was that of its namespace all the time.
            if live is not None and not namespaces.is_gone(pidfd):
                return Caller(who, instance_id, run, live, None, namespace)
        return None

    def _recognise_machine(self, connection: socket.SocketType, who: Credentials, cid: int) -> Caller:
        """Recognise the virtual machine that holds a CID now, or whose VMM has connected."""
        if is_hybrid(cid):
            pidfd = peer_pidfd(connection)
            if pidfd is not None:
                gone = namespaces.is_gone(pidfd)
                os.close(pidfd)
                if gone:
                    # Its PID may be that of a registered VMM by now.
                    return Caller(who)
        elif not machines.LEAST_CID <= cid <= machines.MOST_CID:
            return Caller(who)
        place = vsock_place(cid)
        for instance_id, run, init in self._registrations.running_in(place):
            live = self._inits.get(init) or self._look_at_machine(init)
            if live is not None:
                self._inits.add(live)
                return Caller(Credentials(init.pid, 0, 0), instance_id, run, live, None, place)
        return Caller(who, container=place)

    def _look_at_machine(self, init: Init) -> LiveMachine | None:
        """Return a VMM that is registered, if it is alive and, if it has a CID, holds it."""
        if init.boot_id != namespaces.boot_id() or (init.cid is not None and init.user_namespace is None):
            return None
        try:
            pidfd = os.pidfd_open(init.pid)
        except OSError:
            return None
        live = LiveMachine(init, pidfd, init.user_namespace)
        try:
            same = namespaces.start_time(init.pid) == init.start_time
        except ProcessLookupError:
            return None
        return live if same and live.alive() else None

    def _live(self, init: Init, namespace: int, caller: int) -> LiveInit | None:
        """Return the init that is registered with an open PID namespace, if alive there. `caller` is in it or below."""
        known = self._inits.get(init)
        if known is None:
            known = self._look(init, namespace, caller)
            if known is None:
                return None
            # An ID map is written once, perhaps after the first connection. So its absence is not cached.
            if known.root_uid is not None:
                self._inits.add(known)
        return known

    def _look(self, init: Init, namespace: int, caller: int) -> LiveInit | None:
        if init.boot_id != namespaces.boot_id():
            return None
        try:
            pidfd = os.pidfd_open(init.pid)
        except OSError:
            return None
        try:
            started = namespaces.start_time(init.pid)
            own = namespaces.open_namespace(init.pid, pidfd, by_ioctl=self._pidfd)
            number = namespaces.inode(own)
            # Closed before the next is opened: a worker that is short of descriptors needs no more than four here.
            os.close(own)
            if number != namespaces.inode(namespace):
                raise ProcessLookupError(errno.ESRCH, "it is in another PID namespace than was registered")
            live = LiveInit(init, pidfd, _root_uid(init, namespace, caller))
        except BaseException as error:
            os.close(pidfd)
            if isinstance(error, ProcessLookupError):
                return None
            raise
        # The process is still alive, so every look before was at the process of the pidfd.
        return live if started == init.start_time and live.alive() else None


class ContainerLook:
    """Finds the container of a connection, once: it may be asked for when it is accepted, and again when it waits."""

    __slots__ = ("_connection", "_found", "_identifier", "_who")

    def __init__(self, identifier: Identifier, connection: socket.SocketType, who: Credentials) -> None:
        self._identifier = identifier
        self._connection = connection
        self._who = who
        self._found: int | None = None

    def __call__(self) -> int:
        """As `Identifier.find_container`."""
        if self._found is None:
            self._found = self._identifier.find_container(self._connection, self._who)
        return self._found


class LiveInits:
    """The inits that were seen alive. Those that have ended are removed from time to time."""

    def __init__(self) -> None:
        self._inits: dict[tuple[int, int], LiveInit] = {}
        self._most = _FEW_INITS

    def get(self, init: Init) -> LiveInit | None:
        """Return the process of `init`, if it is remembered and still alive."""
        live = self._inits.get((init.pid, init.start_time))
        # PERF: as a rule, both are the same object.
        return live if live is not None and (live.init is init or live.init == init) and live.alive() else None

    def add(self, live: LiveInit) -> None:
        """Remember an init."""
        if len(self._inits) >= self._most:
            self._inits = {key: other for key, other in self._inits.items() if other.alive()}
            self._most = max(_FEW_INITS, 2 * len(self._inits))
        self._inits[live.init.pid, live.init.start_time] = live

    def __len__(self) -> int:
        return len(self._inits)


def _root_uid(init: Init, namespace: int, caller: int) -> int | None:
    """Return the user who is root in the container of `init`; `namespace` is its open PID namespace. None: nobody."""
    if init.root_uid is not None:
        owner = namespaces.open_owner(namespace)
        if owner is not None:
            try:
                if namespaces.inode(owner) == init.user_namespace:
                    return init.root_uid
            finally:
                os.close(owner)
    # Not recorded, for example by version 0.1. The service may not enter the owner of the PID namespace, but
    # init is in it as a rule, and so is a caller that is root there.
    return namespaces.find_root(namespace, (init.pid, caller))[0]
