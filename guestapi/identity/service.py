"""The process that signs: its socket from systemd, its signals, and the protection of its memory."""

from __future__ import annotations

import ctypes
import logging
import resource
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from guestapi import systemd
from guestapi.errors import GuestapiError, OperatorError
from guestapi.identity.keys import require_libraries
from guestapi.settings import IdentitySettings

if TYPE_CHECKING:
    from guestapi.identity.signer import TokenMaker

log = logging.getLogger(__name__)

#: PR_SET_DUMPABLE (prctl(2)).
_SET_DUMPABLE = 4


def serve(load: Callable[[], IdentitySettings]) -> None:
    """Sign until SIGTERM or SIGINT. SIGHUP has it read the settings again; keys are read whenever they change.

    Args:
        load: reads the settings.

    Raises:
        OperatorError: identity is off, a library is missing, or systemd has passed no socket.
    """
    protect_memory()
    require_libraries()
    # Only now: it loads the libraries.
    from guestapi.identity.signer import SignerLoop

    maker = _make(load)
    if systemd.activated() != 1:
        raise OperatorError(
            "the signer needs one socket from systemd", "'systemctl enable --now guestapi-signer.socket' starts it"
        )
    listener = socket.socket(fileno=systemd.descriptors(1)[0])
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        raise OperatorError("the socket from systemd is not one of ListenSequentialPacket=")
    stopping: list[int] = []
    reloading: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: stopping.append(received))
    signal.signal(signal.SIGHUP, lambda received, _frame: reloading.append(received))
    loop = SignerLoop(listener, maker.answer)
    systemd.notify("READY=1")
    try:
        while not stopping:
            loop.step(1.0)
            if reloading:
                reloading.clear()
                try:
                    loop.answer = _make(load).answer
                except GuestapiError as error:
                    log.error("the settings stay as they were: %s", error)
    finally:
        loop.close()


def protect_memory() -> None:
    """Have the kernel write no core dump of this process, and show its memory to root alone.

    Raises:
        OSError: the kernel refuses.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_DUMPABLE")


def _make(load: Callable[[], IdentitySettings]) -> TokenMaker:
    from guestapi.identity.signer import TokenMaker

    settings = load()
    if settings.trust_domain is None:
        raise OperatorError("identity.trust_domain is not set, so nothing is signed", "docs/identity.md says how to")
    return TokenMaker(settings)
