"""A certificate authority for tests, made with openssl."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path


class Authority:
    """An authority whose certificates are valid for two days.

    Attributes:
        directory: has its own, `ca.crt` and `ca.key`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def own(self) -> Path:
        """Its certificate."""
        return self.directory / "ca.crt"

    def make(self) -> None:
        """Make its certificate."""
        subject = ("-days", "2", "-subj", "/CN=ca", "-keyout", f"{self.directory}/ca.key", "-out", str(self.own))
        _openssl("req", "-x509", *_NEW, *subject)

    def certificate(self, name: str, path: Path) -> None:
        """Make `path`.crt and `path`.key for a CommonName."""
        request = f"{path}.csr"
        _openssl("req", *_NEW, "-subj", f"/CN={name}", "-keyout", f"{path}.key", "-out", request)
        by = ("-CA", str(self.own), "-CAkey", f"{self.directory}/ca.key", "-days", "2")
        # A file of serial numbers would not be for two at once.
        serial = ("-set_serial", str(secrets.randbits(63)))
        _openssl("x509", "-req", "-in", request, *by, *serial, "-out", f"{path}.crt")
        Path(f"{path}.key").chmod(0o600)


_NEW = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)
