"""Tokens of identity as guests get them, by a signer in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import pytest

from guestapi.api.app import create
from guestapi.api.resources.identity import IdentityTokens, SignerUnavailableError, read_parameters
from guestapi.identity.messages import TokenAnswer, TokenRequest
from guestapi.model import Instance
from guestapi.notifications.broker import Broker
from guestapi.rate_limit import RateLimit
from guestapi.settings import LimitSettings
from tests.api.fakes import CLOUD_INIT_ID, ROOT, Client, EmptyLog, MemoryStore, caller, instance
from tests.api.test_app import ALL, assert_error

PATH = "/1.0/guestapi/identity"
AUDIENCE = "https://vault.example.org"
BURST = LimitSettings().writes_burst


@dataclass
class MemorySigner:
    """Gives tokens that are their requests' numbers, and keeps the requests."""

    asked: list[TokenRequest] = field(default_factory=list)
    refused: str = ""
    fails: bool = False
    store: MemoryStore | None = None

    def sign(self, request: TokenRequest) -> TokenAnswer:
        """Return a token, unless the test wants something else."""
        if self.fails:
            raise SignerUnavailableError("the signer at /secret/place does not answer")
        self.asked.append(request)
        if self.store is not None:
            # The instance is removed meanwhile.
            self.store.held = None
        if self.refused:
            return TokenAnswer(refused=self.refused)  # type: ignore[arg-type]  # one of them
        return TokenAnswer(token=f"token-{len(self.asked)}")


def client(
    signer: MemorySigner, store: MemoryStore | None = None, dialect: str = "incus", *, uid: int = ROOT, run: int = 1
) -> Client:
    """Return a client of a host with signed identity."""
    made = Client(store or MemoryStore(instance()), dialect, caller(uid=uid, run=run))
    broker = Broker(EmptyLog(), queue_limit=10, subscriptions_per_instance=1)
    tokens = IdentityTokens(signer, frozenset({AUDIENCE, "ä b&c"}), RateLimit(5.0, BURST))
    made.application = create(made.store, broker, identity=tokens)
    return made


@pytest.mark.parametrize("dialect", ALL)
def test_token(dialect: str) -> None:
    """A token is the body alone, never kept by anybody; the signer is told of this instance and nothing else."""
    signer = MemorySigner()
    asking = client(signer, dialect=dialect)
    answer = asking.ask(PATH, query=f"audience={AUDIENCE}&nonce=1%2b1")
    assert (answer.status, answer.body) == (200, b"token-1")
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("application/jwt", "no-store")
    assert "etag" not in answer.headers
    assert not asking.environ.get("guestapi.cacheable")
    (request,) = signer.asked
    assert (request.audience, request.nonce, request.uuid) == (AUDIENCE, "1+1", CLOUD_INIT_ID)
    assert (request.name, request.project, request.type, request.run) == ("c1", "default", "container", 1)
    tree = json.loads(asking.ask("/1.0/guestapi/tree").body)
    assert request.location == tree["location"]
    assert asking.ask(PATH, query=f"audience={AUDIENCE}").body == b"token-2"
    assert signer.asked[1].nonce is None
    assert asking.ask("/1.0/guestapi").body == b'{"features":["tree","notices","identity"]}\n'


def test_location() -> None:
    """An instance with a location has it in its token."""
    signer = MemorySigner()
    client(signer, MemoryStore(instance(location="member-2"))).ask(PATH, query=f"audience={AUDIENCE}")
    assert signer.asked[0].location == "member-2"


def test_off() -> None:
    """Without signed identity the path is answered as Incus answers it, and is no feature."""
    for method in ("GET", "POST"):
        assert_error(Client(MemoryStore(instance())).ask(PATH, method, query="audience=x"), 404, "404 page not found")
    assert b"identity" not in Client(MemoryStore(instance())).ask("/1.0/guestapi").body


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("", "audience is missing; send ?audience= and for whom the token is"),
        ("nonce=1", "audience is missing; send ?audience= and for whom the token is"),
        ("Audience=x", "audience is missing; send ?audience= and for whom the token is"),
        ("audience", "audience is not 1 to 256 bytes"),
        ("audience=", "audience is not 1 to 256 bytes"),
        ("audience=" + "a" * 257, "audience is not 1 to 256 bytes"),
        ("audience=" + "%61" * 257, "audience is not 1 to 256 bytes"),
        ("audience=" + "%c3%a4" * 129, "audience is not 1 to 256 bytes"),
        ("audience=" + "a" * 15000, "audience is not 1 to 256 bytes"),
        ("audience=x&audience=x", "audience is there twice; send it once"),
        ("audience=x&%61udience=x", "audience is there twice; send it once"),
        ("audience=%ff", "audience is not UTF-8"),
        ("audience=%ed%a0%80", "audience is not UTF-8"),
        (f"audience={AUDIENCE}&nonce=", "nonce is not 1 to 256 bytes"),
        (f"audience={AUDIENCE}&nonce=" + "n" * 257, "nonce is not 1 to 256 bytes"),
        (f"audience={AUDIENCE}&nonce=%fe", "nonce is not UTF-8"),
        (f"nonce=a&audience={AUDIENCE}&nonce=a", "nonce is there twice; send it once"),
    ],
)
def test_bad_request(query: str, text: str) -> None:
    """A request without an audience, or with what no token could repeat, is told what would be right; nobody signs."""
    signer = MemorySigner()
    assert_error(client(signer).ask(PATH, query=query), 400, text)
    assert signer.asked == []


def test_parameters() -> None:
    """Parameters are decoded as those of a form; others are ignored, however long."""
    assert read_parameters("audience=%c3%a4+b%26c&x&" + "y" * 9000 + "=1&=&%=1") == ("ä b&c", None)
    assert read_parameters("nonce=%00%0a") == (None, "\0\n")
    assert read_parameters("%6e%6f%6e%63%65=" + "%6e" * 256) == (None, "n" * 256)


def test_audience() -> None:
    """An audience that the operator's list lacks is 403, be it refused here or by the signer."""
    signer = MemorySigner()
    for other in ("https://vault.example.org/", "https://VAULT.example.org", "x"):
        answer = client(signer).ask(PATH, query=f"audience={other}")
        assert_error(answer, 403, "no tokens are given for this audience")
    assert signer.asked == []
    signer.refused = "audience"
    answer = client(signer).ask(PATH, query=f"audience={AUDIENCE}")
    assert_error(answer, 403, "no tokens are given for this audience")


def test_rate() -> None:
    """Beyond the burst there are no tokens for a while; changes of state have a bucket of their own."""
    signer = MemorySigner()
    asking = client(signer)
    answers = [asking.ask(PATH, query=f"audience={AUDIENCE}") for _ in range(BURST + 1)]
    assert [one.status for one in answers] == [200] * BURST + [429]
    assert_error(answers[-1], 429, "too many requests for a token")
    assert answers[-1].headers["retry-after"] == "1"
    assert len(signer.asked) == BURST
    # A refused audience costs nothing, and readiness can be told.
    assert asking.ask(PATH, query="audience=x").status == 403
    assert asking.ask("/1.0", "PATCH", b'{"state":"Ready"}').status == 200


def test_who_may_ask() -> None:
    """Other users than root get 401, instances that are switched off 403, unknown callers 500; nobody signs."""
    signer = MemorySigner()
    query = f"audience={AUDIENCE}"
    assert_error(client(signer, uid=ROOT + 5).ask(PATH, query=query), 401, "Access denied for non-root user")
    off = MemoryStore(instance({"security.guestapi": "false"}))
    assert_error(client(signer, off).ask(PATH, query=query), 403, "not authorized")
    assert client(signer, run=2).ask(PATH, query=query).status == 500
    assert client(signer).ask(PATH, "POST", query=query).status == 405
    assert signer.asked == []


def test_removed_meanwhile() -> None:
    """An instance that is removed while the signer works gets no token."""
    store = MemoryStore(instance())
    signer = MemorySigner(store=store)
    answer = client(signer, store).ask(PATH, query=f"audience={AUDIENCE}")
    assert signer.asked
    assert_error(answer, 500, "pid not in container?")


@pytest.mark.parametrize("reason", ["keys", "request", "fails"])
def test_no_signer(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """A fault of the host is 500, as others are; the guest learns nothing of it, the operator does."""
    signer = MemorySigner(fails=reason == "fails", refused="" if reason == "fails" else reason)
    answer = client(signer).ask(PATH, query=f"audience={AUDIENCE}&nonce=secret-nonce")
    assert_error(answer, 500, "temporarily unavailable, try again")
    assert "signer" in caplog.text
    assert "secret-nonce" not in caplog.text


def test_each_instance_is_itself() -> None:
    """What tells instances apart is of the instance that asks."""
    signer = MemorySigner()
    other: Instance = replace(instance(), uuid="0" * 8 + "-0000-0000-0000-" + "0" * 12, name="c2", project="p", run=1)
    for one in (instance(), other):
        client(signer, MemoryStore(one)).ask(PATH, query=f"audience={AUDIENCE}")
    assert [(one.uuid, one.name, one.project) for one in signer.asked] == [
        (CLOUD_INIT_ID, "c1", "default"),
        (other.uuid, "c2", "p"),
    ]
