"""Three PostgreSQL servers that Patroni looks after, with an etcd on loopback; Debian's packages, unpacked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.harness.machine import CHECKOUT
from tests.harness.postgresql import USER, Postgres, as_user, binaries, signal_all
from tests.harness.replicated import Replicas, running
from tests.harness.waiting import until

#: Where `make test-fleet` unpacks Patroni and etcd.
PACKAGES = CHECKOUT / ".venv/patroni"
#: The shortest that Patroni takes: a primary is replaced after about `ttl` seconds.
_TIMES = {"ttl": 20, "loop_wait": 5, "retry_timeout": 5}
_SECONDS = 120.0
_LOCAL = ["local all all trust", "local replication all trust"]
_LOOPBACK = ["host replication all 127.0.0.1/32 trust", "host all postgres 127.0.0.1/32 trust"]


class PatroniReplicas(Replicas):
    """The servers. Patroni decides which of them is the primary."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, {})
        self._directory = directory
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def make(self) -> None:
        """Start etcd and Patroni, and wait until one standby confirms what the primary does."""
        # The servers' user may not come into the checkout.
        shutil.copytree(PACKAGES / "usr", self._directory / "usr")
        peer, client = _free_port(), _free_port()
        place = self._directory / "etcd"
        place.mkdir()
        shutil.chown(place, USER)
        peers, clients = f"http://127.0.0.1:{peer}", f"http://127.0.0.1:{client}"
        urls = ["--listen-client-urls", clients, "--advertise-client-urls", clients, "--listen-peer-urls", peers]
        urls += ["--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"]
        self._start("etcd", [str(self._directory / "usr/bin/etcd"), "--data-dir", str(place / "data"), *urls])
        for number, node in enumerate(self.nodes):
            shutil.chown(node.directory, USER)
            conf = node.directory / "patroni.json"
            # JSON is YAML.
            conf.write_text(json.dumps(self._conf(number, node, client)))
            self._start(str(number), ["/usr/bin/python3", "-m", "patroni", str(conf)])
        self.find_primary()
        self.wait_for_standbys(1)

    def find_primary(self) -> None:
        """Wait until a server takes changes; from then on, it is `primary`."""
        until(self._has_primary, lambda: self.logs, pause=0.2, seconds=_SECONDS)

    def _has_primary(self) -> bool:
        for node in self.nodes:
            try:
                with node.connect() as connection:
                    if connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,):
                        self.primary = node
                        return True
            except psycopg.Error:
                pass
        return False

    def kill_primary(self) -> None:
        """End the primary and its Patroni at once, without a word."""
        number = self.nodes.index(self.primary)
        postmaster = int((self.primary.data / "postmaster.pid").read_text().split()[0])
        process = self._processes.pop(str(number))
        signal_all(process.pid, signal.SIGKILL)
        signal_all(postmaster, signal.SIGKILL)
        process.wait()

    def stop_all(self) -> None:
        """End everything."""
        for process in self._processes.values():
            signal_all(process.pid, signal.SIGKILL)
            process.wait()
        for node in self.nodes:
            try:
                signal_all(int((node.data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
            except (OSError, ValueError, IndexError):
                pass

    @property
    def logs(self) -> str:
        """The end of what each Patroni has said."""
        return "\n".join(path.read_text()[-1500:] for path in sorted(self._directory.glob("log-*")))

    def _start(self, name: str, words: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self._directory / "usr/lib/python3/dist-packages")}
        with (self._directory / f"log-{name}").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                as_user(*words), stdout=log, stderr=log, cwd=self._directory, env=environment
            )

    def _conf(self, number: int, node: Postgres, etcd: int) -> object:
        rest = f"127.0.0.1:{_free_port()}"
        return {
            "scope": "guestapi",
            "name": f"server{number}",
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"host": f"127.0.0.1:{etcd}"},
            "bootstrap": {
                "dcs": {**_TIMES, "synchronous_mode": True, "synchronous_mode_strict": True},
                "initdb": [{"auth": "trust"}, {"encoding": "UTF8"}, "no-sync"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{node.port}",
                "connect_address": f"127.0.0.1:{node.port}",
                "data_dir": str(node.data),
                "bin_dir": str(binaries()),
                "pgpass": str(node.directory / "pgpass"),
                "authentication": {
                    "superuser": {"username": "postgres", "password": "x"},
                    "replication": {"username": "replicator", "password": "x"},
                },
                "parameters": {
                    "unix_socket_directories": str(node.directory),
                    "fsync": "off",
                    "shared_buffers": "32MB",
                    "max_connections": 100,
                },
                "pg_hba": [*_LOCAL, *_LOOPBACK],
            },
        }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def patroni() -> Iterator[PatroniReplicas]:
    """Three servers that run until the end of the block; skip the test if Patroni is not unpacked."""
    if not PACKAGES.is_dir():
        pytest.skip("needs Patroni and etcd, which 'make test-fleet' unpacks")
    with running(PatroniReplicas) as replicas:
        yield replicas
