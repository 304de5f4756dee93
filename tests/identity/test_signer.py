"""Tokens as two libraries verify them, and the loop that answers workers."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import joserfc.jwt
import jwt
import msgspec
import pytest
from joserfc.jwk import KeySet

from guestapi.identity import keys
from guestapi.identity.keys import FILE, LIFETIME
from guestapi.identity.messages import MESSAGE_BYTES, TokenAnswer, TokenRequest, decode_answer, encode
from guestapi.identity.signer import MOST_CONNECTIONS, SignerLoop, TokenMaker
from guestapi.settings import IdentitySettings

AUDIENCE = "https://vault.example.org"
UUID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
REQUEST = TokenRequest(
    audience=AUDIENCE,
    nonce="n-1",
    uuid=UUID,
    name="wéb",
    project="a project/with what SPIFFE forbids",
    type="container",
    location="host1",
    run=3,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a key."""
    made = tmp_path / "keys"
    made.mkdir(mode=0o700)
    keys.rotate(made, 1)
    return made


@pytest.fixture
def maker(directory: Path) -> TokenMaker:
    """Makes tokens for one audience."""
    return TokenMaker(settings(directory))


def settings(directory: Path) -> IdentitySettings:
    """Settings with one audience."""
    return IdentitySettings(trust_domain="example.org", audiences=(AUDIENCE,), keys=str(directory))


def ask(maker: TokenMaker, request: TokenRequest = REQUEST) -> TokenAnswer:
    """Ask as a worker does."""
    return decode_answer(maker.answer(encode(request)))


def part(token: str, index: int) -> dict[str, Any]:
    """A part of a token as it was sent, verified by nothing."""
    text = token.split(".")[index]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return found


def test_two_libraries_verify(maker: TokenMaker, directory: Path) -> None:
    """PyJWT and joserfc verify a token by the published keys, and read the same claims."""
    token = ask(maker).token
    document = keys.require(directory).jwks(time.time())
    key = jwt.PyJWKSet.from_dict(document)[jwt.get_unverified_header(token)["kid"]]
    first = jwt.decode(
        token, key, algorithms=["ES256"], audience=AUDIENCE, issuer="https://example.org", options={"require": ["exp"]}
    )
    second = joserfc.jwt.decode(token, KeySet.import_key_set(document), algorithms=["ES256"])  # type: ignore[arg-type]
    assert first == second.claims
    with pytest.raises(jwt.InvalidAudienceError):
        jwt.decode(token, key, algorithms=["ES256"], audience="https://other.example.org")
    head, payload, signature = token.split(".")
    forged = part(token, 1) | {"sub": "spiffe://example.org/guestapi/other"}
    payload = base64.urlsafe_b64encode(json.dumps(forged).encode()).rstrip(b"=").decode()
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(f"{head}.{payload}.{signature}", key, algorithms=["ES256"], audience=AUDIENCE)


def test_header_and_claims(maker: TokenMaker, directory: Path) -> None:
    """Header and claims are those of the contract and no more; the instance's own are in one object."""
    began = int(time.time())
    token = ask(maker).token
    assert part(token, 0) == {"alg": "ES256", "kid": keys.require(directory).keys[0].kid, "typ": "JWT"}
    claims = part(token, 1)
    assert claims.keys() == {"iss", "sub", "aud", "iat", "nbf", "exp", "jti", "nonce", "guestapi"}
    assert claims["sub"] == f"spiffe://example.org/guestapi/{UUID}"
    assert (claims["iss"], claims["aud"], claims["nonce"]) == ("https://example.org", AUDIENCE, "n-1")
    assert began <= claims["iat"] == claims["nbf"] <= time.time()
    assert claims["exp"] - claims["iat"] == LIFETIME
    assert claims["guestapi"] == {
        "name": "wéb",
        "project": REQUEST.project,
        "uuid": UUID,
        "type": "container",
        "location": "host1",
        "run": 3,
    }
    without = part(ask(maker, msgspec.structs.replace(REQUEST, nonce=None)).token, 1)
    assert "nonce" not in without
    assert without["jti"] != claims["jti"]


#: JWT-SVID (github.com/spiffe/spiffe, standards/JWT-SVID.md), sections 2 and 3, and SPIFFE-ID.md, section 2.
RULES: dict[str, Callable[[dict[str, Any], dict[str, Any]], bool]] = {
    "2: no header but alg, kid and typ": lambda head, _claims: head.keys() <= {"alg", "kid", "typ"},
    "2.1: alg is one of the list": lambda head, _claims: (
        head["alg"] in {"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"}
    ),
    "2.2: kid is a text": lambda head, _claims: isinstance(head["kid"], str) and head["kid"] != "",
    "2.3: typ is JWT or JOSE": lambda head, _claims: head["typ"] in {"JWT", "JOSE"},
    "3.1: sub is a SPIFFE ID": lambda _head, claims: is_spiffe_id(claims["sub"]),
    "3.2: aud has a value": lambda _head, claims: bool(claims["aud"]),
    "3.3: exp is there, and soon": lambda _head, claims: 0 < claims["exp"] - claims["iat"] <= 3600,
    "RFC 7519, 4.1: numbers are numbers": lambda _head, claims: all(
        isinstance(claims[name], int) for name in ("iat", "nbf", "exp")
    ),
}


def is_spiffe_id(text: str) -> bool:
    """Whether a text is a SPIFFE ID, by SPIFFE-ID.md, sections 2.1 to 2.3."""
    scheme, _, rest = text.partition("://")
    domain, slash, path = rest.partition("/")
    segments = path.split("/") if slash else []
    letters = set("abcdefghijklmnopqrstuvwxyz0123456789.-_")
    return (
        scheme == "spiffe"
        and len(text.encode()) <= 2048
        and 0 < len(domain) <= 255
        and set(domain) <= letters
        and all(
            one not in ("", ".", "..") and set(one) <= letters | set("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for one in segments
        )
    )


@pytest.mark.parametrize("rule", RULES)
def test_jwt_svid(maker: TokenMaker, rule: str) -> None:
    """Each rule of SPIFFE for JWT-SVIDs holds."""
    token = ask(maker).token
    assert RULES[rule](part(token, 0), part(token, 1))


def test_spiffe_id_rules() -> None:
    """The table of rules tells apart what is none: a project's name, for one, could not be in it."""
    assert is_spiffe_id(f"spiffe://example.org/guestapi/{UUID}")
    for bad in (f"spiffe://example.org/{REQUEST.project}", "spiffe://Example.org/a", "spiffe://example.org/a/", "x"):
        assert not is_spiffe_id(bad)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 5000,
        encode(REQUEST).replace(b"container", b"pod"),
        encode(REQUEST).replace(UUID.encode(), UUID.upper().encode()),
        encode(REQUEST).replace(UUID.encode(), UUID.encode() + b"\\n"),
        encode(REQUEST).replace(UUID.encode(), b"../" + UUID.encode()[3:]),
        encode(REQUEST).replace(b'"run":3', b'"run":-1'),
        encode(REQUEST).replace(b'"run":3', b'"run":3,"sub":"spiffe://example.org/guestapi/x"'),
        encode(REQUEST).replace(b'"n-1"', b'""'),
        encode(msgspec.structs.replace(REQUEST, nonce="ä" * 129)),
        encode(msgspec.structs.replace(REQUEST, audience="a" * 257)),
    ],
)
def test_malformed_requests(maker: TokenMaker, message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What is not a request gets no token, and the log repeats nothing of it."""
    assert decode_answer(maker.answer(message)) == TokenAnswer(refused="request")
    assert [one.getMessage() for one in caplog.records] == ["a worker has sent what is not a request for a token"]


def test_audience(maker: TokenMaker) -> None:
    """The signer has the operator's list, too: a worker that was taken over gets no token for another audience."""
    for other in ("https://vault.example.org/", "HTTPS://vault.example.org", "x"):
        assert ask(maker, msgspec.structs.replace(REQUEST, audience=other)).refused == "audience"


def test_keys_change(maker: TokenMaker, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new file is used for the next token; without one, or with one that others can read, there is none."""
    first = part(ask(maker).token, 0)["kid"]
    assert part(ask(maker).token, 0)["kid"] == first
    second = keys.rotate(directory, 1, compromised=True).keys[0].kid
    assert part(ask(maker).token, 0)["kid"] == second != first
    (directory / FILE).chmod(0o644)
    assert ask(maker).refused == "keys"
    (directory / FILE).chmod(0o600)
    assert part(ask(maker).token, 0)["kid"] == second
    (directory / FILE).unlink()
    assert ask(maker).refused == "keys"
    assert ["lets others in" in caplog.records[0].message, "no key yet" in caplog.records[1].message] == [True, True]


@pytest.fixture
def served(maker: TokenMaker, tmp_path: Path) -> Iterator[Path]:
    """The path of a socket at which the loop answers."""
    path = tmp_path / "sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1024)
    loop, stopped = SignerLoop(listener, maker.answer), threading.Event()

    def run() -> None:
        while not stopped.is_set():
            loop.step(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    yield path
    stopped.set()
    thread.join()
    loop.close()
    listener.close()


def connect(path: Path) -> socket.socket:
    """Connect as a worker does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(30)
    connection.connect(str(path))
    return connection


def test_loop(served: Path) -> None:
    """Workers are answered each on its connection, as often as they ask, and also after a refusal."""
    with connect(served) as one, connect(served) as two:
        for connection in (one, two, one):
            connection.send(encode(REQUEST))
        for connection in (two, one):
            assert decode_answer(connection.recv(MESSAGE_BYTES)).token
        one.send(b"nonsense")
        one.send(encode(REQUEST))
        answers = [decode_answer(one.recv(MESSAGE_BYTES)) for _ in range(3)]
        assert sorted(bool(answer.token) for answer in answers) == [False, True, True]


def flood(connection: socket.socket) -> None:
    """Ask without reading any answer."""
    for _ in range(100_000):
        connection.send(encode(REQUEST))


def test_loop_hostile_workers(served: Path) -> None:
    """A worker that reads nothing, sends too much or opens too many connections is cut off, and others are answered."""
    with connect(served) as greedy, connect(served) as long:
        greedy.settimeout(0.5)
        # EPIPE or ECONNRESET, when the signer ends it.
        with pytest.raises(OSError):  # noqa: PT011
            flood(greedy)
        long.send(b" " * (MESSAGE_BYTES + 100))
        assert decode_answer(long.recv(MESSAGE_BYTES)).refused == "request"
        many = [connect(served) for _ in range(MOST_CONNECTIONS + 8)]
        many[-1].settimeout(30)
        try:
            assert many[-1].recv(10) == b""
            long.send(encode(REQUEST))
            assert decode_answer(long.recv(MESSAGE_BYTES)).token
        finally:
            for one in many:
                one.close()
    with connect(served) as again:
        again.send(encode(REQUEST))
        assert decode_answer(again.recv(MESSAGE_BYTES)).token
