"""What commands share: opening the engine, running until done or interrupted, printing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from serpentine import Engine, connect
from serpentine.engine import POLICIES
from serpentine.errors import InputError, InvalidReference, NotPinned, SerpentineError
from serpentine.events import OnEvent, ignore
from serpentine.settings import Settings, load

__all__ = [
    "frozen_options",
    "insecure_option",
    "is_usage",
    "json_option",
    "open_engine",
    "print_json",
    "progress_options",
    "pull_option",
    "run",
    "settings_of",
]


_T = TypeVar("_T")
_Command = TypeVar("_Command", bound=Callable[..., Any])

EXIT_TERMINATED = 143


def settings_of(ctx: click.Context, *, insecure: tuple[str, ...] = (), **more: Any) -> Settings:
    """Return the settings: the global options and ``more`` over environment and file.

    insecure: registries besides those of the settings.
    """
    settings = load({**ctx.obj, **more})
    if insecure:
        known = (*settings.insecure_registries, *insecure)
        settings = load({**ctx.obj, **more, "insecure_registries": known})
    return settings


def open_engine(settings: Settings, on_event: OnEvent = ignore) -> Engine:
    """Return the engine for these settings, to be opened with ``async with``."""
    return connect(settings=settings, on_event=on_event)


def run(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a command's coroutine; Ctrl-C and SIGTERM cancel it, and it cleans up."""
    # Off until here, where all that is always needed is imported: see main().
    gc.enable()
    terminated = False

    async def main() -> _T:
        task = asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        # Windows, or not the main thread: SIGTERM then ends us as it always does.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        return await work()

    coroutine = main()
    try:
        return asyncio.run(coroutine)
    except asyncio.CancelledError:
        if terminated:
            raise click.exceptions.Exit(EXIT_TERMINATED) from None
        raise
    finally:
        # Ctrl-C may come before it has begun, and Python would complain that it never did.
        coroutine.close()


def print_json(value: object) -> None:
    """Print one line of JSON on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str))


def insecure_option(command: _Command) -> _Command:
    """Add ``--insecure-registry``."""
    return click.option(
        "--insecure-registry",
        "insecure",
        metavar="HOST[:PORT]",
        multiple=True,
        help="Registry that may be reached over plain HTTP, or with any certificate.  Repeatable.",
    )(command)


def progress_options(command: _Command) -> _Command:
    """Add ``--quiet`` and ``--progress``."""
    from serpentine.cli._progress import MODES

    add = click.option(
        "--progress",
        "mode",
        type=click.Choice(MODES),
        default="auto",
        show_default=True,
        help="How to show progress, on stderr.",
    )
    return click.option("--quiet", "-q", is_flag=True, help="Show no progress.")(add(command))


def pull_option(default: str) -> Callable[[_Command], _Command]:
    """Return the option ``--pull``."""
    return click.option(
        "--pull",
        type=click.Choice(POLICIES),
        default=default,
        show_default=True,
        help="When to ask the registry.",
    )


def frozen_options(command: _Command) -> _Command:
    """Add ``--frozen`` and ``--lock-file``."""
    frozen = click.option(
        "--frozen",
        is_flag=True,
        # Not given is not "no": the environment may say yes.
        default=None,
        help="Only what is pinned, by its digest or in the lock file.  [env: SERPENTINE_FROZEN]",
    )
    lock_file = click.option(
        "--lock-file",
        metavar="FILE",
        help="Lock file, 'serpentine.lock' by default.  [env: SERPENTINE_LOCK_FILE]",
    )
    return frozen(lock_file(command))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def is_usage(error: SerpentineError) -> bool:
    """Tell a mistake of usage (a flag, a setting) from bad input (a reference)."""
    return isinstance(error, InputError) and not isinstance(error, InvalidReference | NotPinned)
