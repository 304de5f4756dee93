"""Times on the command line, like ``60s``, ``5m`` or ``2h``."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", re.ASCII)


class Duration(click.types.FloatParamType):
    """A time like ``60s``, ``5m`` or ``2h``, in seconds."""

    name = "time"

    def __init__(self, most: int) -> None:
        """Accept times above 0.

        Args:
            most: the longest one, in seconds: a number of whole days.
        """
        super().__init__()
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As click.ParamType."""
        if isinstance(value, float):
            return value
        found = _DURATION.fullmatch(value)
        seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
        if not 0 < seconds <= self._most:
            self.fail(f"{value!r} is not a time like 60s, 5m or 2h, up to {self._most // 86400}d", param, ctx)
        return seconds
