"""`python -m benchmarks [PART]...`: measures, prints tables in Markdown, and writes all figures as JSON.

Parts: requests (all contenders), scale (instances, streams, fan-out, latency, sustained), waiting (the tree, and
requests that wait), boots (of many instances), attributes (of instances), notices (to instances), fairness, hooks (of
container runtimes), commands (of the operator), counting (what metrics cost), identity (tokens), hostile (attacks),
machines (virtual machines beside containers), beside (a real Incus and a real LXD), cluster (of three Incus), and fleet
(1,000 hosts); by default all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import (
    attributes,
    beside,
    boots,
    cluster,
    commands,
    contenders,
    counting,
    fairness,
    fleet,
    hooks,
    hostile,
    identity,
    machines,
    notices,
    processes,
    report,
    requests,
    scale,
    waiting,
)
from benchmarks.figures import Figure


def main() -> int:
    """Run the requested parts; return 1 if a target was not reached."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken (default 5)")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of one round (default 0.4)")
    parser.add_argument("--connections", default="1,16,64", help="how many at a time (default 1,16,64)")
    parser.add_argument("--paths", default=",".join(requests.PATHS), help="what is asked for")
    parser.add_argument("--manners", default="keep,new", help="keep-alive, new connections, or both")
    parser.add_argument("--json", type=Path, default=processes.BUILD / "results.json", help="where figures go")
    options = parser.parse_args()
    figures: dict[str, Callable[[], Iterator[Figure]]] = {
        "instances": lambda: scale.instances(options.rounds, options.seconds),
        "streams": scale.streams,
        "fan-out": scale.fan_out,
        "latency": scale.latency,
        "sustained": scale.sustained,
        "waiting": lambda: waiting.measure(options.rounds, options.seconds),
        "boots": lambda: boots.measure(options.rounds),
        "attributes": lambda: attributes.measure(5 * options.seconds),
        "notices": notices.measure,
        "fairness": lambda: fairness.measure(options.rounds, options.seconds),
        "hooks": hooks.measure,
        "commands": commands.measure,
        "counting": lambda: counting.measure(options.rounds, options.seconds),
        "identity": lambda: identity.measure(options.rounds, options.seconds),
        "hostile": lambda: hostile.measure(options.rounds, options.seconds),
        "cluster": cluster.measure,
        "fleet": fleet.measure,
    }
    apart = (
        "waiting",
        "boots",
        "attributes",
        "notices",
        "fairness",
        "hooks",
        "commands",
        "counting",
        "identity",
        "hostile",
        "cluster",
        "fleet",
    )
    groups = {"scale": [name for name in figures if name not in apart]}
    parts = options.parts or ["requests", *figures, "machines", "beside"]
    parts = [one for part in parts for one in groups.get(part, [part])]
    if unknown := set(parts) - {"requests", *figures, "machines", "beside"}:
        known = ("requests", "scale", "machines", "beside", *figures)
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if os.geteuid() != 0:
        print("benchmarks need root: they run real containers", file=sys.stderr)
        return 2
    processes.build()
    processes.go_first()
    scale.allow_many_descriptors()
    results: dict[str, Any] = {
        "cores": processes.cores(),
        "kernel": os.uname().release,
        "python": sys.version.split()[0],
    }
    targets: list[Figure] = []
    if "requests" in parts:
        with contenders.all_of_them() as all_of_them:
            numbers = [int(number) for number in options.connections.split(",")]
            loads = dict.fromkeys(options.manners.split(","), numbers)
            cells = _requests(options, all_of_them, options.paths.split(","), loads)
        print(f"\n{report.summary(cells)}")
        results["requests"] = [asdict(cell) for cell in cells]
        targets += requests.targets(cells)
    for name, measure in figures.items():
        if name in parts:
            found = _figures(measure())
            results[name] = [asdict(figure) for figure in found]
            targets += [figure for figure in found if figure.limited]
    if "machines" in parts:
        with machines.contenders() as both:
            cells = _requests(options, both, ["config/KEY"], {manner: [1, 16] for manner in options.manners.split(",")})
        results["machines"] = [asdict(cell) for cell in cells]
    if "beside" in parts:
        results["beside"] = {}
        for kind in beside.kinds():
            figures_beside, cells = _beside(options, kind)
            results["beside"][kind] = {
                "requests": list(map(asdict, cells)),
                "figures": list(map(asdict, figures_beside)),
            }
            targets += [figure for figure in figures_beside if figure.limited]
    print(report.targets(targets))
    results["targets"] = [asdict(figure) | {"reached": figure.reached} for figure in targets]
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nfigures are in {options.json}")
    return 0 if all(figure.reached for figure in targets) else 1


def _requests(
    options: argparse.Namespace,
    those: Sequence[contenders.Contender],
    paths: Sequence[str],
    loads: Mapping[str, Sequence[int]],
) -> list[requests.Cell]:
    cells: list[requests.Cell] = []
    for load in requests.measure(those, rounds=options.rounds, seconds=options.seconds, paths=paths, loads=loads):
        print(report.table(load), flush=True)
        cells += load
    return cells


def _figures(measured: Iterator[Figure]) -> list[Figure]:
    found = []
    for figure in measured:
        print(report.figure(figure), flush=True)
        found.append(figure)
    return found


def _beside(options: argparse.Namespace, kind: str) -> tuple[list[Figure], list[requests.Cell]]:
    with beside.pair(kind) as pair:
        figures = _figures(pair.events())
        cells = []
        for manner, number in beside.LOADS:
            pair.revive()
            cells += _requests(options, pair.contenders, ["config/KEY"], {manner: [number]})
    return figures, cells


if __name__ == "__main__":
    sys.exit(main())
