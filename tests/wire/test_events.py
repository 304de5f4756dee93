"""The recorded event streams of a live Incus and a live LXD, replayed: handshakes, frames and received events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from guestapi.model import Device, Instance
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from guestapi.store.transaction import Change
from tests.harness.containers import Container, receive, send
from tests.harness.service import Service
from tests.wire.peers import INCUS, LXD, Peer
from tests.wire.recordings import unfold

PEERS = (INCUS, LXD)
CASES = [(peer, case) for peer in PEERS for case in peer.load_events()]
HANDSHAKES = [(peer, case) for peer, case in CASES if "events" not in case]

_NEEDS_13 = (400, "Sec-WebSocket-Version: 13 is needed\n", False)
#: Cases with another result than the recorded one, and why; compared are (status, bytes after the head, closed).
DIFFERENCES: dict[tuple[str, str], tuple[str, tuple[int, str, bool]]] = {
    ("incus", "patch-events"): ("405 where Incus runs the read", (405, 'method "PATCH" not allowed\n', False)),
    ("incus", "hs-no-version"): ("one sentence", _NEEDS_13),
    ("incus", "hs-version-8"): ("one sentence", _NEEDS_13),
    ("incus", "hs-origin"): ("one sentence", (403, "the Origin is not this Host\n", False)),
    ("incus", "hs-origin-null"): ("one sentence", (403, "the Origin is not this Host\n", False)),
    ("lxd", "hs-no-version"): ("one sentence", _NEEDS_13),
    ("lxd", "hs-version-8"): ("one sentence", _NEEDS_13),
    ("lxd", "hs-no-key"): ("one sentence", (400, "Sec-WebSocket-Key: 16 bytes in base64 are needed\n", False)),
    ("lxd", "hs-head"): ("HEAD is answered, it is no stream", (200, "", False)),
    ("lxd", "hs-post"): ("405 as for any other method", (405, 'method "POST" not allowed\n', False)),
    **{
        ("lxd", f"{method.lower()}-events"): (
            "405 where LXD runs the read",
            (405, f'method "{method}" not allowed\n', False),
        )
        for method in ("PUT", "POST", "DELETE", "PATCH")
    },
}

DEVICES: dict[str, Device] = {
    "eth0": {"name": "eth0", "nictype": "bridged", "parent": "br0", "type": "nic"},
    "root": {"path": "/", "pool": "default", "type": "disk"},
}


def project(peer: Peer) -> str:
    """Return the project of the recorded instance of a peer."""
    return f"{peer.project}-events"


@pytest.fixture(scope="module")
def containers(service: Service) -> Iterator[dict[str, Container]]:
    """The recorded container of each peer, by dialect."""
    with ExitStack() as stack:
        yield {
            peer.dialect: stack.enter_context(
                service.container("c1", {"user.foo": "bar"}, DEVICES, project=project(peer))
            )
            for peer in PEERS
        }


def split(data: bytes) -> tuple[int, str]:
    """Return the status and the bytes after the head; Incus ends the lines of a stream's head with a bare LF."""
    head, _, rest = data.decode("latin-1").replace("\n\n", "\r\n\r\n", 1).partition("\r\n\r\n")
    return (int(head.split()[1]) if head else 0), rest


@pytest.mark.parametrize(
    ("peer", "case"), HANDSHAKES, ids=[f"{peer.dialect}-{case['case']}" for peer, case in HANDSHAKES]
)
def test_recorded_handshake(peer: Peer, case: dict[str, Any], containers: dict[str, Container]) -> None:
    """Each recorded handshake and client frame has the recorded result, except for the differences listed above."""
    recorded = b"".join(step[1].encode("latin-1") for step in case["steps"] if step[0] == "receive")
    expected = DIFFERENCES.get((peer.dialect, case["case"]), ("", (*split(recorded), case["closed"])))[1]
    # How long nothing more has to come: a machine under load takes its time.
    for silence in (0.15, 5.0):
        steps: list[list[Any]] = []
        for step in case["steps"]:
            if step[0] != "receive":
                steps += [send(unfold(step[1])) if step[0] == "send" else step, receive(99, "GET", silence)]
        result = containers[peer.dialect].exchange(*steps, socket=peer.socket)
        received = b"".join(result.received)
        found = (*split(received), result.closed)
        if found == expected:
            break
    assert found == expected
    if expected[0] == 101:
        (accepted,) = re.findall(rb"Sec-WebSocket-Accept: \S+\r\n", recorded)
        assert accepted in received
    if expected[0] in (400, 403):
        assert b"Sec-WebSocket-Version: 13\r\n" in received


def act(service: Service, peer: Peer) -> None:
    """Make the changes that were made while the recorded listeners were connected, as far as guestapi has them."""
    one: list[dict[str, str]] = [
        {"user.foo": "baz"},
        {"user.foo": "baz"},
        {"user.new": "1"},
        {"user.new": ""},
        {"user.uni": "hé <&> ☃\n\u2028"},
        {"cloud-init.user-data": "#cloud-config\n"},
        {"user.user-data": "#cloud-config\nruncmd: [ls]\n"},
        {"environment.X": "2"},
        {"limits.processes": "1000"},
        {"security.nesting": "true"},
        {"user.a": "1", "user.b": "2", "user.c": "3"},
    ]
    for config in one:
        configure(service, peer, config)
    share = {"path": "/mnt", "source": "/root/share", "type": "disk"}
    devices(service, peer, mnt=share)
    devices(service, peer, mnt={**share, "source": "/root/share2"})
    devices(service, peer, mnt={**share, "source": "/root/share2", "readonly": "true"})
    devices(service, peer)
    devices(service, peer, eth0={**DEVICES["eth0"], "limits.ingress": "100Mbit"})
    if peer is INCUS:
        # LXD 5.0 has no such option.
        devices(service, peer, eth0={**DEVICES["eth0"], "limits.ingress": "100Mbit", "limits.priority": "3"})
    devices(service, peer)
    with service.writer.change() as change:
        instance = steps.configure(change, of(change, peer), {"user.foo": "q"})
        steps.replace_devices(change, instance, {**instance.devices, "none0": {"type": "none"}})
    configure(service, peer, {"user.p": "1"})
    configure(service, peer, {"user.p": ""})
    with service.writer.change() as change:
        steps.set_ready(change, of(change, peer).id, of(change, peer).run, True)


def of(change: Change, peer: Peer) -> Instance:
    """Return the recorded instance."""
    return get_instance(change, project(peer), "c1")


def configure(service: Service, peer: Peer, config: dict[str, str]) -> None:
    """Change the configuration once."""
    with service.writer.change() as change:
        steps.configure(change, of(change, peer), config)


def devices(service: Service, peer: Peer, **changed: Device) -> None:
    """Change the devices once, starting from the recorded ones."""
    with service.writer.change() as change:
        steps.replace_devices(change, of(change, peer), {**DEVICES, **changed})


def parse_events(data: str) -> list[dict[str, Any]]:
    """Return the events in a stream's bytes, in any framing, without their timestamps."""
    found = []
    for text in re.findall(r'\{"type":"(?:config|device)".*?\}\}(?=\n)', data):
        event = json.loads(text.encode("latin-1"))
        assert list(event) == ["type", "timestamp", "metadata"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?(Z|[+-]\d\d:\d\d)", event["timestamp"])
        del event["timestamp"]
        found.append(event)
    return found


def expected_events(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events that guestapi sends for the recorded ones.

    To change a disk's source, Incus removes the device and adds it again; guestapi updates a device of the same name
    and type. Incus sends keys that were set in one change in any order, guestapi in the order of their names.
    """
    found: list[dict[str, Any]] = []
    for event in recorded:
        last = found[-1]["metadata"] if found else {}
        metadata = event["metadata"]
        if last.get("action") == "removed" and metadata.get("action") == "added" and last["name"] == metadata["name"]:
            found[-1] = {"type": "device", "metadata": {**metadata, "action": "updated"}}
        else:
            found.append(event)
    at_once = [event for event in found if event["metadata"].get("key") in ("user.a", "user.b", "user.c")]
    at_once.sort(key=lambda event: str(event["metadata"]["key"]))
    return [
        at_once.pop(0) if event["metadata"].get("key") in ("user.a", "user.b", "user.c") else event for event in found
    ]


def clients_of(cases: list[dict[str, Any]]) -> str:
    """Return the recorded requests for listening.py, each with the last event that its listener receives."""
    wanted = []
    for case in cases:
        request = unfold(case["steps"][0][1]).decode("latin-1")
        query = request.split(" ")[1].partition("?type=")[2]
        last = {"": "user.end", "config": "user.end", "device": '"end"'}.get(re.split("[,&]", query)[0], "")
        wanted.append([request, last])
    return json.dumps(wanted)


def mark_the_end(service: Service, peer: Peer) -> None:
    """Make the last change that every listener receives; no event of an earlier change follows it."""
    with service.writer.change() as change:
        instance = steps.configure(change, of(change, peer), {"user.end": "1"})
        steps.replace_devices(change, instance, {**instance.devices, "end": {"type": "none"}})
    with service.writer.change() as change:
        instance = steps.configure(change, of(change, peer), {"user.end": ""})
        steps.replace_devices(change, instance, DEVICES)


def without_end(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events before those of `mark_the_end`."""
    names = [event["metadata"].get("key", event["metadata"].get("name")) for event in events]
    ends = [number for number, name in enumerate(names) if name in ("user.end", "end")]
    return events[: ends[0]] if ends else events


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: str(peer.dialect))
def test_recorded_listeners(service: Service, containers: dict[str, Container], peer: Peer) -> None:
    """Through both workers, a listener with any recorded filter receives the recorded events in the recorded order."""
    cases = [case for one, case in CASES if one is peer and "events" in case and not case["case"].startswith("burst")]
    with containers[peer.dialect].listening("raw", clients_of(cases), peer.socket) as clients:
        assert clients.read_document() == "ready"
        act(service, peer)
        mark_the_end(service, peer)
        results = clients.read_document()
    for case, data in zip(cases, results, strict=True):
        assert without_end(parse_events(data)) == expected_events(case["events"]), case["case"]
        if case["case"].startswith("ws-"):
            assert data.split("\r\n\r\n", 1)[1].startswith("\x89\tkeepalive")


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: str(peer.dialect))
def test_recorded_burst(service: Service, containers: dict[str, Container], peer: Peer) -> None:
    """Twenty keys that are set in one change produce twenty events."""
    cases = [case for one, case in CASES if one is peer and case["case"].startswith("burst")]
    with containers[peer.dialect].listening("raw", clients_of(cases), peer.socket) as clients:
        assert clients.read_document() == "ready"
        configure(service, peer, {event["metadata"]["key"]: "v" for event in cases[0]["events"]})
        mark_the_end(service, peer)
        results = clients.read_document()
    for case, data in zip(cases, results, strict=True):
        recorded = sorted(case["events"], key=lambda event: str(event["metadata"]["key"]))
        assert without_end(parse_events(data)) == recorded


def test_every_difference_is_needed() -> None:
    """Every entry in the table of differences belongs to a recorded case, and differs from it."""
    recorded = {}
    for peer, case in HANDSHAKES:
        data = b"".join(step[1].encode("latin-1") for step in case["steps"] if step[0] == "receive")
        recorded[peer.dialect, case["case"]] = (*split(data), case["closed"])
    assert all(recorded[key] != wanted for key, (_reason, wanted) in DIFFERENCES.items())
