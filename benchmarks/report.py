"""What was measured, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

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


def targets(rows: Sequence[tuple[str, str, bool]]) -> str:
    """Which figures were to be reached, what was reached, and whether that is enough."""
    lines = ["\n**To reach**\n", _row(("figure", "measured", "")), _row(("---", "---", "---"))]
    lines += [_row((what, measured, "yes" if enough else "**no**")) for what, measured, enough in rows]
    return "\n".join(lines)
