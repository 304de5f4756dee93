"""The commands that scripts call in loops, ``config get`` and ``config set``, without loading what the others need.

To load the library of the command line and the whole configuration takes longer than all that these two do. So what is
plainly one of them is done here, by the same functions; anything else (another option, a mistake, a setting that is not
plainly right) is left to the command itself, which knows what to say about it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from guestapi import defaults
from guestapi.cli.words import MisuseError, explain, settings
from guestapi.errors import GuestapiError

if TYPE_CHECKING:
    from guestapi.store.options import Options

#: What these commands are given beside words, each with a value.
_OPTIONS = ("--config", "--project")


class _Store(NamedTuple):
    url: str = defaults.STORE_URL
    lock_seconds: float = defaults.LOCK_SECONDS
    configuration_bytes: int = defaults.CONFIGURATION_BYTES


class _Log(NamedTuple):
    keep_entries: int = defaults.KEEP_ENTRIES
    keep_seconds: int = defaults.KEEP_SECONDS


class _Options(NamedTuple):
    store: _Store
    events: _Log


class Call(NamedTuple):
    """A command that can be done here.

    Attributes:
        verb: ``get`` or ``set``.
        file: what ``--config`` names, if it was given.
        project: of the instance.
        words: the name of the instance, and what follows it.
    """

    verb: str
    file: str | None
    project: str
    words: tuple[str, ...]


def parse(words: Sequence[str]) -> Call | None:
    """What a command line says; None: the command itself must decide.

    Args:
        words: behind the name of the program.
    """
    options: dict[str, str] = {}
    plain: list[str] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            plain.append(word)
            continue
        name, equals, value = word.partition("=")
        # --config is an option of the program, and stands before its commands.
        if name not in _OPTIONS or name in options or (name == "--config" and plain):
            return None
        options[name] = value if equals else next(rest, "")
        if not options[name]:
            return None
    noun, verb, *arguments = (*plain, "", "")[: max(len(plain), 2)]
    counted = len(arguments) == 2 if verb == "get" else len(arguments) >= 2
    if noun != "config" or verb not in ("get", "set") or not counted:
        return None
    return Call(verb, options.get("--config"), options.get("--project", "default"), tuple(arguments))


def run(words: Sequence[str]) -> int | None:
    """Do what a command line says.

    Args:
        words: behind the name of the program.

    Returns:
        The exit code; None: nothing was done, and the command itself must decide.
    """
    call = parse(words)
    options = None if call is None else read_options(call.file)
    if call is None or options is None:
        return None
    # PERF: the process ends before there is anything to collect, and looking for it takes a tenth of the time.
    gc.disable()
    # Loaded for these commands alone: entry looks at every command line by this module.
    from guestapi.cli.values import get_value, set_values

    name, *arguments = call.words
    try:
        if call.verb == "get":
            value = get_value(options.store.url, call.project, name, arguments[0])
            sys.stdout.buffer.write(value.encode() + b"\n")
            sys.stdout.buffer.flush()
            return 0
        wanted = settings(arguments)
        from guestapi.audit_log import by_operator
        from guestapi.store.writing import Writer

        writer = Writer(options, create=True, audit=by_operator("guestapi config set"))
        for warning in set_values(writer.change(), call.project, name, wanted):
            sys.stderr.write(f"Warning: {explain(warning)}\n")
        return 0
    except MisuseError:
        return None
    except GuestapiError as error:
        sys.stderr.write(f"Error: {explain(error.message, error.hint)}\n")
        return 1
    except BrokenPipeError:
        # Nobody reads it any more: nothing is to be flushed at the end, either (docs.python.org, SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def read_options(named: str | None) -> Options | None:
    """The store's part of the configuration.

    Args:
        named: the file that ``--config`` names, if it was given.

    Returns:
        The options; None: `settings.load` must decide whether the configuration is right.
    """
    file = named or os.environ.get(defaults.FILE_VARIABLE) or defaults.FILE
    try:
        with open(file, "rb") as opened:
            content = opened.read()
    except FileNotFoundError:
        return _Options(_Store(), _Log()) if file is defaults.FILE else None
    except (OSError, ValueError):
        return None
    # Loaded where there is a file.
    import tomllib

    try:
        document = tomllib.loads(content.decode())
        store, events = document.get("store", {}), document.get("events", {})
        options = _Options(_Store(**store), _Log(**events))
    except (ValueError, TypeError, RecursionError):
        return None
    return options if document.keys() <= defaults.TABLES and _is_right(options) else None


def _is_right(options: _Options) -> bool:
    """Whether `settings.load` would take these, too."""
    store, events = options.store, options.events
    numbers = (store.configuration_bytes, events.keep_entries, events.keep_seconds)
    return (
        isinstance(store.url, str)
        and type(store.lock_seconds) in (int, float)
        and 0 < store.lock_seconds <= defaults.MOST_SECONDS
        and all(type(number) is int and number >= 1 for number in numbers)
        and defaults.LEAST_CONFIGURATION_BYTES <= store.configuration_bytes <= defaults.MOST_CONFIGURATION_BYTES
        and events.keep_entries <= defaults.MOST_ENTRIES
    )
