"""The contents of the documents: commands, code, links and headings, each with its document."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

#: All documents except those about the past, which may name what no longer exists.
DOCUMENTS = sorted(
    path
    for path in [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md")]
    if path.name != "changelog.md" and path.parent.name != "decisions"
)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
#: Separators of the commands in a line.
_SEPARATORS = {"&&", "||", "|", ";", "&", ">", ">>", "<", "2>&1"}


@dataclass(frozen=True)
class Found:
    """A piece of a document.

    Attributes:
        where: the document, relative to the checkout.
        text: its text.
    """

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def _name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def blocks(language: str) -> Iterator[Found]:
    """Yield the code blocks of a language."""
    for path in DOCUMENTS:
        for found, text in _BLOCK.findall(path.read_text()):
            if found == language:
                yield Found(_name(path), text)


def prose(path: Path) -> str:
    """Return a document without its code blocks."""
    return _BLOCK.sub("", path.read_text())


def code_spans() -> Iterator[Found]:
    """Yield the code spans in running text and tables."""
    for path in DOCUMENTS:
        for text in _INLINE.findall(prose(path)):
            yield Found(_name(path), text.replace("\\|", "|"))


def links() -> Iterator[tuple[Path, str]]:
    """Yield the targets of links, each with its document."""
    for path in DOCUMENTS:
        for target in _LINK.findall(prose(path)):
            yield path, target


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines() -> Iterator[Found]:
    """Yield the commands at prompts in code blocks, with continued lines joined."""
    for block in blocks("console"):
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            prompt = re.match(r"(?:host)?[#$] (.+)", line)
            if prompt:
                # The demo's prompt is the name of the program, as in its output.
                yield Found(block.where, prompt[1])


def words(line: str) -> list[list[str]]:
    """Return the words of each command in a line of shell, without comments, redirections and substitutions."""
    lexer = shlex.shlex(re.sub(r"\$\(.*?\)", "SUBSTITUTED", line), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif word in _SEPARATORS or (word and set(word) <= set("|&;<>")):
            skip = word[0] in "<>"
            if not skip:
                found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


def commands(program: str) -> Iterator[tuple[Found, list[str]]]:
    """Yield each use of a program: at a prompt, or in a code span that begins with its name."""
    for source in (command_lines(), code_spans()):
        for found in source:
            if f"{program}" not in found.text:
                continue
            try:
                split = words(found.text)
            except ValueError:
                continue  # A code span that is no shell.
            for command in split:
                if command[0] in ("eval", "sudo"):
                    command = command[1:]
                if command and command[0] == program and len(command) > 1:
                    yield found, command[1:]
