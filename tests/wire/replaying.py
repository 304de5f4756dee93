"""Replays the recordings of a live daemon against the real service, from real containers: bytes in, bytes out."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from guestapi.store import images, steps
from guestapi.store.lookup import get_instance
from tests.harness.containers import BASE, Container, Exchanged, Response, exchanged, from_host, parse, receive, send
from tests.harness.service import Service
from tests.wire import recordings
from tests.wire.differences import SENTENCE, expected
from tests.wire.peers import Peer
from tests.wire.recordings import Case

#: The directory below which `in_cgroup` makes a cgroup with a misleading name.
CGROUP = Path("/sys/fs/cgroup/unified") if Path("/sys/fs/cgroup/unified").is_dir() else Path("/sys/fs/cgroup")

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@contextmanager
def running(peer: Peer, service: Service) -> Iterator[dict[str, Container]]:
    """Run the recorded containers: c1, another one with an ID map of its own, and a privileged one."""
    options: dict[str, Any] = {"location": peer.location, "project": peer.project}
    with (
        service.container("c1", devices=peer.devices, **options) as c1,
        service.container("ciso", base=BASE + 65536, **options) as ciso,
        service.container("cpriv", base=None, **options) as cpriv,
    ):
        yield {"c1": c1, "ciso": ciso, "cpriv": cpriv}


@contextmanager
def imported(service: Service, files: Path, public_image: bytes) -> Iterator[dict[str, str]]:
    """Import images like the recorded ones; yield their fingerprints by the recorded ones."""
    where = images.directory(service.settings)
    (files / "public.tar.gz").write_bytes(public_image)
    for name in ("private.tar.gz", "metadata.tar.xz", "rootfs.squashfs"):
        (files / name).write_bytes(name.encode() * 100)
    public = images.import_image(service.writer, where, [files / "public.tar.gz"], public=True).fingerprint
    private = images.import_image(service.writer, where, [files / "private.tar.gz"]).fingerprint
    both = [files / "metadata.tar.xz", files / "rootfs.squashfs"]
    split = images.import_image(service.writer, where, both, public=True).fingerprint
    yield {recordings.PUBLIC: public, recordings.PRIVATE: private, recordings.SPLIT: split}
    for fingerprint in (public, private, split):
        images.remove_image(service.writer, where, fingerprint)


@contextmanager
def in_cgroup(container: Container, name: str) -> Iterator[None]:
    """Move a container's init, and so its children, into a cgroup that is named like another container's."""
    group = CGROUP / name
    group.mkdir(exist_ok=True)
    before = Path(f"/proc/{container.pid}/cgroup").read_text().split("0::", 1)[1].strip().lstrip("/")
    (group / "cgroup.procs").write_text(str(container.pid))
    try:
        yield
    finally:
        (CGROUP / before / "cgroup.procs").write_text(str(container.pid))
        group.rmdir()


def steps_of(peer: Peer, case: Case) -> list[list[Any]]:
    """Return the steps of an exchange; where the recording received nothing, it waits a while for nothing."""
    steps = []
    for step in case.steps:
        if step[0] == "send":
            steps.append(send(recordings.unfold(step[1])))
        elif step[0] == "receive":
            timeout = 10 if step[1] else peer.timeouts.get(case.name, 5)
            steps.append(receive(max(1, len(step[1])), case.method, timeout))
        else:
            steps.append(step)
    return steps


def sender(
    peer: Peer, case: Case, service: Service, containers: dict[str, Container]
) -> Callable[[list[list[Any]]], Exchanged]:
    """Return the function with which the recorded kind of caller exchanges bytes with the service."""
    c1 = containers["c1"]
    from_c1: dict[str, dict[str, Any]] = {
        "root": {},
        "init": {},
        "user": {"become": ["uid:1000"]},
        "pidns": {"become": ["pidns"]},
        "usernsroot": {"become": ["uid:1000", "userns"]},
        "gone": {"how": "exited"},
    }
    if case.sender in from_c1:
        return lambda steps: c1.exchange(*steps, socket=peer.socket, **from_c1[case.sender])
    if case.sender in ("cpriv", "ciso"):
        return lambda steps: containers[case.sender].exchange(*steps, socket=peer.socket)
    if case.sender in ("cgmonitor", "cgpayload"):

        def from_another_cgroup(steps: list[list[Any]]) -> Exchanged:
            with in_cgroup(c1, f"lxc.{case.sender[2:]}.c2"):
                return c1.exchange(*steps, socket=peer.socket)

        return from_another_cgroup
    if case.sender == "nsenter":
        return lambda steps: entered(c1, steps, peer.socket)
    if case.sender == "spoof":
        return lambda steps: spoofed(c1, steps, peer.socket)
    uid = {"host": None, "hostuser": 65534, "hostidmap": BASE}[case.sender]
    become = [] if uid is None else [f"uid:{uid}"]
    return lambda steps: from_host(service.sockets[peer.dialect], *steps, become=become)


def entered(container: Container, steps: list[list[Any]], socket: str) -> Exchanged:
    """Exchange bytes as the host's root in the container's mount and PID namespaces, but not in its user namespace."""
    command = {"do": "exchange", "steps": steps, "socket": socket}
    done = subprocess.run(
        ["nsenter", "-t", str(container.pid), "-m", "-p", "/usr/bin/python3", "-I", "-S", "/tmp/agent.py"],
        input=json.dumps(command).encode() + b"\n",
        capture_output=True,
        check=True,
    )
    return exchanged(json.loads(done.stdout))


def spoofed(container: Container, steps: list[list[Any]], socket: str) -> Exchanged:
    """Exchange bytes from a process in the container that has the name of another container's monitor."""
    command = {"do": "exchange", "steps": steps, "socket": socket}
    start = 'exec -a "[lxc monitor] /var/lib/lxd/containers c2" /usr/bin/python3 -I -S /tmp/agent.py'
    ran = container.run("/bin/bash", "-c", start, stdin=json.dumps(command).encode() + b"\n")
    assert ran.code == 0, ran.err
    return exchanged(json.loads(ran.out))


def prepare(peer: Peer, case: Case, service: Service, name: str) -> None:
    """Give the instance the recorded configuration and state."""
    with service.writer.change() as change:
        instance = get_instance(change, peer.project, name)
        wanted = {**peer.config[case.state], **peer.hwaddr}
        gone = dict.fromkeys(instance.config.keys() - wanted.keys(), "")
        instance = steps.configure(change, instance, {**wanted, **gone})
        steps.set_ready(change, instance.id, instance.run, case.ready_before)


def compare(peer: Peer, case: Case, service: Service, name: str, result: Exchanged) -> None:
    """Compare status, Content-Type, nosniff, Location, fields of images, body, the connection's end, and readiness."""
    wanted, closed, ready = expected(peer.rules, case)
    got = [response for data in result.received for response in parse(data, case.method)]
    assert [response.status for response in got] == [response["status"] for response in wanted]
    for response, want in zip(got, wanted, strict=True):
        if want["status"] == 100:
            continue
        kind, body, want_kind, want_body = in_same_parts(response, want)
        assert kind == want_kind
        assert (response.headers.get("x-content-type-options") == "nosniff") == want.get("nosniff", False)
        assert response.headers.get("location") == want.get("location")
        if fields := want.get("fields"):
            assert {name: response.headers.get(name) for name in fields} == fields
        if want["status"] == 405:
            assert "GET" in response.headers["allow"].split(", ")
        compare_body(body, "" if case.method == "HEAD" else want_body, want.get("type"))
    assert result.closed == closed
    if ready is not None:
        assert service.instance(name, peer.project).ready == ready


def in_same_parts(response: Response, want: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return both Content-Types and bodies with the boundaries replaced by a stand-in of the same length."""
    return (
        *_without_boundary(response.headers.get("content-type", ""), response.body.decode("latin-1")),
        *_without_boundary(want.get("type", ""), want["body"]),
    )


def _without_boundary(kind: str, body: str) -> tuple[str, str]:
    boundary = kind.partition("boundary=")[2]
    stand_in = "-" * len(boundary)
    return (kind.replace(boundary, stand_in), body.replace(boundary, stand_in)) if boundary else (kind, body)


def compare_body(got: str, want: str, kind: str | None) -> None:
    """Compare two bodies exactly, except for UUIDs, sentences of guestapi's own, and lists that Go does not sort."""
    if want == SENTENCE:
        assert re.fullmatch(r"[^\n]{8,120}\n", got)
    elif kind == "application/json" and want.startswith("["):
        assert (
            got
            == json.dumps(sorted(json.loads(want.encode("latin-1"))), separators=(",", ":"), ensure_ascii=False)
            .encode()
            .decode("latin-1")
            + "\n"
        )
    else:
        assert _UUID.sub("UUID", got) == _UUID.sub("UUID", want)


def instance_of(case: Case) -> str:
    """Return the name of the instance that a case is about."""
    return case.sender if case.sender in ("cpriv", "ciso") else "c1"


@contextmanager
def waiting(peer: Peer, cases: list[Case], service: Service) -> Iterator[dict[str, Future[Exchanged]]]:
    """Begin these exchanges, which wait for a time limit, at once, each in its own container; yield their results."""
    with ThreadPoolExecutor(len(cases)) as pool, ExitStack() as stack:
        begun = {}
        for case in cases:
            name = f"slow-{case.name}"
            # A container's agent does one exchange at a time.
            container = stack.enter_context(
                service.container(name, devices=peer.devices, location=peer.location, project=peer.project)
            )
            prepare(peer, case, service, name)
            begun[case.name] = pool.submit(container.exchange, *steps_of(peer, case), socket=peer.socket)
        yield begun


def check_rules_are_needed(peer: Peer, cases: list[Case]) -> None:
    """Check that every rule in the peer's table of differences applies to a case."""
    used = {next((rule.cases for rule in peer.rules if rule.fits(case)), None) for case in cases}
    assert {rule.cases for rule in peer.rules} <= used
