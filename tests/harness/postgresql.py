"""A PostgreSQL server for tests, with TLS, on loopback and a Unix socket; it is started here and ended by its PID."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.harness import fast
from tests.harness.certificates import Authority
from tests.harness.waiting import until

#: Who the server runs as: PostgreSQL refuses root.
USER = "nobody"
_SECONDS = 30.0
#: Tests come in as anybody by the Unix socket, whose directory only root and the server can enter.
_LOCAL = "local all all trust\nlocal replication all trust\n"
_CONF = """listen_addresses = '127.0.0.1'
ssl = on
ssl_ca_file = 'ca.crt'
fsync = off
max_connections = 100
shared_buffers = '32MB'
"""


def documented(language: str) -> str:
    """Return the block of docs/fleet.md in that language: what operators are told to write is what is tested."""
    text = (Path(__file__).parents[2] / "docs/fleet.md").read_text()
    return text.partition(f"```{language}\n")[2].partition("```")[0]


def binaries() -> Path:
    """Return the directory of the newest PostgreSQL's programs; skip the test without root or PostgreSQL.

    In CI a skip is a failure (tests/conftest.py).
    """
    if os.getuid() != 0:
        pytest.skip("starting PostgreSQL as another user needs root")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found or shutil.which("openssl") is None:
        pytest.skip("needs the Debian packages postgresql and openssl")
    return found[-1].parent


class Postgres:
    """One server. Its databases and roles are as `initdb` makes them."""

    def __init__(self, directory: Path, programs: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.authority = Authority(directory)
        self._programs = programs
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        #: Variables of the environment that it has in addition.
        self.environment: Mapping[str, str] = {}

    def make(self) -> None:
        """Make its directory, with certificates signed by a CA of its own."""
        shutil.chown(self.directory, USER)
        self._run(str(self._programs / "initdb"), "-A", "trust", "-U", "postgres", "-E", "UTF8", "-N", str(self.data))
        self.authority.make()
        self.authority.certificate("localhost", self.data / "server")
        shutil.copy(self.authority.own, self.data)
        for name in ("ca.crt", "server.crt", "server.key"):
            shutil.chown(self.data / name, USER)
        (self.data / "pg_hba.conf").write_text(_LOCAL + documented("pg_hba").replace("192.0.2.0/24", "127.0.0.1/32"))
        (self.data / "pg_ident.conf").write_text(documented("pg_ident"))
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.write(f"{_CONF}port = {self.port}\nunix_socket_directories = '{self.directory}'\n")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        fast.forbid()
        command = as_user(str(self._programs / "postgres"), "-D", str(self.data))
        with (self.directory / "log").open("ab") as log:
            environment = {**os.environ, **self.environment}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        until(self._takes_connections, (self.directory / "log").read_text, pause=0.05, seconds=_SECONDS)

    def _takes_connections(self) -> bool:
        assert self._process is not None
        try:
            psycopg.connect(self.url()).close()
        except psycopg.OperationalError:
            assert self._process.poll() is None, (self.directory / "log").read_text()
            return False
        return True

    def stop(self) -> None:
        """End it at once, and its children with it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        """The URL for a role, by the Unix socket."""
        return f"postgresql://{user}@/{database}?host={self.directory}&port={self.port}"

    def url_of_host(self, name: str, database: str, user: str) -> str:
        """The URL with the certificate of a host, by TLS; it is made if there is none."""
        path = self.directory / name
        if not Path(f"{path}.crt").exists():
            self.authority.certificate(name, path)
        return (
            f"postgresql://{user}@localhost:{self.port}/{database}?hostaddr=127.0.0.1&sslmode=verify-full"
            f"&sslrootcert={self.directory}/ca.crt&sslcert={path}.crt&sslkey={path}.key"
        )

    def connect(self, database: str = "postgres", user: str = "postgres") -> psycopg.Connection[Any]:
        """A session of a role, by the Unix socket, in autocommit mode."""
        return psycopg.connect(self.url(database, user), autocommit=True)

    def dump(self, database: str) -> str:
        """Return what `pg_dump` writes of a database."""
        return self._run(str(self._programs / "pg_dump"), "-d", self.url(database))

    def put_back(self, database: str, dump: str) -> None:
        """Have psql read a dump."""
        self._run(str(self._programs / "psql"), "-q", "-v", "ON_ERROR_STOP=1", "-d", self.url(database), given=dump)

    def _run(self, *words: str, given: str = "") -> str:
        done = subprocess.run(as_user(*words), capture_output=True, text=True, check=False, input=given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def reload(self) -> None:
        """Have it read its files again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)

    @property
    def running(self) -> bool:
        """Whether it was started and not ended."""
        return self._process is not None

    @property
    def processes(self) -> list[int]:
        """The PIDs of it and all that it has started."""
        assert self._process is not None
        return _processes_of(self._process.pid)

    @property
    def socket(self) -> str:
        """The path of its Unix socket."""
        return f"{self.directory}/.s.PGSQL.{self.port}"

    def kill(self) -> None:
        """End all its processes at once, without a word, also if they are stopped."""
        if self._process is not None:
            signal_all(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Stop all its processes: the kernel goes on answering for it."""
        assert self._process is not None
        signal_all(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Have all its processes go on."""
        assert self._process is not None
        signal_all(self._process.pid, signal.SIGCONT)

    def standby(self, directory: Path) -> Postgres:
        """Make a standby of this server, which is not started yet, in an empty directory."""
        other = Postgres(directory, self._programs)
        self.copy_to(other)
        return other

    def copy_to(self, other: Postgres) -> None:
        """Make the data of another server, which has none, those of a standby of this one."""
        shutil.chown(other.directory, USER)
        self._run(str(self._programs / "pg_basebackup"), "-R", "-D", str(other.data), "-d", self.url(), "-c", "fast")
        with (other.data / "postgresql.conf").open("a") as conf:
            conf.write(f"port = {other.port}\nunix_socket_directories = '{other.directory}'\n")


def as_user(*words: str) -> list[str]:
    """A command that runs as the servers' user."""
    return ["setpriv", f"--reuid={USER}", "--regid=65534", "--clear-groups", *words]


def _processes_of(pid: int) -> list[int]:
    """A server's process and all that it has started."""
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def signal_all(pid: int, number: signal.Signals) -> None:
    """Send a signal to a server and all that it has started."""
    for one in _processes_of(pid):
        try:
            os.kill(one, number)
        except ProcessLookupError:
            pass


@contextmanager
def running() -> Iterator[Postgres]:
    """A server that runs until the end of the block."""
    programs = binaries()
    # A socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="pg-"))
    server = Postgres(directory, programs)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)
