"""How ``edit`` gets a changed document: from $EDITOR, or from standard input if that is not a terminal."""

from __future__ import annotations

import sys

import click

from guestapi.cli.definitions import to_yaml


def is_by_hand() -> bool:
    """Whether somebody edits the document now. Then what is stored may change meanwhile."""
    return sys.stdin.isatty()


def edit_document(document: object) -> bytes | None:
    """Let the operator edit a document.

    Args:
        document: as it is now.

    Returns:
        The document as the operator wants it, as text; None if nothing was changed, and the operator was told so.
    """
    if not is_by_hand():
        return sys.stdin.buffer.read()
    edited = click.edit(to_yaml(document), extension=".yaml")
    if edited is None:
        click.echo("nothing was changed", err=True)
        return None
    return edited.encode(errors="surrogateescape")
