"""The manual pages and completions: complete, well-formed, and with the existing commands and keys."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import guestapi
from guestapi.cli.main import main
from guestapi.guest import guestctl
from tools import manual

CHECKOUT = Path(__file__).parents[2]
PAGES = ("guestapi.1", "guestapi.toml.5", "guestapi.7", "guestctl.1")


@pytest.fixture(scope="module")
def manuals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that `tools/manual.py` has written."""
    directory = tmp_path_factory.mktemp("manuals")
    subprocess.run([sys.executable, "tools/manual.py", directory], cwd=CHECKOUT, check=True)
    return directory


def plain(page: str) -> str:
    """Return a page without roff's fonts and escapes."""
    return re.sub(r"\\f[BR]", "", page).replace("\\-", "-").replace("\\&", "").replace("\\e", "\\")


def commands(each: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all below it, with their names."""
    yield path, each
    if isinstance(each, click.Group):
        context = click.Context(each, **each.context_settings)
        for name in each.list_commands(context):
            below = each.get_command(context, name)
            assert below is not None
            if not below.hidden:
                yield from commands(below, f"{path} {name}")


def test_every_command_and_option(manuals: Path) -> None:
    """guestapi(1) has each command with each of its options."""
    page = plain((manuals / "guestapi.1").read_text())
    parts = dict(re.findall(r"^\.SS (guestapi[a-z -]*?)(?= \[|\n)(.*?)(?=^\.S[SH]|\Z)", page, re.MULTILINE | re.DOTALL))
    for path, each in commands(main, "guestapi"):
        for option in each.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[0] in parts[path], f"{path} {option.opts[0]}"


def test_every_key(manuals: Path) -> None:
    """guestapi.toml(5) has each key of docs/configuration.md, which another test compares with the code."""
    page = plain((manuals / "guestapi.toml.5").read_text())
    keys = re.findall(r"^\| `([a-z_.-]+)`", (CHECKOUT / "docs/configuration.md").read_text(), re.MULTILINE)
    assert len(keys) > 20
    for key in keys:
        assert f".TP\n{key}" in page, key


def words_of_guestctl() -> tuple[set[str], set[str]]:
    """Return the commands and the options of guestctl, as its help has them."""
    top = subprocess.run(
        [sys.executable, guestctl.__file__, "--help"], capture_output=True, text=True, check=True
    ).stdout
    verbs = set(re.findall(r"^    ([a-z]+) ", top, re.MULTILINE))
    pages = [top]
    for verb in verbs:
        words = [sys.executable, guestctl.__file__, verb, "--help"]
        pages.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return verbs, {option for page in pages for option in re.findall(r"--[a-z]+", page)} - {"--help"}


def test_every_command_of_guestctl(manuals: Path) -> None:
    """guestctl(1) has each command and option of guestctl, and each exit status."""
    page = plain((manuals / "guestctl.1").read_text())
    verbs, options = words_of_guestctl()
    assert {"get", "list", "ready", "events"} <= verbs
    assert {"--wait", "--since", "--not", "--socket"} <= options
    assert [verb for verb in verbs if f"guestctl {verb}" not in page] == []
    assert [option for option in options if option not in page] == []
    for status in range(5):
        assert re.search(rf"^\.TP\n{status}$", page, re.MULTILINE), status


def test_completions_of_guestctl(manuals: Path) -> None:
    """bash completes each command and option of guestctl; the files for zsh and fish have all of them."""
    verbs, options = words_of_guestctl()
    # What bash does at a tab, with the words that are registered.
    compgen = '$(complete -p guestctl | sed "s/^complete/compgen/; s/guestctl$/--/")'
    for word in verbs | options:
        done = subprocess.run(
            ["bash", "-c", f'source {manuals}/guestctl.bash; eval "{compgen} {word[:-1]}"'],
            capture_output=True,
            text=True,
            check=True,
        )
        assert word in done.stdout.split()
    for shell, beginning in (("zsh", "#compdef guestctl\n"), ("fish", "complete -c guestctl ")):
        text = (manuals / f"guestctl.{shell}").read_text()
        assert text.startswith(beginning)
        assert [word for word in verbs | options if word.removeprefix("--") not in re.findall(r"[a-z]+", text)] == []


def test_every_document_has_its_page() -> None:
    """Each document for operators is in guestapi(7), on another page, or not for operators."""
    elsewhere = {"configuration.md", "commands.md", "guestctl.md"}
    not_for_operators = {"changelog.md", "design.md", "glossary.md", "modules.md", "performance.md", "testing.md"}
    # It is for those who set limits or change the code.
    not_for_operators |= {"security.md"}
    found = {path.name for path in (CHECKOUT / "docs").glob("*.md")}
    assert found == set(manual.GUIDE) | elsewhere | not_for_operators


def test_every_section_of_the_documents(manuals: Path) -> None:
    """guestapi(7) has each section of its documents, and their code blocks unchanged."""
    page = plain((manuals / "guestapi.7").read_text())
    for name in manual.GUIDE:
        text = (CHECKOUT / "docs" / name).read_text()
        for heading in re.findall(r"^## (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
            assert f".SS {plain(manual.inline(heading))}\n" in page, f"{name}: {heading}"
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            assert block in page, f"{name}: {block}"


@pytest.mark.parametrize("name", PAGES)
def test_head(manuals: Path, name: str) -> None:
    """Each page has its section, the version, and the version's date."""
    title, _, section = name.rpartition(".")
    first = (manuals / name).read_text().partition("\n")[0]
    assert first == f'.TH {title.upper()} {section} "{manual.release_date()}" "guestapi {guestapi.__version__}"'


@pytest.mark.parametrize(
    ("text", "roff"),
    [
        ("a `b-c` d-e", "a \\fBb\\-c\\fR d-e"),
        ("**strong `code`** x", "\\fBstrong \\fBcode\\fR\\fR x"),
        ("[here](other.md#x)", "here"),
        ("[there](https://example.org/a-b)", "there <https://example.org/a\\-b>"),
        ("C:\\x", "C:\\ex"),
    ],
)
def test_inline(text: str, roff: str) -> None:
    """Inline Markdown becomes equivalent roff."""
    assert manual.inline(text) == roff


def test_blocks() -> None:
    """Headings, code, tables and lists are converted, and no line of a document becomes a roff request."""
    text = (
        "# T\n\n.not a request\n\n```\n.x -y\n```\n\n| a | b | c |\n|---|---|---|\n| `k` | 1 | two |\n| l | | three |\n"
        "\n- one\n  more\n- two\n\n1. first\n"
    )
    assert list(manual.markdown(text)) == [
        *(".SH T", ".PP", "\\&.not a request"),
        *(".PP", ".RS 4", ".nf", "\\&.x \\-y", ".fi", ".RE"),
        *(".TP", "\\fBk\\fR", "b: 1\n.br\nc: two", ".TP", "l", "c: three"),
        *('.IP "\\(bu" 2', "one more", '.IP "\\(bu" 2', "two", '.IP "1." 4', "first"),
    ]


def test_bash_completion(manuals: Path) -> None:
    """bash accepts its completion file, and gets completions from the command."""
    program = Path(sys.executable).parent
    script = (
        f"PATH={program}:$PATH; source {manuals}/guestapi.bash && complete -p guestapi && "
        'COMP_WORDS=(guestapi inst) COMP_CWORD=1 && _guestapi_completion guestapi && echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert "-F _guestapi_completion guestapi" in done.stdout
    assert done.stdout.split()[-1] == "instance"


def test_other_completions(manuals: Path) -> None:
    """zsh's file begins with its marker, and fish's file completes the command."""
    assert (manuals / "guestapi.zsh").read_text().startswith("#compdef guestapi\n")
    assert "complete --no-files --command guestapi" in (manuals / "guestapi.fish").read_text()
