"""guestapi.client as a distribution of its own: its wheel has the client alone, and works without the service."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

import guestapi
from tests.harness.machine import CHECKOUT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as by ``make client``, of a copy of the files that it is built from."""
    directory = tmp_path_factory.mktemp("client")
    for name in ("client", "guestapi"):
        unwanted = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(CHECKOUT / name, directory / name, ignore=unwanted)
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    words = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(directory), "./client"]
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = directory.glob("*.whl")
    return built


def test_files(wheel: Path) -> None:
    """It has the modules of the client, the mark that they are typed, and the service's version."""
    sources = [path for path in (CHECKOUT / "guestapi/client").iterdir() if path.suffix == ".py"]
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {f"guestapi/client/{name}" for name in ("py.typed", *(path.name for path in sources))}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    assert fields["Version"] == guestapi.__version__
    assert {field.partition(">")[0] for field in fields.get_all("Requires-Dist", [])} == {"httpx", "websockets"}


def test_alone(wheel: Path, tmp_path: Path) -> None:
    """With it and what it needs, but without the service, a program can use the client."""
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; from guestapi.client import Guest, HostUnavailableError\n"
        "try: Guest('/nowhere', timeout=0.01).state()\n"
        "except HostUnavailableError: print(sorted(name for name in sys.modules if name.startswith('guestapi')))\n"
    )
    words = [sys.executable, "-I", "-S", "-c", program, str(tmp_path), sysconfig.get_path("purelib")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    client = ["asynchronous", "blocking", "protocol"]
    assert done.stdout == f"{['guestapi', 'guestapi.client', *(f'guestapi.client.{name}' for name in client)]}\n"
