"""Network interfaces of another network namespace, as the kernel reports them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from guestapi.sources.netlink import Netlink, NetlinkError, nics

pytestmark = pytest.mark.root


@contextmanager
def namespace(*commands: str) -> Iterator[int]:
    """A process in a network namespace of its own.

    In commands, which run on the host, ``PID`` is replaced by its PID.
    """
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 100"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            for command in commands:
                subprocess.run(command.replace("PID", str(process.pid)).split(), check=True)
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def bridge() -> Iterator[str]:
    """A bridge on this host."""
    name = f"gapi{os.getpid() % 100_000}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    yield name
    subprocess.run(["ip", "link", "delete", name], check=True)


def test_every_kind(bridge: str) -> None:
    """Names and addresses are those in the namespace; the host's side gives parent and host_name."""
    host = f"{bridge}v"
    with namespace(
        f"ip link add {host} type veth peer name inside netns PID",
        f"ip link set {host} master {bridge}",
        "nsenter -t PID -n ip link set inside name lan0 address 00:16:3e:00:00:01 mtu 1400",
        f"ip link add mac0 link {bridge} netns PID type macvlan",
        "nsenter -t PID -n ip link add own0 type bridge",
        "ip link add pair0 netns PID type veth peer name pair1 netns PID",
    ) as pid:
        found = nics(pid)
        assert found["lan0"] == {
            "type": "nic",
            "name": "lan0",
            "nictype": "bridged",
            "hwaddr": "00:16:3e:00:00:01",
            "mtu": "1400",
            "parent": bridge,
            "host_name": host,
        }
        kinds = {name: (one["nictype"], one.get("parent")) for name, one in found.items() if name != "lan0"}
        # Both ends of the last pair are inside, so neither of them is the host's link with the same number.
        assert kinds == {
            "mac0": ("macvlan", bridge),
            "own0": ("physical", None),
            "pair0": ("p2p", None),
            "pair1": ("p2p", None),
        }
        assert not any("host_name" in found[name] for name in ("pair0", "pair1"))


def test_no_interfaces() -> None:
    """A namespace without links has no NICs, and neither has a process in the host's network namespace."""
    with namespace() as pid:
        assert nics(pid) == {}
    assert nics(os.getpid()) == {}


def test_needed_capability() -> None:
    """CAP_NET_ADMIN suffices for an unprivileged user; without it there is an error."""
    program = "import sys; from guestapi.sources.netlink import nics; print(sorted(nics(int(sys.argv[1]))))"
    with namespace("nsenter -t PID -n ip link add one type bridge") as pid:
        for capabilities, expected in (
            ("-all,+net_admin", r"\['one'\]\n"),
            ("-all", "NetlinkError: .*(not permitted|denied)"),
        ):
            sets = [f"--{one}-caps={capabilities}" for one in ("inh", "ambient")]
            sets.append(f"--bounding-set={capabilities}")
            nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *sets]
            done = subprocess.run(
                [*nobody, "/usr/bin/python3", "-c", program, str(pid)],
                capture_output=True,
                text=True,
                check=False,
                env={"PYTHONPATH": os.pathsep.join(_paths()), "PYTHONDONTWRITEBYTECODE": "1"},
            )
            assert re.search(expected, done.stdout + done.stderr)


def _paths() -> list[str]:
    """Return the directories from which guestapi and its dependencies are imported."""
    import guestapi

    return [os.path.dirname(os.path.dirname(guestapi.__file__))]


def test_no_such_process() -> None:
    """A process that does not exist is an error."""
    netlink = Netlink()
    try:
        with pytest.raises(NetlinkError, match="network namespace of process"):
            netlink.namespace(1 << 22)
    finally:
        netlink.close()
