"""The root of every error that the project raises on purpose, and its branches.

Rules: the message is one sentence that says what is wrong; the hint says what to do about it. What goes wrong inside a
component has a class beside that component, below one of these branches. An exception that is none of these is a bug.
"""

from __future__ import annotations


class GuestapiError(Exception):
    """Something went wrong that somebody can be told about.

    Attributes:
        message: one sentence without a full stop: what is wrong.
        hint: what to do about it; None if the message says it all.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        """Make an error.

        Args:
            message: one sentence without a full stop: what is wrong.
            hint: what to do about it, also without a full stop.
        """
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Message and hint in one line, as a log shows them."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class OperatorError(GuestapiError):
    """The operator asked for something that cannot be done; nothing is broken, and nothing was changed."""


class SourceError(GuestapiError):
    """A runtime or daemon cannot be asked, or its answer cannot be understood."""
