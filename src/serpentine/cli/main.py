"""The entry point: the group of commands, loaded one by one, and what an error looks like."""

from __future__ import annotations

import errno
import gc
import os
import sys
from importlib import import_module

import click

from serpentine._version import __version__
from serpentine.errors import SerpentineError, StepError
from serpentine.settings import DAEMONS, TRANSPORTS

__all__ = ["cli", "main"]

# name -> (module, one line of help).  The help of the whole needs no module of a command.
COMMANDS = {
    "pull": ("serpentine.cli.pull", "Pull an image from a registry and unpack it."),
    "lock": ("serpentine.cli.lock", "Pin tags to digests, in a file."),
    "run": ("serpentine.cli.run", "Run a command on an image."),
    "shell": ("serpentine.cli.run", "Open a shell in an image."),
    "cp": ("serpentine.cli.cp", "Copy files into an image, or out of one."),
    "images": ("serpentine.cli.images", "List the images that are there."),
    "inspect": ("serpentine.cli.inspect", "Show the state of an image as JSON."),
    "rmi": ("serpentine.cli.rmi", "Remove images."),
    "explain": ("serpentine.cli.explain", "Tell what a pull did, and why."),
    "df": ("serpentine.cli.df", "Show how much is there, and what could be freed."),
    "prune": ("serpentine.cli.prune", "Remove what is not needed."),
    "verify": ("serpentine.cli.verify", "Check blobs and file trees, and mend them."),
    "daemon": (
        "serpentine.cli.daemon",
        "Install, start, stop, remove and look at our own containerd.",
    ),
    "doctor": ("serpentine.cli.doctor", "Check each part, and say how to mend what fails."),
    "version": ("serpentine.cli.version", "Show the version."),
}

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
# Of what our stdout is, and not of anything that we look after.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(COMMANDS[cmd_name][0])
        command = getattr(module, "shell" if cmd_name == "shell" else "command")
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
@click.option(
    "--daemon",
    type=click.Choice(DAEMONS),
    help="Kind of our own containerd; the first that can be had by default."
    "  [env: SERPENTINE_DAEMON]",
)
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    help="How to reach it in Docker or Podman: 'socket' on Linux, else 'envoy'."
    "  [env: SERPENTINE_TRANSPORT]",
)
@click.option(
    "--offline",
    is_flag=True,
    help="Ask no registry and download nothing; what is here must do.  [env: SERPENTINE_OFFLINE]",
)
@click.option(
    "--log-level",
    type=click.Choice(("info", "debug"), case_sensitive=False),
    envvar="SERPENTINE_LOG",
    help="Log what happens, on stderr.  [env: SERPENTINE_LOG]",
)
@click.pass_context
def cli(
    ctx: click.Context,
    address: str | None,
    namespace: str | None,
    snapshotter: str | None,
    daemon: str | None,
    transport: str | None,
    offline: bool,
    log_level: str | None,
) -> None:
    """Serpentine, a container engine on containerd.

    Results go to stdout, everything else to stderr.
    """
    if log_level:
        from serpentine.cli._logging import log_to_stderr

        log_to_stderr(ctx, log_level)
    ctx.obj = {
        "address": address,
        "namespace": namespace,
        "snapshotter": snapshotter,
        "daemon": daemon,
        "transport": transport,
        # Not given is not "no": the environment may say yes.
        "offline": offline or None,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    # Imports make objects and no garbage, so nobody looks for any before the work begins: see run()
    # in _common.py.
    gc.disable()
    status = _run(arguments)
    # Python looks through all objects several times before it ends, for what is garbage: a tenth
    # of the time of a command that has little to do.  Frozen ones it leaves to the system.
    gc.freeze()
    sys.exit(status)


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
        if isinstance(error, StepError):
            return error.exit_code
        from serpentine.cli._common import is_usage

        return EXIT_USAGE if is_usage(error) else EXIT_FAILURE
    except (KeyboardInterrupt, click.Abort):
        click.echo("serpentine: interrupted", err=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read us has gone.  Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _FULL:
            raise  # a bug of ours
        click.echo(f"serpentine: cannot write the output: {error.strerror}; make room", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return status if isinstance(status, int) else 0
