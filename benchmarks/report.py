"""What was measured, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import Figure
from benchmarks.requests import MANNERS, Cell

_HEAD = ("contender", "requests/s", "of (a)", "p50 µs", "p99 µs", "max ms", "CPU µs", "errors")


def table(cells: Sequence[Cell]) -> str:
    """One load, all contenders, in Markdown."""
    first = cells[0]
    lines = [f"\n**{MANNERS[first.manner]}, {first.path}, {first.connections} connections**\n"]
    lines.append(_row(_HEAD))
    lines.append(_row(["---", *["---:"] * (len(_HEAD) - 1)]))
    for cell in cells:
        ratio = cell.rate / first.rate if first.rate else 0.0
        figures = [f"{cell.rate:,.0f}", f"{ratio:.2f}", f"{cell.p50:,.0f}", f"{cell.p99:,.0f}"]
        lines.append(
            _row([cell.contender, *figures, f"{cell.longest / 1000:.1f}", f"{cell.cost:.1f}", str(cell.errors)])
        )
    return "\n".join(lines)


def _row(fields: Sequence[str]) -> str:
    return "| " + " | ".join(fields) + " |"


def figure(one: Figure) -> str:
    """One figure, in a line."""
    limit = "" if one.most is None else f" (at most {one.most:g})"
    return f"{one.name}: {_value(one)}{limit}"


def targets(figures: Sequence[Figure]) -> str:
    """What was to be reached, what was reached, and whether that is enough."""
    lines = ["\n**To reach**\n", _row(("figure", "wanted", "measured", "")), _row(("---", "---:", "---:", "---"))]
    for one in figures:
        wanted = f"≥ {one.least:g}" if one.least is not None else f"≤ {one.most:g}"
        lines.append(_row((one.name.strip(), wanted, _value(one), "" if one.reached else "**not reached**")))
    return "\n".join(lines)


def _value(one: Figure) -> str:
    return f"{one.value:,.2f} {one.unit}".strip()
