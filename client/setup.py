"""Builds guestapi.client as a distribution of its own, which needs nothing of the service.

It has no guestapi/__init__.py, so the service can be installed beside it: both have the same files of the client.
"""

import re
from pathlib import Path

from setuptools import setup

service = Path(__file__).resolve().parents[1] / "guestapi" / "__init__.py"
(version,) = re.findall(r'^__version__ = "(.*)"$', service.read_text(encoding="utf-8"), re.MULTILINE)
setup(
    version=version,
    packages=["guestapi.client"],
    package_dir={"guestapi.client": "../guestapi/client"},
    package_data={"guestapi.client": ["py.typed"]},
)
