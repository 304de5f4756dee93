"""A partial daemon for the mirror, with failures that a real one cannot be made to have."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, unix_serve

TRUSTED = {"auth": "trusted", "api_extensions": ["instance_ready_state"], "environment": {"server": "stub"}}


class Stub:
    """Answers GET requests on a Unix socket.

    Attributes:
        answers: the answer for each path, with its query or for all queries: metadata, a file's text, or an exception
            for a refusal. A function is called at each request.
        asked: the paths of all requests, with their queries.
        over: an event that is set at the end, for answers that hang until then.
    """

    def __init__(self, path: Path, answers: Mapping[str, object]) -> None:
        """Listen, without answering yet.

        Args:
            path: the path of the socket.
            answers: answers in addition to those of every daemon.
        """
        self.answers = {"/1.0": TRUSTED, "/1.0/projects": ["/1.0/projects/default"], "/1.0/images": [], **answers}
        self.asked: list[str] = []
        self.over = threading.Event()
        self._streams: list[ServerConnection] = []
        self._server = unix_serve(self._follow, str(path), process_request=self._answer, compression=None)

    def __enter__(self) -> Stub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()

    def announce(self, action: str, source: str, location: str = "none") -> None:
        """Send a lifecycle event, of this cluster member."""
        event = {"type": "lifecycle", "location": location, "metadata": {"action": action, "source": source}}
        for stream in self._streams:
            stream.send(json.dumps(event))

    def _follow(self, stream: ServerConnection) -> None:
        self._streams.append(stream)
        self.over.wait()

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        path = urlsplit(request.path).path
        if path == "/1.0/events":
            return None
        self.asked.append(request.path)
        answer: Any = self.answers.get(request.path, self.answers.get(path))
        if callable(answer):
            answer = answer()
        if answer is None:
            return connection.respond(404, json.dumps({"error": "Not Found"}))
        if isinstance(answer, Exception):
            return connection.respond(500, json.dumps({"error": str(answer)}))
        if isinstance(answer, str):
            response = connection.respond(200, answer)
            response.headers["Content-Disposition"] = "inline;filename=image.tar"
            return response
        return connection.respond(200, json.dumps({"metadata": answer}))
