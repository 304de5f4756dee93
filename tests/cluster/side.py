"""One member of the cluster with its guestapi, as the tests of this directory use it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.cluster import Cluster, Member
from tests.harness.mirroring import MirrorProcess
from tests.harness.service import Service

#: Seconds to wait for an expected state.
TIMEOUT = 60.0


@dataclass
class Side:
    """A member, its service and its mirror."""

    member: Member
    service: Service
    mirror: MirrorProcess

    def known(self, project: str = "default") -> dict[str, dict[str, Any]]:
        """Return the instances of a project that this guestapi answers, by name."""
        return {one["name"]: one for one in self.service.listed() if one["project"] == project}

    def value(self, name: str, key: str, project: str = "default") -> str | None:
        """Return a key of an instance as this guestapi has it; None if it has no such instance or key."""
        if name not in self.known(project):
            return None
        return self.service.instance(name, project).config.get(key)

    @property
    def device(self) -> tuple[str, str]:
        """The options of a disk device with this guestapi's socket, at `socket` in an instance."""
        return f"source={self.service.sockets['incus'].parent}", f"path={Path(self.socket).parent}"

    @property
    def socket(self) -> str:
        """The path at which an instance with the device has the socket of this guestapi."""
        return f"/dev/guestapi-{self.member.name}/sock"

    def wait_for(self, name: str) -> None:
        """Wait until this guestapi answers an instance of the default project."""
        wait(lambda: self.known().get(name, {}).get("pid"))

    def fault(self) -> str:
        """Return what `guestapi check` finds wrong with the mirror."""
        findings = json.loads(self.service.command("check", "--format", "json", check=False).stdout)
        return "; ".join(str(one["text"]) for one in findings if one["check"] == "mirror incus" and not one["ok"])

    @contextmanager
    def launched(self, name: str, *words: str) -> Iterator[None]:
        """Run a container on this member for the length of the block, asked for at this member."""
        self.member.client("launch", "busybox", name, "--target", self.member.name, *words)
        try:
            yield
        finally:
            self.member.client("delete", "--force", name, check=False)


@contextmanager
def beside_each(release: str = "incus", toml: str = "") -> Iterator[list[Side]]:
    """Run a cluster of three members, each with its own service, store and mirror.

    Args:
        release: ``incus`` or ``incus-7``.
        toml: more settings of guestapi.toml.
    """
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(release))
        made = []
        for member in cluster.members:
            service = stack.enter_context(Service(workers=1, dialects=["incus"], toml=toml))
            mirror = stack.enter_context(MirrorProcess(service, "incus", member.socket))
            made.append(Side(member, service, mirror))
        yield made


def wait(what: Callable[[], object], seconds: float = TIMEOUT) -> None:
    """Poll until a condition holds, at most for some seconds."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)
