"""`make demo`: the service, a container, and every endpoint as it is seen from inside. Leaves nothing behind."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.harness.containers import Container
from tests.harness.lxc import Lxc
from tests.harness.service import COMMAND, UNPRIVILEGED, USER

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


class Demo:
    """One run: a directory for everything, the service, and the container c1."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="guestapi-demo-", dir="/run"))
        self.directory.chmod(0o755)
        self.config = self.directory / "guestapi.toml"
        self.socket = self.directory / "incus" / "sock"
        self.state = self.directory / "state"
        for path in (self.socket.parent, self.state):
            path.mkdir(mode=0o755)
            os.chown(path, USER, USER)
        self.config.write_text(f'store.url = "sqlite:///{self.state}/store.db"\n[[listener]]\npath = "{self.socket}"\n')
        self.log = (self.directory / "log").open("wb")

    def activate(self) -> subprocess.Popen[bytes]:
        """Have the socket listened on by systemd-socket-activate: the service starts at the first connection."""
        service = [*UNPRIVILEGED, str(COMMAND), "--config", str(self.config), "serve"]
        process = subprocess.Popen(
            ["systemd-socket-activate", "--listen", str(self.socket), "--fdname=incus", *service],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        while not self.socket.exists():
            time.sleep(0.01)
        self.socket.chmod(0o666)
        return process

    def on_host(self, command: str) -> None:
        """The operator types a guestapi command."""
        print(f"{DIM}host#{PLAIN} {BOLD}guestapi {command}{PLAIN}")
        done = subprocess.run([COMMAND, "--config", self.config, *shlex.split(command)], capture_output=True, text=True)
        self._show(done.stdout + done.stderr)
        assert done.returncode == 0

    def inside(self, container: Container | Lxc, command: str, *, expect: str) -> None:
        """Somebody types a command in the container; the demo fails if `expect` is not in what it prints."""
        print(f"{DIM}  c1#{PLAIN} {BOLD}{command}{PLAIN}")
        done = container.run("/usr/bin/sh", "-c", command.replace("curl ", "curl -s --unix-socket /dev/incus/sock "))
        self._show(done.out + done.err)
        assert done.code == 0
        assert expect in done.out, f"expected {expect!r}"

    def _show(self, text: str) -> None:
        for line in text.splitlines():
            print(f"      {line}")

    def close(self) -> None:
        """Leave nothing behind."""
        self.log.close()
        shutil.rmtree(self.directory)


def say(text: str) -> None:
    """A word to who watches."""
    print(f"\n{BOLD}{text}{PLAIN}")


def main() -> None:
    """Show it all."""
    began = time.monotonic()
    if os.geteuid() != 0:
        sys.exit("The demo makes a container, which takes root: sudo make demo")
    demo = Demo()
    process = demo.activate()
    try:
        if shutil.which("lxc-start") and Path("/bin/busybox").exists():
            show_lxc(demo)
        else:
            show_container(demo)
    finally:
        process.terminate()
        process.wait(20)
        demo.close()
    say(f"That was all of it, in {time.monotonic() - began:.1f} s; nothing of it is left.")


def show_container(demo: Demo) -> None:
    """A container made with nothing but namespaces, registered by hand."""
    with Container([(demo.socket.parent, "/dev/incus")]) as c1:
        say("A socket that systemd listens on, a container that has it at /dev/incus/sock (curl -s --unix-socket ...).")
        demo.on_host("instance add c1 --config user.foo=bar --device eth0,type=nic,nictype=bridged,parent=br0")
        demo.on_host(f"instance start c1 --pid {c1.pid}")
        show(demo, c1)


def show_lxc(demo: Demo) -> None:
    """An LXC container, which registers itself."""
    hook = f"{COMMAND} --config {demo.config}"
    with Lxc(demo.directory, "c1", hook, demo.socket.parent) as c1:
        say(
            "A socket that systemd listens on, an LXC container with it at /dev/incus/sock (curl -s --unix-socket ...)."
        )
        demo.on_host("instance add c1 --config user.foo=bar --device eth0,type=nic,nictype=bridged,parent=br0")
        print(f"{DIM}host#{PLAIN} {BOLD}lxc-start c1{PLAIN}      # its hook registers it, see docs/lxc.md")
        c1.start()
        show(demo, c1)


def show(demo: Demo, c1: Container | Lxc) -> None:
    """The steps."""

    say("Its first request starts the service. Every endpoint:")
    demo.inside(c1, "curl http://x/", expect='["/1.0"]')
    demo.inside(c1, "curl http://x/1.0", expect='"state":"Started"')
    demo.inside(c1, "curl http://x/1.0/config", expect="/1.0/config/user.foo")
    demo.inside(c1, "curl http://x/1.0/config/user.foo; echo", expect="bar")
    demo.inside(c1, "curl http://x/1.0/devices", expect='"nictype":"bridged"')
    demo.inside(c1, "curl http://x/1.0/meta-data", expect="local-hostname: c1")

    say("The operator changes something, and the next request sees it.")
    demo.on_host("config set c1 user.foo=baz cloud-init.user-data='#cloud-config'")
    demo.inside(c1, "curl http://x/1.0/config/user.foo; echo", expect="baz")

    say("Another who listens hears of it at once, and can resume where it was: ?since=ID.")
    with ThreadPoolExecutor() as pool:
        listening = pool.submit(demo.inside, c1, "curl -N -m 2 http://x/1.0/events; true", expect="user.mood")
        time.sleep(1)
        demo.on_host("config set c1 user.mood=fine")
        listening.result()

    say("Other namespaces of the configuration are none of the guest's business, nor is it a user's.")
    demo.on_host("config set c1 limits.memory=1GiB")
    demo.inside(c1, "curl -w '%{http_code}\\n' http://x/1.0/config/limits.memory", expect="403")
    command = "setpriv --reuid=1000 --clear-groups curl -w '%{http_code}\\n' http://x/1.0/config/user.foo"
    demo.inside(c1, command, expect="401")

    say("The workload says that it is ready.")
    demo.inside(c1, "curl -X PATCH -d '{\"state\": \"Ready\"}' -w '%{http_code}\\n' http://x/1.0", expect="200")
    demo.inside(c1, "curl http://x/1.0", expect='"state":"Ready"')
    demo.on_host("instance list")


if __name__ == "__main__":
    main()
