"""A store of its own for each test that needs one."""

from __future__ import annotations

from tests.store.conftest import settings, writer

__all__ = ["settings", "writer"]
