"""`make demo`: the service, a container, and every endpoint as seen from inside it. Leaves nothing behind.

The README shows the output; tests/docs/test_demo.py compares the two.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.harness.containers import Container
from tests.harness.enterable import run_where_enterable
from tests.harness.following import install_hook
from tests.harness.lxc import Lxc
from tests.harness.scratch import SCRATCH
from tests.harness.service import COMMAND, UNPRIVILEGED, USER

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")

#: Seconds after which a step fails.
_LIMIT = 30.0

#: An argument of the command line: use no LXC container, even if LXC is installed.
NAMESPACES = "namespaces"

#: The command in the container that `curl` stands for.
_CURL = "curl -s --unix-socket /dev/incus/sock "


class DemoError(Exception):
    """A step failed."""


class Demo:
    """One run: a directory for everything, the service, and the container c1."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="guestapi-demo-", dir=SCRATCH))
        self.directory.chmod(0o755)
        self.config = self.directory / "guestapi.toml"
        self.socket = self.directory / "incus" / "sock"
        self.state = self.directory / "state"
        for path in (self.socket.parent, self.state):
            path.mkdir(mode=0o755)
            os.chown(path, USER, USER)
        self.config.write_text(f'store.url = "sqlite:///{self.state}/store.db"\n[[listener]]\npath = "{self.socket}"\n')
        self.log = self.directory / "log"

    def activate(self) -> subprocess.Popen[bytes]:
        """Listen on the socket with systemd-socket-activate, which starts the service at the first connection.

        Raises:
            DemoError: the socket does not appear in time.
        """
        service = [*UNPRIVILEGED, str(COMMAND), "--config", str(self.config), "serve"]
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                ["systemd-socket-activate", "--listen", str(self.socket), "--fdname=incus", *service],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + _LIMIT
        while not self.socket.exists():
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                process.wait()
                raise DemoError("systemd-socket-activate does not listen")
            time.sleep(0.01)
        self.socket.chmod(0o666)
        return process

    def on_host(self, command: str) -> None:
        """Run a guestapi command as the operator.

        Raises:
            DemoError: it fails.
        """
        print(f"{DIM}host#{PLAIN} {BOLD}guestapi {command}{PLAIN}")
        words = [str(COMMAND), "--config", str(self.config), *shlex.split(command)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        self._show(done.stdout + done.stderr)
        if done.returncode != 0:
            raise DemoError(f"guestapi {command}: exit {done.returncode}")

    def inside(self, container: Container | Lxc, command: str, *, expect: str) -> None:
        """Run a command in the container.

        Raises:
            DemoError: it fails, or its output lacks `expect`.
        """
        print(f"{DIM}  c1#{PLAIN} {BOLD}{command}{PLAIN}")
        done = container.run("/usr/bin/sh", "-c", command.replace("curl ", _CURL))
        self._show(done.out + done.err)
        if done.code != 0:
            raise DemoError(f"{command}: exit {done.code}")
        if expect not in done.out:
            raise DemoError(f"{command}: {expect!r} was expected, {done.out!r} came")

    def follow(self, container: Container | Lxc, command: str, change: str, *, expect: str) -> None:
        """Run a command in the container that follows the event stream, make a change, and show its event.

        Raises:
            DemoError: the event is not `expect`, or does not arrive.
        """
        print(f"{DIM}  c1#{PLAIN} {BOLD}{command}{PLAIN}")
        # After the head of the response the client receives every change.
        words = shlex.split(command.replace("curl ", f"{_CURL}-v "))
        enter = ["nsenter", "-t", str(container.pid), "-a", "--setuid", "0", "--setgid", "0"]
        with subprocess.Popen(
            [*enter, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as curl:
            assert curl.stdout is not None
            assert curl.stderr is not None
            try:
                _read(curl.stderr.fileno(), b"< HTTP/1.1 200")
                self.on_host(change)
                line = _read(curl.stdout.fileno(), b"\n")
            finally:
                curl.terminate()
        self._show(line)
        if expect not in line:
            raise DemoError(f"{command}: {expect!r} was expected, {line!r} came")

    def wait(self, container: Container | Lxc, command: str, change: str, *, expect: str) -> None:
        """Type a command in the container that waits for a change, make the change, and show the answer.

        Raises:
            DemoError: the answer is not `expect`, or does not come.
        """
        print(f"{DIM}  c1#{PLAIN} {BOLD}{command}{PLAIN}")
        enter = ["nsenter", "-t", str(container.pid), "-a", "--setuid", "0", "--setgid", "0"]
        shell = ["/usr/bin/sh", "-c", command.replace("curl ", f"{_CURL}-v ")]
        with subprocess.Popen(
            [*enter, *shell], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as curl:
            assert curl.stdout is not None
            assert curl.stderr is not None
            try:
                # The request has been sent.
                _read(curl.stderr.fileno(), b"> GET ")
                self.on_host(change)
                answer = _read(curl.stdout.fileno(), b"\n")
            finally:
                curl.terminate()
        self._show(answer)
        if expect not in answer:
            raise DemoError(f"{command}: {expect!r} was expected, {answer!r} came")

    def follow_lxc(self, lxcpath: Path) -> subprocess.Popen[bytes]:
        """Start the follower as guestapi-lxc.service does.

        Raises:
            DemoError: it does not listen in time.
        """
        doorbells = self.directory / "sources"
        with self.config.open("a") as config:
            config.write(f'[sources]\ndoorbells = "{doorbells}"\n[sources.lxc]\npaths = ["{lxcpath}"]\n')
        with self.log.open("ab") as log:
            follower = subprocess.Popen([COMMAND, "--config", self.config, "follow", "lxc"], stdout=log, stderr=log)
        until = time.monotonic() + _LIMIT
        while not (doorbells / "lxc.sock").exists():
            if follower.poll() is not None or time.monotonic() > until:
                follower.kill()
                raise DemoError("the follower of LXC does not listen")
            time.sleep(0.02)
        return follower

    def _show(self, text: str) -> None:
        for line in text.splitlines():
            print(f"      {line}")

    def close(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory)


def _read(descriptor: int, end: bytes) -> str:
    """Read from a pipe until `end` has arrived."""
    found = b""
    while end not in found:
        ready, _none, _none = select.select([descriptor], [], [], _LIMIT)
        more = os.read(descriptor, 65536) if ready else b""
        if not more:
            raise DemoError("the event stream has ended, or nothing has come from it")
        found += more
    return found.decode()


def explain(text: str) -> None:
    """Print an explanation of the next steps."""
    print(f"\n{BOLD}{text}{PLAIN}")


def main() -> None:
    """Run the demo. If a step fails, print the service's log, and exit with 1."""
    began = time.monotonic()
    if os.geteuid() != 0:
        sys.exit("The demo makes a container, which takes root: sudo make demo")
    run_where_enterable()
    demo = Demo()
    try:
        run(demo)
    except BaseException as error:
        sys.stdout.flush()
        log = demo.log.read_text() if demo.log.exists() else ""
        print(f"\nThe log of the service:\n{log or '(nothing)'}", file=sys.stderr)
        if isinstance(error, DemoError):
            sys.exit(f"The demo failed: {error}")
        raise
    finally:
        demo.close()
    explain(f"The demo took {time.monotonic() - began:.1f} s. It has removed everything that it made.")


def run(demo: Demo) -> None:
    """Run the service, and all steps with a container."""
    process = demo.activate()
    try:
        if NAMESPACES not in sys.argv and shutil.which("lxc-start") and Path("/bin/busybox").exists():
            show_lxc(demo)
        else:
            show_container(demo)
    finally:
        process.terminate()
        process.wait(_LIMIT)


def show_container(demo: Demo) -> None:
    """Run the steps with a container that is made of namespaces alone and registered by hand."""
    with Container([(demo.socket.parent, "/dev/incus")]) as c1:
        explain("A container is started, with the socket at /dev/incus/sock, and registered by the PID of its init.")
        demo.on_host("instance add c1 --config user.foo=bar --device eth0,type=nic,nictype=bridged,parent=br0")
        demo.on_host(f"instance start c1 --pid {c1.pid}")
        show(demo, c1)


def show_lxc(demo: Demo) -> None:
    """Run the steps with an LXC container, which registers itself."""
    lxcpath = demo.directory / "lxc"
    lxcpath.mkdir()
    follower = demo.follow_lxc(lxcpath)
    hook = f"{install_hook(demo.directory)} --config {demo.config}"
    try:
        with Lxc(lxcpath, "c1", hook, demo.socket.parent) as c1:
            show_lxc_container(demo, c1)
    finally:
        follower.terminate()
        follower.wait(_LIMIT)


def show_lxc_container(demo: Demo, c1: Lxc) -> None:
    """Run the steps with a container of LXC."""
    explain("An LXC container is started, with the socket at /dev/incus/sock. Its hook registers it (docs/lxc.md).")
    demo.on_host("instance add c1 --config user.foo=bar --device eth0,type=nic,nictype=bridged,parent=br0")
    print(f"{DIM}host#{PLAIN} {BOLD}lxc-start c1{PLAIN}")
    c1.start()
    show(demo, c1)


def show(demo: Demo, c1: Container | Lxc) -> None:
    """Run the steps."""
    explain("The first request starts the service. 'curl' stands for 'curl -s --unix-socket /dev/incus/sock'.")
    demo.inside(c1, "curl http://x/", expect='["/1.0"]')
    demo.inside(c1, "curl http://x/1.0", expect='"state":"Started"')
    demo.inside(c1, "curl http://x/1.0/config", expect="/1.0/config/user.foo")
    demo.inside(c1, "curl http://x/1.0/config/user.foo; echo", expect="bar")
    demo.inside(c1, "curl http://x/1.0/devices", expect='"nictype":"bridged"')
    demo.inside(c1, "curl http://x/1.0/meta-data", expect="local-hostname: c1")

    explain("The operator changes the configuration. The next request is answered with the new value.")
    demo.on_host("config set c1 user.foo=baz cloud-init.user-data='#cloud-config'")
    demo.inside(c1, "curl http://x/1.0/config/user.foo; echo", expect="baz")

    explain("A client that follows the events is told of a change at once.")
    demo.follow(c1, "curl -N http://x/1.0/events", "config set c1 user.mood=fine", expect="user.mood")

    explain("A client can wait until a key is set: the request is answered when it is.")
    path = "http://x/1.0/guestapi/tree/config/user.go?wait=60"
    demo.wait(c1, f"curl '{path}'; echo", "config set c1 user.go=now", expect="now")

    explain("A secret can be given once. The first who asks gets it, and the operator sees who that was.")
    demo.on_host("policy add 'user.password*' --instance c1 --once")
    demo.on_host("config set c1 user.password=correct-horse")
    demo.inside(c1, "curl http://x/1.0/config/user.password; echo", expect="correct-horse")
    demo.inside(c1, "curl -w '%{http_code}\\n' http://x/1.0/config/user.password", expect="404")
    demo.on_host("policy spent")

    explain("A guest reads user.* and cloud-init.* only, and only its root user does.")
    demo.on_host("config set c1 limits.memory=1GiB")
    demo.inside(c1, "curl -w '%{http_code}\\n' http://x/1.0/config/limits.memory", expect="403")
    command = "setpriv --reuid=1000 --clear-groups curl -w '%{http_code}\\n' http://x/1.0/config/user.foo"
    demo.inside(c1, command, expect="401")

    explain("The workload reports that it is ready.")
    demo.inside(c1, "curl -X PATCH -d '{\"state\": \"Ready\"}' -w '%{http_code}\\n' http://x/1.0", expect="200")
    demo.inside(c1, "curl http://x/1.0", expect='"state":"Ready"')
    demo.on_host("instance list")


if __name__ == "__main__":
    main()
