"""Tokens of identity in real containers, signed by the real signer, verified as those who trust them do."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest

from guestapi.identity.keys import FILE
from tests.harness.containers import Container, Response
from tests.harness.machine import CHECKOUT
from tests.harness.service import USER, Service
from tests.harness.signing import TRUST_DOMAIN, SigningProcess
from tests.harness.waiting import TIMEOUT, until
from tests.server.inside import asking, talk

pytestmark = pytest.mark.root

AUDIENCE = "https://vault.example.org"
PATH = f"/1.0/guestapi/identity?audience={AUDIENCE}"
#: So many requests an instance may send at once here.
GENEROUS = "[limits]\nwrites_per_second = 1000.0\nwrites_burst = 100000\n"


class SigningHost:
    """A service with a signer and its first key."""

    def __init__(self, service: Service, signer: SigningProcess) -> None:
        self.service = service
        self.signer = signer

    def rotate(self, *words: str) -> None:
        """Make a key."""
        self.service.command("identity", "keys", "rotate", *words)

    def jwks(self) -> dict[str, Any]:
        """What everybody is told."""
        found: dict[str, Any] = json.loads(self.service.command("identity", "keys", "jwks").stdout)
        return found

    def verify(self, token: str) -> dict[str, Any]:
        """The claims of a token, by the keys as they are now."""
        name = jwt.get_unverified_header(token)["kid"]
        key = jwt.PyJWKSet.from_dict(self.jwks())[name]
        found: dict[str, Any] = jwt.decode(token, key, algorithms=["ES256"], audience=AUDIENCE)
        return found


@contextmanager
def hosting(toml: str = "", audiences: tuple[str, ...] = (AUDIENCE, "other"), more: str = "") -> Iterator[SigningHost]:
    """A host; both processes run as users of their own. `more`: what else its settings of identity have."""
    service = Service(dialects=["incus"])
    with SigningProcess(service.root, audiences) as signer:
        service.write_config(toml + signer.toml + more)
        made = SigningHost(service, signer)
        made.rotate()
        signer.start(service.config)
        with service:
            yield made


@pytest.fixture(scope="module")
def host() -> Iterator[SigningHost]:
    """A host for tests that change nothing of it."""
    with hosting(GENEROUS) as made:
        yield made


def token_of(answer: Response) -> str:
    """The token of an answer."""
    assert answer.status == 200, answer.text
    return answer.text


@contextmanager
def published(path: Path) -> Iterator[str]:
    """A web server on loopback with that file; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/jwks.json"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_token(host: SigningHost) -> None:
    """A container gets a token that says what it is, and nobody else's; the same request gets another one."""
    with host.service.container("web", project="shop"), host.service.container("db") as container:
        assert json.loads(container.ask("/1.0/guestapi").body)["features"][-1] == "identity"
        answer = container.ask(PATH + "&nonce=4711")
        assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("application/jwt", "no-store")
        claims, stored = host.verify(token_of(answer)), host.service.instance("db")
        assert claims["sub"] == f"spiffe://{TRUST_DOMAIN}/guestapi/{stored.uuid}"
        assert claims["nonce"] == "4711"
        assert claims["guestapi"] | {"location": ""} == {
            "name": "db",
            "project": "default",
            "uuid": stored.uuid,
            "type": "container",
            "location": "",
            "run": stored.run,
        }
        assert claims["guestapi"]["location"] == json.loads(container.ask("/1.0").body)["location"]
        again = host.verify(token_of(container.ask(PATH + "&nonce=4711")))
        assert again["jti"] != claims["jti"]
        head = container.ask(PATH, "HEAD")
        assert (head.status, head.body) == (200, b"")
        assert container.ask(PATH, become=["uid:1000"]).status == 401
        assert container.ask("/1.0/guestapi/identity?audience=x").status == 403
        assert container.ask("/1.0/guestapi/identity").status == 400


def test_nothing_is_cached(host: SigningHost) -> None:
    """On one connection, each of many equal requests gets a token of its own."""
    with host.service.container("web") as container, talk(container) as guest:
        found = []
        for _ in range(20):
            guest.send(asking(PATH))
            found.append(token_of(guest.receive()[0]))
        assert len({host.verify(one)["jti"] for one in found}) == 20


def test_subject(host: SigningHost) -> None:
    """An instance that was removed and added again has another subject; a restart and a new name keep it."""
    subjects = []
    with Container(host.service.binds, hostname="web") as container:
        for _ in range(2):
            host.service.add("web", container)
            subjects.append(host.verify(token_of(container.ask(PATH)))["sub"])
            host.service.command("instance", "stop", "web")
            host.service.command("rename", "web", "shop")
            host.service.command("instance", "start", "shop", "--pid", str(container.pid))
            claims = host.verify(token_of(container.ask(PATH)))
            assert (claims["sub"], claims["guestapi"]["name"]) == (subjects[-1], "shop")
            host.service.remove("shop")
    assert subjects[0] != subjects[1]


def test_copy(host: SigningHost, tmp_path: Path) -> None:
    """A copy, made of a definition under another name, has another subject than its original."""
    with host.service.container("web", {"user.role": "frontend"}) as original:
        first = host.verify(token_of(original.ask(PATH)))
        definition = tmp_path / "web.yaml"
        lines = host.service.command("instance", "show", "web").stdout.splitlines(keepends=True)
        text = "".join(line for line in lines if not line.startswith("uuid:")).replace("name: web", "name: copy")
        definition.write_text(text)
        host.service.command("apply", "--file", str(definition))
        with Container(host.service.binds, hostname="copy") as copied:
            host.service.command("instance", "start", "copy", "--pid", str(copied.pid))
            second = host.verify(token_of(copied.ask(PATH)))
            assert (second["guestapi"]["name"], second["sub"] == first["sub"]) == ("copy", False)
        host.service.remove("copy")
        # With the UUID of the original it is refused.
        definition.write_text(f"{text}uuid: {host.service.instance('web').uuid}\n")
        done = host.service.command("apply", "--file", str(definition), check=False)
        assert (done.returncode, "belongs to another instance already" in done.stderr) == (1, True)


def test_rate() -> None:
    """An instance that asks too often gets 429, and another one its tokens."""
    with hosting() as made, made.service.container("greedy") as greedy, made.service.container("calm") as calm:
        with talk(greedy) as guest:
            statuses = []
            for _ in range(120):
                guest.send(asking(PATH))
                statuses.append(guest.receive()[0].status)
        assert set(statuses) == {200, 429}
        # Two workers, each with a bucket.
        assert statuses.count(200) <= 2 * (20 + 5 * 10)
        assert host_ok(made, calm)


def host_ok(made: SigningHost, container: Container) -> bool:
    """Whether the container gets a token that is valid."""
    return bool(made.verify(token_of(container.ask(PATH))))


def test_rotation_under_load() -> None:
    """While keys rotate, a consumer that has fetched the keys when the rotation began refuses no token.

    The consumer is PyJWT's JWKS client. It fetches by HTTP and keeps the keys. For a name that it does not know it
    would fetch again, which must not happen: the new key was published before it signed.
    """
    with hosting(GENEROUS) as made, made.service.container("web") as container:
        file = made.service.root / "jwks.json"
        first = made.jwks()
        made.rotate("--in", "3s")
        file.write_text(json.dumps(made.jwks()))
        with published(file) as url:
            consumer = jwt.PyJWKClient(url, lifespan=3600, cache_keys=True)
            fetched = [str(one.key_id) for one in consumer.get_signing_keys()]
            assert len(fetched) == 2
            # From now on the server has nothing to tell.
            file.write_text('{"keys":[]}')
            seen: dict[str, int] = {}
            # On a busy machine the new key signs later.
            ends = time.monotonic() + 5
            with talk(container) as guest:
                while time.monotonic() < ends or len(seen) < 2:
                    guest.send(asking(PATH))
                    token = token_of(guest.receive()[0])
                    key = consumer.get_signing_key_from_jwt(token)
                    claims = jwt.decode(token, key.key, algorithms=["ES256"], audience=AUDIENCE)
                    name = jwt.get_unverified_header(token)["kid"]
                    seen[name] = seen.get(name, 0) + 1
                    assert claims["guestapi"]["name"] == "web"
        assert sorted(seen) == sorted(fetched)
        assert first["keys"][0]["kid"] in seen


def test_documented_consumer(tmp_path: Path) -> None:
    """The Python of docs/identity.md takes a token for its own audience, and refuses others."""
    (block,) = re.findall(r"```python\n(.*?)```", (CHECKOUT / "docs/identity.md").read_text(), re.DOTALL)
    own, file = "https://shop.example.org", tmp_path / "guestapi.json"
    with hosting(audiences=(own, AUDIENCE), more='issuer = "https://example.org"\n') as made:
        file.write_text(json.dumps(made.jwks()))
        with made.service.container("web") as container, published(file) as url:
            names: dict[str, Any] = {}
            exec(block.replace("https://www.example.org/guestapi.json", url), names)
            token = token_of(container.ask(f"/1.0/guestapi/identity?audience={own}"))
            uuid = made.service.instance("web").uuid
            assert names["who"](token) == f"spiffe://{TRUST_DOMAIN}/guestapi/{uuid}"
            with pytest.raises(jwt.InvalidAudienceError):
                names["who"](token_of(container.ask(PATH)))
            with pytest.raises(jwt.PyJWTError):
                names["who"](token[:-4] + "AAAA")


def test_signer_restarts_under_load() -> None:
    """Requests for tokens wait while the signer is killed and started again; none fails."""
    with hosting(GENEROUS) as made, made.service.container("web") as container:
        stopped = threading.Event()

        def ask() -> list[int]:
            found = []
            with talk(container) as guest:
                while not stopped.is_set():
                    guest.send(asking(PATH))
                    found.append(guest.receive()[0].status)
            return found

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(4)]
            for end in (made.signer.kill, made.signer.stop):
                time.sleep(0.3)
                end()
                made.signer.start(made.service.config)
                # It has answered again when each guest has had another answer: the last one is asked for below.
                assert container.ask(PATH).status == 200
            stopped.set()
            statuses = [status for one in asked for status in one.result(TIMEOUT)]
        assert set(statuses) == {200}


def test_faults(host: SigningHost) -> None:
    """Without a usable key the guest gets 500 and the log says why; with one again, it gets its tokens."""
    with host.service.container("web") as container:
        file = host.signer.keys / FILE
        file.chmod(0o640)
        try:
            assert container.ask(PATH).status == 500
            assert "lets others in" in host.signer.log.read_text()
        finally:
            file.chmod(0o600)
        assert host_ok(host, container)


def test_reload(host: SigningHost) -> None:
    """The signer takes a new list of audiences on SIGHUP, and keeps the old one if the file cannot be used."""
    with host.service.container("web") as container:
        text = host.service.config.read_text()
        try:
            host.service.config.write_text(text.replace(f'"{AUDIENCE}", ', ""))
            host.signer.reload()
            until(lambda: container.ask(PATH).status == 403, "the signer's refusal")
            host.service.config.write_text("nonsense")
            host.signer.reload()
            until(lambda: "stay as they were" in host.signer.log.read_text(), "the signer's word")
            assert container.ask(PATH).status == 403
        finally:
            host.service.config.write_text(text)
            host.signer.reload()
        until(lambda: container.ask(PATH).status == 200, "the signer's consent")


def memory_of(pid: int) -> Iterator[bytes]:
    """Yield what a process has in its memory, piece by piece, as root reads it."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps.read().splitlines():
            span, permissions, *_rest = line.split()
            if permissions.startswith("r"):
                first, _, last = span.partition("-")
                try:
                    memory.seek(int(first, 16))
                    yield memory.read(int(last, 16) - int(first, 16))
                except (OSError, ValueError, OverflowError):
                    continue  # vvar and vsyscall.


def test_key_is_nowhere_else(host: SigningHost, tmp_path: Path) -> None:
    """The private key is in the signer's memory, and neither in a worker's nor in the store, a backup or a log.

    A core dump of a worker is its memory. The signer writes none: its memory is not dumpable.
    """
    with host.service.container("web") as container:
        for _ in range(10):
            assert host_ok(host, container)
        stored = json.loads((host.signer.keys / FILE).read_text())["keys"][0]["d"]
        number = int.from_bytes(jwt.utils.base64url_decode(stored), "big")
        # As text, and as a library for large numbers has it, in either order of its bytes.
        forms = [stored.encode(), number.to_bytes(32, "big"), number.to_bytes(32, "little")]

        def has(data: bytes) -> bool:
            return any(form in data for form in forms)

        assert any(map(has, memory_of(host.signer.pid))), "the search does not find the key where it is"
        for pid in (host.service.pid, *host.service.workers):
            assert not any(map(has, memory_of(pid))), pid
        backup = tmp_path / "backup"
        host.service.command("backup", str(backup))
        files = [one for one in host.service.root.rglob("*") if one.is_file() and one.parent != host.signer.keys]
        assert {"log", "signer.log", "store.db"} <= {one.name for one in files}
        assert [str(one) for one in (*files, backup) if has(one.read_bytes())] == []
        assert Path(f"/proc/{host.signer.pid}/mem").stat().st_uid == 0, "the signer's memory is dumpable"
        limits = Path(f"/proc/{host.signer.pid}/limits").read_text()
        assert [line.split()[-3:-1] for line in limits.splitlines() if "core file" in line] == [["0", "0"]]


def test_token_is_in_no_log() -> None:
    """Even with log.requests = "all", no line has a token."""
    with hosting('[log]\nrequests = "all"\n') as made, made.service.container("web") as container:
        token = token_of(container.ask(PATH))
        until(lambda: "/1.0/guestapi/identity" in made.service.log.read_text(), "the line of the request")
        for log in (made.service.log, made.signer.log):
            assert token.rpartition(".")[2] not in log.read_text()


def test_socket_is_the_services(host: SigningHost) -> None:
    """Root of a container, which is another user of the host, cannot reach the signer."""
    found = host.signer.path.stat()
    assert (found.st_mode & 0o777, found.st_uid) == (0o600, USER)
    assert os.stat(host.signer.keys).st_mode & 0o777 == 0o700
