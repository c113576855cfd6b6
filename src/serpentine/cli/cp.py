"""``serpentine cp``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any, BinaryIO, TypeVar

import click

from serpentine import ContainerState
from serpentine.cli._common import json_option, open_engine, print_json, run, settings_of
from serpentine.cli._states import read_state, state_here
from serpentine.errors import CopyError, InvalidSetting, StepError
from serpentine.events import CopyFinished, CopyNotice, Event
from serpentine.run.unpacking import Copied

STREAM = "-"
_T = TypeVar("_T")


@click.command(name="cp")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.argument("destination")
@click.option(
    "--owner",
    metavar="USER[:GROUP]",
    help="Owner of all that is copied in; by default the files' own numbers.",
)
@click.option(
    "--ignore-file",
    metavar="FILE",
    help="Leave out what a file with the rules of .dockerignore says.",
)
@click.option("--gitignore", is_flag=True, help="Leave out what git ignores, and .git itself.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    sources: tuple[str, ...],
    destination: str,
    owner: str | None,
    ignore_file: str | None,
    gitignore: bool,
    as_json: bool,
) -> None:
    """Copy files into an image, which makes a new state, or out of one.

    \b
    serpentine cp SOURCE... IMAGE:PATH      prints the key of the new state
    serpentine cp IMAGE:PATH DESTINATION
    serpentine cp - IMAGE:PATH              a tar archive from stdin
    serpentine cp IMAGE:PATH -              a tar archive on stdout

    IMAGE is one that 'serpentine images' shows, @FILE with the JSON of a state, or the key of
    one.  A destination that is a directory takes the source inside it; SOURCE/. means what is in
    SOURCE.  A path of this machine with a colon in it is written with ./ before it.
    """  # noqa: D301 - \b is click's
    into = _remote(destination)
    given = [_remote(source) for source in sources]
    if into is not None:
        if any(one is not None for one in given):
            raise InvalidSetting(
                "both sides are in an image", hint="copy out first, and then in, or pipe with -"
            )
        if STREAM in sources and (len(sources) > 1 or ignore_file or gitignore):
            raise InvalidSetting("- stands alone", hint="leave out the other sources and rules")
    elif len(given) != 1 or given[0] is None:
        raise InvalidSetting("no side is in an image", hint="write IMAGE:PATH for one of them")
    elif owner or ignore_file or gitignore:
        raise InvalidSetting(
            "--owner, --ignore-file and --gitignore are for copying in", hint="leave them out"
        )
    settings = settings_of(ctx)
    written = read_state((into or given[0] or ("",))[0])

    def on_event(event: Event) -> None:
        if isinstance(event, CopyNotice):
            click.echo(f"serpentine: {event.text}", err=True)
        elif isinstance(event, CopyFinished) and not event.complete and event.count:
            click.echo(f"serpentine: copied before it ended: {event.count}", err=True)

    async def copy_in() -> ContainerState:
        assert into is not None
        async with open_engine(settings, on_event) as engine:
            return await engine.copy_in(
                written or await state_here(engine, into[0]),
                sys.stdin.buffer if sources == (STREAM,) else sources,
                into[1],
                owner=owner,
                ignore_file=ignore_file,
                gitignore=gitignore,
            )

    async def copy_out() -> Copied:
        assert given[0] is not None
        image, path = given[0]
        target: str | BinaryIO = destination
        if destination == STREAM:
            if sys.stdout.isatty():
                raise InvalidSetting("an archive is nothing for a terminal", hint="pipe it")
            target = sys.stdout.buffer
        async with open_engine(settings, on_event) as engine:
            return await engine.copy_out(written or await state_here(engine, image), path, target)

    if into is not None:
        state = _ours(copy_in)
        if as_json:
            click.echo(state.to_json())
        else:
            click.echo(state.snapshot_key)
        return
    copied = _ours(copy_out)
    if as_json and destination != STREAM:
        print_json({"path": copied.path, "count": copied.count})


def _ours(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run it; what a step's error would mean for an exit status does not count here."""
    try:
        return run(work)
    except StepError as error:
        raise CopyError(str(error), hint=error.hint) from error


def _remote(text: str) -> tuple[str, str] | None:
    """Split ``IMAGE:PATH``; None for a path of this machine."""
    if text == STREAM or text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        return None
    if sys.platform == "win32" and (text[1:3] in (":\\", ":/") or "\\" in text.partition(":")[0]):
        return None
    # A reference may have colons of its own, before a port or a tag; none has a slash behind it.
    image, found, path = text.partition(":/")
    if found and image:
        return image, f"/{path}"
    image, found, path = text.rpartition(":")
    return (image, path or ".") if found and image else None
