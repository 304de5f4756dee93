"""Requests of workers to the signer, and its answers: JSON, each one message of a SOCK_SEQPACKET socket.

Neither trusts the other's bytes: each side decodes into these types, whose bounds are those of the store.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from guestapi.errors import GuestapiError
from guestapi.model import InstanceType
from guestapi.settings import WORD_BYTES

#: Bytes of a message: the words of a request, each byte of which JSON writes as six at the most.
MESSAGE_BYTES = 16384
#: RFC 9562, section 4, as `names.check_uuid` writes it.
_UUID = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z"

#: As `names.check_instance` and the pattern of projects have them; a project's name has 255 characters.
_Name = Annotated[str, Meta(min_length=1, max_length=255)]


class MessageError(GuestapiError):
    """A message is not one that the signer or a worker sends."""


class TokenRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which token an instance gets.

    Attributes:
        audience: for whom the token is.
        nonce: a word that the token repeats; None: there is none.
        uuid: of the instance, and so of its subject.
        name: of the instance.
        project: of the instance.
        type: of the instance.
        location: name of the host or cluster member on which the instance runs.
        run: of the instance; grows with each start and stop.
    """

    audience: Annotated[str, Meta(min_length=1, max_length=WORD_BYTES)]
    nonce: Annotated[str, Meta(min_length=1, max_length=WORD_BYTES)] | None = None
    uuid: Annotated[str, Meta(pattern=_UUID)]
    name: _Name
    project: _Name
    type: InstanceType
    location: Annotated[str, Meta(max_length=1024)]
    run: Annotated[int, Meta(ge=0)]


class TokenAnswer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A token, or why there is none.

    Attributes:
        token: as a JWT in its compact form; "" if there is none.
        refused: ``audience``: the operator's list does not have it; ``request``: it is malformed; ``keys``: there is no
            key that can be used, which the signer has logged.
    """

    token: Annotated[str, Meta(max_length=MESSAGE_BYTES)] = ""
    refused: Literal["", "audience", "request", "keys"] = ""


_encoder = msgspec.json.Encoder()
_requests = msgspec.json.Decoder(TokenRequest)
_answers = msgspec.json.Decoder(TokenAnswer)


def encode(message: TokenRequest | TokenAnswer) -> bytes:
    """Return a message as it is sent."""
    return _encoder.encode(message)


def decode_request(data: bytes) -> TokenRequest:
    """Return the request of a worker.

    Raises:
        MessageError: it is not a request.
    """
    try:
        found = _requests.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageError(f"not a request for a token: {error}") from None
    for word in (found.audience, found.nonce or ""):
        if len(word.encode()) > WORD_BYTES:
            raise MessageError(f"an audience or a nonce of more than {WORD_BYTES} bytes")
    return found


def decode_answer(data: bytes) -> TokenAnswer:
    """Return the answer of the signer.

    Raises:
        MessageError: it is not an answer.
    """
    try:
        return _answers.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MessageError(f"malformed: {error}") from None
