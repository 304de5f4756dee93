"""Fixtures: a store for each test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestapi.settings import Settings, StoreSettings
from guestapi.store.reading import Reader
from guestapi.store.writing import Writer
from tests.harness.scratch import SCRATCH
from tests.harness.service import USER


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings with a store in the test's directory, which does not exist yet."""
    return Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/store.db"))


@pytest.fixture
def writer(settings: Settings) -> Writer:
    """A writer of an empty store."""
    return Writer(settings, create=True)


@pytest.fixture
def reader(settings: Settings, writer: Writer) -> Iterator[Reader]:
    """A reader of the same store."""
    opened = Reader(settings.store.url)
    yield opened
    opened.close()


@pytest.fixture
def users_directory() -> Iterator[Path]:
    """A directory that belongs to another user, as the service's state directory does."""
    # Not below pytest's own directory, which only root can enter.
    directory = Path(tempfile.mkdtemp(prefix="guestapi-store-", dir=SCRATCH))
    os.chown(directory, USER, USER)
    yield directory
    shutil.rmtree(directory)
