"""``/1.0/guestapi/identity``: a signed token with which the instance shows others which instance it is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import unquote_to_bytes

import falcon

from guestapi.api.errors import BadRequest, OverLimit, Refusal, TemporarilyUnavailable
from guestapi.api.gate import Gate
from guestapi.errors import GuestapiError
from guestapi.identity.messages import TokenAnswer, TokenRequest
from guestapi.model import Instance
from guestapi.rate_limit import RateLimit
from guestapi.settings import WORD_BYTES
from guestapi.wsgi import CALLER, QUERY, Environ

log = logging.getLogger(__name__)

#: What ``GET /1.0/guestapi`` lists for it.
FEATURE = "identity"
#: RFC 7519, section 10.3.1.
_JWT = "application/jwt"
#: Three times as many bytes as a word has, if all are percent-encoded, and the longest name of a parameter.
_PARAMETERS = {b"audience", b"nonce"}
_LONGEST_NAME, _LONGEST_VALUE = 3 * 8, 3 * WORD_BYTES


class SignerUnavailableError(GuestapiError):
    """The signer gives no answer."""


class UnknownAudience(Refusal):
    """The operator's list has no such audience."""

    status_code = 403
    text = "no tokens are given for this audience"


class TooManyIdentities(OverLimit):
    """The instance asks for tokens of its identity too often."""

    text = "too many requests for a token"
    limit = "writes_per_second"


class TokenSigner(Protocol):
    """Who signs tokens."""

    def sign(self, request: TokenRequest) -> TokenAnswer:
        """Return the signer's answer. Only the calling greenlet waits, for a bounded time.

        Raises:
            SignerUnavailableError: there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class IdentityTokens:
    """Which tokens there are, and who signs them.

    Attributes:
        signer: who signs.
        audiences: those that instances may have tokens for.
        rate_limit: how often an instance may have one. It is none of another resource's: whoever wants many tokens can
            still say that it is ready.
    """

    signer: TokenSigner
    audiences: frozenset[str]
    rate_limit: RateLimit


class SignedIdentity:
    """``GET /1.0/guestapi/identity?audience=A[&nonce=N]``. Each answer is another token, so nothing keeps one."""

    def __init__(self, tokens: IdentityTokens, gate: Gate, host: str) -> None:
        """Serve tokens.

        Args:
            tokens: which there are.
            gate: the gate that let the request through. It decides again before the token is sent.
            host: name of this host, the location of every instance that has no other.
        """
        self._tokens = tokens
        self._gate = gate
        self._host = host

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JWT in its compact form, without a line break.

        Raises:
            BadRequest: the audience is missing, or a parameter is too long, twice there or not UTF-8.
            UnknownAudience: the operator's list does not have it.
            TooManyIdentities: the instance asks too often.
            TemporarilyUnavailable: the signer gives no token.
        """
        environ = cast("Environ", req.env)
        audience, nonce = read_parameters(environ.get(QUERY, ""))
        if audience is None:
            raise BadRequest("audience is missing; send ?audience= and for whom the token is")
        if audience not in self._tokens.audiences:
            raise UnknownAudience
        instance: Instance = req.context.instance
        if not self._tokens.rate_limit.take(instance.id):
            raise TooManyIdentities(self._tokens.rate_limit.retry_after)
        try:
            answer = self._tokens.signer.sign(
                TokenRequest(
                    audience=audience,
                    nonce=nonce,
                    uuid=instance.uuid,
                    name=instance.name,
                    project=instance.project,
                    type=instance.type,
                    location=self._host if instance.location is None else instance.location,
                    run=instance.run,
                )
            )
        except SignerUnavailableError as error:
            log.error("%s", error)
            raise TemporarilyUnavailable from None
        if answer.refused == "audience":
            raise UnknownAudience
        if not answer.token:
            log.error("the signer gives no token: %s; 'guestapi check' may say why", answer.refused)
            raise TemporarilyUnavailable
        # It took a while: whoever is not this instance any more gets nothing.
        self._gate.admit(environ[CALLER], "GET", str(req.uri_template))
        resp.content_type = _JWT
        resp.set_header("Cache-Control", "no-store")
        resp.data = answer.token.encode()


def read_parameters(query: str) -> tuple[str | None, str | None]:
    """Return the audience and the nonce of a query; None for what it does not have.

    Args:
        query: the request's, percent-encoded, one character for each byte.

    Raises:
        BadRequest: one is empty, too long, there twice, or not UTF-8.
    """
    found: dict[bytes, str] = {}
    for pair in query.split("&"):
        name, _equals, value = pair.partition("=")
        if len(name) > _LONGEST_NAME:
            continue
        key = _decode(name)
        if key not in _PARAMETERS:
            continue
        word = key.decode()
        if key in found:
            raise BadRequest(f"{word} is there twice; send it once")
        decoded = _decode(value) if len(value) <= _LONGEST_VALUE else b""
        if not 1 <= len(decoded) <= WORD_BYTES:
            raise BadRequest(f"{word} is not 1 to {WORD_BYTES} bytes")
        try:
            found[key] = decoded.decode()
        except UnicodeDecodeError:
            raise BadRequest(f"{word} is not UTF-8") from None
    return found.get(b"audience"), found.get(b"nonce")


def _decode(text: str) -> bytes:
    """Decode a name or a value as of a form (URL Standard, section 5.1), as other parameters of this API are."""
    return unquote_to_bytes(text.replace("+", " ").encode("latin-1"))
