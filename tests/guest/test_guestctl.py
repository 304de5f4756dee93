"""guestctl in real containers, with every installed Python: commands, exit statuses, waits, restarts of the host."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jwt
import pytest

from guestapi.guest import guestctl
from tests.harness.containers import Container, Ran
from tests.harness.machine import CHECKOUT
from tests.harness.service import COMMAND, Service
from tests.harness.signing import SigningProcess

PROGRAM = str(CHECKOUT / "guestapi/guest/guestctl.py")


def interpreters() -> dict[str, str]:
    """Return the path of each CPython from 3.6 on, by its name: those of the system and of pyenv."""
    roots = [Path("/usr/bin"), Path("/usr/local/bin")]
    roots += Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin")
    found: dict[str, str] = {}
    for path in (path for root in roots for path in root.glob("python3.*")):
        if (version := re.fullmatch(r"python3\.(\d+)", path.name)) and int(version[1]) >= 6:
            found.setdefault(path.name, str(path))
    return dict(sorted(found.items(), key=lambda one: int(one[0].rpartition(".")[2])))


PYTHONS = interpreters()


class GuestctlInstance:
    """An instance in which guestctl runs."""

    def __init__(self, container: Container, python: str) -> None:
        self._container = container
        self._words = [python, "-I", PROGRAM]

    def __call__(self, *words: str, stdin: bytes = b"") -> Ran:
        """Run guestctl with these arguments."""
        return self._container.run(*self._words, *words, stdin=stdin)

    @contextmanager
    def following(self, *words: str) -> Iterator[Iterator[dict[str, object]]]:
        """Run guestctl; yield the events that it prints."""
        enter = ["nsenter", "-t", str(self._container.pid), "-a"]
        with subprocess.Popen([*enter, *self._words, *words], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                yield map(json.loads, process.stdout)
            finally:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in children or [str(process.pid)]:
                    os.kill(int(pid), 9)


@pytest.fixture(scope="module")
def instance(service: Service) -> Iterator[Container]:
    """A privileged container, whose root can enter the directories of all interpreters."""
    devices = {"root": {"type": "disk", "path": "/"}}
    with service.container("guestctl", {"user.key": "värde\n", "limits.cpu": "1"}, devices, base=None) as container:
        yield container


@pytest.fixture(params=list(PYTHONS))
def guest(request: pytest.FixtureRequest, instance: Container) -> GuestctlInstance:
    """guestctl, run with each interpreter."""
    return GuestctlInstance(instance, PYTHONS[request.param])


@pytest.fixture(params=sorted({min(PYTHONS, key=list(PYTHONS).index), list(PYTHONS)[-1]}))
def edge(request: pytest.FixtureRequest, instance: Container) -> GuestctlInstance:
    """guestctl, run with the oldest and the newest interpreter; vermin looks at what is between."""
    return GuestctlInstance(instance, PYTHONS[request.param])


def test_python_3_6() -> None:
    """The program uses no syntax and no function newer than Python 3.6; vermin checks it without that Python."""
    words = ["--no-tips", "--eval-annotations", "--violations", "-t=3.6-", PROGRAM]
    done = subprocess.run(
        [Path(sys.executable).with_name("vermin"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_reading(guest: GuestctlInstance) -> None:
    """Values, names, devices and meta-data equal those of the API, byte for byte."""
    assert guest("get", "user.key") == Ran(0, "värde\n", "")
    assert guest("list") == Ran(0, "user.key\n", "")
    assert json.loads(guest("devices").out) == {"root": {"type": "disk", "path": "/"}}
    assert guest("metadata").out.startswith("#cloud-config\ninstance-id: ")


def test_missing_and_unreadable_keys(edge: GuestctlInstance) -> None:
    """A key that is not set gives status 1, one that guests may not read status 4, each with the host's text."""
    assert edge("get", "user.no") == Ran(1, "", "guestctl: not found\n")
    assert edge("get", "limits.cpu") == Ran(4, "", "guestctl: not authorized\n")
    assert edge("get", "user.no/../key").code == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "a command is missing"),
        (["give"], "invalid choice: 'give'"),
        (["get"], "KEY"),
        (["get", "a", "b"], "unrecognized arguments: b"),
        (["get", "a", "--wait", "0"], "not a number of seconds above 0"),
        (["get", "a", "--wait", "soon"], "not a number of seconds above 0"),
        (["events", "--since", "-1"], "--since"),
        (["put", "a", "x"], "'a' is not NAMESPACE/KEY"),
        (["put", "a/b/c", "x"], "'a/b/c' is not NAMESPACE/KEY"),
        (["put", "a/b", "x", "y"], "unrecognized arguments: y"),
        (["delete", "/b"], "'/b' is not NAMESPACE/KEY"),
        (["delete"], "NAMESPACE/KEY"),
        (["attribute"], "attribute needs an action: get or list"),
        (["attribute", "get"], "NAMESPACE/KEY"),
        (["attribute", "get", "a"], "'a' is not NAMESPACE/KEY"),
        (["attribute", "set", "a/b"], "invalid choice: 'set'"),
        (["--timeout", "inf", "list"], "not a number of seconds above 0"),
    ],
)
def test_misuse(capfd: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    """Invalid arguments give status 3 and a sentence that names the mistake."""
    with pytest.raises(SystemExit) as ended:
        guestctl.main(words)
    assert ended.value.code == guestctl.MISUSE
    assert text in capfd.readouterr().err


def test_readiness(edge: GuestctlInstance, service: Service) -> None:
    """The store gets the readiness that the command reports."""
    for words, ready in ((["ready"], True), (["ready", "--not"], False)):
        assert edge(*words) == Ran(0, "", "")
        assert service.instance("guestctl").ready is ready


def test_wait_for_a_key(edge: GuestctlInstance, service: Service) -> None:
    """A wait ends when the key is set, or after its time."""
    assert edge("get", "user.late", "--wait", "0.1").code == 1
    setting = threading.Timer(0.5, lambda: service.configure("guestctl", user_late="now"))
    setting.start()
    assert edge("get", "user.late", "--wait", "60") == Ran(0, "now", "")
    setting.join()
    assert edge("get", "user.late", "--wait", "60").out == "now"
    service.configure("guestctl", user_late="")


def test_events(edge: GuestctlInstance, service: Service, request: pytest.FixtureRequest) -> None:
    """Each change is printed as one line, in order, after those since the given id."""
    key = f"user.{request.node.callspec.id}"
    service.configure("guestctl", **{key: "0"})
    values: list[object] = []
    with edge.following("events", "--since", "0", "--type", "config") as events:
        for event in events:
            metadata = event["metadata"]
            assert isinstance(metadata, dict)
            if metadata.get("key") == key.replace("_", "."):
                values.append(metadata["value"])
                if len(values) == 5:
                    break
                service.configure("guestctl", **{key: str(len(values))})
    service.configure("guestctl", **{key: ""})
    assert values == ["0", "1", "2", "3", "4"]


@pytest.mark.root
def test_restart_of_the_host() -> None:
    """During a restart of the service, commands wait, and the stream of events continues without a gap."""
    with Service(workers=1) as service, service.container("again", {"user.key": "1"}, base=None) as container:
        guest = GuestctlInstance(container, shutil.which("python3") or "python3")
        with guest.following("events", "--since", "0", "--type", "config") as events:
            service.configure("again", user_key="2")
            assert "user.key" in str(next(events))
            service.stop()
            assert guest("--timeout", "0.2", "get", "user.key").code == 2
            asked: list[Ran] = []
            asking = threading.Thread(target=lambda: asked.append(guest("get", "user.key")))
            asking.start()
            service.configure("again", user_key="3")
            service.start()
            asking.join()
            assert asked == [Ran(0, "3", "")]
            assert '"value": "3"' in json.dumps(next(events))


@pytest.mark.root
def test_unregistered_caller() -> None:
    """In an unregistered container, requests are repeated until the timeout, because it may be registered soon."""
    with Service(workers=1) as service, Container(service.binds, base=None) as container:
        ran = GuestctlInstance(container, shutil.which("python3") or "python3")("--timeout", "0.3", "list")
    assert ran == Ran(2, "", "guestctl: the host answers: pid not in container?\n")


class RawServer:
    """A server that answers each connection with the next of the given bytes."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self.requests: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, args=[answers], daemon=True)
        self._thread.start()

    def _serve(self, answers: tuple[bytes, ...]) -> None:
        for answer in answers:
            connection, _address = self._listener.accept()
            with connection:
                self.requests.append(connection.recv(65536))
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    def close(self) -> None:
        """Wait for the last answer, and stop listening."""
        self._thread.join(60)
        self._listener.close()


def answer(status: str, body: str = "", **headers: str) -> bytes:
    """Return the bytes of a response."""
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{fields}\r\n{body}".encode()


REFUSED = ["400 Bad Request", "401 Unauthorized", "403 Forbidden", "412 Precondition Failed"]
REFUSED += ["413 Content Too Large", "429 Too Many Requests", "507 Insufficient Storage"]


@pytest.mark.parametrize("status", REFUSED)
def test_refusals(tmp_path: Path, capfd: pytest.CaptureFixture[str], status: str) -> None:
    """A refusal that another attempt cannot change is final; its text is printed."""
    stub = RawServer(tmp_path / "sock", answer(status, "because\n", Retry_After="60"))
    assert guestctl.main(["--socket", stub.path, "list"]) == guestctl.REFUSED
    assert capfd.readouterr().err == "guestctl: because\n"
    stub.close()


def test_temporary_failures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """After a server error, an incomplete response or a short Retry-After, the request is repeated."""
    good = answer("200 OK", '["/1.0/config/user.a"]')
    bad = [answer("500 Internal Server Error", "later\n"), good[:-3], answer("429 Too Many Requests", Retry_After="0")]
    stub = RawServer(tmp_path / "sock", *bad, b"", good)
    assert guestctl.main(["list", "--socket", stub.path]) == guestctl.FOUND
    assert capfd.readouterr().out == "user.a\n"
    assert len(stub.requests) == 5
    stub.close()


@pytest.mark.parametrize("python", PYTHONS)
def test_exit_statuses(tmp_path: Path, python: str) -> None:
    """With each interpreter, every exit status means what the manual says, and the value is printed as it is."""
    features = answer("200 OK", '{"features":["tree"]}')
    asked: tuple[tuple[list[str], list[bytes], int, str, str], ...] = (
        (["get", "user.a"], [answer("200 OK", "value")], 0, "value", ""),
        (["get", "user.a", "--wait", "9"], [features, answer("200 OK", "value\n")], 0, "value\n", ""),
        (["get", "user.a"], [answer("404 Not Found", "not found\n")], 1, "", "guestctl: not found\n"),
        (["get"], [], 3, "", "KEY"),
        (["list"], [answer("401 Unauthorized", "because\n")], 4, "", "guestctl: because\n"),
    )
    for number, (words, answers, status, out, err) in enumerate(asked):
        stub = RawServer(tmp_path / f"sock{number}", *answers)
        done = run_with(PYTHONS[python], "--socket", stub.path, *words)
        assert (done.returncode, done.stdout) == (status, out), done.stderr
        assert err in done.stderr
        stub.close()
    nobody = run_with(PYTHONS[python], "--socket", str(tmp_path / "none"), "--timeout", "0.1", "list")
    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert "the host cannot be asked" in nobody.stderr


def test_value_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal, a value that has no newline gets one, and a value that has one gets no other."""
    for number, value in enumerate(("value", "value\n")):
        stub = RawServer(tmp_path / f"sock{number}", answer("200 OK", value))
        ours, theirs = pty.openpty()
        with subprocess.Popen([sys.executable, "-I", PROGRAM, "--socket", stub.path, "get", "user.a"], stdout=theirs):
            os.close(theirs)
        # The terminal makes a carriage return of each line's end.
        assert os.read(ours, 100) == b"value\r\n"
        os.close(ours)
        stub.close()


def run_with(python: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run guestctl with an interpreter."""
    return subprocess.run([python, "-I", PROGRAM, *words], capture_output=True, text=True, check=False)


def test_wait_by_requests(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host cannot wait for a key, as Incus and LXD, the request is repeated until the key is set."""
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    absent = answer("404 Not Found", "not found\n")
    stub = RawServer(tmp_path / "sock", absent, absent, absent, answer("200 OK", "value"))
    assert guestctl.main(["--socket", stub.path, "get", "user.a", "--wait", "60"]) == guestctl.FOUND
    assert capfd.readouterr().out == "value"
    assert [request.split()[1] for request in stub.requests] == [b"/1.0/guestapi", *3 * [b"/1.0/config/user.a"]]
    stub.close()


def test_wait_by_the_host(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """If the host can wait for a key, each request asks it to wait."""
    features = answer("200 OK", '{"features":["tree"]}')
    absent = answer("404 Not Found", "not found\n")
    stub = RawServer(tmp_path / "sock", features, absent, answer("200 OK", "value"))
    assert guestctl.main(["--socket", stub.path, "get", "user.a", "--wait", "90"]) == guestctl.FOUND
    assert capfd.readouterr().out == "value"
    waits = [re.search(rb"wait=(\d+)", request) for request in stub.requests[1:]]
    assert [found and found[1] for found in waits] == [b"60", b"60"]
    stub.close()


def test_attributes(edge: GuestctlInstance, service: Service) -> None:
    """Values come as bytes from the command line and from standard input; refusals have the host's sentence."""
    assert edge("put", "app/version", "1") == Ran(4, "", "guestctl: not authorized\n")
    service.command("policy", "allow", "attributes", "--instance", "guestctl")
    try:
        for value in ("2.14", "ä\n", ""):
            assert edge("put", "app/version", value) == Ran(0, "", "")
            assert service.command("attributes", "get", "guestctl", "app/version").stdout == value
            assert edge("attribute", "get", "app/version") == Ran(0, value, "")
        assert edge("put", "app/motd", stdin=b"a\x00b\n") == Ran(0, "", "")
        assert service.command("attributes", "get", "guestctl", "app/motd").stdout == "a\0b\n"
        assert edge("attribute", "list") == Ran(0, "app/motd\napp/version\n", "")
        for _ in range(2):
            assert edge("delete", "app/motd") == Ran(0, "", "")
        assert edge("attribute", "get", "app/motd") == Ran(1, "", "guestctl: not found\n")
        assert service.command("attributes", "get", "guestctl", "app/motd", check=False).returncode == 1
        assert edge("put", "app/a b", "x").code == edge("delete", "../x").code == 4
        ran = edge("put", "app/large", stdin=b"x" * 16385)
        assert ran == Ran(4, "", "guestctl: the value of an attribute has at most 16384 bytes\n")
        edge("delete", "app/version")
    finally:
        service.command("policy", "disallow", "attributes", "--instance", "guestctl")


def test_attributes_of_incus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A host that has no attributes refuses: they are not absent."""
    stub = RawServer(tmp_path / "sock", *[answer("404 Not Found", "404 page not found\n")] * 6)
    for words in (["put", "a/b", "x"], ["delete", "a/b"], ["attribute", "get", "a/b"], ["attribute", "list"]):
        assert guestctl.main(["--socket", stub.path, *words]) == guestctl.REFUSED
        assert capfd.readouterr().err == "guestctl: 404 page not found\n"
    stub.close()


def test_notices(edge: GuestctlInstance, service: Service) -> None:
    """A notice is listed, followed and acknowledged, which ends the operator's wait; streams of all types lack it."""
    assert edge("notices") == Ran(0, "[]\n", "")
    words = [str(COMMAND), "--config", str(service.config), "notice", "guestctl", "stop", "--in", "5m", "--wait"]
    with edge.following("notices", "--follow") as followed, edge.following("events") as rest:
        # The streams are open when these come.
        changing = threading.Event()
        changer = threading.Thread(target=change_until, args=(service, changing))
        changer.start()
        try:
            next(rest)
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as command:
                notice = next(followed)
                assert (notice["type"], notice["status"]) == ("stop", "pending")
                assert edge("notices", "--ack", str(notice["id"])) == Ran(0, "", "")
                assert edge("notices", "--ack", str(notice["id"])).code == 0
                assert command.wait(20) == 0
                assert command.stdout is not None
                assert command.stdout.read().strip() == notice["id"]
            assert next(followed) == {**notice, "status": "acknowledged"}
            assert json.loads(edge("notices").out) == [{**notice, "status": "acknowledged"}]
            # Whatever was changed since is told, and no notice between.
            assert {next(rest)["type"] for _ in range(5)} == {"config"}
        finally:
            changing.set()
            changer.join()
    assert edge("notices", "--ack", "0" * 16) == Ran(1, "", "guestctl: not found\n")
    service.command("notices", "cancel", "guestctl")
    assert edge("notices").out == "[]\n"


@pytest.mark.root
def test_token() -> None:
    """A token is printed as it is, for the audience and with the nonce that were given; each refusal has its status."""
    audience = "https://vault.example.org/ä?b&c"
    running = Service(dialects=["incus"])
    with SigningProcess(running.root, (audience,)) as signer:
        running.write_config(signer.toml)
        running.command("identity", "keys", "rotate")
        signer.start(running.config)
        with running, running.container("signed", base=None) as container:
            for python in (next(iter(PYTHONS.values())), list(PYTHONS.values())[-1]):
                guestctl_ = GuestctlInstance(container, python)
                for words, nonce in (((), None), (("--nonce", "4 7=11"), "4 7=11")):
                    done = guestctl_("token", audience, *words)
                    assert (done.code, done.err, "\n" in done.out) == (0, "", False)
                    claims = jwt.decode(done.out, options={"verify_signature": False})
                    assert (claims["aud"], claims.get("nonce")) == (audience, nonce)
                    assert claims["guestapi"]["name"] == "signed"
                refused = guestctl_("token", "other")
                assert refused == Ran(4, "", "guestctl: no tokens are given for this audience\n")
                assert guestctl_("token", "x" * 257).code == 4
                assert guestctl_("token").code == 3


def test_no_tokens(edge: GuestctlInstance) -> None:
    """Where the host signs nothing, there is none."""
    assert edge("token", "x") == Ran(1, "", "guestctl: 404 page not found\n")


def change_until(service: Service, end: threading.Event) -> None:
    """Change a key five times a second until the event is set."""
    number = 0
    while not end.wait(0.2):
        number += 1
        service.configure("guestctl", user_number=str(number))
    service.configure("guestctl", user_number="")
