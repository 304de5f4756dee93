"""The error of this package."""

from __future__ import annotations


class ProtocolError(OSError):
    """The server refuses the request, answers with ``status`` and one line of text, and closes the connection.

    It is an OSError, because a WSGI application has to expect one from ``wsgi.input``.

    Attributes:
        status: HTTP status code of the answer.
        text: one line for the client.
        limit: name of the setting in ``[limits]`` that was exceeded; None if none was.
    """

    def __init__(self, status: int, text: str, limit: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.limit = limit
