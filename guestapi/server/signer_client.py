"""A worker's connection to the signer, which has the keys. The worker has none, and loads no library that signs."""

from __future__ import annotations

import socket
import time

import gevent
import gevent.socket
from gevent.lock import BoundedSemaphore

from guestapi.api.resources.identity import IdentityTokens, SignerUnavailableError
from guestapi.identity.messages import MESSAGE_BYTES, MessageError, TokenAnswer, TokenRequest, decode_answer, encode
from guestapi.rate_limit import RateLimit
from guestapi.settings import Settings

#: Seconds within which a request has its answer, a restart of the signer included.
ANSWER_SECONDS = 5.0
#: Requests of a worker that wait for their turn. A signature takes a tenth of a millisecond.
MOST_WAITING = 1024
#: Seconds until the next attempt to connect while the queue of the socket is full.
_PAUSE_SECONDS = 0.02


class SignerClient:
    """Asks the signer, one request after the other. It implements `api.resources.identity.TokenSigner`."""

    def __init__(self, path: str, timeout: float = ANSWER_SECONDS) -> None:
        """Connect to nothing yet.

        Args:
            path: of the signer's socket.
            timeout: seconds within which a request has its answer.
        """
        self._path = path
        self._timeout = timeout
        self._turn = BoundedSemaphore(1)
        self._waiting = 0
        self._connection: gevent.socket.socket | None = None

    def sign(self, request: TokenRequest) -> TokenAnswer:
        """Return the signer's answer. Only the calling greenlet waits.

        Raises:
            SignerUnavailableError: the signer does not answer in time, or too many wait for it.
        """
        deadline = time.monotonic() + self._timeout
        if self._waiting >= MOST_WAITING:
            raise SignerUnavailableError("too many requests wait for the signer")
        self._waiting += 1
        try:
            if not self._turn.acquire(timeout=self._timeout):
                raise self._error("does not answer in time")
            try:
                return self._ask(encode(request), deadline)
            finally:
                self._turn.release()
        finally:
            self._waiting -= 1

    def _ask(self, message: bytes, deadline: float) -> TokenAnswer:
        try:
            fresh = self._connection is None
            data = self._exchange(message, deadline)
            if not data and not fresh:
                # The signer was restarted since the last request. A token that nobody has received does no harm.
                data = self._exchange(message, deadline)
            if not data:
                raise self._error("ends the connection; 'systemctl status guestapi-signer' may say why")
            return decode_answer(data)
        except TimeoutError:
            self._disconnect()
            raise self._error("does not answer in time") from None
        except OSError as error:
            self._disconnect()
            raise self._error(
                f"cannot be reached: {error.strerror or error}; is guestapi-signer.socket active?"
            ) from None
        except MessageError as error:
            self._disconnect()
            raise self._error(f"has sent an answer that is {error}") from None
        except BaseException:
            # Nobody shall receive the answer to another's request.
            self._disconnect()
            raise

    def _exchange(self, message: bytes, deadline: float) -> bytes:
        """Send a message, and return the answer; nothing if the signer has ended the connection."""
        connection = self._connection = self._connection or self._connect(deadline)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.send(message)
            data: bytes = connection.recv(MESSAGE_BYTES + 1)
        except (BrokenPipeError, ConnectionResetError):
            data = b""
        if not data:
            self._disconnect()
        return data

    def _connect(self, deadline: float) -> gevent.socket.socket:
        while True:
            # Not gevent's connect: while the queue is full, it would try again and again without a pause.
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            try:
                plain.connect(self._path)
            except BlockingIOError:
                plain.close()
                if time.monotonic() + _PAUSE_SECONDS > deadline:
                    raise TimeoutError from None
                gevent.sleep(_PAUSE_SECONDS)
            except BaseException:
                plain.close()
                raise
            else:
                return gevent.socket.socket(fileno=plain.detach())

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _error(self, what: str) -> SignerUnavailableError:
        return SignerUnavailableError(f"the signer at {self._path} {what}")


def identity_tokens(settings: Settings) -> IdentityTokens | None:
    """Return which tokens this host's instances may have; None if there are none."""
    identity, limits = settings.identity, settings.limits
    if identity.trust_domain is None:
        return None
    rate_limit = RateLimit(limits.writes_per_second, limits.writes_burst)
    return IdentityTokens(SignerClient(identity.socket), frozenset(identity.audiences), rate_limit)
