"""The arbiter process: gunicorn's arbiter, configured from guestapi.toml, with sockets and watchdog from systemd."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from pathlib import Path

import gunicorn.app.base
import gunicorn.arbiter

from guestapi import gunicorn_conf, systemd
from guestapi import settings as settings_module
from guestapi.api import app
from guestapi.metrics.handover import ReportDirectory
from guestapi.server.access_log import GunicornLogger
from guestapi.server.signer_client import identity_tokens
from guestapi.server.store_thread import OffloadedStore
from guestapi.server.token_provider import load_tokens
from guestapi.server.worker import GuestWorker
from guestapi.settings import ListenSocket, Settings, SettingsError
from guestapi.store.errors import StoreError
from guestapi.store.writing import Writer

#: Defaults of gunicorn's settings. gunicorn.conf.py may change all settings but the worker class and the sockets.
_DEFAULTS = {
    # Seconds without a heartbeat after which a worker is killed.
    "timeout": 10,
    # Seconds from SIGTERM until a worker that has not ended is killed. Requests have half of that to finish.
    "graceful_timeout": 4,
    # The most connections of a worker, of all instances together.
    "worker_connections": 10000,
    # Sockets that are not from systemd are 0666: every user of every instance may connect, and the gate decides.
    "umask": 0o111,
    "workers": 2,
    "proc_name": "guestapi",
    # gunicorn's own control socket, which nobody needs, would be one more way to attack the service.
    "control_socket_disable": True,
}


#: A worker has a heartbeat each second while it answers. It does not answer if the last one is older than this.
_FRESH_SECONDS = 5.0


class ServiceApplication(gunicorn.app.base.Application):
    """What gunicorn runs: its settings and the WSGI application.

    Attributes:
        settings: of guestapi.toml.
        dialects: name of the dialect of each listening socket, in gunicorn's order.
        excesses: how often instances exceeded a limit, in all workers since the service was started.
    """

    settings: Settings
    dialects: list[str]

    def __init__(self, file: Path | None, sockets: tuple[ListenSocket, ...], workers: int | None) -> None:
        """Read the configuration.

        Args:
            file: guestapi.toml; None for the defaults.
            sockets: from the command line, in place of the configuration's.
            workers: from the command line, in place of that of gunicorn.conf.py.

        Raises:
            SettingsError: the configuration cannot be used, or a socket from systemd has no dialect.
            StoreError: the store can be neither used nor created.
        """
        self._file = file
        self._sockets = sockets
        self._workers = workers
        self._binds: list[str] = []
        self.excesses = SharedCounter()
        self._activated = systemd.activated()
        if self._activated:
            # Only now: gunicorn moves these sockets to other descriptors.
            paths = [_bound_to(number) for number in systemd.descriptors(self._activated)]
            listeners = settings_module.load(file).listener
            self.dialects = systemd.dialects_of(self._activated, paths, listeners)
        self.check()
        super().__init__(prog="guestapi serve")

    def check(self) -> None:
        """Read the configuration again. If it cannot be used, nothing changes.

        Raises:
            SettingsError: a file cannot be used, or a socket cannot be bound.
            StoreError: the store can be neither used nor created.
        """
        settings = settings_module.load(self._file)
        gunicorn_conf.read(settings.gunicorn_file)
        load_tokens(settings.server.ubuntu_pro)
        # Create the store now, so that workers and commands find it.
        Writer(settings, create=True)
        listeners = self._sockets or settings.listener
        binds = [f"unix:{listener.path}" for listener in listeners]
        if not self._activated:
            for bind in binds:
                if bind not in self._binds:
                    _prepare_bind(Path(bind.removeprefix("unix:")))
            self.dialects = [listener.dialect for listener in listeners]
        self._binds = binds
        self.settings = settings

    def do_load_config(self) -> None:
        """Load settings as gunicorn does, but raise an error instead of printing it and exiting."""
        self.load_default_config()
        self.load_config()

    def load_config(self) -> None:
        """Set defaults, then what gunicorn.conf.py sets, then what is fixed or given on the command line."""
        chosen = {**_DEFAULTS, "loglevel": self.settings.log.level, **gunicorn_conf.read(self.settings.gunicorn_file)}
        if self._workers is not None:
            chosen["workers"] = self._workers
        chosen |= {"worker_class": GuestWorker, "logger_class": GunicornLogger}
        if not self._activated:
            chosen["bind"] = self._binds
        for key, value in chosen.items():
            if key in self.cfg.settings:
                self.cfg.set(key, value)

    def open_store(self) -> OffloadedStore:
        """Return the store of one worker. It is opened once, after the fork."""
        if self._store is None:
            self._store = OffloadedStore(self.settings)
        return self._store

    _store: OffloadedStore | None = None

    def load(self) -> app.GuestApplication:
        """Make the WSGI application of one worker."""
        store, settings = self.open_store(), self.settings
        tokens = load_tokens(settings.server.ubuntu_pro)
        return app.create(store, store.broker, settings.limits, tokens, identity_tokens(settings))

    def run(self) -> None:
        """Serve until told to stop, then exit."""
        Arbiter(self).run()


class SharedCounter:
    """A number that all workers add to and the arbiter reads (eventfd(2))."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._total = 0

    def add(self, count: int) -> None:
        """Add `count`. For workers."""
        if count:
            os.eventfd_write(self._descriptor, count)

    def total(self) -> int:
        """Return the sum. For the arbiter alone, because reading takes what was added out of the descriptor."""
        try:
            self._total += os.eventfd_read(self._descriptor)
        except BlockingIOError:
            pass  # Nothing was added.
        return self._total


class Arbiter(gunicorn.arbiter.Arbiter):
    """gunicorn's arbiter, which also reports to systemd."""

    _status = ""
    _reports: ReportDirectory | None = None

    def start(self) -> None:
        """Start as gunicorn's arbiter."""
        super().start()
        self._reports = ReportDirectory(Path(self.app.settings.metrics.directory))
        # Numbers of workers begin anew.
        self._reports.clear()

    def _hand_over(self) -> None:
        if self._reports is not None:
            alive = {worker.age for worker in self.WORKERS.values()}
            self._reports.write_service(workers=self.num_workers, started=self.worker_age, alive=alive)

    def reload(self) -> None:
        """Use new settings and start new workers (SIGHUP). Settings that cannot be used change nothing."""
        try:
            self.app.check()
        except (SettingsError, StoreError) as error:
            self.log.error("not reloaded, the service continues as before: %s", error)
            return
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        super().reload()
        systemd.notify("READY=1")

    def spawn_worker(self) -> int:
        """Start a worker as gunicorn does, but block signals until it has handlers of its own.

        The handlers that it inherits would take a SIGTERM for the arbiter's own. The worker would continue until it
        was killed.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            pid: int = super().spawn_worker()
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def murder_workers(self) -> None:
        """Kill workers that hang, and report to systemd. gunicorn calls this every second."""
        super().murder_workers()
        self._hand_over()
        now = time.monotonic()
        # Before its first heartbeat a worker's file has the time of day, which is far ahead of this clock.
        ages = [age for worker in self.WORKERS.values() if (age := now - worker.tmp.last_update()) >= 0]
        answering = sum(age < _FRESH_SECONDS for age in ages)
        status = f"STATUS={answering} of {self.num_workers} workers answer on {len(self.LISTENERS)} sockets"
        if excesses := self.app.excesses.total():
            status += f"; limits exceeded {excesses} times"
        fields = [status] if status != self._status else []
        self._status = status
        # A worker that hangs is killed after ``timeout``, well before WatchdogSec= passes.
        if systemd.watchdog_seconds() and answering and answering == len(ages):
            fields.append("WATCHDOG=1")
        if fields:
            systemd.notify(*fields)


def serve(file: Path | None, sockets: tuple[ListenSocket, ...] = (), workers: int | None = None) -> None:
    """Run the service in the foreground. Never returns.

    Args:
        file: guestapi.toml; None for the defaults.
        sockets: to listen on, in place of the configuration's.
        workers: number of workers; None for that of gunicorn.conf.py.

    Raises:
        SettingsError: the configuration cannot be used.
        StoreError: the store can be neither used nor created.
    """
    ServiceApplication(file, sockets, workers).run()


def _bound_to(descriptor: int) -> str:
    with socket.socket(fileno=os.dup(descriptor)) as listening:
        name = listening.getsockname()
    return name if isinstance(name, str) else str(name)


def _prepare_bind(path: Path) -> None:
    """Create the directory of `path`, and make sure that no other server answers there."""
    if "GUNICORN_FD" in os.environ:
        return  # gunicorn's SIGUSR2: the old arbiter hands its sockets over, and answers on them until it stops.
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SettingsError(f"{path}: is there already, and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        if not os.access(path.parent, os.W_OK):
            raise SettingsError(f"{path}: cannot be bound: its directory is not writable", _bind_hint()) from None
        return
    except OSError as error:
        raise SettingsError(f"{path}: cannot be bound: {error.strerror}", _bind_hint()) from None
    raise SettingsError(f"{path}: another server answers there; stop it, or choose another path with --socket")


def _bind_hint() -> str | None:
    """What an operator has forgotten who starts the unit of the service by itself."""
    if "NOTIFY_SOCKET" not in os.environ:
        return None
    return "'systemctl start guestapi.socket' opens the socket, and the service starts with it"
