"""``guestapi top``: what instances, workers and sources do, as it happens."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guestapi.cli.common import Operator, fail
from guestapi.cli.grouping import Verb
from guestapi.cli.top_view import SORTS, Overview, choose, height, look, print_once, render
from guestapi.metrics.handover import ReportDirectory

if TYPE_CHECKING:
    from rich.console import RenderableType

#: Seconds between two looks: workers hand over each second.
_EVERY = 1.0
#: What a terminal sends for these keys.
_ESCAPE, _ENTER, _BACKSPACE = "\x1b", ("\r", "\n"), ("\x7f", "\b")
#: Characters of what is looked for.
_LONGEST = 80


@dataclass(slots=True)
class TopState:
    """What the operator has chosen.

    Attributes:
        sort: of `SORTS`.
        wanted: part of the project or the name of instances.
        typing: what is typed now goes into `wanted`.
        ended: it is enough.
    """

    sort: str
    wanted: str
    typing: bool = False
    ended: bool = False

    def press(self, key: str) -> None:
        """Take a key."""
        if self.typing:
            if key == _ESCAPE:
                self.typing, self.wanted = False, ""
            elif key in _ENTER:
                self.typing = False
            elif key in _BACKSPACE:
                self.wanted = self.wanted[:-1]
            elif key.isprintable():
                self.wanted = (self.wanted + key)[:_LONGEST]
        elif key in ("q", "\x03"):
            self.ended = True
        elif key == "/":
            self.typing, self.wanted = True, ""
        elif key == _ESCAPE:
            self.wanted = ""
        else:
            self.sort = next((sort for sort, letter in SORTS.items() if letter == key), self.sort)

    @property
    def footer(self) -> str:
        """What the keys do, and what is chosen."""
        if self.typing:
            return f"filter: {self.wanted}_"
        keys = " ".join(SORTS.values())
        chosen = f"by {self.sort}" + (f", filter: {self.wanted}" if self.wanted else "")
        return f"{chosen} | sort: {keys} | / filter, q quit"


@click.command(cls=Verb)
@click.option("--sort", type=click.Choice(list(SORTS)), default="requests", show_default=True, help="What comes first.")
@click.option("--filter", "wanted", default="", metavar="TEXT", help="Instances with this in their name or project.")
@click.option("--once", is_flag=True, help="Print it once; so it is if the output is not a terminal.")
@click.pass_obj
def top(operator: Operator, sort: str, wanted: str, once: bool) -> None:
    """Show what instances, workers and sources do, each second anew.

    Keys: r, x, c, s and n sort by requests, refusals, connections, streams and name; / filters, q ends it.
    """
    from rich.console import Console

    state = TopState(sort, wanted)
    if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        # A pipe has no width: nothing is cut off there.
        console = Console() if sys.stdout.isatty() else Console(width=10_000, no_color=True, highlight=False)
        print_once(choose(_overview(operator), state.sort, state.wanted), console)
        return
    _follow(operator, state, Console())


def _overview(operator: Operator) -> Overview:
    settings = operator.settings
    found = look(ReportDirectory(Path(settings.metrics.directory)), settings.store.url)
    if found is None:
        fail("the service does not run, or hands nothing over", "'systemctl status guestapi' shows whether it runs")
    return found


def _follow(operator: Operator, state: TopState, console: object) -> None:
    from rich.console import Console
    from rich.live import Live

    assert isinstance(console, Console)
    overview = _overview(operator)
    with _keys() as descriptor, Live(console=console, screen=True, auto_refresh=False) as live:
        while not state.ended:
            live.update(_screen(overview, state, console.height), refresh=True)
            ready, _write, _exceptional = select.select([descriptor], [], [], _EVERY)
            if ready:
                for key in os.read(descriptor, 64).decode(errors="ignore"):
                    state.press(key)
            else:
                overview = _overview(operator)


def _screen(overview: Overview, state: TopState, lines: int) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    shown = choose(overview, state.sort, state.wanted)
    return Group(render(shown, lines - height(shown) - 2), "", Text(state.footer, no_wrap=True, overflow="ellipsis"))


@contextmanager
def _keys() -> Iterator[int]:
    """Keys as they are pressed, without an echo."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
