"""The command itself: options that all commands share, ``serve``, and what is found in the modules beside this one."""

from __future__ import annotations

import gc
from importlib import import_module
from pathlib import Path

import click
from click.shell_completion import get_completion_class

import guestapi
from guestapi.cli.common import OneSentence, Operator
from guestapi.cli.grouping import takes_project
from guestapi.dialects import DIALECTS, HANDOVER
from guestapi.settings import ListenSocket

#: Each is in the module of its name. Loaded when it is called: a container waits for its hook, and for what that loads.
_MODULES = frozenset(
    {
        *(
            "apply",
            "attributes",
            "backup",
            "check",
            "config",
            "device",
            "events",
            "export",
            "fleet",
            "follow",
            "hook",
            "image",
        ),
        *(
            "identity",
            "instance",
            "metrics",
            "mirror",
            "notice",
            "notices",
            "policy",
            "profile",
            "project",
            "relay",
            "restore",
            "takeover",
            "top",
        ),
    }
)
#: Verbs of instances that can be typed without the noun, as with `incus`.
_VERBS = frozenset({"list", "ls", "info", "rename", "rm", "delete"})


class Commands(OneSentence):
    """The commands of this module, and those in the modules beside it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As click.Group."""
        return sorted([*super().list_commands(ctx), *_MODULES])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """As click.Group."""
        if cmd_name in _VERBS:
            instances = self.get_command(ctx, "instance")
            assert isinstance(instances, click.Group)
            return instances.get_command(ctx, cmd_name)
        if cmd_name not in _MODULES:
            return super().get_command(ctx, cmd_name)
        command = getattr(import_module(f"guestapi.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", metavar="FILE", help="Default: $GUESTAPI_CONFIG, else /etc/guestapi/guestapi.toml.")
@click.option("--fleet", is_flag=True, help="The command is about instances of the fleet, not of this host.")
@takes_project("The project of the instances; it can be given before or behind any verb about them.")
@click.version_option(guestapi.__version__, prog_name="guestapi")
@click.pass_context
def main(ctx: click.Context, config: str | None, fleet: bool) -> None:
    """The guest API: /dev/incus/sock as a service of its own."""
    ctx.obj = Operator(config, fleet=fleet)


@main.command()
@click.option("--socket", "sockets", multiple=True, metavar="[DIALECT=]PATH", help="Bind this; may be repeated.")
@click.option("--workers", type=click.IntRange(1, 256), help="Default: as in gunicorn.conf.py.")
@click.pass_obj
def serve(operator: Operator, sockets: tuple[str, ...], workers: int | None) -> None:
    """Run the service in the foreground. Sockets handed over by systemd win over --socket and configuration."""
    # gunicorn and gevent are loaded for this command alone.
    # PERF: nothing of what is loaded is garbage. To look for it takes a tenth of the start's processor time, and again
    # some in each worker, which would also get a copy of each page that is looked at.
    gc.disable()
    from guestapi.server.arbiter import serve as run

    gc.freeze()
    gc.enable()
    run(operator.file, tuple(map(_listener, sockets)), workers)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the shell completion: eval "$(guestapi completion bash)"."""
    complete = get_completion_class(shell)
    assert complete is not None, "click knows all three"
    click.echo(complete(main, {}, "guestapi", "_GUESTAPI_COMPLETE").source())


def _listener(word: str) -> ListenSocket:
    dialect, equals, path = word.partition("=")
    if not equals or "/" in dialect:
        dialect, path = "incus", word
    if dialect not in (*DIALECTS, HANDOVER):
        raise click.UsageError(f"--socket {word}: {dialect!r} is none of {', '.join((*DIALECTS, HANDOVER))}")
    return ListenSocket(path=str(Path(path).absolute()), dialect=dialect)
