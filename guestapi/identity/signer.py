"""Tokens, made of what workers ask for, and the loop that answers workers.

Nothing that is asked for is signed as it is: each claim is a checked field of the request, or the signer's own.
"""

from __future__ import annotations

import logging
import secrets
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt

from guestapi.identity import keys
from guestapi.identity.keys import KeyRing, KeysError
from guestapi.identity.messages import MESSAGE_BYTES, MessageError, TokenAnswer, TokenRequest, decode_request, encode
from guestapi.journal import ThrottledLog
from guestapi.settings import IdentitySettings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

log = logging.getLogger(__name__)

#: Each worker has one connection, and there are 256 workers at the most; a reload has as many new ones for a moment.
MOST_CONNECTIONS = 520


class TokenMaker:
    """Makes tokens for one host."""

    def __init__(self, settings: IdentitySettings, clock: Callable[[], float] = time.time) -> None:
        """Make none yet.

        Args:
            settings: what tokens say, and where the keys are.
            clock: returns Unix time.
        """
        self._subjects = f"spiffe://{settings.trust_domain}/guestapi/"
        self._issuer = settings.issuer_or_default
        self._audiences = frozenset(settings.audiences)
        self._directory = Path(settings.keys)
        self._clock = clock
        self._ring: KeyRing | None = None
        self._read: tuple[int, int, int] | None = None
        self._loaded: dict[str, EllipticCurvePrivateKey] = {}
        self._errors = ThrottledLog(log, logging.ERROR)

    def answer(self, message: bytes) -> bytes:
        """Answer a message of a worker, whatever it is."""
        try:
            request = decode_request(message)
        except MessageError:
            self._errors.log("a worker has sent what is not a request for a token")
            return encode(TokenAnswer(refused="request"))
        try:
            now = self._clock()
            name, key = self._key(now)
        except KeysError as error:
            self._errors.log(str(error))
            return encode(TokenAnswer(refused="keys"))
        # Checked last: 'guestapi check' finds out by a request for no audience whether there could be tokens.
        if request.audience not in self._audiences:
            return encode(TokenAnswer(refused="audience"))
        token = jwt.encode(self.claims(request, int(now)), key, algorithm="ES256", headers={"kid": name})
        return encode(TokenAnswer(token=token))

    def claims(self, request: TokenRequest, now: int) -> dict[str, Any]:
        """Return the claims of a token that is signed at that Unix time."""
        found: dict[str, Any] = {
            "iss": self._issuer,
            "sub": self._subjects + request.uuid,
            "aud": request.audience,
            "iat": now,
            "nbf": now,
            "exp": now + keys.LIFETIME,
            "jti": secrets.token_hex(16),
        }
        if request.nonce is not None:
            found["nonce"] = request.nonce
        found["guestapi"] = {
            "name": request.name,
            "project": request.project,
            "uuid": request.uuid,
            "type": request.type,
            "location": request.location,
            "run": request.run,
        }
        return found

    def _key(self, now: float) -> tuple[str, EllipticCurvePrivateKey]:
        """Return the key that signs now and its name. The file is read again when it was replaced or changed."""
        try:
            found = (self._directory / keys.FILE).stat()
            seen = found.st_ino, found.st_ctime_ns, found.st_size
        except OSError:
            seen = None
        if seen is None or seen != self._read:
            self._read, self._loaded = None, {}
            self._ring = keys.require(self._directory)
            self._loaded = {one.kid: one.load() for one in self._ring.keys}
            self._read = seen
        assert self._ring is not None, "read above"
        name = self._ring.signing(now).kid
        return name, self._loaded[name]


class SignerLoop:
    """Answers workers, one message of each at a time. Each has one connection, and waits for its answer."""

    def __init__(self, listener: socket.socket, answer: Callable[[bytes], bytes]) -> None:
        """Accept nothing yet.

        Args:
            listener: a listening SOCK_SEQPACKET socket.
            answer: answers a message.
        """
        self.answer = answer
        self._listener = listener
        self._connections: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def step(self, seconds: float) -> None:
        """Wait at most `seconds` for something to do, and do it."""
        for key, _events in self._selector.select(seconds):
            if key.fileobj is self._listener:
                self._accept()
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._serve(key.fileobj)

    def close(self) -> None:
        """Close everything but the listening socket."""
        for one in list(self._connections):
            self._end(one)
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log.error("cannot accept: %s", error.strerror)
            return
        if len(self._connections) >= MOST_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        self._connections.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: socket.socket) -> None:
        try:
            # One byte more than a message may have: a longer one is cut there, and refused.
            message = connection.recv(MESSAGE_BYTES + 1)
            if message:
                connection.send(self.answer(message))
                return
        except BlockingIOError:
            # Not a worker: it asks without reading the answers.
            pass
        except OSError:
            pass
        self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._connections.discard(connection)
        connection.close()
