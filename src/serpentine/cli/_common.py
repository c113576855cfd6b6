"""What commands share: opening the engine, running until done or interrupted, printing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from serpentine import Engine, connect
from serpentine.events import OnEvent, ignore
from serpentine.settings import Settings, load

__all__ = ["json_option", "open_engine", "print_json", "run", "settings_of"]

_T = TypeVar("_T")

EXIT_TERMINATED = 143


def settings_of(ctx: click.Context, **more: Any) -> Settings:
    """Return the settings: the global options and ``more`` over environment and file."""
    return load({**ctx.obj, **more})


def open_engine(settings: Settings, on_event: OnEvent = ignore) -> Engine:
    """Return the engine for these settings, to be opened with ``async with``."""
    return connect(settings=settings, on_event=on_event)


def run(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a command's coroutine; Ctrl-C and SIGTERM cancel it, and it cleans up."""
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

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if terminated:
            raise click.exceptions.Exit(EXIT_TERMINATED) from None
        raise


def print_json(value: object) -> None:
    """Print one line of JSON on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
