"""``guestapi image``: what instances that may export images can download from this host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from guestapi.cli.common import F, Operator, has_format, print_json, print_table
from guestapi.cli.grouping import Noun
from guestapi.cli.printing import mark
from guestapi.cli.words import MisuseError, printable
from guestapi.errors import GuestapiError
from guestapi.model import Image
from guestapi.store import images
from guestapi.store.image_steps import set_image
from guestapi.store.lookup import get_image, list_images
from guestapi.store.writing import Writer


@click.group(cls=Noun)
def image() -> None:
    """Import, change, check and remove images."""


def _complete_image(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        operator = Operator(ctx.find_root().params.get("config"))
        with operator.view() as store:
            known = [name for one in list_images(store) for name in (*one.aliases, one.fingerprint)]
    except GuestapiError:
        return []
    return [CompletionItem(name) for name in known if name.startswith(incomplete)]


def takes_image(command: F) -> F:
    """Give a command IMAGE: an alias, a fingerprint, or the beginning of one fingerprint alone."""
    return click.argument("name", metavar="IMAGE", shell_complete=_complete_image)(command)


@image.command(name="import")
@click.argument("file", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE | METADATA ROOTFS")
@click.option("--public", is_flag=True, help="Every instance that may export images may have it.")
@click.option("--alias", multiple=True, metavar="A", help="Another name for it; may be repeated.")
@click.pass_obj
def import_(operator: Operator, file: tuple[Path, ...], public: bool, alias: tuple[str, ...]) -> None:
    """Take an image in, and print its fingerprint. A split image is two files."""
    if len(file) > 2:
        raise MisuseError("an image is one file, or two: metadata and root file system")
    for one in file:
        images.refuse_other(one)
    where = images.directory(operator.settings)
    with _progress("importing", sum(map(_size, file))) as progress:
        added = images.import_image(operator.writer, where, file, public=public, aliases=alias, progress=progress)
    click.echo(added.fingerprint)


@image.command(name="list")
@has_format
@click.pass_obj
def list_(operator: Operator, as_json: bool) -> None:
    """All images."""
    with operator.view() as store:
        found = list_images(store)
    if as_json:
        print_json([_described(one) for one in found])
        return
    rows = (
        (
            ", ".join(one.aliases),
            one.fingerprint[:12],
            one.type,
            "yes" if one.public else "",
            "yes" if one.cached else "",
            _readable(one.size),
            _date(one.created),
        )
        for one in found
    )
    print_table(["ALIAS", "FINGERPRINT", "TYPE", "PUBLIC", "CACHED", "SIZE", "IMPORTED"], rows)


@image.command()
@takes_image
@has_format
@click.pass_obj
def show(operator: Operator, name: str, as_json: bool) -> None:
    """All that is known of an image."""
    with operator.view() as store:
        found = get_image(store, name)
    document = _described(found)
    if as_json:
        print_json(document)
        return
    document["aliases"] = ", ".join(found.aliases)
    files = document.pop("files")
    print_table(["PROPERTY", "VALUE"], ((key, str(value)) for key, value in document.items()))
    where = images.directory(operator.settings)
    paths = map(str, images.paths(where, found))
    print_table(
        ["FILE", "KIND", "SIZE"],
        ((path, one["extension"], str(one["size"])) for path, one in zip(paths, files, strict=True)),
    )


@image.command(name="set")
@takes_image
@click.option("--public/--private", default=None, help="Whether instances that may export images may have it.")
@click.option("--cached/--no-cached", default=None, help="The same, for an image that is not a public one.")
@click.option("--alias", multiple=True, metavar="A", help="Give it this name too; may be repeated.")
@click.option("--no-alias", multiple=True, metavar="A", help="Take this name from it; may be repeated.")
@click.pass_obj
def set_(
    operator: Operator,
    name: str,
    public: bool | None,
    cached: bool | None,
    alias: tuple[str, ...],
    no_alias: tuple[str, ...],
) -> None:
    """Change which instances may download an image, and its aliases, all at once."""
    if public is None and cached is None and not alias and not no_alias:
        raise MisuseError(
            "nothing to set", "--public, --private, --cached, --no-cached, --alias and --no-alias set something"
        )
    with operator.writer.change() as change:
        found = get_image(change, name)
        set_image(change, found, public=public, cached=cached, add_aliases=alias, remove_aliases=no_alias)


@image.command()
@takes_image
@click.pass_obj
def remove(operator: Operator, name: str) -> None:
    """Forget an image and delete its files. Downloads under way go on to their end."""
    images.remove_image(operator.writer, images.directory(operator.settings), name)


@image.command()
@click.argument("name", required=False, metavar="[IMAGE]", shell_complete=_complete_image)
@has_format
@click.pass_context
def verify(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """Read every byte of an image, or of all: is it what was imported? Exit 1 if not."""
    operator: Operator = ctx.obj
    where = images.directory(operator.settings)
    with operator.view() as store:
        known = list_images(store)
        wanted = known if name is None else [get_image(store, name)]
    writer = Writer(operator.settings, audit=operator.audit)
    with _progress("reading", sum(one.size for one in wanted)) as progress:
        verdicts = [images.verify_image(writer, where, one, progress) for one in wanted]
    strays = images.stray_files(where, known) if name is None else []
    if as_json:
        print_json(
            {
                "images": [
                    {"fingerprint": one.image.fingerprint, "ok": one.fault is None, "fault": one.fault}
                    for one in verdicts
                ],
                "strays": strays,
            }
        )
    else:
        for one in verdicts:
            _print_verdict(one)
        for stray in strays:
            click.echo(f"note {printable(str(where / stray))}: belongs to no image, and may be deleted")
    if any(one.fault for one in verdicts):
        ctx.exit(1)


def _print_verdict(verdict: images.Verdict) -> None:
    text = verdict.fault or ("right, though its files look different; noted" if verdict.renewed else "right")
    click.echo(f"{mark(verdict.fault is None)} {verdict.image.fingerprint[:12]}: {printable(text)}")


def _described(one: Image) -> dict[str, Any]:
    """An image as ``--format json`` shows it."""
    return {
        "fingerprint": one.fingerprint,
        "aliases": list(one.aliases),
        "type": one.type,
        "public": one.public,
        "cached": one.cached,
        "created": _date(one.created),
        "size": one.size,
        "files": [{"extension": file.extension, "size": file.size} for file in one.files],
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")


def _readable(size: int) -> str:
    from rich.filesize import decimal

    return decimal(size)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # What is wrong with it, the import will say.


@contextmanager
def _progress(what: str, total: int) -> Iterator[images.Progress]:
    """A bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _count: None
        return
    # Loaded for these commands alone: others are called by hooks, in a hurry.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda count: bar.advance(task, count)
