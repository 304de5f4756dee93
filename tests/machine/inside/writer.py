"""writer.py KEY: `guestapi config set web1 KEY=N KEY-twin=N` again and again; prints N when it has returned.

Runs with guestapi's own interpreter, so it writes many times a second also on an emulated processor.
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
