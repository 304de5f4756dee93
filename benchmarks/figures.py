"""A measured figure and its target."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure.

    Attributes:
        name: what was measured.
        value: the result.
        unit: the unit of the value; empty for a ratio.
        least, most: the limits of the target; None: there is no such limit.
    """

    name: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None

    @property
    def limited(self) -> bool:
        """Whether there is a target."""
        return self.most is not None or self.least is not None

    @property
    def reached(self) -> bool:
        """Whether the value is within the limits."""
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)
