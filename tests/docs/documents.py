"""What the documents contain: commands, code, links and headings, each with where it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

#: All but those that describe the past: what they name may be gone.
DOCUMENTS = sorted(
    path
    for path in [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/**/*.md")]
    if path.name != "changelog.md" and path.parent.name != "decisions"
)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
#: What separates the commands of a line.
_SEPARATORS = {"&&", "||", "|", ";", "&", ">", ">>", "<", "2>&1"}


@dataclass(frozen=True)
class Found:
    """Something in a document.

    Attributes:
        where: the document, relative to the checkout.
        text: as it stands there.
    """

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def _name(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def blocks(language: str) -> Iterator[Found]:
    """The code blocks of a language."""
    for path in DOCUMENTS:
        for found, text in _BLOCK.findall(path.read_text()):
            if found == language:
                yield Found(_name(path), text)


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return _BLOCK.sub("", path.read_text())


def code_spans() -> Iterator[Found]:
    """The pieces of code in running text and tables."""
    for path in DOCUMENTS:
        for text in _INLINE.findall(prose(path)):
            yield Found(_name(path), text.replace("\\|", "|"))


def links() -> Iterator[tuple[Path, str]]:
    """The targets of links, each with the document that it stands in."""
    for path in DOCUMENTS:
        for target in _LINK.findall(prose(path)):
            yield path, target


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines() -> Iterator[Found]:
    """What is typed at a prompt in a code block. Lines that are continued are one."""
    for block in blocks("console"):
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            prompt = re.match(r"(?:host)?[#$] (.+)", line)
            if prompt:
                # The demo prints its commands with the program's name, as everything else does.
                yield Found(block.where, prompt[1])


def words(line: str) -> list[list[str]]:
    """The commands of a line of shell, each as its words. Comments, redirections and substitutions are left out."""
    lexer = shlex.shlex(re.sub(r"\$\(.*?\)", "SUBSTITUTED", line), posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif word in _SEPARATORS or set(word) <= set("|&;<>"):
            skip = word[0] in "<>"
            if not skip:
                found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


def commands(program: str) -> Iterator[tuple[Found, list[str]]]:
    """Each use of a program: typed at a prompt, or as a piece of code that begins with its name."""
    for source in (command_lines(), code_spans()):
        for found in source:
            if f"{program}" not in found.text:
                continue
            try:
                split = words(found.text)
            except ValueError:
                continue  # A piece of code that is no shell.
            for command in split:
                if command[0] in ("eval", "sudo"):
                    command = command[1:]
                if command and command[0] == program and len(command) > 1:
                    yield found, command[1:]
