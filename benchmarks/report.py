"""The measurements as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import Figure
from benchmarks.requests import MANNERS, Cell

_HEAD = ("contender", "requests/s", "of the first", "p50 µs", "p99 µs", "max ms", "CPU µs", "errors")


def table(cells: Sequence[Cell]) -> str:
    """Return the table of one load with all contenders."""
    first = cells[0]
    lines = [f"\n**{MANNERS[first.manner]}, {first.path}, {first.connections} connections**\n"]
    lines.append(_row(_HEAD))
    lines.append(_row(["---", *["---:"] * (len(_HEAD) - 1)]))
    for cell in cells:
        figures = [f"{cell.rate:,.0f}", f"{cell.share:.2f}", f"{cell.p50:,.0f}", f"{cell.p99:,.0f}"]
        lines.append(
            _row([cell.contender, *figures, f"{cell.longest / 1000:.1f}", f"{cell.cost:.1f}", str(cell.errors)])
        )
    return "\n".join(lines)


def _row(fields: Sequence[str]) -> str:
    return "| " + " | ".join(fields) + " |"


def summary(cells: Sequence[Cell]) -> str:
    """Return the table of all loads: requests per second of (a) to (d), and the processor time of (a) and (c)."""
    head = ("load", "(a)", "(b)", "(c)", "(d)", "(c) of (a)", "(c) p50, p99 µs", "CPU µs (a), (c)", "errors")
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    loads = dict.fromkeys((cell.manner, cell.path, cell.connections) for cell in cells)
    for load in loads:
        manner, path, connections = load
        those = {cell.contender[:3]: cell for cell in cells if (cell.manner, cell.path, cell.connections) == load}
        floor, ours = those["(a)"], those["(c)"]
        rates = [f"{those[letter].rate:,.0f}" for letter in ("(a)", "(b)", "(c)", "(d)")]
        times = f"{ours.p50:,.0f}, {ours.p99:,.0f}"
        costs = f"{floor.cost:.1f}, {ours.cost:.1f}"
        errors = str(sum(cell.errors for cell in those.values()))
        name = f"{MANNERS[manner]}, {path}, {connections}"
        lines.append(_row((name, *rates, f"{ours.share:.2f}", times, costs, errors)))
    return "\n".join(lines)


def figure(one: Figure) -> str:
    """Return a line for a figure."""
    limit = "" if one.most is None else f" (at most {one.most:g})"
    return f"{one.name}: {_value(one)}{limit}"


def targets(figures: Sequence[Figure]) -> str:
    """Return the table of targets and results."""
    lines = ["\n**To reach**\n", _row(("figure", "wanted", "measured", "")), _row(("---", "---:", "---:", "---"))]
    for one in figures:
        wanted = f"≥ {one.least:g}" if one.least is not None else f"≤ {one.most:g}"
        lines.append(_row((one.name.strip(), wanted, _value(one), "" if one.reached else "**not reached**")))
    return "\n".join(lines)


def _value(one: Figure) -> str:
    return f"{one.value:,.2f} {one.unit}".strip()
