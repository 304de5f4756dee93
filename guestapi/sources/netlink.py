"""Network interfaces of another network namespace, asked of the kernel by rtnetlink(7) without entering it.

Needs CAP_NET_ADMIN and nothing else. ``RTM_NEWNSID`` gives the namespace of a process a number in ours, and
``RTM_GETLINK`` with ``IFLA_TARGET_NETNSID`` lists its links. The number is gone when that namespace is.

A container's root can rename its links and change their addresses at any time. So links are as the runtime made them
only before the init runs; later the guest may have chosen them.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from guestapi.errors import SourceError
from guestapi.model import Device

# include/uapi/linux/rtnetlink.h and netlink.h.
_RTM_GETLINK, _RTM_NEWNSID, _RTM_GETNSID = 18, 88, 90
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x4, 0x300, 0x10
# include/uapi/linux/net_namespace.h. NSID -1: in a request, let the kernel choose; in an answer, none yet.
_NETNSA_NSID, _NETNSA_PID, _NO_NSID = 1, 2, -1
# include/uapi/linux/if_link.h.
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 1, 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_LINK_NETNSID, _IFLA_TARGET_NETNSID = 18, 37, 46
_IFLA_INFO_KIND = 1
#: include/uapi/linux/if_arp.h: the type of a loopback device.
_ARPHRD_LOOPBACK = 772
#: The upper bits of an attribute's type are flags (NLA_F_NESTED, NLA_F_NET_BYTEORDER).
_NLA_TYPE = 0x3FFF

_HEADER = struct.Struct("=IHHII")
#: struct ifinfomsg: family, padding, type, index, flags, change.
_IFINFO = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")

#: Seconds for all answers of the kernel, which take less than a millisecond.
_SECONDS = 1.0
#: The kernel sends a dump in messages of at most 32 KiB (net/netlink/af_netlink.c, netlink_recvmsg).
_RECEIVE = 1 << 16
#: Most bytes of a dump: about a kilobyte for each link, so enough for 16,000 links.
_DUMP_BYTES = 16 << 20
#: How often a dump is repeated that a change has interrupted.
_TRIES = 5

#: ``nictype`` of a device by the kind of its link. A link without a kind is a moved host device.
_NIC_TYPES = {"macvlan": "macvlan", "macvtap": "macvlan", "ipvlan": "ipvlan"}
#: Links that the kernel makes in every new network namespace if their modules are loaded (sysctl/net.rst,
#: fb_tunnels_only_for_init_net).
_FALLBACK = {"tunl0", "sit0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip6gre0", "ip_vti0", "ip6_vti0"}


class NetlinkError(SourceError):
    """The kernel could not be asked about network interfaces."""


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface (rtnetlink(7), RTM_GETLINK).

    Attributes:
        index: its number in its namespace.
        name: its name there.
        loopback: whether it is the namespace's ``lo``.
        address: hardware address; None if it has none.
        mtu: bytes of its largest packet; 0 if that is not known.
        kind: ``veth``, ``macvlan`` and so on; empty: a device of the machine itself.
        link: number of its peer or lower device; None if it has none.
        link_namespace: the namespace of `link`, as its number in ours; None: the link's own.
        master: number of the bridge of which it is a port; None if it is none.
    """

    index: int
    name: str
    loopback: bool
    address: str | None
    mtu: int
    kind: str
    link: int | None
    link_namespace: int | None
    master: int | None


class Netlink:
    """A socket to the kernel, bound to the network namespace in which it was made."""

    def __init__(self) -> None:
        """Open the socket.

        Raises:
            NetlinkError: the socket cannot be opened.
        """
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        except OSError as error:
            raise NetlinkError(f"rtnetlink cannot be used: {error.strerror}") from None
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def namespace(self, pid: int) -> int:
        """Return the number of a process's network namespace in ours; one is assigned if it has none.

        Args:
            pid: the process.

        Raises:
            NetlinkError: there is no such process, or CAP_NET_ADMIN is missing.
        """
        found = self._namespace(pid)
        if found == _NO_NSID:
            wanted = _attribute(_NETNSA_PID, struct.pack("=I", pid)) + _attribute(_NETNSA_NSID, struct.pack("=i", -1))
            try:
                self._ask(_RTM_NEWNSID, _NLM_F_ACK, b"\0\0\0\0" + wanted)
            except OSError as error:
                # EEXIST: another process has assigned one meanwhile.
                if error.errno != errno.EEXIST:
                    raise NetlinkError(f"the network namespace of process {pid}: {error.strerror}") from None
            found = self._namespace(pid)
        return found

    def _namespace(self, pid: int) -> int:
        try:
            answers = self._ask(_RTM_GETNSID, 0, b"\0\0\0\0" + _attribute(_NETNSA_PID, struct.pack("=I", pid)))
        except OSError as error:
            raise NetlinkError(f"the network namespace of process {pid}: {error.strerror}") from None
        for body in answers:
            number = dict(_attributes(body[4:])).get(_NETNSA_NSID)
            if number is not None:
                return int(struct.unpack("=i", number[:4])[0])
        return _NO_NSID

    def links(self, namespace: int | None = None) -> list[Link]:
        """All links of a namespace.

        Args:
            namespace: its number, of `namespace`; None: our own.

        Raises:
            NetlinkError: the kernel did not answer.
        """
        target = b"" if namespace is None else _attribute(_IFLA_TARGET_NETNSID, struct.pack("=i", namespace))
        for _ in range(_TRIES):
            try:
                answers = self._ask(_RTM_GETLINK, _NLM_F_DUMP, _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + target)
            except InterruptedError:
                continue  # Something changed during the dump.
            except OSError as error:
                raise NetlinkError(f"links cannot be listed: {error.strerror}") from None
            return [_link(body) for body in answers]
        raise NetlinkError("links change faster than they can be listed")

    def _ask(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Send a request, and return the bodies of the answers.

        Raises:
            InterruptedError: the list changed during the dump.
            OSError: the kernel refuses, or does not answer in time.
        """
        self._sequence += 1
        length = _HEADER.size + len(body)
        deadline = time.monotonic() + _SECONDS
        self._socket.settimeout(_SECONDS)
        self._socket.send(_HEADER.pack(length, kind, _NLM_F_REQUEST | flags, self._sequence, 0) + body)
        found: list[bytes] = []
        size, changed = 0, False
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            # Never empty: the kernel does not shut its end.
            data = self._socket.recv(_RECEIVE)
            size += len(data)
            if size > _DUMP_BYTES:
                raise OSError(errno.EMSGSIZE, f"more than {_DUMP_BYTES >> 20} MiB of links")
            for answer, answer_flags, sequence, content in _messages(data):
                if sequence != self._sequence:
                    continue  # An answer to an earlier request that was given up.
                changed |= bool(answer_flags & _NLM_F_DUMP_INTR)
                # A dump that fails says so at its end (net/netlink/af_netlink.c, netlink_dump_done).
                if answer in (_NLMSG_ERROR, _NLMSG_DONE) and len(content) >= 4:
                    code = -int(struct.unpack_from("=i", content)[0])
                    if code > 0:
                        raise OSError(code, os.strerror(code))
                if answer in (_NLMSG_DONE, _NLMSG_ERROR):
                    if changed:
                        raise InterruptedError
                    return found
                found.append(content)
                if not flags:
                    return found


def nics(pid: int) -> dict[str, Device]:
    """Return the network interfaces of a process's namespace as NIC devices, by their names there.

    Args:
        pid: the process. Its init must not have run yet; otherwise the guest may have chosen the result.

    Returns:
        For each link except ``lo``: type, name, nictype, and where they exist hwaddr, mtu, parent (the bridge or lower
        device on this host) and host_name (this host's end of a veth pair). Empty if the process is in our own
        namespace, whose links are the host's.

    Raises:
        NetlinkError: the kernel did not answer.
    """
    netlink = Netlink()
    try:
        namespace, ours = netlink.namespace(pid), netlink.namespace(os.getpid())
        if namespace == ours:
            return {}
        inside = [link for link in netlink.links(namespace) if not link.loopback and link.name not in _FALLBACK]
        outside = {link.index: link for link in netlink.links()} if inside else {}
    finally:
        netlink.close()
    return {link.name: _device(link, namespace, ours, outside) for link in inside}


def _device(link: Link, namespace: int, ours: int, outside: dict[int, Link]) -> Device:
    device = {"type": "nic", "name": link.name, "nictype": _NIC_TYPES.get(link.kind, "physical")}
    if link.address:
        device["hwaddr"] = link.address
    if link.mtu:
        device["mtu"] = str(link.mtu)
    lower = outside.get(link.link) if link.link is not None and link.link_namespace == ours else None
    if link.kind == "veth":
        bridge = None
        # Both ends must refer to each other; otherwise the number was reused.
        if lower is not None and (lower.link, lower.link_namespace) == (link.index, namespace):
            device["host_name"] = lower.name
            bridge = outside.get(lower.master) if lower.master is not None else None
        device["nictype"] = "bridged" if bridge is not None else "p2p"
        if bridge is not None:
            device["parent"] = bridge.name
    elif lower is not None:
        device["parent"] = lower.name
    return device


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute, until one is malformed."""
    position = 0
    while position + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if not _ATTRIBUTE.size <= length <= len(data) - position:
            return
        yield kind & _NLA_TYPE, data[position + _ATTRIBUTE.size : position + length]
        position += length + -length % 4


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield type, flags, sequence number and body of each message, until one is malformed."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, flags, sequence, _port = _HEADER.unpack_from(data, position)
        if not _HEADER.size <= length <= len(data) - position:
            return
        yield kind, flags, sequence, data[position + _HEADER.size : position + length]
        position += length + -length % 4


def _link(body: bytes) -> Link:
    _family, kind, index, _flags, _change = _IFINFO.unpack_from(body)
    found = dict(_attributes(body[_IFINFO.size :]))

    def number(attribute: int) -> int | None:
        value = found.get(attribute)
        return int.from_bytes(value[:4], sys.byteorder) if value is not None else None

    address = found.get(_IFLA_ADDRESS, b"")
    info = dict(_attributes(found.get(_IFLA_LINKINFO, b"")))
    name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0")
    namespace = found.get(_IFLA_LINK_NETNSID)
    return Link(
        index=index,
        # A link's name is any bytes but '/', ':' and blanks (net/core/dev.c, dev_valid_name).
        name=name.decode(errors="backslashreplace"),
        loopback=kind == _ARPHRD_LOOPBACK,
        address=address.hex(":") if any(address) else None,
        mtu=number(_IFLA_MTU) or 0,
        kind=info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
        link=number(_IFLA_LINK),
        link_namespace=struct.unpack("=i", namespace[:4])[0] if namespace is not None else None,
        master=number(_IFLA_MASTER),
    )
