"""A measured figure, and what it has to come to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure.

    Attributes:
        name: what it is.
        value: what was measured.
        unit: of the value; empty for a ratio.
        least, most: what it has to be; None: it is told for its own sake.
    """

    name: str
    value: float
    unit: str
    most: float | None = None
    least: float | None = None

    @property
    def limited(self) -> bool:
        """Whether there is something to reach."""
        return self.most is not None or self.least is not None

    @property
    def reached(self) -> bool:
        """Whether it is as it has to be."""
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)
