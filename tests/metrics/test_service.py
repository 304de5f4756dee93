"""What a real service tells a monitoring system, while its workers answer, are killed, and are gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from guestapi.metrics.exposition import METRICS
from tests.harness.containers import receive, request, send
from tests.harness.service import COMMAND, USER, Service
from tests.harness.waiting import until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@contextmanager
def endpoint(service: Service) -> Iterator[Path]:
    """`guestapi metrics` on a socket of its own."""
    path = service.root / "metrics.sock"
    process = subprocess.Popen([COMMAND, "--config", service.config, "metrics", "--socket", path])
    try:
        wait(path.exists)
        yield path
    finally:
        process.terminate()
        assert process.wait(10) == 0


def wait(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    until(condition, "the expected state")


def ask(path: Path, target: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of a response of the endpoint."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        connection.sendall(f"{method} {target} HTTP/1.0\r\n\r\n".encode())
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def scrape(path: Path) -> Samples:
    """All samples, by name and labels."""
    code, text = ask(path, "/metrics")
    assert code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def summed(samples: Samples, name: str, **labels: str) -> float:
    """The sum of the samples of a name that have these labels."""
    return sum(
        value for (found, having), value in samples.items() if found == name and labels.items() <= dict(having).items()
    )


@pytest.fixture
def service() -> Iterator[Service]:
    """A service that hands over what it counts."""
    service = Service(dialects=["incus"], toml="")
    directory = service.root / "metrics"
    directory.mkdir()
    os.chown(directory, USER, USER)
    service.write_config(f'[metrics]\ndirectory = "{directory}"\n[limits]\nstreams_per_instance = 0\n')
    with service:
        yield service


def test_everything_is_counted_once(service: Service) -> None:
    """Requests are counted by dialect, route and status, repeated ones too; nothing that a guest sends is a label."""
    with service.container("web", {"user.foo": "bar"}) as guest, endpoint(service) as path:
        wait(lambda: ask(path, "/readyz") == (200, "ok\n"))
        before = scrape(path)
        for _time in range(5):
            # One connection: the second request is answered without the application.
            asked = request("/1.0/config/user.foo")
            guest.exchange(send(asked), receive(), send(asked), receive())
        for target in ("/1.0/config/user.secret-name", "/no/such/path", "/1.0/events"):
            guest.ask(target)

        def counted(**labels: str) -> float:
            after = scrape(path)
            return summed(after, "guestapi_requests_total", **labels) - summed(
                before, "guestapi_requests_total", **labels
            )

        wait(lambda: counted(dialect="incus", route="/1.0/config/{key}", code="200") == 10)
        wait(lambda: counted(dialect="incus", route="/1.0/config/{key}", code="404") == 1)
        wait(lambda: counted(dialect="incus", route="other", code="404") == 1)
        wait(lambda: counted() == 13)
        after = scrape(path)
        # A worker keeps what it is asked for again, so it has asked the application twice at the most.
        assert 6 <= summed(after, "guestapi_cached_responses_total") <= 8
        assert summed(after, "guestapi_limit_excesses_total", limit="streams_per_instance") == 1
        assert summed(after, "guestapi_instances", state="running") == 1
        assert summed(after, "guestapi_workers") == summed(after, "guestapi_workers_wanted") == 2
        assert "secret-name" not in ask(path, "/metrics")[1]
        assert "web" not in ask(path, "/metrics")[1]
        assert {name for family in METRICS for name, _labels in after if name.startswith(family)} == {
            name for name, _labels in after
        }
        assert ask(path, "/metrics", "POST")[0] == 405
        assert ask(path, "/")[0] == 404
        done = subprocess.run(
            ["promtool", "check", "metrics"],
            input=ask(path, "/metrics")[1],
            text=True,
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_attributes_are_in_no_metric(service: Service) -> None:
    """Requests for attributes are counted under their route; neither a name nor a value of one is in any metric."""
    with service.container("web") as guest, endpoint(service) as path:
        service.command("policy", "allow", "attributes", "--instance", "web")
        place = "/1.0/guestapi/attributes/guest/hushed-name"
        assert guest.ask(place, "PUT", b"hushed value").status == 201
        assert guest.ask(place).text == "hushed value"
        route = "/1.0/guestapi/attributes/{namespace}/{name}"
        wait(lambda: summed(scrape(path), "guestapi_requests_total", route=route) == 2)
        assert "hushed" not in ask(path, "/metrics")[1]


def test_no_counter_goes_back_when_workers_are_killed(service: Service) -> None:
    """Of a killed worker at most what it counted in its last second is lost; sums never become smaller."""
    with service.container("web", {"user.foo": "bar"}) as guest, endpoint(service) as path:
        for _time in range(20):
            guest.ask("/1.0/config/user.foo")
        wait(lambda: summed(scrape(path), "guestapi_requests_total") == 20)
        assert ask(path, "/healthz") == (200, "ok\n")
        old = service.workers
        for worker in old:
            os.kill(worker, signal.SIGKILL)
        starts = 0.0
        while starts < 4 or set(service.workers) & set(old):
            samples = scrape(path)
            assert summed(samples, "guestapi_requests_total") == 20
            starts = summed(samples, "guestapi_worker_starts_total")
        guest.ask("/1.0/config/user.foo")
        wait(lambda: summed(scrape(path), "guestapi_requests_total") == 21)


def test_health(service: Service) -> None:
    """What does not answer is said with 503, in one sentence without a path; the endpoint itself goes on."""
    with endpoint(service) as path:
        wait(lambda: ask(path, "/readyz") == (200, "ok\n"))
        database = service.state / "store.db"
        database.rename(database.with_name("elsewhere"))
        assert ask(path, "/readyz") == (503, "the store cannot be read\n")
        assert summed(scrape(path), "guestapi_store_up") == 0
        database.with_name("elsewhere").rename(database)
        service.stop()
        wait(lambda: ask(path, "/healthz") == (503, "no worker answers\n"))
        assert ask(path, "/readyz")[0] == 503
        assert summed(scrape(path), "guestapi_workers") == 0
