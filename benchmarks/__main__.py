"""`python -m benchmarks [requests|scale|fairness]...`: measures, prints tables, and writes all figures as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import contenders, processes, report, requests


def main() -> int:
    """Run what is asked for; 1 if something that was to be reached was not."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken (default 5)")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of one round (default 0.4)")
    parser.add_argument("--connections", default="1,16,64", help="how many at a time (default 1,16,64)")
    parser.add_argument("--paths", default=",".join(requests.PATHS), help="what is asked for")
    parser.add_argument("--manners", default="keep,new", help="keep-alive, new connections, or both")
    parser.add_argument("--json", type=Path, default=processes.BUILD / "results.json", help="where figures go")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("benchmarks need root: they run real containers", file=sys.stderr)
        return 2
    processes.build()
    results: dict[str, Any] = {
        "cores": processes.cores(),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
    }
    parts = options.parts or ["requests"]
    if "requests" in parts:
        cells: list[requests.Cell] = []
        with contenders.all_of_them() as all_of_them:
            for load in requests.measure(
                all_of_them,
                rounds=options.rounds,
                seconds=options.seconds,
                connections=[int(number) for number in options.connections.split(",")],
                paths=options.paths.split(","),
                manners=options.manners.split(","),
            ):
                print(report.table(load), flush=True)
                cells += load
        results["requests"] = [cell.document() for cell in cells]
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nfigures are in {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
