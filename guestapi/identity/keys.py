"""The keys that sign tokens: one file, which belongs to the signer's user alone and is replaced as a whole.

Rules:

1. A key has a time from which it signs. The newest whose time has come signs; if none has, the oldest.
2. Everybody who verifies is told of a key before it signs, and for as long as tokens that it signed can be valid. So
   there are two keys during a rotation, and otherwise one.
3. The file is read only if nobody but its owner can, and if its owner is that of the directory.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from guestapi.errors import GuestapiError, OperatorError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

#: Seconds for which a token is valid.
LIFETIME = 300
#: Seconds for which a key is published after it has signed its last token: those of the token, and as many for clocks
#: that differ and for what verifiers tolerate.
RETAINED = 2 * LIFETIME
#: The name of the file in its directory.
FILE = "keys.json"
#: The most bytes of the file. It has two keys at most, so a larger one is not ours.
_MOST_BYTES = 65536


class KeysError(GuestapiError):
    """The keys cannot be used."""


class StoredKey(Struct, frozen=True, kw_only=True):
    """A private key as a JSON Web Key (RFC 7517; RFC 7518, section 6.2).

    Attributes:
        kid: its name: its thumbprint (RFC 7638).
        nbf: Unix time in seconds from which it signs.
        x: of the point.
        y: of the point.
        d: the private number.
        kty: always ``EC``.
        crv: always ``P-256``.
    """

    kid: str
    nbf: int
    x: str
    y: str
    d: str
    kty: Literal["EC"] = "EC"
    crv: Literal["P-256"] = "P-256"

    def __repr__(self) -> str:
        """Return its name alone, so that no log or traceback shows the private number."""
        return f"StoredKey({self.kid})"

    def public(self, use: str) -> dict[str, str]:
        """Return what everybody may know, as a JSON Web Key for that ``use``."""
        return {
            "kty": self.kty,
            "crv": self.crv,
            "x": self.x,
            "y": self.y,
            "kid": self.kid,
            "use": use,
            "alg": "ES256",
        }

    def load(self) -> EllipticCurvePrivateKey:
        """Return the key to sign with.

        Raises:
            KeysError: its numbers are not a key.
        """
        require_libraries()
        from jwt.algorithms import ECAlgorithm
        from jwt.exceptions import InvalidKeyError

        try:
            found: Any = ECAlgorithm.from_jwk({"kty": self.kty, "crv": self.crv, "x": self.x, "y": self.y, "d": self.d})
        except (InvalidKeyError, ValueError):
            raise KeysError(f"key {self.kid} is damaged", "'guestapi identity keys rotate --compromised'") from None
        loaded: EllipticCurvePrivateKey = found
        return loaded


class _Document(Struct, frozen=True):
    keys: list[StoredKey]


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys of a host, in the order in which they begin to sign. There is at least one."""

    keys: tuple[StoredKey, ...]

    def signing(self, now: float) -> StoredKey:
        """Return the key that signs at that Unix time."""
        begun = [one for one in self.keys if one.nbf <= now]
        return begun[-1] if begun else self.keys[0]

    def published(self, now: float) -> tuple[StoredKey, ...]:
        """Return the keys that everybody who verifies has to know at that Unix time."""
        ends = [*(one.nbf + RETAINED for one in self.keys[1:]), float("inf")]
        return tuple(one for one, end in zip(self.keys, ends, strict=True) if end > now)

    def rotated_at(self, now: float) -> float | None:
        """Return the Unix time at which the rotation that goes on is over; None if there is none."""
        return None if len(self.published(now)) == 1 else self.keys[-1].nbf + RETAINED

    def jwks(self, now: float, *, spiffe: bool = False) -> dict[str, Any]:
        """Return the public keys.

        Args:
            now: the Unix time.
            spiffe: as a bundle of SPIFFE (SPIFFE Trust Domain and Bundle, section 4), which names another ``use``.
        """
        keys = [one.public("jwt-svid" if spiffe else "sig") for one in self.published(now)]
        return {"keys": keys, "spiffe_refresh_hint": LIFETIME} if spiffe else {"keys": keys}


def generate(begins: int) -> StoredKey:
    """Make a key that signs from that Unix time on."""
    require_libraries()
    from cryptography.hazmat.primitives.asymmetric import ec

    numbers = ec.generate_private_key(ec.SECP256R1()).private_numbers()
    x, y, d = (
        _base64(number.to_bytes(32, "big"))
        for number in (numbers.public_numbers.x, numbers.public_numbers.y, numbers.private_value)
    )
    # RFC 7638, section 3: the required members, in the order of their names.
    thumbprint = sha256(f'{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}'.encode()).digest()
    return StoredKey(kid=_base64(thumbprint), nbf=begins, x=x, y=y, d=d)


def read(directory: Path) -> KeyRing | None:
    """Read the keys.

    Args:
        directory: where the file is.

    Returns:
        The keys; None if there are none yet.

    Raises:
        KeysError: others could read the file too, or it cannot be read or understood.
    """
    file = directory / FILE
    try:
        owner = directory.stat()
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeysError(f"{file}: {error.strerror}", "only root and the signer's user can read it") from None
    try:
        _check(directory, owner, file, os.fstat(descriptor))
        data = os.read(descriptor, _MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    try:
        keys = msgspec.json.decode(data, type=_Document).keys
    except (msgspec.DecodeError, UnicodeDecodeError):
        # The decoder's message might repeat parts of the key.
        keys = []
    if not keys or len(data) > _MOST_BYTES:
        raise KeysError(f"{file}: no keys can be read from it", "'guestapi identity keys rotate --compromised'")
    return KeyRing(tuple(sorted(keys, key=lambda one: one.nbf)))


def _check(directory: Path, owner: os.stat_result, file: Path, found: os.stat_result) -> None:
    """Refuse a file that is not its owner's alone."""
    if not stat.S_ISREG(found.st_mode):
        raise KeysError(f"{file}: is not a file")
    for path, one in ((directory, owner), (file, found)):
        if one.st_mode & 0o077:
            raise KeysError(
                f"{path}: mode {stat.S_IMODE(one.st_mode):04o} lets others in, not only its owner",
                f"'chmod go= {path}', and 'guestapi identity keys rotate --compromised' if they may have read it",
            )
    if found.st_uid != owner.st_uid:
        raise KeysError(
            f"{file}: belongs to user {found.st_uid}, its directory to {owner.st_uid}",
            f"'chown --reference={directory} {file}'",
        )


def require(directory: Path) -> KeyRing:
    """Read the keys, as `read`.

    Raises:
        KeysError: as `read`, or there are none yet.
    """
    found = read(directory)
    if found is None:
        raise KeysError(f"{directory}: there is no key yet", "'guestapi identity keys rotate' makes one")
    return found


def rotate(directory: Path, seconds: float, *, compromised: bool = False) -> KeyRing:
    """Add a key. The first one signs at once.

    Args:
        directory: where the file is. It exists, and belongs to the signer's user.
        seconds: from now until the key signs.
        compromised: it signs at once, and what the earlier keys signed is valid no more.

    Returns:
        The keys as they are now.

    Raises:
        OperatorError: the last rotation is not over.
        KeysError: the directory or the file cannot be used.
    """
    if not directory.is_dir():
        raise KeysError(
            f"{directory}: there is no such directory", "'systemd-tmpfiles --create guestapi.conf' makes it"
        )
    now = time.time()
    before = None if compromised else read(directory)
    kept: Sequence[StoredKey] = ()
    if before is not None:
        over = before.rotated_at(now)
        if over is not None:
            until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(over))
            raise OperatorError(
                f"the last rotation goes on until {until}: tokens of the key before can be valid until then",
                "a key that somebody else may know is replaced at once by --compromised",
            )
        kept = before.published(now)
    ring = KeyRing((*kept, generate(int(now + seconds) if kept else int(now))))
    _write(directory, msgspec.json.encode(_Document(list(ring.keys))))
    return ring


def _write(directory: Path, data: bytes) -> None:
    """Replace the file. Whoever reads it meanwhile reads the old one or the new one."""
    temporary = directory / f".{FILE}.{secrets.token_hex(8)}"
    try:
        owner = directory.stat()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as opened:
            if (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            opened.write(data)
            opened.flush()
            os.fsync(descriptor)
        temporary.replace(directory / FILE)
        opened_directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened_directory)
        finally:
            os.close(opened_directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise KeysError(f"{directory}: the keys cannot be written: {error.strerror}", "run this as root") from None


def _base64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def require_libraries() -> None:
    """Load the libraries that sign.

    Raises:
        KeysError: they are not installed.
    """
    try:
        import cryptography
        import jwt.algorithms
    except ImportError as error:
        raise KeysError(
            f"signed identity needs PyJWT and cryptography: {error}",
            "docs/identity.md says how to install guestapi[identity]",
        ) from None
    assert jwt.algorithms.has_crypto, cryptography.__version__
