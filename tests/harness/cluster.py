"""A cluster of three real Incus daemons, each in mount and network namespaces of its own, on a bridge between them."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from types import TracebackType

from tests.harness.daemon import Daemon
from tests.harness.kept_namespaces import KeptNamespaces

#: The network between the members, which nothing else is connected to.
_NETWORK = "10.77.0."
#: Run in a network namespace: a bridge, until it is killed.
_BRIDGE = """
ip link add br0 type bridge
ip link set br0 up
echo ready
exec sleep infinity
"""


class Member(Daemon):
    """One member.

    Attributes:
        name: in the cluster, like ``n1``.
        first: the member that it joins; None: it makes the cluster.
    """

    def __init__(self, release: str, number: int, bridge: int, first: Member | None) -> None:
        """Describe a member, without starting it.

        Args:
            release: ``incus`` or ``incus-7``.
            number: from 1 on.
            bridge: PID of a process in the network namespace of the bridge.
            first: as the attribute.
        """
        super().__init__(release)
        self.name = f"n{number}"
        self.first = first
        self._address = f"{_NETWORK}{number}"
        self._bridge = bridge
        self._port = f"guestapi{number}"
        self._connected = False

    def start(self) -> None:
        """Connect it, if it is not, and start the daemon."""
        if not self._connected:
            self._connect()
        super().start()

    def plug(self, *, connected: bool) -> None:
        """Pull the cable, or put it back."""
        state = "up" if connected else "down"
        _run("nsenter", "-t", str(self._bridge), "-n", "ip", "link", "set", self._port, state)

    def _connect(self) -> None:
        namespace = str(self._namespaces.pid)
        inside = ["nsenter", "-t", namespace, "-n", "ip"]
        _run(
            *("ip", "link", "add", self._port, "netns", str(self._bridge), "type", "veth"),
            *("peer", "name", "eth0", "netns", namespace),
        )
        enter = ["nsenter", "-t", str(self._bridge), "-n", "ip"]
        _run(*enter, "link", "set", self._port, "master", "br0", "up")
        _run(*inside, "link", "set", "lo", "up")
        _run(*inside, "address", "add", f"{self._address}/24", "dev", "eth0")
        _run(*inside, "link", "set", "eth0", "up")
        self._connected = True

    def _set_up(self) -> None:
        if self.first is None:
            super()._set_up()
            self.client("config", "set", f"core.https_address={self._address}:8443")
            self.client("cluster", "enable", self.name)
            return
        token = self.first.client("cluster", "add", self.name).split()[-1]
        joining = {"enabled": True, "server_name": self.name, "server_address": f"{self._address}:8443"}
        pool = {"entity": "storage-pool", "name": "default", "key": "source", "value": ""}
        cluster = {**joining, "cluster_token": token, "member_config": [pool]}
        # JSON is YAML, too.
        self.client("admin", "init", "--preseed", stdin=json.dumps({"cluster": cluster}))


class Cluster:
    """Three members that run. The first has an image, ``busybox``, and a profile with a root disk."""

    members: list[Member]

    def __init__(self, release: str) -> None:
        """Describe a cluster, without starting it.

        Args:
            release: ``incus`` or ``incus-7``.
        """
        self._release = release

    def __enter__(self) -> Cluster:
        self.members = []
        with ExitStack() as stack:
            bridge = KeptNamespaces(_BRIDGE, unshare=["--net"])
            stack.callback(bridge.kill)
            for number in (1, 2, 3):
                first = self.members[0] if self.members else None
                member = Member(self._release, number, bridge.pid, first)
                stack.enter_context(member)
                self.members.append(member)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
