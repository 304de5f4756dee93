"""Fuzzes one target with atheris, guided by coverage: ``python -m tests.fuzz.coverage TARGET OPTION...``.

The options are libFuzzer's (llvm.org/docs/LibFuzzer.html). `tests.fuzz.__main__` starts it.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["guestapi"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]].check)
    atheris.Fuzz()
