"""Three PostgreSQL servers, a primary and two synchronous standbys; each can be killed, stopped and lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from tests.harness.postgresql import Postgres, binaries
from tests.harness.waiting import until

_SECONDS = 30.0
#: A change is acknowledged when one standby has it, so the one that has received most has all.
_SYNCHRONOUS = "ANY 1 (*)"
#: How many standbys confirm changes.
_CONFIRMING = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state IN ('sync', 'quorum')"

R = TypeVar("R", bound="Replicas")


class Replicas:
    """The servers, of which one is the primary."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        programs = binaries()
        # Servers run as another user, and only they and root come in.
        directory.chmod(0o711)
        self.nodes = []
        for number in range(3):
            place = directory / str(number)
            place.mkdir(mode=0o700)
            node = Postgres(place, programs)
            node.environment = environment
            self.nodes.append(node)
        self.primary = self.nodes[0]

    def make(self) -> None:
        """Make and start all."""
        self.primary.make()
        self.primary.start()
        # A standby that was slow finds at the next primary what it lacks.
        self.set("wal_keep_size", "128MB")
        for node in self.nodes[1:]:
            self.rebuild(node)
        self.set("synchronous_standby_names", _SYNCHRONOUS)

    def set(self, name: str, value: str) -> None:
        """Change a setting of the primary."""
        with self.primary.connect() as connection:
            connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
            connection.execute("SELECT pg_reload_conf()")

    def url(self, database: str, user: str) -> str:
        """The URL with all servers; clients use the one that takes changes."""
        hosts = ",".join(str(node.directory) for node in self.nodes)
        ports = ",".join(str(node.port) for node in self.nodes)
        return f"postgresql://{user}@/{database}?host={hosts}&port={ports}"

    def rebuild(self, node: Postgres) -> None:
        """Make a server that is not running a standby, with an empty disk."""
        shutil.rmtree(node.data, ignore_errors=True)
        self.primary.copy_to(node)
        node.start()

    def promote(self) -> Postgres:
        """Make the standby the primary that has received most; the other standbys that run follow it."""
        standbys = [node for node in self.nodes if node is not self.primary and node.running]
        received = []
        for node in standbys:
            with node.connect() as connection:
                row = connection.execute("SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn").fetchone()
                received.append(row[0] if row is not None else 0)
        self.primary = standbys[received.index(max(received))]
        with self.primary.connect() as connection:
            # Standbys that are connected later confirm; until then, changes wait.
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{_SYNCHRONOUS}'".encode())
            connection.execute("SELECT pg_reload_conf()")
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)
        for node in standbys:
            if node is not self.primary:
                conninfo = f"user=postgres host={self.primary.directory} port={self.primary.port}"
                with node.connect() as connection:
                    connection.execute(f"ALTER SYSTEM SET primary_conninfo = '{conninfo}'".encode())
                    connection.execute("SELECT pg_reload_conf()")
        return self.primary

    def wait_for_standbys(self, count: int) -> None:
        """Wait until this many standbys confirm changes."""

        def confirm() -> bool:
            with self.primary.connect() as connection:
                row = connection.execute(_CONFIRMING).fetchone()
            return row is not None and row[0] >= count

        log = self.primary.directory / "log"
        until(confirm, lambda: log.read_text()[-2000:], pause=0.1, seconds=_SECONDS)

    def stop_all(self) -> None:
        """End all servers."""
        for node in self.nodes:
            node.kill()


def replicated(environment: Mapping[str, str]) -> AbstractContextManager[Replicas]:
    """Three servers that run until the end of the block, with these variables in their environment."""
    return running(partial(Replicas, environment=environment))


@contextmanager
def running(describe: Callable[[Path], R]) -> Iterator[R]:
    """Make and start servers, which run until the end of the block.

    Args:
        describe: describes them, with a directory for all that they have.
    """
    # A socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    replicas = describe(directory)
    try:
        replicas.make()
        yield replicas
    finally:
        replicas.stop_all()
        shutil.rmtree(directory)
