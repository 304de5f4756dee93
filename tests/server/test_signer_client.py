"""A worker's connection to the signer: restarts, silence, and many at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gevent
import pytest

from guestapi.api.resources.identity import SignerUnavailableError
from guestapi.identity.messages import MESSAGE_BYTES, TokenAnswer, TokenRequest, decode_request, encode
from guestapi.server import signer_client
from guestapi.server.signer_client import SignerClient, identity_tokens
from guestapi.settings import IdentitySettings, Settings

REQUEST = TokenRequest(
    audience="a",
    uuid="6ba7b810-9dad-41d1-80b4-00c04fd430c8",
    name="c1",
    project="p",
    type="container",
    location="h",
    run=1,
)


@contextmanager
def listening(path: Path, backlog: int = 64) -> Iterator[socket.socket]:
    """A socket as systemd holds it."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen(backlog)
        yield listener


@contextmanager
def answering(listener: socket.socket, *lives: int) -> Iterator[list[str]]:
    """Signers one after the other, each of which ends its connection after so many answers; yields who asked."""
    asked: list[str] = []

    def run() -> None:
        for answers in lives:
            connection, _address = listener.accept()
            with connection:
                for _ in range(answers):
                    message = connection.recv(MESSAGE_BYTES)
                    if not message:
                        return
                    asked.append(decode_request(message).name)
                    connection.send(encode(TokenAnswer(token=asked[-1])))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield asked
    thread.join(30)
    assert not thread.is_alive()


def named(name: str) -> TokenRequest:
    """A request of another instance."""
    return TokenRequest(**{one: getattr(REQUEST, one) for one in REQUEST.__struct_fields__} | {"name": name})


def test_answers_belong_to_their_requests(tmp_path: Path) -> None:
    """Of many that ask at once, each gets its own answer."""
    path = tmp_path / "sock"
    with listening(path) as listener, answering(listener, 100) as asked:
        client = SignerClient(str(path))
        wanted = [f"c{number}" for number in range(100)]
        greenlets = [gevent.spawn(client.sign, named(name)) for name in wanted]
        gevent.joinall(greenlets, timeout=30)
        assert [one.get().token for one in greenlets] == wanted
        assert sorted(asked) == sorted(wanted)


def test_restart(tmp_path: Path) -> None:
    """A signer that ends after an answer is replaced by the next one without an error."""
    path = tmp_path / "sock"
    with listening(path) as listener, answering(listener, 1, 2, 1):
        client = SignerClient(str(path))
        assert [client.sign(named(name)).token for name in "abcd"] == list("abcd")


def test_no_socket(tmp_path: Path) -> None:
    """Without a socket the error comes at once; it names the unit, and the next request tries again."""
    path = tmp_path / "sock"
    client = SignerClient(str(path))
    for _ in range(2):
        with pytest.raises(SignerUnavailableError, match=r"No such file or directory; is guestapi-signer.socket"):
            client.sign(REQUEST)
    with listening(path) as listener, answering(listener, 1):
        assert client.sign(REQUEST).token == "c1"


def test_silence(tmp_path: Path) -> None:
    """A signer that says nothing costs each the same time, however many wait; late answers reach nobody else."""
    path = tmp_path / "sock"
    with listening(path) as listener:
        client = SignerClient(str(path), timeout=0.5)
        began = time.monotonic()
        greenlets = [gevent.spawn(client.sign, named(f"c{number}")) for number in range(50)]
        gevent.joinall(greenlets, timeout=30)
        assert time.monotonic() - began < 5
        assert all(isinstance(one.exception, SignerUnavailableError) for one in greenlets)
        late, _address = listener.accept()
        # It has ended the connection, so it takes no answer from there any more.
        with late, pytest.raises((BrokenPipeError, ConnectionResetError)):
            late.send(encode(TokenAnswer(token="late")))


def test_full_queue(tmp_path: Path) -> None:
    """While the socket's queue is full, a request waits without turning in circles, and then is answered."""
    path = tmp_path / "sock"
    with listening(path, backlog=0) as listener:
        blocking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        blocking.connect(str(path))
        client = SignerClient(str(path), timeout=20)
        asking = gevent.spawn(client.sign, REQUEST)
        gevent.sleep(0.1)
        assert not asking.ready()
        spent = time.process_time()
        gevent.sleep(0.3)
        assert time.process_time() - spent < 0.15
        listener.accept()[0].close()
        blocking.close()
        with answering(listener, 1):
            assert asking.get(timeout=30).token == "c1"


def test_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than `MOST_WAITING` requests of a worker wait; one more is refused at once."""
    monkeypatch.setattr(signer_client, "MOST_WAITING", 3)
    path = tmp_path / "sock"
    with listening(path):
        client = SignerClient(str(path), timeout=1)
        greenlets = [gevent.spawn(client.sign, REQUEST) for _ in range(3)]
        gevent.sleep(0.05)
        with pytest.raises(SignerUnavailableError, match="too many requests wait"):
            client.sign(REQUEST)
        gevent.joinall(greenlets, timeout=30)


def test_nonsense(tmp_path: Path) -> None:
    """What is no answer of the signer is an error, and ends the connection."""
    path = tmp_path / "sock"
    with listening(path) as listener:
        client = SignerClient(str(path), timeout=20)
        asking = gevent.spawn(client.sign, REQUEST)
        gevent.sleep(0.05)
        connection, _address = listener.accept()
        with connection:
            connection.recv(MESSAGE_BYTES)
            connection.send(b'{"token":"' + b"x" * 20000)
            with pytest.raises(SignerUnavailableError, match="has sent an answer that is malformed"):
                asking.get(timeout=30)
            assert connection.recv(1) == b""


def test_off() -> None:
    """Without a trust domain there are no tokens."""
    assert identity_tokens(Settings()) is None
    found = identity_tokens(Settings(identity=IdentitySettings(trust_domain="example.org", audiences=("a",))))
    assert found is not None
    assert found.audiences == {"a"}
