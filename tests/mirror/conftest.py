"""Fixtures: a store for each test that needs one."""

from __future__ import annotations

from tests.store.conftest import settings, writer

__all__ = ["settings", "writer"]
