"""Each command, program and unit of docs/guests.md, run in a real container and checked by a real systemd."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestapi.callers.namespaces import examine
from guestapi.store import steps
from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT, Machine
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.server.test_identity import hosting

pytestmark = [pytest.mark.root]

SECTIONS = (CHECKOUT / "docs/guests.md").read_text().split("\n## ")


def snippets(title: str) -> list[str]:
    """Return the blocks of code in the section with this title."""
    (section,) = (text for text in SECTIONS if text.startswith(f"{title}\n"))
    return re.findall(r"^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def guest(service: Service) -> Iterator[Container]:
    """A privileged container, whose root can enter the checkout."""
    with service.container("snippets", {"user.role": "frontend", "user.password": "x"}, base=None) as container:
        yield container


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that is visible in the instance, which has its own /dev and /tmp."""
    with tempfile.TemporaryDirectory(prefix="guestapi-", dir="/var/tmp") as path:
        yield Path(path)


def descendants(pid: int) -> list[int]:
    """Return the PIDs of all descendants of a process."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


@contextmanager
def running(guest: Container, directory: Path, *words: str | Path) -> Iterator[Iterator[str]]:
    """Run a program in the instance, with guestctl in its PATH; yield its lines."""
    shutil.copy(CHECKOUT / "guestapi/guest/guestctl.py", directory / "guestctl")
    (directory / "guestctl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "GOCACHE": str(directory / "go"),
        "GO111MODULE": "off",
        "TMPDIR": str(directory),
    }
    enter = ["nsenter", "-t", str(guest.pid), "-a", f"--wdns={directory}", "timeout", "--signal=KILL", "100"]
    with subprocess.Popen([*enter, *words], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            for pid in reversed(descendants(process.pid)):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # It has ended with another one, to which it wrote.


@contextmanager
def changing(service: Service) -> Iterator[None]:
    """Change ``user.now`` repeatedly until the end of the block."""
    ended = threading.Event()

    def change() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            service.configure("snippets", user_now=str(number))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def typed(block: str) -> list[str]:
    """Return the commands of a console block, in which ``curl`` is short for more, as the page says."""
    curl = 'curl() { command curl -s --unix-socket /dev/incus/sock "$@"; }\n'
    return [curl + line.removeprefix("# ") for line in block.splitlines()]


def test_every_section_is_tested() -> None:
    """Each section with code has a test of its name."""
    titles = [section.partition("\n")[0] for section in SECTIONS[1:] if "```" in section]
    assert [title for title in titles if f"test_{title.lower().replace(' ', '_')}" not in globals()] == []


def test_read_everything_at_once(guest: Container, directory: Path) -> None:
    """The command prints the tree."""
    ((command,),) = map(typed, snippets("Read everything at once"))
    with running(guest, directory, "sh", "-ec", command) as lines:
        assert json.loads("".join(lines))["config"]["user.role"] == "frontend"


def test_read_one_key(guest: Container, directory: Path) -> None:
    """The command prints the value without a newline, and fails with 22 for a key that is not set."""
    ((command,),) = map(typed, snippets("Read one key"))
    with running(guest, directory, "sh", "-ec", command) as lines:
        assert list(lines) == ["frontend"]
    with running(guest, directory, "sh", "-c", command.replace("role", "no") + "; echo $?") as lines:
        assert list(lines) == ["22\n"]


def test_wait_until_a_key_is_set(service: Service, guest: Container, directory: Path) -> None:
    """The loop ends when the key is set."""
    ((command,),) = map(typed, snippets("Wait until a key is set"))
    with running(guest, directory, "sh", "-ec", "echo begun\n" + command.replace("role", "later")) as lines:
        assert next(lines) == "begun\n"
        service.configure("snippets", user_later="here")
        assert list(lines) == ["here"]
    service.configure("snippets", user_later="")


def test_read_a_secret_that_is_given_once(service: Service, guest: Container, directory: Path) -> None:
    """The command gets the value, and the next one, which does not wait, 404."""
    ((command,),) = map(typed, snippets("Read a secret that is given once"))
    # Another test reads the key of that name.
    command = command.replace("user.password", "user.token")
    service.command("policy", "add", "user.token", "--instance", "snippets", "--once")
    service.configure("snippets", user_token="hush")
    with running(guest, directory, "sh", "-ec", command + '\nprintf %s "$password"') as lines:
        assert list(lines) == ["hush"]
    with running(guest, directory, "sh", "-ec", command.replace("?wait=60", "")) as lines:
        assert list(lines) == []
    assert guest.ask("/1.0/config/user.token").status == 404


def test_do_something_at_each_change(service: Service, guest: Container, directory: Path) -> None:
    """The loop prints each value that lasts, also the same one after the key was not set."""
    loop, follow = snippets("Do something at each change")
    head = directory / "role.head"
    files = loop.replace("/run/", f"{directory}/").replace("user.role", "user.changing").replace("wait=60", "wait=1")
    assert files.count("wait=1") == 1
    with running(guest, directory, "sh", "-ec", files) as lines:
        for value in ("first", "second", "", "second"):
            service.configure("snippets", user_changing=value)
            if value:
                assert next(lines) == f"role: {value}\n"
            else:
                # That it is gone is seen where the wait for it ends.
                until(lambda: head.read_text().startswith("HTTP/1.1 404"), "the end of the key")
    read, after = typed(follow)
    with running(guest, directory, "sh", "-ec", read) as lines:
        (event_id,) = re.findall(r"^Guestapi-Event-Id: (\d+)$", "".join(lines), re.MULTILINE)
    service.configure("snippets", user_changing="third")
    with running(guest, directory, "sh", "-ec", after.replace("4711", event_id)) as lines:
        metadata = json.loads(next(lines))["metadata"]
    assert metadata == {"key": "user.changing", "old_value": "second", "value": "third"}
    service.configure("snippets", user_changing="")


def test_publish_ssh_host_keys(service: Service, guest: Container, directory: Path) -> None:
    """The script publishes each public key of the instance; test_host_keys.py connects to an sshd that has them."""
    (script,) = snippets("Publish SSH host keys")
    made = guest.run("sh", "-ec", "mount -t tmpfs tmpfs /etc/ssh && ssh-keygen -q -A")
    assert made.code == 0, made.err
    service.command("policy", "allow", "attributes", "--instance", "snippets")
    with running(guest, directory, "sh", "-ec", script) as lines:
        assert list(lines) == []
    found = json.loads(service.command("attributes", "show", "snippets", "--format", "json").stdout)
    assert {one["path"]: one["value"] for one in found} == {
        f"hostkeys/{kind}": guest.run("cat", f"/etc/ssh/ssh_host_{kind}_key.pub").out
        for kind in ("ecdsa", "ed25519", "rsa")
    }


def test_prepare_for_an_announced_stop(service: Service, guest: Container, directory: Path) -> None:
    """The loop acknowledges a notice, for which the operator waits, and none of another kind."""
    (script,) = snippets("Prepare for an announced stop")
    with running(guest, directory, "sh", "-ec", script):
        service.command("notice", "snippets", "restart", "--in", "5m")
        service.command("notice", "snippets", "stop", "--in", "5m", "--wait")
    notices = json.loads(guest.ask("/1.0/guestapi/notices").text)
    assert sorted((one["type"], one["status"]) for one in notices) == [
        ("restart", "pending"),
        ("stop", "acknowledged"),
    ]
    service.command("notices", "cancel", "snippets")
    service.command("policy", "disallow", "attributes", "--instance", "snippets")


def test_in_python(service: Service, guest: Container, directory: Path) -> None:
    """Both programs print the instance's values and changes."""
    blocking, concurrent = snippets("In Python")
    (directory / "blocking.py").write_text(blocking + "\n")
    (directory / "with_asyncio.py").write_text(concurrent)
    with running(guest, directory, sys.executable, "blocking.py") as lines, changing(service):
        assert re.fullmatch(r"user\.now \d+\n", next(lines))
    assert service.instance("snippets").ready
    with running(guest, directory, sys.executable, "with_asyncio.py") as lines, changing(service):
        assert next(lines) == "frontend\n"
        assert re.fullmatch(r"user\.now \d+\n", next(lines))


def test_in_shell_scripts(service: Service, guest: Container, directory: Path) -> None:
    """The script waits for the key, and reports readiness."""
    (script,) = snippets("In shell scripts")
    with running(guest, directory, "sh", "-ec", script) as lines:
        assert list(lines) == ["role: frontend\n"]
    assert service.instance("snippets").ready


def test_in_node(service: Service, guest: Container, directory: Path) -> None:
    """The program waits for the key, and prints changes."""
    (program,) = snippets("In Node")
    (directory / "x.js").write_text(program)
    waits_and_follows(service, guest, directory, "node", "x.js")


def test_in_go(service: Service, guest: Container, directory: Path) -> None:
    """The program waits for the key, and prints changes."""
    (program,) = snippets("In Go")
    (directory / "x.go").write_text(program)
    waits_and_follows(service, guest, directory, "go", "run", "x.go")


def waits_and_follows(service: Service, guest: Container, directory: Path, *command: str) -> None:
    """Run a program that waits for ``user.role``, and then prints changes."""
    with running(guest, directory, *command) as lines, changing(service):
        assert next(lines) == "role: frontend\n"
        assert re.fullmatch(r"user\.now: \d+\n", next(lines))


def test_in_systemd_units(service: Service) -> None:
    """In an instance with systemd, a service starts when the key is set that it requires, and readiness is reported."""
    waits, reports = snippets("In systemd units")
    needs = "[Unit]\nRequires=guest-key@user.role.service\nAfter=guest-key@user.role.service\n"
    with Machine() as machine:
        with service.writer.change() as change:
            steps.start(change, steps.add(change, "default", "booted"), examine(machine.pid))
        machine.run("install", str(CHECKOUT / "guestapi/guest/guestctl.py"), "/usr/local/bin/guestctl")
        units = {"guest-key@.service": waits, "guest-ready.service": reports}
        units["app.service"] = f"{needs}[Service]\nExecStart=/bin/sleep infinity\n"
        for name, unit in units.items():
            # The machine has the host's /dev.
            unit = unit.replace("[Service]\n", f"[Service]\nEnvironment=GUESTAPI_SOCKET={service.socket}\n")
            machine.run("sh", "-c", 'printf %s "$1" >"$2"', "write", unit, f"/etc/systemd/system/{name}")
        verified = machine.run("systemd-analyze", "verify", *(f"/etc/systemd/system/{name}" for name in units))
        assert [line for line in verified.stderr.splitlines() if "guest-" in line or "app." in line] == []
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "--no-block", "app.service")
        state = ("systemctl", "show", "--value", "--property=ActiveState")
        until(lambda: machine.run(*state, "guest-key@user.role").stdout == "activating\n", "the wait for the key")
        assert machine.run(*state, "app").stdout == "inactive\n"
        service.configure("booted", user_role="frontend")
        until(lambda: machine.run(*state, "app").stdout == "active\n", "the service that needs the key")
        assert not service.instance("booted").ready
        machine.run("systemctl", "start", "guest-ready.service")
        assert service.instance("booted").ready
    service.remove("booted")


def test_show_others_who_you_are(directory: Path) -> None:
    """The command has a token, which names the instance; on a host that has not switched it on, it fails."""
    ((command,),) = map(typed, snippets("Show others who you are"))
    with hosting() as host, host.service.container("snippets", base=None) as guest:
        with running(guest, directory, "sh", "-ec", f'{command}\necho "$token"') as lines:
            (token,) = lines
        claims = host.verify(token.strip())
        assert claims["sub"].endswith(host.service.instance("snippets").uuid)
    with (
        Service(dialects=["incus"]) as service,
        service.container("snippets", base=None) as guest,
        running(guest, directory, "sh", "-c", f"({command}); echo $?") as lines,
    ):
        assert list(lines) == ["1\n"]


def test_table_of_guestctl(service: Service, guest: Container, directory: Path) -> None:
    """In the table of docs/guestctl.md, a command does what curl beside it does."""
    text = (CHECKOUT / "docs/guestctl.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `guestctl ([^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(rows) > 8
    service.command("notice", "snippets", "freeze", "--in", "5m")
    service.command("policy", "allow", "attributes", "--instance", "snippets")
    for words, curl in rows:
        if words.startswith(("events", "token")) or "ID" in words:
            continue  # They do not end, print another token each time, or need the id of a notice.
        printed = []
        for line in (f"guestctl {words}", curl):
            with running(guest, directory, "sh", "-ec", line) as lines:
                printed.append("".join(lines))
            if words.startswith("ready"):
                assert service.instance("snippets").ready is ("--not" not in words)
        if words == "list":
            printed[1] = "".join(path.removeprefix("/1.0/config/") + "\n" for path in json.loads(printed[1]))
        if words == "attribute list":
            prefix = "/1.0/guestapi/attributes/"
            printed[1] = "".join(path.removeprefix(prefix) + "\n" for path in json.loads(printed[1]))
        if not words.startswith("ready"):
            assert printed[0] == printed[1], words
    service.command("notices", "cancel", "snippets")
