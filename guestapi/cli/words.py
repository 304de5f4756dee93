"""What stands on a command line, and what is printed of it, without the libraries that the commands load."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from guestapi.errors import OperatorError

#: What a value that begins with @ stands for.
_FILES = "a value @FILE is read from FILE, and @- from standard input"


class MisuseError(OperatorError):
    """The command was called wrongly; it exits with 2, and says how it is called."""


def pairs(words: Iterable[str], *, files: bool = False) -> dict[str, str]:
    """``KEY=VALUE`` words as a mapping.

    Args:
        words: as they were typed.
        files: a value ``@FILE`` stands for what the file holds, ``@-`` for standard input.

    Raises:
        MisuseError: a word is not a pair, a key stands there twice, or standard input is to be read twice.
        OperatorError: a file cannot be read.
    """
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise MisuseError(f"{word!r} is not KEY=VALUE")
        if key in found:
            raise MisuseError(f"{key!r} is given twice")
        found[key] = value
    if not files:
        return found
    if list(found.values()).count("@-") > 1:
        raise MisuseError("'@-' is given twice, but standard input can be read once only")
    return {key: _read(value[1:]) if value.startswith("@") else value for key, value in found.items()}


def settings(words: Sequence[str], *, files: bool = True) -> dict[str, str]:
    """``KEY=VALUE...`` or ``KEY VALUE``, as a mapping; as `pairs` otherwise."""
    if len(words) == 2 and "=" not in words[0]:
        return pairs([f"{words[0]}={words[1]}"], files=files)
    return pairs(words, files=files)


def printable(text: str) -> str:
    """`text` with control characters shown as escapes: a guest's key or value must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def explain(sentence: str, hint: str | None = None) -> str:
    """An error as it is printed behind ``Error: ``: the sentence, and below it the hint if there is one."""
    return "\nHint: ".join(printable(line).replace("\n", "\\n") for line in (sentence, hint) if line)


def _read(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.buffer.read().decode()
        with open(name, "rb") as file:
            return file.read().decode()
    except OSError as error:
        raise OperatorError(f"{name}: {os.strerror(error.errno or 0)}", _FILES) from None
    except UnicodeDecodeError:
        raise OperatorError(f"{name}: is not valid UTF-8 text", "a value is text") from None
    except ValueError:
        raise OperatorError(f"{name!r}: no file can be called so", _FILES) from None
