"""Virtual machines in the machine, over vsock(7) as the kernel has it: two that run at once, beside LXC containers.

They are started, and registered, with the commands of docs/virtual-machines.md for QEMU.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from guestapi.relay.loop import MOST_OF_ONE
from tests.harness.waiting import until
from tests.machine import guests, nested
from tests.machine.nested import Nested
from tests.machine.virtual import VirtualMachine

pytestmark = [pytest.mark.root, pytest.mark.timeout(3600)]

INSIDE = Path(__file__).with_name("inside")
NAMES = ("vm1", "vm2", "vm3")
CIDS = {"vm1": 42, "vm2": 43}
MIB = 1 << 20

#: Prints what becomes of binding to the CID that is the first argument.
_BIND = """python3 -c '
import socket, sys
try: socket.socket(socket.AF_VSOCK).bind((int(sys.argv[1]), 8444))
except OSError as error: print(error.strerror)
else: print("bound")
' """
#: Prints the response to a request of the host itself, over the loopback.
_LOOPBACK = """
modprobe vsock_loopback
printf 'GET /1.0/config/user.role HTTP/1.0\\r\\n\\r\\n' | socat -t60 - VSOCK-CONNECT:1:8444
"""
#: The command of docs/virtual-machines.md, at another path than the agent's.
_SOCAT = """
mkdir -p /tmp/socat
setsid socat UNIX-LISTEN:/tmp/socat/sock,fork,mode=0600 VSOCK-CONNECT:2:8444 >/dev/null 2>&1 </dev/null &
until [ -S /tmp/socat/sock ]; do sleep 0.1; done
"""
#: {}: the last event that is known. Prints those that follow, one a line.
_STREAM = "curl -sN --unix-socket /dev/incus/sock 'http://x/1.0/events?since={}'"
#: $1: the file. It begins as a file of gzip does (RFC 1952). Prints its fingerprint.
_IMAGE = """
{ printf '\\037\\213'; head -c 67108864 /dev/urandom; } >"$1"
guestapi image import "$1" --public
rm "$1"
"""


@dataclass(frozen=True)
class Times:
    """What measure.py prints: seconds, and what was no right answer."""

    requests: int
    failures: list[str]
    seconds: float
    p50: float
    p99: float


@pytest.fixture(scope="module")
def host(vsock_host: VirtualMachine) -> VirtualMachine:
    """The machine with instances for virtual machines."""
    for name in NAMES:
        vsock_host.run(
            "guestapi", "instance", "add", name, "--type", "virtual-machine", "--config", f"user.role=role of {name}"
        )
    return vsock_host


@pytest.fixture(scope="module")
def both(host: VirtualMachine) -> Iterator[dict[str, Nested]]:
    """Two virtual machines, registered, with the agent."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(nested.started(host, name, cid)) for name, cid in CIDS.items()}
        for one in found.values():
            one.register()
        for one in found.values():
            one.wait()
            one.start_agent()
        yield found


@pytest.mark.parametrize("name", CIDS)
def test_own_configuration(both: dict[str, Nested], name: str) -> None:
    """Each machine is answered about its own instance, in both dialects, and only its root is."""
    one = both[name]
    assert one.ask("/1.0/config/user.role") == (200, f"role of {name}")
    assert one.ask("/1.0/config/user.role", "/dev/lxd/sock") == (200, f"role of {name}")
    assert json.loads(one.ask("/1.0")[1])["instance_type"] == "virtual-machine"
    assert f"local-hostname: {name}" in one.ask("/1.0/meta-data")[1]
    url = "curl -sS -o /dev/null -w '%{http_code}' --unix-socket /dev/incus/sock http://x/1.0"
    assert one.run(f"setpriv --reuid=1000 --clear-groups {url}") == "401"


def test_socat(both: dict[str, Nested]) -> None:
    """The line of docs/virtual-machines.md does for root what the agent does, and lets no other user connect."""
    one = both["vm2"]
    one.run(_SOCAT)
    assert one.ask("/1.0/config/user.role", "/tmp/socat/sock") == (200, "role of vm2")
    url = "curl -sS -o /dev/null -w '%{exitcode}' --unix-socket /tmp/socat/sock http://x/1.0 2>/dev/null || true"
    # curl(1), EXIT CODES: 7, failed to connect to host.
    assert [one.run(f"{user}{url}") for user in ("", "setpriv --reuid=1000 --clear-groups ")] == ["0", "7"]


def test_what_the_operator_sees(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """The list shows both as running, and `guestapi check` finds nothing wrong."""
    listed = host.run("guestapi", "instance", "list", "--format", "csv", "--columns", "nts").stdout.splitlines()
    assert {f"{name},virtual-machine,running" for name in CIDS} <= set(listed)
    done = host.run("guestapi", "check", check=False)
    assert done.returncode == 0, done.stdout
    assert "ok   relay: 3 virtual machines known, 2 running; guestapi-vsock.socket is active" in done.stdout


def test_nobody_has_anothers_cid(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """Neither a machine nor the host can use another one's CID, nor can a second machine have it."""
    assert both["vm1"].run(_BIND + "43") == "Cannot assign requested address\n"
    assert host.script(_BIND + "43") == "Cannot assign requested address\n"
    with pytest.raises(AssertionError, match="unable to set guest cid"), nested.started(host, "vm3", CIDS["vm2"]):
        pass
    refused = host.run(
        "guestapi", "instance", "register", "vm3", "--cid", "43", "--pid", str(both["vm1"].pid), check=False
    )
    assert "has CID 42, not 43" in refused.stderr


def test_the_host_itself_is_nobody(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """A program of the host, whose CID is 1, is an unknown caller, and no instance can be registered with that CID."""
    response = host.script(_LOOPBACK)
    assert " 500 " in response.splitlines()[0]
    assert "role" not in response
    refused = host.run(
        "guestapi", "instance", "register", "vm3", "--cid", "1", "--pid", str(both["vm1"].pid), check=False
    )
    assert "CID 1 belongs to no virtual machine" in refused.stderr


def test_containers_at_the_same_time(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """Containers and machines ask at the same time, and each is answered about itself."""
    host.script("lxc-info -q -s -n web1 | grep -q RUNNING || lxc-start -n web1")
    for one in both.values():
        one.put(INSIDE / "measure.py", "/tmp/measure.py")
    with guests.load(host, "web1") as load:
        found = [_measuring(one, 10) for one in both.values()]
        measured = [_measured(process) for process in found]
    assert load.failures == ()
    # Each of its threads begins with one.
    assert load.requests >= 4
    for times in measured:
        assert times.failures == []


def test_vsock_beside_a_unix_socket(
    host: VirtualMachine, both: dict[str, Nested], record_property: Callable[[str, object], None]
) -> None:
    """A machine alone is answered each time, and so is a container alone; how fast, is recorded: one run has both."""
    host.script("lxc-info -q -s -n web1 | grep -q RUNNING || lxc-start -n web1")
    host.put(INSIDE / "measure.py", "/var/lib/lxc/web1/rootfs/measure.py")
    both["vm1"].put(INSIDE / "measure.py", "/tmp/measure.py")
    words = ("lxc-attach", "--clear-env", "-n", "web1", "--", "/usr/bin/python3", "/measure.py", "100", "role of web1")
    container = Times(**json.loads(host.run(*words).stdout))
    machine = _measured(_measuring(both["vm1"], 100))
    record_property("a container over a Unix socket, a machine over vsock", str((container, machine)))
    for times in (container, machine):
        assert times.failures == []


def test_events(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """A machine is told of a change at once, and after a break of what it has missed, and of nothing of the other's."""
    one = both["vm1"]
    stream = one.spawn(_STREAM.format(0))
    assert stream.stdout is not None
    host.run("guestapi", "config", "set", "vm2", "user.mood=other")
    host.run("guestapi", "config", "set", "vm1", "user.mood=fine")
    told = json.loads(stream.stdout.readline())
    assert (told["metadata"]["key"], told["metadata"]["value"]) == ("user.mood", "fine")
    one.run("pkill curl")
    stream.communicate()
    for name, mood in (("vm1", "bad"), ("vm2", "same"), ("vm1", "better")):
        host.run("guestapi", "config", "set", name, f"user.mood={mood}")
    resumed = one.spawn(_STREAM.format(told["id"]))
    assert resumed.stdout is not None
    events = [json.loads(resumed.stdout.readline()) for _ in range(2)]
    assert [event["metadata"]["value"] for event in events] == ["bad", "better"]
    one.run("pkill curl")
    resumed.communicate()


def test_both_ways(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """The agent forwards in both directions: after a half-close, a body that is waited for, a WebSocket's frames."""
    one = both["vm2"]
    one.put(INSIDE / "both_ways.py", "/tmp/both_ways.py")
    half_closed, continued, (status, pong, closed) = json.loads(
        one.run("python3 /tmp/both_ways.py /1.0/config/user.role")
    )
    assert half_closed == "role of vm2"
    assert continued == ["HTTP/1.1 100 Continue", "HTTP/1.1 200 OK"]
    assert (status, closed) == ("101", "880203e8")
    # The server's own ping comes before.
    assert pong.endswith("8a026869")
    assert "vm2,Ready" in host.run("guestapi", "instance", "list", "--format", "csv", "--columns", "nr").stdout


def test_restart_of_the_host(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """While the host's service restarts, each request of a machine is answered; after the relay has, too."""
    for one in both.values():
        one.put(INSIDE / "measure.py", "/tmp/measure.py")
    found = [_measuring(one, 100) for one in both.values()]
    host.run("systemctl", "restart", "guestapi.service")
    for process in found:
        assert _measured(process).failures == []
    host.run("systemctl", "restart", "guestapi-vsock.service")
    for name, one in both.items():
        assert one.ask("/1.0/config/user.role") == (200, f"role of {name}")


def test_image(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """An image of 64 MiB arrives whole."""
    fingerprint = host.script(_IMAGE, "/var/tmp/image.tar.gz").split()[-1]
    host.run("guestapi", "config", "set", "vm1", "security.guestapi.images=true")
    url = f"http://x/1.0/images/{fingerprint}/export"
    summed = both["vm1"].run(f"curl -sS --unix-socket /dev/incus/sock {url} | sha256sum", timeout=600)
    assert summed.split()[0] == fingerprint
    assert len(fingerprint) == len(hashlib.sha256().hexdigest())
    host.run("guestapi", "image", "remove", fingerprint)


def test_flood(host: VirtualMachine, both: dict[str, Nested], record_property: Callable[[str, object], None]) -> None:
    """While one machine connects as fast as it can, past its agent, each request of the other is answered.

    How long that takes is recorded: an emulated processor says nothing of it that could fail a test.
    """
    attacker, victim = both["vm1"], both["vm2"]
    attacker.put(INSIDE / "vsock_flood.py", "/tmp/vsock_flood.py")
    victim.put(INSIDE / "measure.py", "/tmp/measure.py")
    quiet = _measured(_measuring(victim, 30))
    # More than wait in the relay, however slow the processor is.
    flood = attacker.spawn(f"python3 /tmp/vsock_flood.py {MOST_OF_ONE + 1} /tmp/enough")
    assert flood.stdout is not None
    assert flood.stdout.readline() == "many\n"
    beside = _measured(_measuring(victim, 30))
    attacker.run("touch /tmp/enough")
    flood.communicate(timeout=300)
    record_property("seconds without and beside a flood", str((quiet, beside)))
    assert beside.failures == []


def test_a_cid_that_another_machine_gets(host: VirtualMachine, both: dict[str, Nested]) -> None:
    """A machine that is killed is dead at once; who gets its CID gets nothing of it, and its own once registered."""
    old = both["vm1"]
    # On an emulated processor, the connections of the flood above end some time after it.
    until(lambda: old.ask("/1.0/config/user.role") == (200, "role of vm1"), "the flood's connections end", pause=0.5)
    old.end()
    with nested.started(host, "vm3", old.cid) as new:
        assert guests.statuses(host)["vm1"] == "dead"
        new.wait()
        new.start_agent()
        assert new.ask("/1.0/config/user.role") == (500, "pid not in container?\n")
        new.register()
        assert new.ask("/1.0/config/user.role") == (200, "role of vm3")
        assert new.ask("/1.0/config/user.mood")[0] == 404
        assert both["vm2"].ask("/1.0/config/user.role") == (200, "role of vm2")
    assert guests.statuses(host)["vm3"] == "dead"


def _measuring(one: Nested, requests: int) -> subprocess.Popen[str]:
    return one.spawn(f"python3 /tmp/measure.py {requests} 'role of {one.name}'")


def _measured(process: subprocess.Popen[str]) -> Times:
    output, _ = process.communicate(timeout=600)
    return Times(**json.loads(output.rpartition("exit ")[0]))
