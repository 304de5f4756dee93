"""Limits, tokens of identity and the log hold for a virtual machine as for a container."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import jwt
import pytest

from tests.harness.service import USER, Service
from tests.harness.signing import SigningProcess
from tests.harness.vmm import FakeVsock, Vmm, relaying
from tests.harness.waiting import TIMEOUT, until
from tests.server.inside import Talk, asking

pytestmark = pytest.mark.root

CID, OTHER_CID, UNKNOWN_CID = 42, 43, 77
LARGE = 1 << 21
LIMITS = """[limits]
requests_per_second = 1
requests_burst = 30
unsent_per_instance = 5000000
writes_per_second = 0.001
writes_burst = 3
"""


class MachineHost:
    """A service, two virtual machines, and the relay."""

    def __init__(self, service: Service, vsock: FakeVsock) -> None:
        self.service, self.vsock = service, vsock

    def talk(self, cid: int) -> Talk:
        """Connect as a virtual machine."""
        sock = self.vsock.connect(cid)
        sock.settimeout(TIMEOUT)
        return Talk(sock)


@pytest.fixture
def host() -> Iterator[MachineHost]:
    """One worker with low limits, and a signer; `vm1` has CID 42, and `vm2` 43."""
    service = Service(workers=1, dialects=["incus"])
    with ExitStack() as stack:
        signer = stack.enter_context(SigningProcess(service.root, ("proof",)))
        path = service.root / "relayed"
        path.mkdir()
        os.chown(path, USER, USER)
        more = f'[[listener]]\npath = "{path}/sock"\ndialect = "handover"\n'
        service.write_config(LIMITS + signer.toml + more)
        service.command("identity", "keys", "rotate")
        signer.start(service.config)
        stack.enter_context(service)
        vsock = stack.enter_context(relaying(path / "sock"))
        for name, cid in (("vm1", CID), ("vm2", OTHER_CID)):
            vmm = stack.enter_context(Vmm(f"guest-cid={cid}"))
            service.command("instance", "add", name, "--type", "virtual-machine", "--config", "user.foo=bar")
            service.command("instance", "register", name, "--cid", str(cid), "--pid", str(vmm.pid))
        yield MachineHost(service, vsock)


def requests_per_second(host: MachineHost) -> None:
    """More requests than the burst."""
    guest = host.talk(CID)
    with guest.socket:
        answers = [guest.ask("/1.0/config/user.foo") for _time in range(30)]
        assert [one.status for one in answers] == 30 * [200]
        # The bucket may have got a token meanwhile.
        again = (guest.ask("/1.0/config/user.foo") for _time in range(100))
        refused = next(response for response in again if response.status != 200)
    assert (refused.status, refused.text) == (429, "too many requests of this instance\n")
    assert refused.headers["retry-after"] == "1"


def writes_per_second(host: MachineHost) -> None:
    """More changes of state than the burst."""
    guest = host.talk(CID)
    with guest.socket:
        bodies = [b'{"state":"Ready"}', b'{"state":"Started"}'] * 2
        answers = [guest.ask("/1.0", method="PATCH", body=body) for body in bodies]
    assert [one.status for one in answers] == [200, 200, 200, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1


def unsent_per_instance(host: MachineHost) -> None:
    """Answers that are not read."""
    host.service.configure("vm1", **{"user.large": "x" * LARGE})
    guests = [host.talk(CID) for _number in range(5)]
    with ExitStack() as stack:
        for guest in guests:
            stack.enter_context(guest.socket)
        for guest in guests[:3]:
            guest.send(asking("/1.0/config/user.large"))
            guest.socket.recv(1, socket.MSG_PEEK)
        refused = guests[3].ask("/1.0/config/user.foo")
        assert (refused.status, refused.text) == (429, "this instance leaves too many answers unread\n")
        for guest in guests[:3]:
            assert len(guest.receive()[0].body) == LARGE
        assert guests[4].ask("/1.0/config/user.foo").status == 200


@pytest.mark.parametrize("exceed", [requests_per_second, writes_per_second, unsent_per_instance])
def test_limits(host: MachineHost, exceed: Callable[[MachineHost], None]) -> None:
    """A virtual machine that exceeds a limit gets 429, as a container; another one is answered."""
    exceed(host)
    other = host.talk(OTHER_CID)
    with other.socket:
        assert other.ask("/1.0/config/user.foo").text == "bar"
        assert other.ask("/1.0", method="PATCH", body=b'{"state":"Ready"}').status == 200
    line = f"default/vm1: limit {exceed.__name__} exceeded "
    until(lambda: line in host.service.log.read_text(), "a line")


def test_tokens_of_identity(host: MachineHost) -> None:
    """Each virtual machine gets a token that says which instance it is; a CID without one gets none."""
    keys = jwt.PyJWKSet.from_json(host.service.command("identity", "keys", "jwks").stdout)
    subjects = set()
    for cid, name in ((CID, "vm1"), (OTHER_CID, "vm2")):
        guest = host.talk(cid)
        with guest.socket:
            token = guest.ask("/1.0/guestapi/identity?audience=proof").text
        key = keys[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(token, key, algorithms=["ES256"], audience="proof")
        assert claims["sub"].endswith(f"/{host.service.instance(name).uuid}")
        subjects.add(claims["sub"])
    assert len(subjects) == 2
    unknown = host.talk(UNKNOWN_CID)
    with unknown.socket:
        assert unknown.ask("/1.0/guestapi/identity?audience=proof").status == 500


def test_log(host: MachineHost) -> None:
    """What is refused is logged with the instance, or with the CID that belongs to none."""
    for cid, path, status, who in (
        (CID, "/1.0/config/limits.memory", 403, "default/vm1"),
        (UNKNOWN_CID, "/1.0/config", 500, f"CID {UNKNOWN_CID}"),
    ):
        guest = host.talk(cid)
        with guest.socket:
            assert guest.ask(path).status == status
        line = f"{who}: GET {path} -> {status}, "
        until(lambda line=line: line in host.service.log.read_text(), line)  # type: ignore[misc]
