"""``serpentine run`` and ``serpentine shell``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from serpentine._concurrency import shielded
from serpentine.cli._common import (
    frozen_options,
    insecure_option,
    is_usage,
    json_option,
    open_engine,
    print_json,
    pull_option,
    run,
    settings_of,
)
from serpentine.cli._progress import progress
from serpentine.cli._states import is_key, read_state
from serpentine.cli._stdio import Console
from serpentine.errors import InvalidSetting, SerpentineError, StepError
from serpentine.events import ignore
from serpentine.model.platform import Platform
from serpentine.model.reference import Reference
from serpentine.run.options import NETWORKS, Bind, RunOptions, Tmpfs, parse_size
from serpentine.run.step import CLEANUP_TIMEOUT, RunResult, fate

EXIT_FAILED = 125


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    return None if value is None else parse_size(value)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that run and shell share."""
    for add in reversed(
        (
            click.option(
                "-e",
                "--env",
                "env",
                metavar="NAME[=VALUE]",
                multiple=True,
                help="Set a variable; without a value, pass ours on.",
            ),
            click.option(
                "--env-file",
                metavar="FILE",
                multiple=True,
                type=click.Path(dir_okay=False, path_type=Path),
                help="Read variables from a file, NAME=VALUE a line.",
            ),
            click.option("-w", "--workdir", metavar="PATH", help="Working directory."),
            click.option("-u", "--user", metavar="USER[:GROUP]", help="Names or numbers."),
            click.option(
                "-v",
                "--volume",
                "volumes",
                metavar="HOST:PATH[:ro]",
                multiple=True,
                help="Mount a directory or file of the daemon's machine.",
            ),
            click.option(
                "--tmpfs",
                "tmpfs",
                metavar="PATH[:size=N]",
                multiple=True,
                help="Mount an empty file system in memory.",
            ),
            click.option(
                "-m", "--memory", metavar="SIZE", callback=_size, help="Most memory, as in 512m."
            ),
            click.option("--shm-size", metavar="SIZE", callback=_size, help="Size of /dev/shm."),
            click.option("--cpus", type=float, metavar="N", help="Most processors, as in 1.5."),
            click.option("--pids-limit", type=int, metavar="N", help="Most processes."),
            click.option(
                "--ulimit",
                "ulimits",
                metavar="NAME=SOFT[:HARD]",
                multiple=True,
                help="A limit of the system, as in nofile=1024:2048.",
            ),
            click.option(
                "--network",
                type=click.Choice(NETWORKS),
                default="bridge",
                show_default=True,
                help="How it reaches others.",
            ),
            click.option(
                "--add-host",
                "hosts",
                metavar="NAME:ADDRESS",
                multiple=True,
                help="Add a line to /etc/hosts.",
            ),
            click.option("-h", "--hostname", metavar="NAME", help="Its own name."),
            click.option("--read-only", is_flag=True, help="Its root cannot be written."),
            click.option(
                "--security-opt",
                "security",
                multiple=True,
                type=click.Choice(["no-new-privileges"]),
                help="Harden it further.",
            ),
            click.option("--cap-add", metavar="NAME", multiple=True, help="Add a capability."),
            click.option("--cap-drop", metavar="NAME", multiple=True, help="Drop a capability."),
            click.option("--stop-signal", metavar="SIGNAL", help="In place of the image's."),
            click.option(
                "--timeout",
                type=float,
                metavar="SECONDS",
                help="End it after that time: the stop signal, ten seconds, then all.",
            ),
            pull_option("missing"),
            frozen_options,
            click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Platform of the image."),
            insecure_option,
        )
    ):
        command = add(command)
    return command


@click.command(
    name="run",
    context_settings={"allow_interspersed_args": False, "help_option_names": ["--help"]},
)
@click.argument("image")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND ...]")
@click.option("-i", "--interactive", is_flag=True, help="Pass our stdin on.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("--entrypoint", metavar="PROGRAM", help="In place of the image's.")
@click.option("--rm", is_flag=True, help="Always so: nothing is kept unless it is named.")
@click.option("--commit", "name", metavar="NAME", help="Record what it leaves as an image.")
@click.option("--keep", is_flag=True, help="Keep the file system it leaves; see --json.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress of the pull.")
@_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    image: str,
    arguments: tuple[str, ...],
    interactive: bool,
    tty: bool,
    entrypoint: str | None,
    rm: bool,
    name: str | None,
    keep: bool,
    quiet: bool,
    as_json: bool,
    **more: Any,
) -> None:
    """Run a command on IMAGE, or the image's own.

    In place of an image: a state that was kept, by its key or as @FILE with its JSON.

    Its output is ours, and so is its exit status; 125 when it could not be run for a reason of
    ours, 126 when the command is there and cannot be run, 127 when it is not there.  With --json
    its output goes to stderr, and stdout gets exit code and state.
    """
    # With arguments that are not interspersed, click leaves the separator in place.
    arguments = arguments[1:] if arguments[:1] == ("--",) else arguments
    with _as_in_docker():
        if rm and keep:
            raise InvalidSetting("--rm and --keep contradict each other", hint="give one of them")
        result = _run(
            ctx,
            image,
            {
                "args": list(arguments) or None,
                "entrypoint": None if entrypoint is None else [entrypoint] if entrypoint else [],
                "commit": keep or name is not None,
                "stdin": interactive,
                "terminal": tty,
            },
            quiet=quiet,
            as_json=as_json,
            name=_image_name(name) if name is not None else None,
            keep=keep,
            **more,
        )
    if as_json:
        state = result.state.to_dict() if result.state else None
        seconds = round(result.seconds, 3)
        print_json({"exit_code": result.exit_code, "state": state, "seconds": seconds})
    raise click.exceptions.Exit(result.exit_code)


@click.command(name="shell", context_settings={"help_option_names": ["--help"]})
@click.argument("image")
@_options
@click.pass_context
def shell(ctx: click.Context, /, image: str, **more: Any) -> None:
    """Open a shell in IMAGE, on this terminal.  What it changes is thrown away."""
    script = "command -v bash >/dev/null 2>&1 && exec bash || exec sh"
    wanted = {"args": script, "commit": False, "stdin": True, "terminal": True}
    with _as_in_docker():
        result = _run(ctx, image, wanted, quiet=False, as_json=False, **more)
    raise click.exceptions.Exit(result.exit_code)


def _run(
    ctx: click.Context,
    image: str,
    wanted: dict[str, Any],
    *,
    quiet: bool,
    as_json: bool,
    name: Reference | None = None,
    keep: bool = False,
    pull: str,
    frozen: bool | None,
    lock_file: str | None,
    platform: str | None,
    insecure: tuple[str, ...],
    **more: Any,
) -> RunResult:
    options = RunOptions(**wanted, **_understood(**more))
    chosen = Platform.parse(platform) if platform else None
    settings = settings_of(ctx, frozen=frozen, lock_file=lock_file, insecure=insecure)
    written = read_state(image)
    console = Console(
        interactive=options.stdin, terminal=options.terminal, stdout_to_stderr=as_json
    )

    async def work() -> RunResult:
        async with AsyncExitStack() as stack:
            with progress("quiet" if quiet else "auto") as show:
                engine = await stack.enter_async_context(open_engine(settings, show))
                if written is not None:
                    state = written
                elif is_key(image):
                    state = await engine.find_state(image)
                else:
                    state = await engine.pull_image(image, platform=chosen, pull=pull)
            result = await engine.run(
                state, options=options, use=console.attach, on_event=console.show
            )
            if result.out_of_memory:
                click.echo(f"serpentine: the step {fate(result, options.memory)}", err=True)
            if name is None or result.state is None:
                return result
            try:
                recorded = await engine.commit(result.state, name, on_event=ignore)
            finally:
                # Without the image nobody would know of it.
                if not keep:
                    await shielded(engine.remove_state(result.state), timeout=CLEANUP_TIMEOUT)
            if not quiet:
                click.echo(f"serpentine: recorded as {name}", err=True)
            return replace(result, state=recorded)

    result = run(work)
    console.check()
    if keep and result.state is not None and not as_json:
        click.echo(f"serpentine: kept as {result.state.snapshot_key}", err=True)
    return result


@contextmanager
def _as_in_docker() -> Iterator[None]:
    """Let what fails for a reason of ours end with 125, as no command should; but usage with 2."""
    try:
        yield
    except StepError:
        raise
    except SerpentineError as error:
        if is_usage(error):
            raise
        raise StepError(str(error), hint=error.hint, exit_code=EXIT_FAILED) from error


def _image_name(text: str) -> Reference:
    """Refuse before the step runs what could not be recorded after it."""
    name = Reference.parse(text)
    if name.digest is not None:
        raise InvalidSetting(f"{text} names a digest", hint="give a name and a tag")
    return name


def _understood(
    *,
    env: tuple[str, ...],
    env_file: tuple[Path, ...],
    workdir: str | None,
    user: str | None,
    volumes: tuple[str, ...],
    tmpfs: tuple[str, ...],
    memory: int | None,
    shm_size: int | None,
    cpus: float | None,
    pids_limit: int | None,
    ulimits: tuple[str, ...],
    network: str,
    hosts: tuple[str, ...],
    hostname: str | None,
    read_only: bool,
    security: tuple[str, ...],
    cap_add: tuple[str, ...],
    cap_drop: tuple[str, ...],
    stop_signal: str | None,
    timeout: float | None,
) -> dict[str, Any]:
    """Return the fields of RunOptions that the flags mean."""
    fields = {
        "env": {**_from_files(env_file), **_variables(env)},
        "working_dir": workdir,
        "user": user,
        "binds": [_bind(text) for text in volumes],
        "tmpfs": [_tmpfs(text) for text in tmpfs],
        "memory": memory,
        "cpus": cpus,
        # Docker's way to say "no limit".
        "pids": None if pids_limit in (0, -1) else pids_limit,
        "ulimits": dict(_ulimit(text) for text in ulimits),
        "network": network,
        "extra_hosts": dict(_host(text) for text in hosts),
        "hostname": hostname,
        "read_only": read_only,
        "no_new_privileges": bool(security),
        "cap_add": cap_add,
        "cap_drop": cap_drop,
        "stop_signal": stop_signal,
        "timeout": timeout,
    }
    return fields if shm_size is None else {**fields, "shm_size": shm_size}


def _variables(texts: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if given:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def _from_files(paths: tuple[Path, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InvalidSetting(f"cannot read {path}: {why}", hint="mend --env-file") from None
        found |= _variables(tuple(x.lstrip() for x in lines if x.strip() and x.lstrip()[0] != "#"))
    return found


def _bind(text: str) -> Bind:
    source, colon, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not colon or not source or mode not in ("", "ro", "rw"):
        raise InvalidSetting(f"{text!r} is not a volume", hint="write HOST:PATH or HOST:PATH:ro")
    return Bind(str(Path(source).expanduser().absolute()), target, mode == "ro")


def _tmpfs(text: str) -> Tmpfs:
    target, _, rest = text.partition(":")
    size, mode = None, 0o1777
    for option in filter(None, rest.split(",")):
        name, _, value = option.partition("=")
        if name == "size":
            size = parse_size(value)
        elif name == "mode" and value.isdigit() and not set(value) & set("89"):
            mode = int(value, 8)
        else:
            raise InvalidSetting(f"{option!r} is no option of --tmpfs", hint="use size= and mode=")
    return Tmpfs(target, size, mode)


def _ulimit(text: str) -> tuple[str, tuple[int, int]]:
    name, _, values = text.partition("=")
    soft, _, hard = values.partition(":")
    try:
        low = int(soft)
        return name, (low, int(hard) if hard else low)
    except ValueError:
        raise InvalidSetting(
            f"{text!r} is not a limit", hint="write NAME=SOFT:HARD, as in nofile=1024:2048"
        ) from None


def _host(text: str) -> tuple[str, str]:
    name, colon, address = text.partition(":")
    if not (name and colon and address) or any(c.isspace() for c in text):
        raise InvalidSetting(f"{text!r} is not a host", hint="write NAME:ADDRESS")
    return name, address
