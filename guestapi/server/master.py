"""The master process: gunicorn's arbiter, configured from guestapi.toml, with sockets and watchdog by systemd."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from pathlib import Path

from gunicorn.app.base import Application as GunicornApplication
from gunicorn.arbiter import Arbiter

from guestapi import settings as settings_module
from guestapi.api import app
from guestapi.server import gunicorn_conf, systemd
from guestapi.server.logs import GunicornLogger
from guestapi.server.offload import OffloadedStore
from guestapi.server.worker import GuestWorker
from guestapi.settings import Listener, Settings, SettingsError
from guestapi.store.errors import StoreError
from guestapi.store.writing import Writer

#: gunicorn's settings that are ours to choose. gunicorn.conf.py may change all but the worker class and the sockets.
_DEFAULTS = {
    # Seconds: a worker that gives no sign of life for so long is killed.
    "timeout": 10,
    # Seconds from SIGTERM until a worker is killed that has not ended. It gives requests under way half of that.
    "graceful_timeout": 4,
    # How many connections a worker holds at the most, of all instances together.
    "worker_connections": 10000,
    # So that sockets that we bind ourselves are 0666: every user of every instance may connect, and is told who it is.
    "umask": 0o111,
    "workers": 2,
    "proc_name": "guestapi",
    # gunicorn's own control socket: one more way in, and nobody needs it.
    "control_socket_disable": True,
}


#: A worker gives a sign of life each second if it answers; so it does not, if the last one is older than this.
_FRESH_SECONDS = 5.0


class Application(GunicornApplication):
    """gunicorn's view of us: its settings, and the WSGI application.

    Attributes:
        settings: guestapi.toml's.
        dialects: of each listening socket, in gunicorn's order.
        excesses: how often instances have exceeded a limit, with all workers since the service was started.
    """

    settings: Settings
    dialects: list[str]

    def __init__(self, file: Path | None, sockets: tuple[Listener, ...], workers: int | None) -> None:
        """Args:
        file: guestapi.toml, or None for defaults.
        sockets: of the command line, in place of the configuration's.
        workers: of the command line, in place of gunicorn.conf.py's.

        Raises:
            SettingsError: the configuration cannot be used, or the sockets that systemd gave are of no dialect.
            StoreError: the store can neither be used nor made.
        """
        self._file = file
        self._sockets = sockets
        self._workers = workers
        self._binds: list[str] = []
        self.excesses = Tally()
        self._activated = systemd.activated()
        if self._activated:
            # Once: gunicorn is about to move these sockets to other descriptors.
            paths = [_bound_to(number) for number in systemd.descriptors(self._activated)]
            listeners = settings_module.load(file).listener
            self.dialects = systemd.dialects_of(self._activated, paths, listeners)
        self.check()
        super().__init__(prog="guestapi serve")

    def check(self) -> None:
        """Read the configuration anew. If it cannot be used, nothing changes.

        Raises:
            SettingsError: a file cannot be used, or a socket cannot be bound.
            StoreError: the store can neither be used nor made.
        """
        settings = settings_module.load(self._file)
        gunicorn_conf.read(settings.gunicorn_file)
        # It is there from now on, whoever comes first: a worker, or the operator's command.
        Writer(settings, create=True)
        listeners = self._sockets or settings.listener
        binds = [f"unix:{listener.path}" for listener in listeners]
        if not self._activated:
            for bind in binds:
                if bind not in self._binds:
                    _make_way(Path(bind.removeprefix("unix:")))
            self.dialects = [listener.dialect for listener in listeners]
        self._binds = binds
        self.settings = settings

    def do_load_config(self) -> None:
        """As gunicorn, but an error is raised to whoever asked, not printed before an exit."""
        self.load_default_config()
        self.load_config()

    def load_config(self) -> None:
        """gunicorn's settings: our defaults, then gunicorn.conf.py, then what is fixed or on the command line."""
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
        """The store, for one worker: opened once, after the fork."""
        if self._store is None:
            self._store = OffloadedStore(self.settings)
        return self._store

    _store: OffloadedStore | None = None

    def load(self) -> app.GuestApplication:
        """The WSGI application of one worker."""
        store = self.open_store()
        return app.create(store, store.broker, self.settings.limits)

    def run(self) -> None:
        """Serve until told to stop; exits."""
        Master(self).run()


class Tally:
    """A number that all workers add to, and the master reads (eventfd(2))."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._total = 0

    def add(self, count: int) -> None:
        """For workers."""
        if count:
            os.eventfd_write(self._descriptor, count)

    def total(self) -> int:
        """For the master alone: who reads it, takes what was added."""
        try:
            self._total += os.eventfd_read(self._descriptor)
        except BlockingIOError:
            pass  # Nothing was.
        return self._total


class Master(Arbiter):
    """gunicorn's arbiter, which also tells systemd how things are."""

    _status = ""

    def reload(self) -> None:
        """SIGHUP: new settings, new workers. Settings that cannot be used change nothing."""
        try:
            self.app.check()
        except (SettingsError, StoreError) as error:
            self.log.error("not reloaded, all goes on as before: %s", error)
            return
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        super().reload()
        systemd.notify("READY=1")

    def spawn_worker(self) -> int:
        """As gunicorn's; but a signal to a worker that has no handlers of its own yet waits until it has.

        With those that it inherits, it would take a SIGTERM for the master's own and go on, until it was killed.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
        try:
            pid: int = super().spawn_worker()
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def murder_workers(self) -> None:
        """Called every second: kill workers that hang, and tell systemd if the others answer."""
        super().murder_workers()
        now = time.monotonic()
        # Before its first sign of life a worker's file has the time of day, which lies far ahead of this clock.
        ages = [age for worker in self.WORKERS.values() if (age := now - worker.tmp.last_update()) >= 0]
        answering = sum(age < _FRESH_SECONDS for age in ages)
        status = f"STATUS={answering} of {self.num_workers} workers answer on {len(self.LISTENERS)} sockets"
        if excesses := self.app.excesses.total():
            status += f"; over limits: {excesses} times"
        fields = [status] if status != self._status else []
        self._status = status
        # A worker that hangs is killed after ``timeout``, well before systemd's patience ends.
        if systemd.watchdog_seconds() and answering and answering == len(ages):
            fields.append("WATCHDOG=1")
        if fields:
            systemd.notify(*fields)


def serve(file: Path | None, sockets: tuple[Listener, ...] = (), workers: int | None = None) -> None:
    """Run the service in the foreground; never returns.

    Raises:
        SettingsError: the configuration cannot be used.
        StoreError: the store can neither be used nor made.
    """
    Application(file, sockets, workers).run()


def _bound_to(descriptor: int) -> str:
    with socket.socket(fileno=os.dup(descriptor)) as listening:
        name = listening.getsockname()
    return name if isinstance(name, str) else str(name)


def _make_way(path: Path) -> None:
    """Prepare for binding `path`: its directory exists, and nobody answers there."""
    if "GUNICORN_FD" in os.environ:
        return  # gunicorn's SIGUSR2: the old master hands its sockets over, and answers on them until it is stopped.
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SettingsError(f"{path}: is there already, and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return
    except OSError as error:
        raise SettingsError(f"{path}: cannot be bound: {error.strerror}") from None
    raise SettingsError(f"{path}: another server answers there; stop it, or choose another path with --socket")
