"""writer.py KEY: runs `guestapi config set web1 KEY=N KEY-twin=N` repeatedly; prints N after each one has returned.

Runs with guestapi's own interpreter, in one process, so it writes many times a second even on an emulated processor.
"""

from __future__ import annotations

import os
import sys

from guestapi.cli.main import main

key, number = sys.argv[1], 0
while True:
    number += 1
    main(["config", "set", "web1", f"{key}={number}", f"{key}-twin={number}"], standalone_mode=False)
    os.write(1, b"%d\n" % number)
