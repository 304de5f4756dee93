"""Attributes: any requests over a real store, beside a model of what they do; and any value as SSH host keys."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from guestapi.api.conditional import etag
from guestapi.cli.known_hosts import read_keys
from guestapi.model import Instance
from guestapi.settings import Settings, StoreSettings
from guestapi.store import permissions, steps
from guestapi.store.attributes import AttributeReport, Outcome
from guestapi.store.lookup import get_instance
from guestapi.store.reading import Reader
from guestapi.store.writing import Writer
from tests.api.fakes import INIT, Client, MemoryStore, caller

_URL = "/1.0/guestapi/attributes"
_NAME = re.compile("[A-Za-z0-9._-]{1,64}")
#: How many requests of an input are sent.
_MOST = 40
_STATUSES = {"GET": {200, 304, 400, 404, 412}, "PUT": {201, 204, 400, 412, 413, 507}, "DELETE": {204, 400, 412}}


class RealAttributes(MemoryStore):
    """A store of which the attributes are in a real database."""

    def __init__(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="guestapi-fuzz-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        settings = Settings(store=StoreSettings(url=f"sqlite:///{directory}/store.db"))
        self.writer = Writer(settings, create=True)
        with self.writer.change() as change:
            steps.add(change, "default", "c1", init=INIT)
            permissions.allow(change, "default", None, "attributes")
            super().__init__(get_instance(change, "default", "c1"))
        self.reader = Reader(settings.store.url)

    def attributes(self, instance: Instance) -> list[str]:
        """As the real store."""
        return self.reader.attributes(instance)

    def attribute(self, instance: Instance, path: str) -> bytes | None:
        """As the real store."""
        return self.reader.attribute(instance, path)

    def write_attribute(
        self, instance: Instance, path: str, value: bytes | None, holds: Callable[[bytes | None], bool] | None
    ) -> Outcome:
        """As the real store."""
        return self.writer.record_all([AttributeReport(instance, path, value, holds)])[0]


@cache
def _store() -> RealAttributes:
    return RealAttributes()


def check_attributes(data: bytes) -> None:
    """Send the requests in `data`, which NUL separates, and compare each answer with a model.

    A request is a line, method, path and condition, and a value behind it. A value of digits stands for so many bytes.

    Raises:
        AssertionError: an answer, or what is stored in the end, differs from the model's.
    """
    store = _store()
    held = store.held
    assert held is not None
    store.writer.record_all([AttributeReport(held, path, None) for path in store.attributes(held)])
    # A bucket of its own for each input.
    client = Client(store, who=caller(run=held.run, instance_id=held.id))
    model: dict[str, bytes] = {}
    for part in data.split(b"\0")[:_MOST]:
        line, _newline, value = part.partition(b"\n")
        method, path, condition = [*line.decode("latin-1").split(" ", 2), "", ""][:3]
        if method not in _STATUSES or path.count("/") != 1 or not re.fullmatch(r"[!-~]+", path):
            _check_keys(value)
            continue
        if value.isdigit() and len(value) < 6:
            value = b"x" * int(value)
        tag = etag(model[path]) if path in model else '"none"'
        conditions = {"*": ("If-None-Match", "*"), "=": ("If-Match", tag), "!": ("If-None-Match", tag)}
        fields = dict([conditions[condition]]) if condition in conditions else {}
        body = value if method == "PUT" else b""
        answer = client.ask(f"{_URL}/{path}", method, body, fields=fields, length=len(body))
        if answer.status in (307, 429) or "%" in path or "" in path.split("/"):
            # Unclean paths are redirected, names are decoded, and the limit is another test's.
            model = {path: store.attribute(held, path) or b"" for path in store.attributes(held)}
            continue
        assert answer.status in _STATUSES[method], answer
        expected = _expected(model, method, path, value, fields)
        assert answer.status == expected, (part[:100], answer.status, expected)
        if answer.status in (201, 204) and method == "PUT":
            model[path] = value
        elif method == "DELETE" and answer.status == 204:
            model.pop(path, None)
        if answer.status == 200:
            assert answer.body == model[path]
        _check_keys(value)
    assert store.attributes(held) == sorted(model)
    assert {path: store.attribute(held, path) for path in model} == model
    assert len(model) <= 128
    assert sum(map(len, model.values())) <= 256 * 1024


def _expected(model: dict[str, bytes], method: str, path: str, value: bytes, fields: dict[str, str]) -> int:
    """The status, by what docs/extensions.md says."""
    if not all(_NAME.fullmatch(name) and name not in (".", "..") for name in path.split("/")):
        return 400
    if method == "PUT" and len(value) > 16384:
        return 413
    there = path in model
    tag = etag(model[path]) if there else ""
    if method == "GET":
        if not there:
            return 404
        if "If-Match" in fields and tag != fields["If-Match"]:
            return 412
        return 304 if fields.get("If-None-Match") in (tag, "*") else 200
    if "If-Match" in fields and not (there and tag == fields["If-Match"]):
        return 412
    if there and fields.get("If-None-Match") in (tag, "*"):
        return 412
    if method == "DELETE" or model.get(path) == value:
        return 204
    rest = sum(len(one) for other, one in model.items() if other != path)
    if (not there and len(model) >= 128) or rest + len(value) > 256 * 1024:
        return 507
    return 204 if there else 201


def _check_keys(value: bytes) -> None:
    """Whatever an instance publishes, a line for known_hosts has a type, base64, and nothing else."""
    keys, refused = read_keys(value)
    assert len(keys) + refused == len([line for line in value.splitlines() if line.strip()])
    for key in keys:
        assert re.fullmatch(r"(ssh-(ed25519|rsa)|ecdsa-sha2-nistp(256|384|521)) [A-Za-z0-9+/]+=*", key), key
        assert read_keys(key.encode()) == ([key], 0)
