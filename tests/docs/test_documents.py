"""The documents agree with the code: commands, options, files, links, settings, variables, fields and modules."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from guestapi.cli.main import main
from guestapi.dialects import DIALECTS
from guestapi.settings import Settings
from tests.docs import documents
from tests.docs.documents import CHECKOUT, Found
from tools import reference

DOCS = CHECKOUT / "docs"


def wrong_use(arguments: list[str]) -> str | None:
    """Return the error of this use of `guestapi`, or None if the command and its options exist."""
    command: click.Command = main
    context = click.Context(main, info_name="guestapi", **main.context_settings)
    # A placeholder, which a reader replaces, counts as any word.
    rest = [re.sub(r"^\[(.*?)\]$", r"\1", word) for word in arguments if word not in ("...", "[...]", "COMMAND")]
    while True:
        # Options of a group come before the subcommand.
        parser = command.make_parser(context)
        try:
            _values, left, _order = parser.parse_args(args=list(rest))
        except click.UsageError as error:
            return error.format_message()
        if not isinstance(command, click.Group):
            return f"unexpected {left[0]}" if left else None
        if not left:
            return None
        following = command.get_command(context, left[0])
        if following is None:
            return f"no command {left[0]}"
        command, rest = following, left[1:]
        context = click.Context(command, info_name=command.name, parent=context)


def test_guestapi_commands_exist() -> None:
    """Each `guestapi ...` in a document is an existing command with existing options."""
    used = list(documents.commands("guestapi"))
    assert len(used) > 60
    assert [f"{found}: {fault}" for found, arguments in used if (fault := wrong_use(arguments))] == []


def test_wrong_commands_are_found() -> None:
    """The test above finds options, commands and arguments that do not exist."""
    assert wrong_use(["events", "--follow"])
    assert wrong_use(["instnace", "list"])
    assert wrong_use(["instance", "list", "--colour"])
    assert wrong_use(["completion", "bash", "zsh"])
    assert not wrong_use(["events", "web", "--type", "lifecycle", "--since", "0", "--format", "json"])


def units() -> set[str]:
    """Return the names of guestapi's units; a template's without its instance."""
    return {path.name for path in (CHECKOUT / "systemd").rglob("*") if path.suffix in (".service", ".socket")}


def test_units_exist() -> None:
    """Each unit of guestapi that a document names exists."""
    known = units()
    named = set()
    for path in documents.DOCUMENTS:
        named |= set(re.findall(r"\bguestapi[\w-]*(?:@[\w%]*)?\.(?:service|socket)\b(?!\.d)", path.read_text()))
    assert {re.sub(r"@.*\.", "@.", unit) for unit in named} - known == set()
    for found, arguments in documents.commands("systemctl"):
        for word in arguments[1:]:
            if word.startswith("guestapi"):
                unit = word if "." in word else f"{word}.service"
                assert re.sub(r"@.*\.", "@.", unit) in known, found


def test_make_targets_exist() -> None:
    """Each `make TARGET` in a document is a target of the Makefile, and each variable exists there."""
    makefile = (CHECKOUT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    used = list(documents.commands("make"))
    assert used
    for found, arguments in used:
        for word in arguments:
            name, is_variable, _value = word.partition("=")
            assert name in (variables if is_variable else targets), found


def installed() -> set[str]:
    """Return the paths that `make install` installs."""
    from tools.installation import Layout, find_files

    return {file.path for file in find_files(Layout(Path("/")))}


def test_installed_files_exist() -> None:
    """Each file in /etc/guestapi that a document names is installed by `make install`."""
    known = installed()
    for path in documents.DOCUMENTS:
        for name in re.findall(r"/etc/guestapi/([\w.-]*\w)", path.read_text()):
            assert f"/etc/guestapi/{name}" in known, f"{path.name}: /etc/guestapi/{name}"


def test_files_of_the_checkout_exist() -> None:
    """Each path of the checkout that a document names exists; paths of modules may omit `guestapi/`."""
    rooms = {path.name for path in (CHECKOUT / "guestapi").iterdir() if path.is_dir()}
    tops = {path.name for path in CHECKOUT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    made = {"benchmarks/build/results.json"}
    for found in documents.code_spans():
        if found.text in made:
            continue
        match = re.fullmatch(r"((\w+)/[\w./-]*\w\.(?:py|c|conf|json|toml|service|socket|jsonl|sh|md))", found.text)
        if match and match[2] in rooms | tops:
            assert any((CHECKOUT / base / match[1]).exists() for base in ("", "guestapi")), found


def test_link_targets_exist() -> None:
    """Each link to a file or a heading has an existing target."""
    for path, target in documents.links():
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in documents.anchors(linked), f"{path.name}: {target}"


def test_every_document_is_linked() -> None:
    """Each document in docs/ is linked from the README."""
    readme = (CHECKOUT / "README.md").read_text()
    for path in DOCS.glob("*.md"):
        assert f"(docs/{path.name})" in readme, path.name


def python_files() -> Iterator[tuple[Path, ast.Module]]:
    """Yield the modules of the package, parsed."""
    for path in sorted((CHECKOUT / "guestapi").rglob("*.py")):
        yield path, ast.parse(path.read_text())


#: Variables that systemd, gunicorn, a runtime or a shell sets for its processes, not the operator.
NOT_OURS = {
    *("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "MAINPID"),
    *("NOTIFY_SOCKET", "GUNICORN_FD", "PATH", "CREDENTIALS_DIRECTORY"),
}


def test_environment_variables_are_documented() -> None:
    """Each environment variable that an operator may set is in docs/configuration.md."""
    read = set()
    for path, _tree in python_files():
        text = path.read_text()
        read |= set(re.findall(r"os\.environ(?:\.get\(|\[)\"([A-Z_]+)\"", text))
        read |= set(re.findall(r"os\.getenv\(\"([A-Z_]+)\"", text))
        read |= {name for name in re.findall(r"\"\$?(GUESTAPI_[A-Z_]+)\"", text) if name != "GUESTAPI_COMPLETE"}
    read -= NOT_OURS | {name for name in read if name.startswith("LXC_")}
    configuration = (DOCS / "configuration.md").read_text()
    assert "GUESTAPI_CONFIG" in read
    assert {name for name in read if f"`{name}`" not in configuration and name not in configuration} == set()


def journal_fields() -> set[str]:
    """Return the journal fields that the code sets in addition to those of every program."""
    found = set()
    for path, _tree in python_files():
        text = path.read_text()
        if "fields" in text:
            # Keys of the mappings that functions with this name return, and the fields of each entry.
            for body in re.findall(r"fields\b[^\n]*(?:=|\|=|return|\*\*)[^\n]*\{([^}]*)\}", text):
                found |= set(re.findall(r'"([A-Z][A-Z_]+)":', body))
            for body in re.findall(r"def _\w*fields\(.*?\n(?=\n\n|\Z)", text, re.DOTALL):
                found |= set(re.findall(r'"([A-Z][A-Z_]+)":', body))
        found |= set(re.findall(r"^ +([A-Z][A-Z_]+)=", text, re.MULTILINE)) - {"PRIORITY", "SYSLOG_IDENTIFIER"}
    return found


def test_journal_fields_are_documented() -> None:
    """The journal fields in docs/operations.md are exactly those of the code."""
    fields = journal_fields()
    assert {"INSTANCE", "PROJECT", "STATUS", "LIMIT", "COUNT"} <= fields
    operations = (DOCS / "operations.md").read_text()
    section = operations.partition("## Read the journal")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([A-Z][A-Z_]+)`", section)) == fields


def test_packages_are_in_the_design() -> None:
    """The table of docs/design.md has exactly the existing packages and top-level modules."""
    design = (DOCS / "design.md").read_text().partition("## What is where")[2].partition("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`[^|]+`) \|", design, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    there = {f"{path.parent.name}/" for path in (CHECKOUT / "guestapi").glob("*/__init__.py")}
    there |= {path.name for path in (CHECKOUT / "guestapi").glob("*.py")} - {"__init__.py"}
    assert named == there


@pytest.mark.parametrize("page", reference.PAGES, ids=lambda page: page.name)
def test_generated_pages_are_current(page: Path) -> None:
    """Every generated page has all commands, options and modules. `make docs` writes the pages."""
    assert page.read_text() == reference.PAGES[page](), "run: make docs"


def test_decisions_have_a_form() -> None:
    """Each decision has a unique number, a title, and the sections context, decision and consequences."""
    numbers = []
    for path in sorted((DOCS / "decisions").glob("*.md")):
        number, _, rest = path.stem.partition("-")
        numbers.append(number)
        text = path.read_text()
        assert re.fullmatch(r"\d{4}", number), path.name
        assert rest, path.name
        assert text.startswith(f"# {number}: "), path.name
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings[:3] == ["Context", "Decision", "Consequences"], path.name
    assert len(numbers) == len(set(numbers))


def defaults(struct: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every setting of guestapi.toml by its dotted name, with its default."""
    for field in msgspec.structs.fields(type(struct)):  # type: ignore[arg-type]  # every one is a Struct
        value = getattr(struct, field.name)
        name = f"{prefix}{field.encode_name}"
        if isinstance(value, msgspec.Struct):
            yield from defaults(value, f"{name}.")
        else:
            yield name, value


def as_documented(value: object) -> str:
    """Return a default as it is written in the table."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(f"`{one}`" for one in value)
    return f"`{value}`" if isinstance(value, str) else str(value)


def test_settings_are_documented() -> None:
    """docs/configuration.md has exactly the existing settings, with their defaults."""
    text = (DOCS / "configuration.md").read_text()
    section = text.partition("## guestapi.toml")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|([^|]*)\| [^|]+ \|$", section, re.MULTILINE)
    documented = {name: default.strip() for names, default in rows for name in re.findall(r"`([^`]+)`", names)}
    settings = dict(defaults(Settings()))
    # The file of the settings is no setting.
    del settings["file"]
    # A list of tables, and settings that are described in words because they depend on others.
    in_words = {"listener", "listener.path", "listener.dialect", "hooks.template", "images.directory"}
    in_words |= {f"fleet.{name}" for name in ("url", "host", "certificate", "key", "ca")}
    in_words |= {"identity.trust_domain", "identity.issuer"}
    assert set(documented) == set(settings) | in_words
    found = {name: as_documented(value) for name, value in settings.items() if name not in in_words}
    assert {name: documented[name] for name in found} == found


def test_switched_off_is_described() -> None:
    """docs/security.md names what an instance gets while its API is switched off."""
    section = (DOCS / "security.md").read_text().partition("## What a guest can do")[2].partition("\n## ")[0]
    for dialect in DIALECTS.values():
        assert dialect.switch in section
        for method, path in dialect.open_when_off:
            assert f"`{method} {path}`" in section


def test_documents_use_installed_files() -> None:
    """Documents of runtimes copy files that `make install` has installed, never files of a checkout."""
    for found in documents.command_lines():
        assert not re.search(r"(?:^|\s)(?:conf|systemd)/", found.text), found


def test_no_passive_references() -> None:
    """No document refers to anything that a reader cannot open, such as issues or drafts."""
    for path in documents.DOCUMENTS:
        text = path.read_text()
        for pattern in (r"\bissue \d", r"the issue\b", r"first draft", r"/work/", r"\.\./shared"):
            assert not re.search(pattern, text, re.IGNORECASE), f"{path.name}: {pattern}"


def test_prose_is_wrapped() -> None:
    """No line of prose has more than 100 characters. Tables, code and generated pages may."""
    for path in documents.DOCUMENTS:
        code = False
        for line in path.read_text().splitlines():
            code ^= line.lstrip().startswith("```")
            if path not in reference.PAGES and not code and not line.lstrip().startswith("|"):
                assert len(line) <= 100, f"{path.name}: {line}"


def test_found_names_its_document() -> None:
    """A failure names the document."""
    assert str(Found("docs/x.md", "guestapi")) == "docs/x.md: guestapi"
