"""The operator's provider of Ubuntu Pro tokens: it is loaded by name, and its errors are hidden from guests."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from guestapi.api.resources.ubuntu_pro import GuestAttach, GuestToken
from guestapi.model import Instance
from guestapi.server.token_provider import load_tokens
from guestapi.settings import SettingsError
from tests.api.fakes import instance


class Provider:
    """A provider whose token is the thread in which it was issued; for `user.broken` it fails."""

    def guest_attach(self, one: Instance) -> GuestAttach:
        """Return "available", or fail."""
        if "user.broken" in one.config:
            raise OSError("secret detail")
        return "available"

    def issue(self, one: Instance) -> GuestToken | None:
        """Return a token with the thread's id, or fail."""
        if "user.broken" in one.config:
            raise OSError("secret detail")
        return GuestToken(str(threading.get_ident()), "2026-12-01T00:00:00Z", "1")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name by which the provider is loaded."""
    module = ModuleType("a_provider")
    module.Provider = Provider  # type: ignore[attr-defined]  # that is how it gets there
    monkeypatch.setitem(sys.modules, "a_provider", module)
    return "a_provider:Provider"


def test_none() -> None:
    """With the default setting there is no provider."""
    assert load_tokens("off") is None


def test_token_is_issued_in_another_thread(named: str) -> None:
    """A token is issued in another thread, so a slow provider does not block other requests."""
    tokens = load_tokens(named)
    assert tokens is not None
    assert tokens.guest_attach(instance()) == "available"
    token = tokens.issue(instance())
    assert token is not None
    assert token.token != str(threading.get_ident())


def test_failing_provider(named: str, caplog: pytest.LogCaptureFixture) -> None:
    """If the provider fails, the guest gets no token, and the error is logged."""
    tokens = load_tokens(named)
    assert tokens is not None
    broken = instance({"user.broken": "1"})
    assert tokens.guest_attach(broken) == "off"
    assert tokens.issue(broken) is None
    assert caplog.text.count("the provider of Ubuntu Pro tokens fails") == 2


@pytest.mark.parametrize("name", ["none_such:Provider", "a_provider:None_such", "a_provider", str(Path("/x"))])
def test_missing_provider(named: str, name: str) -> None:
    """A name that cannot be imported is an error of the settings."""
    assert named
    with pytest.raises(SettingsError, match=r"server\.ubuntu_pro: .* cannot be used"):
        load_tokens(name)
