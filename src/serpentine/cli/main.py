"""The entry point: the group of commands, loaded one by one, and what an error looks like."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

from serpentine._version import __version__
from serpentine.errors import InputError, SerpentineError

__all__ = ["cli", "main"]

# name -> (module, one line of help).  The help of the whole needs no module of a command.
COMMANDS = {
    "pull": ("serpentine.cli.pull", "Pull an image from a registry and unpack it."),
    "images": ("serpentine.cli.images", "List the images that are there."),
    "inspect": ("serpentine.cli.inspect", "Show the state of an image as JSON."),
    "rmi": ("serpentine.cli.rmi", "Remove images."),
    "daemon": ("serpentine.cli.daemon", "Start, stop, remove and look at our own containerd."),
    "version": ("serpentine.cli.version", "Show the version."),
}

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", prog_name="serpentine")
@click.option(
    "--address",
    "-a",
    metavar="SOCKET",
    help="containerd to use; without it, our own is started.  [env: CONTAINERD_ADDRESS]",
)
@click.option(
    "--namespace",
    "-n",
    metavar="NAME",
    help="Namespace in containerd; 'serpentine' by default.  [env: CONTAINERD_NAMESPACE]",
)
@click.option(
    "--snapshotter",
    metavar="NAME",
    help="Snapshotter to unpack with.  [env: CONTAINERD_SNAPSHOTTER]",
)
@click.pass_context
def cli(
    ctx: click.Context, address: str | None, namespace: str | None, snapshotter: str | None
) -> None:
    """Serpentine, a container engine on containerd.

    Results go to stdout, everything else to stderr.
    """
    ctx.obj = {"address": address, "namespace": namespace, "snapshotter": snapshotter}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        # Without standalone mode, click returns the status of an Exit.
        status = cli.main(args=arguments, prog_name="serpentine", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SerpentineError as error:
        remedy = f"; {error.hint}" if error.hint else ""
        click.echo(f"serpentine: {error}{remedy}", err=True)
        return EXIT_USAGE if isinstance(error, InputError) and _is_usage(error) else EXIT_FAILURE
    except (KeyboardInterrupt, click.Abort):
        click.echo("serpentine: interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has gone.  Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return status if isinstance(status, int) else 0


def _is_usage(error: InputError) -> bool:
    """Tell a mistake of usage (a flag, a setting) from bad input (a reference)."""
    from serpentine.errors import InvalidReference

    return not isinstance(error, InvalidReference)
