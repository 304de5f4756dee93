"""``guestapi attributes``: what instances say of themselves.

Rule: an attribute is a guest's claim. On a terminal it is escaped; in a pipe it is as the guest has sent it.
"""

from __future__ import annotations

import base64
import sys
import time

import click

from guestapi.cli.common import Operator, has_format, has_truncate, print_json, print_table, takes_instance, warn
from guestapi.cli.grouping import Noun
from guestapi.cli.known_hosts import is_host, read_keys
from guestapi.cli.seconds import Seconds
from guestapi.cli.words import MisuseError, printable
from guestapi.errors import OperatorError
from guestapi.store.attributes import Attribute, get_value, is_path, list_attributes
from guestapi.store.changes import timestamp
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import get_instance

#: The namespace in which an instance publishes its SSH host keys.
_HOST_KEYS = "hostkeys/"
#: Seconds after which to look although nothing was committed.
_LOOK_SECONDS = 1.0


@click.group(cls=Noun)
def attributes() -> None:
    """Show what instances say of themselves, if 'guestapi policy allow attributes' allows it to them.

    Root of the instance has said it, and nobody has verified it.
    """


@attributes.command()
@takes_instance
@has_truncate
@has_format
@click.pass_obj
def show(operator: Operator, name: str, project: str, truncate: bool, as_json: bool) -> None:
    """Show all attributes of instance NAME."""
    found = _read_all(operator, project, name)
    if as_json:
        print_json([_document(one) for one in found])
        return
    rows = ([one.path, str(len(one.value)), _moment(one), _text(one.value)] for one in found)
    print_table(["ATTRIBUTE", "BYTES", "WRITTEN", "VALUE"], rows, truncate=truncate)


@attributes.command()
@takes_instance
@click.argument("path", metavar="NAMESPACE/KEY")
@click.pass_obj
def get(operator: Operator, name: str, project: str, path: str) -> None:
    """Print an attribute: in a pipe exactly its bytes, on a terminal with what drives terminals escaped."""
    value = _read(operator, project, name, _checked(path))
    if value is None:
        raise OperatorError(f"{path} is not set", f"'guestapi attributes show {name}' shows what is")
    _print(value)


@attributes.command()
@takes_instance
@click.argument("path", metavar="NAMESPACE/KEY")
@click.option("--value", metavar="TEXT", help="Until it has this value.")
@click.option("--timeout", type=Seconds(min=0), metavar="SECONDS", help="Give up then, with exit 1.")
@click.pass_obj
def wait(operator: Operator, name: str, project: str, path: str, value: str | None, timeout: float | None) -> None:
    """Wait until instance NAME has set an attribute, and print it as 'guestapi attributes get' does."""
    _checked(path)
    wanted = None if value is None else value.encode(errors="surrogateescape")
    until = None if timeout is None else time.monotonic() + timeout
    # An instance that is not there is an error at once.
    found = _read(operator, project, name, path)
    try:
        doorbell = Doorbell(database_file(operator.settings.store.url))
    except OSError as error:
        raise StoreError(f"the store's directory cannot be watched: {error.strerror}") from None
    while True:
        # After the bell is heard, or a commit between would be missed.
        found = _read(operator, project, name, path)
        if found is not None and wanted in (None, found):
            _print(found)
            return
        rest = _LOOK_SECONDS if until is None else min(_LOOK_SECONDS, until - time.monotonic())
        if rest <= 0:
            what = "set" if value is None else "set so"
            raise OperatorError(
                f"{name}: {path} was not {what} within {timeout:g} s",
                f"'guestapi attributes show {name}' shows what is",
            )
        doorbell.wait(rest)


@attributes.command(name="known-hosts")
@takes_instance
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="What ssh connects to: a name, an address or [HOST]:PORT (default: NAME); may be repeated.",
)
@click.pass_obj
def known_hosts(operator: Operator, name: str, project: str, hosts: tuple[str, ...]) -> None:
    """Print the SSH host keys that instance NAME has published in hostkeys/, as lines for known_hosts.

    What is not a public key of a host is left out and named on standard error.
    """
    called = tuple(dict.fromkeys(hosts)) or (name,)
    for host in called:
        if not is_host(host):
            hint = "a host is a name, an address or [HOST]:PORT"
            if hosts:
                raise MisuseError(f"{host!r} is not a host; {hint}")
            raise OperatorError(f"{host!r} is not a host", f"say with --host what ssh connects to; {hint}")
    found = [one for one in _read_all(operator, project, name) if one.path.startswith(_HOST_KEYS)]
    keys: dict[str, None] = {}
    refused = []
    for one in found:
        good, bad = read_keys(one.value)
        keys |= dict.fromkeys(good)
        if bad or not good:
            refused.append(f"{one.path}: {'a line is' if good else 'it is'} not a public key of an SSH host")
    warn(refused)
    if not keys:
        raise OperatorError(
            f"{name} has published no SSH host key", f"it does in {_HOST_KEYS}; 'guestapi attributes show {name}' shows"
        )
    for key in keys:
        click.echo(f"{','.join(called)} {key}")


def _read_all(operator: Operator, project: str, name: str) -> list[Attribute]:
    with operator.view() as store:
        return list_attributes(store, get_instance(store, project, name))


def _read(operator: Operator, project: str, name: str, path: str) -> bytes | None:
    with operator.view() as store:
        return get_value(store, get_instance(store, project, name), path)


def _checked(path: str) -> str:
    if not is_path(path):
        raise MisuseError(
            f"{path!r} is not an attribute", "its name is NAMESPACE/KEY, as 'guestapi attributes show' has it"
        )
    return path


def _print(value: bytes) -> None:
    if sys.stdout.isatty():
        click.echo(_printable(value))
    else:
        sys.stdout.buffer.write(value)
        sys.stdout.buffer.flush()


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def _printable(value: bytes) -> str:
    return printable(_text(value))


def _moment(one: Attribute) -> str:
    return timestamp(int(one.written) * 10**9)


def _document(one: Attribute) -> dict[str, object]:
    document: dict[str, object] = {"path": one.path, "bytes": len(one.value), "written": _moment(one)}
    try:
        return document | {"value": one.value.decode(), "base64": None}
    except UnicodeDecodeError:
        return document | {"value": None, "base64": base64.b64encode(one.value).decode()}
