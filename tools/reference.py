#!/usr/bin/env python3
"""Writes docs/commands.md and docs/modules.md: every command with its options, and every module with its purpose.

    python tools/reference.py

Both are generated from help texts and docstrings. Run it after a change of a command, an option or a module;
tests/docs/test_documents.py fails if it was forgotten. Needs the interpreter of an environment in which guestapi is
installed.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import click

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGE = CHECKOUT / "guestapi"


def cell(text: str) -> str:
    """Return text that can be put into a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def find_commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all below it, with their names."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command, **command.context_settings)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            if not found.hidden:
                yield from find_commands(found, f"{name} {child}")


def describe_default(option: click.Option) -> str:
    """Return the default of an option in brackets, if there is one to show."""
    return f" (default: `{option.default}`)" if option.show_default and option.default is not None else ""


def write_commands() -> str:
    """Return docs/commands.md."""
    from guestapi.cli.main import main

    lines = [
        "# Commands",
        "",
        "Every command and its options, as `--help` prints them. `make docs` makes this page of the commands.",
    ]
    for name, command in find_commands(main, "guestapi"):
        arguments = [
            parameter.make_metavar(click.Context(command, **command.context_settings))
            for parameter in command.params
            if parameter.param_type_name == "argument"
        ]
        call = " ".join([name, *arguments, *(["COMMAND"] if isinstance(command, click.Group) else [])])
        lines += ["", f"## {name}", "", f"`{call}`", "", inspect.cleandoc(command.help or "").replace("\b\n", "")]
        options = [
            parameter for parameter in command.params if isinstance(parameter, click.Option) and not parameter.hidden
        ]
        if options:
            lines += ["", "| option | |", "|---|---|"]
        for option in options:
            names = ", ".join(f"`{one}`" for one in (*option.opts, *option.secondary_opts))
            value = (
                ""
                if option.is_flag or option.count
                else f" `{option.make_metavar(click.Context(command, **command.context_settings))}`"
            )
            lines.append(f"| {cell(names + value)} | {cell((option.help or '') + describe_default(option))} |")
    return "\n".join(lines) + "\n"


def purpose(file: Path) -> str:
    """Return the first sentence of a module's docstring: its first paragraph."""
    documented = ast.get_docstring(ast.parse(file.read_text()))
    if documented is None:
        raise SystemExit(f"{file}: has no docstring")
    return cell(documented.partition("\n\n")[0]).replace("``", "`")


def write_modules() -> str:
    """Return docs/modules.md."""
    lines = [
        "# Modules",
        "",
        "Every module of the package and its purpose, as its docstring says. [design.md](design.md) says how they work",
        "together. `make docs` makes this page of the modules themselves.",
    ]
    for package in sorted([PACKAGE, *(file.parent for file in PACKAGE.rglob("*/__init__.py"))]):
        name = str(package.relative_to(CHECKOUT))
        lines += ["", f"## {name}/", "", purpose(package / "__init__.py"), ""]
        modules = [file for file in sorted(package.glob("*.py")) if file.name != "__init__.py"]
        lines += ["| module | purpose |", "|---|---|"] if modules else []
        lines += [f"| `{file.stem}` | {purpose(file)} |" for file in modules]
    return "\n".join(lines) + "\n"


#: The functions that write the pages, by path.
PAGES = {CHECKOUT / "docs" / "commands.md": write_commands, CHECKOUT / "docs" / "modules.md": write_modules}


def main() -> None:
    """Write both pages."""
    for file, write in PAGES.items():
        file.write_text(write())


if __name__ == "__main__":
    main()
