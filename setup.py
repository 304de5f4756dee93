"""guestapi: the guest API of Incus and LXD as a service of its own."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="guestapi",
    version="0.1.0",
    description="The Incus/LXD guest API (/dev/incus/sock) as a service of its own, for any container runtime",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["guestapi", "guestapi.*"]),
    package_data={"guestapi": ["py.typed"]},
    install_requires=[
        "click>=8.1",
        "falcon>=4.0,<5",
        "gevent>=24.10.1",
        "gevent-websocket>=0.10.1",
        "gunicorn[gevent]>=27.0,<28",
        "gunicorn_h1c>=0.6.9,<0.7",
        "httpx>=0.27",
        "inotify_simple>=2.0",
        "msgspec>=0.19",
        "rich>=13",
        "SQLAlchemy>=2.0.30",
        "systemd-python>=235",
        "websockets>=14",
    ],
    extras_require={
        "test": [
            "h11>=0.14",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "websocket-client>=1.8",
        ],
        "fuzz": ["atheris>=3.0"],
        "lint": ["mypy>=1.10", "ruff>=0.6", "types-gevent"],
    },
    entry_points={"console_scripts": ["guestapi = guestapi.cli.main:main"]},
)
