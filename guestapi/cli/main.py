"""The command itself: options that all commands share, ``serve``, and what is found in the modules beside this one."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import get_completion_class

import guestapi
from guestapi.cli.check import check
from guestapi.cli.common import OneSentence, Operator
from guestapi.cli.config import config
from guestapi.cli.device import device
from guestapi.cli.events import events
from guestapi.cli.hook import hook
from guestapi.cli.image import image
from guestapi.cli.instance import instance
from guestapi.cli.mirror import mirror, takeover
from guestapi.dialects import DIALECTS
from guestapi.settings import Listener


@click.group(cls=OneSentence, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", metavar="FILE", help="Default: $GUESTAPI_CONFIG, else /etc/guestapi/guestapi.toml.")
@click.version_option(guestapi.__version__, prog_name="guestapi")
@click.pass_context
def main(ctx: click.Context, config: str | None) -> None:
    """The guest API: /dev/incus/sock as a service of its own."""
    ctx.obj = Operator(config)


@main.command()
@click.option("--socket", "sockets", multiple=True, metavar="[DIALECT=]PATH", help="Bind this; may be repeated.")
@click.option("--workers", type=click.IntRange(1, 256), help="Default: as in gunicorn.conf.py.")
@click.pass_obj
def serve(operator: Operator, sockets: tuple[str, ...], workers: int | None) -> None:
    """Run the service in the foreground. Sockets handed over by systemd win over --socket and configuration."""
    # gunicorn and gevent are loaded for this command alone: the others are called by hooks, in a hurry.
    from guestapi.server.master import serve as run

    run(operator.file, tuple(map(_listener, sockets)), workers)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion: eval "$(guestapi completion bash)"."""
    complete = get_completion_class(shell)
    assert complete is not None, "click knows all three"
    click.echo(complete(main, {}, "guestapi", "_GUESTAPI_COMPLETE").source())


def _listener(word: str) -> Listener:
    dialect, equals, path = word.partition("=")
    if not equals or "/" in dialect:
        dialect, path = "incus", word
    if dialect not in DIALECTS:
        raise click.UsageError(f"--socket {word}: {dialect!r} is none of {', '.join(DIALECTS)}")
    return Listener(path=str(Path(path).absolute()), dialect=dialect)


for command in (instance, config, device, image, events, check, hook, mirror, takeover):
    main.add_command(command)
