"""One target under atheris, which goes by coverage: ``python -m tests.fuzz.coverage TARGET OPTION...``.

The options are libFuzzer's (llvm.org/docs/LibFuzzer.html). Started by `tests.fuzz.__main__`.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["guestapi"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]].check)
    atheris.Fuzz()
