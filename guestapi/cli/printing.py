"""How commands print: tables for people, lines and documents for programs.

Rules: nothing that a guest can choose drives the terminal. A pipe has no width: what is written to one is neither
folded nor cut. Nothing is shortened unless that was asked for.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from guestapi.cli.words import printable
from guestapi.model import Device

#: Control characters that JSON leaves as they are, and halves of surrogate pairs, which no terminal can be sent.
_UNPRINTED = re.compile("[\x7f-\x9f\ud800-\udfff]")
#: Characters of a cell that --truncate leaves.
SHORT = 60


def print_value(value: str) -> None:
    """Print a value as it is, whatever is in it, and a line break."""
    # click.echo would take escape sequences away, and write in the encoding of the environment.
    sys.stdout.buffer.write(value.encode() + b"\n")
    sys.stdout.buffer.flush()


def print_json(document: object) -> None:
    """Print `document`, readable by humans too."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    click.echo(_UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def print_yaml(*documents: object) -> None:
    """Print each of `documents` as a document of a YAML stream."""
    # Loaded for those who want it.
    from guestapi.cli.definitions import to_yaml

    # As bytes: what is printed is taken back, whatever the encoding of the environment is.
    sys.stdout.buffer.write(to_yaml(*documents).encode())
    sys.stdout.buffer.flush()


def print_table(
    columns: Sequence[str], rows: Iterable[Iterable[str]], *, truncate: bool = False, compact: bool = False
) -> None:
    """Print a table: on a terminal with lines between its cells, elsewhere as aligned columns.

    Args:
        columns: their headings.
        rows: their cells; nothing in them is taken for markup.
        truncate: shorten the cells to one line of `SHORT` characters.
        compact: as aligned columns in any case.
    """
    cells = [[shorten(cell) if truncate else cell for cell in row] for row in rows]
    if compact or not sys.stdout.isatty():
        _print_columns([list(columns), *cells])
        return
    # Loaded for tables on a terminal alone.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        # Not an ellipsis: what does not fit goes on in the next line.
        table.add_column(column, overflow="fold")
    for row in cells:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # NO_COLOR (no-color.org) takes bold headings away, too.
    Console(color_system=None if os.environ.get("NO_COLOR") else "auto").print(table)


def print_csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as comma-separated values (RFC 4180), with a line of headings."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([printable(cell) for cell in row] for row in rows)


def mark(passed: bool) -> str:
    """``ok`` or ``FAIL``, in colour on a terminal unless NO_COLOR is set (no-color.org)."""
    word, colour = ("ok  ", "green") if passed else ("FAIL", "red")
    return word if os.environ.get("NO_COLOR") else click.style(word, fg=colour)


def shorten(text: str) -> str:
    """`text` as one line of at most `SHORT` characters, and how many bytes it has if something is left out."""
    first = next(iter(text.splitlines()), "")
    return text if text == first and len(text) <= SHORT else f"{first[:SHORT]} … ({len(text.encode())} bytes)"


def print_pairs(
    config: Iterable[tuple[str, str]], origins: Mapping[str, str] | None = None, *, truncate: bool = False
) -> None:
    """Print keys and values, and where they come from if `origins` says so."""
    _print_with_origins(["KEY", "VALUE"], ([key, value] for key, value in config), origins, truncate)


def print_devices(
    devices: Iterable[tuple[str, Device]], origins: Mapping[str, str] | None = None, *, truncate: bool = False
) -> None:
    """Print devices and their definitions, and where they come from if `origins` says so."""
    rows = ([name, device.get("type", ""), _options(device)] for name, device in devices)
    _print_with_origins(["DEVICE", "TYPE", "OPTIONS"], rows, origins, truncate)


def _print_with_origins(
    columns: list[str], rows: Iterable[list[str]], origins: Mapping[str, str] | None, truncate: bool
) -> None:
    if origins is None:
        print_table(columns, rows, truncate=truncate)
    else:
        print_table([*columns, "ORIGIN"], ([*row, origins[row[0]]] for row in rows), truncate=truncate)


def _print_columns(rows: list[list[str]]) -> None:
    # A line break within a cell is an escape, too: a row is a line.
    lines = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells: list[Any] = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _options(device: Device) -> str:
    return " ".join(f"{key}={value}" for key, value in device.items() if key != "type")
