"""Every line of docs/operations.md and docs/from-incus.md, typed: what it prints is what the documents show."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestapi.model import Init
from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.attributes import AttributeReport, Outcome
from guestapi.store.lookup import get_instance
from guestapi.store.writing import Writer
from tests.docs.documents import CHECKOUT
from tests.docs.test_guides import matches
from tests.harness.containers import Container
from tests.harness.service import COMMAND
from tests.harness.waiting import until

pytestmark = pytest.mark.root

#: Lines that need a machine with systemd, and the test of tests/docs/test_guides.py or tests/package that types them.
ELSEWHERE = (
    ("make install", "test_operations"),
    ("systemctl enable --now guestapi.socket", "test_operations"),
    ("systemctl enable --now guestapi-lxd.socket", "test_operations"),
    ("guestapi check", "test_operations"),
    ("apt-get install", "test_deb"),
    ("systemctl edit guestapi", "test_operations_edit_of_the_unit"),
    ("guestapi top", "test_top"),
    ("systemctl status guestapi", "test_operations_look_after"),
    ("journalctl -u guestapi", "test_operations_look_after"),
)


class Typing:
    """A shell in an empty directory, where ``guestapi`` has a store of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        programs = directory / "bin"
        programs.mkdir()
        config = directory / "guestapi.toml"
        config.write_text(f'[store]\nurl = "sqlite:///{directory}/store.db"\n')
        wrapper = programs / "guestapi"
        wrapper.write_text(f'#!/bin/sh\nexec env GUESTAPI_CONFIG={config} {COMMAND} "$@"\n')
        wrapper.chmod(0o755)
        self.environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(directory), "LANG": "C.UTF-8"}

    def run(self, line: str, *, check: bool = True) -> list[str]:
        """Type a line: what it prints, errors included."""
        done = subprocess.run(
            ["sh", "-c", line],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        assert not check or done.returncode == 0, f"{line}: {done.stdout}"
        return done.stdout.splitlines()


@pytest.fixture
def shell(tmp_path: Path) -> Typing:
    """The shell."""
    return Typing(tmp_path)


def blocks(document: str) -> Iterator[list[tuple[str, list[str]]]]:
    """The commands of each console block, each with the output that is shown."""
    for text in re.findall(r"```console\n(.*?)```", (CHECKOUT / document).read_text(), re.DOTALL):
        found: list[tuple[str, list[str]]] = []
        for line in text.splitlines():
            if line.startswith("# "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        yield found


def block(document: str, beginning: str) -> list[tuple[str, list[str]]]:
    """The block whose first command begins like that."""
    return next(one for one in blocks(document) if one[0][0].startswith(beginning))


def play(
    shell: Typing,
    commands: list[tuple[str, list[str]]],
    replaced: dict[str, str] | None = None,
    before: dict[str, Callable[[], object]] | None = None,
) -> None:
    """Type the commands of a block; what each prints is what is shown, but for numbers.

    Args:
        shell: where they are typed.
        commands: of the block.
        replaced: what to type in the place of something, such as a PID.
        before: what to do before a command.
    """
    for command, shown in commands:
        (before or {}).get(command, lambda: None)()
        for old, new in (replaced or {}).items():
            command, shown = command.replace(old, new), [line.replace(old, new) for line in shown]
        printed = [
            re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", line)
            for line in shell.run(command, check=not any(line.startswith("Error: ") for line in shown))
        ]
        shown = [re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", line) for line in shown]
        assert matches(printed, shown), f"{command} prints:\n" + "\n".join(printed)


def test_every_line_is_typed() -> None:
    """Each line of docs/operations.md is typed by a test, but for those that `ELSEWHERE` excepts, with the reason."""
    verbs = ("apply", "attributes", "backup", "config", "export", "instance", "policy", "profile", "restore", "serve")
    typed = tuple(f"guestapi {verb} " for verb in verbs)
    for commands in blocks("docs/operations.md"):
        for command, _shown in commands:
            known = command.startswith(typed) or any(command.startswith(line) for line, _where in ELSEWHERE)
            assert known, f"no test types: {command}"


def test_operations_registers(shell: Typing) -> None:
    """A container is registered by hand, in both blocks that show it."""
    with Container() as container:
        pid = {"4711": str(container.pid)}
        both = [one for one in blocks("docs/operations.md") if one[0][0].startswith("guestapi instance add web")]
        assert len(both) == 2
        for commands in both:
            play(shell, commands, pid)
            shell.run("guestapi instance rm web --force")


def test_operations_definitions(shell: Typing) -> None:
    """Definitions are kept in files and applied again."""
    shell.run("guestapi instance add web --config user.role=frontend")
    play(shell, block("docs/operations.md", "guestapi instance show web"))
    assert (shell.directory / "web.yaml").read_text() == (shell.directory / "all.yaml").read_text()
    shell.run("guestapi rm web && guestapi instance add web <web.yaml && guestapi config edit web <web.yaml")


def test_operations_profiles(shell: Typing) -> None:
    """A profile is shared."""
    shell.run("guestapi instance add web1")
    play(shell, block("docs/operations.md", "guestapi profile create"))
    assert shell.run("guestapi config get web1 user.role") == ["backend"]


def test_operations_attributes(shell: Typing) -> None:
    """What an instance has said is shown, and made into known_hosts."""
    shell.run("guestapi instance add web")
    commands = block("docs/operations.md", "guestapi policy allow attributes")
    writer = Writer(Settings(store=StoreSettings(url=f"sqlite:///{shell.directory}/store.db")))
    shown = [line.split(maxsplit=3) for line in commands[1][1][1:]]

    def say() -> None:
        with writer.change() as change:
            steps.start(change, get_instance(change, "default", "web"), Init(100, 5, "boot", 7))
            web = get_instance(change, "default", "web")
        for path, _size, _written, value in shown:
            assert writer.record_all([AttributeReport(web, path, value.encode())]) == [Outcome.CREATED]

    play(shell, commands, {"/root/": f"{shell.directory}/"}, {commands[1][0]: say})
    published = next(value for path, _size, _written, value in shown if path.startswith("hostkeys/"))
    assert (shell.directory / "known_hosts").read_text() == f"web.example.org {published}\n"


def test_operations_backup(shell: Typing) -> None:
    """A backup is restored after a change and a removal."""
    for name in ("web", "db", "other"):
        shell.run(f"guestapi instance add {name}")
    commands = block("docs/operations.md", "guestapi backup")
    change = "guestapi config set web user.a=1 && guestapi rm db"
    play(
        shell,
        commands,
        {"/root/": f"{shell.directory}/"},
        {commands[1][0]: lambda: shell.run(change)},
    )


def test_operations_serve(shell: Typing) -> None:
    """Without systemd, the service runs in the foreground and answers on both sockets until it is stopped."""
    shell.run("guestapi instance add web")
    ((command, _shown),) = block("docs/operations.md", "guestapi serve")
    places = [shell.directory / name for name in ("incus", "lxd")]
    for place in places:
        place.mkdir()
    line = command.replace("/run/guestapi/", f"{shell.directory}/")
    environment = {**shell.environment, "PATH": shell.environment["PATH"]}
    with subprocess.Popen(
        ["sh", "-c", f"exec {line}"], env=environment, cwd=shell.directory, stderr=subprocess.DEVNULL
    ) as process:
        try:
            for place in places:
                until(lambda place=place: _answers(place / "sock"), f"{place} answers")  # type: ignore[misc]  # bound
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def _answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(path))
            connection.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
            return connection.recv(4096).startswith(b"HTTP/1.0 200 ")
    except OSError:
        return False


def test_completion(shell: Typing) -> None:
    """The line for ~/.bashrc defines the completion."""
    done = subprocess.run(
        ["bash", "-c", 'eval "$(guestapi completion bash)" && complete -p guestapi'],
        env=shell.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "guestapi" in done.stdout


def rows() -> list[tuple[str, str]]:
    """The habits: with `incus`, and with `guestapi`."""
    text = (CHECKOUT / "docs/from-incus.md").read_text()
    found = re.findall(r"^\| `(incus .*?)` \| `(guestapi .*?)` \|", text, re.MULTILINE)
    return [(habit.replace("\\|", "|"), command.replace("\\|", "|")) for habit, command in found]


def test_habits(shell: Typing) -> None:
    """Each command beside a habit is typed, in the order of the table, and succeeds."""
    found = rows()
    assert len(found) > 30
    with Container() as container:
        for _habit, command in found:
            if command == "guestapi events":
                with subprocess.Popen(
                    ["sh", "-c", f"exec {command} --since 0"],
                    env=shell.environment,
                    stdout=subprocess.PIPE,
                    text=True,
                ) as process:
                    assert process.stdout is not None
                    assert "instance-added" in process.stdout.readline()
                    process.send_signal(signal.SIGINT)
                    process.stdout.read()
                continue
            shell.run(command.replace("4711", str(container.pid)))
    assert shell.run("guestapi list -c n -f csv") == ["NAME", "web", "db"]


def test_session(shell: Typing) -> None:
    """The session prints what it shows."""
    (commands,) = blocks("docs/from-incus.md")
    play(shell, commands)


CHECK_IN_80_COLUMNS = """\
ok   configuration: HERE/guestapi.toml
ok   gunicorn: defaults, there is no HERE/gunicorn.conf.py
ok   store.url: HERE/store.db
"""


def test_check_is_the_same_on_a_terminal(shell: Typing) -> None:
    """On a terminal of 80 columns, check prints a line for each check, with or without colours."""
    import pty

    written = {}
    for colours, environment in (("no", {"NO_COLOR": "1"}), ("yes", {})):
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            ["guestapi", "check", "--settings"],
            executable=str(shell.directory / "bin/guestapi"),
            env={**shell.environment, "TERM": "xterm", "COLUMNS": "80", **environment},
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            parts = []
            try:
                while part := os.read(ours, 65536):
                    parts.append(part)
            except OSError:
                pass  # EIO: the other side is closed.
            os.close(ours)
            assert process.wait(20) == 0
        written[colours] = b"".join(parts).decode().replace("\r\n", "\n").replace(str(shell.directory), "HERE")
    assert written["no"] == CHECK_IN_80_COLUMNS
    assert written["yes"] == CHECK_IN_80_COLUMNS.replace("ok  ", "\x1b[32mok  \x1b[0m")
