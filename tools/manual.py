#!/usr/bin/env python3
"""Writes the manual pages and the completions for bash, zsh and fish into a directory.

    python tools/manual.py DIRECTORY

guestapi(1) is generated from the command's own help, guestapi.toml(5) from docs/configuration.md, guestctl(1) from
docs/guestctl.md, and guestapi(7) from the other documents in docs/ that `GUIDE` names. Needs only the interpreter of an
environment in which guestapi is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from click.shell_completion import get_completion_class

import guestapi
from guestapi.cli.main import main as command
from guestapi.guest import guestctl

CHECKOUT = Path(__file__).resolve().parents[1]
DOCS = CHECKOUT / "docs"

#: The documents of guestapi(7), in this order.
GUIDE = (
    "operations.md",
    "lxc.md",
    "podman.md",
    "docker.md",
    "oci.md",
    "nspawn.md",
    "virtual-machines.md",
    "incus.md",
    "from-incus.md",
    "guests.md",
    "events.md",
    "extensions.md",
    "identity.md",
    "images.md",
    "monitoring.md",
    "audit.md",
    "fleet.md",
)

#: The title of each page.
TITLES = {
    "guestapi.1": "look after the instances to which the guest API is offered",
    "guestctl.1": "ask the host about the instance in which it runs",
    "guestapi.toml.5": "configuration of the guest API service",
    "guestapi.7": "the guest API of Incus and LXD as a service of its own",
}

#: The line of a Markdown table that separates its head from its rows.
_RULE = re.compile(r"\|[-| :]+\|")
_INLINE = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\[([^\]]*)\]\(([^)]*)\)")


def release_date() -> str:
    """Return the date of this version from docs/changelog.md."""
    found = re.search(
        rf"^## \[{re.escape(guestapi.__version__)}\] - (\S+)", (DOCS / "changelog.md").read_text(), re.MULTILINE
    )
    if found is None:
        raise SystemExit(f"docs/changelog.md has no section for version {guestapi.__version__}")
    return found[1]


def escape(text: str, *, code: bool = False) -> str:
    """Return text escaped for roff; in code a hyphen becomes the ASCII character, which can be copied and pasted."""
    text = text.replace("\\", "\\e")
    return text.replace("-", "\\-") if code else text


def guard(line: str) -> str:
    """Return a line of text that roff does not take for a request."""
    return f"\\&{line}" if line[:1] in (".", "'") else line


def inline(text: str) -> str:
    """Return a paragraph of Markdown as roff: code and strong words are bold, a link is its text and a remote URL."""
    found, end = [], 0
    for match in _INLINE.finditer(text):
        found.append(escape(text[end : match.start()]))
        literal, strong, label, target = match.groups()
        if literal is not None:
            found.append(f"\\fB{escape(literal, code=True)}\\fR")
        elif strong is not None:
            found.append(f"\\fB{inline(strong)}\\fR")
        else:
            remote = f" <{escape(target, code=True)}>" if target.startswith("http") else ""
            found.append(f"{inline(label)}{remote}")
        end = match.end()
    found.append(escape(text[end:]))
    return "".join(found)


def cells(line: str) -> list[str]:
    """Return the cells of a row of a Markdown table."""
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def table(lines: Sequence[str]) -> Iterator[str]:
    """Yield a Markdown table as a list: the first cell of a row is the term, the other cells are its description."""
    head = cells(lines[0])
    for line in lines[2:]:
        term, *others = cells(line)
        yield ".TP"
        yield guard(inline(term)) or "\\&"
        said = [f"{inline(name)}: {inline(cell)}" for name, cell in zip(head[1:], others, strict=False) if cell]
        if len(head) == 2:
            said = [inline(cell) for cell in others]
        yield "\n.br\n".join(map(guard, said)) or "\\&"


def markdown(text: str) -> Iterator[str]:
    """Yield a document as the lines of a manual page; its title becomes a section, its sections subsections."""
    lines = [*text.splitlines(), ""]
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            end = next(number for number in range(at + 1, len(lines)) if lines[number].startswith("```"))
            yield from (".PP", ".RS 4", ".nf")
            yield from (guard(escape(code, code=True)) for code in lines[at + 1 : end])
            yield from (".fi", ".RE")
            at = end + 1
        elif line.startswith("|") and at + 1 < len(lines) and _RULE.fullmatch(lines[at + 1].strip()):
            end = next(number for number in range(at, len(lines)) if not lines[number].startswith("|"))
            yield from table(lines[at:end])
            at = end
        elif heading := re.fullmatch(r"(#+) (.*)", line):
            yield f".SH {inline(heading[2]).upper()}" if len(heading[1]) == 1 else f".SS {inline(heading[2])}"
            at += 1
        elif item := re.match(r"(-|\d+\.) ", line):
            end = next(n for n in range(at + 1, len(lines)) if not lines[n].startswith("  ") or not lines[n].strip())
            content = " ".join([line[item.end() :], *(more.strip() for more in lines[at + 1 : end])])
            yield from (f'.IP "{chr(92)}(bu" 2' if item[1] == "-" else f'.IP "{item[1]}" 4', guard(inline(content)))
            at = end
        elif line.strip():
            end = next(n for n in range(at, len(lines)) if not lines[n].strip() or re.match(r"```|\||#+ ", lines[n]))
            yield from (".PP", guard(inline(" ".join(part.strip() for part in lines[at:end]))))
            at = end
        else:
            at += 1


def commands(each: click.Command, context: click.Context) -> Iterator[str]:
    """Yield the description of a command and of those below it."""
    help_text = (each.help or each.short_help or "").replace("\b", "").strip()
    yield f".SS {escape(' '.join([context.command_path, *each.collect_usage_pieces(context)]), code=True)}"
    for paragraph in help_text.split("\n\n"):
        yield from (".PP", guard(escape(" ".join(paragraph.split()))))
    for parameter in each.get_params(context):
        record = parameter.get_help_record(context)
        # Every command has --help; an argument without a text is in the title.
        if record is not None and "--help" not in record[0] and (record[1] or parameter.param_type_name == "option"):
            yield from (".TP", f"\\fB{escape(record[0], code=True)}\\fR", guard(escape(record[1] or "")) or "\\&")
    if isinstance(each, click.Group):
        for name in each.list_commands(context):
            below = each.get_command(context, name)
            assert below is not None, name
            if not below.hidden:
                yield from commands(below, click.Context(below, context, name, **below.context_settings))


def page(name: str, body: Iterator[str]) -> str:
    """Return a whole page.

    Args:
        name: the name of its file, such as "guestapi.1".
        body: its lines after NAME.
    """
    title, _, section = name.rpartition(".")
    head = [
        f'.TH {title.upper()} {section} "{release_date()}" "guestapi {guestapi.__version__}"',
        *(".SH NAME", f"{title} \\- {TITLES[name]}"),
        # No hyphenation and no justification, so that commands can be copied.
        *(".nh", ".ad l"),
    ]
    return "\n".join([*head, *body, ""])


def manual_of_command() -> Iterator[str]:
    """Yield guestapi(1) after NAME."""
    context = click.Context(command, info_name="guestapi", **command.context_settings)
    yield from (".SH SYNOPSIS", "\\fBguestapi\\fR [OPTIONS] COMMAND [ARGS]...", ".SH COMMANDS")
    yield from commands(command, context)
    yield from (".SH SEE ALSO", "\\fBguestapi.toml\\fR(5), \\fBguestapi\\fR(7)")


def manual_of_documents(names: Sequence[str], see: str) -> Iterator[str]:
    """Yield the lines of documents in docs/, and references to other pages."""
    for name in names:
        yield from markdown((DOCS / name).read_text(encoding="utf-8"))
    yield from (".SH SEE ALSO", see)


def completions_of_guestctl() -> dict[str, str]:
    """Return the completions of guestctl's commands and options, by shell."""
    groups = [action for action in guestctl.parser()._actions if isinstance(action.choices, dict)]
    verbs = list(groups[0].choices or ())
    parsers = [guestctl.parser(), *dict(groups[0].choices or {}).values()]
    options = sorted({word for each in parsers for word in each._option_string_actions if word.startswith("--")})
    return {
        "bash": f'complete -W "{" ".join([*verbs, *options])}" guestctl\n',
        "zsh": f"#compdef guestctl\n_arguments '1:command:({' '.join(verbs)})' {' '.join(options)} '*:value:()'\n",
        "fish": f"complete -c guestctl -f -a '{' '.join(verbs)}'\n"
        + "".join(f"complete -c guestctl -l {word[2:]}\n" for word in options),
    }


def autoloaded(script: str) -> str:
    """Return click's script for zsh as a file that zsh loads by itself.

    zsh runs such a file at each completion. click's script completes at the first one only: it takes the next one for
    `eval`, and registers itself again.
    """
    functions, condition, _rest = script.partition("if [[ $zsh_eval_context[-1] == loadautofunc ]]; then\n")
    assert condition, "click's script has the condition"
    return f'{functions}_guestapi_completion "$@"\n'


def write(directory: Path) -> None:
    """Write all pages and completions into a directory, which is created."""
    directory.mkdir(parents=True, exist_ok=True)
    pages = {
        "guestapi.1": manual_of_command(),
        "guestctl.1": manual_of_documents(["guestctl.md"], "\\fBguestapi\\fR(7)"),
        "guestapi.toml.5": manual_of_documents(["configuration.md"], "\\fBguestapi\\fR(1), \\fBguestapi\\fR(7)"),
        "guestapi.7": manual_of_documents(GUIDE, "\\fBguestapi\\fR(1), \\fBguestapi.toml\\fR(5)"),
    }
    for name, body in pages.items():
        (directory / name).write_text(page(name, body), encoding="utf-8")
    for shell in ("bash", "zsh", "fish"):
        complete = get_completion_class(shell)
        assert complete is not None, "click knows all three"
        source = complete(command, {}, "guestapi", "_GUESTAPI_COMPLETE").source().strip() + "\n"
        if shell == "zsh":
            source = autoloaded(source)
        (directory / f"guestapi.{shell}").write_text(source, encoding="utf-8")
    for shell, source in completions_of_guestctl().items():
        (directory / f"guestctl.{shell}").write_text(source, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and write the pages.

    Args:
        arguments: the command line without the program's name; default: this process's own.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    write(parser.parse_args(arguments).directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
