"""A client of LXC's monitors. A monitor supervises one running container, and answers on a command socket.

The protocol is that of LXC 4 to 7 (src/lxc/commands.h there): a request has a number and optional data; an answer has a
result, the length of its data, and a word that is the result of some commands. liblxc's own client has no deadline in
version 5, and ignores answers above 8 KiB.

The sockets are abstract, so any process in the host's network namespace can bind one, even in a container that shares
the namespace. Only a process that listens as uid 0 counts as a monitor. Answers are bounded, with one deadline in all.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from guestapi.errors import SourceError

#: Commands (src/lxc/commands.h, lxc_cmd_t).
_GET_INIT_PID, _GET_CONFIG_ITEM, _GET_NAME, _GET_LXCPATH = 4, 7, 8, 9
#: struct lxc_cmd_req: cmd, datalen, data; struct lxc_cmd_rsp: ret, datalen, data. The pointers are not used.
_REQUEST = struct.Struct("@iiQ")
_ANSWER = struct.Struct("@iiQ")
_UCRED = struct.Struct("@iII")

#: Seconds for all requests of one `Monitor`, unless the caller sets others. An answer takes 0.04 ms, but a monitor
#: answers nothing while it waits for a hook.
SECONDS = 1.0
#: Most bytes of an answer. The longest true one lists a container's mounts: 13 KiB for 150 of them.
ANSWER_BYTES = 1 << 20
#: unix(7): a socket's name has 108 bytes at the most, and begins with a NUL if it is abstract.
_NAME_BYTES = 107
#: Fowler-Noll-Vo 1a with 64 bits (draft-eastlake-fnv): offset basis and prime.
_FNV_BASIS, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


class MonitorError(SourceError):
    """A monitor cannot be asked, or its answer is malformed."""


class NoMonitorError(MonitorError):
    """Nobody listens there: the container does not run."""


def address(path: str, name: str) -> bytes:
    """Return the abstract address of a container's monitor, without the NUL at its start.

    Args:
        path: the lxcpath, as LXC was given it.
        name: of the container.
    """
    plain = os.fsencode(f"{path}/{name}/command")
    if len(plain) <= _NAME_BYTES - 1:
        return plain
    return b"lxc/%016x/command" % _hash(os.fsencode(f"{path}/{name}"))


def _hash(data: bytes) -> int:
    value = _FNV_BASIS
    for byte in data:
        value = (value ^ byte) * _FNV_PRIME & 0xFFFFFFFFFFFFFFFF
    return value


class Monitor:
    """A client of one monitor. Each request has its own connection, as in liblxc; all share one deadline."""

    def __init__(self, address: bytes, seconds: float = SECONDS) -> None:
        """Address a monitor.

        Args:
            address: of its command socket, without the NUL before it.
            seconds: how long all requests may take together.
        """
        self._address = b"\0" + address
        self._where = "@" + address.decode(errors="backslashreplace")
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds

    def check(self) -> None:
        """Check whether a monitor listens there. It sends no request, so the monitor may be running a hook.

        Raises:
            NoMonitorError: no process listens there.
            MonitorError: a process listens that is not root's.
        """
        self._connect().close()

    def init_pid(self) -> int:
        """The PID of the container's init, as the host sees it.

        Raises:
            MonitorError: it cannot be asked, or its answer is not a PID.
        """
        _data, pid = self._ask(_GET_INIT_PID)
        if not 0 < pid <= 1 << 22:
            raise MonitorError(f"the LXC monitor at {self._where} says that its init is process {pid}")
        return pid

    def config_item(self, key: str) -> str | None:
        """Return a value of the running container's configuration.

        Args:
            key: as in lxc.container.conf(5).

        Returns:
            The value; a list has one line for each item. None: the key is not set, or empty.

        Raises:
            MonitorError: it cannot be asked.
        """
        data, _word = self._ask(_GET_CONFIG_ITEM, os.fsencode(key) + b"\0", may_refuse=True)
        return _text(data) or None if data is not None else None

    def name(self) -> str:
        """The container's name."""
        return self._string(_GET_NAME)

    def path(self) -> str:
        """The lxcpath that the container is in."""
        return self._string(_GET_LXCPATH)

    def _string(self, command: int) -> str:
        data, _word = self._ask(command)
        if not data or not (text := _text(data)):
            raise MonitorError(f"the LXC monitor at {self._where} does not say its name")
        return text

    def _ask(self, command: int, payload: bytes = b"", *, may_refuse: bool = False) -> tuple[bytes | None, int]:
        with self._connect() as connection:
            try:
                own = _UCRED.pack(os.getpid(), os.geteuid(), os.getegid())
                head = _REQUEST.pack(command, len(payload), 0)
                self._time_out(connection)
                connection.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, own)])
                if payload:
                    connection.sendall(payload)
                result, length, word = _ANSWER.unpack(self._receive(connection, _ANSWER.size))
                if result < 0:
                    if may_refuse:
                        return None, 0
                    raise MonitorError(f"the LXC monitor at {self._where} refuses: {_strerror(-result)}")
                if not 0 <= length <= ANSWER_BYTES:
                    raise MonitorError(f"the LXC monitor at {self._where} announces an answer of {length} bytes")
                return self._receive(connection, length), word
            except OSError as error:
                raise self._failed(error) from None

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # A full queue is EAGAIN at once.
            self._time_out(connection)
            connection.connect(self._address)
            _pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if uid != 0:
                raise MonitorError(f"user {uid} listens at {self._where}, in the place of an LXC monitor")
        except ConnectionRefusedError:
            connection.close()
            raise NoMonitorError(f"no LXC monitor listens at {self._where}") from None
        except OSError as error:
            connection.close()
            raise self._failed(error) from None
        except BaseException:
            connection.close()
            raise
        return connection

    def _receive(self, connection: socket.socket, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._time_out(connection)
            part = connection.recv(length - len(data))
            if not part:
                raise MonitorError(f"the LXC monitor at {self._where} ended in the middle of an answer")
            data += part
        return bytes(data)

    def _time_out(self, connection: socket.socket) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)

    def _failed(self, error: OSError) -> MonitorError:
        if isinstance(error, TimeoutError) or error.errno == errno.EAGAIN:
            return MonitorError(
                f"the LXC monitor at {self._where} did not answer within {self._seconds:.1f} s",
                "it waits for a hook, or hangs",
            )
        return MonitorError(f"the LXC monitor at {self._where}: {error.strerror}")


def _text(data: bytes) -> str:
    return data.rstrip(b"\0\n").decode(errors="surrogateescape")


def _strerror(number: int) -> str:
    return os.strerror(number) if number < 4096 else f"error {number}"


def listening() -> list[bytes]:
    """Return the addresses of all command sockets in this network namespace, without the NUL at their start.

    Any process may have bound them.
    """
    with open("/proc/net/unix", "rb") as file:
        lines = file.read().splitlines()[1:]
    found: dict[bytes, None] = {}
    for line in lines:
        # proc_net(5): address, reference count, protocol, flags, type, state, inode, path; a blank is as it is.
        fields = line.split(None, 7)
        # __SO_ACCEPTCON (include/linux/net.h): it listens.
        if len(fields) == 8 and int(fields[3], 16) & 0x10000 and fields[7].startswith(b"@"):
            name = fields[7][1:]
            if name.endswith(b"/command"):
                found[name] = None
    return list(found)
