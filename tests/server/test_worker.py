"""Arbiter and workers as real processes: gunicorn's signals, limits, logs and hooks; no request is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from guestapi.settings import load
from tests.harness.containers import Container
from tests.harness.service import COMMAND, UNPRIVILEGED, USER, Service
from tests.harness.waiting import until
from tests.server.inside import Talk, asking, talk, talks

pytestmark = pytest.mark.root

LOOPING = (Path(__file__).parents[1] / "harness" / "looping.py").read_text()
READY = b'{"state":"Ready"}'
#: A graceful_timeout, and an upper bound in seconds for a stop that does not wait for it. It takes about a second when
#: the machine is idle.
PATIENT, SOON = "graceful_timeout = 30\n", 15


class Configured(Service):
    """A service whose number of workers is set by gunicorn.conf.py, not by the command line."""

    def __enter__(self) -> Configured:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def start(self) -> Service:
        """Start the service, and wait until its workers run."""
        self._process = self.launch()
        until(lambda: len(self.workers) == self._workers, "workers")
        return self

    def configure_gunicorn(self, content: str) -> None:
        """Write gunicorn.conf.py."""
        (self.root / "gunicorn.conf.py").write_text(content)


def has_workers(service: Service, count: int) -> bool:
    """Return whether the service has this number of workers."""
    return len(service.workers) == count


def state_of(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@contextmanager
def clients(container: Container, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Run clients in a container that send requests all the time; yield their results afterwards."""
    seen: list[dict[str, Any]] = []
    with ThreadPoolExecutor() as pool:
        running: list[Future[Any]] = []
        for kind in ("connect", "keep"):
            command = ["nsenter", "-t", str(container.pid), "-U", "-m", "-p", "--setuid", "0", "--setgid", "0"]
            command += ["/usr/bin/python3", "-I", "-S", "-c", LOOPING, str(seconds), kind]
            running.append(pool.submit(subprocess.run, command, capture_output=True, check=True))
        yield seen
        seen.extend(json.loads(future.result().stdout) for future in running)


def assert_none_failed(seen: list[dict[str, Any]]) -> None:
    """Check that every request of both clients was answered."""
    assert len(seen) == 2
    for client in seen:
        assert client["failed"] == []
        assert client["good"] > 50


def test_privileges() -> None:
    """Arbiter and workers run as the unprivileged user, with CAP_SYS_PTRACE and no way to gain more."""
    with Service(dialects=["incus"]) as service:
        until(lambda: len(service.workers) == 2, "two workers")
        for pid in (service.pid, *service.workers):
            status = state_of(pid)
            assert status["Uid"].split() == [str(USER)] * 4
            assert status["Gid"].split() == [str(USER)] * 4
            assert status["Groups"] == ""
            # capabilities(7): CAP_SYS_PTRACE is number 19.
            assert {status[f"Cap{kind}"] for kind in ("Eff", "Prm", "Bnd", "Amb")} == {f"{1 << 19:016x}"}
            assert status["NoNewPrivs"] == "1"
            assert os.stat(service.socket).st_mode & 0o777 == 0o666


def test_max_requests() -> None:
    """Workers are replaced after max_requests without a failed request."""
    with Service(gunicorn="max_requests = 100\nmax_requests_jitter = 20\n", dialects=["incus"]) as service:
        before = set(service.workers)
        with service.container("c1", {"user.foo": "bar"}) as c1, clients(c1, 1.8) as seen:
            until(lambda: not before & set(service.workers), "other workers")
        assert_none_failed(seen)


def test_reload_changes_the_workers() -> None:
    """SIGHUP to the arbiter applies the new number of workers and the new settings without a failed request."""
    with Configured(gunicorn="workers = 2\n", dialects=["incus"]) as service:
        before = set(service.workers)
        with service.container("c1", {"user.foo": "bar"}) as c1:
            with clients(c1, 2.2) as seen:
                service.configure_gunicorn("workers = 3\n")
                service.write_config("[limits]\nbody = 1024\n")
                os.kill(service.pid, signal.SIGHUP)
                until(lambda: len(service.workers) == 3 and not before & set(service.workers), "three new workers")
            assert_none_failed(seen)
            assert c1.ask("/1.0", "PATCH", b" " * 1100).status == 413
            service.configure_gunicorn("wrokers = 1\n")
            os.kill(service.pid, signal.SIGHUP)
            until(lambda: "wrokers" in service.log.read_text(), "complaint")
            assert len(service.workers) == 3
            assert c1.ask("/1.0/config/user.foo").text == "bar"


def test_signals_add_and_remove_workers() -> None:
    """SIGTTIN adds a worker, SIGTTOU removes one, SIGUSR1 changes nothing; no request fails."""
    with Service(dialects=["incus"], gunicorn="accesslog = '/dev/null'\n") as service:
        with service.container("c1", {"user.foo": "bar"}) as c1, clients(c1, 1.8) as seen:
            os.kill(service.pid, signal.SIGTTIN)
            until(lambda: len(service.workers) == 3, "three workers")
            for left in (2, 1):
                os.kill(service.pid, signal.SIGTTOU)
                until(partial(has_workers, service, left), "one worker less")
            os.kill(service.pid, signal.SIGUSR1)
        assert_none_failed(seen)
        assert len(service.workers) == 1


def test_signal_during_a_worker_s_start_is_not_lost() -> None:
    """A SIGTERM that arrives before a worker has installed its handlers is not lost."""
    slow = PATIENT + "import time\ndef post_fork(server, worker):\n    time.sleep(1.5)\n"
    with Service(workers=1, gunicorn=slow, dialects=["incus"]) as service:
        os.kill(service.pid, signal.SIGTTIN)
        until(lambda: len(service.workers) == 2, "two workers")
        assert service.stop() < SOON


@contextmanager
def talking_to(worker: int, others: list[int], container: Container) -> Iterator[Talk]:
    """Open a connection that this worker serves: the others are stopped until it has answered a request on it."""
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        with talk(container) as guest:
            assert guest.ask("/1.0/config/user.foo").text == "bar"
            for pid in others:
                os.kill(pid, signal.SIGCONT)
            yield guest
    finally:
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_killed_worker_is_replaced() -> None:
    """kill -9 of a worker ends only its own connections; the other worker serves, and a new one is started."""
    with Service(dialects=["incus"]) as service, service.container("c1", {"user.foo": "bar"}) as c1:
        killed, spared = service.workers
        with talking_to(killed, [spared], c1) as lost, talking_to(spared, [killed], c1) as kept:
            os.kill(killed, signal.SIGKILL)
            assert lost.end() == b""
            assert all(c1.ask("/1.0/config/user.foo").text == "bar" for _time in range(10))
            until(lambda: len(service.workers) == 2 and killed not in service.workers, "another worker")
            assert spared in service.workers
            assert kept.ask("/1.0/config/user.foo").text == "bar"


def test_hung_worker_is_replaced() -> None:
    """A worker without a heartbeat for `timeout` seconds is killed and replaced."""
    hasty = Service(workers=1, gunicorn="timeout = 2\n", dialects=["incus"])
    with hasty as service, service.container("c1", {"user.foo": "bar"}) as c1:
        (hung,) = service.workers
        os.kill(hung, signal.SIGSTOP)
        until(lambda: service.workers and hung not in service.workers, "another worker")
        assert c1.ask("/1.0/config/user.foo").text == "bar"


def test_working_worker_is_not_replaced() -> None:
    """A worker that is idle or busy for longer than `timeout` is not killed."""
    with Service(workers=1, gunicorn="timeout = 2\n", dialects=["incus"]) as service:
        before = service.workers
        with service.container("c1", {"user.foo": "bar"}) as c1:
            with clients(c1, 3) as seen:
                pass
            assert_none_failed(seen)
        assert service.workers == before


def test_graceful_stop() -> None:
    """During a stop, a request whose body is still arriving is answered with Connection: close."""
    with Service(workers=1, gunicorn=PATIENT, dialects=["incus"]) as service, service.container("c1") as c1:
        with talk(c1) as guest, ThreadPoolExecutor() as pool:
            answer = guest.ask("/1.0", "Expect: 100-continue", f"Content-Length: {len(READY)}", method="PATCH")
            assert answer.status == 100
            guest.send(READY[:5])
            stopped = pool.submit(service.stop)
            until(lambda: "Handling signal: term" in service.log.read_text(), "the master's reaction")
            guest.send(READY[5:])
            (answer,) = guest.receive()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert guest.end() == b""
            assert stopped.result() < SOON
        assert service.instance("c1").ready


def test_stop_is_quick() -> None:
    """Idle and new connections hardly delay a stop, and are closed without a response."""
    with (
        Service(gunicorn=PATIENT, dialects=["incus"]) as service,
        service.container("c1") as c1,
        talks(c1, 12) as guests,
    ):
        for guest in guests[:6]:
            assert guest.ask("/").status == 200
        assert service.stop() < SOON
        assert all(guest.end() == b"" for guest in guests)
        assert not service.socket.exists()


def test_guests_cannot_hold_up_a_stop() -> None:
    """Unfinished requests are aborted at the end of the graceful time."""
    patient = "[limits]\nhead_seconds = 60.0\nbody_seconds = 60.0\nsend_seconds = 60.0\n"
    stubborn = Service(gunicorn="graceful_timeout = 4\n", toml=patient, dialects=["incus"])
    large = {"user.large": "x" * (2 << 20)}
    with stubborn as service, service.container("c1", large) as c1, talks(c1, 6) as guests:
        for number, guest in enumerate(guests):
            started = ["GET / HTT", "PATCH /1.0 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"]
            guest.send(started[number % 2].encode())
        # This request gets a response; the pipelined one after it does not.
        guests[0].send(b"P/1.1\r\nHost: x\r\n\r\nGET /1.0/config/user.large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert guests[0].socket.recv(12) == b"HTTP/1.1 200"
        assert 1.5 < service.stop() < 30


def test_idle_connection_gets_one_more_response() -> None:
    """A request on an idle connection during a stop is answered with Connection: close."""
    patient = Service(workers=1, gunicorn=PATIENT, dialects=["incus"])
    with patient as service, service.container("c1") as c1, talk(c1) as guest:
        assert guest.ask("/").status == 200
        with ThreadPoolExecutor() as pool:
            stopped = pool.submit(service.stop)
            until(lambda: "Handling signal: term" in service.log.read_text(), "the master's reaction")
            answer = guest.ask("/")
            assert answer.status == 200
            assert guest.end() == b""
            assert stopped.result() < SOON


def test_stop_counts_only_running_time() -> None:
    """A stopping worker counts only the time in which it runs, so a busy machine does not shorten its clients' time."""
    patient = Service(workers=1, gunicorn=PATIENT, dialects=["incus"])
    with patient as service, service.container("c1") as c1, talks(c1, 3) as (first, during, after):
        for guest in (first, during, after):
            assert guest.ask("/").status == 200
        (worker,) = service.workers
        with ThreadPoolExecutor() as pool:
            stopped = pool.submit(service.stop)
            until(lambda: "Handling signal: term" in service.log.read_text(), "the master's reaction")
            until(lambda: first.ask("/").headers.get("connection") == "close", "the worker's reaction")
            os.kill(worker, signal.SIGSTOP)
            during.send(asking("/"))
            time.sleep(1.5)
            os.kill(worker, signal.SIGCONT)
            time.sleep(0.2)
            after.send(asking("/"))
            for guest in (during, after):
                assert guest.last().headers["connection"] == "close"
            assert stopped.result() < SOON


def test_access_log() -> None:
    """gunicorn's access log has a line for each request with method, path, status and length, in gunicorn's format."""
    with Service(workers=1, dialects=["incus"]) as service, service.container("c1", {"user.foo": "bar"}) as c1:
        service.stop()
        path = service.state / "access.log"
        format_ = "%(m)s %(U)s %(q)s %(H)s %(s)s %(B)s %({x-mark}i)s %({content-type}o)s %(D)s"
        (service.root / "gunicorn.conf.py").write_text(f"accesslog = {str(path)!r}\naccess_log_format = {format_!r}\n")
        service.start()
        with talk(c1) as guest:
            guest.ask("/1.0/config/user.foo?a=b", "X-Mark: here")
            guest.ask("/nowhere", method="PUT")
        until(lambda: path.exists() and path.read_text().count("\n") >= 2, "two lines")
        first, second = path.read_text().splitlines()
        assert first.rsplit(" ", 1)[0] == "GET /1.0/config/user.foo a=b HTTP/1.1 200 3 here application/octet-stream"
        assert second.startswith("PUT /nowhere  HTTP/1.1 404 19 - text/plain; charset=utf-8 ")
        assert all(0 < int(line.rsplit(" ", 1)[1]) < 5_000_000 for line in (first, second))


HOOKS = """
import json
def _tell(**what):
    with open({file!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
def pre_request(worker, req):
    headers = dict(req.headers)
    _tell(hook="pre", pid=worker.pid, method=req.method, path=req.path, query=req.query, mark=headers.get("X-MARK"))
def post_request(worker, req, environ, resp):
    _tell(hook="post", pid=worker.pid, uri=req.uri, status=resp.status, sent=resp.sent, mark=environ["HTTP_X_MARK"])
    if req.path == "/" and {wrong}:
        raise ValueError("a hook with a mistake")
def worker_exit(server, worker):
    _tell(hook="exit", pid=worker.pid)
"""


def hooked(service: Configured, *, wrong: bool = False) -> Path:
    """Restart the service with hooks; return the file to which they write."""
    service.stop()
    file = service.state / "hooks"
    service.configure_gunicorn(
        "workers = 1\n" + HOOKS.replace("{file!r}", repr(str(file))).replace("{wrong}", str(wrong))
    )
    service.start()
    return file


def test_hooks() -> None:
    """gunicorn's hooks are called for each request, its response, and the end of a worker."""
    with (
        Configured(workers=1, gunicorn="workers = 1\n", dialects=["incus"]) as service,
        service.container("c1", {"user.foo": "bar"}) as c1,
    ):
        file = hooked(service)
        (worker,) = service.workers
        with talk(c1) as guest:
            guest.ask("/1.0/config/user.foo?a=b", "X-Mark: here")
            guest.ask("/", "X-Mark: there")
        service.stop()
        before, after, *more = [json.loads(line) for line in file.read_text().splitlines()]
        path = "/1.0/config/user.foo"
        asked = {"pid": worker, "mark": "here"}
        assert before == {"hook": "pre", "method": "GET", "path": path, "query": "a=b", **asked}
        assert after == {"hook": "post", "uri": f"{path}?a=b", "status": "200 OK", "sent": 3, **asked}
        assert [entry["hook"] for entry in more] == ["pre", "post", "exit"]


def test_hook_that_raises() -> None:
    """A hook that raises is logged, as by gunicorn itself, and ends no connection."""
    with Configured(workers=1, gunicorn="workers = 1\n", dialects=["incus"]) as service, service.container("c1") as c1:
        hooked(service, wrong=True)
        with talk(c1) as guest:
            assert guest.ask("/", "X-Mark: x").status == 200
            assert guest.ask("/1.0", "X-Mark: x").status == 200
        assert "a hook with a mistake" in service.log.read_text()


def test_second_service_does_not_take_the_socket() -> None:
    """A second service on the same socket reports it and exits with 1; the first one continues."""
    with Service(dialects=["incus"]) as service, service.container("c1", {"user.foo": "bar"}) as c1:
        inode = service.socket.stat().st_ino
        command = [*UNPRIVILEGED, str(COMMAND), "--config", str(service.config), "serve"]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert str(service.socket) in second.stderr
        assert "another server answers there" in second.stderr
        assert "Traceback" not in second.stderr
        assert service.socket.stat().st_ino == inode
        assert c1.ask("/1.0/config/user.foo").text == "bar"


def test_socket_of_a_killed_service_is_used() -> None:
    """After kill -9 of arbiter and workers, the next start reuses the socket file."""
    lasting = Configured(gunicorn="workers = 2\n", dialects=["incus"])
    with lasting as service, service.container("c1", {"user.foo": "bar"}) as c1:
        for pid in (service.pid, *service.workers):
            os.kill(pid, signal.SIGKILL)
        assert service._process is not None
        service._process.wait()
        assert service.socket.exists()
        service.start()
        assert c1.ask("/1.0/config/user.foo").text == "bar"


def test_each_socket_has_its_dialect() -> None:
    """Each socket has the dialect from the configuration, in any order of the listeners, also after a reload."""
    dialects = ["lxd-legacy", "incus", "lxd"]
    with Service(dialects=dialects) as service, service.container("c1", {"security.devlxd": "false"}) as c1:
        assert [listener.dialect for listener in load(service.config).listener] == dialects
        expected = {"lxd": 403, "lxd-legacy": 200, "incus": 200}
        before = set(service.workers)
        for _time in range(2):
            for dialect in dialects:
                answer = c1.ask("/1.0", socket=f"/dev/{dialect}/sock")
                assert answer.status == expected[dialect]
                assert ("location" in answer.text) == (dialect == "incus")
            os.kill(service.pid, signal.SIGHUP)
            until(lambda: not before & set(service.workers), "new workers")
