"""A virtual machine's requests, handed over by the relay, beside a container's in the same rounds.

`python -m benchmarks.machines PATH HANDOVER` is the relay: it listens on a Unix socket in the place of vsock, since few
machines that measure have /dev/vhost-vsock. So the figures have all that guestapi does, and nothing of vsock itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contenders import CONFIG, DEVICES, TOML, Contender, running
from benchmarks.processes import LOAD_CORE, SERVER_CORE, Inside, pin
from benchmarks.scale import SOCKET
from guestapi.callers.machines import examine_machine
from guestapi.relay.loop import Relay
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from tests.harness.scratch import SCRATCH
from tests.harness.service import USER, Service
from tests.harness.vmm import UnixVsock, Vmm

#: As of guestapi-vsock.socket.
_BACKLOG = 1024
_CID = 42


@contextmanager
def contenders() -> Iterator[list[Contender]]:
    """Start a service with one worker, a container and a virtual machine; both send their load from the container."""
    with tempfile.TemporaryDirectory(prefix="guestapi-handover-", dir=SCRATCH) as name:
        directory = Path(name)
        directory.chmod(0o755)
        os.chown(directory, USER, USER)
        toml = f'[[listener]]\npath = "{directory}/handover"\ndialect = "handover"\n{TOML}'
        with (
            Service(workers=1, dialects=["incus"], toml=toml) as service,
            service.container("c1", CONFIG, DEVICES) as container,
            Vmm(f"guest-cid={_CID}") as vmm,
        ):
            with service.writer.change() as change:
                steps.add(change, "default", "vm1", type="virtual-machine", config=CONFIG, devices=DEVICES)
                steps.start(change, get_instance(change, "default", "vm1"), examine_machine(vmm.pid, _CID))
            # Beside the guest API's socket, so that the container sees it, too.
            path = service.socket.parent / "vsock"
            words = [sys.executable, "-m", "benchmarks.machines", str(path), f"{directory}/handover"]
            with running(words, path, {}) as relay:
                pin([service.pid, *service.workers, relay], SERVER_CORE)
                inside = Inside(container.pid, LOAD_CORE)
                yield [
                    Contender("container", SOCKET, (*service.workers,), inside),
                    Contender("virtual machine", f"{_CID}@/dev/incus/vsock", (*service.workers, relay), inside),
                ]


def main(path: str, handover: str) -> None:
    """Relay for ever."""
    listener = UnixVsock(Path(path), _BACKLOG)
    Path(path).chmod(0o666)
    Relay([(listener, "incus")], handover).run(lambda: False)


if __name__ == "__main__":
    main(*sys.argv[1:])
